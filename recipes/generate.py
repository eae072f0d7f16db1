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
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, TextIO

import torch
from transformers import TextStreamer, set_seed

from transformers_kad import RULES, KADConfig, KADLogitsProcessor, KADStatistics, align_vocabularies
from transformers_kad.command_line import parse_arguments, quieten
from transformers_kad.loading import below_adapter, load_model, load_tokenizer
from transformers_kad.prompting import PLAIN_SAMPLING, Prompt, encode, eos_token_ids
from transformers_kad.resumable import JsonLinesStore
from transformers_kad.statistics import add_up
from transformers_kad.vocabulary import check_tokenizers

QUANTIZATIONS = ("torchao-int8", "torchao-int4", "bitsandbytes-8bit", "bitsandbytes-4bit")


@dataclass
class ModelArguments:
    """Which models, and where they run."""

    base: str | None = field(
        default=None, metadata={"help": "Base: Hub id or folder. Default: the one that --config names."}
    )
    proxy: str | None = field(
        default=None,
        metadata={"help": "Aligned proxy: Hub id or folder of a model or an adapter. Default: the one of --config."},
    )
    reference: str | None = field(
        default=None,
        metadata={
            "help": "The proxy before alignment, for the rule implicit_reward. Default: the model below the adapter."
        },
    )
    align_vocabularies: bool = field(
        default=False, metadata={"help": "Base and proxy have different tokenizers: use the tokens that both have."}
    )
    device: str = field(
        default="auto", metadata={"help": "Where the models run: auto (cuda, mps or cpu), cpu, cuda:1, ..."}
    )
    dtype: str = field(default="auto", metadata={"help": "auto (as saved), float32, bfloat16 or float16."})
    device_map: str | None = field(
        default=None,
        metadata={"help": "How the base is spread over devices: auto, or JSON as from_pretrained takes it."},
    )
    max_memory: str | None = field(
        default=None, metadata={"help": 'For --device_map auto, as JSON: \'{"0": "20GiB", "cpu": "60GiB"}\'.'}
    )
    offload_folder: str | None = field(
        default=None, metadata={"help": "Where weights go that fit neither on a device nor in memory."}
    )
    quantization: Literal[QUANTIZATIONS] | None = field(  # type: ignore[valid-type]
        default=None, metadata={"help": "Quantize the base when it is loaded. torchao also runs on the CPU."}
    )


@dataclass
class RuleArguments:
    """Which rule, and its parameters. What is not given here comes from --config, or has its default."""

    config: str | None = field(
        default=None, metadata={"help": "Folder or Hub repo with a kad_config.json, such as an aligned proxy's."}
    )
    rule: Literal[tuple(RULES)] | None = field(  # type: ignore[valid-type]
        default=None, metadata={"help": "Rule; default: that of --config, else dual."}
    )
    threshold: float | None = field(default=None, metadata={"help": "Of dual, nudging and blend_in."})
    budget: float | None = field(default=None, metadata={"help": "Of primal and exact."})
    tolerance: float | None = field(default=None, metadata={"help": "Of exact."})
    max_states: int | None = field(default=None, metadata={"help": "Of exact."})
    margin: float | None = field(default=None, metadata={"help": "Of confidence_bet."})
    variant: str | None = field(default=None, metadata={"help": "Of cascade: diff, opt, token_v2 or token_v3."})
    alpha: float | None = field(default=None, metadata={"help": "Of cascade."})
    beta: float | None = field(default=None, metadata={"help": "Of implicit_reward."})
    weight: float | None = field(default=None, metadata={"help": "Of ensemble."})
    component_temperature: float | None = field(
        default=None, metadata={"help": "Divides both models' logits before the rule. Default 1."}
    )
    num_assistant_tokens: int | None = field(default=None, metadata={"help": "Draft length. Default 5."})

    def to_config(self) -> KADConfig:
        """The settings of --config with what was given beside it."""
        config = asdict(KADConfig.from_pretrained(self.config)) if self.config else {}
        if self.rule is not None and self.rule != config.get("rule", "dual"):
            config |= {"rule": self.rule, "parameters": {}}
        own = ("config", "rule", "component_temperature", "num_assistant_tokens")
        parameters = {name: value for name, value in vars(self).items() if name not in own and value is not None}
        config["parameters"] = {**config.get("parameters", {}), **parameters}
        for name in ("component_temperature", "num_assistant_tokens"):
            if getattr(self, name) is not None:
                config[name] = getattr(self, name)
        return KADConfig(**config)


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


