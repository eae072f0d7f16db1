"""Layers of caches that transformers 5.19, which vLLM 0.32 asks for, does not have.

The library is made for the versions of transformers that pyproject.toml names. With 5.19 it can be imported, so that
`integrations/vllm.py` runs beside the engine.
"""

try:
    from transformers.cache_utils import BaseQuantizedLayer, DummyLayer
except ImportError:
    from transformers.cache_utils import QuantizedLayer as BaseQuantizedLayer

    class DummyLayer:  # type: ignore[no-redef]
        """A layer that keeps nothing. No cache has one in that version."""


__all__ = ["BaseQuantizedLayer", "DummyLayer"]
