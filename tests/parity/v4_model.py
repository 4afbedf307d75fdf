"""Our DeepSeek-V4 with the random weights that the oracle makes too."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxspark.checkpoints.deepseek_v4 import load_deepseek_v4
from jaxspark.checkpoints.deepseek_v4_config import v4_config_from_hf
from jaxspark.checkpoints.tree import Tensors
from jaxspark.models import DeepSeekV4, FlatTokens
from jaxspark.models.deepseek_v4 import ForwardContext, from_the_start
from jaxspark.training.deepseek_v4 import scores_of
from pallas_kernels.indexer_topk.ref import choices
from tests.parity.v4_weights import random_weights


def made(config: dict, seed: int) -> DeepSeekV4:
    """The model of a transformers configuration and a seed."""
    weights = random_weights(config, seed)
    shapes = {name: value.shape for name, value in weights.items()}
    tensors = Tensors(where="random", shapes=shapes, read=weights.__getitem__)
    return load_deepseek_v4(v4_config_from_hf(config), tensors, dtype="float32")


def through(model: DeepSeekV4, row, keep):
    """What `keep` says of each layer and its internals, on one text; by stack."""

    @jax.jit
    def run(model, ids_1Q):
        tokens = FlatTokens.from_rows(
            ids_1Q, jnp.zeros(1, jnp.int32), jnp.full(1, ids_1Q.shape[1])
        )
        context = ForwardContext.of(model.config, tokens)

        def step(x_TMD, layer, at):
            x_TMD, internals = from_the_start(layer, x_TMD, context)
            return x_TMD, keep(layer, internals, tokens)

        x_TMD = model.streams(model.embed(tokens.ids_T))
        return model.through_layers(step, x_TMD, slice_experts=True)[1]

    return run(model, jnp.asarray(row, jnp.int32)[None])


def chosen_entries(model: DeepSeekV4, row) -> dict[int, np.ndarray]:
    """What the indexer of each CSA layer chooses for every query [T, X]; -1: none."""

    def keep(layer, internals, tokens):
        entries = internals.attention.entries
        if entries is None or entries.index is None:
            return None
        return choices(entries.index, entries.limits_T, tokens)

    period = model.config.layer_pattern[1]
    chosen = through(model, row, keep)
    return {
        first + place * period: np.asarray(chosen_LTX[place])
        for (first, count), chosen_LTX in zip(model.config.layer_stacks, chosen)
        if chosen_LTX is not None
        for place in range(count)
    }


def closest_choice(model: DeepSeekV4, row) -> float:
    """The least by which an expert or an entry was chosen before another one."""

    def margin(scores_TX, count):
        if scores_TX.shape[1] <= count:
            return jnp.float32(jnp.inf)
        best_TX = jax.lax.top_k(scores_TX, count + 1)[0]
        # Nothing is left out where there are not more than are chosen.
        gap_T = jnp.where(best_TX[:, -1] > -1e29, best_TX[:, -2] - best_TX[:, -1], 1.0)
        return jnp.min(gap_T)

    def keep(layer, internals, tokens):
        least = jnp.float32(jnp.inf)
        if not layer.mlp.gate.hashed:
            bias_E = layer.mlp.gate.e_score_correction_bias[...]
            scores_TE = internals.routing.scores_TE + bias_E
            least = margin(scores_TE, layer.mlp.gate.top_k)
        entries = internals.attention.entries
        if entries is not None and entries.index is not None:
            scores_TC = scores_of(entries.index, tokens)
            open_TC = jnp.arange(scores_TC.shape[1]) < entries.limits_T[:, None]
            scores_TC = jnp.where(open_TC, scores_TC, -1e30)
            least = jnp.minimum(least, margin(scores_TC, entries.index.picks))
        return least

    return min(float(jnp.min(each)) for each in through(model, row, keep))
