"""What a call should have returned, computed without the package: transformers' own loop, and a plain processor in it.

The oracle stands in the list of processors where KAD stood. It knows q from forwards of the proxy over whole texts,
without a cache and without padding, and makes r by `reference.py`, with Python's floats. Behind it a processor forces
the tokens that the call emitted, so that one run of `generate` shows what should have been chosen at each of them,
where the text should have ended, and what fills it up.
"""

import math
from dataclasses import dataclass, field, replace
from typing import Any

import reference
import torch
from fuzz_models import PADDING, VOCABULARY
from peft import PeftModel
from transformers import LogitsProcessor

from transformers_kad import ExactDeferral

BANNED_BELOW = 746.0
STAND_IN = 0  # what a proxy reads in the place of ids that it does not have
ROUNDING = 2e-7
NO_TOKEN = VOCABULARY + 59  # an end of sequence that never comes


@dataclass
class Position:
    """One emitted token, as it should have been chosen."""

    scores: torch.Tensor  # (V,) float64: of the base, behind the processors before KAD
    proxy_logits: torch.Tensor  # (V,) float64, over the base's vocabulary
    reference_logits: torch.Tensor | None
    state: float | None  # of the rule with a memory
    p: list[float] = field(default_factory=list)
    q: list[float] = field(default_factory=list)
    r: list[float] = field(default_factory=list)
    mass: float | None = None
    final: torch.Tensor | None = None  # (V,) float64: log r, behind the processors after KAD


