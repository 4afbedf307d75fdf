"""Job files: every kind for every accelerator, and what is refused."""

import itertools
import os
import subprocess
from pathlib import Path

import pytest
import yaml

from jaxspark.launch import pods
from jaxspark.pods.accelerators import parse_accelerator
from tests.launch.manifest_schemas import (
    HTTP_ROUTE,
    INFERENCE_POOL,
    JOBSET,
    LEADER_WORKER_SET,
    SERVICE,
    faults,
)
from tests.programs import call

SCHEMAS = {"jobset": JOBSET, "leaderworkerset": LEADER_WORKER_SET}
# Hosts and chips of each.
MACHINES = {
    "v5e:2x4": (1, 8),
    "v5e:4x8": (8, 4),
    "v5p:2x2x1": (1, 4),
    "v5p:4x4x4": (16, 4),
    "v5p:8x8x12": (192, 4),
    "v6e:1x1": (1, 1),
    "v6e:2x4": (1, 8),
    "v6e:8x8": (16, 4),
    "tpu7x:2x2x4": (4, 4),
    "h100:4": (1, 4),
    "h100:16": (2, 8),
    "h100-mega:32": (4, 8),
    "h200:8": (1, 8),
    "b200:64": (8, 8),
}
GPUS = [name for name in MACHINES if not parse_accelerator(name).is_tpu]
TRAIN = "train_draft --data=/data/answers.jsonl --out=/data/run --steps=3000"
EVERYTHING = {
    "name": "dspark-7",
    "namespace": "research",
    "service_account": "trainer",
    "volume": "gs://weights/dspark/",
    "environment": ("HF_HUB_OFFLINE=1", "NOTE=a=b, $(c)"),
    "secret": "hub",
    "grace_seconds": 300,
}


def config(**options) -> pods.Config:
    given = {"command": TRAIN, "accelerator": "v5p:4x4x4", **options}
    if given.get("kind") != "slurm":
        given.setdefault("image", "registry/jaxspark:1")
    return pods.Config(**given)


def manifests(**options) -> list[dict]:
    return list(yaml.safe_load_all(pods.job_file(config(**options))))


def made(**options) -> dict:
    return yaml.safe_load(pods.job_file(config(**options)))


def spec_of_pod(manifest: dict) -> dict:
    spec = manifest["spec"]
    if manifest["kind"] == "JobSet":
        [job] = spec["replicatedJobs"]
        return job["template"]["spec"]["template"]["spec"]
    return spec["leaderWorkerTemplate"]["workerTemplate"]["spec"]


def container(**options) -> dict:
    [only] = spec_of_pod(made(**options))["containers"]
    return only


def variables(**options) -> dict:
    return {
        each["name"]: each.get("value") or each["valueFrom"]["fieldRef"]["fieldPath"]
        for each in container(**options).get("env", [])
    }


@pytest.mark.parametrize("options", [{}, EVERYTHING, {"volume": "pvc:weights"}])
@pytest.mark.parametrize("kind", SCHEMAS)
def test_manifests_have_only_fields_that_exist(kind, options):
    for accelerator in MACHINES:
        manifest = made(kind=kind, accelerator=accelerator, **options)
        assert faults(manifest, SCHEMAS[kind]) == []


@pytest.mark.parametrize("kind", SCHEMAS)
def test_a_misspelt_or_missing_field_is_a_fault(kind):
    manifest = made(kind=kind)
    spec_of_pod(manifest)["containers"][0]["imagee"] = "x"
    del manifest["metadata"]["name"]
    missing, unknown = faults(manifest, SCHEMAS[kind])
    assert missing == ".metadata.name: missing"
    assert unknown.endswith(".containers[0].imagee: unknown")


@pytest.mark.parametrize(("accelerator", "machines"), MACHINES.items())
def test_hosts_and_chips_follow_from_the_accelerator(accelerator, machines):
    hosts, chips = machines
    [job] = made(accelerator=accelerator)["spec"]["replicatedJobs"]
    assert job["template"]["spec"]["completions"] == hosts
    assert job["template"]["spec"]["parallelism"] == hosts
    group = made(kind="leaderworkerset", accelerator=accelerator)["spec"]
    assert group["leaderWorkerTemplate"]["size"] == hosts
    for kind in SCHEMAS:
        limits = container(kind=kind, accelerator=accelerator)["resources"]["limits"]
        assert list(limits.values()) == [chips]


