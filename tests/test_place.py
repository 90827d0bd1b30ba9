"""Where a process runs, read from tables of variables, and held against what jax itself makes of them."""

import socket

import pytest
from jax._src import clusters
from jax._src.clusters import cloud_tpu_cluster, cluster

from napo_jax.place import Place, find_place

SLURM = {
    "SLURM_JOB_ID": "70001",
    "SLURM_STEP_NODELIST": "gpu[007-010]",
    "SLURM_STEP_NUM_NODES": "4",
    "SLURM_NTASKS": "4",
    "SLURM_PROCID": "2",
    "SLURM_LOCALID": "0",
}
OPEN_MPI = {
    "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911",
    "OMPI_COMM_WORLD_SIZE": "8",
    "OMPI_COMM_WORLD_RANK": "5",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "4",
}
TPU = {"TPU_ML_PLATFORM": "JAX"}  # set by jax where it finds chips
GKE = TPU | {"TPU_WORKER_HOSTNAMES": "run-slice-0-0.run,run-slice-0-1.run", "TPU_WORKER_ID": "1"}
SLICES = {"MEGASCALE_NUM_SLICES": "3", "MEGASCALE_SLICE_ID": "2", "MEGASCALE_COORDINATOR_ADDRESS": "run-slice-0-0.run"}
METADATA = {"agent-worker-number": "2", "worker-network-endpoints": "a:0:10.0.0.5,b:1:10.0.0.6,c:2:10.0.0.7"}
MULTISLICE = METADATA | {
    "tpu-env": "ACCELERATOR_TYPE: 'v5litepod-16'\nMEGASCALE_COORDINATOR_ADDRESS: '10.0.0.1'\n"
    "MEGASCALE_NUM_SLICES: '2'\nMEGASCALE_SLICE_ID: '1'\nWORKER_ID: '2'\n"
}
BY_HAND = {"JAX_COORDINATOR_ADDRESS": "host:1234", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"}

# name, environment, metadata, (address, processes, process), as jax finds them too.
PLACES = [
    ("Slurm", SLURM, {}, ("gpu007:61809", 4, 2)),
    ("Slurm", SLURM | {"SLURM_STEP_NODELIST": "gpu[007,009-011]"}, {}, ("gpu007:61809", 4, 2)),
    ("Slurm", SLURM | {"SLURM_STEP_NODELIST": "gpu3,other[1-3]"}, {}, ("gpu3:61809", 4, 2)),
    ("Slurm", SLURM | {"JAX_COORDINATOR_PORT": "5000"}, {}, ("gpu007:5000", 4, 2)),
    ("Open MPI", OPEN_MPI, {}, ("10.96.0.1:62624", 8, 5)),
    ("Open MPI", OPEN_MPI | SLURM, {}, ("10.96.0.1:62624", 8, 5)),
    ("GKE", GKE, {}, ("run-slice-0-0.run:8482", 2, 1)),
    ("GKE", GKE | {"TPU_PROCESS_ADDRESSES": "h0:8476,h1:8476,h2:8476"}, {}, ("h0:8482", 3, 1)),
    ("GKE multislice", GKE | SLICES, {}, ("run-slice-0-0.run:8482", 6, 5)),
    ("Cloud TPU", TPU, METADATA, ("10.0.0.5:8482", 3, 2)),
    ("Cloud TPU", TPU, METADATA | {"worker-network-endpoints": "h0,h1,h2"}, ("h0:8482", 3, 2)),
    ("Cloud TPU multislice", TPU, MULTISLICE, ("10.0.0.1:8482", 6, 5)),
    ("Cloud TPU multislice", TPU | {"MEGASCALE_SLICE_ID": "0"}, MULTISLICE, ("10.0.0.1:8482", 6, 2)),
    ("set by hand", BY_HAND, {}, ("host:1234", 2, 1)),
    ("set by hand", BY_HAND | SLURM | GKE, {}, ("host:1234", 2, 1)),
    ("set by hand", BY_HAND | {"JAX_COORDINATOR_ADDRESS": "[::1]:1234"}, {}, ("[::1]:1234", 2, 1)),
]


def found(place):
    return place.coordinator, place.processes, place.process


@pytest.mark.parametrize(("name", "environment", "metadata", "expected"), PLACES)
def test_each_place_is_found(name, environment, metadata, expected):
    place = find_place(environment, metadata.get)
    assert (place.name, *found(place)) == (name, *expected)
    assert str(place).startswith(name)
    assert all(str(value) in str(place) for value in expected)
    assert "\n" not in str(place)


@pytest.mark.parametrize(
    ("name", "environment", "metadata", "expected"), [row for row in PLACES if "hand" not in row[0]]
)
def test_jax_finds_the_same(monkeypatch, name, environment, metadata, expected):
    names = {key for row in PLACES for key in row[1]} | {"TPU_SKIP_MDS_QUERY", "KUBERNETES_SERVICE_HOST"}
    for key in names:
        monkeypatch.delenv(key, raising=False)
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    for module in (cloud_tpu_cluster, cluster):
        monkeypatch.setattr(module, "running_in_cloud_tpu_vm", "TPU_ML_PLATFORM" in environment)
    answer = lambda key: (metadata[key], 200) if key in metadata else ("", 404)
    monkeypatch.setattr(cloud_tpu_cluster, "get_metadata", answer)
    monkeypatch.setattr(socket, "gethostbyname", lambda host: "10.0.0.1")
    theirs = clusters.ClusterEnv.auto_detect_unset_distributed_params(None, None, None, None, None, 1)
    assert theirs[:3] == expected


def test_a_task_that_has_its_node_for_itself_takes_all_devices_of_it():
    local = lambda environment: find_place(environment).local_devices
    assert local(SLURM) is None  # where jax would take the first device of each node
    shared = SLURM | {"SLURM_STEP_NUM_NODES": "1", "SLURM_LOCALID": "2"}
    assert local(shared) == (2,)
    assert local(shared | {"CUDA_VISIBLE_DEVICES": "0,1,2,3"}) == (2,)
    assert local(shared | {"CUDA_VISIBLE_DEVICES": "2"}) is None  # Slurm has chosen it
    assert local(shared | {"JAX_LOCAL_DEVICE_IDS": "0,1"}) == (0, 1)
    assert local(OPEN_MPI) == (1,)
    assert local(OPEN_MPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "1"}) is None
    assert local(BY_HAND) is None
    assert local(BY_HAND | {"JAX_LOCAL_DEVICE_IDS": "3"}) == (3,)


