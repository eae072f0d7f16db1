"""Tokens per second, as an `evaluate` module."""
