"""Calls over two processes that share models: in step, and with the texts of one process. See `parallel_calls.py`.

Samples are compared with the law of short texts by chi-square, as in `test_distribution.py`. With correct code a
p-value below THRESHOLD is found with a probability of at most FALSE_ALARM over the choice of the seed, which is fixed.
"""

import json
import os
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import exact_law
import parallel_calls
import pytest
from parallel_calls import LAW, PATHS, PROMPT, Models, models_of_law
from run_command import run_command

FALSE_ALARM = 1e-6
P_VALUES = 2
THRESHOLD = FALSE_ALARM / P_VALUES

DIFFERENT = "RuntimeError: Rank 1 of the processes that share a model has decided otherwise"


def launch(kind: str, folder: Path) -> list[dict[str, Any]]:
    """What two processes saw in the calls of a kind."""
    Models(folder).save()
    command = ["--nproc_per_node", "2", "--rdzv_backend", "c10d", "--rdzv_endpoint", "127.0.0.1:0"]  # any free port
    command += [parallel_calls.__file__, str(folder), kind]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    run = run_command([sys.executable, "-m", "torch.distributed.run", *command], env=environment)
    assert run.returncode == 0, run.stderr[-4000:]
    seen = [json.loads((folder / f"{kind}_{rank}.json").read_text()) for rank in (0, 1)]
    assert [of_rank["world_size"] for of_rank in seen] == [2, 2]
    return seen


