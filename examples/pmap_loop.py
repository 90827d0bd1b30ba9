"""NaPO in a plain `pmap` loop: q is measured over all devices, so that a batch is one however it is cut.

The policy is a table of log-probs, which is all of a model that the loss sees.

    python examples/pmap_loop.py                                                        # the devices that are there
    JAX_PLATFORMS=cpu JAX_NUM_CPU_DEVICES=4 python examples/pmap_loop.py                # four that are not
"""

import functools

import jax
import jax.numpy as jnp
import optax

from napo_jax import napo_loss

ROWS, BETA, ALPHA = 64, 0.1, 0.01
OPTIMIZER = optax.adam(1e-1)


@jax.jit
def draw(key):
    """Returns a batch: features of each answer, the reference's log-probs, and which rows count."""
    features, reference, where = jax.random.split(key, 3)
    chosen, rejected = jax.random.normal(features, (2, ROWS, 8))
    reference = -40 + jax.random.normal(reference, (2, ROWS))
    # Rows that do not count are not as many on each device: a mean of the devices' means would be another number.
    where = jax.random.uniform(where, (ROWS,)) < jnp.linspace(0.2, 1.0, ROWS)
    return {"chosen": chosen + 1, "rejected": rejected, "reference": reference.T, "where": where}


def loss_of(weights, batch, axis_name=None):
    """Returns the mean loss over all devices, and q."""
    chosen, rejected = (batch["reference"][:, i] + batch[n] @ weights for i, n in enumerate(("chosen", "rejected")))
    losses, stats = napo_loss(
        chosen,
        rejected,
        batch["reference"][:, 0],
        batch["reference"][:, 1],
        beta=BETA,
        alpha=ALPHA,
        where=batch["where"],
        axis_name=axis_name,
    )
    total, count = losses.sum(), batch["where"].sum()
    if axis_name:
        total, count = jax.lax.psum((total, count), axis_name)
    return total / count, stats["q"]


@functools.partial(jax.pmap, axis_name="devices")
def step(weights, state, batch):
    """Takes a step with a share of the batch on each device."""
    # The loss is one of all devices; under pmap its gradient is that of all of them after a pmean.
    local = lambda weights: loss_of(weights, batch, axis_name="devices")
    (loss, q), gradient = jax.value_and_grad(local, has_aux=True)(weights)
    updates, state = OPTIMIZER.update(jax.lax.pmean(gradient, "devices"), state)
    return optax.apply_updates(weights, updates), state, loss, q


def main(steps=30):
    """Runs it; returns (loss, q) of each step, here and on one device."""
    devices = jax.local_device_count()
    copy = lambda tree: jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (devices, *leaf.shape)), tree)
    cut = lambda batch: jax.tree.map(lambda leaf: leaf.reshape(devices, -1, *leaf.shape[1:]), batch)
    alone, alone_state = jnp.zeros(8), OPTIMIZER.init(jnp.zeros(8))
    weights, state = copy(alone), copy(alone_state)
    one_device = jax.jit(jax.value_and_grad(loss_of, has_aux=True))
    here, there = [], []
    for number in range(steps):
        batch = draw(jax.random.key(number))
        weights, state, loss, q = step(weights, state, cut(batch))
        here.append((float(loss[0]), float(q[0])))
        (loss, q), gradient = one_device(alone, batch)
        updates, alone_state = OPTIMIZER.update(gradient, alone_state)
        alone = optax.apply_updates(alone, updates)
        there.append((float(loss), float(q)))
        if number % 10 == 0 or number == steps - 1:
            print(f"step {number:2}  on {devices} devices: loss {here[-1][0]:.5f} q {here[-1][1]:.5f}", end="")
            print(f"   on one: loss {there[-1][0]:.5f} q {there[-1][1]:.5f}")
    return here, there


if __name__ == "__main__":
    main()
