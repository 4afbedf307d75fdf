"""The pod that a JobSet and a LeaderWorkerSet make once for every host.

GKE adds to it what TPU and GPU nodes have to be tolerated for, and the sidecar that
mounts a bucket where an annotation asks for it.
"""

from collections.abc import Sequence
from typing import Any

from jaxspark.pods.accelerators import GPU
from jaxspark.pods.options import PodOptions

MOUNT = "/data"

type Manifest = dict[str, Any]


def place(options: PodOptions, name: str) -> Manifest:
    """A name in the namespace of what runs."""
    if options.namespace is None:
        return {"name": name}
    return {"name": name, "namespace": options.namespace}


def metadata(options: PodOptions, exclusive: str) -> Manifest:
    """The set's name and place.

    Args:
      options: what runs.
      exclusive: the annotation by which a set has a node pool for itself.
    """
    about = place(options, options.name)
    machines = options.machines()
    if machines.is_tpu and machines.hosts > 1:
        # A node pool is one slice; hosts of two slices could not reach each other.
        about["annotations"] = {exclusive: "cloud.google.com/gke-nodepool"}
    return about


def pod_template(
    options: PodOptions, restart: str, meeting: Sequence[Manifest] = ()
) -> Manifest:
    """A host's pod.

    Args:
      options: what it runs.
      restart: when Kubernetes restarts the container by itself.
      meeting: environment variables by which GPU processes find each other, where a
        set does not tell them by itself.
    """
    machines = options.machines()
    spec: Manifest = {
        "restartPolicy": restart,
        "terminationGracePeriodSeconds": options.grace_seconds,
        "nodeSelector": dict(machines.node_labels),
    }
    if options.service_account is not None:
        spec["serviceAccountName"] = options.service_account
    container = _container(options, meeting)
    spec["containers"] = [container]
    if volumes := _volumes(options):
        spec["volumes"] = list(volumes.values())
        container["volumeMounts"] = [
            {"name": each["name"], "mountPath": path} for path, each in volumes.items()
        ]
    if (options.volume or "").startswith("gs://"):
        annotations = {"gke-gcsfuse/volumes": "true"}
        return {"metadata": {"annotations": annotations}, "spec": spec}
    return {"spec": spec}


def _container(options: PodOptions, meeting: Sequence[Manifest]) -> Manifest:
    machines = options.machines()
    command = list(map(_literal, options.words()))
    environment: list[Manifest] = [
        {"name": name, "value": _literal(value)}
        for name, value in options.variables().items()
    ]
    if machines.hosts > 1 and machines.is_tpu:
        command.append("--distributed=auto")
    elif machines.hosts > 1:
        environment += meeting
    container: Manifest = {
        "name": "jaxspark",
        "image": options.image,
        "command": command,
        "resources": {"limits": {machines.resource: machines.chips_per_host}},
    }
    if environment:
        container["env"] = environment
    if options.secret is not None:
        container["envFrom"] = [{"secretRef": {"name": options.secret}}]
    return container


def _literal(text: str) -> str:
    """A text in which Kubernetes finds no variable of its own."""
    return text.replace("$(", "$$(")


def _volumes(options: PodOptions) -> dict[str, Manifest]:
    """Volumes by where they are mounted."""
    volumes: dict[str, Manifest] = {}
    if options.volume is not None:
        kind, _, where = options.volume.partition(":")
        source = _bucket(where) if kind == "gs" else _claim(where)
        volumes[MOUNT] = {"name": "data", **source}
    if options.machines().resource == GPU:
        # For NCCL's buffers; a container has 64 MB of it otherwise.
        volumes["/dev/shm"] = {"name": "shm", "emptyDir": {"medium": "Memory"}}
    return volumes


def _bucket(where: str) -> Manifest:
    bucket, _, folder = where.removeprefix("//").partition("/")
    folder = folder.strip("/")
    mount = "implicit-dirs" + (f",only-dir={folder}" if folder else "")
    return {
        "csi": {
            "driver": "gcsfuse.csi.storage.gke.io",
            "volumeAttributes": {"bucketName": bucket, "mountOptions": mount},
        }
    }


def _claim(name: str) -> Manifest:
    return {"persistentVolumeClaim": {"claimName": name}}
