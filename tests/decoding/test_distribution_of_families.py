"""Speculative decoding samples from r where the caches have sliding windows or recurrent states, also in batches.

Pairs of tiny models with five tokens generate texts after one prompt, and after three prompts of different lengths in
one padded batch. The texts are compared by chi-square with their exact law, which is computed for each prompt alone,
without a cache and without padding (exact_law.py). All texts outgrow the windows, and the logits are so far apart that
a wrong token or a wrong state in a cache changes the law visibly.

A p-value below THRESHOLD fails a test. P_VALUES of them are computed at most, so with correct code the module gives a
false alarm with a probability of at most FALSE_ALARM = 1e-6 over the choice of the seeds (Bonferroni, and as far as
the chi-square approximation goes); the seeds are fixed.

The last tests plant bugs in the package and demand that the same comparison refuses what comes out.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Any, NamedTuple

import exact_law
import numpy as np
import pytest
import torch
from exact_law import Law, Text
from test_distribution import new_tokens
from tiny_families import tiny_family
from transformers import Cache, PreTrainedModel

from transformers_kad import DualDeferral, KADLogitsProcessor
from transformers_kad.decoding.speculative_round import SpeculativeRound
from transformers_kad.decoding.speculative_rows import RowByRow
from transformers_kad.models import cache_rollback
from transformers_kad.models.cached_model import CachedModel
from transformers_kad.models.reading_round import Round
from transformers_kad.models.recurrent_states import StateCopy

FALSE_ALARM = 1e-6
P_VALUES = 12
THRESHOLD = FALSE_ALARM / P_VALUES

VOCABULARY = 5
WINDOW = 4
PROMPTS: tuple[Text, ...] = ((1, 2, 3, 4, 1, 2), (3, 2, 1), (4, 2))  # 0 is the padding
NEW_TOKENS = 5
EOS = 2  # where rows end before others
DRAFTS = 3
RULE_THRESHOLD, TEMPERATURE = 0.6, 1.2

# Which of the prompts a call reads.
ALONE, BATCH = (0,), (0, 1, 2)
CALLS = {ALONE: 180, BATCH: 100}
# Bases with recurrent layers take longer, and fewer texts show the bugs that are planted there.
CALLS_WITH_A_RECURRENT_BUG = {ALONE: 120, BATCH: 60}

# The families and the seeds of base and proxy.
PAIRS = {
    "windowed": (("gemma3_text", 15), ("mistral", 16)),
    "hybrid": (("falcon_h1", 7), ("qwen3_next", 8)),
    "recurrent": (("mamba2", 3), ("mamba2", 4)),
    # The rows of a batch take back different numbers of tokens from the states of the proxy.
    "recurrent_proxy": (("llama", 5), ("mamba2", 6)),
    "full_attention": (("llama", 7), ("qwen3", 8)),
}
Patch = pytest.MonkeyPatch


class Pair(NamedTuple):
    base: PreTrainedModel
    proxy: PreTrainedModel


@cache
def pair_of(kind: str) -> Pair:
    return Pair(*(tiny_family(name, window=WINDOW, seed=seed, vocab_size=VOCABULARY) for name, seed in PAIRS[kind]))


@cache
def law_of(kind: str, prompt: Text, eos: int | None) -> Law:
    """The exact law of the texts that follow a prompt."""
    base, proxy = (exact_law.prefix_logits(model, prompt, NEW_TOKENS, VOCABULARY) for model in pair_of(kind))
    rule = exact_law.dual(RULE_THRESHOLD)

    def step(prefix: Text) -> np.ndarray:
        p, q = (exact_law.softmax(logits[prefix] / TEMPERATURE) for logits in (base, proxy))
        return rule(p, q, None)

    return exact_law.law_of_texts(step, NEW_TOKENS, eos)


def sample(kind: str, rows: tuple[int, ...], calls: int, eos: int | None) -> list[Text]:
    """Texts from calls that read the prompts of some rows. The number of its row stands before each text."""
    base, proxy = pair_of(kind)
    rule = DualDeferral(RULE_THRESHOLD)
    kad = KADLogitsProcessor(proxy, rule, component_temperature=TEMPERATURE, num_assistant_tokens=DRAFTS)
    columns = max(len(PROMPTS[row]) for row in rows)
    prompts = torch.tensor([(0,) * (columns - len(PROMPTS[row])) + PROMPTS[row] for row in rows])
    arguments: dict[str, Any] = {"do_sample": True, "top_k": 0, "max_new_tokens": NEW_TOKENS, "eos_token_id": eos}
    arguments |= {"attention_mask": (prompts != 0).long(), "logits_processor": [kad], "assistant_model": proxy}
    torch.manual_seed(1)
    texts = []
    for _ in range(calls):
        new_texts = new_tokens(base.generate(prompts, **arguments), columns, eos)
        texts += [(row, *text) for row, text in zip(rows, new_texts, strict=True)]
    return texts


def p_value(kind: str, rows: tuple[int, ...], calls: int, eos: int | None = None) -> float:
    """The p-value of sampled texts under their law, where the number of the row is a part of each text.

    The test assumes that the row of each text is drawn at random. Here every row has the same number of texts, so that
    the counts vary less than the test expects: p-values are too large rather than too small.
    """
    law = {(row, *text): prob / len(rows) for row in rows for text, prob in law_of(kind, PROMPTS[row], eos).items()}
    return exact_law.chi_square_p_value(sample(kind, rows, calls, eos), law)


@pytest.fixture(scope="module")
def judge() -> Iterator[Callable[[float], None]]:
    """Counts the p-values that can raise a false alarm."""
    yield from exact_law.counted_p_values(THRESHOLD, P_VALUES)


@pytest.mark.slow
@pytest.mark.parametrize("rows", [ALONE, BATCH], ids=["alone", "batch"])
@pytest.mark.parametrize("kind", ["windowed", "hybrid", "recurrent", "recurrent_proxy"])
def test_texts_follow_their_law(judge: Callable[[float], None], kind: str, rows: tuple[int, ...]) -> None:
    judge(p_value(kind, rows, CALLS[rows]))


def rows_end_rounds_together(monkeypatch: Patch) -> None:
    """As over caches that can't take back different numbers of tokens in the rows of a batch."""
    monkeypatch.setattr(CachedModel, "needs_rows_in_step", True)


