"""What padding costs: its share for length mixes and numbers of buckets, and a step with it and without.

    python benchmarks/packing.py [--repeats 7]

The shares are of made-up lengths like RLAIF-V's: 80,000 groups, a picture of 576 tokens, a question, and four answers,
lognormal around 85, 85, 60 and 120 tokens. `common` is the part of an answer's spread that its group shares. The step
is loss and gradient of the 60M LLaVA of `step_vs_torch.py`, interleaved, medians.

The last line is JSON; `ratio` is the padded step over the packed one.
"""

import argparse
import json
import os
import statistics
import time
from functools import partial

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np

from napo_jax.data.buckets import choose_buckets, padding_share
from napo_jax.models import IMAGE_SLOT, Groups, Llava, LlavaConfig, Packing
from napo_jax.models.clip import ClipConfig
from napo_jax.models.llama import LlamaConfig

CELLS = (0, 0, 0, 0)


def lengths(spread, common, count=80_000):
    """Returns made-up prefix lengths int[N] and answer lengths int[N, 4]."""
    random = np.random.default_rng(0)
    shared, own = random.normal(size=(count, 1)), random.normal(size=(count, 4))
    bend = spread * (np.sqrt(common) * shared + np.sqrt(1 - common) * own)
    answers = np.maximum(2, np.rint(np.array([85, 85, 60, 120]) * np.exp(bend))).astype(int)
    return 622 + np.rint(14 * np.exp(0.5 * random.normal(size=count))).astype(int), answers


def print_shares():
    """Prints the share of padding, packed in some numbers of buckets, and with every answer padded to the longest."""
    print("spread common | 4 buckets      8     16 | each padded to the longest of its group")
    for spread, common in ((0.4, 0.3), (0.5, 0.0), (0.5, 0.5), (0.7, 0.5)):
        prefix, answers = lengths(spread, common)
        shares = [padding_share(*choose_buckets(prefix, answers, count=n), prefix, answers) for n in (4, 8, 16)]
        padded = 1 - (prefix + answers.sum(axis=1)).sum() / (prefix + 4 * answers.max(axis=1)).sum()
        print(f"{spread:>6} {common:>6} | {shares[0]:>9.1%} {shares[1]:>6.1%} {shares[2]:>6.1%} | {padded:.1%}")


def make_groups(answer_lengths, prefix_length, prefix=620):
    """Returns one group of random words and pixels."""
    random = np.random.default_rng(0)
    ids = random.integers(3, 32000, (1, 1, prefix))
    ids[:, :, 16 : 16 + 576] = IMAGE_SLOT
    return Groups(
        images=jnp.asarray(random.normal(size=(1, 1, 336, 336, 3)), jnp.float32),
        prefix_ids=jnp.asarray(ids, jnp.int32),
        prefix_lengths=jnp.array([[prefix_length]], jnp.int32),
        answer_ids=jnp.asarray(random.integers(3, 32000, (1, 4, max(answer_lengths))), jnp.int32),
        answer_lengths=jnp.array([answer_lengths], jnp.int32),
    )


def time_steps(repeats):
    """Prints the times of both sides; returns padded over packed for unequal answers."""
    text = LlamaConfig(vocab_size=32000, width=512, mlp_width=1376, layers=8, heads=8, kv_heads=8)
    vision = ClipConfig(width=256, mlp_width=1024, layers=4, heads=4)
    model = Llava(LlavaConfig(text, vision, remat="dots"))
    params = jax.jit(model.init)(jax.random.key(0))
    frozen = {"vision": params.pop("vision")}

    @partial(jax.jit, static_argnums=3)
    def step(params, frozen, groups, packing):
        loss = lambda params: model.logps({**params, **frozen}, groups, CELLS, packing).mean.sum()
        return jax.value_and_grad(loss)(params)

    ratios = []
    cases = [("unequal answers", (60, 110, 170, 256), 608, Packing(1216, 640))]
    cases.append(("nothing to leave out", (128,) * 4, 620, Packing(620 + 512, 512)))
    for name, answers, prefix, packing in cases:
        groups, taken = make_groups(answers, prefix), {None: [], packing: []}
        for turn in range(repeats + 1):  # the first one compiles
            for side, times in taken.items():
                start = time.perf_counter()
                jax.block_until_ready(step(params, frozen, groups, side))
                times += [time.perf_counter() - start] if turn else []
        padded, packed = (statistics.median(times) for times in taken.values())
        ratios.append(padded / packed)
        tokens = f"{620 + 4 * max(answers)} tokens to {packing.tokens}"
        print(f"{name}: padded {padded:.2f} s, packed {packed:.2f} s, {ratios[-1]:.2f}; {tokens}")
    return ratios[0]


def main():
    """Prints both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()
    print_shares()
    print(json.dumps({"benchmark": "packing", "ratio": round(time_steps(options.repeats), 3)}))


if __name__ == "__main__":
    main()
