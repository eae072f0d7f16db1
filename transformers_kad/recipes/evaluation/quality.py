"""Measures the quality of the texts in a results folder, by programs, by a judge and by a reward model."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ...utils.sources import check_source
from ..arguments import ModelArguments
from ..processes import Processes
from .judge import JUDGE_FIELDS, Judge
from .kept_scores import KeptScores, PromptedText, Score
from .methods import Method
from .quality_report import Record, TextScores, prompted_text, summarize_quality
from .reward import RewardModel, check_reward_model
from .runner import Workload

Report = dict[str, Any]


@dataclass
class QualityArguments:
    """The quality of the texts, beside their accuracy.

    Raises:
        ValueError: a value is out of range.
    """

    quality: bool = field(
        default=False,
        metadata={
            "help": "Measure the quality of the texts. Implied by --judge, --reward_model and tasks without right "
            "answers."
        },
    )
    judge: str | None = field(
        default=None,
        metadata={"help": "Causal model whose perplexity judges the texts: Hub id or folder. Default: --aligned."},
    )
    reward_model: str | None = field(
        default=None,
        metadata={"help": "Sequence classifier with one output, for preferences between methods: Hub id or folder."},
    )
    reference_method: str | None = field(
        default=None,
        metadata={"help": "One of --method, which all others are compared with. Default: the best one."},
    )
    judge_batch_size: int = field(default=8, metadata={"help": "Texts in a batch of the judge or reward model."})

    def __post_init__(self) -> None:
        if self.judge_batch_size < 1:
            raise ValueError(f"--judge_batch_size must be at least 1, got {self.judge_batch_size}.")

    def is_wanted(self, workloads: Sequence[Workload]) -> bool:
        """Whether quality is to be measured."""
        asked = self.quality or self.judge is not None or self.reward_model is not None
        return asked or not all(workload.task.has_right_answers for workload in workloads)

    def reference_label(self, methods: Sequence[Method]) -> str | None:
        """The label of the reference method; None if none is named.

        Raises:
            ValueError: it is not among the methods, or the name belongs to several of them.
        """
        if self.reference_method is None:
            return None
        labels = [method.label for method in methods]
        found = [label for label in labels if label == self.reference_method]
        found = found or [method.label for method in methods if method.name == self.reference_method]
        if len(found) != 1:
            raise ValueError(
                f"--reference_method must be one of {', '.join(map(repr, labels))}, got {self.reference_method!r}."
            )
        return found[0]


@dataclass(frozen=True)
class QualityRun:
    """Adds the quality of the texts to a report.

    Attributes:
        arguments: the options.
        models: the pair.
        aligned: the aligned large model, which is the default judge.
        template_arguments: further arguments of the judge's chat template.
        workloads: the tasks.
        reference: the label of the reference method.
        folder: the results folder, below which the scores of models are kept.
    """

    arguments: QualityArguments
    models: ModelArguments
    aligned: str | None
    template_arguments: Mapping[str, Any]
    workloads: Sequence[Workload]
    reference: str | None
    folder: Path

    @property
    def judge(self) -> str | None:
        """The judge; None if there is none."""
        return self.arguments.judge or self.aligned

    def measure(self, records: Mapping[str, Mapping[str, Sequence[Record]]], processes: Processes) -> Report:
        """Score the texts, divided among the processes, which all have to call this.

        Args:
            records: for each task, the records of each method; used in the main process only.
            processes: the processes.

        Returns:
            For each task its quality, as `quality_markdown` takes it; nothing in other processes.
        """
        prompts = {
            workload.task.name: {
                instance.id: workload.task.messages(instance, workload.examples) for instance in workload.instances
            }
            for workload in self.workloads
        }
        texts = [
            text
            for task, methods in records.items()
            for of_method in methods.values()
            for record in of_method
            if (text := prompted_text(record, prompts.get(task, {}))) is not None
        ]
        judged = self._judge_scores(texts, processes)
        rewards = self._rewards(texts, processes)
        report: Report = {}
        for workload in self.workloads:
            name = workload.task.name
            if processes.is_main and records.get(name):
                scores = TextScores(prompts[name], judged, rewards)
                found = summarize_quality(workload.task, records[name], scores, self.reference)
                report[name] = {**self._about(), "reference": self.reference, **found}
        return report

    def _judge_scores(self, texts: Sequence[PromptedText], processes: Processes) -> dict[str, Score]:
        if (judge := self.judge) is None:
            return {}
        settings = {**self._settings(), "judge": judge, "template_arguments": dict(self.template_arguments)}
        load = lambda: Judge.load(judge, self.models, self.template_arguments)  # noqa: E731
        kept = self._kept("judge", settings, load)
        return replace(kept, fields=JUDGE_FIELDS).score(texts, processes)

    def _rewards(self, texts: Sequence[PromptedText], processes: Processes) -> dict[str, Score]:
        if (name := self.arguments.reward_model) is None:
            return {}
        settings = {"reward_model": name, "dtype": self.models.dtype}
        load = lambda: RewardModel.load(name, self.models)  # noqa: E731
        return self._kept("reward", settings, load).score(texts, processes)

    def _settings(self) -> dict[str, Any]:
        return {"dtype": self.models.dtype, "quantization": self.models.quantization}

    def _kept(self, kind: str, settings: Mapping[str, Any], load: Callable[[], Any]) -> KeptScores:
        return KeptScores(self.folder / "quality", kind, settings, load, self.arguments.judge_batch_size)

    def _about(self) -> dict[str, Any]:
        own = {"base": self.models.base, "proxy": self.models.proxy}
        same = [role for role, name in own.items() if _is_same(str(name), self.judge)]
        return {
            "judge": self.judge,
            "judge_is": same[0] if same else None,
            "reward_model": self.arguments.reward_model,
        }


def _is_same(name: str, other: str | None) -> bool:
    """Whether two names are one Hub id or one folder."""
    return other is not None and (name == other or Path(name).resolve() == Path(other).resolve())


def check_scorers(arguments: QualityArguments) -> None:
    """Check the judge and the reward model before any text is generated.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: the reward model has more than one output.
    """
    if arguments.judge is not None:
        check_source(arguments.judge)
    if arguments.reward_model is not None:
        check_reward_model(arguments.reward_model)
