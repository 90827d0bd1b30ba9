"""Does the model's own evidence find what an answer names? On the small world, where every thing's place is known.

    python benchmarks/world_regions.py [--rows 512] [--grounder attention]

`build_regions` marks the pictures of pairs whose chosen answers name things that are there, with the shipped base
model. *Covered* is the share of the named things' cells that are marked, *precise* the share of marked cells that hold
one of them, and *by chance* both of as many cells drawn at random: covered, the share that is marked; precise, the
share that holds a named thing. The last line is JSON; its `ratio` is how many times as precise as chance it is.
"""

import argparse
import collections
import json
import os
import tempfile
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import numpy as np
import pyarrow.parquet as pq

from napo_jax.build_regions import Options, build
from napo_jax.data.regions import read_region
from napo_jax.world.configs import cure
from napo_jax.world.records import draw_pair, true_mask, write_pairs

KINDS = ("colour", "count", "place", "describe")  # whose chosen answers name things of the picture
SEED = 77


def main():
    """Prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--share", type=float, default=Options.share)
    parser.add_argument("--grounder", choices=("evidence", "attention"), default="evidence")
    parser.add_argument("--layers", type=float, nargs=2, default=Options.layers)
    options = parser.parse_args()
    found = collections.defaultdict(list)
    with tempfile.TemporaryDirectory() as folder:
        pairs = Path(folder) / "in" / "pairs.parquet"
        pairs.parent.mkdir()
        write_pairs(pairs, options.rows, seed=SEED)
        how = {"share": options.share, "grounder": options.grounder, "layers": tuple(options.layers)}
        build(cure(), Options(input=(str(pairs),), output=f"{folder}/out", batch=64, **how))
        for row in pq.read_table(f"{folder}/out/pairs.parquet").to_pylist():
            scene, asked, _ = draw_pair(SEED, row["idx"])
            truth = true_mask(scene, asked)
            if asked.kind not in KINDS or row["region_fault"]:
                continue
            mask = read_region(row["region"]).mask
            both = (mask & truth).sum()
            measured = both / truth.sum(), both / mask.sum(), mask.mean(), truth.mean()
            found[asked.kind].append(measured)
            found["all"].append(measured)
    print("| answers to | rows | covered | by chance | precise | by chance |\n|---|---|---|---|---|---|")
    for kind in (*KINDS, "all"):
        covered, precise, marked, named = np.mean(found[kind], axis=0)
        print(f"| {kind} | {len(found[kind])} | {covered:.2f} | {marked:.2f} | {precise:.2f} | {named:.2f} |")
    said = {"benchmark": "world_regions", "grounder": options.grounder, "covered": round(covered, 3)}
    print(json.dumps(said | {"ratio": round(precise / named, 2)}))


if __name__ == "__main__":
    main()
