"""Aligns a proxy with TRL and peft. Needs `pip install -e ".[train]"`.

The steps of `recipes/align_sft.py` and `recipes/align_dpo.py`, in order: `arguments` (the command line), `output` (the
folder of a run), `checks` (whether the proxy fits the base), `data` (examples, made by `rows`, `chats` and `tokens`),
`trainers` (the trainers of TRL), `publishing` (adapter, configuration and model card).
"""

from importlib.util import find_spec

for _needed in ("datasets", "trl"):
    if find_spec(_needed) is None:
        raise ImportError(f'Aligning a proxy needs {_needed}: pip install -e ".[train]"')


class AlignmentError(ValueError):
    """A problem that the user can solve; the message says how."""
