"""Does a lean optimizer state change what a run learns? The same runs with AdamW's and with 6 bytes a parameter.

    python benchmarks/lean_optimizer.py [--seeds 3] [--steps 60]

configs/shapes.py on the small world's shipped pairs, from the shipped base model: with AdamW (float32 parameters and
two float32 moments), with a first moment in bfloat16, and with a second moment of rows and columns beside that. Seeds
draw the batches and which pictures are held out; a seed has the same ones with each optimizer. The distance between two
curves is the root of the mean square of their differences, over the held-out loss at its evaluations and the training
loss at each step. The last line is JSON; `ratio` is the mean distance between the leanest optimizer's curve of the
held-out loss and AdamW's of the same seed, over that between two seeds of AdamW.
"""

import argparse
import dataclasses
import itertools
import json
import os
import tempfile
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import numpy as np

from napo_jax.metrics import Console
from napo_jax.train import train
from napo_jax.world.configs import cure

OPTIMIZERS = {
    "AdamW": {},
    "bfloat16 first moment": {"moment_dtype": "bfloat16"},
    "and factored second": {"moment_dtype": "bfloat16", "second_moment": "factored"},
}


def curves(options, seed, steps, folder):
    """Returns the losses of a run: {"held out": [at each evaluation], "training": [at each step]}."""
    config = cure()
    config = dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, seed=seed, cache=str(folder / "cache")),
        optimizer=dataclasses.replace(config.optimizer, **options),
        train=dataclasses.replace(
            config.train, steps=steps, log_every=1, evaluate_every=max(1, steps // 6), checkpoint_every=steps
        ),
    )
    with tempfile.TemporaryDirectory(dir=folder) as workdir, open(os.devnull, "w") as nowhere:
        train(config, workdir, Console(nowhere))
        read = lambda name: [json.loads(line)["loss"] for line in (Path(workdir) / name).read_text().splitlines()]
        return {"held out": read("held_out.jsonl"), "training": read("metrics.jsonl")}


def distance(one, other):
    """Returns the root of the mean square of the differences of two curves."""
    return float(np.sqrt(np.mean((np.array(one) - np.array(other)) ** 2)))


def main():
    """Runs, prints a table and a JSON line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=60)
    options = parser.parse_args()
    found, rows = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        jax.config.update("jax_compilation_cache_dir", folder)  # of all runs together
        for seed, (name, changes) in itertools.product(range(options.seeds), OPTIMIZERS.items()):
            found[name, seed] = curves(changes, seed, options.steps, Path(folder))
            print(f"{name}, seed {seed}: held out {found[name, seed]['held out'][-1]:.4f}", flush=True)
    for which in ("held out", "training"):
        curve = lambda name, seed, which=which: found[name, seed][which]
        pairs = itertools.combinations(range(options.seeds), 2)
        noise = [distance(curve("AdamW", a), curve("AdamW", b)) for a, b in pairs]
        for name in OPTIMIZERS:
            apart = [distance(curve(name, seed), curve("AdamW", seed)) for seed in range(options.seeds)]
            last = [curve(name, seed)[-1] for seed in range(options.seeds)]
            rows[f"{which}: {name}"] = {
                "last": float(np.mean(last)),
                "spread": float(np.std(last, ddof=1)),
                "from_adamw": float(np.mean(apart)),
                "between_seeds": float(np.mean(noise)),
            }
    print("| loss | last, mean ± spread over seeds | distance to AdamW, same seed | between seeds of AdamW |")
    print("|---|---|---|---|")
    for name, row in rows.items():
        last = f"{row['last']:.4f} ± {row['spread']:.4f}"
        print(f"| {name} | {last} | {row['from_adamw']:.4f} | {row['between_seeds']:.4f} |")
    leanest = rows[f"held out: {list(OPTIMIZERS)[-1]}"]
    ratio = leanest["from_adamw"] / leanest["between_seeds"]
    print(json.dumps({"benchmark": "lean_optimizer", "ratio": ratio, "rows": rows}))


if __name__ == "__main__":
    main()
