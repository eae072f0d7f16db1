"""The methods that can be compared: the models alone, assisted decoding of transformers, and every rule."""

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from ...configuration import KADConfig
from ...rules.registry import RULES, unknown_name_message
from ...utils.strict_json import parse_json

# Methods without a rule.
PLAIN_METHODS: Mapping[str, str] = {
    "base": "the base alone",
    "proxy": "the proxy alone",
    "aligned": "the aligned large model that --aligned names, alone",
    "assisted": "assisted decoding of transformers: the base's own distribution, drafted by the proxy",
}
# Methods with a rule: its name in RULES, and the parameters that the name of the method fixes.
RULE_METHODS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "kad-dual": ("dual", {}),
    "kad-primal": ("primal", {}),
    "kad-exact": ("exact", {}),
    "nudging": ("nudging", {}),
    "confidence-bet": ("confidence_bet", {}),
    "cascade-diff": ("cascade", {"variant": "diff"}),
    "cascade-opt": ("cascade", {"variant": "opt"}),
    "cascade-token-v2": ("cascade", {"variant": "token_v2"}),
    "cascade-token-v3": ("cascade", {"variant": "token_v3"}),
    "kad-paced": ("paced", {}),
    "implicit-reward": ("implicit_reward", {}),
    "ensemble": ("ensemble", {}),
    "blend-in": ("blend_in", {}),
}
FROM_CONFIG = "config"  # the rule and the settings of the kad_config.json that --config names
# The parameters that are tried of every rule, in the words of a command line.
PARAMETER_GRID = (
    "kad-dual:threshold=0.1,0.2,0.3,0.4,0.5,0.6,0.7,0.8,0.9",
    "kad-primal:budget=0.3,0.5,0.7,0.8,0.9,0.95,0.98",
    "nudging:threshold=0.3,0.4,0.5,0.6,0.7,0.8,0.9,0.95",
    "confidence-bet:margin=0.0,0.05,0.1,0.2,0.3,0.5",
    *(f"cascade-{variant}:alpha=0.0,0.05,0.1,0.2,0.4" for variant in ("diff", "opt", "token-v2")),
    "cascade-token-v3:alpha=0.1,0.3,0.5,0.7,0.9",
    "kad-paced:budget=0.1,0.2,0.3,0.4,0.5",
    "implicit-reward:beta=0.5,0.75,1.0,1.25,1.5,2.0",
    "ensemble:weight=0.1,0.3,0.5,0.7,0.9",
    "blend-in:threshold=0.3,0.5,0.7,0.9,1.0",
)
# KADConfig's own, beside the rule's parameters.
SETTINGS = ("component_temperature", "num_assistant_tokens", "verification")


@dataclass(frozen=True)
class Method:
    """A decoding method with its settings.

    Attributes:
        name: a name from `PLAIN_METHODS` or `RULE_METHODS`, or "config".
        config: rule and settings; None for methods without a rule.
        draft_length: draft length of the method "assisted"; None for the default.
    """

    name: str
    config: KADConfig | None = None
    draft_length: int | None = None

    @property
    def num_assistant_tokens(self) -> int | str:
        """Draft length, or "auto"."""
        return self.draft_length or (self.config or KADConfig()).num_assistant_tokens

    @property
    def label(self) -> str:
        """The name with the parameters that distinguish the method from others: "kad-dual threshold=0.4"."""
        names = [self.name] if self.name != FROM_CONFIG or self.config is None else [self.name, self.config.rule]
        return " ".join([*names, *(f"{name}={format_value(value)}" for name, value in self.parameters.items())])

    @property
    def parameters(self) -> dict[str, Any]:
        """The rule's first parameter, and all settings that differ from their defaults."""
        default = KADConfig()
        if self.config is None:
            drafts_otherwise = self.num_assistant_tokens != default.num_assistant_tokens
            return {"num_assistant_tokens": self.draft_length} if drafts_otherwise else {}
        fixed = RULE_METHODS[self.name][1] if self.name in RULE_METHODS else {}
        rule = self.config.make_rule()
        shown: dict[str, Any] = {}
        for field in fields(rule):
            if field.name not in fixed and (not shown or getattr(rule, field.name) != field.default):
                shown[field.name] = getattr(rule, field.name)
        return shown | {
            name: getattr(self.config, name)
            for name in SETTINGS
            if getattr(self.config, name) != getattr(default, name)
        }


def format_value(value: Any) -> str:
    """A parameter's value as text for labels."""
    return str(value).removesuffix(".0")


