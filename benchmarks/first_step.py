"""How long a run takes to its first step's end: with nothing compiled before, and with its programs in its workdir.

    python benchmarks/first_step.py [--config configs/shapes.py] [--pairs 3]

Each pair is two processes of `napo_jax.train`: the first begins in an empty workdir, the second in the same one when
everything but `compiled/` has been removed from it. The last line is JSON; `ratio` is the median
time of the first over that of the second, from `train`'s own line, without Python's imports.
"""

import argparse
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
LINE = r"begun .* is done ([\d.]+) s after the start, ([\d.]+) s of them for (\d+) programs compiled and (\d+) loaded"


def run(workdir, config):
    """Trains two steps; returns what the line of the first one says, and the seconds of the process."""
    command = [sys.executable, "-m", "napo_jax.train", "--config", config, "--workdir", str(workdir)]
    options = ["--train.steps", "2", "--data.cache", str(workdir.parent / "cache")]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("JAX_")}
    environment["JAX_PLATFORMS"] = "cpu"
    begun = time.monotonic()
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    done = subprocess.run([*command, *options], cwd=ROOT, env=environment, **pipes)
    if done.returncode:
        raise SystemExit(done.stderr)
    seconds, compiling, compiled, loaded = re.search(LINE, done.stdout).groups()
    return {
        "seconds": float(seconds),
        "compiling": float(compiling),
        "compiled": int(compiled),
        "loaded": int(loaded),
        "process": time.monotonic() - begun,
        "stderr": len(done.stderr.splitlines()),
    }


def main():
    """Runs the pairs and prints a table and a JSON line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--config", default="configs/shapes.py")
    parser.add_argument("--pairs", type=int, default=3)
    options = parser.parse_args()
    rows = {"cold": [], "warm": []}
    with tempfile.TemporaryDirectory() as folder:
        run(Path(folder) / "ahead", options.config)  # the records' cache, and files in memory
        for number in range(options.pairs):
            workdir = Path(folder) / str(number)
            rows["cold"].append(run(workdir, options.config))
            for path in workdir.iterdir():
                if path.name != "compiled":
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
            rows["warm"].append(run(workdir, options.config))
        kept = sum(file.stat().st_size for file in workdir.glob("compiled/**/*") if file.is_file())
    middle = lambda which, name: statistics.median(row[name] for row in rows[which])
    for which in rows:
        print(
            f"{which}: {middle(which, 'seconds'):.1f} s to the first step, {middle(which, 'compiling'):.1f} s of them "
            f"for {middle(which, 'compiled'):.0f} programs compiled and {middle(which, 'loaded'):.0f} loaded; "
            f"{middle(which, 'process'):.1f} s for the process"
        )
    print(f"kept: {kept / 2**20:.1f} MiB")
    ratio = middle("cold", "seconds") / middle("warm", "seconds")
    print(json.dumps({"benchmark": "first_step", "ratio": ratio, "config": options.config, "kept": kept, **rows}))


if __name__ == "__main__":
    main()
