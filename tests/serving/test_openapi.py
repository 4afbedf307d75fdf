"""Requests that nobody thought of; `make soak` sends many more."""

from tests.serving.fuzzing import fuzz
from tests.serving.hosting import KEY, hosted


def test_requests_made_from_the_schema_get_answers_or_errors_of_theirs(seed):
    with hosted() as server:
        headers = {"Authorization": f"Bearer {KEY}"}
        told = fuzz(server.url, headers, examples=6, number=seed)
        assert server.engine.wait_idle(20) and server.engine.state == "ready"
        assert server.engine.stats().late_compilations == 0
    # Some are served, some are not.
    for route in ("/v1/chat/completions", "/v1/completions", "/tokenize"):
        statuses = told[f"POST {route}"]
        assert statuses[400] and statuses[200], told
    assert set(told["GET /v1/models"]) == {200}
