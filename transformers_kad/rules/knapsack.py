"""The knapsack of one position: its greedy solution, by the fastest way to it, and its optimum.

The items are the tokens, -p log p is an item's value, p its weight. The density value / weight is -log p, so the
density order is rising p; ties are in the order of ids. Sums are in float64.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch

# On the CPU, a sum in float64 converts its input first: so many elements stay in the cache.
CONVERTED_AT_ONCE = 2**18

# Up to this vocabulary a sort is the fastest way to the greedy solution. Above it, a search among the likeliest tokens
# comes first.
SORTED_VOCABULARY = 4096
NUCLEUS = 64
BLOCK = 128

# What can't improve on the best known solution is looked for every so many turns of the search, unless that is more
# than so many pairs of a state and an item.
TURNS_TO_REDUCTION = 32
REDUCED_AT_ONCE = 2**18


def parts_to_convert(rows: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Rows `(n, V)` in the parts in which they are best converted to float64: outside the CPU all together."""
    if rows.device.type != "cpu" or rows.numel() <= CONVERTED_AT_ONCE:
        return (rows,)
    return rows.split(max(1, CONVERTED_AT_ONCE // rows.shape[1]))


def sum_in_float64(probs: torch.Tensor) -> torch.Tensor:
    """The sums of `(..., V)` over the last dimension, `(...)` float64."""
    parts = parts_to_convert(probs.reshape(-1, probs.shape[-1]))
    return torch.cat([part.sum(-1, dtype=torch.float64) for part in parts]).view(probs.shape[:-1])


def choose(probs: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The probabilities where a mask of the same shape is set, 0 elsewhere.

    As a product, which costs the same for every mask; bytes convert to floats in a fraction of the time of booleans.
    """
    return probs * mask.view(torch.uint8)


# --- The greedy solution --------------------------------------------------------------------------------------


def longest_prefix(probs: torch.Tensor, budget: float) -> torch.Tensor:
    """The greedy solution: the longest prefix, in the order of rising p, whose mass is at most the budget.

    The last token of that order is left out, also where the sum of all is within the budget.

    Args:
        probs: p, float32, `(rows, V)`.
        budget: at least 0.

    Returns:
        The masks of the tokens taken, `(rows, V)`. Outside the CPU nothing is read back from the device.
    """
    if probs.device.type != "cpu" or probs.shape[-1] <= SORTED_VOCABULARY:
        return _prefix_by_sorting(probs, budget)
    mask, found = _prefix_around_nucleus(probs, budget)
    for row in (~found).nonzero().squeeze(1).tolist():
        mask[row] = _prefix_by_counting(probs[row], budget)
    return mask


def _prefix_by_sorting(probs: torch.Tensor, budget: float) -> torch.Tensor:
    ordered, order = probs.sort(dim=-1, stable=True)
    fits = ordered.double().cumsum(-1) <= budget
    fits[:, -1] = False
    return torch.zeros_like(fits).scatter_(-1, order, fits)


def _prefix_around_nucleus(probs: torch.Tensor, budget: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The prefixes where at most `NUCLEUS` tokens are left out, at the cost of finding the likeliest ones.

    Returns:
        The masks `(rows, V)`, and for which rows they are right, `(rows,)`: those that leave out none but some of the
        `NUCLEUS + 1` likeliest tokens, each of them likelier than the last.
    """
    ids = _likeliest(probs, NUCLEUS + 1).sort().values
    ordered, order = probs.gather(-1, ids).sort(stable=True)
    rest = sum_in_float64(probs.scatter(-1, ids, 0.0))
    fits = rest.unsqueeze(-1) + ordered.double().cumsum(-1) <= budget
    fits[:, -1] = False
    mask = torch.ones_like(probs, dtype=torch.bool).scatter_(-1, ids.gather(-1, order), fits)
    return mask, (fits | (ordered > ordered[:, :1])).all(-1)


def _likeliest(probs: torch.Tensor, count: int) -> torch.Tensor:
    """Ids of the `count` likeliest tokens of each row `(rows, V)` on the CPU, in no order, ties in any way.

    They are in the `count` blocks of the largest maxima, or behind the last whole block: what is elsewhere is at most
    as likely as each of these maxima.
    """
    blocked = probs.shape[-1] // BLOCK * BLOCK
    maxima = probs[:, :blocked].unflatten(-1, (-1, BLOCK)).amax(-1)
    blocks = maxima.topk(min(count, maxima.shape[-1]), sorted=False).indices
    ids = (blocks.unsqueeze(-1) * BLOCK + torch.arange(BLOCK, device=probs.device)).flatten(1)
    ids = torch.cat([ids, torch.arange(blocked, probs.shape[-1], device=probs.device).expand(len(probs), -1)], dim=-1)
    return ids.gather(-1, probs.gather(-1, ids).topk(count, sorted=False).indices)


def _prefix_by_counting(probs: torch.Tensor, budget: float) -> torch.Tensor:
    """The prefix of one row `(V,)` on the CPU, in a number of passes that does not depend on the distribution.

    Floats that are not negative are ordered as their bits are. The mass of all tokens with the same upper half of
    the bits says in which of these classes the prefix ends; within the class the lower half does, down to one value.
    """
    half = 15  # 1.0 is below 2^30
    bits = probs.view(torch.int32).clamp(min=0)  # -0.0, and what is no probability, counts as 0
    upper = bits >> half
    mass = torch.bincount(upper, weights=probs.double()).cumsum(0)
    high, below = _critical_class(mass, 0.0, budget)
    mass = below + torch.bincount(bits & (1 << half) - 1, weights=choose(probs, upper == high).double()).cumsum(0)
    low, below = _critical_class(mass, below, budget)
    critical = (high << half) + low
    mask = bits < critical

    # Of the tokens with this very value, as many as fit. (In a row with NaN, `below` is NaN, and any mask will do.)
    value = float(torch.tensor(critical, dtype=torch.int32, device=bits.device).view(torch.float32))
    count = int((budget - below) / value) + 1 if value > 0 and below <= budget else len(probs)
    while value > 0 and below + count * value > budget:
        count -= 1
    if count:
        same = bits == critical
        place = same.cumsum(0, dtype=torch.int32)
        mask |= same & (place <= min(count, int(place[-1]) - 1))
    return mask


def _critical_class(mass: torch.Tensor, below: float, budget: float) -> tuple[int, float]:
    """The first class of which not all fits, or the last that has mass, and the mass of those before it.

    Args:
        mass: cumulated masses of the classes, float64.
        below: the mass before the first class.
    """
    at = min(int(torch.searchsorted(mass, budget, right=True)), int(torch.searchsorted(mass, mass[-1])))
    return at, float(mass[at - 1]) if at else below


# --- The optimum ----------------------------------------------------------------------------------------------


def solve_knapsack(
    probs: torch.Tensor, budget: float, tolerance: float, max_states: int
) -> tuple[torch.Tensor, float]:
    """Solve one knapsack.

    Tokens worth at most the tolerance are light. They are the densest, and to take them greedily costs at most the
    value of one of them. The others are searched.

    Args:
        probs: p, float32, on the CPU, `(V,)`.
        budget: in [0, 1).
        tolerance: the value by which the answer may fall short of the optimum.
        max_states: how many states the search may keep.

    Returns:
        The mask of the tokens taken, `(V,)`, and a bound on how far its value is from the optimum where that is more
        than the tolerance, else 0.
    """
    limit = _largest_light(tolerance)
    light = probs <= limit
    light_mass = float(sum_in_float64(choose(probs, light)))
    if light_mass > budget:
        return longest_prefix(probs.unsqueeze(0), budget).squeeze(0), 0.0
    ids = (~light & (probs <= budget)).nonzero().squeeze(1)  # heavier ones are never taken
    weights, order = probs[ids].sort(stable=True)
    if not len(ids):
        return light, 0.0
    search = _Search(weights.double(), light_mass, -math.log(limit) if limit > 0 else 0.0, budget)
    gap = search.run(tolerance, max_states)
    if len(search.state_mass) and not gap:
        light_ids = light.nonzero().squeeze(1)
        light_weights, light_order = probs[light_ids].sort(stable=True)
        kept = search.give_back(light_weights.double())
        light[light_ids[light_order[kept:]]] = False
    light[ids[order]] = _lowest_ids_first(weights, search.taken)
    return light, gap


def _largest_light(tolerance: float) -> float:
    """The largest p, up to the maximum of -p log p at 1/e, whose value is at most the tolerance."""
    low, high = 0.0, 1 / math.e
    while low < (middle := (low + high) / 2) < high:
        low, high = (middle, high) if -middle * math.log(middle) <= tolerance else (low, middle)
    return low


class _Completions(NamedTuple):
    """What some states can become."""

    over: torch.Tensor  # whether the state is over the budget
    bound: torch.Tensor  # no solution that the state leads to has a larger value
    value: torch.Tensor  # of one solution that it leads to, -inf if none is known
    begin: torch.Tensor  # which makes this solution by flipping the items from here
    end: torch.Tensor  # to here


class _Search:
    """Branch and bound from the greedy solution, over the items that are not light, in the order of rising weight.

    A state is the (mass, value) of the greedy solution after some items were flipped: taken, or given back. Items up
    to `left` and from `right` on are not decided yet. Each turn decides one more.

    Paper: Pisinger, "A minimal algorithm for the 0-1 knapsack problem", Operations Research 45(5), 1997: the core that
    grows around the critical item, dominated states, and the reduction by bounds.

    Args:
        weights: `(n,)` float64, rising.
        light_mass: mass of the light tokens, which are all taken.
        light_density: of the light token that is the least dense.
        budget: at least `light_mass`.

    Attributes:
        taken: the best solution known, `(n,)`.
        state_mass, state_value: the states that are left, which can't be improved without the light tokens.
    """

    def __init__(self, weights: torch.Tensor, light_mass: float, light_density: float, budget: float) -> None:
        zero = weights.new_zeros(1)
        self.weights, self.values = weights, -torch.xlogy(weights, weights)
        self.light_mass, self.budget = light_mass, budget
        # Of the light tokens and the first k items; the value is that of the items.
        self._mass = torch.cat([zero, weights.cumsum(0)]) + light_mass
        self._value = torch.cat([zero, self.values.cumsum(0)])
        self._density = torch.cat([zero + light_density, -weights.log(), zero])

        self.right = int(torch.searchsorted(self._mass, budget, right=True)) - 1
        self.left = self.right - 1
        self.greedy = torch.arange(len(weights), device=weights.device) < self.right
        self.taken, self.best = self.greedy, float(self._value[self.right])
        self.state_mass, self.state_value = self._mass[self.right].view(1), self._value[self.right].view(1)
        self._history: list[tuple[int, torch.Tensor, torch.Tensor]] = []  # item, each state's parent, flipped or not

    def run(self, tolerance: float, max_states: int) -> float:
        """Search until no state is left that could gain more than the tolerance without the light tokens.

        Returns:
            0, or where `max_states` were too few the largest gain that is not ruled out.
        """
        items = len(self.weights)
        completions = self._complete(self.state_mass, self.state_value)
        self._improve(completions, lambda state: [])
        self._keep(completions.bound, tolerance)
        lefts, rights = list(range(self.left, -1, -1)), list(range(self.right, items))
        turn, reduced, examined = 0, -TURNS_TO_REDUCTION, 0
        while len(self.state_mass):
            pairs = len(self.state_mass) * (len(lefts) + len(rights))
            if turn == 0 or (turn - reduced >= TURNS_TO_REDUCTION and pairs <= REDUCED_AT_ONCE):
                reduced = turn
                lefts, rights = self._useful(lefts, -1.0, tolerance), self._useful(rights, 1.0, tolerance)
            if not lefts and not rights:
                break
            if examined > max_states:
                return float(self._bound.max()) - self.best
            add = bool(rights) and (not lefts or turn % 2 == 0)
            self._decide((rights if add else lefts).pop(0), 1.0 if add else -1.0, lefts, rights, tolerance)
            examined += len(self.state_mass)
            turn += 1
        self.left, self.right = -1, items
        self._keep(self._complete(self.state_mass, self.state_value).bound, tolerance)
        return 0.0

    def give_back(self, light_weights: torch.Tensor) -> int:
        """Let the states that are left give back light tokens, the least dense first, until they are in the budget.

        Returns:
            How many of the light tokens, `(m,)` rising, belong to the best solution known.
        """
        zero = light_weights.new_zeros(1)
        mass = torch.cat([zero, light_weights.cumsum(0)])
        value = torch.cat([zero, -torch.xlogy(light_weights, light_weights).cumsum(0)])
        room = self.budget - (self.state_mass - self.light_mass)
        kept = torch.searchsorted(mass, room, right=True) - 1
        total = (self.state_value - value[-1] + value[kept]).where(kept >= 0, -torch.inf)
        at = int(total.argmax())
        if float(total[at]) <= self.best:
            return len(light_weights)
        self._flip(self._trace_back(at))
        return int(kept[at])

    def _decide(self, item: int, sign: float, lefts: list[int], rights: list[int], tolerance: float) -> None:
        """Double the states by flipping an item, and keep those that are worth it."""
        self.left, self.right = lefts[0] if lefts else -1, rights[0] if rights else len(self.weights)
        parents = len(self.state_mass)
        mass = torch.cat([self.state_mass, self.state_mass + sign * self.weights[item]])
        value = torch.cat([self.state_value, self.state_value + sign * self.values[item]])
        self.state_mass, order = mass.sort(stable=True)
        self.state_value = value[order]
        parent, flipped = order % parents, order >= parents
        completions = self._complete(self.state_mass, self.state_value)
        self._improve(completions, lambda at: self._trace_back(int(parent[at])) + [item] * bool(flipped[at]))
        no_value = value.new_tensor([-torch.inf])
        dominated = self.state_value <= torch.cat([no_value, self.state_value.cummax(0).values[:-1]])
        kept = self._keep(completions.bound.where(~dominated, -torch.inf), tolerance)
        self._history.append((item, parent[kept], flipped[kept]))

    def _useful(self, items: list[int], sign: float, tolerance: float) -> list[int]:
        """Those undecided items on one side whose flip may lead to a gain. Finds the best flips of two on the way."""
        if not items:
            return items
        index = torch.tensor(items, device=self.weights.device)
        mass = self.state_mass[:, None] + sign * self.weights[index]
        value = self.state_value[:, None] + sign * self.values[index]
        completions = self._complete(mass.flatten(), value.flatten())
        # A solution must not flip the item again: only those are known to exist that flip on the other side.
        other_side = completions.value.where(completions.over == (sign > 0), -torch.inf)
        self._improve(
            completions._replace(value=other_side),
            lambda at: [*self._trace_back(at // len(items)), items[at % len(items)]],
        )
        return index[completions.bound.view(mass.shape).amax(0) > self.best + tolerance].tolist()

    def _complete(self, mass: torch.Tensor, value: torch.Tensor) -> _Completions:
        """What states `(s,)` can become by items that are not decided yet.

        The bound fills what is left of the budget with the next items, or gives back the last ones until the mass
        is within it, one of them in part (Dantzig). The solution leaves that part, or flips a single item.
        """
        over, room = mass > self.budget, self.budget - mass
        start = torch.where(over, self.left + 1, self.right)
        prefix = room + self._mass[start]
        reached = torch.searchsorted(self._mass, prefix, right=True)
        reached = torch.where(over, reached.clamp(max=self.left + 1), reached)
        whole = (reached - 1).clamp(min=0)
        changed = value - self._value[start] + self._value[whole]
        bound = changed + (prefix - self._mass[whole]) * self._density[reached]

        one = torch.where(
            over,
            torch.searchsorted(self.weights, -room),  # the lightest that is heavy enough
            torch.searchsorted(self.weights, room, right=True) - 1,  # the heaviest that is light enough
        )
        possible = torch.where(over, one <= self.left, one >= self.right)
        gain = torch.where(over, -1.0, 1.0) * self.values[one.clamp(0, len(self.weights) - 1)]
        with_one = (value + gain).where(possible, -torch.inf)
        changed = changed.where(reached > 0, -torch.inf)
        alone = with_one > changed
        return _Completions(
            over,
            bound.where(prefix >= 0, -torch.inf),
            torch.maximum(with_one, changed),
            torch.where(alone, one, torch.minimum(start, whole)),
            torch.where(alone, one + 1, torch.maximum(start, whole)),
        )

    def _keep(self, bound: torch.Tensor, tolerance: float) -> torch.Tensor:
        """Keep the states whose bound is above the best value known by more than the tolerance; which these are."""
        kept = bound > self.best + tolerance
        self.state_mass, self.state_value, self._bound = self.state_mass[kept], self.state_value[kept], bound[kept]
        return kept

    def _improve(self, completions: _Completions, flips: Callable[[int], list[int]]) -> None:
        """Note the best of the solutions, if it is better than the one known; `flips` is how to reach its state."""
        at = int(completions.value.argmax())
        if float(completions.value[at]) > self.best:
            self.best = float(completions.value[at])
            self._flip(flips(at))
            self.taken[int(completions.begin[at]) : int(completions.end[at])] ^= True

    def _flip(self, items: list[int]) -> None:
        self.taken = self.greedy.clone()
        self.taken[items] ^= True

    def _trace_back(self, state: int) -> list[int]:
        """The items flipped on the way from the root to a state."""
        flips = []
        for item, parent, flipped in reversed(self._history):
            if flipped[state]:
                flips.append(item)
            state = int(parent[state])
        return flips


def _lowest_ids_first(weights: torch.Tensor, taken: torch.Tensor) -> torch.Tensor:
    """The same number of items taken of every weight, but the first ones. Items in the order of weight, then id."""
    _, group, sizes = weights.unique_consecutive(return_inverse=True, return_counts=True)
    taken_in_group = torch.zeros_like(sizes).index_add(0, group, taken.long())
    place_in_group = torch.arange(len(weights), device=weights.device) - (sizes.cumsum(0) - sizes)[group]
    return place_in_group < taken_in_group[group]