@pytest.mark.parametrize("eos", [None, EOS])
def test_rows_that_end_rounds_together_follow_their_law(
    judge: Callable[[float], None], monkeypatch: pytest.MonkeyPatch, eos: int | None
) -> None:
    """Where a round ends depends on draws for earlier positions only, so that every token is still drawn from r."""
    rows_end_rounds_together(monkeypatch)
    judge(p_value("full_attention", BATCH, CALLS[BATCH], eos))


@pytest.mark.parametrize("kind", ["windowed", "hybrid"])
def test_rows_that_leave_the_batch_follow_their_law(judge: Callable[[float], None], kind: str) -> None:
    """Rows end at different lengths; the others go on with their own windows and states."""
    judge(p_value(kind, BATCH, CALLS[BATCH], EOS))


# Bugs to plant


def states_are_not_restored(role: str) -> Callable[[Patch], None]:
    """The states of the base or of the proxy stay as the refused tokens left them."""

    def states_stay(monkeypatch: Patch) -> None:
        restore = CachedModel._restore

        def without_states(self: CachedModel, ended: Round, tokens: list[int]) -> None:
            with pytest.MonkeyPatch.context() as patch:
                if self.role == role:
                    patch.setattr(StateCopy, "restore_rows", lambda cache, copies: None)
                restore(self, ended, tokens)

        monkeypatch.setattr(CachedModel, "_restore", without_states)

    states_stay.__name__ = f"states_of_the_{role}_are_not_restored"
    return states_stay


def states_are_those_of_the_first_row(monkeypatch: Patch) -> None:
    """All rows take the states back to the step to which the first row does."""
    restore_rows = StateCopy.restore_rows

    def alike(cache: Cache, copies: Sequence[StateCopy]) -> None:
        restore_rows(cache, [copies[0]] * len(copies))

    monkeypatch.setattr(StateCopy, "restore_rows", alike)


