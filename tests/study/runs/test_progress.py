import io

import pytest
from rich.console import Console

from expressive_attention.study.runs import progress
from expressive_attention.study.runs.progress import Bars, Lines, Silent, make_display
from tests.study.tiny import cell


def make_console(terminal):
    return Console(file=io.StringIO(), force_terminal=terminal, width=160, highlight=False)


def run_through(display):
    first, second = cell(), cell("dot_product")
    display.begin(5, 3)
    display.started(first)
    display.started(second)
    display.advanced(first, 10, 0.25)
    display.note("[bold]something[/bold] to read :x:")
    display.finished(first, "1 of 2 seeds solved")
    display.advanced(first, 30, 1.0)  # late
    display.finished(second, "0 of 2 seeds solved")
    display.end()


def test_without_a_terminal_there_is_a_plain_line_per_finished_cell():
    console = make_console(False)
    run_through(Lines(console))
    assert console.file.getvalue().splitlines() == [
        "5 cells, 3 finished before",
        "[bold]something[/bold] to read :x:",
        "[4/5] a condition, expressive, final, learning rate 0.01: 1 of 2 seeds solved",
        "[5/5] a condition, dot_product, final, learning rate 0.01: 0 of 2 seeds solved",
    ]


def test_one_cell_is_no_cells():
    console = make_console(False)
    display = Lines(console)
    display.begin(1, 0)
    display.added(1)
    assert console.file.getvalue().splitlines() == [
        "1 cell, 0 finished before",
        "1 cell more, to confirm an exclusive range on fresh seeds",
    ]


def test_bars_follow_the_cells_at_work():
    display = Bars(make_console(True))
    display.begin(5, 3)
    display.started(cell())
    display.advanced(cell(), 10, 0.25)
    overall, bar = display.progress.tasks
    assert (overall.completed, overall.total, overall.visible) == (3, 5, True)
    assert (bar.completed, bar.total, bar.fields["state"]) == (10, 30, "accuracy 0.250")
    display.finished(cell(), "done")
    assert [(task.completed, task.fields["state"]) for task in display.progress.tasks] == [(4, "4 of 5")]
    display.end()


def test_bars_leave_the_terminal_as_it_was():
    console = make_console(True)
    display = Bars(console)
    run_through(display)
    shown = console.file.getvalue()
    assert "[5/5] a condition, dot_product, final, learning rate 0.01: 0 of 2 seeds solved" in shown
    assert shown.count("\x1b[?25l") == shown.count("\x1b[?25h") == 1  # the cursor
    assert display.bars == {}


def test_quiet_shows_notes_alone_and_on_the_error_stream(capsys):
    run_through(Silent())
    assert capsys.readouterr() == ("", "[bold]something[/bold] to read :x:\n")


@pytest.mark.parametrize(
    ("quiet", "terminal", "kind"), [(True, True, Silent), (False, True, Bars), (False, False, Lines)]
)
def test_the_display_fits_where_it_is_shown(monkeypatch, quiet, terminal, kind):
    monkeypatch.setattr(progress, "Console", lambda **_: make_console(terminal))
    assert type(make_display(quiet=quiet)) is kind
