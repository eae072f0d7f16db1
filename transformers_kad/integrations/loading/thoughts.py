"""Finds the thoughts that reasoning models write before their answer."""

import re

_TAG = r"(?:\w{1,8}:)?(?:think|thinking|thoughts?|reasoning|scratchpad)"
_THOUGHT_OPENS = (
    rf"(?i:<{_TAG}>)",  # <think> (DeepSeek-R1, Qwen3, ...), <thought> (EXAONE), <seed:think>, <mm:think> (MiniMax)
    r"\[THINK\]",  # Mistral
    r"◁think▷|<\|open\|>think<\|sep\|>",  # Kimi
    r"<\|(?:START_THINKING|begin_of_thought|inner_prefix)\|>",  # Cohere, OpenThinker, Apertus
    r"<\|channel>thought",  # Gemma
    r"<\|channel\|>(?:analysis|commentary)\b",  # gpt-oss
    r"\A\s*analysis(?=[A-Z])",  # gpt-oss without its special tokens: "analysisWe need ...assistantfinalIt is 5."
)
_THOUGHT_CLOSES = (
    rf"(?i:</{_TAG}>)",
    r"\[/THINK\]",
    r"◁/think▷|<\|close\|>think<\|sep\|>",
    r"<\|(?:END_THINKING|end_of_thought|inner_suffix)\|>",
    r"<channel\|>",
    r"<\|channel\|>final\b[^<]*(?:<\|constrain\|>[^<]*)?<\|message\|>",
    r"assistantfinal",
    r"Here(?: is|'s) my response:",  # Granite; its opening mark is a sentence that other models write as well
)
_THOUGHT = re.compile(f"(?P<opens>{'|'.join(_THOUGHT_OPENS)})|{'|'.join(_THOUGHT_CLOSES)}")


def without_thoughts(text: str) -> str | None:
    r"""The part of a text after the thoughts, which reasoning models write before their answer.

    A thought is enclosed in `<think>` and `</think>`, or in the marks of other families of models: `<thinking>`,
    `<reasoning>`, `[THINK]`, the channels of gpt-oss, and more. A chat template may have opened the thought in the
    prompt, so that the text only has the mark that closes it.

    Returns:
        The text after the last mark that closes a thought; the whole text if there is no mark; None if a thought is
        still open, so that the text has no answer yet.

    >>> without_thoughts("<think>12? No.</think> It is 15."), without_thoughts("12? No.</think> It is 15.")
    (' It is 15.', ' It is 15.')
    >>> print(without_thoughts("<think>Is it 12?"))
    None
    """
    marks = list(_THOUGHT.finditer(text))
    if not marks:
        return text
    return None if marks[-1]["opens"] else text[marks[-1].end() :]


def thought_opened_by(prompt: str) -> str:
    r"""The opening mark of a thought at the end of a prompt, such as `<think>\n` from some chat templates; else "".

    The completion of such a prompt begins within the thought, without a mark of its own.

    >>> thought_opened_by("<|im_start|>assistant\n<think>\n"), thought_opened_by("<think>\n\n</think>\n\n")
    ('<think>\n', '')
    """
    marks = list(_THOUGHT.finditer(prompt))
    if marks and marks[-1]["opens"] and re.fullmatch(r"(?:<\|message\|>)?\s*", prompt[marks[-1].end() :]):
        return prompt[marks[-1].start() :]
    return ""
