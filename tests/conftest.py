"""Every test runs on eight fake CPU devices, with dtype promotion and rank promotion forbidden."""

import atexit
import os
import shutil
import tempfile
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"  # also of the processes that tests start: libtpu, where installed, finds no TPU

# A model's gradients take seconds to compile and milliseconds to run, and most of the seconds go into their speed: the
# emitters of fused loops, LLVM's optimisation, and a program's parts made apart for processors that other tests need.
# Tests of the last digits (`test_napo_numerics.py`) switch these on again, `quick.speedy_jit` what runs for seconds.
os.environ["XLA_FLAGS"] = (
    "--xla_cpu_use_fusion_emitters=false --xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1"
)

import jax

# What one test compiles, others of its process need not; and the processes that they start need it neither.
_PROGRAMS = tempfile.mkdtemp(prefix="napo_jax_programs_")
atexit.register(shutil.rmtree, _PROGRAMS, ignore_errors=True)
os.environ["JAX_COMPILATION_CACHE_DIR"] = _PROGRAMS
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
jax.config.update("jax_compilation_cache_dir", _PROGRAMS)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# Few tests of minutes each: begun first, the longest before the others, so that no process is left alone with one when
# the others are done.
_LONG = (
    "test_drills.py",
    "test_hosts.py",
    "test_processes.py",
    "test_train.py",
    "test_methods.py",
    "test_build_bias_stops.py",
    "test_base.py",
    "test_plan.py",
    "test_demo.py",
    "test_notebook.py",
)


def pytest_collection_modifyitems(items):
    assert all((Path(__file__).parent / name).exists() for name in _LONG)
    turn = {name: number for number, name in enumerate(_LONG)}
    items.sort(key=lambda item: turn.get(item.path.name, len(turn)))
