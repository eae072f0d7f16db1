"""Models, tokenizers and prompts, for programs that are given names instead of models."""
