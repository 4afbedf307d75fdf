"""The table of rules: every leaf there is has exactly one, and divides."""

from functools import partial

import jax
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import PartitionSpec

from jaxspark.configs import drafters as draft_configs
from jaxspark.configs.targets import deepseek_v4_flash, deepseek_v4_pro
from jaxspark.decoding import DecodeState
from jaxspark.drafters import DeepSeekV4DSpark, PlainDrafter, hybrid
from jaxspark.exactness.tiny_models import DRAFTERS, FAMILIES, tiny_models
from jaxspark.models import DeepSeekV4
from jaxspark.parallel.axes import EXPERTS, MODEL, SLOTS
from jaxspark.parallel.mesh import check_mesh, make_mesh, parse_mesh
from jaxspark.parallel.rules import (
    PARAMETERS,
    parameter_specs,
    path_name,
    rule_for,
    state_specs,
)


def leaves(tree):
    found = jax.tree_util.tree_leaves_with_path(tree)
    return [(path_name(path), leaf) for path, leaf in found]


@pytest.fixture(scope="module", params=FAMILIES)
def models(request):
    return tiny_models(request.param, 8, shards=8)


def test_every_array_has_one_rule_and_every_rule_an_array():
    """Of models, drafters, and what an optimizer remembers of them."""
    used = set()
    for family in FAMILIES:
        target, drafters = tiny_models(family, 8)
        moments = optax.adam(1e-3).init(nnx.split(target)[1])
        for tree in (target, moments, *drafters.values()):
            for path, _ in leaves(tree):
                used.add(rule_for(path))
    unused = [rule.pattern for rule in PARAMETERS if rule not in used]
    # Biases are optional; released models have no other leaves than tiny ones.
    assert all("bias" in pattern for pattern in unused), unused


@pytest.mark.parametrize("preset", [deepseek_v4_flash, deepseek_v4_pro])
def test_released_models_share_out_what_is_large(preset):
    config = preset()
    stages = draft_configs.deepseek_v4_dspark(config)
    for make in (partial(DeepSeekV4, config), partial(DeepSeekV4DSpark, stages)):
        model = nnx.eval_shape(lambda make=make: make(rngs=nnx.Rngs(0)))
        specs = dict(leaves(parameter_specs(model)))
        whole = sum(
            leaf.size for path, leaf in leaves(model) if specs[path] == PartitionSpec()
        )
        total = sum(leaf.size for _, leaf in leaves(model))
        assert whole / total < 0.02


def test_every_array_of_a_state_is_shared_out_by_its_slots(models):
    target, drafters = models
    for drafter in (PlainDrafter(), *drafters.values()):
        state = DecodeState.empty(
            target, drafter, slots=8, capacity=16, block_length=drafter.block_length
        )
        shapes = dict(leaves(state))
        for path, spec in leaves(state_specs(state)):
            [axis] = [i for i, axes in enumerate(spec) if axes == SLOTS]
            assert shapes[path].shape[axis] == 8, path
            rest = [axes for axes in spec if axes not in (SLOTS, None)]
            assert rest == ([MODEL] if "_BKSH" in path else []), path


def test_caches_as_wide_as_released_ones_are_shared_out_by_their_slots():
    """Their rows are cut to lanes."""
    model = nnx.eval_shape(lambda: DeepSeekV4(deepseek_v4_flash(), rngs=nnx.Rngs(0)))
    state = jax.eval_shape(
        lambda: DecodeState.empty(
            model, PlainDrafter(), slots=8, capacity=512, block_length=0
        )
    )
    cut = [spec for path, spec in leaves(state_specs(state)) if "_LBSH" in path]
    assert max(map(len, cut)) == 5
    assert all(spec[1] == SLOTS for spec in cut)


def test_parameters_lie_where_the_rules_say(models):
    target, drafters = models
    mesh = make_mesh("data:2,expert:2,model:2")
    for model in (target, *drafters.values()):
        check_mesh(model, mesh)
        with jax.set_mesh(mesh):
            specs = dict(leaves(parameter_specs(model)))
        for path, leaf in leaves(model):
            for axis, axes in enumerate(specs[path]):
                names = (axes,) if isinstance(axes, str) else axes or ()
                assert leaf.shape[axis] % np.prod([mesh.shape[n] for n in names]) == 0


def test_experts_are_shared_out_over_two_axes():
    spec = rule_for("layers.0.mlp.experts.down_proj").spec((3, 8, 4, 2))
    assert spec == PartitionSpec(None, EXPERTS)


def test_a_parameter_without_a_rule_is_named():
    class Extra(nnx.Module):
        def __init__(self):
            self.surprise = nnx.Param(np.zeros(3))

    with pytest.raises(
        ValueError, match=r"surprise: expected one rule in .* found \[\]"
    ):
        parameter_specs(Extra())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rows:2", "expected sizes of data, expert, model.* got 'rows:2'"),
        ("data:2,data:2", "each at most once"),
        ("data:0", "data must be at least 1, got '0'"),
        ("data:two", "data must be at least 1, got 'two'"),
        ("data:3", "has 3 shards, there are 8 devices"),
    ],
)
def test_impossible_meshes_are_named(text, message):
    with pytest.raises(ValueError, match=message):
        make_mesh(text)


def test_axes_that_are_not_named_have_one_shard():
    assert parse_mesh("expert:4") == {"data": 1, "expert": 4, "model": 1}


@pytest.mark.parametrize(
    ("family", "mesh", "message"),
    [
        ("deepseek_v4", "expert:8", "4 experts cannot be .* expert 8 x model 1"),
        ("dense", "data:4,model:2", "1 key/value heads cannot be .* over model 2"),
        ("dense", "model:8", "2 attention heads cannot be .* over model 8"),
    ],
)
def test_what_cannot_be_shared_out_is_named(family, mesh, message):
    target, drafters = tiny_models(family, 8)
    mesh = make_mesh(mesh)
    with pytest.raises(ValueError, match=message):
        check_mesh(target, mesh)
    name = "eagle3" if family == "dense" else "mtp"
    assert name in DRAFTERS[family]
    beside = hybrid(drafters["ngram"], drafters[name])
    for drafter in (drafters[name], beside):
        with pytest.raises(ValueError, match=message):
            check_mesh(drafter, mesh)
