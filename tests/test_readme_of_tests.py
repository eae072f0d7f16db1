"""The tests, folders and counts that `tests/README.md` names are there, and a page that is wrong is found."""

import ast
import json
import re
from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from pages import ROOT, tables_in, text_of

TESTS = ROOT / "tests"
README = text_of("tests/README.md")


def rows_with(column: str, text: str) -> list[dict[str, str]]:
    """The rows of all tables that have a column."""
    return [row for table in tables_in(text) for row in table if column in row]


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


# --- Tests that are named -------------------------------------------------------------------------------------------


def named_tests(cell: str) -> list[tuple[str, str, str | None]]:
    """The file, the function and the case of each test in a cell; `::test` is one of the file before it."""
    found, file = [], ""
    for name in cell.split(", "):
        match = re.fullmatch(r"`([\w/]+\.py)?::(\w+)(?:\[([^]]+)\])?`", name)
        assert match, f"{name} is not the name of a test"
        file = match[1] or file
        found.append((file, match[2], match[3]))
    return found


def is_test(file: str, function: str, case: str | None) -> bool:
    """Whether there is such a test. A case must be text or a name of a module with a parametrized function."""
    path = ROOT / file
    if not (path.is_file() and path.name.startswith("test_") and function.startswith("test_")):
        return False
    tree = tree_of(path)
    matching = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == function]
    if case is None or not matching:
        return bool(matching)
    texts = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)}
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    decorators = [ast.unparse(decorator) for decorator in matching[0].decorator_list]
    return any(".parametrize(" in decorator for decorator in decorators) and case in texts | names


def missing_tests(text: str) -> list[str]:
    """The tests that do not exist, as file, function and case."""
    named = [test for row in rows_with("test", text) for test in named_tests(row["test"])]
    return [str(test) for test in named if not is_test(*test)]


def doubled_rows(text: str) -> list[str]:
    """Faults and inputs that have several rows."""
    counts = Counter(row.get("fault") or row["input"] for row in rows_with("test", text))
    return [name for name, count in counts.items() if count > 1]


# --- Folders and files ----------------------------------------------------------------------------------------------


def missing_files(text: str) -> list[str]:
    """Folders and modules that do not exist, of those in the map and in the sentences of the page."""
    in_map = [row["folder or file"].strip("`") for row in rows_with("folder or file", text)]
    sentences = "\n".join(line for line in text.splitlines() if not line.startswith("|"))
    in_sentences = re.findall(r"`([\w/]+(?:\.py|/))`", sentences)
    return [name for name in (*in_map, *in_sentences) if not (ROOT / name).exists()]


def unmapped_places(text: str) -> list[str]:
    """What the map leaves out: folders of `tests/`, folders of tests below them, and modules of tests beside them."""
    modules = list(TESTS.rglob("test_*.py"))
    folders = {path for path in TESTS.iterdir() if path.is_dir() and path.name[0] not in "._"}
    folders |= {path.parent for path in modules} - {TESTS}
    there = {f"{folder.relative_to(ROOT).as_posix()}/" for folder in folders}
    there |= {f"tests/{path.name}" for path in modules if path.parent == TESTS}
    return sorted(there - {row["folder or file"].strip("`") for row in rows_with("folder or file", text)})


# --- Counts ---------------------------------------------------------------------------------------------------------


def value_of(constant: str) -> int | None:
    """A number that a module of the tests assigns to a name, or the length of what it assigns."""
    file, _, name = constant.strip("`").partition("::")
    for node in tree_of(ROOT / file).body:
        if isinstance(node, ast.Assign) and [ast.unparse(target) for target in node.targets] == [name]:
            value = node.value
            match value:
                case ast.Constant(int()):
                    return value.value
                case ast.Dict():
                    return len(value.keys)
                case ast.List() | ast.Tuple():
                    return len(value.elts)
    return None


def wrong_counts(text: str) -> list[str]:
    """Counts that are not those of the code."""
    rows = rows_with("constant", text)
    return [row["what"] for row in rows if int(row["number"].replace(",", "")) != value_of(row["constant"])]


