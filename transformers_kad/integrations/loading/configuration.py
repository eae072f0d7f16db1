"""A `KADConfig` from a saved one and from settings that are given by name."""

from collections.abc import Mapping
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from ...configuration import KADConfig
from ...rules.registry import RULES

# The settings of a configuration besides the rule and its parameters.
OWN_SETTINGS = ("component_temperature", "num_assistant_tokens", "verification")
# Every parameter that some rule has, in the order of the rules.
RULE_PARAMETERS = tuple(dict.fromkeys(field.name for rule in RULES.values() for field in fields(rule)))


def config_from(
    source: str | Path | None = None, rule: str | None = None, settings: Mapping[str, Any] | None = None
) -> KADConfig:
    """The configuration that a folder or Hub repo holds, with the given rule and settings in place of its own.

    Args:
        source: folder or Hub repo with a `kad_config.json`; None for the default configuration.
        rule: a name from `RULES`. If it is another rule than the saved one, the saved parameters are dropped.
        settings: parameters of the rule and :data:`OWN_SETTINGS`, by name.

    Raises:
        ValueError: an unknown rule or a value out of range.
        TypeError: a parameter that the rule does not have.
    """
    config = asdict(KADConfig.from_pretrained(source)) if source else {}
    if rule is not None and rule != config.get("rule", "dual"):
        config |= {"rule": rule, "parameters": {}}
    parameters, own = split_settings(settings or {})
    return KADConfig(**{**config, **own, "parameters": {**config.get("parameters", {}), **parameters}})


def split_settings(settings: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The parameters of rules among some settings, and :data:`OWN_SETTINGS`. A draft length may be given as text.

    >>> split_settings({"threshold": 0.5, "num_assistant_tokens": "3"})
    ({'threshold': 0.5}, {'num_assistant_tokens': 3})
    """
    parameters = {name: value for name, value in settings.items() if name not in OWN_SETTINGS}
    own = {name: settings[name] for name in OWN_SETTINGS if name in settings}
    length = str(own.get("num_assistant_tokens", ""))
    if length.lstrip("-").isdecimal():
        own["num_assistant_tokens"] = int(length)
    return parameters, own


def with_models(config: KADConfig, base: str | None, proxy: str | None, source: str | Path | None = None) -> KADConfig:
    """A configuration that names base and proxy: those given here, or else its own.

    Args:
        config: the configuration.
        base: Hub id or folder of the base.
        proxy: Hub id or folder of the proxy.
        source: where the configuration was loaded from. A folder that also holds a model or an adapter is taken for
            the proxy if the configuration names none, or one that is not there: the folder was moved or downloaded.

    Raises:
        ValueError: one of the two is named nowhere.
    """
    own_proxy = config.proxy
    holds_model = source is not None and any(
        (Path(source) / name).is_file() for name in ("adapter_config.json", "config.json")
    )
    if holds_model and (own_proxy is None or not Path(own_proxy).exists()):
        own_proxy = str(source)
    base, proxy = base or config.base, proxy or own_proxy
    if base is None or proxy is None:
        raise ValueError(
            f"Base and proxy are needed, got {base!r} and {proxy!r}: pass --base and --proxy, or a --config that "
            "names them."
        )
    return replace(config, base=base, proxy=proxy)
