"""Rotary position embedding (Su et al. 2021) with the scalings checkpoints use.

A head's vector is split in halves (x, y); at position p frequency i turns the pair
(x_i, y_i) by the angle p * f_i (`PartialRotation` pairs neighbours instead).
`RopeConfig` names how f_i is derived from the base f_i = theta^(-2i/H): `default`,
`linear` (all f_i / factor), `llama3` (low frequencies / factor, smooth in between),
`yarn` (Peng et al. 2023; ramp between both, and cos/sin scaled by an attention factor).
"""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from pallas_kernels.precision import upcast
from pallas_kernels.rotary import Rotary

ROPE_TYPES = ("default", "linear", "llama3", "yarn")


@dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """Rope parameters under the names of Hugging Face's `rope_parameters`."""

    rope_theta: float = 10000.0
    rope_type: str = "default"
    factor: float = 1.0
    original_max_position_embeddings: int | None = None
    # llama3
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    # yarn
    attention_factor: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True

    def __post_init__(self):
        if self.rope_type not in ROPE_TYPES:
            raise ValueError(
                f"unknown rope type {self.rope_type!r}; expected one of {ROPE_TYPES}"
            )
        if self.rope_type in ("llama3", "yarn"):
            if self.original_max_position_embeddings is None:
                raise ValueError(
                    f"rope type {self.rope_type!r} needs "
                    "original_max_position_embeddings; the configuration has none"
                )

    def frequencies(self, head_dim: int) -> tuple[np.ndarray, float]:
        """Angular frequencies [H/2] in radians per position, and the cos/sin scale."""
        base_h = self.rope_theta ** (
            np.arange(0, head_dim, 2, dtype=np.float32) / head_dim
        )
        plain_h = (1.0 / base_h).astype(np.float32)
        if self.rope_type == "linear":
            return plain_h / np.float32(self.factor), 1.0
        if self.rope_type == "llama3":
            return self._llama3(plain_h), 1.0
        if self.rope_type == "yarn":
            return self._yarn(plain_h, head_dim), self._yarn_scale()
        return plain_h, 1.0

    def _llama3(self, plain_h: np.ndarray) -> np.ndarray:
        """Wavelengths past the original context are stretched by `factor`."""
        context = self.original_max_position_embeddings
        turns_h = context * plain_h / (2 * math.pi)
        spread = self.high_freq_factor - self.low_freq_factor
        keep_h = np.clip((turns_h - self.low_freq_factor) / spread, 0.0, 1.0)
        return (keep_h * plain_h + (1 - keep_h) * plain_h / self.factor).astype("f4")

    def _yarn(self, plain_h: np.ndarray, head_dim: int) -> np.ndarray:
        """Ramp from untouched (>= beta_fast turns) to interpolated (<= beta_slow)."""
        context = self.original_max_position_embeddings

        def dimension(turns):
            ratio = context / (turns * 2 * math.pi)
            return head_dim * math.log(ratio) / (2 * math.log(self.rope_theta))

        low, high = dimension(self.beta_fast), dimension(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, head_dim - 1)
        ramp_h = (np.arange(head_dim // 2) - low) / max(high - low, 1e-3)
        keep_h = 1 - np.clip(ramp_h, 0.0, 1.0)
        return (keep_h * plain_h + (1 - keep_h) * plain_h / self.factor).astype("f4")

    def _yarn_scale(self) -> float:
        def mscale(weight):
            return 0.1 * weight * math.log(self.factor) + 1 if self.factor > 1 else 1.0

        if self.attention_factor is not None:
            return self.attention_factor
        if self.mscale and self.mscale_all_dim:
            return mscale(self.mscale) / mscale(self.mscale_all_dim)
        return mscale(1.0)


@dataclass(frozen=True)
class Rotation:
    """cos and sin of every token's angles, computed once per forward pass."""

    cos_Th: Float[Array, "T h"]
    sin_Th: Float[Array, "T h"]

    @classmethod
    def at(cls, config: RopeConfig, head_dim: int, positions_T: Int[Array, " T"]):
        """Angles for absolute `positions_T`, in float32."""
        frequencies_h, scale = config.frequencies(head_dim)
        angles_Th = positions_T.astype(jnp.float32)[:, None] * frequencies_h
        return cls(jnp.cos(angles_Th) * scale, jnp.sin(angles_Th) * scale)

    def __call__(self, x_TNH: Float[Array, "T N H"]) -> Float[Array, "T N H"]:
        """Turns each head's (first half, second half) pairs."""
        x, y = jnp.split(upcast(x_TNH), 2, axis=-1)
        cos, sin = self.cos_Th[:, None], self.sin_Th[:, None]
        turned = jnp.concatenate([x * cos - y * sin, y * cos + x * sin], axis=-1)
        return turned.astype(x_TNH.dtype)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PartialRotation(Rotary):
    """Turns the last 2h of a head's H channels, in pairs of neighbours (DeepSeek-V4).

    The channels before them carry no position.
    """

    @classmethod
    def at(cls, config: RopeConfig, width: int, positions_T: Int[Array, " T"]):
        """Angles of `width` turning channels for absolute `positions_T`, in float32."""
        turns = Rotation.at(config, width, positions_T)
        return cls(turns.cos_Th, turns.sin_Th)
