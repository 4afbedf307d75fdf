"""Requests made from `/openapi.json`, right ones and wrong ones, and what must hold."""

import re
from collections import Counter

import httpx
import schemathesis
from hypothesis import HealthCheck, Phase, given, seed, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

CHECKS = [
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
]
# A request that takes longer hangs.
SECONDS = 30
# Fields of a request that errors may name one after the other.
MOST_MENDED = 40
OPTIONS = settings(
    deadline=None,
    database=None,
    phases=[Phase.generate, Phase.shrink],
    suppress_health_check=list(HealthCheck),
)


def fuzz(url, headers, *, examples, number):
    """Sends requests to every route.

    Args:
      url: of the server.
      headers: with its key.
      examples: of each route, right ones and as many wrong ones.
      number: fixes them.

    Returns:
      a counter of status codes by route.
    """
    schema = schemathesis.openapi.from_url(f"{url}/openapi.json")
    told = {}
    for found in schema.get_all_operations():
        operation = found.ok()
        told[operation.label] = statuses = Counter()
        for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE):
            if mode is GenerationMode.POSITIVE or operation.body:
                cases = operation.as_strategy(generation_mode=mode)
                check = _checked(url, headers, statuses)
                varied = settings(OPTIONS, max_examples=examples)
                seed(number)(varied(given(case=cases)(check)))()
    return told


def _checked(url, headers, statuses):
    """Sends a request, looks at the answer and counts it.

    What an error names is left out or mended, as a client would, until nothing is wrong
    any more: most requests would otherwise be refused for their first field.
    """
    names = httpx.get(f"{url}/v1/models", headers=headers).json()["data"]
    right = {
        "model": names[0]["id"],
        "messages": [{"role": "user", "content": "ab"}],
        "prompt": "ab",
        "tokens": [1],
    }

    def checked(case):
        for _ in range(MOST_MENDED):
            response = case.call(headers=headers, timeout=SECONDS)
            statuses[response.status_code] += 1
            # Whoever allows less time than a turn takes is told that it ran out.
            if not (response.status_code == 504 and "timeout" in (case.body or ())):
                case.validate_response(response, checks=[not_a_server_error])
            case.validate_response(response, checks=CHECKS)
            if response.status_code not in (400, 404) or not isinstance(
                case.body, dict
            ):
                return
            name = re.split(r"[.\[]", response.json()["error"]["param"] or "")[0]
            if name not in case.body or case.body[name] == right.get(name, ()):
                return
            changed = {k: v for k, v in case.body.items() if k != name}
            case.body = changed | {k: v for k, v in right.items() if k == name}

    return checked
