"""Llama and Qwen3 from GGUF: configuration and weights.

Matrices are dequantized tensor by tensor with the `gguf` library. Llama files store the
rows of q and k in interleaved-rope order (x0 y0 x1 y1 ... per head instead of x0 x1 ...
y0 y1 ...), which is undone here; Qwen3 files do not. The head is tied where
`output.weight` is absent.
"""

import math
from pathlib import Path

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, quants

from jaxspark.checkpoints.errors import CheckpointError
from jaxspark.checkpoints.fields import Fields
from jaxspark.checkpoints.gguf_header import GGUFFile
from jaxspark.checkpoints.tree import Tensors
from jaxspark.models import DenseConfig, RopeConfig

ARCHITECTURES = ("llama", "qwen3")
_TOP = {
    "token_embd": "embed_tokens",
    "output_norm": "norm",
    "output": "lm_head",
}
_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_ROPE_FACTORS = "rope_freqs.weight"
_BLOCKS_PER_ROW = 256


def dense_config_from_gguf(file: GGUFFile) -> DenseConfig:
    """The decoder's architecture from a file's metadata and tensor names.

    Raises:
      CheckpointError: an architecture other than llama or qwen3, missing metadata, or
        rope that the decoder does not compute.
    """
    fields = Fields(file.metadata, str(file.path))
    arch = fields.text("general.architecture")
    if arch not in ARCHITECTURES:
        raise fields.wrong("general.architecture", f"one of {ARCHITECTURES}")
    width = fields.integer(f"{arch}.embedding_length")
    heads = fields.integer(f"{arch}.attention.head_count")
    head_dim = fields.integer(f"{arch}.attention.key_length", width // heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        if fields.integer(f"{arch}.{key}", head_dim) != head_dim:
            raise fields.wrong(f"{arch}.{key}", f"{head_dim}, the width of a head")
    if f"{arch}.attention.sliding_window" in fields:
        raise fields.wrong(f"{arch}.attention.sliding_window", "none (full attention)")
    if fields.integer(f"{arch}.expert_count", 0, least=0):
        raise fields.wrong(f"{arch}.expert_count", "none (a dense model)")
    if "token_embd.weight" not in file.tensors:
        raise CheckpointError(f"{file.path}: tensor token_embd.weight is missing")
    try:
        return DenseConfig(
            vocab_size=file.tensors["token_embd.weight"].shape[0],
            hidden_size=width,
            intermediate_size=fields.integer(f"{arch}.feed_forward_length"),
            num_hidden_layers=fields.integer(f"{arch}.block_count"),
            num_attention_heads=heads,
            num_key_value_heads=fields.integer(
                f"{arch}.attention.head_count_kv", heads
            ),
            head_dim=head_dim,
            rms_norm_eps=_float32(
                fields.number(f"{arch}.attention.layer_norm_rms_epsilon")
            ),
            rope=_rope(file, fields, arch, head_dim),
            max_position_embeddings=fields.integer(f"{arch}.context_length"),
            tie_word_embeddings="output.weight" not in file.tensors,
            qk_norm=arch == "qwen3",
            attention_bias="blk.0.attn_q.bias" in file.tensors,
            mlp_bias="blk.0.ffn_gate.bias" in file.tensors,
        )
    except CheckpointError:
        raise
    except ValueError as error:
        raise CheckpointError(f"{file.path}: {error}") from error


def _float32(value: float) -> float:
    """The shortest decimal of a stored float32: 1e-5, not 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def _rope(file: GGUFFile, fields: Fields, arch: str, head_dim: int) -> RopeConfig:
    theta = _float32(fields.number(f"{arch}.rope.freq_base", 10000.0))
    scaling = f"{arch}.rope.scaling"
    kind = fields.text(f"{scaling}.type", "none")
    if _ROPE_FACTORS in file.tensors:
        if kind != "none":
            raise fields.wrong(f"{scaling}.type", f"'none' beside {_ROPE_FACTORS}")
        return _llama3_rope(file, theta, head_dim)
    if kind == "none":
        return RopeConfig(rope_theta=theta)
    if kind not in ("linear", "yarn"):
        raise fields.wrong(f"{scaling}.type", "one of ('none', 'linear', 'yarn')")
    factor = _float32(fields.number(f"{scaling}.factor"))
    if kind == "linear":
        return RopeConfig(rope_theta=theta, rope_type=kind, factor=factor)
    return RopeConfig(
        rope_theta=theta,
        rope_type=kind,
        factor=factor,
        original_max_position_embeddings=fields.integer(
            f"{scaling}.original_context_length",
            fields.integer(f"{arch}.context_length"),
        ),
        beta_fast=_float32(fields.number(f"{scaling}.yarn_beta_fast", 32.0)),
        beta_slow=_float32(fields.number(f"{scaling}.yarn_beta_slow", 1.0)),
    )


def _llama3_rope(file: GGUFFile, theta: float, head_dim: int) -> RopeConfig:
    """Recovers `llama3` parameters from the stored divisor of each frequency.

    The file has no parameters, only their result. All released Llama 3.x models share
    low 1, high 4 and 8192 original positions, and the largest divisor is the factor;
    other divisors are refused, since they would need another form of `RopeConfig`.
    """
    divisors_h = _dequantize(file, _ROPE_FACTORS).reshape(-1)
    rope = RopeConfig(
        rope_theta=theta,
        rope_type="llama3",
        factor=float(divisors_h.max()),
        original_max_position_embeddings=8192,
    )
    plain_h, _ = RopeConfig(rope_theta=theta).frequencies(head_dim)
    same_size = divisors_h.shape == plain_h.shape
    if same_size and np.isfinite(divisors_h).all() and (divisors_h > 0).all():
        expected_h, _ = rope.frequencies(head_dim)
        if np.allclose(plain_h / divisors_h, expected_h, rtol=1e-4, atol=0):
            return rope
    raise CheckpointError(
        f"{file.path}: {_ROPE_FACTORS} holds divisors that Llama 3.x scaling (8192 "
        f"original positions, factors 1 and 4) does not give for theta {theta} and "
        f"head width {head_dim}"
    )


def gguf_tensors(file: GGUFFile, config: DenseConfig) -> Tensors:
    """The file's tensors under the module's names, dequantized when read."""
    names = {_module_name(name): name for name in file.tensors if name != _ROPE_FACTORS}
    interleaved = file.metadata["general.architecture"] == "llama"

    def read(name: str) -> np.ndarray:
        array = _dequantize(file, names[name])
        if interleaved and ".q_proj." in name:
            return _halves_first(array, config.num_attention_heads)
        if interleaved and ".k_proj." in name:
            return _halves_first(array, config.num_key_value_heads)
        return array

    return Tensors(
        where=str(file.path),
        shapes={new: file.tensors[old].shape for new, old in names.items()},
        read=read,
    )


def _module_name(name: str) -> str:
    """blk.3.attn_q.weight -> layers.3.self_attn.q_proj.weight; unknown names stay."""
    stem, _, leaf = name.rpartition(".")
    if stem in _TOP:
        return f"{_TOP[stem]}.{leaf}"
    parts = stem.split(".")
    if len(parts) == 3 and parts[0] == "blk" and parts[2] in _LAYER:
        return f"layers.{parts[1]}.{_LAYER[parts[2]]}.{leaf}"
    return name


def _halves_first(rows_O: np.ndarray, heads: int) -> np.ndarray:
    """Rows (or biases) x0 y0 x1 y1 ... of each head to x0 x1 ... y0 y1 ..."""
    pairs = rows_O.reshape(heads, -1, 2, *rows_O.shape[1:])
    return pairs.swapaxes(1, 2).reshape(rows_O.shape)


def _dequantize(file: GGUFFile, name: str) -> np.ndarray:
    """One tensor as float32, [O, I] or [O]."""
    tensor, stored = file.tensors[name], file.bytes_of(name)
    if tensor.kind in (GGMLQuantizationType.F32, GGMLQuantizationType.F16):
        floats = stored.view("<f4" if tensor.kind.name == "F32" else "<f2")
        return floats.astype(np.float32).reshape(tensor.shape)
    # The library works on 16 rows at a time; wider rows halve its overhead.
    _, block_bytes = GGML_QUANT_SIZES[tensor.kind]
    wide = block_bytes * math.gcd(stored.size // block_bytes, _BLOCKS_PER_ROW)
    try:
        with np.errstate(over="ignore", invalid="ignore"):
            array = quants.dequantize(stored.reshape(-1, wide), tensor.kind)
    except (NotImplementedError, ValueError) as error:
        raise CheckpointError(
            f"{file.path}: tensor {name} of type {tensor.kind.name} cannot be "
            f"dequantized ({error})"
        ) from error
    return array.reshape(tensor.shape)


def gguf_name(file: GGUFFile) -> str:
    """The model's own name, for messages."""
    return str(file.metadata.get("general.name", Path(file.path).stem))


def gguf_stop_ids(file: GGUFFile) -> tuple[int, ...]:
    """End-of-sequence and end-of-turn ids of the metadata."""
    fields = Fields(file.metadata, str(file.path))
    keys = ("eos_token_id", "eot_token_id")
    present = [f"tokenizer.ggml.{key}" for key in keys]
    return tuple(
        dict.fromkeys(fields.integer(k, least=0) for k in present if k in fields)
    )
