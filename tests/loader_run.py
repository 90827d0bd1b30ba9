"""Prints a digest of each batch of a range of steps, for one of several processes: what a fresh process would train on.

python loader_run.py FILE CACHE START STOP PROCESS PROCESSES WORKERS
"""

import dataclasses
import hashlib
import sys

from napo_jax.config import DataConfig
from napo_jax.data.byte_tokenizer import BYTE_VOCABULARY, byte_tokenizer
from napo_jax.data.dataset import open_dataset
from napo_jax.methods import napo
from napo_jax.models import LlavaConfig

BATCH = 6


def dataset_of(file, cache, **options):
    """Opens a dataset for the tiny model."""
    tiny = LlavaConfig.tiny()
    text = dataclasses.replace(tiny.text, vocab_size=BYTE_VOCABULARY, max_positions=1024)
    options = {"batch_size": BATCH, "buckets": 3, "attention_multiple": 8, "threads": 2, "max_tokens": 1024} | options
    config = DataConfig(path=None if file is None else (str(file),), cache=str(cache), **options)
    return open_dataset(config, napo(), byte_tokenizer(), dataclasses.replace(tiny, text=text))


def digest(batch):
    """Returns a digest of every bit of a batch."""
    parts = [getattr(batch, field.name) for field in dataclasses.fields(batch)]
    return hashlib.sha256(
        b"".join(x.tobytes() if hasattr(x, "tobytes") else repr(x).encode() for x in parts)
    ).hexdigest()


def main():
    """Prints `step digest ids` of each batch."""
    file, cache, *numbers = sys.argv[1:]
    start, stop, process, processes, workers = map(int, numbers)
    share = BATCH // processes
    loader = dataset_of(file, cache, workers=workers).loader(rows=(process * share, (process + 1) * share))
    for step, batch in enumerate(loader(start, stop), start):
        print(step, digest(batch), ",".join(map(str, batch.ids.tolist())), flush=True)


if __name__ == "__main__":
    main()
