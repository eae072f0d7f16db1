"""The part of the fuzz that runs in CI: so many sessions for each kind of cache, and what they must have covered."""

from fuzz import fuzz
from fuzz_checks import Account
from fuzz_parts import CRITERIA, PROCESSORS
from fuzz_sessions import CHANGES_OF_SCORES, ENDS, RULES, WARPERS, WAYS_TO_RUN

EXAMPLES = 1_000
MOST_REFUSED = 0.05
MOST_UNDECIDED = 0.005


def check_kind(kind: str, number: int = 0) -> None:
    """Sessions of a kind, always the same. What is refused, and what rounding decides, are bounded shares."""
    account = fuzz(kind, EXAMPLES, number)
    counts = account.counts
    assert counts["sessions: all"] >= EXAMPLES
    assert counts["calls_refused: all"] <= MOST_REFUSED * counts["calls: all"]
    assert counts["positions: undecided"] <= MOST_UNDECIDED * counts["positions: compared"]
    assert counts["positions: compared"] >= 5 * EXAMPLES
    missing = sorted(missing_of(account))
    assert not missing, f"never drawn: {missing}"


def missing_of(account: Account) -> set[str]:
    """What the sessions of every kind should have drawn, and have not."""
    wanted = {
        "rule": RULES,
        "path": ("drafts", "loop", "attached", "argument", "tokens"),
        "setting": (*WARPERS, *CHANGES_OF_SCORES, *ENDS, *WAYS_TO_RUN, "output_scores"),
        "before": PROCESSORS,
        "after": PROCESSORS,
        "criteria": CRITERIA,
        "drafter": ("proxy", "prompt_lookup"),
        "num_assistant_tokens": (*range(1, 9), "auto"),
        "verification": ("token", "block"),
        "change": ("weights", "load", "reset", "adapter"),
        "again": ("same", "fresh"),
        "beams": (2, 3),
        "cache": ("new", "held"),
        "rows": (1, 2, 3),
        "returned": (1, 2),
    }
    wanted |= dict.fromkeys(
        (
            "lazy",
            "trace",
            "adapted",
            "do_sample",
            "proxy_prompt",
            "continues",
            "as_config",
        ),
        (True,),
    )
    names = {f"{dimension}: {value}" for dimension, values in wanted.items() for value in values}
    return {name for name in names if not account.counts[name]}
