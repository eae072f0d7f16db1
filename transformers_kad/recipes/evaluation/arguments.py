"""The command-line arguments of the evaluation recipes."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

from ...configuration import KADConfig
from ..arguments import TEMPLATE_CHOICES, ModelArguments, RuleParameters, SamplingArguments, TemplateArguments
from ..pair import Pair
from ..processes import assign_own_devices
from .decoding import Decoder
from .methods import Method, parse_methods
from .runner import Workload
from .tasks import TASKS, get_task

DEFAULT_BATCH_SIZE = 16  # token by token


@dataclass
class EvaluationArguments(TemplateArguments):
    """The questions, and how they are asked.

    Raises:
        ValueError: a task is unknown, or a value is out of range.
    """

    task: list[str] = field(default_factory=lambda: ["tiny"], metadata={"help": f"Tasks, any of: {', '.join(TASKS)}."})
    output: str = field(
        default="kad_results", metadata={"help": "Folder for the results, and to continue an interrupted run."}
    )
    data_dir: str | None = field(
        default=None,
        metadata={
            "help": "Local data: folder with copies of data sets (openai/gsm8k/...), or the files of one data set."
        },
    )
    prompts: str | None = field(
        default=None,
        metadata={"help": "JSON Lines file with the prompts of the task chat, or with instructions of your own."},
    )
    split: str | None = field(default=None, metadata={"help": "Split of the data sets. Default: that of the task."})
    limit: int | None = field(
        default=None, metadata={"help": "Use only the first instances of each task, at most this many."}
    )
    few_shot: int = field(default=0, metadata={"help": "Number of solved examples before every question."})
    num_samples: int = field(default=1, metadata={"help": "Number of sampled answers to each instance."})
    batch_size: int | None = field(
        default=None,
        metadata={
            "help": "Instances in a batch. Each batch has one seed, is answered by one process, and is resumed as a "
            f"whole. Default: 1 in speculative decoding, {DEFAULT_BATCH_SIZE} with --no_speculative."
        },
    )
    pair: Path | None = field(
        default=None,
        metadata={"help": "Folder with base/ and proxy/ in it, used without --base and --proxy. Default: tiny_pair/."},
    )
    aligned: str | None = field(
        default=None, metadata={"help": "Aligned large model for the method aligned: Hub id or folder."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.task = list(dict.fromkeys(self.task))
        for name in self.task:
            get_task(name)
        for name, least in {"limit": 1, "few_shot": 0, "num_samples": 1, "batch_size": 1}.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"--{name} must be at least {least}, got {value}.")
        if self.prompts is not None and not any(get_task(name).read for name in self.task):
            readers = " or ".join(name for name, task in TASKS.items() if task.read)
            raise ValueError(
                f"--prompts {self.prompts!r} is for the tasks {readers}, got --task {' '.join(self.task)}."
            )

    def workloads(self, sampling: "EvaluationSampling", *, positions: bool = False) -> list[Workload]:
        """Load the instances of all tasks."""
        workloads = []
        for name in self.task:
            task = get_task(name)
            instances = task.load(data_dir=self.data_dir, prompts=self.prompts, split=self.split, limit=self.limit)
            examples = task.few_shot_examples(self.few_shot, data_dir=self.data_dir, split=self.split)
            workloads.append(
                Workload(
                    task,
                    instances,
                    sampling.max_new_tokens or task.max_new_tokens,
                    examples,
                    num_samples=self.num_samples,
                    batch_size=self.batch_size or (1 if sampling.speculative else DEFAULT_BATCH_SIZE),
                    seed=sampling.seed,
                    positions=positions,
                )
            )
        return workloads


@dataclass
class MethodArguments(RuleParameters):
    """The methods, and parameters for methods that don't set their own."""

    method: list[str] = field(
        default_factory=lambda: ["base", "proxy", "kad-dual"], metadata={"help": "Methods, see above."}
    )
    config: str | None = field(
        default=None, metadata={"help": "Folder or Hub repo with a kad_config.json, for the method config."}
    )

    def methods(self) -> list[Method]:
        """The methods that --method names."""
        config = KADConfig.from_pretrained(self.config) if self.config else None
        return parse_methods(self.method, *self.given(), config)


@dataclass
class EvaluationSampling(SamplingArguments):
    """How tokens are chosen."""

    max_new_tokens: int | None = field(
        default=None, metadata={"help": "Maximum length of an answer, in tokens. Default: that of the task."}
    )
    do_sample: bool = field(
        default=True, metadata={"help": "Sample from each method's distribution instead of decoding greedily."}
    )
    seed: int = field(default=0, metadata={"help": "Seed of the sampling, from which every batch derives its own."})

    def settings(self) -> dict[str, Any]:
        """The arguments of `generate` except for the length, which depends on the task."""
        settings = super().settings()
        del settings["max_new_tokens"]
        return settings


def make_decoder(
    models: ModelArguments,
    evaluation: EvaluationArguments,
    sampling: EvaluationSampling,
    state: PartialState,
    *,
    config: str | None = None,
    default_pair: Path,
) -> Decoder:
    """Load the models of a command line on the devices of this process.

    Args:
        models: the models. Base and proxy are filled in.
        evaluation: how questions are asked.
        sampling: how tokens are chosen.
        state: the processes.
        config: folder or Hub repo of a kad_config.json that names base and proxy if the command line does not.
        default_pair: folder of the pair to use if none is named.

    Raises:
        ValueError: several samples without sampling, or the pair was not found.
    """
    if evaluation.num_samples > 1 and not sampling.do_sample:
        raise ValueError(f"--num_samples {evaluation.num_samples} needs --do_sample: greedy answers are identical.")
    uses_pair = models.complete_with_pair(config, evaluation.pair or default_pair)
    if uses_pair and evaluation.pair is None:
        torch.set_num_threads(1)  # more threads are slower for models this small
    assign_own_devices(models, state)
    return Decoder(
        Pair(models),
        sampling.settings(),
        speculative=sampling.speculative,
        aligned=evaluation.aligned,
        chat=TEMPLATE_CHOICES[evaluation.chat],
        proxy_chat=TEMPLATE_CHOICES[evaluation.proxy_chat],
        template_arguments=evaluation.template,
    )
