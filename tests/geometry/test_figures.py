import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from torch import nn

from expressive_attention import expressive_attention
from expressive_attention.geometry import Record, capture, figures, measures


class Attention(nn.Module):
    def forward(self, q, k):
        return expressive_attention(q, k, k, is_causal=True)


@pytest.fixture
def record():
    model = nn.ModuleDict({"attn": Attention()})
    q, k = torch.randn(2, 3, 2, 6, 4, generator=torch.Generator().manual_seed(0))
    with capture(model) as found:
        model["attn"](q, k)
    yield found
    plt.close("all")


def test_the_landscape_shows_weights_by_angle():
    ax = figures.landscape(4.0)
    ea, dpa = ax.get_lines()
    degrees, w = np.array(ea.get_data())
    np.testing.assert_allclose(w, (f := (4 * np.cos(np.radians(degrees))) ** 2) / (1 + f) * 17 / 16, atol=1e-12)
    _, w = np.array(dpa.get_data())
    assert w[0] == 1
    assert w[-1] == pytest.approx(np.exp(-8))
    assert ea.get_linestyle() != dpa.get_linestyle()


@pytest.mark.parametrize("form", measures.FORMS)
def test_the_plane_is_symmetric_across_the_query(form):
    w = np.array(figures.key_plane(form).get_images()[0].get_array())
    assert (w == w[::-1]).all()
    assert np.allclose(w, w[:, ::-1]) == (form != "softmax")


def test_angles_show_pairs_and_attention(record):
    layer = record.layer("attn")
    ax = figures.angles(layer, 1)
    heights = np.array([bar.get_height() for bar in ax.patches if bar.get_width() == pytest.approx(2 / 64)][:64])
    assert heights.sum() * 2 / 64 == pytest.approx(1)
    np.testing.assert_allclose(heights, layer.pairs[1].sum(-1).numpy() / 63 * 32)
    mass, random = (line.get_ydata() for line in ax.get_lines()[:2])
    assert mass.sum() * 2 / 64 == pytest.approx(1)
    assert random.sum() * 2 / 64 == pytest.approx(1)


def test_attention_by_angle_and_size(record):
    layer = record.layer("attn")
    ax = figures.angle_and_size(layer, 1)
    (mesh,) = ax.collections
    shown = np.ma.filled(mesh.get_array().astype(float), np.nan).reshape(32, 64)
    pairs, mass = layer.pairs[1].numpy().T, layer.mass[1].numpy().T
    assert (np.isnan(shown) == (pairs == 0)).all()
    assert np.nansum(shown * pairs) == pytest.approx(mass.sum()) == pytest.approx(18)


def test_a_map_has_the_sign_of_the_scores(record):
    layer = record.layer("attn")
    ax = figures.attention_map(layer, 0, 2, tokens=list("abcdef"))
    shown = np.array(ax.get_images()[0].get_array())
    np.testing.assert_allclose(np.abs(shown).sum(-1), 1, rtol=1e-5)
    np.testing.assert_allclose(shown, (layer.attention(2)[0] * layer.scores(2)[0].sign()).numpy())
    assert [label.get_text() for label in ax.get_xticklabels()] == list("abcdef")
    assert len(ax.texts) == (shown < -0.15).sum() > 0


def test_heads_and_comparisons(record):
    ax = figures.heads(record, "antiparallel")
    np.testing.assert_allclose(
        ax.get_images()[0].get_array()[0], record.layer("attn").measures()["antiparallel"].numpy()
    )
    figure = figures.compare({"EA": record, "again": record}, "attn", 0)
    assert [ax.get_title() for ax in figure.axes[:4]] == ["EA", "again", "", ""]
    figure = figures.angles_by_step({100: record, 0: record}, "attn", 0)
    assert [ax.get_title().splitlines()[0] for ax in figure.axes] == ["step 0", "step 100"]
    given = plt.subplots()[1]
    assert figures.heads(record, "sink", ax=given) is given


def test_wrong_arguments_are_named(record):
    layer = record.layer("attn")
    for call, words in (
        (lambda: figures.angles(layer, 2), "head must be from 0 to 1 in 'attn', got 2"),
        (lambda: figures.attention_map(layer, 0, 3), "example must be from 0 to 2, got 3"),
        (lambda: figures.heads(record, "beauty"), "measure must be one of"),
        (lambda: figures.compare({}, "attn", 0), "at least one record"),
        (lambda: figures.angles_by_step({}, "attn", 0), "at least one record"),
        (lambda: figures.compare({"EA": record}, "mlp", 0), "layer must be one of"),
        (lambda: figures.key_plane("sigmoid"), "form must be one of"),
    ):
        with pytest.raises(ValueError, match=words):
            call()
    assert isinstance(record, Record)
