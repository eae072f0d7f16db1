"""KADConfig: how to decode with KAD, saved beside an adapter or shared on the Hub.

`PushToHubMixin` of transformers is not used: it would also rewrite the README of the repo, or add the model card of a
transformers model where there is none.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from numbers import Real
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from transformers.utils import cached_file, logging

from ._version import __version__
from .rules.base import DeferralRule, Rule, as_float
from .rules.registry import RULES, make_rule, unknown_name_message
from .utils.files import write_whole
from .utils.frozen_dict import FrozenDict
from .utils.sources import check_source, portable_name, resolve_name
from .utils.strict_json import parse_json

logger = logging.get_logger(__name__)

CONFIG_NAME = "kad_config.json"
DRAFTERS = ("proxy", "prompt_lookup")
VERIFICATIONS = ("token", "block")
DEFAULT_VERIFICATION = "token"


@dataclass(frozen=True)
class KADConfig:
    """The settings of a `KADLogitsProcessor`, without the models. Equal configs have equal hashes.

    Args:
        rule: a name from `RULES`.
        parameters: the rule's parameters, for example `{"threshold": 0.4}`. They are copied and can't be changed.
        component_temperature: both models' logits are divided by it before the rule sees them.
        num_assistant_tokens: draft length of speculative decoding, or "auto".
        base: Hub id or folder of the base model, for the record.
        proxy: Hub id or folder of the proxy, for the record.
        drafter: what drafts in speculative decoding, "proxy" or "prompt_lookup".
        compile: whether the forwards of speculative decoding are compiled.
        lazy: whether the proxy is run only where a token drawn from the base is deferred, token by token.
        verification: how speculative decoding verifies a draft, "token" or "block".

    Raises:
        ValueError: an unknown rule, drafter or verification, a value out of range, or settings that can't be combined.
        TypeError: a parameter that the rule does not have, or a value of a wrong type.

    >>> KADConfig(rule="primal", parameters={"budget": 0.9}).make_rule()
    PrimalDeferral(budget=0.9)
    """

    rule: str = "dual"
    parameters: Mapping[str, Any] = field(default_factory=dict)
    component_temperature: float = 1.0
    num_assistant_tokens: int | str = 5
    base: str | None = None
    proxy: str | None = None
    drafter: str = "proxy"
    compile: bool = False
    lazy: bool = False
    verification: str = DEFAULT_VERIFICATION

    def __post_init__(self) -> None:
        if not isinstance(self.parameters, Mapping):
            raise TypeError(f"`parameters` must map names to values, got {self.parameters!r:.200}.")
        for name in ("base", "proxy"):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, str) and value.strip()):
                raise TypeError(f"`{name}` must be the id or path of a model, as text, or None; got {value!r:.200}.")
        object.__setattr__(self, "parameters", FrozenDict(self.parameters))
        check_settings(self.make_rule(), **self.settings)

    @property
    def settings(self) -> dict[str, Any]:
        """The arguments of `KADLogitsProcessor` beside the rule."""
        described = ("rule", "parameters", "base", "proxy")
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in described}

    def make_rule(self) -> Rule:
        """The rule object that `rule` and `parameters` describe."""
        return make_rule(self.rule, **self.parameters)

    def save_pretrained(self, save_directory: str | Path) -> Path:
        """Write `kad_config.json` into a folder, made if it is missing, and return its path.

        Where `base` and `proxy` are folders named relative to the working directory, the file names them relative to
        its own folder, so that it can be used from everywhere and moved together with them.
        """
        folder = Path(save_directory)
        if folder.is_file():
            raise NotADirectoryError(f"`save_directory` must be a folder, got the file {str(folder)!r}.")
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / CONFIG_NAME
        write_whole(path, self._rename_models(lambda name: portable_name(name, folder))._to_json())
        return path

    def _rename_models(self, rename: Callable[[str], str]) -> "KADConfig":
        """The same config with other names for the models that are given."""
        base = None if self.base is None else rename(self.base)
        return replace(self, base=base, proxy=None if self.proxy is None else rename(self.proxy))

    def _to_json(self) -> str:
        return json.dumps({"transformers_kad_version": __version__, **asdict(self)}, indent=2) + "\n"

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        revision: str | None = None,
        token: str | bool | None = None,
        subfolder: str | None = None,
    ) -> "KADConfig":
        """Read `kad_config.json` from a local folder or a Hub repo.

        Folders that the file names relative to its own place are returned as absolute paths. Keys that this version
        does not know, such as those of a newer version, are ignored with a warning.

        Args:
            pretrained_model_name_or_path: a folder, or a Hub repo id.
            revision: branch, tag or commit of the Hub repo.
            token: Hub token, for private repos.
            subfolder: folder inside the folder or repo.

        Raises:
            FileNotFoundError: the folder or the repo has no such file, or there is no such folder or repo.
            ValueError: the file is not valid JSON (a key that appears twice included), or holds a value that is of a
                wrong type or out of range. The file is named.
        """
        source = check_source(pretrained_model_name_or_path)
        is_folder = Path(source).is_dir()
        if is_folder:
            path = Path(source) / (subfolder or "") / CONFIG_NAME
            if not path.is_file():
                raise FileNotFoundError(f"No {CONFIG_NAME} in {str(path.parent)!r}. Write one with save_pretrained().")
        else:
            try:
                path = Path(cached_file(source, CONFIG_NAME, revision=revision, token=token, subfolder=subfolder))
            except OSError as error:
                raise FileNotFoundError(
                    f"{source!r} is no folder here, and {CONFIG_NAME} could not be loaded from the Hub: {error}"
                ) from error
        config = cls._from_file(path)
        if is_folder:
            return config._rename_models(lambda name: resolve_name(name, path.parent))
        # In a config that lies beside the proxy itself, "." is the repo.
        return config if subfolder else config._rename_models(lambda name: source if name == "." else name)

    @classmethod
    def _from_file(cls, path: Path) -> "KADConfig":
        try:
            content = parse_json(path.read_bytes())
        except ValueError as error:
            raise ValueError(f"{str(path)!r} is not valid JSON: {error}.") from error
        if not isinstance(content, dict):
            raise ValueError(f"{str(path)!r} must hold a JSON object, got {content!r:.200}.")
        version, known = content.pop("transformers_kad_version", "unknown"), [f.name for f in fields(cls)]
        for key in [key for key in content if key not in known]:
            logger.warning(
                f"{unknown_name_message('key', key, known)} It is ignored. The file {str(path)!r} was written by "
                f"transformers-kad {version}, this is {__version__}."
            )
        try:
            return cls(**{key: value for key, value in content.items() if key in known})
        except (TypeError, ValueError) as error:
            raise ValueError(f"The settings in {str(path)!r} can't be used: {error}") from error

    def push_to_hub(self, repo_id: str, *, token: str | bool | None = None, private: bool | None = None) -> str:
        """Upload `kad_config.json` to a Hub repo, made if it is missing, and return the commit's address."""
        api = HfApi(token=token)
        api.create_repo(repo_id, private=private, exist_ok=True)
        commit = api.upload_file(
            path_or_fileobj=self._to_json().encode(),
            path_in_repo=CONFIG_NAME,
            repo_id=repo_id,
            commit_message="Upload KAD configuration",
        )
        return str(commit.commit_url)


