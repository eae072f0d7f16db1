# /// script
# requires-python = ">=3.11"
# dependencies = ["transformers-kad[eval]"]
# ///
r"""Search the parameters of a rule and the draft length for a pair, with Optuna.

The most accurate setting of the dual rule for the tiny pair, some minutes on 2 CPU cores:

    python recipes/tune.py --task tiny --split validation --limit 100 --goal accuracy --output tuned

The most accurate setting that is at least 1.5 times as fast as the base alone:

    python recipes/tune.py --base BASE --proxy PROXY --task gsm8k --split train --limit 200 --output tuned \
        --rules kad-dual kad-primal --goal accuracy --min_speedup 1.5 --draft_lengths 2 8

Tune on other questions than those that you report results on: use another --split. --goal both searches the Pareto
front of accuracy and tokens/s. A trial is pruned if another setting is more accurate by a paired test, and no slower
if speed is maximized. A setting that is as good as all that were tried before is pruned with a probability of at most
5 %. The same command continues an interrupted search, and more --trials continue a finished one. All other changes
need another --output.

The results folder gets kad_config.json, which `generate.py --config` and `KADConfig.from_pretrained` read, tuning.json
with all trials and the front, and plots of both.
"""

import json
import sqlite3
import sys
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import optuna
import torch
from accelerate import PartialState
from optuna.trial import TrialState

from transformers_kad.integrations.loading.messages import silence_libraries
from transformers_kad.recipes.arguments import ModelArguments
from transformers_kad.recipes.command_line import exit_status, parse_arguments
from transformers_kad.recipes.environment import describe_environment
from transformers_kad.recipes.evaluation.accuracy_plots import plot_accuracy_parameter, plot_accuracy_speed
from transformers_kad.recipes.evaluation.arguments import (
    DEFAULT_BATCH_SIZE,
    EvaluationArguments,
    EvaluationSampling,
    make_decoder,
)
from transformers_kad.recipes.evaluation.figures import points_of
from transformers_kad.recipes.evaluation.results import ResultsFolder
from transformers_kad.recipes.evaluation.session import log
from transformers_kad.recipes.evaluation.tuning import SEARCH_RANGES, Goal, Tuner, feasible, finished, front, method_of
from transformers_kad.recipes.intervals import wilson_interval
from transformers_kad.recipes.record_fields import check_fields
from transformers_kad.utils.files import write_whole

TINY_PAIR = Path(__file__).resolve().parent / "tiny_pair"


@dataclass
class TuningArguments:
    """The search space and the objective."""

    rules: list[str] = field(
        default_factory=lambda: ["kad-dual"],
        metadata={"help": f"Methods whose parameters are searched: {', '.join(SEARCH_RANGES)}."},
    )
    goal: Literal["both", "accuracy", "speed"] = field(
        default="both", metadata={"help": "Objective: accuracy, tokens/s (speed), or the Pareto front of both."}
    )
    min_speedup: float | None = field(
        default=None, metadata={"help": "With --goal accuracy: the minimum speed, relative to the base."}
    )
    min_accuracy: float | None = field(default=None, metadata={"help": "With --goal speed: the minimum accuracy."})
    draft_lengths: list[int] = field(
        default_factory=list, metadata={"help": "Shortest and longest draft to try. Default: only 5."}
    )
    trials: int = field(default=40, metadata={"help": "Number of settings to try, including those of earlier runs."})

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
    """The questions, and how they are asked."""

    output: str = field(
        default="kad_tuning", metadata={"help": "Folder for the results, and to continue an interrupted search."}
    )


def open_study(folder: Path, goal: Goal, seed: int) -> optuna.Study:
    """Open the study in a folder, or create it.

    Raises:
        ValueError: the file of the study is damaged.
    """
    path = folder / "study.db"
    storage = f"sqlite:///{path}"
    try:
        check_database(path)
        names = optuna.get_all_study_names(storage)
        found = optuna.load_study(study_name="kad", storage=storage) if "kad" in names else None
        tried = len(found.trials) if found is not None else 0
        if found is not None:
            check_trials(found)
    except Exception as error:  # sqlite3, SQLAlchemy, Alembic and Optuna have each their own on damaged files
        reason = next(iter(str(error).splitlines()), repr(error))
        raise ValueError(
            f"The study in {str(path)!r} can't be read: {reason}. Move the file away: the same command then searches "
            "anew, and takes every answer from the results that it has stored."
        ) from error
    return optuna.create_study(
        study_name="kad",
        storage=storage,
        # A continued run must not draw the same settings again.
        sampler=optuna.samplers.TPESampler(seed=seed + tried),
        directions=goal.directions,
        load_if_exists=True,
    )