@pytest.mark.parametrize(
    ("accelerator", "message"),
    [
        ("v9:4x4", "unknown accelerator 'v9'; expected one of v5e, v5p"),
        ("v5p", "expected a topology, such as 4x4x4"),
        ("v5p:4x4xfour", "expected a topology, such as 4x4x4"),
        ("v5p:8x8", "a topology of 3 dimensions, such as 4x4x4, not of 2"),
        ("v6e:4x4x4", "a topology of 2 dimensions, such as 4x4, not of 3"),
        ("v6e:3x4", "no such slice; expected 1x1, 2x2"),
        ("v6e:16x32", "no such slice"),
        ("v5p:1x1x2", "no such slice; expected 2x2x1"),
        ("v5p:4x4x6", "no such slice"),
        ("v5p:8x4x4", "ascending multiples of 4"),
        ("v5p:0x4x4", "no such slice"),
        ("tpu7x:24x24x24", "at most 9216 chips"),
        ("h100:12", "expected 1, 2 or 4 GPUs of one node, or a multiple of 8"),
        ("h100:0", "a multiple of 8"),
        ("h100:4x4", "a multiple of 8"),
    ],
)
def test_an_accelerator_that_cannot_be_is_refused_by_name(accelerator, message):
    with pytest.raises(ValueError, match=f"^accelerator={accelerator}: .*{message}"):
        config(accelerator=accelerator)


@pytest.mark.parametrize("kind", SCHEMAS)
def test_tpu_hosts_find_each_other_by_themselves(kind):
    slice_ = container(kind=kind, accelerator="v6e:8x8")
    assert slice_["command"] == ["jaxspark", *TRAIN.split(), "--distributed=auto"]
    assert "env" not in slice_


def test_gpu_hosts_of_a_jobset_meet_at_the_first_by_its_stable_name():
    manifest = made(accelerator="h100:16", name="run")
    [job] = manifest["spec"]["replicatedJobs"]
    # JobSet's names: set-job-replica-host.subdomain
    first = f"run-{job['name']}-0-0.{manifest['spec']['network']['subdomain']}"
    assert variables(accelerator="h100:16", name="run") == {
        "JAXSPARK_COORDINATOR": f"{first}:8482",
        "JAXSPARK_PROCESSES": "2",
        "JAXSPARK_PROCESS_INDEX": (
            "metadata.annotations['batch.kubernetes.io/job-completion-index']"
        ),
    }


def test_gpu_hosts_of_a_group_meet_at_its_leader():
    """The set tells them itself; see `Job.of_environment`."""
    assert variables(kind="leaderworkerset", accelerator="h100:16") == {}


SERVE = "serve --target=/data/model --mesh=model:8 --drain_seconds=90"


def test_a_group_that_serves_can_be_probed_and_reached():
    options = {"kind": "leaderworkerset", "command": SERVE, "replicas": 3}
    options |= {"accelerator": "v6e:4x4", "volume": "pvc:models", "namespace": "llm"}
    group, service = manifests(**options)
    assert faults(group, LEADER_WORKER_SET) == [] == faults(service, SERVICE)
    assert group["spec"]["replicas"] == 3
    templates = group["spec"]["leaderWorkerTemplate"]
    [leader], [worker] = (
        templates[f"{each}Template"]["spec"]["containers"]
        for each in ("leader", "worker")
    )
    for probe, path in (
        ("startupProbe", "/health"),
        ("livenessProbe", "/health"),
        ("readinessProbe", "/ready"),
    ):
        assert leader[probe]["httpGet"] == {"path": path, "port": "http"}
        assert probe not in worker
    assert leader["ports"] == [{"name": "http", "containerPort": 8000}]
    # Else they run the same, and keep what they compile.
    assert leader["command"] == worker["command"]
    assert leader["command"][-2:] == ["--distributed=auto", "--host=0.0.0.0"]
    cache = {"name": "JAX_COMPILATION_CACHE_DIR", "value": "/data/xla"}
    assert cache in leader["env"] and cache in worker["env"]
    assert service["metadata"] == {"name": "jaxspark-http", "namespace": "llm"}
    assert service["spec"]["selector"] == {
        "leaderworkerset.sigs.k8s.io/name": "jaxspark",
        "leaderworkerset.sigs.k8s.io/worker-index": "0",
    }


