"""Llama and Qwen3 from GGUF: configuration and weights.

Matrices are dequantized tensor by tensor with the `gguf` library. Llama files store the
rows of q and k in interleaved-rope order (x0 y0 x1 y1 ... per head instead of x0 x1 ...
y0 y1 ...), which is undone here; Qwen3 files do not. The head is tied where
`output.weight` is absent. Metadata that would change what the model computes, and that
the decoder does not know, is an error.
"""

import math
from pathlib import Path

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, quants

from jaxspark.checkpoints.fields import Fields
from jaxspark.checkpoints.gguf_header import GGUFFile
from jaxspark.checkpoints.gguf_rope import check_neutral, float32, rope_from_gguf
from jaxspark.checkpoints.tree import Tensors
from jaxspark.errors import CheckpointError
from jaxspark.models import DenseConfig

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
# Keys that change results elsewhere, and the values with which they change nothing.
_NEUTRAL: dict[str, tuple[float, ...]] = {
    "attention.causal": (1,),
    "attention.clamp_kqv": (0,),
    "attention.max_alibi_bias": (0,),
    "attention.output_scale": (0, 1),
    "attention.shared_kv_layers": (0,),
    "attention.sliding_window": (0,),
    "attention.temperature_length": (0,),
    "attention.temperature_scale": (0, 1),
    "attn_logit_softcapping": (0,),
    "embedding_scale": (0, 1),
    "expert_count": (0,),
    "final_logit_softcapping": (0,),
    "logit_scale": (0, 1),
    "nextn_predict_layers": (0,),
    "residual_scale": (0, 1),
    "use_parallel_residual": (0,),
}
_CONTROL, _USER_DEFINED = 3, 4  # token types, llama.cpp's llama_token_type
# Tokens that llama.cpp takes for the end of a text by their names, in any model.
_ENDS = frozenset(
    """<|eot_id|> <|eom_id|> <|im_end|> <|end|> <|endoftext|> <|end_of_text|> </s> <eos>
    <EOT> _<EOT> [EOT] [EOS] <end_of_turn> <end_of_utterance> <|return|> <|call|>
    <|calls|> <|flush|> <turn|> <|tool_response> <｜end▁of▁sentence｜>
    <|fim_pad|> <fim-pad> <fim_pad> <PAD> [PAD] <|fim_repo|> <|repo_name|> <fim-repo>
    <REPO> <reponame> <|file_sep|>""".split()
)
_END_KEYS = ("eos", "eot", "eom", "fim_pad", "fim_rep", "fim_sep")


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
    _check_neutral(fields, arch, head_dim)
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
            rms_norm_eps=float32(
                fields.number(f"{arch}.attention.layer_norm_rms_epsilon")
            ),
            rope=rope_from_gguf(fields, arch, head_dim, _rope_divisors(file)),
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


def _check_neutral(fields: Fields, arch: str, head_dim: int) -> None:
    for name, values in _NEUTRAL.items():
        check_neutral(fields, f"{arch}.{name}", values)
    scale = f"{arch}.attention.scale"
    if fields.values.get(scale) and not math.isclose(
        fields.number(scale), head_dim**-0.5, rel_tol=1e-6
    ):
        raise fields.wrong(scale, f"none, or 1/sqrt({head_dim})")
    if fields.integer("split.count", 1, least=0) > 1:
        raise fields.wrong("split.count", "one whole file; merge the parts first")


def _rope_divisors(file: GGUFFile) -> np.ndarray | None:
    if _ROPE_FACTORS not in file.tensors:
        return None
    return _dequantize(file, _ROPE_FACTORS).reshape(-1)


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
    """Ids that end a text: those the metadata name, then those llama.cpp knows by name.

    Raises:
      CheckpointError: an id that is no token of the file.
    """
    fields = Fields(file.metadata, str(file.path))
    tokens = fields.values.get("tokenizer.ggml.tokens") or []
    kinds = fields.values.get("tokenizer.ggml.token_type") or []
    named = []
    for key in (f"tokenizer.ggml.{end}_token_id" for end in _END_KEYS):
        if key in fields:
            named.append(fields.integer(key, least=0))
            if tokens and named[-1] >= len(tokens):
                raise fields.wrong(key, f"an id below {len(tokens)}")
    known = {
        token: index
        for index, (token, kind) in enumerate(zip(tokens, kinds))
        if kind in (_CONTROL, _USER_DEFINED) and token in _ENDS
    }
    for others in ({"<|return|>", "<|call|>"}, {"<|flush|>", "<|calls|>"}):
        if others <= known.keys():
            known.pop("<|end|>", None)  # ends a message there, not the answer
    if "<|tool_response>" in known:
        known.pop("</s>", None)
    return tuple(dict.fromkeys([*named, *known.values()]))
