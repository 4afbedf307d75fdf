"""How sizes are chosen: by timers that are fakes, by this machine, by a file."""

import itertools
import json

import jax
import jax.numpy as jnp
import pytest

from jaxspark.progress import CellProgress
from jaxspark.tuning import schedule
from jaxspark.tuning.problems import PROBLEMS, Problem
from jaxspark.tuning.search import Timed, Tuned, by_device, by_schedule, reason, tune
from pallas_kernels.block_sizes import PACKAGED, block_sizes, shape

TRIED = (8, 16, 32)


def run(x, implementation):
    """An op of one size, which cannot be 32."""
    [size] = block_sizes("doubled", shape(x.dtype, T=len(x)), width=16)
    if size > TRIED[1]:
        raise RuntimeError(f"blocks of {size} do not fit\nat all")
    return 2 * x


DOUBLED = Problem(
    name="doubled small",
    tried={"width": TRIED},
    operands=lambda: (jnp.arange(5.0),),
    run=run,
)


def tuned(seconds, default=16):
    timed = [Timed(sizes={"width": w}, seconds=s) for w, s in seconds.items()]
    return Tuned(
        problem="doubled small", op="doubled", of="", default={"width": default},
        timed=timed,
    )  # fmt: skip


@pytest.mark.parametrize(
    "order", list(itertools.permutations((1.0, 2.0, 3.0))), ids=str
)
def test_the_fastest_is_chosen(order):
    seconds = dict(zip(TRIED, order))
    [fastest] = (width for width in TRIED if seconds[width] == 1.0)
    assert tuned(seconds).best(0.02).sizes == {"width": fastest}


@pytest.mark.parametrize(
    ("seconds", "width"),
    [
        ({8: 0.99, 16: 1.0, 32: 1.5}, 16),  # too little
        ({8: 0.97, 16: 1.0, 32: 1.5}, 8),
        ({8: 1.0, 16: 1.0, 32: 1.0}, 16),  # the same
        ({8: None, 16: 1.0, 32: 0.5}, 32),  # not all have a time
    ],
    ids=str,
)
def test_the_kernels_own_stay_unless_others_gain_enough(seconds, width):
    assert tuned(seconds).best(0.02).sizes == {"width": width}


def test_nothing_is_said_where_the_kernels_own_have_no_time():
    assert tuned({8: 1.0, 16: None, 32: 2.0}).best(0.02) is None


def test_a_stopped_run_times_only_what_is_missing(tmp_path):
    path, given = str(tmp_path / "progress"), []

    def timer(problem, candidates):
        for sizes in candidates:
            given.append(sizes["width"])
            if len(given) == 2:
                raise KeyboardInterrupt
            yield Timed(sizes=sizes, seconds=1 / sizes["width"])

    with pytest.raises(KeyboardInterrupt):
        tune(DOUBLED, timer, CellProgress(path, {"chip": "v5p"}))
    found = tune(DOUBLED, timer, CellProgress(path, {"chip": "v5p"}))
    assert given == [8, 16, 16, 32]
    assert (found.of, found.default) == ("float32 T=8", {"width": 16})
    assert found.best(0.02).sizes == {"width": 32}
    with pytest.raises(ValueError, match="chip was 'v5p', now 'v6e'"):
        CellProgress(path, {"chip": "v6e"})


def test_a_device_times_what_compiles_and_says_what_does_not():
    found = list(by_device(2)(DOUBLED, DOUBLED.candidates()))
    times = {each.sizes["width"]: each for each in found}
    assert times[8].seconds > 0 and times[16].seconds > 0
    assert times[32].seconds is None and times[32].why == "blocks of 32 do not fit"


@pytest.mark.parametrize(
    ("errors", "says"),
    [
        (
            "Traceback (most recent call last):\n  File x\nValueError: has 'width'\n"
            "--------------------\nFor simplicity, JAX has removed its frames.\n",
            "ValueError: has 'width'",
        ),
        (
            "W1130 1 a.cc:1] a warning\nF1130 05:01:02.3 77 llo.cc:17] no such DMA\n"
            "=== Source Location Trace: ===\nE1130 1 b.cc:2] RAW: Raising signal 6\n",
            "no such DMA",
        ),
        ("jax.errors.JaxRuntimeError: RESOURCE: vmem", "jax.errors.JaxRuntimeError: "),
        ("Killed\n", None),
    ],
)
def test_the_line_that_says_most_is_kept(errors, says):
    found = reason(errors)
    assert found is None if says is None else found.startswith(says)


def test_a_compiler_that_does_not_end_is_stopped():
    timer = by_schedule("v5p:2x2x1", seconds=0, gigabytes=1)
    [found] = timer(PROBLEMS[0], [{"tokens": 128}])
    assert found.seconds is None
    assert found.why == "its compiler took more than 0 seconds"


@pytest.fixture(scope="module")
def asked():
    """What each problem's kernel asks for."""
    return {each.name: each.asked() for each in PROBLEMS}


def test_a_kernels_own_sizes_are_among_those_tried(asked):
    for problem in PROBLEMS:
        _, default = asked[problem.name]
        assert default in problem.candidates(), problem.name


def test_problems_have_shapes_of_their_own(asked):
    """Else one would overwrite the entry of the other."""
    assert len({(each.op, asked[each.name][0]) for each in PROBLEMS}) == len(PROBLEMS)


def test_a_profile_says_a_kernels_cycles(tmp_path):
    profile = tmp_path / "alone.1_TPU v5_static_llo_profile.textproto"
    profile.write_text(
        'hlo_op_estimate {\n  hlo_op_name: "alone.1"\n  estimated_cycles: 160382\n}\n'
    )
    assert schedule.cycles_of(tmp_path, "alone") == 160382
    with pytest.raises(ValueError, match="wrote no profile of copy"):
        schedule.cycles_of(tmp_path, "copy")


def test_kernels_are_found_wherever_a_program_calls_them():
    problem = next(each for each in PROBLEMS if each.op == "draft_sampling")
    operands = jax.eval_shape(problem.operands)

    def twice(*operands):
        def step(carry, _):
            return carry, problem.run(*operands, implementation="mosaic_tpu")

        return jax.jit(lambda: jax.lax.scan(step, 0, None, 2))()

    [found] = schedule.kernels(jax.make_jaxpr(twice)(*operands).jaxpr)
    assert found.params["name"] == "draft_sampling"


def test_packaged_tables_hold_what_was_tried(asked):
    """Each entry is a problem's, under the shape that its kernel asks for today."""
    names = {each.name: each for each in PROBLEMS}
    for path in PACKAGED.glob("*.json"):
        made = json.loads(path.read_text())
        assert made["chip"] == path.stem
        for op, shapes in made["ops"].items():
            for of, entry in shapes.items():
                problem = names[entry["problem"]]
                assert (problem.op, asked[problem.name][0]) == (op, of)
                assert entry["sizes"] in problem.candidates()
                assert entry["microseconds"] <= entry["default_microseconds"]
