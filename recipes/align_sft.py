# /// script
# requires-python = ">=3.11"
# dependencies = ["transformers-kad[train]"]
# ///
"""Align a small proxy by supervised fine-tuning, so that it can guide a larger base of the same model family.

    python recipes/align_sft.py --proxy Qwen/Qwen3-0.6B-Base --base Qwen/Qwen3-8B-Base \
        --data chats.jsonl --output_dir my_proxy

On several GPUs by `torchrun --nproc_per_node 8 recipes/align_sft.py ...` or `accelerate launch`.

`chats.jsonl` has one example a line: `{"messages": [{"role": "user", "content": "..."}, {"role": "assistant",
"content": "..."}]}`, or `{"prompt": "...", "completion": "..."}`. A Hub data set with such fields does as well. The
loss is on the assistant's turns only, in the base's chat template; a turn with `"weight": 0` or `"train": false` has
none. `tools` and `chat_template_kwargs` of a line go to the template. Only a LoRA adapter is trained (TRL's
`SFTTrainer`, peft).

Before any weights are loaded it is checked that the proxy can serve the base (the same ids for the same strings) and
that every line can be used. What is too long is skipped, counted and reported; nothing is cut.

The output folder gets the adapter, the tokenizer with its chat template, `kad_config.json`, a model card and
`training.json`; the lines of Python that use them are printed. A run that was killed goes on with
`--resume_from_checkpoint`.
"""

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from transformers_kad.recipes.command_line import parse_arguments
from transformers_kad.recipes.training import AlignmentError
from transformers_kad.recipes.training.arguments import AlignmentArguments, hush, say, start_processes
from transformers_kad.recipes.training.checks import check_pair
from transformers_kad.recipes.training.data import load_examples
from transformers_kad.recipes.training.output import check_output, checkpoint_to_resume
from transformers_kad.recipes.training.publishing import check_upload, publish
from transformers_kad.recipes.training.trainers import fit, sft_trainer


@dataclass(kw_only=True)
class SFTArguments(AlignmentArguments):
    """Arguments of supervised fine-tuning: those that every alignment takes."""


def align(arguments: SFTArguments, command: list[str]) -> None:
    """Check, train, publish."""
    with start_processes(arguments.use_cpu).main_process_first():  # of several, the first finds what is wrong
        if check_output(arguments):
            say(f"The run in {arguments.output_dir} has finished already.")
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
    hush()
    try:
        align(arguments, [os.path.relpath(__file__), *argv])
    except AlignmentError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
