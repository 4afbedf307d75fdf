"""Whether log-probabilities are those of plain decoding, and outputs by definition."""

from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from jaxspark.exactness.audit import NEAR_TIE, Difference, choices, first_difference
from jaxspark.generation import Completion, Request


def told_error(plain: Completion, seen: Completion) -> float:
    """The largest difference of any log-probability as far as the tokens are the same.

    Likely tokens must be the same ones; where they are not it is that of their
    log-probabilities, which is tiny for such as are equally likely, or infinite if
    anything is missing.
    """
    same = first_difference(plain.tokens, seen.tokens)
    # The log-probabilities at the first difference are of the same text, too.
    count = len(plain.tokens) if same is None else same
    if len(seen.log_probs or ()) != len(seen.tokens):
        return float("inf")
    error = _error((plain.log_probs or [])[:count], (seen.log_probs or [])[:count])
    for a, b in zip((plain.top_log_probs or [])[:count], seen.top_log_probs or ()):
        error = max(error, _likely_error(a, b))
    if len(seen.prompt_log_probs or ()) != len(plain.prompt_log_probs or ()):
        return float("inf")
    for p, q in zip(plain.prompt_log_probs or (), seen.prompt_log_probs or ()):
        if p is None or q is None:
            error = max(error, 0.0 if p is q else float("inf"))
            continue
        error = max(error, _error([p.log_prob], [q.log_prob]))
        error = max(error, _likely_error(p.top, q.top))
    return error


def _error(a: Sequence[float], b: Sequence[float]) -> float:
    if len(a) != len(b):
        return float("inf")
    return float(np.abs(np.array(a) - np.array(b)).max(initial=0.0))


def _likely_error(a: Sequence[tuple[int, float]], b: Sequence[tuple[int, float]]):
    error = _error([each for _, each in a], [each for _, each in b])
    known = dict(b)
    for token, log_prob in a:
        # One that is as likely as the last may stand for it.
        error = max(error, abs(log_prob - known.get(token, b[-1][1])))
    return error


def parted(
    target, requests: Sequence[Request], outputs: Iterable[Sequence[int]]
) -> Iterator[Difference]:
    """Where outputs are not what the definition of their requests says, token by token.

    Rounding decides between choices that are within `NEAR_TIE`.
    """
    for request, output in zip(requests, outputs, strict=True):
        begin = len(request.prompt)
        told = choices(target, [*request.prompt, *output[:-1]], request, begin)
        for index, ((gap, best), token) in enumerate(zip(told, output)):
            chosen = token == best[0] or (gap < NEAR_TIE and token == best[1])
            if not chosen:
                yield Difference(
                    request=request,
                    index=index,
                    expected=best[0],
                    seen=token,
                    margin=gap,
                    best=best,
                )