def parse_methods(
    words: Sequence[str],
    parameters: Mapping[str, Any] | None = None,
    settings: Mapping[str, Any] | None = None,
    config: KADConfig | None = None,
) -> list[Method]:
    """Parse the methods of a command line, and drop repetitions.

    Each word is a name, or a name with parameters: `kad-dual:threshold=0.4`. Several values make several methods:
    `kad-dual:threshold=0.3,0.4:num_assistant_tokens=3,5` makes four.

    Args:
        words: the words.
        parameters: values of rule parameters, for all rules that have them, unless a word has its own.
        settings: values of :data:`SETTINGS`, unless a word has its own.
        config: the configuration of the method "config".

    Raises:
        ValueError: an unknown name, a value out of range, or a parameter that no method uses.
        TypeError: a parameter that the method does not have.

    >>> [method.label for method in parse_methods(["base", "kad-dual:threshold=0.3,0.5"])]
    ['base', 'kad-dual threshold=0.3', 'kad-dual threshold=0.5']
    """
    methods: dict[str, Method] = {}
    unused = {*(parameters or {}), *(settings or {})}
    for word in words:
        name, *assignments = word.split(":")
        grid = [_parse_assignment(assignment, word) for assignment in assignments]
        if name in PLAIN_METHODS:
            for method in _plain_methods(name, grid, settings or {}):
                methods[method.label] = method
            unused -= {"num_assistant_tokens"} if name == "assisted" else set()
            continue
        start, fixed = _start_of(name, config)
        known = [field.name for field in fields(RULES[start.rule])]
        usable = {key: value for key, value in (parameters or {}).items() if key in known and key not in fixed}
        unused -= {*usable, *SETTINGS}
        for values in itertools.product(*(choices for _, choices in grid)):
            own = dict(zip((key for key, _ in grid), values, strict=True))
            for key in own:
                if key in fixed or key not in (*known, *SETTINGS):
                    allowed = [k for k in (*known, *SETTINGS) if k not in fixed]
                    raise TypeError(unknown_name_message(f"parameter of the method {name!r}:", key, allowed))
            merged = {**dict(start.parameters), **usable, **own, **fixed}
            method = Method(
                name,
                replace(
                    start,
                    parameters={key: value for key, value in merged.items() if key in known},
                    **{key: own.get(key, (settings or {}).get(key, getattr(start, key))) for key in SETTINGS},
                ),
            )
            methods[method.label] = method
    if unused:
        raise ValueError(f"No method among {', '.join(words)} has the parameter {', '.join(sorted(unused))!r}.")
    return list(methods.values())


def _plain_methods(name: str, grid: list[tuple[str, list[Any]]], settings: Mapping[str, Any]) -> list[Method]:
    """A method without a rule, or the method "assisted" with each draft length."""
    length = "num_assistant_tokens"
    allowed = [length] if name == "assisted" else []
    for key, _ in grid:
        if key not in allowed:
            raise TypeError(unknown_name_message(f"parameter of the method {name!r}:", key, allowed))
    if name != "assisted":
        return [Method(name)]
    lengths = dict(grid).get(length, [settings.get(length, KADConfig().num_assistant_tokens)])
    if "auto" in lengths:
        raise ValueError('"assisted" is transformers\' own decoding, got num_assistant_tokens="auto": pass a number.')
    return [
        Method(name, draft_length=int(KADConfig(num_assistant_tokens=value).num_assistant_tokens)) for value in lengths
    ]


def _start_of(name: str, config: KADConfig | None) -> tuple[KADConfig, Mapping[str, Any]]:
    """The configuration that a name starts from, and the parameters that it fixes."""
    if name == FROM_CONFIG:
        if config is None:
            raise ValueError('The method "config" needs --config, a folder or Hub repo with a kad_config.json.')
        return config, {}
    if name not in RULE_METHODS:
        raise ValueError(unknown_name_message("method", name, [*PLAIN_METHODS, *RULE_METHODS, FROM_CONFIG]))
    rule, fixed = RULE_METHODS[name]
    return KADConfig(rule=rule, parameters=fixed), fixed


def _parse_assignment(text: str, word: str) -> tuple[str, list[Any]]:
    key, equals, values = text.partition("=")
    if not key or not equals or not values:
        raise ValueError(f"Parameters are given as name:parameter=value, got {word!r}.")
    return key, [_parse_value(value) for value in values.split(",")]


def _parse_value(text: str) -> Any:
    try:
        return parse_json(text)
    except json.JSONDecodeError:
        return text
    except ValueError as error:
        raise ValueError(f"The value {text!r:.80} of a parameter can't be used: {error}.") from error
