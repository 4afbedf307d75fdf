"""DeepSeek-V4 checkpoints: where every tensor of a file lies in the model.

Two layouts are known. *Released*: DeepSeek's own names (`layers.3.attn.wq_a.weight`),
one tensor per expert and matrix. *Transformers*: the names of its modules
(`model.layers.3.self_attn.q_a_proj.weight`), the experts of a layer in one tensor; what
transformers saves mixes both, and is read too.

The model stacks its layers, so one parameter takes the tensors of many layers and
experts. Tensors are read one after the other and put into the parameter where it lies,
on the device or spread over many, so the host holds one tensor at a time.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxspark.checkpoints.shards import Assembly
from jaxspark.checkpoints.tree import Tensors, checked, compare, named_parameters
from jaxspark.errors import CheckpointError
from jaxspark.models.deepseek_v4 import DeepSeekV4
from jaxspark.models.deepseek_v4_config import DeepSeekV4Config
from jaxspark.parallel.mesh import sharding_for
from jaxspark.quantization import blocks
from pallas_kernels import transposed
from pallas_kernels.dispatch import expected_platform
from pallas_kernels.quantized import Quantized, dense
from pallas_kernels.transposed import Transposed

# Names inside a layer: ours, transformers' (None: the same), the released ones.
_LAYER = (
    ("attn_hc.fn", None, "hc_attn_fn"),
    ("attn_hc.base", None, "hc_attn_base"),
    ("attn_hc.scale", None, "hc_attn_scale"),
    ("ffn_hc.fn", None, "hc_ffn_fn"),
    ("ffn_hc.base", None, "hc_ffn_base"),
    ("ffn_hc.scale", None, "hc_ffn_scale"),
    ("input_layernorm.weight", None, "attn_norm.weight"),
    ("post_attention_layernorm.weight", None, "ffn_norm.weight"),
    ("self_attn.sinks", None, "attn.attn_sink"),
    ("self_attn.q_a_proj.weight", None, "attn.wq_a.weight"),
    ("self_attn.q_a_norm.weight", None, "attn.q_norm.weight"),
    ("self_attn.q_b_proj.weight", None, "attn.wq_b.weight"),
    ("self_attn.kv_proj.weight", None, "attn.wkv.weight"),
    ("self_attn.kv_norm.weight", None, "attn.kv_norm.weight"),
    ("self_attn.o_a_proj.weight", None, "attn.wo_a.weight"),
    ("self_attn.o_b_proj.weight", None, "attn.wo_b.weight"),
    ("self_attn.compressor.kv_proj.weight", None, "attn.compressor.wkv.weight"),
    ("self_attn.compressor.gate_proj.weight", None, "attn.compressor.wgate.weight"),
    ("self_attn.compressor.position_bias", None, "attn.compressor.ape"),
    ("self_attn.compressor.kv_norm.weight", None, "attn.compressor.norm.weight"),
    (
        "self_attn.indexer.q_b_proj.weight",
        "self_attn.compressor.indexer.q_b_proj.weight",
        "attn.indexer.wq_b.weight",
    ),
    (
        "self_attn.indexer.weights_proj.weight",
        "self_attn.compressor.indexer.scorer.weights_proj.weight",
        "attn.indexer.weights_proj.weight",
    ),
    (
        "self_attn.indexer.compressor.kv_proj.weight",
        "self_attn.compressor.indexer.kv_proj.weight",
        "attn.indexer.compressor.wkv.weight",
    ),
    (
        "self_attn.indexer.compressor.gate_proj.weight",
        "self_attn.compressor.indexer.gate_proj.weight",
        "attn.indexer.compressor.wgate.weight",
    ),
    (
        "self_attn.indexer.compressor.position_bias",
        "self_attn.compressor.indexer.position_bias",
        "attn.indexer.compressor.ape",
    ),
    (
        "self_attn.indexer.compressor.kv_norm.weight",
        "self_attn.compressor.indexer.kv_norm.weight",
        "attn.indexer.compressor.norm.weight",
    ),
    ("mlp.gate.weight", None, "ffn.gate.weight"),
    ("mlp.gate.e_score_correction_bias", None, "ffn.gate.bias"),
    ("mlp.gate.tid2eid", None, "ffn.gate.tid2eid"),
    ("mlp.shared_experts.gate_proj.weight", None, "ffn.shared_experts.w1.weight"),
    ("mlp.shared_experts.up_proj.weight", None, "ffn.shared_experts.w3.weight"),
    ("mlp.shared_experts.down_proj.weight", None, "ffn.shared_experts.w2.weight"),
)
_RELEASED = {ours: released for ours, _, released in _LAYER}
_TRANSFORMERS = {ours: theirs or ours for ours, theirs, _ in _LAYER}
_TOP = {
    "embed_tokens.weight": "embed.weight",
    "norm.weight": "norm.weight",
    "lm_head.weight": "head.weight",
    "hc_head.hc_fn": "hc_head_fn",
    "hc_head.hc_base": "hc_head_base",
    "hc_head.hc_scale": "hc_head_scale",
}
_GATE_UP, _DOWN = "mlp.experts.gate_up_proj", "mlp.experts.down_proj"


@dataclass(frozen=True)
class Piece:
    """A tensor of a checkpoint, and where it begins in a parameter.

    Attributes:
      name: of the tensor.
      shape: of the tensor.
      start: its first element's place; the tensor takes leading axes of length 1.
    """

    name: str
    shape: tuple[int, ...]
    start: tuple[int, ...]


Plan = dict[str, list[Piece]]


def target_plan(
    config: DeepSeekV4Config, shapes: Mapping[str, tuple[int, ...]], *, released: bool
) -> Plan:
    """The tensors that every parameter of a target is made of, by its path.

    Args:
      config: of the model.
      shapes: of its parameters, by path.
      released: whether names are the released ones, else transformers'.
    """
    period = config.layer_pattern[1]
    firsts = config.layer_stacks
    found = {}
    for path, shape in shapes.items():
        if not path.startswith("layers."):
            found[path] = [_top_piece(path, shape, released)]
            continue
        _, stack, inner = path.split(".", 2)
        first, count = firsts[int(stack)]
        found[path] = [
            piece
            for place in range(count)
            for piece in _layer_pieces(
                inner, shape[1:], first + place * period, place, released
            )
        ]
    return found


def draft_plan(shapes: Mapping[str, tuple[int, ...]]) -> Plan:
    """The same of a drafter inside a released checkpoint, `mtp.0.` and so on.

    Inputs belong to the first stage, heads and the last norm to the last one.
    """
    stages = shapes["stages.self_attn.sinks"][0]
    found = {}
    for path, shape in shapes.items():
        if path.startswith("stages."):
            inner = path.removeprefix("stages.")
            found[path] = [
                Piece(f"mtp.{place}.{piece.name}", piece.shape, piece.start)
                for place in range(stages)
                for piece in _released_pieces(inner, shape[1:], place)
            ]
        else:
            first = path.startswith(("main_", "e_proj", "h_proj", "enorm", "hnorm"))
            name = path.replace("hc_head.hc_", "hc_head_")
            stage = 0 if first else stages - 1
            found[path] = [Piece(f"mtp.{stage}.{name}", shape, (0,) * len(shape))]
    return found


def _top_piece(path, shape, released) -> Piece:
    if released:
        name = _TOP[path]
    else:
        name = path if path.startswith("lm_head.") else f"model.{path}"
    return Piece(name, shape, (0,) * len(shape))


def _layer_pieces(inner, shape, layer, place, released):
    """The tensors of one layer's part of a stacked parameter."""
    if released:
        return [
            Piece(f"layers.{layer}.{piece.name}", piece.shape, piece.start)
            for piece in _released_pieces(inner, shape, place)
        ]
    name = _TRANSFORMERS.get(inner, inner)
    return [Piece(f"model.layers.{layer}.{name}", shape, (place, *(0,) * len(shape)))]


