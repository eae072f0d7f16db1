"""Many calls on one processor, with adapters and weights that change in between: no stale cache, no growing memory.

    python tests/fuzz/soak.py --calls 2000 --seed 0 --output soak.json

Every answer is compared with that of a fresh processor. All ways of decoding take turns, single texts and batches,
chats that continue and prompts that share nothing. The resident memory is fitted by a line over the calls, without
those of the beginning, in which libraries fill caches of their own.
"""

import argparse
import gc
import json
import math
import os
import random
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from fuzz_models import PADDING, VOCABULARY, base_model
from peft import LoraConfig, get_peft_model
from tiny_families import tiny_family
from transformers.utils import logging

from transformers_kad import KADLogitsProcessor, attach, detach, kad_generate

PATHS = ("tokens", "drafts", "loop", "attached", "argument", "beams", "drafts", "drafts")
CHANGES = ("nothing", "nothing", "nothing", "optimizer", "load_state_dict", "set_adapter", "in place", "reset")
WARM_UP = 0.2  # share of the calls that is not fitted


@dataclass
class Slope:
    """The growth of the memory.

    Attributes:
        kib_per_call: slope of the line.
        error: half the width of its 95 % interval. The memory after a call says little that the one before did not, so
            that ten measurements count as one.
    """

    kib_per_call: float
    error: float


class Soak:
    """A pair whose proxy has two adapters, and the processor under test.

    Attributes:
        calls: how many calls were made by path.
        changes: how often each change was made.
        different: descriptions of answers that differ from those of a fresh processor.
    """

    def __init__(self, number: int) -> None:
        self.random = random.Random(number)
        self.base = base_model("llama", "float64")
        model = tiny_family("mistral", seed=1, vocab_size=VOCABULARY)
        settings = {"r": 2, "init_lora_weights": False, "target_modules": ["q_proj", "v_proj"]}
        torch.manual_seed(number)
        self.proxy = get_peft_model(model, LoraConfig(**settings), adapter_name="first").double().eval()
        self.proxy.add_adapter("second", LoraConfig(**settings))
        self.proxy.double().eval()
        self.proxy.set_adapter("first")
        self.saved = {name: value.clone() for name, value in self.proxy.state_dict().items()}
        self.settings = {"rule": "paced", "threshold": 0.6, "num_assistant_tokens": 4, "verification": "block"}
        self.kad = KADLogitsProcessor(self.proxy, **self.settings)
        self.texts: list[list[int]] = []
        self.calls: dict[str, int] = dict.fromkeys(PATHS, 0)
        self.changes: dict[str, int] = dict.fromkeys(CHANGES, 0)
        self.different: list[str] = []

    def step(self, number: int) -> None:
        """One change and one call, which a fresh processor answers as well."""
        change = self.random.choice(CHANGES)
        self.changes[change] += 1
        self._change(change)
        path, do_sample = self.random.choice(PATHS), self.random.random() < 0.5
        self.calls[path] += 1
        prompts = self._prompts()
        arguments: dict[str, Any] = self._inputs(prompts) | {"max_new_tokens": self.random.randint(1, 10)}
        arguments |= {"do_sample": do_sample and path != "beams", "eos_token_id": [3, 5, 7], "pad_token_id": PADDING}
        arguments |= {"top_k": 0} if arguments["do_sample"] else {}
        # The memory of the rule goes on with the texts of the call before, which a fresh processor does not know.
        remembered, statistics = list(self.kad.state.remembered), None
        ids = self._generate(self.kad, path, arguments, number)
        statistics = self.kad.statistics
        fresh = KADLogitsProcessor(self.proxy, **self.settings)
        fresh.state.remembered = remembered
        expected = self._generate(fresh, path, arguments, number)
        length = arguments["input_ids"].shape[1]
        if not torch.equal(ids, expected) or statistics.sequences != _near(fresh.statistics.sequences, statistics):
            self.different.append(f"call {number}, {path} after {change}: {ids.tolist()}, not {expected.tolist()}")
        counts = [row.tokens for row in statistics.sequences]
        self.texts = [
            prompt + own[:count] for prompt, own, count in zip(prompts, ids[:, length:].tolist(), counts, strict=True)
        ]

    def _change(self, change: str) -> None:
        if change == "optimizer":
            self._train()
        elif change == "load_state_dict":
            self.proxy.load_state_dict(self.saved)
        elif change == "set_adapter":
            self.proxy.set_adapter(self.random.choice(["first", "second"]))
        elif change == "in place":
            with torch.no_grad():
                next(p for name, p in self.proxy.named_parameters() if "lora_B" in name).mul_(1.01)
        elif change == "reset":
            self.kad.reset()

    def _train(self) -> None:
        """One step of an optimizer on the active adapter."""
        parameters = [p for name, p in self.proxy.named_parameters() if "lora" in name and p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.0)
        ids = torch.tensor([[self.random.randint(1, VOCABULARY - 1) for _ in range(8)]])
        self.proxy.train()
        self.proxy(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        self.proxy.eval()

    def _prompts(self) -> list[list[int]]:
        if self.texts and max(map(len, self.texts)) < 40 and self.random.random() < 0.5:
            return [[*text, self.random.randint(1, VOCABULARY - 1)] for text in self.texts]
        rows = self.random.randint(1, 3)
        return [
            [self.random.randint(1, VOCABULARY - 1) for _ in range(self.random.randint(1, 8))] for _ in range(rows)
        ]

    @staticmethod
    def _inputs(prompts: list[list[int]]) -> dict[str, torch.Tensor]:
        length = max(map(len, prompts))
        ids = [[PADDING] * (length - len(prompt)) + prompt for prompt in prompts]
        mask = [[0] * (length - len(prompt)) + [1] * len(prompt) for prompt in prompts]
        return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}

    def _generate(self, kad: KADLogitsProcessor, path: str, arguments: dict[str, Any], number: int) -> torch.Tensor:
        torch.manual_seed(number)
        if path == "attached":
            attach(self.base, kad)
            try:
                return self.base.generate(**arguments)
            finally:
                detach(self.base)
        if path == "argument":
            return self.base.generate(**arguments, kad=kad)
        further = {"drafts": {"assistant_model": self.proxy}, "loop": {"custom_generate": kad_generate}}
        beams = {"num_beams": 2} if path == "beams" else {}
        return self.base.generate(**arguments, **beams, **further.get(path, {}), logits_processor=[kad])


