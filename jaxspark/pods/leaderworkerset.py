"""A LeaderWorkerSet: a command that stays, such as serving; all hosts are one replica.

If any pod of a group restarts, the whole group is made anew. More replicas are more
groups, each with an accelerator of its own: `kubectl scale`.
"""

from jaxspark.pods.options import PodOptions
from jaxspark.pods.template import PORT, Manifest, metadata, pod_template


def leaderworkerset(options: PodOptions) -> Manifest:
    """The manifest."""
    return {
        "apiVersion": "leaderworkerset.x-k8s.io/v1",
        "kind": "LeaderWorkerSet",
        "metadata": metadata(options, "leaderworkerset.sigs.k8s.io/exclusive-topology"),
        "spec": {
            "replicas": 1,
            "leaderWorkerTemplate": {
                "size": options.machines().hosts,
                "restartPolicy": "RecreateGroupOnPodRestart",
                # Without a template of its own the leader is a worker too.
                "workerTemplate": pod_template(options, _meeting(), "Always"),
            },
        },
    }


def _meeting() -> list[Manifest]:
    """LeaderWorkerSet's variables, which it puts before ours, under our names."""
    values = {
        "JAXSPARK_COORDINATOR": f"$(LWS_LEADER_ADDRESS):{PORT}",
        "JAXSPARK_PROCESSES": "$(LWS_GROUP_SIZE)",
        "JAXSPARK_PROCESS_INDEX": "$(LWS_WORKER_INDEX)",
    }
    return [{"name": name, "value": value} for name, value in values.items()]
