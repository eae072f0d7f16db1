"""A stand-in for vLLM's Model Runner V2, as far as it decides what a logits processor is told.

It follows `vllm/v1/worker/gpu` of vLLM 0.32:

- A request has a slot as long as it runs. Slots are recycled, the last freed first, and keep the tokens of the request
  before. A request that was preempted joins again, with its output so far as a part of what is read first.
- The rows of logits are those of the requests of a step, in an order that changes. A request owns a row for its last
  token, and one for each drafted token. `pos` is where the input token of a row stands in the text.
- Drafted tokens are in `input_ids` alone; what was accepted is among the committed tokens in the next step.
- The row of a prompt that was not read to its end is thrown away. Where a step ends the prompt, rows of a draft are
  placeholders, with -1 in `input_ids`.
- A large batch is handed to the processors in parts.
"""

from dataclasses import dataclass, field
from types import SimpleNamespace

import numpy as np
import torch

from transformers_kad.decoding.verification import verify


@dataclass(eq=False)
class Request:
    prompt: list
    new: int
    params: object
    drafter: object = None  # from the text so far to the next tokens, of which some are drafted
    output: list = field(default_factory=list)
    read: int = 0  # tokens that the engine has read


def request_state(slots, longest=512):
    """What a processor reads of a `LogitsProcRequestState`."""
    return SimpleNamespace(
        device=torch.device("cpu"),
        all_token_ids=SimpleNamespace(gpu=torch.zeros(slots, longest, dtype=torch.int32)),
        prefill_len=SimpleNamespace(np=np.zeros(slots, dtype=np.int32)),
    )


def context(rows):
    """A `LogitsContext` of rows (slot, place among the rows of the request, position, input token)."""
    slots, places, positions, tokens = torch.tensor(rows).T
    return SimpleNamespace(
        expanded_idx_mapping=slots.int(), expanded_local_pos=places.int(), pos=positions, input_ids=tokens.int()
    )


class FakeV2Engine:
    """Decodes requests with a base and a processor.

    Args:
        base: the base, which reads whole texts without a cache.
        processor: makes the logits processor of the state of the requests.
        slots: how many requests may run at once.
        chunk: how many tokens of a prompt are read in a step.
        longest_draft: how many tokens are drafted at most; the number is drawn for each request and step.
        unrest: the probability at every step that a request is preempted, that one is left out of the step, that
            the batch is handed over in two parts, and for each prompt that its last chunk has placeholders.
        sample: draw tokens, or take the likeliest.
    """

    def __init__(self, base, processor, *, slots=6, chunk=512, longest_draft=0, unrest=0.0, seed=0, sample=False):
        self.base = base
        self.state = request_state(slots)
        self.processor = processor(self.state)
        self.chunk, self.longest_draft, self.unrest, self.sample = chunk, longest_draft, unrest, sample
        self.generator = torch.Generator().manual_seed(seed)
        self.free, self.running = list(range(slots)), {}
        self.steps = self.preemptions = self.accepted = self.refused = self.placeholders = self.parts = 0
        self._known = {}

    def _luck(self):
        return float(torch.rand((), generator=self.generator))

    def _below(self, limit):
        return int(torch.randint(limit, (), generator=self.generator))

    def run(self, requests):
        """The output tokens of all requests."""
        waiting = list(requests)
        while waiting or self.running:
            self._schedule(waiting)
            self._step()
        return [request.output for request in requests]

    def _schedule(self, waiting):
        for slot, request in list(self.running.items()):
            if len(request.output) == request.new:
                self._leave(slot)
        if len(self.running) > 1 and self._luck() < self.unrest:
            slot = list(self.running)[self._below(len(self.running))]
            waiting.insert(0, self._leave(slot))
            self.preemptions += 1
        while waiting and self.free and (self._luck() < 0.8 or self.sample):
            slot, request = self.free.pop(), waiting.pop(0)
            text = request.prompt + request.output
            self.running[slot], request.read = request, 0
            self.state.prefill_len.np[slot] = len(text)
            self.state.all_token_ids.gpu[slot, : len(text)] = torch.tensor(text)
            self.processor.add_request(slot, request.params)

    def _leave(self, slot):
        self.free.append(slot)
        return self.running.pop(slot)

    def _step(self):
        self.steps += 1
        slots = [slot for slot in self.running if self._luck() > self.unrest / 2]
        slots = [slots[at] for at in torch.randperm(len(slots), generator=self.generator)]
        if len(slots) > 1 and self._luck() < self.unrest:
            self.parts += 1
            middle = len(slots) // 2
            self._step_of(slots[:middle])
            self._step_of(slots[middle:])
        elif slots:
            self._step_of(slots)

    def _draft(self, slot):
        """The position of a request's first row, and its draft."""
        request, prefill = self.running[slot], int(self.state.prefill_len.np[slot])
        text = request.prompt + request.output
        if request.read < prefill:
            request.read = min(request.read + self.chunk, prefill)
            if request.read == prefill and self._luck() < self.unrest:
                self.placeholders += 1
                return prefill - 1, [-1] * self.longest_draft
            return request.read - 1, []
        most = min(self.longest_draft, request.new - len(request.output) - 1)
        if not most:
            return len(text) - 1, []
        return len(text) - 1, request.drafter(text)[: most if self.sample else self._below(most + 1)]

    def _step_of(self, slots):
        rows, logits, drafts = [], [], {}
        for slot in slots:
            request = self.running[slot]
            position, draft = drafts[slot] = self._draft(slot)
            text = (request.prompt + request.output)[: position + 1]
            rows += [(slot, at, position + at, token) for at, token in enumerate([text[-1], *draft])]
            logits.append(self._logits(tuple(text), tuple(draft)))
        order = torch.randperm(len(rows), generator=self.generator)
        found = self.processor.apply(torch.cat(logits)[order], context([rows[at] for at in order]))
        found = found[order.argsort()]
        for slot, own in zip(slots, found.split([len(part) for part in logits]), strict=True):
            position, draft = drafts[slot]
            if position + 1 >= int(self.state.prefill_len.np[slot]):
                self._commit(slot, own, [token for token in draft if token >= 0])

    def _logits(self, text, draft):
        """The base's logits of the rows of a request; those of placeholders mean nothing."""
        if (text, draft) not in self._known:
            ids = torch.tensor([[*text, *(max(token, 0) for token in draft)]])
            with torch.no_grad():
                self._known[text, draft] = self.base(ids).logits[0, len(text) - 1 :].float()
        return self._known[text, draft]

    def _commit(self, slot, logits, draft):
        """Rejection as vLLM does it, with a deterministic draft."""
        target = logits[: len(draft) + 1].softmax(-1)[None]
        ids = torch.tensor([draft], dtype=torch.long).reshape(1, -1)
        one_hot = torch.nn.functional.one_hot(ids, target.shape[-1]).to(target)
        accepted, following = verify(target, one_hot, ids, do_sample=self.sample, generator=self.generator)
        self.accepted += int(accepted)
        self.refused += len(draft) - int(accepted)
        request = self.running[slot]
        begin = len(request.prompt) + len(request.output)
        request.output += [*draft[: int(accepted)], int(following)]
        end = len(request.prompt) + len(request.output)
        self.state.all_token_ids.gpu[slot, begin:end] = torch.tensor(request.output[begin - end :])
