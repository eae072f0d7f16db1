"""Forwards of models: counted and timed where they happen, or timed on their own."""

import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import Any, Self

import torch
from torch import nn
from transformers import Cache, PreTrainedModel

from ...models.cached_model import CachedModel
from ...models.static_model import StaticCacheModel
from .bounds import Shape

Clock = Callable[[], float]

IN_A_ROW = 3


def clock_of(device: torch.device) -> Clock:
    """A clock that first waits for the device to finish."""
    if device.type == "cpu":
        return time.perf_counter

    def wait_and_read() -> float:
        torch.accelerator.synchronize(device)
        return time.perf_counter()

    return wait_and_read


class ForwardMeter:
    """Counts the forwards of some models in a block by their shape, and times them.

    Compiled forwards are none of the model's, and must not run in the block: the hooks would be compiled with them.

    Args:
        models: the models by name.
        clock: None: forwards are counted and not timed, which costs a device nothing.

    Attributes:
        counts: forwards of each shape.
        seconds: the times of each shape.
    """

    def __init__(self, models: Mapping[str, nn.Module], clock: Clock | None) -> None:
        self._models, self._clock = models, clock
        self.counts: Counter[Shape] = Counter()
        self.seconds: dict[Shape, list[float]] = {}

    def __enter__(self) -> Self:
        self._handles = []
        for name, model in self._models.items():
            self._handles.append(model.register_forward_pre_hook(partial(self._begin, name), with_kwargs=True))
            self._handles.append(model.register_forward_hook(self._end))
        return self

    def __exit__(self, *exception: object) -> None:
        for handle in self._handles:
            handle.remove()

    def of(self, model: str) -> list[float]:
        """The times of all forwards of a model."""
        return [seconds for shape, times in self.seconds.items() if shape.model == model for seconds in times]

    def _begin(self, name: str, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
        self._shape = Shape(name, *ids.shape)
        self.counts[self._shape] += 1
        if self._clock is not None:
            self._began = self._clock()

    def _end(self, model: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self._clock is not None:
            self.seconds.setdefault(self._shape, []).append(self._clock() - self._began)


class CacheMeter:
    """Looks at the key-value caches that some models are called with in a block.

    Args:
        models: the models by name.
        every: look at every so manieth forward of each.
    """

    def __init__(self, models: Mapping[str, nn.Module], every: int = 16) -> None:
        self._models, self._every = models, every
        self._forwards: Counter[str] = Counter()
        # For each model: tokens held, bytes, and bytes over those of the keys and values of these tokens alone.
        self._seen: dict[str, list[tuple[int, int, float]]] = {name: [] for name in models}

    def __enter__(self) -> Self:
        self._handles = [
            model.register_forward_pre_hook(partial(self._look, name), with_kwargs=True)
            for name, model in self._models.items()
        ]
        return self

    def __exit__(self, *exception: object) -> None:
        for handle in self._handles:
            handle.remove()

    @property
    def bytes(self) -> int:
        """The largest size of each model's cache, added up."""
        return sum(max((size for _, size, _ in seen), default=0) for seen in self._seen.values())

    @property
    def over_ideal(self) -> float | None:
        """The most that a cache was larger than keys and values of its texts' tokens, in the later half of the texts.

        A text that begins has more padding, holes and room than tokens. None if no cache was seen.
        """
        ratios = []
        for seen in self._seen.values():
            longest = max((tokens for tokens, _, _ in seen), default=0)
            ratios += [ratio for tokens, _, ratio in seen if 2 * tokens >= longest]
        return max(ratios, default=None)

    def _look(self, name: str, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._forwards[name] += 1
        cache = kwargs.get("past_key_values")
        if self._forwards[name] % self._every or not isinstance(cache, Cache) or not cache.get_seq_length():
            return
        mask, length = kwargs.get("attention_mask"), int(cache.get_seq_length())
        tensors = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
        size = sum(tensor.nbytes for tensor in tensors)
        rows = tensors[0].shape[0]
        held = rows * length if mask is None or mask.dim() != 2 else int(mask[:, :length].sum())
        ideal = held * sum(tensor.shape[1] * tensor.shape[3] * tensor.element_size() for tensor in tensors)
        self._seen[name].append((held, size, size / ideal))


class ForwardTimer:
    """Times forwards of random tokens on their own, each kind in turn: what bounds are made of.

    Args:
        models: the models by name.
        shapes: forwards behind a text that the cache holds.
        prompts: forwards with nothing in the cache.
        held: tokens of that text. It is read once.
    """

    def __init__(
        self,
        models: Mapping[str, PreTrainedModel],
        shapes: Collection[Shape],
        prompts: Collection[Shape],
        *,
        held: int,
    ) -> None:
        self._models, self._shapes, self._prompts, self._held = models, sorted(shapes), sorted(prompts), held
        self._filled: dict[tuple[str, int], CachedModel] = {}
        self._texts: dict[tuple[str, int], tuple[torch.Tensor, torch.Tensor]] = {}
        longest = max((shape.tokens for shape in (*shapes, *prompts)), default=0)
        for shape in (*self._shapes, *self._prompts):
            place, model = (shape.model, shape.rows), models[shape.model]
            if place not in self._texts:
                self._texts[place] = _random_texts(model, shape.rows, held + longest)
        for shape in self._shapes:
            place = (shape.model, shape.rows)
            if place not in self._filled:
                self._filled[place] = CachedModel(models[shape.model], shape.model)
                ids, mask = self._texts[place]
                self._filled[place].logits(ids[:, :held], mask[:, :held])

    def measure(self) -> dict[Shape, list[float]]:
        """Seconds of each shape, the model's forward alone.

        Those behind a text are run several times in a row, as a proxy's steps are: the first finds the processor's
        caches full of other weights.
        """
        seconds: dict[Shape, list[float]] = {}
        for shape in self._shapes:
            place, end = (shape.model, shape.rows), self._held + shape.tokens
            cached, (ids, mask) = self._filled[place], self._texts[place]
            with self._meter(shape.model) as meter:
                for _ in range(IN_A_ROW):
                    cached.logits(ids[:, :end], mask[:, :end], logits_to_keep=shape.tokens, continues=True)
                    cached.crop(self._held)
            seconds |= meter.seconds
        for shape in self._prompts:
            ids, mask = self._texts[shape.model, shape.rows]
            cached = CachedModel(self._models[shape.model], shape.model)
            with self._meter(shape.model) as meter:
                cached.logits(ids[:, : shape.tokens], mask[:, : shape.tokens])
            seconds |= meter.seconds
        return seconds

    def _meter(self, name: str) -> ForwardMeter:
        model = self._models[name]
        return ForwardMeter({name: model}, clock_of(model.device))


def time_compiled_forwards(compiled: StaticCacheModel, *, held: int) -> list[float]:
    """Seconds of some steps in a row of a compiled model, of its width behind `held` tokens, with what fills them up.

    Compiles nothing that was run before.
    """
    clock = clock_of(compiled.model.device)
    ids, _ = _random_texts(compiled.model, 1, held + compiled.width)
    compiled.reserve(held + compiled.width)
    compiled.logits(ids[:, :held])
    seconds = []
    for _ in range(IN_A_ROW):
        begun = clock()
        compiled.logits(ids, logits_to_keep=compiled.width, continues=True)
        seconds.append(clock() - begun)
        compiled.crop(held)
    compiled.reset()
    return seconds


def _random_texts(model: PreTrainedModel, rows: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask `(rows, length)`; of several rows every other one has a column of padding, as batches have."""
    vocabulary = model.get_input_embeddings().weight.shape[0]
    ids = torch.randint(vocabulary, (rows, length), device=model.device)
    mask = torch.ones_like(ids)
    mask[1::2, 0] = 0
    return ids, mask