@dataclass
class SamplingArguments:
    """How tokens are drawn."""

    max_new_tokens: int = field(default=256, metadata={"help": "Longest answer, in tokens."})
    do_sample: bool = field(default=False, metadata={"help": "Sample from the target r; else its likeliest token."})
    temperature: float = field(default=1.0, metadata={"help": "Of the target, after KAD. Needs --do_sample."})
    top_k: int = field(default=0, metadata={"help": "Of the target; 0: all tokens. Needs --do_sample."})
    top_p: float = field(default=1.0, metadata={"help": "Of the target. Needs --do_sample."})
    seed: int = field(default=0, metadata={"help": "Every line of a file is sampled from a seed of its own."})
    speculative: bool = field(default=True, metadata={"help": "Let the proxy draft: the same distribution, faster."})

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"--max_new_tokens must be at least 1, got {self.max_new_tokens}.")

    def settings(self) -> dict[str, Any]:
        """Arguments of `generate`; nothing is left to the model's own generation config."""
        warped = {"temperature": self.temperature, "top_k": self.top_k, "top_p": self.top_p}
        if not self.do_sample:
            return {"do_sample": False, "temperature": None, "top_k": None, "top_p": None, "repetition_penalty": 1.0}
        return {**PLAIN_SAMPLING, **warped}


def pick_device(name: str) -> str:
    """The device that "auto" stands for."""
    if name != "auto":
        return name
    return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"


def quantization_config(name: str | None) -> Any:
    """The configuration that transformers takes, or None."""
    if name is None:
        return None
    library, _, kind = name.partition("-")
    if library == "bitsandbytes":
        from transformers import BitsAndBytesConfig  # noqa: PLC0415

        return BitsAndBytesConfig(load_in_8bit=kind == "8bit", load_in_4bit=kind == "4bit")
    from torchao.quantization import Int4WeightOnlyConfig, Int8WeightOnlyConfig  # noqa: PLC0415
    from transformers import TorchAoConfig  # noqa: PLC0415

    return TorchAoConfig(Int8WeightOnlyConfig() if kind == "int8" else Int4WeightOnlyConfig())


def as_json(text: str | None, option: str) -> Any:
    """The value of an option that is JSON or one word."""
    if text is None or not text.lstrip().startswith(("{", "[")):
        return text
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{option} must be JSON, got {text!r} ({error}).") from error


class Generator:
    """Base, proxy and processor, and one answer at a time."""

    def __init__(self, models: ModelArguments, config: KADConfig, sampling: SamplingArguments, trace: bool) -> None:
        base_path, proxy_path = models.base or config.base, models.proxy or config.proxy
        if base_path is None or proxy_path is None:
            raise ValueError(
                f"Base and proxy are needed, got {base_path!r} and {proxy_path!r}: pass --base and --proxy, or a "
                "--config that names them."
            )
        self.sampling, self.device = sampling, pick_device(models.device)
        self.tokenizer, self.proxy_tokenizer = load_tokenizer(base_path), load_tokenizer(proxy_path)
        alignment = None
        if models.align_vocabularies:
            alignment = align_vocabularies(self.tokenizer, self.proxy_tokenizer)
            print(alignment.report, file=sys.stderr)
        else:
            try:
                check_tokenizers(self.tokenizer, self.proxy_tokenizer)
            except ValueError as error:
                raise ValueError(f"{error} On the command line: --align_vocabularies.") from error
        max_memory = as_json(models.max_memory, "--max_memory")
        spread = {
            "device_map": as_json(models.device_map, "--device_map"),
            "max_memory": {int(k) if k.isdigit() else k: v for k, v in max_memory.items()} if max_memory else None,
            "offload_folder": models.offload_folder,
            "quantization_config": quantization_config(models.quantization),
        }
        where = {"device": self.device, "dtype": models.dtype}
        merge = models.quantization is None and models.device_map is None
        self.base = load_model(
            base_path, **where, merge=merge, **{name: value for name, value in spread.items() if value is not None}
        )
        rule = config.make_rule()
        switched_off = rule.needs_reference and models.reference is None and below_adapter(proxy_path) is not None
        self.kad = KADLogitsProcessor.from_config(
            load_model(proxy_path, **where, merge=not switched_off),
            config,
            reference=load_model(models.reference, **where) if models.reference else None,
            trace=trace,
            tokenizer=self.tokenizer,
            proxy_tokenizer=self.proxy_tokenizer,
            vocabulary_alignment=alignment,
        )
        pad = self.tokenizer.pad_token_id
        ends = set(eos_token_ids(self.base)) | {self.tokenizer.eos_token_id}
        for end in (*eos_token_ids(self.kad.proxy), self.proxy_tokenizer.eos_token_id):
            ends.add(end if alignment is None or end is None else alignment.base_id(end))
        self.settings = {
            **sampling.settings(),
            "max_new_tokens": sampling.max_new_tokens,
            "eos_token_id": sorted(ends - {None}) or None,
            "pad_token_id": self.tokenizer.eos_token_id if pad is None else pad,
            "logits_processor": [self.kad],
        }
        if sampling.speculative:
            self.settings["assistant_model"] = self.kad.proxy

    def answer(self, prompt: Prompt, arguments: PromptArguments, seed: int, streamer: Any = None) -> list[int]:
        """The ids of one answer. Equal seeds give equal answers, whatever was answered before."""
        inputs = encode(self.tokenizer, [prompt], self.device, chat=_flag(arguments.chat))
        self.kad.reset()
        set_seed(seed)
        if arguments.proxy_chat == "same":
            ids = self.base.generate(**inputs, **self.settings, streamer=streamer)
        else:
            own = encode(self.proxy_tokenizer, [prompt], self.device, chat=_flag(arguments.proxy_chat))
            with self.kad.proxy_prompt(own):
                ids = self.base.generate(**inputs, **self.settings, streamer=streamer)
        return ids[0, inputs["input_ids"].shape[1] :].tolist()

    def text(self, ids: list[int]) -> str:
        """An answer without special tokens."""
        return self.tokenizer.decode(ids, skip_special_tokens=True)


