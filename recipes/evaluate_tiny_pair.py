# /// script
# requires-python = ">=3.11"
# dependencies = ["transformers-kad", "tqdm"]
# ///
"""Score every rule on the tiny pair: parameters chosen on validation problems, reported on test problems.

    python recipes/evaluate_tiny_pair.py                 # some minutes on 2 CPU cores

Token by token, in batches, sampled at temperature 1 without top-k and top-p. Writes a Markdown table to the
terminal and everything to recipes/results/tiny_pair.json: the accuracy of every parameter on the validation
problems, and of the best one of each rule on the test problems, with the paired difference of the KAD dual rule
and nudging. The problems and their two scorers are those of transformers_kad.word_problems; train_tiny_pair.py
says how to read the figures.
"""

import json
import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm
from transformers import set_seed

from transformers_kad import RULES, KADLogitsProcessor
from transformers_kad.command_line import parse_arguments, quieten
from transformers_kad.environment import describe_environment
from transformers_kad.intervals import paired_difference, wilson_interval
from transformers_kad.loading import load_model, load_tokenizer
from transformers_kad.prompting import PLAIN_SAMPLING, encode, eos_token_ids
from transformers_kad.word_problems import Problem, is_correct, is_correct_lenient, make_problems

GRID: dict[str, tuple[str, list[float]]] = {
    "dual": ("threshold", [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9]),
    "primal": ("budget", [0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.98]),
    "nudging": ("threshold", [0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95]),
    "confidence_bet": ("margin", [0.0, 0.05, 0.1, 0.2, 0.3, 0.5]),
    "implicit_reward": ("beta", [0.5, 0.75, 1.0, 1.25, 1.5, 2.0]),
}


@dataclass
class EvaluationArguments:
    """Arguments of the evaluation."""

    pair: Path = field(
        default=Path(__file__).resolve().parent / "tiny_pair", metadata={"help": "Folder of the tiny pair."}
    )
    problems: int = field(default=500, metadata={"help": "Test problems reported."})
    validation_problems: int = field(default=300, metadata={"help": "Problems that parameters are chosen on."})
    seeds: int = field(default=4, metadata={"help": "Sampling runs over the test problems."})
    batch_size: int = field(default=100, metadata={"help": "Problems decoded at once."})
    max_new_tokens: int = field(default=48, metadata={"help": "Longest answer, in tokens."})
    out: Path = field(
        default=Path(__file__).parent / "results" / "tiny_pair.json", metadata={"help": "Where the figures go."}
    )

    def __post_init__(self) -> None:
        if not (self.pair / "base").is_dir():
            raise ValueError(f"No tiny pair in {str(self.pair)!r}. Pass its folder with --pair.")
        for name in ("problems", "validation_problems", "seeds", "batch_size", "max_new_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} must be at least 1, got {getattr(self, name)}.")


class Evaluation:
    """The pair, and the answers that a method gives to many problems."""

    def __init__(self, arguments: EvaluationArguments) -> None:
        self.arguments = arguments
        self.tokenizer = load_tokenizer(arguments.pair / "base")
        self.base = load_model(arguments.pair / "base")
        self.proxy = load_model(arguments.pair / "proxy")
        self.reference = load_model(arguments.pair / "reference")
        self.eos = eos_token_ids(self.base, self.proxy)

    def score(
        self, method: str, problems: list[Problem], seed: int, **parameters: float
    ) -> tuple[list[bool], list[bool], float | None]:
        """Strict and lenient score of each problem, and the mean deferral mass.

        `method` is "base", "proxy", or a rule's name with its parameters.
        """
        kad = None
        if method not in ("base", "proxy"):
            reference = self.reference if RULES[method].needs_reference else None
            kad = KADLogitsProcessor(self.proxy, method, reference=reference, **parameters)
        model = self.proxy if method == "proxy" else self.base
        set_seed(seed)
        strict, lenient, masses = [], [], []
        for start in range(0, len(problems), self.arguments.batch_size):
            batch = problems[start : start + self.arguments.batch_size]
            inputs = encode(self.tokenizer, [problem.question for problem in batch], "cpu")
            ids = model.generate(
                **inputs,
                **PLAIN_SAMPLING,
                max_new_tokens=self.arguments.max_new_tokens,
                eos_token_id=self.eos,
                pad_token_id=self.tokenizer.pad_token_id,
                logits_processor=[kad] if kad else None,
            )
            texts = self.tokenizer.batch_decode(ids[:, inputs["input_ids"].shape[1] :])
            strict += [is_correct(text, problem) for text, problem in zip(texts, batch, strict=True)]
            lenient += [is_correct_lenient(text, problem) for text, problem in zip(texts, batch, strict=True)]
            if kad is not None and kad.statistics is not None:
                masses.append(kad.statistics.deferral_mass)
        known = [mass for mass in masses if mass is not None]
        return strict, lenient, statistics.fmean(known) if known else None


