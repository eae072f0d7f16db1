"""The examples of a run: rows that were read, checked and tokenized. No row is truncated or dropped silently."""

import json
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import datasets

from . import AlignmentError
from .arguments import AlignmentArguments, log
from .chats import UnusableRow, unused_fields
from .checks import Pair
from .rows import SHOWN, Rows, excerpt, list_errors, read_rows
from .tokens import ChatTokenizer, Example


@dataclass(frozen=True)
class Examples:
    """The examples of a run.

    Attributes:
        train: the training examples, for the trainer of TRL.
        evaluation: the held-out examples; None if there is no evaluation.
        end_of_answer: the id that ends every answer.
        skipped: the number of skipped rows of both data sets, by reason.
    """

    train: datasets.Dataset
    evaluation: datasets.Dataset | None
    end_of_answer: int
    skipped: Mapping[str, int]


def load_examples(arguments: AlignmentArguments, pair: Pair, *, preferences: bool = False) -> Examples:
    """Load the data that the arguments name, for `SFTTrainer` or, with `preferences`, for `DPOTrainer`.

    The number of examples, the skipped rows with the reason, and the fields that are not used are printed.

    Raises:
        AlignmentError: lines are malformed (the message names them and the file), or no row is usable.
    """
    limits = [limit for limit in (arguments.max_length, pair.context_length) if limit is not None]
    chats = ChatTokenizer(pair.tokenizer, pair.vocabulary, min(limits, default=None))

    def read(*source: str | None) -> Rows:
        found = read_rows(*source)  # type: ignore[arg-type]
        report_unused_fields(found, pair.tokenizer.get_chat_template(), preferences=preferences)
        return found

    rows = read(arguments.data, arguments.data_config, arguments.data_split)
    held_out = None
    if arguments.eval_data is not None or arguments.eval_split is not None:
        data, split = arguments.eval_data or arguments.data, arguments.eval_split or arguments.data_split
        held_out = read(data, arguments.data_config if arguments.eval_data is None else None, split)
    elif arguments.eval_share:
        rows, held_out = rows.split(arguments.eval_share, arguments.seed)
    make = chats.preference if preferences else chats.examples
    store = chats.preference_dataset if preferences else datasets.Dataset.from_list
    train, row, skipped = make_examples(rows, make)
    evaluation = None
    if held_out is not None:
        measured, _, also_skipped = make_examples(held_out, make)
        evaluation, skipped = store(measured), skipped + also_skipped
    log(f"{len(train)} training examples, {len(evaluation or ())} held out.")
    return Examples(store(train), evaluation, chats.end_of_answer(row), skipped)


def report_unused_fields(rows: Rows, template: str, *, preferences: bool) -> None:
    """Print the fields that are not used, see `unused_fields`."""
    of_rows, of_messages = unused_fields(rows, template, preferences=preferences)
    if of_rows:
        log(f"Fields of {rows.name} that are not used: {', '.join(of_rows)}")
    if of_messages:
        log(f"Fields of messages in {rows.name} that the chat template does not use: {', '.join(of_messages)}")


def make_examples(
    rows: Rows, make: Callable[[Mapping[str, Any]], list[Example]]
) -> tuple[list[Example], Mapping[str, Any], Counter[str]]:
    """Make the examples of all rows, and print which rows were skipped.

    Returns:
        The examples, the first row that gave any, and the number of skipped rows by reason.

    Raises:
        AlignmentError: rows are malformed (the message names them), or every row was skipped.
    """
    examples: list[Example] = []
    errors: list[str] = []
    skipped: dict[str, list[int]] = defaultdict(list)
    first = None
    for number, content in zip(rows.numbers, rows.contents, strict=True):
        try:
            examples += make(content)
            first = first or content
        except UnusableRow as unusable:
            skipped[str(unusable)].append(number)
        except AlignmentError as error:
            start = excerpt(json.dumps(content, ensure_ascii=False, default=str))
            errors.append(f"{rows.unit} {number}: {error}: {start}")
    if errors:
        raise AlignmentError(list_errors(f"{rows.name} cannot be used, {len(errors)} {rows.unit}s are wrong", errors))
    for reason, numbers in skipped.items():
        shown = ", ".join(map(str, numbers[:SHOWN])) + (", ..." if len(numbers) > SHOWN else "")
        log(f"Skipped {len(numbers)} of {len(rows.numbers)} {rows.unit}s of {rows.name} {reason}: {shown}")
    if first is None:
        raise AlignmentError(f"Nothing is left of {rows.name}: all {len(rows.numbers)} {rows.unit}s were skipped.")
    return examples, first, Counter({reason: len(numbers) for reason, numbers in skipped.items()})
