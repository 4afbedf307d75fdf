"""Gated MLP: W_down (silu(W_gate x) * W_up x) (Shazeer 2020, "SwiGLU")."""

import jax
from flax import nnx
from jaxtyping import Array, Float

from jaxspark.models.layers.linear import Linear


class GatedMLP(nnx.Module):
    """SwiGLU feed-forward, width D, hidden width F."""

    def __init__(self, width: int, hidden: int, *, bias: bool, dtype, rngs: nnx.Rngs):
        self.gate_proj = Linear(width, hidden, bias=bias, dtype=dtype, rngs=rngs)
        self.up_proj = Linear(width, hidden, bias=bias, dtype=dtype, rngs=rngs)
        self.down_proj = Linear(hidden, width, bias=bias, dtype=dtype, rngs=rngs)

    def __call__(self, x_DT: Float[Array, "D T"]) -> Float[Array, "D T"]:
        """Maps every column."""
        return self.down_proj(self.hidden(x_DT))

    def hidden(self, x_DT: Float[Array, "D T"]) -> Float[Array, "F T"]:
        """The gated hidden units."""
        return jax.nn.silu(self.gate_proj(x_DT)) * self.up_proj(x_DT)
