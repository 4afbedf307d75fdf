"""Generates text with speculative decoding; streams it, then prints one summary line.

  jaxspark generate --chat="Why is the sky blue?"
  jaxspark generate --prompt="def fibonacci(n):" --draft=none
  jaxspark generate --chat="Tell me a story." --temperature=0.8 --seed=3
  jaxspark generate --chat="Tell me a story." --draft=dspark --schedule=lagged

The tokens are those of plain decoding: at temperature 0 always, at other temperatures
with --coupling=gumbel for the same seed (with --coupling=rejection, in distribution).
"""

import time

import jax
from absl import flags

from jaxspark import generate, load_drafter
from jaxspark.decoding.generate import check_block_length, round_capacity
from jaxspark.launch import common, program

common.define_model_flags()
common.define_sampling_flags()
common.define_schedule_flags()
flags.DEFINE_string("prompt", None, "Text to continue as it is.")
flags.DEFINE_string("chat", None, "A user message, put through the chat template.")
flags.DEFINE_string("system", None, "A system message before --chat.")
flags.DEFINE_integer("max_new_tokens", 256, "Output budget.", lower_bound=1)
flags.DEFINE_bool("log_probs", False, "Print each token's log-probability afterwards.")
FLAGS = flags.FLAGS


def prompt_ids(tokenizer) -> list[int]:
    """The token ids of --prompt or --chat.

    Raises:
      ValueError: neither or both are given, or --system with --prompt.
    """
    if (FLAGS.prompt is None) == (FLAGS.chat is None):
        raise ValueError("give either --prompt or --chat")
    if FLAGS.prompt is not None:
        if FLAGS.system is not None:
            raise ValueError("--system goes before --chat; --prompt is taken as it is")
        return tokenizer.encode(FLAGS.prompt)
    messages = [{"role": "user", "content": FLAGS.chat}]
    if FLAGS.system is not None:
        messages.insert(0, {"role": "system", "content": FLAGS.system})
    return tokenizer.chat(messages)


class Printer:
    """Prints text as it grows and remembers when."""

    def __init__(self, tokenizer, stop_ids):
        self.stream, self.stop_ids = tokenizer.stream(), stop_ids
        self.arrivals: list[tuple[float, int]] = []

    def __call__(self, slot: int, tokens: list[int]) -> None:
        """Prints what the new tokens add."""
        shown = [token for token in tokens if token not in self.stop_ids]
        print(self.stream.push(shown), end="", flush=True)
        self.arrivals.append((time.perf_counter(), len(tokens)))

    def tokens_per_second(self) -> float | None:
        """Decoding speed after the first arrival, which includes compilation."""
        if len(self.arrivals) < 2:
            return None
        elapsed = self.arrivals[-1][0] - self.arrivals[0][0]
        return sum(count for _, count in self.arrivals[1:]) / elapsed


def main() -> None:
    """Loads, generates, streams."""
    target = common.load_text_target()
    drafter = load_drafter(FLAGS.draft, target)
    printer = Printer(target.tokenizer, target.stop_ids)
    ids = prompt_ids(target.tokenizer)
    block_length = check_block_length(drafter, FLAGS.block_length)
    schedule, calibration, capacity = common.chosen_schedule(
        target,
        drafter,
        slots=1,
        block_length=block_length,
        capacity=round_capacity(len(ids) + FLAGS.max_new_tokens + block_length),
        temperature=FLAGS.temperature,
    )
    [completion] = generate(
        target,
        [ids],
        drafter,
        max_new_tokens=FLAGS.max_new_tokens,
        temperature=FLAGS.temperature,
        top_k=FLAGS.top_k,
        top_p=FLAGS.top_p,
        min_p=FLAGS.min_p,
        seed=FLAGS.seed,
        coupling=FLAGS.coupling,
        block_length=block_length,
        schedule=schedule,
        calibration=calibration,
        capacity=capacity,
        log_probs=FLAGS.log_probs,
        on_tokens=printer,
    )
    print(printer.stream.flush())
    if completion.log_probs is not None:
        for token, log_prob in zip(completion.tokens, completion.log_probs):
            print(f"{log_prob:8.3f}  {target.tokenizer.decode([token])!r}")
    speed = printer.tokens_per_second()
    print(
        f"[{len(completion.tokens)} tokens"
        + (f" · {speed:.1f} tokens/s" if speed else "")
        + f" · accepted length {completion.accepted_length:.2f}"
        f" · {completion.rounds} rounds · {completion.finish_reason}"
        f" · draft {FLAGS.draft} · {FLAGS.dtype} · {jax.default_backend()}]"
    )


if __name__ == "__main__":
    program.run(main, may_be_empty=("prompt", "chat", "system"))
