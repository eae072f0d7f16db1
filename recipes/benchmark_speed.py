# /// script
# requires-python = ">=3.11"
# dependencies = ["transformers-kad[eval]"]
# ///
r"""How fast is KAD, compared with the base alone and assisted decoding, and with the bound set by forward passes?

The tiny pair with its models inflated to a realistic cost, for results/speed/, about an hour on 2 CPU cores:

    pair="--inflate base=300M,proxy=30M --dtype bfloat16 --threshold 0.5"
    python recipes/benchmark_speed.py $pair --output tiny_pair --repetitions 12 --draft_lengths 3,5,7 \
        --methods proxy,assisted:5,token_by_token,lazy,speculative,auto,prompt_lookup:5
    python recipes/benchmark_speed.py $pair --output tiny_pair --batch_size 2,4 --draft_lengths 5 \
        --methods token_by_token,lazy,speculative,auto  # and 8,16 with --repetitions 3
    python recipes/benchmark_speed.py $pair --output compiled --repetitions 5 --draft_lengths 5 \
        --methods base_compiled,speculative,compiled
    python recipes/benchmark_speed.py --threshold 0.5 --output compiled_batches --batch_size 1,4,8 --repetitions 7 \
        --draft_lengths 5 --methods base_compiled,speculative,compiled  # the tiny pair as it is, bound by launches
    python recipes/benchmark_speed.py $pair --output copying --task copying --repetitions 3 --draft_lengths 3,5,8 \
        --methods speculative,prompt_lookup

Automatic and fixed draft lengths with a more costly proxy, and with a lower acceptance rate:

    python recipes/benchmark_speed.py --inflate base=300M,proxy=100M --dtype bfloat16 --threshold 0.5 --repetitions 7 \
        --output costly_proxy --methods token_by_token,speculative,auto --draft_lengths 1,2,3,5,7,10
    python recipes/benchmark_speed.py --inflate base=300M,proxy=10M --dtype bfloat16 --rule primal --budget 0.8 \
        --repetitions 6 --output primal --methods speculative,auto --draft_lengths 1,3,5,8

Sliding windows shorter than the texts, and recurrent layers, beside full attention, with random weights:

    cost="--inflate base=300M,proxy=30M --dtype bfloat16 --batch_size 1,4 --draft_lengths 5"
    python recipes/benchmark_speed.py --random_weights windowed $cost --output windowed --repetitions 4 \
        --methods token_by_token,speculative,in_step  # and full
    python recipes/benchmark_speed.py --random_weights hybrid $cost --output hybrid --repetitions 3 \
        --methods token_by_token,speculative,auto

How time and memory grow with the text, the vocabulary and the batch:

    python recipes/benchmark_speed.py --growth length --batch_size 2 --repetitions 1 --output growth
    python recipes/benchmark_speed.py --growth vocabulary batch --batch_size 2 --repetitions 1 --output growth

A real pair, and one with random weights whose acceptance rate is determined by the deferral mass:

    python recipes/benchmark_speed.py --base Qwen/Qwen3-14B-Base --proxy Qwen/Qwen3-1.7B --dtype bfloat16
    python recipes/benchmark_speed.py --random_weights base=Qwen/Qwen3-14B-Base,proxy=Qwen/Qwen3-1.7B \
        --deferral_mass 0.8 --dtype bfloat16 --device cuda --output qwen3_random

The sizes of Qwen3 14B with 1.7B and of OLMo-2 13B with 1B, with random weights on one GPU of 80 GB, in less than nine
minutes. Every pair gets a folder, and every row is stored at once, so that the same command goes on after an
interrupt. The models are made on the GPU:

    python recipes/benchmark_speed.py --preset h100 --output h100
    python recipes/benchmark_speed.py --preset h100 --output tried --shrink  # tiny models, on any device

Random weights accept drafts since their rule defers most of the mass: the threshold is chosen so that the mean
deferral mass is 0.8, and a draft token is accepted with at least that probability, as by a pair that agrees as often.

Methods: base, base_compiled (with a static cache, compiled by transformers), proxy, assisted (assisted decoding of
transformers with the same proxy and draft length, without KAD), and KAD as token_by_token, lazy, speculative, auto,
prompt_lookup, compiled, and in_step (speculative, and all rows of a batch emit the same number of tokens a round).
Methods that draft run with every draft length, or with their own as in assisted:5. All of them sample the same number
of tokens after the same new prompts, without temperature, top-k or end of sequence. In every repetition they take
turns, and each is compared with the base alone in that repetition at the same batch size.

The bound is the ratio that would result if only the forward passes of the models took time. It is computed from the
number of forward passes of each method and the median times of forward passes that are measured in between, prompts
included. Without prompts, for drafts of length γ, it is

    E[tokens per round] t_b(1) / ((γ + a) t_q + t_b(γ + 1))

with t_b(n) the time of a forward pass of the base over n tokens of each text, t_q that of a step of the proxy, and a
the number of further proxy steps per round. A base with recurrent layers reads accepted tokens again after a refusal,
so that its rounds differ in n. Its bound is computed from the widths of the forward passes that it made.

The results folder gets runs.jsonl, with a line for each repetition, from which an interrupted run continues, and
speed.json, speed.md and plots. Batch sizes and repetitions can be added to a folder; other settings and other machines
are refused.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

from transformers_kad.configuration import DEFAULT_VERIFICATION, KADConfig
from transformers_kad.integrations.loading.devices import pick_device
from transformers_kad.integrations.loading.messages import silence_libraries
from transformers_kad.recipes.arguments import ModelArguments, RuleArguments
from transformers_kad.recipes.benchmarking.growth import (
    AXES,
    GrowthSettings,
    growth_to_markdown,
    load_configs,
    make_growth_report,
    measure_growth,
    plot_axes,
)
from transformers_kad.recipes.benchmarking.inflate import parse_by_model, parse_count
from transformers_kad.recipes.benchmarking.methods import KINDS, expand
from transformers_kad.recipes.benchmarking.preset_runs import PresetArguments, run_preset
from transformers_kad.recipes.benchmarking.report_files import circumstances, write_report, write_speed_report
from transformers_kad.recipes.benchmarking.speed import Workload, measure_batch_size
from transformers_kad.recipes.benchmarking.subjects import TASKS, load_subject, threshold_that_defers
from transformers_kad.recipes.command_line import exit_status, parse_arguments
from transformers_kad.recipes.environment import describe_environment
from transformers_kad.recipes.evaluation.session import log
from transformers_kad.recipes.resumable import JsonLinesStore

TINY_PAIR = Path(__file__).resolve().parent / "tiny_pair"
# Configurations of pairs with full attention, with sliding windows of 48 tokens, and with recurrent layers.
TINY_ARCHITECTURES = Path(__file__).resolve().parent / "tiny_architectures"
DEFERRAL_MASS = 0.8
SIZES = {
    "length": [256, 512, 1024, 2048, 4096, 8192],
    "vocabulary": [8000, 16000, 32000, 64000, 128000, 256000],
    "batch": [1, 2, 4, 8, 16],
}


@dataclass
class SpeedArguments:
    """The methods, models and repetitions that are timed.

    Attributes:
        inflated: `inflate`, parsed.
        configs: `random_weights`, parsed.

    Raises:
        ValueError: a method is unknown, or a value is out of range.
    """

    pair: Path | None = field(
        default=None,
        metadata={"help": "Folder with base/ and proxy/ in it, used without --base and --proxy. Default: tiny_pair/."},
    )
    output: str = field(
        default="kad_speed", metadata={"help": "Folder for the results, and to continue an interrupted run."}
    )
    methods: list[str] = field(
        default_factory=list,
        metadata={
            "help": f"Methods of {', '.join(KINDS)}, or with a draft length, as in speculative:5. Default: all; with "
            "--growth base, token_by_token, speculative."
        },
    )
    batch_size: list[str] = field(default_factory=lambda: ["1"], metadata={"help": "Batch sizes, such as 1,2,4,8,16."})
    draft_lengths: list[str] = field(
        default_factory=list,
        metadata={"help": "Draft lengths γ of the methods that draft. Default: 3,5,7; with --growth: 5."},
    )
    task: Literal[tuple(TASKS)] = field(  # type: ignore[valid-type]
        default="arithmetic", metadata={"help": "; ".join(f"{name}: {task.help}" for name, task in TASKS.items())}
    )
    max_new_tokens: int | None = field(
        default=None,
        metadata={
            "help": "New tokens of every text. Default: "
            + ", ".join(f"{task.max_new_tokens} for {name}" for name, task in TASKS.items())
        },
    )
    prompt_tokens: int = field(default=64, metadata={"help": "Length of the random prompts for random weights."})
    repetitions: int = field(default=5, metadata={"help": "Repetitions of all methods."})
    seed: int = field(default=0, metadata={"help": "Seed of prompts, sampling and random weights."})
    inflate: str | None = field(
        default=None,
        metadata={"help": "base=300M,proxy=30M: parameters to add that cost time and change nothing."},
    )
    random_weights: str | None = field(
        default=None,
        metadata={
            "help": "base=CONFIG,proxy=CONFIG: random models of these configurations (Hub id, folder or file); or "
            "full, windowed or hybrid: those of tiny_architectures/."
        },
    )
    deferral_mass: float | None = field(
        default=None,
        metadata={
            "help": "For random weights: mean deferral mass, for which a threshold of dual is chosen; the acceptance "
            f"rate is at least as high. Default: {DEFERRAL_MASS} if neither a rule nor a parameter is given."
        },
    )
    growth: list[str] = field(
        default_factory=list,
        metadata={
            "help": f"Measure how costs grow with any of {', '.join(AXES)}, on random models of the pair's kind."
        },
    )
    sizes: list[str] = field(
        default_factory=list,
        metadata={"help": "Sizes for one axis of --growth. Default: up to 8192 tokens, 256000 ids, 16 texts."},
    )

    def __post_init__(self) -> None:
        self.methods = _words(self.methods)
        self.batch_sizes = _numbers(self.batch_size, "--batch_size")
        self.lengths = _numbers(self.draft_lengths, "--draft_lengths") or ([5] if self.growth else [3, 5, 7])
        self.growth = _words(self.growth)
        self.chosen = expand(
            self.methods or (["token_by_token", "speculative"] if self.growth else list(KINDS)), self.lengths
        )
        for axis in self.growth:
            if axis not in AXES:
                raise ValueError(f"--growth is of {', '.join(AXES)}, got {axis!r}.")
        if self.sizes and len(self.growth) != 1:
            raise ValueError(f"--sizes {' '.join(self.sizes)} go with one axis of --growth, got {self.growth}.")
        if self.growth and any(KINDS[method.kind].compiled for method in self.chosen):
            raise ValueError(
                f"--growth measures every forward pass, which compiled methods don't allow: got {self.methods}."
            )
        self.grown = SIZES | ({self.growth[0]: sorted(_numbers(self.sizes, "--sizes"))} if self.sizes else {})
        if self.max_new_tokens is None:
            self.max_new_tokens = TASKS[self.task].max_new_tokens
        for name in ("max_new_tokens", "prompt_tokens", "repetitions"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} must be at least 1, got {getattr(self, name)}.")
        self.inflated = {name: parse_count(count) for name, count in parse_by_model(self.inflate, "--inflate").items()}
        self.configs = _configs_of(self.random_weights)
        if self.configs and set(self.configs) != {"base", "proxy"}:
            raise ValueError(f"--random_weights needs both, base=...,proxy=..., got {self.random_weights!r}.")
        if self.deferral_mass is not None:
            if not (self.configs or self.growth):
                raise ValueError(
                    "--deferral_mass goes with --random_weights or --growth: it has no meaning for a real pair."
                )
            if not 0 < self.deferral_mass <= 1:
                raise ValueError(f"--deferral_mass must lie in (0, 1], got {self.deferral_mass}.")


def _configs_of(random_weights: str | None) -> dict[str, str]:
    """The sources of the configurations that --random_weights names."""
    if random_weights in ("full", "windowed", "hybrid"):
        return {name: str(TINY_ARCHITECTURES / random_weights / name) for name in ("base", "proxy")}
    return parse_by_model(random_weights, "--random_weights")


def _words(values: Sequence[str]) -> list[str]:
    """Words that are separated by spaces or commas."""
    return [word for value in values for word in value.split(",") if word]


def _numbers(values: Sequence[str], option: str) -> list[int]:
    words = _words(values)
    if not all(word.isdigit() and int(word) >= 1 for word in words):
        raise ValueError(f"{option} takes whole numbers of at least 1, got {' '.join(values)}.")
    return list(dict.fromkeys(map(int, words)))


def choose_rule(rule: RuleArguments, speed: SpeedArguments) -> KADConfig | None:
    """The rule of the command line; None for the dual rule with a threshold for the deferral mass.

    Raises:
        ValueError: a deferral mass was given together with a rule or a parameter, or --num_assistant_tokens was given.
    """
    parameters, own = rule.given()
    if "num_assistant_tokens" in own:
        raise ValueError(
            f"Draft lengths are --draft_lengths, got --num_assistant_tokens {own['num_assistant_tokens']}."
        )
    asked = bool(parameters or own) or rule.config is not None or rule.rule is not None
    if asked and speed.deferral_mass is not None:
        raise ValueError(
            "--deferral_mass chooses the threshold of dual: leave it out, or the rule and its parameters."
        )
    if not asked and (speed.configs or speed.growth):
        return None
    return rule.to_config()


def settings_of(
    models: ModelArguments, speed: SpeedArguments, config: KADConfig | None, environment: dict[str, Any]
) -> dict[str, Any]:
    """The settings that determine the results, as JSON values. Other settings need another folder."""
    rule = {} if config is None else {"rule": config.rule, "parameters": dict(config.parameters)}
    mass = (speed.deferral_mass or DEFERRAL_MASS) if config is None else None
    return {
        "base": _short(speed.configs.get("base", models.base)),
        "proxy": _short(speed.configs.get("proxy", models.proxy)),
        "weights": "random" if speed.configs or speed.growth else "trained",
        "inflate": speed.inflated,
        "dtype": models.dtype,
        "quantization": models.quantization,
        "device_map": models.device_map,
        "align_vocabularies": models.align_vocabularies or None,
        **rule,
        "component_temperature": None if config is None else config.component_temperature,
        "verification": DEFAULT_VERIFICATION if config is None else config.verification,
        "deferral_mass": mass,
        "task": None if speed.configs or speed.growth else speed.task,
        "max_new_tokens": speed.max_new_tokens,
        "prompt_tokens": speed.prompt_tokens if speed.configs else None,
        "rows": speed.batch_sizes[0] if speed.growth else None,
        "seed": speed.seed,
        "environment": environment,
    }


def _short(path: str | None) -> str:
    """The last two names of a local path, so that results don't contain paths of a machine."""
    return "/".join(Path(str(path)).parts[-2:]) if Path(str(path)).exists() else str(path)


