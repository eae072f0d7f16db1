"""Writes and uploads the result of a run: adapter, tokenizer, KADConfig, model card, and code that uses them."""

import shlex
from dataclasses import asdict
from pathlib import Path
from typing import Any

import datasets
import trl
from huggingface_hub import HfApi, ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from peft import PeftModel
from transformers import PreTrainedTokenizerBase, Trainer

from ...configuration import KADConfig
from ...integrations.loading.models import below_adapter
from ...utils.sources import looks_like_path, portable_name
from ...utils.strict_json import parse_json_object
from ..environment import describe_environment
from . import AlignmentError
from .arguments import AlignmentArguments, log
from .checks import Pair
from .data import Examples
from .output import delete_checkpoints, settings_of, write_record
from .trainers import TrainingResult

CARD = """\
---
{{ card_data }}
---

# {{ name }}

A small aligned proxy, a LoRA adapter, that guides the larger model `{{ base }}` inside `generate()` by knapsack
approximation deferral (`pip install transformers-kad`): Hammal, Zweigenbaum, Corro, *KAD: A Framework for Proxy-based
Test-time Alignment with Knapsack Approximation Deferral*, EACL 2026 ([arXiv 2510.27017](https://arxiv.org/abs/2510.27017)).

| | |
|---|---|
| base, guided by this proxy | `{{ base }}` |
| model below the adapter | `{{ proxy }}` |
| data | `{{ data }}` |
| method | {{ method }} |
| rule in `kad_config.json` | {{ rule }} |
{%- for key, value in figures.items() %}
| {{ key }} | {{ value }} |
{%- endfor %}

```python
{{ snippet }}
```

The proxy ends its answers with the token `{{ end_of_answer }}`; its chat template is in this folder.

## How it was made

```bash
{{ command }}
```

With {{ versions }}. `training.json` has every setting.
"""


def save_adapter(model: PeftModel, tokenizer: PreTrainedTokenizerBase, folder: str | Path, below: str) -> None:
    """Write an adapter and its tokenizer into a folder.

    Args:
        model: the trained model.
        tokenizer: the tokenizer, with the chat template of the training.
        folder: the folder.
        below: the model that the adapter's configuration is to name as its base model.
    """
    config = model.peft_config["default"]
    config.base_model_name_or_path = below
    if isinstance(config.target_modules, set):
        config.target_modules = sorted(config.target_modules)  # the order of a set changes from run to run
    # Trained embeddings are saved by `modules_to_save`. Otherwise peft would look up the base model's configuration.
    model.save_pretrained(folder, save_embedding_layers=False)
    (Path(folder) / "README.md").unlink(missing_ok=True)  # peft's empty model card
    tokenizer.save_pretrained(folder)


def usage(base: str, proxy: str, eos_token_ids: list[int]) -> str:
    """Python code that lets an adapter guide a base and prints a greedy answer."""
    return f"""\
from transformers_kad import KADConfig, KADLogitsProcessor
from transformers_kad.integrations.loading import models, prompts
base, proxy, tokenizer = models.load_model({base!r}), models.load_model({proxy!r}), models.load_tokenizer({proxy!r})
kad = KADLogitsProcessor.from_config(proxy, KADConfig.from_pretrained({proxy!r}))
inputs = prompts.encode(tokenizer, ["Why is the sky blue?"])
ids = base.generate(**inputs, logits_processor=[kad], assistant_model=proxy, eos_token_id={eos_token_ids},
                    do_sample=False, max_new_tokens=100)
print(tokenizer.decode(ids[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True))"""


def publish(
    trainer: Trainer,
    arguments: AlignmentArguments,
    pair: Pair,
    examples: Examples,
    result: TrainingResult,
    *,
    method: str,
    command: list[str],
) -> None:
    """Write the result into the output folder, print how to use it, and upload it if requested.

    This happens in the main process only.

    Args:
        trainer: the trainer, after training.
        arguments: the arguments of the recipe.
        pair: base and proxy.
        examples: the training examples.
        result: the result of the training.
        method: a short description of the method for the model card.
        command: the command line of the run, beginning with the script.

    Raises:
        AlignmentError: the upload failed. The folder is complete nevertheless.
    """
    if not trainer.is_world_process_zero():
        return
    folder = Path(arguments.output_dir)
    model = trainer.accelerator.unwrap_model(trainer.model)
    save_adapter(model, pair.tokenizer, folder, portable_name(arguments.proxy, folder))
    name = arguments.push_to_hub or arguments.output_dir
    config = KADConfig("dual", {"threshold": arguments.threshold}, base=arguments.base, proxy=name)
    config.save_pretrained(folder)
    snippet = usage(arguments.base, name, sorted({*pair.eos_token_ids, examples.end_of_answer}))
    made = {**describe_environment(str(trainer.args.device)), "trl": trl.__version__, "datasets": datasets.__version__}
    card = model_card(arguments, pair, examples, config, result, method, command, snippet, made)
    card.save(folder / "README.md")
    record = {"finished": True, "settings": settings_of(arguments), **asdict(result), "environment": made}
    write_record(folder, record)
    delete_checkpoints(folder)
    log(f"\nWritten to {arguments.output_dir}. To use it:\n\n{snippet}\n")
    if arguments.push_to_hub:
        upload(folder, arguments.push_to_hub, private=arguments.hub_private)
        log(f"Uploaded to {arguments.push_to_hub}.")


