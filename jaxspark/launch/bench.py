"""Benchmarks: ratios of things run alternately in one process, medians after warm-up.

  jaxspark bench --suite=decode                 plain, n-gram, rows per round
  jaxspark bench --suite=decode --peer_python=.venv-oracle/bin/python
                                                ... beside HF transformers
  jaxspark bench --suite=layout                 why activations are columns
  jaxspark bench --suite=draft --draft=FOLDER   a drafter alone, in hybrid, and n-gram,
                                                at every block length
  jaxspark bench --suite=load --draft=dspark    many requests at once: fixed lengths
                                                against the schedule
  jaxspark bench --suite=overhead               what scheduling itself costs

Compilation is never part of a figure.
"""

import contextlib
import json
import os
import pathlib
import subprocess
import tempfile
import time
from statistics import median

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from rich.console import Console
from rich.table import Table

from jaxspark.benchmark.sequences import decode_seconds
from jaxspark.checkpoints import load_drafter, save_target
from jaxspark.decoding import DecodeOptions
from jaxspark.decoding.generate import default_buckets
from jaxspark.drafters import NgramDrafter, PlainDrafter, hybrid
from jaxspark.evaluation.acceptance import macro_average
from jaxspark.launch import common, program
from jaxspark.launch.bench_load import bench_load
from jaxspark.launch.bench_overhead import bench_overhead
from jaxspark.models import FlatTokens
from jaxspark.timing import alternate, medians, timed

common.define_model_flags(draft=None)
flags.DEFINE_enum(
    "suite",
    "decode",
    ["decode", "layout", "draft", "load", "overhead"],
    "What to measure.",
)
flags.DEFINE_string("draft", "dspark", "Drafter of --suite=draft, load and overhead.")
flags.DEFINE_list("draft_blocks", ["2", "3", "4", "5", "6", "7"], "Its block lengths.")
common.define_prompts_flag()
flags.DEFINE_integer("prompts_per_domain", 3, "Prompts per domain.", lower_bound=1)
flags.DEFINE_integer("new_tokens", 64, "Tokens per timed run.", lower_bound=8)
flags.DEFINE_integer("repeats", 5, "Timed runs of each contestant.", lower_bound=3)
flags.DEFINE_integer("capacity", 512, "Cache positions per slot.", lower_bound=128)
flags.DEFINE_string(
    "peer_python", None, "A Python with torch and transformers, to compare with."
)
flags.DEFINE_list("rows", ["1", "2", "4", "8", "16", "32"], "Rows per round to time.")
flags.DEFINE_list("ngram_blocks", ["2", "3", "4", "6", "8"], "Block lengths timed.")
flags.DEFINE_string("json_out", None, "File for the figures.")
FLAGS = flags.FLAGS

PROMPTS = (
    "A train leaves at 9 with 120 people. At each of 4 stops 15 leave and 8 join. How "
    "many arrive? Show every step.",
    "Write a Python class for a stack with push, pop and peek, then its unit tests.",
    "Write a short dialogue between a baker and a customer who cannot decide.",
)


