"""The output folder of a run: whether the run may write to it or continue in it, its checkpoints and its record."""

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from accelerate import PartialState

from ...utils.files import write_whole
from ...utils.strict_json import parse_json_object
from ..record_fields import Shape, check_fields
from . import AlignmentError
from .arguments import AlignmentArguments

RECORD_NAME = "training.json"
CHECKPOINTS = "checkpoints"
# Arguments that may change when a run is continued.
FREE_ARGUMENTS = (
    *("output_dir", "resume_from_checkpoint", "push_to_hub", "hub_private", "report_to"),
    *("threshold", "license", "language"),
)


def read_record(output_dir: str | Path) -> dict[str, Any] | None:
    """Read `training.json` in a folder; None if there is none.

    Raises:
        AlignmentError: it is not the record of a run.
    """
    path = Path(output_dir) / RECORD_NAME
    return _read_object(path, {"finished": (bool,), "settings": {}}) if path.is_file() else None


def _read_object(path: Path, fields: Mapping[str, Shape]) -> dict[str, Any]:
    """Read a file with a JSON object that has some fields."""
    try:
        content = parse_json_object(path.read_bytes())
        check_fields(content, fields, "it")
    except ValueError as error:
        raise AlignmentError(f"{str(path)!r} can't be used: {error}") from error
    return content


def write_record(output_dir: str | Path, record: dict[str, Any]) -> None:
    """Write `training.json` atomically."""
    path = Path(output_dir) / RECORD_NAME
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(record, indent=2) + "\n")


def settings_of(arguments: AlignmentArguments) -> dict[str, Any]:
    """The settings that determine the result of a run."""
    settings = {key: value for key, value in asdict(arguments).items() if key not in FREE_ARGUMENTS}
    return {**settings, "world_size": PartialState().num_processes}


def check_output(arguments: AlignmentArguments) -> bool:
    """Check that a run may write to its output folder.

    Returns:
        Whether the same run has already finished there.

    Raises:
        AlignmentError: the folder holds other files, a run with other settings, or a run that was not asked to be
            continued.
    """
    folder = Path(arguments.output_dir)
    record = read_record(folder)
    if record is None:
        if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
            raise AlignmentError(
                f"--output_dir {arguments.output_dir!r} holds files that are not those of a run of this recipe. "
                "Choose another folder."
            )
        return False
    if arguments.resume_from_checkpoint is None:
        raise AlignmentError(
            f"--output_dir {arguments.output_dir!r} holds {'a result' if record['finished'] else 'an unfinished run'} "
            "already. Continue it by --resume_from_checkpoint, or choose another folder."
        )
    found, wanted = record["settings"], settings_of(arguments)
    listed = "; ".join(
        f"{key} was {found.get(key)!r} and is {wanted.get(key)!r}"
        for key in {**found, **wanted}
        if found.get(key) != wanted.get(key)
    )
    if listed:
        raise AlignmentError(
            f"The run in {arguments.output_dir!r} can't be continued with other settings ({listed}). Use the same "
            "settings, or choose another --output_dir."
        )
    return record["finished"]


def newest_checkpoint(checkpoints: str | Path) -> str | None:
    """The newest complete checkpoint in a folder; None if there is none.

    `Trainer` writes its state last, so an incomplete checkpoint has none.
    """
    found = [path.parent for path in Path(checkpoints).glob("checkpoint-*/trainer_state.json")]
    complete = [path for path in found if path.name.removeprefix("checkpoint-").isdecimal()]
    return str(max(complete, key=lambda path: int(path.name.split("-")[1]))) if complete else None


def checkpoint_to_resume(arguments: AlignmentArguments) -> str | None:
    """The checkpoint for `--resume_from_checkpoint`; None to start from the beginning.

    Raises:
        AlignmentError: the named folder is not a complete checkpoint, its state can't be read, or the best checkpoint
            so far is not found.
    """
    wanted = arguments.resume_from_checkpoint
    if wanted == "auto":
        wanted = newest_checkpoint(Path(arguments.output_dir) / CHECKPOINTS)
    if wanted is None:
        return None
    state = Path(wanted) / "trainer_state.json"
    if not state.is_file():
        raise AlignmentError(
            f"--resume_from_checkpoint {wanted!r} is not a complete checkpoint: it has no trainer_state.json."
        )
    best = _read_object(state, {"best_model_checkpoint": (str, type(None))})["best_model_checkpoint"]
    if best is not None and not Path(best).is_dir():
        raise AlignmentError(
            f"The best checkpoint so far, {best!r}, was not found. Continue in the working directory in which the run "
            "was started, with the same --output_dir."
        )
    return wanted


def delete_checkpoints(output_dir: str | Path) -> None:
    """Delete the checkpoints of a finished run."""
    shutil.rmtree(Path(output_dir) / CHECKPOINTS, ignore_errors=True)
