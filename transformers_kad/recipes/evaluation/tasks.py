"""Tasks: which questions, how they are asked, what counts as the answer. One declaration each, in `TASKS`.

The rows come from the Hub (`datasets.load_dataset`) or from a local copy of the same files (`data_dir`). The prompts
are zero-shot chain of thought: one user's turn, which asks to reason step by step and says in which form to answer.
Chats are lists of messages here; the model's own chat template makes them into text when they are encoded.

To add a task, add a declaration to `TASKS` and a row to the table in `tests/recipes/evaluation/test_tasks.py`.
"""

import hashlib
import random
import re
import string
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from ...rules.composition import unknown_name_message
from ..word_problems import EOS, extract_answer, extract_answer_lenient, make_problems
from .answers import REASON, Comparison, answers_match, extract_math, extract_number, extract_option, number_value

Row = Mapping[str, Any]

GENERATED = 500  # instances of a generated task, where no limit says otherwise


@dataclass(frozen=True)
class Instance:
    """One question of a task.

    Attributes:
        id: the set's own id, or else a hash of question and answer. Unique in a task, and the same wherever the row
            stands.
        question: the user's turn, whole: question, options, instruction.
        answer: the right answer in the form that the task's comparison takes.
        solution: what an ideal assistant would write, as the assistant's turn of an example; the answer can be
            extracted from it.
    """

    id: str
    question: str
    answer: str
    solution: str


