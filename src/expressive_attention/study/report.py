"""A study's report: one HTML page that needs no network, and its figures as image files."""

from __future__ import annotations

import base64
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from itertools import groupby
from pathlib import Path
from typing import Any

import jinja2
import plotly.graph_objects as go
import polars as pl
from markupsafe import Markup
from matplotlib.figure import Figure
from plotly.offline import get_plotlyjs
from plotly.subplots import make_subplots

from . import figures
from .figures import GRID, INK, MUTED, PREDICTORS, Style
from .files import write_atomically
from .results import Condition, Setting, StudyResults
from .statistics import (
    LEVEL,
    MINIMUM_FOR_INTERVAL,
    Interval,
    Summary,
    TuningSummary,
    comparisons,
    describe_interval,
    evidence,
    findings_by_condition,
    mechanism_name,
    median_curve,
    overview,
    solve_curve,
    summaries,
    tuning_summaries,
)

__all__ = ["write_report"]

_FONT = 'system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", "Liberation Sans", sans-serif'
_RANGE = [-0.03, 1.03]  # a share, with room for markers at both ends
_HEADROOM = 28  # pixels for a line of text above a plot
_PANELS_PER_STILL = 6  # as many as fit on a printed page


@dataclass(frozen=True)
class _Chart:
    """One figure of the page.

    Attributes:
        name: Of its anchor.
        title: Its heading.
        alternative: What it shows, for those who cannot see it.
        note: What its marks stand for.
        plots: Interactive plots, each with a heading (empty for a single plot).
        stills: Data URIs of images, for paper and for browsers without scripts.
        key: Entries of the key: mechanism's style and label.
        marks: Whether the key shows markers beside lines.
        predictors: Whether the key names the trivial predictors.
        columns: Tasks beside each other, each of which needs some width.
    """

    name: str
    title: str
    alternative: str
    note: str
    plots: Sequence[tuple[str, Markup]]
    stills: Sequence[str]
    key: Sequence[tuple[Style, str]]
    marks: bool = True
    predictors: bool = False
    columns: int = 1


def write_report(results: StudyResults, directory: Path) -> Path:
    """Writes ``report.html`` and ``figures/*.png``, each file at once or not at all.

    Args:
        results: The study, finished or not.
        directory: Where to write; created if missing.

    Returns:
        The path of the page.

    Raises:
        ValueError: If a measure of a final or tuning seed is not a finite number.
    """
    images = figures.save_figures(results, directory / "figures")
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("expressive_attention.study"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "mechanism": mechanism_name,
        "count": _count,
        "duration": _duration,
        "interval": _interval,
        "steps": _steps,
    }
    settings = sorted({trial.setting for trial in tuning_summaries(results)})
    page = environment.get_template("report.html.j2").render(
        results=results,
        overview=overview(results),
        findings=findings_by_condition(results),
        charts=_charts(results, images),
        predictors=PREDICTORS,
        summaries=[(label, list(rows)) for label, rows in groupby(summaries(results), lambda row: row.condition)],
        tuning=_tuning_rows(results),
        settings=settings,
        gains={setting.initial_gain for setting in settings},
        contexts_seen=_contexts_seen(results),
        level=f"{LEVEL:.0%}",
        minimum=MINIMUM_FOR_INTERVAL,
        plotlyjs=Markup(get_plotlyjs()),
        muted=MUTED,
    )
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "report.html"
    write_atomically(path, page.encode())
    return path


