"""Compiled programs: kept in a run's workdir from one start to the next, and counted up to the first step.

A step of 7B takes minutes to compile. JAX can keep programs in a folder, under a key of all that decides them: the
program, its devices, the compiler's version and flags. What is loaded is what was compiled, so that results stay the
same to the bit. Of several processes the first one writes, and all read. A program that cannot be read or written is
a warning of JAX's, and is compiled.
"""

import hashlib
import platform
import time
import zlib
from pathlib import Path

import jax
from etils import epath
from jax.experimental.compilation_cache import compilation_cache

_REQUESTS, _HITS = (f"/jax/compilation_cache/{name}" for name in ("compile_requests_use_cache", "cache_hits"))
_COMPILING = "/jax/core/compile/backend_compile_duration"  # or loading, where there is something to load
_LEAST_SECONDS = 0.2  # what compiles faster is hardly slower than a file

_SETTINGS = (
    "jax_compilation_cache_dir",
    "jax_persistent_cache_min_compile_time_secs",
    "jax_persistent_cache_enable_xla_caches",
)


class Programs:
    """The programs that a run compiles while it is inside a `with` of this."""

    def __init__(self, folder=None):
        """Takes the folder to keep them in, local or gs://; None: they are kept where JAX is told to, or nowhere."""
        self._folder, self._before = folder, None
        self._begun, self._counts, self._seconds = time.monotonic(), {_REQUESTS: 0, _HITS: 0}, 0.0

    def __enter__(self):
        jax.monitoring.register_event_listener(self._count)
        jax.monitoring.register_event_duration_secs_listener(self._add)
        return self

    def __exit__(self, *_):
        jax.monitoring.unregister_event_listener(self._count)
        jax.monitoring.unregister_event_duration_listener(self._add)
        if self._before:
            self._set(self._before)

    def keep(self):
        """Begins to keep programs; asks for devices. Whoever has named a folder before, as in JAX's variables, wins.

        Returns:
          the names of damaged files that it removed.
        """
        if self._folder is None or jax.config.jax_compilation_cache_dir:
            return []
        folder = epath.Path(self._folder)
        if jax.default_backend() == "cpu":
            folder /= f"cpu-{_kind_of_cpu()}"
        removed = _remove_damaged(folder) if jax.process_index() == 0 else []
        self._before = [getattr(jax.config, name) for name in _SETTINGS]
        # What XLA keeps for GPUs beside JAX's files, it writes to local folders only.
        beside = "none" if "://" in str(folder) else self._before[2]
        self._set([str(folder), min(_LEAST_SECONDS, self._before[1]), beside])
        return removed

    def _set(self, values):
        for name, value in zip(_SETTINGS, values, strict=True):
            jax.config.update(name, value)
        compilation_cache.reset_cache()  # or JAX goes on with the folder that it opened first

    def _count(self, event, **_):
        if event in self._counts:
            self._counts[event] += 1

    def _add(self, event, seconds, **_):
        if event == _COMPILING:
            self._seconds += seconds

    def __str__(self):
        loaded = self._counts[_HITS]
        return (
            f"{time.monotonic() - self._begun:.1f} s after the start, {self._seconds:.1f} s of them for "
            f"{self._counts[_REQUESTS] - loaded} programs compiled and {loaded} loaded"
        )


def _kind_of_cpu():
    """Returns a short name of what this machine's CPU can do: a program for another one may end this process."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.exists() else [platform.processor()]
    told = {line for line in lines if line.partition("\t")[0] in ("flags", "Features", "model name")}
    return hashlib.sha256(repr((platform.machine(), sorted(told or lines))).encode()).hexdigest()[:8]


def _remove_damaged(folder):
    """Removes what was cut short as it was written: JAX would warn of it at each start, and never write it anew."""
    found = []
    for file in folder.glob("*-cache") if folder.exists() else ():
        content = file.read_bytes()
        if content[:1] == b"\x78":  # zlib; with the package zstandard installed, JAX packs otherwise
            try:
                zlib.decompress(content)
                continue
            except zlib.error:
                pass
        elif content:
            continue
        file.unlink()
        found.append(file.name)
    return found
