"""Hub ids: only data is asked for, and every failure says what to do."""

import huggingface_hub
import pytest
from huggingface_hub import errors

from jaxspark.checkpoints import CheckpointError, load_target
from tests.checkpoints.tiny import LLAMA, weights, write_folder


def failing(error):
    def download(repo_id, **options):
        raise error

    return download


def http_error(kind):
    """These errors want an HTTP response; only their type matters here."""
    error = kind.__new__(kind)
    error.args = ("refused\nand a page of HTML",)
    return error


def test_only_data_is_downloaded(tmp_path, monkeypatch):
    folder = write_folder(tmp_path / "m", LLAMA, weights(LLAMA))
    asked = {}

    def download(repo_id, **options):
        asked.update(options, repo_id=repo_id)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    target = load_target("someone/tiny-llama")
    assert target.name == asked["repo_id"] == "someone/tiny-llama"
    assert set(asked["allow_patterns"]) == {"*.json", "*.safetensors", "*.jinja"}


@pytest.mark.parametrize(
    "error, words",
    [
        (http_error(errors.GatedRepoError), "gated.*HF_TOKEN"),
        (http_error(errors.RepositoryNotFoundError), "no such Hub checkpoint"),
        (errors.LocalEntryNotFoundError("offline"), "hf download.*pass the folder"),
        (errors.OfflineModeIsEnabled("offline"), "hf download.*pass the folder"),
        (TimeoutError("slow"), "TimeoutError: slow.*hf download"),
    ],
)
def test_a_failed_download_says_what_to_do(monkeypatch, error, words):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", failing(error))
    with pytest.raises(CheckpointError, match="someone/tiny.*" + words):
        load_target("someone/tiny")


def test_what_is_neither_folder_nor_id_is_not_looked_up(monkeypatch):
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", failing(AssertionError("looked up"))
    )
    for source in ("/no/such/folder", "a/b/c", "../model", "model", ""):
        with pytest.raises(CheckpointError, match="no such|config.json"):
            load_target(source)
