# /// script
# requires-python = ">=3.11"
# dependencies = ["transformers-kad[eval]", "tqdm"]
# ///
"""How many more draft tokens does block verification accept than token verification, and is it faster?

    python recipes/benchmark_verification.py --dtype bfloat16 --output recipes/results/verification

For every rule and draft length, both verifications decode the same prompts, sampling at temperature 1:

1. --texts texts of the pair as it is, in batches, to count tokens and accepted draft tokens a round. The verifications
   are compared with a standard error.
2. --repetitions texts one at a time, with the models inflated to a realistic cost (--inflate), to measure the time. In
   every repetition all rules, draft lengths and verifications take turns, and the order of the two verifications
   changes.

A text of the second kind has few rounds, and how many they are is left to chance. The *speed* of block verification
relative to token verification is therefore the ratio of the tokens a round, from the first part, times the median
ratio of the times of a round, from the second. The tokens per second of the second part are shown beside it.

The results folder gets runs.jsonl, from which an interrupted run continues, verification.json and verification.md.
"""

import json
import math
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from transformers_kad.configuration import VERIFICATIONS
from transformers_kad.integrations.loading.messages import silence_libraries
from transformers_kad.integrations.loading.prompts import PLAIN_SAMPLING
from transformers_kad.logits_process import KADLogitsProcessor
from transformers_kad.recipes.arguments import ModelArguments
from transformers_kad.recipes.benchmarking.bounds import quartiles
from transformers_kad.recipes.benchmarking.inflate import inflate, parse_by_model, parse_count
from transformers_kad.recipes.benchmarking.speed import load_average
from transformers_kad.recipes.benchmarking.subjects import Subject, load_subject, make_inputs
from transformers_kad.recipes.command_line import exit_status, parse_arguments
from transformers_kad.recipes.environment import describe_environment
from transformers_kad.recipes.evaluation.methods import Method, parse_methods
from transformers_kad.recipes.resumable import JsonLinesStore
from transformers_kad.records.statistics import KADStatistics
from transformers_kad.utils.files import write_whole

TINY_PAIR = Path(__file__).resolve().parent / "tiny_pair"
TASK = "arithmetic"
WARM_UP_TOKENS = 8


@dataclass
class VerificationArguments:
    """What is compared, and how often.

    Attributes:
        inflated: `inflate`, parsed.

    Raises:
        ValueError: a method without a rule, or a value out of range.
    """

    pair: Path | None = field(
        default=None,
        metadata={"help": "Folder with base/ and proxy/ in it, used without --base and --proxy. Default: tiny_pair/."},
    )
    output: Path = field(default=Path("kad_verification"), metadata={"help": "Folder for the results."})
    methods: list[str] = field(
        default_factory=lambda: ["kad-dual:threshold=0.3,0.5,0.7", "kad-primal:budget=0.8"],
        metadata={"help": "Methods with a rule, as run_eval.py takes them."},
    )
    draft_lengths: list[int] = field(default_factory=lambda: [3, 5, 8], metadata={"help": "Draft lengths γ."})
    texts: int = field(default=1024, metadata={"help": "Texts that are counted, for each row of the table."})
    batch_size: int = field(default=32, metadata={"help": "Texts that are counted at once."})
    repetitions: int = field(default=12, metadata={"help": "Texts that are timed, for each row of the table."})
    inflate: str = field(
        default="base=300M,proxy=30M",
        metadata={"help": "Parameters to add for the timed texts, which cost time and change nothing."},
    )
    max_new_tokens: int = field(default=96, metadata={"help": "New tokens of every text."})
    seed: int = field(default=0, metadata={"help": "Seed of prompts and sampling."})

    def __post_init__(self) -> None:
        for name in ("texts", "batch_size", "repetitions", "max_new_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} must be at least 1, got {getattr(self, name)}.")
        if min(self.draft_lengths) < 1:
            raise ValueError(f"--draft_lengths must be at least 1, got {self.draft_lengths}.")
        self.chosen = parse_methods(self.methods)
        for method in self.chosen:
            if method.config is None:
                raise ValueError(f"--methods need a rule, got {method.name!r}.")
        self.inflated = {name: parse_count(count) for name, count in parse_by_model(self.inflate, "--inflate").items()}