@dataclass(frozen=True, kw_only=True)
class Task:
    """A declaration of a task.

    Attributes:
        name: its key in `TASKS`.
        dataset: Hub id of the data set; None for a task that is generated here.
        subset: the set's configuration, None where it has only one.
        split: the split that is evaluated.
        few_shot_split: the split that examples are drawn from; None where there is no other split than the evaluated.
        question: the question of a row, options included.
        answer: the right answer of a row.
        solution: the ideal assistant's turn for a row.
        instruction: what the user's turn ends with, after a blank line; may be empty.
        extract: `(text, ended) -> prediction`. `text` is the completion without its end-of-turn token, `ended` says
            whether it ended by itself; None where there is no answer.
        comparison: how predictions are compared: :func:`~transformers_kad.recipes.evaluation.answers.answers_match`.
        max_new_tokens: the longest completion, in tokens.
        id_column: the column with the set's own ids, if there is one.
        lenient: a second, more forgiving extraction, `text -> prediction`; None where there is none.
        generate: `(split, count, seed) -> rows` of a generated task.
    """

    name: str
    dataset: str | None
    subset: str | None
    split: str
    few_shot_split: str | None
    question: Callable[[Row], str]
    answer: Callable[[Row], str]
    solution: Callable[[Row], str]
    instruction: str
    extract: Callable[[str, bool], str | None]
    comparison: Comparison
    max_new_tokens: int
    id_column: str | None = None
    lenient: Callable[[str], str | None] | None = None
    generate: Callable[[str, int, int], Iterable[Row]] | None = None

    def load(
        self,
        *,
        data_dir: str | Path | None = None,
        split: str | None = None,
        limit: int | None = None,
        seed: int = 0,
    ) -> list[Instance]:
        """The instances, in the set's order.

        Args:
            data_dir: a folder with local copies of data sets, each in the folder of its Hub id (`openai/gsm8k`) or of
                its name (`gsm8k`); or the copy of this one set, as on the Hub (`main/test-00000-of-00001.parquet`)
                or any part of it (`test.jsonl`, `gsm8k_test.jsonl`); or one file with the rows, which is taken for
                the split. Files that have changed are read anew. Default: the Hub, or its cache. Generated tasks need
                none.
            split: instead of the task's own.
            limit: only the first `limit` rows. A generated task makes that many, by default 500.
            seed: of a generated task.

        Raises:
            FileNotFoundError: the data cannot be had; the message says how to get it.
            ValueError: the set has no such split, or its rows are laid out differently or have no answers.
            ImportError: the package datasets is not installed.
        """
        if limit is not None and (not isinstance(limit, int) or limit < 1):
            raise ValueError(f"`limit` must be an integer >= 1 or None, got {limit!r}.")
        split = split or self.split
        if self.generate is not None:
            source = f"the task {self.name!r}"
            rows = self.generate(split, GENERATED if limit is None else limit, seed)
        else:
            source = self._source(split)
            rows = self._local_rows(Path(data_dir), split, limit) if data_dir else self._hub_rows(split, limit)
        seen: Counter[str] = Counter()
        return [self._instance(row, number, source, seen) for number, row in enumerate(rows, 1)]

    def _instance(self, row: Row, number: int, source: str, seen: Counter[str]) -> Instance:
        try:
            question, answer, solution = self.question(row), self.answer(row), self.solution(row)
            identity = None if self.id_column is None else str(row[self.id_column])
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"Row {number} of {source} is not laid out as the task {self.name!r} expects ({error!r}); its columns "
                f"are {', '.join(row)}."
            ) from error
        except ValueError as error:
            raise ValueError(f"Row {number} of {source}: {error}") from error
        if not answer or (self.comparison == "number" and number_value(answer) is None):
            raise ValueError(f"Row {number} of {source} has no answer that can be compared: {answer!r}.")
        if identity is None:
            identity = hashlib.sha256(f"{question}\n{answer}".encode()).hexdigest()[:12]
        seen[identity] += 1
        if seen[identity] > 1:  # the very same question stands there twice
            identity = f"{identity}-{seen[identity]}"
        return Instance(identity, f"{question}\n\n{self.instruction}".rstrip(), answer, solution)

    def messages(self, instance: Instance, examples: Sequence[Instance] = ()) -> list[dict[str, str]]:
        """The chat that asks a question: the examples as earlier turns, then the question.

        Raises:
            ValueError: one of the examples is the question itself.
        """
        chat = []
        for example in examples:
            if example.question == instance.question:
                raise ValueError(f"The example {example.id!r} of the task {self.name!r} is the question itself.")
            chat += [
                {"role": "user", "content": example.question},
                {"role": "assistant", "content": example.solution},
            ]
        return [*chat, {"role": "user", "content": instance.question}]

    def few_shot_examples(
        self, count: int, *, data_dir: str | Path | None = None, split: str | None = None, seed: int = 0
    ) -> list[Instance]:
        """Examples for :meth:`messages`: the same for every question, drawn from `few_shot_split` with a seed.

        A question that the evaluated split has as well is never drawn. The draw does not depend on the order of rows.

        Args:
            count: how many.
            data_dir: as for :meth:`load`.
            split: the evaluated split, if it is not the task's own.
            seed: of the draw.

        Raises:
            ValueError: there is no split for examples, or too few of them.
        """
        if not isinstance(count, int) or count < 0:
            raise ValueError(f"The number of examples must be an integer >= 0, got {count!r}.")
        if count == 0:
            return []
        split = split or self.split
        if self.few_shot_split in (None, split):
            raise ValueError(
                f"{count} examples were asked for, but the task {self.name!r} has no split but the evaluated one "
                f"({split!r}) to draw them from: use 0."
            )
        if data_dir is not None and self.generate is None and Path(data_dir).expanduser().is_file():
            raise ValueError(
                f"{count} examples were asked for, but {str(data_dir)!r} is one file, the evaluated split. Pass a "
                f"folder that holds the split {self.few_shot_split!r} as well."
            )
        asked = {instance.question for instance in self.load(data_dir=data_dir, split=split)}
        candidates = self.load(data_dir=data_dir, split=self.few_shot_split)
        candidates = sorted((one for one in candidates if one.question not in asked), key=lambda one: one.id)
        if count > len(candidates):
            raise ValueError(
                f"{count} examples were asked for, but the task {self.name!r} has {len(candidates)} (split "
                f"{self.few_shot_split!r})."
            )
        return random.Random(f"examples {self.name} {seed}").sample(candidates, count)

    def is_correct(self, prediction: str | None, instance: Instance) -> bool:
        """Whether a prediction of `extract` or `lenient` says the same as the instance's answer."""
        return answers_match(prediction, instance.answer, self.comparison)

    # --- Where the rows come from ---

    def _source(self, split: str) -> str:
        return f"{self.dataset} ({f'{self.subset}, ' if self.subset else ''}{split})"

    def _how_to_get(self, folder: str | Path, split: str) -> str:
        return (
            "--data_dir takes a file with the rows of the split, or a folder that holds "
            f"{self.subset or 'data'}/{split}-*.parquet, {split}.jsonl or {self.name}_{split}.jsonl (any of "
            f"{', '.join(_READERS)}). Where the Hub can be reached: hf download --repo-type dataset {self.dataset} "
            f"--local-dir {folder}/{self.dataset}; then pass --data_dir {folder}."
        )

    def _hub_rows(self, split: str, limit: int | None) -> Iterable[Row]:
        load_dataset = _load_dataset()
        try:
            rows = load_dataset(self.dataset, name=self.subset, split=split)
        except OSError as error:
            raise FileNotFoundError(
                f"Could not load {self._source(split)}: {error}. {self._how_to_get('DIR', split)}"
            ) from error
        except ValueError as error:  # no such split, or a cache that holds another configuration
            raise ValueError(
                f"Could not load {self._source(split)}: {error}. {self._how_to_get('DIR', split)}"
            ) from error
        return rows.select(range(min(limit or len(rows), len(rows))))

    def _local_rows(self, data_dir: Path, split: str, limit: int | None) -> list[Row]:
        """The rows of the file that `data_dir` names, or of the files of the split in that folder."""
        given, source = data_dir.expanduser(), self._source(split)
        if given.is_file():
            folder, files = given, [given]
        else:
            below = (given / str(self.dataset), given / str(self.dataset).rpartition("/")[2])
            folder = next((place for place in below if place.is_dir()), given)
            files = self._split_files(folder, split)
        loaded: dict[str, Any]
        if files:
            if files[0].suffix not in _READERS:
                raise ValueError(f"Rows are read from files that end in {', '.join(_READERS)}, got {str(given)!r}.")
            names = {"rows": [str(file) for file in files]}
            loaded = {"path": _READERS[files[0].suffix], "data_files": names, "split": "rows"}
        elif (folder / "README.md").is_file():  # whose `configs:` say where files of other names lie
            loaded = {"path": str(folder), "name": self.subset, "split": split}
        else:
            raise FileNotFoundError(f"There is no {source} in {str(data_dir)!r}. {self._how_to_get(data_dir, split)}")
        load_dataset = _load_dataset()
        # Streamed, and with a cache of its own: datasets serves stale rows of a local file that has changed.
        with TemporaryDirectory() as cache:
            try:
                return list(islice(load_dataset(**loaded, streaming=True, cache_dir=cache), limit))
            except FileNotFoundError as error:
                raise FileNotFoundError(
                    f"Could not load {source} from {folder}: {error}. {self._how_to_get(data_dir, split)}"
                ) from error
            except Exception as error:  # whatever its readers raise on a file that is none of theirs
                advice = "" if files else f" {self._how_to_get(data_dir, split)}"
                raise ValueError(f"Could not load {source} from {folder}: {error}{advice}") from error

    def _split_files(self, folder: Path, split: str) -> list[Path]:
        """The files of a split by their names, in the subset's folder, in data/ or in the folder itself; or none.

        Raises:
            ValueError: files of two kinds, or a part of one that is missing.
        """
        name = re.compile(rf"(?:{re.escape(self.name)}[_-])?{re.escape(split)}(?:-\d+-of-(\d+)(?:-\w+)?)?")
        for place in (self.subset, "data", "."):
            found = sorted((folder / place).glob("*")) if place else []
            files = [file for file in found if file.suffix in _READERS and name.fullmatch(file.stem)]
            if files:
                counts = {(file.suffix, int(name.fullmatch(file.stem)[1] or 1)) for file in files}  # type: ignore[index]
                if len(counts) > 1 or len(files) != next(iter(counts))[1]:
                    raise ValueError(
                        f"{self._source(split)} must be one file, or all parts of one file, got "
                        f"{', '.join(file.name for file in files)} in {str(files[0].parent)!r}. Add what is missing, "
                        "remove what does not belong to it, or pass the right file itself as --data_dir."
                    )
                return files
        return []


