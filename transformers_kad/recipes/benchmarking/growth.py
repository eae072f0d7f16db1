"""Measures how time and memory grow with the length of texts, the vocabulary and the batch."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig

from ...configuration import KADConfig
from ...integrations.loading.models import below_adapter
from ...integrations.loading.reading import load_architecture
from ..arguments import ModelArguments
from ..markdown import number
from ..resumable import JsonLinesStore
from .bounds import fit_exponent
from .forwards import CacheMeter
from .inflate import inflate
from .methods import Method, MethodRunner
from .plots import plot_growth
from .report import Column, measured_with, mebibytes, percentage, table
from .speed import WARM_UP_TOKENS, load_average, run_method
from .subjects import Subject, make_inputs, random_model, threshold_that_defers

PROMPT_TOKENS = 16
AXES = {"length": "tokens of the text", "vocabulary": "tokens in the vocabulary", "batch": "texts in the batch"}

# The costs whose growth is fitted, from a row; None if it was not measured.
COSTS: Mapping[str, Callable[[Mapping[str, Any]], float | None]] = {
    "time": lambda row: row["seconds"],
    "time outside": lambda row: None if row["outside"] is None else row["seconds"] * row["outside"],
    "peak memory": lambda row: row["memory"],
    "caches": lambda row: row["cache_bytes"],
}


@dataclass(frozen=True)
class GrowthSettings:
    """The settings of the measurement at every size.

    Attributes:
        configs: the architectures of base and proxy.
        inflated: for each model, the number of parameters that it is inflated to.
        device: the device of the models.
        dtype: dtype of the weights; "auto" for that of the configuration.
        rule: the rule; None for dual with the threshold that defers `deferral_mass`.
        deferral_mass: the mean deferral mass, if `rule` is None.
        rows: the number of texts, unless the batch grows.
        max_new_tokens: the number of new tokens of each text, unless the text grows.
        seed: seed of weights, prompts and sampling.
    """

    configs: Mapping[str, PreTrainedConfig]
    inflated: Mapping[str, int]
    device: str
    dtype: str
    rule: KADConfig | None
    deferral_mass: float
    rows: int
    max_new_tokens: int
    seed: int


def load_configs(models: ModelArguments, random_weights: Mapping[str, str]) -> dict[str, PreTrainedConfig]:
    """The architectures of base and proxy: those of `random_weights` if given, else those of the models."""
    paths = random_weights or {"base": str(models.base), "proxy": str(models.proxy)}
    return {name: load_architecture(below_adapter(path) or path) for name, path in paths.items()}


def measure_growth(
    settings: GrowthSettings,
    axis: str,
    sizes: Sequence[int],
    methods: Sequence[Method],
    store: JsonLinesStore,
    *,
    repetitions: int,
    log: Callable[[str], None],
) -> None:
    """Measure all methods in turns at each size, on random models and texts, unless the store has the result.

    Args:
        settings: the settings of the measurement.
        axis: what grows, a key of `AXES`.
        sizes: the sizes.
        methods: the methods.
        store: the store of the results.
        repetitions: the number of repetitions at each size.
        log: called with messages about the progress.

    Raises:
        ValueError: the store has results of a size with other methods.
    """
    keys = sorted(method.key for method in methods)
    for size in sizes:
        done = [record for record in store.records if (record["axis"], record["size"]) == (axis, size)]
        for record in done:
            if sorted(record["runs"]) != keys:
                raise ValueError(
                    f"{str(store.path)!r} holds {axis} {size} with the methods {', '.join(sorted(record['runs']))}, "
                    f"not {', '.join(keys)}. Use the same methods, or choose another --output."
                )
        missing = [at for at in range(repetitions) if at not in {record["repetition"] for record in done}]
        if not missing:
            continue
        runner = _make_runner(settings, axis, size)
        for method in methods:
            reason = runner.reason_to_skip(method)
            if reason is not None:
                raise ValueError(f"{method.label} can't be measured at {axis} {size}: {reason}.")
            _warm_up(runner, method)
        for repetition in missing:
            turn = repetition % len(methods)
            record = {
                "axis": axis,
                "size": size,
                "repetition": repetition,
                "load": load_average(),
                "runs": {
                    method.key: _run(runner, method, settings.seed + repetition)
                    for method in (*methods[turn:], *methods[:turn])
                },
            }
            store.append(record)
            store.records.append(record)
            seconds = ", ".join(f"{key} {run['seconds']:.1f}" for key, run in record["runs"].items())
            log(f"{axis} {size:,}, repetition {repetition + 1} of {repetitions}, seconds: {seconds}")


def _make_runner(settings: GrowthSettings, axis: str, size: int) -> MethodRunner:
    length = size if axis == "length" else PROMPT_TOKENS + settings.max_new_tokens
    changes: dict[str, Any] = {"max_position_embeddings": length + 64}
    if axis == "vocabulary":
        changes["vocab_size"] = size
    torch.manual_seed(settings.seed)
    models = {
        name: random_model(config, device=settings.device, dtype=settings.dtype, **changes)
        for name, config in settings.configs.items()
    }
    for name, parameters in settings.inflated.items():
        inflate(models[name], parameters)
    rule = settings.rule
    if rule is None:
        rule = KADConfig("dual", {"threshold": threshold_that_defers(models["base"], settings.deferral_mass)})
    rows = size if axis == "batch" else settings.rows
    return MethodRunner(
        Subject(**models), rule, rows=rows, max_new_tokens=length - PROMPT_TOKENS, longest_prompt=PROMPT_TOKENS
    )


def _inputs(runner: MethodRunner, seed: int) -> dict[str, torch.Tensor]:
    return make_inputs(runner.subject, "arithmetic", runner.rows, seed, PROMPT_TOKENS)


def _warm_up(runner: MethodRunner, method: Method) -> None:
    full, runner.max_new_tokens = runner.max_new_tokens, WARM_UP_TOKENS
    runner.generate(method, _inputs(runner, 0))
    runner.max_new_tokens = full


def _run(runner: MethodRunner, method: Method, seed: int) -> dict[str, Any]:
    with CacheMeter(runner.subject.models) as caches:
        run = run_method(runner, method, _inputs(runner, seed), seed, profile=True)
    run.pop("counts", None)
    return run | {"cache_bytes": caches.bytes, "cache_over_ideal": caches.over_ideal}


def make_growth_report(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The medians for each axis, size and method, and the exponents of their growth, as JSON values."""
    rows: list[dict[str, Any]] = []
    cells: dict[tuple[str, int, str], list[Mapping[str, Any]]] = {}
    for record in records:
        for key, run in record["runs"].items():
            if "error" not in run:
                cells.setdefault((record["axis"], record["size"], key), []).append(run)
    for axis, size, key in sorted(cells, key=_place):
        row = {"axis": axis, "size": size, "method": key, "label": Method.from_key(key).label}
        rows.append(row | _medians(cells[axis, size, key]))
    fits = []
    for axis, key in dict.fromkeys((row["axis"], row["method"]) for row in rows):
        own = [row for row in rows if (row["axis"], row["method"]) == (axis, key)]
        fit: dict[str, Any] = {"axis": axis, "method": key, "label": own[0]["label"]}
        for name, cost in COSTS.items():
            known = [(row["size"], value) for row in own if (value := cost(row)) is not None]
            fit[name] = fit_exponent([size for size, _ in known], [value for _, value in known])
        fits.append(fit)
    return {"rows": rows, "exponents": fits}


