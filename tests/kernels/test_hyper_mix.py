"""hyper_mix: the streams after a sublayer, by every implementation.

The kernel runs in simulated memory of a TPU, where what was never written is NaN and
two accesses that nothing orders are an error.
"""

from contextlib import nullcontext
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import hyper_mix
from pallas_kernels.hyper_mix import mosaic_tpu
from pallas_kernels.hyper_mix.api import IMPLEMENTATIONS

M = 4
TOLERANCE = {"float32": 1e-5, "bfloat16": 1e-2}


def run(implementation, function, *operands):
    """A function of the op by one implementation."""
    op = partial(hyper_mix, implementation=implementation)
    simulated = pltpu.force_tpu_interpret_mode(
        pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")
    )
    with simulated if implementation == "mosaic_tpu" else nullcontext():
        return jax.block_until_ready(jax.jit(partial(function, op))(*operands))


def mixed(op, *operands):
    return op(*operands)


def made(tokens, width, dtype="float32"):
    """The output, the streams, and weights of both."""
    random = np.random.default_rng(tokens)
    shapes = (tokens, width), (tokens, M, width), (tokens, M), (tokens, M, M)
    dtypes = dtype, dtype, "float32", "float32"
    return [
        jnp.asarray(random.normal(size=shape), each)
        for shape, each in zip(shapes, dtypes)
    ]


def plain(*operands):
    """In float64."""
    y_TD, x_TMD, post_TM, comb_TMM = (np.asarray(x, np.float64) for x in operands)
    old_TMD = np.einsum("Tjk,TjD->TkD", comb_TMM, x_TMD)
    return np.einsum("Tk,TD->TkD", post_TM, y_TD) + old_TMD


def far(seen, expected):
    """The largest difference, relative to the largest number."""
    seen = np.asarray(seen, np.float64)
    assert np.isfinite(seen).all()
    return np.abs(seen - expected).max() / np.abs(expected).max()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", TOLERANCE)
# Tokens around a block's edge; widths of one part and of several.
@pytest.mark.parametrize("tokens, width", [(1, 128), (128, 256), (150, 384)])
def test_every_stream_is_made_of_all(implementation, tokens, width, dtype):
    operands = made(tokens, width, dtype)
    seen = run(implementation, mixed, *operands)
    assert seen.dtype == dtype
    assert far(seen, plain(*operands)) <= TOLERANCE[dtype]


def test_gradients_are_those_of_the_reference():
    operands = made(9, 128)

    def gradients(op, *operands):
        return jax.grad(lambda *all: jnp.sum(jnp.sin(op(*all))), (0, 1, 2, 3))(
            *operands
        )

    mine, theirs = (run(name, gradients, *operands) for name in ("mosaic_tpu", "xla"))
    for each, expected in zip(mine, theirs, strict=True):
        assert far(each, np.asarray(expected)) <= 1e-5


def test_the_kernel_runs_in_programs_with_64_bits():
    operands = made(3, 128)
    with jax.enable_x64(True):
        seen = run("mosaic_tpu", mixed, *operands)
    assert far(seen, plain(*operands)) <= 1e-5


def test_a_mistake_in_the_kernel_is_found(monkeypatch):
    """Only some of the columns."""
    monkeypatch.setattr(mosaic_tpu.before, "columns_at_once", lambda width: 256)
    operands = made(3, 384)
    with pytest.raises(AssertionError):
        assert far(run("mosaic_tpu", mixed, *operands), plain(*operands)) <= 1e-3


@pytest.mark.parametrize(
    "shape, dtype, match",
    [
        ((2, 4, 100), "float32", "multiples of 128, got"),
        ((2, 2, 128), "float32", "4 streams"),
        ((2, 4, 128), "float16", "got float16"),
        ((2, 4, 16384), "float32", "28 MB for 128 tokens, too little for 96"),
    ],
)
def test_what_the_kernel_cannot_take_is_told_and_left_to_xla(shape, dtype, match):
    tokens, streams, width = shape
    operands = (
        jnp.ones((tokens, width), dtype),
        jnp.ones(shape, dtype),
        jnp.ones((tokens, streams)),
        jnp.ones((tokens, streams, streams)),
    )
    with pytest.raises(ValueError, match=match):
        hyper_mix(*operands, implementation="mosaic_tpu")
    assert hyper_mix(*operands).shape == shape
