"""The base's texts as the proxy reads them: after a prompt of its own, or in tokens of its own."""

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import torch

from ..models.forward_inputs import repeat_rows
from ..models.vocabulary import VocabularyAlignment

# Maps the base's texts (B, L) to the proxy's texts and their attention mask, (B, L') both; None means no padding.
TextMap: TypeAlias = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor | None]]


class ProxyPrompt(NamedTuple):
    """What the proxy reads in place of the base's prompts.

    Attributes:
        input_ids: `(B, P')`, padded on the left.
        attention_mask: `(B, P')`; None means no padding.
        further_inputs: `token_type_ids` and `position_ids`, `(..., B, P')` each, if they are given.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor | None
    further_inputs: dict[str, torch.Tensor]


def without_placeholders(
    input_ids: torch.Tensor, attention_mask: torch.Tensor | None, placeholders: list[int]
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Prompts `(B, P)` and their mask without the tokens that stand for images, `(B, P')` both, padded on the left.

    Raises:
        ValueError: a prompt has no other tokens.
    """
    if not placeholders:
        return input_ids, attention_mask
    is_placeholder = torch.isin(input_ids, torch.tensor(placeholders, device=input_ids.device))
    if not bool(is_placeholder.any()):
        return input_ids, attention_mask
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    kept = mask.bool() & ~is_placeholder
    lengths = kept.sum(dim=-1)
    if not bool(lengths.all()):
        raise ValueError(
            f"Prompt {int(lengths.argmin())} has placeholders of images or sound alone, and the proxy reads the rest: "
            "give it a prompt of its own, `with kad.proxy_prompt(inputs):`."
        )
    # A stable sort moves what is dropped to the left, where the padding is.
    order = kept.long().argsort(dim=-1, stable=True)[:, -int(lengths.max()) :]
    return input_ids.gather(1, order), kept.to(mask).gather(1, order)


class ProxyText:
    """Maps the texts of one call of `generate`. Its argument and result are those of `TextMap`.

    The rows of a text are the prompts, each repeated for its beams or return sequences.

    Args:
        prompt_length: length of the base's prompts, in columns.
        attention_mask: of the base's prompts, `(B, prompt_length)`; None means no padding.
        prompt: the proxy's own prompts and their mask, if they differ from the base's.
        vocabulary_alignment: how the proxy spells generated tokens, if it has a tokenizer of its own.
    """

    def __init__(
        self,
        prompt_length: int,
        attention_mask: torch.Tensor | None = None,
        prompt: tuple[torch.Tensor, torch.Tensor | None] | None = None,
        vocabulary_alignment: VocabularyAlignment | None = None,
    ) -> None:
        self._base_prompt_length = prompt_length
        self._own_prompt = None if prompt is None else prompt[0]
        self.prompt_mask = attention_mask if prompt is None else prompt[1]
        self._alignment = vocabulary_alignment
        self._spelled: _Spelled | None = None

    @property
    def prompt_length(self) -> int:
        """Length of the proxy's prompts, in columns."""
        return self._base_prompt_length if self._own_prompt is None else self._own_prompt.shape[1]

    def __call__(self, input_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The proxy's texts and their mask for texts `(rows, L)` of the base."""
        generated, mask = input_ids[:, self._base_prompt_length :], None
        prompt = input_ids[:, : self._base_prompt_length] if self._own_prompt is None else self._own_prompt
        if self._alignment is not None:
            generated, mask = self._spell(self._alignment, generated)
        ids = torch.cat([repeat_rows(prompt, len(generated)).to(generated), generated], dim=-1)
        if self.prompt_mask is None and mask is None:
            return ids, None
        prompt_mask = torch.ones_like(prompt) if self.prompt_mask is None else self.prompt_mask
        mask = torch.ones_like(generated) if mask is None else mask
        return ids, torch.cat([repeat_rows(prompt_mask, len(mask)).to(mask), mask], dim=-1)

    def _spell(self, alignment: VocabularyAlignment, generated: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Generated tokens in the proxy's spelling, and their mask. Only tokens that are new are spelled."""
        none = generated[:, :0]
        before, ids, mask, widths = self._spelled or _Spelled(none, none, none, [])
        shorter = min(before.shape[1], generated.shape[1])
        same = 0
        if len(before) == len(generated):
            same = int((before[:, :shorter] == generated[:, :shorter]).all(dim=0).long().cumprod(0).sum())
        kept = sum(widths[:same])
        new_ids, new_mask, new_widths = alignment.spell(generated[:, same:])
        if kept:
            new_ids, new_mask = torch.cat([ids[:, :kept], new_ids], -1), torch.cat([mask[:, :kept], new_mask], -1)
        self._spelled = _Spelled(generated, new_ids, new_mask, widths[:same] + new_widths)
        return new_ids, new_mask


class _Spelled(NamedTuple):
    """What was spelled last."""

    generated: torch.Tensor  # (rows, T): the base's tokens
    ids: torch.Tensor  # (rows, T'): the proxy's
    mask: torch.Tensor  # (rows, T')
    widths: list[int]  # columns of each of the T tokens
