"""The NaPO step at 7B on one GPU: examples a second, share of the matrix peak, and peak memory, per attention backend.

    python benchmarks/gpu_step.py [--backends cudnn xla] [--groups 4] [--size 7b|tiny] [--peak-tflops 989]

Random weights, bfloat16. The decoder and the projector train with AdamW in bfloat16 moments, and the vision tower is
frozen; weights, gradients and moments of 7B are 54 GB that way. It needs jax, flax, optax and numpy, and nothing
installed of this repository.

The arithmetic counted is what the shared prefix needs, 3 times the forward pass: recomputation earns nothing. Causal
attention counts as half. The last line is JSON with a row per backend.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

sys.path.insert(0, str(Path(__file__).parent.parent))

from napo_jax.logps import Logps
from napo_jax.methods import napo
from napo_jax.models import IMAGE_SLOT, Groups, Llava, LlavaConfig

CELLS = napo().cells
PEAK_TFLOPS = {"H100": 989.0, "H200": 989.0, "A100": 312.0}  # dense bfloat16, by the makers' data sheets


def made_up_batch(config, groups, question, answer):
    """Returns a full batch of random words and pixels."""
    rng = np.random.default_rng(0)
    size, vocab = config.vision.image_size, config.text.vocab_size
    prefix = rng.integers(3, vocab, (groups, 1, config.vision.image_tokens + question))
    prefix[:, :, 8 : 8 + config.vision.image_tokens] = IMAGE_SLOT
    return Groups(
        images=jnp.asarray(rng.normal(size=(groups, 1, size, size, 3)), jnp.float32),
        prefix_ids=jnp.asarray(prefix, jnp.int32),
        prefix_lengths=jnp.full((groups, 1), prefix.shape[2], jnp.int32),
        answer_ids=jnp.asarray(rng.integers(3, vocab, (groups, len(CELLS), answer)), jnp.int32),
        answer_lengths=jnp.full((groups, len(CELLS)), answer, jnp.int32),
    )


def needed_flops(config, groups):
    """Counts the multiply-adds of one step, times two: forward and backward of what trains, forward of the tower."""
    text, vision = config.text, config.vision
    batch, _, prefix = groups.prefix_ids.shape
    cells, answer = groups.answer_ids.shape[1:]
    layer = text.width * text.head_width * 2 * (text.heads + text.kv_heads) + 3 * text.width * text.mlp_width
    pairs = prefix**2 / 2 + cells * answer * (prefix + answer / 2)  # of queries and keys
    decoder = text.layers * (layer * (prefix + cells * answer) + 2 * text.width * pairs)
    head = text.width * text.vocab_size * cells * answer
    projector = (vision.width + text.width) * text.width * vision.image_tokens
    patches = vision.image_tokens + 1
    tower_layer = (4 * vision.width + 2 * vision.mlp_width) * vision.width * patches + 2 * vision.width * patches**2
    return 2 * batch * (3 * (decoder + head + projector) + (vision.layers - 1) * tower_layer)


def run(config, groups, repeats):
    """Returns median seconds a step and the loss; compiles and warms up first."""
    model, optimizer = Llava(config), optax.adamw(5e-7, weight_decay=0.01, mu_dtype=jnp.bfloat16)
    params = jax.jit(model.init)(jax.random.key(0))
    frozen = {"vision": params.pop("vision")}
    moments = jax.jit(optimizer.init)(params)
    cells = len(CELLS)

    def loss_of(trained, frozen, groups):
        logps = model.logps({**trained, **frozen}, groups, (0,) * cells)
        policy = {cell: Logps(logps.sum[:, c], logps.mean[:, c]) for c, cell in enumerate(CELLS)}
        reference = jax.tree.map(lambda x: jnp.full_like(x, -1000.0), policy)
        return napo()(policy, reference)[0]

    @partial(jax.jit, donate_argnums=(0, 2))
    def step(trained, frozen, moments, groups):
        loss, gradients = jax.value_and_grad(loss_of)(trained, frozen, groups)
        updates, moments = optimizer.update(gradients, moments, trained)
        return optax.apply_updates(trained, updates), moments, loss

    start = time.perf_counter()
    params, moments, loss = step(params, frozen, moments, groups)
    loss.block_until_ready()
    first = time.perf_counter() - start
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        params, moments, loss = step(params, frozen, moments, groups)
        loss.block_until_ready()
        times.append(time.perf_counter() - start)
    return statistics.median(times), first, float(loss)


def main():
    """Prints a table and a JSON line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--backends", nargs="+", default=["cudnn", "xla"], help="attention backends to compare")
    parser.add_argument("--groups", type=int, default=4, help="groups a step")
    parser.add_argument("--question", type=int, default=64, help="text tokens of the prefix")
    parser.add_argument("--answer", type=int, default=128, help="tokens of each of the four answers")
    parser.add_argument("--remat", default="full", help="what the decoder recomputes")
    parser.add_argument("--size", choices=("7b", "tiny"), default="7b")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--peak-tflops", type=float, help="matrix peak of the device, where it is not known by name")
    options = parser.parse_args()
    if len(options.backends) == 1:
        row = measure(options.backends[0], options)
    else:
        # A process each: the peak of a device's memory is counted from the start of its process.
        others = [word for word in sys.argv[1:] if word not in ("--backends", *options.backends)]
        row = []
        for backend in options.backends:
            command = [sys.executable, __file__, *others, "--backends", backend]
            out = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines()
            print("\n".join(out[:-1]))
            row += json.loads(out[-1])["rows"]
    print(json.dumps({"benchmark": "gpu_step", "options": vars(options), "rows": row}))


def measure(backend, options):
    """Runs one backend in this process; prints its line and returns it as a list of one row."""
    device = jax.devices()[0]
    peak = options.peak_tflops or next((tf for name, tf in PEAK_TFLOPS.items() if name in device.device_kind), None)
    make = LlavaConfig.llava7b if options.size == "7b" else LlavaConfig.tiny
    config = make(dtype=jnp.bfloat16, param_dtype=jnp.bfloat16, attention=backend, remat=options.remat)
    groups = made_up_batch(config, options.groups, options.question, options.answer)
    seconds, first, loss = run(config, groups, options.repeats)
    rate = needed_flops(config, groups) / seconds / 1e12
    used = (device.memory_stats() or {}).get("peak_bytes_in_use")
    row = {
        "backend": backend,
        "device": device.device_kind,
        "seconds": round(seconds, 4),
        "groups_per_second": round(options.groups / seconds, 3),
        "tflops": round(rate, 2),
        "mfu": round(rate / peak, 4) if peak else None,
        "peak_gib": round(used / 2**30, 2) if used else None,
        "first_step_seconds": round(first, 1),
        "loss": loss,
        "jax": jax.__version__,
    }
    print("  ".join(f"{key} {value}" for key, value in row.items()))
    return [row]


if __name__ == "__main__":
    main()
