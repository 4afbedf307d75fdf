"""Rotary embedding of a head's last channels, as attention of DeepSeek-V4 uses it.

At position p frequency i turns the pair (x_2i, x_2i+1) of the turning channels by the
angle p f_i. Channels before them carry no position.
"""

from dataclasses import dataclass, replace
from typing import Self

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.precision import upcast


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Rotary:
    """Angles of every token, by which the last 2h of a head's H channels turn."""

    cos_Th: Float[Array, "T h"]
    sin_Th: Float[Array, "T h"]

    @property
    def inverse(self) -> Self:
        """The rotation back."""
        return replace(self, sin_Th=-self.sin_Th)

    def __call__(self, x_TNH: Float[Array, "T N H"]) -> Float[Array, "T N H"]:
        """Turns each head's last pairs."""
        T, N, H = x_TNH.shape
        rope_dim = 2 * self.cos_Th.shape[1]
        pairs_TNh2 = upcast(x_TNH[..., H - rope_dim :]).reshape(T, N, -1, 2)
        x_TNh, y_TNh = pairs_TNh2[..., 0], pairs_TNh2[..., 1]
        cos, sin = self.cos_Th[:, None], self.sin_Th[:, None]
        turned_TNh2 = jnp.stack(
            [x_TNh * cos - y_TNh * sin, y_TNh * cos + x_TNh * sin], axis=-1
        )
        turned_TNr = turned_TNh2.reshape(T, N, rope_dim).astype(x_TNH.dtype)
        return jnp.concatenate([x_TNH[..., : H - rope_dim], turned_TNr], axis=-1)
