"""Adjusted logits of a round: of the rows that are verified, and of drafts.

A row stands at the position of its own token and has the logits of the next one. What
comes before it is the slot's committed text and, behind the anchor, the drafts up to
the row's own. So every row's logits are those that plain decoding would adjust there,
and whatever is made of them is exact under speculation.

What the committed text amounts to is worked out once a round for every token of the
vocabulary (`Adjuster.terms`, from the token buffer alone: nothing needs undoing where
drafts are rejected). Drafts change it for the few tokens that were drafted, whose
logits are adjusted again.
"""

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxspark.decoding.adjustment_arrays import Adjustments, Penalties, unpacked
from jaxspark.models import FlatTokens
from jaxspark.parallel import vocabulary
from jaxspark.parallel.axes import MODEL, size
from jaxspark.settings import standard_settings


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Terms:
    """What the committed text of slots means for each token; None has no meaning.

    Attributes:
      bias_BV: added; -inf for tokens that are not allowed.
      stops_BV: stop ids.
      counts_BV: times that it is in the output.
      seen_BV: whether it is in prompt or output.
    """

    bias_BV: Float[Array, "B V"] | None = None
    stops_BV: Bool[Array, "B V"] | None = None
    counts_BV: Int[Array, "B V"] | None = None
    seen_BV: Bool[Array, "B V"] | None = None


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Adjuster:
    """Adjusts logits of one round.

    Attributes:
      adjustments: what the slots want.
      any_asks: whether one that takes part wants anything; otherwise logits stay as
        they are, at no cost.
      tokens_BS: committed tokens.
      anchors_B: positions of the anchors.
      terms: of the committed tokens.
    """

    adjustments: Adjustments
    any_asks: Bool[Array, ""]
    tokens_BS: Int[Array, "B S"]
    anchors_B: Int[Array, " B"]
    terms: Terms

    @classmethod
    @standard_settings()
    def of(
        cls,
        adjustments: Adjustments | None,
        *,
        tokens_BS: Int[Array, "B S"],
        anchors_B: Int[Array, " B"],
        stop_ids_BX: Int[Array, "B X"],
        live_B: Bool[Array, " B"],
    ) -> "Adjuster | None":
        """For a round of these slots; None where nothing is compiled."""
        if adjustments is None:
            return None
        any_asks = jnp.any(adjustments.asks_B & live_B)

        def terms() -> Terms:
            return _terms(adjustments, tokens_BS, anchors_B, stop_ids_BX)

        def nothing() -> Terms:
            shapes = jax.eval_shape(terms)
            return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

        return cls(
            adjustments=adjustments,
            any_asks=any_asks,
            tokens_BS=tokens_BS,
            anchors_B=anchors_B,
            terms=jax.lax.cond(any_asks, terms, nothing),
        )

    def rows(
        self,
        logits_TV: Float[Array, "T V"],
        tokens: FlatTokens,
        drafts_BG: Int[Array, "B G"],
    ) -> Float[Array, "T V"]:
        """Logits of verified rows, anchors and drafts."""

        def adjusted(logits_TV):
            slots_T, positions_T = tokens.slots_T, tokens.positions_T
            terms = jax.tree.map(lambda x_BV: x_BV[slots_T], self.terms)
            z_TV = self._apply(logits_TV, terms, slots_T, positions_T)
            if drafts_BG.shape[1] and self.adjustments.penalties is not None:
                z_TV = self._counting_drafts(z_TV, logits_TV, tokens, drafts_BG)
            if self.adjustments.bad_words_BWX.size:
                z_TV = self._without_bad_words(z_TV, tokens, drafts_BG)
            return z_TV

        return jax.lax.cond(self.any_asks, adjusted, lambda x: x, logits_TV)

    def drafts(
        self,
        logits_BW: Float[Array, "B W"],
        j: Int[Array, "*B"],
        ids_W: Int[Array, " W"] | None,
    ) -> Float[Array, "B W"]:
        """Logits that draft j of every slot is drawn from, over a draft vocabulary.

        One j for all slots, or one for each.

        Adjusted so that more is accepted; what is emitted does not depend on it. The
        drafts before it in its block are not counted, nor is any bad word they begin.
        Where nothing that may be sampled can be drafted, the logits stay.
        """

        def adjusted(logits_BW):
            terms = self.terms
            if ids_W is not None:
                terms = jax.tree.map(
                    lambda x_BV: vocabulary.whole(x_BV)[:, ids_W], terms
                )
            slots_B = jnp.arange(len(logits_BW))
            z_BW = self._apply(logits_BW, terms, slots_B, self.anchors_B + j)
            possible_B1 = vocabulary.maximum(z_BW) > -jnp.inf
            return jnp.where(possible_B1, z_BW, logits_BW)

        return jax.lax.cond(self.any_asks, adjusted, lambda x: x, logits_BW)

    def _apply(self, logits, terms: Terms, slots_R, positions_R):
        """All but bad words, for rows of any choice of tokens; see `adjustments`."""
        own = self.adjustments
        if own.min_tokens_B is not None:
            made_R = positions_R + 1 - own.prompt_lengths_B[slots_R]
            early_R1 = (made_R < own.min_tokens_B[slots_R])[:, None]
            logits = jnp.where(early_R1 & terms.stops_BV, -jnp.inf, logits)
        if terms.bias_BV is not None:
            logits = logits + terms.bias_BV
        counts_BV, seen_BV = terms.counts_BV, terms.seen_BV
        if own.penalties is None or counts_BV is None or seen_BV is None:
            return logits
        at_R1 = jax.tree.map(lambda x_B: x_B[slots_R][:, None], own.penalties)
        return penalized(logits, at_R1, counts_BV, seen_BV)

    def _counting_drafts(self, z_TV, logits_TV, tokens, drafts_BG):
        """With what the drafts up to each row change: logits of the drafted tokens."""
        slots_T, positions_T = tokens.slots_T, tokens.positions_T
        ids_TG, here_TG = self._drafts_before(tokens, drafts_BG)
        row_T1, width = jnp.arange(len(slots_T))[:, None], z_TV.shape[1]
        place_TG = vocabulary.here(ids_TG, width)
        terms = jax.tree.map(
            lambda x_BV: x_BV.at[slots_T[:, None], place_TG].get(mode="clip"),
            self.terms,
        )
        same_TGG = ids_TG[:, :, None] == ids_TG[:, None, :]
        drafted_TG = jnp.sum(same_TGG & here_TG[:, None, :], axis=2)
        terms = replace(
            terms,
            counts_BV=terms.counts_BV + drafted_TG,
            seen_BV=jnp.ones_like(terms.seen_BV),
        )
        logits_TG = logits_TV.at[row_T1, place_TG].get(mode="clip")
        again_TG = self._apply(logits_TG, terms, slots_T, positions_T)
        place_TG = jnp.where(here_TG, place_TG, width)
        return z_TV.at[row_T1, place_TG].set(again_TG, mode="drop")

    def _drafts_before(self, tokens, drafts_BG):
        """Drafts of each row's slot, and which of them are not behind it."""
        G = drafts_BG.shape[1]
        place_TG = self.anchors_B[tokens.slots_T][:, None] + 1 + jnp.arange(G)
        return drafts_BG[tokens.slots_T], place_TG <= tokens.positions_T[:, None]

    def _without_bad_words(self, z_TV, tokens, drafts_BG):
        """Without the last tokens of bad words whose others were just put out."""
        own, slots_T = self.adjustments, tokens.slots_T
        words_TWX = own.bad_words_BWX[slots_T]
        back_X = jnp.arange(words_TWX.shape[2] - 2, -1, -1)
        place_TX = tokens.positions_T[:, None] - back_X
        newest_TX = self._text(place_TX, slots_T, drafts_BG)
        inside_TX = place_TX >= own.prompt_lengths_B[slots_T][:, None]
        newest_TX = jnp.where(inside_TX, newest_TX, -2)
        before_TWX = words_TWX[:, :, :-1]
        matches_TWX = (before_TWX == newest_TX[:, None]) | (before_TWX < 0)
        last_TW = jnp.where(jnp.all(matches_TWX, axis=2), words_TWX[:, :, -1], -1)
        place_TW = vocabulary.here(last_TW, z_TV.shape[1])
        row_T1 = jnp.arange(len(slots_T))[:, None]
        return z_TV.at[row_T1, place_TW].set(-jnp.inf, mode="drop")

    def _text(self, place_TX, slots_T, drafts_BG):
        """Tokens at positions of rows' slots, drafts behind the anchors."""
        slot_T1 = slots_T[:, None]
        text_TX = self.tokens_BS.at[slot_T1, place_TX].get(mode="clip")
        if not drafts_BG.shape[1]:
            return text_TX
        behind_TX = place_TX - self.anchors_B[slots_T][:, None] - 1
        drafts_TX = drafts_BG.at[slot_T1, behind_TX].get(mode="clip")
        return jnp.where(behind_TX >= 0, drafts_TX, text_TX)


