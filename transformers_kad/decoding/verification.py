"""Accept draft tokens or replace them: the step of speculative sampling in which no model takes part.

Draw y_1 ... y_γ from q. Accept y_i with probability min(1, r_i(y_i) / q_i(y_i)), stop at the first refusal and draw
from the normalised (r_i - q_i)_+ there; if all are accepted, draw one bonus token from r_{γ+1}. Every token is then
distributed exactly as r. This is *token verification*.

*Block verification* decides on the draft as a whole. With P_0 = 1 and

    P_i = min(1, P_{i-1} r_i(y_i) / q_i(y_i))                   the chance that at least i tokens are accepted
    R_i(v) = max(0, P_i r_{i+1}(v) - q_{i+1}(v))                the residual behind i tokens
    h_i = sum R_i / (sum R_i + 1 - P_i) for i < γ, h_γ = P_γ

each i from 1 to γ gets a uniform number of its own. The accepted length is the largest i whose number is below h_i, 0
if there is none, and the next token is drawn from the normalised R_i, or from r_{γ+1} if all are accepted. Every token
is again distributed exactly as r, and on average no fewer tokens are accepted. For a draft of one token and for a
deterministic draft the two are equal in law, and so they are in greedy decoding.

Papers: Leviathan et al., "Fast Inference from Transformers via Speculative Decoding", ICML 2023 (appendix A.1);
Chen et al., "Accelerating Large Language Model Decoding with Speculative Sampling" (arXiv 2302.01318);
Sun et al., "Block Verification Accelerates Speculative Decoding", ICLR 2025 (arXiv 2403.10444).
"""

import torch

from ..configuration import VERIFICATIONS
from ..rules.arithmetic import LIMB, LIMB_BITS, has_float64, split_for_float64, sum_in_float64, sum_precisely, to_limbs
from ..rules.registry import unknown_name_message

# A residual with no more mass than this consists of rounding errors, not of a difference of the two distributions.
SMALLEST_RESIDUAL = torch.finfo(torch.float32).eps


