"""The numbers in docs/findings.md are those in results/."""

import importlib.util
import json
import re
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from expressive_attention.study.analysis.comparisons import comparisons
from expressive_attention.study.analysis.estimators import clustered_interval
from expressive_attention.study.config.declared import PRIMARY_COMPARISONS
from expressive_attention.study.runs.exported import load_results

ROOT = Path(__file__).parents[1]
spec = importlib.util.spec_from_file_location("findings", ROOT / "docs" / "findings.py")
tables = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tables)
TEXT = (ROOT / "docs" / "findings.md").read_text(encoding="utf-8")


def summary(study):
    return pl.read_parquet(ROOT / "results" / study / "summary.parquet")


def rows_after(heading):
    """Cells of the table rows in a section, but for those of tables that docs/findings.py fills."""
    section = TEXT.split(f"## {heading}\n")[1].split("\n## ")[0]
    section = FILLED.sub("", section)
    lines = [line for line in section.splitlines() if line.startswith("| ")]
    return [[cell.strip().replace("**", "") for cell in line.strip("|").split("|")] for line in lines[1:]]


def by_mechanism(rows):
    return {row["mechanism"]: row for row in rows.iter_rows(named=True)}


@pytest.mark.parametrize("page", tables.PAGES, ids=lambda page: page.stem)
def test_tables_are_those_of_the_results(page):
    text = page.read_text(encoding="utf-8")
    assert tables.filled(text) == text
    # A changed number is noticed.
    assert tables.filled(re.sub(r"(?m)(?<=^\| )(sum|Is) .*", "changed", text)) == text


# Counts of protocol 2, whose results are in the repository's history.
HISTORY = {"7 of 27"}
FILLED = re.compile(r"<!-- \w+: [\w ]+ -->.*?<!-- end -->", re.DOTALL)


def numbers(text):
    """Numbers of some digits, with their signs where they have one: those that come from results."""
    return set(re.findall(r"(?<![\w.])[+-]?(?:0?\.\d+|\d+\.\d+|\d{3,})(?![\w.]*e-)", text))


def unknown(text, evidence):
    """The numbers of a text that its evidence does not have; one with a sign has to have it there, too."""
    with_signs = {(found[0] in "+-" and found[0], abs(float(found))) for found in numbers(evidence)}
    values = {value for _, value in with_signs}
    return {
        found
        for found in numbers(text)
        if ((found[0], abs(float(found))) not in with_signs if found[0] in "+-" else float(found) not in values)
    }


def counts(text):
    """Counts as in ``15/16``, ``4 of 21`` or ``1 seed of 16``."""
    return {f"{a} of {b}" for a, b in re.findall(r"(\d+)(?:/|\s(?:\w+\s)?of\s(?:the\s|its\s)?)(\d+)\b", text)}


def counted(*studies):
    """The counts that follow from the summaries: leads, and choices at the ends of a grid."""
    found = set()
    for study in studies:
        rows = [conditions for _, conditions in tables.by_condition(study)]
        ahead = [each["expressive"]["difference"] > 0 for each in rows if tables.leads(each["expressive"])]
        found |= {f"{ahead.count(by_ea)} of {len(rows)}" for by_ea in (True, False)}
        tried = pl.read_parquet(ROOT / "results" / study / "seeds.parquet").filter(role="tuning")
        for setting in ("learning_rate", "initial_gain"):
            ends = tried[setting].min(), tried[setting].max()
            for mechanism in ("expressive", "dot_product"):
                chosen = [each[mechanism][setting] for each in rows]
                found |= {f"{chosen.count(end)} of {len(rows)}" for end in ends}
    return found


def ceilings(study):
    """Accuracies of the best possible predictor, one for each condition that has one."""
    about = json.loads((ROOT / "results" / study / "about.json").read_text(encoding="utf-8"))
    return " ".join(tables.share(facts["ceiling"]) for facts in about["facts"].values() if facts.get("ceiling"))


