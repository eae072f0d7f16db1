"""Options from dataclasses: help that keeps its lines, errors in one line."""

from dataclasses import dataclass, field

import pytest

from transformers_kad.recipes.command_line import parse_arguments


@dataclass
class Sizes:
    width: int = field(default=3, metadata={"help": "How wide."})
    name: str | None = field(default=None, metadata={"help": "Its name."})

    def __post_init__(self):
        if self.width < 1:
            raise ValueError(f"--width must be at least 1, got {self.width}.")


def test_options_become_dataclasses():
    (sizes,) = parse_arguments([Sizes], None, ["--width", "5"])
    assert sizes == Sizes(5)


def test_help_keeps_the_lines_of_the_description_and_names_defaults(capsys):
    with pytest.raises(SystemExit, match="0"):
        parse_arguments([Sizes], "What it does.\n\n    python it.py --width 3\n", ["--help"])
    out = capsys.readouterr().out
    assert "What it does.\n\n    python it.py --width 3\n" in out
    assert "How wide. (default: 3)" in out
    assert "Its name.\n" in out


@pytest.mark.parametrize(
    ("words", "message"), [(["--width", "0"], "got 0"), (["--width", "x"], "'x'"), (["--hight", "1"], "--hight")]
)
def test_errors_end_the_process_in_one_line(capsys, words, message):
    with pytest.raises(SystemExit, match="2"):
        parse_arguments([Sizes], None, words)
    assert message in capsys.readouterr().err.splitlines()[-1]
