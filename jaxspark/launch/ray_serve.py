"""Serves a model by several replicas in a Ray cluster, behind one address.

  jaxspark ray_serve --replicas=2                       two on this machine's CPUs
  jaxspark ray_serve --replicas=8 --resources=GPU:1 --target=/data/model --host=0.0.0.0
  jaxspark ray_serve --address=auto --replicas=4 --resources=TPU:4 --mesh=model:4

A replica is an engine of `jaxspark serve` on the devices of one host. A request whose
replica is lost goes to another, as long as nothing of its answer was sent. Needs more
packages than the library: pip install 'jaxspark[serve,ray]'.
"""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from jaxspark.configuration import ConfigurationError, option
from jaxspark.launch import program
from jaxspark.launch.devices import DeviceOptions
from jaxspark.launch.serve_options import (
    ServeOptions,
    check_packages,
    make_service,
    show_logs,
)
from jaxspark.pods.serving import PORT

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from ray.serve import Application
    from starlette.types import ASGIApp, Message

    from jaxspark.serving.app_options import AppOptions
    from jaxspark.serving.relay import Asked

NAME = "jaxspark"
# How often Ray asks whether a replica is well, and how soon one has to say so.
HEALTH_S, HEALTH_PATIENCE_S = 5.0, 30.0
# Between two looks whether replicas run.
_LOOK_S = 0.5


@dataclass(frozen=True, kw_only=True)
class Config(ServeOptions):
    """What is served, by how many, and where."""

    replicas: int = option("Engines.", 2, at_least=1)
    resources: tuple[str, ...] = option(
        "What each of them takes of the cluster, such as GPU:1, TPU:4 or CPU:2.",
        ("CPU:1",),
    )
    address: str | None = option(
        "Ray cluster to join: auto for the one on this machine, or ray://HOST:PORT. By "
        "default one is started here and ended with this command.",
        None,
    )
    host: str = option("Address to listen at; 0.0.0.0 is all there are.", "127.0.0.1")
    port: int = option("Port to listen at.", PORT, at_least=1)

    def __post_init__(self):
        super().__post_init__()
        if self.job() is not None:
            raise ValueError(
                "a replica is one process; for several use jaxspark serve and a "
                "LeaderWorkerSet, and leave out --distributed, --coordinator, "
                "--processes and --process_index"
            )
        self.actor_options()

    @contextlib.contextmanager
    def devices(self) -> Iterator[None]:
        """The command takes none: they are its replicas'."""
        yield

    def actor_options(self) -> dict[str, Any]:
        """The resources as Ray names them.

        Raises:
          ConfigurationError: one is no name with an amount.
        """
        found: dict[str, Any] = {"num_cpus": 0, "resources": {}}
        own = {"CPU": "num_cpus", "GPU": "num_gpus"}
        for each in self.resources:
            name, _, amount = each.partition(":")
            try:
                number = float(amount)
            except ValueError as error:
                raise ConfigurationError(
                    f"resources={each}: expected NAME:AMOUNT, such as GPU:1"
                ) from error
            if name in own:
                found[own[name]] = number
            else:
                found["resources"][name] = number
        return found


class Replica:
    """An engine and its application; Ray makes one in a process of its own."""

    def __init__(self, config: Config, options: "AppOptions"):
        """Returns once the engine is ready: Ray sends no requests before.

        Args:
          config: what is served.
          options: what clients may do, with the keys of the process that deploys.
        """
        program.quiet()
        program.use_compilation_cache()
        show_logs()
        with DeviceOptions.devices(config):
            service = make_service(config, on_failure=lambda: None, app_options=options)
        self._engine, self._app = service.engine, service.app
        self._engine.start()
        self._engine.wait_ready()

    async def answer(self, asked: "Asked") -> "AsyncGenerator[Message, None]":
        """What the application sends to a request."""
        from jaxspark.serving.relay import answered_by

        async for message in answered_by(self._app, asked):
            yield message

    def check_health(self) -> None:
        """Ray replaces a replica of which this raises."""
        if self._engine.state in ("failed", "stopped"):
            raise RuntimeError(f"the engine is {self._engine.state}")

    def __del__(self) -> None:
        """Ray calls this once the requests that were here have ended."""
        self._engine.stop()


