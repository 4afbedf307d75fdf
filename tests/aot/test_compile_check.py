"""compile_check says what fits, what is missing, and which meshes cannot be."""

import pytest

from tests.aot.compilers import answers


@pytest.mark.aot
@pytest.mark.long
def test_what_does_not_fit_is_said_with_what_is_missing():
    fits, large, *refused = answers("tpu", "compile_misfits")
    assert fits["status"] == 0 and "fits, " in fits["said"]
    assert fits["figures"]["fits"] and fits["figures"]["round"]["bound"] == "memory"

    assert large["status"] == 1
    figures = large["figures"]
    held, memory = figures["bytes"], figures["memory"]
    assert not figures["fits"] and 15 * 2**30 < memory <= 16 * 2**30
    # The compiler's number holds the arguments, whatever it calls it; it is rounded.
    caches = held["caches of the target"] + held["caches of the drafter"]
    assert held["peak"] > 0.99 * caches
    missing = (held["peak"] - memory) / 2**30
    assert f"does not fit: {missing:.2f} GiB are missing" in large["said"]
    assert figures["most_slots"] < figures["slots"]

    errors = [each["error"] for each in refused]
    assert errors[0] == "mesh 'data:3' has 3 shards, v5e:2x2 has 4 devices"
    assert errors[1].startswith("97 tokens of the vocabulary cannot be shared out")
    assert errors[2].startswith("3 slots cannot be shared out evenly over data 1 x exp")
    assert errors[3].startswith("v5e:3x5: ")
