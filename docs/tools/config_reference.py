"""Writes docs/config.md: every field of a config, every option of a command, from the dataclasses and their comments.

    python docs/tools/config_reference.py

What it says of a flag is what `--help` says: the comment above the field.
"""

import dataclasses
import importlib
import inspect
import re
import types
from pathlib import Path
from typing import Annotated, Literal, Union, get_args, get_origin, get_type_hints

import tyro

from napo_jax.config import Config
from napo_jax.objective import Objective
from napo_jax.term import Term

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "config.md"
_WORDS = {int: "whole number", float: "number", str: "text", bool: "yes or no"}
_INTRODUCTION = """\
# Every flag

<!-- Made by docs/tools/config_reference.py; change the comments in the dataclasses, not this page. -->

A config is a Python file with `get_config()`, which returns a `napo_jax.config.Config`; `--config` takes its path, or
the name of one that comes along: {names}. Each field below is a flag of every command that takes a config,
`--data.batch-size 8`, and an argument in the file, `DataConfig(batch_size=8)`; a flag wins. Defaults are those of the
dataclass; a config sets some of them otherwise, and `--help` beside `--config` shows what holds then.

Several values follow each other, `--data.path a.parquet b.parquet`, those of a dictionary likewise, in pairs; what is
yes or no is `--data.exif` or `--data.no-exif`.
"""
_OBJECTIVE = """\
## objective

Which answers under which images are compared. It is set in the config file alone, as a function of `napo_jax.methods`
or as terms of its own: see [objectives](objectives.md).
"""
_COMMANDS = """\
## The commands' own options

Those with * also take `--config` and every flag above.
"""


def render() -> str:
    """Returns the page."""
    names = ", ".join(f"`{path.stem}`" for path in sorted((ROOT / "configs").glob("*.py")))
    parts = [_INTRODUCTION.format(names=names)]
    for field in dataclasses.fields(Config):
        kind = _plain(get_type_hints(Config, include_extras=True)[field.name])
        if dataclasses.is_dataclass(kind) and kind is not Objective:
            parts.append(f"## {field.name}\n\n{_says(kind)}\n\n{_table(_flags(kind, f'{field.name}.'))}")
    parts.append(_OBJECTIVE)
    for kind in (Objective, Term):
        parts.append(f"### {kind.__name__}\n\n{_says(kind)}\n\n{_table(_fields(kind))}")
    parts.append(_COMMANDS)
    for title, says, kind in _commands():
        parts.append(f"### {title}\n\n{says}\n\n{_table(_flags(kind, ''))}")
    return "\n".join(part.rstrip("\n") + "\n" for part in parts)


