"""The trainers of TRL: their settings from the arguments of a recipe, their progress reports, and the training."""

import inspect
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
from accelerate import PartialState
from peft import LoraConfig
from transformers import (
    EarlyStoppingCallback,
    PreTrainedModel,
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.utils import is_torch_bf16_gpu_available
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from ...integrations.loading.models import load_merged
from ...models.model_settings import text_setting
from ..progress import Progress
from . import AlignmentError
from .arguments import AlignmentArguments, log
from .checks import Pair
from .data import Examples
from .output import CHECKPOINTS, settings_of, write_record

# Computing activations again instead of keeping them; older versions of transformers have the second name.
_HAS_NEW_NAME = "activation_checkpointing" in inspect.signature(TrainingArguments).parameters
CHECKPOINTING = "activation_checkpointing" if _HAS_NEW_NAME else "gradient_checkpointing"


def sft_trainer(arguments: AlignmentArguments, pair: Pair, examples: Examples) -> SFTTrainer:
    """A trainer for supervised fine-tuning of a LoRA adapter on the proxy, with the labels of the examples.

    The examples are already tokenized, so TRL neither applies the chat template nor truncates.
    """
    settings = SFTConfig(**training_settings(arguments, examples.evaluation), packing=False)
    return SFTTrainer(**_trainer_arguments(arguments, settings, pair, examples))


def dpo_trainer(arguments: AlignmentArguments, pair: Pair, examples: Examples, beta: float) -> DPOTrainer:
    """A trainer for direct preference optimisation of a LoRA adapter. The reference is the proxy without the adapter.

    Args:
        arguments: the arguments of the recipe.
        pair: the checked base and proxy.
        examples: pairs of answers, as messages.
        beta: how strongly the trained proxy is kept close to the original one.
    """
    settings = DPOConfig(**training_settings(arguments, examples.evaluation), beta=beta)
    return DPOTrainer(**_trainer_arguments(arguments, settings, pair, examples))


def training_settings(arguments: AlignmentArguments, evaluation: datasets.Dataset | None) -> dict[str, Any]:
    """The arguments of `SFTConfig` and `DPOConfig` that differ from their defaults, or must not change with them."""
    measured = evaluation is not None
    return {
        "output_dir": str(Path(arguments.output_dir) / CHECKPOINTS),
        "num_train_epochs": arguments.epochs,
        "max_steps": arguments.max_steps,
        "per_device_train_batch_size": arguments.batch_size,
        "per_device_eval_batch_size": arguments.batch_size,
        "gradient_accumulation_steps": arguments.gradient_accumulation_steps,
        "learning_rate": arguments.learning_rate,
        "lr_scheduler_type": "cosine",
        "warmup_steps": arguments.warmup_ratio,
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "max_length": None,  # lengths were checked, so nothing is truncated
        "eval_strategy": "steps" if measured else "no",
        "eval_steps": arguments.eval_steps,
        "save_strategy": "steps",
        "save_steps": arguments.eval_steps,
        "save_total_limit": 2,
        "load_best_model_at_end": measured,
        "metric_for_best_model": "eval_loss" if measured else None,
        "greater_is_better": False if measured else None,
        "restore_callback_states_from_checkpoint": True,  # includes the patience of early stopping
        "logging_steps": arguments.eval_steps,
        "report_to": arguments.report_to,
        "disable_tqdm": not sys.stderr.isatty(),
        # By default TRL computes in bfloat16 and recomputes activations on the CPU as well.
        "bf16": has_bfloat16(arguments) and arguments.dtype != "float32",
        CHECKPOINTING: arguments.gradient_checkpointing,
        f"{CHECKPOINTING}_kwargs": {"use_reentrant": False},
        "ddp_find_unused_parameters": False,
        "use_cpu": on_cpu(arguments),
        "seed": arguments.seed,
        "data_seed": arguments.seed,
    }


def on_cpu(arguments: AlignmentArguments) -> bool:
    """Whether the run uses the CPU, by choice or because there is no other device."""
    return arguments.use_cpu or PartialState().device.type == "cpu"


def has_bfloat16(arguments: AlignmentArguments) -> bool:
    """Whether to compute in bfloat16 by default: never on the CPU, where it is slow."""
    return not on_cpu(arguments) and is_torch_bf16_gpu_available()


def weight_dtype(arguments: AlignmentArguments) -> str:
    """The dtype of the proxy's own weights. peft keeps LoRA weights in float32, but not trained embeddings."""
    if arguments.dtype != "auto":
        return arguments.dtype
    return "bfloat16" if has_bfloat16(arguments) and not arguments.train_embeddings else "float32"


def lora_config(arguments: AlignmentArguments, model: PreTrainedModel) -> LoraConfig:
    """LoRA on all linear layers but the output layer. `train_embeddings` trains that and the embeddings in full."""
    embeddings = [model.get_input_embeddings(), model.get_output_embeddings()]
    trained = [name.split(".")[-1] for name, module in model.named_modules() if module in embeddings]
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=arguments.lora_rank,
        lora_alpha=arguments.lora_alpha,
        lora_dropout=arguments.lora_dropout,
        target_modules="all-linear",
        modules_to_save=trained if arguments.train_embeddings else None,
        ensure_weight_tying=arguments.train_embeddings and bool(text_setting(model.config, "tie_word_embeddings")),
    )


