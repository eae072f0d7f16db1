"""Knapsack approximation deferral (KAD) inside the generation API of Hugging Face transformers.

>>> from transformers_kad import DualDeferral
>>> DualDeferral(threshold=0.4)
DualDeferral(threshold=0.4)
"""

from . import _torchao  # noqa: F401 (before anything that imports transformers' models)
from ._version import __version__
from .configuration import KADConfig
from .decoding import generate_wrapper
from .decoding.attachment import attach, attached_processor, detach
from .decoding.candidate_generator import KADCandidateGenerator
from .decoding.speculative import kad_generate
from .decoding.verification import verify
from .logits_process import KADLogitsProcessor
from .models.vocabulary import VocabularyAlignment, VocabularyReport, align_vocabularies
from .records.statistics import KADStatistics, SequenceStatistics, TokenRecord
from .records.trace import KADTrace
from .rules.base import DeferralRule, StatefulDeferralRule, StatefulRule, mix
from .rules.deferral import (
    CascadeDeferral,
    ConfidenceBetDeferral,
    DualDeferral,
    ExactDeferral,
    NudgingDeferral,
    PrimalDeferral,
)
from .rules.mixtures import BlendIn, Ensemble, ImplicitReward
from .rules.paced import PacedDeferral
from .rules.registry import RULES, make_rule

# `generate` must know of KAD before the first `base.generate` is looked up.
generate_wrapper.install()

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
    "PacedDeferral",
    "PrimalDeferral",
    "SequenceStatistics",
    "StatefulDeferralRule",
    "StatefulRule",
    "TokenRecord",
    "VocabularyAlignment",
    "VocabularyReport",
    "__version__",
    "align_vocabularies",
    "attach",
    "attached_processor",
    "detach",
    "kad_generate",
    "make_rule",
    "mix",
    "verify",
]
