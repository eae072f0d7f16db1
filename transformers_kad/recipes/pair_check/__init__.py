"""Tells from unlabelled prompts whether a base and a proxy will work together, and with which rule to start.

The steps of `recipes/check_pair.py`: `arguments` (the command line), `prompts`, `compatibility` (tokenizers, ends of
turns and chat templates), `texts` (texts of KAD, the base and the proxy), `reading` (p and q along a text), `measures`
and `rounds` (figures of a text), `speed` (times of forwards), `recommendation`, `verdict`, `report` and `plot`.
`session` runs them.
"""
