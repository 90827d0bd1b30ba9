"""Records per second in random order: row groups of parquet, an Arrow file mapped into memory, and ArrayRecord.

    python benchmarks/record_access.py

Each side runs in a process of its own, on one thread, on the same rows with pictures of 60 KB, and the rounds of all
sides take turns. Every file has been read before, so disks play no part. Memory is what a process holds at its peak
above what it held before the first file was opened; mapped pages count, though the system can take them back.
"""

import argparse
import io
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from napo_jax.data.records import open_records

_ANSWER = "A small red cat sits on the left of the table, and two dogs look at it. " * 6
SIDES = ("row groups of 1000", "row groups of 100", "Arrow file, mapped", "ArrayRecord")


def write_files(folder, rows):
    """Writes the same rows for every side, a batch at a time; returns the seconds that the conversion took."""
    noise = np.random.default_rng(0).integers(0, 256, (16, 326, 326, 3), np.uint8)
    images = []
    for pixels in noise:
        data = io.BytesIO()
        Image.fromarray(pixels).save(data, "JPEG", quality=70)
        images.append(data.getvalue())
    assert all(50_000 < len(image) < 70_000 for image in images)
    schema = pa.schema(
        {"image": pa.struct({"bytes": pa.binary(), "path": pa.string()})}
        | dict.fromkeys(("question", "chosen", "rejected"), pa.string())
    )
    with (
        pq.ParquetWriter(folder / "1000.parquet", schema) as large,
        pq.ParquetWriter(folder / "100.parquet", schema) as small,
        pa.OSFile(str(folder / "rows.arrow"), "wb") as file,
        pa.ipc.new_file(file, schema) as arrow,
    ):
        for start in range(0, rows, 1000):
            table = pa.Table.from_pylist(
                [
                    {
                        "image": {"bytes": images[i % 16] + i.to_bytes(4, "big"), "path": None},
                        "question": f"What is in picture {i}?",
                        "chosen": _ANSWER,
                        "rejected": _ANSWER[::-1],
                    }
                    for i in range(start, min(start + 1000, rows))
                ],
                schema,
            )
            large.write_table(table, row_group_size=1000)
            small.write_table(table, row_group_size=100)
            arrow.write_table(table, max_chunksize=100)
    begin = time.monotonic()
    open_records(folder / "1000.parquet", cache=folder / "cache", report=lambda line: None)
    return time.monotonic() - begin


def reader(side, folder):
    """Returns a function from a row's number to its row, as Python values, and the number of rows."""
    if side == "ArrayRecord":
        records = open_records(folder / "1000.parquet", cache=folder / "cache")
        return records.__getitem__, len(records)
    if side == "Arrow file, mapped":
        file = pa.ipc.open_file(pa.memory_map(str(folder / "rows.arrow")))
        starts = np.cumsum([0] + [file.get_batch(i).num_rows for i in range(file.num_record_batches)])
    else:
        file = pq.ParquetFile(folder / f"{side.rpartition(' ')[2]}.parquet")
        counts = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
        starts = np.cumsum([0, *counts])

    def read(number):
        group = int(np.searchsorted(starts, number, "right")) - 1
        table = file.get_batch(group) if side == "Arrow file, mapped" else file.read_row_group(group)
        return table.slice(number - int(starts[group]), 1).to_pylist()[0]

    return read, int(starts[-1])


def memory(field):
    """Returns a field of /proc/self/status in MB."""
    return int(re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text()).group(1)) / 1024


def serve(side, folder):
    """Reads for as long as is asked on stdin, and prints records per second and the rise of memory, in MB."""
    before = memory("VmRSS")
    read, rows = reader(side, folder)
    order, done = np.random.default_rng(1).permutation(rows), 0
    assert str(read(7)).count("picture 7?") == 1
    for line in sys.stdin:
        begin, first = time.monotonic(), done
        while time.monotonic() - begin < float(line):
            read(int(order[done % rows]))
            done += 1
        rate = (done - first) / (time.monotonic() - begin)
        print(json.dumps([rate, memory("VmHWM") - before]), flush=True)


def main():
    """Writes the files, lets every side read in turns, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=int, default=8000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=3.0, help="of each side in each round")
    parser.add_argument("--serve", nargs=2, metavar=("SIDE", "FOLDER"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        serve(args.serve[0], Path(args.serve[1]))
        return
    with tempfile.TemporaryDirectory() as folder:
        seconds = write_files(Path(folder), args.rows)
        command = lambda side: [sys.executable, __file__, "--serve", side, folder]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        sides = {side: subprocess.Popen(command(side), **pipes) for side in SIDES}
        results = {side: [] for side in SIDES}
        for _ in range(args.rounds):
            for side, process in sides.items():
                process.stdin.write(f"{args.seconds}\n")
                process.stdin.flush()
                results[side].append(json.loads(process.stdout.readline()))
        for process in sides.values():
            process.communicate()
    rates = {side: statistics.median(rate for rate, _ in rounds) for side, rounds in results.items()}
    print(f"{'':20} {'records/s':>10} {'peak MB':>8}")
    for side in SIDES:
        print(f"{side:20} {rates[side]:10.0f} {results[side][-1][1]:8.0f}")
    print(f"{args.rows} records were checked and converted in {seconds:.1f} s")
    print(json.dumps({"ratio": rates["ArrayRecord"] / rates["row groups of 100"], "records_per_s": rates}))


if __name__ == "__main__":
    main()
