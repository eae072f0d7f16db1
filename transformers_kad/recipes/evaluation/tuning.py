"""Searches the parameters of a rule with Optuna, for accuracy, for speed, or for the Pareto front of the two."""

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import chain
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from ..progress import Progress
from ..resumable import describe_differences
from .comparison import sign_flip_p_value
from .decoding import Decoder
from .methods import RULE_METHODS, Method, parse_methods
from .results import ResultsFolder, config_hash
from .runner import Workload, answer_batch, warm_up

# The search range of each method's first parameter: name, lowest and highest value. Values are multiples of `STEP`, so
# that a value that was tried before is found in the results.
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
    "kad-paced": ("budget", 0.05, 0.95),
    "implicit-reward": ("beta", 0.1, 3.0),
    "ensemble": ("weight", 0.0, 1.0),
    "blend-in": ("threshold", 0.05, 0.95),
}
STEP = 0.01
ERROR_RATE = 0.05  # the highest probability that a setting is pruned although it is as good as all tried before


@dataclass(frozen=True)
class Goal:
    """The objective of a search.

    Attributes:
        accuracy: maximize the accuracy.
        speed: maximize tokens/s. With both, the search is for the Pareto front.
        min_speedup: the tokens/s that a setting must reach, as a multiple of the base's.
        min_accuracy: the accuracy that a setting must reach.

    Raises:
        ValueError: nothing is maximized, or a constraint is on a quantity that is itself maximized.
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
        """By how much a setting misses each constraint; zero or less if it meets it."""
        limits = {"min_speedup": (self.min_speedup, speedup), "min_accuracy": (self.min_accuracy, accuracy)}
        return {name: least - reached for name, (least, reached) in limits.items() if least is not None}


@dataclass(frozen=True)
class BatchScores:
    """The part of a batch's records that a search needs.

    Attributes:
        right: whether each answer is correct, in the order of the batch.
        tokens: the number of generated tokens.
        seconds: the time they took.
        error: the error of the first answer that failed; None if none did.
    """

    right: tuple[bool, ...]
    tokens: int
    seconds: float
    error: str | None

    @classmethod
    def of(cls, records: Sequence[Mapping[str, Any]]) -> "BatchScores":
        """Summarize the records of a batch."""
        return cls(
            tuple(record["correct"] for record in records),
            sum(record["tokens"] for record in records),
            sum(record["seconds"] for record in records),
            next((record["error"] for record in records if record["error"] is not None), None),
        )


@dataclass
class Tuner:
    """Evaluates settings of some methods on a workload, in one process.

    Every batch of every trial is stored in the results folder, and every trial in the study, so that an interrupted
    search can be continued.

    A trial is pruned if another setting is more accurate on the questions so far by the paired sign-flip test, and at
    least as fast if speed is maximized. The test is made several times and against every other setting, so each test
    gets an equal share of `ERROR_RATE` (Bonferroni): whatever the number of tests and settings, a setting that is as
    good as all that were tried before is pruned with a probability of at most `ERROR_RATE`. The shares count
    pruned settings as well, since they might have been compared with if their results had been luckier. Comparing with
    the most accurate setting alone would need fewer shares, but would be biased: that setting owes its rank to luck on
    the same questions, so settings that equal it look worse.

    Args:
        decoder: the models.
        workload: the questions. They must not be those that the result will be reported on.
        folder: the results folder, opened and prepared.
        methods: names from `RULE_METHODS`.
        goal: the objective.
        draft_lengths: the shortest and the longest draft to try; None for the default draft length.
        questions_between_tests: a trial is tested whenever it has answered so many more questions, rounded down to
            whole batches; None to test it after every batch.
        progress: called after every trial with a line for the user.
    """

    decoder: Decoder
    workload: Workload
    folder: ResultsFolder
    methods: Sequence[str]
    goal: Goal
    draft_lengths: tuple[int, int] | None = None
    questions_between_tests: int | None = None
    progress: Callable[[str], None] = print
    _scores: dict[str, list[BatchScores]] = field(default_factory=dict)  # method label -> its batches so far

    def __post_init__(self) -> None:
        for name in self.methods:
            if name not in RULE_METHODS:
                raise ValueError(f"Only methods with a rule can be tuned ({', '.join(RULE_METHODS)}), got {name!r}.")
        if not self.workload.task.has_right_answers:
            raise ValueError(f"The task {self.workload.task.name!r} has no right answers, so accuracy can't be tuned.")
        records: dict[tuple[str, str], list[dict[str, Any]]] = {}
        for record in self.folder.read():
            records.setdefault((record["config"], record["batch"]), []).append(record)
        self._done = {key: BatchScores.of(batch) for key, batch in records.items()}
        size, samples = self.workload.batch_size, self.workload.num_samples
        whole = math.ceil(len(self.workload.instances) / size)
        step = max((self.questions_between_tests or size) // size, 1)
        # The numbers of batches after which a trial may be pruned, if all questions so far have the same number of
        # samples and some batches are left.
        self._test_points = {*range(step, whole, step), *range(whole, whole * samples, whole)}

    @property
    def settings(self) -> dict[str, Any]:
        """The settings that determine the outcome of a search, as JSON values."""
        config = self.workload.config(Method("base"), self.decoder)
        settings = {
            "goal": asdict(self.goal),
            "rules": self._rules,
            "draft_lengths": self.draft_lengths,
            "task": config["task"],
            "num_samples": self.workload.num_samples,
            **config["shared"],
            "reference": self.decoder.pair.models.reference,
        }
        return json.loads(json.dumps(settings))

    @property
    def _rules(self) -> list[str]:
        return sorted(set(self.methods))

    def run(self, study: optuna.Study, trials: int) -> None:
        """Run trials until the study has `trials` finished ones, including those of earlier runs.

        Interrupted trials are repeated, but questions that they have answered are not answered again. A trial that
        failed with an error twice in a row is not repeated; both errors have been raised.

        Raises:
            ValueError: the study was made with other settings (the message shows the difference), or the base
                generated nothing.
        """
        self._check_settings(study)
        each, before = len(self.workload.instances) * self.workload.num_samples, len(finished(study))
        with Progress(each * (1 + max(trials, before)), "answers", done=each * before) as bar:
            self._search(study, trials, bar)

    def _search(self, study: optuna.Study, trials: int, bar: Progress) -> None:
        base = self.measure(Method("base"), bar=bar)
        assert base is not None
        if base[1] == 0:
            error = next((batch.error for batch in self._scores["base"] if batch.error is not None), None)
            raise ValueError(
                f"The base generated nothing for any of {len(self.workload.instances)} questions, so there is no "
                f"speed to compare with. Its first error: {error}. Remove its cause, and choose another --output."
            )
        study.set_user_attr("base_tokens_per_second", base[1])
        enqueue_interrupted_trials(study)
        for trial in finished(study):  # later trials are compared with these
            if trial.state == TrialState.COMPLETE:
                self.measure(method_of(trial.params))
        while len(finished(study)) < trials:
            study.optimize(lambda trial: self._objective(study, trial, base[1], bar), n_trials=1)

    def _check_settings(self, study: optuna.Study) -> None:
        """Write the settings into the study, or compare them with those that the study was made with."""
        settings, found = self.settings, study.user_attrs.get("settings", {})
        if all(trial.state == TrialState.WAITING for trial in study.get_trials(deepcopy=False)):
            study.set_user_attr("settings", settings)
        elif found != settings:
            raise ValueError(
                f"The study in {str(self.folder.path)!r} was made with other settings: "
                f"{describe_differences(found, settings)}. Choose another --output, or use the same settings to "
                "continue that search."
            )

    def _objective(
        self, study: optuna.Study, trial: optuna.Trial, base_speed: float, bar: Progress
    ) -> tuple[float, ...]:
        name = trial.suggest_categorical("method", self._rules)
        parameter, low, high = SEARCH_RANGES[name]
        trial.suggest_float(f"{name}.{parameter}", low, high, step=STEP)
        if self.draft_lengths is not None:
            trial.suggest_int("num_assistant_tokens", *self.draft_lengths)
        method = method_of(trial.params)
        trial.set_user_attr("method", method.label)
        tried = {t.user_attrs["method"]: t for t in finished(study)}
        rivals = [t for t in tried.values() if t.state == TrialState.COMPLETE and feasible(t)]
        chance = ERROR_RATE / max(len(tried) * len(self._test_points), 1)
        try:
            result = self.measure(
                method, lambda speed: self._is_dominated(method, speed / base_speed, rivals, chance), bar
            )
        except Exception as error:
            trial.set_user_attr("error", f"{type(error).__name__}: {error}")
            raise
        if result is None:
            better = "more accurate and no slower" if self.goal.speed else "more accurate"
            self.progress(
                f"{method.label}: pruned, another setting is {better} (paired tests; a setting as good as any "
                f"other is pruned with a probability of at most {ERROR_RATE:.0%})"
            )
            raise optuna.TrialPruned
        accuracy, speed = result
        trial.set_user_attr("accuracy", accuracy)
        trial.set_user_attr("speedup", speed / base_speed)
        for constraint, missed in self.goal.constraints(accuracy, speed / base_speed).items():
            trial.set_constraint(constraint, missed)
        self.progress(f"{method.label}: accuracy {accuracy:.3f}, {speed / base_speed:.2f} times the base's tokens/s")
        return self.goal.values(accuracy, speed / base_speed)

    def measure(
        self, method: Method, prune: Callable[[float], bool] = lambda speed: False, bar: Progress | None = None
    ) -> tuple[float, float] | None:
        """The accuracy and tokens/s of a method on the whole workload; None if it was pruned.

        Args:
            method: the method.
            prune: called after every batch with the tokens/s so far; returns whether to stop.
            bar: counts the answers, and those that pruning makes unnecessary.
        """
        config = self.workload.config(method, self.decoder)
        name = config_hash(config)
        scores = self._scores[method.label] = []
        right = answers = tokens = 0
        seconds, ready = 0.0, False
        for batch in self.workload.batches(method):
            if (name, batch.key) not in self._done:
                if not ready:
                    self.decoder.prepare(method)
                    self.folder.describe([config])
                    warm_up(self.decoder, batch)
                    ready = True
                records = answer_batch(self.decoder, batch, name)
                self.folder.append(records)
                self._done[name, batch.key] = BatchScores.of(records)
            done = self._done[name, batch.key]
            scores.append(done)
            right, answers = right + sum(done.right), answers + len(done.right)
            tokens, seconds = tokens + done.tokens, seconds + done.seconds
            pruned = prune(tokens / max(seconds, 1e-9))
            if bar is not None:
                left = len(self.workload.instances) * self.workload.num_samples - answers
                bar.update(
                    len(done.right) + (left if pruned else 0),
                    f"{method.label}: accuracy {right / answers:.3f} so far",
                )
            if pruned:
                return None
        return right / answers, tokens / max(seconds, 1e-9)

    def _is_dominated(self, method: Method, speedup: float, rivals: Iterable[FrozenTrial], chance: float) -> bool:
        """Whether a rival is more accurate on the questions so far, and at least as fast if speed is maximized.

        `chance` is the significance level of one test: the probability that a setting as good as a rival is pruned.
        """
        batches = len(self._scores[method.label])
        if not self.goal.accuracy or batches not in self._test_points:
            return False
        own = self._correct_samples(method.label, batches)
        for rival in rivals:
            if self.goal.speed and rival.user_attrs["speedup"] < speedup:
                continue
            theirs = self._correct_samples(rival.user_attrs["method"], batches)
            differences = [a - b for a, b in zip(theirs, own, strict=True)]
            if sum(differences) > 0 and sign_flip_p_value(differences) / 2 <= chance:  # one-sided
                return True
        return False

    def _correct_samples(self, label: str, batches: int) -> list[int]:
        """For each question, the number of correct samples in a method's first batches."""
        right = list(chain.from_iterable(batch.right for batch in self._scores[label][:batches]))
        instances = len(self.workload.instances)
        return [sum(right[at::instances]) for at in range(min(instances, len(right)))]


