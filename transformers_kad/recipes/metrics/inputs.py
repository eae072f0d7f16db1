"""What the metrics share: inputs that are held in memory, and the check of counts."""

from collections.abc import Sequence
from typing import Any


class InMemory:
    """Mixin before `evaluate.Metric`: holds the inputs in memory, and names those that are missing.

    By default `evaluate` writes inputs to a cache file that all processes of a user share. Its locks keep two metrics
    apart, but the second one has to wait, and a metric that raised an error keeps its lock. Several processes that
    gather their inputs (`num_process` > 1) can do so only through files and need an `experiment_id`.
    """

    def __init__(self, config_name: str | None = None, **options: Any) -> None:
        options["keep_in_memory"] = options.get("num_process", 1) == 1
        super().__init__(config_name, **options)  # type: ignore[call-arg]

    def compute(self, *, predictions: Any = None, references: Any = None, **kwargs: Any) -> dict[str, Any] | None:
        """Compute the metric from the inputs given here, or, without any, from those added before."""
        given = {"predictions": predictions, "references": references, **kwargs}
        names: list[str] = self._feature_names()  # type: ignore[attr-defined]
        missing = [name for name in names if given.get(name) is None]
        if missing and (len(missing) < len(names) or len(self) == 0):  # type: ignore[arg-type]
            raise ValueError(f"{type(self).__name__} needs {names}, missing: {missing}.")
        return super().compute(predictions=predictions, references=references, **kwargs)  # type: ignore[misc]


def whole_numbers(name: str, values: Sequence[float | None]) -> list[int]:
    """Counts as integers.

    Metrics take counts as float64, since an int64 column would silently truncate 1.5 to 1.

    Raises:
        ValueError: for anything but whole numbers >= 0.
    """
    for at, value in enumerate(values):
        if value is None or value < 0 or not float(value).is_integer():
            raise ValueError(f"`{name}` must be whole numbers >= 0, got {value!r} at index {at}.")
    return [int(value) for value in values if value is not None]
