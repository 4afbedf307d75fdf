"""DeepSeekMoE with V4's router (sections 2.1, 4.2.1).

    s = sqrt(softplus(W_gate x))                          float32
    chosen: the X best of s + bias, or, in the first layers, a table row of the token id
    y = shared(x) + scale * sum_chosen (s_e / sum_chosen s) expert_e(x)

The bias evens out loads and takes part in choosing only. Experts and the shared expert
clamp what they gate: silu(min(gate, L)) * clip(up, -L, L). No token is ever dropped:
assignments are sorted by expert, and each expert multiplies the rows it got.
"""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxspark.models.layers.expert_pairs import Pairs, outputs, packed_outputs
from jaxspark.models.layers.linear import Buffer, matmul
from jaxspark.models.layers.mlp import GatedMLP
from jaxspark.parallel.axes import EXPERTS, size
from jaxspark.parallel.exchange import exchange
from pallas_kernels.precision import upcast


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Routing:
    """Where T tokens go.

    Attributes:
      experts_TX: the chosen experts of each token.
      weights_TX: of their outputs, in float32.
      scores_TE: router scores of all experts, in float32.
    """

    experts_TX: Int[Array, "T X"]
    weights_TX: Float[Array, "T X"]
    scores_TE: Float[Array, "T E"]


class Router(nnx.Module):
    """Chooses X of E experts; hashed: by token id, from a frozen table."""

    def __init__(self, config, *, hashed: bool, dtype, rngs: nnx.Rngs):
        E, D = config.n_routed_experts, config.hidden_size
        self.weight = nnx.Param(
            config.initializer_range * jax.random.normal(rngs.params(), (E, D), dtype)
        )
        self.hashed, self.top_k = hashed, config.num_experts_per_tok
        self.scale = config.routed_scaling_factor
        if hashed:
            self.tid2eid = Buffer(_spread_ids(config.vocab_size, self.top_k, E))
        else:
            self.e_score_correction_bias = Buffer(jnp.zeros((E,), jnp.float32))

    def __call__(self, x_TD: Float[Array, "T D"], ids_T: Int[Array, " T"]) -> Routing:
        """Routes every row."""
        logits_TE = matmul(upcast(x_TD), upcast(self.weight[...]))
        # Where softplus vanishes, its root has no gradient.
        least = jnp.finfo(logits_TE.dtype).tiny
        scores_TE = jnp.sqrt(jnp.maximum(jax.nn.softplus(logits_TE), least))
        if self.hashed:
            experts_TX = self.tid2eid[...][ids_T]
        else:
            biased_TE = scores_TE + self.e_score_correction_bias[...]
            _, experts_TX = jax.lax.top_k(biased_TE, self.top_k)
        weights_TX = jnp.take_along_axis(scores_TE, experts_TX, axis=1)
        total_T1 = jnp.sum(weights_TX, axis=1, keepdims=True) + 1e-20
        return Routing(experts_TX, self.scale * weights_TX / total_T1, scores_TE)


class Experts(nnx.Module):
    """E gated MLPs; their matrices may be those of many layers, [L, E, ...].

    They may be `Quantized`; `grouped_matmul` dequantizes those it multiplies with.
    """

    def __init__(self, config, *, dtype, rngs: nnx.Rngs):
        E, D, F = (
            config.n_routed_experts,
            config.hidden_size,
            config.moe_intermediate_size,
        )
        normal = jax.random.normal
        self.gate_up_proj = nnx.Param(
            D**-0.5 * normal(rngs.params(), (E, 2 * F, D), dtype)
        )
        self.down_proj = nnx.Param(F**-0.5 * normal(rngs.params(), (E, D, F), dtype))
        self.count, self.limit = E, config.swiglu_limit

    def __call__(
        self,
        x_TD: Float[Array, "T D"],
        routing: Routing,
        slots_T: Int[Array, " T"],
        layer: Int[Array, ""],
    ) -> Float[Array, "T D"]:
        """The weighted sum of each token's experts; 0 for padding (slot -1)."""
        experts_TX = jnp.where(slots_T[:, None] < 0, -1, routing.experts_TX)
        y_TD = exchange(
            partial(self.local, layer=layer),
            x_TD,
            experts_TX,
            routing.weights_TX,
            count=self.count,
        )
        return y_TD.astype(x_TD.dtype)

    def local(
        self,
        x_RD: Float[Array, "R D"],
        experts_RX: Int[Array, "R X"],
        *,
        packed: bool,
        layer: Int[Array, ""],
    ) -> Float[Array, "A D"]:
        """Outputs of the experts that this shard holds, see `exchange.Local`.

        Args:
          x_RD: rows.
          experts_RX: experts of each, among the shard's own; -1 for none.
          packed: whether outputs that there are come first.
          layer: whose experts.
        """
        count = self.count // size(EXPERTS)
        pairs = Pairs.of(experts_RX, count)
        weights = tuple(
            jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[-2:]), each[...])
            for each in (self.gate_up_proj, self.down_proj)
        )
        offset = layer * count
        if packed:
            return packed_outputs(
                x_RD, weights, pairs, offset, limit=self.limit, share=size(EXPERTS)
            )
        return outputs(x_RD, weights, pairs, offset, limit=self.limit)


class MixtureOfExperts(nnx.Module):
    """Routed experts beside one shared expert."""

    def __init__(self, config, *, hashed: bool, dtype, rngs: nnx.Rngs):
        options = {"dtype": dtype, "rngs": rngs}
        self.gate = Router(config, hashed=hashed, **options)
        self.experts = Experts(config, **options)
        self.shared_experts = GatedMLP(
            config.hidden_size,
            config.n_shared_experts * config.moe_intermediate_size,
            bias=False,
            limit=config.swiglu_limit,
            **options,
        )

    def __call__(
        self,
        x_TD: Float[Array, "T D"],
        ids_T: Int[Array, " T"],
        slots_T: Int[Array, " T"],
        layer: Int[Array, ""],
    ) -> tuple[Float[Array, "T D"], Routing]:
        """Maps every row, and says where it went."""
        routing = self.gate(x_TD, ids_T)
        with jax.named_scope("experts"):
            routed_TD = self.experts(x_TD, routing, slots_T, layer)
        with jax.named_scope("shared_expert"):
            shared_TD = self.shared_experts(x_TD)
        return routed_TD + shared_TD, routing


def _spread_ids(vocab: int, top_k: int, experts: int) -> Int[Array, "V X"]:
    """A table that gives neighbouring ids different experts, all equally often."""
    ids_VX = np.arange(vocab * top_k, dtype=np.int32).reshape(vocab, top_k)
    return jnp.asarray(ids_VX % experts)
