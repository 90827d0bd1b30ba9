"""NaPO's training again, in PyTorch and from the equations: the twin that ours is held against.

A program of its own, slow and plain: `transformers` runs every answer behind a copy of the picture and the prompt,
all logits are there, autograd goes through one micro-batch after the other, and torch's AdamW steps.
"""

import collections
import dataclasses
import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import numpy as np
import torch
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

torch.set_num_threads(1)  # for products this small, several threads wait for each other longer than they compute

BETA = 0.1
# Each prefers the first answer of a group, to its second, third and fourth.
TERMS = ("preference", "language_bias", "vision_bias")
SUM, MEAN = 0, 1  # of the log-probs of an answer's tokens


class Group(NamedTuple):
    """A picture, a question and four answers to it."""

    image: np.ndarray  # uint8[I, I, 3]
    before: list[int]  # the prompt up to the picture
    after: list[int]  # and from there on
    # Chosen, rejected, made without the picture, made without the question; one without tokens is not there.
    answers: list[list[int]]


def paper_q(margins, alpha):
    """Returns q of Eq. 12, from the margins float[n] that it is measured on."""
    return (1 - torch.sigmoid(alpha * BETA * margins.mean())).clamp(0.01, 1)


def released_q(margins, alpha):
    """Returns q as the published code has it: twice as large, and from a margin without beta."""
    return (2 * (1 - torch.sigmoid(alpha * margins.mean()))).clamp(0.001, 1)


def dynamic_weights(psi):
    """Returns gamma of Eq. 13, float[3]; a third each where it is silent, no psi being positive but for rounding."""
    psi = psi.clamp(min=0)
    return (psi / psi.sum()).clamp(0.01, 1) if psi.sum() >= 1e-4 else torch.full_like(psi, 1 / 3)


def cosine(step, steps):
    """Returns the share of the peak learning rate: up from 0 in a tenth of the steps, then half a cosine down to 0."""
    rise = steps // 10
    return step / rise if step < rise else (1 + math.cos(math.pi * (step - rise) / (steps - rise))) / 2


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What the paper and the released code do in different ways, and what is easily done wrong."""

    q: Callable
    weights: Callable
    # What q and the weights are measured on.
    scope: Literal["batch", "microbatch"]
    accumulate: int = 3
    schedule: Callable = cosine
    decays: Callable = lambda weight: weight.ndim > 1
    # How many places before a token the logits stand that predict it.
    shift: int = 1


PAPER = Recipe(paper_q, dynamic_weights, "batch")
RELEASED = Recipe(released_q, torch.ones_like, "microbatch")


class Twin:
    """A policy in training beside its reference, both `LlavaForConditionalGeneration`."""

    def __init__(self, policy, reference, recipe, *, steps, learning_rate, weight_decay, eps):
        """Freezes the vision tower and hands the rest to AdamW."""
        self.policy, self.reference, self.recipe = policy, reference, recipe
        policy.model.vision_tower.requires_grad_(False)
        trained = [weight for weight in policy.parameters() if weight.requires_grad]
        groups = [{"params": [w], "weight_decay": weight_decay * recipe.decays(w)} for w in trained]
        self.optimizer = torch.optim.AdamW(groups, lr=learning_rate, eps=eps)
        self.rate = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: recipe.schedule(step, steps))

    def step(self, groups):
        """Takes one step on a batch; returns {name: float}: the loss, and each term's loss, weight and q."""
        size = len(groups) // self.recipe.accumulate
        parts = [groups[start : start + size] for start in range(0, len(groups), size)]
        with torch.no_grad():
            references = [_score(self.reference, part, self.recipe.shift) for part in parts]
            pools = [self._margins(*both) for both in zip(parts, references, strict=True)]
        counts = torch.tensor([[len(margins) for margins in pool] for pool in pools])
        if self.recipe.scope == "batch":
            shares = counts / counts.sum(0)  # a micro-batch's mean counts for its pairs,
            pools = [[torch.cat(margins) for margins in zip(*pools, strict=True)]] * len(parts)
        else:
            shares = (counts > 0) / (counts > 0).sum(0)  # or as much as that of any other that has a pair

        metrics = collections.Counter()
        for part, reference, pool, share in zip(parts, references, pools, shares, strict=True):
            qs, weights = self._measure(pool)
            margins = self._margins(part, reference)
            loss = torch.zeros((), requires_grad=True)  # and it stays so where no pair is there
            for i in share.nonzero()[:, 0]:
                of_term = _losses(margins[i][:, SUM], qs[i]).mean()
                loss = loss + share[i] * weights[i] * of_term
                for name, value in (("q", qs[i].mean()), ("weight", weights[i]), ("loss", of_term)):
                    metrics[f"{TERMS[i]}/{name}"] += (share[i] * value).item()
            loss.backward()
            metrics["loss"] += loss.item()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.rate.step()
        return dict(metrics)

    def _measure(self, pool):
        """Returns q of each term, 0 for DPO, and their weights float[3]."""
        _, language, vision = pool
        qs = torch.zeros(()), self.recipe.q(language[:, MEAN], 0.5), self.recipe.q(vision[:, SUM], 0.01)
        psi = [BETA * margins[:, SUM].mean() if len(margins) else torch.zeros(()) for margins in pool]
        return qs, self.recipe.weights(torch.stack(psi))

    def _margins(self, groups, reference):
        """Returns for each term the margins of the pairs that are there: sum and mean, float[n, 2]."""
        h = _score(self.policy, groups, self.recipe.shift) - reference
        there = torch.tensor([[len(answer) > 0 for answer in group.answers] for group in groups])
        return [(h[:, 0] - h[:, i])[there[:, 0] & there[:, i]] for i in (1, 2, 3)]


def _losses(margins, q):
    """Returns the loss of each pair, from its summed margin: Eq. 9 as printed, or for q = 0 that of DPO."""
    z = BETA * margins
    return (1 - torch.sigmoid(z) ** q) / q if q.any() else -torch.nn.functional.logsigmoid(z)


def _score(model, groups, shift):
    """Returns the sum and the mean of the log-probs of each answer's tokens, float[B, 4, 2]; 0 for one not there."""
    image = [model.config.image_token_index] * model.config.image_seq_length
    rows, cells, ids, labels = [], [], [], []
    for row, group in enumerate(groups):
        prompt = [*group.before, *image, *group.after]
        for cell, answer in enumerate(group.answers):
            if answer:
                rows.append(row)
                cells.append(cell)
                ids.append(torch.tensor(prompt + answer))
                labels.append(torch.tensor([-100] * len(prompt) + answer))
    pad = lambda rows, value: torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value)
    there = pad([torch.ones_like(x) for x in ids], 0)
    pixels = (np.stack([groups[row].image for row in rows]) / 255 - OPENAI_CLIP_MEAN) / OPENAI_CLIP_STD
    pixels = torch.tensor(pixels.transpose(0, 3, 1, 2), dtype=model.dtype)
    logits = model(input_ids=pad(ids, 0), pixel_values=pixels, attention_mask=there).logits
    logits = logits[:, :, :-1]  # without the last word of this vocabulary, the image token
    labels = pad(labels, -100)[:, shift:]
    logps = logits[:, : labels.shape[1]].log_softmax(-1)
    answered = labels != -100
    total = (logps.gather(-1, labels.clamp(min=0)[..., None])[..., 0] * answered).sum(1)
    scores = torch.stack([total, total / answered.sum(1)], dim=1)
    return scores.new_zeros(len(groups), 4, 2).index_put((torch.tensor(rows), torch.tensor(cells)), scores)
