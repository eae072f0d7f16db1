"""Runs an evaluation: batches of instances are answered by each method and recorded immediately."""

import hashlib
import json
import random
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

from ..environment import describe_environment
from ..processes import Processes
from ..progress import Progress
from ..record_fields import ADVICE
from .decoding import Answer, Decoder, own_settings, shared_settings
from .methods import Method
from .results import RESULTS, Repairs, ResultsFolder, batch_name, config_hash
from .task import Instance, Task


@dataclass(frozen=True)
class Workload:
    """The instances of a task, and how they are asked.

    Attributes:
        task: the task.
        instances: the instances, in the order of the data set.
        examples: solved instances that precede every question.
        max_new_tokens: the maximum length of an answer in tokens.
        num_samples: the number of answers to each instance.
        batch_size: the number of instances in a batch. Each batch has its own seed, is answered by one process, and is
            repeated as a whole when a run is continued, so another batch size gives other samples.
        seed: seed of the sampling.
        positions: record the deferral mass at every position, which does not change the answers.
    """

    task: Task
    instances: Sequence[Instance]
    max_new_tokens: int
    examples: Sequence[Instance] = ()
    num_samples: int = 1
    batch_size: int = 16
    seed: int = 0
    positions: bool = False

    def config(self, method: Method, decoder: Decoder) -> dict[str, Any]:
        """All settings that determine the results of a method, as JSON values, in `shared` and `own`."""
        asked = [[i.id, self.task.messages(i, self.examples), i.answer] for i in self.instances]
        versions = describe_environment()
        return {
            "task": self.task.name,
            "method": method.label,
            "shared": {
                "instances": len(self.instances),
                "questions": hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:12],
                "few_shot": len(self.examples),
                "max_new_tokens": self.max_new_tokens,
                "batch_size": self.batch_size,
                "seed": self.seed,
                "versions": {name: versions[name] for name in ("torch", "transformers", "transformers_kad")},
                **shared_settings(decoder),
            },
            "own": own_settings(decoder, method),
        }

    def batches(self, method: Method) -> Iterator["Batch"]:
        """All batches of a method."""
        for sample in range(self.num_samples):
            for number, start in enumerate(range(0, len(self.instances), self.batch_size)):
                yield Batch(self, method, sample, number, self.instances[start : start + self.batch_size])


@dataclass(frozen=True)
class Batch:
    """Instances that one method answers together."""

    workload: Workload
    method: Method
    sample: int
    number: int
    instances: Sequence[Instance]

    @property
    def key(self) -> str:
        """The name of the batch, unique in a results folder."""
        return batch_name(self.workload.task.name, self.method.label, self.sample, self.number)

    @property
    def seed(self) -> int:
        """The seed of the batch, so that its answers don't depend on the process or on earlier batches."""
        return random.Random(f"{self.workload.seed} {self.key}").getrandbits(32)


def run_evaluation(
    decoder: Decoder,
    workloads: Sequence[Workload],
    methods: Sequence[Method],
    folder: ResultsFolder,
    *,
    processes: Processes | None = None,
    log: Callable[[str], None] = print,
    retry_failed: bool = False,
) -> None:
    """Answer every instance by every method, except those that the folder already has.

    The remaining batches are distributed over the processes in turn, and each process records a batch when it is
    finished. At the end the main process merges the files of all processes.

    Args:
        decoder: the models.
        workloads: the tasks.
        methods: the methods.
        folder: the results folder, which all processes share.
        processes: the processes. Default: those of the current launch.
        log: called by the main process with messages for the user.
        retry_failed: answer batches again in which an answer failed.

    Raises:
        ValueError: the folder holds results of other settings or is not shared by all processes, the processes have
            different settings, or a method can't be used with the models.
        ConnectionError: another process has ended before the run was complete.
    """
    processes = processes or Processes()

    def load_models() -> None:
        for method in methods:
            decoder.prepare(method)

    processes.run(load_models)
    configs = {(w.task.name, m.label): w.config(m, decoder) for w in workloads for m in methods}
    names = {key: config_hash(config) for key, config in configs.items()}
    batches = {
        (names[w.task.name, m.label], batch.key): batch for w in workloads for m in methods for batch in w.batches(m)
    }
    processes.check_equal({"the number of batches": len(batches), **_settings(configs)})

    def prepare_folder() -> set[tuple[str, str]]:
        _log_repairs(folder.prepare(retry_failed=retry_failed), log)
        folder.describe(list(configs.values()))
        _check_instances(folder, batches)
        return folder.batches()

    processes.check_shared(folder.path)
    done = processes.run_in_main(prepare_folder)
    left = [key for key in batches if key not in done]
    if processes.is_main and len(left) < len(batches):
        log(f"{len(batches) - len(left)} of {len(batches)} batches are already done.")
    _answer_batches(decoder, {key: batches[key] for key in processes.share(left)}, folder, shown=processes.is_main)
    processes.run(folder.close_part)
    processes.run_in_main(lambda: _merge(folder, batches.keys()))


def _check_instances(folder: ResultsFolder, batches: Mapping[tuple[str, str], "Batch"]) -> None:
    """Raise a `ValueError` if a stored line is of another question than the one with its place in its batch."""
    for number, record in enumerate(folder.read(), start=1):
        batch = batches.get((record["config"], record["batch"]))
        if batch is None or record["row"] >= len(batch.instances):
            continue
        instance = batch.instances[record["row"]]
        if (record["instance"], record["answer"]) != (instance.id, instance.answer):
            raise ValueError(
                f"{str(folder.path / RESULTS)!r}, line {number} is of the question {record['instance']!r:.80} with "
                f"the answer {record['answer']!r:.80}, but in its place is {instance.id!r} with the answer "
                f"{instance.answer!r:.80}. {ADVICE}"
            )


