"""Every implementation of `cached_attention` agrees with attention in plain NumPy."""

from contextlib import nullcontext
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from jaxspark.models import FlatTokens
from pallas_kernels import cached_attention
from pallas_kernels.cached_attention import mosaic_tpu, mosaic_tpu_kernel
from pallas_kernels.cached_attention.api import IMPLEMENTATIONS

B, K, G, COUNTS = 3, 3, 2, np.array([4, 0, 2])
# Positions of a slot, width of a head, positions of a page.
SIZES = {"xla": (16, 8, 4), "mosaic_tpu": (80, 128, 16)}


@pytest.fixture(params=IMPLEMENTATIONS, scope="module")
def implementation(request):
    return request.param


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(mosaic_tpu, "CHUNK", 32)


def attend(implementation, *operands, **options):
    """By an implementation; TPU kernels in simulated memory."""
    simulated = pltpu.force_tpu_interpret_mode(
        pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")
    )
    run = jax.jit(
        partial(cached_attention, implementation=implementation, **options),
        static_argnames="implementation",
    )
    with simulated if implementation == "mosaic_tpu" else nullcontext():
        return jax.block_until_ready(run(*operands))


def numpy_attention(q, k, v, tokens, limits, scale):
    out = np.zeros(q.shape)
    for t, n in np.ndindex(q.shape[:2]):
        slot, seen = int(tokens.slots_T[t]), limits[t]
        scores = scale * k[slot, n // G, :seen] @ q[t, n]
        weights = np.exp(scores - scores.max())
        out[t, n] = weights / weights.sum() @ v[slot, n // G, :seen]
    return out


@pytest.fixture
def arrays(implementation):
    """Operands of six tokens, and of padding."""
    S, H, _ = SIZES[implementation]
    random = np.random.default_rng(0)
    tokens = FlatTokens.from_rows(
        jnp.zeros((B, 4), jnp.int32), jnp.zeros(B, jnp.int32), jnp.asarray(COUNTS),
        capacity=7,
    )  # fmt: skip
    q = random.normal(size=(7, K * G, H))
    k, v = random.normal(size=(2, B, K, S, H))
    q, k, v = (jnp.asarray(each, jnp.float32) for each in (q, k, v))
    limits = np.array([1, S, S // 2 - 7, S // 2, S // 2 + 1, 3, 1])
    return q, k, v, tokens, jnp.asarray(limits)


def paged(x_BKSH, size, seed=1):
    """Pages in any order, and which a slot has."""
    order = np.random.default_rng(seed).permutation(B * x_BKSH.shape[2] // size)
    pages = order.reshape(B, -1)
    rows = np.zeros((order.size, K, size, x_BKSH.shape[-1]), np.float32)
    parts = np.asarray(x_BKSH).reshape(B, K, -1, size, x_BKSH.shape[-1])
    rows[pages] = np.moveaxis(parts, 1, 2)
    return jnp.asarray(rows, x_BKSH.dtype), jnp.asarray(pages)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("by_pages", [False, True])
def test_each_token_sees_positions_below_its_limit(
    arrays, implementation, by_pages, dtype
):
    if by_pages and dtype == "bfloat16":
        pytest.skip("pages are the same in every type")
    q, k, v, tokens, limits = arrays
    q, k, v = (each.astype(dtype) for each in (q, k, v))
    H, size = SIZES[implementation][1:]
    expected = numpy_attention(
        *(np.asarray(each, np.float64) for each in (q, k, v)), tokens, limits, H**-0.5
    )
    options = {}
    if by_pages:
        (k, pages), (v, _) = paged(k, size), paged(v, size)
        options = {"pages_BP": pages}
    operands = (q, k, v, tokens, limits)
    seen = attend(implementation, *operands, scale=H**-0.5, **options)
    assert seen.dtype == dtype
    error = np.abs(np.asarray(seen[:6], np.float64) - expected[:6]).max()
    assert error <= {"float32": 1e-5, "bfloat16": 1e-2}[dtype] * np.abs(expected).max()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_how_pages_lie_changes_no_bit(dtype):
    S, H, size = 96, 64, 16
    random = np.random.default_rng(3)
    tokens = FlatTokens.from_rows(
        jnp.zeros((B, 4), jnp.int32), jnp.zeros(B, jnp.int32), jnp.asarray([4, 1, 2])
    )
    q = jnp.asarray(random.normal(size=(12, K * G, H)), dtype)
    k, v = jnp.asarray(random.normal(size=(2, B, K, S, H)), dtype)
    # Two slots begin alike.
    k, v = (each.at[1, :, : 2 * size].set(each[0, :, : 2 * size]) for each in (k, v))
    limits = jnp.asarray(random.integers(1, S + 1, 12)).at[0].set(S)

    def seen(extra, shared):
        """With so many pages of nobody's, and beginnings in the same pages or not."""
        (pages_k, pages), (pages_v, _) = paged(k, size), paged(v, size)
        pages_k, pages_v = (
            jnp.pad(each, ((1, extra), (0, 0), (0, 0), (0, 0)), constant_values=7.0)
            for each in (pages_k, pages_v)
        )
        pages = pages + 1
        if shared:
            pages = pages.at[1, :2].set(pages[0, :2])
        operands = (q, pages_k, pages_v, tokens, limits)
        o = attend("xla", *operands, scale=H**-0.5, pages_BP=pages)
        return np.asarray(o.astype(jnp.float32))[[0, 1, 2, 3, 4, 8, 9]]

    in_place = seen(extra=0, shared=False)
    np.testing.assert_array_equal(in_place, seen(extra=100, shared=False))
    np.testing.assert_array_equal(in_place, seen(extra=0, shared=True))


def test_a_slot_of_many_tokens_is_several_groups(implementation, monkeypatch):
    monkeypatch.setattr(mosaic_tpu, "_ROWS", 6)
    S, H, _ = SIZES[implementation]
    random, counts = np.random.default_rng(2), np.array([7, 3, 0])
    tokens = FlatTokens.from_rows(
        jnp.zeros((B, 7), jnp.int32), jnp.zeros(B, jnp.int32), jnp.asarray(counts)
    )
    q = random.normal(size=(21, K * G, H))
    k, v = random.normal(size=(2, B, K, S, H))
    q, k, v = (jnp.asarray(each, jnp.float32) for each in (q, k, v))
    limits = jnp.asarray(random.integers(1, S + 1, 21))
    seen = attend(implementation, q, k, v, tokens, limits, scale=0.3)
    expected = numpy_attention(q, k, v, tokens, limits, 0.3)
    np.testing.assert_allclose(seen[:10], expected[:10], atol=1e-5)


def test_garbage_past_the_limit_is_not_read(arrays, implementation):
    q, k, v, tokens, _ = arrays
    limits = jnp.full(7, 6)
    clean = attend(implementation, q, k, v, tokens, limits, scale=1.0)
    k, v = k.at[:, :, 6:].set(1e4), v.at[:, :, 6:].set(-1e4)
    dirty = attend(implementation, q, k, v, tokens, limits, scale=1.0)
    np.testing.assert_array_equal(clean[:6], dirty[:6])


def test_gradients_are_those_of_the_reference(arrays, implementation):
    q, k, v, tokens, limits = arrays

    def loss(implementation, *qkv):
        o = cached_attention(
            *qkv, tokens, limits, scale=0.3, implementation=implementation
        )
        return jnp.sum(o[:6] ** 2)

    simulated = pltpu.force_tpu_interpret_mode(pltpu.InterpretParams())
    with simulated if implementation == "mosaic_tpu" else nullcontext():
        mine = jax.grad(partial(loss, implementation), (0, 1, 2))(q, k, v)
    expected = jax.grad(partial(loss, "xla"), (0, 1, 2))(q, k, v)
    jax.tree.map(partial(np.testing.assert_allclose, atol=1e-4), mine, expected)


def test_a_mistake_in_the_kernel_is_found(arrays, monkeypatch):
    """A chunk too few."""
    monkeypatch.setattr(
        mosaic_tpu_kernel, "chunks_of", lambda chunks_ref, group: chunks_ref[group] - 1
    )
    if arrays[0].shape[-1] % 128:
        pytest.skip("of the kernel")
    q, k, v, tokens, limits = arrays
    seen = attend("mosaic_tpu", *arrays, scale=0.3)
    expected = numpy_attention(q, k, v, tokens, limits, 0.3)
    assert np.abs(seen[:6] - expected[:6]).max() > 0.01


def test_what_there_is_no_implementation_for_is_named(arrays):
    with pytest.raises(ValueError, match="no implementation 'cuda'.*'xla'"):
        cached_attention(*arrays, scale=1.0, implementation="cuda")
    narrow = [each[..., :8] for each in arrays[:3]]
    with pytest.raises(ValueError, match="multiple of 128 wide, got 8"):
        cached_attention(*narrow, *arrays[3:], scale=1.0, implementation="mosaic_tpu")
