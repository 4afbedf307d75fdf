"""Gated MLP: W_down (silu(W_gate x) * W_up x) (Shazeer 2020, "SwiGLU")."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jaxspark.models.layers.linear import Linear
from pallas_kernels.precision import upcast


class GatedMLP(nnx.Module):
    """SwiGLU feed-forward, width D, hidden width F; `limit` clamps what is gated."""

    def __init__(
        self,
        width: int,
        hidden: int,
        *,
        bias: bool,
        limit: float | None = None,
        dtype,
        rngs: nnx.Rngs,
    ):
        self.gate_proj = Linear(width, hidden, bias=bias, dtype=dtype, rngs=rngs)
        self.up_proj = Linear(width, hidden, bias=bias, dtype=dtype, rngs=rngs)
        self.down_proj = Linear(hidden, width, bias=bias, dtype=dtype, rngs=rngs)
        self.limit = limit

    def __call__(self, x_TD: Float[Array, "T D"]) -> Float[Array, "T D"]:
        """Maps every row."""
        return self.down_proj.summed(self.hidden(x_TD))

    def hidden(self, x_TD: Float[Array, "T D"]) -> Float[Array, "T F"]:
        """The gated hidden units."""
        gate_TF, up_TF = self.gate_proj(x_TD), self.up_proj(x_TD)
        if self.limit is None:
            return jax.nn.silu(gate_TF) * up_TF
        return clamped_swiglu(gate_TF, up_TF, self.limit)


def clamped_swiglu(
    gate: Float[Array, "..."], up: Float[Array, "..."], limit: float
) -> Float[Array, "..."]:
    """silu(min(gate, limit)) * clip(up, -limit, limit), in float32 and rounded once."""
    wide_gate, wide_up = upcast(gate), jnp.clip(upcast(up), -limit, limit)
    return (jax.nn.silu(jnp.minimum(wide_gate, limit)) * wide_up).astype(gate.dtype)
