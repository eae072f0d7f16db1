"""`KADConfig`: what it accepts, what it writes and reads, and what it asks of the Hub. Nothing is downloaded."""

import copy
import dataclasses
import json
import pickle
import re
from pathlib import Path
from tempfile import TemporaryDirectory
from types import MappingProxyType, SimpleNamespace

import pytest
from huggingface_hub.errors import LocalEntryNotFoundError
from hypothesis import given, settings
from hypothesis import strategies as st

from transformers_kad import (
    RULES,
    KADConfig,
    KADLogitsProcessor,
    PrimalDeferral,
    __version__,
    configuration,
    make_rule,
)

CONFIGS = [
    KADConfig(),
    KADConfig(rule="primal", parameters={"budget": 0.25}),
    KADConfig(rule="cascade", parameters={"variant": "token_v3", "alpha": 1}),
    KADConfig(rule="exact", parameters={"budget": 0.1 + 0.2, "max_states": 7}),
    KADConfig("nudging", lazy=True, compile=True),
    KADConfig("blend_in", drafter="prompt_lookup"),
    KADConfig("ensemble", verification="block"),
    KADConfig("dual", {"threshold": 0.3}, 0.7, 9, base="some/base", proxy="Ünïcode/проксі"),
]


def write(folder, content):
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "kad_config.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return folder


# --- What it accepts ------------------------------------------------------------------------------------------


def test_every_rule_can_be_configured_by_its_name():
    for name in RULES:
        assert KADConfig(rule=name).make_rule() == make_rule(name)


def test_parameters_reach_the_rule():
    assert KADConfig(rule="primal", parameters={"budget": 0.25}).make_rule() == PrimalDeferral(0.25)


def test_the_defaults_are_those_of_the_processor():
    config = KADConfig()
    assert config.make_rule() == make_rule("dual", threshold=0.4)
    assert (config.component_temperature, config.num_assistant_tokens) == (1.0, 5)
    assert config.base is None
    assert config.proxy is None


@pytest.mark.parametrize("value", [0, -1.0, float("nan"), float("inf"), True, "1.0", None])
def test_a_component_temperature_that_is_not_positive_and_finite_is_refused_and_echoed(value):
    with pytest.raises((TypeError, ValueError), match=rf"component_temperature.*{re.escape(repr(value))}"):
        KADConfig(component_temperature=value)


@pytest.mark.parametrize("value", [0, -5, 2.5, True, "5", None])
def test_a_draft_length_that_is_no_positive_integer_is_refused_and_echoed(value):
    with pytest.raises((TypeError, ValueError), match=rf"num_assistant_tokens.*{re.escape(repr(value))}"):
        KADConfig(num_assistant_tokens=value)


def test_an_unknown_rule_or_parameter_is_refused_when_the_config_is_made():
    with pytest.raises(ValueError, match=r"'prima'.*Did you mean 'primal'"):
        KADConfig(rule="prima")
    with pytest.raises(TypeError, match=r"'budgt'.*Did you mean 'budget'"):
        KADConfig(rule="primal", parameters={"budgt": 0.5})
    with pytest.raises(ValueError, match=r"budget.*1\.5"):
        KADConfig(rule="primal", parameters={"budget": 1.5})


def test_a_config_is_frozen_and_comparable():
    config = KADConfig(rule="primal", parameters={"budget": 0.25})
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.rule = "dual"
    assert config == KADConfig(rule="primal", parameters={"budget": 0.25})
    assert config != KADConfig(rule="primal", parameters={"budget": 0.5})
    assert config != dataclasses.replace(config, proxy="another")


def test_a_config_does_not_change_with_the_mapping_that_it_was_made_from():
    parameters = {"budget": 0.25}
    config = KADConfig(rule="primal", parameters=parameters)
    parameters["budget"] = 7
    assert config.make_rule() == PrimalDeferral(0.25)


def test_equal_configs_have_equal_hashes_and_parameters_that_cannot_be_changed():
    config, same = (KADConfig("primal", {"budget": 1}, lazy=True), KADConfig("primal", {"budget": 1.0}, 1, lazy=True))
    assert (config, hash(config)) == (same, hash(same))
    assert len({config, same, dataclasses.replace(config, lazy=False), KADConfig("primal", {"budget": 0.5})}) == 3
    assert {KADConfig("exact", {"budget": 0.5, "max_states": 7}): 1}[
        KADConfig("exact", {"max_states": 7, "budget": 0.5})
    ]
    with pytest.raises(TypeError, match=r"\{'budget': 1\} can't be changed"):
        config.parameters["budget"] = 0.5
    assert config.make_rule() == PrimalDeferral(1)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.rule)
