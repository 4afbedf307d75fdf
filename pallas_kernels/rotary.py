"""Rotary embedding of a head's last channels, as attention of DeepSeek-V4 uses it.

At position p frequency i turns the pair (x_2i, x_2i+1) of the turning channels by the
angle p f_i. Channels before them carry no position.
"""

from dataclasses import dataclass, replace
from typing import Self

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.channels import turn_neighbours


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

    def lanes(self, width: int) -> Float[Array, "T 2 L"]:
        """cos and sin of a head's last `width` channels, 1 and 0 of what does not turn.

        A head's channels are then turned as x cos + (x P) sin, P being `right_angles`.
        """
        both_T2h = jnp.stack([self.cos_Th, self.sin_Th], axis=1)
        both_T2r = jnp.repeat(both_T2h.astype(jnp.float32), 2, axis=2)
        rest_T2R = jnp.zeros((*both_T2r.shape[:2], width - both_T2r.shape[2]))
        return jnp.concatenate([rest_T2R.at[:, 0].set(1), both_T2r], axis=2)

    def __call__(self, x_TNH: Float[Array, "T N H"]) -> Float[Array, "T N H"]:
        """Turns each head's last pairs."""
        return turn_neighbours(x_TNH, self.cos_Th[:, None], self.sin_Th[:, None])


def right_angles(width: int) -> Float[Array, "L L"]:
    """P, which turns every pair by a right angle: x P is (-x_1, x_0, -x_3, x_2, ..)."""
    row_LL, column_LL = (
        jax.lax.broadcasted_iota(jnp.int32, (width, width), axis) for axis in range(2)
    )
    sign_LL = jnp.where(row_LL % 2 == 0, 1.0, -1.0)
    return jnp.where(column_LL == row_LL ^ 1, sign_LL, 0.0)
