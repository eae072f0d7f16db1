"""The task of the tiny pair: arithmetic word problems with worked solutions, held-out splits, and two scores.

A tenth of the arithmetic never occurs in a training text. The MD5 hash of a fact family (a + b = c, b + a = c,
c - a = b, c - b = a) assigns it to the train (90 %), validation (5 %) or test split (5 %), and all steps of a problem
belong to the split of the problem.

>>> problem = make_problems("test", 1)[0]
>>> is_correct(problem.solution + EOS, problem)
True
"""

import hashlib
import random
import re
from dataclasses import dataclass
from functools import cache

from ..integrations.loading.thoughts import without_thoughts

Triple = tuple[int, str, int]

# --- Arithmetic and its splits ------------------------------------------------------------------------------

LIMIT = 99  # operands and results lie in 1..LIMIT
SPLITS = ("train", "validation", "test")


def evaluate_triple(triple: Triple) -> int:
    """The result of `a op b`."""
    a, op, b = triple
    return a + b if op == "+" else a - b


def split_of(triple: Triple) -> str:
    """The split of a triple: 90 % train, 5 % validation, 5 % test, by the md5 of its fact family.

    The four equations a + b = c, b + a = c, c - a = b and c - b = a are one family and share one split. No held-out
    equation can therefore be derived from a commuted or an inverse one in the training data.
    """
    a, op, b = triple
    low, high = sorted((a, b) if op == "+" else (a - b, b))
    bucket = int(hashlib.md5(f"{low}+{high}".encode(), usedforsecurity=False).hexdigest(), 16) % 20
    return {0: "validation", 1: "test"}.get(bucket, "train")


@cache
def triples_of(split: str) -> tuple[tuple[Triple, ...], dict[int, tuple[Triple, ...]]]:
    """All triples of a split, and the same triples grouped by their first operand."""
    numbers = range(1, LIMIT + 1)
    triples = [(a, op, b) for a in numbers for op in "+-" for b in numbers]
    triples = [t for t in triples if 1 <= evaluate_triple(t) <= LIMIT and split_of(t) == split]
    by_first = {a: tuple(t for t in triples if t[0] == a) for a in numbers}
    return tuple(triples), by_first


def draw_steps(rng: random.Random, split: str, steps: int) -> tuple[Triple, ...]:
    """Draw a chain of triples of one split, in which each step starts from the result of the previous step."""
    triples, by_first = triples_of(split)
    while True:
        chain = [rng.choice(triples)]
        while len(chain) < steps and (following := by_first[evaluate_triple(chain[-1])]):
            chain.append(rng.choice(following))
        if len(chain) == steps:
            return tuple(chain)


def equation(triple: Triple) -> str:
    """A triple as text: "12 + 7 = 19"."""
    a, op, b = triple
    return f"{a} {op} {b} = {evaluate_triple(triple)}"


# --- Problems and their scores ------------------------------------------------------------------------------

NAMES = (
    *("Ada", "Ben", "Cleo", "Dan", "Eva", "Finn", "Gus", "Hana"),
    *("Ivy", "Jon", "Kim", "Leo", "Mia", "Nora", "Otto", "Pia"),
)
ITEMS = (
    *("apples", "beads", "books", "cards", "coins", "cups", "hats", "keys"),
    *("marbles", "nuts", "pens", "plums", "shells", "stamps", "stones", "toys"),
)
OPENINGS = ("{name} has {a} {items}.", "{name} owns {a} {items}.", "{name} starts with {a} {items}.")
EVENTS = {
    "+": (
        *("{name} buys {b} more.", "{name} finds {b} more.", "{name} gets {b} more from {other}."),
        *("{other} brings {b} more.", "{name} wins {b} more."),
    ),
    "-": (
        *("{name} loses {b} of them.", "{name} sells {b} of them.", "{name} gives {b} to {other}."),
        *("{other} takes {b} away.", "{name} drops {b} of them."),
    ),
}
QUESTIONS = (
    *("How many {items} does {name} have now?", "How many {items} are there now?"),
    *("How many does {name} have in the end?", "What is the number of {items} now?"),
)


