"""Where a process runs: how many train along, which of them it is, and where they meet.

Read from variables of the environment, the same that `jax.distributed` looks at and in its order, so that a mistake in
them is told before anything waits for it. On a Cloud TPU VM they are not in the environment: there one may ask.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping

THREE = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
_SLURM = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")
_TPU_PORT = 8482
_FIRST_PORT, _PORTS = 61440, 4096  # jobs of Slurm and Open MPI have one of these ports each, by their number


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a process runs.

    Attributes:
      name: what started it; None for a process that nothing but a user started.
      coordinator: "host:port", where the first process listens; None for a process alone.
      local_devices: the devices of its host that are its own; None for all.
      slices: groups of hosts that only a slow network joins.
      hint: what a user may have meant otherwise.
    """

    name: str | None = None
    processes: int = 1
    process: int = 0
    coordinator: str | None = None
    local_devices: tuple[int, ...] | None = None
    slices: int = 1
    hint: str = ""

    def __str__(self):
        """Says it on one line."""
        if self.processes == 1:
            return "one process" + (f", {self.name}" if self.name else "") + (f" ({self.hint})" if self.hint else "")
        slices = f" of {self.slices} slices" if self.slices > 1 else ""
        return f"{self.name}{slices}, process {self.process} of {self.processes}, which meet at {self.coordinator}"


def find_place(environment: Mapping[str, str], ask: Callable[[str], str | None] = lambda key: None) -> Place:
    """Finds out where a process runs.

    Args:
      environment: the variables, as they are once jax was imported: it sets some where there is a TPU.
      ask: returns what the metadata server of a Cloud TPU VM says of a key, or None.

    Returns:
      the `Place`. Raises a ValueError that names the variable which is missing or wrong.
    """
    for find in (_by_hand, _open_mpi, _slurm, _gke, lambda environment: _tpu_vm(environment, ask)):
        if place := find(environment):
            return place
    return Place(hint=_hint(environment))


def _by_hand(environment):
    given = [name for name in THREE if name in environment]
    if not given:
        return None
    if missing := [name for name in THREE if name not in environment]:
        raise ValueError(f"{', '.join(given)} is set in the environment, and {', '.join(missing)} is not")
    processes = _number(environment, THREE[1], 1)
    process = _number(environment, THREE[2], 0, processes)
    return Place("set by hand", processes, process, _address(environment), _local_devices(environment))


