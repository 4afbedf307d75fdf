"""No byte of an exported checkpoint can change or go missing unnoticed."""

import hashlib

import pytest

from jaxspark.checkpoints import (
    CheckpointError,
    load_draft_checkpoint,
    load_target,
    save_draft_checkpoint,
    save_target,
)
from tests.checkpoints.tiny import LLAMA, drafter, target, weights, write_folder

PLACES = (0.0, 0.001, 0.13, 0.5, 0.77, 0.999, 1.0)
TARGET_FILES = (
    "SHA256SUMS",
    "config.json",
    "generation_config.json",
    "model-00001-of-00002.safetensors",
    "model-00002-of-00002.safetensors",
    "model.safetensors.index.json",
    "tokenizer.json",
    "tokenizer_config.json",
)
DRAFTER_FILES = ("SHA256SUMS", "config.json", "model.safetensors")


@pytest.fixture(scope="module")
def target_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("target") / "m"
    save_target(folder, target(), shard_bytes=80_000)
    return folder


@pytest.fixture(scope="module")
def drafter_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("drafter") / "m"
    save_draft_checkpoint(folder, drafter(), target().model)
    return folder


def assert_every_change_is_seen(path, load):
    """Flips single bits, cuts, grows, empties and removes `path`."""
    data = path.read_bytes()
    offsets = sorted({int(place * (len(data) - 1)) for place in PLACES})
    altered = [
        data[:offset] + bytes([data[offset] ^ (1 << bit)]) + data[offset + 1 :]
        for offset in offsets
        for bit in (0, 2, 5)
    ]
    altered += [data[:offset] for offset in offsets]
    altered += [data + b"\n", data + b"\0" * 8, data + data]
    try:
        for content in altered:
            path.write_bytes(content)
            with pytest.raises(CheckpointError, match=str(path.parent)):
                load()
    finally:
        path.write_bytes(data)
    load()


@pytest.mark.parametrize("name", TARGET_FILES)
def test_an_altered_file_of_a_target_is_an_error(target_folder, name):
    assert {path.name for path in target_folder.iterdir()} == {*TARGET_FILES}
    path = target_folder / name
    assert_every_change_is_seen(path, lambda: load_target(target_folder))


@pytest.mark.parametrize("name", DRAFTER_FILES)
def test_an_altered_file_of_a_drafter_is_an_error(drafter_folder, name):
    assert {path.name for path in drafter_folder.iterdir()} == {*DRAFTER_FILES}
    config = target().model.config
    path = drafter_folder / name
    assert_every_change_is_seen(
        path, lambda: load_draft_checkpoint(drafter_folder, config)
    )


@pytest.mark.parametrize("name", TARGET_FILES[1:])
def test_a_removed_file_is_named(target_folder, name):
    path = target_folder / name
    data = path.read_bytes()
    path.unlink()
    try:
        with pytest.raises(CheckpointError, match=name):
            load_target(target_folder)
    finally:
        path.write_bytes(data)


def test_a_cut_list_of_checksums_does_not_hide_files(target_folder):
    path = target_folder / "SHA256SUMS"
    lines = path.read_text().splitlines(keepends=True)
    try:
        for kept in range(len(lines)):
            path.write_text("".join(lines[:kept]))
            with pytest.raises(CheckpointError):
                load_target(target_folder)
    finally:
        path.write_text("".join(lines))


def test_checksums_are_those_of_sha256sum(target_folder):
    listed = (target_folder / "SHA256SUMS").read_text().splitlines()
    for line in listed:
        digest, name = line.split("  ")
        data = (target_folder / name).read_bytes()
        assert hashlib.sha256(data).hexdigest() == digest


@pytest.mark.parametrize("algorithm", ["sha256", "sha1"])
def test_a_download_cache_checks_itself(tmp_path, algorithm):
    """Cache files are links to blobs that are named by their content."""
    folder = write_folder(tmp_path / "m", LLAMA, weights(LLAMA))
    link = folder / "model.safetensors"
    data = link.read_bytes()
    prefix = b"" if algorithm == "sha256" else b"blob %d\0" % len(data)
    blob = tmp_path / hashlib.new(algorithm, prefix + data).hexdigest()
    link.rename(blob)
    link.symlink_to(blob)
    load_target(folder)
    flipped = bytes([data[-1] ^ 1])
    blob.write_bytes(data[:-1] + flipped)
    with pytest.raises(CheckpointError, match="model.safetensors.*download it again"):
        load_target(folder)
    blob.unlink()
    with pytest.raises(CheckpointError, match="model.safetensors"):
        load_target(folder)
