"""What a model weighs: parameters, cache bytes, arithmetic. Nothing is allocated.

Parameters are counted from the module's own shapes. *Active* are those a token is
multiplied with: of routed experts only the chosen ones. A product with W counts
2 |W| operations per token, and attention 4 N H for every key it reads (scores, values).
Routing tables are integers and no parameters.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from flax import nnx

from jaxspark.models import DeepSeekV4, DeepSeekV4Config, DenseConfig, DenseDecoder

# First part of the path that matches names the part of the model.
_PARTS = {
    "mlp.experts": "routed experts",
    "mlp.shared_experts": "shared experts",
    "mlp.gate.": "router",
    "indexer": "indexer",
    "compressor": "compression",
    "self_attn": "attention",
    "mlp": "MLP",
    "embed_tokens": "embedding",
    "lm_head": "LM head",
    "hc": "hyper-connections",
    "norm": "norms",
}
# Released storage of an entry: FP8, but bfloat16 where it turns, and one byte for 64,
# padded to 8; of an index key: FP4 and one byte for 32.
_SCALED, _SCALE_PAD, _INDEX_SCALED = 64, 8, 32
# DeepSeek-V3.2: 61 layers of 656 bytes of latent and 132 of index key.
V32_BYTES_PER_TOKEN = 61 * (656 + 132)


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """Of one model.

    Attributes:
      parameters: by part of the model.
      active: parameters a token is multiplied with, the embedding's row not counted.
      cache: bytes that every token adds, by part, for each storage.
      state: bytes of a request however long, for each storage.
      flops: operations per token by context length.
    """

    parameters: Mapping[str, int]
    active: int
    cache: Mapping[str, Mapping[str, float]]
    state: Mapping[str, int]
    flops: Mapping[int, float]

    @property
    def total(self) -> int:
        """All parameters."""
        return sum(self.parameters.values())

    def as_json(self) -> dict[str, Any]:
        """For files."""
        return {
            "parameters": dict(self.parameters),
            "total": self.total,
            "active": self.active,
            "cache_bytes_per_token": {
                storage: {**parts, "total": sum(parts.values())}
                for storage, parts in self.cache.items()
            },
            "state_bytes_per_request": dict(self.state),
            "flops_per_token": {str(k): v for k, v in self.flops.items()},
        }


def footprint(
    config: DenseConfig | DeepSeekV4Config, contexts: tuple[int, ...] = ()
) -> Footprint:
    """Of a model of this architecture.

    Args:
      config: the architecture.
      contexts: lengths at which operations per token are counted.
    """
    kind: Any = DeepSeekV4 if isinstance(config, DeepSeekV4Config) else DenseDecoder
    shapes = parameter_shapes(kind, config)
    parameters = dict.fromkeys(_PARTS.values(), 0)
    for path, shape in shapes.items():
        if not path.endswith("tid2eid"):
            parameters[_part(path)] += math.prod(shape)
    parameters = {part: count for part, count in parameters.items() if count}
    active = sum(parameters.values()) - parameters["embedding"]
    if isinstance(config, DenseConfig):
        # A tied embedding is the head too.
        active += parameters["embedding"] * config.tie_word_embeddings
        cache, state = _dense_cache(config)
    else:
        share = 1 - config.num_experts_per_tok / config.n_routed_experts
        active -= round(share * parameters["routed experts"])
        cache, state = _v4_cache(config)
    flops = {n: 2 * active + attention_flops(config, n) for n in contexts}
    return Footprint(
        parameters=parameters, active=active, cache=cache, state=state, flops=flops
    )


def parameter_shapes(kind, config) -> dict[str, tuple[int, ...]]:
    """Shapes of the arrays of a module of a configuration, by path; only traced."""
    module = nnx.eval_shape(lambda: kind(config, dtype=jnp.bfloat16, rngs=nnx.Rngs(0)))
    state = nnx.split(module)[1]
    return {
        ".".join(map(str, path)): tuple(variable.shape)
        for path, variable in nnx.to_flat_state(state)
    }


def attention_flops(config: DenseConfig | DeepSeekV4Config, context: int) -> float:
    """Operations of one token's attention, and of choosing what it attends to."""
    per_key = 4 * config.num_attention_heads * config.head_dim
    if isinstance(config, DenseConfig):
        return float(per_key * context * config.num_hidden_layers)
    flops = 0.0
    for ratio in config.compress_ratios:
        keys = min(context, config.sliding_window)
        if ratio == config.csa_ratio:
            entries = context // ratio
            keys += min(entries, config.index_topk)
            # Scores of index heads, their ReLU and weighting.
            flops += config.index_n_heads * (2 * config.index_head_dim + 3) * entries
        elif ratio:
            keys += context // ratio
        flops += per_key * keys
    return flops


def _part(path: str) -> str:
    return next(part for name, part in _PARTS.items() if name in path)


def _dense_cache(config: DenseConfig):
    width = 2 * config.num_key_value_heads * config.head_dim * config.num_hidden_layers
    cache = {"bfloat16": {"keys and values": 2.0 * width}}
    return cache, {"bfloat16": 0}


def _v4_cache(config: DeepSeekV4Config):
    """Bytes per token, and of a request's windows and rows that await compression."""
    turning, plain = config.qk_rope_head_dim, config.head_dim - config.qk_rope_head_dim
    scales = -(-plain // _SCALED)
    scales = -(-scales // _SCALE_PAD) * _SCALE_PAD
    index = config.index_head_dim
    sizes = {
        "released": (
            plain + 2 * turning + scales,
            index // 2 + index // _INDEX_SCALED,
        ),
        "bfloat16": (2 * config.head_dim, 2 * index),
    }
    csa = config.compress_ratios.count(config.csa_ratio)
    hca = config.compress_ratios.count(config.hca_ratio)
    raw = csa * 4 * (2 * config.csa_ratio - 1) * (config.head_dim + index)
    raw += hca * 2 * (config.hca_ratio - 1) * config.head_dim
    cache = {
        storage: {
            "CSA entries": csa * entry / config.csa_ratio,
            "index keys": csa * key / config.csa_ratio,
            "HCA entries": hca * entry / config.hca_ratio,
        }
        for storage, (entry, key) in sizes.items()
    }
    state = {
        storage: config.num_hidden_layers * config.sliding_window * entry + 4 * raw
        for storage, (entry, _) in sizes.items()
    }
    return cache, state
