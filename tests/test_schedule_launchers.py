"""Calibrate, profile, schedule, simulate: command by command, on a tiny target."""

import json

import pytest

from jaxspark.calibration.files import load_calibration
from tests.test_launchers import DOMAINS, DRAFT, TRAIN, Place


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A tiny drafter with calibrated confidences and measured costs."""
    place = Place(tmp_path_factory.mktemp("schedule"))
    place.run("train_draft", "--data=questions.jsonl", "--out=run", *DRAFT, *TRAIN)
    place.run("calibrate", *CALIBRATE)
    place.run("profile_cost", "--draft=run/drafter", *PROFILE)
    return place


CALIBRATE = (
    *("--draft=run/drafter", "--data=questions.jsonl", "--prompts_dir=."),
    *("--out=calibration", "--fit_prompts=6", "--test_prompts=2", "--slots=4"),
    *("--max_new_tokens=16", "--temperatures=0,1"),
)
PROFILE = ("--slots=1,2", "--capacity=128", "--repeats=3", "--out=costs.json")


def test_calibration_is_kept_beside_the_drafter(place):
    calibration = load_calibration(place.folder / "run/drafter", "rejection")
    assert calibration.fitted_at == (0.0, 1.0) and calibration.block_length == 3
    found = place.json("calibration/calibration_rejection.json")
    for figures in found.values():
        before, scaled, biased, sharpened = (
            figures[way] for way in ("before", "temperatures", "biases", "sharpness")
        )
        assert len(before["ece"]) == len(scaled["auc"]) == 3
        # One temperature and bias for each place: the first place keeps its order.
        assert before["auc"][0] == scaled["auc"][0] == biased["auc"][0]
        assert before["biases"] == scaled["biases"] == [0, 0, 0]
        assert biased["weights"] == [0, 0, 0] and len(sharpened["weights"]) == 3
    assert calibration.weights == tuple(
        tuple(found[temperature]["sharpness"]["weights"]) for temperature in ("0", "1")
    )
    png = place.folder / "calibration" / "reliability_rejection_1.png"
    assert png.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="has no calibration .* coupling 'gumbel'"):
        load_calibration(place.folder / "run/drafter", "gumbel")


def test_thresholds_are_swept(place):
    place.run(
        "evaluate",
        *("--draft=run/drafter", "--prompts_dir=.", "--prompts_per_domain=2"),
        *("--max_new_tokens=12", "--speed_prompts=0", "--temperature=1"),
        *("--thresholds=0,0.5,1", "--json_out=sweep.json"),
    )
    found = place.json("sweep.json")["thresholds"]
    assert set(found) == set(DOMAINS)
    for points in found.values():
        verified = [points[t]["verified_length"] for t in ("0", "0.5", "1")]
        assert verified == sorted(verified, reverse=True)
    assert (place.folder / "sweep_thresholds.png").exists()


GENERATE = ("generate", "--draft=run/drafter", "--prompt=abc", "--max_new_tokens=8")


def test_text_is_generated_by_cost(place):
    plain = place.run(*GENERATE[:1], *GENERATE[2:], "--draft=none")
    lagged = ("--schedule=lagged", "--costs=costs.json", "--temperature=1")
    place.run(*GENERATE, *lagged)
    # Costs of sampled rounds are not those of greedy ones.
    said = place.run(*GENERATE, *lagged[:2], fails=True)
    assert "made for another sampled: True, this is False" in said.replace("\n", " ")
    # Greedy output is plain decoding's whatever is verified.
    said = place.run(*GENERATE, "--schedule=threshold:0.4")
    assert said.splitlines()[:-1] == plain.splitlines()[:-1]


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        ("free", "changes the distribution of the output under coupling 'rejection'"),
        ("lagged:9", "lag must lie in 1..4, got 9"),
        ("eager", "unknown schedule 'eager'; expected fixed"),
    ],
)
def test_bad_schedules_are_named(place, schedule, message):
    costs = ("--costs=costs.json", "--temperature=1")
    said = place.run(*GENERATE, f"--schedule={schedule}", *costs, fails=True)
    assert message in said.replace("\n", " ")


def test_a_profile_of_another_drafter_is_refused(place):
    content = place.json("costs.json")
    for profile in content["profiles"]:
        profile["setting"]["device"] = "4 x TPU v9"
    (place.folder / "other.json").write_text(json.dumps(content))
    options = ("--schedule=lagged", "--costs=other.json", "--temperature=1")
    said = place.run(*GENERATE, *options, fails=True)
    assert "made for another device: '4 x TPU v9'" in said.replace("\n", " ")


def test_load_is_swept(place):
    sweep = (
        *("bench", "--suite=load", "--draft=run/drafter", "--concurrency=1,2"),
        *("--fixed_lengths=1,3", "--load_block=3", "--load_rounds=3", "--repeats=3"),
        *("--prompts_dir=.", "--prompts_per_domain=1", "--capacity=256"),
        *("--progress=load.jsonl", "--json_out=load.json"),
    )
    assert "against best" in place.run(*sweep)
    found = place.json("load.json")
    for figures in found["figures"].values():
        assert figures["scheduled"]["tokens_per_second"] > 0
        assert figures["none"]["verified_tokens_per_slot"] == 1
    assert (place.folder / "load.png").exists()
    # Nothing is left to measure.
    assert "decoding in turn" not in place.run(*sweep)
    assert place.json("load.json") == found


def test_overhead_is_measured(place):
    place.run(
        "bench",
        *("--suite=overhead", "--draft=run/drafter", "--overhead_slots=2"),
        *("--prompts_dir=.", "--prompts_per_domain=1", "--capacity=256"),
        *("--repeats=3", "--json_out=overhead.json"),
    )
    figures = place.json("overhead.json")["figures"]
    assert figures["decision_and_packing_seconds"] > 0 < figures["sharpness_seconds"]
    assert figures["round_seconds"] > 0


def test_recorded_rounds_are_simulated(place):
    said = place.run(
        "simulate",
        *("--trace=calibration/test_rejection_1.npz", "--costs=costs.json"),
        *("--draft=run/drafter", "--rounds=20", "--json_out=simulated.json"),
        target=False,
    )
    assert "simulated" in said
    found = place.json("simulated.json")
    assert found["simulated"] is True
    policies = found["calibration/test_rejection_1.npz"]
    assert {"no speculation", "fixed 1", "fixed 2", "fixed 3", "scheduled"} == set(
        policies
    )
    assert set(policies["scheduled"]) == {"1", "2"}
    said = place.run(
        "simulate", "--trace=calibration/test_rejection_1.npz", "--costs=costs.json",
        "--coupling=gumbel", target=False, fails=True,
    )  # fmt: skip
    assert "costs under coupling 'rejection', the trace's is 'gumbel'" in " ".join(
        said.split()
    )
    said = place.run(
        "simulate", "--trace=calibration/settings.json", "--costs=costs.json",
        target=False, fails=True,
    )  # fmt: skip
    assert "holds no recorded rounds" in said.replace("\n", " ")


def test_machines_are_simulated_with_recorded_and_with_stated_acceptance(place):
    few = ("simulate", "--users=2,1", "--rounds=20", "--json_out=machines.json")
    place.run(*few, "--trace=calibration/test_rejection_1.npz", target=False)
    found = place.json("machines.json")
    assert any("as recorded in calibration" in line for line in found["assumptions"])
    assert list(found["8 x H100"]["DSpark-3, scheduled"]) == ["1", "2"]
    (place.folder / "curves.json").write_text('{"a": [0.9, 0.8], "b": [0.5, 0.4]}')
    place.run(*few, "--acceptance=curves.json", "--rate=5", target=False)
    found = place.json("machines.json")
    assert any("a 0.9, 0.8; b 0.5, 0.4" in line for line in found["assumptions"])
    assert any("5 requests arrive per second" in line for line in found["assumptions"])
    assert "DSpark-2, scheduled" in found["TPU v5p-16"]
    (place.folder / "curves.json").write_text('{"a": [0.9], "b": [0.5, 1.4]}')
    said = place.run(*few, "--acceptance=curves.json", target=False, fails=True)
    assert "expected rates between 0 and 1" in " ".join(said.split())
    said = place.run("simulate", "--users=0", target=False, fails=True)
    assert "--users must be positive, got [0]" in said


def test_the_quick_audit_passes(place):
    said = place.run("audit", "--suite=quick", target=False)
    assert "quick: 0 violations" in said
