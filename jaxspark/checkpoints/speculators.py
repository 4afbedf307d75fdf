"""Drafters in the `config.json` of vllm-project/speculators, in and out.

Tensors are named as in DeepSpec's folders; the configuration differs:

- Taps are the target layers whose *input* is read, one higher than DeepSpec's ids of
  layers whose output is. Null means `[2, L/2, L-3]`.
- `block_size` counts the anchor's row where that predicts nothing
  (`sample_from_anchor` false): one more than drafts.
- The draft layers stand in `transformer_layer_config`: Qwen3's, for Eagle3 also
  Llama's. `architectures` is whatever class was saved, so nothing relies on it.

Options that our drafters do not have are refused by name.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from jaxspark.checkpoints.deepseek_v4_config import v4_config_to_hf
from jaxspark.checkpoints.deepspec import heads_to_json, read_heads
from jaxspark.checkpoints.draft_tensors import DraftConfig
from jaxspark.checkpoints.fields import Fields
from jaxspark.checkpoints.hf_config import dense_config_from_hf, dense_config_to_hf
from jaxspark.drafters import DSparkConfig, Eagle3Config
from jaxspark.errors import CheckpointError
from jaxspark.models import DenseConfig, TargetConfig

KIND = "speculators_model_type"
_ARCHITECTURES = {
    "dspark": "DSparkSpeculator",
    "dflash": "DFlashSpeculator",
    "eagle3": "Eagle3Speculator",
}
_TAPS = "aux_hidden_state_layer_ids"
# True means something that is not built; the words say what false means.
_REFUSED = {
    "sliding_window_non_causal": "false (full attention)",
    "fc_norm": "false (features are normed all as one vector, or not at all)",
    "embed_requires_grad": "false (the embedding is the target's)",
}
_EAGLE3_OPTIONS = ("norm_before_fc", "norm_before_residual", "norm_output")


def draft_config_from_speculators(
    config: Mapping[str, Any], target: TargetConfig, *, where: str = "config.json"
) -> DraftConfig:
    """A drafter's configuration from its parsed `config.json`.

    Args:
      config: the JSON object.
      target: what it shall draft for, whose depth is not in the file.
      where: names the file in errors.

    Raises:
      CheckpointError: another kind of drafter, an option that is not supported, a
        missing key or a bad value.
    """
    fields = Fields(config, where)
    kind = fields.text(KIND)
    if kind not in _ARCHITECTURES:
        raise fields.wrong(KIND, f"one of {list(_ARCHITECTURES)}")
    for key, expected in _REFUSED.items():
        if fields.boolean(key, False):
            raise fields.wrong(key, expected)
    backbone = _backbone(fields, ("qwen3", "llama") if kind == "eagle3" else ("qwen3",))
    vocab = fields.integer("draft_vocab_size")
    shared: dict[str, Any] = {
        "backbone": backbone,
        "num_target_layers": fields.integer(
            "num_target_layers", target.num_hidden_layers
        ),
        "draft_vocab_size": None if vocab == backbone.vocab_size else vocab,
    }
    read = _read_eagle3 if kind == "eagle3" else _read_dspark
    try:
        return read(fields, shared)
    except CheckpointError:
        raise
    except ValueError as error:
        raise CheckpointError(f"{where}: {error}") from error


def _backbone(fields: Fields, families: tuple[str, ...]) -> DenseConfig:
    layers = fields.table("transformer_layer_config")
    if layers is None:
        raise fields.wrong(
            "transformer_layer_config", "the draft layers' configuration"
        )
    family = layers.text("model_type", "qwen3")
    if family not in families:
        raise layers.wrong("model_type", f"one of {list(families)}")
    config = dense_config_from_hf(layers.values, where=layers.where, family=family)
    width = fields.integer("target_hidden_size", config.hidden_size)
    if width != config.hidden_size:
        raise fields.wrong(
            "target_hidden_size", f"null or the draft layers' {config.hidden_size}"
        )
    return replace(config, tie_word_embeddings=False)


def _taps(fields: Fields, key: str, depth: int, *, least: int) -> tuple[int, ...]:
    """Our taps: layers whose output is the input of the layers that the file names."""
    inputs = fields.integers(key, (2, depth // 2, depth - 3))
    ascending = all(a < b for a, b in zip(inputs, inputs[1:]))
    # Input number `depth` would be the last layer's output, normed or not.
    if not inputs or not ascending or inputs[0] < least or inputs[-1] >= depth:
        raise CheckpointError(
            f"{fields.where}: {key} is {list(inputs)}, expected ascending layers in "
            f"{least}..{depth - 1}, whose inputs are read"
        )
    return tuple(layer - 1 for layer in inputs)


def _read_dspark(fields: Fields, shared: dict[str, Any]) -> DSparkConfig:
    default = fields.values[KIND] == "dspark"
    from_anchor = fields.boolean("sample_from_anchor", default)
    block_size = fields.integer("block_size", least=1 if from_anchor else 2)
    heads = read_heads(fields)
    if heads["markov_rank"] and heads["markov_head_type"] == "rnn" and not from_anchor:
        raise fields.wrong(
            "sample_from_anchor",
            "true where markov_head_type is 'rnn' (its state would begin at a row that "
            "predicts nothing)",
        )
    return DSparkConfig(
        **shared,
        **heads,
        target_layer_ids=_taps(fields, _TAPS, shared["num_target_layers"], least=0),
        block_size=block_size if from_anchor else block_size - 1,
        mask_token_id=fields.integer("mask_token_id", least=0),
        sample_from_anchor=from_anchor,
    )


def _read_eagle3(fields: Fields, shared: dict[str, Any]) -> Eagle3Config:
    backbone, depth = shared["backbone"], shared["num_target_layers"]
    if backbone.num_hidden_layers != 1:
        raise CheckpointError(
            f"{fields.where}: transformer_layer_config: num_hidden_layers is "
            f"{backbone.num_hidden_layers}, expected 1 for eagle3"
        )
    options: dict[str, Any] = {n: fields.boolean(n, False) for n in _EAGLE3_OPTIONS}
    return Eagle3Config(
        **shared,
        **options,
        target_layer_ids=_taps(fields, f"eagle_{_TAPS}", depth, least=1),
        ttt_length=_speculative_tokens(fields),
        step_loss_decay=fields.number("step_loss_decay", 0.8),
    )


def _speculative_tokens(fields: Fields) -> int:
    proposal = fields.table("speculators_config")
    methods = None if proposal is None else proposal.values.get("proposal_methods")
    if not isinstance(methods, list) or not methods or not isinstance(methods[0], dict):
        raise fields.wrong(
            "speculators_config", "proposal_methods with speculative_tokens"
        )
    where = f"{fields.where}: proposal_methods[0]"
    return Fields(methods[0], where).integer("speculative_tokens")


def draft_config_to_speculators(
    config: DraftConfig, target: TargetConfig, *, dtype, verifier: str | None
) -> dict[str, Any]:
    """The `config.json` of a drafter folder.

    Args:
      config: the drafter's.
      target: the target's.
      dtype: of the tensors.
      verifier: the target's Hub id or folder; None: speculators uses the copies of its
        matrices alone, which is not enough for Eagle3.
    """
    if isinstance(config, Eagle3Config):
        kind, drafts = "eagle3", config.ttt_length
    else:
        heads = config.markov_rank or config.enable_confidence_head
        kind, drafts = "dspark" if heads else "dflash", config.block_size
    layers = dense_config_to_hf(config.backbone, dtype=dtype)
    taps = [layer + 1 for layer in config.target_layer_ids]
    verifier_config = (
        dense_config_to_hf(target, dtype=dtype)
        if isinstance(target, DenseConfig)
        else v4_config_to_hf(target, dtype=dtype)
    )
    result = {
        "architectures": [_ARCHITECTURES[kind]],
        KIND: kind,
        "speculators_config": {
            "algorithm": kind,
            "proposal_methods": [
                {"proposal_type": "greedy", "speculative_tokens": drafts}
            ],
            "default_proposal_method": "greedy",
            "verifier": {
                "name_or_path": verifier,
                "architectures": verifier_config["architectures"],
            },
        },
        "transformer_layer_config": layers,
        "torch_dtype": layers["torch_dtype"],
        "draft_vocab_size": config.draft_vocab_size or config.backbone.vocab_size,
        "num_target_layers": config.num_target_layers,
    }
    if isinstance(config, Eagle3Config):
        return result | {
            f"eagle_{_TAPS}": taps,
            "step_loss_decay": config.step_loss_decay,
            **{name: getattr(config, name) for name in _EAGLE3_OPTIONS},
        }
    return result | {
        _TAPS: taps,
        "block_size": drafts if config.sample_from_anchor else drafts + 1,
        "mask_token_id": config.mask_token_id,
        "sample_from_anchor": config.sample_from_anchor,
        **(heads_to_json(config) if kind == "dspark" else {}),
    }


def why_not_speculators(config: DraftConfig) -> str | None:
    """What of a drafter the format cannot say; None if it can say all."""
    layers, eagle3 = config.backbone, isinstance(config, Eagle3Config)
    if layers.mlp_bias and (layers.qk_norm or not eagle3):
        return "speculators' Qwen3 layers have no mlp_bias, expected False"
    if isinstance(config, DSparkConfig):
        if not layers.qk_norm:
            return "speculators' DSpark layers are Qwen3's: expected qk_norm True"
        rnn = config.markov_rank and config.markov_head_type == "rnn"
        if rnn and not config.sample_from_anchor:
            return (
                "speculators begins an rnn head at the anchor's row: expected "
                "sample_from_anchor True"
            )
    return None