def _settings(configs: Mapping[tuple[str, str], Mapping[str, Any]]) -> dict[str, Any]:
    """All settings of a run by name, to compare those of different processes."""
    settings: dict[str, Any] = {}
    for (task, method), config in configs.items():
        settings |= {f"{name} of {task!r}": value for name, value in config["shared"].items()}
        settings |= {f"{name} of {method!r}": value for name, value in config["own"].items()}
    return settings


def _answer_batches(
    decoder: Decoder, batches: Mapping[tuple[str, str], "Batch"], folder: ResultsFolder, *, shown: bool
) -> None:
    """Answer and record the batches of this process. The keys are a batch's configuration and name."""
    total = sum(len(batch.instances) for batch in batches.values())
    with Progress(total, "answers", shown=shown) as progress:
        warm, tally = set[str](), _RunningScore()
        for (config, _), batch in batches.items():
            if batch.method.label not in warm:
                warm.add(batch.method.label)
                warm_up(decoder, batch)
            records = answer_batch(decoder, batch, config)
            folder.append(records)
            progress.update(len(records), tally.note(batch, records))


def _merge(folder: ResultsFolder, batches: Set[tuple[str, str]]) -> None:
    """Merge the files of all processes.

    Raises:
        ValueError: batches are missing.
    """
    folder.merge()
    missing = len(batches - folder.batches())
    if missing:
        raise ValueError(
            f"{missing} of {len(batches)} batches are missing in {str(folder.path / RESULTS)!r}, although all "
            "processes have recorded theirs. Start the same command again: it finds files that a network file system "
            "has shown late, and answers the rest."
        )


def answer_batch(decoder: Decoder, batch: Batch, config: str) -> list[dict[str, Any]]:
    """Answer a batch, and return its records, one for each line of the results."""
    workload = batch.workload
    prompts = [workload.task.messages(instance, workload.examples) for instance in batch.instances]
    answers = decoder.answer(batch.method, prompts, batch.seed, workload.max_new_tokens)
    return [
        {
            "task": workload.task.name,
            "method": batch.method.label,
            "instance": instance.id,
            "sample": batch.sample,
            "batch": batch.key,
            "batch_number": batch.number,
            "batch_size": len(batch.instances),
            "row": row,
            "config": config,
            **score(workload.task, instance, answer),
            **measure(answer, positions=workload.positions),
        }
        for row, (instance, answer) in enumerate(zip(batch.instances, answers, strict=True))
    ]


def warm_up(decoder: Decoder, batch: Batch) -> None:
    """Answer a question without recording it, since the first call of a process is slower than later ones."""
    decoder.answer(batch.method, [batch.workload.task.messages(batch.instances[0])], seed=0, max_new_tokens=2)


def score(task: Task, instance: Instance, answer: Answer) -> dict[str, Any]:
    """The text of an answer, the prediction in it, and whether it is correct. A failed answer is wrong."""
    text = answer.text if answer.error is None else None
    scores = task.score(instance, text, answer.ended)
    return scores | {"text": answer.text, "ended": answer.ended, "error": answer.error}


def measure(answer: Answer, *, positions: bool) -> dict[str, Any]:
    """The tokens and seconds of an answer, and the statistics of its decoding."""
    statistics = answer.statistics
    measured: dict[str, Any] = {"tokens": answer.tokens, "seconds": round(answer.seconds, 6)}
    if statistics is not None:
        measured |= {
            "rounds": statistics.rounds,
            "drafted": statistics.drafted,
            "accepted": statistics.accepted,
            "acceptance_histogram": list(statistics.acceptance_histogram),
            "deferral_mass": statistics.deferral_mass,
        }
        if positions and statistics.deferral_masses is not None:
            measured["deferral_masses"] = [round(mass, 4) for mass in statistics.deferral_masses]
    return measured


def _log_repairs(repairs: Repairs, log: Callable[[str], None]) -> None:
    for torn in repairs.torn:
        log(f"An incomplete last line was removed, and its batch is answered again: {torn!r}")
    for batch in repairs.incomplete:
        log(f"The batch {batch!r} was interrupted and is answered again.")
    for batch in repairs.retried:
        log(f"The batch {batch!r} has a failed answer and is answered again.")


class _RunningScore:
    """The accuracy and speed of the current method so far, for the progress line."""

    def __init__(self) -> None:
        self._name = ""

    def note(self, batch: Batch, records: Sequence[Mapping[str, Any]]) -> str:
        """Count a batch, and return the text for the progress line."""
        name = f"{batch.workload.task.name}, {batch.method.label}"
        if name != self._name:
            self._name, self._right, self._answers, self._tokens, self._seconds = name, 0, 0, 0, 0.0
        self._right += sum(record["correct"] or False for record in records)
        self._answers += len(records)
        self._tokens += sum(record["tokens"] for record in records)
        self._seconds += sum(record["seconds"] for record in records)
        speed = f"{self._tokens / max(self._seconds, 1e-9):.0f} tokens/s so far"
        if not batch.workload.task.has_right_answers:
            return f"{name}: {speed}"
        return f"{name}: accuracy {self._right / self._answers:.3f}, {speed}"
