"""The progress of a long run: a bar on a terminal, plain lines in a log file."""

import math
import sys
from time import monotonic

from tqdm import tqdm


class Progress:
    """A progress bar on standard error, or plain lines if standard error is not a terminal.

    The first and the last update write a line, and in between there is at most one line every `seconds_between_lines`:
    `24 of 96 answers (25%), 0:02:10 passed, about 0:06:30 left; accuracy 0.417`.

    Args:
        total: the number of units.
        unit: what is counted, in the plural: "answers", "steps".
        done: units that an earlier run has finished, if this run continues it.
        shown: whether anything is written; False for all processes but the first.
        seconds_between_lines: the minimum time between two lines, in seconds.
        patient: write the first line only after this time, so that short runs write none.

    >>> with Progress(total=2, unit="answers", shown=False) as progress:
    ...     progress.update(note="accuracy 1.000")
    ...     progress.update(note="accuracy 0.500")
    """

    def __init__(
        self,
        total: int,
        unit: str,
        *,
        done: int = 0,
        shown: bool = True,
        seconds_between_lines: float = 30.0,
        patient: bool = False,
    ) -> None:
        self.total = total
        self.unit = unit
        self.done = done
        self._first = done
        self._between = seconds_between_lines
        self._started = monotonic()
        self._written = self._started if patient else -math.inf
        self._silent = patient
        terminal = sys.stderr.isatty()
        self._bar = tqdm(total=total, initial=done, unit=unit, disable=not (shown and terminal))
        self._writes_lines = shown and not terminal

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def update(self, count: int = 1, note: str = "") -> None:
        """Count finished units. `note` is shown after the numbers: a loss, an accuracy or a speed."""
        self.done += count
        self._bar.set_postfix_str(note, refresh=False)
        self._bar.update(count)
        now = monotonic()
        last = self.done >= self.total and not self._silent
        if self._writes_lines and (last or now - self._written >= self._between):
            self._written, self._silent = now, False
            print(self._line(now - self._started, note), file=sys.stderr, flush=True)

    def close(self) -> None:
        """Stop updating the bar, and leave it on the screen."""
        self._bar.close()

    def _line(self, passed: float, note: str) -> str:
        share = self.done / self.total if self.total else 1.0
        line = f"{self.done} of {self.total} {self.unit} ({share:.0%}), {_clock(passed)} passed"
        if self._first < self.done < self.total:
            line += f", about {_clock(passed * (self.total - self.done) / (self.done - self._first))} left"
        return f"{line}; {note}" if note else line


def _clock(seconds: float) -> str:
    """Seconds as hours, minutes and seconds."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"
