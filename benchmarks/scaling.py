"""How a step of 7B scales from 8 to 256 chips of TPU v5e, by the programs that the compiler makes for them.

    python benchmarks/scaling.py [--rows rows.jsonl]

Each row is `napo_jax.plan` for llava7b.py with one group for each device, or for each few devices that share a row: the
work of a device stays the same, and what it sends may not. Meshes are copies of the model (data), parameters cut among
all devices (fsdp), some of both, and parameters cut with devices that share rows (fsdp x tensor). Whole copies of 7B
fit no such chip; their arithmetic and what they send are counted all the same. Nothing is run: times are what a chip's
data sheet gives for what the program computes, moves and sends. Efficiency is the needed arithmetic over the devices'
peak for that time, where all that is sent is hidden behind work, and where nothing is.

The table goes into docs/plan.md. The last line is JSON; `ratio` is the groups per chip and second of 256 chips, 8
copies that are cut among 32 each, over those of 8 chips, among which one copy is cut, nothing hidden.
"""

import argparse
import json
from pathlib import Path

from plan_table import run as plan
from plan_table import write_between

TOPOLOGIES = {8: "v5e:2x4", 16: "v5e:4x4", 32: "v5e:4x8", 64: "v5e:8x8", 128: "v5e:8x16", 256: "v5e:16x16"}
# Groups of the paper's batch, of which more devices have to share rows; and the most that parameters are cut among.
CUT = 32
TITLES = (
    *("chips", "data x fsdp x tensor", "groups", "state GiB", "peak GiB", "TFLOP done", "all-gather GB", "others GB"),
    *("step s, hidden", "efficiency", "step s, not hidden", "efficiency"),
)


def meshes(devices):
    """Returns the meshes (data, fsdp, tensor) to compile."""
    found = [(devices, 1, 1), (1, devices, 1), (1, devices // 2, 2)]
    if devices > CUT:
        found.append((devices // CUT, CUT, 1))
    if devices > 2 * CUT:
        found.append((1, CUT, devices // CUT))
    return found


def seconds(row):
    """Returns the time of a step where what is sent is hidden behind work, and where nothing is."""
    work = max(row["seconds"]["matrix products"], row["seconds"]["memory"])
    return max(work, row["seconds"]["links"]), work + row["seconds"]["links"]


def efficiency(row, time):
    """Returns the needed arithmetic over what the devices could do in a time."""
    return row["mfu_at_most"] * row["step_seconds"] / time


def cells(row):
    """Returns a line of the table."""
    mesh, (hidden, not_hidden) = row["mesh"], seconds(row)
    # Gathers that are cut into the steps of a ring, each beside a part of its product, are permutations.
    sent = {kind: of["bytes"] / 1e9 for kind, of in row["collectives"].items()}
    gathers = sum(sent.get(kind, 0) for kind in ("all-gather", "collective-permute"))
    return (
        str(row["devices"]),
        " x ".join(str(mesh[axis]) for axis in ("data", "fsdp", "tensor")),
        str(row["groups"]),
        f"{row['state_bytes'] / 2**30:.1f}",
        f"{row['peak_bytes'] / 2**30:.1f}{'' if row['fits'] else ' (too much)'}",
        f"{row['flops_done_per_device'] / 1e12:.0f}",
        f"{gathers:.1f}",
        f"{sum(sent.values()) - gathers:.1f}",
        *(f"{hidden:.2f}", f"{efficiency(row, hidden):.0%}"),
        *(f"{not_hidden:.2f}", f"{efficiency(row, not_hidden):.0%}"),
    )


def main():
    """Compiles, writes the table and prints a JSON line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=Path, help="where rows are kept between runs")
    options = parser.parse_args()
    rows = {}
    for devices, topology in TOPOLOGIES.items():
        for data, fsdp, tensor in meshes(devices):
            flags = ("--data.batch-size", str(data * fsdp), "--mesh.data", str(data), "--mesh.fsdp", str(fsdp))
            row = plan("llava7b", topology, (*flags, "--mesh.tensor", str(tensor)), options.rows)
            rows[devices, fsdp, tensor] = row
            print("  ".join(cells(row)), flush=True)
    write_between("scaling", TITLES, map(cells, rows.values()))
    rate = lambda devices: 1 / seconds(rows[devices, min(devices, CUT), 1])[1]
    found = [{"devices": d, "mesh": row["mesh"], "seconds": seconds(row)} for (d, *_), row in rows.items()]
    print(json.dumps({"benchmark": "scaling", "ratio": rate(256) / rate(8), "rows": found}))


if __name__ == "__main__":
    main()
