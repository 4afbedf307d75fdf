"""Compression of m positions into one cached entry (DeepSeek-V4 sections 2.3.1, 2.3.2).

    c_i = rope_{i m}(norm(sum_p softmax_p(z_p + b_{p mod m}) * v_p))     per channel

where v = W_kv x and z = W_gate x, and p runs over the m positions of window i (HCA).
With *overlap* (CSA) every position has two series of both: the sum then runs over the
first series of window i - 1 and the second of window i, 2 m rows in one softmax. (The
report calls the first C^b, Z^b and the second C^a, Z^a; Hugging Face's code has the
letters the other way round.)

Values and biased logits of positions whose window is not complete wait in a ring. An
entry is computed when its window's last position is processed; if that was a draft that
is rejected, it is computed again later and overwritten. All in float32.
"""

from dataclasses import replace

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxspark.models.batch import FlatTokens
from jaxspark.models.layers.linear import Linear, matmul
from jaxspark.models.layers.norm import Float32RMSNorm
from jaxspark.models.rows import LayerRows, Ring
from pallas_kernels import Table, compress
from pallas_kernels.precision import upcast
from pallas_kernels.ragged import LANES


class Compressor(nnx.Module):
    """Makes entries of width H from inputs of width D, one for `ratio` positions."""

    def __init__(
        self, config, width: int, ratio: int, *, overlap: bool, dtype, rngs: nnx.Rngs
    ):
        self.ratio, self.width, self.series = ratio, width, 1 + overlap
        channels = self.series * width
        options = {"dtype": dtype, "rngs": rngs}
        self.kv_proj = Linear(config.hidden_size, channels, **options)
        self.gate_proj = Linear(config.hidden_size, channels, **options)
        self.position_bias = nnx.Param(jnp.zeros((ratio, channels), jnp.float32))
        self.kv_norm = Float32RMSNorm(width, eps=config.rms_norm_eps, dtype=dtype)
        self.rope, self.rope_dim = config.compress_rope, config.qk_rope_head_dim

    @property
    def lookback(self) -> int:
        """Positions before a pass that a window completed in it may hold."""
        return self.series * self.ratio - 1

    def init_pending(self, layers: int, slots: int, length: int) -> Ring:
        """The ring of rows that await their window's end."""
        width = 2 * self.series * self.width
        return Ring.empty(
            layers, slots, length, width, jnp.float32, lookback=self.lookback
        )

    def init_entries(
        self, layers: int, slots: int, length: int, dtype, *, apart: bool = False
    ) -> LayerRows:
        """The table of entries; `apart` if they are read one by one."""
        count = max(length // self.ratio, 1)
        if not apart and self.width % LANES == 0:
            # Read from the first on, by TPUs in tiles: of sixteen, or better of many.
            step = 16 if count <= LANES else LANES
            count = -(-count // step) * step
        return LayerRows.zeros(
            *(layers, slots, count, self.width, dtype),
            apart=apart,
            positions=self.ratio,
        )

    def limits(self, positions: Int[Array, "..."]) -> Int[Array, "..."]:
        """How many entries a query at a position sees: those complete by then."""
        return (positions + 1) // self.ratio

    def __call__(
        self,
        x_TD: Float[Array, "T D"],
        pending: Ring,
        entries: LayerRows,
        layer: Int[Array, ""],
        tokens: FlatTokens,
    ) -> tuple[Ring, LayerRows]:
        """Remembers the tokens' rows and writes the entries that they complete."""
        frequencies_h, amplitude = self.rope.frequencies(self.rope_dim)
        pending_LBSX, entries_LBCH = compress(
            self.rows(x_TD, tokens.positions_T),
            pending.table(layer),
            Table(entries.rows_LBSH, layer, tokens.pages_BP),
            self.kv_norm.weight[...],
            jnp.asarray(frequencies_h),
            tokens,
            ratio=self.ratio,
            eps=self.kv_norm.eps,
            amplitude=float(amplitude),
        )
        return (
            replace(pending, rows_LBSH=pending_LBSX),
            replace(entries, rows_LBSH=entries_LBCH),
        )

    def rows(
        self, x_TD: Float[Array, "T D"], positions_T: Int[Array, " T"]
    ) -> Float[Array, "T X"]:
        """Values, then logits with their position's bias, of all series."""
        x_TD = upcast(x_TD)
        value_TX = matmul(x_TD, upcast(self.kv_proj.matrix))
        logit_TX = matmul(x_TD, upcast(self.gate_proj.matrix))
        bias_TX = self.position_bias[...][positions_T % self.ratio]
        return jnp.concatenate([value_TX, logit_TX + bias_TX], axis=1)
