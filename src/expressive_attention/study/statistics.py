"""What a study shows: summaries, paired comparisons, and findings in plain sentences."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import polars as pl

from .inference import (
    LEVEL,
    MINIMUM_FOR_INTERVAL,
    SIGNIFICANCE,
    SMALLEST_EFFECT,
    Interval,
    example_error,
    finite,
    holm,
    log_rank_p,
    mean_interval,
    median_steps,
    restricted_steps,
    sign_flip_p,
    solve_curve,
    wider,
    wilson_interval,
)
from .results import Condition, Setting, StudyResults

__all__ = [
    "BASELINE",
    "LEVEL",
    "MINIMUM_CONTEXTS",
    "MINIMUM_FOR_INTERVAL",
    "MINIMUM_PREDICTIONS",
    "SIGNIFICANCE",
    "SMALLEST_EFFECT",
    "Comparison",
    "Finding",
    "Interval",
    "Summary",
    "TuningSummary",
    "comparisons",
    "describe_interval",
    "describe_p",
    "evidence",
    "findings",
    "findings_by_condition",
    "mean_interval",
    "mechanism_name",
    "median_curve",
    "median_steps",
    "overview",
    "solve_curve",
    "summaries",
    "tuning_summaries",
    "wilson_interval",
]

BASELINE = "dot_product"

# A condition counts with so many scored predictions, on so many different contexts, that training never saw.
MINIMUM_PREDICTIONS = 512
MINIMUM_CONTEXTS = 256

_NAMES = {
    "expressive": "EA",
    "dot_product": "DPA",
    "squared": "z²",
    "one_sided": "one-sided EA",
    "relu_squared": "ReLU²",
    "sigmoid": "sigmoid",
    "softmax_abs": "softmax of |z|",
    "sigmoid_abs": "sigmoid of |z|",
    "absolute": "|z|",
    "relu": "ReLU",
    "quartic": "z⁴/(1 + z⁴)",
    "one_sided_quartic": "one-sided z⁴/(1 + z⁴)",
}


@dataclass(frozen=True)
class Summary:
    """What the final seeds of one mechanism reached on one condition.

    Attributes:
        condition: Label of the condition.
        mechanism: The mechanism, as in the configuration.
        learning_rate: The rate chosen on the tuning seeds.
        initial_gain: The gain chosen with it.
        seeds: Number of seeds, diverged ones included.
        solved: Number of seeds that solved the task.
        solved_interval: Wilson interval of the share solved.
        accuracy: Mean accuracy over the seeds.
        accuracy_interval: Bootstrap interval of that mean, None where `mean_interval` gives none.
        cross_entropy: Mean over the seeds of their cross-entropy, in nats; infinite or NaN where a seed diverged.
        rollout_digits: Mean share of tokens right in rollouts, None where the task has none.
        rollout_exact: Mean share of rollouts right as a whole, likewise.
        median_steps: Steps by which at least half of the seeds had solved, None if fewer than half did.
        restricted_steps: Mean over all seeds of the steps before the task was solved, all steps where it was not.
        steps: Most optimizer steps that any of the seeds took.
        diverged: Number of seeds whose loss stopped being finite.
    """

    condition: str
    mechanism: str
    learning_rate: float
    initial_gain: float
    seeds: int
    solved: int
    solved_interval: Interval
    accuracy: float
    accuracy_interval: Interval | None
    cross_entropy: float
    rollout_digits: float | None
    rollout_exact: float | None
    median_steps: float | None
    restricted_steps: float
    steps: int
    diverged: int


@dataclass(frozen=True)
class Comparison:
    """One mechanism against the baseline on one condition, over the seeds that both have finished.

    Attributes:
        candidate: Summary of the mechanism over the shared seeds.
        baseline: Summary of the baseline over the same seeds.
        seeds: The shared seeds, ascending.
        differences: Accuracy of the candidate minus that of the baseline, per shared seed.
        difference: Mean of the differences.
        interval: Bootstrap interval of that mean, None where `mean_interval` gives none.
        p: Of the sign-flip test of that mean, adjusted by Holm's method over the conditions on which this mechanism is
            compared, or over the family of the study; None, and not counted there, where `untested` says why.
        raw_p: The same, not adjusted.
        steps_p: Of the log-rank test of the steps to solve, likewise.
        steps_difference: Mean difference in the steps before the task was solved, over all pairs.
        steps_interval: Bootstrap interval of that mean.
        validation_difference: Mean difference in accuracy on the validation sequences; None: not kept.
        validation_interval: Its interval over seeds.
        cross_entropy_difference: Mean difference in cross-entropy on the test sequences, in nats; None where a seed of
            either diverged.
        cross_entropy_interval: Its interval over seeds.
        example_interval: As `interval`, for the drawing of the test examples as well; None where there are more
            examples than are tested, so that this is no matter.
        untested: Why there is no test; None: there is one.
        neither_learned: Neither mechanism is better than a guess.
    """

    candidate: Summary
    baseline: Summary
    seeds: tuple[int, ...]
    differences: tuple[float, ...]
    difference: float
    interval: Interval | None
    p: float | None
    raw_p: float | None
    steps_p: float | None
    steps_difference: float
    steps_interval: Interval | None
    validation_difference: float | None
    validation_interval: Interval | None
    cross_entropy_difference: float | None
    cross_entropy_interval: Interval | None
    example_interval: Interval | None
    untested: str | None
    neither_learned: bool

    @property
    def condition(self) -> str:
        """Label of the condition."""
        return self.candidate.condition

    @property
    def leader(self) -> str | None:
        """The mechanism that is ahead, the one that the mean favours; None where none is.

        One is where `p` is below 0.05, the mean at least `SMALLEST_EFFECT`, and 0 outside of `example_interval`, if
        there is one.
        """
        if self.p is None or self.p >= SIGNIFICANCE or abs(self.difference) < SMALLEST_EFFECT:
            return None
        if self.example_interval is not None and self.example_interval.low <= 0 <= self.example_interval.high:
            return None
        return self.candidate.mechanism if self.difference > 0 else self.baseline.mechanism

    @property
    def verdict(self) -> str:
        """``"EA ahead"``, ``"DPA ahead"``, ``"neither learned"``, ``"not counted"`` or ``"no difference shown"``."""
        if self.leader:
            return f"{mechanism_name(self.leader)} ahead"
        if self.neither_learned:
            return "neither learned"
        return "not counted" if self.untested else "no difference shown"


@dataclass(frozen=True)
class TuningSummary:
    """What one learning rate and gain reached on the tuning seeds.

    Attributes:
        condition: Label of the condition.
        mechanism: The mechanism, as in the configuration.
        setting: The learning rate and gain tried.
        seeds: Number of tuning seeds.
        solved: Number of them that solved the task.
        accuracy: Their mean accuracy on validation sequences; in protocol 2, on test sequences.
        chosen: Whether the final seeds ran with this setting.
    """

    condition: str
    mechanism: str
    setting: Setting
    seeds: int
    solved: int
    accuracy: float
    chosen: bool


@dataclass(frozen=True)
class Finding:
    """What one condition shows, in words.

    Attributes:
        condition: Label of the condition.
        verdict: As `Comparison.verdict`, or ``"no comparison"``.
        details: The numbers, as sentences.
    """

    condition: str
    verdict: str
    details: str

    @property
    def sentence(self) -> str:
        """All of it in one line."""
        return f"{self.condition}: {self.verdict}. {self.details}"


def mechanism_name(mechanism: str) -> str:
    """Returns the name that people use: ``"EA"``, ``"DPA"``, or the mechanism itself."""
    first = mechanism.removesuffix("_again")
    return _NAMES.get(first, first) + (" again" if first != mechanism else "")


def median_curve(curves: pl.DataFrame) -> pl.DataFrame:
    """Median accuracy over seeds at each evaluation.

    A seed that ended early, or whose accuracy is NaN, keeps its last accuracy: leaving it out would let
    the median rise when the worst seeds diverge.

    Args:
        curves: Rows of `StudyResults.curves` of one condition and mechanism.

    Returns:
        Columns ``step`` and ``accuracy``, by ascending step.

    Raises:
        ValueError: If `curves` has no row.
    """
    if curves.is_empty():
        raise ValueError("curves has no row")
    by_seed = (
        curves.with_columns(pl.col("accuracy").fill_nan(None))
        .pivot(on="seed", index="step", values="accuracy")
        .sort("step")
        .with_columns(pl.exclude("step").forward_fill())
    )
    return by_seed.select("step", accuracy=pl.concat_list(pl.exclude("step")).list.median())


def evidence(
    table: pl.DataFrame, condition: str, mechanism: str, *, role: str = "final", by: str = "seed"
) -> pl.DataFrame:
    """Rows of a table of `StudyResults` of one condition and mechanism, in the order of `by`: final seeds count."""
    return table.filter(
        pl.col("role") == role, pl.col("condition") == condition, pl.col("mechanism") == mechanism
    ).sort(by)


@lru_cache(maxsize=4)  # figures, tables and sentences all ask for them
def summaries(results: StudyResults) -> list[Summary]:
    """One summary for each condition and mechanism that has final seeds, in the study's order.

    Raises:
        ValueError: If an accuracy is not a finite number, or final seeds ran at several learning rates.
    """
    return [
        _summarize(rows)
        for condition in results.conditions
        for mechanism in results.mechanisms
        if not (rows := evidence(results.seeds, condition.label, mechanism)).is_empty()
    ]


@lru_cache(maxsize=4)
def comparisons(results: StudyResults) -> list[Comparison]:
    """Every other mechanism against `BASELINE`, wherever both have final seeds in common.

    Raises:
        ValueError: As `summaries`.
    """
    order = [condition.label for condition in results.conditions]
    found = []
    for mechanism in results.mechanisms:
        if mechanism != BASELINE:
            compared = [_compare(results, condition, mechanism) for condition in results.conditions]
            # The family is of EA; another mechanism's tests are the study's own.
            family = results.family if mechanism == "expressive" else 0
            found += _adjusted([comparison for comparison in compared if comparison is not None], family)
    return sorted(found, key=lambda comparison: order.index(comparison.condition))


@lru_cache(maxsize=4)
def tuning_summaries(results: StudyResults) -> list[TuningSummary]:
    """One summary for each setting tried on tuning seeds, by ascending rate and gain, in the study's order.

    Raises:
        ValueError: If an accuracy is not a finite number.
    """
    chosen = {
        (summary.condition, summary.mechanism): Setting(summary.learning_rate, summary.initial_gain)
        for summary in summaries(results)
    }
    tuning = results.seeds.filter(pl.col("role") == "tuning").sort(Setting._fields)
    found = []
    for condition in results.conditions:
        for mechanism in results.mechanisms:
            cell = tuning.filter(pl.col("condition") == condition.label, pl.col("mechanism") == mechanism)
            for rows in cell.partition_by(Setting._fields, maintain_order=True):
                setting = Setting(*rows.select(Setting._fields).row(0))
                found.append(
                    TuningSummary(
                        condition=condition.label,
                        mechanism=mechanism,
                        setting=setting,
                        seeds=rows.height,
                        solved=int(rows["solved"].sum()),
                        accuracy=_mean(rows, "accuracy" if results.protocol < 3 else "validation"),
                        chosen=chosen.get((condition.label, mechanism)) == setting,
                    )
                )
    return found


def findings(results: StudyResults) -> list[str]:
    """What the study found, in plain sentences: counts over the conditions first, then each condition.

    Raises:
        ValueError: As `summaries`.
    """
    return [*overview(results), *(finding.sentence for finding in findings_by_condition(results))]


def overview(results: StudyResults) -> list[str]:
    """Sentences that count over the conditions."""
    compared = comparisons(results)
    if not compared:
        return [_nothing_to_compare(results)]
    sentences = []
    for candidate in dict.fromkeys(comparison.candidate.mechanism for comparison in compared):
        chosen = [comparison for comparison in compared if comparison.candidate.mechanism == candidate]
        sentences += _counts(chosen)
        missing = len(results.conditions) - len(chosen)
        if missing:
            sentences.append(
                f"Not compared yet: {_plural(missing, 'condition')} of {len(results.conditions)}, where "
                f"{mechanism_name(candidate)} and {mechanism_name(BASELINE)} have not both finished."
            )
    return sentences


def findings_by_condition(results: StudyResults) -> list[Finding]:
    """What each condition with final seeds shows, in the study's order."""
    found = [
        Finding(comparison.condition, comparison.verdict, _explain(comparison)) for comparison in comparisons(results)
    ]
    compared = {finding.condition for finding in found}
    found += [
        Finding(summary.condition, "no comparison", f"{_reached(summary)}.")
        for summary in summaries(results)
        if summary.condition not in compared
    ]
    order = [condition.label for condition in results.conditions]
    return sorted(found, key=lambda finding: order.index(finding.condition))


