"""Merges adapters into the weights, if the merged model computes the same as before."""

import torch
from peft import PeftConfig, PeftModel
from peft.tuners.trainable_tokens.layer import TrainableTokensLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import PreTrainedModel

from ...models.model_settings import text_setting

_PROBE_LENGTH = 16  # length of the text on which logits are compared, in tokens


def reason_not_to_merge(adapted: PeftModel) -> str | None:
    """Why merging an adapter is known to change the model's output; None if there is no known reason."""
    model, config = adapted.get_base_model(), adapted.active_peft_config
    if config.is_prompt_learning:
        return f"{config.peft_type.value} changes the model's input, not its weights"
    if getattr(config, "alora_invocation_tokens", None) is not None:
        return "an activated LoRA acts only after its invocation tokens, but merged weights act everywhere"
    if getattr(model, "is_quantized", False):
        return "the model below it is quantized, and the merged weights would be rounded again"
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    tied = text_setting(model.config, "tie_word_embeddings")
    # peft itself replaces tokens that were trained one by one in both layers.
    if tied and any(isinstance(end, BaseTunerLayer) and not isinstance(end, TrainableTokensLayer) for end in ends):
        return "it acts on embeddings that input and output share, so merging it into one changes the other"
    return None


def merge_and_compare(adapted: PeftModel) -> tuple[PreTrainedModel, str | None]:
    """Merge an adapter and compare the logits of one short text before and after.

    Args:
        adapted: a model in evaluation mode. It must not be used afterwards.

    Returns:
        The merged model, and None if it computes the same as before. Otherwise the second value is the reason why
        neither model may be used: weights that were merged wrongly or in part can't be restored by unmerging, so the
        adapter must be loaded again.
    """
    ids = _probe(adapted)
    before = _logits(adapted, ids)
    try:
        merged = adapted.merge_and_unload().eval()
    except (AttributeError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
        return adapted, f"peft can't merge it ({str(error).splitlines()[0]})"
    difference = relative_difference(before, _logits(merged, ids))
    allowed = max(torch.finfo(p.dtype).eps for p in merged.parameters() if p.is_floating_point()) ** 0.5
    if not difference <= allowed:  # written so that NaN counts as a difference
        return merged, f"the merged model's logits on a short text differ by {difference:.1%} of their spread"
    return merged, None


def relative_difference(before: torch.Tensor, after: torch.Tensor) -> float:
    """The largest change of logits `(..., V)` at any position, relative to the spread of the logits there.

    Change and spread are root mean squares over the vocabulary. A constant that is added to all logits of a position
    does not count, since it does not change the probabilities.

    >>> before = torch.tensor([[0.0, 1.0, 2.0], [0.0, 1.0, 2.0]])
    >>> relative_difference(before, before + torch.tensor([[5.0], [7.0]]))
    0.0
    """
    center = before - before.mean(-1, keepdim=True)
    moved = (after - after.mean(-1, keepdim=True)) - center
    return float((moved.norm(dim=-1) / center.norm(dim=-1)).max())


def trained_tokens(config: PeftConfig) -> dict[str | None, list[int]]:
    """The ids of the tokens that an adapter trains one by one, by the module that they belong to.

    The key None stands for the input embeddings.
    """
    listed = getattr(config, "trainable_token_indices", None) or getattr(config, "token_indices", None) or {}
    return dict(listed) if isinstance(listed, dict) else {None: list(listed)}


def _probe(adapted: PeftModel) -> torch.Tensor:
    """A short text `(1, L)`: tokens spread evenly over the vocabulary, and tokens that were trained one by one."""
    embeddings = adapted.get_input_embeddings()
    rows = embeddings.weight.shape[0]
    ids = torch.linspace(0, rows - 1, _PROBE_LENGTH + 2)[1:-1].long().tolist()
    for trained in trained_tokens(adapted.active_peft_config).values():
        ids += trained[:_PROBE_LENGTH]
    return torch.tensor([ids], device=embeddings.weight.device)


def _logits(model: PreTrainedModel | PeftModel, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits.float()
