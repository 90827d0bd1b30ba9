"""Groups per second out of the loader, beside a bare loop of Pillow on the same pictures, on one core and on two.

    python benchmarks/loader.py [--rows 600] [--memory]

The bare loop decodes a JPEG of 640x480, pads it to a square, resizes it to 336 and makes an array of it. The loader
does that too, and all the rest: records out of a parquet file in random order, prompts and four answers as token ids,
padded to the bucket, batches of eight. Both run in turns, each in a process of its own that is held to its cores.
`--memory` reads a file of 20,000 rows three times over instead and prints the memory that the process holds.

The last line is JSON; `ratio` is the loader over the bare loop, on one core.
"""

import argparse
import io
import json
import multiprocessing
import os
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

ANSWERS = {"chosen": 85, "rejected": 85, "question_only": 60, "image_only": 120}
BATCH = 8


def picture(random):
    """Returns a JPEG of 640x480 with something to compress: soft shapes under a little grain."""
    coarse = Image.fromarray(random.integers(0, 256, (12, 16, 3), np.uint8)).resize(
        (640, 480), Image.Resampling.BICUBIC
    )
    pixels = np.asarray(coarse, np.int16) + random.integers(-12, 13, (480, 640, 3))
    data = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(data, "JPEG", quality=85)
    return data.getvalue()


def write_rows(file, rows, distinct=200):
    """Writes a parquet file in RLAIF-V's columns; only the first `distinct` pictures are drawn anew."""
    random = np.random.default_rng(0)
    pictures = [picture(random) for _ in range(min(rows, distinct))]
    words = ["the", "bear", "is", "brown", "and", "stands", "near", "a", "river", "with", "two", "small", "trees"]
    # A byte is a token here, so a letter stands for a word.
    text = lambda median: "".join(word[0] for word in random.choice(words, int(median * np.exp(0.5 * random.normal()))))
    with pq.ParquetWriter(
        file, pa.schema([("image", pa.binary()), *((n, pa.string()) for n in ("question", *ANSWERS))])
    ) as out:
        for start in range(0, rows, 100):
            numbers = range(start, min(start + 100, rows))
            table = {"image": [pictures[i % len(pictures)] for i in numbers]}
            table["question"] = [f"{i}. what is it?" for i in numbers]
            table |= {name: [text(median) + "." for _ in numbers] for name, median in ANSWERS.items()}
            out.write_table(pa.table(table, schema=out.schema))
    return sum(map(len, pictures)) / len(pictures)


def open_dataset(file, cache, threads):
    """Opens the file as a config would."""
    from napo_jax.config import DataConfig
    from napo_jax.data import dataset
    from napo_jax.data.byte_tokenizer import BYTE_VOCABULARY, byte_tokenizer
    from napo_jax.methods import napo
    from napo_jax.models import LlavaConfig
    from napo_jax.models.llama import LlamaConfig

    model = LlavaConfig(text=LlamaConfig(vocab_size=BYTE_VOCABULARY))
    config = DataConfig(path=(str(file),), cache=str(cache), batch_size=BATCH, threads=threads)
    return dataset.open_dataset(config, napo(), byte_tokenizer(), model)


def time_loader(file, cache, cores, steps):
    """Returns groups per second."""
    os.sched_setaffinity(0, cores)
    loader = open_dataset(file, cache, threads=len(cores)).loader()
    batches = loader()
    for _ in range(4):
        next(batches)
    start = time.perf_counter()
    for _ in range(steps):
        next(batches)
    return steps * BATCH / (time.perf_counter() - start)


def time_bare(file, cores, groups):
    """Returns pictures per second of the bare loop: one process for each core, which nothing shares."""
    with multiprocessing.get_context("spawn").Pool(len(cores)) as pool:
        return sum(pool.starmap(_time_one_core, [(file, {core}, groups) for core in cores], chunksize=1))


def _time_one_core(file, cores, groups):
    os.sched_setaffinity(0, cores)
    # A large array made and let go of: glibc then keeps freed memory, and the loop is a third faster than without.
    np.ones(30_000_000, np.uint8)
    data = pq.read_table(file, columns=["image"]).column("image").to_pylist()
    for i in range(32):
        bare(data[i])
    start = time.perf_counter()
    for i in range(groups):
        bare(data[i % len(data)])
    return groups / (time.perf_counter() - start)


def bare(data):
    """Decodes, pads and resizes one picture, and nothing else."""
    image = Image.open(io.BytesIO(data)).convert("RGB")
    side = max(image.size)
    square = Image.new("RGB", (side, side), (122, 116, 104))
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return np.asarray(square.resize((336, 336), Image.Resampling.BICUBIC))


def apart(function, *args):
    """Runs a function in a fresh process."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, args)


def resident():
    """Returns the memory that this process holds for itself, in MB."""
    fields = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines() if "Rss" in line)
    return int(fields["RssAnon"].split()[0]) / 1000, int(fields["RssFile"].split()[0]) / 1000


def watch_memory(file, cache):
    """Prints the resident memory along three epochs."""
    dataset = open_dataset(file, cache, threads=2)
    order = dataset.order()
    print(f"{dataset.rows} rows, {len(dataset.table)} groups, padding {dataset.padding:.1%}")
    batches = dataset.loader(order)(0, 3 * order.steps_per_epoch)
    held, mark = [], order.steps_per_epoch // 4
    for step, _ in enumerate(batches, 1):
        if step % mark == 0:
            held.append(resident())
            print(
                f"epoch {step / order.steps_per_epoch:.2f}: {held[-1][0]:.0f} MB of its own, {held[-1][1]:.0f} MB of "
                "files"
            )
    after_first, end = held[3], held[-1]
    print(
        json.dumps(
            {"benchmark": "loader_memory", "ratio": round(sum(end) / sum(after_first), 3), "mb": round(sum(end))}
        )
    )


def main():
    """Runs both sides in turns and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=600)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--memory", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        file, cache = Path(folder, "rows.parquet"), Path(folder, "cache")
        size = write_rows(file, 20_000 if options.memory else options.rows)
        if options.memory:
            return watch_memory(file, cache)
        start = time.perf_counter()
        padding = apart(prepare, file, cache)
        print(
            f"{options.rows} rows, pictures of {size / 1000:.0f} KB, padding {padding:.1%}; "
            f"converted, checked and tokenised once in {time.perf_counter() - start:.1f} s"
        )
        cores = sorted(os.sched_getaffinity(0))
        ratios = {}
        for count in (1, 2):
            held = cores[:count]
            ours, theirs = [], []
            for _ in range(options.repeats):
                ours.append(apart(time_loader, file, cache, held, 40 * count))
                theirs.append(time_bare(file, held, 320))
            ratios[count] = statistics.median(ours) / statistics.median(theirs)
            print(
                f"{count} core{'s' * (count > 1)}: loader {statistics.median(ours):.1f} groups/s, bare loop "
                f"{statistics.median(theirs):.1f} pictures/s, {ratios[count]:.2f}"
            )
    print(json.dumps({"benchmark": "loader", "ratio": round(ratios[1], 3), "two_cores": round(ratios[2], 3)}))
    return None


def prepare(file, cache):
    """Converts and tokenises; returns the share of padding."""
    return open_dataset(file, cache, threads=2).padding


if __name__ == "__main__":
    main()
