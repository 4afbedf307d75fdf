"""DeepSeek-V4 folders: round trips, released storage, damage, other names."""

import json
import shutil
import weakref
from contextlib import nullcontext
from dataclasses import replace

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import save_file

from jaxspark import load_drafter, load_target
from jaxspark.checkpoints import (
    CheckpointError,
    Target,
    deepseek_v4,
    save_deepseek_v4,
    save_target,
)
from jaxspark.checkpoints.deepseek_v4 import load_deepseek_v4
from jaxspark.checkpoints.deepseek_v4_released import dequantized
from jaxspark.checkpoints.safetensors_files import EIGHT_BITS, open_safetensors
from jaxspark.checkpoints.tree import named_parameters
from jaxspark.configs.drafters import deepseek_v4_dspark
from jaxspark.configs.targets import deepseek_v4_tiny
from jaxspark.drafters import DeepSeekV4DSpark, MTPDrafter
from jaxspark.exactness.audit import audit, decode_requests, plain_outputs
from jaxspark.generation import Request
from jaxspark.models import DeepSeekV4
from jaxspark.parallel.mesh import make_mesh
from jaxspark.quantization import blocks
from pallas_kernels.quantized import Quantized, dense
from pallas_kernels.transposed import Transposed
from tests.driver import Session

VOCAB = 61


@pytest.fixture(scope="module")
def model():
    """A tiny target with a bias and sinks that are not zero."""
    config = replace(
        deepseek_v4_tiny(VOCAB), compress_ratios=(0, 4, 32, 4, 32), hc_sinkhorn_iters=3
    )
    model = DeepSeekV4(config, rngs=nnx.Rngs(0))
    graph, state = nnx.split(model)
    random = np.random.default_rng(0)
    state = jax.tree.map(
        lambda x: (
            x
            if jnp.issubdtype(x.dtype, jnp.integer)
            else x + jnp.asarray(0.02 * random.normal(size=x.shape), x.dtype)
        ),
        state,
    )
    return nnx.merge(graph, state)


@pytest.fixture(scope="module")
def drafter(model):
    config = deepseek_v4_dspark(model.config)
    return DeepSeekV4DSpark(config, rngs=nnx.Rngs(1))


@pytest.fixture(scope="module")
def quantized(model, drafter, tmp_path_factory):
    """A folder in the released types, in several shards."""
    folder = tmp_path_factory.mktemp("released") / "model"
    save_deepseek_v4(folder, model, drafter, shard_bytes=2_000_000)
    return folder


def same(a, b, tolerance=0.0):
    """Whether two modules hold the same numbers."""
    for mine, theirs in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        mine, theirs = np.asarray(mine, np.float64), np.asarray(theirs, np.float64)
        assert np.abs(mine - theirs).max(initial=0) <= tolerance


def logits(model):
    row = np.random.default_rng(1).integers(0, VOCAB, 70)
    return Session(model, 1, 96).feed([row])[0][0]


@pytest.mark.parametrize("transformers_names", [False, True])
def test_a_plain_folder_comes_back_as_it_was(model, tmp_path, transformers_names):
    folder = tmp_path / "model"
    save_deepseek_v4(
        folder, model, quantized=False, transformers_names=transformers_names
    )
    loaded = load_target(str(folder)).model
    same(loaded, model)
    assert loaded.config == model.config
    np.testing.assert_array_equal(logits(loaded), logits(model))


def test_save_target_writes_what_load_target_reads(model, tmp_path):
    target = Target(model=model, tokenizer=None, stop_ids=(1, 2), name="tiny")
    save_target(tmp_path / "a", target)
    loaded = load_target(str(tmp_path / "a"))
    same(loaded.model, model)
    assert loaded.stop_ids == (1, 2)


def test_quantized_twice_is_quantized_once(quantized, tmp_path, drafter):
    """Export, import, export: identical numbers, types and logits."""
    once = load_target(str(quantized)).model
    stages = load_drafter(str(quantized), once)
    save_deepseek_v4(tmp_path / "again", once, stages, shard_bytes=2_000_000)
    first, second = (open_safetensors(f) for f in (quantized, tmp_path / "again"))
    assert first.shapes == second.shapes
    assert first.types == second.types
    # A number just above the largest may be rounded to it, and then needs less scale.
    first, second = dequantized(first), dequantized(second)
    for name in first.shapes:
        np.testing.assert_array_equal(first.read(name), second.read(name), name)
    twice = load_target(str(tmp_path / "again")).model
    np.testing.assert_array_equal(logits(once), logits(twice))
    assert stages.config == drafter.config


