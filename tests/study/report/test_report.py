import base64
import io
import json
import re
import shutil
import zipfile
from dataclasses import replace
from html import unescape
from html.parser import HTMLParser

import polars as pl
import pytest

from expressive_attention.nn import MECHANISMS
from expressive_attention.study.analysis.claims import verdicts
from expressive_attention.study.analysis.comparisons import comparisons
from expressive_attention.study.analysis.findings import findings
from expressive_attention.study.analysis.wording import mechanism_name
from expressive_attention.study.report.drawing.theme import DARK, styles
from expressive_attention.study.report.export import summary_table
from expressive_attention.study.report.page import write_report

from ...axe import problems
from ..report_data import LADDER, make_condition, make_results, mixed_results, results_of, seed_row, trained

MANY = tuple(
    (basis, delay, position)
    for position in ("rope", "learned", "alibi", "relative", "none")
    for basis in range(2, 12)
    for delay in range(2, 12)
)


class Page(HTMLParser):
    """Text, tables and attributes of a page."""

    def __init__(self, html):
        super().__init__()
        self.text, self.attributes, self.tables = "", [], []
        self._skip = self._in_cell = False
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.attributes += [(tag, name, value) for name, value in attrs]
        self._skip = tag in ("script", "style")
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append([])
        if tag in ("td", "th"):
            self.tables[-1][-1].append("")
            self._in_cell = True

    def handle_endtag(self, tag):
        self._skip = False
        if tag in ("td", "th"):
            self._in_cell = False

    def handle_data(self, data):
        if self._skip:
            return
        self.text += data
        if self._in_cell:
            self.tables[-1][-1][-1] += data.strip()

    def values(self, tag, name):
        return [value for t, n, value in self.attributes if (t, n) == (tag, name)]


def words(text):
    return " ".join(text.split())


