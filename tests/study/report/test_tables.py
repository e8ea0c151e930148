"""Tables of a report."""

import math
from dataclasses import replace

import pytest

from expressive_attention.study.analysis.comparisons import comparisons
from expressive_attention.study.config.load import parse_config
from expressive_attention.study.report.page import write_report
from expressive_attention.study.report.tables import cross_entropy_table, numbered_tables
from tests.study.report_data import MECHANISMS, make_condition, results_of, seed_row
from tests.study.tiny import tiny


@pytest.mark.parametrize("mechanisms", [MECHANISMS, (*MECHANISMS, "squared")])
def test_models_of_fixed_data_are_compared_by_bits(mechanisms):
    """The report on text told accuracies alone, unless in sentences, and with few seeds not even there."""
    fixed, other = (make_condition(16, 5, position) for position in ("rope", "learned"))
    fixed = replace(fixed, facts=fixed.facts | {"fixed_data": True})
    rows = [
        seed_row(
            condition.label, name, seed, 0.5, cross_entropy=math.log(2) * (2 + number / 4 + seed / 4 * (number == 0))
        )
        for condition in (fixed, other)
        for number, name in enumerate(mechanisms)
        for seed in range(8)
    ]
    results = results_of(rows, [fixed, other], mechanisms)
    table = cross_entropy_table(results)
    first, *others = [[cell.text for cell in row] for row in table.rows]
    assert first == [fixed.label, *(["EA"] if len(mechanisms) == 3 else []), "2.875", "2.250", "+0.625", "8"]
    nats = comparisons(results)[0].cross_entropy_interval
    assert table.rows[0][-2].small == f"[{nats.low / math.log(2):+.3f} to {nats.high / math.log(2):+.3f}]"
    assert others == ([[fixed.label, "z²", "2.500", "2.250", "+0.250", "8"]] if len(mechanisms) == 3 else [])
    assert cross_entropy_table(results_of(rows, [other], mechanisms)) is None
    lost = [row | {"cross_entropy": math.nan} if row["seed"] == 3 else row for row in rows]
    (lone, *_) = cross_entropy_table(results_of(lost, [fixed], mechanisms)).rows
    assert [cell.text for cell in lone[-4:-1]] == ["\N{EN DASH}"] * 3


def test_the_page_has_bits_where_data_are_fixed(tmp_path):
    condition = make_condition(16, 5, "rope")
    rows = [seed_row(condition.label, name, seed, 0.5) for name in MECHANISMS for seed in range(2)]
    pages = []
    for is_fixed in (True, False):
        made = replace(condition, facts=condition.facts | {"fixed_data": is_fixed})
        pages.append(write_report(results_of(rows, [made]), tmp_path / str(is_fixed)).read_text())
    assert ["Bits per prediction" in page for page in pages] == [True, False]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (tiny(task="{ basis = 16, delay = 5 }"), "16"),
        (tiny(task="{ basis = 16, delay = 5 }", test_sequences="3000"), "3,000"),
        (tiny(task='{ kind = "language", context = 8 }'), "16"),
        (tiny(task='{ kind = "digits" }', test_sequences="3000"), "540"),  # all that there are
    ],
)
def test_the_number_of_test_sequences_is_that_of_the_configuration(text, shown):
    """It was 2,048 for all tasks."""
    worth = numbered_tables(results_of([], parse_config(text, "tiny").conditions()))["worth"]
    place = [column.heading for column in worth.columns].index("Test\nsequences")
    assert [row[place].text for row in worth.rows] == [shown]