def verify(
    target_probs: torch.Tensor,
    draft_probs: torch.Tensor,
    draft_ids: torch.Tensor,
    draft_lengths: torch.Tensor | None = None,
    do_sample: bool = True,
    generator: torch.Generator | None = None,
    verification: str = "token",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Decide how many tokens of a draft are accepted, and draw the token that follows.

    Args:
        target_probs: r, shape `(B, γ + 1, V)`.
        draft_probs: q, the distributions that the draft was drawn from, shape `(B, γ, V)`. For a deterministic
            draft, one-hot rows.
        draft_ids: y, shape `(B, γ)`.
        draft_lengths: how many of the γ tokens each row has drafted, shape `(B,)`; all γ by default. What stands after
            a row's own draft is ignored.
        do_sample: if False, a draft token is accepted where it equals argmax r, and the next token is argmax r.
        generator: source of the random numbers, on the device of `target_probs`.
        verification: "token" or "block", see above. Without `do_sample` they are the same.

    Returns:
        `accepted_lengths` and `next_tokens`, both `(B,)` int64: row b emits its first `accepted_lengths[b]` draft
        tokens and then `next_tokens[b]`. Where the residual is numerically zero, the latter is drawn from r.

    Raises:
        ValueError: if the shapes do not fit together, or for an unknown verification.

    >>> target = torch.tensor([[[0.0, 1.0], [1.0, 0.0]]])
    >>> verify(target, torch.tensor([[[0.5, 0.5]]]), torch.tensor([[1]]))
    (tensor([1]), tensor([0]))
    """
    _check_shapes(target_probs, draft_probs, draft_ids, draft_lengths, with_bonus=True)
    if verification not in VERIFICATIONS:
        raise ValueError(unknown_name_message("verification", verification, VERIFICATIONS))
    path_chances = None
    if verification == "block" and do_sample:
        accepted, path_chances = accept_block(target_probs, draft_probs, draft_ids, draft_lengths, generator)
    else:
        accepted = count_accepted(target_probs, draft_probs, draft_ids, draft_lengths, do_sample, generator)
    return accepted, draw_next(
        target_probs, draft_probs, accepted, draft_lengths, do_sample, generator, path_chances=path_chances
    )


def count_accepted(
    target_probs: torch.Tensor,
    draft_probs: torch.Tensor,
    draft_ids: torch.Tensor,
    draft_lengths: torch.Tensor | None = None,
    do_sample: bool = True,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """The first half of :func:`verify` by tokens: how many draft tokens are accepted, shape `(B,)`.

    The bonus position is not needed yet: `target_probs` may be of shape `(B, γ, V)` here.
    """
    _check_shapes(target_probs, draft_probs, draft_ids, draft_lengths)
    drafted = draft_ids.shape[1]
    if not drafted:
        return torch.zeros(len(draft_ids), dtype=torch.long, device=draft_ids.device)
    if draft_lengths is not None:
        is_drafted = torch.arange(drafted, device=draft_ids.device) < draft_lengths[:, None]
        draft_ids = draft_ids.where(is_drafted, 0)
    if do_sample:
        r_y, q_y = probs_of(draft_ids, target_probs), probs_of(draft_ids, draft_probs)
        uniform = torch.rand(r_y.shape, dtype=r_y.dtype, device=r_y.device, generator=generator)
        accepted = uniform * q_y < r_y
    else:
        accepted = target_probs[:, :drafted].argmax(-1) == draft_ids
    if draft_lengths is not None:
        accepted &= is_drafted
    return accepted.long().cumprod(-1).sum(-1)


def accept_block(
    target_probs: torch.Tensor,
    draft_probs: torch.Tensor,
    draft_ids: torch.Tensor,
    draft_lengths: torch.Tensor | None = None,
    generator: torch.Generator | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The first half of :func:`verify` by blocks.

    The bonus position is not needed yet: `target_probs` may be of shape `(B, γ, V)` here.

    Returns:
        How many draft tokens are accepted, `(B,)` int64, and the chance P of these tokens, `(B,)`, for `draw_next`.
    """
    _check_shapes(target_probs, draft_probs, draft_ids, draft_lengths)
    batch, drafted = draft_ids.shape
    if not drafted:
        return torch.zeros(batch, dtype=torch.long, device=draft_ids.device), draft_probs.new_ones(batch)
    if draft_lengths is None:
        draft_lengths = torch.full((batch,), drafted, device=draft_ids.device)
    path_chances, stop_chances = block_chances(target_probs[:, :drafted], draft_probs, draft_ids, draft_lengths)
    counts = torch.arange(1, drafted + 1, device=draft_ids.device)
    uniform = torch.rand(stop_chances.shape, dtype=stop_chances.dtype, device=stop_chances.device, generator=generator)
    accepted = longest_accepted((uniform < stop_chances) & (counts <= draft_lengths[:, None]))
    return accepted, path_chances.gather(-1, accepted[:, None]).squeeze(-1)


def block_chances(
    target_probs: torch.Tensor, draft_probs: torch.Tensor, draft_ids: torch.Tensor, draft_lengths: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """P and h of block verification, for r and q of shape `(B, γ, V)`.

    Where P_i = 1, at least i tokens are accepted with certainty, so that h_i = 1. There the residual may be zero as
    well (r = q), which would make h_i = 0/0. Everywhere else 1 - P_i is at least the rounding error of a number below
    1, and the quotient is finite. Rounding errors in the sum of R_i change h_i much where both it and 1 - P_i are
    of that size, but h_i is asked with a probability of sum R_i + 1 - P_i only.

    Returns:
        P_0 ... P_γ, `(B, γ + 1)`, and h_1 ... h_γ, `(B, γ)`. What stands behind a row's own draft means nothing.
    """
    counts = torch.arange(1, draft_ids.shape[1] + 1, device=draft_ids.device)
    is_drafted = counts <= draft_lengths[:, None]
    draft_ids = draft_ids.where(is_drafted, 0)
    r_y, q_y = probs_of(draft_ids, target_probs), probs_of(draft_ids, draft_probs)
    # A token that q rules out was not drawn from q: it is accepted where r allows it, as in token verification.
    ratios = (r_y / q_y).clamp(max=torch.finfo(r_y.dtype).max).where(r_y > 0, 0.0)
    path_chances = chances_of_paths(ratios.where(is_drafted, 1.0))
    residuals = residual_of(target_probs[:, 1:], draft_probs[:, 1:], path_chances[:, 1:-1])
    masses = sum_in_float64(residuals) if has_float64(residuals.device) else sum_precisely(residuals)
    missing = 1 - path_chances[:, 1:-1].to(masses.dtype)
    stop_chances = (masses / (masses + missing)).where(missing > 0, 1.0)
    of_whole_drafts = path_chances[:, 1:].to(masses.dtype)
    stop_chances = torch.cat([stop_chances, of_whole_drafts[:, -1:]], dim=-1)
    return path_chances, stop_chances.where(counts != draft_lengths[:, None], of_whole_drafts)


def chances_of_paths(ratios: torch.Tensor) -> torch.Tensor:
    """P_0 ... P_γ of block verification, `(B, γ + 1)`, from r_i(y_i) / q_i(y_i), `(B, γ)`."""
    chances = [torch.ones_like(ratios[:, 0])]
    for ratio in ratios.unbind(-1):
        chances.append((chances[-1] * ratio).clamp(max=1))
    return torch.stack(chances, dim=-1)


def longest_accepted(accepted: torch.Tensor) -> torch.Tensor:
    """The largest i from 1 to γ that is flagged in `(B, γ)`, 0 if none is, `(B,)` int64."""
    return (accepted * torch.arange(1, accepted.shape[1] + 1, device=accepted.device)).amax(-1)


def residual_of(target: torch.Tensor, draft: torch.Tensor, path_chances: torch.Tensor | None) -> torch.Tensor:
    """(P r - q)_+ of probabilities `(..., V)`, with P `(...)`, which is 1 in token verification (None)."""
    if path_chances is None:
        return (target - draft).clamp_(min=0)
    return (path_chances[..., None] * target).sub_(draft).clamp_(min=0)


def probs_of(ids: torch.Tensor, probs: torch.Tensor) -> torch.Tensor:
    """The probabilities of ids `(B, n)` in the first n positions of `(B, n or more, V)`, `(B, n)`."""
    return probs[:, : ids.shape[1]].gather(-1, ids[..., None]).squeeze(-1)


def draw_next(
    target_probs: torch.Tensor,
    draft_probs: torch.Tensor,
    accepted_lengths: torch.Tensor,
    draft_lengths: torch.Tensor | None = None,
    do_sample: bool = True,
    generator: torch.Generator | None = None,
    *,
    path_chances: torch.Tensor | None = None,
) -> torch.Tensor:
    """The second half of :func:`verify`: the token that follows the accepted ones, shape `(B,)`.

    Of row b only position `accepted_lengths[b]` is needed: `target_probs` may end after the last of these positions.
    `path_chances` is what :func:`accept_block` returned, None for token verification.
    """
    target = _at(target_probs, accepted_lengths)
    if not do_sample:
        return target.argmax(-1)
    drafted = draft_probs.shape[1]
    if drafted:
        refused = accepted_lengths < (drafted if draft_lengths is None else draft_lengths)
        draft = _at(draft_probs, accepted_lengths.clamp(max=drafted - 1))
        residual = residual_of(target, draft, path_chances)
        use_residual = refused & (residual.sum(-1) > SMALLEST_RESIDUAL)
        target = torch.where(use_residual[:, None], residual, target)
    return draw(target, generator)


def draw(probs: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
    """Draw one id from each row of `(B, V)`, `(B,)` int64; the rows need not sum to 1.

    The cumulated probabilities are inverted in float64, or in whole numbers if the device has no float64. Nothing is
    read back from the device. A row that is no distribution (with NaN, or all zeros) gives an arbitrary id.
    """
    if not has_float64(probs.device):
        return _invert_units(probs, generator).clamp(max=probs.shape[-1] - 1)
    uniform = torch.rand(len(probs), 1, dtype=torch.float64, device=probs.device, generator=generator)
    parts = split_for_float64(probs)
    if len(parts) == 1:
        drawn = _invert(probs, uniform)
    else:
        shares = uniform.split([len(part) for part in parts])
        drawn = torch.cat([_invert(part, share) for part, share in zip(parts, shares, strict=True)])
    return drawn.squeeze(-1).clamp(max=probs.shape[-1] - 1)


def _invert(probs: torch.Tensor, share: torch.Tensor) -> torch.Tensor:
    """The first id of each row of `(B, V)` with more than a share `(B, 1)` of the sum up to it, `(B, 1)`."""
    cumulated = probs.cumsum(-1, dtype=torch.float64)
    return torch.searchsorted(cumulated, share * cumulated[:, -1:], right=True)


def _invert_units(probs: torch.Tensor, generator: torch.Generator | None) -> torch.Tensor:
    """:func:`draw` on a device without float64, `(B,)`; ids may be beyond the last one.

    Probabilities are in multiples of 2^-60. The share of the sum is (a + b / 2^30) / 2^30 with random whole numbers a
    and b below 2^30. The sum is below 2^62, and with its lower 30 bits apart no intermediate result exceeds 64 bits.
    """
    upper, lower = to_limbs(probs, 2)
    cumulated = (upper * LIMB + lower).cumsum(-1)
    a, b = torch.randint(LIMB, (2, len(probs), 1), device=probs.device, generator=generator)
    upper, lower = cumulated[:, -1:] >> LIMB_BITS, cumulated[:, -1:] & LIMB - 1
    share = upper * a + (lower * a + upper * b + (lower * b >> LIMB_BITS) >> LIMB_BITS)
    not_beyond: torch.Tensor = cumulated <= share
    return not_beyond.sum(-1)


def _at(probs: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """One position `(B,)` of each row of probabilities `(B, n, V)`, `(B, V)`."""
    first = torch.arange(len(probs), device=probs.device) * probs.shape[1]
    return probs.flatten(0, 1).index_select(0, first + positions)


def _check_shapes(
    target_probs: torch.Tensor,
    draft_probs: torch.Tensor,
    draft_ids: torch.Tensor,
    draft_lengths: torch.Tensor | None,
    with_bonus: bool = False,
) -> None:
    """Raise unless the shapes fit together; `with_bonus` demands the target's position after the draft."""
    batch, drafted, vocabulary = draft_probs.shape if draft_probs.dim() == 3 else (-1, -1, -1)
    positions = [drafted + 1] if with_bonus else [drafted, drafted + 1]
    if (
        target_probs.shape in [(batch, count, vocabulary) for count in positions]
        and draft_ids.shape == (batch, drafted)
        and (draft_lengths is None or draft_lengths.shape == (batch,))
    ):
        return
    named = {"target_probs": target_probs, "draft_probs": draft_probs, "draft_ids": draft_ids}
    if draft_lengths is not None:
        named["draft_lengths"] = draft_lengths
    got = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in named.items())
    expected = "target_probs (B, γ + 1, V), draft_probs (B, γ, V), draft_ids (B, γ) and draft_lengths (B,)"
    raise ValueError(f"Expected {expected}, got {got}.")
