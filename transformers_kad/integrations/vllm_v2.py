"""KAD in vLLM's Model Runner V2, whose processors see a row of logits for each drafted token as well.

vLLM loads the class by its name, and the settings are those of `vllm.py`:

    KAD_CONFIG=kad vllm serve BASE --logits-processors transformers_kad.integrations.vllm_v2:KADLogitsProcessorV2

It is written against the interface of vLLM 0.32, in `vllm/v1/worker/gpu/sample/logits_processor/interface.py`, and was
never run in an engine. docs/vllm.md tells more.
"""

from collections.abc import Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, NamedTuple

import torch

from .vllm import EngineProxy, GuidedRequest, check_request, guidance_of

if find_spec("vllm") is not None:
    from vllm.v1.worker.gpu.sample.logits_processor.interface import LogitsProcessor
else:  # for readers of the documentation and tests of what does not need the engine
    LogitsProcessor = object

if TYPE_CHECKING:
    from vllm import SamplingParams
    from vllm.config import VllmConfig
    from vllm.v1.worker.gpu.sample.logits_processor.interface import LogitsContext, LogitsProcRequestState


class _Row(NamedTuple):
    """A row of logits that belongs to a guided request."""

    place: int  # among the rows of its request
    position: int  # of its input token in the text
    token: int  # its input token
    row: int


class KADLogitsProcessorV2(LogitsProcessor):
    """Turns the base's logits of the rows in a batch of vLLM into log r.

    Under speculative decoding, vLLM applies processors to the rows of all drafted tokens before it accepts or refuses
    these. Every row gets the r of the text that leads to it: the committed tokens of its request and the drafted ones
    before the row. One forward of the proxy reads the newest token and the draft of all requests in the batch, and one
    more the prompts that join. What is refused is taken back in the next step.

    A prompt that vLLM reads in chunks is read as a whole with the last chunk; vLLM throws the rows of the others
    away. A request that was preempted joins again, and so does one that was left out of a step.

    Raises:
        ValueError: no settings or settings that can't be used, or a proxy that does not fit.
    """

    @classmethod
    def validate_params(cls, sampling_params: "SamplingParams") -> None:
        """See `check_request`."""
        check_request(sampling_params)

    def __init__(self, vllm_config: "VllmConfig", req_states: "LogitsProcRequestState") -> None:
        self._proxy = EngineProxy(vllm_config, req_states.device)
        self._req_states = req_states
        self._requests: dict[int, GuidedRequest] = {}  # the guided ones, by their slot; some may have ended

    def add_request(self, req_idx: int, sampling_params: "SamplingParams") -> bool:
        """Put a request into a slot, in which another one may have been. Returns whether it is guided."""
        self._requests.pop(req_idx, None)
        guidance = guidance_of(self._proxy.config, sampling_params)
        if guidance is not None:
            # The committed tokens are the prompt, and the draft of a step is the output.
            self._requests[req_idx] = GuidedRequest(guidance, [], [])
        return guidance is not None

    def apply(self, logits: torch.Tensor, ctx: "LogitsContext") -> torch.Tensor:
        """Log r in place of the base's logits `(n, V)`, in the rows of guided requests."""
        if self._requests:
            rows = self._rows_by_slot(ctx)
            self._read_committed(rows)
            for slot, own in rows.items():
                self._requests[slot].output = [row.token for row in own[1:]]
            if rows:
                self._proxy.guide(
                    logits, {self._requests[slot]: [row.row for row in own] for slot, own in rows.items()}
                )
        return logits

    def _rows_by_slot(self, ctx: "LogitsContext") -> dict[int, list[_Row]]:
        """The rows of each guided request that can become tokens, in the order of its text."""
        columns = (ctx.expanded_idx_mapping, ctx.expanded_local_pos, ctx.pos, ctx.input_ids)
        values = torch.stack([column.long() for column in columns], dim=-1).tolist()
        found: dict[int, list[_Row]] = {}
        for at, (slot, place, position, token) in enumerate(values):
            if slot in self._requests:
                found.setdefault(slot, []).append(_Row(place, position, token, at))
        prefill = self._req_states.prefill_len.np
        return {
            slot: _without_placeholders(sorted(own))
            for slot, own in found.items()
            if min(own).position >= prefill[slot] - 1  # the whole prompt was read
        }

    def _read_committed(self, rows: dict[int, list[_Row]]) -> None:
        """Bring the committed tokens of requests, up to their first row, from the device; all in one transfer."""
        slots, positions, counts = list[int](), list[int](), list[int]()
        for slot, own in rows.items():
            committed = self._requests[slot].prompt
            del committed[own[0].position + 1 :]
            new = range(len(committed), own[0].position + 1)
            slots += [slot] * len(new)
            positions += new
            counts.append(len(new))
        tokens = self._req_states.all_token_ids.gpu
        index = torch.tensor([slots, positions], dtype=torch.long, device=tokens.device)
        read = tokens[index[0], index[1]].tolist()
        for slot, count in zip(rows, counts, strict=True):
            self._requests[slot].prompt += read[:count]
            read = read[count:]


def _without_placeholders(rows: Sequence[_Row]) -> list[_Row]:
    """The rows up to the first whose token is a placeholder (-1) for a draft that there is not, which vLLM refuses."""
    end = next((at for at, row in enumerate(rows) if at and row.token < 0), len(rows))
    return list(rows[:end])