@pytest.mark.parametrize(
    ("environment", "metadata", "line"),
    [
        ({}, {}, "one process"),
        # A shell in an allocation is no task of it.
        ({"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "1"}, {}, "one process"),
        ({"SLURM_JOB_NUM_NODES": "4"}, {}, "one process (Slurm gave 4 nodes; srun starts a process on each)"),
        (SLURM | {"SLURM_NTASKS": "1", "SLURM_PROCID": "0"}, {}, "one process, Slurm"),
        ({"OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_RANK": "0"}, {}, "one process, Open MPI"),
        (TPU | {"TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0"}, {}, "one process, GKE"),
        (TPU, {"agent-worker-number": "0", "worker-network-endpoints": "a:0:10.0.0.5"}, "one process, Cloud TPU"),
        (TPU, {}, "one process (there is a TPU, and nothing that names its hosts)"),
        (TPU | {"TPU_SKIP_MDS_QUERY": "1"}, METADATA, "one process"),
        # On a worker of a pod, and told to leave its TPU alone.
        (GKE | {"JAX_PLATFORMS": "cpu"}, METADATA, "one process"),
        # Variables of a TPU where there is none.
        ({key: value for key, value in GKE.items() if key not in TPU}, {}, "one process"),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, {}, "one process"),
    ],
)
def test_one_process_says_so(environment, metadata, line):
    place = find_place(environment, metadata.get)
    assert str(place) == line
    assert found(place) == (None, 1, 0)


def test_a_pod_of_an_indexed_job_hears_how_to_join():
    place = find_place({"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "3"})
    assert place.processes == 1
    assert "pod 3 of an indexed Job" in str(place)
    assert "JAX_COORDINATOR_ADDRESS" in str(place)


def without(environment, name):
    return {key: value for key, value in environment.items() if key != name}


@pytest.mark.parametrize(
    ("environment", "says"),
    [
        (without(BY_HAND, "JAX_NUM_PROCESSES"), "JAX_NUM_PROCESSES is not"),
        (without(BY_HAND, "JAX_COORDINATOR_ADDRESS"), "JAX_COORDINATOR_ADDRESS is not"),
        ({"JAX_PROCESS_ID": "0"}, "JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES is not"),
        (BY_HAND | {"JAX_NUM_PROCESSES": "x"}, "JAX_NUM_PROCESSES must be a number, got 'x'"),
        (BY_HAND | {"JAX_NUM_PROCESSES": "²"}, "JAX_NUM_PROCESSES must be a number"),
        (BY_HAND | {"JAX_NUM_PROCESSES": ""}, "JAX_NUM_PROCESSES must be a number"),
        (BY_HAND | {"JAX_NUM_PROCESSES": "0"}, "JAX_NUM_PROCESSES must be at least 1, got 0"),
        (BY_HAND | {"JAX_PROCESS_ID": "2"}, "JAX_PROCESS_ID must be from 0 to 1, got 2 of 2 processes"),
        (BY_HAND | {"JAX_PROCESS_ID": "-1"}, "JAX_PROCESS_ID must be a number, got '-1'"),
        (BY_HAND | {"JAX_COORDINATOR_ADDRESS": "host"}, "JAX_COORDINATOR_ADDRESS must be host:port, got 'host'"),
        (BY_HAND | {"JAX_COORDINATOR_ADDRESS": "host:99999"}, "must be host:port"),
        (BY_HAND | {"JAX_COORDINATOR_ADDRESS": ":1234"}, "must be host:port"),
        (BY_HAND | {"JAX_LOCAL_DEVICE_IDS": "0;1"}, "JAX_LOCAL_DEVICE_IDS must be numbers"),
        (SLURM | {"SLURM_PROCID": "4"}, "SLURM_PROCID must be from 0 to 3"),
        (SLURM | {"SLURM_STEP_NODELIST": ""}, "SLURM_STEP_NODELIST names no node"),
        (SLURM | {"JAX_COORDINATOR_PORT": "http"}, "JAX_COORDINATOR_PORT must be a number, got 'http'"),
        (without(OPEN_MPI, "OMPI_MCA_orte_hnp_uri"), "Open MPI 5 sets none"),
        (without(OPEN_MPI, "OMPI_COMM_WORLD_RANK"), "OMPI_COMM_WORLD_RANK must be a number, got nothing"),
        (without(GKE, "TPU_WORKER_ID"), "TPU_WORKER_ID must be a number, got nothing"),
        (GKE | {"TPU_WORKER_ID": "2"}, "TPU_WORKER_ID must be from 0 to 1"),
        (GKE | SLICES | {"MEGASCALE_SLICE_ID": "3"}, "MEGASCALE_SLICE_ID must be from 0 to 2"),
    ],
)
def test_a_wrong_variable_is_named(environment, says):
    with pytest.raises(ValueError, match=r"^[^\n]+$") as error:
        find_place(environment)
    assert says in str(error.value)


def test_an_address_of_many_colons_is_told_from_its_port():
    uri = {"OMPI_MCA_orte_hnp_uri": "1314521088.0;tcp6://[fe80::b9b:9cf0,2620:10d::2]:43370"}
    assert find_place(OPEN_MPI | uri).coordinator == "[fe80::b9b:9cf0]:62880"


def test_a_node_behind_two_brackets_is_spelt_out():
    nodes = {"SLURM_STEP_NODELIST": "rack[0-1]node[03-04],login"}
    assert find_place(SLURM | nodes).coordinator == "rack0node03:61809"


def test_places_are_values():
    assert find_place({}) == Place()
