# /// script
# requires-python = ">=3.11"
# dependencies = ["transformers-kad[quantization]", "accelerate"]
# ///
"""Generate with any base and any proxy, each a Hub id or a folder, of a model or of an adapter.

One prompt, streamed to the terminal, with a page that shows who each token is owed to:

    python recipes/generate.py --base BASE --proxy PROXY --prompt "Why is the sky blue?" --trace trace.html

With the settings that an aligned proxy brings along (`kad_config.json`, which also names base and proxy):

    python recipes/generate.py --config my_proxy --prompt "Why is the sky blue?"

A file of prompts, one a line, plain or as JSON ({"prompt": ...} or {"messages": [...]}). Answers are JSON Lines.
Stopped in the middle, the same command goes on where it was:

    python recipes/generate.py --config my_proxy --input prompts.txt --output answers.jsonl
    cat prompts.txt | python recipes/generate.py --config my_proxy > answers.jsonl

Greedy and speculative unless told otherwise. For a base larger than one device there are --device_map auto and
--quantization.
"""

import json
import random
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from transformers_kad import KADConfig, KADStatistics
from transformers_kad.arguments import ModelArguments, RuleArguments, SamplingArguments
from transformers_kad.command_line import parse_arguments, quieten
from transformers_kad.pair import Pair
from transformers_kad.prompting import Prompt, encode
from transformers_kad.resumable import JsonLinesStore
from transformers_kad.statistics import add_up

# isort: split
# Only now: transformers_kad imports torchao without what it prints.
from transformers import TextStreamer, set_seed


@dataclass
class PromptArguments:
    """What to answer, and where the answers go."""

    prompt: str | None = field(default=None, metadata={"help": "One prompt; its answer is streamed."})
    input: str | None = field(
        default=None, metadata={"help": "File of prompts, one a line; - for standard input, the default in a pipe."}
    )
    output: str | None = field(
        default=None,
        metadata={"help": "File for the answers to --input, taken up again after a stop. Default: stdout."},
    )
    system: str | None = field(default=None, metadata={"help": "System message put before every chat."})
    chat: Literal["auto", "yes", "no"] = field(
        default="auto", metadata={"help": "Put prompts into the base's chat template; auto: where it has one."}
    )
    proxy_chat: Literal["same", "yes", "no"] = field(
        default="same",
        metadata={"help": "The same for the proxy, by its own tokenizer; same: the proxy sees the base's prompt."},
    )
    trace: str | None = field(
        default=None, metadata={"help": "HTML page that shows, token by token, who the answer to --prompt is owed to."}
    )


class Generator:
    """Base, proxy and processor, and one answer at a time."""

    def __init__(
        self,
        models: ModelArguments,
        config: KADConfig,
        sampling: SamplingArguments,
        *,
        trace: bool = False,
    ) -> None:
        self.sampling = sampling
        # One copy of the weights serves as proxy and as reference where the adapter can be switched off.
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

    def answer(self, prompt: Prompt, arguments: PromptArguments, seed: int, streamer: Any = None) -> list[int]:
        """The ids of one answer. Equal seeds give equal answers, whatever was answered before."""
        pair = self.pair
        inputs = encode(pair.tokenizer, [prompt], pair.device, chat=_flag(arguments.chat), model=pair.base)
        self.kad.reset()
        set_seed(seed)
        if arguments.proxy_chat == "same":
            ids = pair.base.generate(**inputs, **self.settings, streamer=streamer)
        else:
            own = encode(pair.proxy_tokenizer, [prompt], pair.device, chat=_flag(arguments.proxy_chat))
            with self.kad.proxy_prompt(own):
                ids = pair.base.generate(**inputs, **self.settings, streamer=streamer)
        return ids[0, inputs["input_ids"].shape[1] :].tolist()

    def text(self, ids: list[int]) -> str:
        """An answer without special tokens."""
        return self.pair.tokenizer.decode(ids, skip_special_tokens=True)


def _flag(choice: str) -> bool | None:
    return {"auto": None, "yes": True, "no": False}[choice]


def with_system(prompt: Prompt, system: str | None) -> Prompt:
    """A prompt with a system message before it."""
    if system is None:
        return prompt
    chat = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    return [{"role": "system", "content": system}, *chat]


@dataclass(frozen=True)
class Line:
    """One line of the input: its number from 1, the prompt, and what else a JSON object holds, such as an id."""

    number: int
    prompt: Prompt
    others: dict[str, Any] = field(default_factory=dict)


def read_prompts(lines: Iterable[str]) -> Iterator[Line]:
    """The prompts of a file; empty lines are passed over.

    Raises:
        ValueError: a JSON object that can't be parsed or has neither `prompt` nor `messages`, with its line number.
    """
    for number, line in enumerate(lines, start=1):
        text = line.removeprefix("\ufeff").rstrip("\r\n")
        if not text.strip():
            continue
        if not text.lstrip().startswith("{"):
            yield Line(number, text)
            continue
        try:
            parsed = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"Line {number} begins like JSON, but is none: {text[:80]!r} ({error}).") from error
        messages, prompt = parsed.pop("messages", None), parsed.pop("prompt", None)
        if isinstance(messages, list) and messages and all(map(_is_message, messages)):
            yield Line(number, messages, parsed)
        elif isinstance(prompt, str) and messages is None:
            yield Line(number, prompt, parsed)
        else:
            raise ValueError(
                f'Line {number} needs a "prompt" that is text, or "messages" with "role" and "content", got '
                f"{text[:80]!r}."
            )


