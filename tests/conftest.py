"""Every test runs on eight fake CPU devices, with dtype promotion and rank promotion forbidden."""

import jax

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
