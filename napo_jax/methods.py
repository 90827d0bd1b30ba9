"""The objectives of published methods, by name; `docs/objectives.md` compares them.

Each is a sum of terms. Where a paper and its released code differ, the method's own name is the paper's form.
"""

import functools
from typing import Literal

from napo_jax.losses import (
    anchor_loss,
    chip_released_loss,
    dpo_loss,
    hinge_loss,
    ipo_loss,
    kto_pair_loss,
    napo_loss,
    reward_loss,
    robust_dpo_loss,
    sft_loss,
    simpo_loss,
    single_sigmoid_loss,
    softmax_preference_loss,
    token_kl_loss,
)
from napo_jax.objective import Objective
from napo_jax.term import Term


def napo(beta: float = 0.1, weight: float | Literal["dynamic"] = "dynamic") -> Objective:
    """Returns NaPO as in the paper (Eq. 14).

    The original pair keeps DPO. The two biased answers take NaPO with q by the paper's rule: the language-biased one,
    made without the image, on the mean margin with alpha 0.5; the vision-biased one, made without the question, on the
    summed margin with alpha 0.01. All three have dynamic weights.

    Args:
      beta: of all three losses.
      weight: a number in place of the dynamic weights. These follow the margins: a term whose answers are easily
        told apart takes most of the weight from the others.
    """
    return Objective(
        (
            Term("preference", dpo_loss, "chosen", "rejected", weight=weight, options={"beta": beta}),
            *_bias_terms(beta, rule="paper", weight=weight),
        )
    )


def napo_released(beta: float = 0.1) -> Objective:
    """Returns NaPO as the published code runs it: q by its own rule on each micro-batch, and all weights 1."""
    return Objective(
        (
            Term("preference", dpo_loss, "chosen", "rejected", options={"beta": beta}),
            *_bias_terms(beta, rule="released", weight=1.0),
        ),
        noise_scope="microbatch",
    )


def _bias_terms(beta, rule, weight):
    language = {"beta": beta, "alpha": 0.5, "rule": rule}
    vision = {"beta": beta, "alpha": 0.01, "rule": rule}
    return (
        Term("language_bias", napo_loss, "chosen", "question_only", weight, margin="mean", options=language),
        Term("vision_bias", napo_loss, "chosen", "image_only", weight, margin="sum", options=vision),
    )


def dpo(beta: float = 0.1, label_smoothing: float = 0.0) -> Objective:
    """Returns DPO on the original pair."""
    return _on_the_pair(dpo_loss, beta=beta, label_smoothing=label_smoothing)


def reward(centring_weight: float = 1e-3, centring: Literal["absolute", "square"] = "absolute") -> Objective:
    """Returns the reward model of LLaVA-RLHF (arXiv 2309.14525): a number for each answer, larger for the better one.

    It trains a head beside the vocabulary's, and reads no reference. What the paper goes on to do with it, PPO, is not
    here; `napo_jax.build_ranked --reward` ranks answers by it.

    Args:
      centring_weight: of the term that holds rewards near 0.
      centring: "absolute" as in the published code, or "square"; see `reward_loss`.
    """
    options = {"centring_weight": centring_weight, "centring": centring}
    return Objective((Term("preference", reward_loss, "chosen", "rejected", options=options),))


def mfpo(beta: float = 0.1, eta: float = 0.0) -> Objective:
    """Returns MFPO (arXiv 2410.15334): the picture to prefer is the clean one over one noisy in its key regions.

    Text, image and margin terms weigh the same. The records need a column `region`; `napo_jax.build_regions` makes it.

    Args:
      beta: of all three losses.
      eta: the reward of the chosen answer to hold.
    """
    return _with_image("region", beta, anchor=eta)


def mdpo(beta: float = 0.1, delta: float = 0.0) -> Objective:
    """Returns mDPO (arXiv 2406.11839): the same three terms, over a crop of 1% to 20% of the picture.

    Policy and reference see one crop.

    Args:
      beta: of all three losses.
      delta: the reward of the chosen answer to hold.
    """
    return _with_image("crop", beta, anchor=delta)


def mdpo_released(beta: float = 0.1) -> Objective:
    """Returns mDPO as the published code runs it: the reference's crop is another one than the policy's."""
    return _with_image("crop_anew", beta, anchor=0.0)


def chip(beta: float = 0.5, segment_weight: float = 3.0, token_weight: float = 0.1, edited: float = 1.0) -> Objective:
    """Returns CHiP (arXiv 2501.16629): preferences of whole answers, edited spans, tokens, and the picture.

    The token term compares whole distributions with the reference's, which has to run along. As the paper prints it, it
    has no lower bound; the published code has the opposite sign (`chip_released`).

    Args:
      beta: of all four terms.
      segment_weight: of the term in which edited spans count more; the paper's lambda: 3 for LLaVA-1.6, 1 for Muffin.
      token_weight: of the token term; the paper's gamma.
      edited: how many times more a token of an edited span counts in the segment term. The paper names no number; with
        this one it counts twice.
    """
    options = {"beta": beta}
    pair = functools.partial(Term, preferred="chosen", other="rejected", options=options)
    return Objective(
        (
            pair(name="response", loss=dpo_loss),
            pair(name="segment", loss=dpo_loss, weight=segment_weight, logps="mean", edited=edited),
            pair(name="token", loss=token_kl_loss, weight=token_weight),
            Term("image", dpo_loss, "chosen", "chosen@diffusion", options=options),
        )
    )


