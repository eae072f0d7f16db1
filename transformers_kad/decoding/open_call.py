"""One running call of `generate`, as the steps and the loop of a KAD processor need to know it."""

import threading
from dataclasses import dataclass, field, replace

import torch

from ..records.recorders import BatchRecorder, StepRecorder
from ..records.statistics import KADStatistics, SequenceStatistics, add_up
from ..records.trace import KADTrace
from .ended_rows import EndedRows
from .parallel import OneProcess
from .proxy_models import ProxyModels
from .proxy_text import TextMap
from .rule_memory import RuleMemory
from .settings import DecodingSettings


@dataclass(eq=False)
class OpenCall:
    """The state that lives as long as one call. A question by hand, outside `generate`, is a call of one step.

    Attributes:
        settings: the processor's settings.
        models: the proxy and the reference, with their caches.
        proxy_text: maps the base's texts to the proxy's.
        recorder: collects the statistics and the trace; None for a question by hand.
        prompt_length: length of the prompts that `generate` starts from, in columns.
        proxy_prompt_length: the same of the proxy's prompts; None means that a text is all prompt.
        batch_size: number of prompts.
        beams: beams for each prompt; 1 without beam search.
        eos_token_ids: ids that end a text.
        pad_token_id: the id that finished rows are filled up with.
        chunk_size: prompts are forwarded at most so many tokens at a time; None means all at once.
        rows_stay: whether row i of every step continues row i of the step before.
        prompt_inputs: further inputs of the prompts that the proxy gets too, see `CachedModel.use_prompt_inputs`.
        prompt_mask: attention mask of the proxy's prompts.
        rule_memory: the states of a rule with a memory; None for other rules.
        ended_rows: knows which rows have ended, token by token; None where that is not told row by row, as in beams.
        ranks: the processes that compute the call together, since they share a model, or this one alone.
        thread: the thread that runs the call.
        base_forwards: forwards of the base so far.
        earlier_proxy_forwards: forwards of the proxy before the call.
        finished: whether the call has returned, so that the caches are as it left them.
        closed: whether the processor is free for another call.
    """

    settings: DecodingSettings
    models: ProxyModels
    proxy_text: TextMap
    recorder: StepRecorder | BatchRecorder | None = None
    prompt_length: int = 0
    proxy_prompt_length: int | None = None
    batch_size: int = 1
    beams: int = 1
    eos_token_ids: frozenset[int] = frozenset()
    pad_token_id: int | None = None
    chunk_size: int | None = None
    rows_stay: bool = True
    prompt_inputs: dict[str, torch.Tensor] = field(default_factory=dict)
    prompt_mask: torch.Tensor | None = None
    rule_memory: RuleMemory | None = None
    ended_rows: EndedRows | None = None
    ranks: OneProcess = field(default_factory=OneProcess)
    thread: int = field(default_factory=threading.get_ident)
    base_forwards: int = 0
    earlier_proxy_forwards: int = 0
    finished: bool = False
    closed: bool = False

    @property
    def is_in_this_thread(self) -> bool:
        """Whether the code that asks runs in the thread of the call."""
        return self.thread == threading.get_ident()

    def ended(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Which of the texts `(rows, L)` have ended, `(rows,)` boolean; none of them where that is not known."""
        known = None if self.ended_rows is None else self.ended_rows.flags
        if known is None or len(known) != len(input_ids):
            return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
        return known

    def trace_so_far(self) -> KADTrace | None:
        """The trace and the statistics of the rounds that have ended, for a page that shows a text while it grows.

        It is to be asked for in the thread of the call, for example by a streamer. None where decoding is token by
        token or no trace is kept.
        """
        if not isinstance(self.recorder, BatchRecorder):
            return None
        statistics, trace = self.recorder.finish()
        return None if trace is None else replace(trace, statistics=self._add_up(statistics))

    def finish(self, sequences: torch.Tensor) -> tuple[KADStatistics, KADTrace | None]:
        """Statistics and trace of the call, which returned the sequences `(N, L)`."""
        if isinstance(self.recorder, BatchRecorder):
            statistics, trace = self.recorder.finish()
        else:
            assert self.recorder is not None
            rows = list(range(len(sequences)))
            if self.beams > 1:  # all beams of a prompt start alike, so its first stands for them
                per_prompt = len(sequences) // self.batch_size
                rows = [row // per_prompt * self.beams for row in rows]
                lengths = self.recorder.beam_lengths(sequences, self.prompt_length, rows)
            else:
                lengths = self._emitted_tokens(sequences)
            statistics, trace = self.recorder.finish(sequences, self.prompt_length, lengths, rows)
        return self._add_up(statistics), trace

    def _add_up(self, statistics: list[SequenceStatistics]) -> KADStatistics:
        """The statistics of the call from those of its sequences."""
        proxy_forwards = self.models.proxy_forwards - self.earlier_proxy_forwards
        return add_up(statistics, base_forwards=self.base_forwards, proxy_forwards=proxy_forwards)

    def _emitted_tokens(self, sequences: torch.Tensor) -> list[int]:
        """The number of tokens that each row emitted, for sequences `(B, L)`."""
        longest = sequences.shape[1] - self.prompt_length
        if len(sequences) == 1:
            return [longest]
        known = None if self.ended_rows is None else self.ended_rows.lengths
        if known is not None and len(known) == len(sequences):
            return [min(length - self.prompt_length, longest) for length in known.tolist()]
        # A decoding method of the user's that does not ask the stopping criteria as `generate` does.
        return [self._tokens_before_padding(ids) for ids in sequences[:, self.prompt_length :].tolist()]

    def _tokens_before_padding(self, ids: list[int]) -> int:
        """How many tokens a generated row seems to have: up to its end of sequence, or without the padding.

        Where no criterion of the user's may have ended it, padding behind no end of sequence is text.
        """
        length = len(ids)
        for index, token in enumerate(ids):
            if token in self.eos_token_ids:
                return index + 1
        if self.ended_rows is not None and not self.ended_rows.asks_criteria:
            return length
        while self.eos_token_ids and length and ids[length - 1] == self.pad_token_id:
            length -= 1
        return length
