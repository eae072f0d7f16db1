# /// script
# requires-python = ">=3.11"
# dependencies = ["transformers-kad[train]", "tqdm"]
# ///
"""Train a tiny base and a tiny proxy from scratch, with which the effect of KAD can be seen on a CPU.

    python recipes/train_tiny_pair.py --out my_pair              # 10 to 15 minutes on 2 CPU cores
    python recipes/train_tiny_pair.py --out smoke_pair --smoke   # under a minute, only to test the code

Three Llamas with the same vocabulary learn addition and subtraction up to 99, mostly from word problems of one or two
steps. All data is generated from a seed. An interrupted run continues when it is started again.

- The *base* (3 layers x 96, 0.48 M parameters) is trained on a raw corpus: equations, stories with their working in
  many styles, questions without answers, and prose. It knows the arithmetic, but never saw a chat or an end of
  sequence.
- The *reference* (3 layers x 64, 0.2 M) is trained on less of the same corpus and is weak at the arithmetic.
- The *proxy* is the reference with a LoRA adapter that is trained on chats, with the loss on the assistant's turn, by
  the steps of `align_sft.py`. It answers "We get 12 + 7 = 19. The answer is 19." and stops, but the number is often
  wrong.

A tenth of the arithmetic never occurs in a training text. The MD5 hash of a fact family (a + b = c, b + a = c,
c - a = b, c - b = a) assigns it to the train (90 %), validation (5 %) or test split (5 %), and all steps of a problem
belong to the split of the problem.

Result
------
`run_eval.py` on 500 problems of the test split, sampled at temperature 1 without top-k and top-p, with each rule at
its best parameter on 300 problems of the validation split (`results/tiny_pair/` has all results and the paired tests).
*strict* is `is_correct` (the phrase, the number and the end of sequence), and *lenient* is
`is_correct_lenient` (the number after the last "=" of the first line).

    rule                        strict   lenient
    base alone                  0.000    0.008
    proxy alone                 0.350    0.354
    nudging 0.7                 0.786    0.798
    primal 0.95                 0.446    0.730
    dual 0.7                    0.936    0.936
    confidence bet 0.1          0.948    0.950
    implicit reward 2.0         0.898    0.898   (a third model)

The test problems share 496 triples, so they are not quite independent. The base scores 0 although it knows the
arithmetic: it completes nearly all held-out equations correctly in the raw format, but does not know that it should
answer.

The pair demonstrates a mechanism and is not a benchmark. Two properties of the data determine the results. First, the
base's knowledge concerns few tokens (digits) and the proxy's knowledge others (format), so a choice at each token can
combine both. Second, documents of the raw corpus end after any word with a probability of 2 % (`BREAK_OFF`), as
scraped text does, so the base has a small tail of unlikely tokens at every position. At temperature 1 the dual rule
defers that tail. Nudging keeps or replaces the base's distribution as a whole, and therefore samples from the tail. In
an earlier version, without documents that end early and with another base and reference, the two rules hardly
differed: 0.035 +- 0.049 over 200 problems. With greedy decoding the rules hardly differ either, so the comparison
needs sampling.

Lessons
-------
- Hold out by a hash of the fact family. An equation that can be derived from b + a or c - b shows no generalisation.
- A digit is always one token, separate from the space before it. Otherwise "6" and " 6" are two digits to learn.
- The generation prompt ends in a newline, which the base knows, and not in a token that it has never seen.
- Separators vary within documents. With a newline after every answer the base would prefer it to the end of sequence.
- A reference of 2 layers and 2 heads did not learn to copy the second number of a story within 3 M tokens. Its proxy
  was right 1 time in 100, and the dual rule fell to 0.85: a proxy must be right where the base defers to it. 3 layers
  and 4 heads learn it with 2.5 M tokens, and still get the last digit wrong.
- Muon is used because AdamW is too slow here. After the same 2.5 M tokens the reference with Muon gets 49 % of the
  held-out equations right and copies both numbers of a story 49 % of the time. With AdamW it gets 15 % and never
  copies both at a learning rate of 3e-3 (7 % at 8e-3).

Measured on 2 CPU cores with one thread (`OMP_NUM_THREADS=1`) and torch 2.13: 9 minutes of CPU time and 13.5 minutes of
wall-clock time beside other work (base 7, reference 3, proxy 2). A second run gave bitwise equal weights. Another
number of threads or another CPU rounds differently, which gives other weights of the same quality.
"""

