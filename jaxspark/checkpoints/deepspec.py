"""DSpark, DFlash and Eagle3 drafters in DeepSpec's `config.json`, in and out.

It is the Qwen3 configuration of the draft layers plus the drafter's own keys. DFlash is
DSpark's architecture without Markov rank and confidence head. Pruned vocabularies and
`sample_from_anchor` are additions of ours, which DeepSpec cannot read.
"""

from collections.abc import Mapping
from typing import Any

from jaxspark.checkpoints.draft_tensors import DraftConfig
from jaxspark.checkpoints.fields import Fields
from jaxspark.checkpoints.hf_config import dense_config_from_hf, dense_config_to_hf
from jaxspark.drafters import DSparkConfig, Eagle3Config
from jaxspark.errors import CheckpointError

DSPARK, EAGLE3 = "Qwen3DSparkModel", "Qwen3Eagle3Model"
# Blocks per sequence in the released training recipes.
_NUM_ANCHORS = 512


def draft_config_from_deepspec(
    config: Mapping[str, Any], *, where: str = "config.json"
) -> DraftConfig:
    """A drafter's configuration from its parsed `config.json`.

    Raises:
      CheckpointError: another architecture, a missing key or a bad value.
    """
    fields = Fields(config, where)
    architectures = fields.values.get("architectures")
    if architectures not in ([DSPARK], [EAGLE3]):
        raise fields.wrong("architectures", f"[{DSPARK!r}] or [{EAGLE3!r}] (DeepSpec)")
    shared: dict[str, Any] = {
        "backbone": dense_config_from_hf(config, where=where, family="qwen3"),
        "target_layer_ids": fields.integers("target_layer_ids"),
        "num_target_layers": fields.integer("num_target_layers"),
        "draft_vocab_size": fields.integer("draft_vocab_size", None),
    }
    read = _read_dspark if architectures == [DSPARK] else _read_eagle3
    try:
        return read(fields, shared)
    except CheckpointError:
        raise
    except ValueError as error:
        raise CheckpointError(f"{where}: {error}") from error


def _read_dspark(fields: Fields, shared: dict[str, Any]) -> DSparkConfig:
    return DSparkConfig(
        **shared,
        **read_heads(fields),
        block_size=fields.integer("block_size"),
        mask_token_id=fields.integer("mask_token_id", least=0),
        sample_from_anchor=fields.boolean("sample_from_anchor", True),
    )


def read_heads(fields: Fields) -> dict[str, Any]:
    """What a configuration says of the sequential and the confidence head."""
    confidence = fields.boolean("enable_confidence_head", False)
    return {
        "markov_rank": fields.integer("markov_rank", 0, least=0),
        "markov_head_type": fields.text("markov_head_type", "vanilla"),
        "enable_confidence_head": confidence,
        # Folders without a head may still carry the flag's default.
        "confidence_head_with_markov": confidence
        and fields.boolean("confidence_head_with_markov", False),
    }


def _read_eagle3(fields: Fields, shared: dict[str, Any]) -> Eagle3Config:
    return Eagle3Config(
        **shared,
        ttt_length=fields.integer("ttt_length"),
        step_loss_decay=fields.number("step_loss_decay", 0.8),
    )


def draft_config_to_deepspec(
    config: DraftConfig, *, dtype, complete: bool
) -> dict[str, Any]:
    """The `config.json` of a drafter folder.

    Args:
      config: the drafter's.
      dtype: of its tensors.
      complete: whether the folder has all that DeepSpec wants. Where it does not, keys
        that DeepSpec demands are left out, for it would take what is missing at random.
    """
    depth = config.backbone.num_hidden_layers
    result = dense_config_to_hf(config.backbone, dtype=dtype) | {
        "model_type": "qwen3",
        "tie_word_embeddings": False,
        "layer_types": ["full_attention"] * depth,
        "num_target_layers": config.num_target_layers,
        "target_layer_ids": list(config.target_layer_ids),
    }
    if config.draft_vocab_size is not None:
        result["draft_vocab_size"] = config.draft_vocab_size
    if isinstance(config, Eagle3Config):
        result |= {
            "architectures": [EAGLE3],
            "ttt_length": config.ttt_length,
            "step_loss_decay": config.step_loss_decay,
        }
        return result | ({"draft_num_hidden_layers": depth} if complete else {})
    result |= {
        "architectures": [DSPARK],
        "block_size": config.block_size,
        "mask_token_id": config.mask_token_id,
        **heads_to_json(config),
        "sample_from_anchor": config.sample_from_anchor,
    }
    return result | ({"num_anchors": _NUM_ANCHORS} if complete else {})


def heads_to_json(config: DSparkConfig) -> dict[str, Any]:
    """The keys that `read_heads` reads."""
    return {
        "markov_rank": config.markov_rank,
        "markov_head_type": config.markov_head_type,
        "enable_confidence_head": config.enable_confidence_head,
        "confidence_head_with_markov": config.confidence_head_with_markov,
    }


def why_not_deepspec(config: DraftConfig, *, complete: bool) -> str | None:
    """What of a drafter DeepSpec's format cannot say; None if it can say all.

    Args:
      config: the drafter's.
      complete: whether DeepSpec itself shall read it, without our additions.
    """
    if not config.backbone.qk_norm or config.backbone.mlp_bias:
        return (
            "DeepSpec's draft layers are Qwen3's: expected qk_norm True and mlp_bias "
            f"False, found {config.backbone.qk_norm} and {config.backbone.mlp_bias}"
        )
    if isinstance(config, Eagle3Config):
        for name in ("norm_before_fc", "norm_before_residual", "norm_output"):
            if getattr(config, name):
                return f"DeepSpec's Eagle3 has no {name}, expected False"
    if complete and config.draft_vocab_size is not None:
        return (
            f"DeepSpec cannot read pruned vocabularies: draft_vocab_size is "
            f"{config.draft_vocab_size}, expected none"
        )
    if complete and isinstance(config, DSparkConfig) and not config.sample_from_anchor:
        return (
            "DeepSpec ignores sample_from_anchor and drafts as if it were true, found "
            "False"
        )
    return None