def test_a_config_can_be_taken_apart_replaced_copied_and_pickled(config):
    values = dataclasses.asdict(config)
    assert KADConfig(**values) == config
    assert json.loads(json.dumps(values)) == values
    values["parameters"] = {**values["parameters"]}
    assert KADConfig(**values) == config
    for again in (dataclasses.replace(config), copy.deepcopy(config), pickle.loads(pickle.dumps(config))):
        assert (again, hash(again)) == (config, hash(config))


@pytest.mark.parametrize("setting", ["compile", "lazy"])
@pytest.mark.parametrize("value", [1, 0, "true", None, ["yes"]])
def test_a_switch_that_is_not_true_or_false_is_refused_and_echoed(setting, value):
    with pytest.raises(TypeError, match=rf"`{setting}`.*{re.escape(repr(value))}"):
        KADConfig(**{setting: value})


REFUSED = {
    "drafter": ({"drafter": "promt_lookup"}, r"'promt_lookup'\. Did you mean 'prompt_lookup'"),
    "verification": (
        {"verification": "blocks"},
        r"verification 'blocks'\. Did you mean 'block'\? Known: token, block",
    ),
    "lookup": (
        {"drafter": "prompt_lookup", "num_assistant_tokens": "auto"},
        'num_assistant_tokens="auto".*prompt_lookup',
    ),
    "compile": ({"compile": True, "num_assistant_tokens": "auto"}, '`compile=True`.*num_assistant_tokens="auto"'),
    **{
        name: (
            {"rule": name, "lazy": True},
            rf"`lazy=True`.*\(dual, primal, exact, nudging, paced\), got {rule.__name__}",
        )
        for name, rule in RULES.items()
        if name not in ("dual", "primal", "exact", "nudging", "paced")
    },
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_processor_refuses_is_refused_in_the_same_words_by_its_config(proxy, tmp_path, case):
    settings, message = REFUSED[case]
    with pytest.raises(ValueError, match=message) as by_config:
        KADConfig(**settings)
    reference = {"reference": proxy} if case == "implicit_reward" else {}
    with pytest.raises(ValueError, match=message) as by_processor:
        KADLogitsProcessor(proxy, **settings, **reference)
    assert str(by_config.value) == str(by_processor.value)
    write(tmp_path, settings)
    with pytest.raises(ValueError, match=rf"(?s)kad_config\.json.*{message}"):
        KADConfig.from_pretrained(tmp_path)


def test_a_processor_takes_every_setting_of_a_config_unless_it_is_given_another(proxy):
    config = KADConfig("nudging", component_temperature=0.7, num_assistant_tokens=3, drafter="prompt_lookup")
    config = dataclasses.replace(config, compile=True, lazy=True, verification="block")
    kad = KADLogitsProcessor.from_config(proxy, config)
    assert kad.rule == config.make_rule()
    for name in ("component_temperature", "num_assistant_tokens", "drafter", "compile", "lazy", "verification"):
        assert getattr(kad, name) == getattr(config, name) != getattr(KADConfig(), name), name
    other = KADLogitsProcessor.from_config(proxy, config, lazy=False, drafter="proxy", trace=True)
    assert (other.lazy, other.drafter, other.compile) == (False, "proxy", True)


# --- Saving and loading ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.rule)
def test_what_is_saved_is_loaded_again(tmp_path, config):
    config.save_pretrained(tmp_path)
    assert KADConfig.from_pretrained(tmp_path) == config
    assert KADConfig.from_pretrained(str(tmp_path)) == config


def test_any_mapping_of_parameters_can_be_saved(tmp_path):
    config = KADConfig(rule="primal", parameters=MappingProxyType({"budget": 0.25}))
    config.save_pretrained(tmp_path)
    assert KADConfig.from_pretrained(tmp_path).make_rule() == PrimalDeferral(0.25)


def test_the_folder_is_made_and_gets_one_file_whose_path_is_returned(tmp_path):
    folder = tmp_path / "not" / "yet"
    path = KADConfig().save_pretrained(str(folder))
    assert Path(path) == folder / "kad_config.json"
    assert [file.name for file in folder.iterdir()] == ["kad_config.json"]


def test_the_file_is_json_with_the_library_version_in_it(tmp_path):
    config = CONFIGS[-1]
    text = config.save_pretrained(tmp_path).read_text(encoding="utf-8")
    assert json.loads(text) == {
        "transformers_kad_version": __version__,
        "rule": "dual",
        "parameters": {"threshold": 0.3},
        "component_temperature": 0.7,
        "num_assistant_tokens": 9,
        "base": "some/base",
        "proxy": "Ünïcode/проксі",
        "drafter": "proxy",
        "compile": False,
        "lazy": False,
        "verification": "token",
    }
    assert text.endswith("}\n")


def test_saving_again_replaces_the_file(tmp_path):
    CONFIGS[0].save_pretrained(tmp_path)
    CONFIGS[1].save_pretrained(tmp_path)
    assert KADConfig.from_pretrained(tmp_path) == CONFIGS[1]


def test_saving_to_a_file_is_refused(tmp_path):
    file = tmp_path / "file"
    file.write_text("text")
    with pytest.raises(NotADirectoryError, match=re.escape(str(file))):
        KADConfig().save_pretrained(file)
    assert file.read_text() == "text"


def test_a_subfolder_is_read_and_not_the_folder_above(tmp_path):
    CONFIGS[0].save_pretrained(tmp_path)
    CONFIGS[1].save_pretrained(tmp_path / "below" / "deeper")
    assert KADConfig.from_pretrained(tmp_path, subfolder="below/deeper") == CONFIGS[1]


def test_a_missing_file_is_named_with_its_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match=rf"kad_config\.json.*{re.escape(str(tmp_path))}"):
        KADConfig.from_pretrained(tmp_path)
    CONFIGS[0].save_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match=re.escape(str(tmp_path / "below"))):
        KADConfig.from_pretrained(tmp_path, subfolder="below")


