# /// script
# requires-python = ">=3.11"
# dependencies = ["transformers-kad", "tqdm"]
# ///
"""How much does a rule cost, relative to a softmax of the same tensor?

    python recipes/benchmark_rules.py                    # about three minutes

Times every rule on random distributions over --vocabulary tokens, for each number of rows in --rows. Distributions are
*peaked* (20 tokens have nearly all of the mass, as where a model is sure of the next token), *flat* (thousands of
tokens have it) or *equal* (all tokens tie). Each time is divided by that of a softmax of the same tensor, measured
right before. The tables show medians over the repetitions with their quartiles.

- The rule: `defer`, or the target distribution for rules without a deferral mask.
- The whole step of a round, from the models' logits to the accepted tokens, with 5 draft tokens per sequence if the
  number of rows is a multiple of 6, and with one sequence otherwise.
- `ExactDeferral`, in milliseconds for one position.

All of this is in float32 on the CPU, in one thread. The times are CPU times of that thread, which other processes
disturb less than wall-clock time.
"""

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from transformers_kad import (
    BlendIn,
    CascadeDeferral,
    ConfidenceBetDeferral,
    DeferralRule,
    DualDeferral,
    Ensemble,
    ExactDeferral,
    ImplicitReward,
    NudgingDeferral,
    PacedDeferral,
    PrimalDeferral,
)
from transformers_kad.decoding.verification import count_accepted, draw, draw_next
from transformers_kad.models.model_errors import is_unusable
from transformers_kad.recipes.benchmarking.bounds import quartiles
from transformers_kad.recipes.command_line import parse_arguments
from transformers_kad.recipes.environment import describe_environment
from transformers_kad.rules.base import Rule
from transformers_kad.rules.composition import compose_positions
from transformers_kad.utils.files import write_whole

DISTRIBUTIONS = ("peaked", "flat", "equal")
PEAKS = 20
POSITIONS_PER_SEQUENCE = 6
EXACT_BUDGETS = (0.1, 0.5, 0.9)


@dataclass
class BenchmarkArguments:
    """Arguments of the benchmark."""

    vocabulary: int = field(default=150_000, metadata={"help": "Number of tokens."})
    rows: list[int] = field(default_factory=lambda: [1, 6, 48], metadata={"help": "Numbers of positions in a tensor."})
    repetitions: int = field(default=15, metadata={"help": "Repetitions of each measurement."})
    output: Path | None = field(default=None, metadata={"help": "JSON file for the results."})

    def __post_init__(self) -> None:
        if self.vocabulary < 2 * PEAKS:
            raise ValueError(f"--vocabulary must be at least {2 * PEAKS}, got {self.vocabulary}.")
        if self.repetitions < 1:
            raise ValueError(f"--repetitions must be at least 1, got {self.repetitions}.")
        if not self.rows or min(self.rows) < 1:
            raise ValueError(f"--rows must be at least 1 each, got {self.rows}.")


def rules(vocabulary: int) -> list[Rule]:
    """All rules except the exact one. Dual and primal also with parameters that split a flat distribution in half."""
    return [
        DualDeferral(0.4),
        DualDeferral(1 / vocabulary),
        PrimalDeferral(0.9),
        PrimalDeferral(0.1),
        NudgingDeferral(0.4),
        ConfidenceBetDeferral(0.1),
        *(CascadeDeferral(variant, 0.1) for variant in ("diff", "opt", "token_v2", "token_v3")),
        PacedDeferral(0.3),
        ImplicitReward(1.0),
        Ensemble(0.5),
        BlendIn(0.4),
    ]


def label(rule: Rule) -> str:
    """The name of a rule in the tables."""
    parameters = [f"{value:.3g}" if isinstance(value, float) else str(value) for value in vars(rule).values()]
    return f"{type(rule).__name__}({', '.join(parameters)})"


def random_logits(distribution: str, rows: int, vocabulary: int) -> torch.Tensor:
    """Logits `(rows, vocabulary)` of one kind of distribution."""
    generator = torch.Generator().manual_seed(0)
    if distribution == "equal":
        return torch.zeros(rows, vocabulary)
    logits = torch.randn(rows, vocabulary, generator=generator)
    if distribution == "peaked":
        peaks = torch.randperm(vocabulary, generator=generator)[:PEAKS]
        logits[:, peaks] += 14 + 2 * torch.randn(rows, PEAKS, generator=generator)
    return logits


