"""hyper_connections: coefficients of the streams, and their weighted sum.

One suite for all implementations; the kernel runs in simulated memory of a TPU, where
what was never written is NaN and two accesses that nothing orders are an error.
"""

from contextlib import nullcontext
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import hyper_connections
from pallas_kernels.hyper_connections import mosaic_tpu
from pallas_kernels.hyper_connections.api import IMPLEMENTATIONS

M, X = 4, 24
OPTIONS = {"iterations": 3, "eps": 1e-3, "norm_eps": 1e-2}
TOLERANCE = {"float32": 1e-5, "bfloat16": 1e-2}
OPERANDS = (0, 1, 2, 3)


@pytest.fixture(params=IMPLEMENTATIONS)
def implementation(request):
    return request.param


def run(implementation, function, *operands):
    """A function of the op by one implementation."""
    op = partial(hyper_connections, implementation=implementation, **OPTIONS)
    simulated = pltpu.force_tpu_interpret_mode(
        pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")
    )
    with simulated if implementation == "mosaic_tpu" else nullcontext():
        return jax.block_until_ready(jax.jit(partial(function, op))(*operands))


def made(tokens, width, dtype="float32"):
    """Streams of very different sizes, fn, scale and base."""
    random = np.random.default_rng(tokens)
    x_TMD = random.normal(size=(tokens, M, width))
    x_TMD *= 2.0 ** random.integers(-6, 6, (tokens, 1, 1))
    fn_XY = random.normal(size=(X, M * width)) / np.sqrt(M * width)
    rest = random.normal(size=3), random.normal(size=X)
    fn_XY, *rest = (jnp.asarray(each, "float32") for each in (fn_XY, *rest))
    return jnp.asarray(x_TMD, dtype), fn_XY, *rest


def plain(x_TMD, fn_XY, scale, base_X):
    """In float64, as the report writes it."""
    x_TMD, fn_XY, scale, base_X = (
        np.asarray(each, np.float64) for each in (x_TMD, fn_XY, scale, base_X)
    )
    x_TY = x_TMD.reshape(len(x_TMD), -1)
    mean_T1 = np.mean(x_TY**2, axis=1, keepdims=True)
    z_TX = x_TY / np.sqrt(mean_T1 + OPTIONS["norm_eps"]) @ fn_XY.T
    z_TX = z_TX * np.repeat(scale, [M, M, M * M]) + base_X
    eps, sigmoid = OPTIONS["eps"], lambda z: 1 / (1 + np.exp(-z))
    comb_TMM = np.exp(z_TX[:, 2 * M :]).reshape(-1, M, M)
    comb_TMM = comb_TMM / comb_TMM.sum(2, keepdims=True) + eps
    for turn in range(OPTIONS["iterations"]):
        if turn:
            comb_TMM = comb_TMM / (comb_TMM.sum(2, keepdims=True) + eps)
        comb_TMM = comb_TMM / (comb_TMM.sum(1, keepdims=True) + eps)
    pre_TM = sigmoid(z_TX[:, :M]) + eps
    h_TD = np.einsum("TM,TMD->TD", pre_TM, x_TMD)
    return h_TD, 2 * sigmoid(z_TX[:, M : 2 * M]), comb_TMM


def far(seen, expected):
    """The largest difference of a token, relative to its largest number."""
    seen, expected = (np.asarray(x, np.float64) for x in (seen, expected))
    assert np.isfinite(seen).all()
    axes = tuple(range(1, expected.ndim))
    largest_T = np.abs(expected).max(axes)
    return (np.abs(seen - expected).max(axes) / largest_T).max()


@pytest.mark.parametrize("dtype", TOLERANCE)
# Tokens around a block's edge; widths of one part and of several.
@pytest.mark.parametrize("tokens, width", [(1, 128), (128, 256), (150, 384)])
def test_coefficients_and_the_streams_sum(implementation, tokens, width, dtype):
    operands = made(tokens, width, dtype)
    seen = run(implementation, lambda op, *operands: op(*operands), *operands)
    assert [each.dtype for each in seen] == [jnp.dtype(dtype), *2 * [jnp.float32]]
    # Coefficients are in float32, whatever streams are in.
    tolerances = (TOLERANCE[dtype], 1e-5, 1e-5)
    for mine, theirs, most in zip(seen, plain(*operands), tolerances, strict=True):
        assert mine.shape == theirs.shape
        assert far(mine, theirs) <= most


def test_gradients_are_those_of_the_reference():
    operands = made(9, 128)

    def gradients(op, *operands):
        def loss(*operands):
            return sum(jnp.sum(jnp.sin(each)) for each in op(*operands))

        return jax.grad(loss, OPERANDS)(*operands)

    mine, theirs = (run(name, gradients, *operands) for name in ("mosaic_tpu", "xla"))
    for each, expected in zip(mine, theirs, strict=True):
        scale = np.abs(expected).max()
        np.testing.assert_allclose(each, expected, atol=1e-5 * scale)


def test_the_kernel_runs_in_programs_with_64_bits():
    operands = made(3, 128)
    with jax.enable_x64(True):
        seen = run("mosaic_tpu", lambda op, *operands: op(*operands), *operands)
    for mine, theirs in zip(seen, plain(*operands)):
        assert far(mine, theirs) <= 1e-5


def test_a_mistake_in_the_kernel_is_found(monkeypatch):
    """An iteration too few."""
    right = mosaic_tpu._sinkhorn
    monkeypatch.setattr(
        mosaic_tpu, "_sinkhorn", lambda z, turns, eps: right(z, turns - 1, eps)
    )
    operands = made(3, 128)
    seen = run("mosaic_tpu", lambda op, *operands: op(*operands), *operands)
    assert far(seen[2], plain(*operands)[2]) > 1e-3


@pytest.mark.parametrize(
    "shape, dtype, match",
    [
        ((2, 4, 100), "float32", "multiples of 128, got"),
        ((2, 2, 128), "float32", "4 streams"),
        ((0, 4, 128), "float32", "takes tokens"),
        ((2, 4, 128), "float16", "got float16"),
        ((2, 4, 16384), "float32", "28 MB for 128 tokens, too little for 92"),
    ],
)
def test_what_the_kernel_cannot_take_is_told_and_left_to_xla(shape, dtype, match):
    tokens, streams, width = shape
    rows = (2 + streams) * streams
    operands = (
        jnp.ones(shape, dtype),
        jnp.ones((rows, streams * width)),
        jnp.ones(3),
        jnp.ones(rows),
    )
    with pytest.raises(ValueError, match=match):
        hyper_connections(*operands, **OPTIONS, implementation="mosaic_tpu")
    assert hyper_connections(*operands, **OPTIONS)[0].shape == (tokens, width)