import json
import random
import re
import shutil
import sys
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import torch

from transformers_kad.recipes.command_line import parse_arguments
from transformers_kad.recipes.resumable import describe_differences
from transformers_kad.recipes.training.arguments import AlignmentArguments, silence_training_libraries
from transformers_kad.recipes.training.checks import check_pair
from transformers_kad.recipes.training.data import load_examples
from transformers_kad.recipes.training.output import checkpoint_to_resume, newest_checkpoint
from transformers_kad.recipes.training.publishing import save_adapter
from transformers_kad.recipes.training.trainers import fit, report_progress, sft_trainer
from transformers_kad.recipes.word_problems import (
    ASSISTANT,
    EOS,
    NAMES,
    PAD,
    USER,
    ask,
    draw_story,
    equation,
    make_problems,
    triples_of,
)
from transformers_kad.utils.files import write_whole
from transformers_kad.utils.strict_json import parse_json_object

# isort: split
# These imports follow transformers_kad, which suppresses the messages of torchao.
from peft import PeftModel
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    default_data_collator,
    set_seed,
)

PAIR_DIR = Path(__file__).resolve().parent / "tiny_pair"

# --- The raw corpus, on which base and reference are trained ------------------------------------------------

SEPARATORS = ("\n", "\n", "\n\n", " ", " ", "  ", " \n", "\n- ", "\n* ", " | ", " / ", " -- ", "\n\n\n")
LIST_SEPARATORS = (
    *(", ", "; ", "\n", " | ", " and ", ". ", " / ", "\n- ", "\n* ", " ", " or ", ", so ", " while ", ".\n"),
)
LEAD_INS = (
    *("We get ", "We have ", "We find ", "We see ", "We write ", "So ", "So we have ", "Now ", "Then "),
    *("Here ", "This is ", "This gives ", "This makes ", "That is ", "That gives ", "Count: ", "Work: "),
    *("Note: ", "Look: ", "One finds ", "It is clear that ", "In numbers, ", "On paper: ", "In short, "),
    *("Well, ", "Hence ", "", "", ""),
)
LINKS = (
    *(". Then ", ". Then ", ", then ", " and then ", ". Next ", "; ", ", ", ". After that "),
    *(". So ", ". Now ", "\n"),
)
TAILS = (
    *("", "", ".", ".", "!", ";", "\n", ", done.", " in all.", ", as it should be.", ". That is that."),
    *(". {name} has {c} {items}.", ". {c} {items} now.", ". So {name} has {c} now.", ", so {c} {items}."),
    *(". The answer is {c}.", ". The answer is {c}", ". The result is {c}.", ". The number is {c}."),
    *(". There are {c} {items}.", ". That makes {c}.", ". It is {c}.", ". {name} counts {c}."),
    ". In the end {c}.",
)
SUBJECTS = (*(*NAMES, "The cat", "The old man", "A boat", "The rain", "Nobody", "The teacher", "A bird", "The shop"),)
VERBS = (
    *(
        "sees",
        "likes",
        "follows",
        "forgets",
        "paints",
        "hides",
        "carries",
        "hears",
        "wants",
        "opens",
        "leaves",
    ),
)
OBJECTS = (
    *("the door", "a letter", "the river", "a song", "the hill", "some tea", "the garden", "a lamp"),
    "the road",
)
ADVERBS = (
    *("", " again", " today", " at night", " in spring", " slowly", " without a word", " by the sea"),
    " for once",
)
TOLD_AS_QUESTION = 0.7  # share of the worked stories that ask first
BREAK_OFF = 0.02  # chance that a document ends after a word: see the docstring of the module


def _equations(rng: random.Random) -> str:
    """A list of equations with random separators."""
    parts = []
    for _ in range(rng.randint(3, 12)):
        parts += [equation(rng.choice(triples_of("train")[0])), rng.choice(LIST_SEPARATORS)]
    return "".join(parts[:-1])


def _worked_story(rng: random.Random) -> str:
    """A story with or without its question, and its working in one of many styles."""
    story = draw_story(rng, "train")
    told = ask(rng, story) if rng.random() < TOLD_AS_QUESTION else story.telling
    working = equation(story.triples[0])
    for triple in story.triples[1:]:
        working += rng.choice(LINKS) + equation(triple)
    tail = rng.choice(TAILS).format(name=story.name, items=story.items, c=story.result)
    return told + rng.choice(SEPARATORS) + rng.choice(LEAD_INS) + working + tail