class Case:
    """A rule with a draft length, and a processor for each verification."""

    def __init__(self, subject: Subject, method: Method, draft_length: int) -> None:
        assert method.config is not None
        self.subject = subject
        self.key = {"method": method.label, "draft_length": draft_length}
        self.processors: dict[str, KADLogitsProcessor] = {
            name: subject.processor(method.config, num_assistant_tokens=draft_length, verification=name)
            for name in VERIFICATIONS
        }

    def decode(self, verification: str, seed: int, *, rows: int, max_new_tokens: int) -> tuple[float, KADStatistics]:
        """Decode `rows` texts with one of the verifications; the time in seconds, and the statistics."""
        kad, inputs = self.processors[verification], make_inputs(self.subject, TASK, rows, seed, 0)
        kad.reset()
        torch.manual_seed(seed)
        began = time.perf_counter()
        self.subject.base.generate(
            **inputs,
            **PLAIN_SAMPLING,
            logits_processor=[kad],
            assistant_model=self.subject.proxy,
            max_new_tokens=max_new_tokens,
            eos_token_id=None,
            pad_token_id=self.subject.pad_token_id,
        )
        seconds = time.perf_counter() - began
        assert kad.statistics is not None
        return seconds, kad.statistics


def count(case: Case, arguments: VerificationArguments) -> dict[str, Any]:
    """Decode the texts that are counted. For each verification tokens, rounds and accepted tokens of every text."""
    record: dict[str, Any] = {"part": "counts", **case.key, **{name: [] for name in VERIFICATIONS}}
    for first in range(0, arguments.texts, arguments.batch_size):
        rows = min(arguments.batch_size, arguments.texts - first)
        for name in VERIFICATIONS:
            seed = arguments.seed + first
            _, counts = case.decode(name, seed, rows=rows, max_new_tokens=arguments.max_new_tokens)
            record[name] += [[text.tokens, text.rounds, text.accepted] for text in counts.sequences]
    return record


def time_texts(
    cases: Sequence[Case], arguments: VerificationArguments, repetition: int, tokens: int
) -> dict[str, Any]:
    """Decode a text with every case. For each verification time, tokens and rounds."""
    record: dict[str, Any] = {"part": "times", "repetition": repetition, "load": load_average(), "cases": []}
    for case in cases:
        times: dict[str, Any] = {}
        for name in VERIFICATIONS[:: 1 if repetition % 2 else -1]:
            seconds, counts = case.decode(name, arguments.seed + repetition, rows=1, max_new_tokens=tokens)
            times[name] = [seconds, counts.tokens, counts.rounds]
        record["cases"].append(case.key | times)
    return record


def measure(arguments: VerificationArguments, subject: Subject, store: JsonLinesStore) -> None:
    """Count and time all cases, as far as the store does not hold them yet."""
    cases = [Case(subject, method, length) for method in arguments.chosen for length in arguments.draft_lengths]

    def keep(record: dict[str, Any]) -> None:
        store.append(record)
        store.records.append(record)

    counted = [record for record in store.records if record["part"] == "counts"]
    left = [case for case in cases if not any(case.key.items() <= record.items() for record in counted)]
    for case in tqdm(left, desc="counting", disable=None):
        keep(count(case, arguments))
    timed = {record["repetition"] for record in store.records if record["part"] == "times"}
    repetitions = [at for at in range(arguments.repetitions) if at not in timed]
    if repetitions:
        for name, parameters in arguments.inflated.items():
            inflate(subject.models[name], parameters)
        time_texts(cases, arguments, 0, min(WARM_UP_TOKENS, arguments.max_new_tokens))
    for repetition in tqdm(repetitions, desc="timing", disable=None):
        keep(time_texts(cases, arguments, repetition, arguments.max_new_tokens))