def enqueue_interrupted_trials(study: optuna.Study) -> None:
    """Enqueue trials again that were interrupted or failed, except those that failed twice in a row."""
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        study.tell(trial.number, state=TrialState.FAIL)
    trials = study.get_trials(deepcopy=False)
    followed = {trial.user_attrs.get("follows") for trial in trials}
    for trial in trials:
        if trial.state != TrialState.FAIL or trial.number in followed or not trial.params:
            continue
        before = trial.user_attrs.get("follows")
        if "error" in trial.user_attrs and before is not None and "error" in trials[before].user_attrs:
            continue
        study.enqueue_trial(trial.params, user_attrs={"follows": trial.number})


def method_of(params: Mapping[str, Any]) -> Method:
    """The method of a trial's parameters, which are rounded to remove the rounding errors of multiples of `STEP`."""
    name = params["method"]
    words = [f"{key.partition('.')[2]}={round(v, 6)}" for key, v in params.items() if key.startswith(f"{name}.")]
    if "num_assistant_tokens" in params:
        words.append(f"num_assistant_tokens={params['num_assistant_tokens']}")
    (method,) = parse_methods([":".join([name, *words])])
    return method


def finished(study: optuna.Study) -> list[FrozenTrial]:
    """The trials that were measured completely or pruned."""
    return study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED))


def feasible(trial: FrozenTrial) -> bool:
    """Whether a trial meets the goal's constraints."""
    return all(missed <= 0 for missed in trial.constraints.values())


def front(study: optuna.Study) -> list[FrozenTrial]:
    """The trials on the Pareto front that meet the constraints, the most accurate first.

    Settings that were tried twice are listed once.
    """
    trials = {trial.user_attrs["method"]: trial for trial in study.best_trials if feasible(trial)}
    return sorted(trials.values(), key=lambda t: (-t.user_attrs["accuracy"], -t.user_attrs["speedup"]))
