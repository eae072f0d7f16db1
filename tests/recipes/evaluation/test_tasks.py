"""Every task: a row of the table below, and rows in the layout of the real set in `fixtures/`.

A new task is one declaration in `TASKS`, one row here, and a folder of fixtures.
"""

import json
import re
import shutil
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from run_command import run_command

from transformers_kad.recipes import word_problems
from transformers_kad.recipes.evaluation.answer_text import REASON
from transformers_kad.recipes.evaluation.option_answers import extract_option
from transformers_kad.recipes.evaluation.task import Instance
from transformers_kad.recipes.evaluation.tasks import TASKS, get_task, multiple_choice

FIXTURES = Path(__file__).parent / "fixtures"


@dataclass(frozen=True)
class Case:
    """What is expected of a task on its fixtures: the last instance, and a prediction that is wrong for it."""

    name: str
    file: str | None  # of the evaluated split, in the set's folder; None: generated
    question: str
    answer: str
    wrong: str
    count: int = 20


CASES = [
    Case("gsm8k", "main/test-00000-of-00001.jsonl", "How many grains fill one cup?\n\n", "25000", "25"),
    Case("mmlu", "all/test-00000-of-00001.jsonl", "show?\n\n(A) Costs\n(B) Tasks over time\n(C)", "B", "C"),
    Case(
        "truthfulqa_mc1",
        "multiple_choice/validation-00000-of-00001.jsonl",
        "\n(H) None, all are as likely\n",
        "H",
        "A",
    ),
    Case("math500", "test.jsonl", "Who is the shortest?\n\n", r"\text{Cleo}", "Ben"),
    Case("svamp", "test.json", "one of them 700. How many seats has the other?\n\n", "500", "-500"),
    Case("arc_challenge", "ARC-Challenge/test-00000-of-00001.jsonl", "tides?\n\n(A) clouds\n(B) fish", "D", "4"),
    Case("commonsense_qa", "data/validation-00000-of-00001.jsonl", "library?\n\n(A) to wake others\n", "E", "e"),
    Case("tiny", None, "Gus takes 22 away. How many shells does Cleo have now?", "77", "077", count=500),
]
each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
each_set = pytest.mark.parametrize("case", [case for case in CASES if case.file], ids=lambda case: case.name)


def test_the_table_has_every_task():
    """Tasks with an extractor; the others have tests of their own."""
    assert [case.name for case in CASES] == [name for name, task in TASKS.items() if task.extract is not None]
    assert all(name == task.name for name, task in TASKS.items())


def read(file: Path) -> list[dict]:
    text = file.read_text(encoding="utf-8")
    return json.loads(text) if file.suffix == ".json" else [json.loads(line) for line in text.splitlines()]


def write(file: Path, rows: list[dict]) -> None:
    lines = "\n".join(json.dumps(row) for row in rows)
    file.write_text(json.dumps(rows) if file.suffix == ".json" else lines, encoding="utf-8")


