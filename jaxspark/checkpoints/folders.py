"""Folders that are whole or absent, with checksums of what they hold.

A folder is written under a temporary sibling name and renamed when complete, so a crash
leaves nothing that looks like a checkpoint. `SHA256SUMS` (the format of `sha256sum`)
covers every file; loading verifies it first, since safetensors has no checksum of data.
A file is read for that once, and again after it has changed (see `stamps`).
"""

import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from jaxspark.checkpoints import stamps
from jaxspark.errors import CheckpointError

SUMS = "SHA256SUMS"
READ_SUFFIXES = (".json", ".safetensors", ".jinja")
_LINE = re.compile(r"([0-9a-f]{64})  ([^/\\\n]+)\n")


@contextmanager
def new_folder(folder: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A temporary folder that becomes `folder`, checksums added, if the block succeeds.

    Raises:
      CheckpointError: `folder` is a file, or not empty without `overwrite`, or not a
        checkpoint (no config.json) with it; raised before the block runs.
    """
    _check_destination(folder, overwrite)
    folder.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{folder.name}."
    temporary = Path(tempfile.mkdtemp(prefix=prefix, dir=folder.parent))
    try:
        yield temporary
        write_sums(temporary)
        # mkdtemp and safetensors keep others out; the umask says who may read.
        mask = os.umask(0)
        os.umask(mask)
        temporary.chmod(0o777 & ~mask)
        for path in temporary.iterdir():
            path.chmod(0o666 & ~mask)
        _replace(temporary, folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _check_destination(folder: Path, overwrite: bool) -> None:
    if not folder.exists():
        return
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: is a file, expected a folder to write to")
    if not any(folder.iterdir()):
        return
    if not overwrite:
        raise CheckpointError(
            f"{folder}: is not empty; choose another folder or pass overwrite=True"
        )
    if not (folder / "config.json").is_file():
        raise CheckpointError(
            f"{folder}: holds no config.json, so it is no checkpoint; not overwritten"
        )


def _replace(temporary: Path, folder: Path) -> None:
    """Puts the new folder in place; the old one stays until the new one is there."""
    if not folder.exists() or not any(folder.iterdir()):
        os.replace(temporary, folder)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{folder.name}.old.", dir=folder.parent))
    os.replace(folder, old)
    try:
        os.replace(temporary, folder)
    except BaseException:
        os.replace(old, folder)
        raise
    shutil.rmtree(old)


def sha256(path: Path) -> str:
    """SHA-256 of a file, lower-case hex."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error})") from error


def verified_sha256(path: Path, expected: str, *, again: bool = False) -> str:
    """The SHA-256 of a file; `expected` where the file was found to have that before.

    `again`, or the environment variable JAXSPARK_VERIFY, has it computed anyway.
    """
    again = again or bool(os.environ.get("JAXSPARK_VERIFY"))
    if not again and stamps.is_stamped(path, expected):
        return expected
    try:
        before = stamps.state(path)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error})") from error
    seen = sha256(path)
    if seen == expected:
        stamps.stamp(path, seen, before)
    return seen


def write_sums(folder: Path) -> None:
    """Writes `SHA256SUMS` over every file of `folder`."""
    names = sorted(path.name for path in folder.iterdir() if path.name != SUMS)
    lines = [f"{sha256(folder / name)}  {name}\n" for name in names]
    (folder / SUMS).write_text("".join(lines), encoding="utf-8")


def cover(folder: Path, name: str) -> None:
    """Brings the line of one file in `SHA256SUMS` up to date, if there are sums."""
    path = folder / SUMS
    if path.exists():
        entries = _LINE.findall(path.read_text(encoding="utf-8"))
        digests = {file: digest for digest, file in entries}
        digests[name] = sha256(folder / name)
        lines = [f"{digests[file]}  {file}\n" for file in sorted(digests)]
        path.write_text("".join(lines), encoding="utf-8")


def verify(folder: Path, *, again: bool = False) -> None:
    """Checks a folder against its `SHA256SUMS`, or its files against the Hub cache.

    A folder without either is accepted: nothing is known about its bytes. Files that
    have not changed since they were checked are checked `again` only if asked for.

    Raises:
      CheckpointError: a file differs from its checksum, is missing, or could be read
        but is not covered; names the file.
    """
    if (folder / SUMS).exists():
        _verify_sums(folder, again)
    for path in sorted(folder.iterdir()):
        if path.is_symlink() and path.suffix in READ_SUFFIXES:
            _verify_blob(path, again)


def _verify_sums(folder: Path, again: bool) -> None:
    path = folder / SUMS
    try:
        text = path.read_bytes().decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error})") from error
    entries = _LINE.findall(text)
    read = "".join(f"{digest}  {name}\n" for digest, name in entries)
    if not entries or read != text:
        raise CheckpointError(
            f"{path}: expected lines of 64 hex digits, two spaces and a file name"
        )
    expected = {name: digest for digest, name in entries}
    if len(expected) != len(entries):
        raise CheckpointError(f"{path}: lists a file twice")
    for name, digest in expected.items():
        seen = verified_sha256(folder / name, digest, again=again)
        if seen != digest:
            raise CheckpointError(
                f"{folder / name}: has SHA-256 {seen}, but {SUMS} says {digest}; "
                "the file was truncated or altered"
            )
    for file in sorted(folder.iterdir()):
        if file.suffix in READ_SUFFIXES and file.name not in expected:
            raise CheckpointError(f"{file}: is not listed in {SUMS}")


def _verify_blob(link: Path, again: bool) -> None:
    """The download cache names blobs by SHA-256, or by Git's SHA-1 if small."""
    blob = link.resolve()
    name = blob.name
    if not blob.is_file():
        raise CheckpointError(f"{link}: is a link to a file that does not exist")
    if re.fullmatch(r"[0-9a-f]{64}", name):
        seen = verified_sha256(blob, name, again=again)
    elif re.fullmatch(r"[0-9a-f]{40}", name):
        data = blob.read_bytes()
        seen = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
    else:
        return
    if seen != name:
        raise CheckpointError(
            f"{link}: has checksum {seen}, but the download cache says {name}; the "
            "file was truncated or altered, download it again"
        )
