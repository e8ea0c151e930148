"""Whether a page in the browser can be used by everyone: the rules of axe-core, which a package brings along."""

from importlib import resources

import pytest


def problems(browser, *tags):
    """Rules of axe-core that the page breaks as it is shown: rule, what to do, and the first elements.

    With tags, such as "wcag2aa", only the rules that have one of them.
    """
    pytest.importorskip("axe_core_python", reason="needs axe-core-python")
    script = resources.files("axe_core_python").joinpath("axe.min.js").read_text(encoding="utf-8")
    browser.execute_script(script)
    found = browser.execute_async_script(
        "const [tags, done] = arguments;"
        "axe.run(document, tags.length ? {runOnly: tags} : {})"
        ".then(found => done(found.violations), error => done(String(error)))",
        tags,
    )
    assert isinstance(found, list), found
    return [(each["id"], each["help"], [node["html"][:200] for node in each["nodes"][:5]]) for each in found]