@pytest.mark.parametrize(
    ("heading", "studies"),
    [
        ("The ladder", ["ladder"]),
        ("Beyond the ladder", ["frontier"]),
        ("Positions", ["positions"]),
        ("The recipe of text on these tasks", ["text_recipe"]),
        ("Two-sidedness and saturation", ["geometry_ablation"]),
        ("The limit of small scores", ["probes"]),
        ("A search for mixtures on which EA leads", ["multitask_regime"]),
        ("Recipes of training", ["optimization", "optimization_sgd"]),
        ("Size of the model", ["model_size"]),
        ("The same task in several presets", ["text_recipe"]),
        ("One seed, or the best of three", ["ladder"]),
        ("The field's probes", ["probes"]),
        ("Text", ["text"]),
        ("Text: positions and heads", ["text_codes", "text"]),
        ("Text: the parts of EA", ["text_mechanisms"]),
        ("Images", ["vision", "mnist"]),
    ],
)
def test_sentences_have_the_numbers_of_their_tables(heading, studies):
    section = TEXT.split(f"## {heading}\n")[1].split("\n## ")[0]
    in_tables = [line for line in section.splitlines() if line.startswith("|")]
    evidence, sentences = "".join(in_tables), "\n".join(line for line in section.splitlines() if line not in in_tables)
    evidence += str(PRIMARY_COMPARISONS) + "".join((ROOT / "results" / x / "config.toml").read_text() for x in studies)
    evidence += " ".join(ceilings(study) for study in studies)
    assert numbers(sentences)
    assert unknown(sentences, evidence) == set()
    assert counts(sentences) - counts(evidence) - counted(*studies) - HISTORY == set()


def test_the_first_table_has_the_numbers_of_the_others():
    rows = [line for line in TEXT.split("\n## ")[0].splitlines() if line.startswith("| ")]
    of_protocol_3 = [line for line in rows if "(protocol 3)" in line]
    assert len(of_protocol_3) > 6
    evidence = "".join(FILLED.findall(TEXT))
    for line in of_protocol_3:
        told = re.sub(r"; on mixtures .*", "", line)
        assert unknown(told, evidence) == set()
        assert counts(told) - counts(evidence) - counted("ladder", "probes", "optimization") == set()


def test_when_to_use_it_has_the_numbers_of_the_findings():
    """Rows of protocol 3 rest on the tables that are filled from its results, the others on the rest of the page."""
    page = (ROOT / "docs" / "when-to-use.md").read_text(encoding="utf-8")
    evidence = {"3": "".join(FILLED.findall(TEXT)), "2": FILLED.sub("", TEXT)}
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in page.splitlines() if line.startswith("| ")
    ]
    rows = [row for row in rows if row[-1] != "protocol"]  # the heads of the tables
    assert len(rows) > 30
    for *about, told, protocol in rows:
        assert unknown(told, evidence[protocol]) == set(), about
        if protocol == "3":
            assert counts(told) - counts(evidence[protocol]) == set(), about
    questions, models_that_exist, rest = re.split(r"(\*\*A model that exists\?\*\*.*?\n\n)", page, flags=re.DOTALL)
    assert unknown(questions + rest, TEXT) == set()
    integrations = (ROOT / "docs" / "integrations.md").read_text(encoding="utf-8")
    assert "| 78% |" in integrations
    assert "78%" in models_that_exist


def test_the_readme_has_the_numbers_of_the_findings():
    section = (ROOT / "README.md").read_text(encoding="utf-8").split("## When to use it\n")[1].split("\n## ")[0]
    assert len(numbers(section)) > 4
    assert unknown(section, TEXT) == set()


def anchored(anchor):
    """The section of the findings that a link leads to; the whole page, without an anchor."""
    sections = {
        "-".join(re.findall(r"\w+", text.split("\n")[0].lower().replace("'", ""))): text for text in TEXT.split("\n## ")
    }
    return sections[anchor] if anchor else TEXT


@pytest.mark.parametrize("page", sorted((ROOT / "docs").glob("*.md")), ids=lambda page: page.stem)
def test_a_page_that_cites_the_findings_has_their_numbers(page):
    for text in re.split(r"\n\s*\n|\n(?=[-*] |\d+\. |\|)", page.read_text(encoding="utf-8")):
        cited = re.findall(r"findings\.md(?:#([\w-]+))?\)", text)
        if cited and page.name not in ("protocol.md", "when-to-use.md"):  # which have more, and tests of their own
            assert unknown(text, " ".join(anchored(anchor) for anchor in cited)) == set()
        assert all(anchored(anchor) for anchor in cited)


