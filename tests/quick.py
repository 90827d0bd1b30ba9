"""Programs that compile fast: the same ones, without the compiler's work on their speed.

Gradients of a whole model take LLVM seconds to optimise and milliseconds to run. Tests of numbers in the last digits
(`test_napo_numerics.py`) use the ordinary jit, so that what they see is what users run.
"""

import functools
import os

import jax

quick_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})

# The same for the processes that tests start; `conftest.py` says the first part for this one.
QUICK_FLAGS = f"{os.environ['XLA_FLAGS']} --xla_backend_optimization_level=0"
