"""Tests of the recipe that trains the tiny pair, and of the pair that is kept beside it."""

import json
import os
import re
import shutil
import sys
from itertools import islice
from pathlib import Path

import pytest
import torch
import train_tiny_pair as recipe
from peft import PeftModel
from run_command import run_command
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer

from transformers_kad.models.by_version import CACHE
from transformers_kad.recipes import word_problems as task

ROOT = Path(__file__).resolve().parents[3]
SCRIPT = ROOT / "recipes" / "train_tiny_pair.py"

EQUATION = re.compile(r"(?<!\d)(\d+) ([+-]) (\d+) = (\d+)")
EVENT_HEAD = rf" (?:{'|'.join(task.NAMES)}) (buys|finds|gets|brings|wins|loses|sells|gives|takes|drops)"
WHOLE_EVENT = rf"{EVENT_HEAD} \d+ (?:more|more from \w+|of them|away|to \w+)\."
BROKEN_EVENT = rf"{EVENT_HEAD} \d+(?!\d| [+-])"
STORY = re.compile(rf"(?:has|owns|starts with) (\d+) \w+\.((?:{WHOLE_EVENT})*(?:{BROKEN_EVENT})?)")
EVENT = re.compile(rf"{EVENT_HEAD} (\d+)")
GAINS = {"buys", "finds", "gets", "brings", "wins"}


def equations_in(text):
    """Triples of every equation, with the result that the text claims."""
    return [((int(a), op, int(b)), int(c)) for a, op, b, c in EQUATION.findall(text)]


def story_triples_in(text):
    """Triples that the stories of a text are about, asked, answered or neither."""
    triples = []
    for story in STORY.finditer(text):
        number, events = int(story[1]), story[2]
        for verb, amount in EVENT.findall(events):
            op = "+" if verb in GAINS else "-"
            triples.append((number, op, int(amount)))
            number += int(amount) if op == "+" else -int(amount)
    return triples


# --- Splits, problems, corpus -------------------------------------------------------------------------------


def test_the_parsers_of_this_file_see_held_out_triples():
    for problem in task.make_problems("test", 200):
        assert tuple(triple for triple, _ in equations_in(problem.solution)) == problem.triples
        assert tuple(story_triples_in(problem.question)) == problem.triples


def test_the_parser_of_equations_finds_one_of_the_test_split_in_the_corpus_if_it_is_there():
    held_out = task.make_problems("test", 1)[0].solution
    text = "".join(islice(recipe.raw_documents(seed=0), 50)) + held_out
    assert "test" in {task.split_of(triple) for triple, _ in equations_in(text)}


def test_no_held_out_triple_in_the_raw_corpus():
    text = "".join(islice(recipe.raw_documents(seed=0), 8000))  # about 300,000 tokens
    equations, stories = equations_in(text), story_triples_in(text)
    assert len(equations) > 12_000
    assert len(stories) > 3_000
    assert all(task.evaluate_triple(triple) == claimed for triple, claimed in equations)
    assert {task.split_of(triple) for triple, _ in equations} == {"train"}
    assert {task.split_of(triple) for triple in stories} == {"train"}
    assert len(equations) == text.count("=")  # the parser missed none


def test_no_held_out_triple_and_right_sums_in_the_chats():
    for problem in task.make_problems("train", 4000):
        equations = equations_in(problem.solution)
        assert tuple(triple for triple, _ in equations) == problem.triples
        assert {task.split_of(triple) for triple in problem.triples} == {"train"}
        assert all(task.evaluate_triple(triple) == claimed for triple, claimed in equations)
        assert equations[-1][1] == problem.answer


def test_raw_corpus_has_no_chat_markup():
    text = "".join(islice(recipe.raw_documents(seed=0), 8000))
    assert not any(token in text for token in (task.EOS, task.PAD, task.USER, task.ASSISTANT))


# --- The pair in the repository -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pair():
    load = AutoModelForCausalLM.from_pretrained
    reference = load(recipe.PAIR_DIR / "reference")
    proxy = PeftModel.from_pretrained(load(recipe.PAIR_DIR / "reference"), recipe.PAIR_DIR / "proxy")
    tokenizer = AutoTokenizer.from_pretrained(recipe.PAIR_DIR / "base")
    return load(recipe.PAIR_DIR / "base").eval(), reference.eval(), proxy.eval(), tokenizer