def _charts(results: StudyResults, images: dict[str, Path]) -> list[_Chart]:
    """The figures that the results allow."""
    if not images:
        return []
    conditions = figures.finished_conditions(results)
    styles = figures.styles(results.mechanisms)
    key = [(style, mechanism_name(mechanism)) for mechanism, style in styles.items()]
    names = " and ".join(name for _, name in key)
    charts = [
        _Chart(
            name="accuracy",
            title="Accuracy against complexity",
            alternative=f"Held-out accuracy of {names} on each task, by state space. Numbers: table 1.",
            note=figures.accuracy_note(results),
            plots=[("", _plot(_accuracy_plot(results)))],
            stills=[_data_uri(images["accuracy"].read_bytes())],
            key=key,
            predictors=True,
            columns=len(figures.ladder(results).tasks),
        ),
        _Chart(
            name="solved",
            title="Seeds that solved the task",
            alternative=f"Share of seeds solved by {names} on each condition. Numbers: table 1.",
            note=figures.solved_note(results),
            plots=[("", _plot(_solved_plot(results)))],
            stills=[_data_uri(images["solved"].read_bytes())],
            key=key,
        ),
    ]
    if compared := comparisons(results):
        candidates = list(dict.fromkeys(comparison.candidate.mechanism for comparison in compared))
        against = f"{figures.candidate_names(results)} minus that of DPA"
        charts.append(
            _Chart(
                name="difference",
                title="Paired difference in accuracy",
                alternative=f"Accuracy of {against} on each condition. Numbers: findings.",
                note=figures.difference_note(results),
                plots=[("", _plot(_difference_plot(results)))],
                stills=[_data_uri(images["difference"].read_bytes())],
                key=[(styles[mechanism], f"{mechanism_name(mechanism)} - DPA") for mechanism in candidates],
            )
        )
    charts += [
        _Chart(
            name="learning",
            title="Learning curves",
            alternative=f"Validation accuracy of {names} against training steps on each condition.",
            note=figures.learning_note(results),
            plots=[(found.label, _plot(_learning_plot(results, found))) for found in conditions],
            stills=_stills(results, conditions, figures.learning_figure, images["learning_curves"]),
            key=key,
            marks=False,
        ),
        _Chart(
            name="steps",
            title="Steps to solve",
            alternative=f"Share of seeds solved by {names} against training steps on each condition.",
            note=figures.steps_note(results),
            plots=[(found.label, _plot(_steps_plot(results, found))) for found in conditions],
            stills=_stills(results, conditions, figures.steps_figure, images["steps_to_solve"]),
            key=key,
            marks=False,
        ),
    ]
    return charts


def _accuracy_plot(results: StudyResults) -> go.Figure:
    layout = figures.ladder(results)
    figure = make_subplots(
        rows=len(layout.panels),
        shared_xaxes=True,
        vertical_spacing=0.3 / max(3, len(layout.panels)),
        subplot_titles=[_text(panel.title) for panel in layout.panels],
    )
    figure.update_annotations(x=0, xanchor="left", font_size=13)
    styles, shift = figures.styles(results.mechanisms), figures.dodge(results.mechanisms)
    found = {(summary.condition, summary.mechanism): summary for summary in summaries(results)}
    for row, panel in enumerate(layout.panels, 1):
        for fact, (name, _, symbol, offset) in PREDICTORS.items():
            figure.add_scatter(
                row=row,
                col=1,
                x=[column + offset for column, condition in panel.conditions if fact in condition.facts],
                y=[condition.facts[fact] for _, condition in panel.conditions if fact in condition.facts],
                mode="markers",
                marker={"symbol": symbol, "size": 16 if fact == "chance" else 8, "color": MUTED},
                hovertemplate=f"{name} %{{y:.3f}}<extra></extra>",
            )
        for mechanism, style in styles.items():
            columns = [(at, found.get((condition.label, mechanism))) for at, condition in panel.conditions]
            present = [(at, summary) for at, summary in columns if summary]
            for trace in _accuracy_traces(results, present, mechanism, style, shift[mechanism]):
                figure.add_trace(trace, row=row, col=1)
    ticks = ["<br>".join(map(_text, lines)) for lines in layout.tasks]
    figure.update_xaxes(
        range=[-0.5, len(ticks) - 0.5], tickvals=list(range(len(ticks))), ticktext=ticks, showgrid=False
    )
    for boundary in range(1, len(ticks)):
        figure.add_vline(boundary - 0.5, line_color=GRID, line_width=1)
    figure.update_xaxes(title_text="task, state space in bits", row=len(layout.panels), col=1)
    figure.update_yaxes(range=_RANGE, title_text="held-out accuracy")
    return figure.update_layout(height=120 + 230 * len(layout.panels), margin_t=_HEADROOM)