def model_card(
    arguments: AlignmentArguments,
    pair: Pair,
    examples: Examples,
    config: KADConfig,
    result: TrainingResult,
    method: str,
    command: list[str],
    snippet: str,
    environment: dict[str, Any],
) -> ModelCard:
    """The model card: base, proxy, data, results, and the command line of the run."""
    data = {path for path in (arguments.data, arguments.eval_data) if path is not None}
    languages = (arguments.language or "").replace(",", " ").split()
    metadata = ModelCardData(
        base_model=hub_id(arguments.proxy),
        language=languages or None,
        license=arguments.license,
        datasets=sorted(path for path in data if not Path(path).exists()) or None,
        library_name="peft",
        pipeline_tag="text-generation",
        tags=["arxiv:2510.27017", "kad", "lora", "transformers-kad", "trl"],
    )
    processes = f"{result.world_size} process{'es' if result.world_size > 1 else ''}"
    skipped = ", ".join(f"{count} {reason}" for reason, count in examples.skipped.items())
    figures: dict[str, Any] = {
        "training examples": result.examples,
        "examples held out": len(examples.evaluation or ()),
        "rows skipped": skipped or "none",
        "updates": f"{result.steps} ({result.epochs:.2f} epochs, {processes})",
    }
    if result.eval_loss is not None:
        figures["held-out loss"] = f"{result.eval_loss:.4f} (before training {result.eval_loss_before:.4f})"
    launcher = ["torchrun", "--nproc_per_node", str(result.world_size)] if result.world_size > 1 else ["python"]
    return ModelCard.from_template(
        metadata,
        template_str=CARD,
        name=Path(arguments.push_to_hub or arguments.output_dir).name,
        base=arguments.base,
        proxy=arguments.proxy,
        data=arguments.data,
        method=method,
        figures=figures,
        snippet=snippet,
        rule=", ".join([config.rule, *(f"{name} {value}" for name, value in config.parameters.items())]),
        command=shlex.join([*launcher, *command]),
        end_of_answer=pair.tokenizer.convert_ids_to_tokens(examples.end_of_answer),
        versions=", ".join(f"{name} {version}" for name, version in environment.items() if name != "device"),
    )


def hub_id(name: str) -> str | None:
    """The Hub id of a model, or that of the model that a local folder was made from; None if it is not known."""
    if not Path(name).is_dir():
        return name
    below = below_adapter(name)
    if below is not None:
        return hub_id(below)
    origin = parse_json_object(Path(name, "config.json").read_bytes()).get("_name_or_path")
    is_id = isinstance(origin, str) and origin and not looks_like_path(origin) and not Path(origin).exists()
    return origin if is_id else None


def check_upload(arguments: AlignmentArguments) -> None:
    """Check before the training that the result can be uploaded, if that was requested.

    Raises:
        AlignmentError: there is no login, or the Hub can't be reached.
    """
    if arguments.push_to_hub is None:
        return
    try:
        HfApi().whoami()
    except OSError as error:
        raise AlignmentError(
            f"--push_to_hub {arguments.push_to_hub} needs a login (`hf auth login`) and the Hub: {error}"
        ) from error
    if Path(arguments.proxy).is_dir():
        log(f"Note: the proxy {arguments.proxy} is a local folder. Whoever downloads the adapter needs it as well.")


def upload(folder: Path, repo: str, *, private: bool) -> None:
    """Upload the result to a Hub repo, which is created if it is missing.

    Raises:
        AlignmentError: the upload failed; the message names a command to try again.
    """
    api = HfApi()
    try:
        api.create_repo(repo, private=private, exist_ok=True)
        api.upload_folder(
            repo_id=repo,
            folder_path=folder,
            commit_message="Upload aligned proxy",
        )
    except (OSError, HFValidationError) as error:
        raise AlignmentError(
            f"The result is in {str(folder)!r}, but could not be uploaded: {error}. Try again with "
            f"`hf upload {repo} {folder}`."
        ) from error
