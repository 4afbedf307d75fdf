"""Quantized: what the device reads is what the host would, bit for bit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxspark.quantization import blocks
from pallas_kernels import grouped_matmul
from pallas_kernels import transposed as turned
from pallas_kernels.quantized import LARGEST_SCALE, Quantized, dense
from pallas_kernels.transposed import transpose, transposed

HOST = {
    "fp4": (blocks.quantize_fp4, blocks.dequantize_fp4),
    "fp8": (blocks.quantize_fp8, blocks.dequantize_fp8),
}


def quantized(elements, scales, dtype=jnp.float32):
    scales = np.asarray(scales).view(np.uint8)
    return Quantized(jnp.asarray(elements), jnp.asarray(scales), dtype)


def flushed(x):
    """Numbers below float32's normal ones are 0 to XLA."""
    return np.where(np.abs(x) < np.finfo(np.float32).tiny, 0, x)


def stack(kind, shapes, seed=0, dtype=jnp.float32):
    """Matrices and, in one array, the same dequantized by the host."""
    random = np.random.default_rng(seed)
    pairs = [HOST[kind][0](random.normal(size=s).astype(np.float32)) for s in shapes]
    elements, scales = (np.stack(parts) for parts in zip(*pairs))
    plain = np.stack([HOST[kind][1](*pair) for pair in pairs])
    return quantized(elements, scales, dtype), plain


@pytest.mark.parametrize("kind", HOST)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_device_reads_what_the_host_reads(kind, dtype):
    w, plain = stack(kind, 3 * [(200, 320)], dtype=dtype)
    assert w.shape == plain.shape
    assert w.dtype == w.dense().dtype == dtype
    np.testing.assert_array_equal(np.asarray(jax.jit(dense)(w), np.float32), plain)
    np.testing.assert_array_equal(np.asarray(dense(w[1]), np.float32), plain[1])


def test_every_fp4_pattern_and_every_scale():
    packed = np.arange(256, dtype=np.uint8).view(np.int8).reshape(16, 16)
    for byte in (0, 1, 2, 126, 127, 128, 200, LARGEST_SCALE - 2):
        scales = np.full((16, 1), byte, np.uint8)
        expected = flushed(blocks.dequantize_fp4(packed, scales))
        np.testing.assert_array_equal(quantized(packed, scales).dense(), expected)


def test_every_fp8_pattern():
    byte = np.arange(256, dtype=np.uint8)
    elements = byte[byte & 0x7F != 0x7F].view(blocks.FP8).reshape(2, -1)
    for scale in (1, 127, LARGEST_SCALE - 8):
        scales = np.full((1, 1), scale, np.uint8)
        expected = flushed(blocks.dequantize_fp8(elements, scales))
        np.testing.assert_array_equal(quantized(elements, scales).dense(), expected)


@pytest.mark.parametrize("kind", HOST)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_turned_over_they_are_the_same(kind, dtype):
    w, plain = stack(kind, 3 * [(200, 384)], dtype=dtype)
    seen = transposed(w)
    assert seen.shape == w.shape and seen.dtype == dtype
    assert seen.packed == w.packed
    # FP8 has a scale for every row of a block.
    assert seen.elements.nbytes == w.elements.nbytes
    np.testing.assert_array_equal(np.asarray(jax.jit(dense)(seen), np.float32), plain)
    np.testing.assert_array_equal(np.asarray(dense(seen[1]), np.float32), plain[1])


def test_every_pattern_turned_over():
    packed = np.arange(256, dtype=np.uint8).view(np.int8).reshape(2, 128)
    byte = np.arange(256, dtype=np.uint8)
    finite = np.where(byte & 0x7F == 0x7F, 0, byte).view(blocks.FP8).reshape(2, 128)
    for scale in (0, 1, 127, 200, turned.LARGEST_SCALE):
        for elements, shape in ((packed, (2, 8)), (finite, (1, 1))):
            w = quantized(elements, np.full(shape, scale, np.uint8))
            np.testing.assert_array_equal(transposed(w).dense(), w.dense())


@pytest.mark.parametrize(
    "width, scale, match",
    [(48, 127, "96 elements"), (64, 250, r"2\^123 is above 2\^117")],
)
def test_what_cannot_be_turned_over_is_told(width, scale, match):
    elements = np.zeros((4, width), np.int8)
    with pytest.raises(ValueError, match=match):
        transpose(elements, np.full((4, width // 16), scale, np.uint8))


@pytest.mark.parametrize("kind", HOST)
def test_grouped_products_are_those_of_the_dequantized_matrices(kind):
    w, plain = stack(kind, 6 * [(40, 64)])
    x_AI = np.random.default_rng(1).normal(size=(50, 64)).astype(np.float32)
    group_sizes_E = np.array([17, 0, 30])

    def through(w, x_AI):
        return grouped_matmul(x_AI, w, group_sizes_E, group_offset=2)

    np.testing.assert_allclose(
        jax.jit(through)(w, x_AI), through(plain, x_AI), atol=1e-5
    )
    # Rows have gradients; matrices in blocks have none.
    mine, theirs = (
        jax.grad(lambda x_AI, w=w: jnp.sum(through(w, x_AI) ** 2))(x_AI)
        for w in (w, jnp.asarray(plain))
    )
    np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("kind", HOST)
def test_only_groups_with_rows_are_dequantized(kind):
    """The compiled program never holds all matrices dequantized."""
    w, plain = stack(kind, 64 * [(128, 256)])
    x_AI = jnp.ones((8, 256))
    compiled = (
        jax.jit(lambda w, x: grouped_matmul(x, w, jnp.zeros(64, int).at[5].set(8)))
        .lower(w, x_AI)
        .compile()
    )
    assert compiled.memory_analysis().temp_size_in_bytes < plain.nbytes / 16
