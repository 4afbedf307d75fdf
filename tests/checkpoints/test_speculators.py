"""Folders of speculators: read with their own defaults, options refused by name.

What their numbers mean is checked against their own classes in
`tests/parity/test_drafter_peers.py`.
"""

import json
from dataclasses import replace

import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from jaxspark.checkpoints import (
    CheckpointError,
    draft_format,
    load_draft_checkpoint,
    load_drafter,
    save_draft_checkpoint,
)
from jaxspark.checkpoints.speculators import draft_config_from_speculators
from jaxspark.drafters import Eagle3Config, Eagle3Drafter
from jaxspark.generation import generate
from jaxspark.training import initialize
from tests import zoo
from tests.checkpoints.test_deepspec import altered, assert_equal, pruned_drafter
from tests.checkpoints.tiny import dense, drafter, target

TARGET = dense(num_hidden_layers=8)
LAYERS = {
    "model_type": "qwen3",
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "layer_types": ["full_attention"],
    "tie_word_embeddings": True,
}
DFLASH = {
    "speculators_model_type": "dflash",
    "transformer_layer_config": LAYERS,
    "draft_vocab_size": 300,
    "block_size": 8,
    "aux_hidden_state_layer_ids": [0, 2, 7],
    "mask_token_id": 299,
}
DSPARK = DFLASH | {
    "speculators_model_type": "dspark",
    "markov_rank": 4,
    "markov_head_type": "vanilla",
    "enable_confidence_head": True,
    "confidence_head_with_markov": True,
}
METHODS = [{"proposal_type": "greedy", "speculative_tokens": 5}]
EAGLE3 = {
    "speculators_model_type": "eagle3",
    "transformer_layer_config": LAYERS | {"model_type": "llama"},
    "speculators_config": {"proposal_methods": METHODS},
    "draft_vocab_size": 20,
    "eagle_aux_hidden_state_layer_ids": [2, 4, 7],
}


def read(config, **changes):
    return draft_config_from_speculators(config | changes, TARGET)


def test_their_layers_are_those_whose_input_is_read():
    assert read(DSPARK).target_layer_ids == (-1, 1, 6)
    assert read(EAGLE3).target_layer_ids == (1, 3, 6)
    unset = {"eagle_aux_hidden_state_layer_ids": None}
    assert read(EAGLE3, **unset).target_layer_ids == (1, 3, 4)
    assert read(EAGLE3).num_target_layers == 8


def test_a_block_counts_the_anchors_row_where_that_predicts_nothing():
    """Which is DFlash's default and not DSpark's."""
    assert (read(DFLASH).block_size, read(DFLASH).sample_from_anchor) == (7, False)
    assert (read(DSPARK).block_size, read(DSPARK).sample_from_anchor) == (8, True)
    assert read(DFLASH, sample_from_anchor=True).block_size == 8
    assert read(DSPARK, sample_from_anchor=False).block_size == 7
    assert read(EAGLE3).ttt_length == 5


def test_a_draft_vocabulary_of_full_size_is_none():
    assert read(DFLASH).draft_vocab_size is None
    assert read(DFLASH, draft_vocab_size=20).draft_vocab_size == 20


def test_layers_are_qwen3s_or_llamas():
    assert not read(EAGLE3).backbone.qk_norm
    assert read(EAGLE3, transformer_layer_config=LAYERS).backbone.qk_norm
    assert read(DSPARK).backbone.qk_norm
    # Copied from the target's configuration; a drafter has no embedding to tie.
    assert not read(DSPARK).backbone.tie_word_embeddings


def layers(**changes):
    return {"transformer_layer_config": LAYERS | changes}


@pytest.mark.parametrize(
    "config, changes, words",
    [
        (DSPARK, {"speculators_model_type": "peagle"}, "'peagle', expected one of"),
        (DSPARK, {"transformer_layer_config": None}, "is None, expected the draft lay"),
        (DSPARK, layers(model_type="llama"), "model_type is 'llama', expected.*qwen3"),
        (EAGLE3, layers(model_type="qwen3_moe"), "'qwen3_moe', expected.*llama"),
        (DSPARK, layers(layer_types=["sliding_attention"]), "layer_types is.*full_att"),
        (DSPARK, layers(use_sliding_window=True), "use_sliding_window is True"),
        (
            DFLASH,
            {"sliding_window_non_causal": True},
            "sliding_window_non_causal is Tr",
        ),
        (DFLASH, {"target_hidden_size": 64}, "target_hidden_size is 64, expected.*32"),
        (EAGLE3, {"fc_norm": True}, "fc_norm is True, expected false"),
        (EAGLE3, {"embed_requires_grad": True}, "embed_requires_grad is True"),
        (
            EAGLE3,
            layers(num_hidden_layers=2, layer_types=None),
            "layers is 2, expected 1",
        ),
        (
            EAGLE3,
            {"speculators_config": {}},
            "expected proposal_methods with speculativ",
        ),
        (DSPARK, {"mask_token_id": None}, "mask_token_id is None"),
        (DSPARK, {"aux_hidden_state_layer_ids": [0, 8]}, "expected ascending.*0..7"),
        (
            DSPARK,
            {"aux_hidden_state_layer_ids": [3, 2]},
            "is .3, 2., expected ascending",
        ),
        (EAGLE3, {"eagle_aux_hidden_state_layer_ids": [0, 2]}, "in 1..7"),
        (
            DFLASH,
            {"block_size": 1},
            "block_size is 1, expected an integer of at least 2",
        ),
        (DFLASH, {"draft_vocab_size": 301}, "draft_vocab_size must lie in 1..300"),
        (
            DSPARK,
            {"markov_head_type": "rnn", "sample_from_anchor": False},
            "sample_from_anchor is False, expected true where markov_head_type is",
        ),
    ],
)
def test_what_is_not_built_is_refused_by_name(config, changes, words):
    with pytest.raises(CheckpointError, match=words):
        read(config, **changes)


