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

from jaxspark.models.layers.linear import product
from jaxspark.models.layers.norm import normalise


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
        self, x_MDT: Float[Array, "M D T"]
    ) -> tuple[Float[Array, "D T"], Float[Array, "M T"], Float[Array, "M M T"]]:
        """The sublayer's input, and `post` and `comb` for `mix`."""
        M, D, T = x_MDT.shape
        mix_XT = project(self.fn[...], x_MDT, self.norm_eps)
        scale_X = jnp.repeat(
            self.scale[...], jnp.array([M, M, M * M]), total_repeat_length=M * (2 + M)
        )
        mix_XT = mix_XT * scale_X[:, None] + self.base[...][:, None]
        pre_MT = jax.nn.sigmoid(mix_XT[:M]) + self.eps
        post_MT = 2 * jax.nn.sigmoid(mix_XT[M : 2 * M])
        comb_MMT = sinkhorn(mix_XT[2 * M :].reshape(M, M, T), self.iterations, self.eps)
        return collapse(pre_MT, x_MDT), post_MT, comb_MMT


class HyperHead(nnx.Module):
    """The last collapse of the streams, before the final norm."""

    def __init__(self, config, *, rngs: nnx.Rngs):
        M, D = config.hc_mult, config.hidden_size
        self.hc_fn = nnx.Param(_normal(rngs, (M, M * D), config))
        self.hc_base = nnx.Param(jnp.zeros((M,), jnp.float32))
        self.hc_scale = nnx.Param(jnp.ones((1,), jnp.float32))
        self.eps, self.norm_eps = config.hc_eps, config.rms_norm_eps

    def __call__(self, x_MDT: Float[Array, "M D T"]) -> Float[Array, "D T"]:
        """One stream of all."""
        mix_MT = project(self.hc_fn[...], x_MDT, self.norm_eps)
        mix_MT = mix_MT * self.hc_scale[...] + self.hc_base[...][:, None]
        return collapse(jax.nn.sigmoid(mix_MT) + self.eps, x_MDT)


def project(
    fn_XY: Float[Array, "X MD"], x_MDT: Float[Array, "M D T"], eps: float
) -> Float[Array, "X T"]:
    """fn times the normed concatenation of all streams."""
    return product(fn_XY, normalise(x_MDT.reshape(-1, x_MDT.shape[-1]), eps))


def sinkhorn(
    mix_MMT: Float[Array, "M M T"], iterations: int, eps: float
) -> Float[Array, "M M T"]:
    """Doubly stochastic matrices from logits: rows by softmax, then columns, and so on.

    It ends on a column norm, as the released models do: the sum over the first axis,
    from which streams are mixed, is 1.
    """
    comb_MMT = jax.nn.softmax(mix_MMT, axis=1) + eps
    comb_MMT /= comb_MMT.sum(0, keepdims=True) + eps
    for _ in range(iterations - 1):
        comb_MMT /= comb_MMT.sum(1, keepdims=True) + eps
        comb_MMT /= comb_MMT.sum(0, keepdims=True) + eps
    return comb_MMT


def collapse(
    pre_MT: Float[Array, "M T"], x_MDT: Float[Array, "M D T"]
) -> Float[Array, "D T"]:
    """sum_j pre_j x_j."""
    return (pre_MT[:, None] * x_MDT).sum(0).astype(x_MDT.dtype)


def mix(
    y_DT: Float[Array, "D T"],
    x_MDT: Float[Array, "M D T"],
    post_MT: Float[Array, "M T"],
    comb_MMT: Float[Array, "M M T"],
) -> Float[Array, "M D T"]:
    """x'_k = post_k y + sum_j comb_jk x_j."""
    mixed_MDT = (comb_MMT[:, :, None] * x_MDT[:, None]).sum(0)
    return (post_MT[:, None] * y_DT + mixed_MDT).astype(x_MDT.dtype)


def _normal(rngs, shape, config):
    normal = jax.random.normal(rngs.params(), shape, jnp.float32)
    return config.initializer_range * normal