def write(results, directory):
    path = write_report(results, directory)
    assert path == directory / "report.html"
    return Page(path.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """The whole of a small study, and where its report is."""
    results, directory = make_results(), tmp_path_factory.mktemp("quick")
    return results, write_report(results, directory)


def read(path):
    return Page(path.read_text(encoding="utf-8"))


def test_report_tells_every_finding(quick):
    results, path = quick
    page = read(path)
    for sentence in findings(results):
        assert sentence in words(page.text)


def test_report_holds_table_config_and_machine(quick):
    results, path = quick
    page = read(path)
    _, compared, numbers, worth, tuning, machine = page.tables
    assert len(compared) == 1 + 3
    assert len(numbers) == 1 + 6
    summary = results.seeds.filter(role="final", condition="sum, basis 16, delay 5, rope", mechanism="expressive")
    row = next(row for row in numbers if row[0] == "sum, basis 16, delay 5, rope")
    assert row[1:4] == ["EA", "0.02", "8"]
    assert row[4] == f"{summary['solved'].sum()}/8[0.676 to 1.000]"
    assert row[5].startswith(f"{sum(summary['accuracy']) / 8:.3f}[")
    assert worth[2][:3] == ["sum, basis 16, delay 5, rope", "1,048,576", "20.0"]
    assert worth[2][-1] == "3.1%"
    assert [len(row) for row in tuning] == [5] * 7
    assert sum(cell.endswith(", chosen") for row in tuning for cell in row) == 6
    assert ["torch", "2.13.0+cpu"] in machine
    assert ["training time", "2 min 14 s"] in machine
    assert results.config in page.text


def test_steps_to_solve_shows_censoring(tmp_path):
    condition = make_condition(16, 5, "rope")
    rows = [
        *(seed_row(condition.label, "expressive", seed, 1.0) for seed in range(2)),
        *(seed_row(condition.label, "dot_product", seed, 0.5, diverged_at=100) for seed in range(2)),
    ]
    numbers = write(results_of(rows, [condition]), tmp_path).tables[2]
    assert [row[-2:] for row in numbers[1:]] == [["1,000", "0"], ["> 2,000", "2"]]


def test_page_needs_nothing_from_elsewhere(quick):
    _, path = quick
    page = read(path)
    assert page.values("script", "src") == []
    assert all(value.startswith("data:") for value in page.values("img", "src") + page.values("link", "href"))
    html = path.read_text(encoding="utf-8")
    assert html.count('id="plotly"') == 1
    assert not re.search(r"@import|url\((?!data:)", html.split("<style>")[1].split("</style>")[0])


def test_pictures_have_words(quick):
    _, path = quick
    page = read(path)
    assert len(page.values("img", "alt")) == len(page.values("img", "src")) == 8
    assert all(len(alt) > 30 for alt in page.values("img", "alt"))
    # 6 single plots and one for each of 3 conditions in 2 figures, each labelled
    assert page.values("div", "role").count("img") == 12


def test_every_figure_states_n_and_the_kind_of_its_interval(quick):
    _, path = quick
    html = path.read_text(encoding="utf-8")
    notes = [words(unescape(note)) for note in re.findall(r"<figcaption.*?>(.*?)</figcaption>", html, re.S)]
    assert len(notes) == 8
    assert all("n = 8" in note for note in notes)
    kinds = ["95% bootstrap", "Holm", "95% Wilson", "95% bootstrap", "95% bootstrap", "95% Wilson"]
    kinds += ["median over seeds", "no interval"]
    for note, kind in zip(notes, kinds, strict=True):
        assert kind in note


def test_labels_cannot_break_the_page(tmp_path):
    label = "</script><script>alert(1)</script> <b>& {{ 7 * 7 }}"
    plain = make_condition(16, 5, "rope")
    rows = [seed_row(label, mechanism, 0, 0.5) for mechanism in ("expressive", "dot_product")]
    hostile = results_of(rows, [replace(plain, label=label)], config="</code><script>alert(2)</script>")
    page = write(hostile, tmp_path)
    assert label in page.text
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<script>alert" not in html


def test_unfinished_cells_are_listed_under_a_banner(tmp_path):
    cells = ["sum, basis 16, delay 5, rope: EA, learning rate 0.01, final", "another"]
    page = write(make_results(unfinished=cells), tmp_path)
    assert "This study is unfinished: 2 cells have no result yet" in words(page.text)
    assert all(cell in page.text for cell in cells)


def test_finished_study_has_no_banner(quick):
    _, path = quick
    assert "unfinished" not in read(path).text.lower()


def test_report_of_nothing(tmp_path):
    conditions = [make_condition(2, 5, "rope")]
    page = write(results_of([], conditions, unfinished=["all of it"]), tmp_path)
    assert "No final seed has finished yet: there is nothing to report." in words(page.text)
    assert [row[0] for row in page.tables[0][1:]] == ["sum, basis 2, delay 5, rope"]
    assert page.tables[0][0][-1] == "Testsequences"  # no column of contexts seen: nobody has seen any
    assert page.values("img", "src") == []
    assert list(tmp_path.rglob("*.png")) == []


@pytest.mark.parametrize(
    ("results", "plots"),
    [
        (make_results(mechanisms=["expressive"]), 10),
        (make_results(mechanisms=["dot_product"], seeds=1), 10),
        (make_results(mechanisms=["expressive", "dot_product", "squared"], seeds=6), 12),
        (make_results(seeds=1), 12),
    ],
    ids=["EA alone", "one seed of DPA", "three mechanisms", "one seed"],
)
def test_report_of_less(results, plots, tmp_path):
    page = write(results, tmp_path)
    assert page.values("div", "class").count("plotly-graph-div") == plots
    assert not re.search(r"\bnan\b", page.text)


def test_report_without_tuning(tmp_path):
    whole = make_results()
    page = write(replace(whole, seeds=whole.seeds.filter(pl.col("role") == "final")), tmp_path)
    assert "No setting was tuned" in page.text
    assert "chosen for each mechanism" not in page.text


@pytest.mark.pictures
def test_a_study_of_many_conditions_shows_those_that_differ_most(tmp_path):
    results = make_results(LADDER, seeds=6)
    html = write_report(results, tmp_path).read_text(encoding="utf-8")
    gaps = sorted((-abs(found.difference), found.condition) for found in comparisons(results))
    learning = html.split('<figure id="learning_curves">')[1].split("</figure>")[0]
    shown, folded = learning.split("<details")
    assert set(re.findall(r'<p class="panel">(.*?)</p>', shown)) == {label for _, label in gaps[:12]}
    assert set(re.findall(r'<p class="panel">(.*?)</p>', folded)) == {label for _, label in gaps[12:]}


def test_report_opens_with_a_row_for_each_claim(tmp_path):
    claims = ["at_least_as_good", "lead_grows", "exclusive_range"]
    results = make_results(LADDER, seeds=8, claims=claims)
    page = write(results, tmp_path)
    found = verdicts(results, claims)
    marks = {"supported": "\N{CHECK MARK}", "contradicted": "\N{BALLOT X}", "undecided": "?"}
    rows = page.tables[1][1:]
    for verdict, row, why in zip(found, rows[::2], rows[1::2], strict=True):
        assert row[0] == verdict.question
        assert row[1] == f"{marks[verdict.answer]} {verdict.answer}"
        assert row[2:4] == [verdict.effect, verdict.n]
        assert verdict.where in why[0]
        assert verdict.test in why[0]
    links = [link for link in page.values("a", "href") if link.startswith("#")]
    figures = page.values("figure", "id")
    assert all(f"#{verdict.evidence}" in links for verdict in found)
    assert all(link[1:] in figures + page.values("section", "id") for link in links)


def test_mixed_tasks_show_accuracy_by_rule(tmp_path):
    html = write_report(mixed_results(), tmp_path).read_text(encoding="utf-8")
    splits = html.split('<figure id="splits">')[1].split("</figure>")[0]
    shown, folded = splits.split("<details")
    assert re.findall(r"<h4.*?>(.*?)</h4>", shown) == ["mixed"]
    assert re.findall(r'<p class="panel">(.*?)</p>', shown) == ["By position", "By rule"]
    assert re.findall(r'<p class="panel">(.*?)</p>', folded) == ["plain"]


def test_settings_are_pairs_of_rate_and_gain(tmp_path):
    condition = make_condition(16, 5, "rope")
    rows = [
        seed_row(condition.label, "expressive", seed, 0.5 + gain / 10 + rate, learning_rate=rate, initial_gain=gain)
        | {"role": role}
        for rate, gain, role, seed in [
            *((rate, gain, "tuning", 100) for rate in (0.01, 0.02) for gain in (0.5, 1.0)),
            (0.02, 1.0, "final", 0),
        ]
    ]
    tables = write(results_of(rows, [condition], ["expressive"]), tmp_path).tables
    numbers, tuning = tables[1], tables[3]
    assert numbers[0][2] == "Learningrate, gain"
    assert numbers[1][2] == "0.02gain 1"
    assert tuning[0][2:] == [f"Rate{rate},gain{gain}" for rate in ("0.01", "0.02") for gain in ("0.5", "1")]
    assert tuning[1][2:] == ["0.5600/1", "0.6100/1", "0.5700/1", "0.6200/1, chosen"]


def test_report_of_a_folder_with_cells_shows_where_models_look(tmp_path):
    results = trained(tmp_path)
    html = write_report(results, tmp_path).read_text(encoding="utf-8")
    assert '<figure id="attention_maps">' in html
    weights = pl.read_csv(tmp_path / "figures" / "attention_maps.csv")
    assert weights["rank"].unique().sort().to_list() == ["best", "worst"]
    shutil.rmtree(tmp_path / "cells")
    assert '<figure id="attention_maps">' not in write_report(results, tmp_path).read_text(encoding="utf-8")


@pytest.mark.pictures
def test_report_is_the_same_each_time(quick, tmp_path):
    _, path = quick
    assert path.read_text() == write_report(make_results(), tmp_path).read_text()


def test_no_partial_files_remain(quick):
    _, path = quick
    names = {file.relative_to(path.parent).as_posix() for file in path.parent.rglob("*") if file.is_file()}
    figures = (
        "at_a_glance",
        "margin_map",
        "solved_map",
        "accuracy",
        "difference",
        "solved",
        "learning_curves",
        "steps_to_solve",
    )
    assert names == {"report.html", *(f"figures/{name}.{kind}" for name in figures for kind in ("png", "csv"))}


def draw_all(browser):
    """Brings every plot that is not folded away into sight."""
    browser.execute_async_script(
        "const done = arguments[0], plots = document.querySelectorAll('.plotly-graph-div');"
        "const frame = () => new Promise(requestAnimationFrame);"
        "(async () => { for (const plot of plots) {"
        "  if (!plot.checkVisibility()) continue;"
        "  plot.scrollIntoView(); while (plot.ariaBusy !== 'false') await frame();"
        "} done(); })()"
    )


def visit(browser, path, width):
    """Opens the page at a width and returns what the console says and the addresses asked for."""
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500},
    )
    browser.get("about:blank")
    for log in ("browser", "performance"):
        browser.get_log(log)  # what came before
    browser.get(path.as_uri())
    draw_all(browser)
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    requests = [event["params"] for event in events if event["method"] == "Network.requestWillBeSent"]
    return browser.get_log("browser"), [request["request"]["url"] for request in requests]


