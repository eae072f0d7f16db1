"""Proxies that are of no use to the tiny pair's base, to see whether the check says so."""

import argparse
import inspect
import json
import random
import textwrap
from pathlib import Path

import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from ...integrations.loading import load_tokenizer
from ...integrations.loading.reading import load_architecture
from ..benchmarking.subjects import random_model

CONTEXT = 64
VOCABULARY = 640
END = "<|end|>"


def save_random_weights(proxy: str | Path, architecture: str | Path, folder: Path, seed: int = 0) -> Path:
    """Save a model of random weights with the tokenizer of a proxy, and return the folder.

    Args:
        proxy: folder of the proxy, whose tokenizer the model gets.
        architecture: folder with the configuration of the model.
        folder: where the model is saved.
        seed: seed of the weights.
    """
    torch.manual_seed(seed)
    tokenizer = load_tokenizer(proxy)
    model = random_model(load_architecture(architecture), device="cpu")
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def save_other_family(folder: Path, *, steps: int = 200, seed: int = 0) -> Path:
    """Train a small GPT-2 with a tokenizer of its own, save both, and return the folder.

    It is trained on the source of modules of Python's standard library, and so knows the text of another kind.

    Args:
        folder: where the model is saved.
        steps: the number of training steps.
        seed: seed of the weights and the batches.
    """
    text = "\n".join(inspect.getsource(module) for module in (argparse, json, random, textwrap, inspect))
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator([text], vocab_size=VOCABULARY, special_tokens=[END], show_progress=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token=END, pad_token=END)
    ids = torch.tensor(tokenizer(text)["input_ids"])
    torch.manual_seed(seed)
    end = tokenizer.eos_token_id
    sizes = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 512, "vocab_size": VOCABULARY}
    model = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=end, eos_token_id=end, pad_token_id=end)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(steps):
        starts = torch.randint(len(ids) - CONTEXT, (16,))
        batch = torch.stack([ids[start : start + CONTEXT] for start in starts.tolist()])
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
