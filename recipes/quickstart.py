# /// script
# requires-python = ">=3.11"
# dependencies = ["transformers-kad", "tqdm"]
# ///
"""Shows what KAD does within three minutes on a laptop, offline, with a tiny pair of models from this repo.

    python recipes/quickstart.py

The script answers a question with the base, the proxy and KAD, scores several rules on held-out problems, and checks
that speculative decoding and decoding token by token generate the same texts.

Any other pair, by Hub id or local folder (the proxy may be a LoRA adapter):

    python recipes/quickstart.py --base Qwen/Qwen3-8B-Base --proxy Qwen/Qwen3-0.6B --prompt "Why is the sky blue?"
"""

import os
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from transformers_kad import RULES, KADLogitsProcessor, KADStatistics, KADTrace, make_rule
from transformers_kad.integrations.loading.messages import silence_libraries
from transformers_kad.integrations.loading.models import below_adapter, load_model, load_tokenizer
from transformers_kad.integrations.loading.prompts import PLAIN_SAMPLING, encode, eos_token_ids, pad_token_id
from transformers_kad.recipes.command_line import parse_arguments
from transformers_kad.recipes.intervals import wilson_interval
from transformers_kad.recipes.word_problems import is_correct, is_correct_lenient, make_problems
from transformers_kad.records.statistics import add_up
from transformers_kad.utils.strict_json import parse_json_object

# isort: split
# These imports follow transformers_kad, which suppresses the messages of torchao.
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)

# The best parameters in the grid of recipes/sweep.py on 300 validation problems.
TINY_PAIR_RULES = {
    "implicit reward": ("implicit_reward", {"beta": 2.0}),
    "nudging": ("nudging", {"threshold": 0.7}),
    "confidence bet": ("confidence_bet", {"margin": 0.1}),
    "KAD primal": ("primal", {"budget": 0.95}),
    "KAD dual": ("dual", {"threshold": 0.7}),
}


@dataclass
class QuickstartArguments:
    """The arguments of the quickstart."""

    base: str | None = field(
        default=None, metadata={"help": "Base model: Hub id or folder. Default: the tiny pair's."}
    )
    proxy: str | None = field(
        default=None, metadata={"help": "Aligned proxy: Hub id or folder of a model or of a LoRA adapter."}
    )
    pair: Path = field(
        default=Path(__file__).resolve().parent / "tiny_pair",
        metadata={"help": "Folder of the tiny pair, used without --base and --proxy."},
    )
    rule: str = field(default="dual", metadata={"help": "Rule for the answer at the top, a name from RULES."})
    parameters: str = field(
        default="{}", metadata={"help": "The rule's parameters as JSON, for example '{\"threshold\": 0.5}'."}
    )
    prompt: str | None = field(default=None, metadata={"help": "The question. Default: a held-out problem."})
    max_new_tokens: int = field(default=40, metadata={"help": "Maximum length of an answer, in tokens."})
    num_assistant_tokens: int = field(default=5, metadata={"help": "Draft length of speculative decoding."})
    problems: int = field(default=200, metadata={"help": "Number of held-out problems in the table (tiny pair only)."})
    device: str = field(default="cpu", metadata={"help": "Device of the models: cpu, cuda, cuda:1, mps."})
    dtype: str = field(default="auto", metadata={"help": "dtype of the weights: auto, float32, bfloat16 or float16."})
    seed: int = field(default=0, metadata={"help": "Seed of the sampling."})

    def __post_init__(self) -> None:
        if (self.base is None) != (self.proxy is None):
            raise ValueError(f"Pass --base and --proxy together, got {self.base!r} and {self.proxy!r}.")
        if self.problems < 1:
            raise ValueError(f"--problems must be at least 1, got {self.problems}.")
        try:
            self.rule_parameters = parse_json_object(self.parameters)
        except ValueError as error:
            raise ValueError(
                f"--parameters must be JSON such as '{{\"threshold\": 0.5}}', got {self.parameters!r:.200}: {error}."
            ) from error
        make_rule(self.rule, **self.rule_parameters)