def _exercises(rng: random.Random) -> str:
    """Questions without answers."""
    count = rng.randint(1, 3)
    return "".join(ask(rng, draw_story(rng, "train")) + rng.choice(SEPARATORS) for _ in range(count))


def _prose(rng: random.Random) -> str:
    """Random sentences without arithmetic."""
    words = (SUBJECTS, VERBS, OBJECTS, ADVERBS)
    sentences = ("{} {} {}{}.".format(*map(rng.choice, words)) for _ in range(rng.randint(1, 4)))
    return " ".join(sentences)


def _broken_off(rng: random.Random, text: str) -> str:
    """`text`, truncated after each word with the probability `BREAK_OFF`, but never after "+", "-" or "="."""
    for space in re.finditer("(?<![-+=]) ", text):
        if rng.random() < BREAK_OFF:
            return text[: space.start()]
    return text


def raw_documents(seed: int = 0) -> Iterator[str]:
    """The infinite raw corpus: documents with the separators that follow them.

    There is no chat markup and no end of sequence. Equations and stories only have triples of the train split.
    """
    rng = random.Random(f"corpus {seed}")
    kinds = (_equations, _worked_story, _exercises, _prose)
    while True:
        (kind,) = rng.choices(kinds, weights=(20, 55, 10, 15))
        yield _broken_off(rng, kind(rng)) + rng.choice(SEPARATORS)


# --- Tokenizer and token blocks -----------------------------------------------------------------------------

# The generation prompt ends in a newline, since the base knows newlines but not the tokens of the roles.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}"
    f"{{{{ '{ASSISTANT}\\n' }}}}"
    f"{{% generation %}}{{{{ message['content'] + '{EOS}' }}}}{{% endgeneration %}}"
    "{{ '\\n' }}"
    "{% else %}"
    f"{{{{ '{USER}\\n' + message['content'] + '\\n' }}}}"
    "{% endif %}"
    "{% endfor %}"
    f"{{% if add_generation_prompt %}}{{{{ '{ASSISTANT}\\n' }}}}{{% endif %}}"
)