@pytest.mark.parametrize("content", ["", "{", '{"rule": "dual",}', "rule: dual"])
def test_broken_json_is_refused_and_the_file_named(tmp_path, content):
    write(tmp_path, content)
    with pytest.raises(ValueError, match=rf"{re.escape(str(tmp_path))}.*not valid JSON"):
        KADConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize("content", ["[]", '"dual"', "null", "3"])
def test_json_that_is_no_object_is_refused_and_echoed(tmp_path, content):
    write(tmp_path, content)
    echoed = re.escape(repr(json.loads(content)))
    with pytest.raises(ValueError, match=rf"{re.escape(str(tmp_path))}.*JSON object.*{echoed}"):
        KADConfig.from_pretrained(tmp_path)


def test_an_unknown_key_is_ignored_with_the_nearest_name_the_list_and_both_versions(tmp_path, caplog):
    write(tmp_path, {"transformers_kad_version": "99.1", "rule": "primal", "num_asistant_tokens": 3, "speed": [1]})
    with caplog.at_level("WARNING", logger="transformers_kad.configuration"):
        assert KADConfig.from_pretrained(tmp_path) == KADConfig("primal")
    misspelled, newer = (record.getMessage() for record in caplog.records)
    assert "'num_asistant_tokens'. Did you mean 'num_assistant_tokens'" in misspelled
    assert "'speed'." in newer
    assert "Did you mean" not in newer
    for message in (misspelled, newer):
        assert all(field.name in message for field in dataclasses.fields(KADConfig))
        assert "ignored" in message
        assert "99.1" in message
        assert __version__ in message
        assert str(tmp_path) in message


def test_known_keys_are_read_without_a_warning(tmp_path, caplog):
    CONFIGS[-1].save_pretrained(tmp_path)
    with caplog.at_level("WARNING", logger="transformers_kad.configuration"):
        KADConfig.from_pretrained(tmp_path)
    assert caplog.records == []


def test_a_file_of_another_version_is_read_where_it_is_understood(tmp_path):
    write(tmp_path, {"transformers_kad_version": "99.1", "rule": "primal", "parameters": {"budget": 0.25}})
    assert KADConfig.from_pretrained(tmp_path) == CONFIGS[1]
    write(tmp_path, {"rule": "primal", "parameters": {"budget": 0.25}})
    assert KADConfig.from_pretrained(tmp_path) == CONFIGS[1]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ({"rule": "duel"}, "'duel'.*Did you mean 'dual'"),
        ({"parameters": {"threshold": 2}}, "threshold.*2"),
        ({"parameters": {"treshold": 0.2}}, "treshold.*Did you mean 'threshold'"),
        ({"component_temperature": 0}, "component_temperature.*0"),
        ({"num_assistant_tokens": "5"}, "num_assistant_tokens.*'5'"),
        ({"rule": None}, "None"),
    ],
)
def test_bad_values_in_a_file_are_refused_as_in_code(tmp_path, content, says):
    write(tmp_path, content)
    with pytest.raises((TypeError, ValueError), match=says):
        KADConfig.from_pretrained(tmp_path)


