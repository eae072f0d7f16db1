"""Thoughts: texts without their marks, and prompts that open one."""

import pytest

from transformers_kad.integrations.loading.thoughts import thought_opened_by, without_thoughts


@pytest.mark.parametrize(
    "text",
    [
        "I think that 48 + 24 = 72. The answer is 72.",
        "Thinking: 48 + 24 = 72.\n\nReasoning: ...\n\nThe answer is 72.",
        "[Reasoning] 48 + 24\n[Answer] 72",
        "The analysis is done. <b>72</b>",
        "",
    ],
)
def test_a_text_without_the_marks_of_a_thought_is_all_answer(text):
    assert without_thoughts(text) == text


@pytest.mark.parametrize(
    ("prompt", "mark"),
    [
        ("<|im_start|>assistant\n<think>\n", "<think>\n"),
        ("<|start|>assistant<|channel|>analysis<|message|>", "<|channel|>analysis<|message|>"),
        ("<|im_start|>assistant\n<think>\n\n</think>\n\n", ""),
        ("<|im_start|>user\nPut your thoughts into <think>.<|im_end|>\n<|im_start|>assistant\n", ""),
        ("", ""),
    ],
)
def test_a_thought_may_be_opened_by_the_prompt(prompt, mark):
    assert thought_opened_by(prompt) == mark
