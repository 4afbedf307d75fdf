"""What the frozen target says about packed sequences: taps, last hidden states, log Z.

    p(next token | prefix) = softmax(head h),   log p_v = head_v h - log Z

One hidden row and one number per position give the target's distribution over any part
of the vocabulary, so nothing of vocabulary size is ever stored. Features are computed
inside the run (`online`), or kept in a bounded file that later epochs and runs read
(`FeatureCache`). Both give the same float32 numbers.

On a mesh every shard runs its own sequences, and no process reads those of others.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from jaxspark.models import DenseDecoder, FlatTokens, TargetDecoder
from jaxspark.models.layers.rope import Rotation
from jaxspark.parallel import vocabulary
from jaxspark.parallel.axes import MODEL, SLOTS, bound
from jaxspark.parallel.mesh import over_mesh, slot_shards
from jaxspark.parallel.rows import own_rows, read_own_rows
from jaxspark.parallel.rules import parameter_specs, row_specs
from jaxspark.settings import standard_settings
from jaxspark.training.blocks import packed_attention
from jaxspark.training.data.packing import Packed
from jaxspark.training.feature_cache import FeatureCache
from jaxspark.training.vocabulary_loss import head_columns


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Features:
    """The target's view of P packed sequences.

    Attributes:
      taps_PSmD: outputs of the tapped layers.
      hidden_PSD: last hidden states after the final norm; the head's input.
      log_z_PS: log of the softmax's denominator over the whole vocabulary.
    """

    taps_PSmD: Float[Array, "P S m D"]
    hidden_PSD: Float[Array, "P S D"]
    log_z_PS: Float[Array, "P S"]

    def taps_TmD(self, dtype) -> Float[Array, "T m D"]:
        """The taps of all T = P S positions, as drafters read them."""
        return self.taps_PSmD.astype(dtype).reshape(-1, *self.taps_PSmD.shape[2:])

    def with_noise(self, key: Array, scale: float) -> "Features":
        """Uniform noise on the taps, `scale` times the size of each row (RMS).

        It keeps a drafter from learning few data by heart, as EAGLE's training does
        (arXiv 2401.15077).
        """
        taps_PSmD = jnp.asarray(self.taps_PSmD)
        rms_PSm1 = jnp.sqrt(
            jnp.mean(jnp.square(taps_PSmD), -1, keepdims=True, dtype=jnp.float32)
        )
        noise_PSmD = jax.random.uniform(
            key, taps_PSmD.shape, taps_PSmD.dtype, minval=-1, maxval=1
        )
        # A uniform number in [-1, 1] has variance 1/3.
        size_PSm1 = (3**0.5 * scale * rms_PSm1).astype(taps_PSmD.dtype)
        return replace(self, taps_PSmD=taps_PSmD + size_PSm1 * noise_PSmD)


def target_features(
    target: TargetDecoder, batch: Packed, *, taps: tuple[int, ...]
) -> Features:
    """Runs the target over packed sequences; documents do not see each other.

    A dense target attends within whole sequences, by one program for all batches. Any
    other takes documents as slots of one pass. On a mesh its shards share the sequences
    out, and keep their own.

    Raises:
      ValueError: they cannot be shared out evenly.
    """
    own_rows(len(batch.index_P))
    function, *operands, static = features_program(target, batch, taps)
    return function(*operands, **static)


def lower_features(
    target: TargetDecoder, batch: Packed, *, taps: tuple[int, ...]
) -> Any:
    """The same, lowered and not run."""
    function, *operands, static = features_program(target, batch, taps)
    return function.lower(*operands, **static)


def features_program(
    target: TargetDecoder, batch: Packed, taps: tuple[int, ...]
) -> tuple[Any, Any, Any, dict[str, Any]]:
    """What computes features, jitted; its two arguments, and its static keywords."""
    if isinstance(target, DenseDecoder):
        return _of_sequences, target, batch, {"taps": taps}
    rows, length = batch.ids_PS.shape
    static = {"taps": taps, "shape": (rows // slot_shards(), length)}
    return _of_documents, target, _slots_by_shard(batch), static


def _slots_by_shard(batch: Packed) -> FlatTokens:
    """The documents as slots, those of each shard by themselves."""
    parts = np.array_split(np.arange(len(batch.index_P)), slot_shards())
    sizes = _sizes(batch, len(parts[0]))
    tokens = [as_slots(batch[rows], sizes) for rows in parts]
    return jax.tree.map(lambda *x: np.concatenate(x), *tokens)


def _sizes(batch: Packed, rows: int) -> tuple[int, int]:
    """Slots for so many sequences, and tokens of the longest document, rounded up."""
    documents_PS = np.asarray(batch.documents_PS)
    slots = rows * (int(documents_PS.max()) + 1)
    longest = int(np.asarray(batch.positions_PS)[documents_PS >= 0].max(initial=0)) + 1
    return _power_of_two(slots), _power_of_two(longest)


def as_slots(batch: Packed, sizes: tuple[int, int] | None = None) -> FlatTokens:
    """The documents of packed sequences as slots.

    Their number and the longest are rounded up to powers of two, so that few programs
    serve all batches; `sizes` are larger ones, of several batches.
    """
    documents_PS = np.asarray(batch.documents_PS)
    slots, longest = sizes or _sizes(batch, len(documents_PS))
    per_row = int(documents_PS.max()) + 1
    first_P1 = per_row * np.arange(len(documents_PS))[:, None]
    slots_T = np.where(documents_PS < 0, -1, documents_PS + first_P1).ravel()
    real, first = np.unique(slots_T, return_index=True)
    offsets_B = np.zeros(slots, np.int32)
    offsets_B[real[real >= 0]] = first[real >= 0]
    counts_B = np.bincount(slots_T[slots_T >= 0], minlength=slots).astype(np.int32)
    positions_T = np.asarray(batch.positions_PS).ravel()
    arrays: dict[str, Any] = {
        "ids_T": np.asarray(batch.ids_PS).ravel(),
        "positions_T": positions_T,
        "limits_T": positions_T + 1,
        "slots_T": slots_T.astype(np.int32),
        "starts_B": np.zeros(slots, np.int32),
        "offsets_B": offsets_B,
        "counts_B": counts_B,
    }
    return FlatTokens(rows=longest, **arrays)


def _power_of_two(count: int) -> int:
    return 1 << max(count - 1, 0).bit_length()


@partial(jax.jit, static_argnames=("taps", "shape"))
@standard_settings()
@over_mesh(parameter_specs, row_specs, out=PartitionSpec(SLOTS))
def _of_documents(target, tokens, *, taps, shape) -> Features:
    cache = target.init_cache(tokens.slots, tokens.rows)
    x_TD, taps_TmD, _ = target(tokens, cache, taps=taps)
    return _features(target, x_TD, taps_TmD, shape)


def _features(target, x_TD, taps_TmD, shape) -> Features:
    normed_TD = target.norm(x_TD)
    return Features(
        taps_PSmD=taps_TmD.reshape(*shape, *taps_TmD.shape[1:]),
        hidden_PSD=normed_TD.reshape(*shape, -1),
        log_z_PS=_log_z(target.head_VD, normed_TD).reshape(shape),
    )


@partial(jax.jit, static_argnames=("taps",))
@standard_settings()
@over_mesh(parameter_specs, row_specs, out=PartitionSpec(SLOTS))
def _of_sequences(target, batch, *, taps) -> Features:
    P, S = batch.ids_PS.shape
    documents_PS = jnp.asarray(batch.documents_PS)
    seen_PSS = documents_PS[:, :, None] == documents_PS[:, None]
    seen_PSS &= jnp.tri(S, dtype=bool)
    rotation = Rotation.at(
        target.config.rope,
        target.config.head_dim,
        jnp.asarray(batch.positions_PS).reshape(-1),
    )
    x_TD = target.embed(jnp.asarray(batch.ids_PS).reshape(-1))
    outputs = {-1: x_TD}
    for index, layer in enumerate(target.layers):
        attention = layer.self_attn
        h_TD = layer.input_layernorm(x_TD)
        k_TKH, v_TKH = attention.keys_values(h_TD, rotation)
        q_TNH = attention.queries(h_TD, rotation)
        o_TX = packed_attention(q_TNH, k_TKH, v_TKH, seen_PSS)
        x_TD = layer.after_attention(x_TD, attention.o_proj.summed(o_TX))
        outputs[index] = x_TD
    taps_TmD = jnp.stack([outputs[tap] for tap in taps], axis=1)
    return _features(target, x_TD, taps_TmD, (P, S))


def _log_z(head_VD, normed_TD, rows: int = 512):
    """logsumexp of the logits, some rows at a time: [T, V] need not exist."""

    def some(h_ND):
        log_z_N = jax.nn.logsumexp(head_columns(head_VD, h_ND), axis=0)
        return vocabulary.logsumexp(log_z_N[:, None]) if bound(MODEL) else log_z_N

    T, D = normed_TD.shape
    h_TD = jnp.pad(normed_TD, ((0, -T % rows), (0, 0)))
    return jax.lax.map(some, h_TD.reshape(-1, rows, D)).reshape(-1)[:T]


@dataclass(frozen=True)
class FeatureSource:
    """Features of any batch: from the cache where there is one, else computed.

    Attributes:
      target: the frozen model.
      taps: layers the drafter sees.
      cache: where features are kept; None computes them every time.
    """

    target: TargetDecoder
    taps: tuple[int, ...]
    cache: FeatureCache | None = None

    def __call__(self, batch: Packed) -> Features:
        """The features of a batch, written to the cache if they were not there.

        Sequences are computed one by one, on a mesh one by one on every shard, so that
        what they give does not depend on which of them the cache holds.

        Args:
          batch: whole, of which a process gets the features of its own sequences.

        Raises:
          ValueError: it cannot be shared out evenly.
        """
        shards, count = slot_shards(), len(batch.index_P)
        own_rows(count)
        steps = np.arange(count).reshape(shards, -1).T
        found = [self._some(batch[rows]) for rows in steps]
        return jax.tree.map(
            lambda *x: np.stack(x, axis=1).reshape(-1, *x[0].shape[1:]), *found
        )

    def _some(self, some: Packed) -> Features:
        """Of one sequence of every shard, those of this process's shards."""
        if self.cache is None:
            return read_own_rows(target_features(self.target, some, taps=self.taps))
        layers, index_P = self.cache.layers, some.index_P[own_rows(len(some.index_P))]
        # Where one process has to compute, all of them do.
        rows_PSXD: Any
        log_z_PS: Any
        if self.cache.all_hold(some.index_P, index_P):
            rows_PSXD, log_z_PS = self.cache.read(index_P)
        else:
            all_PSmD = read_own_rows(target_features(self.target, some, taps=layers))
            rows_PSXD = np.concatenate(
                [all_PSmD.taps_PSmD, all_PSmD.hidden_PSD[:, :, None]], axis=2
            )
            log_z_PS = all_PSmD.log_z_PS
            self.cache.write(index_P, rows_PSXD, log_z_PS)
        places = [layers.index(tap) for tap in self.taps]
        return Features(rows_PSXD[:, :, places], rows_PSXD[:, :, -1], log_z_PS)


def with_features(
    batch: Packed, source: Callable[[Packed], Features]
) -> tuple[Packed, Features]:
    """This process's sequences of a batch, and what the target says of them."""
    return batch[own_rows(len(batch.index_P))], source(batch)
