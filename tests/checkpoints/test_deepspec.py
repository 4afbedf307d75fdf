"""Drafters in DeepSpec's format load as they are, and ours read back equal."""

import json
import warnings
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from jaxspark.checkpoints import (
    CheckpointError,
    draft_folders,
    load_draft_checkpoint,
    load_drafter,
    save_draft_checkpoint,
)
from jaxspark.checkpoints.tree import named_parameters
from jaxspark.drafters import Eagle3Config, Eagle3Drafter, HybridDrafter
from jaxspark.models import DenseDecoder
from tests.checkpoints.tiny import dense, drafter, target

DFLASH = {
    "markov_rank": 0,
    "enable_confidence_head": False,
    "confidence_head_with_markov": False,
}
KINDS = {
    "vanilla": {},
    "gated": {"markov_head_type": "gated"},
    "rnn": {"markov_head_type": "rnn", "confidence_head_with_markov": False},
    "dflash": DFLASH,
    "dflash_as_published": DFLASH | {"sample_from_anchor": False},
    "pruned": {"draft_vocab_size": 20},
}
TARGET = dense()


def assert_equal(loaded, saved):
    assert loaded.config == saved.config
    mine, theirs = named_parameters(loaded), named_parameters(saved)
    assert mine.keys() == theirs.keys()
    for name, array in mine.items():
        assert array.dtype == theirs[name].dtype
        np.testing.assert_array_equal(array, theirs[name], err_msg=name)


def pruned_drafter():
    made = drafter(draft_vocab_size=20)
    ids = np.sort(np.random.default_rng(0).choice(300, 20, replace=False))
    made.draft_ids.set_value(jnp.asarray(ids, jnp.int32))
    return made


def eagle3_config(pruned=None):
    return Eagle3Config(
        backbone=replace(dense(qk_norm=True), num_hidden_layers=1),
        ttt_length=5,
        target_layer_ids=(0,),
        num_target_layers=2,
        draft_vocab_size=pruned,
    )


@pytest.mark.parametrize("pruned", [None, 20])
def test_an_exported_eagle3_drafter_loads_equal(tmp_path, pruned):
    saved = Eagle3Drafter(eagle3_config(pruned), rngs=nnx.Rngs(0))
    save_draft_checkpoint(tmp_path / "d", saved)
    assert_equal(load_draft_checkpoint(tmp_path / "d", TARGET), saved)
    written = json.loads((tmp_path / "d" / "config.json").read_text())
    assert written["architectures"] == ["Qwen3Eagle3Model"]
    assert (written["ttt_length"], written["step_loss_decay"]) == (5, 0.8)
    names = set(load_file(tmp_path / "d" / "model.safetensors"))
    layer = {
        *("hidden_norm", "input_layernorm", "post_attention_layernorm"),
        *(f"self_attn.{each}_proj" for each in "qkvo"),
        *("self_attn.q_norm", "self_attn.k_norm"),
        *(f"mlp.{each}_proj" for each in ("gate", "up", "down")),
    }
    expected = {"fc.weight", "norm.weight"}
    expected |= {f"layers.0.{each}.weight" for each in layer}
    expected |= {"lm_head.weight", "d2t", "t2d"} if pruned else set()
    assert names == expected


def test_a_pruned_head_may_be_left_to_the_target(tmp_path):
    model, saved = target().model, pruned_drafter()
    saved.lm_head.weight[...] = model.head_VD[saved.draft_ids[...]]
    save_draft_checkpoint(tmp_path / "d", saved, pruned_head=False)
    assert "lm_head.weight" not in load_file(tmp_path / "d" / "model.safetensors")
    assert_equal(load_draft_checkpoint(tmp_path / "d", model), saved)
    with pytest.raises(CheckpointError, match="has no lm_head.weight; load it with"):
        load_draft_checkpoint(tmp_path / "d", TARGET)


def test_a_hybrid_is_named_by_its_second_drafter(tmp_path):
    save_draft_checkpoint(tmp_path / "d", drafter())
    loaded = load_drafter(f"hybrid:{tmp_path / 'd'}", target().model)
    assert isinstance(loaded, HybridDrafter)
    assert loaded.block_length == loaded.lookup.block_length == drafter().block_length


