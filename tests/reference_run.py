"""Opens a reference cache twice in a process of its own, or in each of several, and prints its values as JSON.

python reference_run.py FOLDER PROCESS PROCESSES PORT SECONDS
"""

import json
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
from loader_run import dataset_of

from napo_jax import reference, scorer
from napo_jax.logps import Logps
from napo_jax.methods import napo
from napo_jax.models import Llava, LlavaConfig
from napo_jax.sharding import MeshConfig, make_mesh

ROWS, BATCH, PIECE = 37, 4, 6
WEIGHTS = np.arange(8, dtype=np.float32)


def quick_score(model, params, batch, objective, *, reference, kl_to):
    """Stands in for `score`: whole numbers made of a row's words, picture and seed, so exact in any company."""
    assert reference, "what fills the cache is the reference"
    assert kl_to is None
    place = 1 + jnp.arange(batch.answer_ids.shape[-1], dtype=jnp.int32)
    words = jnp.sum(batch.answer_ids * place[None, None], axis=-1) + jnp.sum(batch.prefix_ids, axis=-1)[:, None]
    pixels = jnp.sum(batch.images.astype(jnp.int32), axis=(1, 2, 3)) % 1009
    total = -(words + pixels[:, None]).astype(jnp.float32) * jnp.sum(params["weights"].astype(jnp.float32))
    mean = total / jnp.maximum(batch.answer_lengths, 1).astype(jnp.float32)
    return {cell: Logps(total[:, c], mean[:, c]) for c, cell in enumerate(objective.cells)}


def open_quickly(root, dataset, **options):
    """Opens the cache of a dataset under `quick_score`."""
    params = options.pop("params", {"weights": WEIGHTS})
    objective, model = options.pop("objective", napo()), options.pop("model", Llava(LlavaConfig.tiny()))
    return reference.open_reference(root, dataset, objective, model, params, **options)


def values_of(cache, dataset):
    """Returns {record number: [(sum, mean) of each cell]}, attached batch by batch."""
    order = dataset.order(batch_size=5, keep_rest=True)
    values = {}
    for batch in dataset.loader(order, rows=(0, 5))(0, order.steps_per_epoch):
        logps = cache.attach(batch).reference
        for row, number in enumerate(batch.ids):
            values[int(number)] = [(float(x.sum[row]), float(x.mean[row])) for x in logps.values()]
    return values


def main():
    """Prints for both times how many batches were computed, the deviation, and the values of each row."""
    folder, *numbers = sys.argv[1:]
    process, processes, port, seconds = int(numbers[0]), int(numbers[1]), int(numbers[2]), float(numbers[3])
    scorer.score, reference.PIECE_ROWS = quick_score, PIECE
    options = {}
    if processes > 1:
        jax.config.update("jax_num_cpu_devices", 2)
        jax.distributed.initialize(f"localhost:{port}", processes, process)
        devices = jax.devices()
        mesh = make_mesh(MeshConfig(data=processes, fsdp=2), devices[::2] + devices[1::2])  # rows not by process
        pieces = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(("fsdp", "data")))
        # By a callback: no process has all of it.
        weights = jax.make_array_from_callback(WEIGHTS.shape, pieces, lambda index: WEIGHTS[index])
        options = {"mesh": mesh, "params": {"weights": weights}}
    dataset = dataset_of(None, f"{folder}/data{process}", made_up=ROWS, batch_size=BATCH, buckets=1)
    batches, deviations, values = [], [], []
    for _ in range(2):
        done = []

        def progress(now, done=done):
            done.append(now.done)
            time.sleep(seconds)

        # Folders that the processes do not share.
        cache = open_quickly(f"{folder}/reference{process}", dataset, progress=progress, **options)
        batches.append(len(done))
        deviations.append(cache.deviation)
        values.append(sorted(values_of(cache, dataset).items()))
    print(json.dumps({"batches": batches, "deviations": deviations, "values": values}))


if __name__ == "__main__":
    main()
