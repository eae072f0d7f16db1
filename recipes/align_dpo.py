# /// script
# requires-python = ">=3.11"
# dependencies = ["transformers-kad[train]"]
# ///
"""Align a small proxy with preferences (DPO), so that it can guide a larger base of the same model family.

    python recipes/align_dpo.py --proxy my_proxy --base Qwen/Qwen3-8B-Base \
        --data preferences.jsonl --output_dir my_better_proxy

On several GPUs: `torchrun --nproc_per_node 8 recipes/align_dpo.py ...` or `accelerate launch`.

`preferences.jsonl` has one pair of answers in each line: `{"prompt": "...", "chosen": "...", "rejected": "..."}`,
strings or lists of messages; `tools` and `chat_template_kwargs` are passed to the chat template. A Hub data set with
these fields works as well. Only a LoRA adapter is trained (TRL's `DPOTrainer`, peft); the proxy without it is the
reference. The proxy should be fine-tuned first (align_sft.py). It may be the adapter of that run, which is then merged
before the new adapter is added.

Before any weights are loaded, the recipe checks that the proxy can guide the base (both must have the same ids for the
same strings) and that every line is well formed. Examples that are too long are skipped, counted and reported; nothing
is truncated.

The output folder gets the adapter, the tokenizer with its chat template, `kad_config.json`, a model card and
`training.json`. The recipe prints Python code that uses them. `--resume_from_checkpoint` continues an interrupted run.
"""

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field

from transformers_kad.recipes.command_line import parse_arguments
from transformers_kad.recipes.training import AlignmentError
from transformers_kad.recipes.training.arguments import (
    AlignmentArguments,
    distributed_state,
    log,
    silence_training_libraries,
)
from transformers_kad.recipes.training.checks import check_pair
from transformers_kad.recipes.training.data import load_examples
from transformers_kad.recipes.training.output import check_output, checkpoint_to_resume
from transformers_kad.recipes.training.publishing import check_upload, publish
from transformers_kad.recipes.training.trainers import dpo_trainer, fit


@dataclass(kw_only=True)
class DPOArguments(AlignmentArguments):
    """The arguments of preference training."""

    learning_rate: float = field(default=1e-5, metadata={"help": "Peak learning rate of a cosine schedule."})
    beta: float = field(
        default=0.1, metadata={"help": "How strongly the trained proxy is kept close to the original one."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.beta <= 0:
            raise AlignmentError(f"--beta must be positive, got {self.beta}.")


def align(arguments: DPOArguments, command: list[str]) -> None:
    """Check the inputs, train, and publish the result."""
    with distributed_state(arguments.use_cpu).main_process_first():  # so that only the main process reports errors
        if check_output(arguments):
            log(f"The run in {arguments.output_dir} has already finished.")
            return
        check_upload(arguments)
        checkpoint = checkpoint_to_resume(arguments)
        pair = check_pair(arguments.base, arguments.proxy, arguments.chat_template)
        examples = load_examples(arguments, pair, preferences=True)
    trainer = dpo_trainer(arguments, pair, examples, arguments.beta)
    result = fit(trainer, arguments, checkpoint)
    method = f"direct preference optimisation with beta {arguments.beta:g}, LoRA (TRL, peft)"
    publish(trainer, arguments, pair, examples, result, method=method, command=command)


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line and run."""
    argv = sys.argv[1:] if argv is None else argv
    (arguments,) = parse_arguments([DPOArguments], __doc__, argv)
    silence_training_libraries()
    try:
        align(arguments, [os.path.relpath(__file__), *argv])
    except AlignmentError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