def find_models(models: ModelArguments, rule: RuleArguments, speed: SpeedArguments) -> None:
    """Fill in base and proxy if the command line does not name them.

    Raises:
        ValueError: they were not found.
    """
    if speed.configs:
        return
    models.complete_with_pair(rule.config, speed.pair or TINY_PAIR, ", or --random_weights")


def run_speed(
    models: ModelArguments, speed: SpeedArguments, config: KADConfig | None, settings: dict[str, Any]
) -> None:
    """Measure all methods at all batch sizes, and report everything in the folder."""
    folder = Path(speed.output)
    with JsonLinesStore(folder / "runs.jsonl", settings, checked=True) as store:
        subject = load_subject(models, random_weights=speed.configs, inflated=speed.inflated, seed=speed.seed)
        sizes = ", ".join(f"{name} {model.num_parameters() / 1e6:.1f} M" for name, model in subject.models.items())
        log(f"Parameters: {sizes}. Device: {settings['environment']['device']}.")
        if config is None:
            threshold = threshold_that_defers(subject.base, settings["deferral_mass"])
            log(f"A deferral mass of {settings['deferral_mass']} needs dual with threshold {threshold:.3g}.")
            config = KADConfig("dual", {"threshold": threshold})
        workload = Workload(speed.task, speed.max_new_tokens, speed.prompt_tokens, speed.seed)
        for rows in speed.batch_sizes:
            measure_batch_size(
                subject, config, workload, speed.chosen, store, rows=rows, repetitions=speed.repetitions, log=log
            )
        records = store.records
    write_speed_report(records, config, settings, folder, log)


