import csv
import json
import re

import numpy as np
import pytest
import torch
from torch import nn

from expressive_attention import expressive_attention
from expressive_attention.geometry import Record, capture
from expressive_attention.geometry.folder import write_folder
from expressive_attention.geometry.page import write_page


class Attention(nn.Module):
    def __init__(self, softmax):
        super().__init__()
        self.softmax = softmax

    def forward(self, q, k, mask):
        if self.softmax:
            return torch.nn.functional.scaled_dot_product_attention(q, k, k, mask, enable_gqa=True)
        return expressive_attention(q, k, k, mask, enable_gqa=True)


def recorded(softmax, mask, length=7, heads=4, dim=8):
    torch.manual_seed(int(softmax))
    model = nn.ModuleDict({"a": Attention(softmax), "b": Attention(softmax)})
    with capture(model) as record:
        for layer in model.values():
            layer(2 * torch.randn(2, heads, length, dim), torch.randn(2, heads // 2, length, dim), mask)
    return record


def embedded(path):
    text = path.read_text(encoding="utf-8")
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)[1])


def masks(kind):
    generator = torch.Generator().manual_seed(0)
    keep = torch.rand(2, 1, 7, 7, generator=generator) > 0.3
    keep[0, 0, 3] = False
    distance = (torch.arange(7)[:, None] - torch.arange(7)).float()
    return {
        "none": None,
        "bool": keep,
        "bias": torch.randn(1, 4, 7, 7, generator=generator),
        "padding": (torch.arange(7) < 5).expand(2, 1, 7, 7),
        "diagonals": (-0.3 * distance.abs()).masked_fill(distance < 0, -torch.inf)[None, None],
    }[kind]


def test_the_page_needs_nothing_from_elsewhere(tmp_path):
    path = write_page(recorded(False, None), tmp_path / "page.html", title="a < b", tokens=[["</script>", "x"]])
    text = path.read_text(encoding="utf-8")
    outside = text.replace(re.search(r"<script>/\*\*.*?</script>", text, re.S)[0], "")  # plotly's own code
    assert "http" not in outside
    assert "<title>a &lt; b</title>" in text
    assert embedded(path)["tokens"] == [["</script>", "x"]]


def test_a_long_text_is_cut_to_size(tmp_path):
    record = recorded(False, None, length=256, heads=8, dim=32)
    sizes = [
        write_page(record, tmp_path / "page.html", megabytes=megabytes).stat().st_size for megabytes in (0.05, 0.1)
    ]
    assert 40e3 < sizes[1] - sizes[0] < 90e3  # half a tenth of a megabyte, times 4/3
    assert embedded(tmp_path / "page.html")["models"][0]["layers"][0]["query"]["shape"] == [1, 8, 115, 32]


def test_nothing_to_show_is_an_error(tmp_path):
    for records in ({}, Record(), {"EA": Record()}):
        with pytest.raises(ValueError, match="records must hold at least one record, each with layers"):
            write_page(records, tmp_path / "page.html")


@pytest.mark.browser
@pytest.mark.parametrize("megabytes", [5.5, 0.008])
@pytest.mark.parametrize("kind", ["none", "bool", "bias", "padding", "diagonals"])
def test_the_browser_works_out_the_same_attention(browser, kind, megabytes, tmp_path):
    records = {"EA": recorded(False, masks(kind)), "DPA": recorded(True, masks(kind))}
    path = write_page(records, tmp_path / "page.html", megabytes=megabytes)
    rounded = megabytes < 1  # to 8 bits
    browser.get("about:blank")
    browser.get_log("browser")
    browser.get(path.as_uri())
    for place, record in enumerate(records.values()):
        for name, layer in enumerate(record.layers.values()):
            for example, head in ((0, 0), (1, 3)):
                choose = "".join(
                    f"document.getElementById('{control}').selectedIndex = {index};"
                    for control, index in (("model", place), ("layer", name), ("example", example), ("head", head))
                )
                found = browser.execute_script(f"{choose} draw(); return [now.a, now.z, now.cos]")
                a, z, cos = np.array(found)
                np.testing.assert_allclose(a, layer.attention(example)[head].numpy(), atol=0.03 if rounded else 1e-5)
                np.testing.assert_allclose(z, layer.scores(example)[head].numpy(), atol=0.05 if rounded else 1e-5)
                assert np.abs(cos).max() <= 1.0001
    about = browser.execute_script("return document.getElementById('about').textContent")
    assert ("vectors to 8 bits" in about) == rounded
    assert browser.get_log("browser") == []


