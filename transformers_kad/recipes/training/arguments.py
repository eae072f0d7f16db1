"""The command-line arguments of the alignment recipes."""

import sys
from dataclasses import dataclass, field
from typing import Literal

import datasets
import torch
from accelerate import PartialState
from transformers.utils import logging

from ...integrations.loading.messages import silence_libraries
from . import AlignmentError


@dataclass(kw_only=True)
class AlignmentArguments:
    """Arguments that `align_sft.py` and `align_dpo.py` share. `field.metadata["help"]` describes each of them.

    Raises:
        AlignmentError: a value is out of range, or two values contradict each other.
    """

    proxy: str = field(
        metadata={
            "metavar": "ID_OR_DIR",
            "help": "The small model to align: Hub id or folder of a model, or of an adapter to train further.",
        }
    )
    base: str = field(
        metadata={"metavar": "ID_OR_DIR", "help": "The large model that the proxy will guide: Hub id or folder."}
    )
    data: str = field(
        metadata={
            "metavar": "FILE_OR_HUB_ID",
            "help": "Training data: a JSON Lines file or the id of a Hub data set.",
        }
    )
    output_dir: str = field(
        metadata={"metavar": "DIR", "help": "Folder for the result: a new one, or that of a run to continue."}
    )

    data_config: str | None = field(default=None, metadata={"help": "Configuration (subset) of the Hub data set."})
    data_split: str = field(default="train", metadata={"help": "Split of the Hub data set to train on."})
    eval_data: str | None = field(
        default=None,
        metadata={
            "metavar": "FILE_OR_HUB_ID",
            "help": "Evaluation data, instead of a share of --data.",
        },
    )
    eval_split: str | None = field(default=None, metadata={"help": "Split of the Hub data set to evaluate on."})
    eval_share: float = field(
        default=0.05,
        metadata={"help": "Share of the data that is held out to evaluate the loss; 0: no evaluation."},
    )
    chat_template: str | None = field(
        default=None,
        metadata={
            "metavar": "FILE",
            "help": "Jinja file with the chat template. Default: that of the base, else that of the proxy.",
        },
    )
    max_length: int | None = field(
        default=None,
        metadata={"help": "Skip and count examples with more tokens. Default: the proxy's context length."},
    )

    epochs: float = field(default=1.0, metadata={"help": "Number of passes over the data."})
    max_steps: int = field(default=-1, metadata={"help": "Number of updates after which to stop; overrides --epochs."})
    learning_rate: float = field(default=2e-4, metadata={"help": "Peak learning rate of a cosine schedule."})
    warmup_ratio: float = field(
        default=0.03, metadata={"help": "Share of the run in which the learning rate rises from 0."}
    )
    batch_size: int = field(
        default=8, metadata={"help": "Examples in a batch of each process. Fewer need less memory."}
    )
    gradient_accumulation_steps: int = field(
        default=1, metadata={"help": "Number of batches whose gradients are added up for one update."}
    )
    eval_steps: float = field(
        default=0.1,
        metadata={"help": "Evaluate and save every so many updates; below 1: every such share of the run."},
    )
    early_stopping_patience: int = field(
        default=3,
        metadata={"help": "Stop after so many evaluations without a lower loss; 0: never. The best adapter is kept."},
    )

    lora_rank: int = field(default=16, metadata={"help": "Rank of the adapter. A higher rank can learn more."})
    lora_alpha: int = field(
        default=32, metadata={"help": "Scale of the adapter's output, which is multiplied by alpha / rank."}
    )
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout on the adapter's input."})
    train_embeddings: bool = field(
        default=False,
        metadata={
            "help": "Train the embeddings and the output layer as well, which is needed if the chat template has "
            "tokens that the proxy was never trained on. The adapter grows by their size."
        },
    )

    dtype: Literal["auto", "float32", "bfloat16"] = field(
        default="auto",
        metadata={
            "help": "dtype of the proxy's own weights; the adapter's are float32. auto: bfloat16 if the device "
            "supports it and no embeddings are trained, else float32."
        },
    )
    gradient_checkpointing: bool = field(
        default=False,
        metadata={"help": "Recompute activations instead of storing them: slower, but needs less memory."},
    )
    use_cpu: bool = field(default=False, metadata={"help": "Train on the CPU even if there is a GPU."})
    seed: int = field(
        default=0, metadata={"help": "Seed of the adapter's initial weights and of the order of the data."}
    )
    resume_from_checkpoint: str | None = field(
        default=None,
        metadata={
            "nargs": "?",
            "const": "auto",
            "metavar": "DIR",
            "help": "Continue the run in --output_dir from its newest complete checkpoint (from the start if there is "
            "none), or from the checkpoint folder given here.",
        },
    )
    report_to: str = field(
        default="none", metadata={"help": "Where training is logged: wandb, tensorboard, none, ..."}
    )
    threshold: float = field(
        default=0.4, metadata={"help": "Threshold of the dual rule that is written into kad_config.json."}
    )
    push_to_hub: str | None = field(
        default=None, metadata={"metavar": "REPO", "help": "Upload the result to this Hub repo."}
    )
    hub_private: bool = field(default=False, metadata={"help": "Make the repo private if it is new."})
    license: str | None = field(
        default=None, metadata={"help": "Licence of the adapter for the model card, for example apache-2.0."}
    )
    language: str | None = field(
        default=None, metadata={"help": "Languages of the data for the model card, for example en or en,fr."}
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
            raise AlignmentError(
                f"--eval_steps of 1 or more must be a whole number of updates, got {self.eval_steps}."
            )
        if not 0 < self.threshold <= 1:
            raise AlignmentError(f"--threshold must lie in (0, 1], got {self.threshold}.")
        if self.max_steps == 0 or self.max_steps < -1:
            raise AlignmentError(f"--max_steps must be positive, or -1 for no limit, got {self.max_steps}.")
        if self.max_length is not None and self.max_length < 2:
            raise AlignmentError(f"--max_length must be at least 2, got {self.max_length}.")
        if self.train_embeddings and self.dtype == "bfloat16":
            raise AlignmentError(
                "--train_embeddings needs weights in float32, since small updates are lost in bfloat16. Leave out "
                "--dtype bfloat16; computations use bfloat16 anyway if the device supports it."
            )


def distributed_state(use_cpu: bool) -> PartialState:
    """The state of this process and of the other processes of the run, on the CPU if there is no other device."""
    return PartialState(cpu=use_cpu or not torch.accelerator.is_available())


def log(message: str) -> None:
    """Print a message, in the main process only."""
    if PartialState().is_main_process:
        print(message, flush=True)


def silence_training_libraries() -> None:
    """Hide messages of the libraries, and their progress bars if standard error is not a terminal."""
    silence_libraries()
    logging.set_verbosity_error()
    datasets.utils.logging.set_verbosity_error()
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
