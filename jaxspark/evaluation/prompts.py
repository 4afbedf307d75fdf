"""Evaluation prompts: JSON lines with a domain and user turns, as token ids."""

import importlib.resources
import json
from pathlib import Path

DOMAINS = ("math", "code", "chat")
# What comes with the package: 20 prompts of each domain, and questions to calibrate by.
PROMPTS = Path(str(importlib.resources.files(__package__))) / "data"
CALIBRATION = tuple(PROMPTS / f"{domain}_calibration.jsonl" for domain in DOMAINS)


def load_prompts(
    folder: str | Path,
    tokenizer,
    *,
    per_domain: int,
    max_tokens: int = 384,
    domains: tuple[str, ...] = DOMAINS,
) -> dict[str, list[list[int]]]:
    """Chat prompts of each domain from `<folder>/<domain>_prompts.jsonl`.

    The first user turn of every line goes through the chat template. Prompts longer
    than `max_tokens` are passed over; the rest are taken evenly from the file.

    Raises:
      ValueError: a missing file, a malformed line, or too few prompts.
    """
    prompts = {}
    for domain in domains:
        path = Path(folder) / f"{domain}_prompts.jsonl"
        if not path.is_file():
            raise ValueError(f"{path}: no such file; expected one per domain {domains}")
        fitting = [
            ids
            for line, text in enumerate(path.read_text("utf-8").splitlines(), 1)
            if len(ids := _prompt_ids(path, line, text, tokenizer)) <= max_tokens
        ]
        if len(fitting) < per_domain:
            raise ValueError(
                f"{path}: has {len(fitting)} prompts of at most {max_tokens} tokens, "
                f"{per_domain} were asked for"
            )
        prompts[domain] = [
            fitting[i * len(fitting) // per_domain] for i in range(per_domain)
        ]
    return prompts


def _prompt_ids(path, line, text, tokenizer) -> list[int]:
    try:
        turns = json.loads(text)["turns"]
        return tokenizer.chat([{"role": "user", "content": turns[0]}])
    except (json.JSONDecodeError, KeyError, IndexError, TypeError) as error:
        raise ValueError(
            f"{path}:{line}: expected an object with a list `turns`, got {text[:80]!r}"
        ) from error


def in_turn(domains: dict[str, list[list[int]]]) -> list[list[int]]:
    """The prompts of all domains in one list, one of each domain in turn."""
    return [prompt for turn in zip(*domains.values()) for prompt in turn]