def _trainer_arguments(arguments: AlignmentArguments, settings: Any, pair: Pair, examples: Examples) -> dict[str, Any]:
    # If the proxy has an adapter, it is merged, and the new adapter is trained on top.
    try:
        model = load_merged(arguments.proxy, dtype=weight_dtype(arguments))
    except ValueError as error:
        raise AlignmentError(f"--proxy {arguments.proxy!r} can't be trained: {error}") from error
    callbacks: list[TrainerCallback] = []
    if settings.load_best_model_at_end and arguments.early_stopping_patience:
        callbacks.append(EarlyStoppingCallback(arguments.early_stopping_patience))
    return {
        "model": model,
        "args": settings,
        "train_dataset": examples.train,
        "eval_dataset": examples.evaluation,
        "processing_class": pair.tokenizer,
        "peft_config": lora_config(arguments, model),
        "callbacks": callbacks,
    }


class EvaluationReport(TrainerCallback):
    """Prints one line for each evaluation."""

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        named = {"loss": "loss", "eval_loss": "held-out loss"}
        shown = [f"{name} {logs[key]:.4f}" for key, name in named.items() if logs and key in logs]
        if shown and state.is_world_process_zero:
            self.write(f"step {state.global_step} of {state.max_steps}: {', '.join(shown)}")

    def write(self, line: str) -> None:
        print(line, flush=True)


class Report(EvaluationReport):
    """Prints evaluations and, if standard error is not a terminal, lines with the progress in between."""

    steps: Progress
    evaluating: Progress | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.steps = Progress(state.max_steps, "steps", done=state.global_step, shown=state.is_world_process_zero)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.steps.update(state.global_step - self.steps.done)

    def on_prediction_step(
        self, args: Any, state: Any, control: Any, eval_dataloader: Any = None, **kwargs: Any
    ) -> None:
        if self.evaluating is None:
            shown = state.is_world_process_zero
            self.evaluating = Progress(len(eval_dataloader), "held-out batches", shown=shown, patient=True)
        self.evaluating.update()

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.evaluating = None


class ReportWithBar(EvaluationReport, ProgressCallback):
    """Prints evaluations above a progress bar, for terminals."""

    def write(self, line: str) -> None:
        self.training_bar.write(line)


def report_progress(trainer: Trainer) -> None:
    """Let a trainer print lines instead of dictionaries, above a progress bar on a terminal."""
    quiet = trainer.args.disable_tqdm
    trainer.remove_callback(PrinterCallback if quiet else ProgressCallback)
    trainer.add_callback(Report() if quiet else ReportWithBar())


@dataclass(frozen=True)
class TrainingResult:
    """The result of a run.

    Attributes:
        eval_loss_before: loss on the held-out examples before training; None if there are none.
        eval_loss: the loss of the adapter that was kept; None if there are none.
        best_step: the update after which that adapter was saved; None without evaluation.
        steps: the number of updates.
        epochs: the number of passes over the data.
        examples: the number of training examples.
        seconds: the duration of the training, since the last start if the run was continued.
        world_size: the number of processes.
    """

    eval_loss_before: float | None
    eval_loss: float | None
    best_step: int | None
    steps: int
    epochs: float
    examples: int
    seconds: float
    world_size: int


def fit(trainer: Trainer, arguments: AlignmentArguments, checkpoint: str | None) -> TrainingResult:
    """Train, from a checkpoint if there is one, and evaluate before and after. The record of the run is written.

    Raises:
        AlignmentError: the launcher shards the model.
    """
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        raise AlignmentError(
            "The recipe trains a whole copy of the proxy in each process. Launch it with torchrun, or with an "
            "accelerate configuration without FSDP and DeepSpeed."
        )
    report_progress(trainer)
    measured = trainer.eval_dataset is not None
    # `trainer.evaluate()` before `train()` would mark the model as prepared. It would then not be wrapped for
    # distributed training, and each process would train its own copy.
    trainer.args.eval_on_start = measured and checkpoint is None
    if trainer.is_world_process_zero():
        write_record(arguments.output_dir, {"finished": False, "settings": settings_of(arguments)})
    started = time.perf_counter()
    trainer.train(resume_from_checkpoint=checkpoint)
    seconds = time.perf_counter() - started
    state = trainer.state
    steps, before, after = state.global_step, None, None
    if measured:
        before = next(entry["eval_loss"] for entry in state.log_history if "eval_loss" in entry)
        # The last step was evaluated too, and the best adapter is loaded. There is none if every loss is NaN.
        after = state.best_metric if state.best_metric is not None else trainer.evaluate()["eval_loss"]
        best = state.best_global_step
        log(f"Kept: step {best} of {steps}, held-out loss {after:.4f} (before training {before:.4f})")
    return TrainingResult(
        eval_loss_before=before,
        eval_loss=after,
        best_step=state.best_global_step,
        steps=steps,
        epochs=state.epoch,
        examples=len(trainer.train_dataset),
        seconds=seconds,
        world_size=trainer.accelerator.num_processes,
    )
