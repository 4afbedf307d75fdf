"""Target features: the same from the cache, bounded, refused when damaged."""

from dataclasses import replace

import jax
import numpy as np
import pytest
from flax import nnx

from jaxspark.configs.targets import deepseek_v4_tiny
from jaxspark.models import DeepSeekV4, FlatTokens
from jaxspark.training import drafter_setup
from jaxspark.training.config import TrainConfig
from jaxspark.training.feature_cache import FeatureCache
from jaxspark.training.features import FeatureSource, target_features
from jaxspark.training.objective import Objective
from jaxspark.training.trainer import Trainer
from tests import zoo
from tests.training import made

TAPS = (0, 1)
CONFIG = TrainConfig(steps=1, sequences=2, anchors=8, block_length=4)


def source(folder, packed, *, taps=TAPS, layers=TAPS, limit=10**8, model=None):
    model = zoo.target() if model is None else model
    cache = FeatureCache(folder, model, packed, layers=layers, limit_bytes=limit)
    return FeatureSource(model, taps, cache)


@pytest.fixture
def packed():
    return made.packed(20, 25, 40, 33)


def v4():
    """A DeepSeek-V4 of layers with and without entries."""
    config = replace(
        deepseek_v4_tiny(zoo.VOCAB), compress_ratios=(0, 4, 4), hc_sinkhorn_iters=2
    )
    return DeepSeekV4(config, rngs=nnx.Rngs(0))


@pytest.mark.parametrize(
    "target", [zoo.target, pytest.param(v4, marks=pytest.mark.long)]
)
def test_features_are_those_of_each_document_alone(packed, target):
    model = target()
    features = FeatureSource(model, TAPS)(packed)
    documents = ((0, 0), (0, 1), (1, 0)) if target is zoo.target else ((0, 1),)
    forward = jax.jit(lambda model, tokens, cache: model(tokens, cache, taps=TAPS))
    for row, number in documents:
        mine = packed.documents_PS[row] == number
        ids_1Q = packed.ids_PS[row][mine][None]
        count = ids_1Q.shape[1]
        tokens = FlatTokens.from_rows(
            jax.numpy.asarray(ids_1Q), jax.numpy.zeros(1, int), jax.numpy.array([count])
        )
        x_TD, taps_TmD, _ = forward(model, tokens, model.init_cache(1, count))
        seen = np.asarray(features.taps_PSmD)[row][mine]
        np.testing.assert_allclose(seen, taps_TmD, atol=2e-4)
        log_z = jax.nn.logsumexp(model.logits(x_TD), axis=-1)
        np.testing.assert_allclose(features.log_z_PS[row][mine], log_z, atol=2e-4)


def test_a_drafter_is_trained_for_any_target(packed):
    """The loss of one batch falls, also for a target whose layers are no dense ones."""
    model = v4()
    options = drafter_setup.DrafterOptions(depth=1, rank=8, block_length=4, taps=TAPS)
    drafter, _ = drafter_setup.new_drafter(options, model, packed, seed=0)
    trainer, state = Trainer.create(drafter, model, replace(CONFIG, steps=9))
    batch = [(packed, target_features(model, packed, taps=TAPS))]
    losses = []
    for _ in range(5):
        state, sums = trainer.step(state, batch)
        losses.append(float(sums.numerator / sums.weight))
    assert losses[-1] < losses[0]


def test_a_start_from_dense_layers_wants_a_dense_target(packed):
    options = drafter_setup.DrafterOptions(init="target", taps=TAPS)
    with pytest.raises(ValueError, match="copies of a dense target's.*DeepSeekV4"):
        drafter_setup.new_drafter(options, v4(), packed, seed=0)


def test_noise_has_the_size_that_was_asked_for(packed):
    features = FeatureSource(zoo.target(), TAPS)(packed)
    noisy = features.with_noise(jax.random.key(0), 0.3)
    taps, seen = np.asarray(features.taps_PSmD), np.asarray(noisy.taps_PSmD)
    rms_PSm = np.sqrt(np.mean(np.square(taps), -1))
    relative = (seen - taps) / rms_PSm[..., None]
    np.testing.assert_allclose(relative.std(axis=(0, 1, 3)), 0.3, rtol=0.05)
    assert abs(relative.mean()) < 0.01
    again = features.with_noise(jax.random.key(0), 0.3)
    np.testing.assert_array_equal(again.taps_PSmD, seen)
    np.testing.assert_array_equal(noisy.hidden_PSD, features.hidden_PSD)


def test_noise_is_part_of_training_and_not_of_evaluation(packed):
    model = zoo.target()
    drafter = zoo.drafter("dflash", model)
    features = made.features(model, drafter, packed)
    # All places are anchors: training and evaluation would say the same without noise.
    config = replace(CONFIG, anchors=made.LENGTH)
    evaluated = []
    for noise in (0.0, 0.5):
        noisy = replace(config, feature_noise=noise)
        trainer, state = Trainer.create(drafter, model, noisy)
        evaluated.append(float(trainer.evaluate(state, packed, features).numerator))
    _, sums = trainer.step(state, [(packed, features)])
    assert evaluated[0] == evaluated[1]
    assert abs(float(sums.numerator) - evaluated[0]) > 1e-3 * evaluated[0]
    with pytest.raises(ValueError, match="feature_noise=-1.0: expected at least 0"):
        replace(CONFIG, feature_noise=-1.0)


