"""Steps to solve a task, where a seed that has not solved it is censored."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import stats

__all__ = ["log_rank_p", "median_steps", "restricted_steps", "solve_curve"]


def solve_curve(steps_to_solve: Sequence[int | None], steps: int) -> tuple[list[float], list[float]]:
    """Share of seeds that have solved the task, against optimizer steps (Kaplan and Meier 1958, JASA 53:457-481).

    Unsolved seeds are censored at `steps`. A seed that diverged earlier is too: it can no longer solve
    the task, and censoring it when it diverged would credit it with the fate of the others.

    Args:
        steps_to_solve: One entry per seed, None where the seed did not solve the task.
        steps: Optimizer steps after which the unsolved were given up.

    Returns:
        Steps, starting at 0 and ending at `steps`, and the share solved from each step on.

    Raises:
        ValueError: If there are no seeds, or one took more than `steps`.
    """
    share = stats.ecdf(_censored(steps_to_solve, steps)).cdf
    at, reached = [0.0, *share.quantiles.tolist()], [0.0, *share.probabilities.tolist()]
    if at[-1] < steps:
        at, reached = [*at, float(steps)], [*reached, reached[-1]]
    return at, reached


def median_steps(steps_to_solve: Sequence[int | None], steps: int) -> float | None:
    """Steps by which at least half of the seeds had solved the task, None if fewer than half did.

    Args:
        steps_to_solve: As in `solve_curve`.
        steps: As in `solve_curve`.
    """
    at, reached = solve_curve(steps_to_solve, steps)
    return next((step for step, share in zip(at, reached, strict=True) if share >= 0.5), None)


def log_rank_p(ours: Sequence[int | None], theirs: Sequence[int | None], steps: int) -> float:
    """Two-sided p of a difference in steps to solve, by the log-rank test (Mantel 1966).

    At each step t at which d of n unsolved seeds solve the task, n_1 of these n being ours, ours are expected to be
    ``d n_1 / n`` of them; the sum of seen minus expected is compared with its hypergeometric variance. The pairing
    of seeds is not used.

    Args:
        ours: Steps to solve of one mechanism's seeds, None where unsolved, censored as in `solve_curve`.
        theirs: Steps to solve of the other mechanism's seeds.
        steps: Optimizer steps after which the unsolved were given up, the same for both.

    Returns:
        p; 1 where nothing tells the two apart, as where no seed solved the task.

    Raises:
        ValueError: As `solve_curve`.
    """
    with np.errstate(invalid="ignore"):  # 0 / 0
        p = stats.logrank(_censored(ours, steps), _censored(theirs, steps)).pvalue
    return 1.0 if np.isnan(p) else float(p)


def restricted_steps(steps_to_solve: Sequence[int | None], steps: int) -> list[float]:
    """Steps that each seed spends without having solved the task, of `steps`: an unsolved one spends all.

    Their mean is the area above `solve_curve`, the restricted mean survival time (Royston and Parmar 2013, BMC Medical
    Research Methodology 13:152): it speaks of all seeds, where a median of the solved ones compares survivors.

    Args:
        steps_to_solve: As in `solve_curve`.
        steps: As in `solve_curve`.
    """
    _censored(steps_to_solve, steps)
    return [float(steps if taken is None else taken) for taken in steps_to_solve]


def _censored(steps_to_solve: Sequence[int | None], steps: int) -> Any:
    if not steps_to_solve:
        raise ValueError("steps_to_solve is empty")
    if any(taken is not None and taken > steps for taken in steps_to_solve):
        raise ValueError(f"steps_to_solve holds {max(filter(None, steps_to_solve))}, more than steps={steps}")
    times = [steps if taken is None else taken for taken in steps_to_solve]
    return stats.CensoredData.right_censored(times, [taken is None for taken in steps_to_solve])