def train_tokenizer(vocab_size: int, seed: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer. Each digit is a token, separate from the space before it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers  # noqa: PLC0415

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, EOS, USER, ASSISTANT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    documents = raw_documents(seed)
    tokenizer.train_from_iterator((next(documents) for _ in range(5000)), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=EOS,
        pad_token=PAD,
        additional_special_tokens=[USER, ASSISTANT],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        padding_side="left",
    )


def raw_blocks(tokenizer: PreTrainedTokenizerFast, tokens: int, length: int, seed: int) -> list[dict]:
    """The first `tokens` tokens of the raw corpus, in blocks of `length` that documents may straddle."""
    from tqdm.auto import tqdm  # noqa: PLC0415

    ids: list[int] = []
    documents = raw_documents(seed)
    with tqdm(total=tokens, desc="raw corpus", unit="token", unit_scale=True, disable=None) as progress:
        while len(ids) < tokens:
            text = "".join(next(documents) for _ in range(500))
            new = tokenizer(text)["input_ids"]
            ids += new
            progress.update(len(new))
    blocks = torch.tensor(ids[: tokens // length * length]).view(-1, length)
    return [{"input_ids": block, "labels": block} for block in blocks]


# --- Training -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shape:
    """The size of a Llama, and the number of raw tokens that it is trained on."""

    layers: int
    width: int
    mlp: int
    heads: int
    tokens: int


@dataclass(frozen=True)
class Settings:
    """The settings that determine the result. They are stored beside it, and compared when a run is continued."""

    seed: int
    vocab_size: int = 640
    block: int = 128
    batch: int = 32
    muon_lr: float = 0.02
    adam_lr: float = 3e-3
    base: Shape = field(default=Shape(layers=3, width=96, mlp=288, heads=3, tokens=5_000_000))
    reference: Shape = field(default=Shape(layers=3, width=64, mlp=128, heads=4, tokens=2_500_000))
    chats: int = 6000
    chat_epochs: int = 4
    chat_lr: float = 3e-3
    chat_warmup: float = 0.02
    lora_rank: int = 16

    @classmethod
    def smoke(cls, seed: int) -> "Settings":
        tiny = Shape(layers=1, width=32, mlp=64, heads=1, tokens=80_000)
        return cls(seed, batch=8, base=tiny, reference=tiny, chats=160, chat_epochs=1)


class Muon(torch.optim.Optimizer):
    """Muon for the hidden matrices, AdamW for everything else, in float32.

    Source: Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks",
    https://kellerjordan.github.io/posts/muon/. The momentum of a matrix is replaced by the nearest orthogonal
    matrix, found by five Newton-Schulz steps. Matrices of one shape go through them together.
    """

    def __init__(self, model: torch.nn.Module, muon_lr: float, adam_lr: float):
        hidden: dict[torch.Size, list] = defaultdict(list)
        others: list[torch.nn.Parameter] = []
        for name, p in model.named_parameters():
            (hidden[p.shape] if name.endswith("proj.weight") else others).append(p)
        groups: list[dict] = [{"params": same, "lr": muon_lr, "muon": True} for same in hidden.values()]
        groups.append({"params": others, "lr": adam_lr, "muon": False})
        super().__init__(groups, {"momentum": 0.95, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.01})

    @staticmethod
    def orthogonalise(matrices: torch.Tensor) -> torch.Tensor:
        """Newton-Schulz: singular values go to about 1. Shape (n, rows, columns)."""
        tall = matrices.shape[1] > matrices.shape[2]
        x = matrices.mT if tall else matrices
        x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
        for _ in range(5):
            gram = x @ x.mT
            x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
        return x.mT if tall else x

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # Trainer passes no closure
        for group in self.param_groups:
            (self._muon_step if group["muon"] else self._adam_step)(group)

    def _muon_step(self, group: dict) -> None:
        updates = []
        for p in group["params"]:
            momentum = self.state[p].setdefault("momentum", torch.zeros_like(p))
            momentum.lerp_(p.grad, 1 - group["momentum"])
            updates.append(p.grad.lerp(momentum, group["momentum"]))
        directions = self.orthogonalise(torch.stack(updates))
        rows, columns = directions.shape[1:]
        for p, direction in zip(group["params"], directions, strict=True):
            p.mul_(1 - group["lr"] * group["weight_decay"])
            p.add_(direction, alpha=-group["lr"] * max(1, rows / columns) ** 0.5)

    def _adam_step(self, group: dict) -> None:
        beta1, beta2 = group["betas"]
        for p in group["params"]:
            state = self.state[p]
            if not state:
                state.update(step=0, mean=torch.zeros_like(p), square=torch.zeros_like(p))
            state["step"] += 1
            state["mean"].lerp_(p.grad, 1 - beta1)
            state["square"].lerp_(p.grad.square(), 1 - beta2)
            mean = state["mean"] / (1 - beta1 ** state["step"])
            square = state["square"] / (1 - beta2 ** state["step"])
            p.mul_(1 - group["lr"] * group["weight_decay"])
            p.sub_(group["lr"] * mean / (square.sqrt() + group["eps"]))


def fit_raw(model: PreTrainedModel, rows: list[dict], work: Path, settings: Settings) -> None:
    """Train one epoch with `Trainer`, with checkpoints in `work`, and continue from the last one."""
    steps = max(1, len(rows) // settings.batch)
    arguments = TrainingArguments(
        output_dir=str(work),
        num_train_epochs=1,
        per_device_train_batch_size=settings.batch,
        lr_scheduler_type="cosine",
        warmup_steps=steps // 50,
        max_grad_norm=1.0,
        save_steps=max(1, steps // 10),
        save_total_limit=1,
        logging_steps=max(1, steps // 20),
        report_to="none",
        disable_tqdm=not sys.stderr.isatty(),
        seed=settings.seed,
        use_cpu=True,
    )
    trainer = Trainer(
        model,
        arguments,
        train_dataset=rows,
        data_collator=default_data_collator,
        optimizers=(Muon(model, settings.muon_lr, settings.adam_lr), None),
    )
    report_progress(trainer)
    trainer.train(resume_from_checkpoint=newest_checkpoint(work))


def train_raw(shape: Shape, tokenizer: PreTrainedTokenizerFast, work: Path, settings: Settings) -> LlamaForCausalLM:
    """Train a Llama with random initial weights on the raw corpus."""
    set_seed(settings.seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=shape.width,
            intermediate_size=shape.mlp,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
            max_position_embeddings=512,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    rows = raw_blocks(tokenizer, shape.tokens, settings.block, settings.seed)
    fit_raw(model, rows, work, settings)
    model.config.use_cache = True  # Trainer switched it off
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    return model


def train_proxy(out: Path, tokenizer: PreTrainedTokenizerFast, work: Path, settings: Settings) -> PeftModel:
    """Train a LoRA adapter for the reference on chats, by the steps of `align_sft.py`.

    Embeddings and head learn too: the chat markup is new.
    """
    work.mkdir(parents=True, exist_ok=True)
    chats = work / "chats.jsonl"
    with chats.open("w", encoding="utf-8") as lines:
        for problem in make_problems("train", settings.chats, settings.seed):
            print(json.dumps({"prompt": problem.question, "completion": problem.solution}), file=lines)
    arguments = AlignmentArguments(
        proxy=str(out / "reference"),
        base=str(out / "base"),
        data=str(chats),
        output_dir=str(work),
        eval_share=0,
        epochs=settings.chat_epochs,
        learning_rate=settings.chat_lr,
        warmup_ratio=settings.chat_warmup,
        batch_size=settings.batch,
        lora_rank=settings.lora_rank,
        lora_alpha=2 * settings.lora_rank,
        train_embeddings=True,
        use_cpu=True,
        seed=settings.seed,
        resume_from_checkpoint="auto",
    )
    pair = check_pair(arguments.base, arguments.proxy)
    trainer = sft_trainer(arguments, pair, load_examples(arguments, pair))
    fit(trainer, arguments, checkpoint_to_resume(arguments))
    return trainer.model


# --- The run ------------------------------------------------------------------------------------------------


@dataclass
class PairArguments:
    """The command-line arguments."""

    out: Path = field(default=PAIR_DIR, metadata={"help": "Folder for base/, reference/ and proxy/."})
    smoke: bool = field(
        default=False, metadata={"help": "Train tiny models in under a minute, only to test the code."}
    )
    seed: int = field(default=0, metadata={"help": "Seed of data, initial weights and order."})


def check_settings(out: Path, settings: Settings) -> None:
    """Write the settings into `out`, or compare them with those of the run that is already there."""
    record = out / "settings.json"
    wanted = asdict(settings)
    if record.exists():
        try:
            found = parse_json_object(record.read_bytes())
        except ValueError as error:
            raise ValueError(f"{str(record)!r} can't be used: {error}. Choose another --out.") from error
        listed = describe_differences(found, json.loads(json.dumps(wanted)))
        if listed:
            raise ValueError(f"{out} holds a pair made with other settings ({listed}). Choose another --out.")
    elif out.is_dir() and any(out.iterdir()):
        raise ValueError(f"{out} is not empty and has no pair of this recipe. Choose another --out.")
    else:
        out.mkdir(parents=True, exist_ok=True)
        write_whole(record, json.dumps(wanted, indent=2) + "\n")


def finish(
    stage: Path, work: Path, model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerFast | None
) -> None:
    """Save the result of a stage atomically, and delete its checkpoints."""
    new = work / "finished"
    shutil.rmtree(new, ignore_errors=True)
    if isinstance(model, PeftModel):
        save_adapter(model, tokenizer, new, below="../reference")
    else:
        model.save_pretrained(new)
        if tokenizer is not None:
            tokenizer.save_pretrained(new)
    for path in new.iterdir():
        path.chmod(0o644)
    new.replace(stage)
    shutil.rmtree(work)


def run(out: Path, settings: Settings) -> None:
    """Run all stages, except those whose folder exists."""
    checkpoints = out / "checkpoints"
    tokenizer = train_tokenizer(settings.vocab_size, settings.seed)
    stages = {
        "base": (partial(train_raw, settings.base), tokenizer),
        "reference": (partial(train_raw, settings.reference), None),
        "proxy": (partial(train_proxy, out), tokenizer),
    }
    for name, (train, saved_tokenizer) in stages.items():
        if (out / name).is_dir():
            print(f"{name}: already there, skipped")
            continue
        print(f"{name}: training")
        work = checkpoints / name
        finish(out / name, work, train(tokenizer, work, settings), saved_tokenizer)
    shutil.rmtree(checkpoints, ignore_errors=True)


def main(arguments: list[str] | None = None) -> None:
    """Parse the command line and run."""
    (options,) = parse_arguments([PairArguments], __doc__, arguments)
    silence_training_libraries()
    settings = Settings.smoke(options.seed) if options.smoke else Settings(options.seed)
    try:
        check_settings(options.out, settings)
    except ValueError as error:
        sys.exit(f"error: {error}")
    run(options.out, settings)


if __name__ == "__main__":
    main()