def test_pair_loads_in_float32_with_one_vocabulary(pair):
    base, reference, proxy, tokenizer = pair
    for model in (base, reference, proxy):
        assert {p.dtype for p in model.parameters()} == {torch.float32}
        assert model.config.vocab_size == len(tokenizer)
        assert model.generation_config.eos_token_id == model.config.eos_token_id == tokenizer.eos_token_id
        assert model.generation_config.pad_token_id == tokenizer.pad_token_id
        assert model.config.use_cache
    other = AutoTokenizer.from_pretrained(recipe.PAIR_DIR / "proxy")
    assert other.get_vocab() == tokenizer.get_vocab()
    assert other.chat_template == tokenizer.chat_template


def test_pair_is_small_and_names_no_machine():
    files = [path for path in recipe.PAIR_DIR.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 12e6
    assert {path.name for path in recipe.PAIR_DIR.iterdir()} == {
        *("base", "reference", "proxy", "aligned", "settings.json", "README.md"),
    }
    assert not [path for path in files if path.suffix in {".bin", ".pt", ".pth"}]
    for path in files:
        found = re.search(rb"/(tmp|home|root|work|Users|mnt)/", path.read_bytes())
        assert found is None, f"{path} holds {found}"


def test_pair_was_made_with_the_settings_of_the_script():
    recorded = json.loads((recipe.PAIR_DIR / "settings.json").read_text())
    recipe.check_settings(recipe.PAIR_DIR, recipe.Settings(recorded["seed"]))


def test_generation_configs_are_plain():
    for name in ("base", "reference"):
        config = json.loads((recipe.PAIR_DIR / name / "generation_config.json").read_text())
        assert set(config) <= {"eos_token_id", "pad_token_id", "transformers_version", "_from_model_config"}


def test_adapter_names_the_reference_beside_it():
    config = json.loads((recipe.PAIR_DIR / "proxy" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "../reference"


def test_chat_template_marks_the_assistant_s_turn(pair):
    tokenizer = pair[3]
    problem = task.make_problems("train", 1)[0]
    chat = [{"role": "user", "content": problem.question}, {"role": "assistant", "content": problem.solution}]
    row = tokenizer.apply_chat_template(chat, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
    own = [token for token, mask in zip(row["input_ids"], row["assistant_masks"], strict=True) if mask]
    assert tokenizer.decode(own) == problem.solution + tokenizer.eos_token
    whole = tokenizer.apply_chat_template(chat, tokenize=False)
    prompt = tokenizer.apply_chat_template(chat[:1], tokenize=False, add_generation_prompt=True)
    assert whole.startswith(prompt)
    assert prompt.endswith("\n")


def test_a_digit_is_one_token_wherever_it_stands(pair):
    tokenizer = pair[3]
    six = tokenizer.convert_tokens_to_ids("6")
    for text in ("6", " 6", "16", "x6", "6.", "= 6\n66"):
        assert tokenizer(text)["input_ids"].count(six) == text.count("6")


def test_scores_read_what_the_tokenizer_decodes(pair):
    tokenizer = pair[3]
    problem = task.make_problems("test", 1)[0]
    ids = tokenizer(problem.solution + tokenizer.eos_token + tokenizer.pad_token)["input_ids"]
    assert task.is_correct(tokenizer.decode(ids), problem)
    assert not task.is_correct(tokenizer.decode(ids, skip_special_tokens=True), problem)


@torch.no_grad()
def sample(rule, models, tokenizer, problems, *, seed=0, length=48):
    """Token by token. `rule` makes one distribution of those of the models."""
    generator = torch.Generator().manual_seed(seed)
    chats = [[{"role": "user", "content": problem.question}] for problem in problems]
    prompts = tokenizer.apply_chat_template(chats, add_generation_prompt=True, tokenize=False)
    inputs = tokenizer(prompts, padding=True, padding_side="left", return_tensors="pt")
    ids, mask, caches, completion = inputs["input_ids"], inputs["attention_mask"], [None] * len(models), []
    finished = torch.zeros(len(ids), dtype=torch.bool)
    while len(completion) < length and not finished.all():
        positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
        outputs = [m(**inputs, **{CACHE: c}) for m, c in zip(models, caches, strict=True)]
        caches = [output.past_key_values for output in outputs]
        target = rule(*(output.logits[:, -1].softmax(-1) for output in outputs))
        ids = torch.multinomial(target, 1, generator=generator)
        ids[finished] = tokenizer.pad_token_id
        finished |= ids[:, 0] == tokenizer.eos_token_id
        mask = torch.cat([mask, torch.ones_like(ids)], 1)
        completion.append(ids)
    return tokenizer.batch_decode(torch.cat(completion, 1))


def dual(base, proxy, threshold=0.5):
    deferred = base < threshold
    return base.masked_fill(deferred, 0) + (base * deferred).sum(-1, keepdim=True) * proxy


@pytest.mark.slow
def test_pair_shows_the_effect(pair):
    base, _, proxy, tokenizer = pair
    problems = task.make_problems("test", 80)

    def accuracy(rule, models, score):
        texts = sample(rule, models, tokenizer, problems)
        return sum(map(score, texts, problems)) / len(problems)

    deferring = accuracy(dual, (base, proxy), task.is_correct)
    alone = accuracy(lambda q: q, (proxy,), task.is_correct)
    assert deferring > 0.85
    assert 0.1 < alone < deferring - 0.4
    assert accuracy(lambda p: p, (base,), task.is_correct) == 0
    assert accuracy(lambda p: p, (base,), task.is_correct_lenient) < deferring - 0.4


# --- The run ------------------------------------------------------------------------------------------------


def weights(folder):
    files = sorted(Path(folder).rglob("*.safetensors"))
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


SMOKE_STEPS = 79 + 79 + 20  # of base, reference and proxy


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """A whole run from the command line, of a copy of the script elsewhere."""
    out = tmp_path_factory.mktemp("pair") / "out"
    copy = shutil.copy(SCRIPT, out.parent)
    command = [sys.executable, str(copy), "--smoke", "--seed", "5", "--out", str(out)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    run = run_command(command, env=environment)
    assert run.returncode == 0, run.stderr
    return out


@pytest.mark.slow
def test_smoke_run_leaves_a_pair_and_nothing_else(smoke):
    assert {path.name for path in smoke.iterdir()} == {"base", "reference", "proxy", "settings.json"}
    reference = AutoModelForCausalLM.from_pretrained(smoke / "reference")
    proxy = PeftModel.from_pretrained(reference, smoke / "proxy")
    ids = torch.tensor([AutoTokenizer.from_pretrained(smoke / "proxy")("We get 12 + 7 =")["input_ids"]])
    aligned = proxy(ids).logits
    with proxy.disable_adapter():
        assert not torch.allclose(aligned, proxy(ids).logits)  # the adapter learned something
    moved = smoke.rename(smoke.with_name("moved"))  # no path of the first place is needed
    AutoModelForCausalLM.from_pretrained(moved / "base")
    moved.rename(smoke)


@pytest.mark.slow
def test_finished_run_is_left_alone(smoke, capsys):
    before = weights(smoke)
    recipe.main(["--smoke", "--seed", "5", "--out", str(smoke)])
    assert capsys.readouterr().out.count("skipped") == 3
    assert weights(smoke) == before


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # transformers warns of itself
@pytest.mark.parametrize("killed_at", [45, 170])  # in the base's training, in the proxy's
def test_killed_run_resumes_to_the_same_weights(smoke, tmp_path, monkeypatch, killed_at):
    out = tmp_path / "out"
    arguments = ["--smoke", "--seed", "5", "--out", str(out)]
    training_step, steps = Trainer.training_step, []

    def killed(self, *args, **kwargs):
        steps.append(1)
        if len(steps) == killed_at:
            raise KeyboardInterrupt
        return training_step(self, *args, **kwargs)

    def counted(self, *args, **kwargs):
        steps.append(1)
        return training_step(self, *args, **kwargs)

    monkeypatch.setattr(Trainer, "training_step", killed)
    with pytest.raises(KeyboardInterrupt):
        recipe.main(arguments)
    states = list((out / "checkpoints").rglob("checkpoint-*/trainer_state.json"))
    state = max(states, key=lambda path: int(path.parent.name.split("-")[1]))
    assert json.loads(state.read_text())["global_step"] > 0

    torn = state.parents[1] / "checkpoint-99999"  # as if it had been killed while it wrote the next one
    torn.mkdir()
    (torn / "model.safetensors").write_bytes(b"half of a")
    monkeypatch.setattr(Trainer, "training_step", counted)
    recipe.main(arguments)
    assert len(steps) < SMOKE_STEPS + 20  # it went on from the checkpoint and did not start again
    assert weights(out) == weights(smoke)
    assert not (out / "checkpoints").exists()


@pytest.mark.slow
def test_other_settings_are_refused(smoke):
    before = weights(smoke)
    with pytest.raises(SystemExit, match="seed is 5 there and 6 here"):
        recipe.main(["--smoke", "--seed", "6", "--out", str(smoke)])
    assert weights(smoke) == before


def test_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(SystemExit, match=re.escape(str(tmp_path))):
        recipe.main(["--smoke", "--out", str(tmp_path)])
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize("text", ["", "[]", "caf\udce9", "[" * 5000])
def test_settings_that_cannot_be_read_are_named(tmp_path, text):
    (tmp_path / "settings.json").write_text(text, errors="surrogateescape")
    with pytest.raises(ValueError, match=r"settings\.json' can't be used"):
        recipe.check_settings(tmp_path, recipe.Settings.smoke(0))
