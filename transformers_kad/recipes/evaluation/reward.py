"""Rewards of answers by a reward model, a sequence classifier with one output."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification, PreTrainedModel, PreTrainedTokenizerBase

from ...integrations.loading.devices import pick_device
from ...integrations.loading.models import load_tokenizer
from ...integrations.loading.reading import NO_CODE, NO_PICKLE, load_architecture, readable
from ...models.model_settings import context_length
from ...utils.sources import check_source
from ..arguments import ModelArguments
from ..pair import device_spread
from .decoding import as_text
from .kept_scores import PromptedText, Score


@dataclass(frozen=True)
class RewardModel:
    """Scores chats that end with the answer.

    A tokenizer with a chat template formats the prompt's turns and the answer as the assistant's turn. Without one,
    prompt and answer are encoded as a pair of texts, as encoders such as DeBERTa take them.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase

    @classmethod
    def load(cls, name: str, models: ModelArguments) -> "RewardModel":
        """Load a reward model by its Hub id or folder.

        Raises:
            ValueError: it has more than one output, or the weights of its output are missing.
        """
        check_reward_model(name)
        placed = {key: value for key, value in device_spread(models).items() if value is not None}
        with readable(name):
            model, loading = AutoModelForSequenceClassification.from_pretrained(
                check_source(name), dtype=models.dtype, output_loading_info=True, **placed, **NO_CODE, **NO_PICKLE
            )
        if loading["missing_keys"]:
            missing = ", ".join(sorted(loading["missing_keys"]))
            raise ValueError(
                f"--reward_model {name!r} lacks weights ({missing}), so its rewards would be random. "
                "Pass a model that was trained to give rewards."
            )
        if not placed:
            model.to(pick_device(models.device))
        return cls(model.eval(), load_tokenizer(name))

    @torch.inference_mode()
    def score(self, texts: Sequence[PromptedText]) -> list[Score]:
        """Score a batch of texts.

        Returns:
            For each text its `reward`; None if prompt and answer are longer than the model's context.
        """
        inputs = [self._encode(text) for text in texts]
        limit = min(context_length(self.model) or self.tokenizer.model_max_length, self.tokenizer.model_max_length)
        rewards: list[float | None] = [None] * len(texts)
        fitting = [at for at, one in enumerate(inputs) if len(one["input_ids"]) <= limit]
        # A classifier finds the end of a text by the padding token of its configuration, so one that has none, or
        # another than the tokenizer, takes single texts.
        padding = self.model.config.get_text_config().pad_token_id
        size = len(texts) if padding is not None and padding == self.tokenizer.pad_token_id else 1
        for start in range(0, len(fitting), size):
            rows = fitting[start : start + size]
            batch = self.tokenizer.pad([inputs[at] for at in rows], padding_side="right", return_tensors="pt")
            logits = self.model(**batch.to(self.model.get_input_embeddings().weight.device)).logits
            for at, reward in zip(rows, logits[:, 0].float().tolist(), strict=True):
                rewards[at] = reward
        return [{"reward": reward} for reward in rewards]

    def _encode(self, text: PromptedText) -> dict[str, Any]:
        if self.tokenizer.chat_template is None:
            return dict(self.tokenizer(as_text(text.prompt).rstrip("\n"), text.text))
        turns = [{"role": "user", "content": text.prompt}] if isinstance(text.prompt, str) else list(text.prompt)
        turns.append({"role": "assistant", "content": text.text})
        return dict(self.tokenizer.apply_chat_template(turns, return_dict=True))


def check_reward_model(name: str) -> None:
    """Raise a `ValueError` unless a model has one output, before its weights are loaded."""
    labels = load_architecture(check_source(name)).num_labels
    if labels != 1:
        raise ValueError(
            f"--reward_model {name!r} has {labels} labels, but a reward is a single number: pass a sequence "
            "classifier with one output (num_labels=1)."
        )