def test_a_gateway_finds_leaders_through_a_pool():
    options = {"kind": "leaderworkerset", "accelerator": "h100:16", "name": "flash"}
    _, service, pool, route = manifests(
        **options, command=f"{SERVE} --port=9000", gateway="inference-gateway"
    )
    assert faults(pool, INFERENCE_POOL) == [] == faults(route, HTTP_ROUTE)
    assert pool["spec"]["selector"]["matchLabels"] == service["spec"]["selector"]
    assert pool["spec"]["targetPorts"] == [{"number": 9000}]
    [rule] = route["spec"]["rules"]
    [backend] = rule["backendRefs"]
    assert (backend["kind"], backend["name"]) == (pool["kind"], "flash")
    assert route["spec"]["parentRefs"] == [{"name": "inference-gateway"}]


def test_a_server_s_flags_stay_as_they_are():
    options = {"kind": "leaderworkerset", "accelerator": "h100:8"}
    kept = {"environment": ("JAX_COMPILATION_CACHE_DIR=/x",), "volume": "pvc:a"}
    group, _ = manifests(**options, **kept, command=f"{SERVE} --host=10.0.0.1")
    [leader] = group["spec"]["leaderWorkerTemplate"]["leaderTemplate"]["spec"][
        "containers"
    ]
    assert leader["command"][-1] == "--host=10.0.0.1"
    assert [each["value"] for each in leader["env"]] == ["/x"]


@pytest.mark.parametrize("kind", SCHEMAS)
@pytest.mark.parametrize("accelerator", ["v6e:2x4", "h100:8"])
def test_a_host_alone_is_told_of_no_others(kind, accelerator):
    alone = container(kind=kind, accelerator=accelerator)
    assert alone["command"] == ["jaxspark", *TRAIN.split()] and "env" not in alone
    # And needs no node pool for itself.
    assert "annotations" not in made(kind=kind, accelerator=accelerator)["metadata"]


@pytest.mark.parametrize("kind", SCHEMAS)
def test_hosts_of_a_slice_share_a_node_pool_with_nobody(kind):
    [(name, value)] = made(kind=kind)["metadata"]["annotations"].items()
    assert name.endswith("/exclusive-topology")
    assert value == "cloud.google.com/gke-nodepool"


def test_a_bucket_is_mounted_where_all_hosts_see_it():
    [job] = made(volume="gs://weights/dspark/")["spec"]["replicatedJobs"]
    pod = job["template"]["spec"]["template"]
    assert pod["metadata"]["annotations"] == {"gke-gcsfuse/volumes": "true"}
    [volume] = pod["spec"]["volumes"]
    assert volume["csi"]["volumeAttributes"] == {
        "bucketName": "weights",
        "mountOptions": "implicit-dirs,only-dir=dspark",
    }
    mounts = container(volume="gs://weights")["volumeMounts"]
    assert mounts == [{"name": volume["name"], "mountPath": "/data"}]


def test_texts_reach_the_command_as_they_are():
    ask = {"command": 'jaxspark generate --chat="Why $(HOME)?"', "image": "x"}
    assert container(**ask)["command"][2] == "--chat=Why $$(HOME)?"
    assert variables(environment=("A=b=c, $(d)",)) == {"A": "b=c, $$(d)"}


