"""launch/gke: the manifests as Kubernetes reads them, and what kubectl is asked."""

import subprocess
from pathlib import Path

import pytest
import yaml
from stand_ins import World

SCRIPT = Path(__file__).parent.parent / "launch/gke/apply.sh"
# With what YAML, a shell or Kubernetes would take for something else.
FLAGS = [
    "--config",
    "configs/llava7b.py",
    "--workdir",
    'gs://bucket/"a" \\ & $HOME $(HOME) $$ __NAME__',
    "--x",
    "no: #1",
]
NAMES = ["--name", "a-run", "--image", "host/p/i:1"]
TPU = [*NAMES, "--type", "tpu-v5-lite-podslice", "--topology", "4x4", "--chips", "4"]
GPU = [*NAMES, "--type", "nvidia-h100-80gb", "--chips", "8", "--workers", "2"]


@pytest.fixture
def world(tmp_path):
    return lambda **plan: World(tmp_path / "world", **plan)


def apply(world, *words):
    words = ["bash", SCRIPT, *words]
    return subprocess.run(words, env=world.environment, capture_output=True, text=True, timeout=60)


def applied(world, *words):
    """Returns what is applied: the service and the JobSet."""
    done = apply(world, *words, "--", *FLAGS)
    assert done.returncode == 0, done.stderr
    text = (world.folder / "applied.yaml").read_text()
    service, jobset = yaml.safe_load_all(text)
    return service, jobset


def parts(jobset):
    """Returns the spec of the only replicated job, of its job, of its pods, and their container."""
    (replicated,) = jobset["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    (container,) = job["template"]["spec"]["containers"]
    return replicated, job, job["template"]["spec"], container


def check_what_both_have(service, jobset):
    assert (service["kind"], jobset["kind"]) == ("Service", "JobSet")
    # Headless, over the pods of this JobSet, and where JobSet gives them names.
    assert service["spec"]["clusterIP"] == "None"
    assert service["spec"]["publishNotReadyAddresses"] is True
    assert service["spec"]["selector"] == {"jobset.sigs.k8s.io/jobset-name": "a-run"}
    assert jobset["spec"]["network"]["enableDNSHostnames"] is True
    names = {service["metadata"]["name"], jobset["metadata"]["name"], jobset["spec"]["network"]["subdomain"]}
    assert names == {"a-run"}
    _, job, pod, container = parts(jobset)
    # A pod that ends has all of them start again; by nobody else, and not after status 2.
    assert pod["restartPolicy"] == "Never"
    assert (job["backoffLimit"], job["completionMode"]) == (0, "Indexed")
    (rule,) = job["podFailurePolicy"]["rules"]
    assert rule["action"] == "FailJob"
    assert rule["onExitCodes"] == {"containerName": container["name"], "operator": "In", "values": [2]}
    (rule,) = jobset["spec"]["failurePolicy"]["rules"]
    assert (rule["action"], rule["onJobFailureReasons"]) == ("FailJobSet", ["PodFailurePolicy"])
    assert container["args"] == [flag.replace("$", "$$") for flag in FLAGS]
    assert "command" not in container, "the image's own gets the signals"
    assert all(isinstance(entry.get("value", ""), str) for entry in container["env"])
    mounted = {mount["name"] for mount in container["volumeMounts"]}
    assert mounted == {volume["name"] for volume in pod["volumes"]}


def test_a_slice(world):
    service, jobset = applied(world(), *TPU)
    check_what_both_have(service, jobset)
    replicated, job, pod, container = parts(jobset)
    assert (replicated["replicas"], job["parallelism"], job["completions"]) == (1, 4, 4)
    assert jobset["spec"]["failurePolicy"]["maxRestarts"] == 10
    assert pod["terminationGracePeriodSeconds"] == 900
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v5-lite-podslice",
        "cloud.google.com/gke-tpu-topology": "4x4",
    }
    assert container["resources"] == {"requests": {"google.com/tpu": 4}, "limits": {"google.com/tpu": 4}}
    assert jobset["metadata"]["annotations"] == {
        "alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"
    }
    assert "tolerations" not in pod


def test_slices_with_everything_asked_for(world):
    more = ["--slices", "3", "--namespace", "train", "--service-account", "trainer", "--bucket", "my-bucket", "--spot"]
    service, jobset = applied(world(), *TPU, *more, "--grace", "1200", "--retries", "3")
    check_what_both_have(service, jobset)
    replicated, _, pod, container = parts(jobset)
    assert replicated["replicas"] == 3
    assert service["metadata"]["namespace"] == jobset["metadata"]["namespace"] == "train"
    assert (pod["serviceAccountName"], pod["terminationGracePeriodSeconds"]) == ("trainer", 1200)
    assert jobset["spec"]["failurePolicy"]["maxRestarts"] == 3
    assert pod["nodeSelector"]["cloud.google.com/gke-spot"] == "true"
    assert [toleration["key"] for toleration in pod["tolerations"]] == ["cloud.google.com/gke-spot"]
    annotations = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["metadata"]["annotations"]
    assert annotations == {"gke-gcsfuse/volumes": "true"}
    (bucket,) = (volume["csi"] for volume in pod["volumes"] if "csi" in volume)
    assert bucket["driver"] == "gcsfuse.csi.storage.gke.io"
    assert bucket["volumeAttributes"]["bucketName"] == "my-bucket"
    assert {"name": "bucket", "mountPath": "/gcs"} in container["volumeMounts"]