def test_quantized_agrees_to_the_rounding_of_its_storage(model, quantized):
    """FP8 keeps 3 bits of mantissa, FP4 one: half a unit, relative to the block."""
    loaded = load_target(str(quantized)).model
    plain = dict(nnx.to_flat_state(nnx.split(model)[1]))
    for path, variable in nnx.to_flat_state(nnx.split(loaded)[1]):
        mine = np.asarray(variable.get_value(), np.float64)
        theirs = np.asarray(plain[path].get_value(), np.float64)
        name = ".".join(map(str, path))
        far, largest = np.abs(mine - theirs), np.abs(theirs).max()
        if "mlp.experts" in name:
            # Steps of 2 between 4 and 6, and scales up to twice too large.
            assert far.max() <= 2 * largest / 6 + 1e-6, name
        elif any(part in name for part in ("norm", "embed", "lm_head", "mlp.gate.")):
            assert far.max() <= 2**-8 * largest + 1e-6, name
        else:
            assert far.max() <= 2**-4 * 2 * largest + 1e-6, name
    assert 0 < np.abs(logits(loaded) - logits(model)).max()


@pytest.mark.long
def test_matrices_may_stay_quantized_in_memory(quantized, tmp_path):
    """As the files hold them, to the bit; the model's numbers are the same."""
    plain = load_target(str(quantized)).model
    kept = load_target(str(quantized), keep_quantized=True).model
    theirs = named_parameters(plain)
    blocked = set()
    for name, mine in named_parameters(kept).items():
        assert mine.dtype == theirs[name].dtype, name
        np.testing.assert_array_equal(dense(mine), theirs[name], name)
        if isinstance(mine, Quantized):
            blocked.add(name.split(".", 2)[2])
            least = mine.elements.nbytes + mine.scales.nbytes
            assert least <= (0.28 if mine.packed else 0.51) * theirs[name].nbytes
    assert {name.split(".")[-1] for name in blocked} == {
        "weight",
        "gate_up_proj",
        "down_proj",
    }
    assert {name.split(".")[-2] for name in blocked} == {
        *("q_a_proj", "q_b_proj", "kv_proj", "o_a_proj", "o_b_proj"),
        *("gate_proj", "up_proj", "down_proj", "experts"),
    }
    assert not any("compressor" in name for name in blocked)
    np.testing.assert_allclose(logits(kept), logits(plain), rtol=0, atol=1e-5)

    save_deepseek_v4(tmp_path / "again", kept, shard_bytes=2_000_000)
    again = dequantized(open_safetensors(tmp_path / "again"))
    first = dequantized(open_safetensors(quantized))
    for name in again.shapes:
        np.testing.assert_array_equal(again.read(name), first.read(name), name)


@pytest.mark.parametrize(
    "mesh", [None, pytest.param("data:1,expert:8", marks=pytest.mark.long)]
)
def test_experts_are_turned_over_for_tpus(tmp_path, monkeypatch, mesh):
    """They are the same to the bit, and are written as they came."""
    config = replace(
        deepseek_v4_tiny(VOCAB),
        hidden_size=256,
        moe_intermediate_size=128,
        compress_ratios=(0, 4),
    )
    save_deepseek_v4(tmp_path / "first", DeepSeekV4(config, rngs=nnx.Rngs(0)))
    plain = load_target(tmp_path / "first", keep_quantized=True).model
    monkeypatch.setattr(deepseek_v4, "expected_platform", lambda: "tpu")
    with jax.set_mesh(make_mesh(mesh)) if mesh else nullcontext():
        seen = load_target(tmp_path / "first", keep_quantized=True).model
    theirs, turned = named_parameters(plain), set()
    for name, mine in named_parameters(seen).items():
        assert mine.shape == theirs[name].shape, name
        np.testing.assert_array_equal(dense(mine), dense(theirs[name]), name)
        if isinstance(mine, Transposed):
            turned.add(name.split(".")[-1])
            assert mine.packed
    assert turned == {"gate_up_proj", "down_proj"}
    if mesh is None:
        save_deepseek_v4(tmp_path / "again", seen)
        first, again = (
            dequantized(open_safetensors(tmp_path / name))
            for name in ("first", "again")
        )
        for name in first.shapes:
            np.testing.assert_array_equal(again.read(name), first.read(name), name)


