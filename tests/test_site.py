"""The site builds without a warning, and its pages can be used on a phone, in the dark, and by everyone."""

import functools
import http.server
import json
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from expressive_attention.study.cli.app import app, study
from tests.axe import problems

pytest.importorskip("mkdocs", reason="needs the extra 'docs'")
pytest.importorskip("latex2mathml", reason="needs the extra 'docs'")

ROOT = Path(__file__).parents[1]
RULES = ("wcag2a", "wcag2aa", "wcag21a", "wcag21aa")  # more than these the theme does not keep
# One of each kind: text, formulas, tables, code, a notebook, signatures, a search box.
PAGES = ["", "mathematics/", "findings/", "operator/", "notebooks/twins/", "api/", "architectures/"]


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_request(self, code="-", size="-"):
        pass


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The address of the site."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}/"
    server.shutdown()
    thread.join()
    server.server_close()


def visit(browser, address, width, scheme="light"):
    """Opens a page; returns what the console says and the addresses asked for."""
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    feature = {"name": "prefers-color-scheme", "value": scheme}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
    browser.get("about:blank")
    for log in ("browser", "performance"):
        browser.get_log(log)
    browser.get(address)
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    requests = [event["params"] for event in events if event["method"] == "Network.requestWillBeSent"]
    return browser.get_log("browser"), [request["request"]["url"] for request in requests]


@pytest.mark.browser
@pytest.mark.parametrize("page", PAGES)
def test_a_page_in_a_browser(browser, site, page):
    for width in (1280, 390):
        for scheme in ("light", "dark"):
            console, addresses = visit(browser, site + page, width, scheme)
            assert console == []
            assert all(address.startswith((site, "data:", "blob:")) for address in addresses)
            assert not browser.execute_script("return document.documentElement.scrollWidth > innerWidth")
            background = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
            assert (background == "rgb(255, 255, 255)") == (scheme == "light")
            assert problems(browser, *RULES) == []


@pytest.mark.browser
def test_names_in_tables_break_at_their_joints(browser, site):
    visit(browser, f"{site}errors/", 390)
    broken = browser.execute_script(
        "return [...document.querySelectorAll('td code')].filter(code => code.getClientRects().length > 1)"
        ".map(code => code.textContent)"
    )
    assert broken
    assert all(re.search(r"[._(= -]", name) for name in broken)
    rights = "return [...document.querySelectorAll('.md-content table')].map(t => t.getBoundingClientRect().right)"
    assert max(browser.execute_script(rights)) < 390


@pytest.mark.browser
def test_the_command_line_has_a_section_for_each_command(browser, site):
    visit(browser, f"{site}commands/", 1280)
    found = "return [...document.querySelectorAll(arguments[0])].map(each => each.textContent.replace('¶', ''))"
    commands = [each.name or each.callback.__name__ for group in (app, study) for each in group.registered_commands]
    assert sorted(heading.split()[-1] for heading in browser.execute_script(found, "h2")) == sorted(commands)
    names = browser.execute_script(found, "td:first-child code:first-child")
    assert {"--sample N", "--workers N", "PRESET_OR_FILE"} <= {*names}


@pytest.mark.browser
def test_formulas_are_drawn_by_the_browser(browser, site):
    visit(browser, f"{site}mathematics/", 1280)
    heights = browser.execute_script(
        "return [...document.querySelectorAll('.formula math')].map(m => m.getBoundingClientRect().height)"
    )
    assert len(heights) > 10
    assert min(heights) > 10
    # A formula in a line leaves its paragraph whole.
    text = browser.execute_script("return document.querySelector('.md-content article p').innerText")
    assert "of one head, all of width" in text


@pytest.mark.browser
def test_an_architecture_is_found_with_its_outcome(browser, site):
    visit(browser, f"{site}architectures/", 1280)
    box = browser.find_element("css selector", "#find-architecture input")
    shown = "return [...document.querySelectorAll('#find-architecture li')].map(line => line.textContent)"
    box.send_keys("MODERNBERT-dec")
    assert browser.execute_script(shown) == ["modernbert-decoder: Expressive attention ran in every layer"]
    box.clear()
    box.send_keys("bloom")
    assert browser.execute_script(shown)[0].startswith("bloom: Refused by convert or by the model: ")
    box.clear()
    box.send_keys("no such model")
    assert browser.execute_script(shown) == ["none of this name"]
