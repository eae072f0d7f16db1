"""Draw deferral.svg: how base and proxy make the target at two positions of the quickstart's answer.

    python docs/images/draw_deferral.py

It needs the package with its extra `eval`. The figures are those of the tiny pair in `recipes/tiny_pair`.
"""

from pathlib import Path

import torch
from matplotlib import pyplot
from matplotlib.axes import Axes
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from transformers_kad import DualDeferral

ROOT = Path(__file__).resolve().parents[2]
PAIR = ROOT / "recipes" / "tiny_pair"
QUESTION = "Mia has 83 apples. She gives 47 to Jon. How many apples does Mia have now?"
THRESHOLD = 0.4
SHOWN = 4  # tokens of each position
KEPT, DEFERRED, PROXY = "#3b6fb6", "#c9d3e0", "#e08214"

# What was written before each position, and what is to be seen there.
POSITIONS = [
    ("We get 83 - 4", "The base is sure of the number"),
    ("We get 83 - 47 = 36. The answer is 36.", "The base is unsure, the proxy knows how to end"),
]


def distributions(written: str) -> tuple[list[str], torch.Tensor, torch.Tensor]:
    """The tokens of the base's vocabulary, and p and q `(V,)` of the token that follows."""
    tokenizer = AutoTokenizer.from_pretrained(PAIR / "base")
    base = AutoModelForCausalLM.from_pretrained(PAIR / "base")
    proxy = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(PAIR / "reference"), PAIR / "proxy")
    chat = [{"role": "user", "content": QUESTION}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    answer = tokenizer(written, add_special_tokens=False, return_tensors="pt")["input_ids"]
    ids = torch.cat([prompt["input_ids"], answer], dim=-1)
    with torch.no_grad():
        p, q = (model.eval()(ids).logits[0, -1].float().softmax(-1) for model in (base, proxy))
    return [tokenizer.decode([token]) for token in range(len(p))], p, q


def draw(axes: list[Axes], strings: list[str], p: torch.Tensor, q: torch.Tensor) -> None:
    """Bars of p, q and r, one below the other, for the tokens that one of the models finds likely."""
    deferred = DualDeferral(THRESHOLD).defer(p)
    mass = float(p[deferred].sum())
    shown = torch.maximum(p, q).topk(SHOWN).indices.tolist()
    kept = [0.0 if deferred[token] else float(p[token]) for token in shown]
    given = [mass * float(q[token]) for token in shown]
    places = range(SHOWN)
    axes[0].bar(places, [float(p[t]) for t in shown], color=[DEFERRED if deferred[t] else KEPT for t in shown])
    axes[1].bar(places, [float(q[token]) for token in shown], color=PROXY)
    axes[2].bar(places, kept, color=KEPT)
    axes[2].bar(places, given, bottom=kept, color=PROXY)
    axes[0].text(SHOWN - 0.5, 0.9, f"deferred: D = {mass:.2f}", ha="right", va="top", color="#5c6b7e")
    for axis in axes:
        axis.set_xticks(list(places), [repr(strings[token])[1:-1].replace(" ", "␣") for token in shown])
        axis.set_ylim(0, 1.05)
        axis.spines[["top", "right"]].set_visible(False)


def main() -> None:
    """Write the picture beside this file."""
    pyplot.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "kad", "font.size": 9})
    figure, axes = pyplot.subplots(3, len(POSITIONS), figsize=(8.4, 4.4), layout="constrained")
    for column, (written, title) in enumerate(POSITIONS):
        draw(list(axes[:, column]), *distributions(written))
        axes[0, column].set_title(f"{title}\n“{written} …”", fontsize=9)
    for axis, name in zip(axes[:, 0], ("base  p", "proxy  q", "target  r"), strict=True):
        axis.set_ylabel(name)
    figure.savefig(Path(__file__).with_name("deferral.svg"), metadata={"Date": None})


if __name__ == "__main__":
    main()
