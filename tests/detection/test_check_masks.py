"""Areas and outlines of masks are judged by what they cover of the picture."""

import sys

import numpy as np
import pytest
from coco_sets import held, pair

from lambdanets.detection import check, outlines
from lambdanets.detection.layouts import look_at_coco

BIG = 200
# Polygons of one object, the area that is given and right, and its box.
RIGHT = {
    "half of it outside": ([[-40, 30, 20, 30, 20, 70, -40, 70]], 800, [0, 30, 20, 40]),
    "twisted": ([[50, 50, 80, 70, 80, 50, 50, 69]], 300, [50, 50, 30, 20]),
    "three times the same": ([[10, 10, 30, 10, 30, 30, 10, 30]] * 3, 400, [10, 10, 20, 20]),
    "a bow tie": ([[100, 100, 160, 160, 160, 100, 100, 160]], 1800, [100, 100, 60, 60]),
}


def looked_at(at, polygons, area, box):
    content = held(2, per_picture=1)
    for picture in content["images"]:
        picture.update(width=BIG, height=BIG)
    content["annotations"][0].update(segmentation=polygons, area=area, bbox=box)
    return look_at_coco(pair(at, content))


@pytest.fixture(autouse=True)
def _large_pictures(monkeypatch):
    import coco_sets

    monkeypatch.setattr(coco_sets, "WIDE", BIG)
    monkeypatch.setattr(coco_sets, "HIGH", BIG)


def about_masks(found):
    return {row.id: row for row in found.findings if row.part == "train"}


@pytest.mark.parametrize("case", RIGHT)
def test_a_right_area_is_kept_and_its_mask_too(case, tmp_path) -> None:
    polygons, area, box = RIGHT[case]
    found = looked_at(tmp_path, polygons, area, box)
    objects = found.train.objects(0)
    assert objects.areas.tolist() == [area]
    assert len(objects.segmentations[0]) == len(polygons)
    assert not {"D13", "D8", "R76"} & about_masks(found).keys(), found.findings.table()


@pytest.mark.parametrize("case", RIGHT)
def test_a_wrong_or_missing_area_becomes_what_the_mask_covers(case, tmp_path) -> None:
    polygons, area, box = RIGHT[case]
    for given in (None, 7 * area, area / 7):
        found = looked_at(tmp_path / str(given), polygons, given, box)
        assert about_masks(found)["D13"].count == 1
        assert found.train.objects(0).areas[0] == pytest.approx(area, rel=0.05)


@pytest.mark.parametrize("polygon", [[10, 10, 10, 40, 10, 20], [9, 9, 19, 19, 29, 29], [9, 9, 19, 9, 29, 9]])
def test_a_polygon_that_covers_no_pixel_has_no_area(polygon, tmp_path) -> None:
    found = looked_at(tmp_path, [polygon], 100, [9, 9, 10, 10])
    assert about_masks(found)["R76"].what == "polygons that have no area"
    assert found.train.objects(0).segmentations == [None]


def test_without_the_library_that_draws_a_given_area_is_left_alone_and_that_is_said(tmp_path, monkeypatch) -> None:
    for module in (outlines, check):
        monkeypatch.setattr(module, "can_draw", lambda: False)
    monkeypatch.setitem(sys.modules, "faster_coco_eval", None)
    for case, (polygons, area, box) in RIGHT.items():
        found = looked_at(tmp_path / case, polygons, area, box)
        row = about_masks(found)["D13"]
        assert row.count == 1
        assert "left as it is given; pip install 'lambdanets[detection]'" in row.action
        assert found.train.objects(0).areas.tolist() == [area]
        assert found.train.has_masks
        unknown = looked_at(tmp_path / f"{case} unknown", polygons, None, box).train.objects(0).areas
        assert np.isfinite(unknown).all()
        assert unknown[0] <= box[2] * box[3]
