"""Checksums of a checkpoint are computed once, and again after any change."""

import hashlib
import os
from dataclasses import replace

import pytest

from jaxspark.checkpoints import (
    CheckpointError,
    folders,
    load_target,
    save_target,
    stamps,
)
from jaxspark.checkpoints.built_in import Packaged
from tests.checkpoints.tiny import LLAMA, target, weights, write_folder


@pytest.fixture
def read(tmp_path, monkeypatch):
    """Names of the files of which SHA-256 is computed; all count as settled."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("JAXSPARK_VERIFY", raising=False)
    monkeypatch.setattr(stamps, "SETTLED_NS", 0)
    names, sha256 = [], folders.sha256

    def counted(path):
        names.append(path.name)
        return sha256(path)

    monkeypatch.setattr(folders, "sha256", counted)
    return names


@pytest.fixture
def folder(tmp_path, read):
    save_target(tmp_path / "m", target())
    read.clear()
    return tmp_path / "m"


def stamped(tmp_path):
    return list((tmp_path / "cache" / "jaxspark" / "verified").iterdir())


def test_a_second_load_reads_no_file_for_its_checksum(folder, read):
    files = {path.name for path in folder.iterdir()}
    load_target(folder)
    assert {*read} == files - {"SHA256SUMS"}
    read.clear()
    load_target(folder)
    assert read == []
    assert {path.name for path in folder.iterdir()} == files


def test_on_request_all_is_read_again(folder, read, monkeypatch):
    load_target(folder)
    once = sorted(read)
    load_target(folder, verify=True)
    assert sorted(read) == sorted(once * 2)
    monkeypatch.setenv("JAXSPARK_VERIFY", "1")
    load_target(folder)
    assert sorted(read) == sorted(once * 3)


def test_a_file_altered_after_it_was_verified_is_found(folder, read):
    """Also one of the same size whose time was set back."""
    load_target(folder)
    path = folder / "model.safetensors"
    data, before = path.read_bytes(), path.stat()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_mtime_ns == before.st_mtime_ns
    read.clear()
    with pytest.raises(CheckpointError, match="model.safetensors: has SHA-256"):
        load_target(folder)
    assert read == ["model.safetensors"]
    os.replace(folder / "model.safetensors", folder.parent / "old")
    path.write_bytes(data)
    load_target(folder)


def test_a_sum_that_was_altered_is_found(folder):
    load_target(folder)
    path = folder / "SHA256SUMS"
    digest = path.read_text().split()[0]
    path.write_text(path.read_text().replace(digest, "0" * 64))
    with pytest.raises(CheckpointError, match="says 000"):
        load_target(folder)


def test_a_file_that_has_just_changed_is_not_trusted(folder, read, monkeypatch):
    """It may change again within one tick of the clock that stamps go by."""
    monkeypatch.setattr(stamps, "SETTLED_NS", 3600 * 10**9)
    load_target(folder)
    once = sorted(read)
    load_target(folder)
    assert sorted(read) == sorted(once * 2)


@pytest.mark.parametrize("content", [b"", b"{}", b"\xff", b"[" * 10_000, b'["a", 1]'])
def test_a_damaged_stamp_costs_a_checksum(folder, tmp_path, read, content):
    load_target(folder)
    for path in stamped(tmp_path):
        path.write_bytes(content)
    once = sorted(read)
    load_target(folder)
    assert sorted(read) == sorted(once * 2)
    load_target(folder)
    assert len(read) == 2 * len(once)


def test_without_a_place_for_stamps_every_load_verifies(folder, read, monkeypatch):
    (folder.parent / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder.parent / "file"))
    load_target(folder)
    once = sorted(read)
    load_target(folder)
    assert sorted(read) == sorted(once * 2)


def test_blobs_of_a_download_cache_are_verified_once(tmp_path, read):
    folder = write_folder(tmp_path / "m", LLAMA, weights(LLAMA))
    link = folder / "model.safetensors"
    blob = tmp_path / hashlib.sha256(link.read_bytes()).hexdigest()
    link.rename(blob)
    link.symlink_to(blob)
    load_target(folder)
    load_target(folder)
    assert read == [blob.name]


def test_the_built_in_file_is_verified_once(tmp_path, read, monkeypatch):
    path = tmp_path / "m.gguf"
    path.write_bytes(b"not a model")
    digest = hashlib.sha256(b"not a model").hexdigest()
    packaged = Packaged(package="m", version="1", file="m.gguf", sha256=digest)
    packaged.check(path, again=False)
    packaged.check(path, again=False)
    assert read == ["m.gguf"]
    packaged.check(path, again=True)
    assert len(read) == 2
    with pytest.raises(CheckpointError, match="install its package again"):
        replace(packaged, sha256="0" * 64).check(path, again=False)