def chip_released(beta: float = 0.1, edited: float = 3.0, kl_weight: float = 0.1) -> Objective:
    """Returns CHiP as the published code has it: all in one sigmoid, over sums in which edited tokens count more.

    Args:
      beta: of the loss.
      edited: how many times more they count: 3 for LLaVA, 1 for Muffin.
      kl_weight: of the token part.
    """
    others, options = ("rejected", "chosen@diffusion"), {"beta": beta, "kl_weight": kl_weight}
    return Objective((Term("preference", chip_released_loss, "chosen", others, edited=edited, options=options),))


def dense_dpo(beta: float = 0.1, edited: float = 4.0) -> Objective:
    """Returns dense DPO (RLHF-V, arXiv 2312.00849): tokens of the spans where the answers differ count more.

    Args:
      beta: of the loss.
      edited: how many times more they count.
    """
    return Objective((Term("preference", dpo_loss, "chosen", "rejected", edited=edited, options={"beta": beta}),))


def rdpo(beta: float = 0.1, image_weight: float = 1.0) -> Objective:
    """Returns Re-Align's rDPO (arXiv 2502.13146): DPO, and the picture over a retrieved one that is much like it.

    The records need a column `rejected_image`, and the paper's `rejected` answers are written to that picture. (Robust
    DPO, which goes by the same letters, is `robust_dpo`.)

    Args:
      beta: of both losses.
      image_weight: the weight of the picture's term; the paper's w_v.
    """
    return _with_image("rejected_image", beta, image_weight=image_weight)


def _with_image(variant, beta, *, anchor=None, image_weight=1.0):
    """Returns DPO on the answers, DPO on the picture and a variant of it, and the anchor if it has a reward to hold."""
    terms = [
        Term("text", dpo_loss, "chosen", "rejected", options={"beta": beta}),
        Term("image", dpo_loss, "chosen", f"chosen@{variant}", weight=image_weight, options={"beta": beta}),
    ]
    if anchor is not None:
        terms.append(Term("anchor", anchor_loss, "chosen", options={"beta": beta, "delta": anchor}))
    return Objective(tuple(terms))


def adavip(beta: float = 0.1) -> Objective:
    """Returns AdaViP (arXiv 2504.15619): one softmax over the answer to prefer, the other one, and the other picture.

    Its weighting is the softmax: most of the gradient goes where the policy errs most. The records need a column
    `rejected_image`; the paper's lack one element of the picture.
    """
    others = ("rejected", "chosen@rejected_image")
    return Objective((Term("preference", softmax_preference_loss, "chosen", others, options={"beta": beta}),))


def povid(beta: float = 0.1, chosen_weight: float = 1.0, weights: tuple[float, float] = (0.5, 0.5)) -> Objective:
    """Returns POVID (arXiv 2402.11411): one sigmoid over an edited answer and what the model says to a noisy picture.

    Args:
      beta: of the loss.
      chosen_weight: of the chosen answer; the paper's a.
      weights: of `rejected`, and of `noisy_image` under the noisy picture; the paper's b1 and b2. It names none of
        these numbers. With these the weights of both sides are equal, so that a longer answer gains nothing.
    """
    others = ("rejected", "noisy_image@diffusion_pixels")
    options = {"beta": beta, "chosen_weight": chosen_weight, "rejected_weights": tuple(weights)}
    return Objective((Term("preference", single_sigmoid_loss, "chosen", others, options=options),))


def povid_released(beta: float = 0.1) -> Objective:
    """Returns POVID's second stage as published: half DPO over the edited answer, half over the model's own.

    Both are scored under the clean picture.
    """
    half = functools.partial(Term, loss=dpo_loss, preferred="chosen", weight=0.5, options={"beta": beta})
    return Objective((half(name="preference", other="rejected"), half(name="noisy", other="noisy_image")))


def mia_dpo(beta: float = 0.1, sft_weight: float = 0.0) -> Objective:
    """Returns MIA-DPO (arXiv 2410.17637): DPO, with the likelihood of the chosen answer if it is given a weight.

    What is its own are the records: several pictures, and rejected answers that looked at the wrong one. They are made
    by `napo_jax.build_composed`. The published script gives the likelihood no weight; the paper's best is 0.1.
    """
    preference = Term("preference", dpo_loss, "chosen", "rejected", options={"beta": beta})
    likelihood = Term("likelihood", sft_loss, "chosen", weight=sft_weight)
    return Objective((preference, likelihood) if sft_weight else (preference,))


def robust_dpo(beta: float = 0.1, flip_rate: float = 0.1) -> Objective:
    """Returns DPO that is unbiased where a known share of the preferences is turned round (arXiv 2403.00409)."""
    return _on_the_pair(robust_dpo_loss, beta=beta, flip_rate=flip_rate)


def ipo(beta: float = 0.1) -> Objective:
    """Returns IPO (arXiv 2310.12036), on means over tokens: its target margin does not grow with the length."""
    return _on_the_pair(ipo_loss, logps="mean", beta=beta)


def hinge(beta: float = 0.1) -> Objective:
    """Returns the hinge loss on the pair's margin (RSO, arXiv 2309.06657)."""
    return _on_the_pair(hinge_loss, beta=beta)


def simpo(beta: float = 2.0, target_margin: float = 1.0) -> Objective:
    """Returns SimPO (arXiv 2405.14734): means over tokens, and no reference."""
    return _on_the_pair(simpo_loss, logps="mean", beta=beta, target_margin=target_margin)


def kto_pair(beta: float = 0.1) -> Objective:
    """Returns KTO's value (arXiv 2402.01306) of both answers of a pair, each on its own."""
    return _on_the_pair(kto_pair_loss, beta=beta)


def _on_the_pair(loss, logps="sum", **options):
    return Objective((Term("preference", loss, "chosen", "rejected", logps=logps, options=options),))