def _released_pieces(inner, shape, place):
    """The same under names without the layer's prefix."""
    if inner not in (_GATE_UP, _DOWN):
        return [Piece(_RELEASED[inner], shape, (place, *(0,) * len(shape)))]
    experts, rows, columns = shape
    parts = [("w2", 0)] if inner == _DOWN else [("w1", 0), ("w3", rows // 2)]
    return [
        Piece(
            f"ffn.experts.{expert}.{part}.weight",
            (rows // len(parts), columns),
            (place, expert, begin, 0),
        )
        for expert in range(experts)
        for part, begin in parts
    ]


def normalized(tensors: Tensors) -> Tensors:
    """Under released names or transformers', whichever the file mostly has.

    What transformers saves has released names behind "model.", and some of its own.
    Tensors of draft stages (`mtp.`) are not the model's and left out.
    """
    names = [name for name in tensors.shapes if not name.startswith("mtp.")]
    if any(".self_attn." in name for name in names):
        return tensors.renamed({name: name for name in names})
    own = {f"model.{ours}": theirs for ours, theirs in _TOP.items()}

    def released(name):
        name = own.get(name, name).removeprefix("model.")
        return name.replace(".attn.norm.", ".attn.kv_norm.")

    return tensors.renamed({released(name): name for name in names})


def load_deepseek_v4(
    config: DeepSeekV4Config,
    tensors: Tensors,
    *,
    dtype,
    keep_quantized: bool = False,
) -> DeepSeekV4:
    """Builds a model and fills it, tensor by tensor and shard by shard.

    Args:
      config: of the model.
      tensors: a checkpoint in either layout, see `dequantized`.
      dtype: of the large matrices, norms and the embedding.
      keep_quantized: whether matrices stay in the blocks they are stored in.

    Raises:
      CheckpointError: tensors missing, extra, of another shape or type, or not finite;
        before anything is read where it can be known.
    """
    if keep_quantized and not tensors.blocks:
        raise CheckpointError(
            f"{tensors.where}: nothing is quantized here that could stay so in memory"
        )
    tensors = normalized(tensors)
    released = not any(".self_attn." in name for name in tensors.shapes)
    return fill(
        lambda: DeepSeekV4(config, dtype=dtype, rngs=nnx.Rngs(0)),
        lambda shapes: target_plan(config, shapes, released=released),
        tensors,
        keep_quantized=keep_quantized,
    )


def fill[M: nnx.Module](
    build: Callable[[], M],
    plan_of: Callable[[Mapping[str, tuple[int, ...]]], Plan],
    tensors: Tensors,
    *,
    keep_quantized: bool = False,
) -> M:
    """Builds a module and fills its parameters piece by piece; only traces `build`."""
    graph, state = nnx.split(nnx.eval_shape(build))
    flat = nnx.to_flat_state(state)
    shapes = {".".join(map(str, path)): tuple(v.shape) for path, v in flat}
    plan = plan_of(shapes)
    compare({piece.name: piece.shape for ps in plan.values() for piece in ps}, tensors)
    filled = []
    for path, variable in flat:
        name = ".".join(map(str, path))
        fits = keep_quantized and _fits_blocks(plan[name], tensors)
        assemble = _in_blocks if fits else _plain
        value = assemble(name, variable, plan[name], tensors)
        filled.append((path, variable.replace(value)))
    return nnx.merge(graph, nnx.from_flat_state(filled))


def _plain(name, variable, pieces, tensors) -> jax.Array:
    """A parameter of its tensors, in its own type."""
    shape = tuple(variable.shape)
    array = Assembly(shape, variable.dtype, sharding_for(name, shape))
    for piece in pieces:
        if array.wants(piece.start, piece.shape):
            array.add(piece.start, checked(piece.name, tensors, variable.dtype))
    return array.finish()


def _in_blocks(name, variable, pieces, tensors) -> Quantized:
    """A parameter of its tensors as they are stored; experts for TPUs turned over."""
    (height, width), packing, dtype = _blocks_of(pieces[0], tensors)
    *lead, rows, columns = variable.shape
    if turned := turns_over(name, rows, columns):
        dtype = transposed.FP8 if packing == 1 else jnp.uint8
        # Of a scale's blocks one side stays: its rows.
        shapes = (columns // packing, rows), (columns // width, rows)
    else:
        shapes = (rows, columns // packing), (-(-rows // height), -(-columns // width))

    def assembly(leaf, dtype, matrix):
        shape = (*lead, *matrix)
        return Assembly(shape, dtype, sharding_for(f"{name}.{leaf}", shape))

    elements = assembly("elements", dtype, shapes[0])
    scales = assembly("scales", jnp.uint8, shapes[1])
    for piece in pieces:
        *before, row, column = piece.start
        size = piece.shape[-2], piece.shape[-1] // packing
        start, first = (row, column // packing), (row // height, column // width)
        if turned:
            start, first, size = start[::-1], (first[1], row), size[::-1]
        if elements.wants((*before, *start), (*piece.shape[:-2], *size)):
            part, scale = tensors.blocks[piece.name]()
            if turned:
                part, scale = _transposed(piece.name, part, scale)
            elements.add((*before, *start), part)
            scales.add((*before, *first), scale.view(np.uint8))
    kind = Transposed if turned else Quantized
    return kind(elements.finish(), scales.finish(), variable.dtype)


def turns_over(name: str, rows: int, columns: int) -> bool:
    """Whether a parameter's blocks are kept turned over, for the kernel of TPUs."""
    experts = ".experts." in f".{name}" and transposed.fits(rows, columns)
    return experts and expected_platform() == "tpu"


def _transposed(name, elements, scales):
    try:
        return transposed.transpose(elements, scales)
    except ValueError as error:
        raise CheckpointError(f"{name}: {error}") from None


def _blocks_of(piece, tensors):
    """Rows and columns of a block, elements in a byte and their type."""
    if tensors.types[piece.name] == "I8":
        return (1, blocks.FP4_BLOCK), 2, jnp.int8
    return (blocks.FP8_BLOCK, blocks.FP8_BLOCK), 1, blocks.FP8


def _fits_blocks(pieces, tensors) -> bool:
    """Whether all tensors have blocks of one kind, none begun by two of them."""
    if not all(piece.name in tensors.blocks for piece in pieces):
        return False
    if len({tensors.types[piece.name] for piece in pieces}) > 1:
        return False
    rows, columns = _blocks_of(pieces[0], tensors)[0]
    return all(p.start[-2] % rows == p.start[-1] % columns == 0 for p in pieces)


def tensors_of(
    module: nnx.Module, plan_of: Callable[[Mapping[str, tuple[int, ...]]], Plan]
) -> Iterator[tuple[str, np.ndarray]]:
    """A module's tensors by a layout's names, one after the other."""
    arrays = named_parameters(module)
    plan = plan_of({path: array.shape for path, array in arrays.items()})
    for path, parts in plan.items():
        for piece in parts:
            lead = len(piece.start) - len(piece.shape)
            inside = tuple(
                slice(begin, begin + size)
                for begin, size in zip(piece.start[lead:], piece.shape)
            )
            tensor = dense(arrays[path][piece.start[:lead]])
            yield piece.name, np.asarray(tensor[inside])
