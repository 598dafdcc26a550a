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