def describe_interval(interval: Interval | None, n: int, spec: str) -> str:
    """``"95% interval 0.912 to 0.998"``, or why there is no interval."""
    if interval is not None:
        return f"{LEVEL:.0%} interval {interval:{spec}}"
    if n < MINIMUM_FOR_INTERVAL:
        return f"no interval: fewer than {MINIMUM_FOR_INTERVAL} seeds"
    return "no interval: all equal"


def describe_p(p: float) -> str:
    """``"p = 0.031"`` or ``"p < 0.001"``."""
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}"


def _explain(comparison: Comparison) -> str:
    """The numbers that a verdict rests on."""
    pairs = len(comparison.differences)
    return (
        f"{_reached(comparison.candidate)}; {_reached(comparison.baseline)}. "
        f"Paired difference {comparison.difference:+.4f} "
        f"({describe_interval(comparison.interval, pairs, '+.4f')}; {_plural(pairs, 'pair')}"
        f"{_tested(comparison.p)}).{_fixed_data(comparison)}{_steps(comparison)}"
        + (f" Not counted: {comparison.untested}." if comparison.untested else "")
    )


def _fixed_data(comparison: Comparison) -> str:
    """A note on cross-entropy and on what validation examples say, where there are no more examples; none elsewhere."""
    if comparison.example_interval is None:
        return ""
    drawn = f" With the drawing of test examples: {LEVEL:.0%} interval {comparison.example_interval:+.4f}."
    if comparison.cross_entropy_difference is not None:
        interval = describe_interval(comparison.cross_entropy_interval, len(comparison.differences), "+.4f")
        drawn += (
            f" Cross-entropy {comparison.candidate.cross_entropy:.4f} against {comparison.baseline.cross_entropy:.4f} "
            f"nats, difference {comparison.cross_entropy_difference:+.4f} ({interval})."
        )
    if comparison.validation_difference is None:
        return drawn
    interval = describe_interval(comparison.validation_interval, len(comparison.differences), "+.4f")
    return f"{drawn} On validation examples the difference is {comparison.validation_difference:+.4f} ({interval})."


