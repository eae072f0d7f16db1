"""No file that is read can run code: no pickles, no `eval`, no code of a model, weights in safetensors alone."""

import ast
import io
import json
import re
import shutil
import sys
from pathlib import Path

import align_dpo
import align_sft
import benchmark_pacing
import benchmark_speed
import benchmark_verification
import generate
import pytest
import quickstart
import run_eval
import serve
import sweep
import torch
import tune
from safetensors.torch import load_file, save_file
from transformers import dynamic_module_utils

from transformers_kad.integrations.loading.models import load_model, load_tokenizer
from transformers_kad.recipes.training import AlignmentError
from transformers_kad.recipes.training.checks import check_pair

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted([*(ROOT / "transformers_kad").rglob("*.py"), *(ROOT / "recipes").rglob("*.py")])
PAIR = ROOT / "recipes" / "tiny_pair"

MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib", "yaml", "jsonpickle"}
BUILT_IN = {"eval", "exec", "compile", "__import__"}
ATTRIBUTES = {
    *("torch.load", "torch.save", "torch.hub.load", "torch.package.PackageImporter", "numpy.load", "np.load"),
    *("os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput", "torch.jit.load", "ast.unparse"),
    *("pandas.read_pickle", "pd.read_pickle", "runpy.run_path", "runpy.run_module", "importlib.import_module"),
}
# Arguments with the only value that they may have.
ARGUMENTS = {
    "shell": False,
    "allow_pickle": False,
    "weights_only": True,
    "trust_remote_code": False,
    "use_safetensors": True,
    "safe_serialization": True,
}
# What is allowed, and why.
ALLOWED = {
    ("transformers_kad/integrations/lm_eval.py", "trust_remote_code"): "the harness's own option of that name",
}
LOADERS = {"AutoConfig", "AutoModelForCausalLM", "AutoModelForSequenceClassification", "AutoTokenizer"}


def dotted(node):
    """`a.b.c` of an expression; an empty text for other expressions."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return ""


def dangers(tree):
    """Everything in a module that can run code from a file: its line and its name."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            for name in names:
                if name.partition(".")[0] in MODULES:
                    yield node.lineno, name
            if isinstance(node, ast.ImportFrom):
                for alias in node.names:
                    if f"{node.module}.{alias.name}" in ATTRIBUTES:
                        yield node.lineno, f"{node.module}.{alias.name}"
        elif isinstance(node, ast.Call):
            if isinstance(node.func, ast.Name) and node.func.id in BUILT_IN:
                yield node.lineno, node.func.id
            if dotted(node.func) in ATTRIBUTES:
                yield node.lineno, dotted(node.func)
            for keyword in node.keywords:
                value = keyword.value.value if isinstance(keyword.value, ast.Constant) else "an expression"
                if keyword.arg in ARGUMENTS and value is not ARGUMENTS[keyword.arg]:
                    yield node.lineno, keyword.arg
        elif isinstance(node, ast.Assign):  # where["trust_remote_code"] = True
            for target in node.targets:
                if isinstance(target, ast.Subscript) and isinstance(target.slice, ast.Constant):
                    name = target.slice.value
                    if name in ARGUMENTS and ast.unparse(node.value) != str(ARGUMENTS[name]):
                        yield node.lineno, name
        elif isinstance(node, ast.Dict):
            for key, value in zip(node.keys, node.values, strict=True):
                name = key.value if isinstance(key, ast.Constant) else None
                if isinstance(name, str) and name in ARGUMENTS and ast.unparse(value) != str(ARGUMENTS[name]):
                    yield value.lineno, name


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_nothing_can_run_code_from_a_file(source):
    name = source.relative_to(ROOT).as_posix()
    found = [(line, what) for line, what in dangers(ast.parse(source.read_text())) if (name, what) not in ALLOWED]
    assert not found


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("import pickle", "pickle"),
        ("from yaml import load", "yaml"),
        ("eval(text)", "eval"),
        ("exec(text)", "exec"),
        ("compile(text, '', 'exec')", "compile"),
        ("torch.load(path)", "torch.load"),
        ("from torch import load", "torch.load"),
        ("np.load(path, allow_pickle=True)", "allow_pickle"),
        ("subprocess.run(text, shell=True)", "shell"),
        ("subprocess.run(text, shell=choice)", "shell"),
        ("AutoModel.from_pretrained(path, trust_remote_code=True)", "trust_remote_code"),
        ("more['trust_remote_code'] = True", "trust_remote_code"),
        ("more = {'use_safetensors': None}", "use_safetensors"),
    ],
)
def test_the_search_finds_what_it_looks_for(text, what):
    assert what in [name for _, name in dangers(ast.parse(text))]


@pytest.mark.parametrize(
    "text",
    ["model.eval()", "re.compile(text)", "torch.compile(model)", "f(trust_remote_code=False)", "f(shell=False)"],
)
def test_the_search_finds_nothing_else(text):
    assert not list(dangers(ast.parse(text)))


def test_every_exception_is_needed():
    found = {
        (source.relative_to(ROOT).as_posix(), what)
        for source in SOURCES
        for _, what in dangers(ast.parse(source.read_text()))
    }
    assert not ALLOWED.keys() - found


def test_whatever_loads_by_name_says_that_no_code_may_run():
    """`from_pretrained` of the automatic classes without this argument would ask on standard input."""
    calls = []
    for source in SOURCES:
        for node in ast.walk(ast.parse(source.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                owner, method = dotted(node.func.value), node.func.attr
                if owner in LOADERS and method in ("from_pretrained", "from_config"):
                    calls.append((source.name, ast.unparse(node)))
    assert len(calls) >= 6
    for name, call in calls:
        assert re.search(r"\*\*NO_CODE|\*\*kwargs", call), f"{name}: {call}"


# --- Folders that hold code ------------------------------------------------------------------------------------------


class Bomb:
    """A pickle of it creates a file when it is read."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.fixture
def pair(tmp_path):
    return shutil.copytree(PAIR, tmp_path / "pair")


def with_code(folder, marker):
    """Make a model need code of its own, which creates the file `marker`."""
    (folder / "code.py").write_text(
        f"open({str(marker)!r}, 'w').close()\n"
        "from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast\n"
        "class Config(LlamaConfig):\n    model_type = 'unknown'\n"
        "class Model(LlamaForCausalLM):\n    config_class = Config\n"
        "class Tokens(PreTrainedTokenizerFast):\n    pass\n"
    )
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "model_type": "unknown",
        "auto_map": {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"},
    }
    (folder / "config.json").write_text(json.dumps(config))
    tokens = json.loads((folder / "tokenizer_config.json").read_text())
    tokens |= {"tokenizer_class": "Tokens", "auto_map": {"AutoTokenizer": [None, "code.Tokens"]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokens))


EVALUATION = ("--limit", "1", "--no_speculative")
RECIPES = {
    "generate": (generate, ("--input", "-")),
    "run_eval": (run_eval, (*EVALUATION, "--output", "out")),
    "sweep": (sweep, (*EVALUATION, "--output", "out")),
    "tune": (tune, (*EVALUATION, "--output", "out", "--trials", "1")),
    "serve": (serve, ("--port", "0")),
    "quickstart": (quickstart, ()),
    "benchmark_speed": (benchmark_speed, ("--output", "out", "--repetitions", "1")),
    "benchmark_speed --growth": (
        benchmark_speed,
        ("--output", "out", "--repetitions", "1", "--growth", "batch", "--sizes", "2,1"),
    ),
    "benchmark_verification": (benchmark_verification, ("--output", "out", "--texts", "1", "--repetitions", "1")),
    "benchmark_pacing": (benchmark_pacing, ("--output", "out", "--limit", "1", "--budgets", "0.2")),
    "align_dpo": (align_dpo, ("--data", "preferences.jsonl", "--output_dir", "out", "--use_cpu")),
    "align_sft": (align_sft, ("--data", "data.jsonl", "--output_dir", "out", "--use_cpu")),
}


@pytest.mark.parametrize("name", RECIPES)
def test_no_recipe_runs_code_of_a_model(name, pair, tmp_path, monkeypatch, capsys):
    """Not even if standard input, where the prompts may lie, holds what transformers would take for a consent."""
    recipe, arguments = RECIPES[name]
    marker = tmp_path / "executed"
    with_code(pair / "base", marker)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data.jsonl").write_text('{"prompt": "Why?", "completion": "So."}\n')
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"y\n" * 20)))
    models = ("--base", str(pair / "base"), "--proxy", str(pair / "proxy"))
    try:
        status = recipe.main([*models, *arguments])
        message = capsys.readouterr().err
    except SystemExit as stopped:
        status, message = stopped.code, f"{stopped.code} {capsys.readouterr().err}"
    assert status not in (0, None)
    assert not marker.exists()
    assert "Python code that lies in its folder" in message
    assert "No recipe runs it" in message
    assert sys.stdin.readline() == "y\n"  # nothing was read


def test_code_of_a_model_runs_if_the_user_says_so(pair, tmp_path, monkeypatch):
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(tmp_path / "modules")
    with_code(pair / "base", tmp_path / "executed")
    load_model(pair / "base", trust_remote_code=True)
    assert (tmp_path / "executed").exists()


def test_a_model_without_safetensors_is_refused_and_its_pickle_is_not_read(pair, tmp_path):
    weights = load_file(pair / "base" / "model.safetensors")
    (pair / "base" / "model.safetensors").unlink()
    torch.save(weights | {"bomb": Bomb(tmp_path / "executed")}, pair / "base" / "pytorch_model.bin")
    with pytest.raises(
        OSError, match=r"no file named model\.safetensors.*other formats are not read.*save_pretrained"
    ):
        load_model(pair / "base")
    assert not (tmp_path / "executed").exists()


def test_an_adapter_without_safetensors_is_refused_and_its_pickle_is_not_read(pair, tmp_path):
    weights = load_file(pair / "proxy" / "adapter_model.safetensors")
    (pair / "proxy" / "adapter_model.safetensors").unlink()
    torch.save(weights | {"bomb": Bomb(tmp_path / "executed")}, pair / "proxy" / "adapter_model.bin")
    with pytest.raises(ValueError, match=r"no adapter_model\.safetensors.*other formats are not read"):
        load_model(pair / "proxy")
    assert not (tmp_path / "executed").exists()


def test_a_chat_template_can_do_nothing_but_write_text(pair, tmp_path, monkeypatch, capsys):
    """transformers renders templates in a sandbox."""
    marker = tmp_path / "executed"
    template = "{{ cycler.__init__.__globals__.os.system('touch " + str(marker) + "') }}"
    (pair / "base" / "chat_template.jinja").write_text(template)
    models = ("--base", str(pair / "base"), "--proxy", str(pair / "proxy"))
    assert generate.main([*models, "--prompt", "Why?", "--max_new_tokens", "2"]) == 2
    assert "refused the prompt" in capsys.readouterr().err
    assert not marker.exists()


# --- Damaged models --------------------------------------------------------------------------------------------------


def change_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def rename_a_weight(path):
    weights = load_file(path)
    name = next(name for name in weights if "mlp" in name)
    weights[f"renamed.{name}"] = weights.pop(name)
    save_file(weights, path, metadata={"format": "pt"})


def cut_a_weight(path):
    weights = load_file(path)
    name = next(name for name in weights if "mlp" in name)
    weights[name] = weights[name][:3].clone()
    save_file(weights, path, metadata={"format": "pt"})


DAMAGES = {
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-100]),
    "empty": lambda path: path.write_bytes(b""),
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "a long header": lambda path: path.write_bytes(b"\xff" * 8 + path.read_bytes()[8:]),
    "a renamed weight": rename_a_weight,
    "a weight of another shape": cut_a_weight,
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("file", ["base/model.safetensors", "proxy/adapter_model.safetensors"])
@pytest.mark.filterwarnings("ignore:Found missing adapter keys")
def test_damaged_weights_are_refused_and_never_random(file, damage, pair):
    DAMAGES[damage](pair / file)
    with pytest.raises(ValueError, match=re.escape(str((pair / file).parent))):
        load_model((pair / file).parent)


JSON_DAMAGES = ["", "[]", "null", "5", '"x"', "{", "\0", '{"a": 1, "a": 2}', '{"auto_map": 5}']


@pytest.mark.parametrize("text", JSON_DAMAGES)
@pytest.mark.parametrize("file", ["base/config.json", "proxy/adapter_config.json"])
def test_damaged_configurations_are_refused_with_their_folder(file, text, pair):
    (pair / file).write_text(text)
    with pytest.raises((OSError, ValueError), match=re.escape(str((pair / file).parent))):
        load_model((pair / file).parent)


@pytest.mark.parametrize("text", [*JSON_DAMAGES[:-1], '{"eos_token_id": "x"}', '{"eos_token_id": [1, true]}'])
def test_a_damaged_generation_config_is_not_passed_over(text, pair):
    """transformers takes the ends of a turn from another file then, or from nowhere."""
    (pair / "base" / "generation_config.json").write_text(text)
    with pytest.raises(ValueError, match=r"generation_config\.json"):
        load_model(pair / "base")
    with pytest.raises(AlignmentError, match=r"generation_config\.json"):
        check_pair(str(pair / "base"), str(pair / "proxy"))


@pytest.mark.parametrize("text", JSON_DAMAGES[:-2])
@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json"])
def test_damaged_tokenizers_are_refused_with_their_folder(file, text, pair):
    (pair / "base" / file).write_text(text)
    with pytest.raises((OSError, ValueError), match=re.escape(str(pair / "base"))):
        load_tokenizer(pair / "base")
