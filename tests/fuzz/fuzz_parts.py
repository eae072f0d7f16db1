"""Processors and stopping criteria of the user's, by name. The fuzz and its oracle make them anew for each call."""

from collections.abc import Callable

import torch
from fuzz_models import VOCABULARY
from transformers import (
    EosTokenCriteria,
    LogitNormalization,
    LogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    PrefixConstrainedLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteria,
    SuppressTokensLogitsProcessor,
)

IDS = torch.arange(VOCABULARY)


class Bias(LogitsProcessor):
    """Adds what the last token says."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return scores + 2 * torch.cos(input_ids[:, -1:] * IDS[: scores.shape[-1]]).to(scores)


class CountedBias(LogitsProcessor):
    """Adds what the number of its calls says."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return scores + 2 * torch.cos(0.7 * self.calls * IDS[: scores.shape[-1]]).to(scores)


class InPlace(LogitsProcessor):
    """Bans the token after the last one, in the tensor that it gets."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return scores.scatter_(-1, (input_ids[:, -1:] + 1) % scores.shape[-1], -torch.inf)


class FiniteBans(LogitsProcessor):
    """Bans every fifth token with a number."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        banned = (IDS[: scores.shape[-1]] + input_ids[:, -1:]) % 5 == 0
        return scores.masked_fill(banned, -1e4)


class Double(LogitsProcessor):
    """Returns another dtype than it gets."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return scores.double() * 1.1


class Watch(LogitsProcessor):
    """Notes whether it was given a text for which no token is left."""

    def __init__(self) -> None:
        self.has_seen_none = False

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.has_seen_none |= bool((scores == -torch.inf).all(dim=-1).any())
        return scores


class Odd(StoppingCriteria):
    """Ends a text with a token that leaves 3 when divided by 7."""

    def __call__(self, input_ids: torch.Tensor, scores: object, **kwargs: object) -> torch.Tensor:
        return input_ids[:, -1] % 7 == 3


class Counted(StoppingCriteria):
    """Ends every text when it is asked for the fifth time."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, input_ids: torch.Tensor, scores: object, **kwargs: object) -> torch.Tensor:
        self.calls += 1
        return torch.full((len(input_ids),), self.calls >= 5)


PROCESSORS: dict[str, Callable[[], LogitsProcessor]] = {
    "normalized": LogitNormalization,
    "penalty": lambda: RepetitionPenaltyLogitsProcessor(1.3),
    "no repeats": lambda: NoRepeatNGramLogitsProcessor(2),
    "only some": lambda: SuppressTokensLogitsProcessor(list(range(0, VOCABULARY, 3))),
    "prefix": lambda: PrefixConstrainedLogitsProcessor(
        lambda row, text: [token for token in range(VOCABULARY) if (token + int(text[-1])) % 4], num_beams=1
    ),
    "bias": Bias,
    "counted bias": CountedBias,
    "in place": InPlace,
    "finite bans": FiniteBans,
    "double": Double,
}
CRITERIA: dict[str, Callable[[], StoppingCriteria]] = {
    "odd": Odd,
    "counted": Counted,
    "own eos": lambda: EosTokenCriteria(eos_token_id=[7, 8, 9, 10]),
}