def _steps(comparison: Comparison) -> str:
    """Whether the steps to solve differ, as a sentence; none where no seed solved the task or too few ran."""
    if comparison.steps_p is None or not comparison.candidate.solved + comparison.baseline.solved:
        return ""
    spent, interval = (
        comparison.steps_difference,
        describe_interval(comparison.steps_interval, len(comparison.differences), "+,.0f"),
    )
    return (
        f" Steps before it is solved, over all seeds: {comparison.candidate.restricted_steps:,.0f} against "
        f"{comparison.baseline.restricted_steps:,.0f}, {spent:+,.0f} ({interval}; log-rank "
        f"{describe_p(comparison.steps_p)})."
    )


def _tested(p: float | None) -> str:
    return "" if p is None else f"; {describe_p(p)}"


def _summarize(rows: pl.DataFrame) -> Summary:
    """Summary of the final rows of one condition and mechanism."""
    rates = rows["learning_rate"].unique().sort().to_list()
    if len(rates) > 1:
        raise ValueError(f"{_where(rows)}: final seeds ran at several learning rates: {rates}")
    accuracy = finite(rows["accuracy"].to_list(), f"{_where(rows)}: accuracy")
    steps = int(rows["steps"].to_numpy().max())
    solved = int(rows["solved"].sum())
    return Summary(
        condition=rows["condition"][0],
        mechanism=rows["mechanism"][0],
        learning_rate=rates[0],
        initial_gain=rows["initial_gain"][0],
        seeds=rows.height,
        solved=solved,
        solved_interval=wilson_interval(solved, rows.height),
        accuracy=float(accuracy.mean()),
        accuracy_interval=mean_interval(accuracy.tolist()),
        cross_entropy=float(rows["cross_entropy"].to_numpy().mean()),
        rollout_digits=_mean_if_any(rows, "rollout_digits"),
        rollout_exact=_mean_if_any(rows, "rollout_exact"),
        median_steps=median_steps(rows["steps_to_solve"].to_list(), steps),
        restricted_steps=float(np.mean(restricted_steps(rows["steps_to_solve"].to_list(), steps))),
        steps=steps,
        diverged=rows.height - rows["diverged_at"].null_count(),
    )


