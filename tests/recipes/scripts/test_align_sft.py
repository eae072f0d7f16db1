"""Fine-tuning of the tiny reference by the recipe: what it learns and writes, how it goes on, what it refuses."""

import json
import os
import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import align_sft
import pytest
import torch
from alignment import BASE, PROXY, REFERENCE, align, chats, logits, weights, write_lines
from huggingface_hub import HfApi, ModelCard
from huggingface_hub.errors import LocalTokenNotFoundError
from peft import PeftModel
from run_command import run_command
from safetensors.torch import load_file
from tiny_models import tiny_model
from transformers import AutoTokenizer, Trainer

from transformers_kad import DualDeferral, KADConfig, KADLogitsProcessor
from transformers_kad.integrations.loading.models import below_adapter, load_model
from transformers_kad.recipes.training import AlignmentError, trainers
from transformers_kad.recipes.word_problems import EOS

SCRIPT = Path(align_sft.__file__)
LEARNING = ["--train_embeddings", "--learning_rate", "3e-3", "--batch_size", "16"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_lines(tmp_path_factory.mktemp("data") / "chats.jsonl", chats(200))


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    """One whole run: output folder, trainer, what was printed."""
    out = tmp_path_factory.mktemp("run") / "proxy"
    return out, *align(
        align_sft, data, out, *LEARNING, "--max_steps", "48", "--eval_steps", "8", "--eval_share", "0.1"
    )


# --- What a run leaves --------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_held_out_loss_falls(run):
    out, trainer, printed = run
    record = json.loads((out / "training.json").read_text())
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert record["eval_loss_before"] == losses[0] == pytest.approx(1.5, abs=0.2)  # measured: 1.61 and 0.29
    assert record["eval_loss"] < 0.6
    assert record["eval_loss"] == min(losses)
    assert losses[1] < losses[0]
    shown = [float(x) for x in re.findall(r"held-out loss ([\d.]+)$", printed, re.MULTILINE)]
    assert shown == pytest.approx(losses, abs=5e-5)
    measured = [entry["step"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert measured == [0, 8, 16, 24, 32, 40, 48]  # each once
    torch.testing.assert_close(trainer.evaluate()["eval_loss"], record["eval_loss"])  # of the adapter that was kept


@pytest.mark.slow
def test_files_of_the_result(run):
    out = run[0]
    assert {path.name for path in out.iterdir()} == {
        *("adapter_config.json", "adapter_model.safetensors", "README.md", "kad_config.json", "training.json"),
        *("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"),
    }
    adapter = json.loads((out / "adapter_config.json").read_text())
    assert adapter["base_model_name_or_path"] == REFERENCE
    assert adapter["target_modules"] == sorted(adapter["target_modules"])
    assert set(adapter["modules_to_save"]) == {"embed_tokens", "lm_head"}
    assert (adapter["r"], adapter["lora_alpha"]) == (16, 32)
    assert AutoTokenizer.from_pretrained(out).chat_template == AutoTokenizer.from_pretrained(BASE).chat_template
    config = KADConfig.from_pretrained(out)
    assert config == KADConfig("dual", {"threshold": 0.4}, base=BASE, proxy=str(out))


@pytest.mark.slow
def test_the_reloaded_adapter_is_the_trained_one_to_the_bit(run):
    out, trainer, _ = run
    trained = logits(trainer.model)
    assert torch.equal(logits(load_model(out, merge=False)), trained)
    torch.testing.assert_close(logits(load_model(out)), trained, atol=1e-4, rtol=1e-4)  # merged: other roundings
    assert not torch.allclose(logits(load_model(REFERENCE)), trained, atol=0.1)


@pytest.mark.slow
def test_the_model_card_says_what_made_it(run, data):
    out = run[0]
    card = ModelCard.load(out / "README.md")
    record = json.loads((out / "training.json").read_text())
    assert card.data.library_name == "peft"
    assert card.data.base_model is None  # a folder is no Hub id
    for shown in (
        f"| base, guided by this proxy | `{BASE}` |",
        f"| model below the adapter | `{REFERENCE}` |",
        f"| data | `{data}` |",
        "| rule in `kad_config.json` | dual, threshold 0.4 |",
        "| training examples | 180 |",
        "| examples held out | 20 |",
        "| rows skipped | none |",
        "| updates | 48 (4.00 epochs, 1 process) |",
        f"| held-out loss | {record['eval_loss']:.4f} (before training {record['eval_loss_before']:.4f}) |",
        f"python {os.path.relpath(SCRIPT)} --proxy {REFERENCE} --base {BASE} --data {data} --output_dir {out} --train",
        "https://arxiv.org/abs/2510.27017",
        f"`{EOS}`",
        *(f"{name} {version}" for name, version in record["environment"].items() if name != "device"),
    ):
        assert shown in card.content
    libraries = {"trl", "peft", "transformers", "torch", "datasets", "transformers_kad", "python", "device"}
    assert set(record["environment"]) == libraries


@pytest.mark.slow
def test_the_printed_lines_run(run, capsys):
    out, _, printed = run
    lines = printed.split("To use it:\n\n")[1].rstrip().splitlines()
    assert len(lines) == 8
    assert "\n".join(lines) in (out / "README.md").read_text()
    names = {}
    exec("\n".join(lines), names)
    answer = capsys.readouterr().out
    assert answer.strip()
    assert "Why is the sky blue?" not in answer
    for seed in (0, 1):  # nothing is drawn
        torch.manual_seed(seed)
        exec("\n".join(lines), {})
        assert capsys.readouterr().out == answer
    assert names["kad"].rule == DualDeferral(0.4)
    assert names["kad"].statistics.accepted > 0
    assert names["ids"].shape[1] > 20


@pytest.mark.slow
def test_the_proxy_ends_its_answers(run):
    """The end of the turn was learned: this is what most goes wrong with masks."""
    out = run[0]
    tokenizer = AutoTokenizer.from_pretrained(out)
    text = tokenizer.apply_chat_template(chats(1, seed=9)[0]["messages"], tokenize=False).removesuffix("\n")
    ids = tokenizer(text.removesuffix(EOS), return_tensors="pt")["input_ids"]
    aligned, plain = load_model(out), load_model(REFERENCE)
    with torch.no_grad():
        after, before = (model(ids).logits[0, -1].softmax(-1)[tokenizer.eos_token_id] for model in (aligned, plain))
    assert before < 0.01
    assert after > 0.5


@pytest.mark.slow
def test_the_loss_is_on_the_answers_only(run):
    trainer = run[1]
    tokenizer = trainer.processing_class
    rows = 0
    for batch in trainer.get_train_dataloader():
        for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True):
            learned = labels != -100
            assert torch.equal(ids[learned], labels[learned])
            text = tokenizer.decode(ids[learned])
            assert re.fullmatch(rf"We get .*The answer is \d+\.{re.escape(EOS)}", text)
            assert text.removesuffix(EOS) in {row["messages"][1]["content"] for row in chats(200)}
            rows += 1
    assert rows == 180


@pytest.mark.slow
def test_every_default_of_trl_that_would_change_the_result_is_set(run):
    settings = run[1].args
    assert (settings.bf16, settings.fp16, getattr(settings, trainers.CHECKPOINTING)) == (False, False, False)
    assert (settings.max_length, settings.packing, settings.weight_decay) == (None, False, 0.0)
    assert (settings.lr_scheduler_type, settings.report_to, settings.use_cpu) == ("cosine", [], True)


# --- The same again -----------------------------------------------------------------------------------------

SHORT = [*LEARNING, "--max_steps", "10", "--eval_steps", "3", "--lora_dropout", "0.2", "--batch_size", "4"]


@pytest.fixture(scope="module")
def short(data, tmp_path_factory):
    """A few steps, with dropout, so that the state of the random numbers matters."""
    out = tmp_path_factory.mktemp("short") / "proxy"
    align(align_sft, data, out, *SHORT)
    return out


@pytest.mark.slow
def test_killed_run_resumes_to_the_same_adapter(short, data, tmp_path, monkeypatch):
    """So two runs with one seed are equal, too."""
    out, steps, training_step = tmp_path / "proxy", [], Trainer.training_step

    def killed(self, *arguments, **settings):
        if len(steps) == 7:
            raise KeyboardInterrupt
        return counted(self, *arguments, **settings)

    def counted(self, *arguments, **settings):
        steps.append(self.state.global_step)
        return training_step(self, *arguments, **settings)

    monkeypatch.setattr(Trainer, "training_step", killed)
    with pytest.raises(KeyboardInterrupt):
        align(align_sft, data, out, *SHORT)
    torn = out / "checkpoints" / "checkpoint-9"  # as if it had been killed while it wrote the next one
    torn.mkdir()
    (torn / "adapter_model.safetensors").write_bytes(b"half of an")
    monkeypatch.setattr(Trainer, "training_step", counted)
    with pytest.raises(SystemExit, match="holds an unfinished run already"):
        align(align_sft, data, out, *SHORT)
    moved = out.rename(tmp_path / "moved")  # the checkpoints name each other
    with pytest.raises(SystemExit, match=r"best checkpoint so far, '.*checkpoint-6', was not found"):
        align(align_sft, data, moved, *SHORT, "--resume_from_checkpoint")
    moved.rename(out)
    align(align_sft, data, out, *SHORT, "--resume_from_checkpoint")
    assert steps == [0, 1, 2, 3, 4, 5, 6, 6, 7, 8, 9]  # from the checkpoint of step 6
    assert weights(out) == weights(short)
    one, two = (json.loads((folder / "training.json").read_text()) for folder in (out, short))
    for key in ("eval_loss_before", "eval_loss", "best_step", "steps", "epochs"):
        assert one[key] == two[key]
    assert not (out / "checkpoints").exists()


@pytest.mark.slow
def test_another_seed_gives_another_adapter(short, data, tmp_path):
    trainer, _ = align(align_sft, data, tmp_path / "proxy", *SHORT, "--seed", "1")
    assert (trainer.args.seed, trainer.args.data_seed) == (1, 1)
    assert weights(tmp_path / "proxy") != weights(short)


@pytest.mark.slow
def test_resuming_without_a_checkpoint_starts_from_the_beginning(short, data, tmp_path):
    align(align_sft, data, tmp_path / "proxy", *SHORT, "--resume_from_checkpoint")
    assert weights(tmp_path / "proxy") == weights(short)


@pytest.mark.slow
def test_gradient_checkpointing_changes_the_memory_not_the_result(short, data, tmp_path):
    trainer, _ = align(align_sft, data, tmp_path / "proxy", *SHORT, "--gradient_checkpointing")
    assert trainer.model.is_gradient_checkpointing
    one, two = (load_file(folder / "adapter_model.safetensors") for folder in (tmp_path / "proxy", short))
    for name, weight in one.items():
        torch.testing.assert_close(weight, two[name], atol=1e-4, rtol=1e-3)


@pytest.mark.slow
def test_early_stopping_keeps_the_best_and_its_patience_across_a_kill(data, tmp_path, monkeypatch):
    options = ["--learning_rate", "1", "--warmup_ratio", "0", "--max_steps", "40", "--eval_steps", "1"]
    options += ["--early_stopping_patience", "2"]
    trainer, _ = align(align_sft, data, tmp_path / "proxy", *options)
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    record = json.loads((tmp_path / "proxy" / "training.json").read_text())
    assert record["steps"] < 40
    assert record["steps"] - record["best_step"] == 2
    assert record["eval_loss"] == min(losses[1:]) == losses[record["best_step"]]

    training_step = Trainer.training_step

    def killed(self, *arguments, **settings):
        if self.state.global_step == record["steps"] - 1:  # after the first of the two worse ones
            raise KeyboardInterrupt
        return training_step(self, *arguments, **settings)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Trainer, "training_step", killed)
        align(align_sft, data, tmp_path / "killed", *options)
    align(align_sft, data, tmp_path / "killed", *options, "--resume_from_checkpoint")
    assert json.loads((tmp_path / "killed" / "training.json").read_text())["steps"] == record["steps"]
    assert weights(tmp_path / "killed") == weights(tmp_path / "proxy")


# --- Other proxies and templates ----------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("architecture", ["gpt2", "qwen3"])
def test_any_architecture_reloads_as_it_was_trained(data, tmp_path, architecture, tied):
    tiny_model(architecture, vocabulary=704, initializer_range=0.05, tie_word_embeddings=tied).save_pretrained(
        tmp_path / "model"
    )
    options = ["--train_embeddings", "--max_steps", "2", "--learning_rate", "3e-3", "--eval_share", "0"]
    trainer, _ = align(align_sft, data, tmp_path / "out", *options, proxy=str(tmp_path / "model"))
    assert torch.equal(logits(load_model(tmp_path / "out", merge=False)), logits(trainer.model))
    torch.testing.assert_close(logits(load_model(tmp_path / "out")), logits(trainer.model), atol=1e-5, rtol=1e-4)
    assert not torch.equal(logits(load_model(tmp_path / "model")), logits(trainer.model))
    record = json.loads((tmp_path / "out" / "training.json").read_text())
    assert (record["eval_loss"], record["eval_loss_before"]) == (None, None)
    assert "held-out" not in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.slow
def test_an_adapter_is_merged_and_built_on(data, tmp_path):
    trainer, _ = align(align_sft, data, tmp_path / "out", "--max_steps", "3", "--learning_rate", "3e-3", proxy=PROXY)
    assert below_adapter(tmp_path / "out") == PROXY
    assert torch.equal(logits(load_model(tmp_path / "out", merge=False)), logits(trainer.model))
    with trainer.model.disable_adapter():
        assert torch.equal(logits(trainer.model), logits(load_model(PROXY)))


@pytest.mark.slow
def test_a_template_from_a_file_is_trained_with_and_kept(data, tmp_path):
    template = re.sub(r"{% (end)?generation %}", "", AutoTokenizer.from_pretrained(BASE).chat_template)
    (tmp_path / "own.jinja").write_text(template)
    options = ["--max_steps", "1", "--eval_share", "0", "--chat_template", str(tmp_path / "own.jinja")]
    trainer, _ = align(align_sft, data, tmp_path / "out", *options)
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == template
    labels = trainer.train_dataset[0]["labels"]
    answer = chats(1)[0]["messages"][1]["content"]
    assert trainer.processing_class.decode([label for label in labels if label != -100]) == f"{answer}{EOS}\n"


def test_bfloat16_where_the_device_has_it(monkeypatch):
    def settings(**values):
        arguments = align_sft.SFTArguments(proxy="p", base="b", data="d", output_dir="o", **values)
        chosen = trainers.training_settings(arguments, None)
        return trainers.weight_dtype(arguments), chosen["bf16"], chosen["use_cpu"]

    assert settings() == ("float32", False, True)
    assert settings(dtype="bfloat16") == ("bfloat16", False, True)
    monkeypatch.setattr(trainers, "on_cpu", lambda arguments: arguments.use_cpu)
    monkeypatch.setattr(trainers, "is_torch_bf16_gpu_available", lambda: True)
    assert settings() == ("bfloat16", True, False)
    assert settings(train_embeddings=True) == ("float32", True, False)  # peft would train them in bfloat16
    assert settings(dtype="float32") == ("float32", False, False)
    assert settings(use_cpu=True) == ("float32", False, True)
    monkeypatch.setattr(trainers, "is_torch_bf16_gpu_available", lambda: False)
    assert settings() == ("float32", False, False)
    with pytest.raises(AlignmentError, match="--train_embeddings needs weights in float32"):
        settings(train_embeddings=True, dtype="bfloat16")


# --- What is refused ----------------------------------------------------------------------------------------


@pytest.fixture
def no_weights(monkeypatch):
    """Loading a model fails the test: everything must be found out before."""

    def load(*arguments, **settings):
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(trainers, "load_merged", load)


def refused(data, out, *options, **settings):
    with pytest.raises(SystemExit) as error:
        align(align_sft, data, out, *options, **settings)
    assert not (Path(out) / "training.json").exists() or settings
    return str(error.value)


@pytest.mark.usefixtures("no_weights")
def test_wrong_data_is_found_before_weights_are_loaded(tmp_path):
    rows = chats(30)
    rows[11] = {"messages": [{"role": "user", "content": "Why?"}]}
    data = write_lines(tmp_path / "chats.jsonl", rows)
    message = refused(data, tmp_path / "out")
    assert message.startswith("error: ")
    assert f"{data} cannot be used" in message
    assert "line 12: there is no assistant's turn to learn from" in message
    assert "There is no file" in refused(str(tmp_path / "no.jsonl"), tmp_path / "out")
    Path(data).write_text("")
    assert f"{data} is empty" in refused(data, tmp_path / "out")
    Path(data).write_text('{"messages": [\n')
    assert "line 1: " in refused(data, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("no_weights")
def test_a_proxy_that_cannot_serve_is_found_before_weights_are_loaded(data, tmp_path):
    proxy = tmp_path / "proxy"
    shutil.copytree(REFERENCE, proxy)
    tokenizer = json.loads(Path(BASE, "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["Ġa"], vocabulary["Ġb"] = vocabulary["Ġb"], vocabulary["Ġa"]
    (proxy / "tokenizer.json").write_text(json.dumps(tokenizer))
    shutil.copy(Path(BASE, "tokenizer_config.json"), proxy)
    message = refused(data, tmp_path / "out", proxy=str(proxy))
    assert "2 token ids mean different strings (base and proxy)" in message
    assert f"{vocabulary['Ġb']}: 'Ġa' and 'Ġb'" in message


@pytest.mark.usefixtures("no_weights")
def test_a_missing_chat_template(data, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(BASE, base)
    (base / "chat_template.jinja").unlink()
    assert "--chat_template FILE" in refused(data, tmp_path / "out", "--base", str(base))


@pytest.mark.slow
def test_a_folder_with_a_result_is_left_alone(short, data, monkeypatch):
    before = {path.name: path.read_bytes() for path in short.iterdir()}
    monkeypatch.setattr(trainers, "load_merged", None)
    message = refused(data, short, *SHORT, proxy=REFERENCE)
    assert "holds a result already. Continue it by --resume_from_checkpoint, or choose another folder" in message
    again = [*SHORT, "--resume_from_checkpoint"]
    message = refused(data, short, *again, "--seed", "3", proxy=REFERENCE)
    assert "can't be continued with other settings (seed was 0 and is 3)" in message
    _, printed = align(align_sft, data, short, *again)
    assert printed == f"The run in {short} has already finished.\n"
    assert {path.name: path.read_bytes() for path in short.iterdir()} == before


@pytest.mark.usefixtures("no_weights")
def test_a_folder_of_something_else_is_left_alone(data, tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    for options in ([], ["--resume_from_checkpoint"]):
        assert "holds files that are not those of a run of this recipe" in refused(data, tmp_path, *options)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]
    assert "is not a complete checkpoint" in refused(data, tmp_path / "a", "--resume_from_checkpoint", str(tmp_path))


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("batch_size", 0, "--batch_size must be at least 1, got 0"),
        ("lora_rank", 0, "--lora_rank must be at least 1"),
        ("eval_share", 1.0, "--eval_share must be below 1, got 1.0"),
        ("eval_share", -0.1, "--eval_share must be at least 0"),
        ("warmup_ratio", 2.0, "--warmup_ratio must be below 1"),
        ("epochs", 0.0, "--epochs must be positive"),
        ("learning_rate", -1e-3, "--learning_rate must be positive"),
        ("eval_steps", 2.5, "--eval_steps of 1 or more must be a whole number of updates, got 2.5"),
        ("threshold", 0.0, r"--threshold must lie in \(0, 1\]"),
        ("max_steps", 0, "--max_steps must be positive, or -1"),
        ("max_length", 1, "--max_length must be at least 2"),
    ],
)
def test_values_out_of_range(option, value, message, capsys):
    with pytest.raises(AlignmentError, match=message):
        align_sft.SFTArguments(proxy="p", base="b", data="d", output_dir="o", **{option: value})
    with pytest.raises(SystemExit, match="2"):
        align_sft.main(["--proxy", "p", "--base", "b", "--data", "d", "--output_dir", "o", f"--{option}", str(value)])
    assert re.search(f"error: {message}", capsys.readouterr().err)


@pytest.mark.parametrize("sharding", ["is_fsdp_enabled", "is_deepspeed_enabled"])
def test_sharded_training_is_refused(sharding):
    trainer = SimpleNamespace(**{"is_fsdp_enabled": False, "is_deepspeed_enabled": False, sharding: True})
    with pytest.raises(AlignmentError, match="without FSDP and DeepSpeed"):
        trainers.fit(trainer, None, None)


def test_help_can_be_read(capsys):
    with pytest.raises(SystemExit, match="0"):
        align_sft.main(["--help"])
    out = capsys.readouterr().out
    assert str(align_sft.__doc__).splitlines()[2] in out  # laid out as written
    assert "--proxy ID_OR_DIR" in out
    assert "(default: None)" not in out
    for name in align_sft.SFTArguments.__dataclass_fields__:
        assert f"--{name}" in out


# --- The Hub ------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(monkeypatch):
    """The Hub's calls, recorded."""
    calls = []

    def record(name, result=None):
        def call(self, *arguments, **settings):
            if name == "upload_folder":
                settings["files"] = sorted(path.name for path in Path(settings["folder_path"]).iterdir())
            calls.append((name, arguments, settings))
            return result

        monkeypatch.setattr(HfApi, name, call)

    for name in ("whoami", "create_repo", "upload_folder"):
        record(name)
    return calls


@pytest.mark.slow
def test_the_result_is_uploaded(data, tmp_path, hub):
    out = tmp_path / "proxy"
    options = ["--push_to_hub", "me/my-proxy", "--hub_private", "--max_steps", "1", "--eval_share", "0"]
    _, printed = align(align_sft, data, out, *options)
    names = [name for name, _, _ in hub]
    assert names == ["whoami", "create_repo", "upload_folder"]
    assert hub[1][1:] == (("me/my-proxy",), {"private": True, "exist_ok": True})
    upload = hub[2][2]
    assert (upload["repo_id"], upload["folder_path"]) == ("me/my-proxy", out)
    assert upload["files"] == sorted(path.name for path in out.iterdir())
    assert "adapter_model.safetensors" in upload["files"]
    assert KADConfig.from_pretrained(out).proxy == "me/my-proxy"
    assert "models.load_model('me/my-proxy')" in (out / "README.md").read_text()
    assert "Note: the proxy" in printed  # it is a folder here, which nobody else has
    assert "Uploaded to me/my-proxy." in printed


@pytest.mark.usefixtures("no_weights")
def test_nobody_logged_in_is_found_before_the_training(data, tmp_path, monkeypatch):
    def whoami(self):
        raise LocalTokenNotFoundError("no token")

    monkeypatch.setattr(HfApi, "whoami", whoami)
    message = refused(data, tmp_path / "out", "--push_to_hub", "me/my-proxy")
    assert "--push_to_hub me/my-proxy needs a login (`hf auth login`) and the Hub: no token" in message


@pytest.mark.slow
@pytest.mark.usefixtures("hub")
def test_a_failed_upload_loses_nothing(data, tmp_path, monkeypatch):
    def upload_folder(self, **settings):
        raise OSError("the line is down")

    monkeypatch.setattr(HfApi, "upload_folder", upload_folder)
    out = tmp_path / "proxy"
    with pytest.raises(SystemExit, match=f"could not be uploaded: the line is down.*hf upload me/p {out}"):
        align(align_sft, data, out, "--push_to_hub", "me/p", "--max_steps", "1", "--eval_share", "0")
    assert json.loads((out / "training.json").read_text())["finished"]
    load_model(out)


# --- Elsewhere, and several processes -----------------------------------------------------------------------

ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


@pytest.fixture
def elsewhere(tmp_path):
    """A folder with a copy of the recipe, the models and data, all named relative to it."""
    for source, name in ((SCRIPT, "align_sft.py"), (BASE, "models/base"), (REFERENCE, "models/small")):
        target = tmp_path / name
        target.parent.mkdir(exist_ok=True)
        (shutil.copytree if Path(source).is_dir() else shutil.copy)(source, target)
    write_lines(tmp_path / "chats.jsonl", chats(200))
    command = [sys.executable, "align_sft.py", "--proxy", "models/small", "--base", "models/base"]
    return tmp_path, [*command, "--data", "chats.jsonl", "--output_dir", "out/proxy", *LEARNING, "--eval_share", "0.1"]


@pytest.mark.slow
def test_a_copied_file_works_with_relative_folders(elsewhere, tmp_path):
    folder, command = elsewhere
    run = run_command([*command, "--max_steps", "2"], cwd=folder, env=ENVIRONMENT)
    assert run.returncode == 0, run.stderr
    out = folder / "out" / "proxy"
    assert json.loads((out / "adapter_config.json").read_text())["base_model_name_or_path"] == "../../models/small"
    assert isinstance(load_model(out, merge=False), PeftModel)  # from the folder of these tests
    for path in out.iterdir():
        assert str(tmp_path).encode() not in path.read_bytes()
    lines = run.stdout.split("To use it:\n\n")[1]
    used = run_command([sys.executable, "-c", lines], cwd=folder, env=ENVIRONMENT)
    assert used.returncode == 0, used.stderr
    assert "it/s" not in run.stderr  # no progress bar without a terminal
    assert [line.split(",")[0] for line in run.stderr.splitlines() if " steps " in line] == [
        "1 of 2 steps (50%)",
        "2 of 2 steps (100%)",
    ]


@pytest.mark.slow
def test_two_processes_train_one_adapter(elsewhere, base_model, data):
    folder, command = elsewhere
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", *command[1:]]
    learning = ["--batch_size", "8", "--max_steps", "6", "--eval_steps", "2"]
    run = run_command([*launch, *learning], cwd=folder, env=ENVIRONMENT)
    assert run.returncode == 0, run.stderr[-3000:]
    out = folder / "out" / "proxy"
    record = json.loads((out / "training.json").read_text())
    assert record["world_size"] == 2
    assert run.stdout.count("180 training examples") == 1  # only one of them speaks
    assert run.stdout.count("To use it:") == 1

    # Two processes with batches of 8 are one with batches of 16: otherwise each would train for itself.
    align(align_sft, data, folder / "one", *LEARNING, "--eval_share", "0.1", "--max_steps", "6", "--eval_steps", "2")
    one, two = (load_file(path / "adapter_model.safetensors") for path in (folder / "one", out))
    largest = max(float((one[name] - two[name]).abs().max()) for name in one)
    moved = max(float(two[name].abs().max()) for name in two if "lora_B" in name)  # they start at 0
    assert moved > 1e-3
    assert largest < 1e-2 * moved

    proxy = load_model(out, merge=False)
    assert isinstance(proxy, PeftModel)
    assert not torch.allclose(logits(proxy), logits(load_model(REFERENCE)), atol=0.1)
    kad = KADLogitsProcessor(proxy, DualDeferral(0.6))
    prompt = AutoTokenizer.from_pretrained(out).apply_chat_template(
        chats(1, seed=4)[0]["messages"][:1], add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )
    ids = base_model.generate(**prompt, logits_processor=[kad], do_sample=False, max_new_tokens=12, top_k=None)
    alone = base_model.generate(**prompt, do_sample=False, max_new_tokens=12, top_k=None)
    assert not torch.equal(ids, alone)
    assert kad.statistics.deferral_mass > 0.01


@pytest.fixture
def base_model():
    return load_model(BASE)


@pytest.mark.slow
def test_several_processes_report_an_error_once(elsewhere):
    folder, command = elsewhere
    (folder / "chats.jsonl").write_text("oops\n")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", *command[1:]]
    run = run_command(launch, cwd=folder, env=ENVIRONMENT)
    assert run.returncode != 0
    assert run.stderr.count("error: chats.jsonl is not a JSON Lines file") == 1
    assert not (folder / "out").exists()