@dataclass(frozen=True)
class PlainRule:
    """A rule of `reference.py`, with its temperature."""

    name: str
    parameters: dict[str, Any]
    temperature: float

    def apply(self, position: Position, generator: torch.Generator | None = None) -> Position:
        """The position with p, q, r and D; with a generator, p and q are rounded at random, as much as in float32."""
        scores = position.scores
        banned = scores < scores.max() - BANNED_BELOW
        p = (scores.masked_fill(banned, -math.inf) / self.temperature).softmax(-1)
        q, q0 = (
            None if logits is None else self._without(logits, banned, p)
            for logits in (position.proxy_logits, position.reference_logits)
        )
        if generator is not None:
            p, q = (probs * (1 + ROUNDING * torch.randn(len(probs), generator=generator)) for probs in (p, q))
        p, q, q0 = (None if probs is None else probs.tolist() for probs in (p, q, q0))
        if self.name in reference.TARGETS:
            return replace(position, p=p, q=q, r=reference.target(self.name, self.parameters, p, q, q0))
        mask = self.mask(p, q, position.state)
        return replace(position, p=p, q=q, r=reference.mix(p, q, mask), mass=reference.mass(p, mask))

    def mask(self, p: list[float], q: list[float], state: float | None) -> list[bool]:
        """The deferral mask."""
        if self.name == "exact":  # an optimum can't be found by trying all subsets of so many tokens
            return ExactDeferral(**self.parameters).defer(torch.tensor(p)).tolist()
        if self.name == "paced":
            return reference.dual(p, q, math.exp(-state))
        return reference.MASKS[self.name](p, q, **self.parameters)

    @property
    def first_state(self) -> float | None:
        """The state of a rule with a memory at the beginning of a text."""
        return -math.log(self.parameters["threshold"]) if self.name == "paced" else None

    def next_state(self, position: Position) -> float | None:
        """The state behind a position."""
        if self.name != "paced":
            return None
        moved = position.state + self.parameters["step_size"] * (position.mass - self.parameters["budget"])
        return min(max(moved, 0.0), -math.log(0.01))

    def _without(self, logits: torch.Tensor, banned: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
        logits = logits.masked_fill(banned, -math.inf)
        return p if logits.max() == -math.inf else (logits / self.temperature).softmax(-1)


@torch.no_grad()
def logits_along(model: Any, prompt: list[int], tokens: list[int], *, without_adapter: bool = False) -> torch.Tensor:
    """The logits behind a prompt and behind each token after it, `(n + 1, V)` float64, in the base's vocabulary."""
    ids = torch.tensor([prompt + tokens])
    ids[ids >= model.get_input_embeddings().weight.shape[0]] = STAND_IN
    if without_adapter:
        with model.disable_adapter():
            logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
    else:
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
    logits = logits[0, len(prompt) - 1 :].double()
    missing = VOCABULARY - logits.shape[-1]
    return torch.nn.functional.pad(logits, (0, missing), value=-math.inf) if missing > 0 else logits[:, :VOCABULARY]


class Oracle(LogitsProcessor):
    """Stands in KAD's place, and knows which tokens were emitted.

    Attributes:
        positions: of each row, its positions.
    """

    def __init__(
        self,
        rule: PlainRule,
        proxy: Any,
        prompts: list[list[int]],
        emitted: list[list[int]],
        states: list[float | None],
    ) -> None:
        self.rule, self.emitted = rule, emitted
        self._states, self._steps = list(states), 0
        pairs = list(zip(prompts, emitted, strict=True))
        self._proxy_logits = [logits_along(proxy, *pair) for pair in pairs]
        self._reference_logits: list[Any] = [None] * len(pairs)
        if rule.name == "implicit_reward":
            assert isinstance(proxy, PeftModel)
            self._reference_logits = [logits_along(proxy, *pair, without_adapter=True) for pair in pairs]
        self.positions: list[list[Position]] = [[] for _ in pairs]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        at, self._steps = self._steps, self._steps + 1
        result = scores.float().log_softmax(-1)
        for row, tokens in enumerate(self.emitted):
            if at >= len(tokens):
                continue
            q0 = self._reference_logits[row]
            q0 = None if q0 is None else q0[at]
            position = Position(scores[row].double().clone(), self._proxy_logits[row][at], q0, self._states[row])
            position = self.rule.apply(position)
            self._states[row] = self.rule.next_state(position)
            self.positions[row].append(position)
            result[row] = torch.tensor(position.r, dtype=torch.float64).log().to(result)
        return result

    @property
    def states_along(self) -> list[list[float | None]]:
        """Of each row, the states before each of its tokens, and behind the last."""
        pairs = zip(self.positions, self._states, strict=True)
        return [[*(position.state for position in own), last] for own, last in pairs]


class Force(LogitsProcessor):
    """Notes the scores that each token was chosen from, and forces the one that was emitted.

    Behind the tokens of a row it forces a token that can't be taken for padding: it shows in the text if that goes on.
    """

    def __init__(self, oracle: Oracle) -> None:
        self._oracle, self._steps = oracle, 0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        at, self._steps = self._steps, self._steps + 1
        forced = torch.full_like(scores, -math.inf)
        for row, tokens in enumerate(self._oracle.emitted):
            is_emitted = at < len(tokens)
            forced[row, tokens[at] if is_emitted else PADDING + 1] = 0.0
            if is_emitted:
                self._oracle.positions[row][at].final = scores[row].double().clone()
        return forced


class BeamOracle(LogitsProcessor):
    """Stands in KAD's place in a beam search, and asks the proxy about every text from its beginning."""

    def __init__(
        self,
        rule: PlainRule,
        proxy: Any,
        prompts: list[list[int]],
        prompt_length: int,
        states: list[float | None],
        beams: int,
    ) -> None:
        self.rule, self._proxy, self._prompts, self._beams = rule, proxy, prompts, beams
        self._prompt_length = prompt_length
        self._states: dict[tuple[int, tuple[int, ...]], float | None] = {(row, ()): s for row, s in enumerate(states)}
        self.positions: list[Position] = []
        self.masses: dict[tuple[int, tuple[int, ...]], float | None] = {}  # by the prompt and the tokens behind it

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        rows = []
        for number, text in enumerate(input_ids[:, self._prompt_length :].tolist()):
            row, tokens = number // self._beams, tuple(text)
            prompt, is_reward = self._prompts[row], self.rule.name == "implicit_reward"
            q = logits_along(self._proxy, prompt, text)[-1]
            q0 = logits_along(self._proxy, prompt, text, without_adapter=True)[-1] if is_reward else None
            state = self._states.get((row, tokens), self.rule.first_state)
            position = self.rule.apply(Position(scores[number].double().clone(), q, q0, state))
            for token in range(VOCABULARY):
                self._states[row, (*tokens, token)] = self.rule.next_state(position)
            self.masses[row, tokens] = position.mass
            self.positions.append(position)
            rows.append(position.r)
        return torch.tensor(rows, dtype=torch.float64).log().to(torch.float32)