def _compare(results: StudyResults, condition: Condition, mechanism: str) -> Comparison | None:
    """The mechanism against `BASELINE` on the seeds that both have, None if there is none."""
    candidate, baseline = (evidence(results.seeds, condition.label, name) for name in (mechanism, BASELINE))
    candidate = candidate.join(baseline, on="seed", how="semi")
    baseline = baseline.join(candidate, on="seed", how="semi")
    if candidate.is_empty():
        return None
    candidate_summary, baseline_summary = _summarize(candidate), _summarize(baseline)
    paired = candidate.join(baseline, on="seed", suffix="_baseline", validate="1:1").sort("seed")
    differences = (paired["accuracy"] - paired["accuracy_baseline"]).to_list()
    difference, interval = float(np.mean(differences)), mean_interval(differences)
    steps = max(candidate_summary.steps, baseline_summary.steps)
    spent = [paired[f"steps_to_solve{side}"].to_list() for side in ("", "_baseline")]
    ours, theirs = (restricted_steps(taken, steps) for taken in spent)
    more = [mine - other for mine, other in zip(ours, theirs, strict=True)]
    validation = (paired["validation"] - paired["validation_baseline"]).drop_nulls().to_list()
    losses = (paired["cross_entropy"] - paired["cross_entropy_baseline"]).to_list()
    are_finite = bool(np.isfinite(np.array(losses, dtype=float)).all())  # not where a seed diverged
    error = _example_error(results, condition, mechanism)
    untested = _untested(condition, paired)
    raw_p = None if untested else sign_flip_p(differences)
    return Comparison(
        candidate=candidate_summary,
        baseline=baseline_summary,
        seeds=tuple(paired["seed"].to_list()),
        differences=tuple(differences),
        difference=difference,
        interval=interval,
        p=raw_p,
        raw_p=raw_p,
        steps_p=None if untested else log_rank_p(spent[0], spent[1], steps),
        steps_difference=float(np.mean(more)),
        steps_interval=mean_interval(more),
        validation_difference=float(np.mean(validation)) if validation else None,
        validation_interval=mean_interval(validation) if validation else None,
        cross_entropy_difference=float(np.mean(losses)) if are_finite else None,
        cross_entropy_interval=mean_interval(losses) if are_finite else None,
        example_interval=None if error is None else wider(difference, interval, error),
        untested=untested,
        neither_learned=_neither_learned(condition, candidate_summary, baseline_summary),
    )


