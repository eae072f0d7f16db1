"""Names of models: folders that are found again from everywhere, folders that are not there."""

import json
import shutil
from pathlib import Path

import pytest
from transformers import AutoConfig

from transformers_kad import KADConfig
from transformers_kad.integrations.loading.models import below_adapter, load_merged, load_model, load_tokenizer
from transformers_kad.recipes.arguments import ModelArguments, RuleArguments
from transformers_kad.recipes.benchmarking.growth import load_configs
from transformers_kad.recipes.benchmarking.subjects import load_subject
from transformers_kad.utils.sources import check_source, looks_like_path, portable_name, resolve_name

PAIR = Path(__file__).resolve().parents[2] / "recipes" / "tiny_pair"
MISSING = ["./missing", "../missing", "/no/such/folder", "some/deep/folder", "missing/", "~/missing", "a\\\\b"]


@pytest.mark.parametrize("name", MISSING)
@pytest.mark.parametrize(
    "load",
    [
        load_model,
        load_merged,
        load_tokenizer,
        below_adapter,
        KADConfig.from_pretrained,
        lambda name: RuleArguments(config=name).to_config(),
        lambda name: load_configs(ModelArguments(base=name, proxy=name), {}),
        lambda name: load_subject(ModelArguments(), random_weights={"base": name, "proxy": name}, inflated={}),
    ],
)
def test_a_missing_folder_is_no_network_error(name, load):
    with pytest.raises(FileNotFoundError) as error:
        load(name)
    assert str(error.value).startswith(f"Folder not found: {name!r} (working directory: ")


@pytest.mark.parametrize("name", ["gpt2", "Qwen/Qwen3-0.6B-Base", "owner/name.v2"])
def test_hub_ids_are_not_paths(name):
    assert not looks_like_path(name)
    assert check_source(name) == name


@pytest.mark.parametrize("load", [load_model, load_tokenizer, KADConfig.from_pretrained])
def test_what_may_be_both_is_said_to_be_neither(load):
    with pytest.raises((OSError, ValueError), match="'nobody/nothing'"):
        load("nobody/nothing")


def test_a_missing_model_below_an_adapter_names_both(tmp_path):
    adapter = shutil.copytree(PAIR / "proxy", tmp_path / "adapter")
    with pytest.raises(FileNotFoundError, match=r"not found: '\.\./reference', to which the adapter '.*/adapter'"):
        load_model(adapter)


def test_a_name_is_found_from_everywhere_and_after_both_were_moved(tmp_path, monkeypatch):
    for name in ("work/models/base", "work/out/proxy", "elsewhere"):
        (tmp_path / name).mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "work")
    for given, stored in (
        ("models/base", "../../models/base"),
        ("./models/base", "../../models/base"),
        ("out/proxy", "."),
        (str(tmp_path / "work/models/base"), str(tmp_path / "work/models/base")),
        ("Qwen/Qwen3", "Qwen/Qwen3"),
    ):
        assert portable_name(given, "out/proxy") == stored
    assert portable_name("models/base", ".") == "./models/base"  # not to be taken for a Hub id
    monkeypatch.chdir(tmp_path / "elsewhere")
    moved = (tmp_path / "work").rename(tmp_path / "moved")
    assert resolve_name("../../models/base", moved / "out/proxy") == str(moved / "models/base")
    assert resolve_name("Qwen/Qwen3", moved / "out/proxy") == "Qwen/Qwen3"


def test_a_config_names_its_models_so_that_they_are_found(tmp_path, monkeypatch):
    for name in ("base", "proxy"):
        shutil.copytree(PAIR / name, tmp_path / "work/models" / name)
    monkeypatch.chdir(tmp_path / "work")
    KADConfig(base="models/base", proxy="models/proxy").save_pretrained("models/proxy")
    KADConfig(base="models/base", proxy="models/proxy").save_pretrained("settings")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "work").rename(tmp_path / "moved")
    models = tmp_path / "moved/models"
    for folder in ("moved/models/proxy", "moved/settings"):
        config = RuleArguments(config=folder).to_config()
        assert (config.base, config.proxy) == (str(models / "base"), str(models / "proxy"))
        arguments = ModelArguments()
        arguments.complete(config, folder)
        assert (arguments.base, arguments.proxy) == (config.base, config.proxy)
        AutoConfig.from_pretrained(arguments.base)
        assert str(tmp_path) not in Path(folder, "kad_config.json").read_text()


def test_a_config_beside_a_proxy_on_the_hub_means_that_proxy(tmp_path, monkeypatch):
    file = tmp_path / "kad_config.json"
    file.write_text(json.dumps({"base": "../../models/base", "proxy": "."}))
    monkeypatch.setattr("transformers_kad.configuration.cached_file", lambda *arguments, **settings: str(file))
    config = KADConfig.from_pretrained("me/proxy")
    assert (config.base, config.proxy) == ("../../models/base", "me/proxy")
