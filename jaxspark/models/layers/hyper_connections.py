"""Manifold-constrained hyper-connections (Xie et al. 2026; DeepSeek-V4 section 2.2).

The residual is M streams. Around each sublayer F,

    x'_k = post_k F(sum_j pre_j x_j) + sum_j comb_jk x_j

with weights that depend on the token: pre = sigmoid(.) + eps, post = 2 sigmoid(.), and
comb made doubly stochastic by Sinkhorn's iteration, so that mixing expands nothing.
(.) is scale * (fn norm([x_1; ...; x_M])) + base: rows for pre, post and comb (j k, row
by row), each part with a scale of its own. All in float32. `HyperHead` collapses the
streams at the end.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from pallas_kernels import hyper_connections
from pallas_kernels.hyper_connections.ref import collapse, project


class HyperConnection(nnx.Module):
    """Weights of the streams around one sublayer; tensors as in the checkpoint."""

    def __init__(self, config, *, rngs: nnx.Rngs):
        M, D = config.hc_mult, config.hidden_size
        self.fn = nnx.Param(_normal(rngs, ((2 + M) * M, M * D), config))
        self.base = nnx.Param(jnp.zeros(((2 + M) * M,), jnp.float32))
        self.scale = nnx.Param(jnp.ones((3,), jnp.float32))
        self.iterations, self.eps = config.hc_sinkhorn_iters, config.hc_eps
        self.norm_eps = config.rms_norm_eps

    def __call__(
        self, x_TMD: Float[Array, "T M D"]
    ) -> tuple[Float[Array, "T D"], Float[Array, "T M"], Float[Array, "T M M"]]:
        """The sublayer's input, and `post` and `comb` for `hyper_mix`."""
        with jax.named_scope("hyper_connections"):
            return hyper_connections(
                x_TMD,
                self.fn[...],
                self.scale[...],
                self.base[...],
                iterations=self.iterations,
                eps=self.eps,
                norm_eps=self.norm_eps,
            )


class HyperHead(nnx.Module):
    """The last collapse of the streams, before the final norm."""

    def __init__(self, config, *, rngs: nnx.Rngs):
        M, D = config.hc_mult, config.hidden_size
        self.hc_fn = nnx.Param(_normal(rngs, (M, M * D), config))
        self.hc_base = nnx.Param(jnp.zeros((M,), jnp.float32))
        self.hc_scale = nnx.Param(jnp.ones((1,), jnp.float32))
        self.eps, self.norm_eps = config.hc_eps, config.rms_norm_eps

    def __call__(self, x_TMD: Float[Array, "T M D"]) -> Float[Array, "T D"]:
        """One stream of all."""
        mix_TM = project(self.hc_fn[...], x_TMD, self.norm_eps)
        mix_TM = mix_TM * self.hc_scale[...] + self.hc_base[...]
        return collapse(jax.nn.sigmoid(mix_TM) + self.eps, x_TMD)


def _normal(rngs, shape, config):
    normal = jax.random.normal(rngs.params(), shape, jnp.float32)
    return config.initializer_range * normal
