"""Runs a check, from the command-line arguments to the report."""

import hashlib
import json
import math
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from ...configuration import KADConfig
from ...integrations.loading.models import load_tokenizer
from ...integrations.loading.prompts import PLAIN_SAMPLING
from ...models.model_settings import vocabulary_size
from ...utils.files import write_whole
from ...utils.sources import shown_name
from ..arguments import TEMPLATE_CHOICES, ModelArguments
from ..environment import describe_environment
from ..evaluation.decoding import Decoder
from ..pair import Pair
from ..progress import Progress
from ..prompt_lines import Line, seed_of
from ..resumable import JsonLinesStore
from ..word_problems import make_problems
from .arguments import CheckArguments
from .compatibility import compare_ends, compare_templates, compare_vocabularies
from .plot import plot_check
from .prompts import as_lines, load_prompts
from .report import recommend, summarize, to_markdown
from .speed import measure_costs
from .texts import TextMeter
from .verdict import Finding, find, verdict_of


def check_pair(models: ModelArguments, arguments: CheckArguments, *, default_pair: Path) -> dict[str, Any]:
    """Check a pair, print the summary, and write the report, the plot and the configuration.

    Returns:
        The report: `verdict`, `reasons` and `notes` (sentences), `findings`, `recommended` (the figures of a rule,
        with `rule` and `parameters` as `KADConfig` takes them), `figures`, `compatibility`, `settings`,
        `environment` and `seconds`, the time that this run took.
        `recommended` and `figures` are None if the tokenizers can't be aligned.

    Raises:
        ValueError: there are no prompts, every prompt failed, or the folder holds results of another check.
    """
    began = time.perf_counter()
    is_tiny = models.complete_with_pair(None, arguments.pair or default_pair) and arguments.pair is None
    if is_tiny:
        torch.set_num_threads(1)  # more threads are slower for models this small
    lines = _lines(arguments, is_tiny)
    base, proxy = load_tokenizer(str(models.base)), load_tokenizer(str(models.proxy))
    prompts = [line.prompt for line in lines if line.prompt is not None]
    vocabulary = compare_vocabularies(base, proxy, prompts)
    templates = compare_templates(base, proxy, prompts[0], {**arguments.template, **lines[0].template})
    compatibility: dict[str, Any] = {"vocabulary": asdict(vocabulary), "templates": asdict(templates)}
    compatibility |= {"chat": arguments.chat, "proxy_chat": arguments.proxy_chat}
    figures = recommended = None
    environment = describe_environment("cpu")
    if vocabulary.refusal is None:
        models.align_vocabularies = models.align_vocabularies or vocabulary.difference is not None
        pair = Pair(models)
        environment = describe_environment(str(pair.device))
        sizes = {name: sum(p.numel() for p in getattr(pair, name).parameters()) for name in ("base", "proxy")}
        compatibility |= {"ends": asdict(compare_ends(pair)), "parameters": sizes}
        figures, recommended = _measure(pair, models, arguments, lines)
    report = _report(compatibility, figures, recommended)
    report |= {"settings": _settings(models, arguments, lines), "environment": environment}
    report["seconds"] = time.perf_counter() - began
    _write(report, models, arguments)
    return report


def _lines(arguments: CheckArguments, is_tiny: bool) -> list[Line]:
    if arguments.prompts is None and is_tiny:  # which knows nothing else
        return as_lines([problem.question for problem in make_problems("validation", arguments.limit)])
    return load_prompts(arguments.prompts, arguments.limit, config=arguments.data_config, split=arguments.split)


