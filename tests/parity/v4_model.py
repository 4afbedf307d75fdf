"""Our DeepSeek-V4 with the random weights that the oracle makes too."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxspark.checkpoints.deepseek_v4 import load_deepseek_v4
from jaxspark.checkpoints.deepseek_v4_config import v4_config_from_hf
from jaxspark.checkpoints.tree import Tensors
from jaxspark.models import DeepSeekV4, FlatTokens
from jaxspark.models.deepseek_v4 import Pass, member, stacks
from tests.parity.v4_weights import random_weights


def made(config: dict, seed: int) -> DeepSeekV4:
    """The model of a transformers configuration and a seed."""
    weights = random_weights(config, seed)
    shapes = {name: value.shape for name, value in weights.items()}
    tensors = Tensors(where="random", shapes=shapes, read=weights.__getitem__)
    return load_deepseek_v4(v4_config_from_hf(config), tensors, dtype="float32")


def chosen_entries(model: DeepSeekV4, row) -> dict[int, np.ndarray]:
    """What the indexer of each CSA layer chooses for every query [T, X]; -1: none."""
    period = model.config.plan[1]
    places = {
        first + place * period: (index, place)
        for index, (first, count) in enumerate(stacks(model.config))
        for place in range(count)
    }

    @jax.jit
    def run(model, ids_1Q):
        tokens = FlatTokens.from_rows(
            ids_1Q, jnp.zeros(1, jnp.int32), jnp.full(1, ids_1Q.shape[1])
        )
        run, chosen = Pass.of(model.config, tokens), {}
        x_DT = model.embed(tokens.ids_T)
        x_MDT = jnp.broadcast_to(x_DT, (model.config.hc_mult, *x_DT.shape))
        for number in range(model.config.num_hidden_layers):
            index, place = places[number]
            layer = member(model.layers[index], jnp.int32(place))
            rotation = run.compressed if layer.ratio else run.plain

            def attend(h_DT, layer=layer, rotation=rotation):
                return layer.self_attn.of_whole(h_DT, tokens, run.view, rotation)

            x_MDT, looked, _ = layer.around(attend, x_MDT, jnp.int32(place), tokens)
            if "chosen_BQX" in looked.seen:
                chosen[number] = looked.seen["chosen_BQX"][0]
        return chosen

    return jax.tree.map(np.asarray, run(model, jnp.asarray(row, jnp.int32)[None]))
