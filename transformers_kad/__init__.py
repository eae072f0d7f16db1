"""Knapsack approximation deferral (KAD) inside the generation API of Hugging Face transformers.

>>> from transformers_kad import DualDeferral
>>> DualDeferral(threshold=0.4)
DualDeferral(threshold=0.4)
"""

from . import (
    _torchao,  # noqa: F401 (before anything that imports transformers' models)
    hooks,
)
from ._version import __version__
from .candidate_generator import KADCandidateGenerator
from .composition import RULES, BlendIn, Ensemble, ImplicitReward, make_rule, mix
from .configuration import KADConfig
from .deferral import (
    CascadeDeferral,
    ConfidenceBetDeferral,
    DeferralRule,
    DualDeferral,
    ExactDeferral,
    NudgingDeferral,
    PrimalDeferral,
)
from .generation import kad_generate
from .logits_process import KADLogitsProcessor
from .statistics import KADStatistics, KADTrace, SequenceStatistics, TokenRecord
from .verification import verify
from .vocabulary import VocabularyAlignment, VocabularyReport, align_vocabularies

# `generate` must know of KAD before the first `base.generate` is looked up.
hooks.install()

__all__ = [
    "RULES",
    "BlendIn",
    "CascadeDeferral",
    "ConfidenceBetDeferral",
    "DeferralRule",
    "DualDeferral",
    "Ensemble",
    "ExactDeferral",
    "ImplicitReward",
    "KADCandidateGenerator",
    "KADConfig",
    "KADLogitsProcessor",
    "KADStatistics",
    "KADTrace",
    "NudgingDeferral",
    "PrimalDeferral",
    "SequenceStatistics",
    "TokenRecord",
    "VocabularyAlignment",
    "VocabularyReport",
    "__version__",
    "align_vocabularies",
    "kad_generate",
    "make_rule",
    "mix",
    "verify",
]
