"""Compiles the step of configs for four chips of TPU v5e at the size of the tiny model: `make configs`.

It takes 10 to 50 s of a core for each, too long for the suite, which compiles two; CI has a job of its own for all.
Layers are a loop and widths are numbers: what the compiler may refuse of a config is there at this size too. One
process for all of them, because libtpu takes seconds to start. Exit status 1 if any does not compile.
"""

import json
import sys
import traceback
from pathlib import Path

import jax

from napo_jax import plan
from napo_jax.chips import find_topology
from napo_jax.config import load_config, parse

TOPOLOGY = "v5e:2x2"
SHORT = {"prefix_tokens": 24, "answer_tokens": 8}


def compile_config(file):
    """Returns what `plan` finds of a config at the size of the tiny model, as plain values."""
    path = load_config(file).model.path
    there = path is not None and Path(path).exists()  # the small world's model, which is of one size
    flags = [] if there else ["--model.size", "tiny"]
    config, _ = parse(plan.Options, ["--config", file, "--data.attention-multiple", "8", *flags], description="")
    return plan.plan(config, find_topology(TOPOLOGY), **SHORT).as_json()


def main(files):
    """Compiles each file's config, and prints a line of JSON for it."""
    # Compiled fast and not to be fast.
    jax.config.update("jax_exec_time_optimization_effort", -1.0)
    failed = []
    for file in files:
        try:
            found = compile_config(file)
        except Exception:  # all of them are tried
            traceback.print_exc()
            failed.append(file)
            continue
        print(json.dumps({"config": Path(file).stem} | found), flush=True)
        if found["estimate"] or not found["fits"]:
            failed.append(file)
    if failed:
        sys.exit(f"not compiled for {TOPOLOGY}: {', '.join(failed)}")


if __name__ == "__main__":
    main(sys.argv[1:])