def _open_mpi(environment):
    if "OMPI_COMM_WORLD_SIZE" not in environment and "OMPI_MCA_orte_hnp_uri" not in environment:
        return None
    processes = _number(environment, "OMPI_COMM_WORLD_SIZE", 1)
    process = _number(environment, "OMPI_COMM_WORLD_RANK", 0, processes)
    if processes == 1:
        return Place("Open MPI")
    uri = environment.get("OMPI_MCA_orte_hnp_uri", "")
    # 1531576320.0;tcp://10.96.0.1,10.148.0.1:34911 or 1314521088.0;tcp6://[fe80::b9b,2620:10d::2]:43370
    found = re.match(r"(\d+)\..*?tcp6?://\[?([^,\]/]+?)(?:,|\]|:\d+$)", uri)
    if not found:
        raise ValueError(
            f"Open MPI started {processes} processes and does not say where they meet (OMPI_MCA_orte_hnp_uri is {uri!r}"
            f"; Open MPI 5 sets none): set {', '.join(THREE)}"
        )
    port = _port(environment, int(found[1]) // _PORTS % _PORTS + _FIRST_PORT)
    alone = environment.get("OMPI_COMM_WORLD_LOCAL_SIZE") == "1"
    local = _local_devices(environment, None if alone else "OMPI_COMM_WORLD_LOCAL_RANK")
    host = f"[{found[2]}]" if ":" in found[2] else found[2]
    return Place("Open MPI", processes, process, f"{host}:{port}", local)


def _slurm(environment):
    if any(name not in environment for name in _SLURM):
        return None
    processes = _number(environment, "SLURM_NTASKS", 1)
    process = _number(environment, "SLURM_PROCID", 0, processes)
    if processes == 1:
        return Place("Slurm")
    port = _port(environment, _number(environment, "SLURM_JOB_ID", 0) % _PORTS + _FIRST_PORT)
    # A task that has its node for itself has all devices of it. JAX would give it the first one alone.
    alone = environment.get("SLURM_STEP_NUM_NODES", environment.get("SLURM_NNODES")) == str(processes)
    local = _local_devices(environment, None if alone else "SLURM_LOCALID")
    return Place("Slurm", processes, process, f"{_first_node(environment['SLURM_STEP_NODELIST'])}:{port}", local)


def _first_node(nodes):
    """Returns the first of Slurm's list, such as gpu[007,009-012],gpu100 or rack[0-1]node[0-3]."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])+", nodes)
    if not first:
        raise ValueError(f"SLURM_STEP_NODELIST names no node: {nodes!r}")
    return re.sub(r"\[([^,\-\]]*)[^\]]*\]", r"\1", first[0])


def _gke(environment):
    hosts = environment.get("TPU_PROCESS_ADDRESSES", environment.get("TPU_WORKER_HOSTNAMES"))
    if not _has_tpu(environment) or hosts is None:
        return None
    worker = lambda count: _number(environment, "TPU_WORKER_ID", 0, count)
    return _tpu("GKE", environment, [host.split(":")[0] for host in hosts.split(",")], worker)


def _tpu_vm(environment, ask):
    if not _has_tpu(environment) or "TPU_SKIP_MDS_QUERY" in environment:
        return None
    answers = {key: ask(key) for key in ("agent-worker-number", "worker-network-endpoints")}
    if None in answers.values():
        return None
    # Hosts as they are, or each as name:number:address.
    hosts = [host.split(":")[-1] for host in answers["worker-network-endpoints"].split(",")]
    megascale = dict(re.findall(r"^\s*(MEGASCALE_\w+)\s*:\s*'?([^'\n]*?)'?\s*$", ask("tpu-env") or "", re.MULTILINE))
    worker = lambda count: _number(answers, "agent-worker-number", 0, count)
    return _tpu("Cloud TPU", megascale | dict(environment), hosts, worker)


def _has_tpu(environment):
    """Tells whether jax found chips of a Cloud TPU, when it was imported, and is to use them."""
    platforms = environment.get("JAX_PLATFORMS")
    return "TPU_ML_PLATFORM" in environment and (not platforms or "tpu" in platforms.split(","))


def _tpu(name, environment, hosts, worker):
    """Returns the place of a worker in a slice of these hosts, which may be one of several slices."""
    number = lambda key, *limits: _number(environment, key, *limits) if environment.get(key) else None
    slices = number("MEGASCALE_NUM_SLICES", 1) or 1
    this = number("MEGASCALE_SLICE_ID", 0, slices) or 0
    first = (environment.get("MEGASCALE_COORDINATOR_ADDRESS") or hosts[0]).split(":")[0]
    processes, process = len(hosts) * slices, worker(len(hosts)) + this * len(hosts)
    name += " multislice" if slices > 1 else ""
    if processes == 1:
        return Place(name)
    return Place(name, processes, process, f"{first}:{_port(environment, _TPU_PORT)}", slices=slices)


def _hint(environment):
    """Returns what may keep a process from the others that its user thinks of."""
    if _has_tpu(environment) and "TPU_SKIP_MDS_QUERY" not in environment:
        return "there is a TPU, and nothing that names its hosts"
    nodes = environment.get("SLURM_JOB_NUM_NODES", "1")
    if nodes != "1":
        return f"Slurm gave {nodes} nodes; srun starts a process on each"
    if "KUBERNETES_SERVICE_HOST" in environment and "JOB_COMPLETION_INDEX" in environment:
        pod = environment["JOB_COMPLETION_INDEX"]
        return f"pod {pod} of an indexed Job; with {', '.join(THREE)} its pods train together"
    return ""


def _number(values, name, least, end=None):
    """Returns a variable as a number that is at least `least` and below `end`."""
    text = values.get(name)
    if text is None or not re.fullmatch(r"[0-9]+", text):
        raise ValueError(f"{name} must be a number, got {'nothing' if text is None else repr(text)}")
    if int(text) < least or (end is not None and int(text) >= end):
        limits = f"at least {least}" if end is None else f"from {least} to {end - 1}"
        raise ValueError(f"{name} must be {limits}, got {int(text)}" + (f" of {end} processes" if end else ""))
    return int(text)


def _port(environment, default):
    """Returns the port that JAX_COORDINATOR_PORT asks for, or else the default."""
    return _number(environment, "JAX_COORDINATOR_PORT", 1, 65536) if "JAX_COORDINATOR_PORT" in environment else default


def _address(environment):
    host, _, port = environment[THREE[0]].rpartition(":")
    if not host or not re.fullmatch(r"[0-9]+", port) or not 0 < int(port) < 65536:
        raise ValueError(f"{THREE[0]} must be host:port, got {environment[THREE[0]]!r}")
    return f"{host}:{port}"


def _local_devices(environment, rank=None):
    """Returns the devices that JAX_LOCAL_DEVICE_IDS names; else the one of a variable with the rank on a host, or all.

    Where only one device can be seen, it was chosen already.
    """
    if "JAX_LOCAL_DEVICE_IDS" in environment:
        given = environment["JAX_LOCAL_DEVICE_IDS"]
        if not re.fullmatch(r"[0-9]+(,[0-9]+)*", given):
            raise ValueError(f"JAX_LOCAL_DEVICE_IDS must be numbers with commas between them, got {given!r}")
        return tuple(map(int, given.split(",")))
    visible = environment.get("CUDA_VISIBLE_DEVICES", "").split(",")
    if rank is None or (len(visible) == 1 and visible[0]):
        return None
    return (_number(environment, rank, 0),)
