"""Measures all methods in turns, and appends each repetition to a file immediately."""

import os
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import set_seed

from ...configuration import KADConfig
from ...models.model_settings import context_length
from ..evaluation.decoding import is_failure
from ..resumable import JsonLinesStore
from .bounds import Shape
from .forwards import ForwardMeter, ForwardTimer, clock_of, time_compiled_forwards
from .memory import PeakMemory
from .methods import KINDS, Method, MethodRunner, counts_from_json, counts_to_json
from .subjects import Subject, make_inputs

FORWARD_PASSES = 3  # how often each repetition measures all forward passes, spread over the methods
WARM_UP_TOKENS = 8
# Shapes with a smaller share of a model's forward passes in all runs are not timed but interpolated.
SMALLEST_SHARE = 0.02


@dataclass(frozen=True)
class Workload:
    """The prompts that every method gets, and the length of the texts.

    Attributes:
        task: a name from `TASKS`.
        max_new_tokens: the number of new tokens of every text.
        prompt_tokens: the length of a prompt for models without a tokenizer.
        seed: seed of prompts and sampling.
    """

    task: str
    max_new_tokens: int
    prompt_tokens: int
    seed: int

    def inputs(self, subject: Subject, rows: int, repetition: int) -> dict[str, torch.Tensor]:
        """The prompts of a repetition, which differ from those of all other repetitions and batch sizes."""
        return make_inputs(subject, self.task, rows, self.seed_of(rows, repetition), self.prompt_tokens)

    def seed_of(self, rows: int, repetition: int) -> int:
        """The seed of a repetition."""
        return 1_000_000 * self.seed + 1_000 * rows + repetition


class _Forwards:
    """Times the forward passes that the methods use, between their runs.

    Batches of fewer rows are timed too, since finished rows leave a batch. The cache holds half of the longest text.
    Shapes that are not foreseen, as those of a base that reads accepted tokens again, are added when they occur.
    """

    def __init__(self, runner: MethodRunner, methods: Sequence[Method]) -> None:
        rows, prompt = runner.rows, runner.longest_prompt
        self._runner = runner
        self._compiled = [method for method in methods if KINDS[method.kind].compiled]
        self._held = prompt + runner.max_new_tokens // 2
        self._widest = runner.max_new_tokens - runner.max_new_tokens // 2  # within the text, and so the context
        drafts = sorted({method.draft_length for method in methods if method.draft_length is not None})
        fewer = {1 << power for power in range(rows.bit_length())} | {rows}
        widths = {1, *(length + 1 for length in drafts)}
        reads_drafts = any(method.kind == "prompt_lookup" for method in methods)
        shapes = [Shape("base", of_rows, width) for of_rows in fewer for width in widths]
        shapes += [Shape("proxy", of_rows, width) for of_rows in fewer for width in (widths if reads_drafts else {1})]
        prompts = [Shape("proxy", rows, prompt), Shape("base", rows, prompt + max(drafts, default=0))]
        self._timer = ForwardTimer(runner.subject.models, shapes, prompts, held=self._held)

    def measure(self) -> dict[Shape, list[float]]:
        """The times of each shape in seconds. Forward passes are compiled where they have not been before."""
        times = self._timer.measure()
        for method in self._compiled:
            for shape, model in self._runner.compiled_models(method).items():
                times[shape] = time_compiled_forwards(model, rows=shape.rows, held=self._held)
        return times

    def measure_rest(self, measured: Mapping[Shape, list[float]]) -> dict[Shape, list[float]]:
        """The times of the shapes that were added since the others were measured, in seconds."""
        return self._timer.measure(leave_out=measured)

    def add_shapes_of(self, run: Mapping[str, Any]) -> None:
        """Time what a run's forward passes are mostly like, and its prompts if they are as long as the longest."""
        if run.get("prefills") is None:  # it failed, or is compiled
            return
        prefills = counts_from_json(run["prefills"])
        steps = counts_from_json(run["counts"]) - prefills
        self._timer.add(
            [
                shape
                for shape, count in steps.items()
                if count >= SMALLEST_SHARE * sum(steps[other] for other in steps if other.model == shape.model)
                and shape.tokens <= self._widest
            ],
            [shape for shape in prefills if shape.tokens >= self._runner.longest_prompt],
        )