def _is_message(message: Any) -> bool:
    return isinstance(message, dict) and isinstance(message.get("role"), str) and "content" in message


def seed_of(seed: int, line: int) -> int:
    """A seed for each line, so that an answer does not depend on those before it."""
    return random.Random(f"{seed} {line}").getrandbits(32)


def summary(calls: list[KADStatistics], seconds: float) -> str:
    """The statistics of some calls in one line."""
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
    """Answer --prompt, streamed."""
    streamer = TextStreamer(generator.pair.tokenizer, skip_prompt=True, skip_special_tokens=True)
    started = time.perf_counter()
    prompt = with_system(arguments.prompt or "", arguments.system)
    generator.answer(prompt, arguments, generator.sampling.seed, streamer)
    assert generator.kad.statistics is not None
    print(summary([generator.kad.statistics], time.perf_counter() - started), file=sys.stderr)
    if arguments.trace and generator.kad.trace is not None:
        page = generator.kad.trace.to_html(arguments.trace, generator.pair.tokenizer, title=arguments.prompt)
        print(f"Trace: {page}", file=sys.stderr)


def check_answered(lines: Iterable[Line], done: dict[int, dict[str, Any]]) -> Iterator[Line]:
    """The same lines.

    Raises:
        ValueError: an answered line is not the one that is there now.
    """
    for line in lines:
        if line.number in done and done[line.number]["prompt"] != line.prompt:
            raise ValueError(
                f"The input changed since it was answered: line {line.number} was "
                f"{str(done[line.number]['prompt'])!r} and is {str(line.prompt)!r}. Choose another --output."
            )
        yield line


def run_lines(
    generator: Generator, arguments: PromptArguments, lines: Iterable[Line], store: JsonLinesStore | None
) -> int:
    """Answer one prompt a line; how many failed, earlier runs included."""
    done = {record["line"]: record for record in store.records} if store else {}
    failed = sum("error" in record for record in done.values())
    if store and store.torn is not None:
        print(f"A torn last line was removed and is answered anew: {store.torn!r}", file=sys.stderr)
    if done:
        print(f"{len(done)} lines are done already, {failed} of them failed.", file=sys.stderr)
    started, calls = time.perf_counter(), list[KADStatistics]()
    for line in check_answered(lines, done):
        if line.number in done:
            continue
        record: dict[str, Any] = {**line.others, "line": line.number, "prompt": line.prompt}
        try:
            prompt = with_system(line.prompt, arguments.system)
            ids = generator.answer(prompt, arguments, seed_of(generator.sampling.seed, line.number))
        except ValueError as error:  # too long, say: the other lines go on
            record["error"], failed = str(error), failed + 1
            print(f"Line {line.number} failed: {error}", file=sys.stderr)
        else:
            statistics = generator.kad.statistics
            assert statistics is not None
            calls.append(statistics)
            record |= {
                "text": generator.text(ids),
                "tokens": statistics.tokens,
                "acceptance_rate": statistics.acceptance_rate,
                "deferral_mass": statistics.deferral_mass,
            }
        if store:
            store.append(record)
        else:
            print(json.dumps(record, ensure_ascii=False), flush=True)
    if calls:
        print(f"{len(calls)} prompts; {summary(calls, time.perf_counter() - started)}", file=sys.stderr)
    return failed


def run(models: ModelArguments, rule: RuleArguments, prompts: PromptArguments, sampling: SamplingArguments) -> int:
    """Do what the command line says; the exit status."""
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
    models.complete(config, rule.config if rule.config and Path(rule.config).is_dir() else None)
    if prompts.input is None:
        run_prompt(Generator(models, config, sampling, trace=prompts.trace is not None), prompts)
        return 0
    lines: Iterable[Line] = read_prompts(sys.stdin)
    if prompts.input != "-":  # all of it is read, and so checked, before anything is loaded
        lines = list(read_prompts(read_file(prompts.input)))
    with ExitStack() as stack:
        store = None
        if prompts.output is not None:
            decides = {**asdict(config), **asdict(models), **asdict(sampling)}
            decides |= {name: value for name, value in asdict(prompts).items() if name != "output"}
            store = stack.enter_context(JsonLinesStore(prompts.output, decides))
        generator = Generator(models, config, sampling)
        return 1 if run_lines(generator, prompts, lines, store) else 0


def read_file(path: str) -> list[str]:
    """The lines of a text file.

    Raises:
        ValueError: there is no such file, or it is not UTF-8.
    """
    try:
        return Path(path).read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--input {path!r} can't be read as UTF-8 text: {error}") from error


def main(argv: list[str] | None = None) -> int:
    """Parse the command line and run."""
    types = (ModelArguments, RuleArguments, PromptArguments, SamplingArguments)
    arguments = parse_arguments(types, __doc__, argv)
    quieten()
    try:
        return run(*arguments)
    except (ImportError, OSError, RuntimeError, TypeError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nStopped. With --output, the same command goes on where it was.", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