def check_database(path: Path) -> None:
    """Raise an error of sqlite3 or a `ValueError` if a file that is not empty is not a sound SQLite database."""
    if path.exists():
        with closing(sqlite3.connect(path)) as database:
            (found,) = database.execute("PRAGMA integrity_check(1)").fetchone()
        if found != "ok":
            raise ValueError(f"it is damaged ({found})")


def check_trials(study: optuna.Study) -> None:
    """Check what a search reads from earlier trials.

    Raises:
        ValueError: a trial or the study has not the fields that a search writes, or values of other types.
    """
    if any(trial.state != TrialState.WAITING for trial in study.trials):
        check_fields(study.user_attrs, {"settings": {"goal": {}}}, "the study")
    for trial in finished(study):
        where = f"trial {trial.number}"
        check_fields(trial.user_attrs, {"method": (str,)}, where)
        if method_of(trial.params).label != trial.user_attrs["method"]:
            raise ValueError(f"{where} has the method {trial.user_attrs['method']!r:.80}, not that of its parameters")
        if trial.state == TrialState.COMPLETE:
            check_fields(trial.user_attrs, {"accuracy": (int, float), "speedup": (int, float)}, where)


def describe(study: optuna.Study, instances: int) -> dict[str, Any]:
    """All trials and the front, as JSON values."""

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
    """Plot the accuracy of all settings against speed and against the parameter, except those that generated nothing.

    Returns:
        The files that were written; none if there is nothing to plot.
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
    """The line above the settings of the front."""
    trials, best, goal = len(result["trials"]), len(result["front"]), result["goal"]
    tried = f"Of {trials} settings on {result['instances']} questions"
    if goal["accuracy"] and goal["speed"]:
        return f"{tried}, the Pareto front of accuracy and tokens/s, the most accurate first:"
    most, other = ("most accurate", "fastest") if goal["accuracy"] else ("fastest", "most accurate")
    if best == 1:
        return f"{tried}, the {most}:"
    return f"{tried}, {best} tie for the {most}, the {other} of them first:"


def run(
    models: ModelArguments, evaluation: EvaluationArguments, sampling: EvaluationSampling, tuning: TuningArguments
) -> int:
    """Search, and write the best setting."""
    state = PartialState(cpu=not torch.accelerator.is_available())
    if state.num_processes > 1:
        raise ValueError(f"The search runs in one process, got {state.num_processes}: start it without torchrun.")
    if len(evaluation.task) != 1:
        raise ValueError(f"The search needs exactly one task, got {evaluation.task}.")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    if tuning.draft_lengths and not sampling.speculative:
        raise ValueError(f"--draft_lengths {tuning.draft_lengths} have no effect with --no_speculative.")
    (workload,) = evaluation.workloads(sampling)
    decoder = make_decoder(models, evaluation, sampling, state, default_pair=TINY_PAIR)
    with ResultsFolder(evaluation.output) as folder:
        folder.prepare()
        study = open_study(folder.path, tuning.aim, sampling.seed)
        if not study.trials and (answers := len(folder.read())):
            log(f"The study has no trials. The search begins anew, and takes {answers} stored answers where it can.")
        lengths = (tuning.draft_lengths[0], tuning.draft_lengths[1]) if tuning.draft_lengths else None
        tuner = Tuner(
            decoder,
            workload,
            folder,
            tuning.rules,
            tuning.aim,
            lengths,
            questions_between_tests=evaluation.batch_size or DEFAULT_BATCH_SIZE,
            progress=log,
        )
        tuner.run(study, tuning.trials)
        folder.merge()
    result = describe(study, len(workload.instances)) | {"environment": describe_environment(decoder.pair.device)}
    path = folder.path / "tuning.json"
    write_whole(path, json.dumps(result, indent=2) + "\n")
    for written in (path, *plot(result, folder.path)):
        log(f"Written: {written}")
    best = front(study)
    if not best:
        print(f"None of {len(result['trials'])} settings meets the constraints. All of them are in {path}.")
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
    silence_libraries()

    def search() -> int:
        try:
            return run(*arguments)
        except optuna.exceptions.StorageInternalError as error:  # on a full disk, for example
            raise OSError(f"The study could not be written: {error.__cause__ or error}") from error

    return exit_status(search)


if __name__ == "__main__":
    sys.exit(main())
