"""grouped_matmul: every row meets its group's matrix, in values and gradients.

One suite for all implementations and kinds of matrices; kernels of TPUs run in
simulated memory, where what was never written is NaN and two accesses that nothing
orders are an error. Rows of no group are NaN everywhere.
"""

from contextlib import nullcontext

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from jaxspark.quantization import blocks
from pallas_kernels import grouped_matmul
from pallas_kernels.grouped_matmul import mosaic_tpu, mosaic_tpu_kernel
from pallas_kernels.quantized import Quantized, dense
from pallas_kernels.transposed import transposed

SIZES = {
    "even": [4, 4, 4],
    "some empty": [0, 11, 0, 1, 0],
    "one has all": [0, 0, 20],
    "none": [0, 0],
    "tiles and a bit": [130, 1, 300, 9],
}
# Outputs and inputs: of kernels two parts of the one, two chunks of the other.
SHAPES = {"xla": (5, 6), "mosaic_tpu": (256, 256)}
KINDS = {"fp4": blocks.quantize_fp4, "fp8": blocks.quantize_fp8}
TOLERANCE = {"float32": 1e-5, "bfloat16": 1e-2}


@pytest.fixture(autouse=True)
def small_steps(monkeypatch):
    monkeypatch.setattr(mosaic_tpu_kernel, "BROADCAST_LOADS", False)
    monkeypatch.setattr(mosaic_tpu, "_WIDTHS", (128,))


def matrices(kind, shape, dtype, seed=0):
    """Plain or turned-over matrices, of very different magnitudes."""
    random = np.random.default_rng(seed)
    w_GOI = random.normal(size=shape) * 2.0 ** random.integers(-8, 3, (*shape[:2], 1))
    if kind == "plain":
        return jnp.asarray(w_GOI, dtype)
    pairs = [KINDS[kind](w_OI.astype(np.float32)) for w_OI in w_GOI]
    elements, scales = (np.stack(parts) for parts in zip(*pairs))
    return transposed(Quantized(elements, scales.view(np.uint8), jnp.dtype(dtype)))


def rows(sizes, width, dtype, seed):
    """Rows of all groups, then some of none, which are NaN."""
    x_AI = np.random.default_rng(seed).normal(size=(sum(sizes) + 3, width))
    x_AI[sum(sizes) :] = np.nan
    return jnp.asarray(x_AI, dtype)


def plain(x_AI, w_GOI, dy_AO, sizes, group_offset):
    """Outputs and gradients in float64, group after group."""
    x_AI, w_GOI, dy_AO = (np.asarray(x, np.float64) for x in (x_AI, w_GOI, dy_AO))
    y_AO, dx_AI, dw_GOI = (np.zeros(x.shape) for x in (dy_AO, x_AI, w_GOI))
    start = 0
    for group, size in enumerate(sizes, group_offset):
        own, start = slice(start, start + size), start + size
        y_AO[own], dx_AI[own] = x_AI[own] @ w_GOI[group].T, dy_AO[own] @ w_GOI[group]
        dw_GOI[group] = dy_AO[own].T @ x_AI[own]
    return y_AO, dx_AI, dw_GOI


def far(seen, expected):
    """The largest difference, relative to the largest number."""
    assert np.isfinite(np.asarray(seen, np.float64)).all()
    largest = np.abs(expected).max(initial=0) or 1.0
    return np.abs(np.asarray(seen, np.float64) - expected).max(initial=0) / largest