@pytest.mark.parametrize(
    ("heading", "studies"),
    [
        ("Several tasks at once", ["multitask"]),
    ],
)
def test_every_condition_is_told_as_it_was_found(heading, studies):
    found = [summary(study) for study in studies]
    conditions = [(table, name) for table in found for name in table["condition"].unique(maintain_order=True)]
    told = [row for row in rows_after(heading) if row[-1] != "p, Holm"]
    assert len(told) == len(conditions)
    for (*_, ea, dpa, difference, p), (table, condition) in zip(told, conditions, strict=True):
        found = by_mechanism(table.filter(pl.col("condition") == condition))
        best = found["expressive"]
        assert (ea, dpa) == (tables.solved(best), tables.solved(found["dot_product"]))
        ends = f"({tables.signed(best['difference_low'])} to {tables.signed(best['difference_high'])})"
        assert difference == f"{tables.signed(best['difference'])} {ends}"
        assert p == tables.probability(best["p"])


def test_the_results_are_small_enough_for_every_clone():
    assert sum(path.stat().st_size for path in (ROOT / "results").rglob("*") if path.is_file()) <= 6_000_000


def test_the_error_of_the_procedure_is_told_as_it_was_found():
    results = load_results(ROOT / "results" / "calibration")
    compared = comparisons(results)
    differences = np.array([found.differences for found in compared])  # (conditions, seeds)
    text = " ".join((ROOT / "docs" / "protocol.md").read_text(encoding="utf-8").split())
    interval = clustered_interval(differences)
    told = f"their mean over all conditions is {tables.signed(differences.mean())}, with an interval of "
    assert f"{told}{tables.signed(interval.low)} to {tables.signed(interval.high)}." in text
    largest = min(compared, key=lambda found: found.p)
    assert f"({tables.signed(largest.difference)} at basis 18, delay 6; p = {tables.probability(largest.p)}" in text
    assert largest.condition.startswith("sum, basis 18, delay 6")
    more = sum(found.candidate.solved > found.baseline.solved for found in compared)
    fewer = sum(found.candidate.solved < found.baseline.solved for found in compared)
    assert f"more seeds under its second name on {more} conditions, fewer on {fewer})" in text
    together = np.corrcoef(differences)
    basis = [re.search(r"basis (\d+)", found.condition)[1] for found in compared]
    same, other = (
        np.mean([together[i, j] for i in range(60) for j in range(i) if (basis[i] == basis[j]) == alike])
        for alike in (True, False)
    )
    assert f"correlation of {same:.2f} at the same basis and {other:.2f} otherwise".replace("0.", ".") in text


def test_the_choice_that_decides_a_verdict_is_told_as_it_was_found():
    text = (ROOT / "docs" / "protocol.md").read_text(encoding="utf-8")
    told = " ".join(text.split("One choice decides a verdict.")[1].split("A check")[0].split())
    seeds = pl.read_parquet(ROOT / "results" / "frontier" / "seeds.parquet").filter(
        pl.col("condition") == "sum, basis 32, delay 10, rope, qk_norm True", mechanism="dot_product"
    )

    def reached(role, rate):
        found = seeds.filter(role=role, learning_rate=rate)
        return tables.share(found["validation"].mean()), len(found), found["solved"].sum()

    tuned, other = reached("tuning", 2e-2), reached("tuning", 2.5e-3)
    final, fresh = reached("final", 2e-2), reached("confirmation", 2e-2)
    assert (
        "DPA's chosen rate, 2e-2, reaches {} on the {} tuning seeds, of which {} solve the task,".format(*tuned) in told
    )
    assert "{} on the {} final seeds ({} solves) and {} on the {} fresh ones ({} solve).".format(*final, *fresh) in told
    assert f"The rate 2.5e-3 reaches {other[0]} on the tuning seeds, of which {other[2]} solve." in told
