"""The settings of a KAD processor, which no call of `generate` changes."""

from dataclasses import dataclass, fields
from typing import Any

from ..configuration import DEFAULT_VERIFICATION, check_settings
from ..models.vocabulary import VocabularyAlignment
from ..rules.base import Rule


@dataclass(frozen=True, eq=False)
class DecodingSettings:
    """How a `KADLogitsProcessor` decodes. Its constructor documents the fields.

    Raises:
        ValueError: a value out of range, or two settings that exclude each other.
    """

    rule: Rule
    component_temperature: float = 1.0
    num_assistant_tokens: int | str = 5
    drafter: str = "proxy"
    compile: bool = False
    lazy: bool = False
    verification: str = DEFAULT_VERIFICATION
    trace: bool = False
    tokenizer: Any = None
    vocabulary_alignment: VocabularyAlignment | None = None

    def __post_init__(self) -> None:
        check_settings(
            self.rule,
            component_temperature=self.component_temperature,
            num_assistant_tokens=self.num_assistant_tokens,
            drafter=self.drafter,
            compile=self.compile,
            lazy=self.lazy,
            verification=self.verification,
        )
        if self.lazy and self.trace:
            raise ValueError(
                "`lazy=True` and `trace=True` can't be combined: a record shows q, which is unknown wherever the "
                "proxy is not asked. Leave out one of them."
            )

    def __repr__(self) -> str:
        """The settings as the `repr` of a processor shows them: the first three, and what is not at its default."""
        shown = {"rule", "component_temperature", "num_assistant_tokens"}
        hidden = {"trace", "tokenizer"}
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in hidden}
        default = {f.name: f.default for f in fields(self)}
        return ", ".join(f"{k}={v!r}" for k, v in values.items() if k in shown or v != default[k])
