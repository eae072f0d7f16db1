"""The model card: what it says of a run, without training one."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from alignment import BASE, PROXY, REFERENCE
from huggingface_hub import ModelCard
from transformers import AutoTokenizer

from transformers_kad import KADConfig
from transformers_kad.recipes.training.arguments import AlignmentArguments
from transformers_kad.recipes.training.publishing import hub_id, model_card
from transformers_kad.recipes.training.trainers import TrainingResult


def card(world_size=1, skipped=None, **settings):
    """A card, read back from its text."""
    settings = {"proxy": REFERENCE, "base": BASE, "data": "owner/data", "output_dir": "out"} | settings
    made = model_card(
        AlignmentArguments(**settings),
        SimpleNamespace(tokenizer=AutoTokenizer.from_pretrained(BASE)),
        SimpleNamespace(evaluation=[{}] * 4, end_of_answer=1, skipped=skipped or {}),
        KADConfig("primal", {"budget": 0.25}),
        TrainingResult(None, None, None, 10, 1.0, 36, 5.0, world_size),
        "by hand",
        ["recipes/align_sft.py", "--data", "my data"],
        "print(1)",
        {"torch": "9"},
    )
    return ModelCard(str(made))


def test_what_the_card_says():
    text = card(skipped={"longer than 9 tokens": 3, "whose two answers are the same": 1}).content
    for shown in (
        "| rule in `kad_config.json` | primal, budget 0.25 |",
        "| training examples | 36 |",
        "| examples held out | 4 |",
        "| rows skipped | 3 longer than 9 tokens, 1 whose two answers are the same |",
        "[arXiv 2510.27017](https://arxiv.org/abs/2510.27017)",
        "\npython recipes/align_sft.py --data 'my data'\n",
    ):
        assert shown in text
    assert "torchrun --nproc_per_node 4 recipes/align_sft.py --data 'my data'" in card(world_size=4).content


def test_licence_and_language_are_those_that_were_given():
    assert (card().data.license, card().data.language) == (None, None)
    assert "license" not in card().data.to_dict()
    data = card(license="apache-2.0", language="en,fr").data
    assert (data.license, data.language) == ("apache-2.0", ["en", "fr"])
    assert data.datasets == ["owner/data"]


@pytest.mark.parametrize(
    ("origin", "found"),
    [("Qwen/Qwen3", "Qwen/Qwen3"), ("/home/me/model", None), ("./model", None), ("", None), (None, None)],
)
def test_a_folder_is_no_base_model_but_may_say_where_it_is_from(tmp_path, origin, found):
    below = Path(shutil.copytree(REFERENCE, tmp_path / "reference"))
    config = json.loads((below / "config.json").read_text())
    (below / "config.json").write_text(json.dumps(config | {"_name_or_path": origin}))
    adapter = shutil.copytree(PROXY, tmp_path / "proxy")  # it belongs to ../reference
    for folder in (below, adapter):
        assert hub_id(str(folder)) == found
        assert card(proxy=str(folder)).data.base_model == found
    assert hub_id("owner/model") == "owner/model"
