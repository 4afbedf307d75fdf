"""Target language models on flat tokens with position-indexed caches."""

from jaxspark.models.base import TargetModel
from jaxspark.models.batch import FlatTokens
from jaxspark.models.cache import LayerCache
from jaxspark.models.deepseek_v4 import DeepSeekV4
from jaxspark.models.deepseek_v4_config import DeepSeekV4Config
from jaxspark.models.dense import DenseConfig, DenseDecoder
from jaxspark.models.layers.rope import RopeConfig

# A target model that comes with jaxspark: has checkpoints, and drafters trained for it.
TargetDecoder = DenseDecoder | DeepSeekV4
TargetConfig = DenseConfig | DeepSeekV4Config

__all__ = [
    "TargetDecoder",
    "TargetConfig",
    "DeepSeekV4",
    "DeepSeekV4Config",
    "DenseConfig",
    "DenseDecoder",
    "FlatTokens",
    "LayerCache",
    "RopeConfig",
    "TargetModel",
]
