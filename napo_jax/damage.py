"""Saves whose files are not as they were written: found before they are used, and set aside, never deleted."""

import jax
import numpy as np
from jax.experimental import multihost_utils

from napo_jax.checksums import read_sums, sum_file

_SUFFIX = ".damaged"
_GOOD, _NO_SUMS = -1, 2**30  # beside the numbers of damaged files
_FAULTS = (
    "is gone",
    "has another size than when it was saved",
    "has other bytes than when it was saved",
    "is unreadable",
)


def find_damage(save, *, together=None) -> str | None:
    """Reads the files of a save through; says what is wrong with the first that is damaged, None if none is.

    Args:
      save: epath.Path.
      together: whether all processes call this, and each reads its share of the files; all hear the same. By default
        as there are several.
    """
    together = jax.process_count() > 1 if together is None else together
    index, count = (jax.process_index(), jax.process_count()) if together else (0, 1)
    try:
        sums = read_sums(save)
    except ValueError:
        sums, found = {}, _NO_SUMS
    else:
        found = _GOOD
    names = sorted(sums)
    for number in range(index, len(names), count):
        if (fault := _fault(save / names[number], sums[names[number]])) is not None:
            found = number * len(_FAULTS) + fault
            break
    if together:
        seen = multihost_utils.process_allgather(np.int32(found)).tolist()
        found = min((each for each in seen if each != _GOOD), default=_GOOD)
    if found == _GOOD:
        return None
    if found == _NO_SUMS:
        return "the sums of its files cannot be read"
    number, fault = divmod(found, len(_FAULTS))
    return f"{names[number] if names else 'a file'} {_FAULTS[fault]}"


def set_aside(save):
    """Renames a save, on the first process while the others wait, so that it is no step any more; returns its path."""
    aside, number = save.parent / f"{save.name}{_SUFFIX}", 1
    while aside.exists():
        number += 1
        aside = save.parent / f"{save.name}{_SUFFIX}{number}"
    if jax.process_index() == 0:
        save.rename(aside)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(f"{save.name} is set aside")
    return aside


def saves_set_aside(folder) -> list:
    """Returns the saves of a folder that were set aside, sorted by step."""
    there = [path for path in folder.iterdir() if _SUFFIX in path.name] if folder.is_dir() else []
    return sorted(there, key=lambda path: (int(path.name.partition(_SUFFIX)[0]), path.name))


def _fault(file, expected):
    """Returns the number of what is wrong with a file, None if nothing is."""
    try:
        if not file.exists():
            return 0
        if file.stat().length != expected.size:
            return 1
        return 2 if sum_file(file) != expected else None
    except OSError:
        return 3