def paint(trace: KADTrace, tokenizer: PreTrainedTokenizerBase, colour: bool) -> str:
    """The text of a trace. A token is blue if it is due to the base, and yellow if it is due to the proxy."""
    ids, text, painted = [], "", ""
    for record in trace:
        ids.append(record.token_id)
        longer = tokenizer.decode(ids, skip_special_tokens=True)
        if longer.endswith("\ufffd"):  # the next token completes the character
            continue
        piece, text = longer[len(text) :], longer
        if not colour or record.proxy_share is None:
            painted += piece
        else:
            code = 34 if record.proxy_share < 1 / 3 else 33 if record.proxy_share > 2 / 3 else 35
            painted += f"\033[{code}m{piece}\033[0m"
    return painted


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    method: str
    correct: int
    lenient: int
    problems: int
    tokens: int
    seconds: float
    deferral_mass: float | None = None
    acceptance_rate: float | None = None
    tokens_per_round: float | None = None

    HEADER = "| method | accuracy | 95 % interval | lenient | tokens/s | deferral mass | acceptance | tokens/round |"

    def __str__(self) -> str:
        low, high = wilson_interval(self.correct, self.problems)
        cells = [
            self.method,
            f"{self.correct / self.problems:.3f}",
            f"{low:.3f} to {high:.3f}",
            f"{self.lenient / self.problems:.3f}",
            f"{self.tokens / self.seconds:.0f}",
            *(
                "–" if value is None else f"{value:.2f}"
                for value in (self.deferral_mass, self.acceptance_rate, self.tokens_per_round)
            ),
        ]
        return f"| {' | '.join(cells)} |"


class Session:
    """The models of a run, and their answers."""

    def __init__(self, arguments: QuickstartArguments, base_path: str, proxy_path: str) -> None:
        self.arguments = arguments
        self.tokenizer = load_tokenizer(base_path)
        self.base = self._load(base_path)
        self.proxy = self._load(proxy_path)
        self.below_proxy = below_adapter(proxy_path)
        self.proxy_tokenizer = load_tokenizer(proxy_path)
        self.settings = {
            "max_new_tokens": arguments.max_new_tokens,
            "eos_token_id": eos_token_ids(self.base, self.proxy) or None,
            "pad_token_id": pad_token_id(self.tokenizer),
        }

    def _load(self, path: str) -> PreTrainedModel:
        return load_model(path, device=self.arguments.device, dtype=self.arguments.dtype)

    def processor(self, rule: str, parameters: dict[str, Any], trace: bool = False) -> KADLogitsProcessor:
        """A processor over this session's proxy."""
        needed = RULES[rule].needs_reference and self.below_proxy is not None
        return KADLogitsProcessor(
            self.proxy,
            rule,
            reference=self._load(self.below_proxy) if needed else None,
            num_assistant_tokens=self.arguments.num_assistant_tokens,
            trace=trace,
            tokenizer=self.tokenizer,
            proxy_tokenizer=self.proxy_tokenizer,
            **parameters,
        )

    def answers(self, model: PreTrainedModel, questions: list[str], **settings: Any) -> list[list[int]]:
        """The ids that a model generates for each question, up to the end of its turn."""
        inputs = encode(self.tokenizer, questions, self.arguments.device, model=model)
        ids = model.generate(**inputs, **{**self.settings, **PLAIN_SAMPLING, **settings})
        ends = set(self.settings["eos_token_id"] or ())
        rows = ids[:, inputs["input_ids"].shape[1] :].tolist()
        return [row[: next((at + 1 for at, token in enumerate(row) if token in ends), len(row))] for row in rows]

    def answer(self, model: PreTrainedModel, question: str, **settings: Any) -> list[int]:
        """The ids that a model generates for one question."""
        return self.answers(model, [question], **settings)[0]


def show_answers(session: Session, question: str) -> None:
    """Print the answers of the base, the proxy and KAD to one question."""
    arguments = session.arguments
    kad = session.processor(arguments.rule, arguments.rule_parameters, trace=True)
    kad_settings = {"logits_processor": [kad], "assistant_model": kad.proxy}
    colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    print(f"Prompt: {question}\n")
    for name, model, settings in (
        ("base", session.base, {}),
        ("proxy", session.proxy, {}),
        ("KAD", session.base, kad_settings),
    ):
        set_seed(arguments.seed)
        started = time.perf_counter()
        ids = session.answer(model, question, **settings)
        seconds = time.perf_counter() - started
        text = session.tokenizer.decode(ids, skip_special_tokens=True)
        if name == "KAD":
            text = paint(kad.trace or KADTrace(), session.tokenizer, colour)
        print(f"{name:>5}: {text!s}   [{len(ids)} tokens, {len(ids) / seconds:.0f} tokens/s]")
    if colour:
        print("       \033[34mdue to the base\033[0m, \033[35mto both\033[0m, \033[33mto the proxy\033[0m")
    statistics = kad.statistics
    if statistics is not None and statistics.acceptance_rate is not None:
        print(
            f"       {kad.rule}: acceptance {statistics.acceptance_rate:.2f}, "
            f"{statistics.tokens_per_round:.1f} tokens per round"
        )