def _untested(condition: Condition, paired: pl.DataFrame) -> str | None:
    """Why a condition is not counted, None where it is."""
    if paired.height < MINIMUM_FOR_INTERVAL:
        return f"fewer than {MINIMUM_FOR_INTERVAL} pairs of seeds"
    predictions, contexts = (
        min([condition.facts[name], *paired[column].drop_nulls(), *paired[f"{column}_baseline"].drop_nulls()])
        if name in condition.facts
        else None
        for name, column in (("predictions", "unseen_predictions"), ("contexts", "unseen_contexts"))
    )
    if predictions is None or contexts is None:
        return None
    if predictions >= MINIMUM_PREDICTIONS and contexts >= MINIMUM_CONTEXTS:
        return None
    return (
        f"its test has {predictions} scored predictions on {contexts} contexts that training never saw, fewer than "
        f"{MINIMUM_PREDICTIONS} on {MINIMUM_CONTEXTS}"
    )


def _neither_learned(condition: Condition, *both: Summary) -> bool:
    guess = max(condition.facts.get(name) or 0.0 for name in ("chance", "majority"))
    return all(summary.accuracy < guess + SMALLEST_EFFECT for summary in both)


def _example_error(results: StudyResults, condition: Condition, mechanism: str) -> float | None:
    """Standard error of the difference by the drawing of test examples; None where there are more of them."""
    if not condition.facts.get("fixed_data"):
        return None
    sides = []
    for name in (mechanism, BASELINE):
        rows = evidence(results.examples, condition.label, name, by="example")
        if rows.is_empty():
            return None
        sides.append(
            rows.group_by("example", maintain_order=True).agg(
                pl.col("scored").first(), share=pl.col("right").sum() / pl.col("seeds").sum()
            )
        )
    return example_error((sides[0]["share"] - sides[1]["share"]).to_list(), sides[0]["scored"].to_list())


