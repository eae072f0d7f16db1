# /// script
# requires-python = ">=3.11"
# dependencies = ["transformers-kad[eval,train]"]
# ///
"""Will this pair of base and proxy work? From 20 to 100 prompts of your own kind, without answers to compare with.

The tiny pair of this repository, on word problems, a minute on 2 CPU cores:

    python recipes/check_pair.py

A pair of your own, on a file with a prompt in each line, as text or as JSON ({"prompt": ...} or {"messages": [...]}):

    python recipes/check_pair.py --base BASE --proxy PROXY --prompts prompts.jsonl --output check --save_config start
    python recipes/generate.py --config start --prompt "Why is the sky blue?"

--prompts also takes a data set of the Hub with such rows; without it, 24 built-in questions are asked.

For every prompt, KAD, the base alone and the proxy alone write a text. Both models read the three texts, and every
rule is applied along KAD's. The output folder gets check.json (verdict, reasons, recommended rule and all figures),
check.md (the summary that is printed), check.png and check.svg, and texts.jsonl (the figures of every prompt), from
which the same command continues an interrupted check. The exit status is 0 whatever the verdict.
"""

import sys
from pathlib import Path

from transformers_kad.integrations.loading.messages import silence_libraries
from transformers_kad.recipes.arguments import ModelArguments
from transformers_kad.recipes.command_line import exit_status, parse_arguments
from transformers_kad.recipes.pair_check.arguments import CheckArguments
from transformers_kad.recipes.pair_check.session import check_pair

TINY_PAIR = Path(__file__).resolve().parent / "tiny_pair"


def main(argv: list[str] | None = None) -> int:
    """Parse the command line and run."""
    models, arguments = parse_arguments((ModelArguments, CheckArguments), __doc__, argv)
    silence_libraries()

    def run() -> None:
        check_pair(models, arguments, default_pair=TINY_PAIR)

    return exit_status(run)


if __name__ == "__main__":
    sys.exit(main())
