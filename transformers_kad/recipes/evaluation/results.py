"""A folder of results that one process or many write to, and that a later run goes on with."""

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
from ..resumable import append_json_lines, describe_differences, json_line, lock, read_json_lines

RESULTS, CONFIGS, LOCK = "results.jsonl", "configs.json", ".lock"


# What every line holds, and of which types. Lines hold more, where a method or a task has more to say.
FIELDS: Mapping[str, tuple[type, ...]] = {
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
    "correct": (bool,),
    "error": (str, type(None)),
    "tokens": (int,),
    "seconds": (int, float),
}
CONFIG_FIELDS: Mapping[str, tuple[type, ...]] = {"task": (str,), "method": (str,), "shared": (dict,), "own": (dict,)}


def hash_of(config: Mapping[str, Any]) -> str:
    """A short name of a configuration: equal configurations have equal ones."""
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:12]


@dataclass(frozen=True)
class Mended:
    """What was found broken and put right when a folder was opened.

    Attributes:
        torn: beginnings of torn last lines, removed.
        incomplete: batches that a stop left unfinished; their lines were removed.
        retried: batches with failed answers that are to be tried again; their lines were removed.
    """

    torn: tuple[str, ...] = ()
    incomplete: tuple[str, ...] = ()
    retried: tuple[str, ...] = ()


class ResultsFolder:
    """Results of an evaluation, one JSON object a line, one line an instance, method and sample.

    `results.jsonl` holds what is merged, `results.<process>.jsonl` what a process has written since, and
    `configs.json` the configuration behind every line's `config`. Lines carry `batch`, the unit in which they were
    made, and `batch_size`, by which a batch that a stop cut short is recognised.

    The first process owns the folder: it opens it before all others (`prepare`) and merges at the end. The others
    only append to files of their own.

    Args:
        path: the folder, made if it is missing.
        process: number of this process.
    """

    def __init__(self, path: str | Path, process: int = 0) -> None:
        self.path = Path(path)
        if self.path.is_file():
            raise ValueError(f"Results go into a folder, got the file {str(self.path)!r}.")
        self.process = process
        self._used: set[str] = set()  # configurations of the lines that are there, or will be
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

    def prepare(self, *, retry_failed: bool = False) -> Mended:
        """Take the folder, and merge what a stopped run left.

        For the first process only, before any other touches the folder.

        Args:
            retry_failed: let go of the batches in which an answer failed.

        Raises:
            ValueError: another run is writing to it.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = (self.path / LOCK).open("a", encoding="utf-8")
        lock(self._lock, self.path)
        return self.merge(retry_failed=retry_failed)

    def describe(self, configs: Sequence[Mapping[str, Any]]) -> None:
        """Note the configurations of the lines that will be written.

        Args:
            configs: each with `task` and `method`, the settings `shared` by all methods of a task, and the method's
                `own`.

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
                    f"settings: {'; '.join(filter(None, differences))}. Choose another --output, or repeat the "
                    "settings to go on."
                )
        new = {hash_of(config): dict(config) for config in configs}
        self._used |= new.keys()
        write_whole(self.path / CONFIGS, json.dumps(kept | new, indent=2) + "\n")

    def configs(self) -> dict[str, dict[str, Any]]:
        """Every configuration, by the name that lines carry.

        Raises:
            ValueError: the file holds something else.
        """
        path = self.path / CONFIGS
        if not path.exists():
            return {}
        try:
            configs = parse_json_object(path.read_bytes())
        except ValueError as error:
            raise ValueError(f"{str(path)!r} is no JSON object: {error}.") from error
        for name, config in configs.items():
            _check_fields(config, CONFIG_FIELDS, f"{str(path)!r}, {name!r}")
        return configs

    def read(self) -> list[dict[str, Any]]:
        """Every merged record.

        Raises:
            ValueError: a line that is no record, with its number.
        """
        path = self.path / RESULTS
        return _read_records(path)[0] if path.exists() else []

    def append(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Write the answers of a batch; when this returns, it is on the disk."""
        if self._file is None:
            self._file = (self.path / f"results.{self.process}.jsonl").open("a", encoding="utf-8")
        append_json_lines(self._file, records)

    def merge(self, *, retry_failed: bool = False) -> Mended:
        """Put every process's lines into `results.jsonl`, in an order that does not depend on who made them."""
        if self._file is not None:
            self._file.close()
            self._file = None
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
                # A batch that was cut short is made again behind its own beginning: the whole one counts.
                whole = batch[-batch[0]["batch_size"] :]
                if [record["row"] for record in whole] != list(range(batch[0]["batch_size"])):
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
        return Mended(tuple(torn), tuple(incomplete), tuple(retried))


def _read_records(path: Path) -> tuple[list[dict[str, Any]], str | None]:
    """What `read_json_lines` returns, with every record checked."""
    records, torn = read_json_lines(path)
    for number, record in enumerate(records, start=1):
        _check_fields(record, FIELDS, f"{str(path)!r}, line {number}")
    return records, torn


def _check_fields(found: Any, fields: Mapping[str, tuple[type, ...]], where: str) -> None:
    """Raise a ValueError unless an object holds all fields, of their types."""
    advice = "It was not written by this program, or was changed: put it right, or choose another --output."
    if not isinstance(found, dict):
        raise ValueError(f"{where} must be an object, got {found!r:.80}. {advice}")
    for name, types in fields.items():
        if name not in found:
            raise ValueError(f"{where} has no {name!r}. {advice}")
        if not isinstance(found[name], types):
            kinds = " or ".join("null" if kind is type(None) else kind.__name__ for kind in types)
            raise ValueError(f"{where}: {name!r} is {found[name]!r:.80}, not of type {kinds}. {advice}")
