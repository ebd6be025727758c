"""The documentation's figures: that they can be drawn and read, and say what the code and the results say."""

import re
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
import torch

matplotlib = pytest.importorskip("matplotlib")
pytest.importorskip("triton")

FIGURES = Path(__file__).resolve().parent.parent / "docs" / "figures"
if not FIGURES.is_dir():
    pytest.skip("a source distribution has no docs", allow_module_level=True)
sys.path.insert(0, str(FIGURES))

import draw  # noqa: E402
import facts  # noqa: E402
import fig_hero  # noqa: E402
import fig_int4_layout  # noqa: E402
import svg  # noqa: E402

from tiny_gemm.quantize_utils import unit_k  # noqa: E402

FILES = [f"{name}-{theme}.svg" for name in draw.FIGURES for theme in draw.THEMES]
SVG = "{http://www.w3.org/2000/svg}"
HREF = "{http://www.w3.org/1999/xlink}href"


@pytest.fixture(scope="module")
def drawn(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("figures")
    assert [path.name for path in draw.draw_all(directory)] == FILES
    return directory


def texts(picture: str) -> list[str]:
    """What a figure says: its title, its description and every line that is written in it."""
    root = ElementTree.fromstring(picture)
    named = [root.findtext(f"{SVG}title"), root.findtext(f"{SVG}desc")]
    return named + [label for element in root.iter() if (label := element.get("aria-label"))]


def drawn_with(picture: str) -> str:
    """Matplotlib's version: another one may place letters in another way."""
    return re.search(r"(?i)(?:drawn with matplotlib |Matplotlib v)([0-9.]+[0-9])", picture)[1]


@pytest.mark.parametrize("name", FILES)
def test_a_figure_is_whole(drawn, name):
    picture = (drawn / name).read_text(encoding="utf-8")
    root = ElementTree.fromstring(picture)
    width, height = (float(root.get(key)) for key in ("width", "height"))
    assert width in (640, 840) and height < 1.25 * width, "a phone halves it, and shows it at once"
    assert len(picture) < 100_000
    title, description, *_ = texts(picture)
    assert title and len(description) > 60
    ids = {element.get("id") for element in root.iter()}
    assert {element.get(HREF)[1:] for element in root.iter(f"{SVG}use")} <= ids
    assert "nan" not in picture.lower().split("</desc>")[1]


@pytest.mark.parametrize("name", FILES)
def test_the_committed_figure_is_what_the_code_draws(drawn, name):
    fresh, committed = ((directory / name).read_text(encoding="utf-8") for directory in (drawn, FIGURES))
    hint = f"{name} is out of date: python docs/figures/draw.py"
    assert texts(committed) == texts(fresh), hint
    if drawn_with(committed) == matplotlib.__version__:
        assert committed == fresh, hint


def test_light_and_dark_say_the_same(drawn):
    for name in draw.FIGURES:
        light, dark = (texts((drawn / f"{name}-{theme}.svg").read_text(encoding="utf-8")) for theme in draw.THEMES)
        assert light == dark


@pytest.mark.parametrize(
    "x, y, text, complaint",
    [
        (95, 50, "too far", "leaves the canvas"),
        (12, 52, "over", "covers"),
        (60, 80, "out", "crosses the edge"),
        (10, 20, "字", "lacks"),
    ],
)
def test_what_cannot_be_read_is_refused(x, y, text, complaint):
    canvas = svg.Canvas("light", 100, 100, "title", "description")
    canvas.text(10, 50, "here")
    canvas.rect(50, 70, 20, 20, stroke="ink")
    canvas.svg()
    with pytest.raises(ValueError, match=complaint):
        canvas.text(x, y, text)
        canvas.svg()


def test_a_box_holds_its_text():
    with pytest.raises(ValueError, match="wide and its box 40"):
        svg.Canvas("light", 100, 100, "title", "description").box(0, 0, 40, 20, "a long line")


# ----------------------------------------------------------------------------------------------------------- the facts
@pytest.mark.parametrize("n, k", [(32, 256), (16, 64), (48, 192)])
def test_the_packed_order_is_the_format_s(n, k):
    """As quantize_utils tells it: nibble j of column c holds q[n, U * unit + U / 4 * j + c]."""
    unit = unit_k(k)
    order = facts.packed_order(n, k)
    assert len(order) == n * k
    for (row, column), place in order.items():
        plane, c = divmod(column % unit, unit // 4)
        assert place.nibble == plane
        assert place.word == ((row // 16 * (k // unit) + column // unit) * 16 + row % 16) * (unit // 4) + c


def test_the_tiles_of_the_layout_figure_cover_the_weight():
    tiles = facts.tile_order(fig_int4_layout.N, fig_int4_layout.K)
    stretches = sorted(tiles.values(), key=lambda span: span.start)
    assert [span.start for span in stretches[1:]] == [span.stop for span in stretches[:-1]]
    assert stretches[-1].stop == fig_int4_layout.N * fig_int4_layout.K // 2, "two weights in a byte"


@pytest.mark.parametrize("i, impl", [(0, "pytorch"), (1, "tiny-gemm-int4")])
def test_the_bytes_of_a_step_are_those_of_the_benchmark(i, impl):
    counted = sum(pair[i] for pair in facts.step_bytes().values())
    assert counted == pytest.approx(facts.decode_row(impl)["bytes"], rel=1e-3)


def test_launches_add_up_to_the_step():
    eager, ours = (facts.launches_per_layer(which) for which in ("eager", "ours"))
    for which, parts in (("eager", eager), ("ours", ours)):
        layers = facts.TRACED_LAYERS * sum(parts.values())
        assert 0.8 * facts.kernels_per_step(which) < layers < facts.kernels_per_step(which)
    assert set(eager) == set(ours) and all(eager[part] >= ours[part] >= 1 for part in ours)


def test_a_layer_is_taken_apart():
    layer = ["attention", "other", "product", "other", "product", "other", "product", "other", "product", "other"]
    expected = {"attention": 3, "out": 1, "norm 2": 1, "ffn": 3, "norm 1": 1, "qkv": 1}
    assert facts._parts(layer) == expected


def test_the_hero_s_speed_is_measured(monkeypatch):
    row = facts.decode_row("tiny-gemm-int4-generate")
    assert row["us"] * row["tokens_per_s"] == pytest.approx(1e6, rel=1e-3)
    monkeypatch.setattr(facts, "decode_row", lambda impl: row | {"tokens_per_s": 12.0})
    assert "12" in texts(fig_hero.draw("light"))


@pytest.mark.parametrize(
    "count, expected", [(131, "131 B"), (16_384, "16.4 kB"), (525_336_576, "525 MB"), (2.49e9, "2.49 GB")]
)
def test_sizes(count, expected):
    assert facts.size(count) == expected


def test_the_hero_s_shades_are_four_bits():
    shades = torch.tensor(fig_hero._integers(4, 64))
    assert shades.min() >= 0 and shades.max() == 15
