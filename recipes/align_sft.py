# /// script
# requires-python = ">=3.11"
# dependencies = ["transformers-kad[train]"]
# ///
"""Align a small proxy by supervised fine-tuning, so that it can guide a larger base of the same model family.

    python recipes/align_sft.py --proxy Qwen/Qwen3-0.6B-Base --base Qwen/Qwen3-8B-Base \
        --data chats.jsonl --output_dir my_proxy

On several GPUs: `torchrun --nproc_per_node 8 recipes/align_sft.py ...` or `accelerate launch`.

`chats.jsonl` has one example in each line: `{"messages": [{"role": "user", "content": "..."}, {"role": "assistant",
"content": "..."}]}`, or `{"prompt": "...", "completion": "..."}`. A Hub data set with these fields works as well. The
loss is on the assistant's turns only, formatted by the base's chat template; a turn with `"weight": 0` or `"train":
false` has no loss. `tools` and `chat_template_kwargs` of a line are passed to the template. Only a LoRA adapter is
trained (TRL's `SFTTrainer`, peft).

Before any weights are loaded, the recipe checks that the proxy can guide the base (both must have the same ids for the
same strings) and that every line is well formed. Examples that are too long are skipped, counted and reported; nothing
is truncated.

The output folder gets the adapter, the tokenizer with its chat template, `kad_config.json`, a model card and
`training.json`. The recipe prints Python code that uses them. `--resume_from_checkpoint` continues an interrupted run.
"""

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass

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
from transformers_kad.recipes.training.trainers import fit, sft_trainer


@dataclass(kw_only=True)
class SFTArguments(AlignmentArguments):
    """The arguments of supervised fine-tuning, which are those of every alignment recipe."""


def align(arguments: SFTArguments, command: list[str]) -> None:
    """Check the inputs, train, and publish the result."""
    with distributed_state(arguments.use_cpu).main_process_first():  # so that only the main process reports errors
        if check_output(arguments):
            log(f"The run in {arguments.output_dir} has already finished.")
            return
        check_upload(arguments)
        checkpoint = checkpoint_to_resume(arguments)
        pair = check_pair(arguments.base, arguments.proxy, arguments.chat_template)
        examples = load_examples(arguments, pair)
    trainer = sft_trainer(arguments, pair, examples)
    result = fit(trainer, arguments, checkpoint)
    method = "supervised fine-tuning on the assistant's turns, LoRA (TRL, peft)"
    publish(trainer, arguments, pair, examples, result, method=method, command=command)


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line and run."""
    argv = sys.argv[1:] if argv is None else argv
    (arguments,) = parse_arguments([SFTArguments], __doc__, argv)
    silence_training_libraries()
    try:
        align(arguments, [os.path.relpath(__file__), *argv])
    except AlignmentError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
