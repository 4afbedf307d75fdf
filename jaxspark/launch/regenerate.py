"""Lets the target answer conversations, as training data for its drafter.

  jaxspark regenerate --data=math.jsonl,code.jsonl --out=answers.jsonl
  jaxspark regenerate --data=a.jsonl --out=sampled.jsonl --temperature=0.8

Data are JSON lines with {"messages": [...]}, or Hugging Face dataset folders; several
are taken in turn, each shuffled, and a prompt that comes again is passed over. The same
command goes on where it was stopped. What gave no example is listed in <out>.dropped.
"""

import itertools
import random
from collections import Counter
from fnmatch import fnmatch

from absl import flags
from rich.console import Console

from jaxspark.jsonlines import JsonLines, same_settings
from jaxspark.launch import common, program
from jaxspark.launch.progress import bars
from jaxspark.training.data import (
    Conversation,
    Problem,
    Regenerated,
    read_conversations,
    regenerate,
)

common.define_model_flags(draft=None)
flags.DEFINE_list("data", None, "Conversations: JSON lines or dataset folders.")
flags.DEFINE_string("out", None, "JSON-lines file to write, or to go on with.")
flags.DEFINE_integer("conversations", None, "How many to answer.", lower_bound=1)
flags.DEFINE_list("include", ["*"], "Patterns of the `source` to take.")
flags.DEFINE_list("exclude", [], "Patterns of the `source` to leave out.")
flags.DEFINE_integer("slots", 64, "Answers written together.", lower_bound=1)
flags.DEFINE_integer("max_prompt_tokens", 192, "Longest prompt.", lower_bound=1)
flags.DEFINE_integer("max_new_tokens", 192, "Answers are cut here.", lower_bound=1)
flags.DEFINE_float("temperature", 0.0, "0 answers greedily.", lower_bound=0.0)
flags.DEFINE_float("top_p", 1.0, "Sample from this much of the mass.")
flags.DEFINE_integer("seed", 0, "Of the order and of sampling.", lower_bound=0)
flags.mark_flags_as_required(["data", "out"])
FLAGS = flags.FLAGS


def conversations() -> list:
    """What --include and --exclude leave of --data: shuffled, then taken in turn."""
    columns = []
    for path in FLAGS.data:
        rows = [
            row
            for row in read_conversations([path])
            if isinstance(row, Problem) or _wanted(row.source)
        ]
        random.Random(FLAGS.seed).shuffle(rows)
        columns.append(rows)
    turns = itertools.zip_longest(*columns)
    rows = [row for turn in turns for row in turn if row is not None]
    known: dict[str, Conversation | Problem] = {}
    for row in rows:
        known.setdefault(row.where if isinstance(row, Problem) else row.key, row)
    return list(known.values())[: FLAGS.conversations]


def _wanted(source: str) -> bool:
    def matches(patterns):
        return any(fnmatch(source, pattern) for pattern in patterns)

    return matches(FLAGS.include) and not matches(FLAGS.exclude)


def main() -> None:
    """Answers what is not answered yet."""
    console = Console()
    target = common.load_text_target()
    rows = conversations()
    names = (
        "max_prompt_tokens",
        "max_new_tokens",
        "temperature",
        "top_p",
        "seed",
        "dtype",
    )
    settings = {name: FLAGS[name].value for name in names}
    same_settings(f"{FLAGS.out}.settings", settings | {"target": target.name})
    out = JsonLines(FLAGS.out)
    dropped = JsonLines(f"{FLAGS.out}.dropped")
    done = [entry["key"] for entry in (*out.entries, *dropped.entries)]
    tokens = sum(len(entry["answer_ids"]) for entry in out.entries)
    with bars(console) as progress:
        bar = progress.add_task("answers", total=len(rows), completed=len(done))
        for result in regenerate(
            target,
            rows,
            done=done,
            slots=FLAGS.slots,
            max_prompt_tokens=FLAGS.max_prompt_tokens,
            max_new_tokens=FLAGS.max_new_tokens,
            temperature=FLAGS.temperature,
            top_p=FLAGS.top_p,
            seed=FLAGS.seed,
        ):
            if isinstance(result, Regenerated):
                spoken = result.conversation
                entry = {
                    "key": result.key,
                    "domain": spoken.domain,
                    "source": spoken.source,
                    "finish_reason": result.finish_reason,
                    "messages": list(spoken.messages),
                    "answer_ids": list(spoken.answer_ids),
                }
                out.add(entry | ({"tools": spoken.tools} if spoken.tools else {}))
                tokens += len(spoken.answer_ids)
            else:
                dropped.add(
                    {"key": result.key, "where": result.where, "reason": result.reason}
                )
            progress.update(bar, advance=1, description=f"answers, {tokens:,} tokens")
    # "prompt of 200 tokens, ...": the number does not make another reason.
    reasons = Counter(entry["reason"].split(" of ")[0] for entry in dropped.entries)
    console.print(
        f"{FLAGS.out}: {len(out.entries):,} answers, {tokens:,} tokens; dropped "
        + (", ".join(f"{n} ({why})" for why, n in reasons.most_common(6)) or "none")
    )


if __name__ == "__main__":
    program.run(main)