@pytest.mark.browser
@pytest.mark.parametrize("width", [1200, 390])
def test_page_in_a_browser(browser, width, quick):
    _, path = quick
    console, addresses = visit(browser, path, width)
    assert console == []
    assert path.as_uri() in addresses
    assert [url for url in addresses if not url.startswith("data:")] == [path.as_uri()]

    plots = browser.execute_script(
        "return [...document.querySelectorAll('.plotly-graph-div')].map(plot => ["
        "plot.querySelectorAll('.trace path, .hm image').length, plot.querySelector('.main-svg').clientWidth,"
        "plot.clientWidth])"
    )
    assert len(plots) == 12
    for paths, drawn_width, room in plots:
        assert paths >= 1
        assert 200 < drawn_width == room

    # wide tables scroll in their own box, never the page
    assert browser.execute_script("return document.documentElement.scrollWidth <= innerWidth")
    assert browser.execute_script(
        "return [...document.querySelectorAll('.still')].every(image => image.offsetParent === null)"
    )


@pytest.mark.browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_everyone_can_use_the_page(browser, quick, width, scheme):
    feature = {"name": "prefers-color-scheme", "value": scheme}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
    visit(browser, quick[1], width)
    found = problems(browser)
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
    assert found == []


@pytest.mark.browser
def test_marks_stand_where_the_numbers_say(browser, tmp_path):
    condition = make_condition(16, 5, "rope")
    rows = [
        seed_row(condition.label, mechanism, seed, value)
        for mechanism, values in {"expressive": (1.0, 1.0), "dot_product": (1.0, 0.5)}.items()
        for seed, value in enumerate(values)
    ]
    visit(browser, write_report(results_of(rows, [condition]), tmp_path), 1200)
    shares = browser.execute_script(
        "const plot = document.querySelector('#solved .plotly-graph-div'), axis = plot._fullLayout.xaxis;"
        "const frame = plot.getBoundingClientRect().left + plot._fullLayout._size.l;"
        "return [...plot.querySelectorAll('.points path')].map(mark => {"
        "const box = mark.getBoundingClientRect();"
        "return axis.p2l((box.left + box.right) / 2 - frame) })"
    )
    assert shares == pytest.approx([1.0, 0.5], abs=0.01)


