"""Generates text with speculative decoding; streams it, then prints one summary line.

  jaxspark generate --chat="Why is the sky blue?"
  jaxspark generate --prompt="def fibonacci(n):" --draft=none
  jaxspark generate --chat="Tell me a story." --temperature=0.8 --seed=3
  jaxspark generate --chat="Tell me a story." --draft=dspark --schedule=lagged

The tokens are those of plain decoding: at temperature 0 always, at other temperatures
with --coupling=gumbel for the same seed (with --coupling=rejection, in distribution).
"""

from dataclasses import dataclass

import jax

from jaxspark import Completion, generate, load_drafter
from jaxspark.calibration.schedules import chosen_options
from jaxspark.configuration import option
from jaxspark.generation.completion import Likely
from jaxspark.launch import common, program
from jaxspark.launch.sampling import SamplingOptions
from jaxspark.parallel.mesh import slot_shards
from jaxspark.text import Tokenizer
from jaxspark.text.printing import Printer


@dataclass(frozen=True, kw_only=True)
class Config(
    common.TargetOptions,
    common.DraftOptions,
    common.CouplingOptions,
    common.ScheduleOptions,
    SamplingOptions,
):
    """What to continue, and how."""

    prompt: str | None = option("Text to continue as it is.", None, may_be_empty=True)
    chat: str | None = option(
        "A user message, put through the chat template.", None, may_be_empty=True
    )
    system: str | None = option(
        "A system message before --chat.", None, may_be_empty=True
    )

    def __post_init__(self):
        super().__post_init__()
        if (self.prompt is None) == (self.chat is None):
            raise ValueError("give either --prompt or --chat")
        if self.prompt is not None and self.system is not None:
            raise ValueError("--system goes before --chat; --prompt is taken as it is")

    def prompt_ids(self, tokenizer: Tokenizer) -> list[int]:
        """The token ids of the prompt or the chat."""
        if self.prompt is not None:
            return tokenizer.encode(self.prompt)
        messages = [{"role": "user", "content": self.chat}]
        if self.system is not None:
            messages.insert(0, {"role": "system", "content": self.system})
        return tokenizer.chat(messages)


def main(config: Config) -> None:
    """Loads, generates, streams."""
    target, tokenizer = config.load()
    drafter = load_drafter(config.draft, target)
    printer = Printer(tokenizer, target.stop_ids)
    ids = config.prompt_ids(tokenizer)
    options, capacity = chosen_options(
        config.schedule,
        config.costs,
        target,
        drafter,
        draft=config.draft,
        block_length=config.block_length,
        tokens=len(ids) + config.max_new_tokens,
        coupling=config.coupling,
        temperature=config.temperature,
        confidences=config.confidences,
        # One request, and as many idle slots as a mesh wants.
        slots=slot_shards(),
    )
    [completion] = generate(
        target,
        [ids],
        drafter,
        config.params(),
        options=options,
        capacity=capacity,
        on_tokens=printer,
    )
    print(printer.stream.flush())
    tell(completion, ids, tokenizer)
    speed = printer.tokens_per_second()
    print(
        f"[{len(completion.tokens)} tokens"
        + (f" · {speed:.1f} tokens/s" if speed else "")
        + f" · accepted length {completion.accepted_length:.2f}"
        f" · {completion.rounds} rounds · {completion.finish_reason}"
        f" · draft {config.draft} · {config.dtype} · {jax.default_backend()}]"
    )


def tell(completion: Completion, ids: list[int], tokenizer: Tokenizer) -> None:
    """Prints the log-probabilities that were asked for, a token per line."""

    def line(token: int, log_prob: float | None, top: Likely, note: str = "") -> str:
        shown = f"{'' if log_prob is None else f'{log_prob:8.3f}':8}  "
        shown += f"{tokenizer.decode([token], skip_special=False)!r}{note}"
        likely = (
            f"{tokenizer.decode([each], skip_special=False)!r} {value:.3f}"
            for each, value in top
        )
        return f"{shown:32}  {'  '.join(likely)}".rstrip()

    if completion.prompt_log_probs is not None:
        for token, told in zip(ids, completion.prompt_log_probs):
            if told is None:
                print(line(token, None, []))
            else:
                print(line(token, told.log_prob, told.top, f" #{told.rank}"))
        print()
    tops = completion.top_log_probs or [[] for _ in completion.tokens]
    for token, log_prob, top in zip(
        completion.tokens, completion.log_probs or (), tops
    ):
        print(line(token, log_prob, top))


if __name__ == "__main__":
    program.run(main, Config)
