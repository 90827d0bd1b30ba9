"""Every test runs on eight fake CPU devices, with dtype promotion and rank promotion forbidden."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"  # also of the processes that tests start: libtpu, where installed, finds no TPU

import jax

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
