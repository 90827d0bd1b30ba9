"""A jit that compiles fast: the same program, without the compiler's work on its speed.

Gradients of a whole model take LLVM seconds to optimise and milliseconds to run. Tests of numbers in the last digits
(`test_napo_numerics.py`) use the ordinary jit, so that what they see is what users run.
"""

import functools

import jax

quick_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
