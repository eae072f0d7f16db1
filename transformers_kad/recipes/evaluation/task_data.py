"""Finds and loads the rows of a task's data set, from the Hub or from local files."""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

Row = Mapping[str, Any]

# The readers of the package datasets, by the file endings that they read.
_READERS = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".csv": "csv", ".arrow": "arrow"}


@dataclass(frozen=True)
class DatasetFiles:
    """The files of one split of a data set.

    Attributes:
        task: name of the task, which may begin the names of local files.
        dataset: Hub id of the data set.
        subset: its configuration; None if it has only one.
        split: the split.
    """

    task: str
    dataset: str
    subset: str | None
    split: str

    @property
    def source(self) -> str:
        """The data set, its configuration and its split, for messages."""
        return f"{self.dataset} ({f'{self.subset}, ' if self.subset else ''}{self.split})"

    def _how_to_get(self, folder: str | Path) -> str:
        return (
            "--data_dir takes a file with the rows of the split, or a folder that holds "
            f"{self.subset or 'data'}/{self.split}-*.parquet, {self.split}.jsonl or {self.task}_{self.split}.jsonl "
            f"(any of {', '.join(_READERS)}). Where the Hub can be reached: hf download --repo-type dataset "
            f"{self.dataset} --local-dir {folder}/{self.dataset}; then pass --data_dir {folder}."
        )

    def hub_rows(self, limit: int | None) -> Iterable[Row]:
        """The rows on the Hub, or in its cache.

        Raises:
            FileNotFoundError: they can't be loaded.
            ValueError: there is no such split.
        """
        load_dataset = _load_dataset()
        try:
            rows = load_dataset(self.dataset, name=self.subset, split=self.split)
        except OSError as error:
            raise FileNotFoundError(f"Could not load {self.source}: {error}. {self._how_to_get('DIR')}") from error
        except ValueError as error:  # there is no such split, or only another configuration is in the cache
            raise ValueError(f"Could not load {self.source}: {error}. {self._how_to_get('DIR')}") from error
        return rows.select(range(min(limit or len(rows), len(rows))))

    def local_rows(self, data_dir: Path, limit: int | None) -> list[Row]:
        """The rows of the file `data_dir`, or of the files of the split in the folder `data_dir`.

        Raises:
            FileNotFoundError: there are no such files.
            ValueError: the files can't be read, or don't belong together.
        """
        given, source = data_dir.expanduser(), self.source
        if given.is_file():
            folder, files = given, [given]
        else:
            below = (given / str(self.dataset), given / str(self.dataset).rpartition("/")[2])
            folder = next((place for place in below if place.is_dir()), given)
            files = self._split_files(folder)
        loaded: dict[str, Any]
        if files:
            if files[0].suffix not in _READERS:
                raise ValueError(f"Rows are read from files that end in {', '.join(_READERS)}, got {str(given)!r}.")
            names = {"rows": [str(file) for file in files]}
            loaded = {"path": _READERS[files[0].suffix], "data_files": names, "split": "rows"}
        elif (folder / "README.md").is_file():  # its `configs:` list the files, whatever their names
            loaded = {"path": str(folder), "name": self.subset, "split": self.split}
        else:
            raise FileNotFoundError(f"There is no {source} in {str(data_dir)!r}. {self._how_to_get(data_dir)}")
        load_dataset = _load_dataset()
        # Streamed, with a temporary cache: datasets would return old rows of a local file that has changed.
        with TemporaryDirectory() as cache:
            try:
                return list(islice(load_dataset(**loaded, streaming=True, cache_dir=cache), limit))
            except FileNotFoundError as error:
                raise FileNotFoundError(
                    f"Could not load {source} from {folder}: {error}. {self._how_to_get(data_dir)}"
                ) from error
            except Exception as error:  # its readers raise many kinds of errors on malformed files
                advice = "" if files else f" {self._how_to_get(data_dir)}"
                raise ValueError(f"Could not load {source} from {folder}: {error}{advice}") from error

    def _split_files(self, folder: Path) -> list[Path]:
        """The files of the split by their names, in the folder of the subset, in data/ or in the folder itself.

        Raises:
            ValueError: there are files of two kinds, or a part of a file is missing.
        """
        name = re.compile(rf"(?:{re.escape(self.task)}[_-])?{re.escape(self.split)}(?:-\d+-of-(\d+)(?:-\w+)?)?")
        for place in (self.subset, "data", "."):
            found = sorted((folder / place).glob("*")) if place else []
            files = [file for file in found if file.suffix in _READERS and name.fullmatch(file.stem)]
            if files:
                counts = {(file.suffix, int(name.fullmatch(file.stem)[1] or 1)) for file in files}  # type: ignore[index]
                if len(counts) > 1 or len(files) != next(iter(counts))[1]:
                    raise ValueError(
                        f"{self.source} must be one file, or all parts of one file, got "
                        f"{', '.join(file.name for file in files)} in {str(files[0].parent)!r}. Add the missing "
                        "parts, remove the others, or pass the right file itself as --data_dir."
                    )
                return files
        return []


def _load_dataset() -> Callable[..., Any]:
    try:
        from datasets import load_dataset  # noqa: PLC0415
    except ImportError as error:
        raise ImportError('Loading a data set needs datasets: pip install -e ".[eval]"') from error
    return load_dataset
