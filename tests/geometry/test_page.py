import base64
import csv
import gzip
import json
import re
from importlib import resources

import numpy as np
import pytest
import torch
from torch import nn

from expressive_attention import expressive_attention
from expressive_attention.geometry import Record, capture
from expressive_attention.geometry.folder import write_folder
from expressive_attention.geometry.page import write_page
from expressive_attention.geometry.record import MEASURES, SHARES
from tests.axe import problems
from tests.waiting import wait_until


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
    outside = text.replace(re.search(r'<script type="application/gzip".*?</script>', text, re.S)[0], "")  # plotly
    assert "http" not in outside.replace("http-equiv", "")
    assert "<title>a &lt; b</title>" in text
    assert embedded(path)["tokens"] == [["</script>", "x"]]


def test_the_bundle_is_plotlys_and_its_license_lies_beside_it(tmp_path):
    text = write_page(recorded(False, None), tmp_path / "page.html").read_text(encoding="utf-8")
    (packed,) = re.findall(r'<script type="application/gzip" id="plotly">(.*?)</script>', text)
    assert "plotly.js (cartesian - minified)" in gzip.decompress(base64.b64decode(packed)).decode()[:200]
    terms = resources.files("expressive_attention.geometry.plotly").joinpath("LICENSE").read_text(encoding="utf-8")
    assert terms.startswith("MIT License")


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
    visit(browser, path)
    for place, record in enumerate(records.values()):
        for name, layer in enumerate(record.layers.values()):
            for example, head in ((0, 0), (1, 3)):
                choose = "".join(
                    f"document.getElementById('{control}').selectedIndex = {index};"
                    for control, index in (("layer", name), ("example", example), ("head", head))
                )
                found = browser.execute_script(f"{choose} draw(); return ['a', 'z', 'cos'].map(x => now[{place}][x])")
                a, z, cos = np.array(found)
                np.testing.assert_allclose(a, layer.attention(example)[head].numpy(), atol=0.03 if rounded else 1e-5)
                np.testing.assert_allclose(z, layer.scores(example)[head].numpy(), atol=0.05 if rounded else 1e-5)
                assert np.abs(cos).max() <= 1.0001
    about = browser.execute_script("return document.getElementById('about-0').textContent")
    assert ("vectors to 8 bits" in about) == rounded
    assert browser.get_log("browser") == []


PLOTS = ("heads", "angles", "map", "keys")


def visit(browser, path, address=""):
    """Opens the page, and waits until its plots and thumbnails are drawn."""
    browser.get("about:blank")
    for log in ("browser", "performance"):
        browser.get_log(log)
    browser.get(path.as_uri() + address)
    wait(browser)


def wait(browser):
    browser.execute_async_script(
        "const done = arguments[0], frame = () => new Promise(requestAnimationFrame);"
        "(async () => { while (document.body.ariaBusy !== 'false') await frame(); done(); })()"
    )


def drawn(browser):
    """The data of each plot, by its name and side, and the pixels of each side's thumbnails."""
    return browser.execute_script(
        f"const found = {{}}; for (const side of SIDES) {{ for (const name of {list(PLOTS)})"
        "found[`${name}-${side}`] = JSON.stringify($(`${name}-${side}`).data);"
        "found[`thumbs-${side}`] = [...document.querySelectorAll(`#thumbs-${side} canvas`)]"
        ".map(c => c.toDataURL()).join(); }"
        "return found"
    )


def choose(browser, control, index):
    browser.execute_script(
        "const select = document.getElementById(arguments[0]);"
        "select.selectedIndex = arguments[1]; select.dispatchEvent(new Event('change'))",
        *(control, index),
    )
    wait(browser)


def both():
    return {"EA": recorded(False, None), "DPA": recorded(True, None)}