def measure(
    session: Session,
    method: str,
    problems: list[Any],
    score: Callable[[str, Any], bool],
    lenient: Callable[[str, Any], bool],
    kad: KADLogitsProcessor | None = None,
    **settings: Any,
) -> Row:
    """Sample an answer to every problem, one after the other, and score it."""
    model = session.proxy if method == "proxy alone" else session.base
    set_seed(session.arguments.seed)
    correct = right = tokens = 0
    seconds, calls = 0.0, list[KADStatistics]()
    progress = tqdm(problems, desc=f"{method:<22}", unit="problem", leave=False, disable=None)
    for problem in progress:
        started = time.perf_counter()
        ids = session.answer(model, problem.question, **settings)
        seconds += time.perf_counter() - started
        text = session.tokenizer.decode(ids)
        correct += score(text, problem)
        right += lenient(text, problem)
        tokens += len(ids)
        if kad is not None and kad.statistics is not None:
            calls.append(kad.statistics)
        progress.set_postfix(correct=correct)
    total = add_up(
        calls,
        base_forwards=sum(call.base_forwards for call in calls),
        proxy_forwards=sum(call.proxy_forwards for call in calls),
    )
    return Row(
        method,
        correct,
        right,
        len(problems),
        tokens,
        seconds,
        deferral_mass=total.deferral_mass,
        acceptance_rate=total.acceptance_rate,
        tokens_per_round=total.tokens_per_round,
    )


def tables(
    session: Session, problems: list[Any], scorers: tuple[Callable[..., bool], Callable[..., bool]]
) -> Iterable[Row]:
    """The rows of all methods on the same problems: base, proxy and rules, sampled at temperature 1."""
    yield measure(session, "base alone", problems, *scorers)
    yield measure(session, "proxy alone", problems, *scorers)
    for method, (rule, parameters) in TINY_PAIR_RULES.items():
        kad = session.processor(rule, parameters)
        settings = {"logits_processor": [kad], "assistant_model": kad.proxy}
        label = f"{method} {next(iter(parameters.values()))}"
        yield measure(session, label, problems, *scorers, kad=kad, **settings)


def count_equal_texts(session: Session, problems: list[Any]) -> int:
    """The number of problems on which greedy decoding gives the same text speculatively and token by token."""
    kad = session.processor(*TINY_PAIR_RULES["KAD dual"])
    settings = {"logits_processor": [kad], "do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    questions = [problem.question for problem in problems]
    one_by_one = session.answers(session.base, questions, **settings)
    equal = 0
    progress = tqdm(questions, desc="greedy, both ways", unit="problem", leave=False, disable=None)
    for question, expected in zip(progress, one_by_one, strict=True):
        equal += session.answer(session.base, question, assistant_model=kad.proxy, **settings) == expected
    return equal


def run_tiny_pair(arguments: QuickstartArguments) -> None:
    """Run the quickstart with the tiny pair."""
    pair = arguments.pair
    if not (pair / "base").is_dir():
        sys.exit(
            f"error: no tiny pair in {str(pair)!r}. Pass its folder with --pair, or a pair of your own with --base "
            "and --proxy."
        )
    torch.set_num_threads(1)  # more threads are slower for models this small
    if arguments.rule == "dual" and not arguments.rule_parameters:
        arguments.rule_parameters = dict(TINY_PAIR_RULES["KAD dual"][1])
    session = Session(arguments, str(pair / "base"), str(pair / "proxy"))
    problems = make_problems("test", arguments.problems)
    show_answers(session, arguments.prompt or problems[0].question)

    print(f"\n{len(problems)} held-out problems, sampled at temperature 1")
    print(f"(rules: speculative, {arguments.num_assistant_tokens} draft tokens, one problem at a time)\n")
    print(Row.HEADER)
    print("|---|" + "---:|" * 7)
    for row in tables(session, problems, (is_correct, is_correct_lenient)):
        print(row, flush=True)
    print(
        "\naccuracy: the right number in the right form, followed by the end of sequence.\n"
        "lenient: the right number after the last '='.\n"
        "tokens/s: the speed of models this small is limited by Python, so it says nothing about larger models."
    )
    equal = count_equal_texts(session, problems)
    dtype = str(session.base.dtype).removeprefix("torch.")
    print(f"\nSpeculative = token by token ({dtype}, greedy): identical text on {equal} of {len(problems)} problems.")


def main(argv: list[str] | None = None) -> None:
    """Parse the command line and run."""
    (arguments,) = parse_arguments([QuickstartArguments], __doc__, argv)
    silence_libraries()
    try:
        if arguments.base is None:
            run_tiny_pair(arguments)
        else:
            session = Session(arguments, arguments.base, arguments.proxy)
            show_answers(session, arguments.prompt or "Why is the sky blue?")
    except (OSError, TypeError, ValueError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
