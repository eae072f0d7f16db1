"""One round of speculative decoding: from the models' logits to the tokens that every row emits."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from transformers import LogitsProcessor, PreTrainedModel

from ..models.model_errors import UnusableLogitsError, is_unusable, unusable_logits_error
from ..models.text_reader import tempered
from ..rules.composition import Composition, compose_positions, with_bans
from ..utils.transfers import fetch
from .call_processors import CallProcessors, RowTexts, can_run_ahead, look_at_text, must_go_in_step
from .candidate_generator import Draft, KADCandidateGenerator
from .open_call import OpenCall
from .text_buffer import TextBuffer
from .verification import accept_block, count_accepted, draw_next, probs_of

_BEHIND_KAD = "behind KAD"


class RoundSettings:
    """What all rounds of a call have in common.

    Args:
        base: the base, for error messages.
        call: the call.
        before: the processors before KAD in the list of the call.
        after: the processors behind it.
        rows: number of rows of the batch.
        do_sample: whether tokens are drawn; the likeliest ones are taken otherwise.
        with_chances: whether `SpeculativeRound.chances` is wanted.

    Attributes:
        processors_in_step: whether the processors need all rows to end their rounds together.
        run_ahead: whether the processors may see positions that a text may never reach.
        verification: "token" or "block". Tokens are verified where the two are equal in law, in greedy decoding and
            for drafts that are certain, and where processors are called one position after the other, so that r of
            the whole draft is not known at once.
    """

    def __init__(
        self,
        base: PreTrainedModel,
        call: OpenCall,
        before: Sequence[LogitsProcessor],
        after: Sequence[LogitsProcessor],
        rows: int,
        *,
        do_sample: bool,
        with_chances: bool,
    ) -> None:
        self.base, self.call, self.do_sample, self.with_chances = base, call, do_sample, with_chances
        processors = [*before, *after]
        self.processors_in_step = must_go_in_step(processors, rows)
        self.run_ahead = not self.processors_in_step and can_run_ahead(processors)
        blocks = do_sample and self.run_ahead and call.settings.drafter != "prompt_lookup"
        self.verification = call.settings.verification if blocks else "token"
        self.look_at_text = look_at_text(processors)
        if call.rule_memory is not None:
            call.rule_memory.begin(rows)
        self.before = CallProcessors(before, rows, in_step=self.processors_in_step)
        self.after = CallProcessors(after, rows, in_step=self.processors_in_step)


@dataclass(frozen=True)
class _Part:
    """Some neighbouring positions of a round, of all rows, from `begin` on."""

    begin: int
    composition: Composition  # of B * n rows
    log_target: torch.Tensor | None  # processed, (B, n, V); None where no processor stands behind KAD
    target_probs: torch.Tensor  # (B, n, V): what is drawn from; in greedy decoding log_target, if there is one


class _Decision(NamedTuple):
    """What was fetched from the device of some neighbouring positions."""

    accepted: list[int]  # of every row, how many of its draft tokens there
    next_tokens: list[int]  # of every row, the token behind these; it is of no use where all were accepted
    faults: dict[int, tuple[int, UnusableLogitsError]]  # of some rows, the first position without a distribution


class SpeculativeRound:
    """The positions of one round, of every row that goes on.

    Args:
        settings: common to all rounds of the call.
        rows: the numbers of the rows in the batch of the call. The round speaks of a row by its place in this list.
        texts: of all rows of the call.
        draft: what was drafted behind them.
        base_logits: the base's logits, `(B, γ + 1, V)`.
        reference_logits: the reference's tempered logits, `(B, γ + 1, V)`, if the rule needs them.
        in_step: whether all rows end their rounds where the first of them ends it.

    Attributes:
        base_logits: as above, on the base's device.
        drafted: of each row the ids that were drafted, filled up to the longest draft; known after `decide`.
        lengths: of each row, the number of tokens drafted; known after `decide`.
        accepted: of each row, how many of them were accepted.
        chances: of each row and each position that was looked at, Σ min(q, r): the probability with which a token
            that is drafted there is accepted. Empty unless the settings ask for it.
        ratios: in block verification the same for q(v) / r(v), with the token v that the row emits there.
    """

    def __init__(
        self,
        settings: RoundSettings,
        rows: list[int],
        texts: TextBuffer,
        draft: Draft,
        base_logits: torch.Tensor,
        reference_logits: torch.Tensor | None,
        *,
        in_step: bool,
    ) -> None:
        device = base_logits.device
        self.settings, self.rows, self.in_step = settings, rows, in_step
        self.base_logits, self._reference_logits = base_logits, reference_logits
        self._draft_ids, self._draft_lengths = draft.ids.to(device), draft.lengths.to(device)
        self._draft_probs, self._proxy_logits = draft.probs.to(device), draft.proxy_logits.to(device)
        self._draft_is_from_proxy = draft.from_proxy
        self._memory = settings.call.rule_memory
        self._next_rule_states = None if self._memory is None else self._memory.current  # (B, ...)
        self.lengths: list[int] = []
        self.accepted = [0] * len(rows)
        self.chances = [list[float]() for _ in rows]
        self.ratios = [list[float]() for _ in rows]
        self.drafted: list[list[int]] = []
        self._parts: list[_Part] = []
        with_drafts = list[torch.Tensor]()
        if settings.look_at_text:
            drafts = zip(rows, self._draft_ids.split(1), strict=True)
            with_drafts = [torch.cat([texts.text(row), ids], dim=-1) for row, ids in drafts]
        self._texts = RowTexts(rows, with_drafts, [texts.lengths[row] for row in rows], texts.all_texts)
        self._going_on = list(range(len(rows)))

    def decide(self, generator: KADCandidateGenerator, emit: Callable[[dict[int, list[int]]], Sequence[int]]) -> None:
        """Decide which tokens each row emits: what is accepted of its draft, and one more.

        The bonus position, behind a draft that was accepted as a whole, may need one more forward of the proxy, which
        is run if a row gets there.

        Args:
            generator: has drafted the tokens.
            emit: takes the next tokens of some rows as soon as they are known, and returns the rows that they do not
                end. Where rows go in step, it emits the same number of tokens of each.

        Raises:
            UnusableLogitsError: a row came to a position that has no distribution.
        """
        drafted, known = self._draft_ids.shape[1], self._proxy_logits.shape[1]
        ends = {known, drafted + 1} - {0} if self.settings.run_ahead else range(1, drafted + 2)
        begin = 0
        for end in sorted(ends):
            if end > known:
                bonus = generator.next_logits().to(self._proxy_logits.device)
                self._proxy_logits = torch.cat([self._proxy_logits, bonus[:, None]], dim=1)
            self._going_on = self._decide_positions(begin, end, emit)
            begin = end
            if not self._going_on:
                break

    def _decide_positions(
        self, begin: int, end: int, emit: Callable[[dict[int, list[int]]], Sequence[int]]
    ) -> list[int]:
        """Decide the positions from `begin` to `end` of the rows that go on; which of them go on behind these."""
        decision = self._verify_positions(begin, end)
        tokens = {}
        for row in self._going_on:
            count = decision.accepted[row]
            self.accepted[row] += count
            tokens[row] = self.drafted[row][begin : begin + count]
            if begin + count < end:
                tokens[row].append(decision.next_tokens[row])
            if row in decision.faults:
                tokens[row] = tokens[row][: decision.faults[row][0]]
        unfinished = emit(tokens)
        emitted = {row: len(tokens[row]) for row in unfinished}
        if self.in_step:
            emitted = dict.fromkeys(unfinished, min(emitted.values(), default=0))
        for row in unfinished:
            if row in decision.faults and decision.faults[row][0] == emitted[row]:
                raise decision.faults[row][1]
        whole = [row for row in unfinished if decision.accepted[row] == emitted[row] == end - begin]
        return [] if self.in_step and len(whole) < len(unfinished) else whole

    def positions(self, row: int, count: int) -> list[Composition]:
        """What the rule made of the first `count` positions of a row, in pieces."""
        pieces = []
        for part in self._parts:
            length = part.target_probs.shape[1]
            own = min(count - part.begin, length)
            if own > 0:
                pieces.append(part.composition.rows(slice(row * length, row * length + own)))
        return pieces

    def keep_rule_states(self, emitted: list[int], staying: list[int]) -> None:
        """At the end of the round, go on with the states of a rule with a memory behind what each row emitted.

        Args:
            emitted: how many tokens each row emitted.
            staying: the places of the rows that go on.
        """
        if self._memory is None:
            return
        states = [self._memory.current[:, None]]
        for part in self._parts:
            assert part.composition.next_state is not None
            states.append(part.composition.next_state.unflatten(0, part.target_probs.shape[:2]))
        self._memory.end_round(self.rows, torch.cat(states, dim=1), emitted, staying)

    def scores(self, row: int, at: int) -> torch.Tensor:
        """The processed log r of one position of a row, `(V,)`."""
        part = next(part for part in reversed(self._parts) if part.begin <= at)
        if part.log_target is None:
            return part.target_probs[row, at - part.begin].log()
        return part.log_target[row, at - part.begin]

    def _verify_positions(self, begin: int, end: int) -> _Decision:
        """Make r of the positions from `begin` to `end`, and verify the draft there."""
        part, unusable = self._make_targets(begin, end)
        self._parts.append(part)
        target_probs, do_sample = part.target_probs, self.settings.do_sample
        draft_probs, draft_ids = self._draft_probs[:, begin:end], self._draft_ids[:, begin:end]
        lengths = (self._draft_lengths - begin).clamp(min=0, max=draft_ids.shape[1])
        flags, path_chances = torch.stack(list(unusable.values())), None
        if self.settings.verification == "block":
            # A block ends before a position that has no distribution, which is an error only if the row comes there.
            lengths = lengths.minimum((~flags.any(0)).long().cumprod(-1).sum(-1))
            accepted, path_chances = accept_block(target_probs, draft_probs, draft_ids, lengths)
        else:
            accepted = count_accepted(target_probs, draft_probs, draft_ids, lengths, do_sample=do_sample)
        last = accepted.clamp(max=end - begin - 1)
        next_tokens = draw_next(
            target_probs, draft_probs, last, lengths, do_sample=do_sample, path_chances=path_chances
        )
        chances = ratios = None
        if self.settings.with_chances:
            q = part.composition.proxy_probs.view_as(target_probs)
            if self.settings.verification == "block":
                emitted = torch.nn.functional.pad(draft_ids, (0, end - begin - draft_ids.shape[1]))
                is_next = torch.arange(end - begin, device=emitted.device) == accepted[:, None]
                emitted = torch.where(is_next, next_tokens[:, None], emitted)
                ratios = probs_of(emitted, q) / probs_of(emitted, target_probs)
            if do_sample:
                chances = torch.minimum(q, target_probs).sum(-1)
            else:
                chances = (q.argmax(-1) == target_probs.argmax(-1)).float()
        wanted = {"counts": accepted, "following": next_tokens, "flags": flags, "chances": chances, "ratios": ratios}
        return self._fetch(begin, list(unusable), {name: part for name, part in wanted.items() if part is not None})

    def _make_targets(self, begin: int, end: int) -> tuple[_Part, dict[str, torch.Tensor]]:
        """R of the positions from `begin` to `end`, and for each source of scores which are unusable, `(B, n)`."""
        settings, proxy_logits = self.settings.call.settings, self._proxy_logits[:, begin:end]
        rows, count, vocabulary = proxy_logits.shape
        base_scores = self.base_logits[:, begin:end]
        if self.settings.before:
            base_scores = self.settings.before(begin, base_scores.clone(), self._texts, self._going_on)
        unusable = {"base": is_unusable(base_scores), "proxy": is_unusable(proxy_logits)}
        reference_logits = None
        if self._reference_logits is not None:
            unusable["reference"] = is_unusable(self._reference_logits[:, begin:end])
            reference_logits = self._reference_logits[:, begin:end]
        proxy_probs = None
        if self._draft_is_from_proxy and end <= self._draft_ids.shape[1]:
            proxy_probs = self._draft_probs[:, begin:end]
        composition = compose_positions(
            settings.rule,
            tempered(with_bans(base_scores), settings.component_temperature),
            proxy_logits,
            reference_logits,
            proxy_probs=proxy_probs,
            state=self._next_rule_states,
        )
        if composition.next_state is not None:
            self._next_rule_states = composition.next_state.unflatten(0, (rows, count))[:, -1]
        target_probs, log_target = composition.target_probs.view(rows, count, vocabulary), None
        if self.settings.after:
            log_target = self.settings.after(begin, target_probs.log(), self._texts, self._going_on)
            # Greedy decoding takes the largest score as it is: +inf forces a token there.
            target_probs = log_target.softmax(-1) if self.settings.do_sample else log_target
            unusable[_BEHIND_KAD] = ~(target_probs.amax(-1) > -torch.inf)
        return _Part(begin, composition, log_target, target_probs), unusable

    def _fetch(self, begin: int, sources: list[str], wanted: dict[str, torch.Tensor]) -> _Decision:
        """Fetch from the device, in one transfer, all that is to be known of some positions.

        Args:
            begin: the first of the positions.
            sources: where the scores came from that may be unusable.
            wanted: `counts` of accepted tokens and the ones `following`, `(B,)` each; unusable `flags` of each source,
                `(sources, B, n)`; and what the settings ask for of `chances` and `ratios`, `(B, n)` each.
        """
        if begin == 0:
            wanted |= {"lengths": self._draft_lengths, "drafted": self._draft_ids}
        values = fetch(wanted)
        counts, following = values["counts"], values["following"]
        if begin == 0:
            self.lengths, self.drafted = values["lengths"], values["drafted"]
        for name, by_row in (("chances", self.chances), ("ratios", self.ratios)):
            for own, of_part in zip(by_row, values.get(name, ()), strict=False):
                own.extend(of_part)
        faults = {}
        for row, count in enumerate(counts):
            # What comes behind a refused draft token belongs to no text.
            reached = range(min(count + 1, wanted["flags"].shape[-1]))
            bad = ((at, s) for at in reached for s, own in zip(sources, values["flags"], strict=True) if own[row][at])
            for at, source in bad:
                faults[row] = at, self._fault(source, row, begin + at)
                break
        return _Decision(counts, following, faults)

    def _fault(self, source: str, row: int, at: int) -> UnusableLogitsError:
        """The error for a position of a row without a distribution: of a model, by its role, or behind KAD."""
        position, sequence = self._texts.lengths[row] + at, self.rows[row]
        if source != _BEHIND_KAD:
            models = {cached.role: cached.model for cached in self.settings.call.models} | {"base": self.settings.base}
            return unusable_logits_error(source, models[source], position, sequence)
        return UnusableLogitsError(
            f"The scores for position {position} of sequence {sequence} are NaN, +inf or all -inf after the "
            "processors behind KAD in `logits_processor`, so that no token can be chosen: one of them may have banned "
            "every token that r leaves."
        )