HUGE = "1" + "0" * 400


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ('{"base": 5}', r"`base`.*got 5"),
        ('{"proxy": ["a"]}', r"`proxy`.*got \['a'\]"),
        ('{"rule": ["dual"]}', r"rule.*\['dual'\]"),
        ('{"parameters": 5}', r"`parameters`.*got 5"),
        ('{"parameters": null}', r"`parameters`.*got None"),
        ('{"parameters": [["threshold", 0.5]]}', r"`parameters`.*threshold"),
        ('{"parameters": {"threshold": "0.5"}}', r"threshold.*'0\.5'"),
        ('{"parameters": {"threshold": ' + HUGE + "}}", r"threshold.*1000"),
        ('{"rule": "implicit_reward", "parameters": {"beta": ' + HUGE + "}}", r"beta.*1000"),
        ('{"component_temperature": ' + HUGE + "}", r"component_temperature.*1000"),
        ('{"component_temperature": 1e400}', r"component_temperature.*inf"),
        ('{"component_temperature": [1]}', r"component_temperature.*\[1\]"),
        ('{"num_assistant_tokens": ' + "1" * 5000 + "}", "not valid JSON.*digits"),
        ('{"rule": "dual", "rule": "primal"}', r"'rule'.*twice"),
        ('{"parameters": {"threshold": 0.1, "threshold": 0.2}}', r"'threshold'.*twice"),
        ('{"parameters": ' + '{"a":' * 5000 + "1" + "}" * 5001, "not valid JSON.*nested"),
        ('{"parameters": {"threshold": ' + "[" * 300 + "]" * 300 + "}}", "not valid JSON.*nested"),
    ],
)
def test_whatever_is_wrong_in_a_file_is_a_value_error_that_names_the_file_and_the_key(tmp_path, content, says):
    write(tmp_path, content)
    with pytest.raises(ValueError, match=rf"(?s)kad_config\.json.*{says}"):
        KADConfig.from_pretrained(tmp_path)


def test_bytes_that_are_no_text_are_refused_and_the_file_named(tmp_path):
    (tmp_path / "kad_config.json").write_bytes(b'{"base": "caf\xe9"}')
    with pytest.raises(ValueError, match=r"kad_config\.json.*not valid JSON.*0xe9"):
        KADConfig.from_pretrained(tmp_path)


def test_a_byte_order_mark_is_no_part_of_the_file(tmp_path):
    CONFIGS[1].save_pretrained(tmp_path)
    path = tmp_path / "kad_config.json"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert KADConfig.from_pretrained(tmp_path) == CONFIGS[1]


NUMBERS = st.integers() | st.just(10**400) | st.floats() | st.booleans()
VALUES = st.recursive(
    st.none() | NUMBERS | st.text(max_size=5) | st.sampled_from([*RULES, "auto", "diff"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
PARAMETERS = [field.name for rule in RULES.values() for field in dataclasses.fields(rule)]
DOCUMENTS = VALUES | st.fixed_dictionaries(
    {},
    optional={field.name: VALUES for field in dataclasses.fields(KADConfig)}
    | {"rule": st.sampled_from([*RULES]) | VALUES}
    | {"parameters": st.dictionaries(st.sampled_from(PARAMETERS), VALUES, max_size=2) | VALUES},
)


@given(DOCUMENTS)
@settings(derandomize=True, deadline=None, max_examples=500)
def test_any_json_is_a_config_that_can_be_saved_and_read_again_or_a_value_error_with_the_file(document):
    with TemporaryDirectory() as folder:
        write(Path(folder), json.dumps(document))
        try:
            config = KADConfig.from_pretrained(folder)
        except ValueError as error:
            assert "kad_config.json" in str(error)
            return
        config.save_pretrained(folder)
        assert KADConfig.from_pretrained(folder) == config
        assert config.make_rule() == make_rule(document.get("rule", "dual"), **document.get("parameters", {}))


@given(st.text(st.sampled_from('{}[]":,0e-.ruletbas\\ud83d\ufeff \n'), max_size=30) | st.binary(max_size=30))
@settings(derandomize=True, deadline=None, max_examples=300)
def test_any_bytes_are_a_config_or_a_value_error_with_the_file(content):
    with TemporaryDirectory() as folder:
        raw = content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass")
        (Path(folder) / "kad_config.json").write_bytes(raw)
        try:
            KADConfig.from_pretrained(folder)
        except ValueError as error:
            assert "kad_config.json" in str(error)


# --- The Hub, recorded ----------------------------------------------------------------------------------------


@pytest.fixture
def downloads(monkeypatch, tmp_path):
    """Records the calls of `cached_file`, which finds a file."""
    calls = []
    path = CONFIGS[1].save_pretrained(tmp_path / "cache")

    def cached_file(repo_id, filename, **settings):
        calls.append((repo_id, filename, settings))
        return str(path)

    monkeypatch.setattr(configuration, "cached_file", cached_file)
    monkeypatch.chdir(tmp_path)
    return calls


def test_what_is_no_folder_is_asked_of_the_hub_with_revision_token_and_subfolder(downloads):
    config = KADConfig.from_pretrained("some/repo", revision="v2", token="secret", subfolder="below")
    assert config == CONFIGS[1]
    assert downloads == [("some/repo", "kad_config.json", {"revision": "v2", "token": "secret", "subfolder": "below"})]


def test_the_hub_is_asked_for_the_default_revision_without_a_token_unless_they_are_given(downloads):
    KADConfig.from_pretrained("some/repo")
    ((repo_id, filename, settings),) = downloads
    assert (repo_id, filename) == ("some/repo", "kad_config.json")
    assert all(value is None for value in settings.values())


def test_a_local_folder_is_never_asked_of_the_hub(downloads, tmp_path):
    CONFIGS[2].save_pretrained(tmp_path / "some" / "repo")
    assert KADConfig.from_pretrained("some/repo", revision="v2") == CONFIGS[2]
    with pytest.raises(FileNotFoundError):
        KADConfig.from_pretrained("some")
    assert downloads == []


@pytest.fixture
def uploads(monkeypatch):
    """Records what is asked of `HfApi`."""
    calls = []

    class Api:
        def __init__(self, **settings):
            calls.append(("HfApi", settings))

        def create_repo(self, repo_id, **settings):
            calls.append(("create_repo", {"repo_id": repo_id, **settings}))

        def upload_file(self, **settings):
            calls.append(("upload_file", settings))
            return SimpleNamespace(commit_url="https://hub.example/commit/1")

    monkeypatch.setattr(configuration, "HfApi", Api)
    return calls


def test_pushing_makes_the_repo_and_uploads_the_file_that_would_be_saved(uploads, tmp_path):
    address = CONFIGS[-1].push_to_hub("some/repo", token="secret", private=True)
    assert address == "https://hub.example/commit/1"
    assert [name for name, _ in uploads] == ["HfApi", "create_repo", "upload_file"]
    (_, api), (_, created), (_, uploaded) = uploads
    assert api["token"] == "secret"
    assert (created["repo_id"], created["private"], created["exist_ok"]) == ("some/repo", True, True)
    assert (uploaded["repo_id"], uploaded["path_in_repo"]) == ("some/repo", "kad_config.json")
    assert uploaded["path_or_fileobj"] == CONFIGS[-1].save_pretrained(tmp_path).read_bytes()


def test_pushing_with_nothing_said_leaves_token_and_privacy_to_the_hub(uploads):
    KADConfig().push_to_hub("some/repo")
    settings = dict(uploads)
    assert settings["HfApi"].get("token") is None
    assert settings["create_repo"].get("private") is None


def test_a_hub_that_cannot_be_reached_is_told_apart_from_a_missing_folder(monkeypatch):
    def hf_hub_download(*arguments, **settings):
        raise LocalEntryNotFoundError("no connection")

    monkeypatch.setattr("transformers.utils.hub.hf_hub_download", hf_hub_download)
    with pytest.raises(FileNotFoundError, match=r"'nowhere' is no folder here, .* from the Hub: .*couldn't connect"):
        KADConfig.from_pretrained("nowhere")


def test_a_path_that_is_neither_a_folder_nor_a_repo_is_named(tmp_path):
    missing = str(tmp_path / "not" / "there")
    with pytest.raises(FileNotFoundError, match=r"Folder not found: '.*/not/there'"):
        KADConfig.from_pretrained(missing)


@pytest.mark.parametrize("name", ["base", "proxy"])
@pytest.mark.parametrize("value", ["", " "])
def test_a_model_without_a_name_is_refused(name, value):
    """It would be taken for the folder that the file lies in."""
    with pytest.raises(TypeError, match=f"`{name}` must be the id or path of a model"):
        KADConfig(**{name: value})
