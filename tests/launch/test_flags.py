"""What launchers make of flags: an empty value is a value, or an error."""

from types import SimpleNamespace

import pytest
from absl import flags

from jaxspark.evaluation.prompts import DOMAINS
from jaxspark.launch import program


class Spelling:
    """A tokenizer that shows what it was given."""

    def chat(self, messages):
        return "".join(f"[{m['role']}]{m['content']}" for m in messages)

    def encode(self, text):
        return text


@pytest.mark.parametrize(
    ("given", "prompt"),
    [
        (["--chat=hi", "--system="], "[system][user]hi"),
        (["--chat=hi", "--system=be brief"], "[system]be brief[user]hi"),
        (["--chat=hi"], "[user]hi"),
        (["--chat="], "[user]"),
        (["--prompt="], ""),
    ],
)
def test_an_empty_text_is_a_text(given, prompt, load):
    generate = load("generate")
    flags.FLAGS(["jaxspark", *given])
    assert generate.prompt_ids(Spelling()) == prompt


def test_a_flag_that_would_be_ignored_is_refused(load):
    generate = load("generate")
    flags.FLAGS(["jaxspark", "--prompt=hi", "--system=be brief"])
    with pytest.raises(ValueError, match="--system goes before --chat"):
        generate.prompt_ids(Spelling())
    flags.FLAGS(["jaxspark", "--costs=costs.json", "--schedule=threshold:0.5"])
    size = {"slots": 1, "block_length": 2, "capacity": 8, "temperature": 0.0}
    with pytest.raises(ValueError, match="not --schedule=threshold:0.5"):
        generate.common.chosen_schedule(None, None, **size)


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("generate", "--costs="),
        ("audit", "--drafters="),
        ("audit", "--drafters=ngram,"),
        ("audit", "--json_out="),
        ("bench", "--concurrency="),
        ("plot", "--names="),
        ("train_draft", "--taps="),
        ("train_draft", "--warm_start="),
    ],
)
def test_an_empty_value_is_refused(name, given, load):
    launcher = load(name)
    required = {"plot": ["--results=a", "--out=b"]}.get(name, [])
    if name == "train_draft":
        required = ["--data=a", "--out=b", "--steps=1"]
    own = program.own_flags(launcher)
    rest = program.parse(launcher, ["jaxspark", *required])
    program.check_given(rest, own, ())
    rest = program.parse(launcher, ["jaxspark", *required, given])
    with pytest.raises(
        ValueError, match=f"{given.partition('=')[0]} has an empty value"
    ):
        program.check_given(rest, own, ())
    with pytest.raises(ValueError, match="unexpected argument 'more'"):
        program.check_given(["jaxspark", "more"], own, ())


def test_a_wrong_flag_is_told_where_help_is(load):
    launcher = load("generate")
    with pytest.raises(ValueError, match="temprature.*see jaxspark generate --help"):
        program.parse(launcher, ["jaxspark", "--temprature=1"])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("--target=nowhere", "nowhere: no such folder"),
        ("--prompts_dir=nowhere", "nowhere/math_prompts.jsonl"),
        ("--drafters=ngram,dspark-gate", "dspark-gate: expected dspark-vanilla"),
        ("--schedules=eager", "unknown schedule 'eager'"),
    ],
)
def test_an_audit_finds_what_is_wrong_before_it_begins(
    given, message, load, monkeypatch
):
    audit = load("audit")
    flags.FLAGS(["jaxspark", "--suite=all", given])
    monkeypatch.setattr(audit, "audit_schedules", None)
    if not given.startswith("--target"):
        model = SimpleNamespace(dtype="float32", config=SimpleNamespace(vocab_size=60))
        target = SimpleNamespace(model=model, tokenizer=audit.Bytes())
        monkeypatch.setattr(audit.common, "load_text_target", lambda: target)
        # Its own drafters need a model.
        monkeypatch.setitem(audit.PARTS["all"], "drafters", ["ngram"])
    with pytest.raises(ValueError, match=message):
        audit.main()


def test_prompts_are_those_of_the_package_unless_told(load, tmp_path, capsys):
    common = load("evaluate").common
    flags.FLAGS(["jaxspark"])
    domains = common.load_domains(Spelling(), per_domain=20, max_tokens=5000)
    assert {name: len(each) for name, each in domains.items()} == dict.fromkeys(
        DOMAINS, 20
    )
    assert capsys.readouterr().err == ""
    for domain in DOMAINS:
        (tmp_path / f"{domain}_prompts.jsonl").write_text('{"turns": ["hi"]}\n')
    flags.FLAGS(["jaxspark", f"--prompts_dir={tmp_path}"])
    domains = common.load_domains(Spelling(), per_domain=1)
    assert domains == dict.fromkeys(DOMAINS, ["[user]hi"])
    used = "1 of math, 1 of code, 1 of chat"
    assert capsys.readouterr().err == f"prompts of {tmp_path}: {used}\n"
