"""The figures in plotly, for the page."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from ...analysis.comparisons import comparisons
from ...analysis.summaries import Summary, evidence, median_curve, summaries
from ...analysis.survival import solve_curve
from ...analysis.wording import describe_interval, mechanism_name
from ...config.condition import Condition
from ...runs.results import StudyResults
from .layout import finished_conditions, ladder
from .notes import candidate_names, steps_tests
from .plotly_parts import (
    HEADROOM,
    RANGE,
    Plot,
    error_bars,
    escaped,
    means_with_intervals,
    one_curve,
    one_panel,
    rows_of_conditions,
    seed_marks,
    shortened,
    straight_line,
)
from .theme import GRID, INK, MUTED, PREDICTORS, Style, crowding, difference_reach, dodge, predictors_of, spread, styles

__all__ = ["accuracy_plot", "difference_plot", "learning_plot", "solved_plot", "steps_plot"]


def accuracy_plot(results: StudyResults) -> go.Figure:
    """Accuracy against complexity: one panel per model, one column per task."""
    layout = ladder(results)
    figure = make_subplots(
        rows=len(layout.panels),
        shared_xaxes=True,
        vertical_spacing=0.3 / max(3, len(layout.panels)),
        subplot_titles=[escaped(panel.title) for panel in layout.panels],
    )
    figure.update_annotations(x=0, xanchor="left", font_size=13)
    drawn, shift = styles(results.mechanisms), dodge(results.mechanisms)
    found = {(summary.condition, summary.mechanism): summary for summary in summaries(results)}
    for row, panel in enumerate(layout.panels, 1):
        known = [(column, predictors_of(condition)) for column, condition in panel.conditions]
        for fact, (name, _, symbol, offset) in PREDICTORS.items():
            figure.add_scatter(
                row=row,
                col=1,
                x=[column + offset for column, values in known if fact in values],
                y=[values[fact] for _, values in known if fact in values],
                mode="markers",
                marker={"symbol": symbol, "size": 16 if fact == "chance" else 8, "color": MUTED},
                hovertemplate=f"{name} %{{y:.3f}}<extra></extra>",
            )
        for mechanism, style in drawn.items():
            columns = [(at, found.get((condition.label, mechanism))) for at, condition in panel.conditions]
            present = [(at, summary) for at, summary in columns if summary]
            for trace in _accuracy_traces(results, present, mechanism, style, shift[mechanism]):
                figure.add_trace(trace, row=row, col=1)
    ticks = ["<br>".join(map(escaped, lines)) for lines in layout.tasks]
    figure.update_xaxes(
        tickangle=0,
        tickfont_size=11,
        range=[-0.5, len(ticks) - 0.5],
        tickvals=list(range(len(ticks))),
        ticktext=ticks,
        showgrid=False,
    )
    figure.update_layout(shapes=[straight_line(boundary - 0.5, "x", GRID) for boundary in range(1, len(ticks))])
    figure.update_xaxes(title_text="task, state space in bits", row=len(layout.panels), col=1)
    figure.update_yaxes(range=RANGE, title_text="held-out accuracy")
    return figure.update_layout(height=120 + 230 * len(layout.panels), margin_t=HEADROOM)


def _accuracy_traces(
    results: StudyResults,
    present: Sequence[tuple[int, Summary]],
    mechanism: str,
    style: Style,
    shift: float,
) -> list[go.Scatter]:
    """One mechanism's seeds, and its means with intervals; the seeds stand left of the mean."""
    x, y, texts = [], [], []
    closer = crowding(results.mechanisms)
    for column, summary in present:
        rows = evidence(results.seeds, summary.condition, mechanism)
        x += [column + shift - 0.06 * closer + offset for offset in spread(rows.height, 0.1 * closer)]
        y += rows["accuracy"].to_list()
        texts += [f"{mechanism_name(mechanism)}, seed {seed}" for seed in rows["seed"]]
    return [
        seed_marks(x, y, texts, style, "%{text}: %{y:.3f}"),
        means_with_intervals(
            [column + shift + 0.06 * closer for column, _ in present],
            [summary.accuracy for _, summary in present],
            style,
            hover=[
                f"{mechanism_name(mechanism)}: {summary.accuracy:.3f}<br>"
                + describe_interval(summary.accuracy_interval, summary.seeds, ".3f")
                for _, summary in present
            ],
            mode="lines+markers",
            error_y=error_bars([(summary.accuracy, summary.accuracy_interval) for _, summary in present], style),
        ),
    ]


