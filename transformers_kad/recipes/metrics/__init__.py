"""Metrics for `evaluate.load(metric_path(name))`. They need `pip install "transformers-kad[eval]"`.

What is counted is written down in each module's description: `evaluate.load(metric_path("throughput")).description`.
"""

from pathlib import Path

from ...rules.composition import unknown_name_message

METRICS = ("answer_accuracy", "throughput", "acceptance_rate", "acceptance_length", "deferral_mass")

KAD_CITATION = """\
@inproceedings{hammal2026kad,
  title     = {{KAD}: A Framework for Proxy-based Test-time Alignment with Knapsack Approximation Deferral},
  author    = {Hammal and Zweigenbaum and Corro},
  booktitle = {Proceedings of EACL},
  year      = {2026},
  note      = {arXiv:2510.27017}
}
"""


def metric_path(name: str) -> str:
    """Where a metric of :data:`METRICS` lies, for `evaluate.load`.

    Raises:
        ValueError: for an unknown name.
    """
    if name not in METRICS:
        raise ValueError(unknown_name_message("metric", name, METRICS))
    return str(Path(__file__).parent / name)
