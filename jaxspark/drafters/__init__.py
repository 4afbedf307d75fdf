"""What proposes: each drafter is one file that keeps the contract of `base.Drafter`."""

from jaxspark.drafters.base import (
    DraftContext,
    Drafter,
    DraftSampler,
    Drawn,
    Proposal,
)
from jaxspark.drafters.deepseek_v4_dspark import (
    DeepSeekV4DSpark,
    DeepSeekV4DSparkConfig,
)
from jaxspark.drafters.distribution import DraftDistribution
from jaxspark.drafters.dspark import DSparkConfig, DSparkDrafter
from jaxspark.drafters.eagle3 import Eagle3Config, Eagle3Drafter
from jaxspark.drafters.hybrid import HybridDrafter, hybrid
from jaxspark.drafters.mtp import MTPDrafter
from jaxspark.drafters.ngram import NgramDrafter
from jaxspark.drafters.plain import PlainDrafter

__all__ = [
    "DeepSeekV4DSpark",
    "DeepSeekV4DSparkConfig",
    "DSparkConfig",
    "DSparkDrafter",
    "DraftContext",
    "DraftDistribution",
    "DraftSampler",
    "Drafter",
    "Drawn",
    "Eagle3Config",
    "Eagle3Drafter",
    "HybridDrafter",
    "MTPDrafter",
    "NgramDrafter",
    "PlainDrafter",
    "Proposal",
    "hybrid",
]
