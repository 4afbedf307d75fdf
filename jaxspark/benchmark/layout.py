"""`jaxspark bench --suite=layout`: how a product of a few rows should be written."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from jaxspark.models.layers.linear import matmul
from jaxspark.timing import alternate, medians, timed


def input_major(x_TI, w_OI, w_IO):
    """x W, with weights laid out anew."""
    return x_TI @ w_IO


def output_major(x_TI, w_OI, w_IO):
    """x W^T as one writes it, with weights as in the checkpoint."""
    return x_TI @ w_OI.T


def streamed(x_TI, w_OI, w_IO):
    """(W x^T)^T: each row of W is read once."""
    return jax.lax.optimization_barrier(w_OI @ x_TI.T).T


def ours(x_TI, w_OI, w_IO):
    """What `Linear` does."""
    return matmul(x_TI, w_OI)


WRITINGS = {
    "x W": input_major,
    "x @ W.T": output_major,
    "(W x^T)^T": streamed,
    "matmul": ours,
}


def bench_layout(console: Console, rows: Sequence[int], repeats: int) -> dict:
    """24 MLP pairs of SmolLM2's size, by type, number of rows and writing."""
    layers, width, hidden = 24, 576, 1536
    random = np.random.default_rng(0)

    def weights(*shape):
        return [
            jnp.asarray(random.normal(0, 0.02, shape), jnp.float32)
            for _ in range(layers)
        ]

    up, down = weights(hidden, width), weights(width, hidden)

    def contestant(product, x, up, down):
        laid_out = [(w, w.T.copy()) for w in up], [(w, w.T.copy()) for w in down]

        @jax.jit
        def run(x, up, down):
            for u, d in zip(up, down):
                x = x + product(jax.nn.silu(product(x, *u)), *d)
            return x

        return timed(run, x, *laid_out)

    figures: dict[str, dict] = {}
    table = Table(title="ms for 24 MLP pairs")
    for column in ("type", "rows", *WRITINGS):
        table.add_column(column, justify="right")
    for dtype in (jnp.float32, jnp.bfloat16):
        name = jnp.dtype(dtype).name
        typed = [[w.astype(dtype) for w in matrices] for matrices in (up, down)]
        for count in rows:
            x = jnp.asarray(random.normal(0, 1, (count, width)), dtype)
            contestants = {
                writing: contestant(product, x, *typed)
                for writing, product in WRITINGS.items()
            }
            middle = medians(alternate(contestants, max(repeats, 9)))
            figures.setdefault(name, {})[str(count)] = middle
            table.add_row(
                name, str(count), *(f"{1e3 * each:.1f}" for each in middle.values())
            )
    console.print(table)
    return figures
