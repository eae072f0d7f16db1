"""KADConfig: how to decode with KAD, saved beside an adapter or shared on the Hub."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from numbers import Real
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

from ._version import __version__
from .rules.composition import Rule, make_rule, unknown_name_message
from .rules.deferral import as_float
from .utils.files import write_whole
from .utils.sources import check_source, portable_name, resolve_name
from .utils.strict_json import parse_json

CONFIG_NAME = "kad_config.json"


def check_settings(component_temperature: object, num_assistant_tokens: object) -> None:
    """Raise unless the two settings that a processor and its config share are in range."""
    if (
        isinstance(component_temperature, bool)
        or not isinstance(component_temperature, Real)
        or not 0 < as_float(component_temperature) < float("inf")
    ):
        raise ValueError(f"`component_temperature` must be a positive number, got {component_temperature!r}.")
    if num_assistant_tokens != "auto" and (
        isinstance(num_assistant_tokens, bool) or not isinstance(num_assistant_tokens, int) or num_assistant_tokens < 1
    ):
        raise ValueError(f'`num_assistant_tokens` must be a positive integer or "auto", got {num_assistant_tokens!r}.')


DRAFTERS = ("proxy", "prompt_lookup")


def check_drafter(drafter: str, num_assistant_tokens: object) -> str:
    """Raise unless there is such a drafter, and its draft length can be had."""
    if drafter not in DRAFTERS:
        raise ValueError(unknown_name_message("drafter", drafter, DRAFTERS))
    if drafter != "proxy" and num_assistant_tokens == "auto":
        raise ValueError(
            f'`num_assistant_tokens="auto"` weighs what steps of the proxy cost, and drafter={drafter!r} has none: '
            "pass a number."
        )
    return drafter


@dataclass(frozen=True)
class KADConfig:
    """The settings of a `KADLogitsProcessor`, without the models.

    Args:
        rule: a name from `RULES`.
        parameters: the rule's parameters, for example `{"threshold": 0.4}`.
        component_temperature: both models' logits are divided by it before the rule sees them.
        num_assistant_tokens: draft length of speculative decoding, or "auto".
        base: Hub id or folder of the base model, for the record.
        proxy: Hub id or folder of the proxy, for the record.

    Raises:
        ValueError: an unknown rule or a value out of range.
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

    def __post_init__(self) -> None:
        if not isinstance(self.parameters, Mapping):
            raise TypeError(f"`parameters` must map names to values, got {self.parameters!r:.200}.")
        for name in ("base", "proxy"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, str):
                raise TypeError(f"`{name}` must be the id or path of a model, as text, or None; got {value!r:.200}.")
        object.__setattr__(self, "parameters", dict(self.parameters))  # the caller may change theirs
        self.make_rule()
        check_settings(self.component_temperature, self.num_assistant_tokens)

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
        names: dict[str, Any] = {name: portable_name(value, folder) for name, value in self._models().items()}
        write_whole(path, replace(self, **names)._to_json())
        return path

    def _models(self) -> dict[str, str]:
        """The names of the models that are given."""
        return {name: value for name, value in (("base", self.base), ("proxy", self.proxy)) if value is not None}

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

        Folders that it names relative to its own place are returned as absolute paths.

        Args:
            pretrained_model_name_or_path: a folder, or a Hub repo id.
            revision: branch, tag or commit of the Hub repo.
            token: Hub token, for private repos.
            subfolder: folder inside the folder or repo.

        Raises:
            FileNotFoundError: the local folder has no such file, or there is no such folder.
            ValueError: the file is not valid JSON (a key that appears twice included), or holds a key that this
                version does not know, or a value that is of a wrong type or out of range. The file is named.
        """
        folder = Path(check_source(pretrained_model_name_or_path))
        if folder.is_dir():
            path = folder / (subfolder or "") / CONFIG_NAME
            if not path.is_file():
                raise FileNotFoundError(f"No {CONFIG_NAME} in {str(path.parent)!r}. Write one with save_pretrained().")
        else:
            repo = str(pretrained_model_name_or_path)
            try:
                path = Path(hf_hub_download(repo, CONFIG_NAME, subfolder=subfolder, revision=revision, token=token))
            except HFValidationError as error:
                raise FileNotFoundError(f"{repo!r} is neither a folder nor the id of a Hub repo.") from error
            except LocalEntryNotFoundError as error:
                raise FileNotFoundError(
                    f"{repo!r} is no folder here, and {CONFIG_NAME} could not be had from the Hub: {error}"
                ) from error
        try:
            content = parse_json(path.read_bytes())
        except ValueError as error:
            raise ValueError(f"{str(path)!r} is not valid JSON: {error}.") from error
        if not isinstance(content, dict):
            raise ValueError(f"{str(path)!r} must hold a JSON object, got {content!r:.200}.")
        version = content.pop("transformers_kad_version", "unknown")
        known = [f.name for f in fields(cls)]
        for key in content:
            if key not in known:
                raise ValueError(
                    f"{unknown_name_message('key', key, known)} The file {str(path)!r} was written by "
                    f"transformers-kad {version}, this is {__version__}."
                )
        try:
            config = cls(**content)
        except (TypeError, ValueError) as error:
            raise ValueError(f"The settings in {str(path)!r} can't be used: {error}") from error
        names: dict[str, Any] = config._models()
        if folder.is_dir():
            names = {name: resolve_name(value, path.parent) for name, value in names.items()}
        elif not subfolder:  # a config that lies beside the proxy itself
            names = {name: repo if value == "." else value for name, value in names.items()}
        return replace(config, **names)

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
