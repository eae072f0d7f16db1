"""Counts and times the forward passes of models, while a method runs or on their own."""

import copy
import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import Any, Self

import torch
from torch import nn
from transformers import Cache, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin

from ...models.by_version import CACHE
from ...models.cache_rollback import counts_tokens
from ...models.cached_model import CachedModel
from ...models.offloading import execution_device
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
        prefills: of these, the number that began without a cache or with an empty one, and so read a text from its
            first token on.
        seconds: the times of each shape, in seconds.
    """

    def __init__(self, models: Mapping[str, nn.Module], clock: Clock | None) -> None:
        self._models, self._clock = models, clock
        self.counts: Counter[Shape] = Counter()
        self.prefills: Counter[Shape] = Counter()
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
        if _filled_cache(kwargs) is None:
            self.prefills[self._shape] += 1
        if self._clock is not None:
            self._started = self._clock()

    def _after_forward(self, model: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self._clock is not None:
            self.seconds.setdefault(self._shape, []).append(self._clock() - self._started)


def _filled_cache(kwargs: Mapping[str, Any]) -> Cache | None:
    """The cache among a model's inputs, if it holds tokens already; else None."""
    cache = kwargs.get(CACHE, kwargs.get("cache_params"))
    if not isinstance(cache, Cache):
        return None
    is_filled = int(cache.get_seq_length()) > 0 if counts_tokens(cache) else cache.has_previous_state()
    return cache if is_filled else None


class CacheMeter:
    """Context manager that measures the key-value caches that models are called with, without recurrent states.

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
        if self._forwards[name] % self._every or (cache := _filled_cache(kwargs)) is None:
            return
        layers = [layer for layer in cache.layers if isinstance(layer, CacheLayerMixin)]
        if not layers:  # only recurrent ones
            return
        mask, length = kwargs.get("attention_mask"), int(cache.get_seq_length())
        tensors = [tensor for layer in layers for tensor in (layer.keys, layer.values)]
        size = sum(tensor.nbytes for tensor in tensors)
        rows = tensors[0].shape[0]
        held = rows * length
        if isinstance(mask, torch.Tensor) and mask.dim() == 2:  # not prepared for each kind of layer
            held = int(mask[:, :length].sum())
        ideal = held * sum(tensor.shape[1] * tensor.shape[3] * tensor.element_size() for tensor in tensors)
        self._measured[name].append((held, size, size / ideal))


class ForwardTimer:
    """Times forward passes of random tokens on their own, in turns. The bounds are computed from these times.

    A forward pass after a text continues a copy of the cache that holds the text, so that caches that can't take
    tokens back, as those of recurrent layers, are timed like all others.

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
        self._models, self._held = models, held
        self._shapes: list[Shape] = []
        self._prompts: list[Shape] = []
        # For each model and number of rows: a text, its mask, and the model with the text in its cache.
        self._filled: dict[tuple[str, int], tuple[torch.Tensor, torch.Tensor, CachedModel]] = {}
        self.add(shapes, prompts)

    def add(self, shapes: Collection[Shape], prompts: Collection[Shape] = ()) -> None:
        """Time these shapes too, from the next measurement on."""
        self._shapes = sorted({*self._shapes, *shapes})
        self._prompts = sorted({*self._prompts, *prompts})
        for shape in self._shapes:
            place = (shape.model, shape.rows)
            if place not in self._filled:
                cached = CachedModel(self._models[shape.model], shape.model)
                ids, mask = _random_texts(cached.model, shape.rows, self._held)
                cached.logits(ids, mask)
                self._filled[place] = ids, mask, cached

    def measure(self, leave_out: Collection[Shape] = ()) -> dict[Shape, list[float]]:
        """The times of each shape that is not left out, in seconds, of the model's forward pass alone.

        Forward passes after a text are run several times in a row, like a proxy's steps: at the first one the caches
        of the processor still hold the weights of another model.
        """
        seconds: dict[Shape, list[float]] = {}
        for shape in self._shapes:
            if shape not in leave_out:
                seconds |= self._after_text(shape)
        for shape in self._prompts:
            if shape not in leave_out:
                cached = CachedModel(self._models[shape.model], shape.model)
                ids, mask = _random_texts(cached.model, shape.rows, shape.tokens)
                with self._meter(shape.model) as meter:
                    cached.logits(ids, mask)
                seconds |= meter.seconds
        return seconds

    def _after_text(self, shape: Shape) -> dict[Shape, list[float]]:
        ids, mask, cached = self._filled[shape.model, shape.rows]
        new, _ = _random_texts(cached.model, shape.rows, shape.tokens)
        ids, mask = torch.cat([ids, new], dim=-1), torch.cat([mask, torch.ones_like(new)], dim=-1)
        shared = {id(module): module for module in cached.model.modules()}
        with self._meter(shape.model) as meter:
            for _ in range(IN_A_ROW):
                copied = copy.deepcopy(cached, dict(shared))
                copied.logits(ids, mask, logits_to_keep=shape.tokens, continues=True)
        return meter.seconds

    def _meter(self, name: str) -> ForwardMeter:
        model = self._models[name]
        return ForwardMeter({name: model}, clock_of(execution_device(model)))


def time_compiled_forwards(compiled: StaticCacheModel, *, rows: int, held: int) -> list[float]:
    """The times of some steps in a row of a compiled model after `held` columns of each text, in seconds.

    Forward passes that were compiled before are not compiled again.
    """
    clock = clock_of(compiled.device)
    ids, mask = _random_texts(compiled.model, rows, held)
    new, _ = _random_texts(compiled.model, rows, compiled.width)
    compiled.reserve(held + compiled.width, rows)
    compiled.logits(ids, mask)
    seconds = []
    for _ in range(IN_A_ROW):
        started = clock()
        compiled.extend(new, logits_to_keep=compiled.width)
        seconds.append(clock() - started)
        compiled.take_back([compiled.width] * rows)
    compiled.reset()
    return seconds


def _random_texts(model: PreTrainedModel, rows: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Random ids and a mask, `(rows, length)`. Every other row begins with padding, as in real batches."""
    vocabulary = model.get_input_embeddings().weight.shape[0]
    ids = torch.randint(vocabulary, (rows, length), device=execution_device(model))
    mask = torch.ones_like(ids)
    mask[1::2, 0] = 0
    return ids, mask
