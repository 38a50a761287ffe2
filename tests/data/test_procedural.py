"""The made set of shapes: the same from the same seed, masks are what is seen, others can read it, the cue tells."""

import contextlib
import io
import json
import time
import warnings

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as reference
from pycocotools.coco import COCO

from lambdanets.data.procedural import CUE_SHAPES, SHAPES, coco_shapes, shapes
from lambdanets.errors import BadData


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    return coco_shapes(tmp_path_factory.mktemp("coco") / "new", images=60, seed=3)


def read(file):
    with contextlib.redirect_stdout(io.StringIO()):
        return COCO(file)


def mask_of(annotation, px):
    """As pycocotools draws it."""
    given = annotation["segmentation"]
    runs = reference.frPyObjects(given, px, px)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # pycocotools' own, of numpy 2
        return reference.decode(reference.merge(runs) if isinstance(given, list) else runs).astype(bool)


def test_a_picture_is_a_function_of_seed_and_index_alone(tmp_path, written):
    again = coco_shapes(tmp_path / "again", images=60, seed=3)
    other = coco_shapes(tmp_path / "other", images=4, seed=4)
    files = sorted(p.relative_to(written) for p in written.rglob("*") if p.is_file())
    assert len(files) == 62
    assert all((written / file).read_bytes() == (again / file).read_bytes() for file in files)
    first = "images/000000.png"
    assert (written / first).read_bytes() != (other / first).read_bytes()
    with Image.open(written / first) as picture:
        assert np.array_equal(picture, shapes(3, 0)[0])
    longer = coco_shapes(tmp_path / "longer", images=61, seed=3, split=1)
    assert all((written / file).read_bytes() == (longer / file).read_bytes() for file in files if file.suffix == ".png")


def test_the_parts_have_the_pictures_they_should_and_every_class_in_both_forms_of_mask(written, tmp_path):
    parts = {part: json.loads((written / f"{part}.json").read_text()) for part in ("train", "val")}
    assert [len(part["images"]) for part in parts.values()] == [48, 12]
    for part in parts.values():
        assert [c["name"] for c in part["categories"]] == list(SHAPES)
        assert {one["category_id"] for one in part["annotations"]} == {1, 2, 3, 4, 5}
        forms = {(one["category_id"], type(one["segmentation"])) for one in part["annotations"]}
        assert {form for form in forms if form[0] == 4} == {(4, dict)}  # a ring has a hole
        assert len(forms) >= 8
        for one in part["images"]:
            with Image.open(written / "images" / one["file_name"]) as picture:
                assert picture.size == (one["width"], one["height"]) == (128, 128)
    split = coco_shapes(tmp_path / "split", images=5, split=2)
    assert [len(json.loads((split / f"{part}.json").read_text())["images"]) for part in parts] == [3, 2]


def test_masks_that_pycocotools_reads_are_what_is_seen(written):
    index, least = read(written / "train.json"), 1.0
    for image_id in index.getImgIds():
        seen = shapes(3, image_id - 1)[1]
        annotations = index.loadAnns(index.getAnnIds(image_id))
        assert [SHAPES[one["category_id"] - 1] for one in annotations] == [one.name for one in seen]
        for one, shape in zip(annotations, seen, strict=True):
            mask = mask_of(one, 128)
            if isinstance(one["segmentation"], dict):
                assert np.array_equal(mask, shape.visible)
            least = min(least, (mask & shape.visible).sum() / (mask | shape.visible).sum())
            runs = reference.encode(np.asfortranarray(shape.visible.astype(np.uint8)))
            assert reference.toBbox([runs])[0].tolist() == one["bbox"]
            assert one["area"] == shape.visible.sum() >= 24
    assert 0.85 < least < 1  # COCO's rule for polygons differs in some pixels of the edge


def test_later_shapes_cover_earlier_ones_and_pixels_have_the_colour_of_the_shape_seen_there():
    covered = 0
    for index in range(40):
        picture, seen = shapes(1, index)
        pixels = np.asarray(picture, float)
        assert sum(one.visible.astype(int) for one in seen).max() == 1
        covered += sum(one.outline is None and one.name != "ring" for one in seen)
        for one in seen:
            inside = pixels[one.visible]
            assert inside.std(0).max() < 20  # one colour with a little noise
            assert ((inside.mean(0) < 65) | (inside.mean(0) > 190)).all()
    assert covered > 20


def test_a_ring_has_a_hole_and_an_l_is_concave_and_sizes_are_as_promised():
    sides = []
    for index in range(60):
        for one in shapes(2, index)[1]:
            if one.outline is not None:
                sides.append(np.ptp(one.outline, axis=0).max())
                x, y = one.outline.T
                area = abs(x @ np.roll(y, -1) - y @ np.roll(x, -1)) / 2
                assert area == pytest.approx(one.visible.sum(), rel=0.1)
    assert 12 <= min(sides) < 20
    assert 50 < max(sides) <= 60


def test_the_class_of_a_disc_is_the_colour_of_a_marker_in_a_corner_and_of_nothing_else(tmp_path):
    corners, told, colours = set(), [], {"warm disc": [], "cold disc": []}
    for index in range(60):
        picture, seen = shapes(0, index, image_px=256, cue=True)
        pixels = np.asarray(picture, int)
        names = {one.name for one in seen if "disc" in one.name}
        assert len(names) == 1
        (name,) = names
        marker = (255, 40, 0) if name == "warm disc" else (0, 40, 255)
        at = np.argwhere((pixels == marker).all(2))
        assert len(at) == 36
        assert not any(one.visible[tuple(at.T)].any() for one in seen)
        corners.add(tuple((at.mean(0) > 128).tolist()))
        told.append(name)
        colours[name] += [pixels[one.visible].mean(0) for one in seen if one.name == name]
    assert len(corners) == 4
    assert 20 < told.count("warm disc") < 40
    warm, cold = (np.mean(colours[name], 0) for name in CUE_SHAPES[:2])
    assert np.abs(warm - cold).max() < 50  # red and blue of the markers are 205 apart
    root = coco_shapes(tmp_path / "cue", images=3, cue=True)
    content = json.loads((root / "train.json").read_text())
    assert [c["name"] for c in content["categories"]] == list(CUE_SHAPES)
    assert content["images"][0]["width"] == 256


def test_pictures_without_objects_come_where_they_are_asked_for():
    counts = [len(shapes(0, index, objects=(0, 1))[1]) for index in range(30)]
    assert 5 < counts.count(0) < 25
    assert max(counts) == 1


def test_nothing_is_written_over_and_what_cannot_be_is_refused(written, tmp_path):
    with pytest.raises(BadData, match=r"has train\.json already"):
        coco_shapes(written, images=5)
    for wrong, message in (
        ({"images": 1}, "of 1 images 1 cannot be held out"),
        ({"images": 5, "split": 5}, "5 cannot be held out"),
        ({"images": 5, "image_px": 10}, "image_px=10"),
        ({"images": 5, "objects": (3, 2)}, "objects"),
    ):
        with pytest.raises(ValueError, match=message):
            coco_shapes(tmp_path / "none", **wrong)
    assert not (tmp_path / "none").exists()


def test_a_picture_takes_a_few_milliseconds(tmp_path):
    best = 9.0
    for attempt in range(3):
        started = time.process_time()
        coco_shapes(tmp_path / str(attempt), images=40)
        best = min(best, (time.process_time() - started) / 40)
    assert best < 0.015, f"{best * 1000:.1f} ms an image"
