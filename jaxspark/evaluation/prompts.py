"""Evaluation prompts: JSON lines with a domain and user turns, as token ids."""

import importlib.resources
import itertools
import sys
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxspark.configuration import Configuration, option
from jaxspark.jsonlines import MalformedRow, first_reasons, read_json_lines

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
    than `max_tokens` are passed over; the rest are taken evenly from the file, all of
    them where it has fewer than `per_domain`. Warnings say what is fewer, and which
    lines are no prompts.

    Raises:
      ValueError: a missing file, or one without any prompt that fits.
    """
    prompts = {}
    for domain in domains:
        path = Path(folder) / f"{domain}_prompts.jsonl"
        if not path.is_file():
            raise ValueError(f"{path}: no such file; expected one per domain {domains}")
        read = [
            _prompt_ids(where, row, tokenizer) for where, row in read_json_lines(path)
        ]
        problems = [each for each in read if isinstance(each, MalformedRow)]
        fitting = [
            ids
            for ids in read
            if not isinstance(ids, MalformedRow) and len(ids) <= max_tokens
        ]
        said = f"{path}: has {len(fitting)} prompts of at most {max_tokens} tokens"
        if problems:
            said += f", {len(problems)} lines are none ({first_reasons(problems)})"
        if not fitting:
            raise ValueError(said)
        count = min(per_domain, len(fitting))
        if problems or count < per_domain:
            warnings.warn(f"{said}; {count} are used", stacklevel=2)
        prompts[domain] = [fitting[i * len(fitting) // count] for i in range(count)]
    return prompts


def _prompt_ids(where: str, row: Any, tokenizer) -> list[int] | MalformedRow:
    if isinstance(row, MalformedRow):
        return row
    turns = row.get("turns") if isinstance(row, Mapping) else None
    if not isinstance(turns, list) or not turns or not isinstance(turns[0], str):
        return MalformedRow(where, "expected an object with a list of texts `turns`")
    try:
        return tokenizer.chat([{"role": "user", "content": turns[0]}])
    except Exception as error:  # Templates raise whatever they like.
        return MalformedRow(where, str(error))


def in_turn(domains: dict[str, list[list[int]]]) -> list[list[int]]:
    """The prompts of all domains in one list, one of each domain in turn."""
    turns = itertools.zip_longest(*domains.values())
    return [prompt for turn in turns for prompt in turn if prompt is not None]


@dataclass(frozen=True, kw_only=True)
class PromptOptions(Configuration):
    """The prompts that something is measured on."""

    prompts_dir: str | None = option(
        "Folder with <domain>_prompts.jsonl files of math, code and chat; by default "
        "the prompts that come with jaxspark, 20 of each.",
        None,
    )

    def read_prompts(
        self, tokenizer, *, per_domain: int, max_tokens: int = 384
    ) -> dict[str, list[list[int]]]:
        """The prompts as token ids by domain, evenly chosen.

        Says what is used where that is not what the package brings.

        Args:
          tokenizer: with a chat template.
          per_domain: prompts wanted of each domain.
          max_tokens: longer prompts are passed over.

        Raises:
          ValueError: a file is missing, malformed or without prompts.
        """
        folder = self.prompts_dir
        domains = load_prompts(
            PROMPTS if folder is None else folder,
            tokenizer,
            per_domain=per_domain,
            max_tokens=max_tokens,
        )
        if folder is not None:
            used = ", ".join(f"{len(each)} of {name}" for name, each in domains.items())
            print(f"prompts of {folder}: {used}", file=sys.stderr)
        return domains