def run_growth(
    models: ModelArguments, speed: SpeedArguments, config: KADConfig | None, settings: dict[str, Any]
) -> None:
    """Measure along all axes of --growth, and report everything in the folder."""
    folder = Path(speed.output)
    growth = GrowthSettings(
        load_configs(models, speed.configs),
        speed.inflated,
        pick_device(models.device),
        models.dtype,
        config,
        settings["deferral_mass"] or DEFERRAL_MASS,
        speed.batch_sizes[0],
        speed.max_new_tokens,
        speed.seed,
    )
    with JsonLinesStore(folder / "growth.jsonl", settings, checked=True) as store:
        for axis in speed.growth:
            measure_growth(
                growth, axis, speed.grown[axis], speed.chosen, store, repetitions=speed.repetitions, log=log
            )
        report = make_growth_report(store.records) | circumstances(settings, store.records)
    write_report(report, growth_to_markdown(report), folder, "growth", log)
    for path in plot_axes(report, folder / "plots"):
        log(f"Written: {path}")


def check_that_only_a_preset_is_asked_for(
    models: ModelArguments, rule: RuleArguments, speed: SpeedArguments, preset: str
) -> None:
    """Raise `ValueError` if options are given that a preset chooses itself."""
    own, others = ("device", "output"), SpeedArguments(output=speed.output)
    for given, default in ((models, ModelArguments(device=models.device)), (rule, RuleArguments()), (speed, others)):
        for option in fields(given):
            if option.name not in own and getattr(given, option.name) != getattr(default, option.name):
                raise ValueError(f"--preset {preset} chooses --{option.name} itself: leave it out.")


def run(models: ModelArguments, rule: RuleArguments, speed: SpeedArguments, preset: PresetArguments) -> int:
    """Measure and report."""
    if preset.preset is not None:
        check_that_only_a_preset_is_asked_for(models, rule, speed, preset.preset)
        run_preset(preset, pick_device(models.device), Path(speed.output), log)
        return 0
    config = choose_rule(rule, speed)
    find_models(models, rule, speed)
    if config is not None:
        config = replace(config, base=None, proxy=None)
    settings = settings_of(models, speed, config, describe_environment(pick_device(models.device)))
    (run_growth if speed.growth else run_speed)(models, speed, config, settings)
    return 0


def main(argv: list[str] | None = None) -> int:
    """Parse the command line and run."""
    arguments = parse_arguments([ModelArguments, RuleArguments, SpeedArguments, PresetArguments], __doc__, argv)
    silence_libraries()
    return exit_status(lambda: run(*arguments))


if __name__ == "__main__":
    sys.exit(main())
