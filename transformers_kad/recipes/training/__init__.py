"""Aligning a proxy with TRL and peft. Needs `pip install "transformers-kad[train]"`.

The steps of `recipes/align_sft.py` and `recipes/align_dpo.py`, in order: `arguments` (what the command line takes),
`output` (the folder of a run), `checks` (can this proxy serve this base?), `data` (rows, checked and tokenized),
`trainers` (TRL's), `publishing` (adapter, configuration, model card).
"""

from importlib.util import find_spec

for _needed in ("datasets", "trl"):
    if find_spec(_needed) is None:
        raise ImportError(f'Aligning a proxy needs {_needed}: pip install "transformers-kad[train]"')


class AlignmentError(ValueError):
    """Something that the user can put right: the message says what and how."""