def penalized(
    logits: Float[Array, "R V"],
    penalties: Penalties,
    counts: Int[Array, "R V"],
    seen: Bool[Array, "R V"],
) -> Float[Array, "R V"]:
    """Repetition, then frequency and presence penalties.

    Args:
      logits: of rows.
      penalties: of each, [R, 1].
      counts: times that tokens are in the output.
      seen: whether they are in prompt or output.
    """
    r = penalties.repetition_B
    repeated = jnp.where(logits > 0, logits / r, logits * r)
    logits = jnp.where(seen, repeated, logits)
    logits = logits - penalties.frequency_B * counts
    return logits - jnp.where(counts > 0, penalties.presence_B, 0.0)


def _terms(adjustments: Adjustments, tokens_BS, anchors_B, stop_ids_BX) -> Terms:
    """Over this shard's part of the vocabulary."""
    vocab = adjustments.vocab
    slots, width = len(anchors_B), vocab // size(MODEL)
    slot_B1 = jnp.arange(slots)[:, None]

    def spread(ids_BX, values, start, *, add=False):
        at = start.at[slot_B1, vocabulary.here(ids_BX, width)]
        return at.add(values, mode="drop") if add else at.set(values, mode="drop")

    def nothing(dtype):
        return jnp.zeros((slots, width), dtype)

    terms: dict[str, Array] = {}
    if adjustments.bias_ids_BX.size or adjustments.allowed_BU.size:
        ids_BX, bias_BX = adjustments.bias_ids_BX, adjustments.bias_BX
        terms["bias_BV"] = spread(ids_BX, bias_BX, nothing(jnp.float32))
    if adjustments.allowed_BU.size:
        allowed_BV = vocabulary.part(unpacked(adjustments.allowed_BU, vocab))
        terms["bias_BV"] = jnp.where(allowed_BV, terms["bias_BV"], -jnp.inf)
    if adjustments.min_tokens_B is not None:
        terms["stops_BV"] = spread(stop_ids_BX, True, nothing(bool))
    if adjustments.penalties is not None:
        place_S = jnp.arange(tokens_BS.shape[1])
        known_BS = place_S <= anchors_B[:, None]
        put_out_BS = known_BS & (place_S >= adjustments.prompt_lengths_B[:, None])
        known_BS = jnp.where(known_BS, tokens_BS, -1)
        put_out_BS = jnp.where(put_out_BS, tokens_BS, -1)
        terms["seen_BV"] = spread(known_BS, True, nothing(bool))
        terms["counts_BV"] = spread(put_out_BS, 1, nothing(jnp.int32), add=True)
    return Terms(**terms)
