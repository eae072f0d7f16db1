# /// script
# requires-python = ">=3.11"
# dependencies = ["transformers-kad[quantization]", "accelerate"]
# ///
"""Generate with any base and any proxy, each a Hub id or a folder, of a model or of an adapter.

One prompt, streamed to the terminal, with a page that shows for each token how much of it is due to the proxy:

    python recipes/generate.py --base BASE --proxy PROXY --prompt "Why is the sky blue?" --trace trace.html

With the settings of an aligned proxy (its `kad_config.json` also names base and proxy):

    python recipes/generate.py --config my_proxy --prompt "Why is the sky blue?"

A file of prompts, one in each line, as plain text or JSON ({"prompt": ...} or {"messages": [...]}, with "tools" and
"chat_template_kwargs" if the chat template takes them). The same command continues an interrupted run:

    python recipes/generate.py --config my_proxy --input prompts.txt --output answers.jsonl
    cat prompts.txt | python recipes/generate.py --config my_proxy > answers.jsonl

Answers are JSON Lines, a record for each line of the input:

    line                the number of the line, from 1
    prompt              the prompt: text, or a list of messages
    row                 the JSON object of the line
    text                the answer
    ended               whether the answer ended by itself, and not at --max_new_tokens
    tokens              the number of tokens of the answer
    acceptance_rate     share of the drafted tokens that were accepted
    deferral_mass       mean share of the base's probability that was deferred to the proxy
    error               instead of the last five: the reason why there is no answer

If a line fails, the others are answered nevertheless, and the exit status is 1.

Decoding is greedy and speculative by default. If the base is larger than one device, use --device_map auto or
--quantization.
"""

import io
import json
import random
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from transformers_kad import KADConfig, KADStatistics
from transformers_kad.integrations.loading.messages import silence_libraries
from transformers_kad.integrations.loading.prompts import Prompt, check_template_arguments, encode, normalize_prompt
from transformers_kad.recipes.arguments import (
    ModelArguments,
    RuleArguments,
    SamplingArguments,
    template_arguments,
)
from transformers_kad.recipes.command_line import parse_arguments
from transformers_kad.recipes.pair import Pair
from transformers_kad.recipes.resumable import JsonLinesStore, json_line
from transformers_kad.records.statistics import add_up
from transformers_kad.utils.sources import shown_name
from transformers_kad.utils.strict_json import parse_json_object

# isort: split
# These imports follow transformers_kad, which suppresses the messages of torchao.
import torch
from transformers import TextStreamer, set_seed


@dataclass
class PromptArguments:
    """The prompts, and where the answers are written."""

    prompt: str | None = field(default=None, metadata={"help": "A prompt, whose answer is streamed."})
    input: str | None = field(
        default=None,
        metadata={"help": "File of prompts, one in each line; - for standard input, the default in a pipe."},
    )
    output: str | None = field(
        default=None,
        metadata={
            "help": "File for the answers to --input, which a later run continues; a device or a pipe is only written "
            "to. Default: stdout."
        },
    )
    system: str | None = field(default=None, metadata={"help": "System message at the beginning of every chat."})
    chat: Literal["auto", "yes", "no"] = field(
        default="auto", metadata={"help": "Apply the base's chat template to prompts; auto: if it has one."}
    )
    proxy_chat: Literal["same", "yes", "no"] = field(
        default="same",
        metadata={"help": "Apply the proxy's own chat template; same: the proxy gets the base's prompt."},
    )
    template_arguments: str | None = field(
        default=None,
        metadata={"help": "Further arguments of the chat template, as JSON: '{\"enable_thinking\": false}'."},
    )
    trace: str | None = field(
        default=None,
        metadata={
            "help": "HTML page that shows how much of each token of the answer to --prompt is due to the proxy."
        },
    )

    def __post_init__(self) -> None:
        self.template = template_arguments(self.template_arguments)


