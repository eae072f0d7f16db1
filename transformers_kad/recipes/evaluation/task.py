"""What a task is: its questions, how they are asked, and what counts as the answer."""

import hashlib
import random
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...integrations.loading.thoughts import without_thoughts
from .answers import Comparison, answers_match
from .number_answers import number_value
from .task_data import DatasetFiles, Row

GENERATED = 500  # the number of instances of a generated task without a limit
SEPARATOR = "\n"  # between the names of the constraints of a row


@dataclass(frozen=True)
class Instance:
    """One question of a task.

    Attributes:
        id: the id in the data set, or else a hash of question and answer. It is unique within a task and does not
            depend on the order of the rows.
        question: the whole turn of the user: question, options and instruction.
        answer: the right answer, in the form that the task's comparison takes.
        solution: an ideal answer, used as the assistant's turn of an example. The right answer can be extracted from
            it.
        chat: the turns of the prompt, if they are more than `question` as the user's only turn.
        row: the row of the data set, for tasks that check answers by a program.
    """

    id: str
    question: str
    answer: str
    solution: str
    chat: Sequence[Mapping[str, Any]] = ()
    row: Row = field(default_factory=dict, repr=False)


@dataclass(frozen=True, kw_only=True)
class Task:
    """The declaration of a task.

    Attributes:
        name: its key in `TASKS`.
        dataset: Hub id of the data set; None for a generated task.
        subset: configuration of the data set; None if it has only one.
        split: the split to evaluate.
        few_shot_split: the split to draw examples from; None if there is no other split than the evaluated one.
        question: `row -> question`, options included.
        answer: `row -> right answer`.
        solution: `row -> ideal answer`.
        instruction: the end of the user's turn, after an empty line; may be empty.
        extract: `(text, ended) -> prediction`, or None if there is no answer. `text` is the completion without its
            end-of-turn token, and `ended` whether it ended by itself. None for a task without right answers, and for
            one with `check`.
        comparison: how predictions are compared: :func:`~transformers_kad.recipes.evaluation.answers.answers_match`.
        max_new_tokens: the maximum length of a completion, in tokens.
        id_column: the column with the ids of the data set; None if it has none.
        lenient: a second, more lenient extraction, `text -> prediction`; None if the task has none.
        generate: `(split, count, seed) -> rows` of a generated task.
        read: `path -> rows` of a task whose rows are in the file of --prompts; the path is None without that option.
        chat: `row -> turns` of a task with prompts of several turns.
        check: `(row, text) -> (strict, loose)` of a task whose answers are checked by a program: for each constraint
            of the row, whether the text follows it.
        form: `(text, ended) -> whether` an answer has the form that the instruction asks for; None if the instruction
            does not ask for one.
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
    max_new_tokens: int
    extract: Callable[[str, bool], str | None] | None = None
    comparison: Comparison = "text"
    id_column: str | None = None
    lenient: Callable[[str], str | None] | None = None
    generate: Callable[[str, int, int], Iterable[Row]] | None = None
    read: Callable[[str | None], Sequence[Row]] | None = None
    chat: Callable[[Row], Sequence[Mapping[str, Any]]] | None = None
    check: Callable[[Row, str], tuple[Sequence[bool], Sequence[bool]]] | None = None
    form: Callable[[str, bool], bool] | None = None

    @property
    def has_right_answers(self) -> bool:
        """Whether an answer can be right or wrong. Other tasks are open-ended, and have no accuracy."""
        return self.extract is not None or self.check is not None

    def load(
        self,
        *,
        data_dir: str | Path | None = None,
        prompts: str | None = None,
        split: str | None = None,
        limit: int | None = None,
        seed: int = 0,
    ) -> list[Instance]:
        """Load the instances, in the order of the data set.

        Args:
            data_dir: a folder with local copies of data sets, each in a folder named by its Hub id (`openai/gsm8k`) or
                by the last part of it (`gsm8k`); or a copy of this data set, as on the Hub
                (`main/test-00000-of-00001.parquet`) or a part of it (`test.jsonl`, `gsm8k_test.jsonl`); or one file
                with the rows of the split. Changed files are read again. Default: the Hub, or its cache. Generated
                tasks ignore it.
            prompts: the file with the rows of a task that reads them from one.
            split: the split. Default: the task's own.
            limit: load only the first `limit` rows. A generated task makes as many instances, by default 500.
            seed: seed of a generated task.

        Raises:
            FileNotFoundError: the data was not found; the message says how to get it.
            ValueError: the data set has no such split, or its rows have another layout or no answers.
            ImportError: the package datasets is not installed.
        """
        if limit is not None and (not isinstance(limit, int) or limit < 1):
            raise ValueError(f"`limit` must be an integer >= 1 or None, got {limit!r}.")
        split = split or self.split
        if self.generate is not None:
            source = f"the task {self.name!r}"
            rows = self.generate(split, GENERATED if limit is None else limit, seed)
        elif self.read is not None:
            source = "--prompts" if prompts is None else repr(prompts)
            rows = self.read(prompts)[:limit]
        else:
            files = DatasetFiles(self.name, str(self.dataset), self.subset, split)
            source = files.source
            rows = files.local_rows(Path(data_dir), limit) if data_dir else files.hub_rows(limit)
        seen: Counter[str] = Counter()
        return [self._instance(row, number, source, seen) for number, row in enumerate(rows, 1)]

    def _instance(self, row: Row, number: int, source: str, seen: Counter[str]) -> Instance:
        try:
            question, answer, solution = self.question(row), self.answer(row), self.solution(row)
            identity = None if self.id_column is None else str(row[self.id_column])
            chat = () if self.chat is None else self.chat(row)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"Row {number} of {source} does not have the layout that the task {self.name!r} expects ({error!r}); "
                f"its columns are {', '.join(row)}."
            ) from error
        except ValueError as error:
            raise ValueError(f"Row {number} of {source}: {error}") from error
        for name, value in (("question", question), ("answer", answer), ("solution", solution)):
            if not isinstance(value, str):
                raise ValueError(f"Row {number} of {source} has the {name} {value!r:.80}, which is not text.")
        if not question.strip():
            raise ValueError(f"Row {number} of {source} has no question.")
        if (self.has_right_answers and not answer) or (self.comparison == "number" and number_value(answer) is None):
            raise ValueError(f"Row {number} of {source} has no answer that can be compared: {answer!r}.")
        if identity is None:
            identity = hashlib.sha256(f"{question}\n{answer}".encode()).hexdigest()[:12]
        seen[identity] += 1
        if seen[identity] > 1:  # the data set has the same question twice
            identity = f"{identity}-{seen[identity]}"
        asked = f"{question}\n\n{self.instruction}".rstrip()
        return Instance(identity, asked, answer, solution, chat, {} if self.check is None else row)

    def messages(self, instance: Instance, examples: Sequence[Instance] = ()) -> list[Mapping[str, Any]]:
        """The chat of a question: the examples as earlier turns, followed by the question.

        Raises:
            ValueError: one of the examples is the question itself.
        """
        chat: list[Mapping[str, Any]] = []
        for example in examples:
            if example.question == instance.question:
                raise ValueError(f"The example {example.id!r} of the task {self.name!r} is the question itself.")
            chat += [
                {"role": "user", "content": example.question},
                {"role": "assistant", "content": example.solution},
            ]
        return [*chat, *(instance.chat or [{"role": "user", "content": instance.question}])]

    def few_shot_examples(
        self, count: int, *, data_dir: str | Path | None = None, split: str | None = None, seed: int = 0
    ) -> list[Instance]:
        """Draw examples for :meth:`messages` from `few_shot_split`, the same ones for every question.

        Questions of the evaluated split are never drawn. The draw does not depend on the order of the rows.

        Args:
            count: the number of examples.
            data_dir: as for :meth:`load`.
            split: the evaluated split. Default: the task's own.
            seed: seed of the draw.

        Raises:
            ValueError: there is no split to draw examples from, or it has too few.
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
        """Whether a prediction of `extract` or `lenient` is the same as the instance's answer."""
        return answers_match(prediction, instance.answer, self.comparison)

    def score(self, instance: Instance, text: str | None, ended: bool) -> dict[str, Any]:
        """What an answer is worth, as fields of its record.

        Args:
            instance: the question.
            text: the answer; None if it failed, which is wrong.
            ended: whether it ended by itself.
        """
        scores: dict[str, Any] = {"prediction": None, "answer": instance.answer, "correct": None}
        if self.check is not None:
            answer = None if text is None else without_thoughts(text)
            names = instance.answer.split(SEPARATOR)
            wrong = [False] * len(names)
            strict, loose = (wrong, wrong) if answer is None else self.check(instance.row, answer)
            followed = SEPARATOR.join(name for name, holds in zip(names, strict, strict=True) if holds)
            scores |= {"prediction": followed or None, "correct": all(strict), "correct_lenient": all(loose)}
            scores |= {"followed": list(strict), "followed_lenient": list(loose)}
        elif self.extract is not None:
            prediction = None if text is None else self.extract(text, ended)
            scores |= {"prediction": prediction, "correct": self.is_correct(prediction, instance)}
            if self.lenient is not None:
                lenient = None if text is None else self.lenient(text)
                scores["correct_lenient"] = self.is_correct(lenient, instance)
        return scores
