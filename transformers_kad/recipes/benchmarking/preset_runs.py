"""Measures a preset of the speed benchmark row by row within a time limit, and goes on where an earlier run ended."""

import gc
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import AutoConfig

from ...configuration import KADConfig
from ..environment import describe_environment
from ..resumable import JsonLinesStore
from .methods import MethodRunner
from .presets import PRESETS, PlannedRow, Preset, PresetPair
from .report_files import Log, write_speed_report
from .speed import measure_method
from .subjects import Subject, random_model, threshold_that_defers

RESERVE = 30  # seconds of the time limit for starting Python and for the reports


@dataclass
class PresetArguments:
    """A preset, which chooses models and rows itself.

    Raises:
        ValueError: `shrink` or `time_limit` go without a preset, or the time is too short.
    """

    preset: Literal[tuple(PRESETS)] | None = field(  # type: ignore[valid-type]
        default=None,
        metadata={"help": "Measure the rows of a preset. h100: pairs of 14B and 1.7B, and of 13B and 1B, on one GPU."},
    )
    time_limit: float = field(
        default=540, metadata={"help": "With --preset: seconds that the run may take. The next run does what is left."}
    )
    shrink: bool = field(
        default=False, metadata={"help": "With --preset: the same rows with tiny models on any device, to try it."}
    )

    def __post_init__(self) -> None:
        if self.shrink and self.preset is None:
            raise ValueError("--shrink goes with --preset.")
        if self.time_limit <= RESERVE:
            raise ValueError(f"--time_limit must be more than {RESERVE} seconds, got {self.time_limit:g}.")


def run_preset(arguments: PresetArguments, device: str, output: Path, log: Log) -> None:
    """Measure the rows of a preset that the folder does not hold yet, and write a report for each pair.

    Every row is stored as soon as it is measured. A row is not begun if it is planned to end after the time limit.

    Args:
        arguments: the preset, the time limit, and whether its models are shrunk.
        device: the device.
        output: the folder, in which every pair has a folder of its own.
        log: called with the plan and with messages about progress.

    Raises:
        ValueError: there is no GPU with enough memory, or the folder holds rows of other settings.
    """
    assert arguments.preset is not None
    preset = PRESETS[arguments.preset]
    if arguments.shrink:
        preset = preset.shrunk()
    else:
        check_gpu(preset, arguments.preset, device)
    ends = time.perf_counter() + arguments.time_limit - RESERVE
    log_plan(preset, arguments.time_limit, log)
    left = sum(_run_pair(preset, pair, device, output / pair.name, ends, log) for pair in preset.pairs)
    log(f"{left} rows are left: the same command measures them." if left else "All rows are measured.")


def check_gpu(preset: Preset, name: str, device: str) -> None:
    """Raise `ValueError` unless the device is a GPU with enough memory for the preset."""
    needs = f"--preset {name} needs a CUDA GPU with at least {preset.gibibytes} GiB of memory"
    hint = "To try the command with tiny models on any device, add --shrink."
    if not device.startswith("cuda") or not torch.cuda.is_available():
        raise ValueError(f"{needs}, got the device {device!r}. {hint}")
    properties = torch.cuda.get_device_properties(device)
    if properties.total_memory < preset.gibibytes * 2**30:
        found = f"{properties.name} with {properties.total_memory / 2**30:.0f} GiB"
        raise ValueError(f"{needs}, got {found}. {hint}")


def log_plan(preset: Preset, time_limit: float, log: Log) -> None:
    """Log the rows of each pair with the time when each is planned to end."""
    log(f"Plan, in seconds from the beginning, of {time_limit - RESERVE:g} in all (and {RESERVE} for the rest):")
    planned = 0.0
    for pair in preset.pairs:
        planned += pair.loading_seconds
        log(f"  {pair.name}: models {planned:.0f}")
        for rows, group in groupby(pair.rows, key=lambda row: row.batch_size):
            ends = []
            for row in group:
                planned += row.seconds
                ends.append(f"{row.key} {planned:.0f}")
            log(f"    batch {rows}: {', '.join(ends)}")


