"""The tasks of `run_eval.py`, one declaration for each of them, in `TASKS`.

To add a task, change three places:

1. Add a declaration to `TASKS` at the end of this module: `Task(...)`, or `multiple_choice(...)` for questions with
   options. `task.py` documents every field, and `answers.py`, `number_answers.py`, `option_answers.py` and
   `math_answers.py` hold the comparisons and extractors to choose from.
2. Add a row to `CASES` in `tests/recipes/evaluation/test_tasks.py`.
3. Add some rows in the layout of the data set to `tests/recipes/evaluation/fixtures/<Hub id>/`.

The rows come from the Hub or from a local copy of the same files (`--data_dir`). Prompts ask for a zero-shot chain of
thought: one turn of the user, which asks to reason step by step and names the form of the answer. Chats are lists of
messages here; the chat template of the model makes them into text when they are encoded.
"""

import hashlib
import re
import string
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from ...rules.registry import unknown_name_message
from ..word_problems import EOS, extract_answer, extract_answer_lenient, make_problems
from .answer_forms import boxed, number_sentence, option_sentence
from .answer_text import REASON
from .decoding import as_text
from .ifeval import check_ifeval, ifeval_names
from .instructions import constraint_name, strict_and_loose
from .math_answers import extract_math
from .number_answers import extract_number
from .option_answers import extract_option
from .prompt_files import read_chats, read_instructions
from .task import SEPARATOR, Task
from .task_data import Row

STATE_NUMBER = (
    f"{REASON} End with one sentence of exactly this form: The answer is N. Here N stands for the number "
    "alone, without a unit."
)
STATE_OPTION = (
    f"{REASON} End with one sentence of exactly this form: The answer is (X). Here X stands for the "
    "letter of the right option."
)
STATE_BOXED = REASON + r" Put the final answer, and nothing else, into \boxed{}."


def multiple_choice(*, letters: str, options: Callable[[Row], tuple[Sequence[str], int]], **declaration: Any) -> Task:
    """A task whose questions have options, one in each line: "(A) one", "(B) two".

    Args:
        letters: the letters of the options, as many as a question can have.
        options: `row -> (options, index of the right one)`; raises a ValueError if no option is known to be right.
        declaration: the other fields of the `Task`; `question` gives the question without options.
    """
    ask = declaration.pop("question")

    def lettered(row: Row) -> tuple[list[tuple[str, str]], str]:
        texts, right = options(row)
        if not all(isinstance(text, str) for text in texts):
            raise ValueError(f"options must be text, got {list(texts)!r:.200}.")
        if not 0 <= right < len(texts) <= len(letters):
            raise ValueError(f"of {len(texts)} options (at most {len(letters)} are known), the right one is {right}.")
        return list(zip(letters, texts, strict=False)), letters[right]

    def question(row: Row) -> str:
        lines = [f"({letter}) {text}" for letter, text in lettered(row)[0]]
        return "\n".join([ask(row), "", *lines])

    return Task(
        question=question,
        answer=lambda row: lettered(row)[1],
        solution=lambda row: f"The answer is ({lettered(row)[1]}).",
        instruction=STATE_OPTION,
        extract=lambda text, ended: extract_option(text, letters, ended),
        max_new_tokens=512,
        form=option_sentence(letters),
        **declaration,
    )


def labelled_options(row: Row) -> tuple[Sequence[str], int]:
    """Options in the layout of ARC and CommonsenseQA, with labels "A" to "E" or "1" to "4"."""
    labels = list(row["choices"]["label"])
    if row["answerKey"] not in labels:
        raise ValueError(f"the right option {row['answerKey']!r} is none of {labels}; not every split has answers.")
    return row["choices"]["text"], labels.index(row["answerKey"])


def mixed_options(row: Row) -> tuple[Sequence[str], int]:
    """Options in the layout of TruthfulQA's MC1, which lists the right one first; they are shuffled by a hash."""
    targets = row["mc1_targets"]

    def position(index: int) -> str:
        return hashlib.sha256(f"{row['question']}\n{targets['choices'][index]}".encode()).hexdigest()

    order = sorted(range(len(targets["choices"])), key=position)
    return [targets["choices"][index] for index in order], order.index(list(targets["labels"]).index(1))


def without_annotations(answer: str) -> str:
    """A worked solution of GSM8K without calculator annotations (<<48/2=24>>) and without the last line (#### 24)."""
    return re.sub(r"<<.*?>>", "", answer).rpartition("####")[0].strip()


def trimmed(numbers: str) -> str:
    """The numbers of SVAMP without trailing zeros: "( 8.0 - 3.0 )" becomes "( 8 - 3 )"."""
    return re.sub(r"(?<=\d)\.0+(?!\d)", "", numbers)


def extract_tiny(text: str, ended: bool) -> str | None:
    """The number of an answer to a problem of the tiny pair, which has to have the form of its training data."""
    return extract_answer(text + EOS if ended else text)


TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task(
            name="gsm8k",
            dataset="openai/gsm8k",
            subset="main",
            split="test",
            few_shot_split="train",
            question=lambda row: row["question"],
            answer=lambda row: row["answer"].rpartition("####")[2].strip().replace(",", ""),
            solution=lambda row: (
                f"{without_annotations(row['answer'])}\nThe answer is {row['answer'].rpartition('####')[2].strip()}."
            ),
            instruction=STATE_NUMBER,
            extract=extract_number,
            comparison="number",
            form=number_sentence,
            max_new_tokens=512,
        ),
        multiple_choice(
            name="mmlu",
            dataset="cais/mmlu",
            subset="all",
            split="test",
            few_shot_split="dev",
            question=lambda row: row["question"],
            options=lambda row: (row["choices"], row["answer"]),
            letters="ABCD",
        ),
        multiple_choice(
            name="truthfulqa_mc1",
            dataset="truthfulqa/truthful_qa",
            subset="multiple_choice",
            split="validation",
            few_shot_split=None,
            question=lambda row: row["question"],
            options=mixed_options,
            letters=string.ascii_uppercase,
        ),
        Task(
            name="math500",
            dataset="HuggingFaceH4/MATH-500",
            subset=None,
            split="test",
            few_shot_split=None,
            question=lambda row: row["problem"],
            answer=lambda row: row["answer"],
            solution=lambda row: row["solution"],
            instruction=STATE_BOXED,
            extract=extract_math,
            comparison="math",
            form=boxed,
            max_new_tokens=1024,
            id_column="unique_id",
        ),
        Task(
            name="svamp",
            dataset="ChilleD/SVAMP",
            subset=None,
            split="test",
            few_shot_split="train",
            question=lambda row: row["question_concat"],
            answer=lambda row: trimmed(str(row["Answer"])),
            solution=lambda row: (
                f"{trimmed(row['Equation'])} = {trimmed(str(row['Answer']))}. "
                f"The answer is {trimmed(str(row['Answer']))}."
            ),
            instruction=STATE_NUMBER,
            extract=extract_number,
            comparison="number",
            form=number_sentence,
            max_new_tokens=512,
            id_column="ID",
        ),
        multiple_choice(
            name="arc_challenge",
            dataset="allenai/ai2_arc",
            subset="ARC-Challenge",
            split="test",
            few_shot_split="train",
            question=lambda row: row["question"],
            options=labelled_options,
            letters="ABCDE",
            id_column="id",
        ),
        multiple_choice(
            name="commonsense_qa",
            dataset="tau/commonsense_qa",
            subset=None,
            split="validation",  # the test split has no answers
            few_shot_split="train",
            question=lambda row: row["question"],
            options=labelled_options,
            letters="ABCDE",
            id_column="id",
        ),
        Task(  # for the tiny pair, whose proxy was aligned to answer questions without an instruction
            name="tiny",
            dataset=None,
            subset=None,
            split="test",
            few_shot_split="train",
            question=lambda row: row["question"],
            answer=lambda row: str(row["answer"]),
            solution=lambda row: row["solution"],
            instruction="",
            extract=extract_tiny,
            form=lambda text, ended: extract_tiny(text, ended) is not None,
            max_new_tokens=48,
            lenient=extract_answer_lenient,
            generate=lambda split, count, seed: map(asdict, make_problems(split, count, seed)),
        ),
        Task(
            name="instructions",
            dataset=None,
            subset=None,
            split="test",
            few_shot_split=None,
            question=lambda row: row["prompt"],
            answer=lambda row: SEPARATOR.join(map(constraint_name, row["constraints"])),
            solution=lambda row: row.get("solution", ""),
            instruction="",
            check=lambda row, text: strict_and_loose(row["constraints"], text),
            max_new_tokens=512,
            read=read_instructions,
        ),
        Task(
            name="ifeval",
            dataset="google/IFEval",
            subset=None,
            split="train",  # its only split
            few_shot_split=None,
            question=lambda row: row["prompt"],
            answer=lambda row: SEPARATOR.join(ifeval_names(row)),
            solution=lambda row: "",
            instruction="",
            check=check_ifeval,
            max_new_tokens=1280,
            id_column="key",
        ),
        Task(
            name="cnn_dailymail",
            dataset="abisee/cnn_dailymail",
            subset="3.0.0",
            split="test",
            few_shot_split="train",
            question=lambda row: row["article"],
            answer=lambda row: row["highlights"],
            solution=lambda row: row["highlights"],
            instruction="Summarize this article in three sentences. Write the summary and nothing else.",
            max_new_tokens=256,
            id_column="id",
        ),
        Task(
            name="chat",
            dataset=None,
            subset=None,
            split="test",
            few_shot_split=None,
            question=lambda row: as_text(row["chat"]),
            answer=lambda row: row["reference"],
            solution=lambda row: row["reference"],
            instruction="",
            max_new_tokens=512,
            read=read_chats,
            chat=lambda row: row["chat"],
        ),
    )
}


def get_task(name: str) -> Task:
    """The task with this name.

    Raises:
        ValueError: for an unknown name.

    >>> get_task("gsm8k").dataset
    'openai/gsm8k'
    """
    if name not in TASKS:
        raise ValueError(unknown_name_message("task", name, TASKS))
    return TASKS[name]