def _commands():
    """Yields ("napo_jax.train *", what it does, the dataclass of its options) for each command."""
    for path in sorted((ROOT / "napo_jax").rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        if "    exit_with_one_line(main)" not in text:
            continue
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        module = importlib.import_module(name)
        for reader, options in re.findall(r"\b(parse|read_flags)\((\w+),", text):
            # An import inside a function keeps a command's start short; the name is then not the module's.
            there = re.search(rf"from (napo_jax[\w.]*) import [^\n]*\b{options}\b", text)
            kind = getattr(module, options, None) or getattr(importlib.import_module(there.group(1)), options)
            word = options.removesuffix("Options").lower()
            title = f"{name}{' ' + word if word else ''}{' *' if reader == 'parse' else ''}"
            yield title, _says(kind if word else module).partition("\n")[0], kind


def _says(kind) -> str:
    """Returns what a docstring says, without its examples and attributes."""
    return re.split(r"\n\n(?:Examples|Attributes):", inspect.cleandoc(kind.__doc__))[0]


def _flags(kind, prefix, defaults=None):
    """Yields (flag, value, default, meaning) for each field, those of dataclasses inside it too.

    Args:
      kind: the dataclass.
      prefix: what stands before its fields' names.
      defaults: an instance whose values are the defaults; None for those of the fields.
    """
    hints = get_type_hints(kind, include_extras=True)
    comments = field_comments(kind)
    for field in dataclasses.fields(kind):
        hint = hints[field.name]
        inner = _plain(hint)
        if tyro.conf.Suppress in _marks(hint):
            continue
        name = prefix + field.name.replace("_", "-")
        if dataclasses.is_dataclass(inner):
            within = _default(field) if defaults is None else getattr(defaults, field.name)
            yield from _flags(inner, f"{name}.", None if within is dataclasses.MISSING else within)
        else:
            flag = name.upper() if tyro.conf.Positional in _marks(hint) else f"--{name}"
            default = _default(field) if defaults is None else getattr(defaults, field.name)
            yield flag, _value(inner), default, comments[field.name]


def _fields(kind):
    """Yields the same rows for a dataclass that is written in the file."""
    hints, comments = get_type_hints(kind), field_comments(kind)
    for field in dataclasses.fields(kind):
        yield field.name, _value(hints[field.name]), _default(field), comments[field.name]


def _table(rows) -> str:
    lines = ["| | value | default | |", "|---|---|---|---|"]
    for name, value, default, meaning in rows:
        cells = (f"`{name}`", value, _spell(default), _safe(meaning))
        lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    return "\n".join(lines)


def _safe(text) -> str:
    """Returns a comment as Markdown: words that look like code or like a tag are shown as they are."""
    parts = re.split(r"(`[^`]*`)", text)
    parts[::2] = [re.sub(r"[\w./]*[*_<>][\w./*<>]*(?<![.,])", r"`\g<0>`", part) for part in parts[::2]]
    return "".join(parts)


def _marks(hint):
    return get_args(hint)[1:] if get_origin(hint) is Annotated else ()


def _plain(hint):
    return get_args(hint)[0] if get_origin(hint) is Annotated else hint


def _value(kind) -> str:
    """Returns the values that a type allows, in words."""
    kind = _plain(kind)
    inner = get_args(kind)
    if get_origin(kind) is Literal:
        return ", ".join(f"`{value}`" for value in inner)
    if get_origin(kind) in (Union, types.UnionType):
        return ", or ".join("none" if part is type(None) else _value(part) for part in inner)
    if get_origin(kind) is tuple:
        if inner[-1] is not Ellipsis:
            return f"{len(inner)} times {_value(inner[0])}"
        return "pairs" if get_origin(inner[0]) is tuple else f"several: {_value(inner[0])}"
    if get_origin(kind) is dict:
        return f"pairs of {_value(inner[0])}" if inner[0] is inner[1] else "names and values"
    return _WORDS.get(kind) or {"Callable": "function", "Mapping": "names and values"}.get(
        getattr(get_origin(kind), "__name__", ""), getattr(kind, "__name__", "any")
    )


def _default(field):
    """Returns a field's default; MISSING if it has none."""
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def _spell(value) -> str:
    """Returns a default as a flag would say it."""
    if value is dataclasses.MISSING:
        return "needed"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None or value in ((), {}):
        return "none"
    if isinstance(value, tuple | list):
        return " ".join(f"`{one}`" for one in value)
    return f"`{value}`"


def field_comments(kind) -> dict[str, str]:
    """Returns {field: comment} of a dataclass and of those that it is made from, as `--help` finds them.

    Fields that follow each other without a comment or an empty line between them share the one above.
    """
    found = {}
    for base in reversed(kind.__mro__):
        if not dataclasses.is_dataclass(base):
            continue
        lines, said = [], ""
        for line in inspect.cleandoc("\n" + inspect.getsource(base)).splitlines():
            if comment := re.fullmatch(r"    # ?(.*)", line):
                lines.append(comment.group(1))
            elif field := re.match(r"    (\w+): ", line):
                beside = re.search(r"  # (.*)", line)
                said = beside.group(1) if beside else " ".join(lines) or said
                found[field.group(1)] = said
                lines = []
            elif not line.startswith("     ") and line != "    )":  # a field may go on over several lines
                lines, said = [], ""
            if line.startswith("    def "):
                break
    return found


if __name__ == "__main__":
    PAGE.write_text(render(), encoding="utf-8")
