"""A LeaderWorkerSet: a command that stays, such as serving; a group is one replica.

If any pod of a group restarts, the whole group is made anew. More replicas are more
groups, each with an accelerator of its own. The set tells pods of their leader, their
number and how many they are, by which GPU processes find each other.
"""

from jaxspark.pods import serving
from jaxspark.pods.options import PodOptions
from jaxspark.pods.template import Manifest, metadata, pod_template


def leaderworkerset(options: PodOptions) -> Manifest:
    """The manifest."""
    group: Manifest = {
        "size": options.machines().hosts,
        "restartPolicy": "RecreateGroupOnPodRestart",
    }
    if serving.serves(options):
        group["leaderTemplate"] = serving.as_leader(options, _pod(options))
    # Without a template of its own the leader is a worker too.
    group["workerTemplate"] = _pod(options)
    return {
        "apiVersion": "leaderworkerset.x-k8s.io/v1",
        "kind": "LeaderWorkerSet",
        "metadata": metadata(options, "leaderworkerset.sigs.k8s.io/exclusive-topology"),
        "spec": {"replicas": options.replicas or 1, "leaderWorkerTemplate": group},
    }


def _pod(options: PodOptions) -> Manifest:
    template = pod_template(options, "Always")
    return serving.as_server(options, template) if serving.serves(options) else template
