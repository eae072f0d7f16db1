"""Search a rule's parameters with Optuna: the most accurate, the fastest, or the front between the two."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from .comparison import compare_methods
from .decoding import Decoder
from .methods import RULE_METHODS, Method, parse_methods
from .results import ResultsFolder, hash_of
from .runner import Workload, answer_batch, warm_up

# What is searched for each method's first parameter: name, lowest, highest. In steps, so that a value that was tried
# once costs nothing the second time.
SEARCH_RANGES: Mapping[str, tuple[str, float, float]] = {
    "kad-dual": ("threshold", 0.05, 0.95),
    "kad-primal": ("budget", 0.05, 0.99),
    "kad-exact": ("budget", 0.05, 0.99),
    "nudging": ("threshold", 0.05, 0.95),
    "confidence-bet": ("margin", 0.0, 0.5),
    "cascade-diff": ("alpha", 0.0, 0.5),
    "cascade-opt": ("alpha", 0.0, 0.5),
    "cascade-token-v2": ("alpha", 0.0, 0.5),
    "cascade-token-v3": ("alpha", 0.0, 1.0),
    "implicit-reward": ("beta", 0.1, 3.0),
    "ensemble": ("weight", 0.0, 1.0),
    "blend-in": ("threshold", 0.05, 0.95),
}
STEP = 0.01
SURE = 0.05  # a trial is given up when another one is better with a p-value below this


@dataclass(frozen=True)
class Goal:
    """What is looked for.

    Attributes:
        accuracy: accuracy is to be high.
        speed: tokens/s are to be high. With both, the front between them is searched.
        min_speedup: tokens/s as a multiple of the base's that a setting must reach.
        min_accuracy: accuracy that a setting must reach.

    Raises:
        ValueError: nothing is looked for, or a constraint on what is itself to be high.
    """

    accuracy: bool = True
    speed: bool = True
    min_speedup: float | None = None
    min_accuracy: float | None = None

    def __post_init__(self) -> None:
        if not self.accuracy and not self.speed:
            raise ValueError("The goal must be accuracy, speed or both, got neither.")
        if self.min_speedup is not None and (self.speed or self.min_speedup <= 0):
            raise ValueError(
                f"`min_speedup` must be positive and goes with the goal accuracy alone, got {self.min_speedup}."
            )
        if self.min_accuracy is not None and (self.accuracy or not 0 <= self.min_accuracy <= 1):
            raise ValueError(
                f"`min_accuracy` must lie in [0, 1] and goes with the goal speed alone, got {self.min_accuracy}."
            )

    @property
    def directions(self) -> list[str]:
        """For `optuna.create_study`."""
        return ["maximize"] * (self.accuracy + self.speed)

    def values(self, accuracy: float, speedup: float) -> tuple[float, ...]:
        """The objectives of a setting."""
        return (accuracy,) * self.accuracy + (speedup,) * self.speed

    def constraints(self, accuracy: float, speedup: float) -> dict[str, float]:
        """By how much a setting misses what it must reach; zero or less: not at all."""
        limits = {"min_speedup": (self.min_speedup, speedup), "min_accuracy": (self.min_accuracy, accuracy)}
        return {name: least - reached for name, (least, reached) in limits.items() if least is not None}


@dataclass
class Tuner:
    """Tries settings of some methods on a workload.

    Every batch of every trial is kept in the folder of results, and every trial in the study, so that a search that
    was stopped goes on where it was. One process.

    Args:
        decoder: the models.
        workload: the questions; not those that the result will be reported on.
        folder: the results, opened and prepared.
        methods: names from `RULE_METHODS`.
        goal: what is looked for.
        draft_lengths: the shortest and the longest draft to try; None: always the default.
        progress: called after every trial with a line for a person.
    """

    decoder: Decoder
    workload: Workload
    folder: ResultsFolder
    methods: Sequence[str]
    goal: Goal
    draft_lengths: tuple[int, int] | None = None
    progress: Callable[[str], None] = print
    _scores: dict[str, dict[str, list[bool]]] = field(default_factory=dict)  # method label -> instance -> samples

    def __post_init__(self) -> None:
        for name in self.methods:
            if name not in RULE_METHODS:
                raise ValueError(f"Only methods with a rule can be tuned ({', '.join(RULE_METHODS)}), got {name!r}.")
        self._done: dict[tuple[str, str], list[dict[str, Any]]] = {}
        for record in self.folder.read():
            self._done.setdefault((record["config"], record["batch"]), []).append(record)

    def run(self, study: optuna.Study, trials: int) -> None:
        """Bring the study to `trials` finished ones, those of earlier runs included.

        Trials that a stop cut short are tried anew; what they had answered is not answered again.
        """
        base = self.measure(Method("base"))
        assert base is not None
        study.set_user_attr("base_tokens_per_second", base[1])
        for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            study.tell(trial.number, state=TrialState.FAIL)
            study.enqueue_trial(trial.params, skip_if_exists=False)
        for trial in finished(study):  # what later trials are compared with
            if trial.state == TrialState.COMPLETE:
                self.measure(method_of(trial.params))
        while len(finished(study)) < trials:
            study.optimize(lambda trial: self._objective(study, trial, base[1]), n_trials=1)

    def _objective(self, study: optuna.Study, trial: optuna.Trial, base_speed: float) -> tuple[float, ...]:
        name = trial.suggest_categorical("method", list(self.methods))
        parameter, low, high = SEARCH_RANGES[name]
        trial.suggest_float(f"{name}.{parameter}", low, high, step=STEP)
        if self.draft_lengths is not None:
            trial.suggest_int("num_assistant_tokens", *self.draft_lengths)
        method = method_of(trial.params)
        rivals = [t for t in study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)) if feasible(t)]
        result = self.measure(method, lambda speed: self._beaten(method, speed / base_speed, rivals))
        trial.set_user_attr("method", method.label)
        if result is None:
            self.progress(f"{method.label}: given up, another setting is better for sure")
            raise optuna.TrialPruned
        accuracy, speed = result
        trial.set_user_attr("accuracy", accuracy)
        trial.set_user_attr("speedup", speed / base_speed)
        for constraint, missed in self.goal.constraints(accuracy, speed / base_speed).items():
            trial.set_constraint(constraint, missed)
        self.progress(f"{method.label}: accuracy {accuracy:.3f}, {speed / base_speed:.2f} times the base's tokens/s")
        return self.goal.values(accuracy, speed / base_speed)

    def measure(
        self, method: Method, give_up: Callable[[float], bool] = lambda speed: False
    ) -> tuple[float, float] | None:
        """Accuracy and tokens/s of a method on the whole workload; None if it was given up.

        `give_up` is asked after every batch, with the tokens/s so far.
        """
        self.decoder.prepare(method)
        config = self.workload.config(method, self.decoder)
        name = hash_of(config)
        self.folder.describe([config])
        scores = self._scores[method.label] = {}
        right = answers = tokens = 0
        seconds, warm = 0.0, False
        for batch in self.workload.batches(method):
            records = self._done.get((name, batch.key))
            if records is None:
                if not warm:
                    warm_up(self.decoder, batch)
                    warm = True
                records = answer_batch(self.decoder, batch, name)
                self.folder.append(records)
                self._done[name, batch.key] = records
            for record in records:
                scores.setdefault(record["instance"], []).append(record["correct"])
                right, answers = right + record["correct"], answers + 1
                tokens, seconds = tokens + record["tokens"], seconds + record["seconds"]
            if give_up(tokens / max(seconds, 1e-9)):
                return None
        return right / answers, tokens / max(seconds, 1e-9)

    def _beaten(self, method: Method, speedup: float, rivals: Sequence[FrozenTrial]) -> bool:
        """Whether another setting is at least as fast, and more accurate for sure on the instances so far."""
        if not self.goal.accuracy:
            return False
        own = self._scores[method.label]
        for rival in rivals:
            if self.goal.speed and rival.user_attrs["speedup"] < speedup:
                continue
            scores = self._scores[rival.user_attrs["method"]]
            theirs = {instance: scores[instance][: len(samples)] for instance, samples in own.items()}
            if len({len(samples) for samples in own.values()}) > 1:
                continue  # between two samples of the whole workload
            (comparison,) = compare_methods({"rival": theirs, "own": own})
            if comparison.difference > 0 and comparison.p_value < SURE:
                return True
        return False


def method_of(params: Mapping[str, Any]) -> Method:
    """The method that a trial's parameters stand for."""
    name = params["method"]
    words = [f"{key.partition('.')[2]}={value}" for key, value in params.items() if key.startswith(f"{name}.")]
    if "num_assistant_tokens" in params:
        words.append(f"num_assistant_tokens={params['num_assistant_tokens']}")
    (method,) = parse_methods([":".join([name, *words])])
    return method


def finished(study: optuna.Study) -> list[FrozenTrial]:
    """The trials that were measured, or given up in the middle."""
    return study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED))


def feasible(trial: FrozenTrial) -> bool:
    """Whether a trial meets the goal's constraints."""
    return all(missed <= 0 for missed in trial.constraints.values())


def front(study: optuna.Study) -> list[FrozenTrial]:
    """The trials that meet the constraints and that no other one beats, from the most accurate on.

    Settings that were tried twice count once.
    """
    trials = {trial.user_attrs["method"]: trial for trial in study.best_trials if feasible(trial)}
    return sorted(trials.values(), key=lambda t: (-t.user_attrs["accuracy"], -t.user_attrs["speedup"]))
