"""Sequential and confidence heads of DSpark (arXiv 2607.05147, section 3.1).

The backbone predicts all rows of a block at once; a sequential head then corrects row j
by the token drafted before it, y = x_j, with a low-rank bias b over the vocabulary:

    vanilla   b = W2 W1[y]
    gated     g = sigmoid(Wg [h_j; W1[y]] + bg),       b = W2 (g * W1[y])
    rnn       (g, c, o) = split(Wz [s; W1[y]; h_j] + bz),
              s <- sigmoid(g) * s + (1 - sigmoid(g)) * tanh(c),   b = W2 tanh(o)
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxspark.models.layers.linear import Embedding, Linear, head_logits

HEAD_TYPES = ("vanilla", "gated", "rnn")


class MarkovHead(nnx.Module):
    """A sequential head of rank R; parameters under DeepSpec's names."""

    def __init__(
        self,
        kind: str,
        *,
        vocab: int,
        draft_vocab: int,
        width: int,
        rank: int,
        dtype,
        rngs: nnx.Rngs,
    ):
        self.kind, self.rank = kind, rank
        self.markov_w1 = Embedding(vocab, rank, dtype=dtype, rngs=rngs)
        self.markov_w2 = Linear(rank, draft_vocab, dtype=dtype, rngs=rngs)
        options = {"bias": True, "dtype": dtype, "rngs": rngs}
        if kind == "gated":
            self.gate_proj = Linear(width + rank, rank, **options)
        if kind == "rnn":
            self.joint_proj = Linear(2 * rank + width, 3 * rank, **options)

    def start(self, slots: int) -> Float[Array, "B R"]:
        """The recurrent state before a block's first row."""
        return jnp.zeros((slots, self.rank), self.markov_w1.weight.dtype)

    def embed(self, previous_B: Int[Array, " B"]) -> Float[Array, "B R"]:
        """W1[y] of the previous tokens (target ids)."""
        return self.markov_w1(previous_B)

    def latent(
        self,
        state_BR: Float[Array, "B R"],
        embedded_BR: Float[Array, "B R"],
        hidden_BD: Float[Array, "B D"],
    ) -> tuple[Float[Array, "B R"], Float[Array, "B R"]]:
        """One row: the next state, and what W2 maps to the vocabulary."""
        if self.kind == "vanilla":
            latent_BR = embedded_BR
        elif self.kind == "gated":
            inputs = jnp.concatenate([hidden_BD, embedded_BR], axis=1)
            latent_BR = jax.nn.sigmoid(self.gate_proj(inputs)) * embedded_BR
        else:
            inputs = jnp.concatenate([state_BR, embedded_BR, hidden_BD], axis=1)
            gate, candidate, output = jnp.split(self.joint_proj(inputs), 3, axis=1)
            keep = jax.nn.sigmoid(gate)
            state_BR = keep * state_BR + (1 - keep) * jnp.tanh(candidate)
            latent_BR = jnp.tanh(output)
        return state_BR, latent_BR


class ConfidenceHead(nnx.Module):
    """Logit of P(x_{j+1} accepted | earlier accepted) from [h_j; W1[x_j]] or h_j."""

    def __init__(self, width: int, *, bias: bool = True, dtype, rngs: nnx.Rngs):
        self.proj = Linear(width, 1, bias=bias, dtype=dtype, rngs=rngs)

    def __call__(self, features_BI: Float[Array, "B I"]) -> Float[Array, " B"]:
        """One logit per slot, in float32 all along."""
        logit_B = head_logits(features_BI, self.proj.matrix)[:, 0]
        bias = self.proj.bias
        return logit_B if bias is None else logit_B + bias[...]
