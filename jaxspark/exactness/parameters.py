"""Guarantee 2 for everything that a request may do to its logits.

A draft changes what comes after it: penalties count it, bad words may begin with it,
and a least length is nearer. So each case here has drafts that matter: the output is
one token old, and one token of three has not been seen.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxspark.decoding import Adjustment, AdjustmentLimits, Fixed, Sampling, Scheduler
from jaxspark.decoding.couplings import COUPLINGS
from jaxspark.exactness.audit_schedules import spread_confidences
from jaxspark.exactness.enumeration import EnumeratedRound
from jaxspark.exactness.plain_law import sequence_log_probs, target_distribution
from jaxspark.exactness.rejection import Check
from jaxspark.exactness.rejection_under_schedules import (
    LEAKY,
    leaky_drafter,
    schedules_for_rejection,
)
from jaxspark.exactness.statistics import chi_square, sample_first_tokens
from jaxspark.exactness.tiny_models import BLOCK_LENGTH, DRAFTERS, Family, tiny_models
from jaxspark.exactness.wanted import Wanted
from jaxspark.settings import standard_settings

VOCAB = 3
# Repeats itself, and has no token 1.
PROMPT = (0, 2, 2, 0, 2, 2, 0, 2)


@dataclass(frozen=True, kw_only=True)
class Case:
    """Adjustments of a request.

    Attributes:
      adjustment: what is done to logits.
      sampling: beside the temperature, 0.8.
      stop_ids: of the request.
    """

    adjustment: Adjustment
    sampling: Mapping[str, Any]
    stop_ids: tuple[int, ...] = ()


def _case(*, sampling=None, stop_ids=(), **adjustment) -> Case:
    return Case(
        adjustment=Adjustment(**adjustment), sampling=sampling or {}, stop_ids=stop_ids
    )


CASES = {
    "presence": _case(presence_penalty=1.5),
    "negative presence": _case(presence_penalty=-1.0),
    "frequency": _case(frequency_penalty=0.9),
    "repetition": _case(repetition_penalty=1.8),
    "less repetition": _case(repetition_penalty=0.6),
    "bias": _case(logit_bias={0: 1.5, 1: -2.0}),
    "allowed": _case(allowed_ids=(0, 2)),
    "a bad word": _case(bad_words=((1,),)),
    # Behind the anchor, behind a draft, behind anchor and draft, and behind the prompt.
    "bad words": _case(bad_words=((2, 0), (1, 0), (2, 1, 2), (0, 2, 1))),
    "min_tokens": _case(min_tokens=3, stop_ids=(1,)),
    "everything": _case(
        presence_penalty=0.4,
        frequency_penalty=0.3,
        repetition_penalty=1.4,
        logit_bias={1: 0.7},
        bad_words=((1, 2), (2, 1, 0)),
        min_tokens=2,
        stop_ids=(0,),
    ),
    "everything, filtered": _case(
        presence_penalty=-0.4,
        frequency_penalty=0.5,
        repetition_penalty=0.7,
        logit_bias={0: -0.5},
        bad_words=((0, 2),),
        sampling={"top_k": 2},
    ),
}
LIMITS = AdjustmentLimits.of([case.adjustment for case in CASES.values()])
# Without schedules; those come on top.
LENGTHS = tuple(Fixed(length) for length in range(BLOCK_LENGTH))


@standard_settings()
def enumeration_checks(
    drafters: Sequence[str] | None = None,
    cases: Sequence[str] | None = None,
    schedules: Mapping[str, Scheduler] | None = None,
    family: Family = "dense",
) -> list[Check]:
    """A round's distribution in each case under each schedule, to 1e-6.

    Two requests want the same and compete for what is verified, after rounds that
    promised little and after such that promised much.
    """
    asked = {}
    for label in CASES if cases is None else cases:
        case = CASES[label]
        wanted = Wanted(
            adjustment=case.adjustment, output=1, stop_ids=case.stop_ids, limits=LIMITS
        )
        asked[label] = wanted, Sampling.of(1, temperature=0.8, **case.sampling)
    return enumerated(asked, drafters, schedules, family, ((0.5, 0.1), (0.9, 0.8)))


def enumerated(
    asked: Mapping[str, tuple[Wanted, Sampling]],
    drafters: Sequence[str] | None,
    schedules: Mapping[str, Scheduler] | None,
    family: Family,
    remembered: Sequence[tuple[float, float]],
) -> list[Check]:
    """Rounds of what two requests ask for against the target's distribution.

    Args:
      asked: of both, by name.
      drafters: None for all of the family, and one whose confidences tell its drafts.
      schedules: beside those of fixed lengths; None for all that are lawful.
      family: of the models.
      remembered: survival in earlier rounds, for each of which schedules are tried.
    """
    names = (LEAKY, *DRAFTERS[family]) if drafters is None else drafters
    own = [name for name in names if name != LEAKY]
    target, tried = tiny_models(family, VOCAB, drafters=own)
    chosen = schedules_for_rejection() if schedules is None else schedules
    checks = []
    for label, (wanted, sampling) in asked.items():
        table = sequence_log_probs(target, PROMPT, BLOCK_LENGTH + 1, sampling, wanted)
        expected = target_distribution(table)
        for name in names:
            drafter = (
                leaky_drafter() if name == LEAKY else spread_confidences(tried[name])
            )
            prompts = [PROMPT, PROMPT[1:]]
            round_ = EnumeratedRound(
                target, drafter, prompts, table, sampling, wanted=wanted
            )
            seen = [round_.distribution(each) for each in LENGTHS]
            for earlier in remembered:
                seen += [
                    round_.distribution(each, earlier_G=jnp.array(earlier))
                    for each in chosen.values()
                ]
            error = max(np.abs(each - expected).max() for each in seen)
            checks.append(Check.distance(f"enumeration, {name}, {label}", error))
    return checks


@standard_settings()
def frequency_checks(
    samples: int, drafters: Sequence[str] | None = None, family: Family = "dense"
) -> list[Check]:
    """First two tokens of many requests that adjust their logits: chi-square.

    The whole compiled round, whose drafts are drawn from adjusted logits too.
    """
    target, tried = tiny_models(family, VOCAB, drafters=drafters)
    wanted = Wanted(
        adjustment=Adjustment(
            presence_penalty=1.0,
            frequency_penalty=0.5,
            repetition_penalty=1.5,
            logit_bias={0: 0.5},
            bad_words=((1, 2),),
        ),
        output=1,
    )
    sampling = Sampling.of(1, temperature=1.0)
    exact = target_distribution(sequence_log_probs(target, PROMPT, 2, sampling, wanted))
    checks = []
    for name, drafter in tried.items():
        for coupling in COUPLINGS:
            drawn = sample_first_tokens(
                target,
                drafter,
                PROMPT,
                coupling=coupling,
                samples=samples,
                wanted=wanted,
            )
            label = f"first two tokens, adjusted, {coupling}, {name}"
            checks.append(Check.p_value(label, chi_square(drawn.counts, exact)))
    return checks