@pytest.fixture(scope="module")
def tensor_parallel(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return launch("tensor_parallel", tmp_path_factory.mktemp("tensor_parallel"))


@pytest.fixture(scope="module")
def fully_sharded(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return launch("fully_sharded", tmp_path_factory.mktemp("fully_sharded"))


@pytest.mark.slow
def test_ranks_with_different_seeds_return_the_texts_of_one_process_with_the_first_seed(tensor_parallel):
    first, other = (seen["texts"] for seen in tensor_parallel)
    assert len(first) == 4 * len(PATHS) - 2  # lazy only samples
    of_one_process = set()
    for case, texts in first.items():
        sharded = {name: tokens for name, tokens in texts.items() if name != "one process"}
        assert sharded == other[case], case
        if "one process" in texts:
            assert all(tokens == texts["one process"] for tokens in sharded.values()), case
            of_one_process.add(str(texts["one process"]))
    assert len(of_one_process) > 10  # texts of many kinds


@pytest.mark.slow
def test_all_ways_of_sharding_were_run(tensor_parallel):
    shardings = Counter(name for texts in tensor_parallel[0]["texts"].values() for name in texts)
    cases = 4 * len(PATHS) - 2
    assert shardings["base"] == cases
    assert shardings["one process"] == cases - 4  # not those whose draft lengths depend on times
    assert (shardings["base and proxy"], shardings["proxy"]) == (len(PATHS), 3)


@pytest.mark.slow
def test_a_round_costs_one_collective_operation_beside_those_of_the_models(tensor_parallel):
    """Token by token it is one a forward of the base, and a call has one more at its beginning and its end."""
    for seen in tensor_parallel:
        for case, (counts, base_forwards) in seen["collectives"].items():
            assert counts == {"all_gather": base_forwards + 2, "broadcast": 1}, case


@pytest.mark.slow
def test_random_states_are_given_back_and_that_of_the_first_rank_goes_on(tensor_parallel):
    first, other = (seen["random state"] for seen in tensor_parallel)
    assert other["after"] == other["untouched"]
    assert first["after"] == first["after one process"] != first["untouched"]


@pytest.mark.slow
def test_the_streamer_of_the_first_rank_gets_the_text_and_nobody_waits_for_the_others(tensor_parallel):
    first, other = (seen["streamer"] for seen in tensor_parallel)
    for path, texts in first["texts"].items():
        assert first["seen"][path] == [*PROMPT, *texts[0]]
        assert other["seen"][path] == []
        assert first["ended"][path] and other["ended"][path]
    assert first["iterated"].split() and other["iterated"] == ""


@pytest.mark.slow
def test_an_error_of_one_rank_is_an_error_of_all_and_the_next_call_is_right(tensor_parallel):
    first, other = (seen["errors"] for seen in tensor_parallel)
    told = "RuntimeError: The call ended with an error on rank {} of the processes that share a model"
    refused = "ValueError: `max_time=60.0` is not available where processes share a model"
    expected = {
        "a processor of rank 1": (told.format(1), "ArithmeticError: of a processor"),
        "the streamer of rank 0": ("BrokenPipeError: of a streamer", told.format(0)),
        "a refusal on rank 1": (told.format(1), 'ValueError: `cache_implementation="paged"`'),
        "an argument that rank 1 has wrong": (DIFFERENT, DIFFERENT),
        "an end that rank 1 has earlier": (DIFFERENT, DIFFERENT),
        "a limit that rank 1 has earlier": (DIFFERENT, DIFFERENT),
        "another prompt on rank 1": (DIFFERENT, DIFFERENT),
        "a time limit": (refused, refused),
        "a time limit as a criterion": (refused, refused),
    }
    assert first.keys() == other.keys() and len(first) == 3
    for calls in first:
        for name, (of_first, of_other) in expected.items():
            (message, next_is_right), (other_message, other_next_is_right) = first[calls][name], other[calls][name]
            assert message.startswith(of_first) and other_message.startswith(of_other), (calls, name)
            assert next_is_right and other_next_is_right, (calls, name)


@pytest.mark.slow
def test_without_shared_random_states_the_ranks_do_not_agree(tensor_parallel):
    """The planted bug: each rank draws by a seed of its own. No text is returned then."""
    for seen in tensor_parallel:
        for errors in seen["errors"].values():
            assert errors["random states that are not shared"][0].startswith(DIFFERENT)


@pytest.mark.slow
@pytest.mark.parametrize("path", ["token by token", "block verification"])
def test_sampled_texts_have_the_law_of_one_process(tensor_parallel, path):
    base, proxy = models_of_law()
    prompt, length, vocabulary = LAW["prompt"], LAW["length"], LAW["vocabulary"]
    p, q = (exact_law.prefix_logits(model, prompt, length, vocabulary) for model in (base, proxy))
    rule = exact_law.dual(0.4)

    def step(prefix: exact_law.Text) -> Any:
        return rule(exact_law.softmax(p[prefix]), exact_law.softmax(q[prefix]), None)

    law = exact_law.law_of_texts(step, length)
    texts, of_other = ([tuple(text) for text in seen["law"][path]] for seen in tensor_parallel)
    assert texts == of_other and len(texts) == LAW["samples"]
    assert exact_law.chi_square_p_value(texts, law) >= THRESHOLD
    of_base = exact_law.law_of_texts(lambda prefix: exact_law.softmax(p[prefix]), length)
    assert exact_law.chi_square_p_value(texts, of_base) < THRESHOLD  # so many samples tell the two apart


@pytest.mark.slow
def test_processes_with_texts_of_their_own_return_what_one_process_returns(fully_sharded):
    """FSDP: rank 0 has one text and is done long before rank 1, which has three."""
    rounds = []
    for seen in fully_sharded:
        assert len(seen["texts"]) == 2 * len(PATHS) - 3 + 4
        for case, texts in seen["texts"].items():
            assert texts["base"] == texts["one process"], case
        rounds.append({case: texts.get("base_forwards") for case, texts in seen["texts"].items()})
    differing = [case for case in rounds[0] if rounds[0][case] != rounds[1][case]]
    assert len(differing) == 2 * len(PATHS) - 3  # all that were counted


@pytest.mark.slow
def test_an_error_of_one_process_leaves_the_others_their_texts(fully_sharded):
    first, other = (seen["errors"] for seen in fully_sharded)
    assert len(first) == 6
    for case, (message, _) in first.items():
        if case.startswith("a sharded proxy"):
            assert "The proxy is sharded" in message and "The proxy is sharded" in other[case][0]
        else:
            assert message.startswith(("ArithmeticError: of a processor", "ValueError: `cache_implementation"))
            assert other[case] == ["no error", True], case
