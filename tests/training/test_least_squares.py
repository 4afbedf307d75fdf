"""A drafter fitted by least squares starts better than one at random."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxspark.models import DenseDecoder
from jaxspark.training import least_squares
from jaxspark.training.blocks import sample_blocks
from jaxspark.training.config import TrainConfig
from jaxspark.training.least_squares import View
from jaxspark.training.objective import summary
from jaxspark.training.regression import Regression, cholesky, low_rank
from jaxspark.training.trainer import Trainer
from tests import zoo
from tests.training import made

G = 4


def figures(drafter, model, batch, features):
    """What the objective says of a drafter."""
    config = TrainConfig(steps=1, anchors=12, block_length=G)
    trainer, state = Trainer.create(drafter, model, config)
    sums = trainer.evaluate(state, batch, features)
    return summary(jax.device_get(sums), config.objective)


@pytest.fixture(scope="module")
def model():
    """A target."""
    return zoo.target()


@pytest.mark.parametrize("kind", ["dspark-rnn", "dspark-pruned", "dflash-masks"])
def test_a_fitted_drafter_agrees_more(model, kind):
    """On sequences that the fit has not seen."""
    drafter = zoo.drafter(kind, model)
    unseen = made.packed(*[20, 25] * 8, seed=1000)
    features = made.features(model, drafter, unseen)
    before = figures(drafter, model, unseen, features)
    batches = [made.packed(*[20, 25] * 8, seed=100 * i) for i in range(1, 9)]
    stages = []
    least_squares.fit(
        drafter,
        model,
        batches,
        lambda batch: made.features(model, drafter, batch),
        block_length=G,
        anchors=12,
        on_stage=stages.append,
    )
    after = figures(drafter, model, unseen, features)
    assert after["l1"] < before["l1"] and after["ce"] < before["ce"]
    assert len(stages) == 2 + 4 * len(drafter.layers)
    for leaf in jax.tree.leaves(nnx.state(drafter)):
        assert np.isfinite(leaf).all()


def test_heads_look_where_they_are_aimed():
    """The first of a group at the newest context row."""
    # Wide heads: narrow ones have too few frequencies.
    config = replace(zoo.TARGETS["qwen3"], head_dim=64)
    model = DenseDecoder(config, rngs=nnx.Rngs(0))
    # A direction that all embeddings share, as trained ones do.
    table_VD = model.embed_tokens.weight
    table_VD[...] = table_VD[...].at[:, 0].add(4 * float(jnp.abs(table_VD[...]).max()))
    drafter = zoo.drafter("dspark-vanilla", model)
    batch = made.packed(30, 15, 40, seed=3)
    features = made.features(model, drafter, batch)
    least_squares.fit(
        drafter, model, [batch], lambda batch: features, block_length=G, anchors=8
    )
    blocks = sample_blocks(jax.random.key(1), batch, anchors=8, block_length=G)
    view = View(drafter, model, batch, features, blocks)
    attention = drafter.layers[0].self_attn
    inputs = view.inputs
    normed_RD = drafter.layers[0].input_layernorm(inputs.x_RD)
    q_RNH = attention.queries(normed_RD, inputs.block_rotation)
    k_TKH, _ = attention.keys_values(inputs.context_TD, inputs.context_rotation)
    S = batch.ids_PS.shape[1]
    scores_RT = np.asarray(jnp.einsum("rh,th->rt", q_RNH[:, 0], k_TKH[:, 0]))
    Q = len(inputs.seen_QQ)
    hits = total = 0
    for index, anchor in enumerate(np.asarray(blocks.anchors_PA).ravel()):
        sequence = index // blocks.anchors_PA.shape[1]
        seen_S = np.asarray(inputs.seen_PAS).reshape(-1, S)[index]
        if not (seen_S.any() and blocks.valid_PAG.reshape(-1, G)[index, 0]):
            continue
        rows = scores_RT[index * Q : (index + 1) * Q, sequence * S :][:, :S]
        hits += (np.where(seen_S, rows, -np.inf).argmax(1) == anchor - 1).sum()
        total += Q
    assert total and hits / total > 0.9


def test_regression_is_ridge_regression():
    """Batches add up to the closed form over all rows."""
    rng = np.random.default_rng(0)
    x_RI, w_OI = rng.normal(size=(200, 5)), rng.normal(size=(3, 5))
    y_RO, weight_R = x_RI @ w_OI.T, rng.uniform(size=200)
    regression = Regression()
    for part in np.array_split(np.arange(200), 3):
        regression.add(*(a[part].astype("f4") for a in (x_RI, y_RO, weight_R)))
    np.testing.assert_allclose(regression.solve(0.0), w_OI, atol=1e-4)
    assert np.abs(regression.solve(10.0)).sum() < 0.5 * np.abs(w_OI).sum()


def test_low_rank_is_the_best_of_its_rank():
    """Its error in the logits is what the singular values left out say."""
    rng = np.random.default_rng(1)
    x_IR, w_OI = rng.normal(size=(6, 300)), rng.normal(size=(6, 6))
    metric_OO = np.linalg.cholesky(np.cov(rng.normal(size=(6, 20))) + np.eye(6))
    regression = Regression(x_IR @ x_IR.T, x_IR @ (w_OI @ x_IR).T)
    whole = regression.solve(1e-2)

    def error(map_OI):
        return np.square(metric_OO.T @ (map_OI - whole) @ x_IR).sum()

    left, right = low_rank(regression, metric_OO, 6)
    assert error(left @ right.T) < 1e-6 * error(0 * whole)
    left, right = low_rank(regression, metric_OO, 2)
    values = np.linalg.svd(metric_OO.T @ whole @ x_IR, compute_uv=False)
    np.testing.assert_allclose(
        error(left @ right.T), np.square(values[2:]).sum(), rtol=1e-3
    )


def test_fading_falls_over_its_reach():
    """The nearest place scores most, from wherever in a block one looks."""
    frequencies = 1e4 ** (-np.arange(28) / 32)
    for places in (1, 7, 15):
        weights = least_squares.fading(frequencies, places)
        score = np.cos(np.outer(np.arange(500), frequencies)) @ weights
        assert score[0] == pytest.approx(1)
        for place in range(1, places + 1):
            assert score[place] > score[place + 1 :].max() + 0.02


def test_too_few_rows_are_named_with_the_way_out():
    with pytest.raises(ValueError, match="too few positions to fit 3 inputs.*--init"):
        cholesky(np.diag([1.0, 1.0, -1.0]), 1e-6)
