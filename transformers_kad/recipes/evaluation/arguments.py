"""What the command lines of the evaluation recipes share."""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import PartialState

from ...configuration import KADConfig
from ...integrations.loading.arguments import ModelArguments, RuleParameters, SamplingArguments, template_arguments
from ..pair import Pair
from .decoding import Decoder
from .methods import Method, parse_methods
from .runner import Workload
from .tasks import TASKS, get_task


@dataclass
class EvaluationArguments:
    """Which questions, and how they are asked.

    Raises:
        ValueError: an unknown task, or a value out of range.
    """

    task: list[str] = field(default_factory=lambda: ["tiny"], metadata={"help": f"Tasks, any of: {', '.join(TASKS)}."})
    output: str = field(
        default="kad_results", metadata={"help": "Folder for the results; a stopped run goes on in it."}
    )
    data_dir: str | None = field(
        default=None,
        metadata={
            "help": "Local data: folder with copies of the data sets (openai/gsm8k/...), or one set's files or file."
        },
    )
    split: str | None = field(default=None, metadata={"help": "Split of the data sets. Default: the task's own."})
    limit: int | None = field(default=None, metadata={"help": "Only the first so many instances of each task."})
    few_shot: int = field(default=0, metadata={"help": "Solved examples before every question."})
    num_samples: int = field(default=1, metadata={"help": "Answers to each instance, each sampled anew."})
    batch_size: int = field(
        default=16,
        metadata={
            "help": "Instances at once, with --no_speculative; also what is dealt out to processes, seeded and "
            "resumed as a whole. Speculative runs answer one at a time, and keep each answer at once."
        },
    )
    pair: Path | None = field(
        default=None,
        metadata={"help": "Folder with base/ and proxy/ in it, used without --base and --proxy. Default: tiny_pair/."},
    )
    aligned: str | None = field(
        default=None, metadata={"help": "The aligned large model, for the method aligned: Hub id or folder."}
    )
    chat: Literal["auto", "yes", "no"] = field(
        default="auto", metadata={"help": "Put prompts into the base's chat template; auto: where it has one."}
    )
    proxy_chat: Literal["same", "yes", "no"] = field(
        default="same",
        metadata={"help": "The same for the proxy, by its own tokenizer; same: the proxy sees the base's prompt."},
    )
    template_arguments: str = field(
        default="{}", metadata={"help": "More for the chat template, as JSON: '{\"enable_thinking\": false}'."}
    )

    def __post_init__(self) -> None:
        self.task = list(dict.fromkeys(self.task))
        for name in self.task:
            get_task(name)
        for name, least in {"limit": 1, "few_shot": 0, "num_samples": 1, "batch_size": 1}.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"--{name} must be at least {least}, got {value}.")
        self.template = template_arguments(self.template_arguments)

    def workloads(self, sampling: "EvaluationSampling", *, positions: bool = False) -> list[Workload]:
        """The instances of every task, loaded."""
        workloads = []
        for name in self.task:
            task = get_task(name)
            instances = task.load(data_dir=self.data_dir, split=self.split, limit=self.limit)
            examples = task.few_shot_examples(self.few_shot, data_dir=self.data_dir, split=self.split)
            workloads.append(
                Workload(
                    task,
                    instances,
                    sampling.max_new_tokens or task.max_new_tokens,
                    examples,
                    num_samples=self.num_samples,
                    batch_size=self.batch_size,
                    seed=sampling.seed,
                    positions=positions,
                )
            )
        return workloads


@dataclass
class MethodArguments(RuleParameters):
    """Which methods, and the parameters of those that have none of their own."""

    method: list[str] = field(
        default_factory=lambda: ["base", "proxy", "kad-dual"], metadata={"help": "Methods, see above."}
    )
    config: str | None = field(
        default=None, metadata={"help": "Folder or Hub repo with a kad_config.json, for the method config."}
    )

    def methods(self) -> list[Method]:
        """What --method asks for."""
        config = KADConfig.from_pretrained(self.config) if self.config else None
        return parse_methods(self.method, *self.given(), config)


@dataclass
class EvaluationSampling(SamplingArguments):
    """How tokens are drawn."""

    max_new_tokens: int | None = field(
        default=None, metadata={"help": "Longest answer, in tokens. Default: the task's own."}
    )
    do_sample: bool = field(
        default=True, metadata={"help": "Sample from each method's distribution; else its likeliest tokens."}
    )
    seed: int = field(default=0, metadata={"help": "Every batch is sampled from a seed of its own, made of this one."})

    def settings(self) -> dict[str, Any]:
        """Arguments of `generate`, but for the length, which is the task's matter."""
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
    """Load what the command line asks for, on this process's share of the devices.

    Args:
        models: which models.
        evaluation: how they are asked.
        sampling: how they answer.
        state: the processes.
        config: folder or Hub repo of the kad_config.json that names base and proxy where the command line does not.
        default_pair: folder of the pair that is used where nothing is named.

    Raises:
        ValueError: samples without sampling, or a pair that can't be found.
    """
    if evaluation.num_samples > 1 and not sampling.do_sample:
        raise ValueError(f"--num_samples {evaluation.num_samples} needs --do_sample: greedy answers are all the same.")
    named = KADConfig.from_pretrained(config) if config else KADConfig()
    if models.base is models.proxy is named.base is named.proxy is None:
        pair = evaluation.pair or default_pair
        if not (pair / "base").is_dir() or not (pair / "proxy").is_dir():
            raise ValueError(
                f"No pair in {str(pair)!r}. Pass --base and --proxy, or --pair with a folder that holds base/ and "
                "proxy/."
            )
        models.base, models.proxy = str(pair / "base"), str(pair / "proxy")
        if evaluation.pair is None:
            torch.set_num_threads(1)  # models as small as these only lose time to more
    models.complete(named, config if config and Path(config).is_dir() else None)
    local_processes = int(os.environ.get("LOCAL_WORLD_SIZE", state.num_processes))
    take_share(models, state.local_process_index, local_processes, torch.cuda.device_count())
    flags: dict[str, Any] = {"auto": None, "yes": True, "no": False, "same": "same"}
    return Decoder(
        Pair(models),
        sampling.settings(),
        speculative=sampling.speculative,
        aligned=evaluation.aligned,
        chat=flags[evaluation.chat],
        proxy_chat=flags[evaluation.proxy_chat],
        template_arguments=evaluation.template,
    )


def take_share(models: ModelArguments, process: int, processes: int, gpus: int) -> None:
    """Give this process its own GPU, or its own part of the GPUs where the base is spread over several.

    Args:
        models: changed in place, unless the command line says where models go.
        process: number of this process on this machine.
        processes: how many there are on this machine.
        gpus: how many GPUs the machine has.

    Raises:
        ValueError: more processes than GPUs.

    >>> models = ModelArguments(device_map="auto")
    >>> take_share(models, process=1, processes=2, gpus=4)
    >>> models.gpus, models.device
    ([2, 3], 'cuda:2')
    """
    if processes == 1 or gpus == 0 or models.device != "auto":
        return
    each = gpus // processes
    if each == 0:
        raise ValueError(f"{processes} processes on one machine need a GPU each, but it has {gpus}. Start fewer.")
    models.gpus = list(range(process * each, (process + 1) * each))
    models.device = f"cuda:{models.gpus[0]}"
