"""NaPO in somebody else's Flax NNX loop: their model, their optimizer, their step, and one call for the loss.

The model is a toy that reads a picture's colour and a question and names a colour. It has learnt that bears are brown,
whatever it sees. Each row has an answer that fits the picture and the one that habit gives; the loop prefers the first.

    python examples/nnx_loop.py
"""

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from napo_jax import napo_loss

COLOURS, ROWS = 8, 64


class Model(nnx.Module):
    """Logits over colours, out of a colour that is seen and a thing that is asked about."""

    def __init__(self, rngs):
        self.sees = nnx.Linear(COLOURS, 32, rngs=rngs)
        self.asked = nnx.Embed(COLOURS, 32, rngs=rngs)
        self.says = nnx.Linear(32, COLOURS, rngs=rngs)

    def __call__(self, seen, thing):
        """Returns float32[B, COLOURS]."""
        return self.says(nnx.tanh(self.sees(jax.nn.one_hot(seen, COLOURS)) + self.asked(thing)))


def logps(model, rows, answer):
    """Returns float32[B], the log-prob of one answer to each row; here of one token, in a language model a sum."""
    said = jax.nn.log_softmax(model(rows["seen"], rows["thing"]))
    return jnp.take_along_axis(said, rows[answer][:, None], axis=1)[:, 0]


@jax.jit
def draw(key):
    """Returns rows in which things have any colour; thing number i is by habit of colour i."""
    seen, thing = jax.random.randint(key, (2, ROWS), 0, COLOURS)
    return {"seen": seen, "thing": thing, "chosen": seen, "biased": thing, "where": seen != thing}


@nnx.jit
def accuracy(model, rows):
    """Returns how often the model says what it sees."""
    return (model(rows["seen"], rows["thing"]).argmax(-1) == rows["seen"]).mean()


@nnx.jit
def learn_habit(model, optimizer, rows):
    """Takes a step towards the habitual answer: how the model came to be as it is."""
    gradient = nnx.grad(lambda model: -logps(model, rows, "biased").mean())(model)
    optimizer.update(model, gradient)


@nnx.jit
def prefer(model, reference, optimizer, rows):
    """Takes a NaPO step; returns the loss and q."""

    def loss_of(model):
        losses, stats = napo_loss(
            logps(model, rows, "chosen"),
            logps(model, rows, "biased"),
            logps(reference, rows, "chosen"),  # its gradient is 0 without a stop_gradient: it is no argument
            logps(reference, rows, "biased"),
            beta=0.5,
            alpha=0.5,
            where=rows["where"],  # a row whose two answers are one tells nothing
        )
        return losses.sum() / rows["where"].sum(), stats["q"]

    (loss, q), gradient = nnx.value_and_grad(loss_of, has_aux=True)(model)
    optimizer.update(model, gradient)
    return loss, q


def main(steps=150):
    """Runs it; returns the accuracy before and after."""
    model, key = Model(nnx.Rngs(0)), jax.random.key(1)
    optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)
    for step in range(100):
        learn_habit(model, optimizer, draw(jax.random.fold_in(key, step)))
    reference = nnx.clone(model)
    exam = draw(jax.random.key(2))
    before = accuracy(model, exam)
    optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)
    for step in range(steps):
        loss, q = prefer(model, reference, optimizer, draw(jax.random.fold_in(key, 1000 + step)))
        if step % 50 == 0 or step == steps - 1:
            print(f"step {step:3}  loss {loss:.3f}  q {q:.3f}  says what it sees {accuracy(model, exam):.0%}")
    return float(before), float(accuracy(model, exam))


if __name__ == "__main__":
    main()