@pytest.mark.long
def test_quantized_speculation_gives_the_tokens_of_quantized_decoding(quantized):
    target = load_target(str(quantized), keep_quantized=True)
    stages = load_drafter(str(quantized), target)
    assert isinstance(named_parameters(stages)["main_proj.weight"], Quantized)
    requests = [Request((3, 1, 4, 1, 5), max_new_tokens=24)]
    expected = plain_outputs(target.model, requests, capacity=64)
    seen = decode_requests(target.model, requests, stages, capacity=64)
    result = audit(target.model, requests, expected, seen)
    assert not result.violations and not result.near_ties


def test_what_is_not_quantized_cannot_stay_so(model, tmp_path):
    save_deepseek_v4(tmp_path / "plain", model, quantized=False)
    with pytest.raises(CheckpointError, match="nothing is quantized here"):
        load_target(str(tmp_path / "plain"), keep_quantized=True)
    with pytest.raises(CheckpointError, match="only the matrices of DeepSeek-V4"):
        load_target("smollm2-135m-instruct", keep_quantized=True)


def test_the_host_holds_one_tensor_at_a_time(quantized):
    tensors = dequantized(open_safetensors(quantized))
    alive, most = set(), []

    def watched(array):
        array = np.array(array)
        alive.add(key := len(most))
        most.append(len(alive))
        weakref.finalize(array, alive.discard, key)
        return array

    config = load_target(str(quantized)).model.config
    kept = {name: name for name in tensors.shapes if not name.startswith("mtp.")}
    watching = replace(
        tensors.renamed(kept), read=lambda name: watched(tensors.read(name))
    )
    load_deepseek_v4(config, watching, dtype=jnp.float32)
    assert len(most) == len(kept)
    # The one being read, the one being put into its parameter, one not yet collected.
    assert max(most) <= 3


def test_the_drafter_of_a_folder_is_loaded_beside_its_target(
    model, drafter, quantized, tmp_path
):
    mtp = MTPDrafter(model.config, rngs=nnx.Rngs(2))
    for name, each in (("dspark", drafter), ("mtp", mtp)):
        folder = tmp_path / name
        save_deepseek_v4(folder, model, each, quantized=False)
        target = load_target(str(folder))
        loaded = load_drafter(str(folder), target)
        assert type(loaded) is type(each)
        same(loaded, each)
        assert load_drafter(f"hybrid:{folder}", target).block_length >= 1
    save_deepseek_v4(tmp_path / "none", model, quantized=False)
    with pytest.raises(CheckpointError, match="no draft stages"):
        load_drafter(str(tmp_path / "none"), model)
    other = DeepSeekV4(replace(model.config, swiglu_limit=3.0), rngs=nnx.Rngs(0))
    with pytest.raises(CheckpointError, match="another model"):
        load_drafter(str(quantized), other)


def altered(folder, tmp_path, change):
    """A copy of a folder whose first tensor file is changed; without checksums."""
    copy = tmp_path / "altered"
    shutil.copytree(folder, copy)
    (copy / "SHA256SUMS").unlink()
    change(copy)
    return copy


def drop_index(folder):
    """The same folder as one file, so that names may come and go."""
    tensors = open_safetensors(folder)
    everything = {name: tensors.read(name) for name in tensors.shapes}
    for file in folder.glob("model*"):
        file.unlink()
    return everything


def with_tensors(change):
    def alter(folder):
        everything = drop_index(folder)
        change(everything)
        save_file(everything, folder / "model.safetensors", metadata={"format": "pt"})

    return alter


def scaled(name="layers.0.attn.wq_a"):
    return f"{name}.weight", f"{name}.scale"


def no_scale(everything):
    del everything[scaled()[1]]


def short_scale(everything):
    name = scaled("layers.0.ffn.experts.3.w1")[1]
    everything[name] = everything[name][:-1]


def nan_scale(everything):
    name = scaled()[1]
    everything[name] = np.full(everything[name].shape, 255, np.uint8).view(
        ml_dtypes.float8_e8m0fnu
    )


def stray_scale(everything):
    everything["layers.0.attn.stray.scale"] = everything[scaled()[1]]


def float_table(everything):
    name = "layers.0.ffn.gate.tid2eid"
    everything[name] = everything[name].astype(np.float32)


