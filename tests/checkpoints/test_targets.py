"""Folders of safetensors load as they are, and ours are whole or absent."""

import json
import pickle

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jaxspark.checkpoints import CheckpointError, load_target, save_target
from jaxspark.checkpoints import load as load_file
from jaxspark.checkpoints.tokenizer import save_tokenizer
from jaxspark.checkpoints.tree import named_parameters
from tests.checkpoints.tiny import (
    LLAMA,
    QWEN3,
    target,
    tokenizer,
    weights,
    write_folder,
    write_shards,
)


def assert_same_parameters(model, other):
    mine, theirs = named_parameters(model), named_parameters(other)
    assert mine.keys() == theirs.keys()
    for name, array in mine.items():
        assert array.dtype == theirs[name].dtype
        np.testing.assert_array_equal(array, theirs[name], err_msg=name)


@pytest.mark.parametrize("write", [write_folder, write_shards])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", [LLAMA, QWEN3])
def test_every_tensor_arrives_under_its_name(tmp_path, write, tied, family):
    config = family | {"tie_word_embeddings": tied, "attention_bias": True}
    tensors = weights(config)
    model = load_target(write(tmp_path / "m", config, tensors)).model
    loaded = named_parameters(model)
    assert len(loaded) == len(tensors)
    for name, array in tensors.items():
        np.testing.assert_array_equal(loaded[name.removeprefix("model.")], array)
    assert (model.lm_head is None) == tied


def test_float_types_are_cast_to_the_type_asked_for(tmp_path):
    tensors = {n: a.astype(ml_dtypes.bfloat16) for n, a in weights(LLAMA).items()}
    folder = write_folder(tmp_path / "m", LLAMA, tensors)
    for dtype in (jnp.float32, jnp.bfloat16):
        loaded = named_parameters(load_target(folder, dtype=dtype).model)
        for name, array in tensors.items():
            mine = loaded[name.removeprefix("model.")]
            assert mine.dtype == dtype
            np.testing.assert_array_equal(np.asarray(mine, "f4"), array.astype("f4"))


def test_redundant_tensors_of_old_exports_are_ignored(tmp_path):
    config = LLAMA | {"tie_word_embeddings": True}
    tensors = weights(config)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(4, np.float32)
    model = load_target(write_folder(tmp_path / "m", config, tensors)).model
    assert model.lm_head is None


def test_a_head_that_differs_from_the_embedding_is_used_though_tied(tmp_path):
    tensors = weights(LLAMA)
    folder = write_folder(
        tmp_path / "m", LLAMA | {"tie_word_embeddings": True}, tensors
    )
    loaded = load_target(folder)
    np.testing.assert_array_equal(loaded.model.head_VD, tensors["lm_head.weight"])
    assert not loaded.model.config.tie_word_embeddings
    save_target(tmp_path / "saved", loaded)
    assert_same_parameters(load_target(tmp_path / "saved").model, loaded.model)


def test_one_of_two_tied_matrices_is_enough(tmp_path):
    tensors = weights(LLAMA)
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    folder = write_folder(
        tmp_path / "m", LLAMA | {"tie_word_embeddings": True}, tensors
    )
    model = load_target(folder).model
    assert model.lm_head is None
    np.testing.assert_array_equal(model.head_VD, tensors["lm_head.weight"])
    rejected(write_folder(tmp_path / "m", LLAMA, tensors), "embed_tokens.weight")


def test_a_tensor_under_two_names_is_rejected(tmp_path):
    tensors = weights(LLAMA)
    tensors["norm.weight"] = tensors["model.norm.weight"] + 1
    folder = write_folder(tmp_path / "m", LLAMA, tensors)
    rejected(folder, "has both (model.norm.weight and norm|norm.weight and model)")


def test_an_adapter_beside_the_weights_is_rejected(tmp_path):
    folder = write_folder(tmp_path / "m", LLAMA, weights(LLAMA))
    (folder / "adapter_config.json").write_text("{}")
    rejected(folder, "holds adapter_config.json; expected a whole model")