def a_waiting_token_is_read_twice(monkeypatch: Patch) -> None:
    """Of the tokens that are read again from a restored state, the last one is read two times."""
    behind_waiting = CachedModel._behind_waiting

    def twice(self: CachedModel, *args: Any) -> Any:
        assert self._waiting is not None
        self._waiting = torch.cat([self._waiting, self._waiting[:, -1:]], dim=-1)
        return behind_waiting(self, *args)

    monkeypatch.setattr(CachedModel, "_behind_waiting", twice)


def a_refused_token_stays(monkeypatch: Patch) -> None:
    """Caches take back one token less than was refused."""
    take_back = CachedModel.take_back

    def one_less(self: CachedModel, tokens: list[int]) -> None:
        take_back(self, [max(count - 1, 0) for count in tokens])

    monkeypatch.setattr(CachedModel, "take_back", one_less)


def a_row_emits_a_token_of_another_position(monkeypatch: Patch) -> None:
    """A row that accepted more than another ends the round with the token that it has drawn for a later position.

    Right is its draft token at the position where the other row ended.
    """
    emit = RowByRow.emit

    def misplaced(self: RowByRow, round_: SpeculativeRound, tokens: dict[int, list[int]]) -> list[int]:
        end = min(map(len, tokens.values())) - 1
        return emit(self, round_, {place: [*own[:end], own[-1]] for place, own in tokens.items()})

    monkeypatch.setattr(RowByRow, "emit", misplaced)


def all_rows_drop_as_many_columns_as_one(choose: Callable[[Sequence[int]], int]) -> Callable[[Patch], None]:
    """Rows are not moved to the right; all end where the row does whose end is the min or the max."""

    def rows_stay(monkeypatch: Patch) -> None:
        keep_ends = cache_rollback.keep_ends

        def alike(values: torch.Tensor, ends: Sequence[int], columns: int, dim: int) -> torch.Tensor:
            return keep_ends(values, [choose(ends)] * len(ends), columns, dim=dim)

        monkeypatch.setattr(cache_rollback, "keep_ends", alike)

    rows_stay.__name__ = f"all_rows_end_at_the_{choose.__name__}"
    return rows_stay


# The comparison refuses wrong code

BUGS: list[tuple[str, tuple[int, ...], Callable[[Patch], None]]] = [
    ("windowed", ALONE, a_refused_token_stays),
    ("windowed", BATCH, a_refused_token_stays),
    ("windowed", BATCH, all_rows_drop_as_many_columns_as_one(min)),
    ("windowed", BATCH, all_rows_drop_as_many_columns_as_one(max)),
    *(
        (kind, rows, bug)
        for kind in ("hybrid", "recurrent")
        for rows in (ALONE, BATCH)
        for bug in (states_are_not_restored("base"), states_are_not_restored("proxy"), a_waiting_token_is_read_twice)
    ),
    ("hybrid", BATCH, a_row_emits_a_token_of_another_position),
    ("recurrent", BATCH, a_row_emits_a_token_of_another_position),
    ("recurrent_proxy", BATCH, states_are_not_restored("proxy")),
    ("recurrent_proxy", BATCH, states_are_those_of_the_first_row),
    ("full_attention", BATCH, a_row_emits_a_token_of_another_position),
]


@pytest.mark.parametrize(
    ("kind", "rows", "bug"),
    BUGS,
    ids=[f"{kind}-{'batch' if rows == BATCH else 'alone'}-{bug.__name__}" for kind, rows, bug in BUGS],
)
def test_refuses(
    monkeypatch: pytest.MonkeyPatch, kind: str, rows: tuple[int, ...], bug: Callable[[Patch], None]
) -> None:
    if kind == "full_attention":
        rows_end_rounds_together(monkeypatch)
    bug(monkeypatch)
    calls = CALLS_WITH_A_RECURRENT_BUG if kind in ("hybrid", "recurrent") else CALLS
    assert p_value(kind, rows, calls[rows]) < THRESHOLD
