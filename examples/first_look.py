"""A first look: how hard DPO and NaPO pull on four pairs, and what a whole NaPO batch reports.

The log-probs are made up; the functions are the ones that training calls.
"""

import jax
import jax.numpy as jnp
import numpy as np

from napo_jax import dpo_loss, napo_loss
from napo_jax.methods import napo


def pulls():
    """Prints the gradient's size on pairs from clearly right to clearly wrong."""
    margins = jnp.array([60.0, 10.0, -10.0, -60.0])
    reference = jnp.zeros(4)

    def pull(loss, **options):
        return -jax.grad(lambda chosen: loss(chosen, reference, reference, reference, **options)[0].sum())(margins)

    _, stats = napo_loss(margins, reference, reference, reference)
    print("How hard each loss pulls on a pair (beta = 0.1)\n")
    print(f"{'margin in nats':<24}" + "".join(f"{margin:>10.0f}" for margin in margins))
    rows = {
        "DPO": pull(dpo_loss),
        f"NaPO, measured q = {stats['q']:.2f}": pull(napo_loss),
        "NaPO, q = 1 (MAE)": pull(napo_loss, q=1.0),
    }
    for name, row in rows.items():
        print(f"{name:<24}" + "".join(f"{value:>10.5f}" for value in row))
    print("\nA pair at -60 is either the hardest or mislabelled. DPO pulls on it hardest; a larger q lets it be.\n")


def objective():
    """Prints the metrics of the paper's objective on a random batch."""
    rng = np.random.default_rng(0)
    lengths = {"chosen": 60, "rejected": 60, "question_only": 30, "image_only": 90}
    policy, reference = {}, {}
    for cell, length in lengths.items():
        sums = np.float32(rng.normal(-1.1 * length, 5, 8))
        gain = 6 if cell == "chosen" else rng.normal(-2, 1)
        reference[cell] = (sums, sums / length)
        policy[cell] = (np.float32(sums + gain), np.float32((sums + gain) / length))
    loss, metrics = napo()(policy, reference)
    print(f"NaPO as in the paper on 8 groups of four answers: loss {loss:.4f}\n")
    columns = ("loss", "margin", "accuracy", "q", "weight")
    print(f"{'term':<16}" + "".join(f"{column:>10}" for column in columns))
    for term in napo().terms:
        print(f"{term.name:<16}" + "".join(f"{metrics[f'{term.name}/{column}']:>10.4f}" for column in columns))


if __name__ == "__main__":
    pulls()
    objective()
