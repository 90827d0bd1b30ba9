"""The tables of configs and topologies in docs/plan.md: each step compiled by `napo_jax.plan`, one after the other.

    python benchmarks/plan_table.py [--table plan_table|plan_scale|plan_lean] [--rows rows.jsonl]

A step of 7B takes minutes to compile on two cores. `--rows` keeps what was compiled, and a second run goes on from
there. The last line is JSON; `ratio` is the peak of a table's first row over the memory of such a chip.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

from napo_jax.costs import BETWEEN

ROOT = Path(__file__).parents[1]
DOCUMENT = ROOT / "docs" / "plan.md"

# Config, topology, and what is changed from the config.
CASES = (
    ("llava7b", "v5e:4x4", ()),
    ("llava7b", "v5p:2x2x1", ()),
    ("llava7b", "v6e:2x4", ()),
    ("llava7b", "v5e:2x4", ()),
    ("llava13b", "v5e:8x8", ()),
    ("llava13b", "v5p:2x2x2", ()),
    ("llava7b_lora", "v5e:2x2", ()),
    ("llava7b_lora", "v5e:1x1", ("--train.accumulate", "32")),
    ("llava7b_released", "v6e:2x4", ()),
    ("llava7b_released", "v5p:2x2x1", ()),
    ("dpo7b", "v5e:4x4", ()),
    ("llava7b", "h100:8", ()),
)


def on(data, fsdp, tensor, groups, *flags, slices=1, accumulate=1):
    """Returns the flags of a mesh and a batch."""
    mesh = ("--mesh.data", str(data), "--mesh.fsdp", str(fsdp), "--mesh.tensor", str(tensor))
    batch = ("--data.batch-size", str(groups), "--train.accumulate", str(accumulate))
    return (*mesh, *batch, *(("--mesh.slices", str(slices)) if slices > 1 else ()), *flags)


# Model by topology by micro-batch, up to two slices of 256 and 64 chips and one of 512.
SCALE = (
    ("llava7b", "v5e:4x4", ("--model.remat", "mlp")),
    ("llava7b", "v5e:4x4", ("--train.accumulate", "2")),
    ("llava7b", "v5e:8x8", on(1, 32, 2, 32)),
    ("llava7b", "v5e:8x8", on(1, 32, 2, 64)),
    ("llava7b", "v5e:16x16", on(2, 32, 4, 64)),
    ("llava7b", "v5e:16x16", on(4, 32, 4, 128, slices=2)),
    ("llava7b", "v5p:4x4x4", on(1, 32, 2, 64)),
    ("llava7b", "v5p:4x4x4", on(2, 32, 2, 128, slices=2)),
    ("llava7b", "v5p:8x8x8", on(4, 32, 4, 128)),
    ("llava13b", "v5e:16x16", on(2, 32, 4, 64)),
    ("llava13b", "v5e:16x16", on(4, 32, 4, 128, slices=2)),
    ("llava13b", "v5p:8x8x8", on(4, 32, 4, 128)),
    ("llava7b_lora", "v5e:4x4", ("--train.accumulate", "2")),
    ("llava13b", "v5e:4x4", on(1, 16, 1, 32, "--lora.rank", "64", "--train.reference", "adapters_off", accumulate=2)),
)
_LEAN = ("--optimizer.moment-dtype", "bfloat16", "--optimizer.second-moment", "factored")
# Full fine-tuning on few chips, one group each: AdamW's 12 bytes a parameter, 6, and 4 with parameters in bfloat16.
LEAN = tuple(
    (config, topology, (*on(1, chips, 1, chips), *flags))
    for config, topology, chips in (("llava7b", "v5e:2x2", 4), ("llava7b", "h100:1", 1), ("llava13b", "h100:2", 2))
    for flags in ((), _LEAN, (*_LEAN, "--optimizer.param-dtype", "bfloat16"))
)
TABLES = {"plan_table": CASES, "plan_scale": SCALE, "plan_lean": LEAN}


def run(config, topology, flags, kept=None):
    """Returns what `plan --json` says, or said before: `kept` is a file of one line for each case."""
    case = json.dumps([config, topology, flags])
    for line in kept.read_text().splitlines() if kept and kept.exists() else ():
        before, row = json.loads(line)
        if json.dumps(before) == case:
            return row
    command = [sys.executable, "-m", "napo_jax.plan", "--config", f"configs/{config}.py", "--topology", topology]
    done = subprocess.run([*command, "--json", *flags], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    if kept:
        with kept.open("a") as file:
            file.write(f"[{case}, {done.stdout.splitlines()[-1]}]\n")
    return json.loads(done.stdout.splitlines()[-1])


def write_between(name, titles, lines):
    """Writes a table into the document, between the marks of its name."""
    begin, end = (f"<!-- {name}: {which} -->\n" for which in ("begin", "end"))
    text = DOCUMENT.read_text()
    table = "".join(f"| {' | '.join(line)} |\n" for line in (titles, ["---"] * len(titles), *lines))
    DOCUMENT.write_text(text.partition(begin)[0] + begin + table + end + text.partition(end)[2])


def cells(config, flags, row):
    """Returns a line of the table."""
    gib, mesh = lambda size: f"{size / 2**30:.1f}", row["mesh"]
    at_a_time = row["groups"] // (mesh["data"] * mesh["fsdp"] * row["accumulate"])
    between = lambda which: sum(
        sent["bytes"] / 1e9 for kind, sent in row["collectives"].items() if kind.endswith(BETWEEN) == which
    )
    slices = row.get("slices", 1)
    return (
        " ".join((f"`{config}.py`", *told(flags))),
        f"{f'{slices} x ' if slices > 1 else ''}{row['topology']}{' (estimate)' if row['estimate'] else ''}",
        " x ".join(str(mesh[axis]) for axis in ("data", "fsdp", "tensor")),
        f"{at_a_time} x {row['accumulate']}",
        "yes" if row["fits"] else "**no**",
        gib(row["hbm_bytes"]),
        gib(row["state_bytes"]),
        gib(row["peak_bytes"]),
        f"{row['flops_per_step'] / row['devices'] / 1e12:.0f} / {row['flops_done_per_device'] / 1e12:.0f}",
        f"{between(False):.1f}" + (f" + {between(True):.1f}" if slices > 1 else ""),
        f"{row['step_seconds']:.2f}",
        f"{row['groups'] / row['step_seconds']:.0f}",
        row["bound"],
        f"{row['mfu_at_most']:.0%}",
        f"{row['compile_seconds']:.0f}",
    )


TITLES = (
    *("config", "topology", "data x fsdp x tensor", "groups at a time x micro-batches", "fits", "HBM GiB", "state GiB"),
    *("peak GiB", "TFLOP needed / done", "sent GB", "step s, at least", "groups/s, at most", "bound by"),
    *("MFU, at most", "compiled in s"),
)


def told(flags):
    """Yields the flags that no column of the table tells."""
    for flag, value in zip(flags[::2], flags[1::2], strict=True):
        if not flag.startswith("--mesh.") and flag not in ("--data.batch-size", "--train.accumulate"):
            yield f"{flag} {value}"


def main():
    """Compiles, writes the table and prints a JSON line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--table", choices=TABLES, default="plan_table")
    parser.add_argument("--rows", type=Path, help="where rows are kept between runs")
    options = parser.parse_args()
    rows, cases = [], TABLES[options.table]
    for config, topology, flags in cases:
        rows.append(run(config, topology, flags, options.rows))
        print("  ".join(cells(config, flags, rows[-1])), flush=True)
    write_between(options.table, TITLES, [cells(c[0], c[2], row) for c, row in zip(cases, rows, strict=True)])
    ratio = rows[0]["peak_bytes"] / rows[0]["hbm_bytes"]
    print(json.dumps({"benchmark": options.table, "ratio": ratio, "rows": rows}))


if __name__ == "__main__":
    main()
