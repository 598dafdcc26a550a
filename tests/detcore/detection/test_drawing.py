"""Boxes and names on pictures, in any script that a font of this machine has."""

import pytest
import torch
from PIL import ImageFont

from detcore.detection import drawing

NAMES = {1: "circle", 7: "звезда", 9: "猫"}


@pytest.fixture(autouse=True)
def no_memory():
    drawing.font_for.cache_clear()
    yield
    drawing.font_for.cache_clear()


def test_boxes_have_the_colour_of_their_class():
    image = torch.zeros(3, 60, 80, dtype=torch.uint8)
    found = torch.tensor([[10.0, 20, 30, 25, 0.9, 1], [50, 5, 20, 20, 0.5, 7]], dtype=torch.float64)
    drawn = drawing.draw(image, found, NAMES)
    assert drawn.shape == image.shape and drawn.dtype == torch.uint8 and not image.any()
    for (x, y, w, h, *_), colour in zip(found.int().tolist(), drawing.COLOURS, strict=False):
        rgb = [int(colour[k : k + 2], 16) for k in (1, 3, 5)]
        assert drawn[:, y + h, x + w // 2].tolist() == rgb and drawn[:, y + h // 2, x + w].tolist() == rgb
    assert torch.equal(drawing.draw(image, found[:0], NAMES), image)


@pytest.mark.parametrize("box", [[-20.0, -20, 500, 500], [70, 55, 0, 0], [79, 59, 30, 30], [5, 50, 1e-3, 1e-3]])
@pytest.mark.parametrize("name", ["", "a\nb\x00", "x" * 300, "🎉"])
def test_any_box_and_name_can_be_drawn(box, name):
    found = torch.tensor([[*box, 0.5, 3]], dtype=torch.float64)
    assert drawing.draw(torch.zeros(3, 60, 80, dtype=torch.uint8), found, {3: name}).any()


def test_names_hide_no_other_object():
    """A field of 8 x 8 boxes of 6 pixels, whose names would cover several each; one large one has its name inside."""
    small = [[20.0 + 30 * (k % 8), 140 + 9 * (k // 8), 6, 6, 0.8 - k / 100, 1] for k in range(64)]
    found = torch.tensor([[10, 10, 200, 100, 0.9, 1], *small], dtype=torch.float64)
    image = torch.full((3, 260, 300), 255, dtype=torch.uint8)
    drawn = drawing.draw(image, found, {1: "nucleus"})
    for x, y, w, h, *_ in found.tolist():
        assert drawn[:, round(y + h / 2), round(x + w / 2)].eq(255).all(), "the middle of each object is seen"
    first = torch.tensor([int(drawing.COLOURS[0][k : k + 2], 16) for k in (1, 3, 5)], dtype=torch.uint8)
    assert drawn[:, 11:24, 11:60].eq(first[:, None, None]).all(0).float().mean() > 0.3
    assert len({tuple(drawn[:, y, x].tolist()) for x, y in ((10, 50), (20, 143), (50, 143))}) == 3, "one colour each"


def test_small_pictures_are_enlarged_to_be_read():
    image = torch.arange(3 * 70 * 80).reshape(3, 70, 80).to(torch.uint8)
    drawn = drawing.draw(image, torch.zeros(0, 6, dtype=torch.float64), NAMES, zoom=None)
    assert torch.equal(drawn, image.repeat_interleave(4, 1).repeat_interleave(4, 2))
    box = torch.tensor([[10.0, 20, 30, 25, 0.9, 1]], dtype=torch.float64)
    drawn = drawing.draw(image * 0, box, NAMES, zoom=2)
    assert drawn[:, 2 * 45, 2 * 25].tolist() == [int(drawing.COLOURS[0][k : k + 2], 16) for k in (1, 3, 5)]
    large = torch.zeros(3, 600, 700, dtype=torch.uint8)
    assert drawing.draw(large, box[:0], NAMES, zoom=None).shape == large.shape


def test_letters_that_a_font_lacks():
    font = ImageFont.load_default(20)
    assert drawing.lacking("Circle 12", font) == "" and drawing.lacking("a 猫 b", font) == "猫"


def test_without_another_font_the_lack_is_said(monkeypatch, capsys):
    monkeypatch.setattr(drawing, "_files", lambda: ())
    assert isinstance(drawing.font_for("猫", 14), ImageFont.FreeTypeFont)
    assert "no font here has the letters '猫'" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["звезда", "ΑΒΓδ", "猫と犬", "قطة"])
def test_a_font_of_this_machine_with_all_letters_is_taken(name, capsys):
    having = [font for font in drawing._fonts(14) if not drawing.lacking(name, font)]
    if not having:
        pytest.skip(f"no font here has {name}")
    assert drawing.lacking(name, drawing.font_for(name, 14)) == "" and capsys.readouterr().err == ""
