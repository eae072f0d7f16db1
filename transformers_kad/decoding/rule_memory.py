"""The memory of a rule: its states of the texts of a call, and how a later call goes on with the same texts."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..rules.base import StatefulRule
from ..utils.transfers import send


@dataclass(frozen=True)
class RememberedText:
    """A text of an earlier call.

    Attributes:
        ids: its tokens, without padding.
        prompt_length: how many of them were the prompt.
        states: of the rule behind the prompt and behind each of the n emitted tokens, `(n + 1, ...)`.
    """

    ids: list[int]
    prompt_length: int
    states: torch.Tensor

    def shared_length(self, prompt: Sequence[int]) -> int:
        """How many tokens a prompt has in common with the text; 0 if it does not begin with the text's own prompt."""
        pairs = enumerate(zip(self.ids, prompt, strict=False))
        shared = next((at for at, (own, other) in pairs if own != other), min(len(self.ids), len(prompt)))
        return shared if shared >= self.prompt_length else 0


class RuleMemory:
    """The states of a rule of the texts of one call.

    Args:
        rule: the rule.
        prompts: the tokens of each of the B prompts, without padding.
        remembered: texts of an earlier call. A prompt that continues one of them goes on with its state.
        device: of the states.

    Attributes:
        current: the states behind the newest tokens of the rows that go on, `(rows, ...)`.
    """

    def __init__(
        self, rule: StatefulRule, prompts: list[list[int]], remembered: Sequence[RememberedText], device: torch.device
    ) -> None:
        self._prompts = prompts
        states = list(rule.initial_state(len(prompts), device))
        for row, prompt in enumerate(prompts):
            shared = [text.shared_length(prompt) for text in remembered]
            if longest := max(shared, default=0):
                text = remembered[shared.index(longest)]
                states[row] = text.states[longest - text.prompt_length].to(device)
        self._start = torch.stack(states)
        self.current = self._start
        # Of each row, the states behind its tokens in pieces `(k, ...)`. Behind its end they mean nothing.
        self._pieces: dict[int, list[torch.Tensor]] = {}
        self._length: int | None = None  # token by token: of the texts of the newest step, in columns
        self._next = self._start  # token by token: the states behind the position after these texts

    def begin(self, rows: int) -> None:
        """Begin with the states behind the prompts, each repeated for its beams or return sequences."""
        self.current = self._start_of(rows)

    def _start_of(self, rows: int) -> torch.Tensor:
        return self._start.repeat_interleave(rows // len(self._start), dim=0)

    def begin_step(self, rows: int, length: int, parents: list[int] | None) -> torch.Tensor:
        """Token by token: the states behind texts of a length, `(rows, ...)`.

        Args:
            rows: the number of texts.
            length: of the texts, in columns.
            parents: the row of the step before that each text continues; None where row i continues row i.

        Raises:
            RuntimeError: texts have grown by tokens for which the rule was not asked.
        """
        if self._length is None:
            self.begin(rows)
        elif length == self._length + 1:
            self.current = self._next
        elif length != self._length:  # where it is, the position is asked for once more
            raise RuntimeError(
                f"The texts went from {self._length} to {length} tokens in one step. A rule with a memory has to be "
                "asked for every token: let the decoding method call `logits_processor` at every step."
            )
        if self._length is not None and parents is not None:
            self.current = self.current[send(parents, self.current.device)]
        return self.current

    def end_step(self, length: int, states: torch.Tensor) -> None:
        """Token by token: the states `(rows, ...)` behind the position after texts of a length."""
        for row, state in enumerate(states):
            pieces = self._pieces.setdefault(row, [])
            del pieces[len(pieces) - (length == self._length) :]
            pieces.append(state[None])
        self._length, self._next = length, states

    def end_round(self, rows: Sequence[int], states: torch.Tensor, emitted: list[int], staying: list[int]) -> None:
        """Speculatively: go on behind the tokens that some rows have emitted in a round.

        Args:
            rows: the numbers of the rows.
            states: of these rows before the round and behind each of its positions, `(B, n + 1, ...)`.
            emitted: how many tokens each of the rows has emitted.
            staying: the places of the rows that go on.
        """
        for row, own, count in zip(rows, states, emitted, strict=True):
            self._pieces.setdefault(row, []).append(own[1 : count + 1])
        places, behind = send([staying, [emitted[place] for place in staying]], states.device)
        self.current = states[places, behind]

    def remember(self, emitted: list[list[int]]) -> list[RememberedText]:
        """The texts of a finished call whose rows kept their places.

        Args:
            emitted: the tokens of each row behind its prompt.
        """
        per_prompt = len(emitted) // len(self._prompts)
        texts = []
        for row, (tokens, start) in enumerate(zip(emitted, self._start_of(len(emitted)), strict=True)):
            prompt, states = self._prompts[row // per_prompt], torch.cat([start[None], *self._pieces[row]])
            texts.append(RememberedText([*prompt, *tokens], len(prompt), states[: len(tokens) + 1]))
        return texts
