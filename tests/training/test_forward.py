"""Training drafts as decoding does, and packed documents do not see each other."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxspark.drafters import DraftContext
from jaxspark.models import FlatTokens
from jaxspark.training import forward, forward_dspark, forward_eagle3
from jaxspark.training.blocks import Blocks, sample_blocks
from jaxspark.training.forward import DraftVocabulary
from jaxspark.training.objective import Objective
from jaxspark.training.trainer import FORWARDS, is_trained
from tests import zoo
from tests.driver import Sampler, Session
from tests.training import made

G = 4
ALL = Objective(ce=0.3, l1=0.9, confidence=1.0, soft_ce=0.5)


def spied(monkeypatch):
    """Keeps the arguments of `objective_sums`."""
    seen = {}

    def objective_sums(*arguments):
        names = ("", "vocabulary", "features", "blocks", "hidden", "confidence")
        seen.update(zip((*names, "latent", "w2"), arguments))
        return original(*arguments)

    original = forward.objective_sums
    monkeypatch.setattr(forward_dspark, "objective_sums", objective_sums)
    monkeypatch.setattr(forward_eagle3, "objective_sums", objective_sums)
    return seen


@jax.jit
def drafted(drafter, model, taps_TmD, ids_1L):
    """A block behind as many tokens as there are taps, fed the truth."""
    anchor, start = len(taps_TmD), jnp.zeros((1,), jnp.int32)
    tokens = FlatTokens.from_rows(ids_1L[:, :anchor], start, start + anchor)
    cache = drafter.observe(drafter.init_cache(1, 48), taps_TmD, tokens)

    def draw(logits_BW, j, ids_W):
        return ids_1L[:, anchor + 1 + j], logits_BW, logits_BW[:, 0]

    context = DraftContext.of(ids_1L, start + anchor + 1)
    return drafter.propose(model, cache, context, Sampler(draw), G)[0]


@pytest.mark.parametrize("kind", (*zoo.NEURAL, zoo.SPECULATORS))
def test_training_drafts_what_decoding_drafts(kind, monkeypatch):
    """Logits and confidences of a block equal those of `propose`, fed the truth."""
    model, batch = zoo.target(), made.packed(20, 25)
    drafter = zoo.drafter(kind, model)
    features = made.features(model, drafter, batch)
    document, anchor = 1, 11
    begin = int(np.argmax(batch.documents_PS[0] == document))
    ids_L = batch.ids_PS[0][batch.documents_PS[0] == document]
    place_G = begin + anchor + np.arange(G)
    blocks = Blocks(
        anchors_PA=jnp.array([[begin + anchor]]),
        previous_PAG=jnp.asarray(batch.ids_PS[:, None, place_G]),
        labels_PAG=jnp.asarray(batch.ids_PS[:, None, place_G + 1]),
        valid_PAG=jnp.ones((1, 1, G), bool),
    )
    vocabulary = DraftVocabulary.of(drafter, model)
    spy = spied(monkeypatch)

    @jax.jit
    def says():
        forward_pass = FORWARDS[type(drafter)]
        forward_pass(drafter, model, batch, features, blocks, vocabulary, ALL)
        return {
            name: spy.get(name) for name in ("hidden", "confidence", "latent", "w2")
        }

    seen = says()
    logits_GW = seen["hidden"][:, 0] @ vocabulary.head_WD.T
    if seen["latent"] is not None:
        logits_GW += seen["latent"][:, 0] @ seen["w2"].T
    target_GND, log_z_GN = forward.target_rows(features, blocks)
    log_p_GW = target_GND[:, 0] @ vocabulary.head_WD.T - log_z_GN

    session = Session(model, 1, 48, taps=drafter.taps)
    [logits_LV], [taps_mLD] = session.feed([ids_L])
    taps_TmD = taps_mLD[:, :anchor].swapaxes(0, 1)
    proposal = drafted(drafter, model, taps_TmD, ids_L[None])
    np.testing.assert_allclose(logits_GW, proposal.q.log_q_BGW[0], atol=2e-4)
    np.testing.assert_allclose(
        seen["confidence"][:, 0], proposal.confidence_BG[0], atol=2e-4
    )

    # The target's distribution of each row is that of its own forward pass.
    log_p_TV = jax.nn.log_softmax(logits_LV)[anchor : anchor + G]
    ids_W = slice(None) if drafter.draft_ids is None else drafter.draft_ids[...]
    np.testing.assert_allclose(log_p_GW, log_p_TV[:, ids_W], atol=2e-4)


def gradient_and_sums(drafter, model, batch, blocks):
    features = made.features(model, drafter, batch)
    return _gradient_and_sums(drafter, model, batch, features, blocks)


@jax.jit
def _gradient_and_sums(drafter, model, batch, features, blocks):
    graphdef, trained, frozen = nnx.split(drafter, is_trained, ...)

    @partial(jax.grad, has_aux=True)
    def gradient(trained):
        merged = nnx.merge(graphdef, trained, frozen)
        sums = FORWARDS[type(drafter)](
            merged,
            model,
            batch,
            features,
            blocks,
            DraftVocabulary.of(merged, model),
            ALL,
        )
        return sums.numerator, sums

    return gradient(trained)


@pytest.mark.parametrize("kind", ["dspark-rnn", "dspark-pruned", "eagle3"])
def test_packed_and_unpacked_documents_give_equal_gradients(kind):
    model = zoo.target()
    drafter = zoo.drafter(kind, model)
    together = made.packed(14, 20, 11)
    alone = [made.packed(n, seed=i) for i, n in enumerate((14, 20, 11))]
    draftable_V = DraftVocabulary.of(drafter, model).draftable_V

    def blocks(batch):
        """All of them: as many anchors as places."""
        return sample_blocks(
            jax.random.key(0),
            batch,
            anchors=made.LENGTH,
            block_length=G,
            draftable_V=draftable_V,
        )

    whole = gradient_and_sums(drafter, model, together, blocks(together))
    parts = [gradient_and_sums(drafter, model, batch, blocks(batch)) for batch in alone]
    total = jax.tree.map(lambda *each: sum(each), *parts)
    made.close(whole, total)
    assert float(total[1].rows_G[0]) > 20


def test_another_document_changes_nothing():
    model = zoo.target()
    drafter = zoo.drafter("dspark-gated", model)
    sums = []
    for seed in (0, 9):
        batch = made.packed(14, 20)
        mine = batch.documents_PS == 0
        other = made.packed(14, 20, seed=seed)
        np.copyto(other.ids_PS, batch.ids_PS, where=mine)
        np.copyto(other.trainable_PS, False, where=~mine)
        blocks = sample_blocks(jax.random.key(0), other, anchors=8, block_length=G)
        sums.append(gradient_and_sums(drafter, model, other, blocks)[1])
    made.close(sums[0], sums[1], atol=1e-6)


def test_anchors_are_answer_tokens_followed_by_answer_tokens():
    batch = made.packed(14, 20, 11)
    blocks = sample_blocks(jax.random.key(3), batch, anchors=40, block_length=G)
    used = np.asarray(blocks.valid_PAG[0, :, 0])
    places = np.asarray(blocks.anchors_PA[0])[used]
    trainable, documents = batch.trainable_PS[0], batch.documents_PS[0]
    candidates = [
        s
        for s in range(47)
        if trainable[s] and trainable[s + 1] and documents[s] == documents[s + 1]
    ]
    assert sorted(places.tolist()) == candidates
    for place, valid in zip(np.asarray(blocks.anchors_PA[0]), blocks.valid_PAG[0]):
        inside = documents[place + 1 : place + 1 + G] == documents[place]
        if place in candidates:
            assert int(valid.sum()) == int(np.cumprod(inside).sum())


def test_nothing_counts_behind_a_token_that_cannot_be_drafted():
    batch = made.packed(40)
    draftable_V = jnp.ones((zoo.VOCAB,), bool).at[batch.ids_PS[0, 20]].set(False)
    blocks = sample_blocks(
        jax.random.key(0), batch, anchors=48, block_length=G, draftable_V=draftable_V
    )
    at = np.flatnonzero(np.asarray(blocks.anchors_PA[0]) == 18)[0]
    assert blocks.valid_PAG[0, at].tolist() == [True, True, False, False]