def run_script(script: str, folder: Path, restarts: int, status: int) -> list[list]:
    """Runs a batch script with a Slurm that only notes what it is asked."""
    notes = folder / "notes"
    for name in ("srun", "scontrol"):
        program = folder / name
        program.write_text(
            f'#!/bin/bash\nprintf "%s\\0" {name} "$HOME" "$NOTE" "$@" >> {notes}\n'
            f'printf "\\n" >> {notes}\n[ {name} = scontrol ] || exit {status}\n'
        )
        program.chmod(0o755)
    path = f"{folder}:{os.environ['PATH']}"
    slurm = {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": str(restarts)}
    environment = {"PATH": path, "HOME": "home", **slurm}
    done = subprocess.run(["bash"], input=script, text=True, env=environment)
    assert done.returncode == status
    return [line.split("\0")[:-1] for line in notes.read_text().splitlines()]


@pytest.mark.parametrize("accelerator", GPUS)
def test_a_batch_script_has_a_task_for_every_gpu(accelerator):
    script = pods.job_file(config(kind="slurm", accelerator=accelerator))
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    hosts, gpus = MACHINES[accelerator]
    assert f"#SBATCH --nodes={hosts}\n" in script
    assert f"#SBATCH --ntasks-per-node={gpus}\n" in script
    assert f"#SBATCH --gpus-per-node={gpus}\n" in script
    # Slurm reads no settings behind the first command.
    head = itertools.takewhile(lambda line: line.startswith("#"), script.splitlines())
    assert script.count("#SBATCH") == len(list(head)) - 1


def test_a_batch_script_runs_the_command_word_for_word(tmp_path):
    command = 'generate --chat="Why isn\'t $HOME blue?"'
    script = pods.job_file(
        config(
            kind="slurm",
            accelerator="h100:16",
            command=command,
            environment=("NOTE=it's $HOME",),
        )
    )
    [srun] = run_script(script, tmp_path, restarts=0, status=0)
    assert srun[:3] == ["srun", "home", "it's $HOME"]
    assert srun[-4:] == [
        *("jaxspark", "generate"),
        *("--chat=Why isn't $HOME blue?", "--distributed=auto"),
    ]


@pytest.mark.parametrize(
    ("restarts", "status", "again"),
    [(0, 0, False), (0, 143, True), (1, 1, True), (2, 143, False)],
)
def test_a_failed_batch_job_goes_back_into_the_queue(restarts, status, again, tmp_path):
    script = pods.job_file(config(kind="slurm", accelerator="h100:16", restarts=2))
    _, *rest = run_script(script, tmp_path, restarts, status)
    assert [each[3:] for each in rest] == ([["requeue", "7"]] if again else [])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image": None}, "--kind=jobset needs an --image"),
        ({"name": "Run"}, "name=Run: expected at most 40 lower-case"),
        ({"name": "x" * 41}, "expected at most 40"),
        ({"volume": "/data"}, "volume=/data: expected gs://BUCKET"),
        ({"environment": ("A",)}, "environment=A: expected NAME=VALUE"),
        ({"command": "trian --out=x"}, "--command=trian --out=x: expected a launcher"),
        ({"command": "jaxspark"}, "expected a launcher"),
        (
            {"command": f"{TRAIN} --distributed=auto"},
            "expected no --distributed; the file adds",
        ),
        (
            {"command": f"{TRAIN} --processes=4"},
            "expected no --processes; the file adds",
        ),
        ({"kind": "leaderworkerset", "restarts": 1}, "restarts without end"),
        ({"replicas": 2}, "--replicas: expected no such flag with --kind=jobset"),
        ({"kind": "leaderworkerset", "gateway": "a"}, "expected a --command that serv"),
        (
            {"kind": "leaderworkerset", "command": "serve", "grace_seconds": 70},
            "--grace_seconds=70: a server that drains for 60 s needs at least 80",
        ),
        (
            {"kind": "slurm", "accelerator": "h100:8", "volume": "pvc:a", "image": "b"},
            "--image, --volume: expected no such flag with --kind=slurm",
        ),
        ({"command": "generate --chat='hi"}, "command=generate.*No closing quotation"),
        ({"kind": "slurm"}, "--accelerator=v5p:4x4x4: expected GPUs, such as h100:16"),
    ],
)
def test_what_cannot_run_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        config(**options)


def test_the_file_is_printed_or_written(tmp_path):
    options = {"command": TRAIN, "accelerator": "h100:16", "image": "x"}
    _, printed = call(tmp_path, pods, **options)
    _, told = call(tmp_path, pods, **options, out="job.yaml")
    assert told == "wrote job.yaml (2 hosts with 8 chips each)\n"
    assert (tmp_path / "job.yaml").read_text() == printed
