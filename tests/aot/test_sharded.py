"""On several chips: what a round sends, and that nothing large is whole."""

import pytest

from tests.aot.cases import ALL
from tests.aot.compilers import answers

TILE = 8


@pytest.mark.aot
@pytest.mark.skipif(not ALL, reason="compiles for minutes: make aot")
@pytest.mark.parametrize(
    ("platform", "topology", "mesh", "slot_shards", "kernels"),
    [
        ("tpu", "v5p:2x2x2", "data:2,expert:4", 8, {"indexer_topk", "grouped_matmul"}),
        ("h100", "h100:4", "expert:4", 4, {"compress", "index_scores", "top_k"}),
    ],
)
def test_a_round_sends_what_its_exchange_needs(
    platform, topology, mesh, slot_shards, kernels
):
    """Flash's whole decode loop on one chip's share, kernels inside `shard_map`."""
    n = 4
    [found] = answers(platform, "compile_sharded", topology, mesh)
    assert kernels | {"sparse_attention"} <= set(found["kernels"])
    assert found["tables"] and not found["whole_caches"] and not found["copies"]
    layers, width = found["depth"] + 3, found["width"]
    tokens = -(-found["tokens"] // slot_shards // TILE) * TILE
    rows = layers * (n - 1) * tokens
    # Tokens in bfloat16 there, sums in float32 back, an expert and a weight per choice.
    expected = rows * (2 * width + 4 * width + 8 * found["top_k"])
    assert 0.9 * expected < found["sent"] < 1.1 * expected
    for kind, dtype, shape, group, _ in found["collectives"]:
        if shape:  # All but the scalars that shards agree on.
            assert kind in ("all-gather", "reduce-scatter") and group == n
            assert dtype in ("bf16", "f32", "s32")
            # Of tokens, never of experts.
            assert shape[-1] in (width, 2 * found["top_k"])
            assert len(shape) == 2 or shape[0] == n
    # A GPU starts sums on their way and goes on with the shared expert; a TPU's core
    # takes part in its collectives.
    if platform == "h100":
        meanwhile = found["meanwhile"]
        assert len(meanwhile) >= 4
        assert all(meanwhile[each] for each in meanwhile if each.startswith("reduce"))
