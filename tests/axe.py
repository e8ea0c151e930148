"""Whether a page in the browser can be used by everyone: the rules of axe-core, which a package brings along."""

from importlib import resources

import pytest


def problems(browser):
    """What axe-core finds against the page as it is shown: rule, what to do, and the first elements."""
    pytest.importorskip("axe_core_python", reason="needs axe-core-python")
    script = resources.files("axe_core_python").joinpath("axe.min.js").read_text(encoding="utf-8")
    browser.execute_script(script)
    found = browser.execute_async_script(
        "const done = arguments[0];"
        "axe.run(document, {resultTypes: ['violations']}).then(found => done(found.violations), e => done([String(e)]))"
    )
    return [(each["id"], each["help"], [node["html"][:200] for node in each["nodes"][:5]]) for each in found]
