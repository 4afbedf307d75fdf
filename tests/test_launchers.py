"""The path of a researcher, command by command, on a tiny target."""

import json

import numpy as np
import pytest

from jaxspark import load_drafter, load_target
from jaxspark.checkpoints import save_target
from jaxspark.checkpoints.tree import named_parameters
from jaxspark.launch import (
    bench,
    convert,
    evaluate,
    plot,
    regenerate,
    study,
    train_draft,
)
from tests.checkpoints.tiny import target
from tests.programs import call

DOMAINS = ("math", "code", "chat")
DRAFT = {"depth": 1, "taps": (0,), "rank": 8, "block_length": 3, "draft_vocab": 64}
TRAIN = {
    **{"steps": 2, "sequences": 2, "anchors": 8, "sequence_length": 96},
    **{"held_out": 2, "evaluate_every": 2, "fit_sequences": 8},
}
REGENERATE = {
    **{"data": ("questions.jsonl",), "out": "answers.jsonl", "slots": 4},
    **{"max_new_tokens": 24, "temperature": 1.0},
}
EVALUATE = {
    **{"prompts_per_domain": 2, "max_prompt_tokens": 64, "max_new_tokens": 12},
    **{"speed_prompts": 0, "slots": 4},
}


class Place:
    """A folder with a tiny target, questions and prompts, where launchers run."""

    def __init__(self, folder):
        self.folder = folder
        save_target(folder / "target", target())
        rows = [
            {
                "messages": [
                    {"role": "user", "content": f"question {i}"},
                    {"role": "assistant", "content": "an answer"},
                ]
            }
            for i in range(30)
        ]
        self.lines("questions.jsonl", rows)
        for domain in DOMAINS:
            prompts = [{"turns": [f"{domain} {i}"]} for i in range(2)]
            self.lines(f"{domain}_prompts.jsonl", prompts)

    def lines(self, name, rows):
        """Writes JSON lines."""
        (self.folder / name).write_text("\n".join(map(json.dumps, rows)) + "\n")

    def run(self, launcher, **options):
        """Calls a launcher in the folder; returns what it printed."""
        if "target" in launcher.Config.__dataclass_fields__:
            options.setdefault("target", "target")
        status, printed = call(self.folder, launcher, **options)
        assert status == 0, printed
        return printed

    def refusal(self, launcher, **options):
        """What a launcher says of options that cannot be."""
        with pytest.raises(ValueError) as error:
            self.run(launcher, **options)
        return str(error.value)

    def json(self, name):
        """Reads a JSON file."""
        return json.loads((self.folder / name).read_text())


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Questions answered by the target, and a drafter trained on the answers."""
    place = Place(tmp_path_factory.mktemp("path"))
    said = place.run(regenerate, **REGENERATE)
    answers = (place.folder / "answers.jsonl").read_text().splitlines()
    assert answers, said
    both = ("answers.jsonl", "questions.jsonl")
    place.run(train_draft, data=both, out="run", **DRAFT, **TRAIN)
    return place


def test_regenerating_again_adds_nothing(place):
    before = (place.folder / "answers.jsonl").read_bytes()
    place.run(regenerate, **REGENERATE)
    assert (place.folder / "answers.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    "draft", ["run/drafter", pytest.param("ngram", marks=pytest.mark.long)]
)
def test_evaluation_reports_every_domain(place, draft):
    place.run(
        evaluate,
        **EVALUATE | {"speed_prompts": 1, "speed_tokens": 8, "repeats": 1},
        **{"draft": draft, "prompts_dir": "."},
        **{"json_out": "out.json", "plot": "out.png"},
    )
    found = place.json("out.json")
    assert set(found["domains"]) == set(DOMAINS)
    for figures in (*found["domains"].values(), found["macro_average"]):
        assert figures["accepted_length"] >= 1
        assert figures["tokens_per_second"] > 0 < figures["plain_tokens_per_second"]
        assert "accepted_length_non_looping" in figures
        assert len(figures["conditional_acceptance"]) == found["block_length"]
    assert (place.folder / "out.png").read_bytes().startswith(b"\x89PNG")


def flags(**options):
    """Options as a command line has them."""
    return " ".join(f"--{name}={value}" for name, value in options.items())


@pytest.mark.long
def test_a_study_compares_equal_runs(place):
    train = {"target": "target", "data": "questions.jsonl", "optimizer": "adam"}
    options = {
        **{"suite": "optimizer", "out": "studies", "temperatures": (0.0,)},
        "train": flags(**train, **DRAFT | {"taps": 0}, **TRAIN),
        "evaluate": flags(target="target", prompts_dir=".", **EVALUATE),
    }
    said = place.run(study, **options)
    table = said[said.rindex("accepted length") :]
    found = place.json("studies/optimizer.json")
    assert set(found) == {"muon", "adam"} and "muon" in table
    assert (place.folder / "studies" / "optimizer.png").exists()
    # What --train says already is no variant of its own.
    runs = sorted(path.parent.name for path in place.folder.glob("studies/**/run"))
    assert runs == ["base", "muon"]
    # Nor is a figure taken from another evaluation.
    said = place.refusal(study, **options | {"evaluate": ""})
    assert "begun with other settings (evaluate was" in said


def test_results_are_drawn(place):
    figures = {
        "domains": {name: {"accepted_length": 1.5} for name in DOMAINS},
        "macro_average": {"conditional_acceptance": [0.5, None]},
    }
    for name in ("a.json", "b.json"):
        (place.folder / name).write_text(json.dumps(figures))
    both = ("a.json", "b.json")
    place.run(plot, results=both, out="a.png")
    place.run(plot, results=both, out="b.png", x="depth", at=(1.0, 2.0))
    for name in ("a.png", "b.png"):
        assert (place.folder / name).read_bytes().startswith(b"\x89PNG")
    said = place.refusal(plot, results=("a.json", "a.json"), out="c.png")
    assert "--names must differ, got a more than once" in said


def test_a_compact_drafter_is_the_same(place):
    place.run(convert, draft="run/drafter", out="small", compact=True)
    model = load_target(place.folder / "target")
    mine, whole = (
        named_parameters(load_drafter(place.folder / name, model))
        for name in ("small", "run/drafter")
    )
    assert mine.keys() == whole.keys()
    for name, array in whole.items():
        np.testing.assert_array_equal(mine[name], array, err_msg=name)
    sizes = [
        sum(path.stat().st_size for path in (place.folder / name).iterdir())
        for name in ("small", "run/drafter")
    ]
    assert sizes[0] < sizes[1]


def test_a_drafter_changes_its_format(place):
    """Its pruned vocabulary is nothing for DeepSpec."""
    theirs = {"draft": "run/drafter", "out": "theirs"}
    said = place.refusal(convert, **theirs, format="deepspec")
    assert "DeepSpec cannot read pruned vocabularies: draft_vocab_size is 64" in said
    place.run(convert, **theirs, format="speculators")
    config = place.json("theirs/config.json")
    assert config["speculators_model_type"] == "dspark"
    assert config["aux_hidden_state_layer_ids"] == [1]
    named = config["speculators_config"]["verifier"]["name_or_path"]
    assert named == str(place.folder / "target")


@pytest.mark.long
def test_drafters_are_timed_beside_each_other(place):
    said = place.run(
        bench,
        **{"suite": "draft", "draft": "run/drafter", "draft_blocks": (3,)},
        **{"prompts_dir": ".", "prompts_per_domain": 1, "new_tokens": 8},
        **{"repeats": 3, "capacity": 128, "json_out": "bench.json"},
    )
    assert "hybrid:run/drafter, block 3" in said
    plain = place.json("bench.json")["figures"]["plain"]
    assert plain["against_plain"]["average"] == 1