def _accuracy_traces(
    results: StudyResults,
    present: Sequence[tuple[int, Summary]],
    mechanism: str,
    style: Style,
    shift: float,
) -> list[go.Scatter]:
    """One mechanism's seeds, and its means with intervals; the seeds stand left of the mean."""
    x, y, texts = [], [], []
    for column, summary in present:
        rows = evidence(results.seeds, summary.condition, mechanism)
        x += [column + shift - 0.06 + offset for offset in figures.spread(rows.height, 0.1)]
        y += rows["accuracy"].to_list()
        texts += [f"{mechanism_name(mechanism)}, seed {seed}" for seed in rows["seed"]]
    return [
        _seed_marks(x, y, texts, style, "%{text}: %{y:.3f}"),
        _means(
            [column + shift + 0.06 for column, _ in present],
            [summary.accuracy for _, summary in present],
            style,
            hover=[
                f"{mechanism_name(mechanism)}: {summary.accuracy:.3f}<br>"
                + describe_interval(summary.accuracy_interval, summary.seeds, ".3f")
                for _, summary in present
            ],
            mode="lines+markers",
            error_y=_arms([(summary.accuracy, summary.accuracy_interval) for _, summary in present], style),
        ),
    ]


def _solved_plot(results: StudyResults) -> go.Figure:
    labels = [condition.label for condition in figures.finished_conditions(results)]
    shift = figures.dodge(results.mechanisms)
    figure = _rows(labels)
    for mechanism, style in figures.styles(results.mechanisms).items():
        found = [summary for summary in summaries(results) if summary.mechanism == mechanism]
        shares = [summary.solved / summary.seeds for summary in found]
        at = [labels.index(summary.condition) + shift[mechanism] for summary in found]
        counts = [f"{summary.solved}/{summary.seeds}" for summary in found]
        figure.add_trace(
            _means(
                shares,
                at,
                style,
                hover=[
                    f"{mechanism_name(mechanism)}: {count} solved<br>"
                    + describe_interval(summary.solved_interval, summary.seeds, ".3f")
                    for count, summary in zip(counts, found, strict=True)
                ],
                error_x=_arms(
                    [(share, summary.solved_interval) for share, summary in zip(shares, found, strict=True)],
                    style,
                ),
            )
        )
        for y, count in zip(at, counts, strict=True):
            figure.add_annotation(x=1, xref="paper", xanchor="left", xshift=6, y=y, text=count, showarrow=False)
    figure.update_xaxes(range=_RANGE, title_text="share of seeds solved")
    return figure.update_layout(margin_r=44)


def _difference_plot(results: StudyResults) -> go.Figure:
    compared = comparisons(results)
    labels = list(dict.fromkeys(comparison.condition for comparison in compared))
    candidates = list(dict.fromkeys(comparison.candidate.mechanism for comparison in compared))
    styles, shift = figures.styles(results.mechanisms), figures.dodge(candidates)
    figure = _rows(labels)
    figure.add_vline(0, line_color=INK, line_width=1)
    for candidate in candidates:
        found = [comparison for comparison in compared if comparison.candidate.mechanism == candidate]
        at = [labels.index(comparison.condition) + shift[candidate] for comparison in found]
        x, y, texts = [], [], []
        for row, comparison in zip(at, found, strict=True):
            x += comparison.differences
            y += [row + 0.24 + offset for offset in figures.spread(len(comparison.differences), 0.14)]
            texts += [f"seed {seed}" for seed in comparison.seeds]
        figure.add_trace(_seed_marks(x, y, texts, styles[candidate], "%{text}: %{x:+.3f}"))
        figure.add_trace(
            _means(
                [comparison.difference for comparison in found],
                at,
                styles[candidate],
                hover=[
                    f"{mechanism_name(candidate)} - DPA: {comparison.difference:+.4f}<br>"
                    + describe_interval(comparison.interval, len(comparison.differences), "+.4f")
                    for comparison in found
                ],
                error_x=_arms(
                    [(comparison.difference, comparison.interval) for comparison in found], styles[candidate]
                ),
            )
        )
    reach = figures.difference_reach(results)
    names = _text(figures.candidate_names(results))
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
    return figure.update_layout(margin_t=_HEADROOM)