@pytest.fixture
def copies(tmp_path, monkeypatch) -> Path:
    """The fixtures, to be changed, and a cache of Hugging Face's that no other test sees."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return Path(shutil.copytree(FIXTURES, tmp_path / "copies"))


# --- Every task ---------------------------------------------------------------------------------------------


@each_case
def test_instances(case):
    task = get_task(case.name)
    instances = task.load(data_dir=FIXTURES)
    assert len(instances) == case.count
    assert len({instance.id for instance in instances}) == case.count
    assert case.question in instances[-1].question
    assert instances[-1].question.endswith(task.instruction)
    assert instances[-1].answer == case.answer
    assert not task.is_correct(case.wrong, instances[-1])
    for instance in instances:
        assert task.is_correct(task.extract(instance.solution, True), instance), instance
        assert not task.is_correct(None, instance)
    assert task.load(data_dir=FIXTURES, limit=3) == instances[:3]
    assert task.load(data_dir=FIXTURES, limit=case.count + 1)[: case.count] == instances


@each_case
def test_the_solution_of_one_instance_is_wrong_for_another(case):
    task = get_task(case.name)
    instances = task.load(data_dir=FIXTURES, limit=20)
    first = next(one for one in instances if one.answer != instances[-1].answer)
    assert not task.is_correct(task.extract(first.solution, True), instances[-1])


@each_set
def test_instances_are_the_same_wherever_their_rows_stand(case, copies):
    task = get_task(case.name)
    instances = task.load(data_dir=copies)
    file = copies / task.dataset / case.file
    write(file, read(file)[::-1])
    assert sorted(task.load(data_dir=copies), key=lambda one: one.id) == sorted(instances, key=lambda one: one.id)
    assert task.load(data_dir=copies)[0] == instances[-1] or case.name == "mmlu"  # its last row stands there twice


@each_set
def test_parquet_files_hold_the_same_instances(case, copies):
    task = get_task(case.name)
    folder = copies / task.dataset
    instances = task.load(data_dir=copies)
    for file in [*folder.rglob("*.json"), *folder.rglob("*.jsonl")]:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(read(file)), file.with_suffix(".parquet"))
        file.unlink()
    assert task.load(data_dir=copies) == instances


@each_set
def test_files_that_have_changed_are_read_anew(case, copies):
    task = get_task(case.name)
    file = copies / task.dataset / case.file
    # What others load fills the cache that would be stale.
    assert len(datasets.load_dataset(str(copies / task.dataset), name=task.subset, split=task.split)) == case.count
    assert len(task.load(data_dir=copies)) == case.count
    write(file, read(file)[:7])
    assert task.load(data_dir=copies) == task.load(data_dir=FIXTURES, limit=7)


@each_set
def test_the_copy_of_one_set_can_be_named_itself(case, copies):
    task = get_task(case.name)
    assert task.load(data_dir=FIXTURES / task.dataset) == task.load(data_dir=str(FIXTURES))
    (copies / f"{task.split}.jsonl").write_text("{}")  # the folder of the set goes first
    # What `hf download --local-dir` leaves beside the files.
    note = copies / task.dataset / ".cache" / "huggingface" / "download" / f"{case.file}.metadata"
    note.parent.mkdir(parents=True)
    note.write_text("0000\n0000\n1700000000.0\n")
    assert task.load(data_dir=copies) == task.load(data_dir=FIXTURES)


# What people have of a data set: name, where its files lie below the folder, and what is named as `data_dir`.
LAYOUTS = {
    "a subset's files": ("{subset}/{split}-00000-of-00001.parquet", "."),
    "the subset's folder": ("{subset}/{split}-00000-of-00001.parquet", "{subset}"),
    "two parts": ("{subset}/{split}-0000{part}-of-00002.parquet", "."),
    "a folder data": ("data/{split}-00000-of-00001-0123456789abcdef.parquet", "."),
    "one file of the split": ("{split}.jsonl", "."),
    "below the Hub id": ("{dataset}/{split}.jsonl", "."),
    "below the set's name": ("{set}/{split}.jsonl", "."),
    "one file of the task": ("{task}_{split}.jsonl", "."),
    "the file itself": ("{task}_{split}.jsonl", "{task}_{split}.jsonl"),
    "the file itself, with any name": ("questions.parquet", "questions.parquet"),
}


@pytest.mark.parametrize("readme", [False, True], ids=["alone", "with the Hub's README"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["gsm8k", "math500", "commonsense_qa"])  # with a subset, without, in data/
def test_local_files_load_however_they_lie(name, layout, readme, tmp_path):
    task, (case,) = get_task(name), (case for case in CASES if case.name == name)
    expected = task.load(data_dir=FIXTURES)
    names = {"split": task.split, "dataset": task.dataset, "set": task.dataset.rpartition("/")[2], "task": task.name}
    names["subset"] = task.subset or "."
    rows = read(FIXTURES / task.dataset / case.file)
    file, named = (text.format(part="{part}", **names) for text in LAYOUTS[layout])
    half = len(rows) // 2
    parts = [rows[:half], rows[half:]] if "{part}" in file else [rows]
    for part, some in enumerate(parts):
        path = tmp_path / file.format(part=part)
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".parquet":
            datasets.Dataset.from_list(some).to_parquet(path)
        else:
            write(path, some)
    if readme:
        shutil.copy(FIXTURES / task.dataset / "README.md", tmp_path)
    assert task.load(data_dir=tmp_path / named) == expected
    assert task.load(data_dir=tmp_path / named, limit=3) == expected[:3]


def test_a_part_that_is_missing_and_files_that_tell_two_stories_are_named(tmp_path):
    task, rows = get_task("gsm8k"), read(FIXTURES / "openai/gsm8k" / CASES[0].file)
    folder = tmp_path / "main"
    folder.mkdir()
    write(folder / "test-00000-of-00002.jsonl", rows[:10])
    with pytest.raises(ValueError, match=r"all parts of one file.*test-00000-of-00002.jsonl"):
        task.load(data_dir=tmp_path)
    write(folder / "test-00001-of-00002.jsonl", rows[10:])
    assert len(task.load(data_dir=tmp_path)) == len(rows)
    write(folder / "test.jsonl", rows)
    with pytest.raises(ValueError, match=r"test-00000-of-00002.jsonl.*test.jsonl"):
        task.load(data_dir=tmp_path)


def test_local_files_that_do_not_fit_are_answered_with_the_names_that_would(tmp_path):
    task = get_task("gsm8k")
    write(tmp_path / "answers.jsonl", [])
    names = r"takes a file with.*main/test-\*\.parquet, test\.jsonl or gsm8k_test\.jsonl"
    with pytest.raises(FileNotFoundError, match=names):
        task.load(data_dir=tmp_path)
    (tmp_path / "README.md").write_text("My notes.")
    with pytest.raises(ValueError, match=names):
        task.load(data_dir=tmp_path)
    (tmp_path / "test.txt").write_text("1 + 1")
    with pytest.raises(ValueError, match=r"\.jsonl.*test\.txt"):
        task.load(data_dir=tmp_path / "test.txt")
    write(tmp_path / "mine.jsonl", [{"question": "1 + 1?", "answer": "#### 2"}])
    with pytest.raises(ValueError, match=r"mine\.jsonl.*one file.*'train'"):
        task.few_shot_examples(1, data_dir=tmp_path / "mine.jsonl")


@each_case
def test_examples(case):
    task = get_task(case.name)
    question = task.load(data_dir=FIXTURES, limit=1)[0]
    assert task.few_shot_examples(0, data_dir=FIXTURES) == []
    if task.few_shot_split is None:
        with pytest.raises(ValueError, match=f"'{case.name}' has no split but the evaluated one"):
            task.few_shot_examples(1, data_dir=FIXTURES)
        return
    examples = task.few_shot_examples(3, data_dir=FIXTURES)
    assert examples == task.few_shot_examples(3, data_dir=FIXTURES)
    others = [task.few_shot_examples(3, data_dir=FIXTURES, seed=seed) for seed in range(1, 6)]
    assert any(other != examples for other in others)
    assert len({example.id for example in examples}) == 3
    chat = task.messages(question, examples)
    assert [message["role"] for message in chat] == ["user", "assistant"] * 3 + ["user"]
    assert [message["content"] for message in chat[:2]] == [examples[0].question, examples[0].solution]
    assert chat[-1]["content"] == question.question
    with pytest.raises(ValueError, match="examples were asked for, but"):
        task.few_shot_examples(1000, data_dir=FIXTURES)
    with pytest.raises(ValueError, match="no split but the evaluated one"):
        task.few_shot_examples(1, data_dir=FIXTURES, split=task.few_shot_split)


@each_case
def test_only_the_answer_to_the_question_is_scored(case):
    """Thoughts are not, and neither is what the model says to a question of its own."""
    task = get_task(case.name)
    instances = task.load(data_dir=FIXTURES, limit=20)
    right = instances[-1]
    other = next(one for one in instances if one.answer != right.answer)
    readers = [task.extract, *([lambda text, _: task.lenient(text)] if task.lenient else [])]
    for read in readers:
        thought = f"<think>\n{other.solution}\n</think>\n\n"
        assert task.is_correct(read(thought + right.solution, True), right)
        assert task.is_correct(read(thought.removeprefix("<think>\n") + right.solution, True), right)
        for ended in (True, False):
            assert read(f"<think>\n{right.solution}", ended) is None
    for turn in (f"Question: {other.question}\nAnswer:", other.question):
        if not (turn is other.question and task.instruction == ""):
            prediction = readers[-1](f"{right.solution}\n\n{turn} {other.solution}\n\n", False)
            assert task.is_correct(prediction, right)


def test_instructions_begin_with_what_marks_a_new_question():
    asked = [task for task in TASKS.values() if task.extract is not None]  # the others have no answer to look for
    assert {task.name for task in asked if not task.instruction.startswith(REASON)} == {"tiny"}


# --- Examples and chats -------------------------------------------------------------------------------------


def test_a_question_of_the_evaluated_split_is_no_example(copies):
    task = get_task("gsm8k")
    asked = {instance.question for instance in task.load(data_dir=copies)}
    assert asked & {instance.question for instance in task.load(data_dir=copies, split="train")}
    assert not asked & {example.question for example in task.few_shot_examples(4, data_dir=copies)}
    with pytest.raises(ValueError, match="has 4"):
        task.few_shot_examples(5, data_dir=copies)


def test_examples_do_not_depend_on_the_order_of_rows(copies):
    task = get_task("svamp")
    examples = task.few_shot_examples(2, data_dir=copies)
    file = copies / task.dataset / "train.json"
    write(file, read(file)[::-1])
    assert task.few_shot_examples(2, data_dir=copies) == examples


def test_a_chat_without_examples_is_the_question():
    (question,) = get_task("gsm8k").load(data_dir=FIXTURES, limit=1)
    assert get_task("gsm8k").messages(question) == [{"role": "user", "content": question.question}]


def test_a_question_is_never_its_own_example():
    (question,) = get_task("mmlu").load(data_dir=FIXTURES, limit=1)
    with pytest.raises(ValueError, match="is the question itself"):
        get_task("mmlu").messages(question, [replace(question, id="other")])


@pytest.mark.parametrize("count", [-1, 2.0])
def test_a_bad_number_of_examples_is_named(count):
    with pytest.raises(ValueError, match=re.escape(repr(count))):
        get_task("gsm8k").few_shot_examples(count, data_dir=FIXTURES)


# --- One task and another -----------------------------------------------------------------------------------


def test_prompts_ask_for_the_form_that_is_extracted():
    (number,) = get_task("svamp").load(data_dir=FIXTURES, limit=1)
    assert number.question == (
        "Kira has 14 pears and 9 plums. She eats 5 pears. How many pears does she have now?\n\n"
        "Reason step by step. End with one sentence of exactly this form: The answer is N. Here N stands for the "
        "number alone, without a unit."
    )
    assert number.solution == "( 14 - 5 ) = 9. The answer is 9."
    (option,) = get_task("mmlu").load(data_dir=FIXTURES, limit=1)
    assert option.question == (
        "Which of these bodies is a dwarf planet?\n\n(A) Mars\n(B) Ceres\n(C) Titan\n(D) Venus\n\n"
        "Reason step by step. End with one sentence of exactly this form: The answer is (X). Here X stands for the "
        "letter of the right option."
    )
    assert option.solution == "The answer is (B)."
    (boxed,) = get_task("math500").load(data_dir=FIXTURES, limit=1)
    assert boxed.question.endswith("\n\nReason step by step. Put the final answer, and nothing else, into \\boxed{}.")


def test_gsm8k_shows_no_annotations():
    instance = get_task("gsm8k").load(data_dir=FIXTURES, limit=3)[-1]
    assert instance.answer == "1250"
    assert instance.solution == "It packs 250 * 5 = 1250 bolts.\nThe answer is 1,250."


def test_the_right_option_of_truthfulqa_stands_anywhere(copies):
    task = get_task("truthfulqa_mc1")
    instances = task.load(data_dir=copies)
    assert len({instance.answer for instance in instances}) > 4
    file = copies / task.dataset / CASES[2].file
    rows = read(file)
    for row, instance in zip(rows, instances, strict=True):
        assert f"({instance.answer}) {row['mc1_targets']['choices'][0]}" in instance.question.splitlines()
        row["mc1_targets"] = {key: values[::-1] for key, values in row["mc1_targets"].items()}
    write(file, rows)
    assert task.load(data_dir=copies) == instances  # where it stands in the file does not matter


def test_numbered_options_get_letters():
    instance = get_task("arc_challenge").load(data_dir=FIXTURES, limit=2)[-1]
    assert "\n(A) a ruler\n(B) a clock\n(C) a balance\n" in instance.question
    assert instance.answer == "C"


TEXTS = [
    "We get 12 + 7 = 19. The answer is 19.",
    "We get 12 + 7 = 20. The answer is 19",
    "We get 12 + 7 = 19. The answer is 18.",
    "The answer is 19. The answer is 19.",
    "The answer is 019.",
    "The answer is 19. Ada",
    "We get 12 + 7 = 019.\nThe answer is 18.",
    "19 cups",
    "<think>\nThe answer is 18.\n</think>\n\nWe get 12 + 7 = 19. The answer is 19.",
    "The answer is 18.\n</think>\n\nWe get 12 + 7 = 19. The answer is 19.",
    "<think>\nThe answer is 19.",
    "cups",
    "",
]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("ended", [True, False])
def test_tiny_scores_as_its_module_does(text, ended):
    task = get_task("tiny")
    problem = word_problems.Problem("", "", 19, ())
    instance = Instance("", "", "19", "")
    whole = text + word_problems.EOS if ended else text
    assert task.is_correct(task.extract(text, ended), instance) is word_problems.is_correct(whole, problem)
    assert task.is_correct(task.lenient(text), instance) is word_problems.is_correct_lenient(whole, problem)


def test_tiny_asks_the_bare_problems_of_its_split():
    task = get_task("tiny")
    problems = word_problems.make_problems("validation", 5, seed=3)
    instances = task.load(split="validation", limit=5, seed=3)
    assert [one.question for one in instances] == [problem.question for problem in problems]
    assert [one.answer for one in instances] == [str(problem.answer) for problem in problems]
    assert task.load(limit=5) != task.load(limit=5, seed=1)
    assert all(other.lenient is None for other in TASKS.values() if other is not task)


def test_a_new_task_is_one_declaration(tmp_path):
    task = multiple_choice(
        name="riddles",
        dataset="somebody/riddles",
        subset=None,
        split="test",
        few_shot_split=None,
        question=lambda row: row["riddle"],
        options=lambda row: (row["options"], row["right"]),
        letters="ABC",
    )
    folder = tmp_path / "somebody" / "riddles"
    folder.mkdir(parents=True)
    rows = [{"riddle": "Which has keys?", "options": ["a piano", "a flute"], "right": 0}] * 2
    rows += [{"riddle": "Which has teeth?", "options": ["a spoon", "a cup", "a comb"], "right": 2}]
    write(folder / "test.jsonl", rows)
    twice, again, other = task.load(data_dir=tmp_path)
    assert again.id == f"{twice.id}-2"
    assert other.answer == task.extract("Combs have teeth. The answer is (C).", True) == "C"
    write(folder / "test.jsonl", [*rows, {**rows[0], "right": 2}])
    with pytest.raises(ValueError, match=r"Row 4 of somebody/riddles \(test\): of 2 options"):
        task.load(data_dir=tmp_path)


def test_options_are_extracted_with_the_task_s_letters():
    text = "The answer is (E)."
    assert get_task("commonsense_qa").extract(text, True) == extract_option(text, "ABCDE") == "E"
    assert get_task("mmlu").extract(text, True) is None
    assert get_task("mmlu").extract("The answer is B", False) is None


# --- What can go wrong --------------------------------------------------------------------------------------


def test_an_unknown_task_is_named():
    with pytest.raises(ValueError, match=r"Unknown task 'gsm8'\. Did you mean 'gsm8k'\?"):
        get_task("gsm8")


@pytest.mark.parametrize("limit", [0, -3, 2.5])
def test_a_bad_limit_is_named(limit):
    with pytest.raises(ValueError, match=re.escape(repr(limit))):
        get_task("tiny").load(limit=limit)


def test_a_set_that_is_not_there_comes_with_the_command_that_gets_it(tmp_path):
    command = f"hf download --repo-type dataset openai/gsm8k --local-dir {tmp_path}/openai/gsm8k"
    (tmp_path / "test_results.txt").write_text("no data")
    with pytest.raises(FileNotFoundError, match=re.escape(command)):
        get_task("gsm8k").load(data_dir=tmp_path)
    (tmp_path / "openai" / "gsm8k").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match=re.escape(command)):
        get_task("gsm8k").load(data_dir=tmp_path)
    with pytest.raises(FileNotFoundError, match=re.escape("--data_dir DIR")):
        replace(get_task("gsm8k"), dataset="nobody/no-such-set").load()


def test_a_split_that_is_not_there_is_named():
    with pytest.raises(ValueError, match=r"openai/gsm8k \(main, tset\).*'train', 'test'"):
        get_task("gsm8k").load(data_dir=FIXTURES, split="tset")
    with pytest.raises(ValueError, match="'tset'"):
        get_task("tiny").load(split="tset")


def test_a_split_without_answers_is_refused():
    with pytest.raises(ValueError, match=r"Row 1 of tau/commonsense_qa \(test\).*not every split has answers"):
        get_task("commonsense_qa").load(data_dir=FIXTURES, split="test")


def test_the_copy_of_another_set_is_refused():
    with pytest.raises(ValueError, match=r"'question_concat'.*columns are problem, solution, answer"):
        get_task("svamp").load(data_dir=FIXTURES / "HuggingFaceH4" / "MATH-500")


def test_an_answer_that_is_no_number_is_refused_before_anything_is_generated(copies):
    file = copies / "openai/gsm8k" / CASES[0].file
    write(file, [*read(file), {"question": "How many?", "answer": "Many.\n#### many"}])
    with pytest.raises(ValueError, match=r"Row 21 .*'many'"):
        get_task("gsm8k").load(data_dir=copies)


def test_files_that_cannot_be_read_are_named(copies):
    (copies / "openai/gsm8k" / CASES[0].file).write_text("{no json")
    with pytest.raises(ValueError, match=r"Could not load openai/gsm8k \(main, test\) from "):
        get_task("gsm8k").load(data_dir=copies)


def test_the_hub_is_asked_for_configuration_and_split(monkeypatch):
    asked = []

    def load_dataset(*arguments, **options):
        asked.append((arguments, options))
        return datasets.Dataset.from_list(read(FIXTURES / "openai/gsm8k" / CASES[0].file))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert get_task("gsm8k").load(limit=4) == get_task("gsm8k").load()[:4]
    assert asked == [(("openai/gsm8k",), {"name": "main", "split": "test"})] * 2
    monkeypatch.undo()
    assert get_task("gsm8k").load(data_dir=FIXTURES, limit=4) != []


def test_without_datasets_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    for data_dir in (None, FIXTURES):
        with pytest.raises(ImportError, match=r'pip install -e "\.\[eval\]"'):
            get_task("gsm8k").load(data_dir=data_dir)
    assert get_task("tiny").load(limit=1)


@pytest.mark.slow
def test_tasks_are_declared_without_the_extra():
    code = (
        "import sys; sys.modules.update(datasets=None, math_verify=None); "
        "from transformers_kad.recipes.evaluation.tasks import TASKS; print(len(TASKS))"
    )
    out = run_command([sys.executable, "-c", code])
    assert out.stdout == f"{len(TASKS)}\n", out.stderr


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"question": 5}, "Row 1 of openai/gsm8k .* has the question 5, which is not text"),
        ({"question": " "}, "Row 1 of openai/gsm8k .* has no question"),
        ({"answer": None}, "Row 1 of openai/gsm8k .* does not have the layout"),
    ],
)
def test_a_question_is_text(tmp_path, changed, message):
    row = {"question": "How many?", "answer": "Two.\n#### 2"}
    (tmp_path / "test.jsonl").write_text(json.dumps(row | changed) + "\n")
    with pytest.raises(ValueError, match=message):
        get_task("gsm8k").load(data_dir=tmp_path / "test.jsonl")


def test_an_option_is_text(tmp_path):
    row = {"question": "Which?", "choices": [1.5, 2.5, 3.5, 4.5], "answer": 1}
    (tmp_path / "test.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(ValueError, match=r"Row 1 of cais/mmlu .*: options must be text"):
        get_task("mmlu").load(data_dir=tmp_path / "test.jsonl")
