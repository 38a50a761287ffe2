"""Pictures with objects on them: what is coloured, that labels can be read and stay inside, many objects, none."""

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

from lambdanets.detection import draw as drawing
from lambdanets.detection.draw import colour_of, colours_of, draw

GREY = (90, 90, 90)


def grey(width, height):
    return Image.new("RGB", (width, height), GREY)


@pytest.fixture
def written(monkeypatch):
    """The labels that were written: text, and left, top, right, bottom of its ground."""
    labels = []
    write = drawing._label

    def note(pen, place, text, colour, sizes):
        labels.append((text, place))
        write(pen, place, text, colour, sizes)

    monkeypatch.setattr(drawing, "_label", note)
    return labels


def test_boxes_masks_and_labels_have_the_colour_of_their_class_and_the_rest_stays(tmp_path):
    picture = grey(320, 240)
    before = picture.tobytes()
    mask = np.zeros((240, 320), bool)
    mask[100:160, 100:180] = True
    mask[120:140, 120:150] = False
    drawn = draw(picture, np.array([[100, 100, 180, 160]]), ["cat"], [0.87], [mask])
    assert picture.tobytes() == before
    assert (drawn.mode, drawn.size) == ("RGB", picture.size)
    drawn.save(tmp_path / "drawn.png")
    with Image.open(tmp_path / "drawn.png") as read:
        pixels = np.asarray(read)
    colour = np.array(colour_of("cat"))
    assert (pixels[130, 100] == colour).all()  # the box
    assert (pixels[130, 119] == colour).all()  # the edge of the hole
    assert pixels[110, 110] == pytest.approx(0.6 * np.array(GREY) + 0.4 * colour, abs=1)
    assert (pixels[130, 135] == GREY).all()  # the hole
    assert (pixels[200:] == GREY).all()
    label = pixels[80:99, 100:160].reshape(-1, 3)
    assert (label == colour).all(1).mean() > 0.3


def test_a_label_is_name_and_score_in_letters_that_stand_out(written):
    drawn = np.asarray(draw(grey(640, 480), [[200, 200, 400, 400]], ["person"], [0.8749]), float)
    ((text, place),) = written
    assert text == "person 0.87"
    label = drawn[place.top : place.bottom, place.left : place.right]
    ink = np.abs(label - colour_of("person")).sum(2) > 250
    assert ink.mean() > 0.05
    expected = Image.new("L", (place.right - place.left, place.bottom - place.top))
    font = ImageFont.load_default(13)
    ImageDraw.Draw(expected).text((2, 1), "person 0.87", fill=255, font=font)
    assert np.corrcoef((np.asarray(expected) > 128).ravel(), ink.ravel())[0, 1] > 0.9


def test_labels_without_scores_are_names_alone_and_none_are_drawn_where_none_are_wanted(written):
    draw(grey(300, 200), [[50, 50, 100, 100]], ["dog"])
    assert [text for text, _ in written] == ["dog"]
    written.clear()
    draw(grey(300, 200), [[50, 50, 100, 100]], ["dog"], labels=False)
    assert not written


def test_no_objects_leave_the_picture_as_it_was():
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8))
    drawn = draw(noise, np.zeros((0, 4)), [], [], [])
    assert drawn.tobytes() == noise.tobytes()
    assert drawn is not noise


@pytest.mark.parametrize(
    "box",
    [(0, 0, 60, 40), (280, 0, 320, 30), (0, 220, 50, 240), (300, 230, 320, 240), (-50, -50, 400, 300), (-9, 90, 4, 95)],
)
def test_labels_stay_inside_the_picture_also_at_its_border(box, written):
    draw(grey(320, 240), [box], ["something long"], [0.5])
    ((text, place),) = written
    assert text == "something long 0.50"
    assert 0 <= place.left < place.right <= 320
    assert 0 <= place.top < place.bottom <= 240


def test_a_box_outside_the_picture_is_not_drawn(written):
    drawn = draw(grey(100, 80), [[200, 10, 240, 40], [10, -30, 20, -5]], ["cat", "cat"], labels=True)
    assert drawn.tobytes() == grey(100, 80).tobytes()
    assert not written


def many(n, width, height, sides=(6, 14)):
    draw_at = np.random.default_rng(0)
    at = draw_at.random((n, 2)) * (width, height)
    return np.c_[at, at + draw_at.integers(*sides, (n, 2))], draw_at.random(n)


