"""Reads a text with base and proxy, and gives their next-token distributions a few positions at a time."""

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch

from ...models.cached_model import CachedModel
from ...models.model_errors import is_unusable, unusable_logits_error
from ...models.model_settings import vocabulary_size
from ...models.text_reader import TextReader
from ..pair import Pair

# Probabilities of one model that are held at once: 16 MB in float32, whatever the vocabulary and the length of a text.
PROBABILITIES_AT_ONCE = 2**22

Inputs = Mapping[str, torch.Tensor]


class Positions(NamedTuple):
    """The distributions at n consecutive positions of a text.

    Attributes:
        tokens: the tokens that the text has there, `(n,)`.
        base_probs: p, `(n, V)` float32.
        proxy_probs: q in the base's vocabulary, `(n, V)` float32, on the device of p.
        unknown: which tokens of the vocabulary the proxy does not have, `(V,)` boolean.
    """

    tokens: torch.Tensor
    base_probs: torch.Tensor
    proxy_probs: torch.Tensor
    unknown: torch.Tensor


class PairReader:
    """Reads texts with the models of a pair."""

    def __init__(self, pair: Pair) -> None:
        self._pair = pair
        self._vocabulary = vocabulary_size(pair.base)
        self._models = {name: CachedModel(getattr(pair, name), name) for name in ("base", "proxy")}

    def read(self, tokens: Sequence[int], inputs: Inputs, proxy_inputs: Inputs | None = None) -> Iterator[Positions]:
        """The distributions at every position of a text behind a prompt.

        Args:
            tokens: the text in the base's tokens, at least one.
            inputs: the base's prompt, `input_ids` and `attention_mask` `(1, L)`.
            proxy_inputs: the proxy's own prompt in its own tokens; None if it reads the base's.

        Raises:
            ContextLengthError: prompt and text are longer than the context of a model.
            UnusableLogitsError: logits are NaN, +inf or all -inf.
        """
        alignment = self._pair.alignment
        base = TextReader(self._models["base"], vocabulary=self._vocabulary)
        proxy = TextReader(self._models["proxy"], vocabulary=self._vocabulary, vocabulary_alignment=alignment)
        self._begin("base", base, inputs)
        if proxy_inputs is None and alignment is not None:
            names = ("input_ids", "attention_mask")
            own = alignment.retokenize(*(inputs[name] for name in names))
            proxy_inputs = dict(zip(names, own, strict=True))
        self._begin("proxy", proxy, inputs if proxy_inputs is None else proxy_inputs)
        yield from self._read_on(torch.tensor(tokens, device="cpu"), base, proxy)

    def _begin(self, name: str, reader: TextReader, inputs: Inputs) -> None:
        mask = inputs["attention_mask"]
        types = {key: inputs[key] for key in ("token_type_ids",) if key in inputs}
        self._models[name].use_prompt_inputs(types, mask)
        reader.begin(inputs["input_ids"], mask)

    @torch.no_grad()
    def _read_on(self, text: torch.Tensor, base: TextReader, proxy: TextReader) -> Iterator[Positions]:
        at_once = max(1, PROBABILITIES_AT_ONCE // self._vocabulary)
        for start in range(0, len(text), at_once):
            here = text[start : start + at_once]
            # The logits for a position are those behind the token before it, and at first those behind the prompt.
            new = text[max(0, start - 1) : start + len(here) - 1]
            logits = []
            for name, reader in (("base", base), ("proxy", proxy)):
                found = reader.read(new[None] if len(new) else None, logits_to_keep=len(here))[0]
                reader.accept([len(here) - 1])
                unusable = is_unusable(found)
                if bool(unusable.any()):
                    at = int(unusable.int().argmax())
                    raise unusable_logits_error(name, getattr(self._pair, name), start + at)
                logits.append(found.float())
            of_proxy = logits[1].to(logits[0].device)
            probs = [each.softmax(-1) for each in (logits[0], of_proxy)]
            yield Positions(here.to(logits[0].device), probs[0], probs[1], unknown=of_proxy[0] == -torch.inf)
