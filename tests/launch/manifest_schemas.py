"""What Kubernetes accepts of the manifests we write, as JSON schemas, and their check.

Only fields that we use are in them, and no others are allowed: the API server would
reject a misspelt field or, worse, ignore it.
"""

import re
from typing import Any


def record(required: dict, optional: dict | None = None) -> dict:
    """An object with exactly these fields."""
    return {
        "type": "object",
        "properties": required | (optional or {}),
        "required": list(required),
        "additionalProperties": False,
    }


def several(items: dict) -> dict:
    return {"type": "array", "items": items, "minItems": 1}


def one_of(*values: str) -> dict:
    return {"enum": list(values)}


def texts(pattern: str) -> dict:
    """Labels or annotations: texts by names of this form."""
    return {
        "type": "object",
        "patternProperties": {rf"^({pattern})$": TEXT},
        "additionalProperties": False,
    }


TEXT = {"type": "string"}
TRUE = {"enum": [True]}
# A label of a host name (RFC 1035), which JobSet wants names to be.
NAME = {"type": "string", "pattern": "^[a-z]([-a-z0-9]{0,61}[a-z0-9])?$"}
COUNT = {"type": "integer", "minimum": 1}
COUNT_OR_NONE = {"type": "integer", "minimum": 0}

VARIABLE = record(
    {"name": {"type": "string", "pattern": "^[A-Za-z_][A-Za-z0-9_]*$"}},
    {
        "value": TEXT,
        "valueFrom": record({"fieldRef": record({"fieldPath": TEXT})}),
    },
)
PORT = {"type": "integer", "minimum": 1}
PROBE = record(
    {
        "httpGet": record({"path": TEXT, "port": NAME}),
        "periodSeconds": COUNT,
        "failureThreshold": COUNT,
        "timeoutSeconds": COUNT,
    }
)
CONTAINER = record(
    {
        "name": NAME,
        "image": TEXT,
        "command": several(TEXT),
        "resources": record(
            {
                "limits": {
                    "type": "object",
                    "properties": {"google.com/tpu": COUNT, "nvidia.com/gpu": COUNT},
                    "additionalProperties": False,
                }
            }
        ),
    },
    {
        "env": several(VARIABLE),
        "envFrom": several(record({"secretRef": record({"name": TEXT})})),
        "volumeMounts": several(record({"name": NAME, "mountPath": TEXT})),
        "ports": several(record({"name": NAME, "containerPort": PORT})),
        "startupProbe": PROBE,
        "livenessProbe": PROBE,
        "readinessProbe": PROBE,
    },
)
BUCKET = record(
    {
        "driver": one_of("gcsfuse.csi.storage.gke.io"),
        "volumeAttributes": record({"bucketName": TEXT, "mountOptions": TEXT}),
    }
)
VOLUME = record(
    {"name": NAME},
    {
        "csi": BUCKET,
        "persistentVolumeClaim": record({"claimName": TEXT}),
        "emptyDir": record({"medium": one_of("Memory")}),
    },
)
GKE_NODES = r"cloud\.google\.com/gke-(accelerator|tpu-accelerator|tpu-topology)"


def pod(restart: str) -> dict:
    spec = record(
        {
            "restartPolicy": one_of(restart),
            "terminationGracePeriodSeconds": COUNT,
            "nodeSelector": texts(GKE_NODES),
            "containers": several(CONTAINER),
        },
        {"serviceAccountName": NAME, "volumes": several(VOLUME)},
    )
    sidecar = record({"annotations": texts("gke-gcsfuse/volumes")})
    return record({"spec": spec}, {"metadata": sidecar})


def manifest(version: str, kind: str, spec: dict, exclusive: str = "") -> dict:
    more = {"annotations": texts(exclusive)} if exclusive else {}
    about = record({"name": NAME}, {"namespace": NAME, **more})
    head = {"apiVersion": one_of(version), "kind": one_of(kind)}
    return record(head | {"metadata": about, "spec": spec})


