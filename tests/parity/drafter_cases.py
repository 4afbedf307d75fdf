"""Tiny drafters of other projects, one per branch of their formats.

Imported by `peers.py` too, so NumPy-only and old-Python-friendly. A case says what the
other project's own configuration class is given; weights come from a seed and a name.
"""

import zlib

import numpy as np

try:
    from tests.parity.cases import LLAMA, QWEN3
except ImportError:
    from cases import LLAMA, QWEN3

SEED = 20261129
ANCHORS = (1, 6, 13)
BLOCK = 4  # rows of a block
SEQUENCE = 24
TARGETS = {
    "llama": LLAMA | {"num_hidden_layers": 8},
    "qwen3": QWEN3 | {"num_hidden_layers": 8},
}
VOCAB, PRUNED = LLAMA["vocab_size"], 31

DSPARK = {
    "num_draft_layers": 2,
    "block_size": BLOCK,
    "mask_token_id": 96,
    "num_anchors": 512,
    "target_layer_ids": [-1, 1, 4, 6],
    "confidence_head_alpha": 1.0,
    "confidence_head_with_markov": True,
    "markov_rank": 5,
    "markov_head_type": "vanilla",
}
DEEPSPEC = {
    "deepspec_dspark": DSPARK,
    "deepspec_dspark_gated": DSPARK | {"markov_head_type": "gated"},
    "deepspec_dspark_rnn": DSPARK
    | {"markov_head_type": "rnn", "confidence_head_with_markov": False},
    "deepspec_dflash": DSPARK | {"markov_rank": 0, "confidence_head_alpha": 0.0},
    "deepspec_eagle3": {
        "target_layer_ids": [0, 2, 3, 4, 6],
        "ttt_length": BLOCK,
        "step_loss_decay": 0.7,
        "draft_num_hidden_layers": 1,
        "target_model_name_or_path": "none",
    },
}

BLOCKS = {
    "block_size": BLOCK,
    "mask_token_id": 96,
    "aux_hidden_state_layer_ids": [0, 2, 5, 7],
    "draft_vocab_size": VOCAB,
}
HEADS = {"markov_rank": 5, "markov_head_type": "vanilla"}
EAGLE3 = {"draft_vocab_size": VOCAB, "eagle_aux_hidden_state_layer_ids": [2, 4, 7]}
SPECULATORS = {
    "speculators_dspark": ("dspark", "qwen3", BLOCKS | HEADS),
    "speculators_dspark_pruned": (
        "dspark",
        "qwen3",
        BLOCKS | HEADS | {"markov_head_type": "gated", "draft_vocab_size": PRUNED},
    ),
    "speculators_dspark_rnn": (
        "dspark",
        "qwen3",
        BLOCKS
        | HEADS
        | {"markov_head_type": "rnn", "confidence_head_with_markov": False},
    ),
    "speculators_dspark_masks": (
        "dspark",
        "qwen3",
        BLOCKS | HEADS | {"sample_from_anchor": False, "enable_confidence_head": False},
    ),
    "speculators_dflash": ("dflash", "qwen3", BLOCKS),
    "speculators_dflash_pruned": (
        "dflash",
        "qwen3",
        BLOCKS | {"draft_vocab_size": PRUNED, "sample_from_anchor": True},
    ),
    "speculators_eagle3": ("eagle3", "qwen3", EAGLE3),
    "speculators_eagle3_pruned": (
        "eagle3",
        "qwen3",
        EAGLE3 | {"draft_vocab_size": PRUNED, "norm_before_residual": True},
    ),
    "speculators_eagle3_llama": (
        "eagle3",
        "llama",
        EAGLE3 | {"eagle_aux_hidden_state_layer_ids": None},
    ),
    # What speculators trains unless told otherwise.
    "speculators_eagle3_llama_pruned": (
        "eagle3",
        "llama",
        EAGLE3
        | {
            "draft_vocab_size": PRUNED,
            "norm_before_residual": True,
            "norm_before_fc": True,
            "norm_output": True,
        },
    ),
}
CASES = (*DEEPSPEC, *SPECULATORS)


def peer(name):
    """Whose case it is."""
    return name.split("_")[0]


def family(name):
    """Which of the targets a case's drafter is for."""
    return "qwen3" if peer(name) == "deepspec" else "llama"


def tokens():
    """Per anchor a sequence [SEQUENCE], of which all behind the anchor is drafted."""
    random = np.random.RandomState(SEED)
    return random.randint(0, VOCAB, (len(ANCHORS), SEQUENCE)).astype(np.int32)


def drafter_weights(shapes, target_weights):
    """Random tensors by name; the target's matrices where their shape is the same.

    As for targets, nothing is left at a neutral value.
    """
    head = target_weights["lm_head.weight"]
    weights = {}
    for name, shape in shapes.items():
        random = np.random.RandomState(zlib.crc32(name.encode()) ^ SEED)
        shape = tuple(shape)
        if name == "embed_tokens.weight":
            weights[name] = target_weights["model.embed_tokens.weight"]
            continue
        if name == "lm_head.weight" and shape == head.shape:
            weights[name] = head
            continue
        if name in ("d2t", "t2d"):
            ids = np.sort(np.random.RandomState(SEED).permutation(VOCAB)[:PRUNED])
            drafted = np.isin(np.arange(VOCAB), ids)
            weights[name] = ids - np.arange(PRUNED) if name == "d2t" else drafted
            continue
        if "norm" in name:
            value = random.uniform(0.5, 1.5, shape)
        elif name.endswith("bias"):
            value = 0.3 * random.standard_normal(shape)
        else:
            value = shape[-1] ** -0.5 * random.standard_normal(shape)
        weights[name] = value.astype(np.float32)
    return weights