def counts_of_the_long_fuzz() -> list[str]:
    """Sessions, calls, refused calls, compared tokens and undecided ones of the fuzz that is run by hand."""
    counts = json.loads((TESTS / "fuzz" / "fuzz_100000.json").read_text(encoding="utf-8"))["counts"]
    names = ("sessions: all", "calls: all", "calls_refused: all", "positions: compared", "positions: undecided")
    return [f"{counts[name]:,}" for name in names]


def missing_counts_of_the_long_fuzz(text: str) -> list[str]:
    """Counts of the fuzz that is run by hand which the paragraph that names its file does not have."""
    [paragraph] = [paragraph for paragraph in text.split("\n\n") if "`fuzz/fuzz_100000.json`" in paragraph]
    numbers = re.findall(r"\d+(?:,\d+)*", paragraph)
    return [count for count in counts_of_the_long_fuzz() if count not in numbers]


# --- The page, and pages that are wrong -----------------------------------------------------------------------------

CHECKS = [
    missing_tests,
    doubled_rows,
    missing_files,
    unmapped_places,
    wrong_counts,
    missing_counts_of_the_long_fuzz,
]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_the_page_names_what_is_there(check: Callable[[str], list[str]]) -> None:
    assert check(README) == []


def test_the_page_has_all_its_tables() -> None:
    for column, least in (("fault", 100), ("input", 30), ("folder or file", 20), ("constant", 7)):
        assert len(rows_with(column, README)) >= least


@pytest.mark.parametrize(
    ("check", "old", "new", "found"),
    [
        (missing_tests, "::test_masks_of_any_type`", "::test_masks_of_no_type`", "test_masks_of_no_type"),
        (missing_tests, "tests/decoding/test_edges.py", "tests/decoding/test_hedges.py", "test_hedges"),
        (missing_tests, "`tests/decoding/test_edges.py::", "`tests/decoding/parallel_calls.py::", "parallel_calls"),
        (missing_tests, "[quickstart]", "[slowstart]", "slowstart"),
        (missing_tests, "::test_masks_of_any_type`", "::test_masks_of_any_type[other]`", "'other'"),
        (missing_tests, "::test_a_full_disk`", "::small_disk`", "small_disk"),
        (doubled_rows, "| Logits that are NaN or infinite |", "| A proxy without a cache |", "without a cache"),
        (missing_files, "| `tests/fuzz/` |", "| `tests/fuss/` |", "fuss/"),
        (missing_files, "| `tests/test_torchao.py` |", "| `tests/test_tochao.py` |", "test_tochao.py"),
        (missing_files, "(`tests/exact_law.py`)", "(`tests/exact_laws.py`)", "exact_laws.py"),
        (missing_files, "`tests/real_weights.py`", "`tests/unreal_weights.py`", "unreal_weights"),
        (unmapped_places, "| `tests/golden/` |", "| `tests/rules/` |", "golden/"),
        (unmapped_places, "| `tests/integrations/loading/` |", "| `tests/rules/` |", "integrations/loading/"),
        (unmapped_places, "| `tests/test_torchao.py` |", "| `tests/rules/` |", "test_torchao.py"),
        (wrong_counts, "| 2,275 |", "| 2,274 |", "damaged files"),
        (wrong_counts, "| 11 |", "| 12 |", "faults planted"),
        (wrong_counts, "| 1,000 |", "| 3,000 |", "random sessions in CI"),
        (wrong_counts, "test_soak.py::CALLS", "test_soak.py::MORE", "calls on one processor"),
        *((missing_counts_of_the_long_fuzz, f" {count} ", " 7 ", count) for count in counts_of_the_long_fuzz()),
    ],
)
def test_a_page_that_is_wrong_is_found(check: Callable[[str], list[str]], old: str, new: str, found: str) -> None:
    assert old in README
    assert found in " ".join(check(README.replace(old, new)))


@pytest.mark.parametrize(
    "name", ["`tests/decoding/test_edges.py`", "test_edges.py::test_masks_of_any_type", "the same"]
)
def test_what_is_no_name_of_a_test_is_refused(name: str) -> None:
    with pytest.raises(AssertionError, match="is not the name of a test"):
        missing_tests(README.replace("`tests/decoding/test_edges.py::test_masks_of_any_type`", name))
