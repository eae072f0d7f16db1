"""Accepted draft tokens a round and their histogram, as an `evaluate` module."""
