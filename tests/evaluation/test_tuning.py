"""The search: what a goal asks for, what is given up, and what is left after a stop."""

import optuna
import pytest
from test_runner import FakeDecoder, workload

from transformers_kad.evaluation.decoding import Answer
from transformers_kad.evaluation.methods import RULE_METHODS, parse_methods
from transformers_kad.evaluation.results import ResultsFolder
from transformers_kad.evaluation.tuning import SEARCH_RANGES, STEP, Goal, Tuner, feasible, finished, front, method_of

optuna.logging.set_verbosity(optuna.logging.WARNING)


class Landscape(FakeDecoder):
    """The dual rule is right on most problems near 0.6, and the faster the lower its threshold."""

    def answer(self, method, prompts, seed, max_new_tokens):
        answers = super().answer(method, prompts, seed, max_new_tokens)
        if method.config is None or not answers:
            return answers
        threshold = method.config.parameters["threshold"]
        right = [self.solutions[prompt[-1]["content"]] for prompt in prompts]
        wrong = 20 * abs(threshold - 0.6) - 1
        return [
            Answer(solution if int(number) % 10 >= wrong else "?", True, 3, 0.1 * threshold, answers[0].statistics)
            for number, solution in right
        ]

    def __init__(self, instances, **kwargs):
        super().__init__(**kwargs)
        self.solutions = {i.question: (number, i.solution) for number, i in enumerate(instances)}


WORKLOAD = workload(batch_size=2)


def search(path, goal, trials, decoder=None, seed=0, methods=("kad-dual",), storage=None):
    decoder = decoder or Landscape(WORKLOAD.instances)
    study = optuna.create_study(
        study_name="kad",
        storage=storage,
        sampler=optuna.samplers.TPESampler(seed=seed),
        directions=goal.directions,
        load_if_exists=True,
    )
    with ResultsFolder(path) as folder:
        folder.prepare()
        Tuner(decoder, WORKLOAD, folder, methods, goal, progress=lambda line: None).run(study, trials)
        folder.merge()
    return study, decoder


def test_every_method_with_a_rule_has_a_range_that_its_rule_takes():
    assert SEARCH_RANGES.keys() == RULE_METHODS.keys()
    for name, (parameter, low, high) in SEARCH_RANGES.items():
        labels = {method.label for method in parse_methods([f"{name}:{parameter}={low},{high}"])}
        assert len(labels) == 2


def test_the_most_accurate_setting_is_found(tmp_path):
    study, _ = search(tmp_path, Goal(speed=False), 25)
    (best, *_) = front(study)
    assert best.user_attrs["accuracy"] == 1.0
    assert abs(best.params["kad-dual.threshold"] - 0.6) < 0.06
    assert len(finished(study)) == 25


def test_the_front_trades_accuracy_for_speed(tmp_path):
    study, _ = search(tmp_path, Goal(), 25)
    found = front(study)
    accuracies = [trial.user_attrs["accuracy"] for trial in found]
    speeds = [trial.user_attrs["speedup"] for trial in found]
    assert len(found) > 2
    assert accuracies == sorted(accuracies, reverse=True)
    assert speeds == sorted(speeds)


def test_a_constraint_is_kept(tmp_path):
    # The base takes 0.25 s for three tokens, the rule 0.1 s times its threshold.
    least = 2.5 / 0.3
    study, _ = search(tmp_path, Goal(speed=False, min_speedup=least), 30)
    (best, *_) = front(study)
    assert best.user_attrs["speedup"] >= least
    assert best.params["kad-dual.threshold"] <= 0.3
    assert not all(feasible(trial) for trial in finished(study))


def test_what_can_not_be_reached_leaves_an_empty_front(tmp_path):
    study, _ = search(tmp_path, Goal(speed=False, min_speedup=1e6), 5)
    assert front(study) == []


def test_a_setting_that_is_worse_for_sure_is_given_up(tmp_path):
    decoder = Landscape(WORKLOAD.instances)
    study, _ = search(tmp_path, Goal(speed=False), 20, decoder)
    pruned = [t for t in study.trials if t.state == optuna.trial.TrialState.PRUNED]
    assert pruned
    for trial in pruned:
        label = method_of(trial.params).label
        assert sum(asked == label for asked, _, _ in decoder.asked) < 5  # batches
        assert abs(trial.params["kad-dual.threshold"] - 0.6) > 0.3


def test_a_stopped_search_goes_on_and_answers_nothing_twice(tmp_path):
    storage = f"sqlite:///{tmp_path / 'study.db'}"
    first = Landscape(WORKLOAD.instances, fail=[22])
    with pytest.raises(KeyboardInterrupt):
        search(tmp_path, Goal(speed=False), 12, first, storage=storage)
    study, second = search(tmp_path, Goal(speed=False), 12, storage=storage, seed=1)
    assert len(finished(study)) == 12
    asked = [(label, tuple(questions)) for label, questions, _ in first.asked[:-1] + second.asked]
    assert len(set(asked)) == len(asked)


def test_a_trial_that_was_killed_is_tried_anew(tmp_path):
    storage = f"sqlite:///{tmp_path / 'study.db'}"
    study, _ = search(tmp_path, Goal(speed=False), 3, storage=storage)
    killed = study.ask()
    killed.suggest_categorical("method", ["kad-dual"])
    killed.suggest_float("kad-dual.threshold", 0.05, 0.95, step=STEP)
    study, _ = search(tmp_path, Goal(speed=False), 4, storage=storage, seed=1)
    assert finished(study)[-1].params == killed.params


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"accuracy": False, "speed": False}, "got neither"),
        ({"min_speedup": 1.5}, "goes with the goal accuracy alone, got 1.5"),
        ({"speed": False, "min_speedup": 0}, "got 0"),
        ({"min_accuracy": 0.5}, "goes with the goal speed alone, got 0.5"),
        ({"accuracy": False, "min_accuracy": 2}, "got 2"),
    ],
)
def test_goals_that_make_no_sense_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Goal(**settings)


def test_only_rules_are_tuned(tmp_path):
    with pytest.raises(ValueError, match="got 'base'"):
        search(tmp_path, Goal(), 1, methods=("base",))
