"""Decoding with a KAD processor inside `generate`, token by token and speculatively."""
