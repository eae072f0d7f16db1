"""Data and folders for the tests of alignment: word problems as chats and as preferences, on the tiny pair."""

import contextlib
import io
import json
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from transformers_kad.recipes.training import publishing
from transformers_kad.recipes.word_problems import make_problems

RECIPES = Path(__file__).resolve().parents[1] / "recipes"
PAIR = RECIPES / "tiny_pair"
BASE, REFERENCE, PROXY = (str(PAIR / name) for name in ("base", "reference", "proxy"))


def chats(count, seed=0):
    """Rows with `messages`."""
    return [
        {
            "messages": [
                {"role": "user", "content": problem.question},
                {"role": "assistant", "content": problem.solution},
            ]
        }
        for problem in make_problems("train", count, seed)
    ]


def preferences(count, seed=0):
    """Rows whose rejected answer is the chosen one in capitals."""
    return [
        {"prompt": problem.question, "chosen": problem.solution, "rejected": problem.solution.upper()}
        for problem in make_problems("train", count, seed)
    ]


def write_lines(path, rows):
    """A JSON Lines file; its path as a string."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def weights(folder):
    """The bytes of an adapter's weights."""
    return (Path(folder) / "adapter_model.safetensors").read_bytes()


def align(recipe, data, out, *options, proxy=REFERENCE):
    """Run a recipe in this process. Its trainer (None if it had finished already) and what was printed."""
    seen = []

    def publish(trainer, *arguments, **settings):
        seen.append(trainer)
        publishing.publish(trainer, *arguments, **settings)

    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setattr(recipe, "publish", publish)
        recipe.main(["--proxy", proxy, "--base", BASE, "--data", data, "--output_dir", str(out), *options])
    return (seen[0] if seen else None), printed.getvalue()


def logits(model, text="We get 12 + 7 = 19."):
    """A model's logits on a text, `(1, L, V)`."""
    ids = AutoTokenizer.from_pretrained(BASE)(text, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        return model.eval()(ids).logits