@pytest.mark.parametrize("stop", [-1, 300])
def test_an_end_of_text_outside_the_vocabulary_is_rejected(tmp_path, stop):
    config = LLAMA | {"eos_token_id": [2, stop]}
    folder = write_folder(tmp_path / "m", config, weights(LLAMA))
    rejected(folder, f"eos_token_id is {stop}, expected an id of the vocabulary 0..299")


def test_what_its_makers_recommend_is_kept_when_a_model_is_saved(tmp_path):
    settings = {"temperature": 0.7, "top_p": 0.8, "eos_token_id": [5, 6]}
    folder = write_folder(tmp_path / "m", LLAMA, weights(LLAMA))
    (folder / "generation_config.json").write_text(json.dumps(settings))
    save_target(tmp_path / "saved", load_target(folder))
    written = json.loads((tmp_path / "saved" / "generation_config.json").read_text())
    assert written == settings


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("shard_bytes", [5 * 10**9, 20_000])
def test_a_saved_target_loads_equal(tmp_path, dtype, shard_bytes):
    saved = target(dtype=dtype, qk_norm=True, tie_word_embeddings=True)
    save_target(tmp_path / "m", saved, shard_bytes=shard_bytes)
    loaded = load_target(tmp_path / "m", dtype=dtype)
    assert loaded.model.config == saved.model.config
    assert loaded.stop_ids == saved.stop_ids
    assert_same_parameters(loaded.model, saved.model)
    messages = [{"role": "user", "content": "grüß dich"}]
    assert loaded.tokenizer.chat(messages) == saved.tokenizer.chat(messages)
    many = len(list((tmp_path / "m").glob("*.safetensors")))
    assert (many > 1) == (shard_bytes == 20_000)


def rejected(folder, words):
    with pytest.raises(CheckpointError, match=words):
        load_target(folder)


def test_missing_extra_and_misshapen_tensors_are_listed(tmp_path):
    tensors = weights(LLAMA)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    tensors["model.layers.0.mlp.up_proj.bias"] = np.ones(64, np.float32)
    tensors["model.norm.weight"] = np.ones(31, np.float32)
    folder = write_folder(tmp_path / "m", LLAMA, tensors)
    rejected(folder, r"1 tensors missing: layers.1.mlp.up_proj.weight \(64, 32\)")
    rejected(folder, r"1 tensors not part.*layers.0.mlp.up_proj.bias \(64,\)")
    rejected(folder, r"norm.weight expected \(32,\), found \(31,\)")


def test_a_layer_count_that_the_tensors_lack_fails_at_once(tmp_path):
    config = LLAMA | {"num_hidden_layers": 2_000_000_000}
    rejected(write_folder(tmp_path / "m", config, weights(LLAMA)), "2000000000 layers")


def test_sizes_beyond_any_memory_fail_as_wrong_shapes(tmp_path):
    config = LLAMA | {"hidden_size": 2**30, "intermediate_size": 2**30}
    rejected(write_folder(tmp_path / "m", config, weights(LLAMA)), "wrong shape")


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("stored", [np.float32, ml_dtypes.bfloat16])
def test_weights_that_are_not_finite_are_rejected(tmp_path, value, stored):
    tensors = {name: array.astype(stored) for name, array in weights(LLAMA).items()}
    tensors["model.layers.1.mlp.down_proj.weight"][3, 4] = value
    folder = write_folder(tmp_path / "m", LLAMA, tensors)
    for dtype in (jnp.float32, jnp.bfloat16):
        with pytest.raises(CheckpointError, match="layers.1.mlp.down_proj.*infinit"):
            load_target(folder, dtype=dtype)


