"""A bounded folder of target features, filled as they are first needed.

Of a job's processes each writes and reads its own sequences. The folder may be one that
they share, or one of each host.
"""

import json
import zlib
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, UInt

from jaxspark.checkpoints.tree import named_parameters
from jaxspark.models import TargetDecoder
from jaxspark.parallel.agreement import everywhere, in_turn
from jaxspark.parallel.mesh import replicated
from jaxspark.settings import standard_settings
from jaxspark.training.data.packing import Packed


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
        self.layers = tuple(layers)
        count, S = packed.ids_PS.shape
        self.shape = (S, len(layers) + 1, target.config.hidden_size)
        self.dtype = np.dtype(target.dtype)
        self.row_bytes = sequence_bytes(target, S, self.layers)
        self.count = min(count, limit_bytes // self.row_bytes)
        meta = {
            "target": fingerprint(target),
            "layers": list(layers),
            "shape": list(self.shape),
            "dtype": str(self.dtype),
        }
        in_turn(lambda: self._check_meta(meta))
        files = {
            "rows.bin": (self.dtype, self.shape),
            "log_z.bin": (np.float32, (S,)),
            # Written after its row, so that an interrupted row is not believed.
            "sums.bin": (np.uint32, (2,)),
        }
        self.rows, self.log_z, self.sums = in_turn(
            lambda: [self._file(name, *row) for name, row in files.items()]
        )
        self._complete = False
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
        self.folder.mkdir(parents=True, exist_ok=True)
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

    def all_hold(self, index_P: np.ndarray, own_P: np.ndarray) -> bool:
        """Whether every process holds its own of some sequences; all call this."""
        if self._complete:
            return bool((index_P < self.count).all())
        # Once nothing is missing anywhere, nobody has to be asked.
        held, self._complete = everywhere(
            bool(self.holds(own_P).all()), self.missing == 0
        )
        return held

    def read(
        self, index_P: np.ndarray
    ) -> tuple[Float[np.ndarray, "P S X D"], Float[np.ndarray, "P S"]]:
        """Rows of some sequences, all cached layers and the last norm's, and log Z.

        Raises:
          ValueError: a row's bytes are not those that were written.
        """
        rows_PSXD, log_z_PS = self.rows[index_P], self.log_z[index_P]
        for index, row, log_z in zip(index_P, rows_PSXD, log_z_PS):
            if _checksum(row, log_z) != self.sums[index, 1]:
                raise ValueError(
                    f"{self.folder}: the features of sequence {index} are corrupt; "
                    "remove the folder, the run will fill it again"
                )
        return rows_PSXD, log_z_PS

    def write(
        self,
        index_P: np.ndarray,
        rows_PSXD: Float[np.ndarray, "P S X D"],
        log_z_PS: Float[np.ndarray, "P S"],
    ) -> None:
        """Keeps what `read` gives, of sequences it does not hold yet."""
        for index, row, log_z in zip(index_P, rows_PSXD, log_z_PS):
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
    """Identifies a target's weights, however they are shared out."""
    total = sha256()
    for name, parameter in named_parameters(target).items():
        for leaf in jax.tree.leaves(parameter):
            said = [name, str(leaf.dtype), leaf.shape, *np.asarray(_digest(leaf))]
            total.update(repr([*map(str, said)]).encode())
    return total.hexdigest()[:16]


@jax.jit
@standard_settings()
def _digest(x: Array) -> UInt[Array, "2"]:
    """Sums of hashes of places and numbers: whole ones, so their order is all one."""
    if jnp.issubdtype(x.dtype, jnp.floating):
        x = jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.uint32)
    place = jnp.zeros(x.shape, jnp.uint32)
    for axis, size in enumerate(x.shape):
        here = jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
        place = place * jnp.uint32(size) + here
    hashed = _mixed(x.astype(jnp.uint32) ^ _mixed(place + jnp.uint32(1)))
    both = jnp.sum(hashed), jnp.sum(_mixed(hashed))
    return replicated(jnp.stack(both).astype(jnp.uint32))


def _mixed(x: UInt[Array, "..."]) -> UInt[Array, "..."]:
    """The last rounds of MurmurHash3."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