def measure_batch_size(
    subject: Subject,
    config: KADConfig,
    workload: Workload,
    methods: Sequence[Method],
    store: JsonLinesStore,
    *,
    rows: int,
    repetitions: int,
    log: Callable[[str], None],
) -> None:
    """Measure the repetitions of a batch size that the store does not have yet, with all methods in turns.

    In each repetition all methods decode the same new prompts from the same seed. The method that runs first changes
    from repetition to repetition. Each method runs once before the measurement.

    Args:
        subject: the models.
        config: the rule.
        workload: the prompts and the length of the texts.
        methods: the base alone, and the methods that are compared with it.
        store: the store of the repetitions.
        rows: the number of texts in a batch.
        repetitions: the number of repetitions.
        log: called with messages about progress, skipped methods and the time that is left.

    Raises:
        ValueError: the store has repetitions of this batch size with other methods, or texts would exceed a model's
            context.
    """
    done = [record for record in store.records if record["batch_size"] == rows]
    everything = [workload.inputs(subject, rows, repetition) for repetition in range(repetitions)]
    longest = max(inputs["input_ids"].shape[1] for inputs in everything)
    _check_contexts(subject, longest + workload.max_new_tokens)
    runner = MethodRunner(subject, config, rows=rows, max_new_tokens=workload.max_new_tokens, longest_prompt=longest)
    chosen = []
    for method in methods:
        reason = runner.reason_to_skip(method)
        if reason is None:
            chosen.append(method)
        else:
            log(f"batch {rows}: without {method.label}: {reason}")
    keys = [method.key for method in chosen]
    for record in done:
        if sorted(record["runs"]) != sorted(keys):
            raise ValueError(
                f"{str(store.path)!r} holds repetitions of batch size {rows} with the methods "
                f"{', '.join(sorted(record['runs']))}, not {', '.join(sorted(keys))}. Use the same methods, or choose "
                "another --output."
            )
    missing = [at for at in range(repetitions) if at not in {record["repetition"] for record in done}]
    if not missing:
        log(f"batch {rows}: all {repetitions} repetitions are done")
        return
    started = time.perf_counter()
    _warm_up(runner, chosen, max(everything, key=lambda inputs: inputs["input_ids"].shape[1]), log)
    forwards = _Forwards(runner, chosen)
    forwards.measure()
    log(f"batch {rows}: {len(chosen)} methods, warmed up in {time.perf_counter() - started:.0f} s")
    for count, repetition in enumerate(missing, start=1):
        began = time.perf_counter()
        turn = repetition % len(chosen)
        in_turn = [*chosen[turn:], *chosen[:turn]]
        record = _repetition(
            runner, workload, in_turn, forwards, everything[repetition], repetition, profile=count == 1
        )
        store.append(record)
        store.records.append(record)
        seconds = time.perf_counter() - began
        runs = ", ".join(f"{key} {run['seconds']:.1f}" for key, run in record["runs"].items())
        left = seconds * (len(missing) - count) / 60
        log(
            f"batch {rows}, repetition {repetition + 1} of {repetitions}: {seconds:.0f} s ({runs}), about {left:.1f} "
            "min to go"
        )
    log(f"batch {rows}: took {(time.perf_counter() - started) / 60:.1f} min")


def measure_method(
    runner: MethodRunner, workload: Workload, method: Method, *, repetitions: int, log: Callable[[str], None]
) -> dict[str, Any]:
    """Measure one method on its own: its runs, one a repetition, and the forward passes for its bound, as JSON values.

    The forward passes of compiled methods are not timed, for which they would be compiled once more.
    """
    everything = [workload.inputs(runner.subject, runner.rows, repetition) for repetition in range(repetitions)]
    reason = runner.reason_to_skip(method)
    if reason is not None:
        raise ValueError(f"{method.label} can't be measured at batch size {runner.rows}: {reason}.")
    _warm_up(runner, [method], everything[0], log)
    timed = {} if KINDS[method.kind].compiled else _Forwards(runner, [method]).measure()
    runs = [
        run_method(runner, method, inputs, workload.seed_of(runner.rows, repetition), profile=repetition == 0)
        for repetition, inputs in enumerate(everything)
    ]
    return {
        "batch_size": runner.rows,
        "method": method.key,
        "load": load_average(),
        "forwards": [[*shape, seconds] for shape, seconds in sorted(timed.items())],
        "runs": runs,
    }


def _check_contexts(subject: Subject, tokens: int) -> None:
    for name, model in subject.models.items():
        limit = context_length(model)
        if limit is not None and tokens > limit:
            raise ValueError(
                f"A prompt and its answer have {tokens} tokens, and the context of the {name} ends at {limit}: pass a "
                "smaller --max_new_tokens."
            )