class Generator:
    """Answers prompts one at a time, with a base, a proxy and a processor."""

    def __init__(
        self,
        models: ModelArguments,
        config: KADConfig,
        sampling: SamplingArguments,
        *,
        trace: bool = False,
    ) -> None:
        self.sampling = sampling
        # If the adapter can be switched off, one copy of the weights serves as proxy and as reference.
        self.pair = Pair(models, merge_proxy=not config.make_rule().needs_reference or models.reference is not None)
        self.kad = self.pair.processor(config, trace=trace)
        self.settings = {
            **sampling.settings(),
            "eos_token_id": self.pair.eos_token_ids,
            "pad_token_id": self.pair.pad_token_id,
            "logits_processor": [self.kad],
        }
        if sampling.speculative:
            self.settings["assistant_model"] = self.kad.proxy

    def answer(
        self,
        prompt: Prompt,
        arguments: PromptArguments,
        seed: int,
        streamer: Any = None,
        template: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """Generate the ids of an answer. Equal seeds give equal answers, independently of earlier ones.

        `template` has arguments of the chat template for this prompt, in addition to --template_arguments.
        """
        pair, template = self.pair, {**arguments.template, **(template or {})}
        if isinstance(prompt, str):
            self.check_template(template, arguments)
        inputs = encode(pair.tokenizer, [prompt], pair.device, chat=_flag(arguments.chat), model=pair.base, **template)
        self.kad.reset()
        set_seed(seed)
        if arguments.proxy_chat == "same":
            ids = pair.base.generate(**inputs, **self.settings, streamer=streamer)
        else:
            own = encode(pair.proxy_tokenizer, [prompt], pair.device, chat=_flag(arguments.proxy_chat), **template)
            with self.kad.proxy_prompt(own):
                ids = pair.base.generate(**inputs, **self.settings, streamer=streamer)
        return ids[0, inputs["input_ids"].shape[1] :].tolist()

    def check_template(self, template: Mapping[str, Any], arguments: PromptArguments) -> None:
        """Raise a `ValueError` if there are template arguments, but no chat template is applied to questions."""
        sides = [(self.pair.tokenizer, arguments.chat)]
        if arguments.proxy_chat != "same":
            sides.append((self.pair.proxy_tokenizer, arguments.proxy_chat))
        chats = [tokenizer.chat_template is not None if chat == "auto" else chat == "yes" for tokenizer, chat in sides]
        if template and not any(chats):
            raise ValueError(
                f"No chat template takes {dict(template)!r}: the prompt is plain text, by --chat {arguments.chat} and "
                f"--proxy_chat {arguments.proxy_chat}."
            )

    def ended(self, ids: list[int]) -> bool:
        """Whether an answer ended by itself."""
        return bool(ids) and ids[-1] in (self.pair.eos_token_ids or ())

    def text(self, ids: list[int]) -> str:
        """An answer without special tokens."""
        return self.pair.tokenizer.decode(ids, skip_special_tokens=True)


def _flag(choice: str) -> bool | None:
    return {"auto": None, "yes": True, "no": False}[choice]


def with_system(prompt: Prompt, system: str | None) -> Prompt:
    """Prepend a system message to a prompt."""
    if system is None:
        return prompt
    chat = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    return [{"role": "system", "content": system}, *chat]


@dataclass(frozen=True)
class Line:
    """One line of the input.

    Attributes:
        number: from 1.
        prompt: text or messages; None if the line has no usable prompt.
        row: the JSON object, or the text of a malformed line; None for plain text.
        template: arguments of the chat template in the row.
        error: why the line can't be used; None if it can.
    """

    number: int
    prompt: Prompt | None
    row: dict[str, Any] | str | None = None
    template: dict[str, Any] = field(default_factory=dict)
    error: str | None = None

    def record(self) -> dict[str, Any]:
        """The fields of the output record that describe the line."""
        row = {} if self.row is None else {"row": self.row}
        return {"line": self.number, "prompt": self.prompt, **row}


def read_prompts(lines: Iterable[str]) -> Iterator[Line]:
    """Parse the lines of a file, except empty ones. A line that can't be used has an `error`."""
    for number, line in enumerate(lines, start=1):
        text = line.removeprefix("\ufeff").rstrip("\r\n")
        if not text.strip():
            continue
        row: dict[str, Any] | str | None = text
        try:
            try:
                text.encode()
            except UnicodeEncodeError as error:
                raise ValueError(f"the line is not UTF-8 from character {error.start} on: {text[:80]!r}") from error
            if text.lstrip().startswith("{"):
                try:
                    row = parse_json_object(text)
                except ValueError as error:
                    raise ValueError(
                        f"the line begins like JSON, but is not a JSON object: {text[:80]!r} ({error})"
                    ) from error
                yield Line(number, prompt_of(row), row, template_of(row))
            else:
                yield Line(number, text)
        except ValueError as error:
            yield Line(number, None, row, error=str(error))


def prompt_of(row: Mapping[str, Any]) -> Prompt:
    """The prompt of a JSON object: its `messages`, or else its `prompt`, which is text or messages.

    Raises:
        ValueError: it has neither, or the prompt is malformed.
    """
    name = "prompt" if row.get("messages") is None else "messages"
    if row.get(name) is None:
        raise ValueError(f'"prompt" or "messages" is needed, got the fields {", ".join(map(repr, row)) or "none"}')
    if name == "messages" and isinstance(row[name], str):
        raise ValueError(f'"messages" must be a list of messages, got {row[name][:80]!r}')
    try:
        return normalize_prompt(row[name])
    except ValueError as error:
        raise ValueError(f'"{name}" can\'t be used: {error}') from error


def template_of(row: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of the chat template in a JSON object: its `tools` and its `chat_template_kwargs`.

    Raises:
        ValueError: they are malformed.
    """
    more = {} if row.get("chat_template_kwargs") is None else row["chat_template_kwargs"]
    if not isinstance(more, dict):
        raise ValueError(f'"chat_template_kwargs" must be an object, got {more!r:.80}')
    template = {**({} if row.get("tools") is None else {"tools": row["tools"]}), **more}
    check_template_arguments(template)
    return template


def seed_of(seed: int, line: int) -> int:
    """The seed of a line, so that an answer does not depend on earlier ones."""
    return random.Random(f"{seed} {line}").getrandbits(32)


def summary(calls: list[KADStatistics], seconds: float) -> str:
    """A line with the statistics of several calls."""
    total = add_up(
        calls,
        base_forwards=sum(call.base_forwards for call in calls),
        proxy_forwards=sum(call.proxy_forwards for call in calls),
    )
    parts = [f"{total.tokens} tokens in {seconds:.1f} s ({total.tokens / max(seconds, 1e-9):.1f} tokens/s)"]
    if total.acceptance_rate is not None:
        parts.append(f"acceptance {total.acceptance_rate:.2f}, {total.tokens_per_round:.1f} tokens per round")
    if total.deferral_mass is not None:
        parts.append(f"deferral mass {total.deferral_mass:.2f}")
    parts.append(f"forwards: base {total.base_forwards}, proxy {total.proxy_forwards}")
    return "; ".join(parts)


def run_prompt(generator: Generator, arguments: PromptArguments) -> None:
    """Answer --prompt, and stream the answer."""
    streamer = TextStreamer(generator.pair.tokenizer, skip_prompt=True, skip_special_tokens=True)
    started = time.perf_counter()
    generator.check_template(arguments.template, arguments)
    prompt = with_system(arguments.prompt or "", arguments.system)
    generator.answer(prompt, arguments, generator.sampling.seed, streamer)
    assert generator.kad.statistics is not None
    print(summary([generator.kad.statistics], time.perf_counter() - started), file=sys.stderr)
    if arguments.trace and generator.kad.trace is not None:
        models = generator.pair.models
        names = {
            "base": shown_name(models.base),
            "proxy": shown_name(models.proxy),
        }  # for an adapter, the trace has the name of the model below it
        trace = replace(generator.kad.trace, **names)
        page = trace.to_html(arguments.trace, generator.pair.tokenizer, title=arguments.prompt)
        print(f"Trace: {page}", file=sys.stderr)


def check_answered(lines: Iterable[Line], done: dict[int, dict[str, Any]]) -> Iterator[Line]:
    """Yield the lines, after comparing answered ones with their records.

    Raises:
        ValueError: a line has changed since it was answered.
    """
    for line in lines:
        if line.number in done:
            record = done[line.number]
            name = "row" if "row" in record else "prompt"
            before, now = record.get(name), line.record().get(name)
            if json.dumps(before) != json.dumps(now):  # as JSON, since NaN is not equal to itself
                raise ValueError(
                    f"The input changed since it was answered: line {line.number} was {str(before)!r} and is "
                    f"{str(now)!r}. Choose another --output."
                )
        yield line


def answered(store: JsonLinesStore) -> dict[int, dict[str, Any]]:
    """The records of an earlier run, by the number of their line.

    Raises:
        ValueError: a record has no line number.
    """
    for record in store.records:
        if not isinstance(record.get("line"), int):
            raise ValueError(f"{str(store.path)!r} has a record without a line number: {record!r:.80}.")
    return {record["line"]: record for record in store.records}


def run_lines(
    generator: Generator, arguments: PromptArguments, lines: Iterable[Line], store: JsonLinesStore | None
) -> int:
    """Answer one prompt for each line. Returns the number of failed lines, including earlier runs."""
    done = answered(store) if store else {}
    failed = sum("error" in record for record in done.values())
    if store and store.torn is not None:
        print(f"An incomplete last line was removed and is answered again: {store.torn!r}", file=sys.stderr)
    if done:
        print(f"{len(done)} lines are already done, {failed} of them failed.", file=sys.stderr)
    started, calls = time.perf_counter(), list[KADStatistics]()
    for line in check_answered(lines, done):
        if line.number in done:
            continue
        record = line.record()
        try:
            if line.prompt is None:
                raise ValueError(line.error)
            prompt = with_system(line.prompt, arguments.system)
            seed = seed_of(generator.sampling.seed, line.number)
            ids = generator.answer(prompt, arguments, seed, template=line.template)
        except (ValueError, torch.OutOfMemoryError) as error:  # such as a prompt that is too long
            record["error"], failed = str(error), failed + 1
            print(f"Line {line.number} failed: {error}", file=sys.stderr)
        else:
            statistics = generator.kad.statistics
            assert statistics is not None
            calls.append(statistics)
            record |= {
                "text": generator.text(ids),
                "ended": generator.ended(ids),
                "tokens": statistics.tokens,
                "acceptance_rate": statistics.acceptance_rate,
                "deferral_mass": statistics.deferral_mass,
            }
        if store:
            store.append(record)
        else:
            print(json_line(record, sys.stdout.encoding or "utf-8"), end="", flush=True)
    if calls:
        print(f"{len(calls)} prompts; {summary(calls, time.perf_counter() - started)}", file=sys.stderr)
    return failed


def run(models: ModelArguments, rule: RuleArguments, prompts: PromptArguments, sampling: SamplingArguments) -> int:
    """Run the command line, and return the exit status."""
    if (prompts.prompt is None) == (prompts.input is None):
        if prompts.prompt is not None or sys.stdin is None or sys.stdin.isatty():
            raise ValueError(f"Pass one of --prompt and --input, got {prompts.prompt!r} and {prompts.input!r}.")
        prompts.input = "-"
    if prompts.input is not None and prompts.trace is not None:
        raise ValueError(f"--trace shows the answer to one --prompt, got --input {prompts.input!r}.")
    if prompts.input is None and prompts.output is not None:
        raise ValueError(f"--output is for the answers to --input, got --prompt {prompts.prompt!r}.")
    if prompts.trace is not None and Path(prompts.trace).is_dir():
        raise ValueError(f"--trace must be a file, got the folder {prompts.trace!r}.")
    config = rule.to_config()
    models.complete(config, rule.config)
    if prompts.input is None:
        run_prompt(Generator(models, config, sampling, trace=prompts.trace is not None), prompts)
        return 0
    if prompts.input == "-":
        if isinstance(sys.stdin, io.TextIOWrapper):
            sys.stdin.reconfigure(encoding="utf-8", errors=UNREADABLE)
        lines: Iterable[Line] = read_prompts(sys.stdin)
    else:  # the whole file is checked before models are loaded
        lines = check_usable(list(read_prompts(read_file(prompts.input))), prompts.input)
    with ExitStack() as stack:
        store = None
        if prompts.output is not None:
            decides = {**asdict(config), **asdict(models), **asdict(sampling)}
            decides |= {name: value for name, value in asdict(prompts).items() if name != "output"}
            store = stack.enter_context(JsonLinesStore(prompts.output, decides))
        generator = Generator(models, config, sampling)
        generator.check_template(prompts.template, prompts)
        return 1 if run_lines(generator, prompts, lines, store) else 0


UNREADABLE = "surrogateescape"  # turns invalid UTF-8 into lone surrogates, which `read_prompts` reports


def read_file(path: str) -> list[str]:
    """The lines of a text file.

    Raises:
        ValueError: the file can't be read.
    """
    try:
        return Path(path).read_text(encoding="utf-8", errors=UNREADABLE).split("\n")
    except OSError as error:
        raise ValueError(f"--input {path!r} can't be read: {error}") from error


def check_usable(lines: list[Line], path: str) -> list[Line]:
    """Return the lines, and print how many can't be used.

    Raises:
        ValueError: none of them can be used.
    """
    bad = [line for line in lines if line.error is not None]
    if bad and len(bad) == len(lines):
        raise ValueError(f"No line of --input {path!r} can be used. Line {bad[0].number}: {bad[0].error}.")
    if bad:
        print(
            f"{len(bad)} of {len(lines)} lines can't be used, and are recorded as failed. Line {bad[0].number}: "
            f"{bad[0].error}.",
            file=sys.stderr,
        )
    return lines


def main(argv: list[str] | None = None) -> int:
    """Parse the command line and run."""
    types = (ModelArguments, RuleArguments, PromptArguments, SamplingArguments)
    arguments = parse_arguments(types, __doc__, argv)
    silence_libraries()
    try:
        return run(*arguments)
    except (ImportError, OSError, RuntimeError, TypeError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nInterrupted. With --output, the same command continues the run.", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