def test_online_and_cached_features_give_the_same_loss(tmp_path, packed):
    model = zoo.target()
    drafter = zoo.drafter("dspark-rnn", model)
    trainer, state = Trainer.create(drafter, model, CONFIG)
    online = FeatureSource(model, drafter.taps)
    layers = tuple(sorted({*drafter.taps, 0, 1}))
    cached = source(tmp_path, packed, taps=drafter.taps, layers=layers)
    batch = packed[np.array([1, 0])]
    losses = []
    for features in (online(batch), cached(batch), cached(batch)):
        sums = trainer.evaluate(state, batch, features)
        losses.append(float(sums.numerator / sums.weight))
    assert cached.cache.missing == len(packed.index_P) - 2
    np.testing.assert_allclose(losses, losses[0], atol=1e-5)


def test_bfloat16_features_come_back_as_they_were(tmp_path, packed):
    graphdef, params = nnx.split(zoo.target())
    params = jax.tree.map(lambda x: x.astype(jax.numpy.bfloat16), params)
    model = nnx.merge(graphdef, params)
    cached = source(tmp_path, packed, model=model)
    first, again = cached(packed), cached(packed)
    assert first.taps_PSmD.dtype == again.taps_PSmD.dtype == jax.numpy.bfloat16
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_row_may_lie_beyond_two_gigabytes(tmp_path, packed):
    cache = source(tmp_path, packed).cache
    row = np.ones(cache.shape, cache.dtype)
    index = 2**31 // row.nbytes + 1
    cache._put("rows.bin", np.int32(index), row)  # The file is sparse.
    assert (tmp_path / "rows.bin").stat().st_size == (index + 1) * row.nbytes


def test_a_cache_is_found_again_and_may_grow(tmp_path, packed):
    source(tmp_path, packed)(packed)
    assert source(tmp_path, packed).cache.missing == 0
    grown = made.packed(20, 25, 40, 33, 45)
    again = source(tmp_path, grown)
    assert again.cache.missing == 1
    assert again.cache.holds(packed.index_P).all()


def test_only_missing_sequences_are_computed(tmp_path, packed, monkeypatch):
    whole = source(tmp_path / "whole", packed)(packed)
    some = source(tmp_path / "some", packed)
    some(packed[[1]])
    computed = []

    def counting(target, batch, *, taps):
        computed.append(batch.index_P.tolist())
        return target_features(target, batch, taps=taps)

    monkeypatch.setattr("jaxspark.training.features.target_features", counting)
    made.close(some(packed), whole)
    assert computed == [[n] for n in range(len(packed.index_P)) if n != 1]
    made.close(some(packed), whole)
    assert len(computed) == len(packed.index_P) - 1


def test_sequences_beyond_the_limit_are_computed_every_time(tmp_path, packed):
    limit = source(tmp_path / "a", packed).cache.row_bytes * 2
    bounded = source(tmp_path / "b", packed, limit=limit)
    bounded(packed)
    assert (bounded.cache.count, bounded.cache.missing) == (2, 0)
    assert not bounded.cache.holds(packed.index_P).all()
    size = sum(path.stat().st_size for path in (tmp_path / "b").glob("*.bin"))
    assert size <= limit + 8 * 2
    made.close(bounded(packed), source(tmp_path / "a", packed)(packed))


def test_a_damaged_row_is_noticed(tmp_path, packed):
    source(tmp_path, packed)(packed)
    with (tmp_path / "rows.bin").open("r+b") as file:
        file.seek(100)
        file.write(b"\xff\x00\xff")
    with pytest.raises(ValueError, match="features of sequence 0 are corrupt"):
        source(tmp_path, packed)(packed)


def test_a_cut_file_is_noticed(tmp_path, packed):
    source(tmp_path, packed)(packed)
    with (tmp_path / "rows.bin").open("r+b") as file:
        file.truncate(1000)
    with pytest.raises(ValueError, match="has 1000 bytes, expected a multiple of"):
        source(tmp_path, packed)


def test_an_interrupted_row_is_not_believed(tmp_path, packed, monkeypatch):
    first = source(tmp_path, packed)
    monkeypatch.setattr(
        "jaxspark.training.feature_cache._checksum",
        lambda *arrays: (_ for _ in ()).throw(KeyboardInterrupt),
    )
    with pytest.raises(KeyboardInterrupt):
        first(packed)
    monkeypatch.undo()
    assert source(tmp_path, packed).cache.missing == len(packed.index_P)


@pytest.mark.parametrize("what", ["target", "layers"])
def test_features_of_something_else_are_refused(tmp_path, packed, what):
    source(tmp_path, packed)
    with pytest.raises(ValueError, match=f"holds features of another {what}"):
        if what == "target":
            source(tmp_path, packed, model=zoo.target(seed=5))
        else:
            source(tmp_path, packed, layers=(1,), taps=(1,))


def test_accumulated_micro_batches_equal_one_large_batch(packed):
    model = zoo.target()
    drafter = zoo.drafter("dspark-gated", model)
    features = FeatureSource(model, drafter.taps)
    config = replace(CONFIG, anchors=made.LENGTH, objective=Objective())
    states = []
    for parts in ([[0, 1, 2]], [[0], [1], [2]]):
        trainer, state = Trainer.create(drafter, model, config)
        batches = [packed[np.array(rows)] for rows in parts]
        state, sums = trainer.step(state, [(b, features(b)) for b in batches])
        states.append((jax.device_get(state.optimizer), jax.device_get(sums)))
    made.close(states[0], states[1])
