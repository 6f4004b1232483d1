"""What the runs of a study say together: mean, spread and interval per setting, paired difference to the baseline.

Two things make a score uncertain: the seed (first weights, order, the draw of the training samples) and the sample of
patients that happens to be the test set. The interval of a mean speaks of seeds alone, on this very test set. The
interval of a difference speaks of both.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import NormalDist
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.evaluate.compare import Predictions, what_differs
from pipeline.evaluate.intervals import FEW, LEVEL, RANGES, of_several, resample
from pipeline.evaluate.metrics import Scorer
from pipeline.study.folds import POOLED, pooled, rows_of
from pipeline.study.runs import Planned, Row, result_of

Floats = npt.NDArray[np.floating[Any]]
RESAMPLES = 1000
Trial = tuple[Planned, ...]  # what a seed of a cell is: a run, or its folds in their order
Drawn = tuple[Predictions, Mapping[str, Floats], Mapping[str, float]]  # what it said, scores of draws, and of the whole


@dataclass
class Summary:
    """The tables of a study, from the runs that are done.

    Args:
        runs: All runs that the study plans.
        baseline: The variant that the others are compared with.
        scores: The scores of the table, in its order.
        resamples: Draws of test groups for the differences; each run is drawn once, however often tables are made.
    """

    runs: Sequence[Planned]
    baseline: str
    scores: Sequence[str]
    resamples: int = RESAMPLES
    _drawn: dict[tuple[str, ...], Drawn] = field(default_factory=dict)
    _by_fold: dict[tuple[str, ...], list[Row]] = field(default_factory=dict)

    def results(self) -> list[Row]:
        """One row per finished run: its cell, `seed`, any `fold`, scores, `val_auc`, `best_epoch`, `seconds`, `run`."""
        rows = []
        for planned in self.runs:
            result = result_of(planned)
            if result is not None:
                figures = {key: result[key] for key in ("val_auc", "best_epoch", "seconds")}
                which = {"seed": planned.seed} | ({} if planned.fold is None else {"fold": planned.fold})
                rows.append({**planned.cell, **which, **result["scores"], **figures, "run": str(planned.folder)})
        return rows

    def folds(self) -> list[Row]:
        """The rows of `folds.rows_of` for each cross-validation of which all folds are done; none without folds."""
        if not self.cross_validated:
            return []
        trials = [trial for members in self._cells().values() for trial in self._done(members).values()]
        for trial in trials:
            names = tuple(planned.name for planned in trial)
            if names not in self._by_fold:
                self._by_fold[names] = rows_of(trial, self.scores, resamples=self.resamples)
        return [row for trial in trials for row in self._by_fold[tuple(planned.name for planned in trial)]]

    @property
    def cross_validated(self) -> bool:
        """Whether its runs are folds."""
        return any(planned.fold is not None for planned in self.runs)

    def _cells(self) -> dict[tuple[tuple[str, Any], ...], list[Planned]]:
        """The runs of each cell."""
        cells: dict[tuple[tuple[str, Any], ...], list[Planned]] = {}
        for planned in self.runs:
            cells.setdefault(tuple(planned.cell.items()), []).append(planned)
        return cells

    def _done(self, members: Sequence[Planned]) -> dict[int, Trial]:
        """By seed, the run or all folds of it, where they are done."""
        trials: dict[int, Trial] = {}
        for planned in members:
            trials[planned.seed] = (*trials.get(planned.seed, ()), planned)
        return {
            seed: trial for seed, trial in trials.items() if all(result_of(planned) is not None for planned in trial)
        }

    def table(self) -> list[Row]:
        """One row per cell and score.

        A seed of a cross-validation counts once all of its folds are done, by the score of all samples pooled; `low`
        and `high` are those of its interval over groups then, averaged over seeds, and no interval over seeds.

        Returns:
            The columns of the cell; `score`; `seeds` done and runs `missing`; `mean`, `sd`, and `low` and `high` of the
            95 % interval of the mean over seeds (Student's t; None for a single seed); `difference` to the baseline at
            the same point of the grid, the mean over the seeds that both have, with `difference_low` and
            `difference_high` (see `paired_interval`), None for the baseline itself, where it has no such run, or where
            the two were tested on other samples.
        """
        rows = []
        for key, members in self._cells().items():
            done = self._done(members)
            baseline = [
                planned
                for planned in self.runs
                if planned.cell["variant"] == self.baseline and planned.point == members[0].point
            ]
            rivals = {seed: trial for seed, trial in self._done(baseline).items() if seed in done}
            missing = sum(result_of(planned) is None for planned in members)
            for score in self.scores:
                found = [self._score(trial, score) for trial in done.values()]
                values = np.array([value for value in found if value is not None])
                if len(values):
                    row = {**dict(key), "score": score, "seeds": len(values), "missing": missing}
                    spread = _over_seeds(values, *RANGES.get(score, (0.0, 1.0)))
                    if self.cross_validated:
                        spread |= self._over_groups(dict(key), score)
                    rows.append({**row, **spread, **self._difference(done, rivals, score)})
        return rows

    def _score(self, trial: Trial, score: str) -> float | None:
        """The score of a run, or of all folds pooled; None where the task has none."""
        if len(trial) > 1:
            return self._draws(trial)[2].get(score)
        result = result_of(trial[0])
        assert result is not None
        value: float | None = result["scores"].get(score)
        return value

    def _over_groups(self, key: Mapping[str, Any], score: str) -> Row:
        """Ends of the interval over groups of all samples pooled: of each seed, and averaged over them."""
        ends = [
            (row["low"], row["high"])
            for row in self.folds()
            if row["fold"] == POOLED and row["score"] == score and all(row[name] == key[name] for name in key)
        ]
        low, high = np.array(ends, np.float64).mean(axis=0)
        return {"low": float(low), "high": float(high)}

    def _difference(self, ours: Mapping[int, Trial], theirs: Mapping[int, Trial], score: str) -> Row:
        """Compare a cell with the baseline's, seed by seed and on the same draws of test groups."""
        nothing: Row = {"difference": None, "difference_low": None, "difference_high": None}
        pairs = [(ours[seed], rival) for seed, rival in theirs.items() if ours[seed] != rival]
        if not pairs:
            return nothing
        drawn = [(self._draws(first), self._draws(second)) for first, second in pairs]
        tested = drawn[0][0][0]
        if any(what_differs(tested, one[0]) is not None for pair in drawn for one in pair):
            return nothing
        scores = [(self._score(first, score), self._score(second, score)) for first, second in pairs]
        points = np.array([one - other for one, other in scores if one is not None and other is not None])
        draws = np.stack([one[1][score] - other[1][score] for one, other in drawn], axis=1)
        lowest, highest = RANGES.get(score, (0.0, 1.0))
        largest, groups = highest - lowest, len(set(tested.groups))
        if score == "auc" and tested.task == "binary" and not of_several(tested.labels == 1, tested.groups):
            low, high = -largest, largest  # a class is one patient: see `compare.delong_test`
        else:
            low, high = paired_interval(points, draws, groups=groups, largest=largest)
            low, high = max(low, -largest), min(high, largest)
        return {"difference": float(points.mean()), "difference_low": low, "difference_high": high}

    def _draws(self, trial: Trial) -> Drawn:
        """Score a run, or the folds of a seed pooled, on many draws of test groups, the same draws for all."""
        names = tuple(planned.name for planned in trial)
        if names not in self._drawn:
            said = pooled([planned.folder for planned in trial])
            scorer = Scorer(said.task, said.labels, said.probabilities, said.positive)

            def scores(weights: Floats) -> Mapping[str, Floats]:
                everything = scorer(weights)
                return {name: everything[name] for name in self.scores if name in everything}

            points = {name: float(value[0]) for name, value in scores(np.ones((1, len(said.ids)))).items()}
            self._drawn[names] = said, resample(scores, said.groups, resamples=self.resamples), points
        return self._drawn[names]


def paired_interval(points: Floats, draws: Floats, *, groups: int, largest: float = 1.0) -> tuple[float, float]:
    """Give the 95 % interval of a mean paired difference, for another draw of both the seeds and the test groups.

    Two variances are added: that of the mean over seeds (from how the differences of the seeds scatter on the whole
    test set), and that of the seeds' mean difference over bootstrap draws of test groups. Each holds the part in which
    seed and patient act together, so the sum is a little too large rather than too small. Student's t has the degrees
    of freedom that Satterthwaite (Biometrics 1946) gives the sum, rounded down: a few seeds count as a few.

    With a single seed there is nothing to tell how seeds scatter: the interval then speaks of the test set alone. It
    never speaks of another data set or another recipe. Where too few draws have every class (`intervals.FEW`), nothing
    is known.

    Args:
        points: (S,) difference of each seed on the whole test set.
        draws: (R, S) the same on each draw of test groups; NaN where a draw lacks a class.
        groups: Groups in the test set.
        largest: Difference that there can be, where nothing is known.
    """
    seeds, means = len(points), draws.mean(axis=1)
    if np.isfinite(means).mean() < FEW:
        return -largest, largest
    of_test = float(np.nanvar(means, ddof=1))
    of_seeds = float(points.var(ddof=1)) / seeds if seeds > 1 else 0.0
    total = of_test + of_seeds
    mean = float(points.mean())
    if total == 0:
        return mean, mean
    spread = of_test**2 / max(groups - 1, 1) + (of_seeds**2 / (seeds - 1) if seeds > 1 else 0.0)
    reach = t_point(max(1, math.floor(total**2 / spread))) * math.sqrt(total)
    return mean - reach, mean + reach


def t_point(freedom: int) -> float:
    """Find the 97.5 % point of Student's t with a whole number of degrees of freedom, to 1e-9, by bisection."""
    low, high = NormalDist().inv_cdf((1 + LEVEL) / 2), 13.0  # its limit, and above its value for one degree
    while high - low > 1e-10:
        middle = (low + high) / 2
        low, high = (middle, high) if _t_within(middle, freedom) < LEVEL else (low, middle)
    return low


def _t_within(t: float, freedom: int) -> float:
    """Compute P(|T| < t) by the finite sum of Abramowitz and Stegun, 26.7.3 and 26.7.4."""
    angle = math.atan(t / math.sqrt(freedom))
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = freedom % 2
    term = total = (cosine if freedom > 1 else 0.0) if odd else 1.0
    for k in range(3 if odd else 2, freedom - 1, 2):
        term *= cosine**2 * (k - 1) / k
        total += term
    return 2 / math.pi * (angle + sine * total) if odd else sine * total


def _over_seeds(values: Floats, lowest: float, highest: float) -> Row:
    """Give mean, standard deviation and interval, which ends where the score itself does."""
    mean, count = float(values.mean()), len(values)
    if count < 2:
        return {"mean": mean, "sd": None, "low": None, "high": None}
    sd = float(values.std(ddof=1))
    reach = t_point(count - 1) * sd / math.sqrt(count)
    return {"mean": mean, "sd": sd, "low": max(mean - reach, lowest), "high": min(mean + reach, highest)}
