"""What a LeaderWorkerSet that serves has beside its pods: probes, a Service, a gateway.

Of a group's pods the leader answers HTTP, so it alone has probes, and services and
pools select leaders. A pool is the Gateway API inference extension's (InferencePool
v1): its endpoint picker, which is installed apart from it, sends requests to the
replica that suits them best by the metrics of each.
"""

from collections.abc import Sequence

from jaxspark.pods.options import PodOptions
from jaxspark.pods.template import MOUNT, Manifest, place

LAUNCHER = "serve"
# Of `jaxspark serve`, where its command does not say otherwise.
PORT, DRAIN_S = 8000, 60.0
# After the drain, for answers that are on their way and the runtime's own end.
MARGIN_S = 20
# Loading and compiling may take an hour; from then on silence for 30 s is an end.
STARTUP = {"periodSeconds": 10, "failureThreshold": 360}
LIVENESS = {"periodSeconds": 10, "failureThreshold": 3}
READINESS = {"periodSeconds": 5, "failureThreshold": 1}
# Where an endpoint picker listens.
PICKER_PORT = 9002


def serves(options: PodOptions) -> bool:
    """Whether the command is a server."""
    return options.words()[1:2] == [LAUNCHER]


def flag(words: Sequence[str], name: str) -> str | None:
    """The value that a command gives a flag."""
    given = [each for each in words if each.startswith(f"--{name}=")]
    return given[-1].partition("=")[2] if given else None


def check(options: PodOptions) -> None:
    """That pods have the time to drain.

    Raises:
      ValueError: they have not.
    """
    drain = float(flag(options.words(), "drain_seconds") or DRAIN_S)
    if options.grace_seconds < drain + MARGIN_S:
        raise ValueError(
            f"--grace_seconds={options.grace_seconds}: a server that drains for "
            f"{drain:g} s needs at least {drain + MARGIN_S:g}"
        )


def port(options: PodOptions) -> int:
    """Where the leader listens."""
    return int(flag(options.words(), "port") or PORT)


def as_server(options: PodOptions, template: Manifest) -> Manifest:
    """A pod that can be reached, and finds what was compiled before."""
    [container] = template["spec"]["containers"]
    if flag(options.words(), "host") is None:
        container["command"].append("--host=0.0.0.0")
    variable = "JAX_COMPILATION_CACHE_DIR"
    if options.volume is not None and variable not in options.variables():
        cache = {"name": variable, "value": f"{MOUNT}/xla"}
        container["env"] = [*container.get("env", []), cache]
    return template


def as_leader(options: PodOptions, template: Manifest) -> Manifest:
    """The pod of a server that answers HTTP."""
    [container] = template["spec"]["containers"]
    container["ports"] = [{"name": "http", "containerPort": port(options)}]
    for name, path, times in (
        ("startupProbe", "/health", STARTUP),
        ("livenessProbe", "/health", LIVENESS),
        ("readinessProbe", "/ready", READINESS),
    ):
        container[name] = {"httpGet": {"path": path, "port": "http"}, **times}
        container[name]["timeoutSeconds"] = 5
    return template


def _leaders(options: PodOptions) -> dict[str, str]:
    """Labels of the first pod of every group."""
    return {
        "leaderworkerset.sigs.k8s.io/name": options.name,
        "leaderworkerset.sigs.k8s.io/worker-index": "0",
    }


def service(options: PodOptions) -> Manifest:
    """One address inside the cluster for all replicas."""
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": place(options, f"{options.name}-http"),
        "spec": {
            "selector": _leaders(options),
            "ports": [{"name": "http", "port": 80, "targetPort": "http"}],
        },
    }


def inference_pool(options: PodOptions) -> Manifest:
    """The replicas, as a gateway's endpoint picker sees them."""
    picker = {"name": f"{options.name}-epp", "port": {"number": PICKER_PORT}}
    return {
        "apiVersion": "inference.networking.k8s.io/v1",
        "kind": "InferencePool",
        "metadata": place(options, options.name),
        "spec": {
            "selector": {"matchLabels": _leaders(options)},
            "targetPorts": [{"number": port(options)}],
            "endpointPickerRef": picker,
        },
    }


def http_route(options: PodOptions, gateway: str) -> Manifest:
    """From a gateway to the pool."""
    pool = {
        "group": "inference.networking.k8s.io",
        "kind": "InferencePool",
        "name": options.name,
    }
    return {
        "apiVersion": "gateway.networking.k8s.io/v1",
        "kind": "HTTPRoute",
        "metadata": place(options, options.name),
        "spec": {
            "parentRefs": [{"name": gateway}],
            "rules": [
                {
                    "matches": [{"path": {"type": "PathPrefix", "value": "/v1"}}],
                    "backendRefs": [pool],
                    # Streams take as long as they do.
                    "timeouts": {"request": "0s"},
                }
            ],
        },
    }
