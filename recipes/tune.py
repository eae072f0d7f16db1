# /// script
# requires-python = ">=3.11"
# dependencies = ["transformers-kad[eval]"]
# ///
r"""Find a rule's parameters and draft length for a pair, with Optuna.

The most accurate setting of the dual rule for the tiny pair, some minutes on 2 CPU cores:

    python recipes/tune.py --task tiny --split validation --limit 100 --goal accuracy --output tuned

The most accurate setting that is at least half as fast again as the base alone:

    python recipes/tune.py --base BASE --proxy PROXY --task gsm8k --split train --limit 200 --output tuned \
        --rules kad-dual kad-primal --goal accuracy --min_speedup 1.5 --draft_lengths 2 8

Tune on other questions than those that you report: another --split. --goal both searches the front between accuracy
and tokens/s. A trial is given up when by a paired test another setting is more accurate, and no slower where speed
counts; one that is as good as all that were tried before is given up with a chance of 5 % at most. A search that was
stopped goes on with the same command; more --trials go on with a finished one. Anything else needs another --output.

The folder of the results receives kad_config.json, which `generate.py --config` and `KADConfig.from_pretrained` read,
tuning.json with every trial and the front, and plots of both.
"""

import json
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import optuna
import torch
from accelerate import PartialState

from transformers_kad.integrations.loading.arguments import ModelArguments
from transformers_kad.integrations.loading.messages import quieten
from transformers_kad.recipes.command_line import exit_status, parse_arguments
from transformers_kad.recipes.environment import describe_environment
from transformers_kad.recipes.evaluation.arguments import EvaluationArguments, EvaluationSampling, make_decoder
from transformers_kad.recipes.evaluation.figures import points_of
from transformers_kad.recipes.evaluation.plots import plot_accuracy_parameter, plot_accuracy_speed
from transformers_kad.recipes.evaluation.results import ResultsFolder
from transformers_kad.recipes.evaluation.session import say
from transformers_kad.recipes.evaluation.tuning import SEARCH_RANGES, Goal, Tuner, feasible, finished, front, method_of
from transformers_kad.recipes.intervals import wilson_interval

TINY_PAIR = Path(__file__).resolve().parent / "tiny_pair"


@dataclass
class TuningArguments:
    """What is searched, and for what."""

    rules: list[str] = field(
        default_factory=lambda: ["kad-dual"],
        metadata={"help": f"Methods whose parameter is searched: {', '.join(SEARCH_RANGES)}."},
    )
    goal: Literal["both", "accuracy", "speed"] = field(
        default="both", metadata={"help": "What is to be high: accuracy, tokens/s, or the front between the two."}
    )
    min_speedup: float | None = field(
        default=None, metadata={"help": "With --goal accuracy: at least so many times the base's tokens/s."}
    )
    min_accuracy: float | None = field(default=None, metadata={"help": "With --goal speed: at least this accuracy."})
    draft_lengths: list[int] = field(
        default_factory=list, metadata={"help": "Shortest and longest draft to try. Default: 5 always."}
    )
    trials: int = field(default=40, metadata={"help": "Settings to try, those of earlier runs included."})

    def __post_init__(self) -> None:
        if self.trials < 1:
            raise ValueError(f"--trials must be at least 1, got {self.trials}.")
        if self.draft_lengths and (
            len(self.draft_lengths) != 2 or not 1 <= self.draft_lengths[0] <= self.draft_lengths[1]
        ):
            raise ValueError(f"--draft_lengths takes the shortest and the longest, got {self.draft_lengths}.")
        self.aim = Goal(self.goal != "speed", self.goal != "accuracy", self.min_speedup, self.min_accuracy)


@dataclass
class TuningEvaluationArguments(EvaluationArguments):
    """Which questions, and how they are asked."""

    output: str = field(
        default="kad_tuning", metadata={"help": "Folder for the results; a stopped search goes on in it."}
    )


def open_study(folder: Path, goal: Goal, seed: int) -> optuna.Study:
    """The study in a folder, new or as an earlier run left it."""
    storage = f"sqlite:///{folder / 'study.db'}"
    names = optuna.get_all_study_names(storage)
    tried = len(optuna.load_study(study_name="kad", storage=storage).trials) if "kad" in names else 0
    return optuna.create_study(
        study_name="kad",
        storage=storage,
        # A run that goes on must not draw once more what the one before drew.
        sampler=optuna.samplers.TPESampler(seed=seed + tried),
        directions=goal.directions,
        load_if_exists=True,
    )


