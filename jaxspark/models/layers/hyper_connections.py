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

from jaxspark.models.layers.linear import matmul
from pallas_kernels.precision import upcast


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
        """The sublayer's input, and `post` and `comb` for `mix`."""
        T, M, _ = x_TMD.shape
        mix_TX = project(self.fn[...], x_TMD, self.norm_eps)
        scale_X = jnp.repeat(
            self.scale[...], jnp.array([M, M, M * M]), total_repeat_length=M * (2 + M)
        )
        mix_TX = mix_TX * scale_X + self.base[...]
        pre_TM = jax.nn.sigmoid(mix_TX[:, :M]) + self.eps
        post_TM = 2 * jax.nn.sigmoid(mix_TX[:, M : 2 * M])
        comb_TMM = mix_TX[:, 2 * M :].reshape(T, M, M)
        comb_TMM = sinkhorn(comb_TMM, self.iterations, self.eps)
        return collapse(pre_TM, x_TMD), post_TM, comb_TMM


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


def project(
    fn_XY: Float[Array, "X MD"], x_TMD: Float[Array, "T M D"], eps: float
) -> Float[Array, "T X"]:
    """fn times the normed concatenation of all streams.

    The norm is applied to the product, and streams are never laid side by side.
    """
    streams = [upcast(x_TD) for x_TD in unstacked(x_TMD)]
    width = x_TMD.shape[1] * x_TMD.shape[2]
    square_T1 = sum(jnp.sum(jnp.square(x), 1, keepdims=True) for x in streams)
    fn_parts = jnp.split(fn_XY, len(streams), axis=1)
    product_TX = sum(matmul(x, fn_XD) for x, fn_XD in zip(streams, fn_parts))
    return product_TX * jax.lax.rsqrt(square_T1 / width + eps)


def sinkhorn(
    mix_TMM: Float[Array, "T M M"], iterations: int, eps: float
) -> Float[Array, "T M M"]:
    """Doubly stochastic matrices from logits: rows by softmax, then columns, and so on.

    It ends on a column norm, as the released models do: the sum over the first M,
    from which streams are mixed, is 1.
    """
    comb_TMM = jax.nn.softmax(mix_TMM, axis=2) + eps
    comb_TMM /= comb_TMM.sum(1, keepdims=True) + eps
    for _ in range(iterations - 1):
        comb_TMM /= comb_TMM.sum(2, keepdims=True) + eps
        comb_TMM /= comb_TMM.sum(1, keepdims=True) + eps
    return comb_TMM


def collapse(
    pre_TM: Float[Array, "T M"], x_TMD: Float[Array, "T M D"]
) -> Float[Array, "T D"]:
    """sum_j pre_j x_j."""
    return _weighted(pre_TM, unstacked(x_TMD)).astype(x_TMD.dtype)


def mix(
    y_TD: Float[Array, "T D"],
    x_TMD: Float[Array, "T M D"],
    post_TM: Float[Array, "T M"],
    comb_TMM: Float[Array, "T M M"],
) -> Float[Array, "T M D"]:
    """x'_k = post_k y + sum_j comb_jk x_j."""
    streams = unstacked(x_TMD)
    mixed = [
        post_TM[:, k, None] * y_TD + _weighted(comb_TMM[:, :, k], streams)
        for k in range(len(streams))
    ]
    return jnp.stack(mixed, axis=1).astype(x_TMD.dtype)


def unstacked(x_TMD: Float[Array, "T M D"]) -> list[Float[Array, "T D"]]:
    """The streams one by one: sums over them are cheaper than over a short axis."""
    return [x_TMD[:, m] for m in range(x_TMD.shape[1])]


def _weighted(weights_TM, streams):
    return sum(weights_TM[:, m, None] * x_TD for m, x_TD in enumerate(streams))


def _normal(rngs, shape, config):
    normal = jax.random.normal(rngs.params(), shape, jnp.float32)
    return config.initializer_range * normal
