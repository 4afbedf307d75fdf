"""Lets the target answer conversations, as training data for its drafter.

  jaxspark regenerate --data=math.jsonl,code.jsonl --out=answers.jsonl
  jaxspark regenerate --data=a.jsonl --out=sampled.jsonl --temperature=0.8

Data are JSON lines with {"messages": [...]}, or Hugging Face dataset folders; several
are taken in turn, each shuffled, and a prompt that comes again is passed over. The same
command goes on where it was stopped. What gave no example is listed in <out>.dropped.
"""

from collections import Counter
from dataclasses import asdict, dataclass

from jaxspark.configuration import option
from jaxspark.jsonlines import JsonLines, check_settings
from jaxspark.launch import common, program
from jaxspark.parallel.agreement import in_turn, leads
from jaxspark.progress import bars
from jaxspark.training.data import Regenerated, regenerate
from jaxspark.training.data.selection import select_conversations


@dataclass(frozen=True, kw_only=True)
class Config(common.TargetOptions):
    """What to answer, and how."""

    data: tuple[str, ...] = option("Conversations: JSON lines or dataset folders.")
    out: str = option("JSON-lines file to write, or to go on with.")
    conversations: int | None = option("How many to answer.", None, at_least=1)
    include: tuple[str, ...] = option("Patterns of the `source` to take.", ("*",))
    exclude: tuple[str, ...] = option("Patterns of the `source` to leave out.", ())
    slots: int = option("Answers written together.", 64, at_least=1)
    max_prompt_tokens: int = option("Longest prompt.", 192, at_least=1)
    max_new_tokens: int = option(
        "Output budget; longer answers are cut.", 192, at_least=1
    )
    temperature: float = option(
        "Sampling temperature; 0 answers greedily.", 0.0, at_least=0
    )
    top_p: float = option(
        "Sample from this much of the mass.", 1.0, at_least=0, at_most=1
    )
    seed: int = option("Seed of the order and of sampling.", 0, at_least=0)


def main(config: Config) -> None:
    """Answers what is not answered yet."""
    console = common.console()
    target, _ = config.load()
    rows = select_conversations(
        config.data,
        include=config.include,
        exclude=config.exclude,
        most=config.conversations,
        seed=config.seed,
    )
    names = ("max_prompt_tokens", "max_new_tokens", "temperature", "top_p", "seed")
    settings = config.recorded((*names, "dtype"))
    settings |= {"target": target.name}
    in_turn(lambda: check_settings(f"{config.out}.settings", settings))
    out = in_turn(lambda: JsonLines(config.out, writes=leads()))
    dropped = in_turn(lambda: JsonLines(f"{config.out}.dropped", writes=leads()))
    done = [entry["key"] for entry in (*out.entries, *dropped.entries)]
    tokens = sum(len(entry["answer_ids"]) for entry in out.entries)
    with bars(console) as progress:
        bar = progress.add_task("answers", total=len(rows), completed=len(done))
        for result in regenerate(
            target,
            rows,
            done=done,
            slots=config.slots,
            max_prompt_tokens=config.max_prompt_tokens,
            max_new_tokens=config.max_new_tokens,
            temperature=config.temperature,
            top_p=config.top_p,
            seed=config.seed,
        ):
            if isinstance(result, Regenerated):
                out.add(result.entry())
                tokens += len(out.entries[-1]["answer_ids"])
            else:
                dropped.add(asdict(result))
            progress.update(bar, advance=1, description=f"answers, {tokens:,} tokens")
    # "prompt of 200 tokens, ...": the number does not make another reason.
    reasons = Counter(entry["reason"].split(" of ")[0] for entry in dropped.entries)
    console.print(
        f"{config.out}: {len(out.entries):,} answers, {tokens:,} tokens; dropped "
        + (", ".join(f"{n} ({why})" for why, n in reasons.most_common(6)) or "none")
    )


if __name__ == "__main__":
    program.run(main, Config)
