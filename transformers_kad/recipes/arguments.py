"""The command-line arguments that recipes share: models, rule, and sampling."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import torch

from ..configuration import DEFAULT_VERIFICATION, VERIFICATIONS, KADConfig
from ..integrations.loading.configuration import config_from, split_settings, with_models
from ..integrations.loading.devices import QUANTIZATIONS
from ..integrations.loading.prompts import PLAIN_SAMPLING, check_template_arguments
from ..rules.registry import RULES
from ..utils.strict_json import parse_json, parse_json_object


@dataclass
class ModelArguments:
    """The models and their devices, for every recipe that takes a pair.

    Attributes:
        spread: `device_map`, parsed.
        limits: `max_memory`, parsed.
        gpus: the GPUs that a distributed base of this process may use; None for all.

    Raises:
        ValueError: a device is not available, or JSON can't be parsed.
    """

    base: str | None = field(default=None, metadata={"help": "Base: Hub id or folder. Default: that of --config."})
    proxy: str | None = field(
        default=None,
        metadata={"help": "Aligned proxy: Hub id or folder of a model or an adapter. Default: that of --config."},
    )
    reference: str | None = field(
        default=None,
        metadata={
            "help": "Proxy before alignment, for the rule implicit_reward. Default: the model below the adapter."
        },
    )
    align_vocabularies: bool = field(
        default=False,
        metadata={"help": "For base and proxy with different tokenizers: use the tokens that both have."},
    )
    device: str = field(
        default="auto", metadata={"help": "Device of the models: auto (cuda, mps or cpu), cpu, cuda:1, ..."}
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = field(
        default="auto", metadata={"help": "dtype of the weights; auto: as saved."}
    )
    device_map: str | None = field(
        default=None,
        metadata={"help": "How the base is distributed over devices: auto, or JSON as from_pretrained takes it."},
    )
    max_memory: str | None = field(
        default=None, metadata={"help": 'Memory for --device_map auto, as JSON: \'{"0": "20GiB", "cpu": "60GiB"}\'.'}
    )
    offload_folder: str | None = field(
        default=None, metadata={"help": "Folder for weights that fit neither on a device nor in memory."}
    )
    quantization: Literal[QUANTIZATIONS] | None = field(  # type: ignore[valid-type]
        default=None, metadata={"help": "Quantization of the base. torchao also runs on the CPU."}
    )

    def __post_init__(self) -> None:
        if self.device.startswith("cuda") and not torch.cuda.is_available():
            raise ValueError(f"--device {self.device}: PyTorch sees no CUDA device here.")
        self.gpus: list[int] | None = None
        self.spread = as_json(self.device_map, "--device_map")
        self.limits = as_json(self.max_memory, "--max_memory")
        if self.limits is not None and (not isinstance(self.limits, dict) or self.device_map is None):
            raise ValueError(
                f"--max_memory takes a JSON object and goes with --device_map auto, got {self.max_memory!r:.200}."
            )

    def complete(self, config: KADConfig, source: str | Path | None = None) -> None:
        """Take base and proxy from a configuration where the command line does not name them.

        Args:
            config: the configuration.
            source: where it was loaded from, see `with_models`.

        Raises:
            ValueError: one of the two is named nowhere.
        """
        named = with_models(config, self.base, self.proxy, source)
        self.base, self.proxy = named.base, named.proxy

    def complete_with_pair(self, source: str | Path | None, pair: Path, alternative: str = "") -> bool:
        """Take base and proxy from a saved configuration, or from a folder with a pair if nothing names them.

        Args:
            source: folder or Hub repo with a `kad_config.json`, or None.
            pair: a folder that holds base/ and proxy/.
            alternative: what else the recipe accepts, for the error message.

        Returns:
            Whether the pair of the folder is used.

        Raises:
            ValueError: nothing names them and there is no such pair, or one of the two is named nowhere.
        """
        named = KADConfig.from_pretrained(source) if source else KADConfig()
        uses_pair = self.base is self.proxy is named.base is named.proxy is None
        if uses_pair:
            if not (pair / "base").is_dir() or not (pair / "proxy").is_dir():
                raise ValueError(
                    f"No pair in {str(pair)!r}. Pass --base and --proxy, or --pair with a folder that holds base/ and "
                    f"proxy/{alternative}."
                )
            self.base, self.proxy = str(pair / "base"), str(pair / "proxy")
        self.complete(named, source)
        return uses_pair


@dataclass
class RuleParameters:
    """Parameters of the rules, and the settings that every rule can be used with. None: not given."""

    threshold: float | None = field(default=None, metadata={"help": "Parameter of dual, nudging, paced and blend_in."})
    budget: float | None = field(default=None, metadata={"help": "Parameter of primal, exact and paced."})
    tolerance: float | None = field(default=None, metadata={"help": "Parameter of exact."})
    max_states: int | None = field(default=None, metadata={"help": "Parameter of exact."})
    margin: float | None = field(default=None, metadata={"help": "Parameter of confidence_bet."})
    variant: str | None = field(
        default=None, metadata={"help": "Parameter of cascade: diff, opt, token_v2 or token_v3."}
    )
    alpha: float | None = field(default=None, metadata={"help": "Parameter of cascade."})
    step_size: float | None = field(default=None, metadata={"help": "Parameter of paced."})
    smallest_threshold: float | None = field(default=None, metadata={"help": "Parameter of paced."})
    largest_threshold: float | None = field(default=None, metadata={"help": "Parameter of paced."})
    beta: float | None = field(default=None, metadata={"help": "Parameter of implicit_reward."})
    weight: float | None = field(default=None, metadata={"help": "Parameter of ensemble."})
    component_temperature: float | None = field(
        default=None, metadata={"help": "Temperature of both models' logits before the rule. Default: 1."}
    )
    num_assistant_tokens: str | None = field(
        default=None, metadata={"help": 'Draft length, or "auto" to find the fastest one. Default: 5.'}
    )
    verification: Literal[VERIFICATIONS] | None = field(  # type: ignore[valid-type]
        default=None,
        metadata={"help": f"Verification of drafts in sampling. Default: {DEFAULT_VERIFICATION}."},
    )

    def given(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """The parameters of rules that were given, and the other settings of a `KADConfig`."""
        names = [field.name for field in fields(RuleParameters)]
        return split_settings({name: getattr(self, name) for name in names if getattr(self, name) is not None})


@dataclass
class RuleArguments(RuleParameters):
    """The rule and its parameters. Settings that are not given come from --config, or have their defaults."""

    config: str | None = field(
        default=None, metadata={"help": "Folder or Hub repo with a kad_config.json, such as that of an aligned proxy."}
    )
    rule: Literal[tuple(RULES)] | None = field(  # type: ignore[valid-type]
        default=None, metadata={"help": "Rule. Default: that of --config, or else dual."}
    )

    def to_config(self) -> KADConfig:
        """The configuration of --config, with the given rule and parameters in place of its own."""
        parameters, own = self.given()
        return config_from(self.config, self.rule, parameters | own)


# What the values of --chat and --proxy_chat stand for: whether a template is applied, None if there is one.
TEMPLATE_CHOICES: Mapping[str, Any] = {"auto": None, "yes": True, "no": False, "same": "same"}


@dataclass
class TemplateArguments:
    """How prompts are put into chat templates.

    Attributes:
        template: `template_arguments`, parsed.

    Raises:
        ValueError: `template_arguments` can't be used.
    """

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

    def __post_init__(self) -> None:
        self.template = template_arguments(self.template_arguments)


@dataclass
class SamplingArguments:
    """How tokens are chosen."""

    max_new_tokens: int | None = field(default=256, metadata={"help": "Maximum length of an answer, in tokens."})
    do_sample: bool = field(default=False, metadata={"help": "Sample from the target r instead of decoding greedily."})
    temperature: float = field(
        default=1.0, metadata={"help": "Temperature of the target, after KAD. Needs --do_sample."}
    )
    top_k: int = field(
        default=0,
        metadata={"help": "Sample from the top_k likeliest tokens of the target; 0: from all. Needs --do_sample."},
    )
    top_p: float = field(
        default=1.0, metadata={"help": "Sample from the nucleus of this mass of the target. Needs --do_sample."}
    )
    seed: int = field(
        default=0, metadata={"help": "Seed of the sampling, from which every line of a file derives its own."}
    )
    speculative: bool = field(
        default=True,
        metadata={"help": "Speculative decoding: the proxy drafts, which is faster and gives the same distribution."},
    )

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
        """The arguments of `generate`."""
        if not self.do_sample:
            return {"do_sample": False, "max_new_tokens": self.max_new_tokens}
        warped = {"temperature": self.temperature, "top_k": self.top_k, "top_p": self.top_p}
        return {**PLAIN_SAMPLING, **warped, "max_new_tokens": self.max_new_tokens}


def as_json(text: str | None, option: str) -> Any:
    """Parse the value of an option that is JSON or a single word."""
    if text is None or not text.lstrip().startswith(("{", "[")):
        return text
    try:
        return parse_json(text)
    except ValueError as error:
        raise ValueError(f"{option} must be JSON, got {text!r:.200} ({error}).") from error


def template_arguments(text: str | None) -> dict[str, Any]:
    """Parse the value of --template_arguments, for `encode`; empty if the option was not given.

    Raises:
        ValueError: it is not a JSON object, or has arguments that a chat template can't be given.
    """
    if text is None:
        return {}
    try:
        arguments = parse_json_object(text)
        check_template_arguments(arguments)
    except ValueError as error:
        raise ValueError(f"--template_arguments must be a JSON object, got {text!r:.200}: {error}") from error
    return arguments