def _learning_plot(results: StudyResults, condition: Condition) -> go.Figure:
    figure = _panel(results, "accuracy")
    figure.add_hline(condition.facts["chance"], line_color=MUTED, line_dash="dot", line_width=1)
    for mechanism, style in figures.styles(results.mechanisms).items():
        curves = evidence(results.curves, condition.label, mechanism)
        if curves.is_empty():
            continue
        steps, accuracies = [], []
        for rows in curves.partition_by("seed"):
            rows = rows.sort("step")
            # The gap after each seed lets one trace hold them all.
            steps += [*rows["step"].to_list(), None]
            accuracies += [*rows["accuracy"].fill_nan(None).to_list(), None]
        median = median_curve(curves)
        seeds = {"color": style.color, "dash": style.dash, "width": 0.7}
        figure.add_scatter(x=steps, y=accuracies, mode="lines", line=seeds, opacity=0.5, hoverinfo="skip")
        figure.add_scatter(
            x=median["step"].to_list(),
            y=median["accuracy"].to_list(),
            mode="lines",
            line={"color": style.color, "dash": style.dash, "width": 2.5},
            hovertemplate=f"{_text(mechanism_name(mechanism))}, step %{{x}}: %{{y:.3f}}<extra></extra>",
        )
    return figure


def _steps_plot(results: StudyResults, condition: Condition) -> go.Figure:
    figure = _panel(results, "share of seeds solved")
    for mechanism, style in figures.styles(results.mechanisms).items():
        rows = evidence(results.seeds, condition.label, mechanism)
        if rows.is_empty():
            continue
        at, share = solve_curve(rows["steps_to_solve"].to_list(), int(rows["steps"].to_numpy().max()))
        figure.add_scatter(
            x=at,
            y=share,
            mode="lines",
            line={"color": style.color, "dash": style.dash, "width": 2.5, "shape": "hv"},
            hovertemplate=f"{_text(mechanism_name(mechanism))}, step %{{x}}: %{{y:.3f}}<extra></extra>",
        )
    return figure


def _rows(labels: Sequence[str]) -> go.Figure:
    """A figure with one labelled row per condition, from the top."""
    figure = go.Figure(layout_height=100 + 56 * len(labels))
    figure.update_yaxes(
        range=[len(labels) - 0.5, -0.5],
        tickvals=list(range(len(labels))),
        ticktext=["<br>".join(map(_text, figures.wrap(label, 18))) for label in labels],
        showgrid=False,
        ticks="",
    )
    for boundary in range(1, len(labels)):
        figure.add_hline(boundary - 0.5, line_color=GRID, line_width=1)
    return figure


def _panel(results: StudyResults, ylabel: str) -> go.Figure:
    """A figure of a share against training steps."""
    figure = go.Figure(layout_height=230)
    figure.update_xaxes(title_text="training steps", range=[0, figures.steps_reach(results)])
    return figure.update_yaxes(title_text=ylabel, range=_RANGE, dtick=0.25)


def _means(
    x: Sequence[float], y: Sequence[float], style: Style, hover: list[str], mode: str = "markers", **arms: Any
) -> go.Scatter:
    return go.Scatter(
        x=x,
        y=y,
        mode=mode,
        line={"color": style.color, "dash": style.dash, "width": 1.5},
        marker=_marker(style, 10, 2),
        text=list(map(_text_with_breaks, hover)),
        hovertemplate="%{text}<extra></extra>",
        **arms,
    )


def _seed_marks(x: Sequence[float], y: Sequence[float], texts: list[str], style: Style, template: str) -> go.Scatter:
    return go.Scatter(
        x=x,
        y=y,
        mode="markers",
        opacity=0.6,
        marker=_marker(style, 5, 1),
        text=list(map(_text, texts)),
        hovertemplate=f"{template}<extra></extra>",
    )


