"""A stand-in for the V1 engine of vLLM, as far as it decides what a logits processor is told.

It follows what `vllm/v1/sample/logits_processor/interface.py` of vLLM 0.32 documents:

- Requests have rows in a batch that lasts from step to step. A request that joins takes the lowest empty row, and rows
  that stay empty are closed by moving requests from the end. Requests may change places.
- The list of a request's output tokens is the same object from step to step, and grows.
- A prompt that is read in chunks has a row, whose token is thrown away until the whole prompt was read.
- A request that was preempted leaves the batch, and joins again later with its output so far, in a list of its own.
"""

import enum
from dataclasses import dataclass, field
from types import SimpleNamespace

import torch


class Direction(enum.Enum):
    UNIDIRECTIONAL = enum.auto()
    SWAP = enum.auto()


@dataclass(frozen=True)
class BatchUpdate:
    batch_size: int
    removed: list
    added: list
    moved: list


@dataclass(eq=False)
class Request:
    prompt: list
    new: int
    params: object
    output: list = field(default_factory=list)
    unread: int = 0  # tokens that the engine has still to read before it draws the next one


def sampling_params(kad=None):
    return SimpleNamespace(extra_args=None if kad is None else {"kad": kad})


def engine_settings(base, *, longest=512, tokenizer=None, speculative=None, prompt_embeds=False):
    """What the constructor of a processor looks at in a `VllmConfig`."""
    model = SimpleNamespace(
        model=str(base),
        tokenizer=str(tokenizer or base),
        max_model_len=longest,
        skip_tokenizer_init=tokenizer is None,
        enable_prompt_embeds=prompt_embeds,
    )
    return SimpleNamespace(model_config=model, speculative_config=speculative)


class FakeEngine:
    """Decodes requests with a base and a processor.

    Args:
        base: the base, which reads the whole text of every request at every step.
        processor: the logits processor.
        rows: how many requests may run at once.
        chunk: how many tokens of a prompt are read in a step.
        unrest: the probability at every step that two requests change places, and that one is preempted.
        generator: of what is left to chance, and of sampling; greedy without it.
        sample: draw tokens, or take the likeliest.
    """

    def __init__(self, base, processor, *, rows=6, chunk=512, unrest=0.0, seed=0, sample=False):
        self.base = base
        self.processor = processor
        self.rows, self.chunk, self.unrest, self.sample = rows, chunk, unrest, sample
        self.generator = torch.Generator().manual_seed(seed)
        self.batch = []  # a request or None for each row
        self.steps = self.preemptions = self.swaps = 0

    def _luck(self):
        return float(torch.rand((), generator=self.generator))

    def run(self, requests):
        """The output tokens of all requests."""
        waiting = list(requests)
        for request in waiting:
            request.unread = len(request.prompt)
        while waiting or any(self.batch):
            self._schedule(waiting)
            self._step()
        return [request.output for request in requests]

    def _schedule(self, waiting):
        removed, added, moved = [], [], []
        for row, request in enumerate(self.batch):
            if request is not None and len(request.output) == request.new:
                self.batch[row] = None
                removed.append(row)
        running = [row for row, request in enumerate(self.batch) if request is not None]
        if len(running) > 1 and self._luck() < self.unrest:
            row = running[-1]
            request, self.batch[row] = self.batch[row], None
            removed.append(row)
            request.output = list(request.output)
            request.unread = len(request.prompt) + len(request.output)
            waiting.insert(int(self._luck() * 3), request)
            self.preemptions += 1
        while waiting and sum(request is not None for request in self.batch) < self.rows and self._luck() < 0.8:
            request = waiting.pop(0)
            row = min(removed, default=len(self.batch))
            if removed:
                removed.remove(row)
            else:
                self.batch.append(None)
            self.batch[row] = request
            added.append((row, request.params, request.prompt, request.output))
        for row in sorted(removed):  # the rows that are still empty
            last = max((at for at, request in enumerate(self.batch) if request is not None), default=-1)
            if last > row:
                self.batch[row], self.batch[last] = self.batch[last], None
                moved.append((last, row, Direction.UNIDIRECTIONAL))
        self.batch = self.batch[: sum(request is not None for request in self.batch)]
        if len(self.batch) > 1 and self._luck() < self.unrest:
            one, other = torch.randperm(len(self.batch), generator=self.generator)[:2].tolist()
            self.batch[one], self.batch[other] = self.batch[other], self.batch[one]
            moved.append((one, other, Direction.SWAP))
            self.swaps += 1
        update = BatchUpdate(len(self.batch), sorted(removed, reverse=True), added, moved)
        self.processor.update_state(update if removed or added or moved else None)

    def _step(self):
        if not self.batch:
            return
        self.steps += 1
        logits = []
        for request in self.batch:
            request.unread = max(request.unread - self.chunk, 0)
            text = request.prompt + request.output
            read = text[: len(text) - request.unread]
            with torch.no_grad():
                logits.append(self.base(torch.tensor([read])).logits[0, -1].float())
        stacked = self.processor.apply(torch.stack(logits))
        if self.sample:
            tokens = torch.multinomial(stacked.softmax(-1), 1, generator=self.generator)[:, 0]
        else:
            tokens = stacked.argmax(-1)
        for request, token in zip(self.batch, tokens.tolist(), strict=True):
            if request.unread == 0:
                request.output.append(token)
                request.unread = 1
