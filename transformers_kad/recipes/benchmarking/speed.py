"""Repetitions of all methods in turns, each appended to a file as soon as it is there."""

import os
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import set_seed

from ...configuration import KADConfig
from ..evaluation.decoding import is_failure
from ..resumable import JsonLinesStore
from .bounds import Shape
from .forwards import ForwardMeter, ForwardTimer, clock_of, time_compiled_forwards
from .memory import PeakMemory
from .methods import KINDS, Contest, Method, counts_to_json
from .subjects import Subject, make_inputs

FORWARD_PASSES = 3  # times in a repetition that every kind of forward is measured, spread over the methods
WARM_UP_TOKENS = 8


@dataclass(frozen=True)
class Workload:
    """What every method decodes.

    Attributes:
        task: a name from `TASKS`.
        max_new_tokens: tokens of every text.
        prompt_tokens: of a prompt for models without a tokenizer.
        seed: prompts and draws are made of it.
    """

    task: str
    max_new_tokens: int
    prompt_tokens: int
    seed: int

    def inputs(self, subject: Subject, rows: int, repetition: int) -> dict[str, torch.Tensor]:
        """The prompts of a repetition, which no other repetition or batch size has."""
        return make_inputs(subject, self.task, rows, self.seed_of(rows, repetition), self.prompt_tokens)

    def seed_of(self, rows: int, repetition: int) -> int:
        """A seed for a repetition."""
        return 1_000_000 * self.seed + 1_000 * rows + repetition


class _Forwards:
    """The forwards that the methods use, timed between them.

    For fewer rows too, since rows that are finished leave a batch; all behind a text as long as the longest is in its
    middle.
    """

    def __init__(self, contest: Contest, methods: Sequence[Method]) -> None:
        rows, prompt = contest.rows, contest.longest_prompt
        self._contest = contest
        self._compiled = [method for method in methods if KINDS[method.kind].compiled]
        self._held = prompt + contest.max_new_tokens // 2
        drafts = sorted({method.draft_length for method in methods if method.draft_length is not None})
        fewer = {1 << power for power in range(rows.bit_length())} | {rows}
        widths = {1, *(length + 1 for length in drafts)}
        reads_drafts = any(method.kind == "prompt_lookup" for method in methods)
        shapes = [Shape("base", of_rows, width) for of_rows in fewer for width in widths]
        shapes += [Shape("proxy", of_rows, width) for of_rows in fewer for width in (widths if reads_drafts else {1})]
        prompts = [Shape("proxy", rows, prompt), Shape("base", rows, prompt + max(drafts, default=0))]
        self._timer = ForwardTimer(contest.subject.models, shapes, prompts, held=self._held)

    def measure(self) -> dict[Shape, list[float]]:
        """Seconds of each shape. Compiles what was not compiled before."""
        times = self._timer.measure()
        for method in self._compiled:
            for shape, model in self._contest.compiled_models(method).items():
                times[shape] = time_compiled_forwards(model, held=self._held)
        return times


def measure_batch_size(
    subject: Subject,
    config: KADConfig,
    workload: Workload,
    methods: Sequence[Method],
    store: JsonLinesStore,
    *,
    rows: int,
    repetitions: int,
    say: Callable[[str], None],
) -> None:
    """Measure what the store does not hold yet of a batch size: repetitions of all methods, in turns.

    In each repetition every method decodes the same fresh prompts, from the same seed; which one begins changes from
    repetition to repetition. Each method runs once before, untimed.

    Args:
        subject: the models.
        config: the rule.
        workload: what is decoded.
        methods: the base alone, and what is compared with it.
        store: where repetitions go.
        rows: texts at once.
        repetitions: how many.
        say: told about progress, skipped methods and what the run costs.

    Raises:
        ValueError: the store holds repetitions of this batch size with other methods, or a text would outgrow a
            model's context.
    """
    done = [record for record in store.records if record["batch_size"] == rows]
    everything = [workload.inputs(subject, rows, repetition) for repetition in range(repetitions)]
    longest = max(inputs["input_ids"].shape[1] for inputs in everything)
    _check_contexts(subject, longest + workload.max_new_tokens)
    contest = Contest(subject, config, rows=rows, max_new_tokens=workload.max_new_tokens, longest_prompt=longest)
    chosen = []
    for method in methods:
        reason = contest.refusal(method)
        if reason is None:
            chosen.append(method)
        else:
            say(f"batch {rows}: without {method.label}: {reason}")
    keys = [method.key for method in chosen]
    for record in done:
        if sorted(record["runs"]) != sorted(keys):
            raise ValueError(
                f"{str(store.path)!r} holds repetitions of batch size {rows} with the methods "
                f"{', '.join(sorted(record['runs']))}, not {', '.join(sorted(keys))}. Repeat those, or choose another "
                "--output."
            )
    missing = [at for at in range(repetitions) if at not in {record["repetition"] for record in done}]
    if not missing:
        say(f"batch {rows}: all {repetitions} repetitions are there")
        return
    started = time.perf_counter()
    _warm_up(contest, chosen, max(everything, key=lambda inputs: inputs["input_ids"].shape[1]), say)
    forwards = _Forwards(contest, chosen)
    forwards.measure()
    say(f"batch {rows}: {len(chosen)} methods, warmed up in {time.perf_counter() - started:.0f} s")
    for count, repetition in enumerate(missing, start=1):
        began = time.perf_counter()
        turn = repetition % len(chosen)
        in_turn = [*chosen[turn:], *chosen[:turn]]
        record = _repetition(
            contest, workload, in_turn, forwards, everything[repetition], repetition, profile=count == 1
        )
        store.append(record)
        store.records.append(record)
        seconds = time.perf_counter() - began
        runs = ", ".join(f"{key} {run['seconds']:.1f}" for key, run in record["runs"].items())
        left = seconds * (len(missing) - count) / 60
        say(
            f"batch {rows}, repetition {repetition + 1} of {repetitions}: {seconds:.0f} s ({runs}), about {left:.1f} "
            "min to go"
        )
    say(f"batch {rows}: took {(time.perf_counter() - started) / 60:.1f} min")


