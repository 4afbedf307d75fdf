"""The prompts that come with the package."""

import json

import pytest

from jaxspark.evaluation.prompts import CALIBRATION, DOMAINS, PROMPTS, load_prompts


def rows(path):
    return [json.loads(line) for line in path.read_text("utf-8").split("\n") if line]


@pytest.mark.parametrize("domain", DOMAINS)
def test_the_default_takes_every_prompt_in_order(domain, smollm2):
    """Those that 20 of the whole sets were, on which results rest."""
    own = rows(PROMPTS / f"{domain}_prompts.jsonl")
    chat = smollm2.tokenizer.chat
    expected = [chat([{"role": "user", "content": row["turns"][0]}]) for row in own]
    for limit in (256, 384):
        found = load_prompts(
            *(PROMPTS, smollm2.tokenizer),
            per_domain=20,
            max_tokens=limit,
            domains=(domain,),
        )
        assert found == {domain: expected}


def test_calibration_has_questions_alone_and_none_of_the_prompts(smollm2):
    questions = [row["messages"] for path in CALIBRATION for row in rows(path)]
    assert len(questions) == 192
    for question in questions:
        assert [message["role"] for message in question] == ["user"]
        assert len(smollm2.tokenizer.chat(question)) <= 256
    texts = {question[0]["content"] for question in questions}
    assert len(texts) == 192
    for domain in DOMAINS:
        for row in rows(PROMPTS / f"{domain}_prompts.jsonl"):
            assert not texts.intersection(row["turns"])


def test_every_source_is_credited_with_its_license():
    readme = (PROMPTS / "README.md").read_text("utf-8")
    _, *table = [line for line in readme.splitlines() if line.startswith("| `")]
    sources = {row["source"] for path in CALIBRATION for row in rows(path)}
    for domain in DOMAINS:
        own = rows(PROMPTS / f"{domain}_prompts.jsonl")
        sources |= {row["id"].partition("/")[0] + "/*" for row in own}
    assert {line.split("`")[1] for line in table} == sources
    for line in table:
        assert any(name in line for name in ("MIT", "Apache-2.0", "CC-BY-4.0", "CC0"))
        assert "github.com" in line or "as above" in line