def integer_norm(everything):
    everything["norm.weight"] = np.ones(everything["norm.weight"].shape, np.int32)


def missing(everything):
    del everything["layers.2.attn.compressor.ape"]


def extra(everything):
    everything["layers.9.attn_norm.weight"] = everything["layers.0.attn_norm.weight"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (no_scale, "scales layers.0.attn.wq_a.scale are missing"),
        (short_scale, "experts.3.w1.scale has shape"),
        (nan_scale, "wq_a.scale holds NaN"),
        (stray_scale, "stray.scale scales no matrix"),
        (float_table, "tid2eid has type float32, expected integers"),
        (integer_norm, "norm.weight has type int32"),
        (missing, "1 tensors missing: layers.2.attn.compressor.ape"),
        (extra, "not part of the model: layers.9"),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_damage_is_named(quantized, tmp_path, change, message):
    folder = altered(quantized, tmp_path, with_tensors(change))
    with pytest.raises(CheckpointError, match=message):
        load_target(str(folder))


def test_a_missing_or_truncated_shard_is_named(quantized, tmp_path):
    shard = "model-00002-of-"
    [name] = [f.name for f in quantized.glob(f"{shard}*")]
    gone = altered(quantized, tmp_path / "a", lambda f: (f / name).unlink())
    with pytest.raises(CheckpointError, match=shard):
        load_target(str(gone))

    def cut(folder):
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[:-100])

    (tmp_path / "b").mkdir()
    with pytest.raises(CheckpointError, match=shard):
        load_target(str(altered(quantized, tmp_path / "b", cut)))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("model_type", "deepseek_v3", "model_type"),
        ("scoring_func", "softmax", "scoring_func is 'softmax'"),
        ("num_key_value_heads", 2, "num_key_value_heads is 2"),
        ("compress_ratios", [0, 4], "compress_ratios"),
        ("compress_ratios", [0, 4, 8, 4, 32, 4], "compress_ratios"),
        ("o_groups", 3, "num_attention_heads must be a multiple of 3"),
        ("hidden_size", "many", "hidden_size"),
        ("rope_scaling", {"rope_type": "llama3"}, "rope_type"),
    ],
)
def test_a_foreign_config_is_named(quantized, tmp_path, key, value, message):
    def change(folder):
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))

    with pytest.raises(CheckpointError, match=message):
        load_target(str(altered(quantized, tmp_path, change)))


def test_fp8_is_exact_on_its_own_numbers():
    random = np.random.default_rng(0)
    w_OI = random.normal(size=(200, 300)).astype(np.float32)
    elements, scales = blocks.quantize_fp8(w_OI)
    assert scales.shape == blocks.fp8_scale_shape(200, 300) == (2, 3)
    once = blocks.dequantize_fp8(elements, scales)
    np.testing.assert_array_equal(
        once, blocks.dequantize_fp8(*blocks.quantize_fp8(once))
    )
    # Half a unit of three bits, of numbers not below the block's smallest normal one.
    assert np.abs(once - w_OI).max() <= 2**-4 * np.abs(w_OI).max()
    assert np.isfinite(elements.astype(np.float32)).all()


def test_fp4_packs_the_earlier_element_low():
    row = np.zeros((1, 32), np.float32)
    row[0, :4] = [0.5, -6.0, 3.0, 1.5]
    packed, scales = blocks.quantize_fp4(row)
    assert packed.view(np.uint8)[0, :2].tolist() == [0x1 | 0xF << 4, 0x5 | 0x3 << 4]
    assert scales.view(np.uint8).tolist() == [[127]]
    np.testing.assert_array_equal(blocks.dequantize_fp4(packed, scales), row)
    assert blocks.quantize_fp4(2 * row)[1].view(np.uint8).tolist() == [[128]]


@pytest.mark.parametrize("kind", EIGHT_BITS)
def test_eight_bit_types_are_read_from_files(tmp_path, kind):
    values = np.array([[1.0, 2.0], [4.0, 0.5]]).astype(EIGHT_BITS[kind])
    plain = np.arange(3, dtype=np.float32)
    save_file({"a": plain, "b": values}, tmp_path / "model.safetensors")
    tensors = open_safetensors(tmp_path)
    assert tensors.types["b"] == kind
    np.testing.assert_array_equal(tensors.read("b").view("u1"), values.view("u1"))
    np.testing.assert_array_equal(tensors.read("a"), plain)
