"""Whether the tokenizers, the ends of turns and the chat templates of a pair fit together, before any text is made."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from ...integrations.loading.prompts import TEMPLATE_ERRORS, Prompt
from ...models.vocabulary import align_vocabularies, describe_different_ids
from ..evaluation.decoding import as_text
from ..pair import Pair


@dataclass(frozen=True)
class Vocabularies:
    """How the tokens of base and proxy correspond.

    Attributes:
        difference: a sentence on ids that mean different strings; None if there are none.
        shares: of the prompts' tokens, the smaller of the shares that base and proxy have in common, in [0, 1]; 1 for
            one vocabulary, 0 if the tokens can't be compared.
        refusal: why the tokens can't be aligned, None if they can or need not be.
        report: the `VocabularyReport` as JSON values; None for one vocabulary.
    """

    difference: str | None = None
    shares: float = 1.0
    refusal: str | None = None
    report: dict[str, Any] | None = None


def compare_vocabularies(
    base: PreTrainedTokenizerBase, proxy: PreTrainedTokenizerBase, prompts: Sequence[Prompt]
) -> Vocabularies:
    """Compare two tokenizers by their ids, and by their strings if ids mean different ones."""
    difference = describe_different_ids(base, proxy)
    if difference is None:
        return Vocabularies()
    try:
        text = "\n".join(map(as_text, prompts))
        report = align_vocabularies(base, proxy, sample_text=text, minimum_share=0).report
    except ValueError as error:
        return Vocabularies(difference, 0.0, str(error))
    try:
        align_vocabularies(base, proxy)
    except ValueError as error:  # on the sample text that all recipes check
        return Vocabularies(difference, report.text_share, str(error), asdict(report))
    return Vocabularies(difference, report.text_share, None, asdict(report))


@dataclass(frozen=True)
class Templates:
    """The chat templates of a pair.

    Attributes:
        base: whether the base has one of its own.
        proxy: whether the proxy has one.
        prompts_equal: whether both render the first prompt to the same text; None unless both have one.
    """

    base: bool
    proxy: bool
    prompts_equal: bool | None


def compare_templates(
    base: PreTrainedTokenizerBase, proxy: PreTrainedTokenizerBase, prompt: Prompt, arguments: dict[str, Any]
) -> Templates:
    """Compare the chat templates of two tokenizers on a prompt."""
    have = [tokenizer.chat_template is not None for tokenizer in (base, proxy)]
    if not all(have):
        return Templates(have[0], have[1], None)
    chat = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    of_base, of_proxy = (_render(tokenizer, chat, arguments) for tokenizer in (base, proxy))
    return Templates(True, True, of_base == of_proxy)


def _render(tokenizer: PreTrainedTokenizerBase, chat: Sequence[Any], arguments: dict[str, Any]) -> str:
    """A chat as the template renders it, or the error of a template that refuses it."""
    try:
        return str(tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True, **arguments))
    except TEMPLATE_ERRORS as error:
        return f"refused: {error}"


@dataclass(frozen=True)
class Ends:
    """The ids that end a turn, in the base's vocabulary.

    Attributes:
        of_call: the ids that end a text of the pair.
        proxy: of the proxy's own ids, how many there are.
        proxy_shared: how many of these the base's vocabulary has.
    """

    of_call: list[int]
    proxy: int
    proxy_shared: int


def compare_ends(pair: Pair) -> Ends:
    """The ids that end the turns of a pair."""
    own = pair.proxy_eos_token_ids
    shared = own if pair.alignment is None else [end for end in own if pair.alignment.base_id(end) is not None]
    return Ends(pair.eos_token_ids or [], len(own), len(shared))