def eagle3(seed=0, *, qk_norm=False, **changes):
    config = Eagle3Config(
        backbone=dense(num_hidden_layers=1, qk_norm=qk_norm),
        ttt_length=3,
        target_layer_ids=(0,),
        num_target_layers=2,
        **changes,
    )
    return Eagle3Drafter(config, rngs=nnx.Rngs(seed))


def masks_drafter(**changes):
    return drafter(
        markov_rank=0,
        enable_confidence_head=False,
        confidence_head_with_markov=False,
        sample_from_anchor=False,
        **changes,
    )


NORMS = dict.fromkeys(("norm_before_fc", "norm_before_residual", "norm_output"), True)
MADE = {
    "dspark": drafter,
    "dspark_pruned": pruned_drafter,
    "dflash_masks": masks_drafter,
    "eagle3": lambda: eagle3(qk_norm=True),
    "eagle3_llama_norms": lambda: eagle3(**NORMS),
}


@pytest.mark.parametrize("kind", MADE)
def test_what_is_written_reads_back_equal(tmp_path, kind):
    model, saved = target().model, MADE[kind]()
    folder = tmp_path / "d"
    save_draft_checkpoint(
        folder, saved, model, target_name="org/model", format="speculators"
    )
    assert_equal(load_draft_checkpoint(folder, model), saved)
    config = json.loads((folder / "config.json").read_text())
    assert config["speculators_config"]["verifier"]["name_or_path"] == "org/model"
    assert "embed_tokens.weight" in load_file(folder / "model.safetensors")


def test_other_programs_get_a_format_that_can_say_the_drafter():
    assert draft_format(drafter().config) == "deepspec"
    assert draft_format(drafter().config, "speculators") == "speculators"
    for made in (pruned_drafter(), masks_drafter(), eagle3()):
        assert draft_format(made.config) == "speculators"
    for made, words in (
        (pruned_drafter(), "draft_vocab_size is 20"),
        (masks_drafter(), "ignores sample_from_anchor"),
        (eagle3(), "qk_norm"),
        (eagle3(qk_norm=True, norm_output=True), "norm_output"),
    ):
        with pytest.raises(CheckpointError, match=words):
            draft_format(made.config, "deepspec")
    with pytest.raises(CheckpointError, match="'gguf', expected one of"):
        draft_format(drafter().config, "gguf")
    rnn = replace(drafter().config, markov_head_type="rnn", sample_from_anchor=False)
    with pytest.raises(CheckpointError, match="rnn head at the anchor's row"):
        draft_format(rnn)


def test_a_folder_that_speculators_cannot_use_is_not_written(tmp_path):
    with pytest.raises(CheckpointError, match="wants the target's matrices"):
        save_draft_checkpoint(tmp_path / "d", drafter(), format="speculators")
    assert list(tmp_path.iterdir()) == []
    made = eagle3()
    with pytest.warns(UserWarning, match="put one into config.json"):
        save_draft_checkpoint(tmp_path / "d", made, target().model, target_name="tiny")


def test_training_alone_needs_the_verifiers_head(tmp_path):
    """Folders that carry it for that are read without it."""
    extra = {"verifier_lm_head.weight": np.zeros((300, 32), "f4")}
    folder = altered(tmp_path, tensors=extra)
    assert_equal(load_draft_checkpoint(folder, target().model), drafter())


def test_llama_layers_decode_greedily_as_without_a_drafter(tmp_path):
    model = zoo.target()
    made = zoo.drafter(zoo.SPECULATORS, model)
    initialize.from_target(made, model)
    save_draft_checkpoint(tmp_path / "d", made, model, target_name="org/model")
    options = {"max_new_tokens": 24, "block_length": 3, "capacity": 64}
    prompts = zoo.prompts(5, 1, 17)
    plain = generate(model, prompts, **options | {"block_length": None})
    seen = generate(model, prompts, load_drafter(tmp_path / "d", model), **options)
    assert [each.tokens for each in seen] == [each.tokens for each in plain]
    assert sum(sum(each.accepted) for each in seen) > 0
