"""What is shared out over which axes of a mesh: the one table.

A rule names leaves by the end of their path and says which of their dimensions, counted
from the last, lies along which axes. Everything else about a leaf is whole on every
shard. Names are those of checkpoints, so one rule serves targets and drafters alike;
the two leaves of quantized matrices (`elements`, `scales`) keep their dimensions.

    experts          [L, E, ...]  over expert and model
    heads, hidden    rows of what makes them, columns of what reads them; over model
    vocabulary       rows of embedding, head and draft heads; over model
    slots            of states and caches; over data and expert
"""

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
from jax.sharding import PartitionSpec

from jaxspark.parallel.axes import EXPERTS, MODEL, SLOTS, Axes, axis_names, bound


@dataclass(frozen=True)
class Rule:
    """Shares out one dimension of the leaves whose path ends in a pattern.

    Attributes:
      pattern: regular expression for the end of a path, from the start of a name on.
      what: is shared out, for messages.
      dimension: from the last, -1, backwards; None keeps such leaves whole.
      axes: along which.
    """

    pattern: str
    what: str
    dimension: int | None = None
    axes: Axes = ()

    def matches(self, path: str) -> bool:
        """Whether it is about the leaf at a path."""
        return re.search(rf"(^|\.)({self.pattern})$", path) is not None

    def spec(self, shape: Sequence[int]) -> PartitionSpec:
        """The sharding of a leaf of a shape."""
        if self.dimension is None:
            return PartitionSpec()
        return PartitionSpec(*[None] * (len(shape) + self.dimension), self.axes)


_MATRIX = r"\.weight(\.elements|\.scales)?"
_ROUTED = r"mlp\.experts\.(gate_up_proj|down_proj)(\.elements|\.scales)?"

PARAMETERS = (
    Rule(_ROUTED, "experts", -3, EXPERTS),
    Rule(rf"self_attn\.[qkv]_proj{_MATRIX}", "heads", -2, MODEL),
    Rule(r"self_attn\.[qkv]_proj\.bias", "heads", -1, MODEL),
    Rule(rf"self_attn\.q_b_proj{_MATRIX}", "heads", -2, MODEL),
    Rule(r"self_attn\.sinks", "heads", -1, MODEL),
    Rule(rf"self_attn\.o_a_proj{_MATRIX}", "output groups", -2, MODEL),
    Rule(rf"self_attn\.o(_b)?_proj{_MATRIX}", "heads", -1, MODEL),
    Rule(rf"(mlp|shared_experts)\.(gate|up)_proj{_MATRIX}", "hidden units", -2, MODEL),
    Rule(r"(mlp|shared_experts)\.(gate|up)_proj\.bias", "hidden units", -1, MODEL),
    Rule(rf"(mlp|shared_experts)\.down_proj{_MATRIX}", "hidden units", -1, MODEL),
    Rule(rf"(embed_tokens|lm_head|markov_w2){_MATRIX}", "vocabulary", -2, MODEL),
    Rule(r"draft_ids", "vocabulary", -1, MODEL),
    # Looked up once for every draft: whole, it costs no collective.
    Rule(r"markov_w1\.weight", "Markov table"),
    Rule(r"\w*norm\.weight", "norm"),
    Rule(r"self_attn\.(q_a|kv)_proj\.weight(\.\w+)?", "latent"),
    Rule(r"(compressor|indexer)\.\w+_proj\.weight(\.\w+)?", "compression"),
    Rule(r"compressor\.position_bias", "compression"),
    Rule(r"(attn_hc|ffn_hc|hc_head)(\.\w+)+", "hyper-connection"),
    Rule(r"gate\.(weight|tid2eid|e_score_correction_bias)", "router"),
    Rule(r"mlp\.down_proj\.bias|self_attn\.o_proj\.bias", "bias of a sum"),
    Rule(r"(fc|main_proj|e_proj|h_proj)\.weight(\.\w+)?", "features"),
    Rule(r"markov_head\.(gate|joint)_proj\.\w+", "Markov head"),
    Rule(r"confidence_head\.proj\.\w+", "confidence head"),
    Rule(r"count", "steps of an optimizer"),
)
# Arrays of fewer elements are not worth a collective.
_SMALL = 2**10
# What a letter of a state's name stands for, see the glossary in `jaxspark`.
LETTERS: dict[str, Axes] = {"B": SLOTS, "K": MODEL}


def parameter_specs[ModelT](model: ModelT) -> ModelT:
    """The sharding of every parameter of a model or drafter, in its place.

    Raises:
      ValueError: there is no rule for one, or more than one; names it.
    """
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: rule_for(path_name(path)).spec(leaf.shape), model
    )


