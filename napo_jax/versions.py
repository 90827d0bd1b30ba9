"""What a run was made with."""

import importlib.metadata
import platform

import jax

from napo_jax import __version__

_PACKAGES = ("jax", "jaxlib", "flax", "optax")


def versions() -> dict[str, str]:
    """Returns the versions of what computes a run, and its devices, by name."""
    return {
        "napo_jax": __version__,
        **{name: importlib.metadata.version(name) for name in _PACKAGES},
        "python": platform.python_version(),
        "devices": f"{jax.device_count()} {jax.devices()[0].device_kind}",
    }
