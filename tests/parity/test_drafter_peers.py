"""Drafter folders go both ways between us and DeepSpec and vllm-project/speculators.

Each project's own classes write a folder and say what a folder drafts. They are asked
live where JAXSPARK_DEEPSPEC and JAXSPARK_SPECULATORS name checkouts (with the packages
that those import beside PyTorch, see `oracle_client.oracle_python`), else golden files
hold what they said once.
"""

import os

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.parity import drafter_cases as cases
from tests.parity import drafter_folders, golden
from tests.parity.make_golden_drafters import FILE
from tests.parity.oracle_client import Oracle, oracle_python

TOLERANCE = 2e-5


@pytest.fixture(scope="module")
def peers():
    """The live classes of a project, by its name; skipped where it is not at hand."""
    processes = []

    def ask(request):
        variable = f"JAXSPARK_{cases.peer(request['case']).upper()}"
        if not os.environ.get(variable):
            pytest.skip(f"{variable} names no checkout: golden files only")
        if oracle_python() is None:
            pytest.skip("no PyTorch: set JAXSPARK_ORACLE_PYTHON or run `make oracle`")
        if not processes:
            processes.append(Oracle(oracle_python(), "peers.py"))
        return processes[0].ask(request)

    yield ask
    for process in processes:
        process.close()


@pytest.fixture(scope="module")
def said():
    """Descriptions of folders and arrays, as golden."""
    return golden.load(FILE)


@pytest.fixture(scope="module")
def targets(tmp_path_factory):
    """Targets by family, and what their layers say."""
    places = {
        family: drafter_folders.target(family, tmp_path_factory.mktemp("t") / family)
        for family in cases.TARGETS
    }
    return {f: (t, drafter_folders.states(t)) for f, t in places.items()}


def assert_close(ours, theirs):
    assert "logits" in theirs
    for key, value in theirs.items():
        assert ours[key].shape == value.shape
        worst = float(np.abs(ours[key] - value).max())
        assert worst <= TOLERANCE, (key, worst)


def of_case(arrays, name):
    return {k.split(".")[1]: v for k, v in arrays.items() if k.split(".")[0] == name}


@pytest.mark.parametrize("name", cases.CASES)
def test_their_folders_draft_here_as_there(name, said, targets, tmp_path):
    header, arrays = said
    target, states = targets[cases.family(name)]
    folder = drafter_folders.made_from(
        header[name]["theirs"], target, tmp_path / "theirs"
    )
    assert_close(drafter_folders.drafted(folder, target, states), of_case(arrays, name))


@pytest.mark.parametrize("name", cases.CASES)
def test_our_folders_are_those_that_they_have_read(name, said, targets, tmp_path):
    """Equal in configuration, names, shapes and types; numbers are their own."""
    header, _ = said
    target, states = targets[cases.family(name)]
    theirs = drafter_folders.made_from(
        header[name]["theirs"], target, tmp_path / "theirs"
    )
    ours = drafter_folders.rewritten(name, theirs, target, tmp_path / "ours")
    seen = drafter_folders.description(ours, target)
    assert seen == header[name]["ours"], "stale? run tests.parity.make_golden_drafters"
    written, read = (load_file(f / "model.safetensors") for f in (ours, theirs))
    for tensor, array in read.items():
        np.testing.assert_array_equal(written[tensor], array, err_msg=tensor)


@pytest.mark.parametrize("name", cases.CASES)
def test_folders_go_both_ways_live(name, peers, targets, tmp_path):
    target, states = targets[cases.family(name)]
    request = {"case": name, "target": target.name}
    theirs = tmp_path / "theirs"
    peers(request | {"save": str(theirs)})
    mine = drafter_folders.drafted(theirs, target, states)
    assert_close(mine, peers(request | {"folder": str(theirs)}))
    ours = drafter_folders.rewritten(name, theirs, target, tmp_path / "ours")
    assert_close(mine, peers(request | {"folder": str(ours)}))