def _place(cell: tuple[str, int, str]) -> tuple[int, int, tuple[int, int]]:
    """The sort key of a cell in the tables."""
    axis, size, key = cell
    return list(AXES).index(axis), size, Method.from_key(key).place


def _medians(runs: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
    def median(values: list[float | None]) -> float | None:
        known = [value for value in values if value is not None]
        return statistics.median(known) if known else None

    seen = [run.get("profile") or run for run in runs]
    return {
        "seconds": median([run["seconds"] for run in runs]),
        "seconds_per_token": median([run["seconds"] / run["tokens"] for run in runs]),
        "outside": median(
            [1 - sum(one["inside"].values()) / one["seconds"] if one["inside"] else None for one in seen]
        ),
        "memory": median([run["memory"] for run in runs]),
        "cache_bytes": median([run["cache_bytes"] for run in runs]),
        "cache_over_ideal": median([run["cache_over_ideal"] for run in runs]),
        "acceptance_rate": median([run["accepted"] / run["drafted"] if run.get("drafted") else None for run in runs]),
    }


def growth_to_markdown(report: Mapping[str, Any]) -> str:
    """A growth report as Markdown: for each axis a table of medians and one of exponents."""
    parts = []
    for axis in dict.fromkeys(row["axis"] for row in report["rows"]):
        columns: dict[str, Column] = {
            AXES[axis]: lambda row: f"{row['size']:,}",
            "method": lambda row: row["label"],
            "seconds": lambda row: f"{row['seconds']:.2f}",
            "ms/token": lambda row: f"{1000 * row['seconds_per_token']:.2f}",
            "outside": lambda row: percentage(row["outside"]),
            "peak memory": lambda row: mebibytes(row["memory"]),
            "caches": lambda row: mebibytes(row["cache_bytes"]),
            "over ideal": lambda row: number(row["cache_over_ideal"], 2),
            "accepted": lambda row: number(row["acceptance_rate"], 2),
        }
        parts.append(table(columns, [row for row in report["rows"] if row["axis"] == axis]))
        parts.append(f"Exponents over the upper half of the sizes, by {AXES[axis]}\n")
        powers: dict[str, Column] = {"method": lambda fit: fit["label"]}
        powers |= {name: partial(_exponent, name) for name in COSTS}
        parts.append(table(powers, [fit for fit in report["exponents"] if fit["axis"] == axis]))
    parts.append(
        "Seconds are those of all texts at once, prompts included. Outside: share of the time outside the models' "
        "forwards. Peak memory: beside what was there before the call. Caches: keys and values of both models at "
        "their largest; over ideal: their size over that of their tokens alone, at most, in the later half of a "
        "text.\n"
    )
    return "\n".join([*parts, measured_with(report)])


def _exponent(name: str, fit: Mapping[str, Any]) -> str:
    return number(fit[name], 2)


def plot_axes(report: Mapping[str, Any], folder: Path) -> list[Path]:
    """A plot for each axis with at least two sizes, PNG and SVG."""
    paths = []
    for axis, description in AXES.items():
        rows = [row for row in report["rows"] if row["axis"] == axis]
        sizes = sorted({row["size"] for row in rows})
        if len(sizes) < 2:
            continue
        values, exponents = {}, {fit["method"]: fit["time"] for fit in report["exponents"] if fit["axis"] == axis}
        for key in dict.fromkeys(row["method"] for row in rows):
            own = sorted((row for row in rows if row["method"] == key), key=lambda row: row["size"])
            if len(own) == len(sizes):
                power = "" if exponents[key] is None else f", exponent {exponents[key]:.2f}"
                values[own[0]["label"] + power] = [row["seconds"] for row in own]
        paths += plot_growth(sizes, values, folder / f"growth_{axis}", xlabel=description)
    return paths
