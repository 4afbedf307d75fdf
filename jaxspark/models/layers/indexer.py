"""The Lightning Indexer: which compressed entries a query attends to.

    I_tc = sum_n w_tn ReLU(q_tn . k_c)           (DeepSeek-V4 section 2.3.1)
    w_t  = W_w x_t / sqrt(heads * width)

over entries that are complete at t, of which the `index_topk` best are chosen, ties by
the lowest entry. The index keys are compressed like the entries themselves, with
weights of their own; queries come from the attention's query latent.
"""

import jax
from flax import nnx
from jaxtyping import Array, Float

from jaxspark.models.layers.compression import Compressor
from jaxspark.models.layers.linear import Linear, matmul
from jaxspark.models.layers.rope import PartialRotation
from pallas_kernels import Index, Table
from pallas_kernels.precision import accum_dtype


class Indexer(nnx.Module):
    """Scores entries for every query, with heads of their own."""

    def __init__(self, config, *, dtype, rngs: nnx.Rngs):
        heads, width = config.index_n_heads, config.index_head_dim
        options = {"dtype": dtype, "rngs": rngs}
        self.q_b_proj = Linear(config.q_lora_rank, heads * width, **options)
        self.weights_proj = Linear(config.hidden_size, heads, **options)
        self.compressor = Compressor(
            config, width, config.csa_ratio, overlap=True, **options
        )
        self.heads, self.width, self.top_k = heads, width, config.index_topk

    def __call__(
        self,
        x_TD: Float[Array, "T D"],
        latent_TR: Float[Array, "T R"],
        keys: Table,
        rotation: PartialRotation,
    ) -> Index:
        """What entries are scored by, and how many are chosen."""
        # Else GPUs make one product of this and the queries', and copy both out of it.
        latent_TR = jax.lax.optimization_barrier(latent_TR)
        q_TNH = self.q_b_proj(latent_TR).reshape(-1, self.heads, self.width)
        q_TNH = rotation(q_TNH).astype(keys.rows_LBCH.dtype)
        wide = accum_dtype(x_TD.dtype)
        weights_TN = matmul(x_TD, self.weights_proj.matrix, wide)
        weights_TN *= (self.width * self.heads) ** -0.5
        return Index(q_TNH=q_TNH, weights_TN=weights_TN, keys=keys, picks=self.top_k)
