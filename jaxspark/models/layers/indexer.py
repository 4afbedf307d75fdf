"""The Lightning Indexer: which compressed entries a query attends to.

    I_tc = sum_n w_tn ReLU(q_tn . k_c)           (DeepSeek-V4 section 2.3.1)
    w_t  = W_w x_t / sqrt(heads * width)

over entries that are complete at t, of which the `index_topk` best are chosen, ties by
the lowest entry. The index keys are compressed like the entries themselves, with
weights of their own; queries come from the attention's query latent.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxspark.models.batch import SlotView
from jaxspark.models.layers.compression import Compressor
from jaxspark.models.layers.linear import Linear, product
from jaxspark.models.layers.rope import TrailingRotation
from pallas_kernels import index_scores
from pallas_kernels.precision import wide_type


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
        x_DT: Float[Array, "D T"],
        latent_RT: Float[Array, "R T"],
        keys_BCH: Float[Array, "B C H"],
        view: SlotView,
        rotation: TrailingRotation,
    ) -> Float[Array, "B Q C"]:
        """Scores of all entries, whether complete or not, in float32."""
        q_NHT = self.q_b_proj(latent_RT).reshape(self.heads, self.width, -1)
        q_TNH = jnp.moveaxis(rotation(q_NHT), -1, 0)
        wide = wide_type(x_DT.dtype)
        weight_NT = product(self.weights_proj.matrix, x_DT, wide)
        weight_NT *= (self.width * self.heads) ** -0.5
        with jax.named_scope("index_scores"):
            return index_scores(
                view.spread(q_TNH, 0).astype(keys_BCH.dtype),
                keys_BCH,
                view.spread(weight_NT.T, 0.0),
            )

    def choose(
        self, scores_BQC: Float[Array, "B Q C"], limits_BQ: Int[Array, "B Q"]
    ) -> Int[Array, "B Q X"]:
        """The best entries below each query's limit; -1 where there are fewer."""
        entry_C = jnp.arange(scores_BQC.shape[-1])
        open_BQC = entry_C < limits_BQ[..., None]
        scores_BQC = jnp.where(open_BQC, scores_BQC, -jnp.inf)
        _, chosen_BQX = jax.lax.top_k(scores_BQC, min(self.top_k, len(entry_C)))
        return jnp.where(chosen_BQX < limits_BQ[..., None], chosen_BQX, -1)