def make_rows(records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A row of the table for each rule and draft length, as JSON values."""
    times = [case for record in records if record["part"] == "times" for case in record["cases"]]
    rows = []
    for counted in records:
        if counted["part"] == "counts":
            key = {name: counted[name] for name in ("method", "draft_length")}
            rows.append(key | _row(counted, [case for case in times if key.items() <= case.items()]))
    return rows


def _row(counted: Mapping[str, Any], timed: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    row: dict[str, Any] = {}
    errors, round_times = [], []
    for name in VERIFICATIONS:
        tokens, rounds, accepted = (sum(values) for values in zip(*counted[name], strict=True))
        seconds, timed_tokens, timed_rounds = (sum(values) for values in zip(*(c[name] for c in timed), strict=True))
        row[name] = {
            "texts": len(counted[name]),
            "tokens_per_round": tokens / rounds,
            "accepted_per_round": accepted / rounds,
            "tokens_per_second": timed_tokens / seconds,
            "seconds_per_round": seconds / timed_rounds,
        }
        errors.append(relative_error([rounds for _, rounds, _ in counted[name]]))
        round_times.append([seconds / rounds for seconds, _, rounds in (case[name] for case in timed)])
    token, block = (row[name]["tokens_per_round"] for name in VERIFICATIONS)
    ratios = [of_token / of_block for of_token, of_block in zip(*round_times, strict=True)]
    row["gain"] = {"tokens_per_round": block / token, "standard_error": block / token * math.hypot(*errors)}
    row["speed"] = [block / token * ratio for ratio in quartiles(ratios)]
    return row


def relative_error(values: Sequence[float]) -> float:
    """The standard error of the mean of some values, relative to it; 0 for a single one."""
    if len(values) < 2:
        return 0.0
    return statistics.stdev(values) / len(values) ** 0.5 / statistics.fmean(values)


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    lines = [
        "| rule | γ | accepted/round: token | block | tokens/round: token | block | ratio | ms/round: token | block "
        "| tokens/s: token | block | speed of block |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        pair = [row[name] for name in VERIFICATIONS]
        low, middle, high = row["speed"]
        cells = [
            row["method"].removeprefix("kad-"),
            str(row["draft_length"]),
            *(f"{of['accepted_per_round']:.2f}" for of in pair),
            *(f"{of['tokens_per_round']:.2f}" for of in pair),
            f"× {row['gain']['tokens_per_round']:.3f} ± {row['gain']['standard_error']:.3f}",
            *(f"{1000 * of['seconds_per_round']:.0f}" for of in pair),
            *(f"{of['tokens_per_second']:.1f}" for of in pair),
            f"× {middle:.2f} ({low:.2f} to {high:.2f})",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def run(models: ModelArguments, arguments: VerificationArguments) -> int:
    """Measure, print and write the table."""
    models.complete_with_pair(None, arguments.pair or TINY_PAIR)
    subject = load_subject(models, random_weights={}, inflated={}, seed=arguments.seed)
    settings = {
        name: getattr(arguments, name)
        for name in ("methods", "draft_lengths", "texts", "batch_size", "inflate", "max_new_tokens", "seed")
    }
    # The last two names of a local path, so that results don't contain paths of a machine.
    settings |= {name: "/".join(Path(str(getattr(models, name))).parts[-2:]) for name in ("base", "proxy")}
    settings |= {"dtype": models.dtype, "environment": describe_environment(str(subject.device))}
    with JsonLinesStore(arguments.output / "runs.jsonl", settings, checked=True) as store:
        measure(arguments, subject, store)
        records = store.records
    rows = make_rows(records)
    loads = [record["load"] for record in records if record.get("load") is not None]
    report = {"rows": rows, "settings": settings, "load": max(loads, default=None)}
    print(table(rows))
    write_whole(arguments.output / "verification.json", json.dumps(report, indent=2) + "\n")
    write_whole(arguments.output / "verification.md", table(rows) + "\n")
    return 0


def main(argv: list[str] | None = None) -> int:
    """Parse the command line and run."""
    arguments = parse_arguments([ModelArguments, VerificationArguments], __doc__, argv)
    silence_libraries()
    return exit_status(lambda: run(*arguments))


if __name__ == "__main__":
    sys.exit(main())