# Names of the readers of datasets by the ends of files that they read.
_READERS = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".csv": "csv", ".arrow": "arrow"}


def _load_dataset() -> Callable[..., Any]:
    try:
        from datasets import load_dataset  # noqa: PLC0415
    except ImportError as error:
        raise ImportError('Loading a data set needs datasets: pip install "transformers-kad[eval]"') from error
    return load_dataset


# --- The declarations ---------------------------------------------------------------------------------------

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
    """A task whose questions have options: "(A) one", "(B) two", a line each.

    Args:
        letters: of the options, as many as a question has at most.
        options: the options of a row, and the index of the right one; a ValueError where none is known to be right.
        declaration: the other attributes of the `Task`; `question` is the question without options.
    """
    ask = declaration.pop("question")

    def lettered(row: Row) -> tuple[list[tuple[str, str]], str]:
        texts, right = options(row)
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
        comparison="text",
        max_new_tokens=512,
        **declaration,
    )


def labelled_options(row: Row) -> tuple[Sequence[str], int]:
    """Options in the layout of ARC and CommonsenseQA, where labels are "A" to "E", or "1" to "4"."""
    labels = list(row["choices"]["label"])
    if row["answerKey"] not in labels:
        raise ValueError(f"the right option {row['answerKey']!r} is none of {labels}; not every split has answers.")
    return row["choices"]["text"], labels.index(row["answerKey"])


