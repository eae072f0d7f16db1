"""Metrics for `evaluate.load(metric_path(name))`. They need `pip install -e ".[eval]"`.

Each module's description defines its figures: `evaluate.load(metric_path("decoding_statistics")).description`.
"""

from pathlib import Path

from ...rules.registry import unknown_name_message

METRICS = ("answer_accuracy", "decoding_statistics", "rouge")


def metric_path(name: str) -> str:
    """The folder of a metric of :data:`METRICS`, for `evaluate.load`.

    Raises:
        ValueError: for an unknown name.
    """
    if name not in METRICS:
        raise ValueError(unknown_name_message("metric", name, METRICS))
    return str(Path(__file__).parent / name)
