"""kad_generate: the one decoding loop that drafts with the proxy and verifies with the base."""

from typing import Any

import torch
from transformers import (
    Cache,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PrefixConstrainedLogitsProcessor,
    PreTrainedModel,
    StoppingCriteriaList,
    SynthIDTextWatermarkLogitsProcessor,
    UnbatchedClassifierFreeGuidanceLogitsProcessor,
)
from transformers.generation import BaseStreamer, GenerateDecoderOnlyOutput

from .candidate_generator import KADCandidateGenerator
from .composition import Composition, compose
from .proxy import can_crop, context_length, describe, is_unusable, unusable_logits_error
from .verification import count_accepted, draw_next


def kad_generate(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    streamer: BaseStreamer | None = None,
    **model_kwargs: Any,
) -> torch.Tensor | GenerateDecoderOnlyOutput:
    """Decode one sequence speculatively: the proxy drafts, the base verifies, the result is distributed as r.

    Not called directly, but by `generate`: `generate(..., logits_processor=[kad], assistant_model=proxy)` runs
    it, and so does `generate(..., logits_processor=[kad], custom_generate=kad_generate)`. The arguments are
    those that `generate` hands to every decoding method.

    A round forwards the base once, over the last token and the draft, and the proxy at most
    `num_assistant_tokens + 1` times. Processors before KAD in the list see the base's scores, those after it see
    log r. A processor of the user's, or one of transformers that keeps a state, is called as it would be token by
    token: once per emitted token, in order. The rest are functions of text and scores, and are called for the whole
    draft at once. Stopping criteria are asked after every token.

    Returns:
        The sequence `(1, L)`, or with `return_dict_in_generate` a `GenerateDecoderOnlyOutput` whose `scores`
        are the processed log r and whose `logits` are the base's.

    Raises:
        ValueError: no KAD processor in `logits_processor`, several sequences, a cache that can't be rolled
            back, outputs that this loop does not collect, or logits that are NaN, +inf or all -inf.
    """
    at = _place_of_kad(logits_processor)
    kad, call = logits_processor[at], logits_processor[at].open_call
    for name in ("output_attentions", "output_hidden_states"):
        if getattr(generation_config, name):
            raise ValueError(f"`{name}=True` is not available in speculative decoding; leave out `assistant_model`.")

    do_sample = generation_config.do_sample
    before, after = LogitsProcessorList(logits_processor[:at]), LogitsProcessorList(logits_processor[at + 1 :])
    stateless = all(map(_is_stateless, (*before, *after)))
    base = _Base(model, generation_config.prefill_chunk_size, input_ids, model_kwargs)
    generator = KADCandidateGenerator(
        kad.cached_proxy,
        num_assistant_tokens=kad.num_assistant_tokens,
        vocabulary=model.config.get_text_config(decoder=True).vocab_size,
        do_sample=do_sample,
        component_temperature=kad.component_temperature,
        eos_token_ids=call.eos_token_ids,
        max_length=_longest_draft_end(stopping_criteria.max_length, model),
        proxy_text=call.proxy_text,
        chunk_size=generation_config.prefill_chunk_size,
        vocabulary_alignment=kad.vocabulary_alignment,
    )
    keep_dict = generation_config.return_dict_in_generate
    scores: tuple[torch.Tensor, ...] | None = () if keep_dict and generation_config.output_scores else None
    raw_logits: tuple[torch.Tensor, ...] | None = () if keep_dict and generation_config.output_logits else None

    finished = False
    while not finished:
        candidate_ids, draft_logits = generator.get_candidates(input_ids)
        draft_ids = candidate_ids[:, input_ids.shape[1] :]
        drafted = draft_ids.shape[1]
        base_logits = base.logits(candidate_ids, keep=drafted + 1)
        window = _Window(model, kad, before, after, candidate_ids, base_logits, do_sample)
        draft_probs = draft_logits.to(base_logits.device).softmax(-1)

        # 1. The target r at the drafted positions decides how much of the draft is accepted.
        count = window.accept(draft_ids, draft_logits, draft_probs, stride=drafted if stateless else 1)
        tokens = draft_ids[0, :count].tolist()
        if not tokens or tokens[-1] not in call.eos_token_ids:
            # 2. If all of it, one more token comes from the position after it, for which the proxy runs once more.
            if count == drafted:
                window.extend(generator.next_logits(candidate_ids)[:, None])
                window.read()
            # 3. Else the token comes from the residual of the first refusal.
            accepted = draft_ids.new_tensor([count])
            tokens.append(int(draw_next(window.target_probs, draft_probs, accepted, do_sample=do_sample)))

        # 4. Emit token by token: any criterion may end the text in the middle of the round.
        emitted = 0
        while emitted < len(tokens) and not finished:
            token = tokens[emitted]
            input_ids = torch.cat([input_ids, input_ids.new_tensor([[token]])], dim=-1)
            if scores is not None:
                scores += (window.scores[emitted][None],)
            if raw_logits is not None:
                raw_logits += (base_logits[:, emitted],)
            if streamer is not None:
                streamer.put(torch.tensor([token]))
            emitted += 1
            finished = bool(stopping_criteria(input_ids, scores).all())
        call.recorder.record(drafted, min(count, emitted), tokens[:emitted], window.positions[:emitted])
        call.base_forwards = base.forwards

        # 5. Both caches forget the refused tokens; the last token emitted is forwarded in the next round.
        base.settle(input_ids.shape[1] - 1)
        generator.settle(input_ids)
        kad.settle_reference(input_ids)

    if streamer is not None:
        streamer.end()
    if not keep_dict:
        return input_ids
    return GenerateDecoderOnlyOutput(sequences=input_ids, scores=scores, logits=raw_logits, past_key_values=base.cache)