def mixed_options(row: Row) -> tuple[Sequence[str], int]:
    """Options in the layout of TruthfulQA's MC1, where the right one stands first: in an order made of a hash."""
    targets = row["mc1_targets"]

    def position(index: int) -> str:
        return hashlib.sha256(f"{row['question']}\n{targets['choices'][index]}".encode()).hexdigest()

    order = sorted(range(len(targets["choices"])), key=position)
    return [targets["choices"][index] for index in order], order.index(list(targets["labels"]).index(1))


def without_annotations(answer: str) -> str:
    """A worked solution of GSM8K without its calculator's annotations (<<48/2=24>>) and its last line (#### 24)."""
    return re.sub(r"<<.*?>>", "", answer).rpartition("####")[0].strip()


def trimmed(numbers: str) -> str:
    """Numbers of SVAMP as people write them: "( 8.0 - 3.0 )" is "( 8 - 3 )"."""
    return re.sub(r"(?<=\d)\.0+(?!\d)", "", numbers)


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
        Task(  # the tiny pair's: no instruction, its proxy was aligned to answer the bare question
            name="tiny",
            dataset=None,
            subset=None,
            split="test",
            few_shot_split="train",
            question=lambda row: row["question"],
            answer=lambda row: str(row["answer"]),
            solution=lambda row: row["solution"],
            instruction="",
            extract=lambda text, ended: extract_answer(text + EOS if ended else text),
            comparison="text",
            max_new_tokens=48,
            lenient=extract_answer_lenient,
            generate=lambda split, count, seed: map(asdict, make_problems(split, count, seed)),
        ),
    )
}


def get_task(name: str) -> Task:
    """The task of that name.

    Raises:
        ValueError: for an unknown name.

    >>> get_task("gsm8k").dataset
    'openai/gsm8k'
    """
    if name not in TASKS:
        raise ValueError(unknown_name_message("task", name, TASKS))
    return TASKS[name]
