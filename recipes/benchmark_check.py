# /// script
# requires-python = ">=3.11"
# dependencies = ["transformers-kad[eval,train]"]
# ///
"""Is check_pair.py right? Its verdicts on the tiny pair and on pairs that are bad on purpose, beside the accuracy.

    python recipes/benchmark_check.py --output recipes/results/check_pair

The base is that of the tiny pair; the proxies are the tiny pair's, the base itself, a model of random weights, and
a GPT-2 with a tokenizer of its own that was trained on source code. Every pair is checked on word problems without
answers. Then --problems other word problems are answered by the base, the proxy, KAD with the recommended rule, and
KAD with the setting that has the highest accuracy of the grid of sweep.py on validation problems of the tiny pair.

The results folder gets checks.json, checks.md and a plot of every check, and in a folder for each pair what
check_pair.py writes, from which an interrupted run continues.
"""

import json
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers_kad import KADConfig
from transformers_kad.integrations.loading.messages import silence_libraries
from transformers_kad.integrations.loading.prompts import PLAIN_SAMPLING
from transformers_kad.recipes.arguments import ModelArguments
from transformers_kad.recipes.command_line import exit_status, parse_arguments
from transformers_kad.recipes.evaluation.comparison import compare_methods
from transformers_kad.recipes.evaluation.decoding import Decoder
from transformers_kad.recipes.evaluation.methods import Method
from transformers_kad.recipes.evaluation.task import Instance
from transformers_kad.recipes.evaluation.tasks import get_task
from transformers_kad.recipes.intervals import wilson_interval
from transformers_kad.recipes.pair import Pair
from transformers_kad.recipes.pair_check.arguments import CheckArguments
from transformers_kad.recipes.pair_check.bad_pairs import save_other_family, save_random_weights
from transformers_kad.recipes.pair_check.session import check_pair
from transformers_kad.utils.files import write_whole

# isort: split
# This import follows transformers_kad, which suppresses the messages of torchao.
import torch

TINY_PAIR = Path(__file__).resolve().parent / "tiny_pair"
PAIRS = ("tiny_pair", "base_twice", "random_weights", "other_family")
BEST_OF_GRID = KADConfig(rule="confidence_bet", parameters={"margin": 0.1})
BATCH_SIZE = 100


@dataclass
class BenchmarkArguments:
    """What is checked and scored.

    Raises:
        ValueError: a value is out of range.
    """

    output: Path = field(default=Path("kad_checks"), metadata={"help": "Folder for the results."})
    pair: Path = field(default=TINY_PAIR, metadata={"help": "Folder with base/, proxy/ and reference/ in it."})
    prompts: int = field(default=50, metadata={"help": "Word problems of each check."})
    problems: int = field(default=500, metadata={"help": "Word problems that are scored."})
    max_new_tokens: int = field(default=64, metadata={"help": "Maximum length of a text, in tokens."})
    training_steps: int = field(default=200, metadata={"help": "Training steps of the proxy of another family."})

    def __post_init__(self) -> None:
        for name in ("prompts", "problems", "max_new_tokens", "training_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} must be at least 1, got {getattr(self, name)}.")
        if not (self.pair / "reference").is_dir():
            raise ValueError(f"No pair in {str(self.pair)!r}. Pass --pair with base/, proxy/ and reference/ in it.")


def proxy_of(name: str, arguments: BenchmarkArguments) -> Path:
    """The folder of a pair's proxy, which is made if it is missing."""
    made = arguments.output / name / "proxy"
    if name in ("tiny_pair", "base_twice"):
        return arguments.pair / ("proxy" if name == "tiny_pair" else "base")
    if not (made / "tokenizer.json").is_file():
        if name == "random_weights":
            save_random_weights(arguments.pair / "proxy", arguments.pair / "reference", made)
        else:
            save_other_family(made, steps=arguments.training_steps)
    return made


def score(
    models: ModelArguments, methods: Mapping[str, Method], problems: Sequence[Instance]
) -> dict[str, list[bool]]:
    """Whether each method answers each problem rightly, sampling token by token."""
    decoder, task = Decoder(Pair(models), dict(PLAIN_SAMPLING), speculative=False), get_task("tiny")
    scores: dict[str, list[bool]] = {}
    for name, method in methods.items():
        scores[name] = []
        for start in range(0, len(problems), BATCH_SIZE):
            batch = problems[start : start + BATCH_SIZE]
            prompts = [problem.question for problem in batch]
            answers = decoder.answer(method, prompts, seed=start, max_new_tokens=task.max_new_tokens)
            predictions = [task.extract(answer.text, answer.ended) for answer in answers]
            scores[name] += list(map(task.is_correct, predictions, batch))
    return scores