def solved_plot(results: StudyResults) -> go.Figure:
    """Share of seeds solved on each condition."""
    labels = [condition.label for condition in finished_conditions(results)]
    shift = dodge(results.mechanisms)
    figure = rows_of_conditions(labels)
    beside: list[dict[str, Any]] = []
    for mechanism, style in styles(results.mechanisms).items():
        found = [summary for summary in summaries(results) if summary.mechanism == mechanism]
        shares = [summary.solved / summary.seeds for summary in found]
        at = [labels.index(summary.condition) + shift[mechanism] for summary in found]
        counts = [f"{summary.solved}/{summary.seeds}" for summary in found]
        figure.add_trace(
            means_with_intervals(
                shares,
                at,
                style,
                hover=[
                    f"{mechanism_name(mechanism)}: {count} solved<br>"
                    + describe_interval(summary.solved_interval, summary.seeds, ".3f")
                    for count, summary in zip(counts, found, strict=True)
                ],
                error_x=error_bars(
                    [(share, summary.solved_interval) for share, summary in zip(shares, found, strict=True)],
                    style,
                ),
            )
        )
        beside += [
            {"x": 1, "xref": "paper", "xanchor": "left", "xshift": 6, "y": y, "text": count, "showarrow": False}
            for y, count in zip(at, counts, strict=True)
        ]
    figure.update_xaxes(range=RANGE, title_text="share of seeds solved")
    return figure.update_layout(margin_r=44, annotations=beside)


def difference_plot(results: StudyResults) -> go.Figure:
    """Paired difference in accuracy on each condition."""
    compared = comparisons(results)
    labels = list(dict.fromkeys(comparison.condition for comparison in compared))
    candidates = list(dict.fromkeys(comparison.candidate.mechanism for comparison in compared))
    drawn, shift = styles(results.mechanisms), dodge(candidates)
    figure = rows_of_conditions(labels)
    figure.add_vline(0, line_color=INK, line_width=1)
    for candidate in candidates:
        found = [comparison for comparison in compared if comparison.candidate.mechanism == candidate]
        at = [labels.index(comparison.condition) + shift[candidate] for comparison in found]
        x, y, texts = [], [], []
        for row, comparison in zip(at, found, strict=True):
            x += comparison.differences
            y += [row + 0.24 + offset for offset in spread(len(comparison.differences), 0.14)]
            texts += [f"seed {seed}" for seed in comparison.seeds]
        figure.add_trace(seed_marks(x, y, texts, drawn[candidate], "%{text}: %{x:+.3f}"))
        figure.add_trace(
            means_with_intervals(
                [comparison.difference for comparison in found],
                at,
                drawn[candidate],
                hover=[
                    f"{mechanism_name(candidate)} - DPA: {comparison.difference:+.4f}<br>"
                    + describe_interval(comparison.interval, len(comparison.differences), "+.4f")
                    for comparison in found
                ],
                error_x=error_bars(
                    [(comparison.difference, comparison.interval) for comparison in found], drawn[candidate]
                ),
            )
        )
    reach = difference_reach(results)
    names = escaped(candidate_names(results))
    figure.update_xaxes(range=[-reach, reach], title_text=f"accuracy of {names} - accuracy of DPA")
    for text, at, anchor in (("DPA better", 0, "left"), (f"{names} better", 1, "right")):
        figure.add_annotation(
            x=at,
            y=1,
            xref="paper",
            yref="paper",
            xanchor=anchor,
            yanchor="bottom",
            text=text,
            showarrow=False,
        )
    return figure.update_layout(margin_t=HEADROOM)


def learning_plot(results: StudyResults, condition: Condition) -> Plot:
    """Learning curves of one condition."""
    traces = []
    for mechanism, style in styles(results.mechanisms).items():
        curves = evidence(results.curves, condition.label, mechanism)
        if curves.is_empty():
            continue
        steps, accuracies = [], []
        for rows in curves.partition_by("seed"):
            rows = rows.sort("step")
            # The gap after each seed lets one trace hold them all.
            steps += [*rows["step"].to_list(), None]
            accuracies += [*shortened(rows["accuracy"].fill_nan(None)), None]
        median = median_curve(curves)
        traces += [
            {
                "x": steps,
                "y": accuracies,
                "mode": "lines",
                "line": {"color": style.color, "dash": style.dash, "width": 0.7},
                "opacity": 0.5,
                "hoverinfo": "skip",
            },
            one_curve(mechanism, style, median["step"].to_list(), shortened(median["accuracy"])),
        ]
    chance = straight_line(condition.facts["chance"], "y", MUTED) | {
        "line": {"color": MUTED, "width": 1, "dash": "dot"}
    }
    return one_panel(results, "accuracy", traces, shapes=[chance])


def steps_plot(results: StudyResults, condition: Condition) -> Plot:
    """Share of seeds solved against training steps, of one condition."""
    traces = []
    for mechanism, style in styles(results.mechanisms).items():
        rows = evidence(results.seeds, condition.label, mechanism)
        if rows.height:
            at, share = solve_curve(rows["steps_to_solve"].to_list(), int(rows["steps"].to_numpy().max()))
            traces.append(one_curve(mechanism, style, at, share, shape="hv"))
    said = {
        "x": 0.02,
        "y": 1,
        "xref": "paper",
        "yref": "paper",
        "xanchor": "left",
        "yanchor": "top",
        "text": escaped(steps_tests(results, condition)).replace("\n", "<br>"),
        "showarrow": False,
        "bgcolor": "rgba(255, 255, 255, 0.8)",
    }
    return one_panel(results, "share of seeds solved", traces, annotations=[said] if said["text"] else [])