def _run_pair(preset: Preset, pair: PresetPair, device: str, folder: Path, ends: float, log: Log) -> int:
    """Measure the rows of a pair, and write its report. Returns how many rows are left."""
    settings = _settings(preset, pair, describe_environment(device))
    with JsonLinesStore(folder / "rows.jsonl", settings, checked=True) as store:
        done = {(record["batch_size"], record["method"]) for record in store.records}
        missing = [row for row in pair.rows if (row.batch_size, row.key) not in done]
        try:
            _measure(preset, pair, missing, device, store, ends, log)
        finally:
            if store.records:
                config = KADConfig(*store.records[0]["rule"])
                write_speed_report(as_repetitions(store.records), config, settings, folder, log)
        return len(pair.rows) - len(store.records)


def _measure(
    preset: Preset,
    pair: PresetPair,
    missing: Sequence[PlannedRow],
    device: str,
    store: JsonLinesStore,
    ends: float,
    log: Log,
) -> None:
    """Measure the missing rows of a pair that are planned to end in time."""

    def fits(seconds: float) -> bool:
        return time.perf_counter() + seconds <= ends

    if not missing or not fits(pair.loading_seconds + min(row.seconds for row in missing)):
        return
    began = time.perf_counter()
    subject = make_subject(pair, device, preset.dtype, preset.workload.seed)
    threshold = threshold_that_defers(subject.base, preset.deferral_mass)
    config = KADConfig("dual", {"threshold": threshold})
    log(
        f"{pair.name}: models made in {time.perf_counter() - began:.0f} s; a deferral mass of {preset.deferral_mass} "
        f"needs dual with threshold {threshold:.3g}"
    )
    runners: dict[int, MethodRunner] = {}
    for row in missing:
        if not fits(row.seconds):
            left = ends - time.perf_counter()
            log(f"{pair.name}, {row}: left out, since {row.seconds:.0f} s are planned and {left:.0f} are left")
            continue
        if row.batch_size not in runners:
            runners[row.batch_size] = MethodRunner(
                subject,
                config,
                rows=row.batch_size,
                max_new_tokens=preset.workload.max_new_tokens,
                longest_prompt=preset.workload.prompt_tokens,
            )
        began = time.perf_counter()
        record = measure_method(
            runners[row.batch_size], preset.workload, row.method, repetitions=preset.repetitions, log=log
        )
        record["rule"] = [config.rule, dict(config.parameters)]
        store.append(record)
        store.records.append(record)
        log(f"{pair.name}, {row}: {time.perf_counter() - began:.0f} s, planned were {row.seconds:.0f}")
    del subject, runners
    free_memory(device)


def make_subject(pair: PresetPair, device: str, dtype: str, seed: int) -> Subject:
    """The pair with random weights, made on the device."""
    torch.manual_seed(seed)
    base, proxy = (
        random_model(AutoConfig.for_model(**config), device=device, dtype=dtype) for config in (pair.base, pair.proxy)
    )
    return Subject(base, proxy)


def free_memory(device: str) -> None:
    """Free what compiled code and caches keep of models that are not used any more."""
    torch.compiler.reset()
    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.empty_cache()


def as_repetitions(records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Rows, each with all its repetitions, as the repetitions of whole batch sizes that a report is made of.

    Rows of a batch size without the base alone, which they are compared with, are left out.
    """
    repetitions = []
    for size in sorted({record["batch_size"] for record in records}):
        rows = {record["method"]: record for record in records if record["batch_size"] == size}
        if "base" not in rows:
            continue
        forwards = [times for row in rows.values() for times in row["forwards"]]
        for at in range(min(len(row["runs"]) for row in rows.values())):
            repetitions.append(
                {
                    "batch_size": size,
                    "repetition": at,
                    "load": max((row["load"] for row in rows.values() if row["load"] is not None), default=None),
                    "forwards": [] if at else forwards,
                    "runs": {key: row["runs"][at] for key, row in rows.items()},
                }
            )
    return repetitions


def _settings(preset: Preset, pair: PresetPair, environment: dict[str, Any]) -> dict[str, Any]:
    """The settings that determine the results, as JSON values."""
    return {
        "base": _described(pair.base),
        "proxy": _described(pair.proxy),
        "weights": "random",
        "dtype": preset.dtype,
        "deferral_mass": preset.deferral_mass,
        **asdict(preset.workload),
        "task": None,
        "repetitions": preset.repetitions,
        "environment": environment,
    }


def _described(config: Mapping[str, Any]) -> str:
    """The sizes of an architecture, in one line."""
    sizes = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "vocab_size")
    return f"{config['model_type']} of " + "/".join(str(config[name]) for name in sizes)
