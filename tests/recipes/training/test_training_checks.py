"""Can this proxy serve this base? Asked of folders without weights, whose tokenizers were changed."""

import json
import shutil
from pathlib import Path

import pytest
from alignment import BASE, PROXY, REFERENCE
from transformers import AutoTokenizer, T5Config

from transformers_kad.recipes.training import AlignmentError
from transformers_kad.recipes.training.checks import check_pair

TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


@pytest.fixture
def folder(tmp_path):
    """Makes a model folder without weights: a configuration, a tokenizer (changed by a function) or none."""

    def make(name, change=None, *, tokenizer=True, template=True, **config):
        made = tmp_path / name
        made.mkdir()
        content = json.loads(Path(REFERENCE, "config.json").read_text())
        (made / "config.json").write_text(json.dumps(content | config))
        for file in TOKENIZER if tokenizer else ():
            if template or file != "chat_template.jinja":
                shutil.copy(Path(BASE, file), made / file)
        if change is not None:
            path = made / "tokenizer.json"
            content = json.loads(path.read_text())
            change(content)
            path.write_text(json.dumps(content))
        return str(made)

    return make


def swap(first, second):
    """Exchange the ids of two ordinary tokens."""

    def change(content):
        vocabulary = content["model"]["vocab"]
        vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]

    return change


def test_a_pair_that_fits_needs_no_weights(folder):
    pair = check_pair(folder("base"), folder("proxy", max_position_embeddings=256))
    assert (pair.vocabulary, pair.context_length, pair.eos_token_ids) == (640, 256, (1,))
    assert pair.tokenizer.chat_template == Path(BASE, "chat_template.jinja").read_text()


def test_a_configuration_without_an_end_of_sequence(folder):
    """CPM-Ant has no `eos_token_id`, nor `max_position_embeddings`."""
    base = folder("base")
    Path(base, "config.json").write_text(json.dumps({"model_type": "cpmant", "vocab_size": 640}))
    assert check_pair(base, folder("proxy")).eos_token_ids == (1,)


def test_padded_vocabularies_of_different_size_fit(folder):
    assert check_pair(folder("base", vocab_size=704), folder("proxy", vocab_size=768)).vocabulary == 768


def test_a_proxy_without_tokenizer_uses_the_bases_and_it_is_said(folder, capsys):
    proxy = folder("proxy", tokenizer=False)
    assert check_pair(folder("base"), proxy).tokenizer.get_vocab() == AutoTokenizer.from_pretrained(BASE).get_vocab()
    assert f"The proxy {proxy} has no tokenizer of its own; the base's is used." in capsys.readouterr().out


def test_an_adapter_is_checked_by_what_it_brings(folder, capsys):
    assert check_pair(BASE, PROXY).vocabulary == 640
    assert capsys.readouterr().out == ""


def test_an_adapter_without_tokenizer_is_checked_by_its_models(folder, tmp_path):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    config = json.loads(Path(PROXY, "adapter_config.json").read_text())
    below = folder("below", swap("Ġc", "Ġb"))
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "../below"}))
    with pytest.raises(AlignmentError, match="2 token ids mean different strings"):
        check_pair(BASE, str(adapter))
    shutil.rmtree(below)
    folder("below", tokenizer=False)
    assert check_pair(BASE, str(adapter)).vocabulary == 640


def test_a_proxy_without_tokenizer_whose_embeddings_end_too_early(folder):
    with pytest.raises(AlignmentError, match="has 640 tokens, but the proxy's embeddings end at 639"):
        check_pair(folder("base"), folder("proxy", tokenizer=False, vocab_size=639))


def test_ids_that_mean_different_strings_are_listed(folder):
    vocabulary = AutoTokenizer.from_pretrained(BASE).get_vocab()
    with pytest.raises(AlignmentError) as error:
        check_pair(BASE, folder("proxy", swap("Ġc", "Ġb")))
    assert "2 token ids mean different strings" in str(error.value)
    assert f"{vocabulary['Ġc']}: 'Ġc' and 'Ġb'" in str(error.value)
    assert f"{vocabulary['Ġb']}: 'Ġb' and 'Ġc'" in str(error.value)


def test_a_string_with_another_id_is_listed(folder):
    def change(content):
        content["model"]["vocab"]["Ġc"] = 700  # where the base has no token

    before = AutoTokenizer.from_pretrained(BASE).get_vocab()["Ġc"]
    with pytest.raises(
        AlignmentError, match=rf"1 strings have different ids \(base and proxy\): 'Ġc': {before} and 700"
    ):
        check_pair(BASE, folder("proxy", change, vocab_size=768))


