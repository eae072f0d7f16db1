"""What the command line of every alignment recipe takes."""

import sys
from dataclasses import dataclass, field
from typing import Literal

import datasets
import torch
from accelerate import PartialState
from transformers.utils import logging

from ...integrations.loading.messages import quieten
from . import AlignmentError


@dataclass(kw_only=True)
class AlignmentArguments:
    """Arguments that `align_sft.py` and `align_dpo.py` share. `field.metadata["help"]` says what each one means.

    Raises:
        AlignmentError: a value out of range, or two that contradict each other.
    """

    proxy: str = field(
        metadata={
            "metavar": "ID_OR_DIR",
            "help": "The small model to align: Hub id or folder of a model, or of an adapter to build on.",
        }
    )
    base: str = field(
        metadata={"metavar": "ID_OR_DIR", "help": "The large model that the proxy will guide: Hub id or folder."}
    )
    data: str = field(
        metadata={
            "metavar": "FILE_OR_HUB_ID",
            "help": "What to learn from: a JSON Lines file or the id of a Hub data set.",
        }
    )
    output_dir: str = field(
        metadata={"metavar": "DIR", "help": "Folder for the result: new, or that of a run to go on with."}
    )

    data_config: str | None = field(default=None, metadata={"help": "Configuration (subset) of the Hub data set."})
    data_split: str = field(default="train", metadata={"help": "Split of the Hub data set to learn from."})
    eval_data: str | None = field(
        default=None,
        metadata={
            "metavar": "FILE_OR_HUB_ID",
            "help": "What to measure the loss on, instead of a share of --data.",
        },
    )
    eval_split: str | None = field(default=None, metadata={"help": "Split of the Hub data set to measure on."})
    eval_share: float = field(
        default=0.05,
        metadata={"help": "Share of the data that is held out to measure the loss on; 0: none, nothing is measured."},
    )
    chat_template: str | None = field(
        default=None,
        metadata={
            "metavar": "FILE",
            "help": "Jinja file with the chat template. Default: the base's, else the proxy's.",
        },
    )
    max_length: int | None = field(
        default=None,
        metadata={"help": "Skip (and count) what is longer, in tokens. Default: the proxy's context length."},
    )

    epochs: float = field(default=1.0, metadata={"help": "How often the data is gone through."})
    max_steps: int = field(default=-1, metadata={"help": "Stop after so many updates, whatever --epochs says."})
    learning_rate: float = field(default=2e-4, metadata={"help": "Highest learning rate; it falls along a cosine."})
    warmup_ratio: float = field(
        default=0.03, metadata={"help": "Share of the run in which the learning rate rises from 0."}
    )
    batch_size: int = field(default=8, metadata={"help": "Examples at once in each process. Less needs less memory."})
    gradient_accumulation_steps: int = field(
        default=1, metadata={"help": "Batches that make one update, as if they were one large batch."}
    )
    eval_steps: float = field(
        default=0.1, metadata={"help": "Measure and save after so many updates; below 1: after this share of the run."}
    )
    early_stopping_patience: int = field(
        default=3,
        metadata={"help": "Stop after so many measurements without a lower loss; 0: never. The best one is kept."},
    )

    lora_rank: int = field(default=16, metadata={"help": "Rank of the adapter: higher can learn more."})
    lora_alpha: int = field(default=32, metadata={"help": "The adapter's output is scaled by alpha / rank."})
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout before the adapter."})
    train_embeddings: bool = field(
        default=False,
        metadata={
            "help": "Train embeddings and output layer as well: needed where the chat template has tokens that the "
            "proxy has never seen. The adapter grows by their size."
        },
    )

    dtype: Literal["auto", "float32", "bfloat16"] = field(
        default="auto",
        metadata={
            "help": "dtype of the proxy's own weights; the adapter's are float32. auto: bfloat16 where the device has "
            "it and no embeddings are trained, else float32."
        },
    )
    gradient_checkpointing: bool = field(
        default=False, metadata={"help": "Compute activations twice instead of keeping them: slower, less memory."}
    )
    use_cpu: bool = field(default=False, metadata={"help": "Train on the CPU even where there is a GPU."})
    seed: int = field(default=0, metadata={"help": "Seed of the adapter's first weights and of the data's order."})
    resume_from_checkpoint: str | None = field(
        default=None,
        metadata={
            "nargs": "?",
            "const": "auto",
            "metavar": "DIR",
            "help": "Go on with the run in --output_dir from its newest complete checkpoint (from the start if there "
            "is none), or from the checkpoint folder given here.",
        },
    )
    report_to: str = field(default="none", metadata={"help": "Where training is logged: wandb, tensorboard, none..."})
    threshold: float = field(
        default=0.4, metadata={"help": "Threshold of the dual rule that is written into kad_config.json."}
    )
    push_to_hub: str | None = field(
        default=None, metadata={"metavar": "REPO", "help": "Upload the result to this Hub repo."}
    )
    hub_private: bool = field(default=False, metadata={"help": "Make that repo private if it is new."})
    license: str | None = field(
        default=None, metadata={"help": "Licence of the adapter for the model card, say apache-2.0."}
    )
    language: str | None = field(
        default=None, metadata={"help": "Languages of the data for the model card, say en or en,fr."}
    )

    def __post_init__(self) -> None:
        smallest = {
            **dict.fromkeys(("batch_size", "gradient_accumulation_steps", "lora_rank", "lora_alpha"), 1),
            **dict.fromkeys(("early_stopping_patience", "warmup_ratio", "lora_dropout", "eval_share"), 0),
        }
        for name, least in smallest.items():
            if getattr(self, name) < least:
                raise AlignmentError(f"--{name} must be at least {least}, got {getattr(self, name)}.")
        for name in ("warmup_ratio", "lora_dropout", "eval_share"):
            if getattr(self, name) >= 1:
                raise AlignmentError(f"--{name} must be below 1, got {getattr(self, name)}.")
        for name in ("epochs", "learning_rate", "eval_steps"):
            if getattr(self, name) <= 0:
                raise AlignmentError(f"--{name} must be positive, got {getattr(self, name)}.")
        if self.eval_steps >= 1 and self.eval_steps != int(self.eval_steps):
            raise AlignmentError(f"--eval_steps from 1 on is a number of updates, got {self.eval_steps}.")
        if not 0 < self.threshold <= 1:
            raise AlignmentError(f"--threshold must lie in (0, 1], got {self.threshold}.")
        if self.max_steps == 0 or self.max_steps < -1:
            raise AlignmentError(f"--max_steps must be positive, or -1 for no limit, got {self.max_steps}.")
        if self.max_length is not None and self.max_length < 2:
            raise AlignmentError(f"--max_length must be at least 2, got {self.max_length}.")
        if self.train_embeddings and self.dtype == "bfloat16":
            raise AlignmentError(
                "--train_embeddings needs weights in float32, since small updates are lost in bfloat16. Leave out "
                "--dtype bfloat16; where the device has it, it is computed in."
            )


def start_processes(use_cpu: bool) -> PartialState:
    """Join the other processes of the run, if there are any; on the CPU where there is nothing else."""
    return PartialState(cpu=use_cpu or not torch.accelerator.is_available())


def say(message: str) -> None:
    """Print, in the first of several processes only."""
    if PartialState().is_main_process:
        print(message, flush=True)


def hush() -> None:
    """Leave out what the libraries print of themselves; progress bars only where somebody watches."""
    quieten()
    logging.set_verbosity_error()
    datasets.utils.logging.set_verbosity_error()
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
