"""Accepted / drafted tokens, as an `evaluate` module."""