def check(implementation, kind, dtype, sizes, x64=False):
    """Values and gradients against float64; matrices of two layers, the second's."""
    shape = SHAPES[implementation]
    w_GOI = matrices(kind, (2 * len(sizes), *shape), dtype)
    dy_AO, x_AI = (rows(sizes, n, dtype, seed) for seed, n in enumerate(shape))

    @jax.jit
    def run(x_AI, w_GOI, dy_AO, sizes):
        def of_rows(*arrays):
            matrices = arrays[1] if arrays[1:] else w_GOI
            return grouped_matmul(
                arrays[0],
                matrices,
                sizes,
                group_offset=len(sizes),
                implementation=implementation,
            )

        operands = (x_AI, w_GOI) if kind == "plain" else (x_AI,)
        y_AO, back = jax.vjp(of_rows, *operands)
        return y_AO, *back(dy_AO)

    simulated = pltpu.force_tpu_interpret_mode(
        pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")
    )
    with (
        nullcontext() if implementation == "xla" else simulated,
        jax.enable_x64(x64),
    ):
        seen = jax.block_until_ready(run(x_AI, w_GOI, dy_AO, np.array(sizes)))
    expected = plain(x_AI, dense(w_GOI), dy_AO, sizes, len(sizes))
    for mine, theirs in zip(seen, expected):
        assert mine.dtype == dtype
        assert far(mine, theirs) <= TOLERANCE[dtype]


@pytest.mark.parametrize("name", SIZES)
def test_xla_multiplies_rows_with_their_groups_matrix(name):
    check("xla", "plain", "float32", SIZES[name])


@pytest.mark.parametrize(
    "kind, dtype, name",
    [
        ("plain", "float32", "some empty"),
        ("plain", "bfloat16", "one has all"),
        # Few rows to a group: scales come after the product.
        ("fp4", "bfloat16", "even"),
        ("fp4", "bfloat16", "some empty"),
        ("fp8", "bfloat16", "some empty"),
        # Many, or float32: before it.
        ("fp4", "bfloat16", "tiles and a bit"),
        ("fp4", "float32", "one has all"),
        ("fp8", "float32", "even"),
        ("fp4", "bfloat16", "none"),
    ],
)
def test_the_kernel_multiplies_rows_with_their_groups_matrix(kind, dtype, name):
    check("mosaic_tpu", kind, dtype, SIZES[name])


def test_bfloat16_sums_in_float32():
    check("xla", "plain", "bfloat16", [40, 40])


def test_the_kernel_runs_in_programs_with_64_bits():
    check("mosaic_tpu", "fp4", "bfloat16", [3, 0, 2], x64=True)


def test_a_layer_is_found_by_its_offset_as_data():
    w_GOI = matrices("plain", (4, 5, 6), "float32")
    x_AI = jnp.ones((3, 6))
    run = jax.jit(
        lambda at: grouped_matmul(x_AI, w_GOI, jnp.array([3]), group_offset=at)
    )
    for at in range(4):
        np.testing.assert_allclose(run(at), x_AI @ w_GOI[at].T, rtol=1e-5)


@pytest.mark.parametrize(
    "kind, dtype, shape, match",
    [
        ("plain", "float32", (2, 5, 6), "multiples of 128, got 4 rows"),
        ("plain", "float16", (2, 128, 128), "not float16"),
        ("released", "float32", (2, 128, 128), "pallas_kernels.transposed"),
    ],
)
def test_what_the_kernel_cannot_take_is_told_and_left_to_xla(kind, dtype, shape, match):
    if kind == "released":
        w_GOI = Quantized(
            jnp.zeros((*shape[:2], shape[2] // 2), jnp.int8),
            jnp.zeros((*shape[:2], shape[2] // 32), jnp.uint8),
            jnp.dtype(dtype),
        )
    else:
        w_GOI = jnp.zeros(shape, dtype)
    operands = jnp.zeros((4, shape[2]), dtype), w_GOI, jnp.array([1, 2])
    with pytest.raises(ValueError, match=match):
        grouped_matmul(*operands, implementation="mosaic_tpu")
    assert grouped_matmul(*operands).shape == (4, shape[1])


def test_widths_that_do_not_fit_are_an_error():
    with pytest.raises(ValueError, match="width 6"):
        grouped_matmul(jnp.ones((2, 6)), jnp.ones((1, 5, 7)), jnp.array([2]))


def test_an_unknown_implementation_is_an_error():
    with pytest.raises(ValueError, match="xla"):
        grouped_matmul(
            jnp.ones((1, 6)), jnp.ones((1, 5, 6)), jnp.array([1]), implementation="cuda"
        )