def measure(name: str, arguments: BenchmarkArguments) -> dict[str, Any]:
    """The check of a pair and the accuracies, as JSON values."""
    folder, proxy = arguments.output / name, proxy_of(name, arguments)
    models = ModelArguments(base=str(arguments.pair / "base"), proxy=str(proxy), device="cpu")
    folder.mkdir(parents=True, exist_ok=True)
    questions = [problem.question for problem in get_task("tiny").load(split="validation", limit=arguments.prompts)]
    (folder / "questions.txt").write_text("\n".join(questions) + "\n", encoding="utf-8")
    chosen = CheckArguments(
        prompts=str(folder / "questions.txt"),
        output=folder,
        limit=arguments.prompts,
        max_new_tokens=arguments.max_new_tokens,
    )
    report = check_pair(models, chosen, default_pair=arguments.pair)
    methods = {"base": Method("base"), "proxy": Method("proxy")}
    if (recommended := report["recommended"]) is not None:
        config = KADConfig(rule=recommended["rule"], parameters=recommended["parameters"])
        methods |= {"recommended": Method("config", config), "best of the grid": Method("config", BEST_OF_GRID)}
        shutil.copy(folder / "check.svg", arguments.output / f"{name}.svg")
    else:
        methods = {"base": Method("base")}
    scores = score(models, methods, get_task("tiny").load(limit=arguments.problems))
    kept = ("verdict", "reasons", "notes", "recommended", "compatibility", "seconds", "environment")
    return {
        "pair": name,
        **{key: report[key] for key in kept},
        "texts": report["figures"] and report["figures"]["texts"],
        "accuracy": {method: sum(own) / len(own) for method, own in scores.items()},
        "interval": {method: wilson_interval(sum(own), len(own)) for method, own in scores.items()},
        "p_value": p_value(scores),
    }


def p_value(scores: Mapping[str, Sequence[bool]]) -> float | None:
    """Of the exact paired test of the recommended rule against the best of the grid; None without texts of KAD."""
    if "recommended" not in scores:
        return None
    both = {
        name: {str(at): [own] for at, own in enumerate(scores[name])} for name in ("recommended", "best of the grid")
    }
    (comparison,) = compare_methods(both)
    return comparison.p_value


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The checks as Markdown."""
    lines = [
        "| pair | verdict | start with | proxy's share | base | proxy | KAD | best of the grid | p | seconds |",
        "|---|---|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        recommended, accuracy = row["recommended"], row["accuracy"]
        names = ("base", "proxy", "recommended", "best of the grid")
        cells = [
            row["pair"].replace("_", " "),
            row["verdict"],
            "–" if recommended is None else recommended["method"],
            "–" if recommended is None else f"{recommended['deferral_mass']:.0%}",
            *(f"{accuracy[name]:.3f}" if name in accuracy else "–" for name in names),
            "–" if row["p_value"] is None else f"{row['p_value']:.2f}",
            f"{row['seconds']:.0f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    lines.append("")
    for row in rows:
        lines += [f"{row['pair'].replace('_', ' ')}:", "", *(f"- {reason}" for reason in row["reasons"]), ""]
    return "\n".join(lines)


def run(arguments: BenchmarkArguments) -> None:
    """Check and score every pair, and write the table."""
    torch.set_num_threads(1)  # more threads are slower for models this small
    rows = [measure(name, arguments) for name in PAIRS]
    settings = {name: getattr(arguments, name) for name in ("prompts", "problems", "max_new_tokens", "training_steps")}
    report = {"rows": rows, "settings": settings}
    print(table(rows))
    write_whole(arguments.output / "checks.json", json.dumps(report, indent=2) + "\n")
    write_whole(arguments.output / "checks.md", table(rows))


def main(argv: list[str] | None = None) -> int:
    """Parse the command line and run."""
    (arguments,) = parse_arguments([BenchmarkArguments], __doc__, argv)
    silence_libraries()
    return exit_status(lambda: run(arguments))


if __name__ == "__main__":
    sys.exit(main())
