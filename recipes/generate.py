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

import torch
from transformers import GenerationConfig, TextStreamer, set_seed

from transformers_kad import RULES, KADConfig, KADLogitsProcessor, KADStatistics, align_vocabularies
from transformers_kad.command_line import parse_arguments, quieten
from transformers_kad.loading import below_adapter, load_model, load_tokenizer
from transformers_kad.prompting import PLAIN_SAMPLING, Prompt, encode, eos_token_ids
from transformers_kad.resumable import JsonLinesStore
from transformers_kad.statistics import add_up
from transformers_kad.vocabulary import check_tokenizers

QUANTIZATIONS = ("torchao-int8", "bitsandbytes-8bit", "bitsandbytes-4bit")


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
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = field(
        default="auto", metadata={"help": "Of the weights; auto: as they were saved."}
    )
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

    def __post_init__(self) -> None:
        if self.device.startswith("cuda") and not torch.cuda.is_available():
            raise ValueError(f"--device {self.device}: PyTorch sees no CUDA device here.")
        self.spread = as_json(self.device_map, "--device_map")
        self.limits = as_json(self.max_memory, "--max_memory")
        if self.limits is not None and (not isinstance(self.limits, dict) or self.device_map is None):
            raise ValueError(
                f"--max_memory takes a JSON object and goes with --device_map auto, got {self.max_memory!r}."
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
        if not 0 < self.top_p <= 1:
            raise ValueError(f"--top_p must lie in (0, 1], got {self.top_p}.")
        if self.temperature <= 0 or self.top_k < 0:
            raise ValueError(
                f"--temperature must be positive and --top_k at least 0, got {self.temperature} and {self.top_k}."
            )
        if not self.do_sample and (self.temperature, self.top_k, self.top_p) != (1.0, 0, 1.0):
            raise ValueError("--temperature, --top_k and --top_p need --do_sample.")

    def settings(self) -> dict[str, Any]:
        """Arguments of `generate`."""
        if not self.do_sample:
            return {"do_sample": False, "max_new_tokens": self.max_new_tokens}
        warped = {"temperature": self.temperature, "top_k": self.top_k, "top_p": self.top_p}
        return {**PLAIN_SAMPLING, **warped, "max_new_tokens": self.max_new_tokens}


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
    from torchao.quantization import Int8WeightOnlyConfig  # noqa: PLC0415
    from transformers import TorchAoConfig  # noqa: PLC0415

    # Its settings for the compiler would lower the precision of all other models in float32 as well.
    return TorchAoConfig(Int8WeightOnlyConfig(set_inductor_config=False))


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

    def __init__(
        self,
        models: ModelArguments,
        config: KADConfig,
        sampling: SamplingArguments,
        *,
        folder: str | None = None,
        trace: bool = False,
    ) -> None:
        base_path, proxy_path = find_models(models, config, folder)
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
        spread = {
            "device_map": models.spread,
            "max_memory": {int(k) if k.isdigit() else k: v for k, v in (models.limits or {}).items()} or None,
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
        # What the base's own configuration asks for (penalties, beams, a minimal length) is not the command's.
        getattr(self.base, "get_base_model", lambda: self.base)().generation_config = GenerationConfig()
        self.settings = {
            **sampling.settings(),
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


def find_models(models: ModelArguments, config: KADConfig, folder: str | None) -> tuple[str | None, str | None]:
    """Base and proxy of the command line, else of the config in a folder, which may name them relative to itself."""

    def resolve(name: str | None) -> str | None:
        beside = Path(folder or "") / (name or "")
        return str(beside) if name and folder and not Path(name).exists() and beside.exists() else name

    proxy = resolve(config.proxy)
    holds_model = folder is not None and any(
        (Path(folder) / n).is_file() for n in ("adapter_config.json", "config.json")
    )
    if holds_model and (proxy is None or not Path(proxy).exists()):
        proxy = folder  # the proxy that the config lies beside, moved or downloaded
    return models.base or resolve(config.base), models.proxy or proxy


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
    streamer = TextStreamer(generator.tokenizer, skip_prompt=True, skip_special_tokens=True)
    started = time.perf_counter()
    prompt = with_system(arguments.prompt or "", arguments.system)
    generator.answer(prompt, arguments, generator.sampling.seed, streamer)
    assert generator.kad.statistics is not None
    print(summary([generator.kad.statistics], time.perf_counter() - started), file=sys.stderr)
    if arguments.trace and generator.kad.trace is not None:
        page = generator.kad.trace.to_html(arguments.trace, generator.tokenizer, title=arguments.prompt)
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
    folder = rule.config if rule.config and Path(rule.config).is_dir() else None
    if prompts.input is None:
        run_prompt(Generator(models, config, sampling, folder=folder, trace=prompts.trace is not None), prompts)
        return 0
    lines: Iterable[Line] = read_prompts(sys.stdin)
    if prompts.input != "-":  # all of it is read, and so checked, before anything is loaded
        lines = list(read_prompts(read_file(prompts.input)))
    with ExitStack() as stack:
        store = None
        if prompts.output is not None:
            decides = {**asdict(models), **asdict(config), **asdict(sampling)}
            decides |= {name: value for name, value in asdict(prompts).items() if name != "output"}
            store = stack.enter_context(JsonLinesStore(prompts.output, decides))
        generator = Generator(models, config, sampling, folder=folder)
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