class Peer:
    """The transformers program of `peers`, kept running."""

    def __init__(self, python: str, folder: str):
        program = pathlib.Path(__file__).parent / "peers" / "hf_transformers.py"
        environment = os.environ | {"HF_HUB_OFFLINE": "1"}
        self.process = subprocess.Popen(
            [python, str(program), folder, str(os.cpu_count())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        self.version = self._read()["version"]

    def _read(self) -> dict:
        line = self.process.stdout.readline()
        if not line:
            raise ValueError("the peer ended unexpectedly; its output is above")
        return json.loads(line)

    def decode(self, prompt: list[int], tokens: int) -> dict:
        """Greedy tokens and the seconds they took."""
        request = json.dumps({"prompt": prompt, "tokens": tokens})
        # One that has ended says so when it is read from.
        with contextlib.suppress(BrokenPipeError):
            print(request, file=self.process.stdin, flush=True)
        return self._read()


def bench_decode(console: Console) -> dict:
    """Tokens per second of one sequence: peer, plain, n-gram at each block length."""
    target = common.load_text_target()
    prompts = [
        target.tokenizer.chat([{"role": "user", "content": text}]) for text in PROMPTS
    ]
    states = {}

    def ours(name, drafter, options):
        def run():
            seconds = 0.0
            states[name] = []
            for prompt in prompts:
                spent, state = decode_seconds(
                    target.model,
                    drafter,
                    [prompt],
                    new_tokens=FLAGS.new_tokens,
                    options=options,
                    capacity=FLAGS.capacity,
                )
                seconds += spent
                states[name].append(jax.device_get(state.counters))
            return seconds

        return run

    options = DecodeOptions(block_length=0)
    contestants = {"plain": ours("plain", PlainDrafter(), options)}
    for block in map(int, FLAGS.ngram_blocks):
        options = DecodeOptions(block_length=block, buckets=(1, block + 1))
        name = f"ngram, block {block}"
        contestants[name] = ours(name, NgramDrafter(block_length=block), options)
    with tempfile.TemporaryDirectory() as folder:
        if FLAGS.peer_python:
            checkpoint = os.path.join(folder, "target")
            save_target(checkpoint, target)
            peer = Peer(FLAGS.peer_python, checkpoint)
            contestants[f"transformers {peer.version}"] = lambda: sum(
                peer.decode(prompt, FLAGS.new_tokens)["seconds"] for prompt in prompts
            )
        with console.status("decoding in turn"):
            seconds = alternate(contestants, FLAGS.repeats)
    tokens = FLAGS.new_tokens * len(prompts)
    plain = medians(seconds)["plain"]
    table = Table(title=f"{target.name} · one sequence · {FLAGS.dtype}")
    for column in ("", "tokens/s", "against plain", "accepted length"):
        table.add_column(column, justify="right")
    figures = {}
    for name, middle in medians(seconds).items():
        rounds = sum(int(c.rounds_B.sum()) for c in states.get(name, ()))
        accepted = tokens / rounds if rounds else 1.0
        figures[name] = {
            "tokens_per_second": tokens / middle,
            "against_plain": plain / middle,
            "accepted_length": accepted,
            "seconds": seconds[name],
        }
        table.add_row(
            name, f"{tokens / middle:.1f}", f"{plain / middle:.2f}x", f"{accepted:.2f}"
        )
    console.print(table)
    return {"tokens": figures, "rows": bench_rows(console, target.model)}


def bench_rows(console: Console, model) -> dict:
    """Seconds of one target pass over 1, 2, 4, ... rows of one slot."""
    cache = model.init_cache(1, FLAGS.capacity)

    @jax.jit
    def passes(model, cache, ids_1Q, count):
        """`count` passes in one program, each fed the last one's choices."""
        counts_1 = jnp.array([ids_1Q.shape[1]])

        def body(i, carry):
            ids_1Q, cache = carry
            tokens = FlatTokens.from_rows(ids_1Q, jnp.array([64]) + i, counts_1)
            x_DT, _, cache = model(tokens, cache)
            return jnp.argmax(model.logits(x_DT), -1)[None].astype(jnp.int32), cache

        return jax.lax.fori_loop(0, count, body, (ids_1Q, cache))[0]

    def contestant(rows):
        ids_1Q = jnp.ones((1, rows), jnp.int32)

        def run():
            begin = time.perf_counter()
            jax.block_until_ready(passes(model, cache, ids_1Q, 8))
            return (time.perf_counter() - begin) / 8

        return run

    rows = [int(r) for r in FLAGS.rows]
    with console.status("timing rows per round"):
        seconds = alternate({str(r): contestant(r) for r in rows}, FLAGS.repeats)
    table = Table(title=f"seconds per round · cache of {FLAGS.capacity} positions")
    for column in ("rows", "ms", "against one row"):
        table.add_column(column, justify="right")
    middle = medians(seconds)
    for r in map(str, rows):
        ratio = middle[r] / middle[str(rows[0])]
        table.add_row(r, f"{1e3 * middle[r]:.1f}", f"{ratio:.2f}x")
    console.print(table)
    return middle


def bench_layout(console: Console) -> dict:
    """24 MLP pairs of SmolLM2's size: weights and activations in three layouts."""
    layers, width, hidden = 24, 576, 1536
    random = np.random.default_rng(0)

    def weights(*shape):
        return [
            jnp.asarray(random.normal(0, 0.02, shape), jnp.float32)
            for _ in range(layers)
        ]

    up, down = weights(hidden, width), weights(width, hidden)
    up_T, down_T = [w.T.copy() for w in up], [w.T.copy() for w in down]

    @jax.jit
    def rows_times_weights(x, up, down):
        for u, d in zip(up, down):
            x = x + jax.nn.silu(x @ u) @ d
        return x

    @jax.jit
    def weights_times_columns(x, up, down):
        x = x.T
        for u, d in zip(up, down):
            x = x + d @ jax.nn.silu(u @ x)
        return x.T

    @jax.jit
    def rows_times_output_major(x, up, down):
        for u, d in zip(up, down):
            x = x + jax.nn.silu(x @ u.T) @ d.T
        return x

    figures = {}
    table = Table(title="ms for 24 MLP pairs")
    for column in ("tokens", "x W", "x W^T", "W x (ours)"):
        table.add_column(column, justify="right")
    for count in map(int, FLAGS.rows):
        x = jnp.asarray(random.normal(0, 1, (count, width)), jnp.float32)

        middle = medians(
            alternate(
                {
                    "x W": timed(rows_times_weights, x, up_T, down_T),
                    "x W^T": timed(rows_times_output_major, x, up, down),
                    "W x": timed(weights_times_columns, x, up, down),
                },
                max(FLAGS.repeats, 9),
            )
        )
        figures[str(count)] = middle
        table.add_row(str(count), *(f"{1e3 * each:.1f}" for each in middle.values()))
    console.print(table)
    return figures


def bench_draft(console: Console) -> dict:
    """Tokens per second by domain, one sequence, greedy; every drafter and block."""
    target = common.load_text_target()
    model = load_drafter(FLAGS.draft, target)
    prompts = common.load_domains(target.tokenizer, per_domain=FLAGS.prompts_per_domain)
    counters: dict[str, dict] = {}
    by_domain: dict[str, dict[str, list[float]]] = {}

    def contestant(name, drafter, block):
        options = DecodeOptions(
            block_length=block, buckets=default_buckets(drafter, 1, block, None)
        )
        counters[name], by_domain[name] = {}, {domain: [] for domain in prompts}

        def run():
            for domain, few in prompts.items():
                runs = [
                    decode_seconds(
                        target.model,
                        drafter,
                        [prompt],
                        new_tokens=FLAGS.new_tokens,
                        options=options,
                        capacity=FLAGS.capacity,
                    )
                    for prompt in few
                ]
                by_domain[name][domain].append(sum(seconds for seconds, _ in runs))
                rounds = sum(int(s.counters.rounds_B.sum()) for _, s in runs)
                counters[name][domain] = FLAGS.new_tokens * len(few) / rounds
            return 0.0

        return run

    contestants = {"plain": contestant("plain", PlainDrafter(), 0)}
    blocks = [int(block) for block in FLAGS.draft_blocks]
    for block in (b for b in blocks if b <= model.block_length):
        lookup = NgramDrafter(block_length=block)
        for name, drafter in (
            ("ngram", lookup),
            (FLAGS.draft, model),
            (f"hybrid:{FLAGS.draft}", hybrid(lookup, model)),
        ):
            name = f"{name}, block {block}"
            contestants[name] = contestant(name, drafter, block)
    with console.status("decoding in turn"):
        alternate(contestants, FLAGS.repeats)
    table = Table(title=f"{target.name} · one sequence · tokens/s against plain")
    table.add_column("")
    for column in (*prompts, "average", "accepted length"):
        table.add_column(column, justify="right")
    tokens = {domain: FLAGS.new_tokens * len(few) for domain, few in prompts.items()}
    # The first run of each compiles and is not counted.
    middle = {
        name: {domain: median(runs[1:]) for domain, runs in each.items()}
        for name, each in by_domain.items()
    }
    figures = {}
    for name, seconds in middle.items():
        ratio = {d: middle["plain"][d] / seconds[d] for d in prompts}
        accepted = macro_average(list(counters[name].values()))
        figures[name] = {
            "tokens_per_second": {d: tokens[d] / seconds[d] for d in prompts},
            "against_plain": ratio | {"average": macro_average(list(ratio.values()))},
            "accepted_length": counters[name] | {"average": accepted},
        }
        shown = figures[name]["against_plain"].values()
        table.add_row(name, *(f"{each:.2f}x" for each in shown), f"{accepted:.2f}")
    console.print(table)
    return figures


def main() -> None:
    """Runs the suite and prints its tables."""
    console = Console()
    suite = {
        "decode": bench_decode,
        "layout": bench_layout,
        "draft": bench_draft,
        "load": bench_load,
        "overhead": bench_overhead,
    }[FLAGS.suite]
    figures = {
        "suite": FLAGS.suite,
        "device": jax.devices()[0].device_kind,
        "cores": os.cpu_count(),
        "jax": jax.__version__,
        "dtype": FLAGS.dtype,
        "figures": suite(console),
    }
    if FLAGS.json_out:
        common.write_figures(FLAGS.json_out, figures)


if __name__ == "__main__":
    program.run(main)
