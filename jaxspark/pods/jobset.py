"""A JobSet: a command that ends, such as training, on all hosts at once.

If any process fails, all are stopped and started anew, as often as the failure policy
allows: a collective operation cannot go on with one participant missing.
"""

from jaxspark.parallel.processes import GROUP_PORT
from jaxspark.pods.options import PodOptions
from jaxspark.pods.template import Manifest, metadata, pod_template

HOSTS = "hosts"
INDEX = "metadata.annotations['batch.kubernetes.io/job-completion-index']"


def jobset(options: PodOptions) -> Manifest:
    """The manifest."""
    hosts = options.machines().hosts
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": metadata(options, "alpha.jobset.sigs.k8s.io/exclusive-topology"),
        "spec": {
            # A headless service, by which hosts have names before they are ready.
            "network": {
                "enableDNSHostnames": True,
                "publishNotReadyAddresses": True,
                "subdomain": options.name,
            },
            "failurePolicy": {"maxRestarts": options.most_restarts()},
            "replicatedJobs": [
                {
                    "name": HOSTS,
                    "replicas": 1,
                    "template": {
                        "spec": {
                            "completionMode": "Indexed",
                            "completions": hosts,
                            "parallelism": hosts,
                            "backoffLimit": 0,
                            # A failed pod fails its job; the failure policy sees it.
                            "template": pod_template(
                                options, "Never", _meeting(options.name, hosts)
                            ),
                        }
                    },
                }
            ],
        },
    }


def _meeting(name: str, hosts: int) -> list[Manifest]:
    """The first host by its stable name; JOB_COMPLETION_INDEX under our name."""
    first = f"{name}-{HOSTS}-0-0.{name}:{GROUP_PORT}"
    return [
        {"name": "JAXSPARK_COORDINATOR", "value": first},
        {"name": "JAXSPARK_PROCESSES", "value": str(hosts)},
        {
            "name": "JAXSPARK_PROCESS_INDEX",
            "valueFrom": {"fieldRef": {"fieldPath": INDEX}},
        },
    ]
