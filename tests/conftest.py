"""Every test runs on eight fake CPU devices, with dtype promotion and rank promotion forbidden."""

import atexit
import os
import shutil
import tempfile

os.environ["JAX_PLATFORMS"] = "cpu"  # also of the processes that tests start: libtpu, where installed, finds no TPU

# What one test compiles, others and the processes that they start need not: a third of the suite's time.
_PROGRAMS = tempfile.mkdtemp(prefix="napo_jax_programs_")
atexit.register(shutil.rmtree, _PROGRAMS, ignore_errors=True)
os.environ["JAX_COMPILATION_CACHE_DIR"] = _PROGRAMS
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"

import jax  # noqa: E402  it reads the environment

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
