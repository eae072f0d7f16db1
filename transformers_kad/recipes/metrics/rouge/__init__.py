"""ROUGE, as an `evaluate` module that needs no download."""