@dataclass(frozen=True)
class Problem:
    """A word problem: the user's message, the ideal answer, the number in it, and the steps of the calculation."""

    question: str
    solution: str
    answer: int
    triples: tuple[Triple, ...]


@dataclass(frozen=True)
class Story:
    """A word problem without its question: the person, the items, and the sentences that tell what happened."""

    name: str
    items: str
    telling: str
    triples: tuple[Triple, ...]

    @property
    def result(self) -> int:
        """The number that the question asks for."""
        return evaluate_triple(self.triples[-1])


TWO_STEPS = 1 / 3  # the share of problems with two steps


def draw_story(rng: random.Random, split: str) -> Story:
    """Draw a story of one or two steps."""
    triples = draw_steps(rng, split, 2 if rng.random() < TWO_STEPS else 1)
    name, other = rng.sample(NAMES, 2)
    items = rng.choice(ITEMS)
    sentences = [rng.choice(OPENINGS).format(name=name, a=triples[0][0], items=items)]
    sentences += [rng.choice(EVENTS[op]).format(name=name, other=other, b=b) for _, op, b in triples]
    return Story(name, items, " ".join(sentences), triples)


def ask(rng: random.Random, story: Story) -> str:
    """A story followed by a question about its result."""
    return f"{story.telling} {rng.choice(QUESTIONS).format(name=story.name, items=story.items)}"


def make_problems(split: str, count: int, seed: int = 0) -> list[Problem]:
    """Make distinct problems whose steps all belong to one split.

    Args:
        split: "train", "validation" or "test".
        count: the number of problems.
        seed: seed of the random choices.

    Raises:
        ValueError: an unknown split or a negative count.
    """
    if split not in SPLITS:
        raise ValueError(f"`split` must be one of {SPLITS}, got {split!r}")
    if not isinstance(count, int) or count < 0:
        raise ValueError(f"`count` must be an integer >= 0, got {count!r}")
    rng = random.Random(f"problems {split} {seed}")
    problems: dict[str, Problem] = {}
    while len(problems) < count:
        story = draw_story(rng, split)
        working = " Then ".join(f"{equation(triple)}." for triple in story.triples)
        solution = f"We get {working} The answer is {story.result}."
        question = ask(rng, story)
        problems.setdefault(question, Problem(question, solution, story.result, story.triples))
    return list(problems.values())


EOS, PAD, USER, ASSISTANT = "<|end|>", "<|pad|>", "<|user|>", "<|assistant|>"
STRICT = re.compile(rf"The answer is (\d+)\.?{re.escape(EOS)}(?:{re.escape(PAD)}|{re.escape(EOS)})*")


def extract_answer(text: str) -> str | None:
    """The number of a completion that states "The answer is N" once and ends there; None for any other text.

    `text` is the completion decoded *with* special tokens (`skip_special_tokens=False`): the end of sequence
    must follow the number or its period. Padding after it is ignored, and so are thoughts before the answer
    (:func:`~transformers_kad.integrations.loading.thoughts.without_thoughts`).
    """
    head, phrase, tail = (without_thoughts(text) or "").partition("The answer is ")
    match = STRICT.fullmatch(phrase + tail)
    return match[1] if match is not None and EOS not in head else None


def extract_answer_lenient(text: str) -> str | None:
    """The number of a completion by a model that was never taught how to answer or where to stop.

    This is the number after the last "=" in the first line that is not empty, or the last number of that line if it
    has no "=". Text after the line, the end of sequence and thoughts before the answer are ignored, and leading zeros
    are dropped.
    """
    line = (without_thoughts(text) or "").partition(EOS)[0].strip().partition("\n")[0]
    numbers = re.findall(r"=\s*(\d+)", line) if "=" in line else re.findall(r"\d+", line)
    return (numbers[-1].lstrip("0") or "0") if numbers else None


def is_correct(text: str, problem: Problem) -> bool:
    """The strict score: whether :func:`extract_answer` finds the right number."""
    return extract_answer(text) == str(problem.answer)


def is_correct_lenient(text: str, problem: Problem) -> bool:
    """The lenient score: whether :func:`extract_answer_lenient` finds the right number."""
    return extract_answer_lenient(text) == str(problem.answer)
