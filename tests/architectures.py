"""Every causal language model family of transformers as base and as proxy: which texts are right, and a page of it.

    python tests/architectures.py --write docs/architectures.md

Each family is a tiny random model (tiny_families.py) in float32. As a base it has a small Llama as its proxy, as a
proxy it serves a small Llama. Greedy texts of KAD are compared with a computation that knows no cache: at each step
both models read the whole text, one row, without padding. A text is compared only if no token of it is a close call,
so that rounding can't decide, and if it has both tokens that a draft has and others; other prompts are replaced.
"""

import inspect
import multiprocessing
import re
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from traceback import extract_tb
from typing import Any

import reference
import torch
from tiny_families import NOT_SURVEYED, VOCABULARY, has_windows, tiny_family
from transformers import LogitsProcessor, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from versions import TRANSFORMERS, pins

import transformers_kad
from transformers_kad import DualDeferral, KADLogitsProcessor
from transformers_kad.recipes.command_line import parse_arguments

PAGE = Path(__file__).resolve().parents[1] / "docs" / "architectures.md"
THRESHOLD = 0.5
NEW_TOKENS = 16
PROMPT_LENGTHS = (11, 7, 9)
CLOSE_CALL = 1e-3  # of probabilities
RARE = 2  # tokens of a text
TRIES = 60  # prompts
PAD = 0
BEAMS = {"num_beams": 3, "num_return_sequences": 3, "max_new_tokens": 12}

# Other versions of transformers have other families, and own texts that differ in other places.
IS_VERSION_OF_PAGE = TRANSFORMERS.release[:2] == pins("constraints.txt")["transformers"].release[:2]

OWN_CHECKS = ("alone", "batch", "beams")
EQUAL, DIFFERS, OWN_DIFFER = "equal", "differs", "own texts differ"
CHECKS = ("token by token", "speculative", "batch", "speculative batch", "beams", "chat", "speculative chat")
ROLES = ("base", "proxy")
Verdicts = dict[str, dict[str, str]]  # "own", "base" and "proxy", of each check


@dataclass(frozen=True)
class Entry:
    """A family, or a variant of one."""

    name: str
    family: str
    window: int = 8
    changes: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def build(self) -> PreTrainedModel:
        return tiny_family(self.family, window=self.window, **self.changes)


LONGROPE = {
    "rope_parameters": {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "short_factor": [1.0] * 4,
        "long_factor": [4.0] * 4,
        "original_max_position_embeddings": 16,
    },
    "original_max_position_embeddings": 16,
}
VARIANTS = (Entry("phi3 (longrope)", "phi3", 64, LONGROPE),)


def entries() -> tuple[Entry, ...]:
    """All families that can be built, those with windows twice, and the variants."""
    found = []
    for family in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        if family in NOT_SURVEYED:
            continue
        found.append(Entry(family, family))
        if has_windows(family):
            found.append(Entry(f"{family} (window 64)", family, 64))
    return (*found, *VARIANTS)


# --- The computation without a cache --------------------------------------------------------------------------


@torch.no_grad()
def next_probs(model: PreTrainedModel, text: Sequence[int]) -> list[float]:
    """The probabilities of the token after a text, by one forward over all of it."""
    ids = torch.tensor([text])
    mask = torch.ones_like(ids)
    # `generate` counts positions from 0, also where a family's own default begins elsewhere.
    inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": mask.cumsum(-1) - 1, "use_cache": False}
    accepted = inspect.signature(model.forward).parameters
    logits = model(**{name: value for name, value in inputs.items() if name in accepted}).logits
    return logits[0, -1].double().softmax(-1).tolist()


# The next token of a text, and whether a greedy draft would have had it; None where rounding could change the token.
Choice = Callable[[list[int]], tuple[int, bool] | None]


def likeliest(probs: Sequence[float]) -> int | None:
    """The likeliest token; None where another one is nearly as likely."""
    second, first = sorted(range(len(probs)), key=probs.__getitem__)[-2:]
    return None if probs[first] - probs[second] < CLOSE_CALL else first


