"""Which part of a text gives its answer: boxes, text after thoughts and before questions that follow."""

import pytest

from transformers_kad.recipes.evaluation.answer_text import extract_boxed
from transformers_kad.recipes.evaluation.math_answers import extract_math
from transformers_kad.recipes.evaluation.number_answers import extract_number
from transformers_kad.recipes.evaluation.option_answers import extract_option


@pytest.mark.parametrize(
    ("text", "content"),
    [
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{1} and \boxed{\sqrt{\frac{1}{2}}}.", r"\sqrt{\frac{1}{2}}"),
        (r"\boxed{\left\{ x \mid x > 1 \right.}", r"\left\{ x \mid x > 1 \right."),
        (r"\boxed{\begin{matrix} 1 \\ 2 \end{matrix}}", r"\begin{matrix} 1 \\ 2 \end{matrix}"),
        (r"\boxed{ 5 }", "5"),
        (r"\boxed 5.", "5"),
        (r"\fbox{5}", "5"),
        (r"\boxed{4} or \boxed{\frac{1}{", "4"),
        (r"\boxed{}", ""),
        (r"\boxed{", None),
        ("boxed{5}", None),
        ("", None),
    ],
)
def test_boxes(text, content):
    assert extract_boxed(text) == content


EXTRACTORS = {
    "number": (extract_number, "The answer is {}.", "12", "15"),
    "option": (lambda text, ended: extract_option(text, "ABCD", ended), "The answer is ({}).", "A", "C"),
    "math": (extract_math, "The answer is ${}$.", "1/2", "1/3"),
    "boxed": (lambda text, ended: extract_boxed(text), r"So \boxed{{{}}}.", "12", "15"),
}
each_extractor = pytest.mark.parametrize(
    ("extract", "sentence", "other", "right"), EXTRACTORS.values(), ids=EXTRACTORS.keys()
)
# What opens and closes a thought, as models of these families write it.
THOUGHTS = {
    "DeepSeek-R1, Qwen3": ("<think>\n", "\n</think>\n\n"),
    "asked for in prompts": ("<thinking>", "</thinking>"),
    "GRPO": ("<reasoning>\n", "\n</reasoning>\n"),
    "EXAONE": ("<thought>\n", "\n</thought>\n"),
    "Seed-OSS": ("<seed:think>", "</seed:think>"),
    "Magistral": ("[THINK]", "[/THINK]"),
    "Kimi": ("◁think▷", "◁/think▷"),
    "Kimi K3": ("<|open|>think<|sep|>", "<|close|>think<|sep|>"),
    "Command A": ("<|START_THINKING|>", "<|END_THINKING|><|START_RESPONSE|>"),
    "OpenThinker": ("<|begin_of_thought|>", "<|end_of_thought|>"),
    "Apertus": ("<|inner_prefix|>", "<|inner_suffix|>"),
    "Gemma": ("<|channel>thought\n", "<channel|>"),
    "gpt-oss": ("<|channel|>analysis<|message|>", "<|end|><|start|>assistant<|channel|>final<|message|>"),
    "gpt-oss, special tokens left out": ("analysis", "assistantfinal"),
}


@each_extractor
@pytest.mark.parametrize(("opens", "closes"), THOUGHTS.values(), ids=THOUGHTS.keys())
def test_a_thought_is_no_answer(opens, closes, extract, sentence, other, right):
    thought, answer = sentence.format(other), sentence.format(right)
    for ended in (True, False):
        assert extract(opens + thought + closes + answer + " Yes.", ended) == right
        assert extract(thought + closes + answer + " Yes.", ended) == right  # the prompt opened it
        assert extract(opens + thought + closes + opens + thought + closes + answer + " Yes.", ended) == right
        assert extract(opens + thought + " Yes.", ended) is None
        assert extract(opens + thought + closes + "Yes.", ended) is None


@each_extractor
@pytest.mark.parametrize(
    "turn",
    [
        "Question: Tom has 5 pens. Who has more?\nAnswer: ",
        "Q: Tom has 5 pens. Who has more?\nA: ",
        "**Problem 2:** Tom has 5 pens.\n\n",
        "### Problem 2\nTom has 5 pens.\n\n",
        "### Instruction:\nTom has 5 pens.\n\n### Response:\n",
        "User: Tom has 5 pens.\nAssistant: ",
        "<|im_start|>user\nTom has 5 pens.<|im_end|>\n<|im_start|>assistant\n",
        "Tom has 5 pens.\n\nReason step by step. End with one sentence: The answer is N.\n\n",
    ],
)
@pytest.mark.parametrize("ended", [True, False])
def test_the_answer_to_a_question_of_the_model_s_own_is_no_answer(extract, sentence, other, right, turn, ended):
    assert extract(f"{sentence.format(right)}\n\n{turn}{sentence.format(other)} Yes.", ended) == right


@pytest.mark.parametrize(
    ("extract", "text", "answer"),
    [
        # Without the form that was asked for.
        (extract_number, "48 + 24 = 72\n\nQ: Tom has 5 pens. How many?\nA: 5", "72"),
        (lambda text: extract_option(text, "ABCD"), "B\n\nQ: Which one?\nA: (C)", "B"),
        (lambda text: extract_option(text, "ABCD"), "It is (A) or (B).\n\nQ: Which?\n\nThe answer is (C).", "C"),
        (lambda text: extract_option(text, "ABCD"), "The answer is (A) or (B).\n\nQ: Which?\n\nAnswer: (C)", None),
        # The question is repeated, or taken apart, before it is answered.
        (extract_number, "Question: How many in all?\nAnswer: 72", "72"),
        (extract_number, "Let us see.\n\n**Problem:** She sold 48.\n**Solution:** The answer is 72.", "72"),
        (extract_number, "I ask:\nQuestion 1: In May? 24.\nQuestion 2: In all? 72.", "72"),
        (extract_number, "The question: how many? The answer is 72.", "72"),
    ],
)
def test_where_the_answer_ends(extract, text, answer):
    assert extract(text) == answer
