"""Sizes of kernels' blocks: by the table of the chip, else the kernels' own."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import Ragged, block_sizes, cached_attention, grouped_matmul, verify
from pallas_kernels.block_sizes import ENVIRONMENT, chip_of, shape, trying
from tests.kernels.drawn import rows_of, simulated

TABLE = {"verify": {"bfloat16 T=256 D=4096": {"sizes": {"tokens": 1024}}}}


@pytest.fixture
def tables(tmp_path, monkeypatch):
    """A folder of tables in use, and the chip that is traced for."""

    def put(ops, chip="v5p", kind="TPU v5"):
        text = ops if isinstance(ops, str) else json.dumps({"ops": ops})
        (tmp_path / f"{chip}.json").write_text(text)
        monkeypatch.setenv(ENVIRONMENT, str(tmp_path))
        monkeypatch.setattr(block_sizes, "expected_kind", lambda: kind)
        block_sizes.table.cache_clear()

    yield put
    block_sizes.table.cache_clear()


def sizes(T=192, D=4096):
    of = shape(jnp.bfloat16, T=T, D=D)
    return block_sizes.block_sizes("verify", of, rows=512, tokens=512)


def test_the_chips_table_knows_better_than_a_kernel(tables):
    tables(TABLE)
    assert sizes(T=192) == sizes(T=129) == sizes(T=256) == (512, 1024)


@pytest.mark.parametrize(
    "other",
    [{"T": 128}, {"D": 7168}, {"kind": "TPU v5 lite"}, {"kind": "cpu"}],
    ids=str,
)
def test_what_no_table_knows_is_as_kernels_say(tables, other):
    tables(TABLE, kind=other.pop("kind", "TPU v5"))
    assert sizes(**other) == (512, 512)


@pytest.mark.parametrize(
    ("kind", "chip"),
    [
        ("TPU v5 lite", "v5e"),
        ("TPU v5e", "v5e"),
        ("TPU v5", "v5p"),
        ("TPU v5p", "v5p"),
        ("TPU v6 lite", "v6e"),
        ("TPU7x", "tpu7x"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA A100-SXM4-40GB", None),
        ("TPU v4", None),
        ("cpu", None),
    ],
)
def test_chips_are_known_by_what_they_call_themselves(kind, chip):
    assert chip_of(kind) == chip


@pytest.mark.parametrize(
    ("ops", "says"),
    [
        ('{"ops": {"verify": ', "v5p.json: is no table of block sizes"),
        ('{"verify": {}}', "v5p.json: is no table of block sizes"),
        ('{"ops": {"verify": {"x": {"tokens": 8}}}}', "is no table of block sizes"),
        ('{"ops": {"verify": [1]}}', "is no table of block sizes"),
        ({"width": 512}, "verify: bfloat16 T=256 D=4096: has 'width', expected rows, "),
        ({"tokens": 500}, "tokens is 500, expected a power of two"),
        ({"tokens": 0}, "tokens is 0, expected"),
        ({"tokens": "512"}, "tokens is '512', expected"),
        ({"tokens": True}, "tokens is True, expected"),
    ],
    ids=str,
)
def test_malformed_tables_are_refused_by_name(tables, ops, says):
    if isinstance(ops, dict):
        ops = {"verify": {"bfloat16 T=256 D=4096": {"sizes": ops}}}
    tables(ops)
    with pytest.raises(ValueError, match=re.escape(says)):
        sizes()


def verified(implementation):
    """Rows of hidden states, each with a draw."""
    random = np.random.default_rng(0)
    hidden_TD, head_VD = (
        jnp.asarray(random.normal(size=(count, 128)), jnp.float32)
        for count in (19, 700)
    )
    rows, _ = rows_of(19)
    draws = verify(hidden_TD, head_VD, rows, implementation=implementation)
    return draws.place_R, draws.logit_R, draws.log_prob(draws.logit_R, rows.rate_R)


def multiplied(implementation):
    """Groups of rows, one of them empty."""
    random = np.random.default_rng(0)
    x_AI, w_GOI = (
        jnp.asarray(random.normal(size=each), jnp.float32)
        for each in ((70, 128), (4, 256, 128))
    )
    sizes_E = jnp.array([40, 0, 29, 1])
    return [
        grouped_matmul(
            x_AI,
            w_GOI,
            sizes_E,
            group_offset=jnp.int32(0),
            implementation=implementation,
        )
    ]


def attended(implementation):
    """Two slots of three queries each, over what they see."""
    random = np.random.default_rng(0)
    q_TNH, k_BKSH, v_BKSH = (
        jnp.asarray(random.normal(size=each), jnp.float32)
        for each in ((6, 4, 128), (2, 2, 64, 128), (2, 2, 64, 128))
    )
    ragged = Ragged(
        slots_T=jnp.repeat(jnp.arange(2), 3),
        starts_B=jnp.array([5, 40]),
        offsets_B=jnp.array([0, 3]),
        counts_B=jnp.array([3, 3]),
        rows=3,
    )
    limits_T = jnp.array([6, 7, 8, 41, 42, 43])
    operands = (q_TNH, k_BKSH, v_BKSH, ragged, limits_T)
    return [cached_attention(*operands, scale=0.1, implementation=implementation)]


# Sizes that are not the kernels' own, and by how many steps or rows that shows.
OTHERS = {
    "verify": (verified, {"rows": 16, "tokens": 256}),
    "grouped_matmul": (multiplied, {"rows": 16, "outputs": 128}),
    "cached_attention": (attended, {"rows": 4, "positions": 16}),
}


@pytest.mark.parametrize("op", OTHERS)
def test_other_sizes_change_no_number(op):
    """Each op's kernel is another program then, and computes the same."""
    run, others = OTHERS[op]
    expected = run("xla")
    programs = []
    for tried in ({}, {op: others}):
        jax.clear_caches()
        with trying(tried) as trial, simulated("mosaic_tpu"):
            jax.tree.map(
                lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-5, atol=2e-5),
                run("mosaic_tpu"),
                expected,
            )
            programs.append(str(jax.make_jaxpr(run, static_argnums=0)("mosaic_tpu")))
        [asked] = trial.asked.values()
        assert asked.items() >= tried.get(op, {}).items()
    assert programs[0] != programs[1]