def _place_of_kad(logits_processor: LogitsProcessorList) -> int:
    for place, processor in enumerate(logits_processor):
        if getattr(processor, "is_kad_processor", False):
            return place
    raise ValueError("`kad_generate` needs a `KADLogitsProcessor` in `logits_processor`, got none.")


# Of transformers' own processors, those that keep a state, or call a function of the user's.
_ONE_BY_ONE = (
    PrefixConstrainedLogitsProcessor,
    SynthIDTextWatermarkLogitsProcessor,
    UnbatchedClassifierFreeGuidanceLogitsProcessor,
)


def _is_stateless(processor: LogitsProcessor) -> bool:
    """Whether a processor is known to be a function of text and scores."""
    own = type(processor).__module__ == LogitsProcessor.__module__
    return own and not isinstance(processor, _ONE_BY_ONE)


def _longest_draft_end(max_length: int | None, model: PreTrainedModel) -> int | None:
    """The length that a text with a draft and one more token may reach: the call's limit, or the base's context."""
    context = context_length(model)
    if max_length is None or context is None:
        return max_length if context is None else context + 1
    return min(max_length, context + 1)


class _Window:
    """The positions of one round: from the base's logits to the scores that tokens are drawn from."""

    def __init__(
        self,
        model: PreTrainedModel,
        kad: Any,
        before: LogitsProcessorList,
        after: LogitsProcessorList,
        candidate_ids: torch.Tensor,
        base_logits: torch.Tensor,
        do_sample: bool,
    ) -> None:
        self.model, self.kad, self.before, self.after = model, kad, before, after
        self.candidate_ids, self.base_logits, self.do_sample = candidate_ids, base_logits, do_sample
        self.text_length = candidate_ids.shape[1] - base_logits.shape[1] + 1  # without the draft
        self.positions: list[Composition] = []
        self.scores: list[torch.Tensor] = []  # processed log r, (V,) each
        self.target_probs = base_logits[:, :0]  # (1, positions so far, V)
        self._unusable: list[tuple[str, PreTrainedModel, int, torch.Tensor]] = []

    def accept(
        self, draft_ids: torch.Tensor, draft_logits: torch.Tensor, draft_probs: torch.Tensor, stride: int
    ) -> int:
        """How much of the draft is accepted; `stride` positions are processed at a time, up to a refusal."""
        count = 0
        while count == len(self.positions) < draft_ids.shape[1]:
            part = slice(count, count + stride)
            self.extend(draft_logits[:, part])
            accepted = count_accepted(
                self.target_probs[:, part], draft_probs[:, part], draft_ids[:, part], do_sample=self.do_sample
            )
            count += self.read(accepted)
        return count

    def extend(self, proxy_logits: torch.Tensor) -> None:
        """Process the next n positions, given the proxy's logits there, `(1, n, V)`."""
        begin, count = len(self.positions), proxy_logits.shape[1]
        if count == 0:
            return
        texts = [self.candidate_ids[:, : self.text_length + at] for at in range(begin, begin + count)]
        base_scores = self._process(self.before, texts, self.base_logits[0, begin : begin + count].clone())
        reference_logits = self.kad.reference_logits(texts[-1], count, base_scores.shape[-1])
        composition = compose(
            self.kad.rule, base_scores / self.kad.component_temperature, proxy_logits[0], reference_logits
        )
        log_target = self._process(self.after, texts, composition.target_probs.log())
        self.scores += log_target.unbind()
        self.positions += [composition.row(row) for row in range(count)]
        self.target_probs = torch.cat([self.target_probs, log_target.softmax(-1)[None]], dim=1)

        self._unusable.append(("base", self.model, texts[0].shape[1], is_unusable(base_scores)))
        self._unusable.append(
            ("proxy", self.kad.proxy, texts[0].shape[1], is_unusable(proxy_logits[0]).to(base_scores.device))
        )

    def read(self, accepted: torch.Tensor | None = None) -> int:
        """A number fetched from the device together with the check of all logits since the last time."""
        counts = [] if accepted is None else [accepted]
        values = torch.cat([*counts, *(rows.long() for *_, rows in self._unusable)]).tolist()
        count, flags = (0, values) if accepted is None else (values[0], values[1:])
        for role, model, position, rows in self._unusable:
            bad, flags = flags[: len(rows)], flags[len(rows) :]
            if any(bad):
                raise unusable_logits_error(role, model, position + bad.index(1))
        self._unusable.clear()
        return count

    def _process(
        self, processors: LogitsProcessorList, texts: list[torch.Tensor], scores: torch.Tensor
    ) -> torch.Tensor:
        """Processors expect one position at a time, with the text that leads to it."""
        if not processors:
            return scores
        rows = []
        for text, row in zip(texts, scores.split(1), strict=True):
            rows.append(processors(text, row))
        return torch.cat(rows)