@pytest.mark.browser
def test_the_controls_change_the_pictures(browser, tmp_path):
    path = write_page({"EA": recorded(False, None), "DPA": recorded(True, None)}, tmp_path / "page.html")
    browser.get("about:blank")
    for log in ("browser", "performance"):
        browser.get_log(log)
    browser.get(path.as_uri())
    plots = ("heads", "angles", "map", "keys")
    drawn = lambda: browser.execute_script(  # noqa: E731
        f"return {list(plots)}.map(id => JSON.stringify(document.getElementById(id).data))"
    )
    before = drawn()
    for control, changed in (
        ("head", {"angles", "map", "keys"}),
        ("example", {"map", "keys"}),
        ("query", {"keys"}),
        ("measure", {"heads"}),
        ("layer", {"angles", "map", "keys"}),
        ("model", {"heads", "angles", "map", "keys"}),
    ):
        browser.execute_script(
            "const select = document.getElementById(arguments[0]);"
            "select.selectedIndex = 1; select.dispatchEvent(new Event('change'))",
            control,
        )
        after = drawn()
        assert {plot for plot, old, new in zip(plots, before, after, strict=True) if old != new} == changed, control
        before = after
    about = browser.execute_script("return document.getElementById('about').textContent")
    assert about == "b.head.1: DPA, exp z"
    assert browser.execute_script("return document.documentElement.scrollWidth <= innerWidth")
    assert browser.get_log("browser") == []
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = {event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"}
    assert {url for url in asked if not url.startswith("data:")} == {path.as_uri()}


@pytest.mark.browser
@pytest.mark.parametrize("kind", ["alibi", "any bias"])
def test_a_large_page_is_small(browser, kind, tmp_path):
    torch.manual_seed(0)
    model = nn.ModuleList(Attention(True) for _ in range(12))
    distance = (torch.arange(512)[:, None] - torch.arange(512)).float()
    mask = {
        "alibi": (-torch.rand(12, 1, 1) * distance).masked_fill(distance < 0, -torch.inf)[None],
        "any bias": torch.randn(1, 12, 512, 512),
    }[kind]
    with capture(model) as record:
        for layer in model:
            q, k = torch.randn(2, 1, 12, 512, 64)
            layer(q, k, mask)
    path = write_page(record, tmp_path / "page.html", tokens=[[f"token{i}" for i in range(512)]])
    assert path.stat().st_size < 15e6
    browser.get(path.as_uri())
    browser.execute_async_script(
        "const done = arguments[0], plots = [...document.querySelectorAll('.plot')];"
        "const frame = () => new Promise(requestAnimationFrame);"
        "(async () => { while (!plots.every(plot => plot.querySelector('.main-svg'))) await frame(); done(); })()"
    )
    about = browser.execute_script("return document.getElementById('about').textContent")
    kept = embedded(path)["models"][0]["layers"][0]["query"]["shape"][2]
    assert f"of 512 tokens, maps show the first {kept}" in about
    assert kept >= (75 if kind == "any bias" else 250)


def test_a_folder_has_page_table_and_pictures(tmp_path):
    records = {"EA": recorded(False, None), "DPA": recorded(True, None)}
    written = write_folder(records, tmp_path, title="test")
    names = {path.name for path in tmp_path.iterdir()}
    assert {path.name for path in written} == names
    assert {"geometry.html", "heads.csv", "landscape.png", "antiparallel_EA.png", "compare_a_head_0.png"} <= names
    rows = list(csv.DictReader((tmp_path / "heads.csv").read_text().splitlines()))
    assert len(rows) == 2 * 2 * 4
    assert rows[-1]["name"] == "b.head.3"
    wanted = records["DPA"].layer("b").measures()["sink"][3].item()
    assert float(rows[-1]["sink"]) == pytest.approx(wanted)