@pytest.mark.parametrize("stored", [np.int8, np.int64, ml_dtypes.float8_e4m3fn])
def test_weights_of_an_unknown_type_are_rejected(tmp_path, stored):
    tensors = weights(LLAMA)
    tensors["model.norm.weight"] = tensors["model.norm.weight"].astype(stored)
    rejected(write_folder(tmp_path / "m", LLAMA, tensors), "norm.weight.*type")


def test_an_index_that_disagrees_with_its_shards_is_rejected(tmp_path):
    folder = write_shards(tmp_path / "m", LLAMA, weights(LLAMA))
    path = folder / "model.safetensors.index.json"
    good = json.loads(path.read_text())

    def with_index(changes, words):
        path.write_text(json.dumps(good | changes))
        rejected(folder, words)

    places = good["weight_map"]
    first, file = next(iter(places.items()))
    other = ({*places.values()} - {file}).pop()
    total = good["metadata"]["total_size"]
    with_index({"metadata": {"total_size": total - 4}}, f"total_size.*{total}")
    with_index({"weight_map": places | {"ghost": file}}, "ghost in part-0")
    with_index({"weight_map": places | {first: other}}, f"{first} in {other}.*{file}")
    with_index({"weight_map": {n: f for n, f in places.items() if n != first}}, first)
    with_index({"weight_map": {}}, "weight_map")
    with_index({"weight_map": places | {first: "../a.safetensors"}}, "in the folder")
    with_index({"weight_map": places | {first: 3}}, "in the folder")
    path.write_text("{")
    rejected(folder, "not valid JSON")


def test_a_missing_shard_is_named(tmp_path):
    folder = write_shards(tmp_path / "m", LLAMA, weights(LLAMA))
    (folder / "part-1.safetensors").unlink()
    rejected(folder, "part-1.safetensors.*does not exist")


def test_a_tensor_in_two_shards_is_rejected(tmp_path):
    folder = write_shards(tmp_path / "m", LLAMA, weights(LLAMA))
    one = folder / "part-0.safetensors"
    (folder / "part-1.safetensors").write_bytes(one.read_bytes())
    rejected(folder, "is in both")


def test_foreign_or_cut_weights_are_rejected_even_without_checksums(tmp_path):
    folder = write_folder(tmp_path / "m", LLAMA, weights(LLAMA))
    path = folder / "model.safetensors"
    data = path.read_bytes()
    for length in (0, 4, 8, 100, 2000, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:length])
        rejected(folder, "not a whole safetensors file")
    path.write_bytes(b"PK\x03\x04" + b"z" * 500)
    rejected(folder, "not a whole safetensors file")


def test_every_flipped_header_byte_is_rejected_or_harmless(tmp_path):
    folder = write_folder(tmp_path / "m", LLAMA, weights(LLAMA))
    path = folder / "model.safetensors"
    data = path.read_bytes()
    length = 8 + int.from_bytes(data[:8], "little")
    expected = named_parameters(load_target(folder).model)
    for offset in range(0, length, 23):
        path.write_bytes(data[:offset] + bytes([data[offset] ^ 4]) + data[offset + 1 :])
        try:
            loaded = named_parameters(load_target(folder).model)
        except CheckpointError:
            continue
        for name, array in loaded.items():  # e.g. a flip in the free metadata
            np.testing.assert_array_equal(array, expected[name])


