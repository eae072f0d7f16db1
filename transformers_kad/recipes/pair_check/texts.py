"""The texts on which a pair is measured: those of KAD, of the base alone and of the proxy alone, for one prompt."""

from collections.abc import Mapping, Sequence
from typing import Any

from ...configuration import KADConfig
from ...integrations.loading.prompts import Prompt
from ...models.model_settings import context_length
from ...rules.base import Rule
from ..evaluation.decoding import Answer, Decoder, as_text
from ..evaluation.methods import Method
from .measures import measure_agreement, measure_prediction, measure_rules
from .reading import PairReader

# The rule by which KAD's own texts are generated: the middle of the range to start from.
GENERATING = KADConfig(rule="dual", parameters={"threshold": 0.5})
WRITERS = {"kad": Method("kad-dual", GENERATING), "base": Method("base"), "proxy": Method("proxy")}


class TextMeter:
    """Generates and measures the texts of a pair.

    Args:
        decoder: generates them.
        rules: the rules that are applied along KAD's texts.
        draft_length: γ of the expected rounds.
        max_new_tokens: the maximum length of a text.
    """

    def __init__(self, decoder: Decoder, rules: Sequence[Rule], draft_length: int, max_new_tokens: int) -> None:
        self._decoder, self._rules = decoder, rules
        self._draft_length, self._max_new_tokens = draft_length, max_new_tokens
        self._reader = PairReader(decoder.pair)

    def measure(self, prompt: Prompt, seed: int) -> dict[str, Any]:
        """Generate the three texts for a prompt, and measure them and the prompt.

        Returns:
            A record of JSON values: for each writer of `WRITERS` the figures of its text with `ended`, and `prompt`,
            the figures of `measure_prediction`.

        Raises:
            ValueError: the prompt can't be encoded, or a text could not be generated (the prompt is too long, say).
        """
        inputs, own = self._decoder.encode_prompts([prompt])
        room = self._room(inputs["input_ids"].shape[1], (inputs if own is None else own)["input_ids"].shape[1])
        record: dict[str, Any] = {"prompt": self._measure_prompt(prompt)}
        for name, method in WRITERS.items():
            (answer,) = self._decoder.answer(method, [prompt], seed, self._max_new_tokens)
            if answer.error is not None:
                raise ValueError(answer.error)
            tokens = self._in_tokens_of_base(answer) if name == "proxy" else list(answer.ids)
            positions = self._reader.read(tokens[:room], inputs, own)
            if name == "kad":
                figures: Mapping[str, Any] = measure_rules(positions, self._rules, self._draft_length)
            else:
                figures = measure_agreement(positions)
            record[name] = {"ended": answer.ended, **figures}
        return record

    def _measure_prompt(self, prompt: Prompt) -> dict[str, float]:
        """How well both models predict a prompt as plain text, without what a chat template adds."""
        inputs = self._decoder.pair.tokenizer(as_text(prompt), return_tensors="pt")
        limits = map(context_length, (self._decoder.pair.base, self._decoder.pair.proxy))
        ids = inputs["input_ids"][:, : min(limit for limit in (*limits, inputs["input_ids"].shape[1]) if limit)]
        if ids.shape[1] < 2:
            return {}
        first = ids[:, :1].to(self._decoder.pair.device)
        begun = {"input_ids": first, "attention_mask": first.new_ones(first.shape)}
        return measure_prediction(self._reader.read(ids[0, 1:].tolist(), begun))

    def _room(self, *lengths: int) -> int | None:
        """The number of tokens that fit into both contexts behind prompts of these lengths; None without limits."""
        pair = self._decoder.pair
        limits = map(context_length, (pair.base, pair.proxy))
        return min((limit - length for limit, length in zip(limits, lengths, strict=True) if limit), default=None)

    def _in_tokens_of_base(self, answer: Answer) -> list[int]:
        """The proxy's text in the tokens of the base, without an end of the turn that the base lacks.

        A text of which nothing is left is read as one unknown token.
        """
        pair = self._decoder.pair
        if pair.alignment is None:
            return list(answer.ids)
        own = list(answer.ids)
        end = pair.alignment.base_id(own.pop()) if answer.ended else None
        ids = pair.tokenizer(pair.proxy_tokenizer.decode(own), add_special_tokens=False)["input_ids"]
        ids += [] if end is None else [end]
        return ids or [pair.tokenizer.unk_token_id or 0]
