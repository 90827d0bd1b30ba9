"""NaPO where chosen and rejected answers are one batch, as in Tunix and EasyDeL.

Their trainers put the chosen answers on top of the rejected ones, run the model once, mask each token's log-prob, sum,
and cut the result in two. `napo_loss` takes the halves. With NaPO's biased answers the batch is four blocks, and each
pair has a q of its own.

    python examples/one_batch.py
"""

import jax
import jax.numpy as jnp

from napo_jax import dpo_loss, napo_loss

ROWS, PROMPT, ANSWER, WORDS = 4, 6, 10, 32
BLOCKS = ("chosen", "rejected", "question_only", "image_only")


def token_logps(logits, ids):
    """Returns float32[R, T], the log-prob of each token of the answers; logits[:, i] are those before token i."""
    return jnp.take_along_axis(jax.nn.log_softmax(logits.astype(jnp.float32)), ids[..., None], axis=-1)[..., 0]


def summed(logps, mask):
    """Returns float32[R]: masked, then summed. Where nothing is left to sum, `has_answer` says so."""
    return jnp.where(mask, logps, 0).sum(axis=-1)


def has_answer(mask):
    """Returns bool[R]: rows whose answer has a token at all; an empty one must not reach q."""
    return mask.any(axis=-1)


def split(stacked, names):
    """Cuts [len(names) x B, ...] into {name: [B, ...]}: block by block, as the batch was put together."""
    return dict(zip(names, jnp.split(stacked, len(names)), strict=True))


def napo_on_one_batch(policy, reference, mask, names=BLOCKS):
    """Returns NaPO's loss, all weights 1, on one batch of answers.

    Args:
      policy: float32[K x B, T], log-probs of each token of the answers, K blocks of B.
      reference: float32[K x B, T], likewise.
      mask: bool[K x B, T], the answers' own tokens: neither prompt nor padding.
      names: what each block is.
    """
    mask = mask.astype(bool)  # Tunix has int32
    here, there = split(summed(policy, mask), names), split(summed(reference, mask), names)
    counts, lengths = split(has_answer(mask), names), split(mask.sum(axis=-1), names)
    chosen, total, stats = (here["chosen"], there["chosen"]), 0.0, {}
    for name in names[1:]:
        where = counts["chosen"] & counts[name]
        logps = (chosen[0], here[name], chosen[1], there[name])
        if name == "rejected":
            losses, _ = dpo_loss(*logps, beta=0.1, where=where)
        elif name == "question_only":  # its noise is read off the mean margin, a token's
            mean = lambda block: (here[block] - there[block]) / jnp.maximum(lengths[block], 1).astype(jnp.float32)
            margin = mean("chosen") - mean(name)
            losses, stats[name] = napo_loss(*logps, beta=0.1, alpha=0.5, noise_margin=margin, where=where)
        else:
            losses, stats[name] = napo_loss(*logps, beta=0.1, alpha=0.01, where=where)
        total += losses.sum() / jnp.maximum(where.sum(), 1).astype(jnp.float32)
    return total, {name: stat["q"] for name, stat in stats.items()}


def tunix_loss(model, train_example, beta, label_smoothing):
    """Returns what `DPOTrainer.with_loss_fn(tunix_loss, has_aux=True)` wants: chosen on top of rejected, NaPO between.

    Args:
      model: (input_ids, positions, attention_mask) -> logits float[2B, S, V].
      train_example: as Tunix makes it: input_ids int32[2B, S], completion_mask int32[2B, T], the reference's sums.
      beta: of the trainer's config.
      label_smoothing: of the trainer's config; NaPO has none.
    """
    del label_smoothing
    example = train_example
    answer = example.completion_mask.shape[1]
    logits = model(example.input_ids, example.positions, example.attention_mask)[:, -answer - 1 : -1]
    mask = example.completion_mask.astype(bool)
    policy = split(summed(token_logps(logits, example.input_ids[:, -answer:]), mask), ("chosen", "rejected"))
    counts = split(has_answer(mask), ("chosen", "rejected"))
    where = counts["chosen"] & counts["rejected"]
    reference = (example.ref_chosen_logps, example.ref_rejected_logps)
    losses, stats = napo_loss(policy["chosen"], policy["rejected"], *reference, beta=beta, where=where)
    rewards = {f"rewards/{side}": stats[f"{side}_rewards"].mean() for side in ("chosen", "rejected")}
    return losses.sum() / jnp.maximum(where.sum(), 1).astype(jnp.float32), rewards | {"q": stats["q"]}


def draw(key, names=BLOCKS):
    """Returns policy and reference float32[K x B, T] and the mask of answers of any length, one of them empty."""
    rows = ROWS * len(names)
    policy, reference, lengths = jax.random.split(key, 3)
    make = lambda key: -jax.random.exponential(key, (rows, ANSWER))
    lengths = jax.random.randint(lengths, (rows,), 1, ANSWER + 1).at[-1].set(0)
    return make(policy), make(reference), jnp.arange(ANSWER) < lengths[:, None]


def main():
    """Runs it on made-up log-probs; prints the loss and each q."""
    policy, reference, mask = draw(jax.random.key(0))
    loss, q = jax.jit(napo_on_one_batch)(policy, reference, mask)
    print(f"loss {loss:.4f}  " + "  ".join(f"q of {name} {value:.4f}" for name, value in q.items()))


if __name__ == "__main__":
    main()
