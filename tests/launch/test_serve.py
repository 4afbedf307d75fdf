"""`jaxspark serve` as a process: from its start to its end."""

import asyncio
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time

import httpx
import pytest
from starlette.testclient import TestClient

from jaxspark.checkpoints import save_target
from jaxspark.launch import ray_serve, serve
from jaxspark.launch.serve import Config
from jaxspark.launch.serve_options import make_service
from jaxspark.serving.app_options import AppOptions
from jaxspark.serving.relay import Asked
from tests.checkpoints.tiny import target
from tests.programs import ROOT, command


def started(folder, **options):
    """A server of the tiny target, as a process."""
    save_target(folder / "target", target())
    options |= {"target": "target", "port": 0, "slots": 1, "context": 100}
    return subprocess.Popen(
        command("serve", **options, served_name="mine"),
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_server_that_still_compiles_ends_at_once(tmp_path, number):
    process = started(tmp_path)
    try:
        assert process.stdout.readline().startswith("mine at http://")
        process.send_signal(number)
        assert process.wait(60) == 0
    finally:
        process.kill()
        said = process.communicate()[0]
    assert said == ""  # It would say what it has compiled.


def test_a_server_under_sigterm_finishes_what_it_has_and_ends_with_0(tmp_path):
    (tmp_path / "keys").write_text("# for tests\none-key\n")
    process = started(tmp_path, api_key_file="keys")
    try:
        first = process.stdout.readline()
        assert first.startswith("mine at http://127.0.0.1:"), first
        client = httpx.Client(
            base_url=first.split()[2],
            headers={"Authorization": "Bearer one-key"},
            timeout=60,
        )
        assert client.get("/health").status_code == 200
        early = client.post("/v1/completions", json={"model": "mine", "prompt": "a"})
        assert early.status_code == 503 and int(early.headers["Retry-After"]) == 5
        while client.get("/ready").status_code != 200:
            time.sleep(0.1)
        body = {"model": "mine", "prompt": "ab", "n": 6, "max_tokens": 90}
        body |= {"ignore_eos": True}
        answers = []

        def ask(stream):
            url = f"{client.base_url}/v1/completions"
            answers.append(
                httpx.post(
                    url,
                    json=body | {"stream": stream},
                    headers=client.headers,
                    timeout=60,
                )
            )

        threads = [threading.Thread(target=ask, args=(i % 2 == 0,)) for i in range(3)]
        for each in threads:
            each.start()
        while any(each.is_alive() for each in threads):
            if client.get("/stats").json()["waiting"] >= 12:
                break
        client.close()
        process.send_signal(signal.SIGTERM)
        for each in threads:
            each.join()
        assert process.wait(30) == 0
    finally:
        process.kill()
        said = process.communicate()[0]
    for answer in answers:
        assert answer.status_code == 200
        if answer.headers["content-type"] == "application/json":
            assert answer.json()["usage"]["completion_tokens"] == 6 * 90
        else:
            assert answer.text.count('"finish_reason":"length"') == 6
            assert answer.text.endswith("data: [DONE]\n\n")
    assert said.count('"completion_tokens": 540') == 3, said


def test_few_pages_make_a_small_context(tmp_path, caplog):
    save_target(tmp_path / "target", target())
    values = {"target": str(tmp_path / "target"), "slots": 2, "cache_pages": 1}
    with caplog.at_level("INFO", "jaxspark"):
        service = make_service(Config(**values), on_failure=lambda: None)
    assert service.engine.context == 128 - service.engine.options.block
    assert f"the context is {service.engine.context}: --cache_pages" in caplog.text
    with TestClient(service.app) as http:
        asked = {"model": service.name, "prompt": "ab"}
        answer = http.post("/v1/completions", json=asked)
        # All that it lacks is an engine that was started.
        assert answer.status_code == 503 and "starting" in answer.text
    with pytest.raises(ValueError, match="cache_pages is 1, .* or a smaller context"):
        make_service(Config(**values, context=128), on_failure=lambda: None)


def test_a_replica_logs_requests_and_has_the_keys_it_was_given(tmp_path, caplog):
    """Its own process may have none in its environment, and shows no logs by itself."""
    save_target(tmp_path / "target", target())
    values = {"slots": 1, "context": 100, "grammars": False, "prefill_chunk": 16}
    config = ray_serve.Config(target=str(tmp_path / "target"), **values)
    logging.getLogger("jaxspark").setLevel(logging.NOTSET)
    replica = ray_serve.Replica(config, AppOptions(api_keys=("a-key",)))
    asked = Asked({"type": "http", "method": "GET", "path": "/v1/models"}, b"")
    asked.scope.update(headers=[], query_string=b"", http_version="1.1")

    async def answer():
        return [message async for message in replica.answer(asked)]

    start, *_ = asyncio.run(answer())
    replica.check_health()
    assert start["status"] == 401
    assert json.loads(caplog.records[-1].message)["status"] == 401


def test_flags_that_cannot_be_are_refused(tmp_path, monkeypatch):
    alone = {"coordinator": "localhost:1", "processes": 2, "process_index": 0}
    with pytest.raises(ValueError, match="a replica is one process; for several use"):
        ray_serve.Config(**alone)
    with pytest.raises(ValueError, match="resources=GPU: expected NAME:AMOUNT"):
        ray_serve.Config(resources=("CPU:2", "GPU"))
    taken = ray_serve.Config(resources=("CPU:2", "GPU:1", "TPU:4")).actor_options()
    assert taken == {"num_cpus": 2, "num_gpus": 1, "resources": {"TPU": 4}}
    with pytest.raises(ValueError, match="--costs are for schedules"):
        Config(costs="costs.json")
    with pytest.raises(ValueError, match="cannot listen at no.such.host.invalid:1"):
        serve.main(Config(host="no.such.host.invalid", port=1))
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "jaxspark.serving.app", None)
        for launcher in (serve, ray_serve):
            with pytest.raises(ValueError, match=r"pip install 'jaxspark\[serve\]'"):
                launcher.main(launcher.Config())
        without.delitem(sys.modules, "jaxspark.serving.app")
        without.setitem(sys.modules, "ray", None)
        with pytest.raises(ValueError, match=r"pip install 'jaxspark\[serve,ray\]'"):
            ray_serve.main(ray_serve.Config())
    (tmp_path / "keys").write_text("\n")
    monkeypatch.setenv("JAXSPARK_API_KEYS", " a, b,")
    assert Config().keys() == ("a", "b")
    monkeypatch.delenv("JAXSPARK_API_KEYS")
    with pytest.raises(ValueError, match="has no key"):
        Config(api_key_file=str(tmp_path / "keys")).keys()