@pytest.mark.browser
def test_labels_are_shown_as_they_are(browser, tmp_path):
    label = "<i>a</i>&amp;</script>"
    condition = replace(make_condition(16, 5, "rope"), label=label)
    rows = [seed_row(label, mechanism, 0, 0.5) for mechanism in ("expressive", "dot_product")]
    console, _ = visit(browser, write_report(results_of(rows, [condition]), tmp_path), 1200)
    assert console == []
    ticks = browser.execute_script(
        "return [...document.querySelectorAll('#solved .ytick text')].map(tick => tick.textContent)"
    )
    assert ticks == [label]


@pytest.mark.browser
def test_folded_plots_are_drawn_when_unfolded(browser, tmp_path):
    path = write_report(make_results(LADDER[:14], seeds=1), tmp_path)
    visit(browser, path, 1200)
    drawn = "return document.querySelector('#learning_curves details .main-svg') !== null"
    assert not browser.execute_script(drawn)
    browser.execute_script("document.querySelector('#learning_curves details').open = true")
    draw_all(browser)
    assert browser.execute_script(drawn)


@pytest.mark.browser
def test_a_large_page_draws_what_is_in_sight(browser, tmp_path):
    path = write_report(make_results(MANY, seeds=2, mechanisms=["expressive", "dot_product"]), tmp_path)
    assert path.stat().st_size < 10e6
    assert 'href="tables.zip"' in path.read_text(encoding="utf-8")
    assert zipfile.is_zipfile(tmp_path / "tables.zip")
    browser.get(path.as_uri())
    begun, in_sight, plots = browser.execute_async_script(
        "const done = arguments[0], plots = [...document.querySelectorAll('.plotly-graph-div')];"
        "const near = plot => { const box = plot.getBoundingClientRect();"
        "  return plot.checkVisibility() && box.top < innerHeight + 400 && box.bottom > -400; };"
        "const frame = () => new Promise(requestAnimationFrame);"
        "(async () => { while (!plots.filter(near).every(plot => plot.ariaBusy === 'false')) await frame();"
        "done([plots.filter(plot => plot.querySelector('.main-svg')).length, plots.filter(near).length, plots.length])"
        "})()"
    )
    assert 1 <= begun == in_sight < plots


