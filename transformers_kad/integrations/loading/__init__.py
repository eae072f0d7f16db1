"""Models, tokenizers and prompts, for programs that are given names instead of models."""

from .models import load_model, load_tokenizer

__all__ = ["load_model", "load_tokenizer"]
