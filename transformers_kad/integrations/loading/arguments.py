"""What the command lines of the recipes share: which models, which rule, how tokens are drawn."""

from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import torch

from ...configuration import KADConfig
from ...rules.composition import RULES
from ...utils.strict_json import parse_json, parse_json_object
from .prompts import PLAIN_SAMPLING, check_template_arguments

QUANTIZATIONS = ("torchao-int8", "bitsandbytes-8bit", "bitsandbytes-4bit")


@dataclass
class ModelArguments:
    """Which models, and where they run. The command line of every recipe that takes a pair.

    Attributes:
        spread: `device_map`, parsed.
        limits: `max_memory`, parsed.
        gpus: where a spread base may lie, of several processes on one machine; None: everywhere.

    Raises:
        ValueError: a device that is not there, or JSON that can't be parsed.
    """

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
        self.gpus: list[int] | None = None
        self.spread = as_json(self.device_map, "--device_map")
        self.limits = as_json(self.max_memory, "--max_memory")
        if self.limits is not None and (not isinstance(self.limits, dict) or self.device_map is None):
            raise ValueError(
                f"--max_memory takes a JSON object and goes with --device_map auto, got {self.max_memory!r}."
            )

    def complete(self, config: KADConfig, folder: str | Path | None = None) -> None:
        """Take base and proxy from a config where they were not given.

        A config in a `folder` may lie beside the proxy itself.

        Raises:
            ValueError: one of the two is named nowhere.
        """
        proxy = config.proxy
        holds_model = folder is not None and any(
            (Path(folder) / name).is_file() for name in ("adapter_config.json", "config.json")
        )
        if holds_model and (proxy is None or not Path(proxy).exists()):
            proxy = str(folder)  # the proxy that the config lies beside, moved or downloaded
        self.base, self.proxy = self.base or config.base, self.proxy or proxy
        if self.base is None or self.proxy is None:
            raise ValueError(
                f"Base and proxy are needed, got {self.base!r} and {self.proxy!r}: pass --base and --proxy, or a "
                "--config that names them."
            )


@dataclass
class RuleParameters:
    """Parameters of the rules, and the two settings that go with every rule. None: not given."""

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
    num_assistant_tokens: str | None = field(
        default=None, metadata={"help": 'Draft length, or "auto" for the one that proves fastest. Default 5.'}
    )

    def given(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """What was given: the rules' parameters, and the settings that are `KADConfig`'s own."""
        given = {f.name: getattr(self, f.name) for f in fields(RuleParameters) if getattr(self, f.name) is not None}
        names: tuple[str, ...] = ("component_temperature", "num_assistant_tokens")
        own = {name: given.pop(name) for name in names if name in given}
        length = str(own.get("num_assistant_tokens", ""))
        if length.lstrip("-").isdecimal():
            own["num_assistant_tokens"] = int(length)
        return given, own


@dataclass
class RuleArguments(RuleParameters):
    """Which rule, and its parameters. What is not given here comes from --config, or has its default."""

    config: str | None = field(
        default=None, metadata={"help": "Folder or Hub repo with a kad_config.json, such as an aligned proxy's."}
    )
    rule: Literal[tuple(RULES)] | None = field(  # type: ignore[valid-type]
        default=None, metadata={"help": "Rule; default: that of --config, else dual."}
    )

    def to_config(self) -> KADConfig:
        """The settings of --config with what was given beside it."""
        config = asdict(KADConfig.from_pretrained(self.config)) if self.config else {}
        if self.rule is not None and self.rule != config.get("rule", "dual"):
            config |= {"rule": self.rule, "parameters": {}}
        parameters, own = self.given()
        return KADConfig(**{**config, **own, "parameters": {**config.get("parameters", {}), **parameters}})


@dataclass
class SamplingArguments:
    """How tokens are drawn."""

    max_new_tokens: int | None = field(default=256, metadata={"help": "Longest answer, in tokens."})
    do_sample: bool = field(default=False, metadata={"help": "Sample from the target r; else its likeliest token."})
    temperature: float = field(default=1.0, metadata={"help": "Of the target, after KAD. Needs --do_sample."})
    top_k: int = field(default=0, metadata={"help": "Of the target; 0: all tokens. Needs --do_sample."})
    top_p: float = field(default=1.0, metadata={"help": "Of the target. Needs --do_sample."})
    seed: int = field(default=0, metadata={"help": "Every line of a file is sampled from a seed of its own."})
    speculative: bool = field(default=True, metadata={"help": "Let the proxy draft: the same distribution, faster."})

    def __post_init__(self) -> None:
        if self.max_new_tokens is not None and self.max_new_tokens < 1:
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


def as_json(text: str | None, option: str) -> Any:
    """The value of an option that is JSON or one word."""
    if text is None or not text.lstrip().startswith(("{", "[")):
        return text
    try:
        return parse_json(text)
    except ValueError as error:
        raise ValueError(f"{option} must be JSON, got {text!r} ({error}).") from error


def template_arguments(text: str | None) -> dict[str, Any]:
    """The value of --template_arguments, for `encode`; empty where the option was not given.

    Raises:
        ValueError: it is no JSON object, or holds what a chat template can't be given.
    """
    if text is None:
        return {}
    try:
        arguments = parse_json_object(text)
        check_template_arguments(arguments)
    except ValueError as error:
        raise ValueError(f"--template_arguments must be a JSON object, got {text!r}: {error}") from error
    return arguments
