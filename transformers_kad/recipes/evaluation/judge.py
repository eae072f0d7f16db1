"""The perplexity of answers under a judge, a causal language model."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ...integrations.loading.devices import pick_device
from ...integrations.loading.models import load_tokenizer
from ...integrations.loading.prompts import encode
from ...models.model_errors import describe
from ...models.model_settings import context_length
from ..arguments import ModelArguments
from ..pair import load_large
from ..record_fields import Shape
from .decoding import as_text
from .kept_scores import PromptedText, Score

# The fields of a score and their types.
JUDGE_FIELDS: Mapping[str, Shape] = {"nll": (int, float, type(None)), "tokens": (int,), "cut": (bool,)}


@dataclass(frozen=True)
class Judge:
    """Computes the negative log-likelihood of answers, given their prompts, under a causal language model.

    The prompt is encoded with the judge's own tokenizer and chat template (as plain text if it has none), and the
    answer is encoded apart from it, so that both have the same tokens whatever they are combined with. The prompt's
    tokens are read but not counted, and neither is the end of the turn, which truncated answers don't have.

    Args:
        model: the judge.
        tokenizer: its tokenizer.
        template_arguments: further arguments of its chat template.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    template_arguments: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def load(cls, name: str, models: ModelArguments, template_arguments: Mapping[str, Any]) -> "Judge":
        """Load a judge by its Hub id or folder, on the devices and with the dtype and quantization of the base."""
        device = pick_device(models.device)
        return cls(load_large(models, name, device), load_tokenizer(name), template_arguments)

    @torch.inference_mode()
    def score(self, texts: Sequence[PromptedText]) -> list[Score]:
        """Score a batch of texts.

        A text that is longer than the judge's context is scored as far as it fits. A text of which nothing fits, or
        that has no tokens at all, has no NLL.

        Returns:
            For each text `nll`, the sum over its tokens in nats (None for none), `tokens`, the number of these tokens,
            and `cut`, whether it did not fit.

        Raises:
            ValueError: the judge's logits are NaN or infinite.
        """
        rows = [self._encode(text) for text in texts]
        width = max(len(prompt) + len(answer) for prompt, answer, _ in rows)
        # Padding on the right: no token of a causal model sees it, and positions count from the first token.
        ids = torch.zeros(len(rows), width, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, (prompt, answer, _) in enumerate(rows):
            ids[row, : len(prompt) + len(answer)] = torch.tensor(prompt + answer)
            mask[row, : len(prompt) + len(answer)] = 1
        device = self.model.get_input_embeddings().weight.device
        logits = self.model(input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False).logits
        scores = []
        for row, (prompt, answer, cut) in enumerate(rows):
            nll = None
            if answer:
                targets = torch.tensor(answer, device=logits.device)
                predicted = logits[row, len(prompt) - 1 : len(prompt) - 1 + len(answer)].float()
                nll = cross_entropy(predicted, targets, reduction="none").double().sum().item()
                if not math.isfinite(nll):
                    raise ValueError(
                        f"The judge {describe(self.model)} gives a text a log-likelihood of {-nll}: its logits "
                        "overflow. Use --dtype bfloat16 or float32."
                    )
            scores.append({"nll": nll, "tokens": len(answer), "cut": cut})
        return scores

    def _encode(self, text: PromptedText) -> tuple[list[int], list[int], bool]:
        """The ids of the prompt, those of the answer that fit into the context behind it, and whether some did not."""
        templated = self.tokenizer.chat_template is not None
        prompt = encode(
            self.tokenizer,
            [text.prompt if templated else as_text(text.prompt)],
            chat=templated,
            **self.template_arguments,
        )["input_ids"][0].tolist()
        answer = self.tokenizer(text.text, add_special_tokens=False)["input_ids"]
        limit = context_length(self.model)
        if limit is None or len(prompt) + len(answer) <= limit:
            return prompt, answer, False
        return prompt[:limit], answer[: max(0, limit - len(prompt))], True
