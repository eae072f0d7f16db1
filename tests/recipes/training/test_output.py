"""The output folder of a run: what may be written to, what is continued, and from which checkpoint."""

import json
from pathlib import Path

import pytest

from transformers_kad.recipes.training import AlignmentError
from transformers_kad.recipes.training.arguments import AlignmentArguments
from transformers_kad.recipes.training.output import (
    check_output,
    checkpoint_to_resume,
    delete_checkpoints,
    newest_checkpoint,
    settings_of,
    write_record,
)


def arguments(folder, **settings):
    return AlignmentArguments(proxy="p", base="b", data="d", output_dir=str(folder), **settings)


def checkpoint(folder, step, best=None):
    path = folder / "checkpoints" / f"checkpoint-{step}"
    path.mkdir(parents=True)
    (path / "trainer_state.json").write_text(json.dumps({"best_model_checkpoint": best}))
    return str(path)


def test_a_new_folder_is_free_and_one_with_other_files_is_not(tmp_path):
    assert check_output(arguments(tmp_path / "new")) is False
    (tmp_path / "notes.txt").touch()
    with pytest.raises(AlignmentError, match="files that are not those of a run"):
        check_output(arguments(tmp_path))


@pytest.mark.parametrize("finished", [False, True])
def test_a_run_is_continued_only_if_asked_for_and_with_its_settings(tmp_path, finished):
    write_record(tmp_path, {"finished": finished, "settings": settings_of(arguments(tmp_path))})
    with pytest.raises(AlignmentError, match="a result" if finished else "an unfinished run"):
        check_output(arguments(tmp_path))
    again = {"resume_from_checkpoint": "auto"}
    assert check_output(arguments(tmp_path, **again, threshold=0.9)) is finished  # not a setting of the training
    with pytest.raises(AlignmentError, match=r"other settings \(seed was 0 and is 1\)"):
        check_output(arguments(tmp_path, **again, seed=1))


def test_the_newest_complete_checkpoint_is_found_by_its_number(tmp_path):
    assert newest_checkpoint(tmp_path / "checkpoints") is None
    checkpoint(tmp_path, 9)
    newest = checkpoint(tmp_path, 10)
    (tmp_path / "checkpoints" / "checkpoint-11").mkdir()  # without a state
    assert checkpoint_to_resume(arguments(tmp_path, resume_from_checkpoint="auto")) == newest
    assert checkpoint_to_resume(arguments(tmp_path)) is None
    delete_checkpoints(tmp_path)
    assert newest_checkpoint(tmp_path / "checkpoints") is None


def test_a_checkpoint_without_a_state_or_whose_best_one_is_missing_is_refused(tmp_path):
    with pytest.raises(AlignmentError, match="is not a complete checkpoint"):
        checkpoint_to_resume(arguments(tmp_path, resume_from_checkpoint=str(tmp_path)))
    path = checkpoint(tmp_path, 3, best=str(tmp_path / "gone"))
    with pytest.raises(AlignmentError, match="gone', was not found"):
        checkpoint_to_resume(arguments(tmp_path, resume_from_checkpoint=path))


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"finished": 1, "settings": {}}', '{"finished": true}', "\0", "[" * 5000]
)
def test_a_record_that_is_none_is_named(tmp_path, text):
    (tmp_path / "training.json").write_text(text)
    with pytest.raises(AlignmentError, match=r"training\.json' can't be used"):
        check_output(arguments(tmp_path, resume_from_checkpoint="auto"))


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"best_model_checkpoint": 5}'])
def test_a_state_that_is_none_is_named(tmp_path, text):
    (Path(checkpoint(tmp_path, 3)) / "trainer_state.json").write_text(text)
    with pytest.raises(AlignmentError, match=r"trainer_state\.json' can't be used"):
        checkpoint_to_resume(arguments(tmp_path, resume_from_checkpoint="auto"))


def test_a_folder_that_is_no_checkpoint_by_its_name_is_passed_over(tmp_path):
    newest = checkpoint(tmp_path, 3)
    (tmp_path / "checkpoints" / "checkpoint-backup").mkdir()
    (tmp_path / "checkpoints" / "checkpoint-backup" / "trainer_state.json").write_text("{}")
    assert newest_checkpoint(tmp_path / "checkpoints") == newest