def test_special_tokens_with_other_ids_are_found(folder):
    def change(content):
        names = {1: "<|user|>", 2: "<|end|>"}
        for token in content["added_tokens"]:
            token["content"] = names.get(token["id"], token["content"])
        content["model"]["vocab"] |= {name: index for index, name in names.items()}

    with pytest.raises(AlignmentError, match=r"1: '<\|end\|>' and '<\|user\|>', 2: '<\|user\|>' and '<\|end\|>'"):
        check_pair(BASE, folder("proxy", change))


def test_an_end_of_sequence_that_only_one_has(folder):
    def change(content):
        content["added_tokens"] = [token for token in content["added_tokens"] if token["id"] != 1]
        del content["model"]["vocab"]["<|end|>"]

    proxy = folder("proxy", change)
    settings = json.loads(Path(proxy, "tokenizer_config.json").read_text())
    del settings["eos_token"]
    Path(proxy, "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(AlignmentError, match=r"that the proxy's lacks: \['<\|end\|>'\] \(its end of sequence\)"):
        check_pair(BASE, proxy)
    with pytest.raises(AlignmentError, match=r"that the base's lacks: \['<\|end\|>'\] \(its end of sequence\)"):
        check_pair(proxy, BASE)


def test_a_padding_token_of_its_own_does_no_harm(folder):
    proxy = folder("proxy", vocab_size=700)
    tokenizer = AutoTokenizer.from_pretrained(proxy)
    tokenizer.add_special_tokens({"pad_token": "<own pad>"})
    tokenizer.save_pretrained(proxy)
    assert check_pair(BASE, proxy).tokenizer.pad_token == "<|pad|>"


def test_the_same_tokens_with_other_rules_are_found(folder):
    def change(content):
        content["model"]["merges"] = content["model"]["merges"][:-100]

    with pytest.raises(AlignmentError, match='split text differently: "Hello, world!'):
        check_pair(BASE, folder("proxy", change))


def test_the_chat_template_is_the_files_then_the_bases_then_the_proxys(folder, tmp_path):
    file = tmp_path / "template.jinja"
    file.write_text("from the file")
    base, bare = folder("base"), folder("bare", template=False)
    proxy = folder("proxy")
    Path(proxy, "chat_template.jinja").write_text("from the proxy")
    assert check_pair(base, proxy, str(file)).tokenizer.chat_template == "from the file"
    assert "generation" in check_pair(base, proxy).tokenizer.chat_template
    assert check_pair(bare, proxy).tokenizer.chat_template == "from the proxy"
    with pytest.raises(AlignmentError, match="--chat_template FILE"):
        check_pair(bare, REFERENCE)
    with pytest.raises(AlignmentError, match="--chat_template '/no/file' cannot be read"):
        check_pair(base, proxy, "/no/file")


def test_several_chat_templates_without_a_default(folder):
    base = folder("base", template=False)
    (Path(base) / "additional_chat_templates").mkdir()
    (Path(base) / "additional_chat_templates" / "tool_use.jinja").write_text("with tools")
    with pytest.raises(
        AlignmentError, match=r"'.*base' has several chat templates, tool_use, .* --chat_template FILE"
    ):
        check_pair(base, folder("proxy"))


def test_a_tokenizer_that_cannot_pad(folder):
    base = folder("base")
    settings = json.loads(Path(base, "tokenizer_config.json").read_text())
    del settings["pad_token"]
    Path(base, "tokenizer_config.json").write_text(json.dumps(settings))
    assert check_pair(base, REFERENCE).tokenizer.pad_token == "<|end|>"
    del settings["eos_token"]
    Path(base, "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(AlignmentError, match="neither a padding nor an end-of-sequence token"):
        check_pair(base, REFERENCE)


def test_every_end_of_text_of_both_is_known(folder):
    base, proxy = folder("base", eos_token_id=7), folder("proxy", eos_token_id=[1, 9])
    assert check_pair(base, proxy).eos_token_ids == (1, 7, 9)
    Path(base, "generation_config.json").write_text(json.dumps({"eos_token_id": [8]}))
    assert check_pair(base, proxy).eos_token_ids == (1, 8, 9)


def test_what_is_no_causal_language_model(folder, tmp_path):
    T5Config().save_pretrained(tmp_path / "t5")
    with pytest.raises(AlignmentError, match=r"--proxy '.*t5' is an encoder-decoder model"):
        check_pair(BASE, str(tmp_path / "t5"))
    for option, pair in (("--base", ("./nothing", REFERENCE)), ("--proxy", (BASE, "./nothing"))):
        with pytest.raises(AlignmentError, match=rf"{option} '\./nothing' is not a folder or Hub id of a model"):
            check_pair(*pair)
    with pytest.raises(AlignmentError, match=r"--base '.*' needs a tokenizer"):
        check_pair(REFERENCE, REFERENCE)