def _near(sequences: Any, other: Any) -> Any:
    """The sequences of the other statistics if they are the same but for rounding, else these."""
    counts = [[(s.tokens, s.rounds, s.drafted, s.accepted) for s in each] for each in (sequences, other.sequences)]
    masses = [[s.deferral_masses or () for s in each] for each in (sequences, other.sequences)]
    if counts[0] != counts[1]:
        return sequences
    pairs = (pair for one, two in zip(*masses, strict=True) for pair in zip(one, two, strict=True))
    return other.sequences if all(math.isclose(*pair, abs_tol=1e-5) for pair in pairs) else sequences


def resident_kib() -> float:
    """The resident memory of this process, in KiB."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1024


def slope_of(memory: list[float]) -> Slope:
    """The line through the memory after each call, without the warm-up."""
    values = torch.tensor(memory[int(len(memory) * WARM_UP) :], dtype=torch.float64)
    calls = torch.arange(len(values), dtype=torch.float64)
    centred = calls - calls.mean()
    slope = float((centred * values).sum() / centred.square().sum())
    rest = values - values.mean() - slope * centred
    independent = max(len(values) // 10, 3)
    error = 1.96 * math.sqrt(float(rest.square().mean()) / (independent * float(centred.square().mean())))
    return Slope(slope, error)


def soak(calls: int, number: int = 0) -> dict[str, Any]:
    """Make so many calls, and say what was seen."""
    logging.set_verbosity_error()
    torch.set_num_threads(1)
    run, memory, objects = Soak(number), list[float](), list[int]()
    for call in range(calls):
        run.step(call)
        if call % 50 == 49 or call == calls - 1:
            gc.collect()
            objects.append(sum(issubclass(type(value), torch.Tensor) for value in gc.get_objects()))
        memory.append(resident_kib())
    return {
        "calls": calls,
        "by path": run.calls,
        "by change": run.changes,
        "different": run.different,
        "tensors": objects,  # alive after every fifty calls
        "slope": asdict(slope_of(memory)),
    }


def main() -> int:
    """Print and write what was seen; the status is 1 where an answer differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=2_000, help="number of calls")
    parser.add_argument("--seed", type=int, default=0, help="of all random choices")
    parser.add_argument("--output", type=Path, default=None, help="file of the result")
    arguments = parser.parse_args()
    result = soak(arguments.calls, arguments.seed)
    text = json.dumps(result, indent=1)
    if arguments.output is not None:
        arguments.output.write_text(text)
    print(text)
    slope = result["slope"]
    print(f"memory: {slope['kib_per_call']:+.3f} KiB per call, 95 % interval +- {slope['error']:.3f}")
    return 1 if result["different"] else 0


if __name__ == "__main__":
    sys.exit(main())
