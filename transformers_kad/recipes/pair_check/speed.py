"""How much faster than the base alone each rule can be, by measured times of forwards and expected rounds."""

from typing import NamedTuple

from ..benchmarking.bounds import ForwardTimes, Shape, speculative_bound
from ..benchmarking.forwards import ForwardTimer
from ..pair import Pair

REPETITIONS = 5


class Costs(NamedTuple):
    """Median times of forwards over one text, in seconds.

    Attributes:
        base_one: of the base over one token, t_b(1).
        base_draft: of the base over a draft and one more token, t_b(γ + 1).
        proxy_step: of the proxy over one token, t_q.
    """

    base_one: float
    base_draft: float
    proxy_step: float


def measure_costs(pair: Pair, draft_length: int, *, held: int) -> Costs:
    """Time the forwards of a pair behind a text of `held` tokens, after one repetition to warm up."""
    shapes = [Shape("base", 1, 1), Shape("base", 1, draft_length + 1), Shape("proxy", 1, 1)]
    timer = ForwardTimer({"base": pair.base, "proxy": pair.proxy}, shapes, [], held=held)
    timer.measure()
    seconds: dict[Shape, list[float]] = {}
    for _ in range(REPETITIONS):
        for shape, times in timer.measure().items():
            seconds.setdefault(shape, []).extend(times)
    medians = ForwardTimes(seconds).medians
    return Costs(*(medians[shape] for shape in shapes))


def expected_speed_up(
    costs: Costs, draft_length: int, *, tokens_per_round: float, bonus_steps: float, on_cpu: bool
) -> float:
    """The speed relative to the base alone that the forwards allow, see `speculative_bound`.

    Args:
        costs: the times.
        draft_length: γ.
        tokens_per_round: the expected number of tokens of a round.
        bonus_steps: the share of rounds that accept their whole draft.
        on_cpu: whether the proxy's step behind a draft runs only in these rounds, as on the CPU, or in all.
    """
    return speculative_bound(
        tokens_per_round=tokens_per_round,
        drafted=draft_length,
        bonus_steps=bonus_steps if on_cpu else 1.0,
        base_one=costs.base_one,
        base_draft=costs.base_draft,
        proxy_step=costs.proxy_step,
    )
