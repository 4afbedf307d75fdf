"""The Lightning Indexer: which compressed entries a query attends to.

    I_tc = sum_n w_tn ReLU(q_tn . k_c)           (DeepSeek-V4 section 2.3.1)
    w_t  = W_w x_t / sqrt(heads * width)

over entries that are complete at t, of which the `index_topk` best are chosen, ties by
the lowest entry. The index keys are compressed like the entries themselves, with
weights of their own; queries come from the attention's query latent.
"""

import jax
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxspark.models.batch import FlatTokens
from jaxspark.models.layers.compression import Compressor
from jaxspark.models.layers.linear import Linear, matmul
from jaxspark.models.layers.rope import PartialRotation
from pallas_kernels import Table, index_scores, top_k
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

    def scores(
        self,
        x_TD: Float[Array, "T D"],
        latent_TR: Float[Array, "T R"],
        keys: Table,
        tokens: FlatTokens,
        rotation: PartialRotation,
    ) -> Float[Array, "T C"]:
        """Scores of all entries, whether complete or not, in float32."""
        q_TNH = self.q_b_proj(latent_TR).reshape(-1, self.heads, self.width)
        q_TNH = rotation(q_TNH)
        wide = accum_dtype(x_TD.dtype)
        weight_TN = matmul(x_TD, self.weights_proj.matrix, wide)
        weight_TN *= (self.width * self.heads) ** -0.5
        with jax.named_scope("index_scores"):
            q_TNH = q_TNH.astype(keys.rows_LBCH.dtype)
            return index_scores(q_TNH, keys, weight_TN, tokens)

    def choose(
        self, scores_TC: Float[Array, "T C"], limits_T: Int[Array, " T"]
    ) -> Int[Array, "T X"]:
        """The best entries below each token's limit; -1 where there are fewer."""
        return top_k(scores_TC, limits_T, k=self.top_k)