@pytest.mark.parametrize("copies", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_an_exported_drafter_loads_equal(tmp_path, kind, copies):
    saved = pruned_drafter() if kind == "pruned" else drafter(**KINDS[kind])
    model = target(tie_word_embeddings=True).model if copies else None
    save_draft_checkpoint(tmp_path / "d", saved, model)
    assert_equal(load_draft_checkpoint(tmp_path / "d", TARGET), saved)


def test_a_folder_as_published_loads(tmp_path):
    """Configuration and names of a public block-7 drafter, at a tiny size."""
    D, V, R, H, F = 32, 300, 8, 8, 64
    shapes = {
        "embed_tokens.weight": (V, D),
        "lm_head.weight": (V, D),
        "fc.weight": (D, 2 * D),
        "hidden_norm.weight": (D,),
        "norm.weight": (D,),
        "markov_head.markov_w1.weight": (V, R),
        "markov_head.markov_w2.weight": (V, R),
        "confidence_head.proj.weight": (1, D + R),
        "confidence_head.proj.bias": (1,),
    }
    for i in range(2):
        shapes |= {
            f"layers.{i}.self_attn.q_proj.weight": (4 * H, D),
            f"layers.{i}.self_attn.k_proj.weight": (2 * H, D),
            f"layers.{i}.self_attn.v_proj.weight": (2 * H, D),
            f"layers.{i}.self_attn.o_proj.weight": (D, 4 * H),
            f"layers.{i}.self_attn.q_norm.weight": (H,),
            f"layers.{i}.self_attn.k_norm.weight": (H,),
            f"layers.{i}.mlp.gate_proj.weight": (F, D),
            f"layers.{i}.mlp.up_proj.weight": (F, D),
            f"layers.{i}.mlp.down_proj.weight": (D, F),
            f"layers.{i}.input_layernorm.weight": (D,),
            f"layers.{i}.post_attention_layernorm.weight": (D,),
        }
    random = np.random.default_rng(0)
    tensors = {n: random.standard_normal(s).astype("f4") for n, s in shapes.items()}
    config = {
        "architectures": ["Qwen3DSparkModel"],
        "model_type": "qwen3",
        "vocab_size": V,
        "hidden_size": D,
        "intermediate_size": F,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": H,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000,
        "rope_scaling": None,
        "max_position_embeddings": 40960,
        "max_window_layers": 36,
        "sliding_window": None,
        "use_sliding_window": False,
        "attention_bias": False,
        "tie_word_embeddings": False,
        "layer_types": ["full_attention"] * 2,
        "num_target_layers": 6,
        "block_size": 7,
        "mask_token_id": 299,
        "target_layer_ids": [1, 4],
        "num_anchors": 512,
        "enable_confidence_head": True,
        "confidence_head_with_markov": True,
        "markov_rank": R,
        "markov_head_type": "vanilla",
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(tensors, tmp_path / "model.safetensors")
    loaded = load_draft_checkpoint(tmp_path, dense(num_hidden_layers=6, qk_norm=True))
    assert loaded.config.block_size == 7
    assert loaded.config.target_layer_ids == (1, 4)
    assert loaded.config.backbone.qk_norm and loaded.config.sample_from_anchor
    parameters = named_parameters(loaded)
    assert {
        "embed_tokens.weight",
        "lm_head.weight",
    } == shapes.keys() - parameters.keys()
    for name, array in parameters.items():
        np.testing.assert_array_equal(array, tensors[name])


def test_an_export_carries_copies_of_the_targets_matrices(tmp_path):
    model = target(tie_word_embeddings=True).model
    save_draft_checkpoint(tmp_path / "d", drafter(), model)
    tensors = load_file(tmp_path / "d" / "model.safetensors")
    embedding = np.asarray(model.embed_tokens.weight[...])
    np.testing.assert_array_equal(tensors["embed_tokens.weight"], embedding)
    np.testing.assert_array_equal(tensors["lm_head.weight"], embedding)
    config = json.loads((tmp_path / "d" / "config.json").read_text())
    assert config["architectures"] == ["Qwen3DSparkModel"]
    assert config["layer_types"] == ["full_attention"]


def test_deepspec_gets_all_that_it_demands_or_refuses_the_folder(tmp_path):
    """It would draw a missing embedding and head at random, with a warning only."""
    model = target().model
    eagle3 = Eagle3Drafter(eagle3_config(), rngs=nnx.Rngs(0))
    for made, key in ((drafter(), "num_anchors"), (eagle3, "draft_num_hidden_layers")):
        for name, copied in (("whole", model), ("compact", None)):
            folder = tmp_path / f"{name}_{key}"
            save_draft_checkpoint(folder, made, copied)
            config = json.loads((folder / "config.json").read_text())
            assert (key in config) == (copied is not None)


@pytest.mark.parametrize("name", ["embed_tokens.weight", "lm_head.weight"])
def test_copies_of_another_targets_matrices_are_refused(tmp_path, name):
    model, folder = target().model, altered(tmp_path)
    matrix = load_file(folder / "model.safetensors")[name]
    random = np.random.default_rng(0).standard_normal(matrix.shape).astype("f4")

    def load(changed):
        return load_draft_checkpoint(altered(tmp_path, tensors={name: changed}), model)

    for other in (-matrix, matrix.std() * random, np.full_like(matrix, np.nan)):
        with pytest.raises(CheckpointError, match=f"{name} is not the target's"):
            load(other)
    with pytest.raises(CheckpointError, match=f"{name} has type int32"):
        load(matrix.astype("i4"))
    # A target in 4 bits beside copies of the whole one.
    near = matrix + 0.1 * matrix.std() * random
    with pytest.warns(UserWarning, match=f"{name} is not the target's: .* is 0.1 of"):
        assert_equal(load(near), drafter())
    one = matrix.copy()
    one[17, 3] += 0.01 * matrix.std()
    with pytest.warns(UserWarning, match=f"{name} is not the target's"):
        load(one)


@pytest.mark.parametrize("stored", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("own", ["float32", "bfloat16"])
def test_copies_may_be_rounded(tmp_path, stored, own):
    graphdef, params = nnx.split(target().model)
    model = nnx.merge(graphdef, jax.tree.map(lambda x: x.astype(own), params))
    matrix = np.asarray(target().model.head_VD).astype(stored)
    folder = altered(tmp_path, tensors={"lm_head.weight": matrix})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_draft_checkpoint(folder, model)


def test_a_pruned_vocabulary_is_stored_as_offsets(tmp_path):
    made = pruned_drafter()
    save_draft_checkpoint(tmp_path / "d", made)
    tensors = load_file(tmp_path / "d" / "model.safetensors")
    ids = np.asarray(made.draft_ids[...])
    assert tensors["d2t"].dtype == np.int64 and tensors["t2d"].dtype == np.bool_
    np.testing.assert_array_equal(np.arange(20) + tensors["d2t"], ids)
    np.testing.assert_array_equal(np.flatnonzero(tensors["t2d"]), ids)
    assert tensors["lm_head.weight"].shape == (20, 32)


def altered(tmp_path, *, config=None, tensors=None, made=None):
    """A drafter folder with changed configuration or tensors, no checksums."""
    folder = tmp_path / "d"
    made = made or drafter()
    save_draft_checkpoint(folder, made, target().model, overwrite=True)
    (folder / "SHA256SUMS").unlink()
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | (config or {})))
    arrays = load_file(folder / "model.safetensors") | (tensors or {})
    arrays = {name: array for name, array in arrays.items() if array is not None}
    save_file(arrays, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"vocab_size": 400}, "vocab_size is 300, the target's is 400"),
        ({"hidden_size": 40}, "hidden_size is 32, the target's is 40"),
        ({"num_hidden_layers": 9}, "num_target_layers is 2, the target's is 9"),
    ],
)
def test_a_drafter_for_another_target_is_rejected(tmp_path, changes, words):
    folder = altered(tmp_path)
    with pytest.raises(CheckpointError, match="made for another target: " + words):
        load_draft_checkpoint(folder, dense(**changes))
    model = DenseDecoder(dense(**changes), rngs=nnx.Rngs(0))
    with pytest.raises(CheckpointError, match=words):
        save_draft_checkpoint(tmp_path / "e", drafter(), model)
    assert not (tmp_path / "e").exists()


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"architectures": ["Qwen3ForCausalLM"]}, "expected.*Qwen3DSparkModel"),
        ({"target_layer_ids": [0, 1]}, "last layer 1.*after the final norm"),
        ({"target_layer_ids": [0, 2]}, "must lie in -1..1"),
        ({"target_layer_ids": [0, 0]}, "ascending"),
        ({"target_layer_ids": []}, "ascending"),
        ({"target_layer_ids": "0"}, "expected a list of integers"),
        ({"target_layer_ids": None}, "target_layer_ids is None"),
        ({"block_size": 0}, "block_size is 0, expected an integer of at least 1"),
        ({"mask_token_id": 300}, "mask_token_id 300 lies outside"),
        ({"markov_head_type": "lstm"}, "lstm.*expected one of"),
        ({"markov_rank": -1}, "markov_rank is -1"),
        ({"markov_rank": 16}, "markov_w1.weight expected .300, 16., found .300, 8."),
        ({"num_hidden_layers": 3, "layer_types": None}, "says 3 layers"),
        ({"rope_scaling": {"rope_type": "su"}}, "rope_type is 'su'"),
    ],
)
def test_a_bad_configuration_is_named(tmp_path, changes, words):
    with pytest.raises(CheckpointError, match=words):
        load_draft_checkpoint(altered(tmp_path, config=changes), TARGET)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"fc.weight": None}, r"missing: fc.weight \(32, 64\)"),
        ({"fc.bias": np.zeros(32, "f4")}, "not part of the model: fc.bias"),
        ({"norm.weight": np.zeros(9, "f4")}, "norm.weight expected"),
        ({"lm_head.weight": np.zeros((9, 32), "f4")}, "lm_head.weight.*as in the targ"),
        ({"embed_tokens.weight": np.zeros((300, 9), "f4")}, "embed_tokens.*found"),
        ({"hidden_norm.weight": np.full(32, np.nan, "f4")}, "hidden_norm.*NaN"),
    ],
)
def test_bad_tensors_are_named(tmp_path, changes, words):
    with pytest.raises(CheckpointError, match=words):
        load_draft_checkpoint(altered(tmp_path, tensors=changes), TARGET)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"d2t": None}, "d2t expected .20,., found none"),
        ({"d2t": np.zeros(19, np.int64)}, "d2t expected"),
        ({"d2t": np.full(20, 290, np.int64)}, "ids 290..309"),
        ({"d2t": -np.arange(20)}, "1 of them distinct; expected 20"),
        ({"d2t": np.zeros(20, np.float32)}, "d2t has type float32"),
        ({"t2d": np.ones(300, np.bool_)}, "t2d marks 300 ids"),
        ({"lm_head.weight": np.zeros((300, 32), "f4")}, "lm_head.weight expected"),
    ],
)
def test_a_bad_vocabulary_map_is_named(tmp_path, changes, words):
    folder = altered(tmp_path, tensors=changes, made=pruned_drafter())
    with pytest.raises(CheckpointError, match=words):
        load_draft_checkpoint(folder, TARGET)


