"""Accept, refuse, resample: the step of speculative sampling in which no model takes part.

Draw y_1 ... y_γ from q. Accept y_i with probability min(1, r_i(y_i) / q_i(y_i)), stop at the first refusal
and draw from the normalised (r_i - q_i)_+ there; if all are accepted, draw one bonus token from r_{γ+1}.
Every token is then distributed exactly as r.

Papers: Leviathan et al., "Fast Inference from Transformers via Speculative Decoding", ICML 2023 (appendix A.1);
Chen et al., "Accelerating Large Language Model Decoding with Speculative Sampling" (arXiv 2302.01318).
"""

import torch

from ..rules.knapsack import parts_to_convert

# A residual below this mass is made of rounding errors of the two distributions, not of their difference.
SMALLEST_RESIDUAL = torch.finfo(torch.float32).eps


def verify(
    target_probs: torch.Tensor,
    draft_probs: torch.Tensor,
    draft_ids: torch.Tensor,
    draft_lengths: torch.Tensor | None = None,
    do_sample: bool = True,
    generator: torch.Generator | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Decide how much of a draft is kept, and draw the token that follows.

    Args:
        target_probs: r, shape `(B, γ + 1, V)`.
        draft_probs: q, the distributions that the draft was drawn from, shape `(B, γ, V)`. For a deterministic
            draft, one-hot rows.
        draft_ids: y, shape `(B, γ)`.
        draft_lengths: how many of the γ tokens each row drafted, at most γ, shape `(B,)`; all γ by default. What
            stands behind a row's length is ignored.
        do_sample: if False, a draft token is accepted where it equals argmax r, and the next token is argmax r.
        generator: source of the random numbers, on the device of `target_probs`.

    Returns:
        `accepted_lengths` `(B,)` and `next_tokens` `(B,)`, both int64: row b emits its first
        `accepted_lengths[b]` draft tokens and then `next_tokens[b]`. A residual that is numerically zero falls
        back to r.

    Raises:
        ValueError: if the shapes do not fit together.

    >>> target = torch.tensor([[[0.0, 1.0], [1.0, 0.0]]])
    >>> verify(target, torch.tensor([[[0.5, 0.5]]]), torch.tensor([[1]]))
    (tensor([1]), tensor([0]))
    """
    _check_shapes(target_probs, draft_probs, draft_ids, draft_lengths, with_bonus=True)
    accepted_lengths = count_accepted(target_probs, draft_probs, draft_ids, draft_lengths, do_sample, generator)
    return accepted_lengths, draw_next(
        target_probs, draft_probs, accepted_lengths, draft_lengths, do_sample, generator
    )


def count_accepted(
    target_probs: torch.Tensor,
    draft_probs: torch.Tensor,
    draft_ids: torch.Tensor,
    draft_lengths: torch.Tensor | None = None,
    do_sample: bool = True,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """The first half of :func:`verify`: how many draft tokens are accepted, shape `(B,)`.

    `target_probs` may end at position γ here: the bonus position plays no part.
    """
    _check_shapes(target_probs, draft_probs, draft_ids, draft_lengths)
    drafted = draft_ids.shape[1]
    if not drafted:
        return torch.zeros(len(draft_ids), dtype=torch.long, device=draft_ids.device)
    if draft_lengths is not None:
        is_drafted = torch.arange(drafted, device=draft_ids.device) < draft_lengths[:, None]
        draft_ids = draft_ids.where(is_drafted, 0)
    if do_sample:
        r_y = target_probs[:, :drafted].gather(-1, draft_ids[..., None]).squeeze(-1)
        q_y = draft_probs.gather(-1, draft_ids[..., None]).squeeze(-1)
        uniform = torch.rand(r_y.shape, dtype=r_y.dtype, device=r_y.device, generator=generator)
        accepted = uniform * q_y < r_y
    else:
        accepted = target_probs[:, :drafted].argmax(-1) == draft_ids
    if draft_lengths is not None:
        accepted &= is_drafted
    return accepted.long().cumprod(-1).sum(-1)


def draw_next(
    target_probs: torch.Tensor,
    draft_probs: torch.Tensor,
    accepted_lengths: torch.Tensor,
    draft_lengths: torch.Tensor | None = None,
    do_sample: bool = True,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """The second half of :func:`verify`: the token after the accepted ones, shape `(B,)`.

    Only position `accepted_lengths[b]` of row b is read, so `target_probs` must reach that far and no further.
    """
    target = _at(target_probs, accepted_lengths)
    if not do_sample:
        return target.argmax(-1)
    drafted = draft_probs.shape[1]
    if drafted:
        refused = accepted_lengths < (drafted if draft_lengths is None else draft_lengths)
        draft = _at(draft_probs, accepted_lengths.clamp(max=drafted - 1))
        residual = (target - draft).clamp(min=0)
        use_residual = refused & (residual.sum(-1) > SMALLEST_RESIDUAL)
        target = torch.where(use_residual[:, None], residual, target)
    return draw(target, generator)


def draw(probs: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
    """One id from each row of probabilities `(B, V)`, which need not sum to 1, `(B,)` int64.

    By inversion in float64. Nothing is read back from the device; a row that has no distribution (NaN, zeros) gives
    some id.
    """
    uniform = torch.rand(len(probs), 1, dtype=torch.float64, device=probs.device, generator=generator)
    parts = parts_to_convert(probs)
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


def _at(probs: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """One position of each row of probabilities `(B, n, V)`, `(B, V)`."""
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
    fits = (
        draft_probs.dim() == 3
        and target_probs.dim() == 3
        and target_probs.shape[0] == batch
        and drafted + with_bonus <= target_probs.shape[1] <= drafted + 1
        and target_probs.shape[2] == vocabulary
        and draft_ids.shape == (batch, drafted)
        and (draft_lengths is None or draft_lengths.shape == (batch,))
    )
    if not fits:
        named = {"target_probs": target_probs, "draft_probs": draft_probs, "draft_ids": draft_ids}
        if draft_lengths is not None:
            named["draft_lengths"] = draft_lengths
        got = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in named.items())
        raise ValueError(
            "Expected target_probs (B, γ + 1, V), draft_probs (B, γ, V), draft_ids (B, γ) and draft_lengths (B,), "
            f"got {got}."
        )
