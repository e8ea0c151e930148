"""The page of a report: one file, which needs no network."""

from __future__ import annotations

from pathlib import Path

import jinja2

from ...geometry.plotly import plotly_script
from ..analysis.claims import verdicts
from ..analysis.comparisons import MINIMUM_CONTEXTS, MINIMUM_PREDICTIONS
from ..analysis.estimators import LEVEL, MINIMUM_FOR_INTERVAL, SIGNIFICANCE, SMALLEST_EFFECT
from ..analysis.findings import findings_by_condition, overview
from ..files import write_atomically
from ..runs.results import StudyResults
from ..runs.store import Store
from .attention import attention_maps
from .charts import charts_of
from .drawing.layout import MOST_CONDITIONS, most_different
from .drawing.theme import DARK, MUTED, PREDICTORS, css_color
from .figure import Material
from .files import archive_link, drawings_of, save_figures
from .tables import cross_entropy_table, duration, findings_table, numbered_tables, opening_table

__all__ = ["write_report"]


_MOST_MAPPED = 3  # conditions whose models' attention is shown


def write_report(results: StudyResults, directory: Path | str, *, trust: bool = False) -> Path:
    """Writes ``report.html``, ``figures/*.png`` and ``figures/*.csv``, each file at once or not at all.

    Where `directory` also holds the study's cells, the report shows attention maps of their models.

    Args:
        results: The study, finished or not.
        directory: Folder to write to; it is made if it does not exist.
        trust: Run the study's Python files, without which the models of its own tasks and mechanisms have no maps.

    Returns:
        The path of the page.

    Raises:
        ValueError: If a measure of a final or tuning seed is not a finite number.
        CorruptCellError: If stored parameters are not what was written.
    """
    directory = Path(directory)
    maps = attention_maps(results, Store(directory), most_different(results, _MOST_MAPPED), trust=trust)
    material = Material(results, maps)
    drawings = drawings_of(material)
    charts = charts_of(drawings, save_figures(drawings, material, directory / "figures"))
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("expressive_attention.study.report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"duration": duration, "both_themes": css_color}
    page = environment.get_template("report.html.j2").render(
        results=results,
        names=material.names,
        opening=opening_table(results) if charts else None,
        verdicts=verdicts(results, results.claims),
        overview=overview(results),
        findings=findings_by_condition(results),
        compared=findings_table(results) if material.compared else None,
        cross_entropies=cross_entropy_table(results),
        charts=charts,
        chart_numbers={chart.name: number for number, chart in enumerate(charts, 1)},
        predictor_names={fact: name for fact, (name, _, _, _) in PREDICTORS.items()},
        tables=numbered_tables(results),
        archive=archive_link(drawings, material, directory),
        most_conditions=MOST_CONDITIONS,
        level=f"{LEVEL:.0%}",
        significance=f"{SIGNIFICANCE:g}",
        smallest=SMALLEST_EFFECT,
        predictions=MINIMUM_PREDICTIONS,
        contexts=MINIMUM_CONTEXTS,
        minimum=MINIMUM_FOR_INTERVAL,
        plotly=plotly_script(),
        muted=MUTED,
        dark=DARK,
        geometry=(directory / "geometry" / "geometry.html").exists(),
    )
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "report.html"
    write_atomically(path, page.encode())
    return path
