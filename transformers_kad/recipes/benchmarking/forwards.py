"""Counts and times the forward passes of models, while a method runs or on their own."""

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

IN_A_ROW = 3  # measured forward passes of a shape, one after the other


def clock_of(device: torch.device) -> Clock:
    """A clock that waits for the device to finish before it reads the time."""
    if device.type == "cpu":
        return time.perf_counter

    def wait_and_read() -> float:
        torch.accelerator.synchronize(device)
        return time.perf_counter()

    return wait_and_read


class ForwardMeter:
    """Context manager that counts the forward passes of models by their shape, and times them.

    Compiled forward passes must not run inside, since the hooks would be compiled with them.

    Args:
        models: the models by name.
        clock: a clock to time with; None to count only, which does not slow down a device.

    Attributes:
        counts: the number of forward passes of each shape.
        seconds: the times of each shape, in seconds.
    """

    def __init__(self, models: Mapping[str, nn.Module], clock: Clock | None) -> None:
        self._models, self._clock = models, clock
        self.counts: Counter[Shape] = Counter()
        self.seconds: dict[Shape, list[float]] = {}

    def __enter__(self) -> Self:
        self._handles = []
        for name, model in self._models.items():
            self._handles.append(
                model.register_forward_pre_hook(partial(self._before_forward, name), with_kwargs=True)
            )
            self._handles.append(model.register_forward_hook(self._after_forward))
        return self

    def __exit__(self, *exception: object) -> None:
        for handle in self._handles:
            handle.remove()

    def of(self, model: str) -> list[float]:
        """The times of all forward passes of a model, in seconds."""
        return [seconds for shape, times in self.seconds.items() if shape.model == model for seconds in times]

    def _before_forward(self, name: str, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
        self._shape = Shape(name, *ids.shape)
        self.counts[self._shape] += 1
        if self._clock is not None:
            self._started = self._clock()

    def _after_forward(self, model: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self._clock is not None:
            self.seconds.setdefault(self._shape, []).append(self._clock() - self._started)


class CacheMeter:
    """Context manager that measures the key-value caches that models are called with.

    Args:
        models: the models by name.
        every: the interval between measurements of a model, in forward passes.
    """

    def __init__(self, models: Mapping[str, nn.Module], every: int = 16) -> None:
        self._models, self._every = models, every
        self._forwards: Counter[str] = Counter()
        # For each model: the tokens in the cache, its size in bytes, and its size relative to that of these tokens.
        self._measured: dict[str, list[tuple[int, int, float]]] = {name: [] for name in models}

    def __enter__(self) -> Self:
        self._handles = [
            model.register_forward_pre_hook(partial(self._measure_cache, name), with_kwargs=True)
            for name, model in self._models.items()
        ]
        return self

    def __exit__(self, *exception: object) -> None:
        for handle in self._handles:
            handle.remove()

    @property
    def bytes(self) -> int:
        """The sum of the largest cache sizes of all models, in bytes."""
        return sum(max((size for _, size, _ in seen), default=0) for seen in self._measured.values())

    @property
    def over_ideal(self) -> float | None:
        """The largest size of a cache relative to the keys and values of its tokens, in the later half of the texts.

        At the beginning of a text there are more padded and reserved positions than tokens. It is None if there was no
        cache.
        """
        ratios = []
        for seen in self._measured.values():
            longest = max((tokens for tokens, _, _ in seen), default=0)
            ratios += [ratio for tokens, _, ratio in seen if 2 * tokens >= longest]
        return max(ratios, default=None)

    def _measure_cache(self, name: str, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
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
        self._measured[name].append((held, size, size / ideal))


class ForwardTimer:
    """Times forward passes of random tokens on their own, in turns. The bounds are computed from these times.

    Args:
        models: the models by name.
        shapes: forward passes after a text that is in the cache.
        prompts: forward passes with an empty cache.
        held: length of the text in the cache, in tokens.
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
        """The times of each shape in seconds, of the model's forward pass alone.

        Forward passes after a text are run several times in a row, like a proxy's steps: at the first one the caches
        of the processor still hold the weights of another model.
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
    """The times of some steps in a row of a compiled model after `held` tokens, in seconds, padding included.

    Forward passes that were compiled before are not compiled again.
    """
    clock = clock_of(compiled.model.device)
    ids, _ = _random_texts(compiled.model, 1, held + compiled.width)
    compiled.reserve(held + compiled.width)
    compiled.logits(ids[:, :held])
    seconds = []
    for _ in range(IN_A_ROW):
        started = clock()
        compiled.logits(ids, logits_to_keep=compiled.width, continues=True)
        seconds.append(clock() - started)
        compiled.crop(held)
    compiled.reset()
    return seconds


def _random_texts(model: PreTrainedModel, rows: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Random ids and a mask, `(rows, length)`. Every other row begins with padding, as in real batches."""
    vocabulary = model.get_input_embeddings().weight.shape[0]
    ids = torch.randint(vocabulary, (rows, length), device=model.device)
    mask = torch.ones_like(ids)
    mask[1::2, 0] = 0
    return ids, mask