def test_d2t_alone_is_enough(tmp_path):
    made = pruned_drafter()
    folder = altered(tmp_path, tensors={"t2d": None}, made=made)
    assert_equal(load_draft_checkpoint(folder, TARGET), made)


def test_what_the_format_cannot_say_is_not_exported(tmp_path):
    with pytest.raises(CheckpointError, match="last layer 1"):
        save_draft_checkpoint(tmp_path / "d", drafter(target_layer_ids=(0, 1)))
    plain = drafter(backbone=dense(num_hidden_layers=1))
    with pytest.raises(CheckpointError, match="qk_norm"):
        save_draft_checkpoint(tmp_path / "d", plain)
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_export_leaves_nothing(tmp_path, monkeypatch):
    def fail(folder, arrays, *, shard_bytes):
        raise KeyboardInterrupt

    monkeypatch.setattr(draft_folders, "write_safetensors", fail)
    with pytest.raises(KeyboardInterrupt):
        save_draft_checkpoint(tmp_path / "d", drafter())
    assert list(tmp_path.iterdir()) == []


def test_a_drafter_takes_the_type_asked_for(tmp_path):
    save_draft_checkpoint(tmp_path / "d", pruned_drafter())
    loaded = load_draft_checkpoint(tmp_path / "d", TARGET, dtype=jnp.bfloat16)
    types = {name: array.dtype for name, array in named_parameters(loaded).items()}
    assert types.pop("draft_ids") == jnp.int32
    assert set(types.values()) == {jnp.dtype(jnp.bfloat16)}
