"""The numbers in docs/findings.md are those in results/."""

import importlib.util
import math
import re
from pathlib import Path

import polars as pl
import pytest

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
    section = re.sub(r"<!-- \w+: \w+ -->.*?<!-- end -->", "", section, flags=re.DOTALL)
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


def numbers(text):
    """Numbers of some digits, without their signs: those that come from results."""
    return {float(found) for found in re.findall(r"\d*\.\d+|\d{3,}", text)}


@pytest.mark.parametrize(
    "heading",
    ["The ladder", "Positions", "The recipe of text on these tasks", "The z² limit", "The field's probes", "Images"],
)
def test_sentences_have_the_numbers_of_their_tables(heading):
    section = TEXT.split(f"## {heading}\n")[1].split("\n## ")[0]
    found = re.findall(r"<!-- \w+: \w+ -->.*?<!-- end -->", section, re.DOTALL)
    sentences = re.sub("|".join(map(re.escape, found)), "", section)
    assert numbers(sentences)
    assert numbers(sentences) <= numbers("".join(found))


def test_when_to_use_it_has_the_numbers_of_the_findings():
    """Rows of protocol 3 rest on the tables that are filled from its results, the others on the rest of the page."""
    page = (ROOT / "docs" / "when-to-use.md").read_text(encoding="utf-8")
    filled = re.compile(r"<!-- \w+: \w+ -->.*?<!-- end -->", re.DOTALL)
    evidence = {"3": "".join(filled.findall(TEXT)), "2": filled.sub("", TEXT)}
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in page.splitlines() if line.startswith("| ")
    ]
    assert len(rows) > 10
    for model, _, told, protocol in rows[1:]:
        if numbers(told):
            assert numbers(told) <= numbers(evidence[protocol]), model
    questions, models_that_exist, rest = re.split(r"(\*\*A model that exists\?\*\*.*?\n\n)", page, flags=re.DOTALL)
    assert numbers(questions + rest) <= numbers(TEXT)
    integrations = (ROOT / "docs" / "integrations.md").read_text(encoding="utf-8")
    assert "| 78% |" in integrations
    assert "78%" in models_that_exist


def test_the_readme_has_the_numbers_of_the_findings():
    section = (ROOT / "README.md").read_text(encoding="utf-8").split("## When to use it\n")[1].split("\n## ")[0]
    assert len(numbers(section)) > 4
    assert numbers(section) <= numbers(TEXT)


@pytest.mark.parametrize(
    ("heading", "studies"),
    [
        ("Beyond the ladder", ["frontier"]),
        ("Several tasks at once", ["multitask"]),
        ("A search for mixtures on which EA leads", ["multitask_regime"]),
        ("Recipes of training", ["optimization"]),
        ("Size of the model", ["model_size"]),
        ("Text", ["language"]),
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


def test_bits_per_byte_are_told_as_they_were_found():
    seeds = pl.read_parquet(ROOT / "results" / "language" / "seeds.parquet").filter(pl.col("role") == "final")
    for position, told in (("rope", "2.37 bits against 2.27"), ("learned", "3.06 against 2.41")):
        bits = [
            seeds.filter(pl.col("condition").str.ends_with(position), pl.col("mechanism") == mechanism)["cross_entropy"]
            for mechanism in ("expressive", "dot_product")
        ]
        ea, dpa = (each.mean() / math.log(2) for each in bits)
        assert told.replace("bits ", "") == f"{ea:.2f} against {dpa:.2f}"
        assert told in TEXT


def test_weight_functions_are_told_as_they_were_found():
    order = ["expressive", "squared", "softmax_abs", "dot_product", "sigmoid", "relu_squared", "one_sided"]
    table = summary("geometry_ablation")
    told = rows_after("What makes the difference")
    assert len(told) == len(order)
    for mechanism, (_, _, _, *cells) in zip(order, told, strict=True):
        for shift, cell in zip(("0.0", "1.0"), cells, strict=True):
            found = table.filter(
                pl.col("mechanism") == mechanism, pl.col("condition").str.ends_with(f"embedding_shift {shift}")
            )
            assert cell == ", ".join(re.sub("^0", "", f"{accuracy:.3f}") for accuracy in found["accuracy"])