@pytest.fixture
def emulate(browser):
    """Sets the medium and the color scheme that the browser says it has, for one test."""

    def emulated(medium="", scheme=""):
        features = [{"name": "prefers-color-scheme", "value": scheme}] if scheme else []
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": medium, "features": features})

    yield emulated
    emulated()


@pytest.mark.browser
def test_the_page_follows_the_theme_and_its_switch(browser, emulate, quick):
    _, path = quick
    looks = {}
    for scheme in ("light", "dark"):
        emulate(scheme=scheme)
        visit(browser, path, 1200)
        for _ in range(2):
            look = browser.execute_async_script(
                "const done = arguments[0], plot = document.querySelector('#at_a_glance .plotly-graph-div');"
                "const dark = document.getElementById('theme').textContent === 'Light';"
                "const ink = dark ? DARK['#222222'] : '#222222';"
                "const frame = () => new Promise(requestAnimationFrame);"
                "(async () => { while (plot.layout.font.color !== ink) await frame();"
                "done([dark, getComputedStyle(document.body).backgroundColor, plot.layout.font.color]) })()"
            )
            looks.setdefault(look[0], []).append(look[1:])
            browser.execute_script("document.getElementById('theme').click()")
    assert looks == {
        False: [["rgb(255, 255, 255)", "#222222"]] * 2,
        True: [["rgb(23, 25, 28)", "#e8e8e6"]] * 2,
    }


@pytest.mark.browser
def test_text_on_bright_cells_is_black_in_the_dark(browser, emulate, quick):
    emulate(scheme="dark")
    visit(browser, quick[1], 1200)
    fills = browser.execute_script(
        "return [...document.querySelectorAll('.heatmap-label text')].map(text => getComputedStyle(text).fill)"
    )
    assert set(fills) == {"rgb(255, 255, 255)", "rgb(17, 17, 17)"}