@pytest.mark.browser
def test_the_controls_change_the_pictures_of_both_sides(browser, tmp_path):
    path = write_page(both(), tmp_path / "page.html")
    visit(browser, path)
    before = drawn(browser)
    for control, changed in (
        ("head", {"angles", "map", "keys"}),
        ("example", {"map", "keys", "thumbs"}),
        ("query", {"keys"}),
        ("measure", {"heads"}),
        ("layer", {"angles", "map", "keys"}),
    ):
        choose(browser, control, 1)
        after = drawn(browser)
        wanted = {f"{name}-{side}" for name in changed for side in (0, 1)}
        assert {plot for plot in before if before[plot] != after[plot]} == wanted, control
        before = after
    choose(browser, "model-1", 0)
    after = drawn(browser)
    own = {name for name in before if before[name] != after[name]} - {"keys-0", "heads-0"}  # which share a scale
    assert own == {f"{name}-1" for name in (*PLOTS, "thumbs")}
    assert all(after[f"{name}-0"] == after[f"{name}-1"] for name in ("angles", "map", "keys", "thumbs"))
    about = browser.execute_script("return document.getElementById('about-0').textContent")
    assert about == "b.head.1: EA, z\u00b2/(1 + z\u00b2)"
    assert browser.execute_script("return document.documentElement.scrollWidth <= innerWidth")
    assert browser.get_log("browser") == []
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = {event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"}
    assert {url.partition("#")[0] for url in asked if not url.startswith("data:")} == {path.as_uri()}


@pytest.mark.browser
def test_the_page_opens_on_ea_beside_dpa(browser, tmp_path):
    records = {"DPA": recorded(True, None), "other": recorded(True, None), "EA": recorded(False, None)}
    visit(browser, write_page(records, tmp_path / "page.html"))
    shown = browser.execute_script("return SIDES.map(side => model(side).name)")
    assert shown == ["EA", "DPA"]
    assert "Look for blue" in browser.execute_script("return document.getElementById('look').textContent")


@pytest.mark.browser
def test_one_model_has_one_side(browser, tmp_path):
    visit(browser, write_page(recorded(False, None), tmp_path / "page.html"))
    assert len(drawn(browser)) == len(PLOTS) + 1
    assert browser.get_log("browser") == []


@pytest.mark.browser
def test_the_address_holds_what_is_seen(browser, tmp_path):
    path = write_page(both(), tmp_path / "page.html")
    visit(browser, path)
    for control, index in (("layer", 1), ("head", 2), ("example", 1), ("query", 3), ("measure", 5), ("model-0", 1)):
        choose(browser, control, index)
    seen, address = drawn(browser), browser.current_url.partition("#")[2]
    visit(browser, path)
    assert drawn(browser) != seen
    visit(browser, path, f"#{address}")
    assert drawn(browser) == seen
    visit(browser, path, "#head=99&layer=x&nothing=1")  # of another page: what does not fit is left
    assert browser.execute_script("return [value('head'), value('layer')]") == [0, 0]
    assert browser.get_log("browser") == []


@pytest.mark.browser
def test_a_thumbnail_is_its_heads_map_and_chooses_it(browser, tmp_path):
    records = both()
    visit(browser, write_page(records, tmp_path / "page.html"))
    browser.execute_script("document.querySelectorAll('#thumbs-1 button')[6].click()")  # layer b, head 2
    assert browser.execute_script("return [value('layer'), value('head')]") == [1, 2]
    pressed = "return [...document.querySelectorAll(`#thumbs-${arguments[0]} button`)].map(b => b.ariaPressed)"
    for side in (0, 1):
        assert browser.execute_script(pressed, side) == ["false"] * 6 + ["true", "false"]
    pixels = browser.execute_script(
        "const canvas = document.querySelectorAll('#thumbs-1 canvas')[6];"
        "return [...canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data]"
    )
    rgb = np.array(pixels).reshape(7, 7, 4)[..., :3]
    layer = records["DPA"].layer("b")
    a, z = layer.attention(0)[2], layer.scores(0)[2]
    is_largest = (a == a.amax(-1, keepdim=True)).numpy()
    ends = {True: [217, 130, 0], False: [0, 24, 43]}  # the colors of 1 and -1
    for row, column in zip(*is_largest.nonzero(), strict=True):
        np.testing.assert_allclose(rgb[row, column], ends[bool(z[row, column] > 0)], atol=1)


@pytest.mark.browser
def test_shares_are_on_a_scale_from_0_to_1_and_others_on_one_for_both(browser, tmp_path):
    records = both()
    visit(browser, write_page(records, tmp_path / "page.html"))
    scales = "return SIDES.map(side => [$(`heads-${side}`).data[0].zmin, $(`heads-${side}`).data[0].zmax])"
    for index, name in enumerate(MEASURES):
        choose(browser, "measure", index)
        values = [layer.measures()[name] for record in records.values() for layer in record.layers.values()]
        low, high = min(v.min().item() for v in values), max(v.max().item() for v in values)
        found = browser.execute_script(scales)
        assert found[0] == found[1]
        assert found[0] == ([0, 1] if name in SHARES else [pytest.approx(low, rel=1e-4), pytest.approx(high, rel=1e-4)])
        assert 0 <= low <= high <= 1 + 1e-9 or name not in SHARES


@pytest.mark.browser
def test_tokens_stand_on_the_axes_as_they_are(browser, tmp_path):
    tokens = [["<i>", "a b", "\n", "&amp;", "long" * 5, "x"]] * 2  # one fewer than there are positions
    visit(browser, write_page(both(), tmp_path / "page.html", tokens=tokens))
    shown = browser.execute_script(
        "return [...document.querySelectorAll('#map-0 .xtick text')].map(t => t.textContent)"
    )
    assert shown == ["<i>", "a\u2423b", "\u21b5", "&amp;", "longlongl", "x", "6"]


@pytest.mark.browser
@pytest.mark.parametrize("width", [1280, 390])
def test_everyone_can_use_the_page(browser, tmp_path, width):
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    visit(browser, write_page(both(), tmp_path / "page.html"))
    found = {"light": problems(browser)}
    browser.execute_script("$('theme').click()")
    wait(browser)
    found["dark"] = problems(browser)
    wide = browser.execute_script("return document.documentElement.scrollWidth > innerWidth")
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    assert found == {"light": [], "dark": []}
    assert not wide


@pytest.mark.browser
def test_the_switch_turns_the_page_dark(browser, tmp_path):
    visit(browser, write_page(both(), tmp_path / "page.html"))
    look = (
        "return [getComputedStyle(document.body).backgroundColor, $('map-0').layout.font.color, $('theme').textContent]"
    )
    assert browser.execute_script(look) == ["rgb(255, 255, 255)", "#222222", "Dark"]
    browser.execute_script("$('theme').click()")
    wait(browser)
    assert browser.execute_script(look) == ["rgb(23, 25, 28)", "#e8e8e6", "Light"]
    # The page hears of a change of media with its next frame.
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    wait_until(lambda: browser.execute_script(look)[:2] == ["rgb(255, 255, 255)", "#222222"])
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})
    wait_until(lambda: browser.execute_script(look) == ["rgb(23, 25, 28)", "#e8e8e6", "Light"])


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
    visit(browser, path)
    about = browser.execute_script("return document.getElementById('about-0').textContent")
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
