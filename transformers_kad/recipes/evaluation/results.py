"""A folder of results that one or several processes write to, and that a later run continues."""

import hashlib
import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from ...utils.files import write_whole
from ...utils.strict_json import parse_json_object
from ..record_fields import ADVICE, Shape, check_fields
from ..resumable import append_json_lines, describe_differences, json_line, open_locked, read_json_lines
from .tasks import TASKS

ROUNDING = 1e-6  # a mean of float32 shares can exceed 1 by so much

RESULTS, CONFIGS, LOCK = "results.jsonl", "configs.json", ".lock"


# The fields of every line and their types. Some methods and tasks add more fields.
FIELDS: Mapping[str, Shape] = {
    "task": (str,),
    "method": (str,),
    "instance": (str,),
    "sample": (int,),
    "batch": (str,),
    "batch_number": (int,),
    "batch_size": (int,),
    "row": (int,),
    "config": (str,),
    "prediction": (str, type(None)),
    "answer": (str,),
    "correct": (bool, type(None)),
    "error": (str, type(None)),
    "tokens": (int,),
    "seconds": (int, float),
}
CONFIG_FIELDS: Mapping[str, Shape] = {"task": (str,), "method": (str,), "shared": (dict,), "own": (dict,)}


# Fields that not every line has.
OPTIONAL_FIELDS: Mapping[str, Shape] = {
    "text": (str,),
    "ended": (bool,),
    "correct_lenient": (bool,),
    "deferral_masses": [(int, float)],
}
# The fields of lines of methods with a rule.
DECODING_FIELDS: Mapping[str, Shape] = {
    "rounds": (int,),
    "drafted": (int,),
    "accepted": (int,),
    "acceptance_histogram": [(int,)],
    "deferral_mass": (int, float, type(None)),
}


def batch_name(task: str, method: str, sample: int, number: int) -> str:
    """The name of a batch, unique in a results folder."""
    return f"{task}/{method}/{sample}/{number}"


def config_hash(config: Mapping[str, Any]) -> str:
    """A short hash of a configuration, which is equal for equal configurations."""
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:12]


@dataclass(frozen=True)
class Repairs:
    """What an interrupted run left and was removed when the folder was opened.

    Attributes:
        torn: the beginnings of incomplete last lines.
        incomplete: the batches that were not finished.
        retried: the batches with failed answers that are to be answered again.
    """

    torn: tuple[str, ...] = ()
    incomplete: tuple[str, ...] = ()
    retried: tuple[str, ...] = ()