def check_settings(
    rule: Rule,
    *,
    component_temperature: object,
    num_assistant_tokens: object,
    drafter: object,
    compile: object,
    lazy: object,
    verification: object,
) -> None:
    """Raise unless the settings that a processor and its config share are in range and can be combined.

    Raises:
        ValueError: the name and the value of the first setting that can't be used, and what to do.
    """
    if (
        isinstance(component_temperature, bool)
        or not isinstance(component_temperature, Real)
        or not 0 < as_float(component_temperature) < float("inf")
    ):
        raise ValueError(f"`component_temperature` must be a positive number, got {component_temperature!r:.200}.")
    if num_assistant_tokens != "auto" and (
        isinstance(num_assistant_tokens, bool) or not isinstance(num_assistant_tokens, int) or num_assistant_tokens < 1
    ):
        raise ValueError(
            f'`num_assistant_tokens` must be a positive integer or "auto", got {num_assistant_tokens!r:.200}.'
        )
    if drafter not in DRAFTERS:
        raise ValueError(unknown_name_message("drafter", drafter, DRAFTERS))
    if verification not in VERIFICATIONS:
        raise ValueError(unknown_name_message("verification", verification, VERIFICATIONS))
    for name, value in (("compile", compile), ("lazy", lazy)):
        if not isinstance(value, bool):
            raise TypeError(f"`{name}` must be True or False, got {value!r:.200}.")
    if num_assistant_tokens == "auto" and drafter != "proxy":
        raise ValueError(
            f'`num_assistant_tokens="auto"` weighs what steps of the proxy cost, and drafter={drafter!r} has none: '
            "pass a number."
        )
    if num_assistant_tokens == "auto" and compile:
        raise ValueError(
            '`compile=True` compiles for one draft length, got num_assistant_tokens="auto": pass a number.'
        )
    if lazy and (not isinstance(rule, DeferralRule) or rule.needs_proxy):
        masks = [name for name, kind in RULES.items() if issubclass(kind, DeferralRule) and not kind.needs_proxy]
        raise ValueError(
            f"`lazy=True` needs a deferral rule whose mask does not depend on q ({', '.join(masks)}), got {rule!r}: "
            "take one of those, or leave out `lazy`."
        )
