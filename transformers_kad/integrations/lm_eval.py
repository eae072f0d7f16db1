"""KAD as a model type of the Language Model Evaluation Harness. Needs `pip install -e ".[lm-eval]"`.

    python -m transformers_kad.integrations.lm_eval --model kad --tasks gsm8k --apply_chat_template --batch_size 16 \
        --model_args base=BASE,proxy=PROXY,rule=dual,threshold=0.4 --output_path results.json

This is the harness's own command, `lm_eval`, with one more model type. Releases of the harness after 0.4.13 find
installed model types by themselves: `lm_eval --model kad ...`. To use several devices, each with a copy of the pair
and a share of the requests:

    accelerate launch -m transformers_kad.integrations.lm_eval --model kad ...
"""

import logging
import math
from collections.abc import Sequence
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

if find_spec("lm_eval") is None:
    raise ImportError('The harness is missing: pip install -e ".[lm-eval]"')

from lm_eval.__main__ import cli_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import chunks
from lm_eval.models.utils_hf import stop_sequences_criteria
from lm_eval.utils import handle_arg_string, simple_parse_args_string
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from .._version import __version__
from ..configuration import KADConfig
from ..logits_process import KADLogitsProcessor
from ..models.cached_model import CachedModel
from ..models.model_errors import is_unusable, unusable_logits_error
from ..models.model_settings import context_length
from ..models.text_reader import tempered
from ..models.vocabulary import align_vocabulary, check_tokenizers
from ..rules.base import StatefulRule
from ..rules.composition import compose_positions
from ..rules.registry import RULES, unknown_name_message
from .loading.configuration import OWN_SETTINGS, RULE_PARAMETERS, config_from, with_models
from .loading.devices import pick_device, quantization_config
from .loading.messages import silence_libraries
from .loading.models import below_adapter, clear_generation_config, load_model, load_tokenizer
from .loading.prompts import PLAIN_SAMPLING, eos_token_ids, pad_token_id
from .loading.thoughts import thought_opened_by, without_thoughts

logger = logging.getLogger(__name__)

# (key in the harness's cache, tokens of the context, tokens of the continuation)
Request = tuple[tuple[str, str] | None, list[int], list[int]]

# Arguments with the same meaning as for the harness's own model type `hf`.
_HARNESS_ARGUMENTS = (
    *("add_bos_token", "batch_size", "chat_template_args", "enable_thinking", "max_batch_size", "max_length"),
    *("parallelize", "prefix_token_id", "revision", "think_end_token", "truncation", "trust_remote_code"),
)
_OWN_ARGUMENTS = ("base", "proxy", "reference", "rule", "config", "speculative", "dtype", "device", "quantization")
_LOGITS_AT_ONCE = 2**24  # logits of one model to which the rule is applied at once: 64 MB in float32