def test_gpus_are_told_where_they_meet(world):
    service, jobset = applied(world(), *GPU)
    check_what_both_have(service, jobset)
    replicated, job, pod, container = parts(jobset)
    assert (replicated["replicas"], job["parallelism"], job["completions"]) == (1, 2, 2)
    assert container["resources"]["limits"] == {"nvidia.com/gpu": 8}
    assert pod["nodeSelector"] == {"cloud.google.com/gke-accelerator": "nvidia-h100-80gb"}
    variables = {entry["name"]: entry.get("value") for entry in container["env"]}
    # JobSet's names: of the JobSet, the replicated job, its number, the pod's number; and the service.
    assert variables["JAX_COORDINATOR_ADDRESS"] == f"a-run-{replicated['name']}-0-0.a-run:8482"
    assert variables["JAX_NUM_PROCESSES"] == "2"
    assert variables["JAX_PLATFORMS"] == "cuda"
    (index,) = (entry for entry in container["env"] if entry["name"] == "JAX_PROCESS_ID")
    assert "batch.kubernetes.io/job-completion-index" in index["valueFrom"]["fieldRef"]["fieldPath"]


@pytest.mark.parametrize("name", ["tpu.yaml", "gpu.yaml"])
def test_the_manifests_are_yaml_and_name_nobody(name):
    text = (SCRIPT.parent / name).read_text()
    for document in yaml.safe_load_all(text):
        assert document["metadata"]["name"] == "__NAME__"
    assert "gs://" not in text
    assert "project" not in text


@pytest.mark.parametrize(("state", "verbs"), [("", ["apply"]), ("a-run ", []), ("a-run Failed", ["delete", "apply"])])
def test_what_goes_on_is_left_alone_and_what_has_ended_starts_again(world, state, verbs):
    world = world(jobset=[state])
    done = apply(world, *TPU, "--", *FLAGS)
    assert done.returncode == 0, done.stderr
    assert [call[1] for call in world.calls("kubectl")] == ["get", *verbs]
    assert "logs --follow" in done.stderr
    assert "a-run-slice-0" in done.stderr


def test_deleting_deletes_both(world):
    world = world()
    assert apply(world, "--name", "a-run", "--namespace", "train", "--delete").returncode == 0
    assert world.calls("kubectl") == [
        ["--namespace=train", "delete", "jobset/a-run", "service/a-run", "--ignore-not-found"]
    ]


def test_a_cluster_that_refuses_is_a_failure(world):
    assert apply(world(kubectl=[1]), *TPU, "--", *FLAGS).returncode == 1


def test_a_dry_run_shows_the_manifest_and_asks_nobody(world):
    world = world()
    done = apply(world, *TPU, "--dry-run", "--context", "c1", "--", *FLAGS)
    assert done.returncode == 0, done.stderr
    assert world.calls("kubectl") == []
    shown = [line for line in done.stdout.splitlines() if line.startswith("+ ")]
    assert all("--context=c1" in line for line in shown)
    manifest = "\n".join(line for line in done.stdout.splitlines() if not line.startswith("+ "))
    assert [document["kind"] for document in yaml.safe_load_all(manifest)] == ["Service", "JobSet"]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (TPU[2:], "--name is missing"),
        (TPU[:-2], "--chips is missing"),
        ([*TPU, "--topology", "3x3"], "topology 3x3 has 9 chips"),
        ([*TPU, "--topology", "4by4"], "--topology must be like 4x4"),
        ([*TPU, "--chips", "3"], "not nodes of 3"),
        ([*TPU, "--workers", "2"], "has 4 nodes of 4 chips, and --workers is 2"),
        ([*TPU, "--image", "a b"], "--image cannot be 'a b'"),
        ([*TPU, "--name", "A_run"], "--name must be lower-case"),
        ([*TPU, "--retries", "x"], "--retries must be a number"),
        (GPU[:-2], "--workers is missing"),
        ([*GPU, "--slices", "2"], "--slices and --topology are of TPUs"),
    ],
)
def test_wrong_arguments_are_named(world, words, says):
    done = apply(world(), *words, "--", *FLAGS)
    assert done.returncode == 2
    assert says in done.stderr.splitlines()[0]
    assert "usage:" in done.stderr