class _Base:
    """The base's forwards over a growing text, with the cache and the inputs that `generate` prepared."""

    def __init__(
        self,
        model: PreTrainedModel,
        chunk_size: int | None,
        input_ids: torch.Tensor,
        model_kwargs: dict[str, Any],
    ) -> None:
        cache = model_kwargs.get("past_key_values")
        if not model_kwargs.get("use_cache") or not isinstance(cache, Cache):
            raise ValueError(
                f"Speculative decoding needs a key-value cache, got use_cache={model_kwargs.get('use_cache')!r} and "
                f"a cache of type {type(cache).__name__} for {describe(model)}."
            )
        if not can_crop(cache, 0):
            raise ValueError(
                f"Speculative decoding needs a cache that can take tokens back, got {cache!r}. Leave "
                "`cache_implementation` at its default, or leave out `assistant_model` to decode token by token."
            )
        if model_kwargs.get("inputs_embeds") is not None:
            raise ValueError(
                "Speculative decoding needs `input_ids`, got `inputs_embeds`. Leave out `assistant_model` to "
                "decode token by token."
            )
        self.model, self.cache, self.chunk_size = model, cache, chunk_size
        self.forwards = 0
        self._prompt_length = input_ids.shape[1]
        self._per_token = {name: model_kwargs.pop(name, None) for name in _EXTENSIONS}
        self._kwargs = model_kwargs
        held = cache.get_seq_length()
        if held > self._prompt_length:
            raise ValueError(
                f"`past_key_values` holds {held} tokens, more than the {self._prompt_length} of `input_ids`: pass the "
                "whole text as `input_ids`, also where a cache for its beginning is passed."
            )
        cache.activate_past_recording()
        if held == self._prompt_length:
            self.settle(self._prompt_length - 1)

    def logits(self, input_ids: torch.Tensor, keep: int) -> torch.Tensor:
        """The base's logits at the last `keep` positions of the text, `(1, keep, V)`, float32."""
        stop, start = input_ids.shape[1], self.cache.get_seq_length()
        stops = list(range(start + self.chunk_size, stop - keep, self.chunk_size)) if self.chunk_size else []
        per_token = {
            name: None if value is None else _EXTENSIONS[name](value, stop - self._prompt_length)
            for name, value in self._per_token.items()
        }
        for end in [*stops, stop]:
            inputs = self.model.prepare_inputs_for_generation(
                input_ids[:, :end],
                next_sequence_length=end - start,
                is_first_iteration=self.forwards == 0,
                **{name: None if value is None else value[..., :end] for name, value in per_token.items()},
                **self._kwargs,
            )
            if "logits_to_keep" in inputs:
                inputs["logits_to_keep"] = keep if end == stop else 1
            output = self.model(**inputs, return_dict=True)
            if end != stop:
                self.cache.crop(0)
            start = end
        self.forwards += 1
        return output.logits[:, -keep:].to(dtype=torch.float32, device=input_ids.device, copy=True)

    def settle(self, length: int) -> None:
        """Take back all but the first `length` tokens; 0 tokens too, which trims sliding windows."""
        self.cache.crop(min(length - self.cache.get_seq_length(), 0))


def _repeat_last(value: torch.Tensor, count: int) -> torch.Tensor:
    return torch.cat([value, value[..., -1:].expand(*value.shape[:-1], count)], dim=-1)


def _count_on(value: torch.Tensor, count: int) -> torch.Tensor:
    steps = torch.arange(1, count + 1, dtype=value.dtype, device=value.device)
    return torch.cat([value, value[..., -1:] + steps], dim=-1)


# Inputs with one entry a token, and how they go on behind the prompt.
_EXTENSIONS = {"attention_mask": _repeat_last, "position_ids": _count_on, "token_type_ids": _repeat_last}