def mean(runs: list[list[bool]]) -> float:
    """The share of correct answers over all runs."""
    return statistics.fmean(score for run in runs for score in run)


def evaluate(arguments: EvaluationArguments) -> dict[str, Any]:
    """Choose on validation problems, report on test problems."""
    evaluation = Evaluation(arguments)
    validation = make_problems("validation", arguments.validation_problems)
    test = make_problems("test", arguments.problems)

    tried: dict[str, dict[str, float]] = {}
    best: dict[str, float] = {}
    settings = [(rule, name, value) for rule, (name, values) in GRID.items() for value in values]
    for rule, name, value in tqdm(settings, desc="choosing parameters", disable=None):
        strict, _, _ = evaluation.score(rule, validation, seed=0, **{name: value})
        tried.setdefault(rule, {})[str(value)] = statistics.fmean(strict)
    for rule, (_, values) in GRID.items():
        best[rule] = max(values, key=lambda value, rule=rule: tried[rule][str(value)])

    rows: dict[str, dict[str, Any]] = {}
    strict_runs: dict[str, list[list[bool]]] = {}
    for method in tqdm(["base", "proxy", *GRID], desc="test problems", disable=None):
        parameters = {GRID[method][0]: best[method]} if method in GRID else {}
        runs = [evaluation.score(method, test, seed=1 + seed, **parameters) for seed in range(arguments.seeds)]
        strict_runs[method] = [strict for strict, _, _ in runs]
        low, high = wilson_interval(round(mean(strict_runs[method]) * len(test)), len(test))
        rows[method] = {
            "parameters": parameters,
            "strict": mean(strict_runs[method]),
            "interval": [low, high],
            "lenient": mean([lenient for _, lenient, _ in runs]),
            "deferral_mass": runs[0][2],
        }
    difference, half_width = paired_difference(strict_runs["dual"], strict_runs["nudging"])
    return {
        "settings": {**vars(arguments), "pair": arguments.pair.name, "out": arguments.out.name},
        "validation": tried,
        "test": rows,
        "dual_minus_nudging": {"mean": difference, "half_width_95": half_width},
        "environment": describe_environment(),
    }


def table(result: dict[str, Any]) -> str:
    """The test figures as Markdown."""
    lines = [
        "| method | strict | 95 % interval | lenient | deferral mass |",
        "|---|---:|---:|---:|---:|",
    ]
    for method, row in result["test"].items():
        label = " ".join([method.replace("_", " "), *(f"{value:g}" for value in row["parameters"].values())])
        mass = "–" if row["deferral_mass"] is None else f"{row['deferral_mass']:.2f}"
        low, high = row["interval"]
        lines.append(f"| {label} | {row['strict']:.3f} | {low:.3f} to {high:.3f} | {row['lenient']:.3f} | {mass} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    """Parse the command line and run."""
    (arguments,) = parse_arguments([EvaluationArguments], __doc__, argv)
    quieten()
    result = evaluate(arguments)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    difference = result["dual_minus_nudging"]
    print(table(result))
    print(f"\ndual - nudging: {difference['mean']:.3f} ± {difference['half_width_95']:.3f} (95 %, paired)")
    print(f"Written to {arguments.out}.")


if __name__ == "__main__":
    main()
