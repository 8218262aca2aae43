"""Re-ranker scores as probabilities of relevance. Shape suffix: N scored candidates."""

import numpy as np


def fit_probability(scores_N: np.ndarray, relevant_N: np.ndarray) -> tuple[float, float]:
    """Fits slope and offset of P(relevant) = sigmoid(slope * score + offset): Platt scaling.

    Uses Newton's method on the log-likelihood of dev candidates, with Platt's smoothed targets (Platt
    1999), which keep it finite where the two classes do not overlap.
    """
    positives, negatives = relevant_N.sum(), (~relevant_N).sum()
    target_N = np.where(relevant_N, (positives + 1) / (positives + 2), 1 / (negatives + 2))
    scores_N = scores_N.astype(np.float64)
    centre, scale = scores_N.mean(), max(scores_N.std(), 1e-6)
    x_Nx2 = np.stack([(scores_N - centre) / scale, np.ones_like(scores_N)], axis=1)

    def loss(w: np.ndarray) -> float:
        logit_N = x_Nx2 @ w
        return np.sum(np.logaddexp(0, logit_N) - target_N * logit_N)

    w = np.array([0.0, np.log((positives + 1) / (negatives + 1))])
    for _ in range(50):
        p_N = _sigmoid(x_Nx2 @ w)
        hessian = (x_Nx2 * (p_N * (1 - p_N))[:, None]).T @ x_Nx2 + 1e-6 * np.eye(2)
        step = np.linalg.solve(hessian, x_Nx2.T @ (target_N - p_N))
        # A full step overshoots, and then diverges, where the classes hardly overlap.
        while loss(w + step) > loss(w):
            step = step / 2
        w = w + step
    slope = w[0] / scale
    return float(slope), float(w[1] - slope * centre)


def calibrate(
    scores_N: np.ndarray, relevant_N: np.ndarray, relevant_share: float
) -> tuple[float, float]:
    """Returns slope and offset of P(relevant) for `relevance`, as if this share were relevant.

    The share of relevant dev candidates depends on their depth: at depth 50, where one of 50 has a
    label, no score would make a passage relevant. So the odds of `fit_probability` are multiplied by
    the odds of `relevant_share` over the odds of the share in dev. A re-ranker that scores relevant
    candidates no higher than others gets slope 0: all passages are equally likely.
    """
    slope, offset = fit_probability(scores_N, relevant_N)
    positives, total = relevant_N.sum() + 1, len(relevant_N) + 2
    log_odds = np.log(positives / (total - positives))
    if not slope > 0:
        slope, offset = 0.0, log_odds
    return slope, float(offset - log_odds + np.log(relevant_share / (1 - relevant_share)))


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 0.5 * (1 + np.tanh(0.5 * x))


def relevance(scores: np.ndarray, probability: tuple[float, float]) -> np.ndarray:
    """Returns P(relevant) of re-ranker scores by slope and offset of `calibrate`; NaN stays NaN."""
    slope, offset = probability
    return _sigmoid(slope * scores + offset)