def _flag(choice: str) -> bool | None:
    return {"auto": None, "yes": True, "no": False}[choice]


def with_system(prompt: Prompt, system: str | None) -> Prompt:
    """A prompt with a system message before it."""
    if system is None:
        return prompt
    chat = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    return [{"role": "system", "content": system}, *chat]


def read_prompts(lines: TextIO) -> Iterator[tuple[int, Prompt]]:
    """Line numbers and prompts; empty lines are passed over.

    Raises:
        ValueError: a JSON object without `prompt` or `messages`, with its line number.
    """
    for number, line in enumerate(lines, start=1):
        text = line.rstrip("\r\n")
        if not text.strip():
            continue
        try:
            parsed = json.loads(text)
        except json.JSONDecodeError:
            parsed = None
        if not isinstance(parsed, dict):
            yield number, text
        elif isinstance(parsed.get("messages"), list) and parsed["messages"]:
            yield number, parsed["messages"]
        elif isinstance(parsed.get("prompt"), str):
            yield number, parsed["prompt"]
        else:
            raise ValueError(f'Line {number} needs a "prompt" or "messages", got {text[:80]!r}.')


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
    streamer = TextStreamer(generator.tokenizer, skip_prompt=True, skip_special_tokens=True)
    started = time.perf_counter()
    prompt = with_system(arguments.prompt or "", arguments.system)
    generator.answer(prompt, arguments, generator.sampling.seed, streamer)
    assert generator.kad.statistics is not None
    print(summary([generator.kad.statistics], time.perf_counter() - started), file=sys.stderr)
    if arguments.trace and generator.kad.trace is not None:
        page = generator.kad.trace.to_html(arguments.trace, generator.tokenizer, title=arguments.prompt)
        print(f"Trace: {page}", file=sys.stderr)


def run_lines(generator: Generator, arguments: PromptArguments, lines: TextIO, store: JsonLinesStore | None) -> int:
    """Answer one prompt a line; how many failed."""
    done = {record["line"] for record in store.records} if store else set()
    if store and store.torn is not None:
        print(f"A torn last line was removed and is answered anew: {store.torn!r}", file=sys.stderr)
    if done:
        print(f"{len(done)} lines are answered already.", file=sys.stderr)
    started, calls, failed = time.perf_counter(), list[KADStatistics](), 0
    for number, prompt in read_prompts(lines):
        if number in done:
            continue
        record: dict[str, Any] = {"line": number, "prompt": prompt}
        try:
            ids = generator.answer(with_system(prompt, arguments.system), arguments, generator.sampling.seed + number)
        except ValueError as error:  # too long, say: the other lines go on
            record["error"], failed = str(error), failed + 1
            print(f"Line {number} failed: {error}", file=sys.stderr)
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
    config = rule.to_config()
    if prompts.input is None:
        run_prompt(Generator(models, config, sampling, trace=prompts.trace is not None), prompts)
        return 0
    if prompts.input != "-" and not Path(prompts.input).is_file():
        raise ValueError(f"--input {prompts.input!r} is no file.")
    store = None
    if prompts.output is not None:
        decides = {**vars(models), **asdict(config), **vars(sampling)}
        decides |= {name: value for name, value in vars(prompts).items() if name != "output"}
        store = JsonLinesStore(prompts.output, decides)
    with nullcontext(sys.stdin) if prompts.input == "-" else open(prompts.input, encoding="utf-8") as lines:
        failed = run_lines(Generator(models, config, sampling, trace=False), prompts, lines, store)
    return 1 if failed else 0


def main(argv: list[str] | None = None) -> int:
    """Parse the command line and run."""
    types = (ModelArguments, RuleArguments, PromptArguments, SamplingArguments)
    arguments = parse_arguments(types, __doc__, argv)
    quieten()
    try:
        return run(*arguments)
    except (ValueError, TypeError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
