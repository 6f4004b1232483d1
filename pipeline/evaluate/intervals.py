"""How sure a score is: exact intervals of shares; for other scores, groups (patients) drawn again and again."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import special

from pipeline.evaluate import metrics
from pipeline.model.tasks import Task
from pipeline.overlap import ahead, threads

Floats = npt.NDArray[np.floating[Any]]
LEVEL = 0.95
RANGES: Mapping[str, tuple[float, float]] = MappingProxyType({"kappa": (-1.0, 1.0), "brier": (0.0, 2.0)})
"""Ends of the scores that do not go from 0 to 1."""

FEW = 0.05  # of the draws: where fewer define a score, they tell nothing of its tails; our choice
_ROUNDING = 1e-6  # of sums in float32
_BAND = 101  # points of a band
_CELLS = 2**20  # numbers in one block of weights: few enough to stay in a processor's cache


def draw_weights(groups: Sequence[str], *, resamples: int, seed: int) -> Iterator[npt.NDArray[np.float32]]:
    """Draw whole groups with replacement, as many as there are.

    Samples of one patient are no independent evidence, so they come and go together.

    Args:
        groups: Of each of n samples.
        resamples: How often to draw.
        seed: Of the draws.

    Yields:
        Blocks (r, n) of how often each sample was drawn; `resamples` rows in all.
    """
    names, member_of = np.unique(np.asarray(groups), return_inverse=True)
    random = np.random.default_rng(seed)
    rows = max(1, _CELLS // len(groups))
    for start in range(0, resamples, rows):
        count = min(rows, resamples - start)
        drawn = random.integers(0, len(names), (count, len(names)))
        drawn += np.arange(count)[:, None] * len(names)
        times = np.bincount(drawn.ravel(), minlength=count * len(names)).reshape(count, len(names))
        yield times.astype(np.float32)[:, member_of]


def resample(
    scorer: Callable[[Floats], Mapping[str, Floats]], groups: Sequence[str], *, resamples: int = 2000, seed: int = 0
) -> dict[str, Floats]:
    """Score many draws of groups.

    Args:
        scorer: Weights (r, n) to scores by name, (r,) or (r, K), such as `metrics.Scorer`.
        groups: Of each of n samples.
        resamples: R, how many draws.
        seed: Of the draws; the same seed draws the same groups, so that differences can be paired.

    Returns:
        Scores by name, (R,) or (R, K).
    """
    cores = len(os.sched_getaffinity(0))
    with threads(cores, "resample") as pool:
        drawn = draw_weights(groups, resamples=resamples, seed=seed)
        blocks = list(ahead(scorer, drawn, pool, depth=2 * cores))  # numpy's loops run beside each other
    return {name: np.concatenate([block[name] for block in blocks]) for name in blocks[0]}


def interval(draws: Floats, level: float = LEVEL, *, ends: tuple[float, float] = (0.0, 1.0)) -> tuple[Floats, Floats]:
    """Cut off the tails of draws (R, ...): the lower and upper end, each (...).

    Draws in which a score is not defined (NaN: a class without a sample) are left out. Where that is nearly all of them
    (many classes of which each has one patient), the others are hardly different from the whole, and their tails would
    feign certainty: then nothing is known, which is ours.

    Args:
        draws: (R, ...).
        level: Of confidence.
        ends: Of what is drawn, where nothing is known.
    """
    tail = (1 - level) / 2
    known = np.isfinite(draws).mean(axis=0) >= FEW
    low, high = np.nanquantile(np.where(known, draws, 0.0), [tail, 1 - tail], axis=0)
    return np.where(known, low, ends[0]), np.where(known, high, ends[1])


def proportion(
    right: npt.NDArray[Any], made: npt.NDArray[Any], groups: Sequence[str], level: float = LEVEL
) -> tuple[float, float]:
    """Interval of a share of right decisions, which holds at 0 and 1 too, where a bootstrap gives a point.

    Clopper and Pearson's exact interval (Biometrika 1934) at an effective number of decisions, as Korn and Graubard
    (Survey Methodology 1998) have it for clusters: decisions of one group (a patient) count for less, the more alike
    they are, as far as the data tell. Where they cannot (every group the same), each group is taken to speak with one
    voice, which is ours and errs towards a wide interval.

    Args:
        right: (n,), right decisions of each sample.
        made: (n,), decisions of each sample; samples of which none was asked have 0.
        groups: Of each sample.
        level: Of confidence.

    Returns:
        The lower and the upper end; 0 and 1 where no decision was made.
    """
    _, member_of = np.unique(np.asarray(groups), return_inverse=True)
    sums, sizes = (np.bincount(member_of, weights=np.asarray(of, np.float64)) for of in (right, made))
    sums, sizes = sums[sizes > 0], sizes[sizes > 0]
    count, clusters = float(sizes.sum()), len(sizes)
    if not clusters:
        return 0.0, 1.0
    share = float(sums.sum() / count)
    least = count**2 / float((sizes**2).sum())  # every group of one voice
    spread = float(((sums - share * sizes) ** 2).sum())
    effective = least
    if clusters > 1 and spread > 0 and least < count:
        estimated = count**2 * share * (1 - share) * (clusters - 1) / clusters / spread
        tails = special.stdtrit(np.array([count - 1, clusters - 1]), (1 + level) / 2)
        effective = float(np.clip(estimated * (tails[0] / tails[1]) ** 2, min(least, clusters) / 2, count))
    hits, tail = share * effective, (1 - level) / 2
    low = float(special.betaincinv(hits, effective - hits + 1, tail)) if share > 0 else 0.0
    high = float(special.betaincinv(hits + 1, effective - hits, 1 - tail)) if share < 1 else 1.0
    return low, high


def share(right: npt.NDArray[Any], made: npt.NDArray[Any], groups: Sequence[str]) -> dict[str, Any] | None:
    """A share of right decisions: `value`, `low`, `high`, and `n`, the decisions made; None where there are none."""
    count = int(np.sum(made))
    if not count:
        return None
    low, high = proportion(right, made, groups)
    return {"value": float(np.sum(right) / count), "low": low, "high": high, "n": count}


def of_several(hits: npt.NDArray[np.bool_], groups: Sequence[str]) -> bool:
    """Whether the samples of a class (n,) are of several groups, and all others, too."""
    of = np.asarray(groups)
    return min(len(set(of[kind].tolist())) for kind in (hits, ~hits)) > 1


def of_auc(
    value: float, ends: Mapping[str, float], hits: npt.NDArray[np.bool_], groups: Sequence[str], level: float = LEVEL
) -> dict[str, float]:
    """Give the interval of an AUC where that of draws of groups feigns certainty; of any other leave the draws'.

    Where all samples of a class, or all others, are of one group, draws exchange the other kind alone, and nothing
    tells how groups of this kind would be ranked: the interval is the whole scale.

    Where the AUC is 0 or 1, draws give a point. Of m pairs of a positive and a negative that share no group, all are in
    the right order with probability AUC^m, and a perfect order asks at least that. So the AUCs under which it is not
    too rare end at (tail)^(1/m). This is ours; it errs towards a wide interval.

    Args:
        value: The AUC.
        ends: `low` and `high` from draws.
        hits: (n,), what is true.
        groups: Of each sample.
        level: Of confidence.
    """
    if 0 < value < 1:
        return dict(ends) if of_several(hits, groups) else {"low": 0.0, "high": 1.0}
    with_hits, with_misses = (set(np.asarray(groups)[kind].tolist()) for kind in (hits, ~hits))
    pairs = min(len(with_hits), len(with_misses), len(with_hits | with_misses) // 2)
    reach = ((1 - level) / 2) ** (1 / pairs) if pairs else 0.0
    return {"low": reach, "high": 1.0} if value == 1 else {"low": 0.0, "high": 1 - reach}


def beyond_a_point(
    score: str, value: float, ends: Mapping[str, float], akin: Sequence[Mapping[str, float]]
) -> dict[str, float]:
    """Give the interval of a score of which all draws of groups are the same; of any other leave the draws'.

    That is no certainty: nothing was wrong, or one class was always called, in few samples. What tells how far the
    score may be off are the intervals of what is like it: the mean of their ends, on the score's own scale. This is
    ours; it errs towards a wide interval.

    Args:
        score: Its name, which tells its scale.
        value: What it is.
        ends: `low` and `high` from draws.
        akin: Of shares on the scale from 0 to 1: each class's right calls, or the AUC.
    """
    if ends["high"] - ends["low"] > _ROUNDING:
        return dict(ends)
    least, most = RANGES.get(score, (0.0, 1.0))
    low, high = (least + (most - least) * float(np.mean([one[end] for one in akin])) for end in ("low", "high"))
    return {"low": min(low, value), "high": max(high, value)}


def roc_band(
    hits: npt.NDArray[np.bool_], scores: Floats, groups: Sequence[str], *, resamples: int = 2000, seed: int = 0
) -> tuple[Floats, Floats, Floats]:
    """Where 95 % of the ROC curves of drawn groups run, at each false positive rate by itself.

    Returns:
        False positive rates (m,), and the lower and the upper end of the true positive rate at each.
    """
    rates = np.linspace(0, 1, _BAND)
    scorer = metrics.RocScorer(hits, scores, rates)
    low, high = interval(resample(scorer, groups, resamples=resamples, seed=seed)["tpr"])
    return rates, low, high


def reliability(
    task: Task, labels: metrics.Ints, probabilities: Floats, groups: Sequence[str]
) -> list[dict[str, float]]:
    """Compare confidence with truth, with an interval for each step of confidence.

    Returns:
        The rows of `metrics.reliability`, each with `low` and `high` of its accuracy.
    """
    rows = metrics.reliability(task, labels, probabilities)
    right, made = metrics.decisions_by_step(task, labels, probabilities)
    ends = (proportion(right[:, step], made[:, step], groups) for step in range(len(rows)))
    return [{**row, "low": low, "high": high} for row, (low, high) in zip(rows, ends, strict=True)]


def of_proportions(
    counts: Mapping[str, tuple[npt.NDArray[Any], npt.NDArray[Any]]], groups: Sequence[str], class_names: Sequence[str]
) -> dict[str, Any]:
    """Give `low` and `high` of each share, and for shares by class of each class.

    Args:
        counts: By name, right decisions and decisions made: (n,) each, or (n, K).
        groups: Of each sample.
        class_names: The K names.
    """

    def ends(right: npt.NDArray[Any], made: npt.NDArray[Any]) -> dict[str, float]:
        low, high = proportion(right, made, groups)
        return {"low": low, "high": high}

    return {
        name: ends(right, made)
        if right.ndim == 1
        else {name_of_class: ends(right[:, k], made[:, k]) for k, name_of_class in enumerate(class_names)}
        for name, (right, made) in counts.items()
    }


def named_intervals(draws: Mapping[str, Floats], class_names: Sequence[str]) -> dict[str, Any]:
    """Give `low` and `high` of each score, and for scores (R, K) of each class."""

    def ends(name: str, column: Floats) -> dict[str, float]:
        low, high = interval(column, ends=RANGES.get(name, (0.0, 1.0)))
        return {"low": float(low), "high": float(high)}

    return {
        name: ends(name, values)
        if values.ndim == 1
        else {name_of_class: ends(name, values[:, k]) for k, name_of_class in enumerate(class_names)}
        for name, values in draws.items()
    }