def _marker(style: Style, size: int, width: float) -> dict[str, Any]:
    return {
        "symbol": style.symbol,
        "size": size,
        "color": style.fill,
        "line": {"color": style.color, "width": width},
    }


def _arms(centers: Sequence[tuple[float, Interval | None]], style: Style) -> dict[str, Any]:
    """Error bars; those without an interval have no length."""
    return {
        "array": [interval.high - center if interval else 0 for center, interval in centers],
        "arrayminus": [center - interval.low if interval else 0 for center, interval in centers],
        "color": style.color,
        "thickness": 2,
        "width": 0,
    }


def _plot(figure: go.Figure) -> Markup:
    """The plot as part of a page, in the page's style; fingers scroll the page and not the plot."""
    axes = {
        "fixedrange": True,
        "gridcolor": GRID,
        "linecolor": MUTED,
        "showline": True,
        "tickcolor": MUTED,
        "ticks": "outside",
        "title_standoff": 8,
        "zeroline": False,
        "automargin": True,
    }
    figure.for_each_xaxis(lambda axis: axis.update({**axes, **_given(axis)}))
    figure.for_each_yaxis(lambda axis: axis.update({**axes, **_given(axis)}))
    layout: Any = figure.layout
    margin = {"l": 8, "r": 8, "t": 8, "b": 8} | _given(layout.margin)
    figure.update_layout(
        template="none",
        dragmode=False,
        showlegend=False,
        font={"family": _FONT, "size": 12, "color": INK},
        margin=margin,
        hoverlabel={"bgcolor": "#ffffff", "font_color": INK},
    )
    return Markup(
        figure.to_html(
            full_html=False,
            include_plotlyjs=False,
            default_height=f"{layout.height}px",
            config={"displayModeBar": False, "responsive": True},
        )
    )


def _given(part: Any) -> dict[str, Any]:
    return part.to_plotly_json()


def _stills(
    results: StudyResults,
    conditions: Sequence[Condition],
    draw: Callable[[StudyResults, Sequence[Condition]], Figure],
    whole: Path,
) -> list[str]:
    """Images of a figure with one panel per condition, cut so that each fits on a page."""
    if len(conditions) <= _PANELS_PER_STILL:
        return [_data_uri(whole.read_bytes())]
    starts = range(0, len(conditions), _PANELS_PER_STILL)
    return [_data_uri(figures.png(draw(results, conditions[start : start + _PANELS_PER_STILL]))) for start in starts]


def _tuning_rows(results: StudyResults) -> list[tuple[str, list[tuple[str, dict[Setting, TuningSummary]]]]]:
    """Per condition and mechanism, what each setting reached."""
    return [
        (
            label,
            [
                (mechanism, {trial.setting: trial for trial in trials})
                for mechanism, trials in groupby(tried, key=lambda trial: trial.mechanism)
            ],
        )
        for label, tried in groupby(tuning_summaries(results), key=lambda trial: trial.condition)
    ]


def _contexts_seen(results: StudyResults) -> dict[str, float]:
    """Mean over final seeds of the share of test contexts that also occurred in training."""
    final = results.seeds.filter(pl.col("role") == "final", pl.col("contexts_seen").is_not_null())
    return dict(final.group_by("condition").agg(pl.col("contexts_seen").mean()).iter_rows())


def _data_uri(content: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(content).decode()}"


def _text(text: str) -> str:
    """Text that plotly shows as it is, instead of reading it as HTML."""
    return escape(text, quote=False)


def _text_with_breaks(text: str) -> str:
    return "<br>".join(map(_text, text.split("<br>")))


def _interval(interval: Interval | None) -> str:
    return f"[{interval:.3f}]" if interval else "no interval"


def _count(number: int) -> str:
    return f"{number:,}" if number < 10**12 else f"{number:.2e}"


def _steps(summary: Summary) -> str:
    return f"> {summary.steps:,}" if summary.median_steps is None else f"{summary.median_steps:,.0f}"


def _duration(seconds: float) -> str:
    """``"2 h 05 min"``, ``"3 min 12 s"`` or ``"42 s"``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02} min"
    return f"{minutes} min {rest:02} s" if minutes else f"{rest} s"
