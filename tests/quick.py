"""Programs that compile fast, or fast enough: the same ones, with less of the compiler's work on their speed.

Gradients of a whole model take LLVM seconds to optimise and milliseconds to run. What runs for seconds is worth a part
of that work. Tests of numbers in the last digits (`test_napo_numerics.py`) want all of it, so that what they see is
what users run.
"""

import functools
import os

import jax

quick_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})

# For programs that run for seconds: the first level makes them several times as fast, and the others little more.
speedy_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 1})

# What `conftest.py` says for this process, for those that tests start.
QUICK_FLAGS = os.environ["XLA_FLAGS"]
