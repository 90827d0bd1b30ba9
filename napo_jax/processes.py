"""Several processes that run one program together, one for each host or more."""

import contextlib
import math
import os
import re
import socket
import sys
import threading
import time
import traceback
import urllib.error
import urllib.request

import jax

from napo_jax.command import one_line, verdict
from napo_jax.place import THREE, Place, find_place

NOT_JOINED = 75  # os.EX_TEMPFAIL: nothing is wrong with the command, and it may be given again
SECONDS = "NAPO_JAX_JOIN_SECONDS"  # the variable that says how long to wait for the others
_DEFAULT_SECONDS = 300


class NotJoinedError(Exception):
    """The others were not there in time."""


@contextlib.contextmanager
def together(*, insist=True, say=None):
    """Makes this process one of several for the time of a `with`, if it is; to be entered before any device is touched.

    On a TPU pod, on GKE, under Slurm and under Open MPI they find each other. Elsewhere three variables of the
    environment say where the first one listens (host:port), how many there are, and which one this is.

    A process that fails ends at once. JAX would have it wait for the others, which wait for it in a collective; left
    alone, they find out and end too, so that all can be started again. So does one that does not find the others, with
    a line that says where it looked, and with exit status `NOT_JOINED`.

    Args:
      insist: whether to raise a ValueError for a process that nothing says has others.
      say: takes a line that says where this process runs, before it waits for any other.
    """
    place = find_place(os.environ, _ask_metadata)
    seconds = _seconds(os.environ)
    if insist and place.name is None:
        raise ValueError(
            "this is said to be one of several processes, and nothing in the environment says which: no TPU pod, "
            f"no srun, no mpirun; set {', '.join(THREE)}" + (f" ({place.hint})" if place.hint else "")
        )
    if say is not None:
        say(f"place    {place}")
    if place.processes == 1:
        yield
        return
    try:
        join(place, seconds)
        yield
    except SystemExit:  # all of them end like this, in the same step
        raise
    except BaseException as error:
        said = (one_line(error), NOT_JOINED) if isinstance(error, NotJoinedError) else verdict(error)
        line, status = said or (traceback.format_exc().rstrip(), 1)
        print(line, file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def join(place: Place, seconds: float):
    """Makes this process one of several; raises NotJoinedError if the first one is not there in time.

    If another one is not, this process ends. JAX would end it by a signal, with a stack trace of its own.
    """
    if jax.distributed.is_initialized():  # by what this process ran before
        return
    until = time.monotonic() + seconds
    what = f"process {place.process} of {place.processes} did not join the others within {seconds:.0f} s"
    if place.process > 0 and (reason := _unreachable(place.coordinator, until)):
        raise NotJoinedError(f"{what}: no answer from {place.coordinator}, where process 0 listens ({reason})")
    if place.process == 0 and (reason := _taken(place.coordinator, until)):
        raise NotJoinedError(f"process 0 of {place.processes} cannot listen at {place.coordinator}: {reason}")
    missing = NotJoinedError(f"{what}: not all of them came to {place.coordinator}")
    with _ends_after(until - time.monotonic(), missing):
        try:
            jax.distributed.initialize(
                place.coordinator,
                place.processes,
                place.process,
                local_device_ids=place.local_devices,
                cluster_detection_method="deactivate",  # it is known by now
                initialization_timeout=math.ceil(seconds) + 60,  # later than that
            )
        except RuntimeError as error:
            reason = str(error).strip().partition("\n")[0]
            raise NotJoinedError(f"{what}: {reason}, at {place.coordinator}") from error


@contextlib.contextmanager
def _ends_after(seconds, error):
    """Ends this process with a line if the body of a `with` takes longer, whatever it waits for."""

    def end():
        sys.stdout.flush()
        print(one_line(error), file=sys.stderr, flush=True)
        os._exit(NOT_JOINED)

    timer = threading.Timer(max(0, seconds), end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _taken(address, until):
    """Waits until this process can listen at a port; returns None, or after that time why it cannot.

    The port may still be that of a process which is about to end. And JAX, where it cannot listen, may crash.
    """
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    while "JAX_COORDINATOR_BIND_ADDRESS" not in os.environ:  # which would be another address
        try:
            socket.create_server(("", int(address.rpartition(":")[2])), family=family, dualstack_ipv6=both).close()
            return None
        except OSError as error:
            if time.monotonic() >= until:
                return os.strerror(error.errno)
        time.sleep(min(1, max(0, until - time.monotonic())))
    return None


def _unreachable(address, until):
    """Waits until something listens at host:port; returns None, or after that time why not."""
    host, _, port = address.rpartition(":")
    while True:
        left = until - time.monotonic()
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=max(0.1, min(left, 10))).close()
            return None
        except OSError as error:  # also of a name that is not known yet
            reason = error.strerror or str(error) or type(error).__name__
        if left <= 0:
            return reason
        time.sleep(min(1, max(0, left)))


def _seconds(environment):
    """Returns how long to wait for the others."""
    text = environment.get(SECONDS, str(_DEFAULT_SECONDS))
    if not re.fullmatch(r"[0-9]+", text) or int(text) < 1:
        raise ValueError(f"{SECONDS} must be a number of seconds, got {text!r}")
    return int(text)


def _ask_metadata(key):
    """Returns what the metadata server of a Cloud TPU VM says of a key; None if it says nothing."""
    host = os.environ.get("GCE_METADATA_IP", "metadata.google.internal")
    url = f"http://{host}/computeMetadata/v1/instance/attributes/{key}"
    request = urllib.request.Request(url, headers={"Metadata-Flavor": "Google"})
    for wait in (0.5, 1, 2, 4, None):
        try:
            with urllib.request.urlopen(request, timeout=10) as answer:
                return answer.read().decode()
        except urllib.error.HTTPError as error:
            if error.code == 404:  # there is a server, and no such key
                return None
        except OSError:
            pass  # it is not up yet, or this is no such machine
        if wait is not None:
            time.sleep(wait)
    return None