def kad_target(p: Sequence[float], q: Sequence[float], threshold: float = THRESHOLD) -> list[float]:
    """KAD's target by the dual rule."""
    return reference.target("dual", {"threshold": threshold}, p, q)


def kad_choice(base: PreTrainedModel, proxy: PreTrainedModel) -> Choice:
    """KAD's greedy choice with the dual rule."""

    def choice(text: list[int]) -> tuple[int, bool] | None:
        p, q = next_probs(base, text), next_probs(proxy, text)
        thresholds = (THRESHOLD - CLOSE_CALL, THRESHOLD, THRESHOLD + CLOSE_CALL)
        tokens = {likeliest(kad_target(p, q, bound)) for bound in thresholds}
        token, draft = tokens.pop(), likeliest(q)
        return None if tokens or token is None or draft is None else (token, token == draft)

    return choice


def own_choice(model: PreTrainedModel) -> Choice:
    """A model's own greedy choice; it is its own draft."""

    def choice(text: list[int]) -> tuple[int, bool] | None:
        token = likeliest(next_probs(model, text))
        return None if token is None else (token, True)

    return choice


def continued(prompt: Sequence[int], choice: Choice, mixed: bool) -> list[int] | None:
    """A prompt and its greedy continuation; None where one of its tokens is a close call.

    Args:
        prompt: the prompt's tokens.
        choice: of the next token.
        mixed: None also where fewer than `RARE` tokens are those of a draft, or fewer than `RARE` are not.
    """
    text, drafted = list(prompt), 0
    for _ in range(NEW_TOKENS):
        step = choice(text)
        if step is None:
            return None
        text.append(step[0])
        drafted += step[1]
    return None if mixed and not RARE <= drafted <= NEW_TOKENS - RARE else text


def references(choice: Choice, *, mixed: bool = False) -> list[list[int]]:
    """Texts with prompts of the three lengths; see `continued`.

    Raises:
        RuntimeError: none of the prompts that were tried has such a text.
    """
    generator = torch.Generator().manual_seed(1)
    found = []
    for length in PROMPT_LENGTHS:
        prompts = (torch.randint(3, VOCABULARY, (length,), generator=generator).tolist() for _ in range(TRIES))
        texts = (continued(prompt, choice, mixed) for prompt in prompts)
        text = next((text for text in texts if text is not None), None)
        if text is None:
            raise RuntimeError(f"Each of {TRIES} texts has a close call, or drafts that are always right or wrong.")
        found.append(text)
    return found


# --- Verdicts -------------------------------------------------------------------------------------------------


