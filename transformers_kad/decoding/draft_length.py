"""How long the next draft is to be: a number, or chosen from what was measured in the call so far.

A round that drafts γ tokens emits on average

    E(γ) = 1 + Σ_{k <= γ} m_k

tokens a row, where m_k is the chance that k tokens in a row are accepted, and takes (γ + a) t_q + t(γ + 1) seconds: a
is the share of rounds that need a proxy step for the bonus position, t_q a proxy step, t(n) the rest of a round, which
is mostly the base's forward over n tokens. The best γ has the largest quotient; γ = 0 drafts nothing. Where B rows end
their rounds together, m_k is replaced by m_k^B, the chance that all of them accept k tokens.

m_k is estimated as a mean over windows of k tokens y_1 ... y_k of the text, one behind each place of it. Tokens that
were not drafted serve as well, so that windows may be longer than the drafts and go on over the end of a round. For
token verification a window counts with the product, over its positions, of Σ_v min(q(v), r(v)), the chance that a
draft token is accepted. For block verification what it accepts beyond that is added,

    min(1, W_1, ..., W_k) - Π_{i <= k} min(1, q_i(y_i) / r_i(y_i))    with W_j = Π_{i <= j} q_i(y_i) / r_i(y_i).

These are importance weights. Over drafts y ~ q, the chance of k accepted tokens is E_q[P_k] in block verification,
with P_k = min(1, P_{k-1} r_k(y_k) / q_k(y_k)), whatever γ >= k (see `verification.py`). The text, however, is
distributed as r, and E_q[P_k] = E_r[P_k W_k]. Multiplied by W_k, the recursion of P_k reads
P_k W_k = min(W_k, P_{k-1} W_{k-1}): the running minimum. In the same way the chance in token verification,
E_q[Π min(1, r_i(y_i) / q_i(y_i))], is E_r[Π min(1, q_i(y_i) / r_i(y_i))]. The difference is never negative, and most
of what is random in the two cancels.
"""

import statistics
import time
from collections import Counter, defaultdict, deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import repeat
from typing import Any, NamedTuple

import torch

LONGEST_DRAFT = 16

# Lengths to begin with, so that there is something to choose by. In larger batches, where a forward may cost by the
# token, a long draft is dear to try, and whether to draft at all is what has to be known, not by one measurement.
FIRST_DRAFTS = (5, 2)
FIRST_DRAFTS_OF_MANY_ROWS = (2, 0, 0, 0)
MANY_ROWS = 5

# A draft length that was not measured yet may be this much cheaper than the lengths around it say: it is tried where
# that would make it the best.
OPTIMISM = 0.05

# Measurements kept of each batch size and draft length: their median counts.
KEPT_TIMES = 5

# How fast acceptance far back in the text loses its weight, per token.
MEMORY = 0.98


class Stopwatch:
    """Adds up the time that a device spends in blocks of code."""

    def __init__(self, device: torch.device) -> None:
        self._device = device if device.type in ("cuda", "mps") else None  # these compute by themselves
        self._spans: list[tuple[Any, Any]] = []  # events
        self._seconds = 0.0
        self.blocks = 0

    @contextmanager
    def running(self) -> Iterator[None]:
        """Count the block."""
        self.blocks += 1
        if self._device is None:
            begin = time.perf_counter()
            yield
            self._seconds += time.perf_counter() - begin
        else:
            begin_event = self._record(self._device)
            yield
            self._spans.append((begin_event, self._record(self._device)))

    @staticmethod
    def _record(device: torch.device) -> Any:
        """An event that stands behind all that the device was asked for so far."""
        event: Any
        if device.type == "mps":
            event = torch.mps.event.Event(enable_timing=True)
            event.record()
        else:
            event = torch.cuda.Event(enable_timing=True)
            event.record(torch.cuda.current_stream(device))
        return event

    def read(self) -> tuple[float, int]:
        """Seconds and number of blocks since the last reading. The device must be waited for before."""
        seconds = self._seconds + sum(begin.elapsed_time(end) for begin, end in self._spans) / 1000
        blocks, self._seconds, self._spans, self.blocks = self.blocks, 0.0, [], 0
        return seconds, blocks


class _Window(NamedTuple):
    """The last k tokens of a row, see the docstring of the module."""

    chance: float = 1.0  # product of Σ min(q, r)
    weight: float = 1.0  # W_k
    by_block: float = 1.0  # min(1, W_1, ..., W_k)
    by_token: float = 1.0  # product of min(1, q / r)

    def extend(self, chance: float, ratio: float) -> "_Window":
        """The window with one token more."""
        weight = self.weight * ratio
        return _Window(self.chance * chance, weight, min(self.by_block, weight), self.by_token * min(1.0, ratio))

    @property
    def estimate(self) -> float:
        """What the window says of m_k."""
        return self.chance + self.by_block - self.by_token