@register_model("kad")
class KADLM(HFLM):
    """Evaluates the target distribution r of a base, a proxy and a rule.

    Log-likelihoods are sums of log r over the continuation, from one forward pass of each model over the whole text.
    The second value says whether greedy decoding would generate the continuation. Where r is 0 for a token, the
    log-likelihood is -inf: the harness ranks such a choice last (if all choices are impossible it takes the first),
    and a perplexity over it is inf.

    Texts are generated from r: with the likeliest token at each position, unless the task samples. `temperature`,
    `top_k` and `top_p` act on r, and have no effect unless the task sets them. The base's own `generation_config` is
    ignored. A text ends at every id that ends a turn of the base or of the proxy.

    Args:
        base: Hub id or folder of the base, a model or an adapter.
        proxy: Hub id or folder of the proxy, which must have the base's vocabulary.
        reference: the proxy before alignment, for the rule `implicit_reward`. Default: the proxy with its adapter
            switched off.
        rule: a name from `RULES`; its parameters are further arguments. Default: the rule of `config`, or else "dual".
        config: folder or Hub repo with a `kad_config.json`. Its settings are used where no other is given.
        speculative: generate with drafts of the proxy. The rows of a batch are then decoded one after the other.
        dtype: dtype of the weights: "auto" (as saved), "float32", "bfloat16" or "float16".
        device: "auto", "cpu", "cuda:1", ...; under `accelerate` or `torchrun` each process has its own device.
        quantization: how the base is quantized: "torchao-int8", "bitsandbytes-8bit" or "bitsandbytes-4bit".
        **arguments: the rule's parameters; `component_temperature` (divides both models' logits before the rule);
            `num_assistant_tokens` (draft length); `verification` of drafts; and arguments of the harness's type `hf`:
            `add_bos_token`, `batch_size`, `chat_template_args`, `enable_thinking`, `max_batch_size`, `max_length`,
            `parallelize` (distributes the base over all devices), `prefix_token_id`, `revision` (of the base),
            `think_end_token`, `truncation`, `trust_remote_code`.

    Attributes:
        kad: the processor.
        kad_config: the settings of the processor.

    Raises:
        ValueError: an argument is unknown or out of range, a model is named nowhere, or the tokenizers differ.
        TypeError: the rule does not have one of the parameters.
    """

    def __init__(
        self,
        base: str | Path | None = None,
        proxy: str | Path | None = None,
        *,
        reference: str | Path | None = None,
        rule: str | None = None,
        config: str | Path | None = None,
        speculative: bool | str = False,
        dtype: str = "auto",
        device: str = "auto",
        quantization: str | None = None,
        **arguments: Any,
    ) -> None:
        harness = {name: arguments.pop(name) for name in _HARNESS_ARGUMENTS if name in arguments}
        self.kad_config = _config_from_arguments(config, rule, arguments, base, proxy)
        self.reference_path = reference
        self.speculative, self.quantization = _value(speculative), quantization
        if not isinstance(self.speculative, bool):
            raise ValueError(f"`speculative` must be true or false, got {speculative!r}.")
        if reference is not None and not RULES[self.kad_config.rule].needs_reference:
            raise ValueError(f"`reference` is for rules that need one, which {self.kad_config.rule!r} does not.")

        below = below_adapter(str(self.kad_config.base))
        super().__init__(
            pretrained=below or self.kad_config.base,
            backend="causal",
            tokenizer=load_tokenizer(str(self.kad_config.base)) if below else None,
            device=pick_device(device),
            dtype=dtype,
            **harness,
        )
        if hasattr(self, "accelerator"):  # the harness itself sets these with several GPUs only
            self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes

    @classmethod
    def create_from_arg_obj(cls, arg_dict: dict[str, Any], additional_config: dict[str, Any] | None = None) -> "KADLM":
        """Create the model from `--model_args`, which take precedence over `--device` and `--batch_size`."""
        others = {name: value for name, value in (additional_config or {}).items() if value is not None}
        return cls(**{**others, **arg_dict})

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict[str, Any] | None = None) -> "KADLM":
        """Create the model from a string of the form `name=value,name=value`."""
        return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

    def _create_model(
        self,
        pretrained: str,
        revision: str = "main",
        dtype: str = "auto",
        trust_remote_code: bool = False,
        parallelize: bool = False,
        **_: Any,
    ) -> None:
        """Load base, proxy and reference. The harness calls this once it knows the device and the base's tokenizer."""
        config, device = self.kad_config, str(self.device)
        base, proxy = str(config.base), str(config.proxy)
        proxy_tokenizer = load_tokenizer(proxy, trust_remote_code=trust_remote_code)
        check_tokenizers(self.tokenizer, proxy_tokenizer)
        if self.tokenizer.chat_template is None:
            self.tokenizer.chat_template = proxy_tokenizer.chat_template
        # The harness itself would prefer the unknown token to the end of sequence.
        self.tokenizer.pad_token_id = pad_token_id(self.tokenizer)
        self.tokenizer.model_input_names = ["input_ids", "attention_mask"]  # all that the harness reads
        if parallelize and hasattr(self, "accelerator"):
            raise ValueError(
                "`parallelize=True` distributes one base over all devices, but each of "
                f"{self.accelerator.num_processes} processes needs its own: start a single process, or leave it out."
            )

        where: dict[str, Any] = {"device": device, "dtype": dtype}
        if trust_remote_code:
            where["trust_remote_code"] = True
        spread: dict[str, Any] = {"device_map": "auto"} if parallelize else {}
        if self.quantization is not None:
            spread["quantization_config"] = quantization_config(self.quantization)
        if revision != "main":
            spread["revision"] = revision
        self._model = load_model(base, merge=not (parallelize or self.quantization), **where, **spread)

        switched_off = RULES[config.rule].needs_reference and self.reference_path is None
        proxy_model = load_model(proxy, merge=not switched_off, **where)
        reference = None if self.reference_path is None else load_model(str(self.reference_path), **where)
        self.kad = KADLogitsProcessor.from_config(proxy_model, config, reference=reference)

        self._cached = [CachedModel(self._model, "base"), CachedModel(proxy_model)]
        if self.kad.rule.needs_reference:
            before = proxy_model if reference is None else reference
            self._cached.append(CachedModel(before, "reference", without_adapter=reference is None))
        for cached in self._cached:
            cached.refresh()  # once, since nothing changes the models while the harness runs

        ends = {*eos_token_ids(self._model, proxy_model), self.tokenizer.eos_token_id, proxy_tokenizer.eos_token_id}
        self.eos_token_ids = sorted(ends - {None}) or None
        clear_generation_config(self._model)

    @property
    def max_length(self) -> int:
        """The maximum length of a text in tokens: `max_length` if it was given, else the shortest of the contexts."""
        if self._max_length:
            return self._max_length
        lengths = [context_length(cached.model) for cached in self._cached]
        return min([super().max_length, *(length for length in lengths if length is not None)])

    def get_model_info(self) -> dict[str, Any]:
        """The description of the model in the results: the harness's own fields, and the settings of KAD as "kad"."""
        kad = {
            **asdict(self.kad_config),
            "reference": None if self.reference_path is None else str(self.reference_path),
            "speculative": self.speculative,
            "quantization": self.quantization,
            "device": str(self.device),
            "batch_size": self.batch_size,
            "num_processes": self.world_size,
            "transformers_kad_version": __version__,
        }
        return {**super().get_model_info(), "kad": kad}

    # --- Generation -----------------------------------------------------------------------------------------

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Generate texts without thoughts, with or without `think_end_token`; "" if a thought is not closed."""
        texts = super().generate_until(requests, disable_tqdm)
        if self.think_end_token is None:  # else the harness has removed the thoughts
            texts = [thought_opened_by(one.args[0]) + text for one, text in zip(requests, texts, strict=True)]
        return [without_thoughts(text) or "" for text in texts]

    def _model_generate(
        self, context: torch.Tensor, max_length: int, stop: list[str], **generation_kwargs: Any
    ) -> torch.Tensor:
        """Generate texts `(B, L)` that include their prompts, from prompts `(B, L')` padded on the left."""
        mask = generation_kwargs.pop("attention_mask", torch.ones_like(context))
        if generation_kwargs.get("do_sample"):
            generation_kwargs = {**PLAIN_SAMPLING, **generation_kwargs}
        else:
            generation_kwargs.pop("temperature", None)  # the harness sets it to 0
        generation_kwargs |= {
            "max_new_tokens": max_length - context.shape[1],
            "eos_token_id": self.eos_token_ids,
            "pad_token_id": self.tokenizer.pad_token_id,
        }
        if not self.speculative:
            return self._generate_rows(context, mask, stop, generation_kwargs)
        generated = []
        for ids, present in zip(context, mask.bool(), strict=True):
            row = ids[present][None]
            text = self._generate_rows(
                row, torch.ones_like(row), stop, {**generation_kwargs, "assistant_model": self.kad.proxy}
            )
            generated.append(text[0, row.shape[1] :])
        padded = pad_sequence(generated, batch_first=True, padding_value=self.tokenizer.pad_token_id)
        return torch.cat([context, padded], dim=-1)

    def _generate_rows(
        self, ids: torch.Tensor, mask: torch.Tensor, stop: list[str], settings: dict[str, Any]
    ) -> torch.Tensor:
        self.kad.reset()  # so that results don't depend on earlier calls, not even by rounding
        return self._model.generate(
            input_ids=ids,
            attention_mask=mask,
            stopping_criteria=stop_sequences_criteria(self.tokenizer, stop, ids.shape[1], len(ids)),
            logits_processor=[self.kad],
            **settings,
        )

    # --- Log-likelihoods ------------------------------------------------------------------------------------

    def _loglikelihood_tokens(
        self, requests: Sequence[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """The log-likelihood of each continuation under r, and whether greedy decoding would generate it.

        Requests whose texts differ only in the last token, as the choices of many tasks do, share a forward pass.

        Raises:
            ValueError: a context or continuation is empty, a continuation is longer than `max_length`, or logits are
                NaN, +inf or all -inf.
        """
        # With a rule that has a memory, r also depends on where the continuation begins.
        has_memory = isinstance(self.kad.rule, StatefulRule)
        sharing: dict[tuple[tuple[int, ...], int], list[int]] = {}
        for index, (_, context, continuation) in enumerate(requests):
            if not context or not 0 < len(continuation) <= self.max_length:
                raise ValueError(
                    f"A log-likelihood needs a context and 1 to {self.max_length} tokens after it (`max_length`), got "
                    f"{len(context)} and {len(continuation)} tokens."
                )
            text, begin = (*context, *continuation[:-1]), len(context) if has_memory else 0
            sharing.setdefault((text, begin), []).append(index)
        # The longest texts come first, so that a lack of memory shows at once.
        texts = sorted(sharing, key=lambda key: (-len(key[0]), key))
        cut = sum(len(text) > self.max_length for text, _ in texts)
        if cut:
            logger.warning(f"{cut} of {len(texts)} texts are truncated on the left to {self.max_length} tokens.")

        size, size_at = self.batch_size, None
        if size == "auto":
            longest = [max((requests[i] for i in sharing[text]), key=lambda r: len(r[2])) for text in texts]
            self.batch_sizes: dict[int, int] = {}
            size = override_bs or 0
            size_at = None if override_bs else lambda at, _: self._batch_scheduler(at, longest)

        results: list[tuple[float, bool]] = [(math.nan, False)] * len(requests)
        with tqdm(total=len(requests), disable=disable_tqdm or self.rank != 0, desc="Log-likelihoods") as bar:
            for batch in chunks(texts, size, size_at):
                groups = [[list(requests[i][2]) for i in sharing[text]] for text in batch]
                for text, values in zip(batch, self._score([text for text, _ in batch], groups), strict=True):
                    for index, value in zip(sharing[text], values, strict=True):
                        results[index] = value
                        if requests[index][0] is not None:
                            self.cache_hook.add_partial("loglikelihood", requests[index][0], value)
                        bar.update(1)
        return results

    def _score(
        self, texts: Sequence[tuple[int, ...]], groups: Sequence[list[list[int]]]
    ) -> list[list[tuple[float, bool]]]:
        """The results for continuations that end one token after each text: a list for each text."""
        kept = [text[-self.max_length :] for text in texts]
        # Padded on the right, where no position that is read attends to the padding.
        ids = pad_sequence([torch.tensor(text, device="cpu") for text in kept], batch_first=True).to(self.device)
        spans = [max(map(len, group)) for group in groups]
        keep = max(ids.shape[1] - len(text) + span for text, span in zip(kept, spans, strict=True))
        logits = self._logits(ids, keep)

        values = []
        for row, (text, span, group) in enumerate(zip(kept, spans, groups, strict=True)):
            end = keep - (ids.shape[1] - len(text))
            continuation = max(group, key=len)
            log_probs: list[float] = []
            likeliest: list[int] = []
            stride = max(1, _LOGITS_AT_ONCE // logits[0].shape[-1])
            state = None
            for at in range(0, span, stride):
                part = slice(end - span + at, min(end - span + at + stride, end))
                position = len(text) - span + at + 1
                log_r, state = self._log_target([each[row, part] for each in logits], row, position, state)
                tokens = torch.tensor(continuation[at : at + stride], device=log_r.device)
                log_probs += log_r.gather(-1, tokens[:, None])[:, 0].tolist()
                likeliest += log_r.argmax(-1).tolist()
            last = log_r[-1, [tokens[-1] for tokens in group]].tolist()
            values.append(
                [
                    (
                        math.fsum([*log_probs[span - len(tokens) : span - 1], last_log_prob]),
                        likeliest[span - len(tokens) :] == tokens,
                    )
                    for tokens, last_log_prob in zip(group, last, strict=True)
                ]
            )
        return values

    def _logits(self, ids: torch.Tensor, keep: int) -> list[torch.Tensor]:
        """Each model's logits at the last `keep` positions of texts without padding on the left, `(B, keep, V)`."""
        logits = []
        for cached in self._cached:
            logits.append(cached.logits(ids, logits_to_keep=keep))
            cached.reset()
        return logits

    def _log_target(
        self, logits: list[torch.Tensor], row: int = 0, position: int = 0, state: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The logarithm of r `(n, V)` from each model's logits `(n, V)` at neighbouring positions of a text.

        `row` and `position` are the sequence and the first position of the logits, for error messages. `state` is that
        of a rule with a memory before them, None at the beginning; the second result is its state behind them.
        """
        for cached, rows in zip(self._cached, logits, strict=True):
            unusable = is_unusable(rows)
            if unusable.any():
                raise unusable_logits_error(cached.role, cached.model, position + int(unusable.int().argmax()), row)
        vocabulary = logits[0].shape[-1]
        aligned = (align_vocabulary(each, vocabulary) for each in logits)
        of_models = [tempered(each, self.kad.component_temperature)[None] for each in aligned]
        composition = compose_positions(self.kad.rule, *of_models, state=state)
        behind = None if composition.next_state is None else composition.next_state[-1:]
        return composition.target_probs.log(), behind

    def _model_call(self, inps: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        """The logarithm of r at every position, `(B, L, V)`. The harness calls this to find `batch_size=auto`."""
        logits = self._logits(inps, inps.shape[1])
        return torch.stack([self._log_target(list(own), row)[0] for row, own in enumerate(zip(*logits, strict=True))])


def _value(text: Any) -> Any:
    """Convert a number, a boolean or None that was given as text."""
    return handle_arg_string(text) if isinstance(text, str) else text


def _config_from_arguments(
    source: str | Path | None,
    rule: str | None,
    arguments: dict[str, Any],
    base: str | Path | None,
    proxy: str | Path | None,
) -> KADConfig:
    """The configuration of the model arguments: that of `source`, with the given settings in place of its own.

    Raises:
        ValueError: an unknown argument, or a model that is named nowhere.
    """
    for name in arguments:
        if name not in (*RULE_PARAMETERS, *OWN_SETTINGS):
            known = [*_OWN_ARGUMENTS, *RULE_PARAMETERS, *OWN_SETTINGS, *_HARNESS_ARGUMENTS]
            raise ValueError(unknown_name_message("model argument", name, known))
    settings = {name: value for name, argument in arguments.items() if (value := _value(argument)) is not None}
    config = config_from(source, rule, settings)
    try:
        return with_models(config, None if base is None else str(base), None if proxy is None else str(proxy), source)
    except ValueError as error:
        raise ValueError(f"{error} In the harness: --model_args base=...,proxy=...") from error


if __name__ == "__main__":
    silence_libraries()
    cli_evaluate()
