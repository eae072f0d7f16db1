"""Scores of texts by a model, kept in a file so that no text is scored twice."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from ...integrations.loading.prompts import Prompt
from ..processes import Processes
from ..progress import Progress
from ..record_fields import Shape
from ..resumable import JsonLinesPart, JsonLinesStore

Score = dict[str, Any]


@dataclass(frozen=True)
class PromptedText:
    """A text and the prompt that it answers."""

    prompt: Prompt
    text: str

    @property
    def key(self) -> str:
        """A hash of both, by which their scores are found."""
        return hashlib.sha256(json.dumps([self.prompt, self.text]).encode()).hexdigest()[:24]


class Scorer(Protocol):
    """A model that scores texts."""

    def score(self, texts: Sequence[PromptedText]) -> list[Score]:
        """The scores of a batch of texts, as JSON values."""
        ...


@dataclass(frozen=True)
class KeptScores:
    """The scores of texts by one model under one set of settings.

    The file has the hash of the settings in its name, so that the scores of another model, or of the same model under
    other settings, are in another file. Each score is written as soon as its batch is done, and an interrupted run
    goes on with the texts that are left.

    Attributes:
        folder: the folder of the file.
        kind: what scores the texts, which begins the name of the file: "judge".
        settings: all settings that determine the scores, as JSON values.
        load: loads the model. It is called only if there are texts without scores.
        batch_size: the number of texts in a batch.
        fields: the fields of a score, which are checked when the file is read.
    """

    folder: Path
    kind: str
    settings: Mapping[str, Any]
    load: Callable[[], Scorer]
    batch_size: int
    fields: Mapping[str, Shape] = field(default_factory=dict)

    @property
    def path(self) -> Path:
        """The file with the scores."""
        name = hashlib.sha256(json.dumps(self.settings, sort_keys=True).encode()).hexdigest()[:12]
        return self.folder / f"{self.kind}-{name}.jsonl"

    def score(self, texts: Sequence[PromptedText], processes: Processes) -> dict[str, Score]:
        """Score texts that have no scores yet, divided among the processes, which all have to call this.

        Args:
            texts: the texts; only those of the main process are used.
            processes: the processes.

        Returns:
            The scores of all texts that the file has, by the keys of the texts; nothing in other processes.
        """
        store: JsonLinesStore | None = None

        def find_missing() -> list[PromptedText]:
            nonlocal store
            store = JsonLinesStore(self.path, self.settings, order="key", fields={"key": (str,), **self.fields})
            known = {record["key"] for record in store.records}
            missing = {text.key: text for text in texts if text.key not in known}
            # Texts of similar length share a batch, which then has little padding. The longest come first.
            return sorted(missing.values(), key=lambda one: len(str(one.prompt)) + len(one.text), reverse=True)

        try:
            missing = processes.run_in_main(find_missing)
            if missing:
                self._score_share(processes.share(missing), store, processes)
            processes.run_in_main(lambda: store.complete() if store is not None else None)
            return {} if store is None else {record["key"]: record for record in store.records}
        finally:
            if store is not None:
                store.close()

    def _score_share(self, texts: Sequence[PromptedText], store: JsonLinesStore | None, processes: Processes) -> None:
        """Score the texts of this process. The main process writes to the store, others to a part beside it."""
        scorer = processes.run(self.load)
        file = JsonLinesPart(self.path, processes.index) if store is None else store

        def score_all() -> None:
            with Progress(len(texts), "texts", shown=processes.is_main) as progress:
                for start in range(0, len(texts), self.batch_size):
                    batch = texts[start : start + self.batch_size]
                    for text, score in zip(batch, scorer.score(batch), strict=True):
                        file.append({"key": text.key, **score})
                    progress.update(len(batch), f"scored by the {self.kind}")

        try:
            processes.run(score_all)
        finally:
            if store is None:
                file.close()
