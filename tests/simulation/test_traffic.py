"""What is read in compiled programs is what they do."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from jaxspark.parallel.mesh import make_mesh
from jaxspark.simulation.traffic import traffic


def compiled(function, *shapes):
    arrays = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return jax.jit(function).lower(*arrays).compile().as_text()


def test_products_count_as_often_as_their_loops_turn():
    def loop(x, w):
        def body(x, w):
            return jnp.tanh(x @ w), None

        return jax.lax.scan(body, x, w)[0]

    found = traffic(compiled(loop, (16, 32), (20, 32, 32)))
    assert found.flops == 20 * 2 * 16 * 32 * 32
    # Of the stack, one matrix each turn.
    weights = 20 * 32 * 32 * 4
    assert weights < found.memory < 8 * weights


def test_a_batch_of_products_counts_its_own_sums():
    def product(x, y):
        return jnp.einsum("bqh,bch->bqc", x, y)

    found = traffic(compiled(product, (8, 6, 128), (8, 64, 128)))
    assert found.flops == 2 * 8 * 6 * 64 * 128


# As TPUs write them: a batch axis by dilation, one of the right side alone by padding.
CONVOLUTION = """
ENTRY %main (a: f32[8,6,64], b: f32[8,64,4096]) -> f32[8,4096,6,64] {
  %a = f32[8,6,64,128]{3,2,1,0} parameter(0)
  %b = f32[8,6,64,128]{3,2,1,0} parameter(1)
  ROOT %c = f32[8,4096,6,64]{3,2,1,0} convolution(%a, %b), window={size=8x6 stride=7x1
"""


def test_convolutions_that_are_products_count_as_products():
    line = CONVOLUTION.rstrip() + (
        " pad=0_0x5_5 lhs_dilate=8x1 rhs_reversal=0x1}, dim_labels=0bf1_01oi->0b1f\n}\n"
    )
    assert traffic(line).flops == 2 * 8 * 4096 * 6 * 64 * 128


@pytest.mark.parametrize(
    ("collective", "kind", "expected"),
    [
        (lambda x: jax.lax.all_gather(x, "expert", tiled=True), "all-gather", 3 * 512),
        (lambda x: jax.lax.psum(x, "expert"), "all-reduce", 2 * 3 * 512 / 4),
        (
            lambda x: jax.lax.psum_scatter(x, "expert", tiled=True),
            "reduce-scatter",
            3 * 512 / 4,
        ),
    ],
)
def test_collectives_send_what_rings_send(collective, kind, expected):
    def run(x):
        body = jax.shard_map(
            lambda x: collective(x).sum()[None],
            mesh=make_mesh("data:2,expert:4"),
            in_specs=P(("data", "expert")),
            out_specs=P(("data", "expert")),
            check_vma=False,
        )
        return body(x)

    found = traffic(compiled(run, (8 * 16, 8)), devices=8)
    kinds = found.by_kind()
    assert kinds[kind] == {"times": 1, "bytes": expected}
    assert found.sent == expected


@pytest.mark.parametrize(
    ("groups", "sent"),
    [
        ("{{0,1,2,3},{4,5,6,7}}", 3),
        ("[8,8]<=[64]", 7),
        ("mesh['data'=4,'expert'=16,'model'=1] {'expert'}", 15),
        ("mesh['data'=4,'expert'=16,'model'=1] {'data','expert'}", 63),
        # A part of an axis.
        ("mesh['data'=4,'expert'=16,'model'=1] {'data','expert':(2)8}", 31),
    ],
)
def test_groups_are_read_however_they_are_written(groups, sent):
    gathered = f"f32[64] all-gather(%x), replica_groups={groups}, dimensions={{0}}"
    lines = "ENTRY %main (x: f32[1]) -> f32[64] {", "  %x = f32[1] parameter(0)"
    text = "\n".join([*lines, f"  ROOT %y = {gathered}", "}", ""])
    assert traffic(text, devices=64).sent == 64 * 4 * sent / (sent + 1)


@pytest.mark.parametrize(
    "config",
    [  # of a TPU's kernel, of a GPU's
        '{"custom_call_config":{"cost_estimate":'
        '{"flops":"30","transcendentals":"0","bytes_accessed":"70"}}}',
        r'{cost_estimate_json = "{\22flops\22: 30, \22bytes_accessed\22: 70}"}',
    ],
)
def test_kernels_move_what_they_say(config):
    call = 'f32[8] custom-call(%x), custom_call_target="a_kernel"'
    call += f", backend_config={config}"
    lines = "ENTRY %main (x: f32[64,8]) -> f32[8] {", "  %x = f32[64,8] parameter(0)"
    found = traffic("\n".join([*lines, f"  ROOT %y = {call}", "}", ""]))
    assert (found.memory, found.flops) == (70, 30)


def test_what_lies_in_vector_memory_is_not_moved_by_a_kernel():
    config = '{"custom_call_config":{"cost_estimate":{"bytes_accessed":"70"}}}'
    call = f"f32[8] custom-call(%x, %v), backend_config={config}"
    lines = [
        "ENTRY %main (x: f32[64,8]) -> f32[8] {",
        "  %x = f32[64,8] parameter(0)",
        "  %v = f32[10]{0:T(128)S(1)} fusion(), kind=kLoop, calls=%nothing",
    ]
    assert traffic("\n".join([*lines, f"  ROOT %y = {call}", "}", ""])).memory == 30


def test_a_prefetch_for_the_next_run_counts_once():
    """In the first run it is a copy at the start, in others one at the end."""
    pair = "(f32[8]{0:S(1)}, f32[8]{0}, u32[]{:S(2)}) copy-start(%x)"
    lines = [
        "ENTRY %main (x: f32[8]) -> f32[8] {",
        "  %x = f32[8] parameter(0)",
        f"  %first = {pair}, cross_program_prefetch_index=0",
        f"  %next = {pair}",
        "  ROOT %y = f32[8]{0:S(1)} copy-done(%first)",
        "}",
        "",
    ]
    assert traffic("\n".join(lines)).memory == 32


def test_a_ragged_exchange_moves_what_may_go_and_come():
    """Not the room for everything that any other shard could send."""
    rooms = "f32[16,8] %x, f32[64,8] %room"
    lines = [
        "ENTRY %main (x: f32[16,8]) -> f32[64,8] {",
        "  %x = f32[16,8] parameter(0)",
        '  %room = f32[64,8] custom-call(), custom_call_target="AllocateBuffer"',
        f"  ROOT %y = f32[64,8] ragged-all-to-all({rooms}), replica_groups={{{{0,1}}}}",
        "}",
        "",
    ]
    found = traffic("\n".join(lines), devices=2)
    assert found.memory == 2 * 16 * 8 * 4
