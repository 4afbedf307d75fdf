"""What launchers make of their configurations before anything runs."""

from types import SimpleNamespace

import pytest

from jaxspark.evaluation.prompts import DOMAINS, PromptOptions
from jaxspark.exactness.audit_models import Bytes
from jaxspark.exactness.suites.options import GRIDS, AuditOptions
from jaxspark.exactness.suites.tokens import TokenGrid
from jaxspark.launch import (
    audit,
    convert,
    evaluate,
    generate,
    plot,
    simulate,
    train_draft,
)


class Spelling:
    """A tokenizer that shows what it was given."""

    def chat(self, messages):
        return "".join(f"[{m['role']}]{m['content']}" for m in messages)

    def encode(self, text):
        return text


@pytest.mark.parametrize(
    ("given", "prompt"),
    [
        ({"chat": "hi", "system": ""}, "[system][user]hi"),
        ({"chat": "hi", "system": "be brief"}, "[system]be brief[user]hi"),
        ({"chat": "hi"}, "[user]hi"),
        ({"chat": ""}, "[user]"),
        ({"prompt": ""}, ""),
    ],
)
def test_an_empty_text_is_a_text(given, prompt):
    assert generate.Config(**given).prompt_ids(Spelling()) == prompt


def test_flags_of_sampling_reach_the_request():
    config = generate.Config(
        prompt="hi",
        min_tokens=2,
        repetition_penalty=1.2,
        logit_bias=("5:-100", "7:2.5"),
        bad_words=("no", "never"),
        top_log_probs=3,
    )
    params = config.params()
    assert params.logit_bias == {5: -100.0, 7: 2.5} and params.min_tokens == 2
    assert params.repetition_penalty == 1.2 and params.bad_words == ("no", "never")
    assert params.log_probs and params.top_log_probs == 3
    assert params.max_new_tokens == 256 and params.prompt_log_probs is None


@pytest.mark.parametrize(
    ("launcher", "given", "message"),
    [
        (generate, {}, "give either --prompt or --chat"),
        (generate, {"prompt": "hi", "system": "x"}, "--system goes before --chat"),
        (
            generate,
            {"prompt": "hi", "logit_bias": ("5",)},
            "logit_bias=5: expected token:number, such as 42:2.5",
        ),
        (
            generate,
            {"prompt": "hi", "presence_penalty": 3.0},
            "presence_penalty=3.0: expected -2 to 2",
        ),
        (
            generate,
            {"chat": "hi", "costs": "c.json", "schedule": "threshold:0.5"},
            "not --schedule=threshold:0.5",
        ),
        (generate, {"chat": "hi", "schedule": "eager"}, "unknown schedule 'eager'"),
        (convert, {"out": "x", "compact": True}, "--compact needs --draft"),
        (convert, {"out": "x", "format": "deepspec"}, "--format is about drafters"),
        (
            plot,
            {"results": ("a/x.json", "b/x.json"), "out": "p"},
            "--names must differ",
        ),
        (
            plot,
            {"results": ("a", "b"), "names": ("a",), "out": "p"},
            "2 results, but 1",
        ),
        (plot, {"results": ("a",), "out": "p", "x": "depth"}, "--x needs --at"),
        (simulate, {"costs": "c.json"}, "--costs and --draft are for a --trace"),
        (simulate, {"trace": "t", "acceptance": "a"}, "leave --acceptance out"),
    ],
)
def test_what_does_not_go_together_is_refused(launcher, given, message):
    with pytest.raises(ValueError, match=message):
        launcher.Config(**given)


def test_a_suite_has_a_grid_of_its_own_that_options_change():
    assert AuditOptions().grid() == TokenGrid()
    assert AuditOptions(suite="all").grid() == GRIDS["all"]
    changed = AuditOptions(suite="all", max_new_tokens=128).grid()
    assert changed.max_new_tokens == 128 and changed.drafters == GRIDS["all"].drafters


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"target": "nowhere"}, "nowhere: no such folder"),
        ({"prompts_dir": "nowhere"}, "nowhere/math_prompts.jsonl"),
        (
            {"drafters": ("ngram", "dspark-gate")},
            "dspark-gate: expected dspark-vanilla",
        ),
        ({"schedules": ("eager",)}, "unknown schedule 'eager'"),
    ],
)
def test_an_audit_finds_what_is_wrong_before_it_begins(given, message, monkeypatch):
    monkeypatch.setattr(audit, "run_suites", None)
    if "target" not in given:
        model = SimpleNamespace(dtype="float32", config=SimpleNamespace(vocab_size=60))
        target = SimpleNamespace(model=model, tokenizer=Bytes())
        monkeypatch.setattr(audit.Config, "load", lambda self: (target, Bytes()))
        # Its own drafters need a model.
        given = {"drafters": ("ngram",), **given}
    with pytest.raises(ValueError, match=message):
        audit.main(audit.Config(suite="all", **given))


def test_prompts_are_those_of_the_package_unless_told(tmp_path, capsys):
    config = evaluate.Config()
    domains = config.read_prompts(Spelling(), per_domain=20, max_tokens=5000)
    counts = {name: len(each) for name, each in domains.items()}
    assert counts == dict.fromkeys(DOMAINS, 20)
    assert capsys.readouterr().err == ""
    for domain in DOMAINS:
        (tmp_path / f"{domain}_prompts.jsonl").write_text('{"turns": ["hi"]}\n')
    own = PromptOptions(prompts_dir=str(tmp_path))
    assert own.read_prompts(Spelling(), per_domain=1) == dict.fromkeys(
        DOMAINS, ["[user]hi"]
    )
    used = "1 of math, 1 of code, 1 of chat"
    assert capsys.readouterr().err == f"prompts of {tmp_path}: {used}\n"


def test_settings_files_of_earlier_versions_still_agree():
    """Lists of numbers are texts there, and what only watches a run is not kept."""
    config = train_draft.Config(data=("a",), out="x", steps=1, taps=(1, 3))
    kept = config.settings()
    assert kept["taps"] == ["1", "3"] and kept["data"] == ["a"]
    assert not {"out", "dry_run", "log_every", "keep_quantized"} & set(kept)
    grid = TokenGrid(max_prompts=4).recorded()
    assert grid["slots"] == ["1", "5"] and grid["most"] == 4
    assert "prompts_per_domain" not in grid and "max_prompts" not in grid
