"""Calls over two processes, each of which writes what it saw. `test_parallel.py` starts this file with torchrun.

torchrun --nproc_per_node 2 parallel_calls.py FOLDER tensor_parallel|fully_sharded
"""

import datetime
import itertools
import json
import os
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.distributed as dist
from tiny_models import tiny_model
from torch.distributed.fsdp import fully_shard
from transformers import (
    AutoModelForCausalLM,
    LogitsProcessor,
    MaxTimeCriteria,
    PreTrainedModel,
    StoppingCriteria,
    TextIteratorStreamer,
)
from transformers.distributed import DistributedConfig
from transformers.generation import BaseStreamer

from transformers_kad import KADLogitsProcessor
from transformers_kad.decoding.parallel import RanksInStep

SEED = 11  # of rank 0; the other rank has another one
DRAFT = 3
GREEDY = {"do_sample": False}
SAMPLED = {"do_sample": True, "top_k": 0}
PROMPT = [3, 14, 15, 9, 26, 5, 9, 3, 14]
EOS = 7

PATHS: dict[str, tuple[bool, dict[str, Any]]] = {
    # name: (speculative, settings of the processor)
    "token by token": (False, {}),
    "lazy": (False, {"lazy": True}),
    "speculative": (True, {}),
    "block verification": (True, {"verification": "block"}),
    "prompt lookup": (True, {"drafter": "prompt_lookup"}),
    "auto": (True, {"num_assistant_tokens": "auto"}),
    "auto, block verification": (True, {"num_assistant_tokens": "auto", "verification": "block"}),
    "a prompt of the proxy's own": (True, {}),
    "a prompt of the proxy's own, token by token": (False, {}),
    "a reference": (True, {"rule": "implicit_reward", "beta": 0.5}),
}

# The law of short texts of models with few tokens, see `exact_law.py`.
LAW = {"prompt": (1, 2, 3, 1), "length": 3, "vocabulary": 4, "samples": 6000, "rows": 3000}


def models_of_law() -> tuple[PreTrainedModel, PreTrainedModel]:
    """A base and a proxy with few tokens."""
    settings = {"vocabulary": LAW["vocabulary"]}
    return tiny_model(hidden=32, seed=1, **settings), tiny_model(hidden=16, seed=2, **settings)


class Models:
    """A base and a proxy, whole, and in a folder from which the processes load them in shards."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.reference = folder, tiny_model(hidden=16, seed=3)
        self.whole = {"base": tiny_model(hidden=32, seed=1), "proxy": tiny_model(hidden=16, seed=2)}
        self.whole["base of the law"], self.whole["proxy of the law"] = models_of_law()

    def save(self) -> None:
        for name, model in self.whole.items():
            model.save_pretrained(self.folder / name)

    def tensor_parallel(self, name: str) -> PreTrainedModel:
        distributed = DistributedConfig(tp_size=dist.get_world_size())
        return AutoModelForCausalLM.from_pretrained(self.folder / name, distributed_config=distributed).eval()

    def fully_sharded(self, name: str) -> PreTrainedModel:
        model = AutoModelForCausalLM.from_pretrained(self.folder / name).eval()
        for layer in model.model.layers:
            fully_shard(layer)
        return fully_shard(model)


def prompts(rows: int) -> dict[str, torch.Tensor]:
    """Prompts of different length, padded on the left."""
    ids = torch.tensor([[token + row for token in PROMPT] for row in range(rows)])
    mask = torch.ones_like(ids)
    for row in range(1, rows):
        mask[row, : 2 * row] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}


class Calls:
    """Calls with a base and a proxy."""

    def __init__(self, base: PreTrainedModel, proxy: PreTrainedModel, reference: PreTrainedModel) -> None:
        self.base, self.proxy, self.reference = base, proxy, reference

    def __call__(self, path: str, inputs: dict[str, torch.Tensor], **call: Any) -> dict[str, Any]:
        """The new tokens of each row, and how many forwards of the base they took."""
        speculative, settings = PATHS[path]
        if settings.get("rule") == "implicit_reward":
            settings = settings | {"reference": self.reference}
        kad = KADLogitsProcessor(self.proxy, **{"num_assistant_tokens": DRAFT} | settings)
        call = {"max_new_tokens": 12, "eos_token_id": EOS, "pad_token_id": 0} | call
        call["logits_processor"] = [kad, *call.pop("behind", [])]
        if speculative:
            call["assistant_model"] = self.proxy
        with kad.proxy_prompt({k: v[:, 3:] for k, v in inputs.items()}) if "own" in path else nullcontext():
            sequences = self.base.generate(**inputs, **call)
        tokens = sequences[:, inputs["input_ids"].shape[1] :].tolist()
        return {"tokens": tokens, "base_forwards": kad.statistics.base_forwards}


@contextmanager
def counted() -> Iterator[Counter[str]]:
    """Count the collective operations of this library; those of the models call torch's functional ones."""
    counts, originals = Counter[str](), {name: getattr(dist, name) for name in ("all_gather", "broadcast")}

    def counting(name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            counts[name] += 1
            return originals[name](*args, **kwargs)

        return call

    for name in originals:
        setattr(dist, name, counting(name))
    try:
        yield counts
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)


