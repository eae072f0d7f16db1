"""Which rows and records the plots of a report show."""

from transformers_kad.recipes.evaluation.figures import best_of_each, masses_by_position, points_of


def test_the_best_of_each_name_is_the_most_accurate():
    rows = [
        {"name": name, "accuracy": accuracy, "method": f"{name} {accuracy}"}
        for name, accuracy in [("a", 0.2), ("b", 0.5), ("a", 0.4), ("a", 0.3)]
    ]
    assert [row["method"] for row in best_of_each(rows)] == ["a 0.4", "b 0.5"]


def test_masses_are_averaged_over_the_texts_that_reach_a_position():
    records = [{"method": "m", "deferral_masses": row} for row in ([0.5, 0.25], [1.0], [0.0, 0.75, 1.0])]
    means, counts = masses_by_position([*records, {"method": "base"}])
    assert means == {"m": [0.5, 0.5, 1.0]}
    assert counts == {"m": [3, 2, 1]}


def test_points_are_grouped_by_method_and_draft_length_and_carry_the_rules_parameter():
    row = {"name": "kad-dual", "accuracy": 0.5, "low": 0.4, "high": 0.6, "tokens_per_second": 7.0}
    parameters = [{"threshold": 0.3}, {"threshold": 0.3, "num_assistant_tokens": 3}, {}]
    rows = [{**row, "method": str(number), "parameters": p} for number, p in enumerate(parameters)]
    assisted = {**row, "name": "assisted", "method": "assisted", "parameters": {"num_assistant_tokens": 7}}
    points = points_of([*rows, assisted])
    assert [(point.group, point.value) for point in points] == [
        ("kad-dual", 0.3),
        ("kad-dual, draft 3", 0.3),
        ("kad-dual", None),
        ("assisted, draft 7", None),
    ]
    assert (points[0].low, points[0].high, points[0].tokens_per_second) == (0.4, 0.6, 7.0)
