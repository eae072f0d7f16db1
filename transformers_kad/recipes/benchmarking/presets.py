"""What a preset of the speed benchmark measures: pairs of architectures, and rows with their planned times."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .methods import Method
from .speed import Workload

Config = Mapping[str, Any]


@dataclass(frozen=True)
class PlannedRow:
    """A row of a report: a method at a batch size.

    Attributes:
        batch_size: the number of texts.
        key: the key of the method.
        seconds: how long it is planned to take, with warming up and compiling.
    """

    batch_size: int
    key: str
    seconds: float

    @property
    def method(self) -> Method:
        """The method."""
        return Method.from_key(self.key)

    def __str__(self) -> str:
        return f"batch {self.batch_size}, {self.method.label}"


@dataclass(frozen=True)
class PresetPair:
    """A pair with random weights, and its rows in the order in which they are measured.

    Attributes:
        name: the name of its folder.
        base: the configuration of the base.
        proxy: the configuration of the proxy.
        loading_seconds: how long making both models is planned to take.
        rows: the rows. The base alone is the first of its batch size.
    """

    name: str
    base: Config
    proxy: Config
    loading_seconds: float
    rows: Sequence[PlannedRow]


@dataclass(frozen=True)
class Preset:
    """Pairs and rows that are measured by one command.

    Attributes:
        pairs: the pairs, in the order in which they are measured.
        workload: prompts, length of the texts, and seed.
        repetitions: the number of runs of each row.
        dtype: dtype of the weights.
        deferral_mass: the mean deferral mass, for which a threshold of the dual rule is chosen.
        gibibytes: the memory of the GPU that it needs.
    """

    pairs: Sequence[PresetPair]
    workload: Workload
    repetitions: int
    dtype: str
    deferral_mass: float
    gibibytes: int

    def shrunk(self) -> "Preset":
        """The same rows with tiny models of the same architectures and short texts."""
        pairs = [
            PresetPair(pair.name, _shrunk(pair.base, 64), _shrunk(pair.proxy, 32), 1.0, pair.rows)
            for pair in self.pairs
        ]
        workload = Workload(self.workload.task, max_new_tokens=8, prompt_tokens=6, seed=self.workload.seed)
        return Preset(pairs, workload, 1, "float32", self.deferral_mass, 0)


def _shrunk(config: Config, hidden_size: int) -> dict[str, Any]:
    small = {"hidden_size": hidden_size, "intermediate_size": 2 * hidden_size, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 512}
    return {**config, **small, **heads} | ({"head_dim": 16} if "head_dim" in config else {})


# The sizes of Qwen3-14B-Base and Qwen3-1.7B, and of OLMo-2-1124-13B and OLMo-2-0425-1B.
_QWEN3 = {
    "model_type": "qwen3",
    "vocab_size": 151936,
    "head_dim": 128,
    "num_key_value_heads": 8,
    "max_position_embeddings": 32768,
    "rope_parameters": {"rope_theta": 1000000.0, "rope_type": "default"},
}
_QWEN3_14B = {
    **_QWEN3,
    "hidden_size": 5120,
    "intermediate_size": 17408,
    "num_hidden_layers": 40,
    "num_attention_heads": 40,
    "tie_word_embeddings": False,
}
_QWEN3_1_7B = {
    **_QWEN3,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "tie_word_embeddings": True,
}
_OLMO2 = {
    "model_type": "olmo2",
    "vocab_size": 100352,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 4096,
    "rope_parameters": {"rope_theta": 500000.0, "rope_type": "default"},
    "tie_word_embeddings": False,
}
_OLMO2_13B = {
    **_OLMO2,
    "hidden_size": 5120,
    "intermediate_size": 13824,
    "num_hidden_layers": 40,
    "num_attention_heads": 40,
    "num_key_value_heads": 40,
}
_OLMO2_1B = {
    **_OLMO2,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
}

# Planned for an H100, on which nothing was measured yet: forward passes of about 25 ms (base) and 14 ms (proxy), four
# runs (one of them profiled) of 64 tokens a text, and a minute or two where models are compiled.
_ONE_TEXT = [
    PlannedRow(1, "base", 9),
    PlannedRow(1, "token_by_token", 12),
    PlannedRow(1, "speculative:3", 9),
    PlannedRow(1, "speculative:5", 9),
    PlannedRow(1, "speculative:8", 10),
    PlannedRow(1, "auto", 9),
]
_BATCHES = [
    PlannedRow(rows, key, seconds)
    for rows in (4, 16)
    for key, seconds in (("base", 9), ("speculative:5", 11), ("auto", 11))
]
_COMPILED = [  # code is compiled for every batch size
    PlannedRow(rows, key, seconds)
    for rows in (1, 4, 16)
    for key, seconds in (("base_compiled", 80), ("compiled:5", 130))
]
_COMPILED_ONE_TEXT = [row for row in _COMPILED if row.batch_size == 1]

PRESETS = {
    "h100": Preset(
        pairs=[
            PresetPair("qwen3", _QWEN3_14B, _QWEN3_1_7B, 20, [*_ONE_TEXT, *_COMPILED_ONE_TEXT, *_BATCHES]),
            PresetPair("olmo2", _OLMO2_13B, _OLMO2_1B, 15, [*_ONE_TEXT, *_BATCHES, *_COMPILED]),
        ],
        workload=Workload("arithmetic", max_new_tokens=64, prompt_tokens=64, seed=0),
        repetitions=3,
        dtype="bfloat16",
        deferral_mass=0.8,
        gibibytes=70,
    )
}