def _adjusted(compared: list[Comparison], family: int) -> list[Comparison]:
    """The comparisons of one mechanism, with p adjusted over the conditions on which it is tested, or the family."""
    tested = [comparison for comparison in compared if comparison.p is not None]
    p = holm([comparison.p for comparison in tested if comparison.p is not None], family)
    steps_p = holm([comparison.steps_p for comparison in tested if comparison.steps_p is not None], family)
    adjusted = {
        comparison.condition: replace(comparison, p=p[index], steps_p=steps_p[index])
        for index, comparison in enumerate(tested)
    }
    return [adjusted.get(comparison.condition, comparison) for comparison in compared]


def _counts(compared: list[Comparison]) -> list[str]:
    """Counts over comparisons of one candidate with the baseline."""
    first, total = compared[0], _plural(len(compared), "condition")
    candidate, baseline = mechanism_name(first.candidate.mechanism), mechanism_name(first.baseline.mechanism)
    margins = [comparison.candidate.solved - comparison.baseline.solved for comparison in compared]
    more, fewer = sum(margin > 0 for margin in margins), sum(margin < 0 for margin in margins)
    leaders = [comparison.leader for comparison in compared]
    ahead, behind = leaders.count(first.candidate.mechanism), leaders.count(first.baseline.mechanism)
    neither = sum(comparison.verdict == "neither learned" for comparison in compared)
    uncounted = sum(comparison.verdict == "not counted" for comparison in compared)
    rest = leaders.count(None) - neither - uncounted
    solved = (
        f"On {more} of {total} {candidate} solved more seeds than {baseline}, on {fewer} fewer, "
        f"on {margins.count(0)} equally many."
    )
    accuracy = (
        f"By the paired difference in accuracy {candidate} is ahead on {ahead} of {total}, "
        f"{baseline} on {behind}; on {rest} no difference is shown."
        + (f" On {neither} neither learned." if neither else "")
        + (f" {_plural(uncounted, 'condition')} not counted." if uncounted else "")
    )
    return [solved, accuracy]


def _nothing_to_compare(results: StudyResults) -> str:
    """Why there is no comparison."""
    names = {mechanism_name(summary.mechanism): None for summary in summaries(results)}
    if not names:
        return "No final seed has finished yet: there is nothing to report."
    if len(names) == 1:
        return f"Only {next(iter(names))} has finished seeds: there is nothing to compare it with yet."
    return f"{' and '.join(names)} have no seed in common on any condition: there is nothing to compare yet."


def _reached(summary: Summary) -> str:
    """What one mechanism reached, as part of a sentence."""
    interval = describe_interval(summary.accuracy_interval, summary.seeds, ".3f")
    diverged = f", {summary.diverged} diverged" if summary.diverged else ""
    return (
        f"{mechanism_name(summary.mechanism)} solved {summary.solved}/{summary.seeds} seeds, "
        f"mean accuracy {summary.accuracy:.3f} ({interval}){diverged}"
    )


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def _where(rows: pl.DataFrame) -> str:
    return f"{rows['condition'][0]}, {mechanism_name(rows['mechanism'][0])}"


def _mean(rows: pl.DataFrame, column: str) -> float:
    return float(finite(rows[column].to_list(), f"{_where(rows)}: {column}").mean())


def _mean_if_any(rows: pl.DataFrame, column: str) -> float | None:
    return None if rows[column].null_count() == rows.height else _mean(rows, column)
