"""The verdict on a pair, in words, from its figures. What each limit is based on is written beside it.

"Bad" is a pair that can't work as it is. "Doubtful" is a pair of which the figures leave open whether it works, so
that answers have to be scored before it is used. "Good" says that nothing speaks against the pair.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

# Total variation below which two models are one, up to rounding in bfloat16.
SAME_MODEL = 0.01
# Of what the base knows of the prompts beyond chance, in nats, the share that a proxy needs. Random weights know
# nothing, a small model of the same family more than half: 0.25 and 0.5 are halfway marks, not measured on many pairs.
KNOWS_NOTHING, KNOWS_LITTLE = 0.25, 0.5
# Where the base is sure, the share of tokens on which the proxy agrees. Below a half, the proxy contradicts most of
# what the base is sure of, which no difference in style explains. The second limit is a choice, not a measurement.
CONTRADICTS, DIFFERS = 0.5, 0.8
# The share of tokens that the proxy takes over. That pairs above about 20 % often fail is a rule of thumb: nudging is
# reported to work with less than 9 % (Fei et al., arXiv 2410.09300), and the tiny pair works with 24 %, so that more
# is a reason to score answers and no more. Above a half, the text is the proxy's more than the base's.
OFTEN_FAILS, MOSTLY_PROXY = 0.2, 0.5
# The share of the text's tokens that both tokenizers need: the default of `align_vocabularies`.
SHARED_TOKENS = 0.8
# The base's probability of tokens that the proxy does not have. Such tokens can be kept, but never be guided.
UNKNOWN_TO_PROXY = 0.05
# KAD changes less than this share of the base's probability: nothing is guided.
NO_EFFECT = 0.02
# Below this number of prompts the figures are too rough for a good verdict.
FEWEST_PROMPTS = 20
# Texts of fewer tokens on average say nothing.
SHORTEST_TEXT = 3

LEVELS = ("bad", "doubtful", "note")


@dataclass(frozen=True)
class Finding:
    """One finding about a pair.

    Attributes:
        name: a short name of what was found.
        level: "bad" or "doubtful", which decide the verdict, or "note".
        text: a sentence that states the figure and says what to do.
    """

    name: str
    level: str
    text: str


def verdict_of(findings: Sequence[Finding]) -> str:
    """The verdict: "bad" or "doubtful" if there is a finding of this level, else "good"."""
    return next((level for level in LEVELS[:2] if any(finding.level == level for finding in findings)), "good")


def find(
    compatibility: Mapping[str, Any], figures: Mapping[str, Any] | None, recommended: Mapping[str, Any] | None
) -> list[Finding]:
    """What speaks against a pair and what is worth knowing, causes before their consequences.

    Args:
        compatibility: the JSON values of `Vocabularies`, `Templates` and `Ends` by the names `vocabulary`, `templates`
            and `ends`, with `parameters`, the sizes of base and proxy, and `chat` and `proxy_chat` as they were given.
        figures: the figures of `summarize`; None if no text could be made.
        recommended: the figures of the recommended rule; None if no text could be made.
    """
    found = [*_of_vocabulary(compatibility["vocabulary"])]
    if figures is None or recommended is None:
        return found
    found += _of_models(compatibility, figures)
    found += _of_share(figures, recommended, is_same=any(one.name == "same_model" for one in found))
    found += _of_prompts(compatibility, figures)
    found += _of_speed(recommended)
    return sorted(found, key=lambda finding: LEVELS.index(finding.level))


def _of_vocabulary(vocabulary: Mapping[str, Any]) -> Iterator[Finding]:
    if vocabulary["difference"] is None:
        return
    if vocabulary["refusal"] is not None and (vocabulary["report"] is None or vocabulary["shares"] >= SHARED_TOKENS):
        text = f"Base and proxy have different tokenizers, which can't be aligned. {vocabulary['refusal']}"
        yield Finding("vocabulary", "bad", text)
        return
    if vocabulary["shares"] < SHARED_TOKENS:
        text = (
            f"Base and proxy have different tokenizers, which share only {vocabulary['shares']:.0%} of the tokens of "
            f"the prompts; at least {SHARED_TOKENS:.0%} are needed: take a proxy of the base's family."
        )
        yield Finding("vocabulary", "bad", text)
        return
    text = (
        f"Base and proxy have different tokenizers, which share {vocabulary['shares']:.0%} of the tokens of the "
        "prompts. Their tokens were aligned by their strings: pass --align_vocabularies to the other recipes."
    )
    yield Finding("vocabulary_aligned", "doubtful", text)


def _of_models(compatibility: Mapping[str, Any], figures: Mapping[str, Any]) -> Iterator[Finding]:
    texts = figures["texts"]
    variation = max(text["total_variation"] for text in texts.values())
    if variation < SAME_MODEL:
        text = (
            f"Base and proxy are the same model: their distributions differ by {variation:.3f} (total variation), so "
            "that nothing is guided: take an aligned model as proxy."
        )
        yield Finding("same_model", "bad", text)
        return
    unknown = texts["kad"]["unknown_mass"]
    if unknown > UNKNOWN_TO_PROXY:
        text = (
            f"The base gives {unknown:.0%} of its probability to tokens that the proxy does not have, and that it can "
            "never propose: take a proxy with a tokenizer nearer to the base's."
        )
        yield Finding("unknown_tokens", "bad" if unknown > 1 - SHARED_TOKENS else "doubtful", text)
    known = figures["prompts_predicted"]["proxy_knows"]
    if known is not None and known < KNOWS_LITTLE:
        how = "hardly better than chance" if known < KNOWS_NOTHING else "much worse than the base"
        text = (
            f"The proxy predicts the prompts {how}: it knows {max(known, 0):.0%} of what the base knows of them. "
            "Check that its weights were loaded, and that it was trained on texts of this kind."
        )
        yield Finding("proxy_knows", "bad" if known < KNOWS_NOTHING else "doubtful", text)
    agreement = texts["kad"]["agreement_where_sure"]
    if agreement is not None and agreement < DIFFERS:
        text = (
            f"The proxy contradicts the base on {1 - agreement:.0%} of the tokens that the base is sure of: the two "
            "expect different texts. Look at some texts with generate.py --trace, and check the chat templates."
        )
        yield Finding("contradicts", "bad" if agreement < CONTRADICTS else "doubtful", text)
    sizes = compatibility["parameters"]
    if sizes["proxy"] >= sizes["base"]:
        text = (
            f"The proxy ({sizes['proxy']:,} parameters) is not smaller than the base ({sizes['base']:,}): compare "
            "with the proxy alone, which costs less than both together."
        )
        yield Finding("proxy_is_large", "doubtful", text)


def _of_share(figures: Mapping[str, Any], recommended: Mapping[str, Any], *, is_same: bool) -> Iterator[Finding]:
    share, (low, high) = recommended["deferral_mass"], recommended["deferral_mass_interval"]
    if is_same:
        return
    changed = 1 - recommended["kept_of_base"]
    if changed < NO_EFFECT:
        text = (
            f"KAD changes {changed:.1%} of the base's probability: the text is the base's own. Either the base needs "
            "no proxy for these prompts, or the proxy was not aligned for them."
        )
        yield Finding("no_effect", "doubtful", text)
    if share > OFTEN_FAILS:
        advice = (
            "take a proxy that is larger or was trained on such prompts"
            if share > MOSTLY_PROXY
            else "score some answers (run_eval.py), or try a proxy that is larger or nearer to the base"
        )
        limit = (
            "more than half, so that the text is as good as the proxy's"
            if share > MOSTLY_PROXY
            else f"pairs above about {OFTEN_FAILS:.0%} often fail"
        )
        interval = f" ({low:.0%} to {high:.0%})" if low < high else ""  # there is none for a single text
        text = f"The proxy takes over {share:.0%} of the tokens{interval}: {limit}; {advice}."
        yield Finding("takes_over", "bad" if share > MOSTLY_PROXY else "doubtful", text)


def _of_prompts(compatibility: Mapping[str, Any], figures: Mapping[str, Any]) -> Iterator[Finding]:
    count, failed, texts = figures["prompts"], figures["failed"], figures["texts"]
    if count < FEWEST_PROMPTS:
        text = f"The number of prompts is {count}, and at least {FEWEST_PROMPTS} are needed: pass more --prompts."
        yield Finding("few_prompts", "doubtful", text)
    if failed:
        text = f"{failed} prompts failed and are left out; texts.jsonl in the results says why."
        yield Finding("failed_prompts", "doubtful" if failed >= count else "note", text)
    if texts["kad"]["tokens_per_text"] < SHORTEST_TEXT and texts["kad"]["ended"] > 0:
        text = (
            f"KAD's texts end after {texts['kad']['tokens_per_text']:.1f} tokens on average: check the chat template "
            "and the ids that end a turn."
        )
        yield Finding("short_texts", "doubtful", text)
    yield from _of_templates(compatibility["templates"], compatibility["chat"], compatibility["proxy_chat"])
    ends, ended = compatibility["ends"], {name: text["ended"] for name, text in texts.items()}
    if not ends["of_call"]:
        text = "Neither model names a token that ends a turn: set `eos_token_id`, or no text ends by itself."
        yield Finding("no_end", "doubtful", text)
    elif not ends["proxy_shared"]:
        text = "The base's vocabulary has no token by which the proxy ends its turns: name one with `same`."
        yield Finding("end_not_shared", "doubtful", text)
    elif ended["kad"] < ended["proxy"] / 2:
        text = (
            f"{ended['proxy']:.0%} of the proxy's texts end by themselves, but only {ended['kad']:.0%} of KAD's: the "
            "base goes on where the proxy ends. Compare longer texts (--max_new_tokens)."
        )
        yield Finding("kad_does_not_end", "doubtful", text)
    elif ended["proxy"] == 0:
        text = "None of the proxy's texts ended by itself: it is not aligned, or --max_new_tokens is too small."
        yield Finding("proxy_does_not_end", "note", text)


def _of_templates(templates: Mapping[str, Any], chat: str, proxy_chat: str) -> Iterator[Finding]:
    proxy_reads_chat = chat != "no" if proxy_chat == "same" else proxy_chat == "yes"
    if templates["proxy"] and not proxy_reads_chat:
        text = "The proxy has a chat template, but reads plain text: pass --proxy_chat yes, so that it reads chats."
        yield Finding("proxy_reads_plain_text", "doubtful", text)
    elif not templates["proxy"] and proxy_reads_chat:
        text = "The proxy has no chat template" + (
            ", and reads the base's, on which it may not have been trained."
            if templates["base"]
            else ": both models read plain text. An aligned proxy normally brings a template; check its tokenizer."
        )
        yield Finding("no_proxy_template", "doubtful", text)
    elif templates["prompts_equal"] is False and proxy_chat == "same":
        text = (
            "The chat templates of base and proxy render the same prompt differently, and the proxy reads the base's: "
            "pass --proxy_chat yes, so that the proxy reads its own."
        )
        yield Finding("templates_differ", "doubtful", text)
    elif not templates["base"] and chat != "no":
        text = "The base has no chat template and reads the proxy's. For plain text, pass --chat no --proxy_chat yes."
        yield Finding("base_reads_proxy_template", "note", text)


def _of_speed(recommended: Mapping[str, Any]) -> Iterator[Finding]:
    speed_up = recommended["speed_up"]
    if math.isfinite(speed_up) and speed_up < 1:
        text = (
            f"Speculative decoding is expected at × {speed_up:.2f} the speed of the base alone on this device: the "
            "proxy is not much cheaper than the base. The texts do not depend on that."
        )
        yield Finding("slow", "note", text)
