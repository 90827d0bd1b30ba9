"""Compiled programs: kept in a folder, loaded from it, and compiled again where a file was cut short."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

from napo_jax.programs import Programs

X = np.arange(16, dtype=np.float32)


@pytest.fixture
def nowhere():
    """JAX keeps programs nowhere, in place of where the other tests have it keep them."""
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", None)
    compilation_cache.reset_cache()
    yield
    jax.config.update("jax_compilation_cache_dir", before)
    compilation_cache.reset_cache()


def start(folder):
    """Returns what a start gives, what it says, and how many damaged files it found."""
    with Programs(folder) as programs:
        removed = programs.keep()
        result = jax.jit(lambda x: jnp.cumsum(jnp.sin(x)) * 3)(X)  # a new function: nothing is left from before
        return np.asarray(result), str(programs), len(removed)


def test_a_second_start_loads_what_the_first_one_compiled(nowhere, tmp_path):
    folder = tmp_path / "compiled"
    cold, said, _ = start(folder)
    assert said.endswith(" for 1 programs compiled and 0 loaded")
    (file,) = folder.glob("cpu-*/*-cache")
    warm, said, _ = start(folder)
    assert said.endswith(" for 0 programs compiled and 1 loaded")
    assert warm.tobytes() == cold.tobytes()
    # Killed as it was written: it ends no run, and the next start has a whole one.
    whole = file.read_bytes()
    for damaged in (whole[: len(whole) // 2], b""):
        file.write_bytes(damaged)
        again, said, removed = start(folder)
        assert removed == 1
        assert said.endswith(" for 1 programs compiled and 0 loaded")
        assert again.tobytes() == cold.tobytes()
    assert start(folder)[2] == 0
    # Outside, nothing is kept.
    assert jax.config.jax_compilation_cache_dir is None
    jax.jit(lambda x: jnp.cumsum(jnp.cos(x)) * 3)(X)
    assert len(list(folder.glob("cpu-*/*-cache"))) == 1


def test_a_folder_that_was_named_before_wins(nowhere, tmp_path):
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "named"))
    start(tmp_path / "compiled")
    assert not (tmp_path / "compiled").exists()
    assert list((tmp_path / "named").glob("*-cache"))
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "named")


def test_nothing_is_kept_unless_it_is_asked_for(nowhere):
    assert start(None)[1].endswith(" for 1 programs compiled and 0 loaded")
    assert jax.config.jax_compilation_cache_dir is None