def padded(prompts: Sequence[Sequence[int]]) -> dict[str, torch.Tensor]:
    """Prompts as a batch that is padded on the left."""
    width = max(map(len, prompts))
    ids = torch.tensor([[PAD] * (width - len(prompt)) + list(prompt) for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    return {"input_ids": ids, "attention_mask": mask}


def generated(model: PreTrainedModel, prompts: Sequence[Sequence[int]], **arguments: Any) -> list[list[int]]:
    """Prompts with what `generate` adds to them, without padding."""
    settings = {"do_sample": False, "max_new_tokens": NEW_TOKENS, **arguments}
    rows = model.generate(**padded(prompts), **settings).tolist()
    width = max(map(len, prompts))
    returned = len(rows) // len(prompts)
    return [row[width - len(prompts[i // returned]) :] for i, row in enumerate(rows)]


class WithoutCache(LogitsProcessor):
    """KAD's dual rule for texts without padding, where the proxy reads each whole text."""

    def __init__(self, proxy: PreTrainedModel) -> None:
        self.proxy = proxy

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        pairs = zip(scores.double().softmax(-1).tolist(), input_ids.tolist(), strict=True)
        targets = [kad_target(p, next_probs(self.proxy, text)) for p, text in pairs]
        return torch.tensor(targets, dtype=torch.float64).log().float()


PACKAGE = str(Path(transformers_kad.__file__).parent)


def verdict_of(check: Callable[[], bool]) -> str:
    """What comes of a check: equal, differs, refused by the library with its reason, or another error."""
    try:
        return EQUAL if check() else DIFFERS
    except Exception as error:  # anything that a model may raise is a verdict
        frame = extract_tb(error.__traceback__)[-1]
        is_refusal = isinstance(error, ValueError | TypeError | NotImplementedError)
        if is_refusal and frame.filename.startswith(PACKAGE) and (frame.line or "").startswith("raise"):
            return f"refused: {reason(str(error))}"
        return f"error: {type(error).__name__}"


def reason(message: str) -> str:
    """The first sentence of a message, without the values that it echoes."""
    first = re.split(r"\. |, got |: |; ", message.strip())[0].rstrip(".")
    first = re.sub(
        r"\b\w+(ForCausalLM|LMHeadModel|ForConditionalGeneration|Decoder|WithLMHead)( \(unnamed\))?", "M", first
    )
    return re.sub(r" \(got \w+\)$", "", re.sub(r"\b\d+\b", "N", first))


def own_verdicts(model: PreTrainedModel) -> dict[str, str]:
    """Whether transformers agrees with itself: with a cache and without one, in a padded batch and alone."""
    texts = references(own_choice(model))
    prompts = [text[:length] for text, length in zip(texts, PROMPT_LENGTHS, strict=True)]
    return {
        "alone": verdict_of(lambda: [generated(model, [prompt])[0] for prompt in prompts] == texts),
        "batch": verdict_of(lambda: generated(model, prompts) == texts),
        "beams": verdict_of(
            lambda: generated(model, prompts[:1], **BEAMS) == generated(model, prompts[:1], use_cache=False, **BEAMS)
        ),
    }


def judged(verdicts: Mapping[str, str], own: Mapping[str, str]) -> dict[str, str]:
    """The verdicts of a pair, where nothing is said of texts on which transformers disagrees with itself."""
    result = {}
    for check, verdict in verdicts.items():
        needed = {"alone", "beams"} if check == "beams" else {"alone", "batch"} if "batch" in check else {"alone"}
        is_wrong = verdict == DIFFERS or verdict.startswith("error")
        result[check] = OWN_DIFFER if is_wrong and any(own[name] != EQUAL for name in needed) else verdict
    return result


def wrong_in(verdicts: Mapping[str, str]) -> dict[str, str]:
    """The verdicts that are faults of the library: texts that differ, and errors."""
    return {
        check: verdict
        for check, verdict in verdicts.items()
        if verdict not in (EQUAL, OWN_DIFFER) and not verdict.startswith("refused: ")
    }


def answers(texts: Sequence[list[int]]) -> list[list[int]]:
    """What comes after the prompts of texts."""
    return [text[length:] for text, length in zip(texts, PROMPT_LENGTHS, strict=True)]


def until(end: int, answer: list[int]) -> list[int]:
    """An answer as it is where a token ends it, without what comes behind."""
    return answer[: answer.index(end) + 1] if end in answer else answer


def pair_verdicts(base: PreTrainedModel, proxy: PreTrainedModel) -> dict[str, str]:
    """The verdict of each check on a pair."""
    texts = references(kad_choice(base, proxy), mixed=True)
    prompts = [text[:length] for text, length in zip(texts, PROMPT_LENGTHS, strict=True)]

    def run(rows: Sequence[Sequence[int]], draft: int | str | None = None, **arguments: Any) -> list[list[int]]:
        settings = {} if draft is None else {"num_assistant_tokens": draft}
        kad = KADLogitsProcessor(proxy, DualDeferral(THRESHOLD), **settings)
        if draft is not None:
            arguments["assistant_model"] = proxy
        return generated(base, rows, logits_processor=[kad], **arguments)

    def chat_goes_on(draft: int | None) -> bool:
        kad = KADLogitsProcessor(proxy, DualDeferral(THRESHOLD))
        arguments = {"logits_processor": [kad], "max_new_tokens": NEW_TOKENS // 2}
        if draft is not None:
            arguments |= {"assistant_model": proxy}
        text = texts[0][: len(prompts[0]) + NEW_TOKENS // 2]
        return (
            generated(base, prompts[:1], **arguments) == [text] and generated(base, [text], **arguments) == texts[:1]
        )

    def drafted_alone() -> bool:
        return [run([prompt], 5)[0] for prompt in prompts] == texts and run(prompts[:1], "auto") == texts[:1]

    def rows_end(draft: int | None) -> bool:
        end = answers(texts)[1][NEW_TOKENS // 3]  # ends the second row early
        rows = run(prompts, draft, eos_token_id=end)
        return [until(end, row) for row in answers(rows)] == [until(end, row) for row in answers(texts)]

    def drafted_together() -> bool:
        return run(prompts, 5) == texts and run(prompts, "auto") == texts and rows_end(5)

    def beams_agree() -> bool:
        plain = {"logits_processor": [WithoutCache(proxy)], "use_cache": False}
        return run(prompts[:1], **BEAMS) == generated(base, prompts[:1], **plain, **BEAMS)

    return {
        "token by token": verdict_of(lambda: [run([prompt])[0] for prompt in prompts] == texts),
        "speculative": verdict_of(drafted_alone),
        "batch": verdict_of(lambda: run(prompts) == texts and rows_end(None)),
        "speculative batch": verdict_of(drafted_together),
        "beams": verdict_of(beams_agree),
        "chat": verdict_of(lambda: chat_goes_on(None)),
        "speculative chat": verdict_of(lambda: chat_goes_on(5)),
    }


def verdicts_as(role: str, model: PreTrainedModel, own: Mapping[str, str]) -> dict[str, str]:
    """The verdicts on a model as "base" or as "proxy", beside a small Llama."""
    llama = tiny_family("llama", seed=1)
    return judged(pair_verdicts(*((model, llama) if role == "base" else (llama, model))), own)


def survey(entry: Entry) -> Verdicts:
    """All verdicts on an entry."""
    model = entry.build()
    own = own_verdicts(model)
    return {"own": own} | {role: verdicts_as(role, model, own) for role in ROLES}


# --- The page -------------------------------------------------------------------------------------------------

INTRODUCTION = f"""\
# Model families

Every causal language model family of transformers, as the base and as the proxy of a pair, by one command:

```bash
python tests/architectures.py --write docs/architectures.md
```

Each is a tiny random model in float32. As a base it has a small Llama as its proxy; as a proxy it serves a small
Llama. Greedy texts of `DualDeferral({THRESHOLD})`, {NEW_TOKENS} tokens after prompts of
{", ".join(map(str, PROMPT_LENGTHS))} tokens, are compared token by token with a computation that knows no cache: at
each step both models read the whole text. Windows and chunks are 8 tokens long, so that every text outgrows them; the
rows of "window 64" are the same families with windows that every text fits into.

- **token by token**, **speculative**: one prompt at a time; drafts of 5 tokens, and `num_assistant_tokens="auto"`
- **batch**, **speculative batch**: the three prompts as one batch that is padded on the left; and once more where a
  token ends one of the rows early
- **beams**: three beams, against three beams without any cache
- **chat**, **speculative chat**: a second call continues the text of the first with the same processor

"equal" means that every token is right, "differs" that one is not. "refused" is an error that the library raises
itself, for the reason that is given below the table. "own texts differ" means that nothing can be expected:
transformers alone, without KAD, generates another text with its cache than without it, or in a padded batch than one
row at a time, or fails.
"""


def page(verdicts: Mapping[str, Verdicts]) -> str:
    """All verdicts, by the name of an entry, as a page of Markdown."""
    reasons: dict[str, int] = {}

    def cell(verdict: str) -> str:
        kind, _, why = verdict.partition(": ")
        return f"refused ({reasons.setdefault(why, len(reasons) + 1)})" if kind == "refused" else verdict

    def all_equal(part: Mapping[str, str]) -> bool:
        return all(verdict == EQUAL for verdict in part.values())

    right = [name for name, found in verdicts.items() if all(map(all_equal, found.values()))]
    others = {name: found for name, found in verdicts.items() if name not in right}
    rows = [
        [name, role, *(cell(found[role][check]) for check in CHECKS)]
        for name, found in others.items()
        for role in ROLES
        if not all_equal(found[role])
    ]
    own = [
        [name, *(found["own"][check] for check in OWN_CHECKS)]
        for name, found in others.items()
        if not all_equal(found["own"])
    ]
    parts = [
        INTRODUCTION,
        f"## Counts\n\nOf {len(verdicts)} rows:\n\n{counts(verdicts)}",
        f"## Equal everywhere\n\n{len(right)}: {', '.join(right)}.",
        "## Others\n\nA role that is not listed is equal everywhere.\n\n" + table(["family", "role", *CHECKS], rows),
        "Reasons of refusals:\n\n" + ("\n".join(f"{number}. {why}" for why, number in reasons.items()) or "None."),
        "## Where transformers disagrees with itself\n\nWithout KAD: with a cache against without, a "
        "padded batch against single rows, and beams with a cache against without.\n\n"
        + table(["family", *OWN_CHECKS], own),
        "## Not surveyed\n\n" + "\n".join(f"- {name}: {why}" for name, why in NOT_SURVEYED.items()),
    ]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def counts(verdicts: Mapping[str, Verdicts]) -> str:
    """How often each verdict was found, as a table."""
    kinds = (EQUAL, "refused", OWN_DIFFER, DIFFERS, "error")
    rows = []
    for role in ROLES:
        for check in CHECKS:
            found = Counter(verdict[role][check].partition(": ")[0] for verdict in verdicts.values())
            rows.append([role, check, *(str(found[kind]) for kind in kinds)])
    return table(["role", "check", *kinds], rows)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def read_page(text: str) -> dict[str, Verdicts]:
    """The verdicts of a page that `page` wrote."""
    sections = dict(re.findall(r"^## (.+)\n\n((?:.|\n(?!## ))*)", text, re.MULTILINE))
    reasons = dict(re.findall(r"^(\d+)\. (.+)$", sections["Others"], re.MULTILINE))

    def verdict(cell: str) -> str:
        number = re.fullmatch(r"refused \((\d+)\)", cell)
        return f"refused: {reasons[number[1]]}" if number else cell

    def rows_of(section: str) -> list[list[str]]:
        lines = [line.strip("| ").split(" | ") for line in sections[section].splitlines() if line.startswith("| ")]
        return lines[2:]

    right = sections["Equal everywhere"].partition(": ")[2].strip().rstrip(".").split(", ")
    changed = {(name, role): list(map(verdict, cells)) for name, role, *cells in rows_of("Others")}
    own = {name: cells for name, *cells in rows_of("Where transformers disagrees with itself")}
    names = {*right, *own, *(name for name, _ in changed)}

    def found(name: str, role: str, checks: Sequence[str]) -> dict[str, str]:
        cells = own.get(name) if role == "own" else changed.get((name, role))
        return dict(zip(checks, cells or [EQUAL] * len(checks), strict=True))

    return {
        entry.name: {"own": found(entry.name, "own", OWN_CHECKS)}
        | {role: found(entry.name, role, CHECKS) for role in ROLES}
        for entry in entries()
        if entry.name in names
    }


def _surveyed(entry: Entry) -> tuple[str, Verdicts]:
    torch.set_num_threads(1)
    return entry.name, survey(entry)


@dataclass
class SurveyArguments:
    """What is surveyed, and where the page goes."""

    write: str | None = field(default=None, metadata={"help": "Survey every family, and write the page to this file."})
    families: list[str] | None = field(
        default=None, metadata={"help": "Survey only these, and print what is found of them."}
    )
    processes: int = field(default=2, metadata={"help": "Processes that share the work, with one thread each."})

    def __post_init__(self) -> None:
        if (self.write is None) == (self.families is None):
            raise ValueError("Pass either --write or --families.")


def main(argv: Sequence[str] | None = None) -> int:
    """Write the page, or print what is found of some families."""
    (settings,) = parse_arguments([SurveyArguments], __doc__, argv)
    chosen = [entry for entry in entries() if settings.families is None or entry.family in settings.families]
    verdicts = {}
    with multiprocessing.get_context("spawn").Pool(settings.processes) as pool:
        for name, found in pool.imap(_surveyed, chosen):
            verdicts[name] = found
            if settings.families is not None:
                print(name, *(f"  {part}: {checks}" for part, checks in found.items()), sep="\n", flush=True)
    if settings.write is not None:
        Path(settings.write).write_text(page(verdicts), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
