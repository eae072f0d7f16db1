"""The command-line arguments of the check."""

from dataclasses import dataclass, field
from pathlib import Path

from ...rules.registry import RULES
from ..arguments import TemplateArguments
from ..evaluation.methods import PARAMETER_GRID, Method, parse_methods

THRESHOLDS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)  # among which a start is recommended
# Rules that need the proxy before its alignment are left out.
GRID = tuple(word for word in PARAMETER_GRID if not word.startswith("implicit-reward"))


@dataclass
class CheckArguments(TemplateArguments):
    """The prompts, the texts and the rules of the check.

    Raises:
        ValueError: a value is out of range, or a method can't be checked.
    """

    prompts: str | None = field(
        default=None,
        metadata={
            "help": "Prompts: a file (one in each line, as text or as JSON with prompt or messages), a data set of "
            "the Hub, or a folder that load_dataset reads. Default: built-in questions."
        },
    )
    split: str = field(default="train", metadata={"help": "Split of a data set."})
    data_config: str | None = field(default=None, metadata={"help": "Configuration of a data set."})
    limit: int = field(default=50, metadata={"help": "Use only the first prompts, at most this many."})
    output: Path = field(
        default=Path("kad_check"), metadata={"help": "Folder for the results, and to continue an interrupted check."}
    )
    save_config: Path | None = field(
        default=None, metadata={"help": "Folder for a kad_config.json with the recommended rule."}
    )
    pair: Path | None = field(
        default=None,
        metadata={"help": "Folder with base/ and proxy/ in it, used without --base and --proxy. Default: tiny_pair/."},
    )
    method: list[str] = field(
        default_factory=lambda: list(GRID),
        metadata={"help": "Rules with their parameters, in the words of run_eval.py, beside the dual rule's."},
    )
    num_assistant_tokens: int = field(default=5, metadata={"help": "Draft length of the expected speed."})
    max_new_tokens: int = field(default=128, metadata={"help": "Maximum length of a text, in tokens."})
    seed: int = field(default=0, metadata={"help": "Seed of the sampling, from which every prompt derives its own."})

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("limit", "num_assistant_tokens", "max_new_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} must be at least 1, got {getattr(self, name)}.")
        for name in ("output", "save_config"):
            path = getattr(self, name)
            if path is not None and path.is_file():
                raise ValueError(f"--{name} must be a folder, got the file {str(path)!r}.")
        self.methods()

    def methods(self) -> list[Method]:
        """The dual rule at every threshold that may be recommended, and the methods of --method."""
        thresholds = ",".join(map(str, THRESHOLDS))
        methods = parse_methods([f"kad-dual:threshold={thresholds}", *self.method])
        for method in methods:
            if method.config is None or RULES[method.config.rule].needs_reference:
                raise ValueError(
                    f"--method takes rules that need base and proxy alone, got {method.name!r}. Leave it out."
                )
        return methods
