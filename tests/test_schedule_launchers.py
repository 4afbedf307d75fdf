"""Calibrate, profile, schedule, simulate: command by command, on a tiny target."""

import json

import pytest

from jaxspark.calibration.files import load_calibration
from jaxspark.checkpoints import save_draft_checkpoint
from jaxspark.launch import (
    audit,
    bench,
    calibrate,
    demo,
    evaluate,
    generate,
    profile_cost,
    simulate,
)
from tests.checkpoints import tiny
from tests.test_launchers import DOMAINS, Place

OWN = {"draft": "run/drafter"}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A tiny drafter with calibrated confidences and measured costs."""
    place = Place(tmp_path_factory.mktemp("schedule"))
    drafter = tiny.drafter(block_size=2)
    save_draft_checkpoint(place.folder / "run/drafter", drafter, tiny.target().model)
    place.run(calibrate, **OWN, **CALIBRATE)
    place.run(profile_cost, **OWN, **PROFILE)
    return place


CALIBRATE = {
    **{"data": ("questions.jsonl",), "prompts_dir": ".", "out": "calibration"},
    **{"fit_prompts": 6, "test_prompts": 2, "slots": 4},
    **{"max_new_tokens": 16, "temperatures": (0.0, 1.0)},
}
PROFILE = {"slots": (1,), "capacity": 128, "repeats": 1, "out": "costs.json"}
# Of --suite=load and overhead: rounds that the profile has compiled.
BENCH = {"repeats": 3, "capacity": 128, "prompts_dir": ".", "prompts_per_domain": 1}


def test_calibration_is_kept_beside_the_drafter(place):
    calibration = load_calibration(place.folder / "run/drafter", "rejection")
    assert calibration.fitted_at == (0.0, 1.0) and calibration.block_length == 2
    found = place.json("calibration/calibration_rejection.json")
    for figures in found.values():
        before, scaled, biased, with_certainty = (
            figures[way] for way in ("before", "temperatures", "biases", "certainty")
        )
        assert len(before["ece"]) == len(scaled["auc"]) == 2
        # One temperature and bias for each place: the first place keeps its order.
        assert before["auc"][0] == scaled["auc"][0] == biased["auc"][0]
        assert before["biases"] == scaled["biases"] == [0, 0]
        assert biased["weights"] == [0, 0] and len(with_certainty["weights"]) == 2
    assert calibration.weights == tuple(
        tuple(found[temperature]["certainty"]["weights"]) for temperature in ("0", "1")
    )
    png = place.folder / "calibration" / "reliability_rejection_1.png"
    assert png.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="has no calibration .* coupling 'gumbel'"):
        load_calibration(place.folder / "run/drafter", "gumbel")


@pytest.mark.long
def test_thresholds_are_swept(place):
    place.run(
        evaluate,
        **OWN,
        **{"prompts_dir": ".", "prompts_per_domain": 2, "max_new_tokens": 12},
        **{"speed_prompts": 0, "temperature": 1.0, "thresholds": (0.0, 1.0)},
        json_out="sweep.json",
    )
    found = place.json("sweep.json")["thresholds"]
    assert set(found) == set(DOMAINS)
    for points in found.values():
        assert points["0"]["verified_length"] > points["1"]["verified_length"]
    assert (place.folder / "sweep_thresholds.png").exists()


GENERATE = {"prompt": "abc", "max_new_tokens": 8}
LAGGED = {"schedule": "lagged", "costs": "costs.json"}


@pytest.mark.long
def test_text_is_generated_by_cost(place):
    plain = place.run(generate, **GENERATE, draft="none")
    place.run(generate, **GENERATE, **OWN, **LAGGED, temperature=1.0)
    # Costs of sampled rounds are not those of greedy ones.
    said = place.refusal(generate, **GENERATE, **OWN, **LAGGED)
    assert "made for another sampled: True, this is False" in said
    # Greedy output is plain decoding's whatever is verified.
    said = place.run(generate, **GENERATE, **OWN, schedule="fixed:1")
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
    options = LAGGED | {"schedule": schedule, "temperature": 1.0}
    assert message in place.refusal(generate, **GENERATE, **OWN, **options)


def test_a_profile_of_another_drafter_is_refused(place):
    content = place.json("costs.json")
    for profile in content["profiles"]:
        profile["setting"]["device"] = "4 x TPU v9"
    (place.folder / "other.json").write_text(json.dumps(content))
    options = LAGGED | {"costs": "other.json", "temperature": 1.0}
    said = place.refusal(generate, **GENERATE, **OWN, **options)
    assert "made for another device: '4 x TPU v9'" in said


@pytest.mark.long
def test_load_is_swept(place):
    sweep = OWN | {
        **{"suite": "load", "concurrency": (1,), "fixed_lengths": (1,)},
        **{"load_block": 2, "load_rounds": 3, "load_prompts": 1, **BENCH},
        **{"progress": "load.jsonl", "json_out": "load.json"},
    }
    assert "against best" in place.run(bench, **sweep)
    found = place.json("load.json")
    for figures in found["figures"].values():
        assert figures["scheduled"]["tokens_per_second"] > 0
        assert figures["none"]["verified_tokens_per_slot"] == 1
    assert (place.folder / "load.png").exists()
    # Nothing is left to measure.
    assert "decoding in turn" not in place.run(bench, **sweep)
    assert place.json("load.json") == found


@pytest.mark.long
def test_overhead_is_measured(place):
    place.run(
        bench,
        **OWN,
        **{"suite": "overhead", "overhead_slots": 1, **BENCH},
        json_out="overhead.json",
    )
    figures = place.json("overhead.json")["figures"]
    assert figures["decision_and_packing_seconds"] > 0 < figures["certainty_seconds"]
    assert figures["round_seconds"] > 0


def test_recorded_rounds_are_simulated(place):
    recorded = {"trace": "calibration/test_rejection_1.npz", "costs": "costs.json"}
    said = place.run(simulate, **OWN, **recorded, rounds=20, json_out="simulated.json")
    assert "simulated" in said
    found = place.json("simulated.json")
    assert found["simulated"] is True
    policies = found["calibration/test_rejection_1.npz"]
    assert {"no speculation", "fixed 1", "fixed 2", "scheduled"} == set(policies)
    assert set(policies["scheduled"]) == {"1"}
    said = place.refusal(simulate, **recorded, coupling="gumbel")
    assert "costs under coupling 'rejection', the trace's is 'gumbel'" in said
    other = recorded | {"trace": "calibration/settings.json"}
    assert "holds no recorded rounds" in place.refusal(simulate, **other)


def test_machines_are_simulated_with_recorded_and_with_stated_acceptance(place):
    few = {"rounds": 20, "json_out": "machines.json"}
    recorded = "calibration/test_rejection_1.npz"
    # Fewer users would play more rounds.
    place.run(simulate, **few, users=(100, 50), trace=recorded)
    found = place.json("machines.json")
    assert any("as recorded in calibration" in line for line in found["assumptions"])
    assert list(found["8 x H100"]["DSpark-2, scheduled"]) == ["50", "100"]
    few |= {"users": (100,)}
    (place.folder / "curves.json").write_text('{"a": [0.9, 0.8], "b": [0.5, 0.4]}')
    place.run(simulate, **few, acceptance="curves.json", rate=5.0)
    found = place.json("machines.json")
    assert any("a 0.9, 0.8; b 0.5, 0.4" in line for line in found["assumptions"])
    assert any("5 requests arrive per second" in line for line in found["assumptions"])
    assert "DSpark-2, scheduled" in found["TPU v5p-16"]
    (place.folder / "curves.json").write_text('{"a": [0.9], "b": [0.5, 1.4]}')
    said = place.refusal(simulate, **few, acceptance="curves.json")
    assert "expected rates between 0 and 1" in said
    assert "users=0: expected at least 1" in place.refusal(simulate, users=(0,))


def test_a_small_audit_passes(place):
    """`.ci/run` has the quick one, under every setting of JAX."""
    said = place.run(
        audit,
        **{"suite": "greedy", "drafters": ("run/drafter",)},
        **{"block_lengths": (2,), "slots": (2,), "max_new_tokens": 12},
        **{"prompts_dir": ".", "prompts_per_domain": 1, "json_out": "audit.json"},
    )
    assert "0 violations" in said
    assert (place.folder / "audit.json").exists()


def test_a_demo_shows_the_same_tokens_from_every_drafter(place, monkeypatch):
    monkeypatch.setattr(demo, "PROMPTS", {"math": "1 + 1", "chat": "Who?"})
    drafts = ("ngram@2", "run/drafter@2")
    said = place.run(demo, drafts=drafts, max_new_tokens=8, repeats=1)
    assert said.count("yes (") == 2 * 3 and "run/drafter@2" in said
    said = place.refusal(demo, drafts=("run/drafter@many",))
    assert "--drafts=run/drafter@many: 'many' is not a number of drafts" in said
