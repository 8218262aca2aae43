"""Tests and intervals for the difference between two runs, from one value for each query.

Shape suffixes: Q queries, D queries that differ, P permutations counted at once.
"""

from collections.abc import Sequence

import numpy as np
import scipy.stats

from rqv2_jax.errors import InputError

# With 16 queries that differ there are 65,536 flips: cheap to count all of them.
_EXACT_QUERIES = 16
_FLIPS_PER_CHUNK = 2**22


def paired_test(
    a_Q: np.ndarray, b_Q: np.ndarray, *, permutations: int, seed: int
) -> tuple[float, float]:
    """Returns `(mean(a - b), p_value)` of the two-sided paired randomisation test.

    Under the null hypothesis a and b may be swapped for each query, so the sign of each difference
    may be flipped (Smucker, Allan and Carterette 2007). With at most 16 queries that differ all
    flips are counted and p is exact; else p = (1 + count) / (1 + permutations) over random flips.
    Raises InputError unless the two are finite values of the same queries.
    """
    a_Q, b_Q = np.asarray(a_Q, np.float64), np.asarray(b_Q, np.float64)
    finite = np.isfinite(a_Q).all() and np.isfinite(b_Q).all()
    if a_Q.shape != b_Q.shape or not a_Q.size or not finite:
        raise InputError(
            f"a paired test needs finite values of the same queries, not shapes {a_Q.shape} and"
            f" {b_Q.shape}: evaluate both runs on the same qrels"
        )
    difference_Q = a_Q - b_Q
    # A query without a difference adds nothing to any sum.
    moving_D = difference_Q[difference_Q != 0]
    total = moving_D.sum()
    # Flips whose sum equals the total in exact arithmetic count, whatever their rounding.
    threshold = abs(total) - 1e-9 * np.abs(moving_D).sum()

    def count_extreme(flips_PxD: np.ndarray) -> int:
        sums_P = total - 2 * (flips_PxD.astype(np.float64) @ moving_D)
        return int((np.abs(sums_P) >= threshold).sum())

    mean, num_moving = float(difference_Q.mean()), len(moving_D)
    if num_moving <= _EXACT_QUERIES:
        flips_PxD = np.arange(2**num_moving)[:, None] >> np.arange(num_moving) & 1
        return mean, count_extreme(flips_PxD) / 2**num_moving

    rng = np.random.default_rng(seed)
    extreme, chunk = 0, max(1, _FLIPS_PER_CHUNK // num_moving)
    for start in range(0, permutations, chunk):
        shape = (min(chunk, permutations - start), -(-num_moving // 8))
        bits = rng.integers(0, 256, shape, np.uint8)
        extreme += count_extreme(np.unpackbits(bits, axis=1, count=num_moving))
    return mean, (1 + extreme) / (1 + permutations)


def holm(p_values: Sequence[float]) -> list[float]:
    """Corrects p-values for their number, family-wise, by the step-down rule of Holm (1979)."""
    corrected, largest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, (len(p_values) - rank) * p_values[i])
        corrected[i] = min(largest, 1.0)
    return corrected


def interval(difference_Q: np.ndarray, *, resamples: int, seed: int) -> tuple[float, float]:
    """Returns the 95% bootstrap interval (percentiles) of the mean over queries."""
    if not np.any(difference_Q != difference_Q[0]):
        return float(difference_Q[0]), float(difference_Q[0])
    limits = scipy.stats.bootstrap(
        (difference_Q,),
        np.mean,
        n_resamples=resamples,
        batch=100,
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return float(limits.low), float(limits.high)
