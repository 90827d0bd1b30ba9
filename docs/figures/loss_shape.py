"""Draws loss_shape.svg: value and gradient weight of the NaPO loss against the reward margin, for several q."""

from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib
import matplotlib.pyplot as plt

from napo_jax import dpo_loss, napo_loss

matplotlib.use("svg")

HERE = Path(__file__).parent
INK = "#24292f"
CURVES = [
    (None, "q → 0 (DPO)", "#0b3c5d"),
    (0.25, "q = 0.25", "#328cc1"),
    (0.5, "q = 0.5", "#3aa17e"),
    (0.75, "q = 0.75", "#d9a441"),
    (1.0, "q = 1 (MAE)", "#c8553d"),
]


def loss(z, q):
    """Returns the loss at reward margin z, float32[N]."""
    zero = jnp.zeros_like(z)
    return (dpo_loss(z, zero, zero, zero, beta=1.0) if q is None else napo_loss(z, zero, zero, zero, beta=1.0, q=q))[0]


def main():
    """Writes the figure beside this script; the same bytes every time."""
    plt.rcParams.update(
        {"svg.hashsalt": "napo_jax", "svg.fonttype": "none", "font.family": "sans-serif", "font.size": 10}
    )
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.6, 3.9), layout="constrained")
    z = jnp.linspace(-8, 8, 321)
    for q, label, colour in CURVES:
        left.plot(z, loss(z, q), color=colour, linewidth=2)
        weight = -jax.grad(lambda z, q=q: loss(z, q).sum())(z)
        right.plot(z, weight, color=colour, linewidth=2, label=label)
    left.set(title="Loss", ylabel="loss", ylim=(0, 5), yticks=range(6))
    right.set(title="Pull on the pair", ylabel="−d loss / dz", ylim=(0, 1.02), yticks=[0, 0.25, 0.5, 0.75, 1])
    right.legend(frameon=False, loc="upper right")
    for axes in (left, right):
        axes.set(xlabel="reward margin z = β (h preferred − h other)", xlim=(-8, 8), xticks=range(-8, 9, 2))
        axes.axvline(0, color="#d0d7de", linewidth=1, zorder=0)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(colors=INK)
    right.annotate(
        "pairs that look wrong:\nDPO pulls hardest here,\nMAE leaves them alone",
        xy=(-7.7, 0.56),
        color=INK,
        fontsize=9,
    )
    figure.savefig(HERE / "loss_shape.svg", metadata={"Date": None, "Creator": None}, facecolor="white")


if __name__ == "__main__":
    main()