class ResultsFolder:
    """The results of an evaluation: one line, a JSON object, for each instance, method and sample.

    `results.jsonl` holds the merged results, `results.<process>.jsonl` those that a process has written since, and
    `configs.json` the configurations, which lines refer to by `config`. Each line has the name of its batch and the
    size of the batch, so that an incomplete batch can be detected.

    The main process prepares the folder before the others use it (`prepare`) and merges the results at the end. The
    other processes only append to their own files.

    Args:
        path: the folder, which is created if it is missing.
        process: the index of this process.
    """

    def __init__(self, path: str | Path, process: int = 0) -> None:
        self.path = Path(path)
        if self.path.is_file():
            raise ValueError(f"Results go into a folder, got the file {str(self.path)!r}.")
        self.process = process
        self._used: set[str] = set()  # the configurations of all lines that exist or will be written
        self._file: IO[str] | None = None
        self._lock: IO[str] | None = None

    def __enter__(self) -> "ResultsFolder":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for file in (self._file, self._lock):
            if file is not None:
                file.close()

    def prepare(self, *, retry_failed: bool = False) -> Repairs:
        """Lock the folder, and merge the results of an interrupted run.

        Only the main process may call this, before any other process uses the folder.

        Args:
            retry_failed: remove the batches in which an answer failed.

        Returns:
            What was removed.

        Raises:
            ValueError: another run is writing to the folder.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = open_locked(self.path / LOCK, shown=self.path)
        return self.merge(retry_failed=retry_failed)

    def describe(self, configs: Sequence[Mapping[str, Any]]) -> None:
        """Store the configurations of the lines that will be written.

        Args:
            configs: each with `task` and `method`, the settings `shared` by all methods of a task, and the method's
                `own` settings.

        Raises:
            ValueError: the folder holds results of the task under other shared settings, or of the method under other
                settings of its own (the message shows the difference).
        """
        known = self.configs()
        for name in self._used - known.keys():
            raise ValueError(
                f"{str(self.path / RESULTS)!r} holds results of the configuration {name!r}, which {CONFIGS!r} does "
                "not describe. Choose another --output."
            )
        kept = {name: config for name, config in known.items() if name in self._used}
        for config, found in itertools.product(configs, kept.values()):
            if found["task"] != config["task"]:
                continue
            parts = ("shared", "own") if found["method"] == config["method"] else ("shared",)
            differences = [describe_differences(found[part], config[part]) for part in parts]
            if any(differences):
                raise ValueError(
                    f"{str(self.path)!r} holds results of {found['method']!r} on {found['task']!r} under other "
                    f"settings: {'; '.join(filter(None, differences))}. Choose another --output, or use the "
                    "same settings to continue that run."
                )
        new = {config_hash(config): dict(config) for config in configs}
        self._used |= new.keys()
        write_whole(self.path / CONFIGS, json.dumps(kept | new, indent=2) + "\n")

    def configs(self) -> dict[str, dict[str, Any]]:
        """All configurations, by the hash that lines refer to.

        Raises:
            ValueError: the file is malformed.
        """
        path = self.path / CONFIGS
        if not path.exists():
            return {}
        try:
            configs = parse_json_object(path.read_bytes())
        except ValueError as error:
            raise ValueError(f"{str(path)!r} is not a JSON object: {error}.") from error
        for name, config in configs.items():
            where = f"{str(path)!r}, {name!r:.80}"
            check_fields(config, CONFIG_FIELDS, where)
            if name != config_hash(config):
                raise ValueError(f"{where} is the hash of other settings than those that follow. {ADVICE}")
        return configs

    def read(self) -> list[dict[str, Any]]:
        """All merged records.

        Raises:
            ValueError: a line is malformed; the message has its number.
        """
        path = self.path / RESULTS
        return _read_records(path)[0] if path.exists() else []

    def batches(self) -> set[tuple[str, str]]:
        """The configuration and the name of every merged batch.

        Raises:
            ValueError: as for `read`.
        """
        return {(record["config"], record["batch"]) for record in self.read()}

    def append(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Write the records of a batch to the file of this process, and to the disk before returning."""
        if self._file is None:
            self._file = (self.path / f"results.{self.process}.jsonl").open("a", encoding="utf-8")
        append_json_lines(self._file, records)

    def close_part(self) -> None:
        """Close the file of this process, so that the main process can merge it."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def merge(self, *, retry_failed: bool = False) -> Repairs:
        """Merge the files of all processes into `results.jsonl`, in an order that does not depend on the processes."""
        self.close_part()
        merged: dict[tuple[str, str], list[dict[str, Any]]] = {}
        torn, incomplete, retried = [], [], []
        parts = sorted(path for path in self.path.glob("results.*.jsonl") if path.name.split(".")[1].isdigit())
        for path in [self.path / RESULTS, *parts]:
            if not path.exists():
                continue
            records, rest = _read_records(path)
            if rest is not None:
                torn.append(rest)
            batches: dict[tuple[str, str], list[dict[str, Any]]] = {}
            for record in records:
                batches.setdefault((record["config"], record["batch"]), []).append(record)
            for key, batch in batches.items():
                # An interrupted batch is repeated after its own first lines. The complete one counts.
                whole = batch[-batch[0]["batch_size"] :]
                complete = len(whole) == batch[0]["batch_size"]
                if not complete or [record["row"] for record in whole] != list(range(len(whole))):
                    incomplete.append(key[1])
                elif retry_failed and any(record["error"] is not None for record in whole):
                    retried.append(key[1])
                else:
                    merged.setdefault(key, whole)
        lines = sorted(
            (record for batch in merged.values() for record in batch),
            key=lambda r: (r["task"], r["method"], r["sample"], r["batch_number"], r["row"]),
        )
        self._used |= {config for config, _ in merged}
        if merged or parts or retried:
            write_whole(self.path / RESULTS, "".join(map(json_line, lines)))
        for path in parts:
            path.unlink()
        return Repairs(tuple(torn), tuple(incomplete), tuple(retried))


def _read_records(path: Path) -> tuple[list[dict[str, Any]], str | None]:
    """Read the records of a file, see `read_json_lines`.

    Raises:
        ValueError: a line is not a record; the message has its number.
    """
    records, torn = read_json_lines(path, FIELDS)
    for number, record in enumerate(records, start=1):
        where = f"{str(path)!r}, line {number}"
        name = batch_name(record["task"], record["method"], record["sample"], record["batch_number"])
        if record["batch"] != name:
            raise ValueError(f"{where}: 'batch' is {record['batch']!r:.80}, not {name!r:.80}. {ADVICE}")
        check_fields(record, {key: shape for key, shape in OPTIONAL_FIELDS.items() if key in record}, where)
        if record["task"] in TASKS and (record["correct"] is not None) != TASKS[record["task"]].has_right_answers:
            kind = "true or false" if record["correct"] is None else "null"
            raise ValueError(f"{where}: 'correct' is {record['correct']}, not {kind}. {ADVICE}")
        if "rounds" in record:
            _check_decoding(record, where)
    return records, torn


def _check_decoding(record: Mapping[str, Any], where: str) -> None:
    """Check the statistics of a method with a rule."""
    check_fields(record, DECODING_FIELDS, where)
    if record["accepted"] > record["drafted"]:
        raise ValueError(
            f"{where}: 'accepted' is {record['accepted']}, more than 'drafted', {record['drafted']}. {ADVICE}"
        )
    if (record["deferral_mass"] or 0) > 1 + ROUNDING:
        raise ValueError(f"{where}: 'deferral_mass' is {record['deferral_mass']}, more than 1. {ADVICE}")
