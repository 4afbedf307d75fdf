"""Guarantees 1 to 3 for outputs under grammars, and that what ends obeys.

Plain decoding has one row to mask, a round as many as are verified, and its drafts may
be none that the grammar allows. The law of a round is enumerated under grammars of
three tokens; tokens are compared with plain decoding under random schemas and
expressions.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from jaxspark.decoding import Adjustment, DecodeOptions, Sampling, Scheduler
from jaxspark.decoding.couplings import COUPLINGS, Coupling
from jaxspark.drafters import Drafter
from jaxspark.exactness.audit import AuditResult, audit
from jaxspark.exactness.parameters import LIMITS, PROMPT, VOCAB, enumerated
from jaxspark.exactness.plain_law import sequence_log_probs, target_distribution
from jaxspark.exactness.random_grammars import obeys, random_grammars
from jaxspark.exactness.rejection import Check
from jaxspark.exactness.statistics import chi_square, sample_first_tokens
from jaxspark.exactness.tiny_models import Family, tiny_models
from jaxspark.exactness.wanted import Wanted
from jaxspark.generation import Completion, Request, generate_stream
from jaxspark.settings import standard_settings
from jaxspark.target import Target


def _no_repeats(output: Sequence[int]) -> Collection[int]:
    return {0, 1, 2} - {output[-1]}


def _counted(output: Sequence[int]) -> Collection[int]:
    """Every third token is 1, the second never."""
    return ({0, 2}, {0, 1, 2}, {1})[len(output) % 3]


def _narrow(output: Sequence[int]) -> Collection[int]:
    """One token, now and then another."""
    return {0, 1} if sum(output) % 2 else {sum(output) % 3}


# With what else is wanted; the last leaves no token where the grammar is narrow.
CASES = {
    "no repeats": (_no_repeats, Adjustment()),
    "counted": (_counted, Adjustment(presence_penalty=1.5, logit_bias={2: 1.0})),
    "narrow": (_narrow, Adjustment()),
    "excluded": (_narrow, Adjustment(allowed_ids=(1, 2))),
}


@standard_settings()
def enumeration_checks(
    drafters: Sequence[str] | None = None,
    cases: Sequence[str] | None = None,
    schedules: Mapping[str, Scheduler] | None = None,
    family: Family = "dense",
) -> list[Check]:
    """A round's distribution under each grammar and schedule, to 1e-6."""
    asked = {}
    for label in CASES if cases is None else cases:
        grammar, adjustment = CASES[label]
        wanted = Wanted(adjustment=adjustment, output=1, limits=LIMITS, grammar=grammar)
        asked[label] = wanted, Sampling.of(1, temperature=0.8)
    return enumerated(asked, drafters, schedules, family, ((0.9, 0.8),))


@standard_settings()
def frequency_checks(
    samples: int,
    drafters: Sequence[str] | None = None,
    couplings: Sequence[Coupling] = COUPLINGS,
    family: Family = "dense",
) -> list[Check]:
    """First two tokens of many requests, by rounds in halves: chi-square."""
    target, tried = tiny_models(family, VOCAB, drafters=drafters)
    wanted = Wanted(output=1, grammar=_no_repeats)
    sampling = Sampling.of(1, temperature=1.0)
    exact = target_distribution(sequence_log_probs(target, PROMPT, 2, sampling, wanted))
    return [
        Check.p_value(
            f"first two tokens under a grammar, {coupling}, {name}",
            chi_square(
                sample_first_tokens(
                    target,
                    drafter,
                    PROMPT,
                    coupling=coupling,
                    samples=samples,
                    wanted=wanted,
                ).counts,
                exact,
            ),
        )
        for name, drafter in tried.items()
        for coupling in couplings
    ]


@dataclass(frozen=True, kw_only=True)
class GrammarAudit:
    """What outputs under grammars were.

    Attributes:
      audit: their tokens against those of plain decoding.
      ended: those that ended by themselves.
      disobeyed: those among them that do not obey, in words.
      failed: errors of others.
    """

    audit: AuditResult
    ended: int
    disobeyed: list[str]
    failed: list[str]


def random_requests(
    target: Target, count: int, seed: int, *, max_new_tokens: int
) -> list[Request]:
    """Requests under random grammars, greedy and sampled in turn."""
    assert target.tokenizer is not None
    grammars = random_grammars(np.random.default_rng(seed), count)
    ids = target.tokenizer.encode("Some data:")
    return [
        Request(
            ids,
            name=f"{place}: {grammar.kind}",
            max_new_tokens=max_new_tokens,
            temperature=float(place // 2 % 2),
            seed=place,
            grammar=grammar,
        )
        for place, grammar in enumerate(grammars)
    ]


def audit_grammars(
    target: Target,
    drafter: Drafter,
    requests: Sequence[Request],
    *,
    slots: int,
    options: DecodeOptions = DecodeOptions(coupling="gumbel"),
) -> GrammarAudit:
    """Compares speculation with plain decoding, and outputs with their grammars."""
    plain, seen = (
        _outputs(target, each, requests, slots, options) for each in (None, drafter)
    )
    found = AuditResult()
    for request, expected, other in zip(requests, plain, seen):
        found += audit(target, [request], [expected.tokens], [other])
    ended = [
        (request, completion)
        for request, completion in zip(requests, seen)
        if completion.finish_reason == "stop"
    ]
    return GrammarAudit(
        audit=found,
        ended=len(ended),
        disobeyed=list(_disobeyed(ended)),
        failed=[
            f"{request.name}: {completion.error}"
            for request, completion in zip(requests, seen)
            if completion.finish_reason == "error"
        ],
    )


def _outputs(
    target: Target,
    drafter: Drafter | None,
    requests: Sequence[Request],
    slots: int,
    options: DecodeOptions,
) -> list[Completion]:
    need = max(len(each.prompt) + each.params.max_new_tokens for each in requests)
    ended = generate_stream(
        target, requests, drafter, slots=slots, capacity=need + 16, options=options
    )
    completions = dict(ended)
    return [completions[place] for place in range(len(requests))]


def _disobeyed(ended: Sequence[tuple[Request, Completion]]) -> Iterator[str]:
    for request, completion in ended:
        grammar, text = request.params.grammar, completion.text
        assert grammar is not None and text is not None
        if not obeys(grammar, text):
            yield f"{request.name}: {text!r} is not what {grammar.value!r} wants"
