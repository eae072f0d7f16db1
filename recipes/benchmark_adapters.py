# /// script
# requires-python = ">=3.11"
# dependencies = ["transformers-kad", "tqdm"]
# ///
"""How much slower is a LoRA proxy whose adapter is not merged, and when does merging pay?

    python recipes/benchmark_adapters.py                 # about 90 seconds on 2 CPU cores

Measures a proxy step (one token, with --context tokens in the cache) for random models of several sizes: merged,
unmerged, and unmerged with the adapter switched off, as the rule implicit_reward needs it for q0. The three variants
take turns in one run. The table shows medians over the repetitions, ratios to the merged variant with their quartiles,
and the number of tokens after which merging has saved more time than it took.
"""

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from transformers_kad.integrations.loading.messages import silence_libraries
from transformers_kad.models.cached_model import CachedModel
from transformers_kad.recipes.command_line import parse_arguments
from transformers_kad.recipes.environment import describe_environment
from transformers_kad.utils.files import write_whole

# isort: split
# These imports follow transformers_kad, which suppresses the messages of torchao.
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

# Width and layers: about 1 M, 30 M and 150 M parameters without embeddings.
SIZES = {"1M": (128, 4), "30M": (512, 9), "150M": (1024, 12)}
VARIANTS = ("merged", "unmerged", "adapter off")


@dataclass
class BenchmarkArguments:
    """Arguments of the benchmark."""

    sizes: list[str] = field(
        default_factory=lambda: list(SIZES), metadata={"help": f"Model sizes, of {', '.join(SIZES)}."}
    )
    lora_rank: int = field(default=16, metadata={"help": "Rank of the adapter, on all linear layers."})
    context: int = field(default=128, metadata={"help": "Tokens in the cache before a step."})
    steps: int = field(default=10, metadata={"help": "Steps in a repetition."})
    repetitions: int = field(default=15, metadata={"help": "Repetitions of each variant."})
    device: str = field(default="cpu", metadata={"help": "Device: cpu, cuda, ..."})
    dtype: str = field(default="float32", metadata={"help": "dtype: float32 or bfloat16."})
    output: Path | None = field(default=None, metadata={"help": "JSON file for the results."})

    def __post_init__(self) -> None:
        for size in self.sizes:
            if size not in SIZES:
                raise ValueError(f"--sizes must be of {', '.join(SIZES)}, got {size!r}.")
        for name in ("lora_rank", "context", "steps", "repetitions"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} must be at least 1, got {getattr(self, name)}.")


def build(arguments: BenchmarkArguments, size: str) -> tuple[dict[str, CachedModel], float]:
    """A random model in the three variants, and the time that merging took in seconds."""
    width, layers = SIZES[size]
    config = LlamaConfig(
        vocab_size=1000,
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        max_position_embeddings=4096,
    )

    def adapted() -> Any:
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
        lora = LoraConfig(
            task_type="CAUSAL_LM", r=arguments.lora_rank, target_modules="all-linear", init_lora_weights=False
        )
        return get_peft_model(model, lora).to(arguments.device, getattr(torch, arguments.dtype)).eval()

    unmerged, to_merge = adapted(), adapted()
    started = time.perf_counter()
    merged = to_merge.merge_and_unload().eval()
    seconds = time.perf_counter() - started
    return {
        "merged": CachedModel(merged),
        "unmerged": CachedModel(unmerged),
        "adapter off": CachedModel(unmerged, without_adapter=True),
    }, seconds


def time_steps(cached: CachedModel, context: int, steps: int, synchronize: Callable[[], None]) -> float:
    """The time of a step in seconds."""
    ids = torch.arange(context + steps, device=cached.device)[None] % 1000
    cached.reset()
    cached.logits(ids[:, :context])
    synchronize()
    started = time.perf_counter()
    for length in range(context + 1, context + steps + 1):
        cached.logits(ids[:, :length], continues=True)
    synchronize()
    return (time.perf_counter() - started) / steps


def measure(arguments: BenchmarkArguments) -> list[dict[str, Any]]:
    """A row for each size: medians in seconds, and the quartiles of the ratios to the merged variant."""
    synchronize = torch.cuda.synchronize if arguments.device.startswith("cuda") else lambda: None
    rows = []
    for size in arguments.sizes:
        models, merging = build(arguments, size)
        times: dict[str, list[float]] = {name: [] for name in VARIANTS}
        for repetition in tqdm(range(arguments.repetitions + 1), desc=size, leave=False, disable=None):
            for name in VARIANTS:
                seconds = time_steps(models[name], arguments.context, arguments.steps, synchronize)
                if repetition:  # the first repetition warms up
                    times[name].append(seconds)
        row: dict[str, Any] = {"size": size, "merging": merging}
        for name in VARIANTS:
            ratios = [a / b for a, b in zip(times[name], times["merged"], strict=True)]
            quartiles = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
            row[name] = {"seconds": statistics.median(times[name]), "ratio": quartiles}
        gain = row["unmerged"]["seconds"] - row["merged"]["seconds"]
        row["tokens_to_pay"] = merging / gain if gain > 0 else None
        rows.append(row)
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    lines = ["| proxy | merged | unmerged | adapter off | merging pays after |", "|---|---:|---:|---:|---:|"]
    for row in rows:
        cells = [row["size"], f"{1000 * row['merged']['seconds']:.2f} ms"]
        for name in VARIANTS[1:]:
            low, middle, high = row[name]["ratio"]
            cells.append(f"× {middle:.2f} ({low:.2f} to {high:.2f})")
        pays = "never" if row["tokens_to_pay"] is None else f"{row['tokens_to_pay']:.0f} tokens"
        lines.append(f"| {' | '.join([*cells, pays])} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    """Parse the command line and run."""
    (arguments,) = parse_arguments([BenchmarkArguments], __doc__, argv)
    silence_libraries()
    environment = describe_environment(arguments.device)
    rows = measure(arguments)
    print(table(rows))
    print(f"\n{environment['device']}, {arguments.dtype}, LoRA rank {arguments.lora_rank} on all linear layers")
    print("Do not merge if the adapter is needed on its own: several adapters, implicit_reward, a quantized model.")
    if arguments.output is not None:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        write_whole(arguments.output, json.dumps({"rows": rows, "environment": environment}, indent=2) + "\n")


if __name__ == "__main__":
    main()