def test_code_in_a_folder_is_never_read(tmp_path):
    class Trap:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    folder = tmp_path / "m"
    folder.mkdir()
    (folder / "config.json").write_text(
        json.dumps(LLAMA | {"auto_map": {"AutoModel": "modeling.Model"}})
    )
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Trap()))
    (folder / "modeling.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    rejected(folder, "model.safetensors.*never read")
    write_folder(folder, LLAMA, weights(LLAMA))
    load_target(folder)
    assert not (tmp_path / "ran").exists()


def test_a_source_that_is_nothing_is_explained(tmp_path):
    rejected(tmp_path / "absent", "no such folder.*Hub id.*smollm2-135m-instruct")
    rejected("gpt5", "no such folder")
    (tmp_path / "empty").mkdir()
    rejected(tmp_path / "empty", "config.json: the file does not exist")
    (tmp_path / "notes.txt").write_text("hello, this is no model")
    rejected(tmp_path / "notes.txt", "not a GGUF file")
    with pytest.raises(CheckpointError, match="float16.*expected float32 or bfloat16"):
        load_target(tmp_path, dtype=jnp.float16)


def test_a_tokenizer_larger_than_the_model_is_rejected(tmp_path):
    saved = target()
    config = LLAMA | {"vocab_size": 200}
    save_target(tmp_path / "m", saved)
    (tmp_path / "m" / "SHA256SUMS").unlink()
    write_folder(tmp_path / "m", config, weights(config))
    rejected(tmp_path / "m", "tokenizer has 258 ids.*vocab_size is 200")


def test_texts_end_at_the_same_ids_wherever_that_is_asked(tmp_path):
    """Those of generation_config.json, and the tokenizer's end of text."""
    folder = write_folder(tmp_path / "m", LLAMA, weights(LLAMA))
    save_tokenizer(folder, tokenizer())
    (folder / "generation_config.json").write_text('{"eos_token_id": [256, 7]}')
    loaded = load_target(folder)
    assert loaded.stop_ids == loaded.tokenizer.stop_ids == (256, 7, 257)
    path = folder / "tokenizer_config.json"
    path.write_text('{"eos_token": "<gone>", "tokenizer_class": "TokenizersBackend"}')
    config = LLAMA | {"vocab_size": 258}
    write_folder(folder, config, weights(config))
    rejected(folder, "ends texts with '<gone>', id 258; the model's vocab_size is 258")


def test_a_padding_token_beyond_the_model_is_left_alone(tmp_path):
    config = LLAMA | {"vocab_size": 258}
    folder = write_folder(tmp_path / "m", config, weights(config))
    save_tokenizer(folder, tokenizer())
    (folder / "special_tokens_map.json").write_text('{"pad_token": "[PAD]"}')
    assert load_target(folder).tokenizer.encode("[PAD]") == [258]


def test_an_interrupted_save_leaves_nothing(tmp_path, monkeypatch):
    def fail(folder, arrays, *, shard_bytes):
        (folder / "model.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(load_file, "write_safetensors", fail)
    with pytest.raises(KeyboardInterrupt):
        save_target(tmp_path / "m", target())
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_overwrite_keeps_the_old_checkpoint(tmp_path, monkeypatch):
    save_target(tmp_path / "m", target(seed=1))
    before = {p.name: p.read_bytes() for p in (tmp_path / "m").iterdir()}

    def fail(folder, arrays, *, shard_bytes):
        raise OSError("disk full")

    monkeypatch.setattr(load_file, "write_safetensors", fail)
    with pytest.raises(OSError, match="disk full"):
        save_target(tmp_path / "m", target(seed=2), overwrite=True)
    assert {p.name: p.read_bytes() for p in (tmp_path / "m").iterdir()} == before
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


def test_saving_overwrites_only_checkpoints_and_only_when_asked(tmp_path):
    save_target(tmp_path / "m", target(seed=1))
    with pytest.raises(CheckpointError, match="not empty.*overwrite=True"):
        save_target(tmp_path / "m", target(seed=2))
    saved = target(seed=2)
    save_target(tmp_path / "m", saved, overwrite=True)
    assert_same_parameters(load_target(tmp_path / "m").model, saved.model)
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "dear.txt").write_text("...")
    with pytest.raises(CheckpointError, match="no checkpoint; not overwritten"):
        save_target(tmp_path / "letters", saved, overwrite=True)
    with pytest.raises(CheckpointError, match="is a file"):
        save_target(tmp_path / "letters" / "dear.txt", saved)
    assert {p.name for p in tmp_path.iterdir()} == {"m", "letters"}
