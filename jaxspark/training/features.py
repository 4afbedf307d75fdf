"""What the frozen target says about packed sequences: taps, last hidden states, log Z.

    p(next token | prefix) = softmax(head h),   log p_v = head_v h - log Z

One hidden row and one number per position give the target's distribution over any part
of the vocabulary, so nothing of vocabulary size is ever stored. Features are computed
inside the run (`online`), or kept in a bounded file that later epochs and runs read
(`FeatureCache`). Both give the same float32 numbers.
"""

import json
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float

from jaxspark.checkpoints.tree import named_parameters
from jaxspark.models import DenseDecoder, FlatTokens, TargetDecoder
from jaxspark.models.layers.rope import Rotation
from jaxspark.parallel.mesh import over_mesh
from jaxspark.parallel.rules import parameter_specs, replicated_specs
from jaxspark.settings import standard_settings
from jaxspark.training.blocks import packed_attention
from jaxspark.training.data.packing import Packed
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
    other takes documents as slots of one pass.
    """
    function, *operands, static = _call(target, batch, taps)
    return function(*operands, **static)


def lower_features(
    target: TargetDecoder, batch: Packed, *, taps: tuple[int, ...]
) -> Any:
    """The same, lowered and not run."""
    function, *operands, static = _call(target, batch, taps)
    return function.lower(*operands, **static)


def _call(target, batch, taps):
    if isinstance(target, DenseDecoder):
        return _of_sequences, target, batch, {"taps": taps}
    static = {"taps": taps, "shape": batch.ids_PS.shape}
    return _of_documents, target, as_slots(batch), static


def as_slots(batch: Packed) -> FlatTokens:
    """The documents of packed sequences as slots.

    Their number and the longest are rounded up to powers of two, so that few programs
    serve all batches.
    """
    documents_PS = np.asarray(batch.documents_PS)
    per_row = int(documents_PS.max()) + 1
    first_P1 = per_row * np.arange(len(documents_PS))[:, None]
    slots_T = np.where(documents_PS < 0, -1, documents_PS + first_P1).ravel()
    slots = _power_of_two(per_row * len(documents_PS))
    real, first = np.unique(slots_T, return_index=True)
    offsets_B = np.zeros(slots, np.int32)
    offsets_B[real[real >= 0]] = first[real >= 0]
    counts_B = np.bincount(slots_T[slots_T >= 0], minlength=slots).astype(np.int32)
    positions_T = np.asarray(batch.positions_PS).ravel()
    arrays = {
        "ids_T": np.asarray(batch.ids_PS).ravel(),
        "positions_T": positions_T,
        "limits_T": positions_T + 1,
        "slots_T": slots_T.astype(np.int32),
        "starts_B": np.zeros(slots, np.int32),
        "offsets_B": offsets_B,
        "counts_B": counts_B,
    }
    return FlatTokens(
        rows=_power_of_two(int(counts_B.max())), **jax.tree.map(jnp.asarray, arrays)
    )


def _power_of_two(count: int) -> int:
    return 1 << max(count - 1, 0).bit_length()


@partial(jax.jit, static_argnames=("taps", "shape"))
@standard_settings()
@over_mesh(parameter_specs, replicated_specs, out=PartitionSpec())
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
        x_TD = layer.after_attention(x_TD, attention.o_proj(o_TX))
        outputs[index] = x_TD
    taps_TmD = jnp.stack([outputs[tap] for tap in taps], axis=1)
    return _features(target, x_TD, taps_TmD, (P, S))


def _log_z(head_VD, normed_TD, rows: int = 512):
    """logsumexp of the logits, some rows at a time: [T, V] need not exist."""

    def some(h_ND):
        return jax.nn.logsumexp(head_columns(head_VD, h_ND), axis=0)

    T, D = normed_TD.shape
    h_TD = jnp.pad(normed_TD, ((0, -T % rows), (0, 0)))
    return jax.lax.map(some, h_TD.reshape(-1, rows, D)).reshape(-1)[:T]


class FeatureCache:
    """Features of packed sequences in one folder, filled as they are first needed.

    The folder belongs to one target and one set of layers, of which a smaller set can
    be read. A sequence is known by its content, so data may grow at the end. Nothing
    is kept of sequences beyond the byte limit.
    """

    def __init__(
        self,
        folder: str | Path,
        target: TargetDecoder,
        packed: Packed,
        *,
        layers: Sequence[int],
        limit_bytes: int,
    ):
        """Opens or begins a cache.

        Raises:
          ValueError: the folder holds the features of something else, or is damaged.
        """
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.layers = tuple(layers)
        count, S = packed.ids_PS.shape
        self.shape = (S, len(layers) + 1, target.config.hidden_size)
        self.dtype = np.dtype(target.dtype)
        self._check_meta(
            {
                "target": fingerprint(target),
                "layers": list(layers),
                "shape": list(self.shape),
                "dtype": str(self.dtype),
            }
        )
        self.row_bytes = sequence_bytes(target, S, self.layers)
        self.count = min(count, limit_bytes // self.row_bytes)
        self.rows = self._file("rows.bin", self.dtype, self.shape)
        self.log_z = self._file("log_z.bin", np.float32, (S,))
        # Written after its row, so that an interrupted row is not believed.
        self.sums = self._file("sums.bin", np.uint32, (2,))
        self.keys = np.array(
            [
                _checksum(ids_S, documents_S)
                for ids_S, documents_S in zip(packed.ids_PS, packed.documents_PS)
            ],
            np.uint32,
        )

    @property
    def missing(self) -> int:
        """How many of the sequences it will hold are not there yet."""
        return int(np.sum(self.sums[: self.count, 0] != self.keys[: self.count]))

    def _check_meta(self, meta: dict) -> None:
        path = self.folder / "meta.json"
        if not path.exists():
            path.write_text(json.dumps(meta, indent=1) + "\n")
            return
        try:
            old = json.loads(path.read_text())
        except ValueError as error:
            raise ValueError(
                f"{path}: is damaged ({error}); remove the folder"
            ) from None
        for name, value in meta.items():
            if old.get(name) != value:
                raise ValueError(
                    f"{self.folder}: holds features of another {name} "
                    f"({old.get(name)}, now {value}); name another folder or remove it"
                )

    def _file(self, name: str, dtype, row: tuple[int, ...]) -> np.ndarray:
        """A file of rows, made longer (without using space yet) if need be."""
        path = self.folder / name
        row_bytes = int(np.prod(row)) * np.dtype(dtype).itemsize
        size = path.stat().st_size if path.exists() else 0
        if size % row_bytes:
            raise ValueError(
                f"{path}: has {size} bytes, expected a multiple of {row_bytes}; the "
                "cache is damaged, remove its folder"
            )
        if size < self.count * row_bytes:
            with path.open("ab") as file:
                file.truncate(self.count * row_bytes)
        if not self.count:
            return np.zeros((0, *row), dtype)
        return np.memmap(path, dtype, "r", shape=(self.count, *row))

    def _put(self, name: str, index: int, row: np.ndarray) -> None:
        """Writes one row of a file; a full disk is an error, as it is not in a map."""
        data = row.tobytes()
        with (self.folder / name).open("r+b") as file:
            file.seek(int(index) * len(data))
            file.write(data)

    def holds(self, index_P: np.ndarray) -> Bool[np.ndarray, " P"]:
        """Which of these sequences are there."""
        held_P = index_P < self.count
        inside = index_P[held_P]
        held_P[held_P] = self.sums[inside, 0] == self.keys[inside]
        return held_P

    def read(self, index_P: np.ndarray, taps: Sequence[int]) -> Features:
        """The features of some sequences.

        Raises:
          ValueError: a row's bytes are not those that were written.
        """
        rows_PSmD, log_z_PS = self.rows[index_P], self.log_z[index_P]
        for index, row, log_z in zip(index_P, rows_PSmD, log_z_PS):
            if _checksum(row, log_z) != self.sums[index, 1]:
                raise ValueError(
                    f"{self.folder}: the features of sequence {index} are corrupt; "
                    "remove the folder, the run will fill it again"
                )
        places = [self.layers.index(tap) for tap in taps]
        return Features(rows_PSmD[:, :, places], rows_PSmD[:, :, -1], log_z_PS)

    def write(self, index_P: np.ndarray, features: Features) -> None:
        """Keeps features of all cached layers, of sequences it does not hold yet."""
        rows_PSmD = np.concatenate(
            [features.taps_PSmD, features.hidden_PSD[:, :, None]], axis=2
        )
        log_z_PS = np.asarray(features.log_z_PS)
        for index, row, log_z in zip(index_P, rows_PSmD, log_z_PS):
            if index < self.count and self.sums[index, 0] != self.keys[index]:
                self._put("sums.bin", index, np.zeros(2, np.uint32))
                self._put("rows.bin", index, row)
                self._put("log_z.bin", index, log_z)
                sums = np.array([self.keys[index], _checksum(row, log_z)], np.uint32)
                self._put("sums.bin", index, sums)


def sequence_bytes(target: TargetDecoder, length: int, layers: Sequence[int]) -> int:
    """What the features of one sequence take: layers, last hidden states, log Z."""
    row = (len(layers) + 1) * target.config.hidden_size
    return length * (row * np.dtype(target.dtype).itemsize + 4)


def _checksum(*arrays: np.ndarray) -> int:
    total = 0
    for array in arrays:
        total = zlib.crc32(np.ascontiguousarray(array), total)
    return total or 1  # 0 means absent.


def fingerprint(target: TargetDecoder) -> str:
    """Identifies a target's weights."""
    total = sha256()
    for array in named_parameters(target).values():
        total.update(np.asarray(array).tobytes())
    return total.hexdigest()[:16]


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

        Sequences are computed one by one, so that what they give does not depend on
        which of them the cache holds.
        """
        found = [self._single(batch[[n]]) for n in range(len(batch.index_P))]
        return jax.tree.map(lambda *x: np.concatenate(x), *found)

    def _single(self, one: Packed) -> Features:
        if self.cache is None:
            return jax.device_get(target_features(self.target, one, taps=self.taps))
        if not self.cache.holds(one.index_P).all():
            layers = self.cache.layers
            every = jax.device_get(target_features(self.target, one, taps=layers))
            self.cache.write(one.index_P, every)
            places = [layers.index(tap) for tap in self.taps]
            return replace(every, taps_PSmD=every.taps_PSmD[:, :, places])
        return self.cache.read(one.index_P, self.taps)
