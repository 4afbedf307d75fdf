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

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxspark.models.batch import FlatTokens, SlotView
from jaxspark.models.layers.linear import Linear, product
from jaxspark.models.layers.norm import Float32RMSNorm
from jaxspark.models.layers.rope import TrailingRotation
from jaxspark.models.rows import Rows
from pallas_kernels.precision import widened


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
        self.rope, self.turning = config.compress_rope, config.qk_rope_head_dim

    @property
    def lookback(self) -> int:
        """Positions before a pass that a window completed in it may hold."""
        return self.series * self.ratio - 1

    def init_raw(self, layers: int, slots: int, length: int) -> Rows:
        """The ring of rows that await their window's end."""
        width = 2 * self.series * self.width
        return Rows.ring(
            layers, slots, length, width, jnp.float32, lookback=self.lookback
        )

    def init_entries(self, layers: int, slots: int, length: int, dtype) -> Rows:
        """The table of entries."""
        return Rows.zeros(
            layers, slots, max(length // self.ratio, 1), self.width, dtype
        )

    def limits(self, positions: Int[Array, "..."]) -> Int[Array, "..."]:
        """How many entries a query at a position sees: those complete by then."""
        return (positions + 1) // self.ratio

    def __call__(
        self,
        x_DT: Float[Array, "D T"],
        raw: Rows,
        entries: Rows,
        layer: Int[Array, ""],
        tokens: FlatTokens,
        view: SlotView,
    ) -> tuple[Rows, Rows]:
        """Remembers the tokens' rows and writes the entries that they complete."""
        rows_TX = self.rows(x_DT, tokens.positions_T)
        before_BKX, raw = raw.advance(layer, self.lookback, rows_TX, tokens, view)
        entry_BC, new_BCH = self.pool(before_BKX, rows_TX, tokens, view)
        ends_B = tokens.starts_B + view.counts_B
        complete_BC = self.ratio * (entry_BC + 1) <= ends_B[:, None]
        slot_BC = jnp.broadcast_to(jnp.arange(len(ends_B))[:, None], entry_BC.shape)
        entries = entries.put(
            layer,
            slot_BC.ravel(),
            entry_BC.ravel(),
            new_BCH.reshape(-1, self.width),
            (complete_BC & (entry_BC < entries.length)).ravel(),
        )
        return raw, entries

    def of_whole(
        self, x_DT: Float[Array, "D T"], tokens: FlatTokens, view: SlotView
    ) -> Float[Array, "B C H"]:
        """Entries of texts that begin with this pass, without any cache.

        Those past a text's end are anything.
        """
        rows_TX = self.rows(x_DT, tokens.positions_T)
        size = (len(view.index_BQ), self.lookback, rows_TX.shape[1])
        return self.pool(jnp.zeros(size, rows_TX.dtype), rows_TX, tokens, view)[1]

    def rows(
        self, x_DT: Float[Array, "D T"], positions_T: Int[Array, " T"]
    ) -> Float[Array, "T X"]:
        """Values, then logits with their position's bias, of all series."""
        x_DT = widened(x_DT)
        value_XT = product(widened(self.kv_proj.matrix), x_DT)
        logit_XT = product(widened(self.gate_proj.matrix), x_DT)
        bias_TX = self.position_bias[...][positions_T % self.ratio]
        return jnp.concatenate([value_XT.T, logit_XT.T + bias_TX], axis=1)

    def pool(
        self,
        before_BKX: Float[Array, "B K X"],
        rows_TX: Float[Array, "T X"],
        tokens: FlatTokens,
        view: SlotView,
    ) -> tuple[Int[Array, "B C"], Float[Array, "B C H"]]:
        """The entries that may end in this pass, from its rows and those before it.

        A pass of Q positions ends at most ceil(Q / m) windows. Whether it does end them
        is the caller's question.
        """
        m, H = self.ratio, self.width
        around_BRX = jnp.concatenate([before_BKX, view.spread(rows_TX, 0)], axis=1)
        count = -(-tokens.rows // m)
        entry_BC = (tokens.starts_B // m)[:, None] + jnp.arange(count)
        first_BC = m * (entry_BC + 1 - self.series)
        offset_BC = first_BC - tokens.starts_B[:, None] + self.lookback
        offset_BCp = offset_BC[..., None] + jnp.arange(self.series * m)
        # Rows past the pass belong to windows that are not complete.
        row_BCp = jnp.minimum(offset_BCp, around_BRX.shape[1] - 1)
        rows_BCpX = jax.vmap(lambda around_RX, row: around_RX[row])(around_BRX, row_BCp)
        values, logits = jnp.split(rows_BCpX, 2, axis=-1)
        if self.series == 2:
            values, logits = map(self._overlapping, (values, logits))
            # Entry 0 has no window before it.
            missing_BCp = (entry_BC == 0)[..., None] & (jnp.arange(2 * m) < m)
            logits = jnp.where(missing_BCp[..., None], -jnp.inf, logits)
            values = jnp.where(missing_BCp[..., None], 0.0, values)
        weights_BCpH = jax.nn.softmax(logits, axis=2)
        pooled_CH = jnp.sum(weights_BCpH * values, axis=2).reshape(-1, H)
        rotation = TrailingRotation.at(self.rope, self.turning, m * entry_BC.ravel())
        new_CH = rotation(self.kv_norm(pooled_CH.T)[None])[0].T
        return entry_BC, new_CH.reshape(*entry_BC.shape, H)

    def _overlapping(self, rows_BCpX):
        """The first series of the earlier window, the second of the later one."""
        earlier, later = jnp.split(rows_BCpX, 2, axis=2)
        return jnp.concatenate(
            [earlier[..., : self.width], later[..., self.width :]], axis=2
        )