class Front:
    """Passes requests on to replicas."""

    def __init__(self, options: "AppOptions", replicas: Any):
        show_logs()
        self._options = options
        self._replicas = replicas.options(stream=True)

    def __serve_build_asgi_app__(self) -> "ASGIApp":
        from ray.exceptions import NodeDiedError, RayActorError
        from starlette.applications import Starlette
        from starlette.middleware.cors import CORSMiddleware
        from starlette.routing import Mount

        from jaxspark.serving.http import cors
        from jaxspark.serving.relay import Relay

        relay = Relay(
            self._ask, lost=(RayActorError, NodeDiedError), options=self._options
        )
        app = Starlette(routes=[Mount("/", app=relay)])
        if self._options.cors_origins:
            app.add_middleware(CORSMiddleware, **cors(self._options))
        return app

    async def _ask(self, asked: "Asked") -> "AsyncGenerator[Message, None]":
        answer = self._replicas.answer.remote(asked)
        try:
            async for message in answer:
                yield message
        finally:
            answer.cancel()


def application(config: Config) -> "Application":
    """The replicas and what is before them, for `ray.serve.run`."""
    from ray import serve

    options = config.app_options()
    deployment: Any = serve.deployment  # Typed as what it decorates.
    replicas = deployment(
        Replica,
        name="Replica",
        num_replicas=config.replicas,
        ray_actor_options=config.actor_options(),
        # The engine has a queue of its own, and says when that is full.
        max_ongoing_requests=2 * (config.slots + config.max_queued),
        graceful_shutdown_timeout_s=config.drain_seconds,
        health_check_period_s=HEALTH_S,
        health_check_timeout_s=HEALTH_PATIENCE_S,
    ).bind(config, options)
    front = deployment(
        serve.ingress()(Front),
        name="Front",
        ray_actor_options={"num_cpus": 0},
        max_ongoing_requests=100_000,
        graceful_shutdown_timeout_s=config.drain_seconds,
    )
    return front.bind(options, replicas)


def main(config: Config) -> int:
    """Deploys, waits for a signal, drains."""
    check_packages()
    try:
        import ray
        from ray import serve
    except ModuleNotFoundError as error:
        raise ValueError(
            f"Ray is not installed: pip install 'jaxspark[serve,ray]' ({error})"
        ) from error
    app = application(config)
    if config.address is None:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        ray.init(include_dashboard=False, log_to_driver=False)
    else:
        ray.init(address=config.address, log_to_driver=False)
    ended = threading.Event()
    # Ray's own handlers would end this process, and leave replicas behind.
    for each in (signal.SIGTERM, signal.SIGINT):
        signal.signal(each, lambda number, frame: ended.set())
    serve.start(http_options={"host": config.host, "port": config.port})
    serve.run_many(
        [serve.RunTarget(app, name=NAME)], wait_for_applications_running=False
    )
    if _runs(ended):
        print(
            f"{config.replicas} replicas at http://{config.host}:{config.port}",
            flush=True,
        )
        ended.wait()
    serve.delete(NAME)
    if config.address is None:
        serve.shutdown()
        ray.shutdown()
    return 0


def _runs(ended: threading.Event) -> bool:
    """Waits until the replicas run; False if all is to end before.

    Raises:
      RuntimeError: they cannot.
    """
    from ray import serve

    while not ended.wait(_LOOK_S):
        status = serve.status().applications[NAME]
        if status.status == "RUNNING":
            return True
        if status.status == "DEPLOY_FAILED":
            raise RuntimeError(f"the replicas cannot run: {status.message}")
    return False


if __name__ == "__main__":
    program.run(main, Config)
