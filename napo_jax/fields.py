"""Holds the fields of a config against their types: a config file may say anything."""

import os
from typing import Literal, get_args, get_origin, get_type_hints


def check_fields(config, group):
    """Raises a ValueError for a field of a dataclass whose value its type does not allow."""
    for name, kind in get_type_hints(type(config)).items():
        value = getattr(config, name)
        choices = [option for option in (kind, *get_args(kind)) if get_origin(option) is Literal]
        if choices and value not in get_args(choices[0]) and not (value is None and type(None) in get_args(kind)):
            raise ValueError(f"{group}.{name} must be one of {', '.join(get_args(choices[0]))}, got {value!r}")
        if kind in (int, bool) and type(value) is not kind:
            wanted = "a whole number" if kind is int else "true or false"
            raise ValueError(f"{group}.{name} must be {wanted}, got {value!r}")
        if kind == (str | None) and not isinstance(value, str | os.PathLike | None):
            raise ValueError(f"{group}.{name} must be a path or None, got {value!r}")
        if kind == dict[str, str] and not (isinstance(value, dict) and all(isinstance(v, str) for v in value.values())):
            raise ValueError(f"{group}.{name} must be a dict of names, got {value!r}")
