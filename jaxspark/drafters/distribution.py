"""q: the distribution that drafts were drawn from."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxspark.parallel import vocabulary
from jaxspark.parallel.axes import MODEL, largest


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DraftDistribution:
    """What each draft of a block was drawn from; by default the draft was certain.

    Attributes:
      log_q_BGW: log-probabilities over the draft vocabulary; None where all drafts are
        deterministic: each has all the mass of its q.
      ids_W: target ids of the draft vocabulary; None where it is the target's own.
      deterministic_B: slots whose drafts are, whatever log_q says; None for none.
    """

    log_q_BGW: Float[Array, "B G W"] | None = None
    ids_W: Int[Array, " W"] | None = None
    deterministic_B: Bool[Array, " B"] | None = None

    def log_prob(self, drafts_BG: Int[Array, "B G"]) -> Float[Array, "B G"]:
        """log q_j(x_{j+1}) of the drafts."""
        if self.log_q_BGW is None:
            return jnp.zeros(drafts_BG.shape)
        ids_W = self.ids_W
        if ids_W is None:
            ids_W = vocabulary.places(self.log_q_BGW.shape[-1])
        is_draft_BGW = ids_W == drafts_BG[..., None]
        log_q_BG = jnp.max(jnp.where(is_draft_BGW, self.log_q_BGW, -jnp.inf), axis=-1)
        log_q_BG = largest(log_q_BG, MODEL)
        if self.deterministic_B is None:
            return log_q_BG
        return jnp.where(self.deterministic_B[:, None], 0.0, log_q_BG)

    def row(
        self, drafts_BG: Int[Array, "B G"], row_B: Int[Array, " B"], vocab: int
    ) -> Float[Array, "B V"]:
        """q of one draft of each slot over the target's vocabulary.

        Where that is shared out over several shards, over this one's part of `vocab`.
        """
        ids_V = vocabulary.places(vocab)
        row_B1 = jnp.minimum(row_B, drafts_BG.shape[1] - 1)[:, None]
        draft_B1 = jnp.take_along_axis(drafts_BG, row_B1, axis=1)
        point_BV = (ids_V == draft_B1).astype(jnp.float32)
        if self.log_q_BGW is None:
            return point_BV
        log_q_B1W = jnp.take_along_axis(self.log_q_BGW, row_B1[..., None], axis=1)
        q_BV = jnp.exp(log_q_B1W[:, 0])
        if self.ids_W is not None:
            q_BV = over_target(q_BV, self.ids_W, vocab)
        if self.deterministic_B is None:
            return q_BV
        return jnp.where(self.deterministic_B[:, None], point_BV, q_BV)


def over_target(
    q_BW: Float[Array, "B W"], ids_W: Int[Array, " W"], vocab: int
) -> Float[Array, "B V"]:
    """Probabilities of a draft vocabulary over this shard's part of the target's."""
    place_W = vocabulary.whole(ids_W) - vocabulary.first(vocab)
    # Ids of other parts: negative ones would count from the end.
    place_W = jnp.where(place_W < 0, vocab, place_W)
    zeros_BV = jnp.zeros((q_BW.shape[0], vocab))
    return zeros_BV.at[:, place_W].set(vocabulary.whole(q_BW), mode="drop")