class DraftLength:
    """Chooses the draft length that promises the most tokens per second.

    Args:
        bonus_at_once: whether every round runs the proxy's step for the bonus position.
    """

    def __init__(self, bonus_at_once: bool = False) -> None:
        self.bonus_at_once = bonus_at_once
        # Of each row, the windows of its last 1, 2, ... tokens; and of what they say, weighted sums over all places.
        self._windows: dict[int, list[_Window]] = {}
        self._sums = [0.0] * LONGEST_DRAFT
        self._weights = [0.0] * LONGEST_DRAFT
        self._step_times: dict[int, deque[float]] = defaultdict(lambda: deque(maxlen=KEPT_TIMES))
        self._round_times: dict[tuple[int, int], deque[float]] = defaultdict(lambda: deque(maxlen=KEPT_TIMES))

    def choose(self, rows: int, *, in_step: bool = False) -> int:
        """The length of the next draft, for a batch of so many rows, which end their rounds together or do not."""
        measured = Counter[int]()
        for (_, tokens), times in self._round_times.items():
            measured[tokens - 1] += len(times)
        first = FIRST_DRAFTS if rows < MANY_ROWS else FIRST_DRAFTS_OF_MANY_ROWS
        for length in first:
            if measured[length] < first.count(length):
                return length
        # Costs far beyond what was measured are not to be guessed.
        longest = min(2 * max(measured) + 2, LONGEST_DRAFT)
        return max(range(longest + 1), key=lambda length: self._rate(rows, length, in_step))

    def accepted(self, row: int, chances: Sequence[float], ratios: Sequence[float] = ()) -> None:
        """Note how well the proxy knew the tokens that a row emitted.

        Args:
            row: number of the row.
            chances: for each token, the chance Σ min(q, r) with which a draft token is accepted in its place.
            ratios: for each token v, q(v) / r(v), if drafts are verified as blocks.
        """
        windows = self._windows.setdefault(row, [])
        for chance, ratio in zip(chances, ratios or repeat(1.0), strict=False):
            windows[:] = [window.extend(chance, ratio) for window in [_Window(), *windows][:LONGEST_DRAFT]]
            for k, window in enumerate(windows):
                self._sums[k] = MEMORY * self._sums[k] + window.estimate
                self._weights[k] = MEMORY * self._weights[k] + 1

    def timed(self, rows: int, drafted: int, step_seconds: float, rest_seconds: float) -> None:
        """Note what a round cost: a proxy step, and all but the proxy steps."""
        self._step_times[rows].append(step_seconds)
        self._round_times[rows, drafted + 1].append(rest_seconds)

    def _rate(self, rows: int, length: int, in_step: bool) -> float:
        """Expected tokens a row and second."""
        together = rows if in_step else 1  # rows that have to accept the same tokens
        in_a_row = [chance**together for chance in self._in_a_row()]
        tokens = 1 + sum(in_a_row[:length])
        steps: float = length
        if self.bonus_at_once or length == 0:
            steps += 1
        else:
            steps += 1 - (1 - in_a_row[length - 1]) ** (rows / together)
        return tokens / (steps * self._step(rows) + self._rest(rows, length + 1))

    def _in_a_row(self) -> list[float]:
        """m_1, m_2, ...; what no row was long enough for is extrapolated."""
        chances: list[float] = []
        for k in range(LONGEST_DRAFT):
            if self._weights[k] > 0:
                chances.append(min(self._sums[k] / self._weights[k], 1.0))
            else:
                chances.append(chances[-1] * chances[0] if chances else 1.0)
        return chances

    def _step(self, rows: int) -> float:
        nearest = min(self._step_times, key=lambda known: abs(known - rows))
        return statistics.median(self._step_times[nearest])

    def _rest(self, rows: int, tokens: int) -> float:
        """Seconds of a round without proxy steps, by the number of tokens in the base's forward over all rows."""
        known = self._round_times.get((rows, tokens))
        if known:
            return statistics.median(known)
        points: dict[int, list[float]] = defaultdict(list)
        for (of_rows, of_tokens), times in self._round_times.items():
            points[of_rows * of_tokens].append(statistics.median(times))
        curve = sorted((size, statistics.fmean(times)) for size, times in points.items())
        return (1 - OPTIMISM) * _interpolate(curve, rows * tokens)


def _interpolate(curve: list[tuple[int, float]], size: int) -> float:
    """A value between known points; beyond them on the line through the nearest two, unless that falls."""
    if len(curve) == 1:
        return curve[0][1]
    right = next((at for at, (known, _) in enumerate(curve) if known >= size), len(curve) - 1)
    right = max(right, 1)
    (x0, y0), (x1, y1) = curve[right - 1], curve[right]
    slope = (y1 - y0) / (x1 - x0)
    if curve[0][0] <= size <= curve[-1][0]:
        return y0 + slope * (size - x0)
    slope = max(slope, 0.0)
    return y1 + slope * (size - x1) if size > x1 else max(y0 - slope * (x0 - size), 0.0)