def test_hundreds_of_objects_stay_legible_labels_lie_apart_and_hide_no_object(written):
    boxes, scores = many(300, 800, 600)
    names = [["cell", "dead cell", "debris"][i % 3] for i in range(300)]
    names[int(scores.argmin())] = "rare"
    drawn = np.asarray(draw(grey(800, 600), boxes, names, scores))
    places = [place for _, place in written]
    assert 20 < len(places) < 150
    assert not any(a.meets(b) for i, a in enumerate(places) for b in places[:i])
    middles = (boxes[:, :2] + boxes[:, 2:]) / 2
    within = middles[(middles < (799, 599)).all(1)]
    hidden = sum(((within >= p[:2]) & (within < p[2:])).all(1).sum() for p in places)
    assert hidden == 0
    assert {text.rsplit(" ", 1)[0] for text, _ in written} == {"cell", "dead cell", "debris", "rare"}
    assert (drawn == GREY).all(2).mean() > 0.6
    written.clear()
    draw(grey(800, 600), boxes, names, scores, labels=True)
    assert len(written) == 300


def test_where_labels_have_no_room_those_of_higher_score_stay(written):
    boxes = np.array([[10, 100, 30, 110]] * 8) + np.arange(8)[:, None]
    draw(grey(300, 200), boxes, ["cat"] * 8, np.linspace(0.1, 0.8, 8))
    assert written[0][0] == "cat 0.80"
    assert len(written) < 8


def test_letters_and_lines_grow_with_the_picture_and_a_tiny_one_has_no_label(written):
    heights = []
    for width, height in ((640, 480), (4000, 3000)):
        drawn = draw(grey(width, height), np.array([[0.3, 0.3, 0.6, 0.6]]) * ([width, height] * 2), ["cat"], [0.9])
        (_, place) = written[-1]
        heights.append((place.bottom - place.top) / height)
        colour = (np.asarray(drawn)[height // 2] == colour_of("cat")).all(1)
        assert colour.sum() == pytest.approx(2 * (width * height) ** 0.5 / 300, abs=2)
    assert heights[0] == pytest.approx(heights[1], rel=0.3)
    written.clear()
    tiny = draw(grey(32, 32), [[4, 4, 20, 20]], ["cat"], [0.9])
    assert not written
    assert tiny.tobytes() != grey(32, 32).tobytes()
    draw(grey(32, 32), [[4, 4, 20, 20]], ["caterpillar"], [0.9], labels=True)
    assert written[0][0] in ("cat...", "cate...", "ca...")


def test_a_class_has_one_colour_everywhere_and_classes_of_one_set_have_different_ones():
    assert colour_of("cat") == (colours_of(["cat"])["cat"])
    names = [f"class {i}" for i in range(80)]
    assert len({colour_of(name) for name in names}) < 36  # by its name alone some are alike
    assert len(set(colours_of(names[:36]).values())) == 36
    assert set(colours_of(names)) == set(names)
    assert colours_of(names) == colours_of(reversed(names))
    lower = [name for name in names if colours_of(names)[name] != colour_of(name)]
    assert lower
    drawn = np.asarray(draw(grey(99, 99), [[9, 9, 90, 90]], lower[:1], labels=False, classes=names))
    assert tuple(drawn[50, 9].tolist()) == colours_of(names)[lower[0]]


def test_letters_that_the_font_has_not_become_their_like(written):
    names = ["Straßenbahn", "日本", "\x1b[31mred"]
    draw(grey(640, 480), [[50, 50, 250, 200], [300, 50, 500, 200], [50, 300, 250, 400]], names)
    assert {text for text, _ in written} == {"Strassenbahn", "??", "\\x1b[31mred"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"names": ["cat"]}, "2 boxes, 1 names and 2 scores"),
        ({"scores": [0.5]}, "2 boxes, 2 names and 1 scores"),
        ({"boxes": [[0, 0, 5, np.nan], [0, 0, 5, 5]]}, "a box is not finite"),
        ({"masks": [np.zeros((50, 60), bool)]}, "1 masks of 2 objects"),
        ({"masks": [np.zeros((50, 60), bool)] * 3}, r"mask 3 of 2"),
        ({"masks": [np.zeros((60, 50), bool)] * 2}, r"mask 1 of 2 is \(60, 50\), in a picture of \(50, 60\)"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    fitting = {"boxes": [[0, 0, 5, 5]] * 2, "names": ["cat"] * 2, "scores": [0.5, 0.5], "masks": None}
    with pytest.raises(ValueError, match=message):
        draw(grey(60, 50), **(fitting | change))