def _measure(
    pair: Pair, models: ModelArguments, arguments: CheckArguments, lines: Sequence[Line]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The figures over all prompts, and those of the recommended rule."""
    decoder = Decoder(
        pair,
        dict(PLAIN_SAMPLING),
        chat=TEMPLATE_CHOICES[arguments.chat],
        proxy_chat=TEMPLATE_CHOICES[arguments.proxy_chat],
    )
    methods = arguments.methods()
    rules = [method.config.make_rule() for method in methods if method.config is not None]
    meter = TextMeter(decoder, rules, arguments.num_assistant_tokens, arguments.max_new_tokens)
    settings = {**_settings(models, arguments, lines), "base": models.base, "proxy": models.proxy}
    with JsonLinesStore(arguments.output / "texts.jsonl", settings) as store:
        done = {record["line"] for record in store.records}
        with Progress(len(lines), "prompts", done=len(done), patient=True) as progress:
            for line in lines:
                if line.number in done:
                    continue
                assert line.prompt is not None
                decoder.template_arguments = {**arguments.template, **line.template}
                record: dict[str, Any] = {"line": line.number}
                try:
                    record |= meter.measure(line.prompt, seed_of(arguments.seed, line.number))
                except (ValueError, torch.OutOfMemoryError) as error:  # such as a prompt that is too long
                    record["error"] = str(error)
                    print(f"Line {line.number} failed: {error}", file=sys.stderr)
                store.append(record)
                store.records.append(record)
                progress.update()
        records = [record for record in store.records if "error" not in record]
        errors = [record for record in store.records if "error" in record]
    if not records:
        raise ValueError(f"Every prompt failed. Line {errors[0]['line']}: {errors[0]['error']}")
    length = sum(record["kad"]["tokens"] for record in records) / len(records)
    figures = summarize(
        records,
        methods,
        measure_costs(pair, arguments.num_assistant_tokens, held=max(1, round(length))),
        arguments.num_assistant_tokens,
        vocabulary_nats=math.log(vocabulary_size(pair.base)),
        on_cpu=torch.device(pair.device).type == "cpu",
        failed=len(errors),
    )
    return figures, recommend(figures, records, arguments.num_assistant_tokens)


def _settings(models: ModelArguments, arguments: CheckArguments, lines: Sequence[Line]) -> dict[str, Any]:
    """The settings that determine the figures, as JSON values. Folders are named by their last parts only."""
    names = ("proxy_chat", "chat", "method", "num_assistant_tokens", "max_new_tokens", "seed")
    settings: dict[str, Any] = {name: getattr(arguments, name) for name in names}
    settings |= {name: shown_name(str(getattr(models, name))) for name in ("base", "proxy")}
    settings |= {"dtype": models.dtype, "quantization": models.quantization, "template": arguments.template}
    content = json.dumps([line.record() for line in lines]).encode()
    return {**settings, "prompts": len(lines), "prompts_hash": hashlib.sha256(content).hexdigest()[:12]}


def _report(
    compatibility: Mapping[str, Any], figures: dict[str, Any] | None, recommended: dict[str, Any] | None
) -> dict[str, Any]:
    findings: list[Finding] = find(compatibility, figures, recommended)
    return {
        "verdict": verdict_of(findings),
        "reasons": [finding.text for finding in findings if finding.level != "note"],
        "notes": [finding.text for finding in findings if finding.level == "note"],
        "findings": [asdict(finding) for finding in findings],
        "recommended": recommended,
        "figures": figures,
        "compatibility": dict(compatibility),
    }


def _write(report: Mapping[str, Any], models: ModelArguments, arguments: CheckArguments) -> None:
    """Print the summary, and write `check.json`, `check.md`, the plot and the configuration."""
    output, summary = arguments.output, to_markdown(report)
    output.mkdir(parents=True, exist_ok=True)
    write_whole(output / "check.json", json.dumps(report, indent=2) + "\n")
    write_whole(output / "check.md", summary)
    print(summary)
    written = [output / "check.json", output / "check.md"]
    if report["figures"] is not None:
        written += plot_check(report, output / "check")
    if arguments.save_config is not None:
        written += _save_config(report["recommended"], models, arguments.save_config)
    for path in written:
        print(f"Written: {path}", file=sys.stderr)


def _save_config(recommended: Mapping[str, Any] | None, models: ModelArguments, folder: Path) -> list[Path]:
    if recommended is None:
        print("--save_config: there is no rule to save, since the tokenizers can't be aligned.", file=sys.stderr)
        return []
    config = KADConfig(
        rule=recommended["rule"],
        parameters=recommended["parameters"],
        num_assistant_tokens=recommended["num_assistant_tokens"],
    )
    return [replace(config, base=models.base, proxy=models.proxy).save_pretrained(folder)]
