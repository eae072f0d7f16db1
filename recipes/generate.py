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

Several processes, each with a copy of the models, divide the lines of --input among themselves. --output is in the
order of the input:

    torchrun --nproc_per_node 8 recipes/generate.py --config my_proxy --input prompts.txt --output answers.jsonl

Decoding is greedy and speculative by default. If the base is larger than one device, use --device_map auto or
--quantization.
"""

import hashlib
import io
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from transformers_kad import KADConfig, KADStatistics
from transformers_kad.integrations.loading.messages import silence_libraries
from transformers_kad.integrations.loading.prompts import Prompt, encode
from transformers_kad.recipes.arguments import (
    TEMPLATE_CHOICES,
    ModelArguments,
    RuleArguments,
    SamplingArguments,
    TemplateArguments,
)
from transformers_kad.recipes.command_line import parse_arguments
from transformers_kad.recipes.pair import Pair
from transformers_kad.recipes.processes import Processes, assign_own_devices
from transformers_kad.recipes.prompt_lines import (
    UNREADABLE,
    Line,
    check_answered,
    check_usable,
    read_file,
    read_prompts,
    seed_of,
)
from transformers_kad.recipes.record_fields import Shape, check_fields
from transformers_kad.recipes.resumable import JsonLinesPart, JsonLinesStore, json_line
from transformers_kad.records.statistics import add_up
from transformers_kad.utils.sources import shown_name

# isort: split
# These imports follow transformers_kad, which suppresses the messages of torchao.
import torch
from transformers import TextStreamer, set_seed


@dataclass
class PromptArguments(TemplateArguments):
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
    trace: str | None = field(
        default=None,
        metadata={
            "help": "HTML page that shows how much of each token of the answer to --prompt is due to the proxy."
        },
    )


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
        inputs = encode(
            pair.tokenizer, [prompt], pair.device, chat=TEMPLATE_CHOICES[arguments.chat], model=pair.base, **template
        )
        self.kad.reset()
        set_seed(seed)
        if arguments.proxy_chat == "same":
            ids = pair.base.generate(**inputs, **self.settings, streamer=streamer)
        else:
            own = encode(
                pair.proxy_tokenizer, [prompt], pair.device, chat=TEMPLATE_CHOICES[arguments.proxy_chat], **template
            )
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


def with_system(prompt: Prompt, system: str | None) -> Prompt:
    """Prepend a system message to a prompt."""
    if system is None:
        return prompt
    chat = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    return [{"role": "system", "content": system}, *chat]


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


# The fields that every record has, and those of records with and without an answer.
LINE: Mapping[str, Shape] = {"line": (int,)}
ANSWER: Mapping[str, Shape] = {"text": (str,), "tokens": (int,)}
FAILURE: Mapping[str, Shape] = {"error": (str,)}


def answered(store: JsonLinesStore) -> dict[int, dict[str, Any]]:
    """The records of an earlier run, by the number of their line.

    Raises:
        ValueError: a record has no line number, neither an answer nor an error, or the line of another record.
    """
    done: dict[int, dict[str, Any]] = {}
    for number, record in enumerate(store.records, start=1):
        where = f"{str(store.path)!r}, line {number}"
        check_fields(record, {**LINE, **(FAILURE if "error" in record else ANSWER)}, where)
        if record["line"] in done:
            raise ValueError(
                f"{where} is the second record of line {record['line']} of the input. Remove one of the two, or "
                "choose another --output."
            )
        done[record["line"]] = record
    return done


def lines_left(lines: Iterable[Line], store: JsonLinesStore) -> Iterator[Line]:
    """The lines that the store has no records of; says how many it has.

    Raises:
        ValueError: a record is malformed, or its line has changed. Lines that come from a pipe are compared as they
            come, those of a file before this function returns.
    """
    done = answered(store)
    if store.torn is not None:
        print(f"An incomplete last line was removed and is answered again: {store.torn!r}", file=sys.stderr)
    if done:
        print(f"{len(done)} lines are already done, {count_failed(store)} of them failed.", file=sys.stderr)
    checked = check_answered(lines, done, store.path)
    return (line for line in (list(checked) if isinstance(lines, list) else checked) if line.number not in done)


def count_failed(store: JsonLinesStore) -> int:
    """How many of the records that a store held when it was opened are of lines that failed."""
    return sum("error" in record for record in store.records)


def run_lines(
    generator: Generator, arguments: PromptArguments, lines: Iterable[Line], store: JsonLinesStore | None
) -> int:
    """Answer one prompt for each line. Returns the number of failed lines, including earlier runs."""
    if store is None:
        return answer_lines(generator, arguments, lines, None)
    return answer_lines(generator, arguments, lines_left(lines, store), store) + count_failed(store)


def answer_lines(
    generator: Generator,
    arguments: PromptArguments,
    lines: Iterable[Line],
    store: JsonLinesStore | JsonLinesPart | None,
) -> int:
    """Answer one prompt for each line, and record the answers. Returns how many lines failed."""
    failed, started, calls = 0, time.perf_counter(), list[KADStatistics]()
    for line in lines:
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
    processes = Processes()
    refuse_several(processes.number, prompts)
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
        lines = list(read_prompts(read_file(prompts.input)))
        check_usable(lines, prompts.input, shown=processes.is_main)
    settings = {**asdict(config), **asdict(models), **asdict(sampling)}
    settings |= {name: value for name, value in asdict(prompts).items() if name != "output"}
    assign_own_devices(models, processes.state)

    def make_generator() -> Generator:
        generator = Generator(models, config, sampling)
        generator.check_template(prompts.template, prompts)
        return generator

    if processes.number > 1:
        return run_processes(processes, make_generator, prompts, list(lines), settings)
    with ExitStack() as stack:
        store = None if prompts.output is None else stack.enter_context(JsonLinesStore(prompts.output, settings))
        failed = run_lines(make_generator(), prompts, lines, store)
        if store is not None:
            store.complete()  # an earlier run of several processes may have left answers that are not in order
        return 1 if failed else 0


def run_processes(
    processes: Processes,
    make_generator: Callable[[], Generator],
    arguments: PromptArguments,
    lines: Sequence[Line],
    settings: Mapping[str, Any],
) -> int:
    """Answer a part of the lines in every process of the run. Returns the exit status, which is the same in all."""
    output, by_number = Path(arguments.output or ""), {line.number: line for line in lines}
    processes.check_equal({**settings, "the input": hashlib.sha256(repr(lines).encode()).hexdigest()[:12]})
    processes.check_shared(Path(os.path.realpath(output)).parent)
    with ExitStack() as stack:
        main_store = processes.run(lambda: JsonLinesStore(output, settings) if processes.is_main else None)
        if main_store is not None:
            stack.enter_context(main_store)

        def find_left() -> tuple[list[int], int]:
            assert main_store is not None
            return [line.number for line in lines_left(lines, main_store)], count_failed(main_store)

        left, failed_before = processes.run_in_main(find_left)
        generator = processes.run(make_generator)
        with nullcontext(main_store) if main_store is not None else JsonLinesPart(output, processes.index) as store:
            own = [by_number[number] for number in processes.share(left)]
            failed = answer_lines(generator, arguments, own, store)
        failed_now = processes.gather(failed)

        def complete() -> None:
            assert main_store is not None
            main_store.complete()
            missing = len(by_number.keys() - answered(main_store).keys())
            if missing:
                raise ValueError(
                    f"{missing} of {len(lines)} answers are missing in {arguments.output!r}, although all processes "
                    "have recorded theirs. Start the same command again: it finds files that a network file system "
                    "has shown late, and answers the rest."
                )

        processes.run_in_main(complete)
    return 1 if failed_before + sum(failed_now) else 0


def refuse_several(processes: int, arguments: PromptArguments) -> None:
    """Raise `ValueError` if several processes have nothing to divide, or no file for their answers."""
    output = arguments.output and Path(arguments.output)
    is_stream = not output or (output.exists() and not output.is_file())
    if processes > 1 and (arguments.input in (None, "-") or is_stream):
        raise ValueError(
            f"{processes} processes divide the lines of a file among themselves and write the answers into a file: "
            f"pass both as --input and --output, got {arguments.input!r} and {arguments.output!r}, or start "
            "generate.py without torchrun."
        )


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
