"""Token by token: what stands in the list of processors of a call, and makes log r of the base's scores."""

from typing import NamedTuple

import torch
from transformers import LogitsProcessor

from ..models.cached_model import CachedModel
from ..models.model_errors import is_unusable, unusable_logits_error
from ..models.text_reader import tempered
from ..models.vocabulary import align_vocabulary
from ..records.recorders import StepRecorder
from ..rules.composition import compose, with_bans
from ..utils.transfers import is_synchronous
from .open_call import OpenCall


class TokenStep(LogitsProcessor):
    """Stands in for a KAD processor in the list of one call, so that only the call itself continues its texts.

    A processor may be asked by hand as well, by a stopping criterion for example. Were the processor itself in the
    list, it could not tell such a question from the next step of the call.
    """

    is_kad_processor = True

    def __init__(self, call: OpenCall) -> None:
        self.call = call
        self._last_shape: tuple[int, int] | None = None  # of the texts when the proxy last read them

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """See `KADLogitsProcessor.__call__`."""
        raise NotImplementedError

    def finish(self) -> None:
        """After the last step of a call, raise what could not be known before."""

    def _check_call(self) -> None:
        """Raise `RuntimeError` unless the call is open and runs in this thread, so that no other uses its caches."""
        if not self.call.is_in_this_thread:
            raise RuntimeError("This KAD processor is in use by a call of `generate` in another thread.")
        if self.call.closed:
            raise RuntimeError(
                "This step belongs to a call of `generate` that is over: pass the KAD processor to the next call."
            )

    def _proxy_texts(self, input_ids: torch.Tensor) -> "_ProxyTexts":
        """The base's texts `(rows, L)` as the proxy and the reference read them."""
        call = self.call
        before, self._last_shape = self._last_shape, (len(input_ids), input_ids.shape[1])
        is_longer = before is not None and before[0] == len(input_ids) and before[1] < input_ids.shape[1]
        return _ProxyTexts(
            *call.proxy_text(input_ids),
            continues=call.rows_stay and is_longer,
            chunk_size=call.chunk_size,
            prompt_length=call.proxy_prompt_length,
            ended=call.ended(input_ids),
        )

    def _in_base_vocabulary(self, logits: torch.Tensor, vocabulary: int) -> torch.Tensor:
        """Logits of the proxy or the reference over the base's vocabulary, tempered, `(rows, V)` float32."""
        settings = self.call.settings
        aligned = align_vocabulary(logits, vocabulary, settings.vocabulary_alignment)
        return tempered(aligned, settings.component_temperature)

    def _tempered_base(self, scores: torch.Tensor) -> torch.Tensor:
        """The base's scores with all bans at -inf, tempered."""
        return tempered(with_bans(scores), self.call.settings.component_temperature)

    def _rule_states(self, input_ids: torch.Tensor, parents: list[int] | None = None) -> torch.Tensor | None:
        """Of a rule with a memory, the states behind texts `(rows, L)`; None for other rules and questions by hand."""
        memory = self.call.rule_memory
        return None if memory is None else memory.begin_step(len(input_ids), input_ids.shape[1], parents)

    def _end_rule_step(self, input_ids: torch.Tensor, states: torch.Tensor | None) -> None:
        """Keep the states `(rows, ...)` behind the position after these texts."""
        if self.call.rule_memory is not None and states is not None:
            self.call.rule_memory.end_step(input_ids.shape[1], states)

    def _check(self, role: str, unusable: list[bool], position: int) -> None:
        """Raise if a row of a model's logits for a position is unusable."""
        if any(unusable):
            model = next((cached.model for cached in self.call.models if cached.role == role), None)
            raise unusable_logits_error(role, model, position, unusable.index(True))


class EagerStep(TokenStep):
    """Asks the proxy for q at every token.

    On other devices than the CPU, whether the logits were usable is read one step later, when `generate` has waited
    for the step already: it reads one step later as well whether all rows have ended.
    """

    def __init__(self, call: OpenCall) -> None:
        super().__init__(call)
        self._unchecked: tuple[torch.Tensor, int] | None = None  # (models, rows) of the newest step, and its position
        self._texts_before: torch.Tensor | None = None  # (rows, L) of the step before, where rows do not stay

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Log r of the next token of texts `(rows, L)`, for the base's scores `(rows, V)`."""
        self._check_call()
        self.finish()
        call, vocabulary = self.call, scores.shape[-1]
        texts = self._proxy_texts(input_ids)
        logits = [texts.logits(cached) for cached in call.models]
        parents = None if call.recorder is None else self._parents(input_ids)
        composition = compose(
            call.settings.rule,
            self._tempered_base(scores),
            *(self._in_base_vocabulary(of_model, vocabulary) for of_model in logits),
            state=self._rule_states(input_ids, parents),
        )
        self._end_rule_step(input_ids, composition.next_state)
        call.models.crop(texts.ids.shape[1])
        unusable = torch.stack([is_unusable(of_model).to(scores.device) for of_model in (scores, *logits)])
        self._unchecked = unusable & ~call.ended(input_ids), input_ids.shape[1]
        if is_synchronous(scores.device):
            self.finish()
        if isinstance(call.recorder, StepRecorder):
            call.recorder.record(input_ids, composition, parents)
            call.base_forwards += 1
        # `generate` chooses a token for rows that have ended too, and needs a distribution to do so.
        return composition.target_probs.log().masked_fill(unusable.any(0)[:, None], 0.0)

    def finish(self) -> None:
        """See `TokenStep.finish`: the logits of the newest step that was not checked yet."""
        if self._unchecked is None:
            return
        (unusable, position), self._unchecked = self._unchecked, None
        for role, rows in zip(("base", "proxy", "reference"), unusable.tolist(), strict=False):
            self._check(role, rows, position)

    def _parents(self, input_ids: torch.Tensor) -> list[int] | None:
        """The row of the step before that each of the texts `(rows, L)` continues; None where row i continues row i.

        Of several equal texts it is the first among the beams of the same prompt; without beams it is the row of the
        same number, if that is one of them. A text that continues none stands for the row of its own number.
        """
        if self.call.rows_stay:
            return None
        before, self._texts_before = self._texts_before, input_ids
        if before is None or before.shape[1] > input_ids.shape[1]:
            return list(range(len(input_ids)))
        same = torch.stack([(text[: before.shape[1]] == before).all(-1) for text in input_ids])
        rows = torch.arange(len(input_ids), device=input_ids.device)
        parents = torch.arange(len(before), device=input_ids.device)
        if self.call.beams > 1:
            same &= rows[:, None] // self.call.beams == parents // self.call.beams
        else:  # equal prompts are rows of their own
            same &= (rows[:, None] == parents) | ~(same & (rows[:, None] == parents)).any(-1, keepdim=True)
        return torch.where(same.any(-1), same.int().argmax(-1), rows).tolist()


class _ProxyTexts(NamedTuple):
    """What the proxy and the reference are to read: the arguments of `CachedModel.logits`."""

    ids: torch.Tensor  # (rows, L')
    mask: torch.Tensor | None = None
    continues: bool = False
    chunk_size: int | None = None
    prompt_length: int | None = None
    ended: torch.Tensor | None = None  # (rows,): rows whose logits nobody reads

    def logits(self, model: CachedModel) -> torch.Tensor:
        """A model's logits for the next token, in its own vocabulary, `(rows, V')`."""
        return model.logits(
            self.ids,
            self.mask,
            continues=self.continues,
            chunk_size=self.chunk_size,
            prompt_length=self.prompt_length,
            ended=self.ended,
        )[:, -1]
