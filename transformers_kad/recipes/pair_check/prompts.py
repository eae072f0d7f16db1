"""The prompts of a check: a file, a data set, or neutral ones that are built in."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ...utils.sources import looks_like_path
from ..prompt_lines import UNREADABLE, Line, prompt_of, read_prompts, template_of

# Questions of many kinds, for a check without prompts of the user's own.
NEUTRAL_PROMPTS = (
    "Explain in two sentences why the sky is blue.",
    "What is the capital of Australia, and what is it known for?",
    "Write a short note to a colleague who is moving to another team.",
    "Give three tips for falling asleep more easily.",
    "A train covers 180 km in 2 hours. How fast does it go on average?",
    "Summarise how vaccines work for a twelve-year-old.",
    "Which is heavier, a litre of water or a litre of oil, and why?",
    "Write a Python function that reverses the words of a sentence.",
    "What is the difference between weather and climate?",
    "Suggest a simple dinner with rice, eggs and spinach.",
    "Translate into French: The library opens at nine o'clock.",
    "List the planets of the solar system in order from the sun.",
    "My plant has yellow leaves. What could be the reasons?",
    "Rewrite more politely: Send me the file now.",
    "Who wrote Pride and Prejudice, and what is it about?",
    "If I have 45 coins and give away 18, how many are left?",
    "What should I check before I buy a used bicycle?",
    "Explain what an interest rate is with an example.",
    "Name two advantages and two disadvantages of remote work.",
    "Why do leaves change colour in autumn?",
    "Plan a morning in a city for someone who likes art.",
    "What does the idiom 'to break the ice' mean?",
    "How do I convert 68 degrees Fahrenheit to Celsius?",
    "Describe the water cycle in four steps.",
)


def load_prompts(source: str | None, limit: int, *, config: str | None = None, split: str = "train") -> list[Line]:
    """The first prompts of a source.

    Args:
        source: a file with one prompt in each line, as text or as JSON with `prompt` or `messages`; a data set of the
            Hub, or a folder that `load_dataset` reads, whose rows have these fields; None for `NEUTRAL_PROMPTS`.
        limit: the number of prompts, at most.
        config: configuration of the data set.
        split: split of the data set.

    Raises:
        ValueError: there is no such source, it has no prompts, or a line can't be used; the message names the line.
    """
    if source is None:
        return as_lines(NEUTRAL_PROMPTS[:limit])
    path = Path(source).expanduser()
    if path.is_file():
        text = path.read_text(encoding="utf-8", errors=UNREADABLE)
        lines = list(read_prompts(text.split("\n")))[:limit]
        if path.suffix in (".json", ".jsonl"):
            lines = list(map(_as_object, lines))
    elif not path.is_dir() and (path.suffix in (".json", ".jsonl", ".txt") or looks_like_path(source)):
        raise ValueError(f"There is no file --prompts {source!r}, and no folder either. Correct the path.")
    else:
        lines = _read_dataset(source, config, split, limit)
    if not lines:
        raise ValueError(f"--prompts {source!r} is empty: it needs at least one prompt, and 20 to 100 are better.")
    for line in lines:
        if line.error is not None:
            raise ValueError(
                f"--prompts {source!r}, line {line.number} can't be used: {line.error}. Correct the line."
            )
    return lines


def as_lines(prompts: Sequence[str]) -> list[Line]:
    """Questions as numbered lines."""
    return [Line(number, prompt) for number, prompt in enumerate(prompts, start=1)]


def _as_object(line: Line) -> Line:
    """A line of a file of JSON Lines, with an error if it is no JSON object."""
    if line.error is None and not isinstance(line.row, dict):
        return replace(
            line, error=f'every line must be a JSON object with "prompt" or "messages", got {line.prompt!r:.80}'
        )
    return line


def _read_dataset(name: str, config: str | None, split: str, limit: int) -> list[Line]:
    from ..training.rows import read_rows  # noqa: PLC0415 (needs the extra "train")

    rows, lines = read_rows(name, config, split), []
    for number, row in list(zip(rows.numbers, rows.contents, strict=True))[:limit]:
        try:
            lines.append(Line(number, prompt_of(row), row, template_of(row)))
        except ValueError as error:
            lines.append(Line(number, None, row, error=str(error)))
    return lines