def _check_contexts(subject: Subject, tokens: int) -> None:
    for name, model in subject.models.items():
        limit = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
        if limit is not None and tokens > limit:
            raise ValueError(
                f"A prompt and its answer have {tokens} tokens, and the context of the {name} ends at {limit}: pass a "
                "smaller --max_new_tokens."
            )


def _warm_up(
    contest: Contest, methods: Sequence[Method], inputs: Mapping[str, torch.Tensor], say: Callable[[str], None]
) -> None:
    """Run every method once, shortly; compiled ones as long as they will be, so that nothing is left to compile."""
    full = contest.max_new_tokens
    for method in methods:
        began = time.perf_counter()
        compiled = KINDS[method.kind].compiled
        contest.max_new_tokens = full if compiled else min(WARM_UP_TOKENS, full)
        try:
            contest.generate(method, inputs)
        except Exception as error:
            if not is_failure(error):
                raise
        finally:
            contest.max_new_tokens = full
        if compiled:
            say(f"{method.label}: compiled in {time.perf_counter() - began:.0f} s")


def _repetition(
    contest: Contest,
    workload: Workload,
    methods: Sequence[Method],
    forwards: _Forwards,
    inputs: Mapping[str, torch.Tensor],
    repetition: int,
    profile: bool,
) -> dict[str, Any]:
    """All methods once, and the forwards that their bounds are made of, as JSON values."""
    seed = workload.seed_of(contest.rows, repetition)
    passes = {at * len(methods) // FORWARD_PASSES for at in range(FORWARD_PASSES)}
    times: dict[Shape, list[float]] = {}
    runs = {}
    for place, method in enumerate(methods):
        if place in passes:
            for shape, seconds in forwards.measure().items():
                times.setdefault(shape, []).extend(seconds)
        runs[method.key] = run_method(contest, method, inputs, seed, profile=profile)
    return {
        "batch_size": contest.rows,
        "repetition": repetition,
        "load": load_average(),
        "forwards": [[*shape, seconds] for shape, seconds in sorted(times.items())],
        "runs": runs,
    }


def load_average() -> float | None:
    """How many processes wanted to run in the last minute; None where the system does not say."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def run_method(
    contest: Contest, method: Method, inputs: Mapping[str, torch.Tensor], seed: int, *, profile: bool
) -> dict[str, Any]:
    """One call of a method: time, memory, forwards, and what KAD says of it, as JSON values.

    Where models run beside Python, as on CUDA, waiting for each forward would disturb the time: `profile` asks for a
    second call that does, from which alone the time inside the forwards is read.
    """
    compiled, on_cpu = KINDS[method.kind].compiled, contest.subject.device.type == "cpu"
    run = _call(contest, method, inputs, seed, timed=on_cpu and not compiled)
    if profile and not on_cpu and not compiled and "error" not in run:
        profiled = _call(contest, method, inputs, seed, timed=True)
        run["profile"] = {name: profiled.get(name) for name in ("seconds", "inside")}
    return run


def _call(
    contest: Contest, method: Method, inputs: Mapping[str, torch.Tensor], seed: int, *, timed: bool
) -> dict[str, Any]:
    """One call; `timed`: with the time inside each forward."""
    compiled, length = KINDS[method.kind].compiled, inputs["input_ids"].shape[1]
    models = {} if compiled else contest.subject.models
    clock = clock_of(contest.subject.device)
    set_seed(seed)
    with PeakMemory(contest.subject.device) as memory, ForwardMeter(models, clock if timed else None) as meter:
        began = clock()
        try:
            ids = contest.generate(method, inputs)
        except Exception as error:
            if not is_failure(error):
                raise
            return {"seconds": clock() - began, "error": f"{type(error).__name__}: {error}"}
        seconds = clock() - began
    counts: Mapping[Shape, int] = contest.compiled_counts(method, length) if compiled else meter.counts
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
        "inside": {name: sum(meter.of(name)) for name in models} if timed else None,
    }
    statistics = contest.statistics(method)
    if statistics is not None:
        run |= {name: getattr(statistics, name) for name in ("rounds", "drafted", "accepted", "deferral_mass")}
    return run
