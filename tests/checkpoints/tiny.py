"""Tiny checkpoints, made on the fly."""

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors.numpy import save_file
from tokenizers import Tokenizer as Core
from tokenizers import decoders, models, pre_tokenizers

from jaxspark.checkpoints import Target, Tokenizer
from jaxspark.drafters.dspark import DSparkConfig, DSparkDrafter
from jaxspark.models import DenseConfig, DenseDecoder, RopeConfig

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
    "rope_theta": 10000.0,
}
QWEN3 = LLAMA | {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"}
TEMPLATE = (
    "{% for message in messages %}"
    "<s>{{ message['role'] }}: {{ message['content'] }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant: {% endif %}"
)


def dense(**changes) -> DenseConfig:
    """The architecture of `LLAMA`, or with changes."""
    values = {
        "vocab_size": 300,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 128,
        "rope": RopeConfig(rope_theta=10000.0),
    }
    return DenseConfig(**(values | changes))


def tokenizer() -> Tokenizer:
    """One token per byte, and two special ones."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Core(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(["<s>", "</s>"])
    return Tokenizer(
        core=core,
        stop_ids=(257,),
        special_tokens={"bos_token": "<s>", "eos_token": "</s>"},
        chat_template=TEMPLATE,
    )


def target(seed: int = 0, dtype=jnp.float32, **changes) -> Target:
    """A random model with a tokenizer."""
    model = DenseDecoder(dense(**changes), dtype=dtype, rngs=nnx.Rngs(seed))
    return Target(model=model, tokenizer=tokenizer(), stop_ids=(257,), name="tiny")


def drafter(seed: int = 0, **changes) -> DSparkDrafter:
    """A random drafter for `target()`."""
    values = {
        "backbone": dense(qk_norm=True, num_hidden_layers=1),
        "block_size": 4,
        "target_layer_ids": (-1, 0),
        "mask_token_id": 299,
        "num_target_layers": 2,
        "markov_rank": 8,
        "enable_confidence_head": True,
        "confidence_head_with_markov": True,
    }
    return DSparkDrafter(DSparkConfig(**(values | changes)), rngs=nnx.Rngs(seed))


def weights(config: dict, seed: int = 0) -> dict[str, np.ndarray]:
    """Random tensors under Hugging Face's names."""
    random = np.random.default_rng(seed)
    D, F, V = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    H = config["head_dim"]
    NH, KH = config["num_attention_heads"] * H, config["num_key_value_heads"] * H
    shapes = {"model.embed_tokens.weight": (V, D), "model.norm.weight": (D,)}
    for layer in range(config["num_hidden_layers"]):
        inside = {
            "input_layernorm.weight": (D,),
            "post_attention_layernorm.weight": (D,),
            "self_attn.q_proj.weight": (NH, D),
            "self_attn.k_proj.weight": (KH, D),
            "self_attn.v_proj.weight": (KH, D),
            "self_attn.o_proj.weight": (D, NH),
            "mlp.gate_proj.weight": (F, D),
            "mlp.up_proj.weight": (F, D),
            "mlp.down_proj.weight": (D, F),
        }
        if config["model_type"] == "qwen3":
            inside |= {"self_attn.q_norm.weight": (H,), "self_attn.k_norm.weight": (H,)}
        if config.get("attention_bias"):
            inside |= {
                "self_attn.q_proj.bias": (NH,),
                "self_attn.k_proj.bias": (KH,),
                "self_attn.v_proj.bias": (KH,),
                "self_attn.o_proj.bias": (D,),
            }
        shapes |= {f"model.layers.{layer}.{name}": s for name, s in inside.items()}
    if not config.get("tie_word_embeddings"):
        shapes["lm_head.weight"] = (V, D)
    return {n: random.standard_normal(s).astype(np.float32) for n, s in shapes.items()}


def write_folder(folder: Path, config: dict, tensors: dict) -> Path:
    """A foreign folder: configuration and one weights file, no checksums."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors")
    return folder


def write_shards(folder: Path, config: dict, tensors: dict, count: int = 2) -> Path:
    """A foreign folder with an index and `count` shards."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    weight_map = {}
    for shard in range(count):
        names = list(tensors)[shard::count]
        save_file({n: tensors[n] for n in names}, folder / f"part-{shard}.safetensors")
        weight_map |= dict.fromkeys(names, f"part-{shard}.safetensors")
    total = sum(array.nbytes for array in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder
