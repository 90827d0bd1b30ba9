"""The losses again, in plain float64 NumPy and straight from the equations: the twin that the tests compare with."""

import numpy as np


def sigmoid(z):
    """Returns the logistic function, computed from the side that does not overflow."""
    z = np.asarray(z, np.float64)
    small = np.exp(-np.abs(z))
    return np.where(z >= 0, 1 / (1 + small), small / (1 + small))


def log_sigmoid(z):
    """Returns log sigmoid, the slow way."""
    z = np.asarray(z, np.float64)
    return np.minimum(z, 0) - np.log1p(np.exp(-np.abs(z)))


def dpo(pc, pr, rc, rr, beta=0.1, label_smoothing=0.0):
    """Returns the cross-entropy of DPO with smoothed labels."""
    z = beta * ((pc - rc) - (pr - rr))
    return -(1 - label_smoothing) * log_sigmoid(z) - label_smoothing * log_sigmoid(-z)


def robust_dpo(pc, pr, rc, rr, beta, flip_rate):
    """Returns the unbiased combination of the loss and the loss of the flipped pair."""
    return ((1 - flip_rate) * dpo(pc, pr, rc, rr, beta) - flip_rate * dpo(pr, pc, rr, rc, beta)) / (1 - 2 * flip_rate)


def ipo(pc, pr, rc, rr, beta):
    """Returns the squared distance of the margin to 1 / (2 beta)."""
    return ((pc - rc) - (pr - rr) - 1 / (2 * beta)) ** 2


def hinge(pc, pr, rc, rr, beta):
    """Returns how far the reward margin falls short of 1."""
    return np.maximum(0, 1 - beta * ((pc - rc) - (pr - rr)))


def simpo(pc, pr, beta, target_margin):
    """Returns SimPO on token means."""
    return -log_sigmoid(beta * (pc - pr) - target_margin)


def reward(chosen, rejected, weight, centring):
    """Returns the pairwise loss of rewards; of "absolute", each example's share of the batch's."""
    both = chosen + rejected
    off = both**2 if centring == "square" else both * (1 if both.mean() > 0 else -1)
    return -log_sigmoid(chosen - rejected) + weight * off


def anchor(pc, rc, beta, delta):
    """Returns the anchor of the chosen answer."""
    return -log_sigmoid(beta * (pc - rc) - delta)


def softmax_preference(pc, pr, rc, rr, beta):
    """Returns AdaViP's form: -log sigmoid(-log sum exp(beta h_j - beta h_chosen)); pr and rr are [K, B]."""
    h, hs = pc - rc, np.asarray(pr) - np.asarray(rr)
    return -log_sigmoid(-np.log(np.sum(np.exp(beta * hs - beta * h), axis=0)))


def single_sigmoid(pc, pr, rc, rr, beta, a, b, offset=0.0):
    """Returns one sigmoid over weighted log-ratios; pr and rr are [K, B]."""
    hs = np.asarray(pr) - np.asarray(rr)
    return -log_sigmoid(beta * (a * (pc - rc) - np.einsum("k,kb->b", np.asarray(b), hs) + offset))


def box_cox(z, q):
    """Returns Eq. 9 as printed; float64 bears it for the q and z that the twin is asked about."""
    return (1 - sigmoid(z) ** q) / q


def q_paper(margins, alpha, beta):
    """Returns Eq. 12: one q from the batch mean of psi = beta * margin."""
    return np.clip(1 - sigmoid(alpha * beta * np.mean(margins)), 0.01, 1)


def q_released(margins, alpha):
    """Returns the published code's q, which knows no beta."""
    return np.clip(2 * (1 - sigmoid(alpha * np.mean(margins))), 0.001, 1)


def gamma(margins):
    """Returns Eq. 13 for K rows of margins whose means are all positive."""
    means = np.mean(margins, axis=1)
    return np.clip(means / means.sum(), 0.01, 1)


def napo_objective(policy, reference, beta=0.1):
    """Returns Eq. 14 for {cell: (sums, means)}, and each term's (loss, q, weight)."""

    def margin(other, kind):
        i = ("sum", "mean").index(kind)
        h = {cell: np.float64(policy[cell][i]) - np.float64(reference[cell][i]) for cell in ("chosen", other)}
        return h["chosen"] - h[other]

    q_language = q_paper(margin("question_only", "mean"), 0.5, beta)
    q_vision = q_paper(margin("image_only", "sum"), 0.01, beta)
    weights = gamma([margin(other, "sum") for other in ("rejected", "question_only", "image_only")])
    terms = {
        "preference": (np.mean(-log_sigmoid(beta * margin("rejected", "sum"))), 0.0, weights[0]),
        "language_bias": (
            np.mean(box_cox(beta * margin("question_only", "sum"), q_language)),
            q_language,
            weights[1],
        ),
        "vision_bias": (np.mean(box_cox(beta * margin("image_only", "sum"), q_vision)), q_vision, weights[2]),
    }
    return sum(weight * loss for loss, _, weight in terms.values()), terms


def kto_pair(pc, pr, rc, rr, beta):
    """Returns one minus the mean value of both answers, each against how far the others of the batch have moved."""
    chosen, rejected = pc - rc, pr - rr
    z_chosen, z_rejected = (beta * max(np.mean(h), 0) for h in (chosen, rejected))
    return 1 - (sigmoid(beta * chosen - z_rejected) + sigmoid(z_chosen - beta * rejected)) / 2