def message_of(call: Callable[[], Any]) -> str:
    """The error that a call ends with."""
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


class FailsLater(LogitsProcessor):
    """Raises when it is called for a text of a certain length."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if input_ids.shape[1] >= len(PROMPT) + 5:
            raise ArithmeticError("of a processor")
        return scores


class EndsEarlier(StoppingCriteria):
    """Ends a text after some tokens."""

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return torch.full((len(input_ids),), input_ids.shape[1] >= len(PROMPT) + 5)


class Streamer(BaseStreamer):
    """Keeps what it gets, and raises where it gets too much."""

    def __init__(self, most: int = 1000) -> None:
        self.seen, self.most, self.ended = [], most, False

    def put(self, value: torch.Tensor) -> None:
        self.seen += value.flatten().tolist()
        if len(self.seen) > self.most:
            raise BrokenPipeError("of a streamer")

    def end(self) -> None:
        self.ended = True


def seed_of(rank: int) -> int:
    return SEED + 1000 * rank


def run_tensor_parallel(models: Models, rank: int) -> dict[str, Any]:
    """Everything about tensor parallelism."""
    base, proxy, whole = models.tensor_parallel("base"), models.tensor_parallel("proxy"), models.whole
    alone = Calls(whole["base"], whole["proxy"], models.reference)
    sharded = {
        "base": Calls(base, whole["proxy"], models.reference),
        "base and proxy": Calls(base, proxy, models.reference),
        "proxy": Calls(whole["base"], proxy, models.reference),
    }
    seen: dict[str, Any] = {"texts": {}, "collectives": {}, "errors": {}}

    for path in PATHS:
        for how, rows in ((GREEDY, 1), (GREEDY, 3), (SAMPLED, 1), (SAMPLED, 3)):
            if path == "lazy" and how is GREEDY:
                continue
            texts: dict[str, Any] = {}
            if rank == 0 and ("auto" not in path or how is GREEDY):  # otherwise the texts depend on times
                torch.manual_seed(SEED)
                texts["one process"] = alone(path, prompts(rows), **how)["tokens"]
            for name, calls in sharded.items():
                if name != "base" and (how, rows) != (SAMPLED, 3):
                    continue
                if name == "proxy" and path not in ("token by token", "speculative", "auto"):
                    continue
                torch.manual_seed(seed_of(rank))
                with counted() as counts:
                    called = calls(path, prompts(rows), **how)
                texts[name] = called["tokens"]
                if name == "base":
                    seen["collectives"][f"{path}, {how}, {rows}"] = [counts, called["base_forwards"]]
            seen["texts"][f"{path}, {how}, {rows}"] = texts
    seen["random state"] = random_states(sharded["base"], alone, rank)
    seen["streamer"] = streamed(sharded["base"])
    for name, path in (("base", "token by token"), ("base", "speculative"), ("base and proxy", "speculative")):
        seen["errors"][f"{name}, {path}"] = errors_of(sharded[name], path, rank)
    seen["law"] = {path: sample_law(models, path, rank) for path in ("token by token", "block verification")}
    return seen


def random_states(calls: Calls, alone: Calls, rank: int) -> dict[str, Any]:
    """What is drawn after a call, and what would have been drawn without it."""
    torch.manual_seed(seed_of(rank))
    untouched = torch.rand(1).item()
    torch.manual_seed(seed_of(rank))
    calls("speculative", prompts(1), **SAMPLED)
    after = torch.rand(1).item()
    torch.manual_seed(SEED)
    alone("speculative", prompts(1), **SAMPLED)
    return {"untouched": untouched, "after": after, "after one process": torch.rand(1).item()}


def streamed(calls: Calls) -> dict[str, Any]:
    """What the streamers of a rank get."""
    streamers = {path: Streamer() for path in ("token by token", "speculative")}
    texts = {path: calls(path, prompts(1), streamer=own, **GREEDY)["tokens"] for path, own in streamers.items()}

    class Digits:
        def decode(self, ids: list[int], **kwargs: Any) -> str:
            return " ".join(map(str, ids))

    iterated = TextIteratorStreamer(Digits(), skip_prompt=True, timeout=60)
    thread = threading.Thread(target=calls, args=("speculative", prompts(1)), kwargs={"streamer": iterated, **GREEDY})
    thread.start()
    text = "".join(iterated)
    thread.join()
    return {
        "texts": texts,
        "seen": {path: own.seen for path, own in streamers.items()},
        "ended": {path: own.ended for path, own in streamers.items()},
        "iterated": text,
    }


def errors_of(calls: Calls, path: str, rank: int) -> dict[str, Any]:
    """The errors of calls in which one rank fails or does something else, and the text of a call after each."""
    is_other = rank == 1
    ends = {"stopping_criteria": [EndsEarlier()]} if is_other else {}
    failing: dict[str, tuple[dict[str, torch.Tensor], dict[str, Any]]] = {
        "a processor of rank 1": (prompts(1), {"behind": [FailsLater()] if is_other else []}),
        "the streamer of rank 0": (prompts(1), {"streamer": Streamer(most=len(PROMPT) + 4)}),
        "a refusal on rank 1": (prompts(1), {"cache_implementation": "paged"} if is_other else {}),
        "an argument that rank 1 has wrong": (prompts(1), {"max_new_tokns": 3} if is_other else {}),
        "an end that rank 1 has earlier": (prompts(1), ends),
        "a limit that rank 1 has earlier": (prompts(1), {"max_new_tokens": 5 if is_other else 12}),
        "another prompt on rank 1": ({k: v[rank : rank + 1] for k, v in prompts(2).items()}, {}),
        "a time limit": (prompts(1), {"max_time": 60.0}),
        "a time limit as a criterion": (prompts(1), {"stopping_criteria": [MaxTimeCriteria(60.0)]}),
    }
    expected = calls(path, prompts(1), **GREEDY)["tokens"]
    found = {}
    for name, (inputs, call) in failing.items():
        message = message_of(lambda: calls(path, inputs, **GREEDY, **call))  # noqa: B023 (called at once)
        found[name] = [message, calls(path, prompts(1), **GREEDY)["tokens"] == expected]
    share, RanksInStep._share_random_states = RanksInStep._share_random_states, lambda *_: None
    torch.manual_seed(seed_of(rank))
    found["random states that are not shared"] = [message_of(lambda: calls(path, prompts(1), **SAMPLED)), True]
    RanksInStep._share_random_states = share
    return found


def sample_law(models: Models, path: str, rank: int) -> list[list[int]]:
    """Short texts of models with few tokens."""
    calls = Calls(
        models.tensor_parallel("base of the law"), models.tensor_parallel("proxy of the law"), models.reference
    )
    inputs = {"input_ids": torch.tensor([LAW["prompt"]] * LAW["rows"])}
    torch.manual_seed(seed_of(rank))
    settings = {**SAMPLED, "max_new_tokens": LAW["length"], "eos_token_id": None}
    batches = [calls(path, inputs, **settings)["tokens"] for _ in range(LAW["samples"] // LAW["rows"])]
    return list(itertools.chain(*batches))


def run_fully_sharded(models: Models, rank: int) -> dict[str, Any]:
    """Everything about FSDP: every process has texts of its own, of its own length."""
    whole, base, proxy = models.whole, models.fully_sharded("base"), models.fully_sharded("proxy")
    managed = models.fully_sharded("base")
    managed._is_fsdp_managed_module = True  # as transformers marks what it has sharded itself
    calls, alone = (
        Calls(base, whole["proxy"], models.reference),
        Calls(whole["base"], whole["proxy"], models.reference),
    )
    seen: dict[str, Any] = {"texts": {}, "errors": {}}
    rows, limit = (1, 8) if rank == 0 else (3, 24)
    for path in PATHS:
        for how in (GREEDY, SAMPLED):
            if (path == "lazy" and how is GREEDY) or ("auto" in path and how is SAMPLED):
                continue
            texts, settings = {}, {**how, "max_new_tokens": limit, "eos_token_id": EOS if rank else None}
            for name, own in (("one process", alone), ("base", calls)):
                torch.manual_seed(seed_of(rank))
                called = own(path, prompts(rows), **settings)
                texts[name] = called["tokens"]
            texts["base_forwards"] = called["base_forwards"]
            seen["texts"][f"{path}, {how}"] = texts
    settings = {**GREEDY, "max_new_tokens": limit}
    for path in ("token by token", "speculative"):
        expected = alone(path, prompts(rows), **settings)["tokens"]
        of_managed = Calls(managed, whole["proxy"], models.reference)
        seen["texts"][f"{path}, synced_gpus"] = {
            "one process": expected,
            "base": calls(path, prompts(rows), synced_gpus=True, **settings)["tokens"],
        }
        seen["texts"][f"{path}, marked"] = {
            "one process": expected,
            "base": of_managed(path, prompts(rows), **settings)["tokens"],
        }
        failing = {
            "a processor of rank 0": {"behind": [FailsLater()] if rank == 0 else []},
            "a refusal on rank 0": {"cache_implementation": "paged"} if rank == 0 else {},
        }
        for name, call in failing.items():
            texts = []
            message = message_of(lambda: texts.append(calls(path, prompts(rows), **settings, **call)["tokens"]))  # noqa: B023 (called at once)
            seen["errors"][f"{name}, {path}"] = [message, texts == [expected]]
        sharded_proxy = Calls(base, proxy, models.reference)
        seen["errors"][f"a sharded proxy, {path}"] = [
            message_of(lambda: sharded_proxy(path, prompts(rows), **settings)),  # noqa: B023 (called at once)
            False,
        ]
    return seen


def main() -> None:
    folder, kind = Path(sys.argv[1]), sys.argv[2]
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=20))
    rank = dist.get_rank()
    run = {"tensor_parallel": run_tensor_parallel, "fully_sharded": run_fully_sharded}[kind]
    seen = run(Models(folder), rank) | {"world_size": dist.get_world_size()}
    (folder / f"{kind}_{rank}.json").write_text(json.dumps(seen))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