def _warm_up(
    runner: MethodRunner, methods: Sequence[Method], inputs: Mapping[str, torch.Tensor], log: Callable[[str], None]
) -> None:
    """Run every method once for a few tokens, and compiled methods at full length, so that all is compiled."""
    full = runner.max_new_tokens
    for method in methods:
        began = time.perf_counter()
        compiled = KINDS[method.kind].compiled
        runner.max_new_tokens = full if compiled else min(WARM_UP_TOKENS, full)
        try:
            runner.generate(method, inputs)
        except Exception as error:
            if not is_failure(error):
                raise
        finally:
            runner.max_new_tokens = full
        if compiled:
            log(f"{method.label}: compiled in {time.perf_counter() - began:.0f} s")


def _repetition(
    runner: MethodRunner,
    workload: Workload,
    methods: Sequence[Method],
    forwards: _Forwards,
    inputs: Mapping[str, torch.Tensor],
    repetition: int,
    profile: bool,
) -> dict[str, Any]:
    """Run all methods once, and time the forward passes for their bounds. Returns JSON values."""
    seed = workload.seed_of(runner.rows, repetition)
    passes = {at * len(methods) // FORWARD_PASSES for at in range(FORWARD_PASSES)}
    times: dict[Shape, list[float]] = {}
    runs = {}
    for place, method in enumerate(methods):
        if place in passes:
            for shape, seconds in forwards.measure().items():
                times.setdefault(shape, []).extend(seconds)
        runs[method.key] = run_method(runner, method, inputs, seed, profile=profile)
        forwards.add_shapes_of(runs[method.key])
    times |= forwards.measure_rest(times)
    return {
        "batch_size": runner.rows,
        "repetition": repetition,
        "load": load_average(),
        "forwards": [[*shape, seconds] for shape, seconds in sorted(times.items())],
        "runs": runs,
    }


def load_average() -> float | None:
    """The load average of the last minute; None if the system does not provide it."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def run_method(
    runner: MethodRunner, method: Method, inputs: Mapping[str, torch.Tensor], seed: int, *, profile: bool
) -> dict[str, Any]:
    """Run a method once, and return time, memory, forward passes and statistics as JSON values.

    On a device that runs asynchronously, such as CUDA, waiting for each forward pass would change the total time.
    `profile` therefore adds a second call, from which only the time inside of the forward passes is taken.
    """
    compiled, on_cpu = KINDS[method.kind].compiled, runner.subject.device.type == "cpu"
    run = _call(runner, method, inputs, seed, timed=on_cpu and not compiled)
    if profile and not on_cpu and not compiled and "error" not in run:
        profiled = _call(runner, method, inputs, seed, timed=True)
        run["profile"] = {name: profiled.get(name) for name in ("seconds", "inside")}
    return run


def _call(
    runner: MethodRunner, method: Method, inputs: Mapping[str, torch.Tensor], seed: int, *, timed: bool
) -> dict[str, Any]:
    """Run a method once. `timed` measures the time inside of each forward pass."""
    compiled, length = KINDS[method.kind].compiled, inputs["input_ids"].shape[1]
    models = {} if compiled else runner.subject.models
    clock = clock_of(runner.subject.device)
    set_seed(seed)
    with PeakMemory(runner.subject.device) as memory, ForwardMeter(models, clock if timed else None) as meter:
        began = clock()
        try:
            ids = runner.generate(method, inputs)
        except Exception as error:
            if not is_failure(error):
                raise
            return {"seconds": clock() - began, "error": f"{type(error).__name__}: {error}"}
        seconds = clock() - began
    counts: Mapping[Shape, int] = runner.compiled_counts(method, length) if compiled else meter.counts
    forwards = Counter[str]()
    for shape, count in counts.items():
        forwards[shape.model.removesuffix(" compiled")] += count
    run: dict[str, Any] = {
        "seconds": seconds,
        "tokens": ids[:, length:].numel(),
        "prompt_tokens": length,
        "memory": memory.bytes,
        "forwards": dict(forwards),
        "counts": counts_to_json(counts),
        "prefills": None if compiled else counts_to_json(meter.prefills),
        "inside": {name: sum(meter.of(name)) for name in models} if timed else None,
    }
    statistics = runner.statistics(method)
    if statistics is not None:
        _check_proxy_prefills(method, meter.prefills, forwards["proxy"])
        run |= {name: getattr(statistics, name) for name in ("rounds", "drafted", "accepted", "deferral_mass")}
    return run


def _check_proxy_prefills(method: Method, prefills: Mapping[Shape, int], forwards: int) -> None:
    """Raise `RuntimeError` if a proxy that keeps a cache read its prompt more than once in a call.

    In a proxy without a cache, each of its `forwards` reads the whole text.
    """
    count = sum(number for shape, number in prefills.items() if shape.model == "proxy")
    if 1 < count < forwards:
        raise RuntimeError(
            f"In one call of {method.key}, the proxy read the text from its first token on {count} times, where once "
            "is enough: its cache was dropped instead of rolled back."
        )