def test_what_lies_behind_text_is_dark_on_a_dark_page(quick):
    _, path = quick
    backgrounds = set(re.findall(r'"bgcolor":"(.*?)"', path.read_text(encoding="utf-8")))
    assert len(backgrounds) == 2  # of labels at the pointer, and of texts on lines
    assert all(color in DARK for color in backgrounds)


@pytest.mark.browser
def test_tables_are_sorted_by_their_numbers(browser, tmp_path):
    conditions = [make_condition(basis, 5, "rope") for basis in (4, 16, 8)]
    accuracies = {4: 0.5, 16: 1.0, 8: 0.996}
    rows = [
        seed_row(condition.label, mechanism, 0, accuracies[condition.task["basis"]])
        for condition in conditions
        for mechanism in ("expressive", "dot_product")
    ]
    visit(browser, write_report(results_of(rows, conditions), tmp_path), 1200)

    def sorted_by(column):
        return browser.execute_script(
            "const table = document.querySelector('.opening table');"
            "table.tHead.rows[0].cells[arguments[0]].querySelector('button').click();"
            "return [table.tHead.rows[0].cells[arguments[0]].ariaSort,"
            "...[...table.tBodies[0].rows].map(row => Number(row.cells[0].textContent.match(/basis (\\d+)/)[1]))]",
            column,
        )

    assert sorted_by(2) == ["ascending", 4, 8, 16]  # 50%, >99%, 100%
    assert sorted_by(2) == ["descending", 16, 8, 4]
    assert sorted_by(0) == ["ascending", 4, 8, 16]  # by the numbers in a label, not their digits


@pytest.mark.browser
def test_the_contents_stay_in_sight(browser, quick):
    _, path = quick
    visit(browser, path, 390)
    tops = browser.execute_script(
        "location.hash = '#setup'; const top = s => document.querySelector(s).getBoundingClientRect().top;"
        "return [top('nav'), top('#setup'), document.querySelector('nav').offsetHeight]"
    )
    assert tops[0] == 0
    assert tops[1] >= tops[2]  # the bar does not cover what it leads to


@pytest.mark.browser
@pytest.mark.parametrize("width", [390, 1200])
def test_no_table_is_cut(browser, width, tmp_path):
    visit(browser, write_report(make_results(LADDER[:6], seeds=6, mechanisms=MECHANISMS[:4]), tmp_path), width)
    cut = browser.execute_script(
        "return [...document.querySelectorAll('.table .scroll')].filter(e => e.scrollWidth > e.clientWidth)"
        ".map(e => e.ariaLabel)"
    )
    assert cut == []


@pytest.mark.browser
def test_the_archive_is_a_link_that_the_browser_takes(browser, quick):
    _, path = quick
    visit(browser, path, 1200)
    assert browser.execute_script("return document.querySelector('a[download]').download") == "quick.zip"


def test_the_archive_holds_every_table(quick):
    results, path = quick
    (link,) = [href for href in read(path).values("a", "href") if href.startswith("data:application/zip;base64,")]
    with zipfile.ZipFile(io.BytesIO(base64.b64decode(link.partition(",")[2]))) as archive:
        for file in (path.parent / "figures").glob("*.csv"):
            assert archive.read(f"figures/{file.name}") == file.read_bytes()
        for name in ("seeds", "curves", "splits"):
            assert archive.read(f"{name}.csv").decode() == getattr(results, name).write_csv()
        assert archive.read("summary.csv").decode() == summary_table(results).write_csv()


def test_a_report_of_a_quick_study_is_light(quick):
    _, path = quick
    assert path.stat().st_size < 2e6


