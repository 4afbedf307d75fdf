"""`jaxspark bench --suite=layout`: how weights and activations should lie."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from jaxspark.timing import alternate, medians, timed


def bench_layout(console: Console, rows: Sequence[int], repeats: int) -> dict:
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
    for count in rows:
        x = jnp.asarray(random.normal(0, 1, (count, width)), jnp.float32)

        middle = medians(
            alternate(
                {
                    "x W": timed(rows_times_weights, x, up_T, down_T),
                    "x W^T": timed(rows_times_output_major, x, up, down),
                    "W x": timed(weights_times_columns, x, up, down),
                },
                max(repeats, 9),
            )
        )
        figures[str(count)] = middle
        table.add_row(str(count), *(f"{1e3 * each:.1f}" for each in middle.values()))
    console.print(table)
    return figures