@dataclass(frozen=True)
class Round:
    """The logits of a round: a window of positions for each sequence, the last of them after the draft."""

    base: torch.Tensor  # (B, n, V)
    draft: torch.Tensor  # (B, n - 1, V): the proxy's
    bonus: torch.Tensor  # (B, V): the proxy's
    reference: torch.Tensor  # (B, n, V)
    draft_ids: torch.Tensor  # (B, n - 1)

    @classmethod
    def of(cls, logits: torch.Tensor) -> "Round":
        """A round of a base with these logits, a proxy and a reference that differ at random, and a sampled draft."""
        rows, vocabulary = logits.shape
        sequences = rows // POSITIONS_PER_SEQUENCE if rows % POSITIONS_PER_SEQUENCE == 0 else 1
        generator = torch.Generator().manual_seed(1)
        proxy, reference = (logits + torch.randn(logits.shape, generator=generator) for _ in range(2))
        proxy = proxy.view(sequences, -1, vocabulary)
        drafted = proxy[:, :-1].contiguous()
        ids = draw(drafted.flatten(0, 1).softmax(-1), generator).view(drafted.shape[:2])
        return cls(logits.view(proxy.shape), drafted, proxy[:, -1].contiguous(), reference.view(proxy.shape), ids)

    def step(self, rule: Rule) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The computations of `kad_generate`: the rule, verification, the next token, and the check of the logits."""
        draft_probs = self.draft.softmax(-1)
        proxy = torch.cat([self.draft, self.bonus[:, None]], dim=1)
        reference = self.reference if rule.needs_reference else None
        composition = compose_positions(rule, self.base, proxy, reference)
        target = composition.target_probs.view(self.base.shape)
        accepted = count_accepted(target, draft_probs, self.draft_ids)
        following = draw_next(target, draft_probs, accepted)
        return accepted, following, torch.stack([is_unusable(self.base), is_unusable(proxy)])


def measure_ratios(arguments: BenchmarkArguments) -> list[dict[str, Any]]:
    """A row for each rule, part, distribution and number of rows: the quartiles of its ratio to a softmax."""
    found = []
    for rows in arguments.rows:
        for distribution in DISTRIBUTIONS:
            logits = random_logits(distribution, rows, arguments.vocabulary)
            softmax = partial(logits.softmax, -1)
            tasks = rule_tasks(Round.of(logits), rules(arguments.vocabulary))
            times: dict[tuple[str, str], list[tuple[float, float]]] = {task: [] for task in tasks}
            rounds = range(arguments.repetitions + 1)
            for repetition in tqdm(rounds, desc=f"{rows} rows, {distribution}", leave=False, disable=None):
                for task, run in tasks.items():
                    pair = time_once(softmax), time_once(run)
                    if repetition:  # the first repetition warms up
                        times[task].append(pair)
            for (name, part), pairs in times.items():
                found.append(
                    {
                        "rule": name,
                        "part": part,
                        "distribution": distribution,
                        "rows": rows,
                        "softmax_seconds": statistics.median(first for first, _ in pairs),
                        "ratio": quartiles([second / first for first, second in pairs]),
                    }
                )
    return found


def rule_tasks(window: Round, rules: list[Rule]) -> dict[tuple[str, str], Callable[[], object]]:
    """The functions that are timed, by the name of the rule and the part."""
    proxy = torch.cat([window.draft, window.bonus[:, None]], dim=1)
    p, q, q0 = (logits.flatten(0, 1).softmax(-1) for logits in (window.base, proxy, window.reference))
    tasks: dict[tuple[str, str], Callable[[], object]] = {}
    for rule in rules:
        own = partial(rule.defer, p, q) if isinstance(rule, DeferralRule) else partial(rule, p, q, q0)
        tasks[label(rule), "rule"] = own
        tasks[label(rule), "step"] = partial(window.step, rule)
    return tasks


def measure_exact(arguments: BenchmarkArguments) -> list[dict[str, Any]]:
    """A row for each distribution and budget: the quartiles of the time for a position, and the longest time."""
    found = []
    for distribution in DISTRIBUTIONS:
        positions = random_logits(distribution, arguments.repetitions + 1, arguments.vocabulary).softmax(-1)
        for budget in EXACT_BUDGETS:
            defer = ExactDeferral(budget).defer
            seconds = [time_once(partial(defer, position)) for position in positions][
                1:
            ]  # the first repetition warms up
            kept = (~PrimalDeferral(budget).defer(positions)).sum(-1)
            found.append(
                {
                    "distribution": distribution,
                    "budget": budget,
                    "nucleus": int(kept.median()),
                    "seconds": quartiles(seconds),
                    "longest": max(seconds),
                }
            )
    return found


def keep_freed_memory() -> torch.Tensor:
    """Make the allocator keep freed memory as long as the returned tensor exists.

    Whether glibc returns large freed blocks to the system depends on earlier blocks and on the blocks behind them, and
    getting new pages for a tensor costs more than its softmax. glibc keeps blocks of up to 32 MB once such a block was
    freed, and blocks in front of one that is in use.
    """
    size = 31 * 2**20
    torch.empty(size, dtype=torch.uint8)
    blocks = [torch.empty(size, dtype=torch.uint8) for _ in range(16)]
    last = torch.empty(2**20, dtype=torch.uint8)
    del blocks
    return last


def time_once(run: Callable[[], object]) -> float:
    """The CPU time of a call in this thread, in seconds."""
    started = time.thread_time()
    run()
    return time.thread_time() - started


def ratio_table(ratios: list[dict[str, Any]], part: str) -> str:
    """The ratios of one part as a Markdown table."""
    ratios = [row for row in ratios if row["part"] == part]
    counts = sorted({row["rows"] for row in ratios})
    cells: dict[tuple[str, str], dict[int, str]] = {}
    for row in ratios:
        low, middle, high = row["ratio"]
        line = cells.setdefault((row["rule"], row["distribution"]), {})
        line[row["rows"]] = f"{middle:.1f} ({low:.1f} to {high:.1f})"
    heads = [f"{count} row{'s' if count > 1 else ''}" for count in counts]
    lines = [f"| rule | distribution | {' | '.join(heads)} |", f"|---|---|{'---:|' * len(counts)}"]
    for (rule, distribution), line in cells.items():
        lines.append(f"| {rule} | {distribution} | {' | '.join(line[count] for count in counts)} |")
    return "\n".join(lines)


def summary_table(ratios: list[dict[str, Any]]) -> str:
    """Rules and whole steps side by side, at the number of rows with the highest cost."""
    parts, kinds = ("rule", "step"), list(dict.fromkeys(row["distribution"] for row in ratios))
    worst: dict[str, dict[tuple[str, str], float]] = {}
    for row in ratios:
        line, cell = worst.setdefault(row["rule"], {}), (row["part"], row["distribution"])
        line[cell] = max(line.get(cell, 0.0), row["ratio"][1])
    heads = [f"{part}, {kind}" for part in parts for kind in kinds]
    lines = [f"| in softmaxes | {' | '.join(heads)} |", f"|---|{'---:|' * len(heads)}"]
    for rule, line in worst.items():
        lines.append(f"| {rule} | {' | '.join(f'{line[part, kind]:.1f}' for part in parts for kind in kinds)} |")
    return "\n".join(lines)


def exact_table(rows: list[dict[str, Any]]) -> str:
    """The times of the exact rule as a Markdown table."""
    lines = ["| budget | distribution | nucleus | ms a position | longest |", "|---:|---|---:|---:|---:|"]
    for row in rows:
        low, middle, high = (f"{1000 * seconds:.1f}" for seconds in row["seconds"])
        longest = f"{1000 * row['longest']:.1f}"
        cells = [f"{row['budget']:g}", row["distribution"], f"{row['nucleus']:,}"]
        cells += [f"{middle} ({low} to {high})", longest]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    """Parse the command line and run."""
    (arguments,) = parse_arguments([BenchmarkArguments], __doc__, argv)
    torch.set_num_threads(1)
    environment, kept = describe_environment(), keep_freed_memory()
    ratios, exact = measure_ratios(arguments), measure_exact(arguments)
    del kept
    print(f"The rule, in softmaxes of its {arguments.vocabulary:,} tokens:\n\n{ratio_table(ratios, 'rule')}\n")
    print(f"The whole step, from logits to accepted tokens:\n\n{ratio_table(ratios, 'step')}\n")
    print(f"Both, at the number of rows with the highest cost:\n\n{summary_table(ratios)}\n")
    print(f"ExactDeferral:\n\n{exact_table(exact)}\n")
    print(environment["device"])
    if arguments.output is not None:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        figures = {"vocabulary": arguments.vocabulary, "ratios": ratios, "exact": exact, "environment": environment}
        write_whole(arguments.output, json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
