"""The optimum of a knapsack, up to a tolerance: branch and bound from the greedy solution outwards.

Ties are in the order of ids, and sums are in float64.

Paper: Pisinger, "A minimal algorithm for the 0-1 knapsack problem", Operations Research 45(5), 1997: the core that
grows around the critical item, dominated states, and the reduction by bounds.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from .arithmetic import sum_in_float64, zero_outside
from .greedy_knapsack import longest_prefix

TURNS_TO_REDUCTION = 32  # how often the search looks for items that can't lead to a better solution, to drop them,
REDUCED_AT_ONCE = 2**18  # unless there are more pairs of a state and an item than these to look at


def solve_knapsack(probs: Tensor, budget: float, tolerance: float, max_states: int) -> tuple[Tensor, float]:
    """Solve the knapsack of one position.

    Tokens worth at most the tolerance are light. They are the densest, and taking them greedily costs at most the
    value of one of them. The other tokens are searched.

    Args:
        probs: p, float32, on the CPU, `(V,)`.
        budget: in [0, 1).
        tolerance, max_states: see `ExactDeferral`.

    Returns:
        The mask of the tokens taken, `(V,)`, and a bound on how far its value is from the optimum where that is more
        than the tolerance, else 0.
    """
    limit = _largest_light(tolerance)
    light = probs <= limit
    light_mass = float(sum_in_float64(zero_outside(light, probs)))
    if light_mass > budget:
        return longest_prefix(probs.unsqueeze(0), budget).squeeze(0), 0.0
    ids = (~light & (probs <= budget)).nonzero().squeeze(1)  # heavier tokens are never taken
    weights, order = probs[ids].sort(stable=True)
    if not len(ids):
        return light, 0.0
    search = _Search(weights.double(), light_mass, -math.log(limit) if limit > 0 else 0.0, budget, tolerance)
    gap = search.run(max_states)
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


def _lowest_ids_first(weights: Tensor, taken: Tensor) -> Tensor:
    """Take as many items of every weight, but those of the lowest ids. Items are in the order of weight, then id."""
    taken_first = taken.byte().argsort(descending=True, stable=True)
    return taken[taken_first[weights[taken_first].argsort(stable=True)]]


class _Search:
    """The search over the items that are not light, in the order of rising weight.

    Flipping an item gives it back if the greedy solution takes it, else takes it. A state is the (mass, value) of
    the greedy solution after some flips. Each turn decides of one more item whether it is flipped, one way in each
    state and the other way in its copy.

    Args:
        weights: `(n,)` float64, rising.
        light_mass: the mass of the light tokens, which are all taken; at most the budget.
        light_density: the density of the least dense light token.
        budget, tolerance: see `ExactDeferral`.

    Attributes:
        taken: the best solution known, `(n,)` boolean.
        state_mass, state_value: the states that are left after :meth:`run`.
    """

    def __init__(self, weights: Tensor, light_mass: float, light_density: float, budget: float, tolerance: float):
        self.weights, self.light_mass, self.budget, self.tolerance = weights, light_mass, budget, tolerance
        zero, values = weights.new_zeros(1), -torch.xlogy(weights, weights)
        # The mass of the light tokens and the first k items, and the value of these items without the light tokens.
        self._mass = torch.cat([zero, weights.cumsum(0)]) + light_mass
        self._value = torch.cat([zero, values.cumsum(0)])
        self._density = torch.cat([zero + light_density, -weights.log(), zero])

        # The items that are not decided yet, within the greedy solution and outside, the nearest to its end first.
        whole = int(torch.searchsorted(self._mass, budget, right=True)) - 1
        self._lefts, self._rights = list(range(whole - 1, -1, -1)), list(range(whole, len(weights)))
        self.greedy = torch.arange(len(weights), device=weights.device) < whole
        sign = torch.where(self.greedy, -1.0, 1.0)
        self._flip_mass, self._flip_value = sign * weights, sign * values
        self.taken, self.best = self.greedy, float(self._value[whole])
        self.state_mass, self.state_value = self._mass[whole].view(1), self._value[whole].view(1)
        self._history: list[tuple[int, Tensor, Tensor]] = []  # item, each state's parent, flipped or not

    def run(self, max_states: int) -> float:
        """Search until no state is left that could gain more than the tolerance without giving back light tokens.

        Returns:
            0, or where `max_states` were too few the largest gain that is not ruled out.
        """
        self._keep(self._complete(self.state_mass, self.state_value, lambda state: []))
        turn, reduced, examined = 0, -TURNS_TO_REDUCTION, 0
        while len(self.state_mass):
            pairs = len(self.state_mass) * (len(self._lefts) + len(self._rights))
            if turn == 0 or (turn - reduced >= TURNS_TO_REDUCTION and pairs <= REDUCED_AT_ONCE):
                reduced = turn
                self._lefts, self._rights = self._useful(self._lefts), self._useful(self._rights)
            if not self._lefts and not self._rights:
                break
            if examined > max_states:
                return float(self._bound.max()) - self.best
            take = bool(self._rights) and (not self._lefts or turn % 2 == 0)
            self._decide((self._rights if take else self._lefts).pop(0))
            examined += len(self.state_mass)
            turn += 1
        self._keep(self._complete(self.state_mass, self.state_value, None))
        return 0.0

    def give_back(self, light_weights: Tensor) -> int:
        """Let the states that are left give back light tokens, the least dense first, until the budget is met.

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
        self._note(float(total[at]), self._trace_back(at))
        return int(kept[at])

    def _decide(self, item: int) -> None:
        """Add a copy of each state with the item flipped, and keep those states that may lead to a gain."""
        parents = len(self.state_mass)
        mass = torch.cat([self.state_mass, self.state_mass + self._flip_mass[item]])
        value = torch.cat([self.state_value, self.state_value + self._flip_value[item]])
        self.state_mass, order = mass.sort(stable=True)
        self.state_value = value[order]
        parent, flipped = order % parents, order >= parents
        bound = self._complete(
            self.state_mass,
            self.state_value,
            lambda at: self._trace_back(int(parent[at])) + [item] * bool(flipped[at]),
        )
        best_so_far = self.state_value.cummax(0).values
        bound[1:][self.state_value[1:] <= best_so_far[:-1]] = -torch.inf  # dominated by a lighter state
        kept = self._keep(bound)
        self._history.append((item, parent[kept], flipped[kept]))

    def _useful(self, items: list[int]) -> list[int]:
        """Those undecided items of one side whose flip may lead to a gain. Solutions found on the way are noted."""
        if not items:
            return items
        index = torch.tensor(items, device=self.weights.device)
        mass = self.state_mass[:, None] + self._flip_mass[index]
        value = self.state_value[:, None] + self._flip_value[index]
        # A solution must not flip the item again, which is certain only for those that flip items of the other side.
        bound = self._complete(
            mass.flatten(),
            value.flatten(),
            lambda at: [*self._trace_back(at // len(items)), items[at % len(items)]],
            over_budget=not self.greedy[items[0]],
        )
        return index[bound.view(mass.shape).amax(0) > self.best + self.tolerance].tolist()

    def _complete(
        self, mass: Tensor, value: Tensor, flips: Callable[[int], list[int]] | None, over_budget: bool | None = None
    ) -> Tensor:
        """Complete states by flipping items that are not decided yet, and bound the value that this can reach.

        The bound fills what is left of the budget with the next items, or gives back the last ones until the mass is
        within it, one of them in part (Dantzig). A solution leaves that part, or flips a single item. The best one is
        noted if it is better than the one known.

        Args:
            mass, value: of the states, `(s,)`.
            flips: returns the items flipped on the way to a state. Without it no solution is noted.
            over_budget: note solutions of states above the budget only, or only of those within it.

        Returns:
            For each state a value that no solution it leads to exceeds, `(s,)`.
        """
        left, right = self._lefts[0] if self._lefts else -1, self._rights[0] if self._rights else len(self.weights)
        over, room = mass > self.budget, self.budget - mass
        start = torch.where(over, left + 1, right)
        prefix = room + self._mass[start]
        reached = torch.searchsorted(self._mass, prefix, right=True)
        reached = torch.where(over, reached.clamp(max=left + 1), reached)
        whole = (reached - 1).clamp(min=0)
        changed = value - self._value[start] + self._value[whole]
        bound = (changed + (prefix - self._mass[whole]) * self._density[reached]).where(prefix >= 0, -torch.inf)
        if flips is None:
            return bound

        lightest_enough = torch.searchsorted(self.weights, -room)  # to bring a state within the budget
        heaviest_fitting = torch.searchsorted(self.weights, room, right=True) - 1
        one = torch.where(over, lightest_enough, heaviest_fitting)
        possible = torch.where(over, one <= left, one >= right)
        with_one = (value + self._flip_value[one.clamp(0, len(self.weights) - 1)]).where(possible, -torch.inf)
        changed = changed.where(reached > 0, -torch.inf)
        solution = torch.maximum(with_one, changed)
        if over_budget is not None:
            solution = solution.where(over == over_budget, -torch.inf)
        at = int(solution.argmax())
        if float(solution[at]) > self.best:
            alone = bool(with_one[at] > changed[at])
            begin, end = (int(one[at]), int(one[at]) + 1) if alone else sorted((int(start[at]), int(whole[at])))
            self._note(float(solution[at]), flips(at))
            self.taken[begin:end] ^= True
        return bound

    def _note(self, value: float, flips: list[int]) -> None:
        """Note a solution that is better than the one known: its value, and the items it flips."""
        self.best, self.taken = value, self.greedy.clone()
        self.taken[flips] ^= True

    def _keep(self, bound: Tensor) -> Tensor:
        """Keep the states whose bound exceeds the best value known by more than the tolerance, and return which."""
        kept = bound > self.best + self.tolerance
        self.state_mass, self.state_value, self._bound = self.state_mass[kept], self.state_value[kept], bound[kept]
        return kept

    def _trace_back(self, state: int) -> list[int]:
        """The items flipped on the way from the greedy solution to a state."""
        flips = []
        for item, parent, flipped in reversed(self._history):
            if flipped[state]:
                flips.append(item)
            state = int(parent[state])
        return flips