JOB = record(
    {
        "completionMode": one_of("Indexed"),
        "completions": COUNT,
        "parallelism": COUNT,
        "backoffLimit": COUNT_OR_NONE,
        "template": pod("Never"),
    }
)
JOBSET = manifest(
    "jobset.x-k8s.io/v1alpha2",
    "JobSet",
    exclusive=r"alpha\.jobset\.sigs\.k8s\.io/exclusive-topology",
    spec=record(
        {
            "network": record(
                {
                    "enableDNSHostnames": TRUE,
                    "publishNotReadyAddresses": TRUE,
                    "subdomain": NAME,
                }
            ),
            "failurePolicy": record({"maxRestarts": COUNT_OR_NONE}),
            "replicatedJobs": several(
                record(
                    {
                        "name": NAME,
                        "replicas": COUNT,
                        "template": record({"spec": JOB}),
                    }
                )
            ),
        }
    ),
)
LEADER_WORKER_SET = manifest(
    "leaderworkerset.x-k8s.io/v1",
    "LeaderWorkerSet",
    exclusive=r"leaderworkerset\.sigs\.k8s\.io/exclusive-topology",
    spec=record(
        {
            "replicas": COUNT,
            "leaderWorkerTemplate": record(
                {
                    "size": COUNT,
                    "restartPolicy": one_of("RecreateGroupOnPodRestart"),
                    "workerTemplate": pod("Always"),
                },
                {"leaderTemplate": pod("Always")},
            ),
        }
    ),
)
LEADERS = texts(r"leaderworkerset\.sigs\.k8s\.io/(name|worker-index)")
SERVICE = manifest(
    "v1",
    "Service",
    record(
        {
            "selector": LEADERS,
            "ports": several(record({"name": NAME, "port": PORT, "targetPort": NAME})),
        }
    ),
)
INFERENCE_POOL = manifest(
    "inference.networking.k8s.io/v1",
    "InferencePool",
    record(
        {
            "selector": record({"matchLabels": LEADERS}),
            "targetPorts": several(record({"number": PORT})),
            "endpointPickerRef": record(
                {"name": NAME, "port": record({"number": PORT})}
            ),
        }
    ),
)
HTTP_ROUTE = manifest(
    "gateway.networking.k8s.io/v1",
    "HTTPRoute",
    record(
        {
            "parentRefs": several(record({"name": NAME})),
            "rules": several(
                record(
                    {
                        "matches": several(
                            record(
                                {
                                    "path": record(
                                        {"type": one_of("PathPrefix"), "value": TEXT}
                                    )
                                }
                            )
                        ),
                        "backendRefs": several(
                            record(
                                {
                                    "group": one_of("inference.networking.k8s.io"),
                                    "kind": one_of("InferencePool"),
                                    "name": NAME,
                                }
                            )
                        ),
                        "timeouts": record(
                            {"request": {"type": "string", "pattern": r"^\d+s$"}}
                        ),
                    }
                )
            ),
        }
    ),
)

TYPES = {"object": dict, "array": list, "string": str, "integer": int}


def faults(value: Any, schema: dict, where: str = "") -> list[str]:
    """Where a value differs from a schema, for the words of JSON Schema used above."""
    if "enum" in schema:
        return [] if value in schema["enum"] else [f"{where}: {value!r}"]
    wanted = TYPES[schema["type"]]
    if not isinstance(value, wanted) or (wanted is int and isinstance(value, bool)):
        return [f"{where}: {value!r} is no {schema['type']}"]
    if wanted is str:
        fits = re.search(schema.get("pattern", ""), value)
        return [] if fits else [f"{where}: {value!r}"]
    if wanted is int:
        return [] if value >= schema["minimum"] else [f"{where}: {value}"]
    if wanted is list:
        found = [] if len(value) >= schema["minItems"] else [f"{where} is empty"]
        for index, each in enumerate(value):
            found += faults(each, schema["items"], f"{where}[{index}]")
        return found
    found = [
        f"{where}.{name}: missing"
        for name in schema.get("required", ())
        if name not in value
    ]
    for name, each in value.items():
        known = _of_field(schema, name)
        if known is None:
            found.append(f"{where}.{name}: unknown")
        else:
            found += faults(each, known, f"{where}.{name}")
    return found


def _of_field(schema: dict, name: str) -> dict | None:
    for pattern, known in schema.get("patternProperties", {}).items():
        if re.search(pattern, name):
            return known
    return schema.get("properties", {}).get(name)