def test_the_page_opens_with_a_table_for_everyone(tmp_path):
    conditions = [make_condition(basis, 5, "rope") for basis in (4, 16, 8)]
    accuracies = {4: (1.0, 0.5), 16: (0.0625, 0.0625), 8: (0.997, 0.99)}
    rows = [
        seed_row(condition.label, mechanism, seed, accuracies[condition.task["basis"]][place])
        for condition in conditions
        for place, mechanism in enumerate(("expressive", "dot_product"))
        for seed in range(8)
    ]
    results = results_of(rows, conditions)
    verdicts = {found.condition: found.verdict for found in comparisons(results)}
    heading, *body = write(results, tmp_path).tables[0]
    assert heading == ["Task", "Rule", "EA", "DPA", "Who is ahead"]
    unbroken = "t\N{NO-BREAK SPACE}\N{MINUS SIGN}\N{NO-BREAK SPACE}"
    assert body[0][1] == f"x(t) = x({unbroken}1) + x({unbroken}5), mod 4"
    assert [row[2:4] for row in body] == [["100%", "50%"], ["6%", "6%"], [">99%", "99%"]]
    assert [row[4] for row in body] == [verdicts[condition.label] for condition in conditions]
    assert [row[4] for row in body][:2] == ["EA ahead", "neither learned"]


def test_several_mechanisms_have_their_verdicts_below_their_accuracies(tmp_path):
    """In one column of all verdicts, twelve mechanisms made rows of a page's height."""
    accuracies = {"expressive": 1.0, "dot_product": 0.5, "squared": 0.25, "quartic": 0.5}
    condition = make_condition(4, 5, "rope")
    rows = [seed_row(condition.label, name, seed, value) for name, value in accuracies.items() for seed in range(8)]
    page = write(results_of(rows, [condition], mechanisms=list(accuracies)), tmp_path)
    heading, row = page.tables[0]
    assert heading == ["Task", "Rule", "EA", "DPA", "z²", "z⁴/(1 + z⁴)"]
    assert row[2:] == ["100%ahead", "50%", "25%behind", "50%"]
    assert "1 condition, EA, DPA, z² and z⁴/(1 + z⁴)" in page.text
    assert "the others better" in page.text
    assert "Each mechanism in sentences" in page.text


def test_findings_are_a_table_of_three_decimals(quick):
    results, path = quick
    heading, *body = read(path).tables[1]
    assert heading == ["Condition", "Verdict", "EA", "DPA", "Difference", "p", "Pairs"]
    for row, found in zip(body, comparisons(results), strict=True):
        assert row[:2] == [found.condition, found.verdict]
        assert row[2] == f"{found.candidate.accuracy:.3f}{found.candidate.solved}/8 solved"
        assert row[4].startswith(f"{found.difference:+.3f}[" if found.interval else f"{found.difference:+.3f}no")
        assert row[6] == "8"


@pytest.mark.browser
def test_what_is_folded_is_printed(browser, tmp_path):
    path = write_report(make_results(), tmp_path)
    visit(browser, path, 1200)
    shown = "return document.querySelector('.findings li').checkVisibility()"
    assert not browser.execute_script(shown)
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    try:
        assert browser.execute_script(shown)
    finally:
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})


@pytest.mark.browser
def test_paper_shows_images_instead_of_plots(browser, quick):
    _, path = quick
    visit(browser, path, 1200)
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    try:
        shown = browser.execute_script(
            "const shown = s => [...document.querySelectorAll(s)].filter(e => e.offsetParent !== null).length;"
            "return [shown('.still'), shown('.plotly-graph-div')]"
        )
        complete = browser.execute_script(
            "return [...document.querySelectorAll('.still')].every(i => i.complete && i.naturalWidth > 0)"
        )
    finally:
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})
    assert shown == [8, 0]
    assert complete


@pytest.mark.pictures
def test_all_mechanisms_have_room_and_a_look_of_their_own(tmp_path):
    drawn = styles(MECHANISMS)
    assert len({(style.color, style.marker, style.fill) for style in drawn.values()}) == len(MECHANISMS)
    results = make_results(mechanisms=MECHANISMS)
    page = write(results, tmp_path)  # a figure without room would warn
    assert all(mechanism_name(mechanism) in page.text for mechanism in MECHANISMS)