def describe(study: optuna.Study, instances: int) -> dict[str, Any]:
    """Every trial and the front, as JSON values."""

    def row(trial: optuna.trial.FrozenTrial) -> dict[str, Any]:
        accuracy = trial.user_attrs.get("accuracy")
        interval = None if accuracy is None else wilson_interval(accuracy * instances, instances)
        method = method_of(trial.params)
        return {
            "trial": trial.number,
            "method": method.label,
            "name": method.name,
            "parameters": method.parameters,
            "state": trial.state.name.lower(),
            "accuracy": accuracy,
            "interval": interval,
            "speedup": trial.user_attrs.get("speedup"),
            "feasible": feasible(trial) if accuracy is not None else None,
        }

    return {
        "goal": study.user_attrs["settings"]["goal"],
        "instances": instances,
        "base_tokens_per_second": study.user_attrs["base_tokens_per_second"],
        "trials": [row(trial) for trial in finished(study)],
        "front": [row(trial) for trial in front(study)],
    }


def plot(result: dict[str, Any], folder: Path) -> list[Path]:
    """What was tried: accuracy against speed, and against the parameter. Settings that generated nothing are left out.

    Returns:
        The files that were written; none where nothing is left.
    """
    rows = {
        row["method"]: row
        | dict(zip(("low", "high"), row["interval"], strict=True))
        | {"tokens_per_second": row["speedup"] * result["base_tokens_per_second"]}
        for row in result["trials"]
        if row["speedup"]
    }
    if not rows:
        return []
    tried = points_of(list(rows.values()))
    return [
        *plot_accuracy_speed(tried, folder / "plots" / "tuning_accuracy_speed"),
        *plot_accuracy_parameter(tried, folder / "plots" / "tuning_accuracy_parameter"),
    ]


def headline(result: dict[str, Any]) -> str:
    """What the front's settings have in common, in a line above them."""
    trials, best, goal = len(result["trials"]), len(result["front"]), result["goal"]
    tried = f"Of {trials} settings on {result['instances']} questions"
    if goal["accuracy"] and goal["speed"]:
        return f"{tried}, those that no other one beats in accuracy and tokens/s, the most accurate first:"
    most, other = ("most accurate", "fastest") if goal["accuracy"] else ("fastest", "most accurate")
    if best == 1:
        return f"{tried}, the {most}:"
    return f"{tried}, {best} tie for the {most}, the {other} of them first:"


def run(
    models: ModelArguments, evaluation: EvaluationArguments, sampling: EvaluationSampling, tuning: TuningArguments
) -> int:
    """Search, then write the setting that was found."""
    state = PartialState(cpu=not torch.accelerator.is_available())
    if state.num_processes > 1:
        raise ValueError(f"The search runs in one process, got {state.num_processes}: start it without torchrun.")
    if len(evaluation.task) != 1:
        raise ValueError(f"One task is tuned on, got {evaluation.task}.")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    if tuning.draft_lengths and not sampling.speculative:
        raise ValueError(f"--draft_lengths {tuning.draft_lengths} have no effect with --no_speculative.")
    (workload,) = evaluation.workloads(sampling)
    decoder = make_decoder(models, evaluation, sampling, state, default_pair=TINY_PAIR)
    with ResultsFolder(evaluation.output) as folder:
        folder.prepare()
        study = open_study(folder.path, tuning.aim, sampling.seed)
        lengths = (tuning.draft_lengths[0], tuning.draft_lengths[1]) if tuning.draft_lengths else None
        Tuner(decoder, workload, folder, tuning.rules, tuning.aim, lengths, progress=say).run(study, tuning.trials)
        folder.merge()
    result = describe(study, len(workload.instances)) | {"environment": describe_environment(decoder.pair.device)}
    path = folder.path / "tuning.json"
    path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    for written in (path, *plot(result, folder.path)):
        say(f"Written: {written}")
    best = front(study)
    if not best:
        print(f"None of {len(result['trials'])} settings reaches what was asked for. The closest are in {path}.")
        return 1
    config = method_of(best[0].params).config
    assert config is not None
    written = replace(config, base=models.base, proxy=models.proxy).save_pretrained(folder.path)
    print(headline(result))
    for row in result["front"]:
        low, high = row["interval"]
        print(
            f"  {row['method']}: accuracy {row['accuracy']:.3f} ({low:.3f} to {high:.3f}), {row['speedup']:.2f} times "
            "the base's tokens/s"
        )
    print(f"The first one is written to {written}.")
    return 0


def main(argv: list[str] | None = None) -> int:
    """Parse the command line and run."""
    types = (ModelArguments, TuningEvaluationArguments, EvaluationSampling, TuningArguments)
    arguments = parse_arguments(types, __doc__, argv)
    quieten()
    return exit_status(lambda: run(*arguments))


if __name__ == "__main__":
    sys.exit(main())
