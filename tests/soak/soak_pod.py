"""A server of several processes, one of which is lost."""

import json
import signal
import threading
import time

import httpx
import pytest

from tests.serving.pods import FLAGS, asked, pod
from tests.soak.conftest import figure


def test_a_lost_process_ends_requests_with_errors_and_the_server(folder):
    with pod(folder.parent, *FLAGS, "--heartbeat_seconds=10") as here:
        told, begun = [], threading.Event()

        def ask(stream):
            body = asked(max_tokens=100, stream=stream, n=1 if stream else 3)
            address = f"{here.url}/v1/completions"
            with httpx.stream("POST", address, json=body, timeout=60) as answer:
                text = ""
                for each in answer.iter_text():
                    text += each
                    begun.set()
                told.append((answer.status_code, text))

        threads = [
            threading.Thread(target=ask, args=(stream,)) for stream in (True, False)
        ]
        threads[0].start()
        begun.wait()
        threads[1].start()
        here.kill(1)
        for each in threads:
            each.join()
        statuses = here.ends()
        assert statuses[0] == 1, here.said
        assert statuses[1] == 128 + signal.SIGKILL
    [(status, whole)] = [each for each in told if "data:" not in each[1]]
    assert status == 500 and json.loads(whole)["error"]["type"] == "server_error"
    [(_, stream)] = [each for each in told if "data:" in each[1]]
    assert '"error"' in stream and stream.endswith("data: [DONE]\n\n")


def test_a_process_that_is_lost_while_nobody_asks_ends_the_server(folder):
    with pod(folder.parent, *FLAGS, "--heartbeat_seconds=10") as here:
        here.kill(1)
        begun = time.monotonic()
        statuses = here.ends()
        figure(f"an idle server ended {time.monotonic() - begun:.1f} s after a loss")
        # Before JAX's runtime would end it, which leaves no time for answers.
        assert statuses == [1, 128 + signal.SIGKILL], here.said


def in_flight(url):
    """Outputs that the server has taken on."""
    stats = httpx.get(f"{url}/stats").json()
    return stats["running"] + stats["waiting"]


@pytest.mark.parametrize("index", [0, 1])
def test_sigterm_to_any_process_drains_all(folder, index):
    with pod(folder.parent, *FLAGS, "--heartbeat_seconds=10") as here:
        told = []

        def ask():
            address = f"{here.url}/v1/completions"
            told.append(httpx.post(address, json=asked(max_tokens=60), timeout=60))

        threads = [threading.Thread(target=ask) for _ in range(6)]
        for each in threads:
            each.start()
        while len(told) + in_flight(here.url) < len(threads):
            time.sleep(0.01)
        here.processes[index].send_signal(signal.SIGTERM)
        for each in threads:
            each.join()
        assert here.ends() == [0, 0], here.said
        assert [each.status_code for each in told] == [200] * 6


def test_a_lost_process_0_ends_the_others(folder):
    with pod(folder.parent, *FLAGS, "--heartbeat_seconds=10") as here:
        here.kill(0)
        statuses = here.ends()
        assert statuses[0] == 128 + signal.SIGKILL and statuses[1] not in (0, None)