def rule_for(path: str) -> Rule:
    """The one rule about a parameter.

    Raises:
      ValueError: there is none, or more than one.
    """
    rules = [rule for rule in PARAMETERS if rule.matches(path)]
    if len(rules) != 1:
        found = [rule.pattern for rule in rules]
        raise ValueError(
            f"{path}: expected one rule in jaxspark.parallel.rules that says how it is "
            f"shared out, found {found}"
        )
    return rules[0]


def state_specs[StateT](state: StateT) -> StateT:
    """The sharding of every array of a state or cache, in its place.

    The letters that end an array's name are its axes; of sampling parameters, which
    have none, the only axis is that of slots.

    Raises:
      ValueError: a name does not say its axes.
    """

    def spec(path, leaf) -> PartitionSpec:
        name = path_name(path)
        letters = "B" if name.startswith("sampling.") else name.rpartition("_")[2]
        # Rows may be cut to lanes, see `LayerRows.zeros`.
        if letters.endswith("H") and len(leaf.shape) == len(letters) + 1:
            letters += "h"
        if len(letters) != len(leaf.shape) or "B" not in letters:
            raise ValueError(f"{name}: its name does not tell the axes of {leaf.shape}")
        return PartitionSpec(*(LETTERS.get(letter) for letter in letters))

    return jax.tree_util.tree_map_with_path(spec, state)


def spread_specs(tree: Any) -> Any:
    """What training keeps: each array's longest axis that divides over slots' shards.

    Parameters and what the optimizer remembers of them are spread alike (FSDP; ZeRO-3,
    arXiv 1910.02054), and gathered where they are used. Small arrays are whole.
    """
    return jax.tree.map(lambda leaf: _spread(leaf.shape, PartitionSpec()), tree)


def training_specs(tree: Any) -> Any:
    """What DeepSeek-V4's own training keeps of parameters, or of what they gather.

    Experts are where decoding has them. Beside that, each large array is spread over
    the axes of slots that it is not shared out over yet, along its longest dimension
    but that of layers.
    """

    def spec(path, leaf) -> PartitionSpec:
        name = path_name(path)
        stacked = re.search(r"(^|\.)(layers|stages)\.", name) is not None
        return _spread(leaf.shape, rule_for(name).spec(leaf.shape), begin=int(stacked))

    return jax.tree_util.tree_map_with_path(spec, tree)


def _spread(
    shape: Sequence[int], used: PartitionSpec, *, begin: int = 0
) -> PartitionSpec:
    """`used`, and the longest of its free dimensions over the free axes of slots.

    Args:
      shape: of an array.
      used: what it is shared out over already.
      begin: the first dimension that may be.
    """
    mesh = jax.sharding.get_abstract_mesh()
    dimensions = [*used, *[None] * (len(shape) - len(used))]
    free = unused_slots(used)
    shards = math.prod(mesh.shape[axis] for axis in free)
    fitting = [
        i
        for i, size in enumerate(shape)
        if i >= begin and dimensions[i] is None and size % shards == 0
    ]
    if math.prod(shape) >= _SMALL and fitting:
        dimensions[max(fitting, key=lambda i: shape[i])] = free
    return PartitionSpec(*dimensions)


def unused_slots(spec: PartitionSpec) -> tuple[str, ...]:
    """The axes of slots that an array is not shared out over."""
    used = {axis for axes in spec for axis in axis_names(axes)}
    return tuple(axis for axis in SLOTS if axis not in used)


def gather(leaf: Any, stored: PartitionSpec, used: PartitionSpec) -> Any:
    """Inside a program: an array as `used` has it, of its shards as they are stored."""
    for dimension, axes in enumerate(stored):
        kept = axis_names(used[dimension]) if dimension < len(used) else ()
        missing = bound(tuple(axis for axis in axis_names(axes) if axis not in kept))
        if missing:
            leaf = jax.lax.all_gather(leaf, missing, axis=dimension, tiled=True)
    return leaf


def row_specs(tree: Any) -> Any:
    """Rows of a batch, on the first axis, are shared out like slots."""
    return jax.tree.map(lambda _: PartitionSpec(SLOTS), tree)


def replicated_specs(tree: Any) -> Any:
    """Every shard has all of it."""
    return jax.tree.map(lambda _: PartitionSpec(), tree)


def path_name(path: Iterable[Any]) -> str:
    """A path as checkpoints write it, names and numbers with dots between."""
    names = [
        str(getattr(key, "name", getattr(key, "key", getattr(key, "idx", ""))))
        for key in path
    ]
    # Flax keeps an array in the attribute `value` of its variable.
    return ".".join(name for name in names if name != "value")
