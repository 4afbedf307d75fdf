"""Exactness audits: does speculation change a single token?

A run with a drafter is compared with plain one-token-at-a-time decoding of the same
requests. Products with 8 rows round differently from products with 1, so where two
outputs part, the position decides: if the two best (perturbed) log-probabilities there
are closer than `NEAR_TIE`, rounding chose and it is a *near-tie*; otherwise the
difference is a *violation*. After the first difference texts diverge; nothing later
counts.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from jaxspark.decoding import AdjustmentLimits, DecodeOptions, Sampling
from jaxspark.decoding.sampling import position_noise, warp
from jaxspark.drafters import Drafter
from jaxspark.exactness.by_definition import (
    adjusted_by_definition,
    masked_by_definition,
)
from jaxspark.generation import Completion, Request, generate
from jaxspark.generation.adjusting import adjustment_of
from jaxspark.generation.request import token_ids
from jaxspark.grammars import GrammarError, matcher_of
from jaxspark.grammars.matcher import listed
from jaxspark.models import FlatTokens
from jaxspark.settings import standard_settings
from jaxspark.target import Target

NEAR_TIE = 1e-4


@dataclass(frozen=True, kw_only=True)
class Difference:
    """The first place where two outputs part.

    Attributes:
      request: whose output.
      index: output position (0 is the first new token).
      expected: the token of plain decoding, None past its end.
      seen: the token under audit, None past its end.
      margin: gap of the two best (perturbed) log-probabilities there, in nats.
      best: those two tokens.
    """

    request: Request
    index: int
    expected: int | None
    seen: int | None
    margin: float
    best: tuple[int, int]

    @property
    def near_tie(self) -> bool:
        """Whether rounding, not the decoder, chose between the two best tokens."""
        chosen = {self.expected, self.seen}
        return self.margin < NEAR_TIE and chosen == set(self.best)

    def __str__(self) -> str:
        kind = "near-tie" if self.near_tie else "VIOLATION"
        return (
            f"{kind} {self.request.name} at output token {self.index}: plain "
            f"{self.expected}, speculative {self.seen}, margin {self.margin:.2e}"
        )


@dataclass(kw_only=True)
class AuditResult:
    """What an audit saw; results add up with `+=`."""

    outputs: int = 0
    tokens: int = 0
    rounds: int = 0
    differences: list[Difference] = field(default_factory=list)

    @property
    def violations(self) -> list[Difference]:
        """Differences that rounding does not explain."""
        return [each for each in self.differences if not each.near_tie]

    @property
    def near_ties(self) -> list[Difference]:
        """Differences that rounding explains."""
        return [each for each in self.differences if each.near_tie]

    def __iadd__(self, other: "AuditResult") -> "AuditResult":
        self.outputs += other.outputs
        self.tokens += other.tokens
        self.rounds += other.rounds
        self.differences += other.differences
        return self


def plain_outputs(target, requests: Sequence[Request], **options) -> list[list[int]]:
    """Tokens of plain decoding, one request and one row at a time: the yardstick.

    `options` are those of `decode_requests`.
    """
    return [
        decode_requests(target, [request], **options)[0].tokens for request in requests
    ]


def decode_requests(
    target,
    requests: Sequence[Request],
    drafter: Drafter | None = None,
    *,
    capacity: int | None = None,
    adjustments: AdjustmentLimits | None = None,
    **options,
) -> list[Completion]:
    """Decodes requests together, one slot each; `options` are `DecodeOptions`."""
    return generate(
        target,
        requests,
        drafter,
        options=DecodeOptions(**options),
        capacity=capacity,
        adjustments=adjustments,
    )


def audit(
    target,
    requests: Sequence[Request],
    expected: Sequence[Sequence[int]],
    seen: Sequence[Completion],
) -> AuditResult:
    """Compares outputs with the tokens of plain decoding, request by request."""
    result = AuditResult()
    for request, plain, other in zip(requests, expected, seen, strict=True):
        result.outputs += 1
        result.tokens += len(other.tokens)
        result.rounds += other.rounds
        index = first_difference(plain, other.tokens)
        if index is None:
            continue
        prefix = [*request.prompt, *plain[:index]]
        gap, best = margin(target, prefix, request)
        result.differences.append(
            Difference(
                request=request,
                index=index,
                expected=_at(plain, index),
                seen=_at(other.tokens, index),
                margin=gap,
                best=best,
            )
        )
    return result


def first_difference(a: Sequence[int], b: Sequence[int]) -> int | None:
    """Index of the first place where two outputs differ, a missing end included."""
    for index, (x, y) in enumerate(zip(a, b)):
        if x != y:
            return index
    return None if len(a) == len(b) else min(len(a), len(b))


def _at(tokens: Sequence[int], index: int) -> int | None:
    return tokens[index] if index < len(tokens) else None


@standard_settings()
def margin(
    target, prefix: Sequence[int], request: Request
) -> tuple[float, tuple[int, int]]:
    """The two best choices for the token after `prefix`, and their gap in nats.

    Greedy requests compare log-probabilities, sampled ones log-probabilities plus the
    position's Gumbel noise; both of logits that are adjusted by definition.
    """
    [choice] = choices(target, prefix, request, len(prefix))
    return choice


@standard_settings()
def choices(
    target, tokens: Sequence[int], request: Request, begin: int
) -> list[tuple[float, tuple[int, int]]]:
    """`margin` after the first `begin` of the tokens, and after every further one."""
    target, params = Target.of(target), request.params
    # Widths in steps, so that few programs are compiled.
    width = -(-len(tokens) // 128) * 128
    ids_1T = np.zeros((1, width), np.int32)
    ids_1T[0, : len(tokens)] = tokens
    sampling = Sampling.of(
        1,
        temperature=params.temperature,
        top_k=params.top_k,
        top_p=params.top_p,
        min_p=params.min_p,
        # Where none is given nothing is drawn.
        seed=params.seed or 0,
    )
    stop_ids = target.stop_ids if params.stop_ids is None else params.stop_ids
    adjustment = adjustment_of(params, target, stop_ids)
    lengths = range(begin, len(tokens) + 1)
    count = 1 if len(lengths) == 1 else -(-len(lengths) // 32) * 32
    logits_QV = _logits(target.model, jnp.asarray(ids_1T), begin - 1, count)
    found, prompt = [], token_ids(target, request.prompt)
    matcher = None
    if params.grammar is not None:
        vocab = target.model.config.vocab_size
        matcher = matcher_of(
            params.grammar, target.tokenizer, vocab=vocab, stop_ids=stop_ids
        )
    for length, logits_V in zip(lengths, np.asarray(logits_QV)):
        output = list(tokens[len(prompt) : length])
        own_V = logits_V
        if adjustment.asks:
            logits_V = adjusted_by_definition(
                logits_V, prompt, output, adjustment, stop_ids
            )
        if matcher is not None and not set(output) & set(stop_ids):
            try:
                matcher.advance(output[matcher.taken :])
                allowed = listed(matcher.mask())
            except GrammarError:
                matcher = None  # What follows comes behind a difference.
            else:
                logits_V = masked_by_definition(logits_V, own_V, allowed)
        (first, second), (a, b) = jax.device_get(
            _two_best(jnp.array(logits_V[None], jnp.float32), length, sampling)
        )
        found.append((float(first - second), (int(a), int(b))))
    return found


@partial(jax.jit, static_argnames=("count",))
def _logits(model, ids_1T, first, count: int):
    """Of so many rows."""
    width = ids_1T.shape[1]
    tokens = FlatTokens.from_rows(
        ids_1T, jnp.zeros((1,), jnp.int32), jnp.array([width])
    )
    x_TD, _, _ = model(tokens, model.init_cache(1, width))
    return model.logits(x_TD.at[first + jnp.arange(count)].get(mode="clip"))


@jax.jit
def _two_best(logits_1V, position, sampling):
    ids_V = jnp.arange(logits_1V.shape[-1])
    noise_1V = position_noise(sampling.seed, position[None], ids_V)
    sampled_1V = warp(logits_1V, sampling) + noise_1V
    greedy_1V = jax.nn.log_softmax(logits_1V)
    score_1V = jnp.where(sampling.greedy[:, None], greedy_1V, sampled_1V)
    return jax.lax.top_k(score_1V[0], 2)
