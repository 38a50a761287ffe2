"""Average precision against pycocotools, what it refuses, the kinds of errors, and the results that others read."""

import contextlib
import io
import json
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pycocotools.mask
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from lambdanets.detection.masks import encode
from lambdanets.detection.mistakes import ERROR_KINDS, errors
from lambdanets.detection.precision import Detected, average_precision, detections_json, shown
from lambdanets.errors import BadData

SIZES = ("small", "medium", "large")
NAMES = ["ap", "ap50", "ap75", *(f"ap_{s}" for s in SIZES), "ar1", "ar10", "ar100", *(f"ar_{s}" for s in SIZES)]


class Category(NamedTuple):
    id: int
    name: str


class Set:
    """A COCO file in memory, with what a CocoImages has of it."""

    def __init__(self, truth):
        self.truth = truth
        pictures = sorted(truth["images"], key=lambda one: one["id"])
        self.categories = tuple(
            Category(one["id"], one["name"]) for one in sorted(truth["categories"], key=lambda c: c["id"])
        )
        self.image_ids = np.array([one["id"] for one in pictures], np.int64)
        self.sizes = np.array([(one["height"], one["width"]) for one in pictures], np.int32).reshape(-1, 2)
        self.names = [f"{one['id']}.png" for one in pictures]
        self.label_of = {category.id: label for label, category in enumerate(self.categories, 1)}

    def objects(self, index):
        of = [one for one in self.truth["annotations"] if one["image_id"] == self.image_ids[index]]
        boxes = np.array([one["bbox"] for one in of], float).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        return SimpleNamespace(
            ids=np.array([one["id"] for one in of], np.int64),
            labels=np.array([self.label_of[one["category_id"]] for one in of], np.int64),
            boxes=boxes,
            crowd=np.array([one["iscrowd"] for one in of], bool),
            areas=np.array([one["area"] for one in of], float),
            segmentations=[self._shape(one.get("segmentation")) for one in of],
        )

    @staticmethod
    def _shape(given):
        if isinstance(given, list):
            return [np.array(polygon, float).reshape(-1, 2) for polygon in given]
        return given and given["counts"].encode()


def shape_in(draw, height, width):
    """A ring, a box or noise, as bits; sides and corners in whole and quarter pixels, so that overlaps tie."""
    bits = np.zeros((height, width), bool)
    y, x = int(draw.integers(height - 4)), int(draw.integers(width - 4))
    h, w = int(draw.integers(2, height - y + 1)), int(draw.integers(2, width - x + 1))
    if draw.random() < 0.5:  # small ones, or all would be large
        h, w = min(h, 20), min(w, 20)
    bits[y : y + h, x : x + w] = draw.random((h, w)) < 0.9 if draw.random() < 0.3 else True
    if draw.random() < 0.4:
        bits[y + h // 3 : y + h // 2 + 1, x + w // 3 : x + w // 2 + 1] = False
    bits[y, x] = True
    return bits


def as_json(bits):
    return {"size": list(bits.shape), "counts": encode(bits).decode()}


def box_of(bits):
    rows, columns = np.flatnonzero(bits.any(1)), np.flatnonzero(bits.any(0))
    return [int(v) for v in (columns[0], rows[0], columns[-1] + 1 - columns[0], rows[-1] + 1 - rows[0])]


def random_set(seed):
    """A set and detections near its objects: crowds, ties, holes, polygons, pictures and classes without objects."""
    draw = np.random.default_rng(seed)
    classes = int(draw.integers(1, 5))
    category_ids = sorted(draw.choice(90, classes, replace=False).tolist())
    pictures, annotations, detected = [], [], []
    for image_id in sorted(draw.choice(10**6, int(draw.integers(2, 9)), replace=False).tolist()):
        height, width = (int(side) for side in draw.integers(20, 200, 2))
        pictures.append({"id": image_id, "height": height, "width": width, "file_name": f"{image_id}.png"})
        boxes, labels, scores, masks = [], [], [], []
        for _ in range(int(draw.integers(0, 8))):
            bits, label = shape_in(draw, height, width), int(draw.integers(classes))
            x, y, w, h = box = box_of(bits)
            polygon = draw.random() < 0.3
            crowd = not polygon and draw.random() < 0.2
            outline = [[x, y, x + w, y, x + w, y + h, x, y + h]] if polygon else as_json(bits)
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": category_ids[label],
                    "bbox": box,
                    "area": w * h if polygon else int(bits.sum()),
                    "iscrowd": int(crowd),
                    "segmentation": outline,
                }
            )
            for _ in range(int(draw.integers(0, 4))):  # near it, some of another class, with scores that tie
                shift = draw.integers(-3, 4, 2)
                moved = np.roll(bits, shift, (0, 1))
                boxes.append(
                    box_of(moved) if draw.random() < 0.7 else (np.array(box) + draw.integers(0, 9, 4) / 4).tolist()
                )
                labels.append(label + 1 if draw.random() < 0.8 else int(draw.integers(1, classes + 1)))
                scores.append(round(draw.random(), 1))
                masks.append(encode(moved))
        if labels or draw.random() < 0.5:
            corners = np.array(boxes, float).reshape(-1, 4)
            corners[:, 2:] += corners[:, :2]
            detected.append(Detected(image_id, corners, np.array(labels, np.int64), np.array(scores, float), masks))
    categories = [{"id": i, "name": f"class {i}"} for i in category_ids]
    return Set({"images": pictures, "annotations": annotations, "categories": categories}), detected


def pycocotools_numbers(images, results, kind, keep=None):
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = json.loads(json.dumps(images.truth))
        truth.createIndex()
        found = truth.loadRes(results) if results else COCO()
        if not results:
            found.dataset = {"images": truth.dataset["images"], "annotations": [], "categories": []}
            found.createIndex()
        evaluation = COCOeval(truth, found, kind)
        if keep:
            evaluation.params.maxDets = keep
        evaluation.evaluate()
        evaluation.accumulate()
        if keep:
            return evaluation.eval
        evaluation.summarize()
    return evaluation.stats


def with_objects(seed):
    images, detected = random_set(seed)
    if all(one["iscrowd"] for one in images.truth["annotations"]):
        return with_objects(seed + 1000)
    return images, detected


@pytest.mark.parametrize("seed", range(50))
def test_the_12_numbers_are_those_that_pycocotools_gives_of_our_results_file(seed, capfd):
    images, detected = with_objects(seed)
    for kind in ("bbox", "segm"):
        results = json.loads(json.dumps(detections_json(images, detected, kind)))
        expected = pycocotools_numbers(images, results, kind)
        found = average_precision(images, detected, kind)
        assert list(found.numbers) == NAMES
        assert list(found.numbers.values()) == pytest.approx(expected, abs=1e-12)
    assert capfd.readouterr() == ("", "")  # the library prints nothing


def test_the_50_sets_have_what_makes_them_hard():
    sets = [with_objects(seed) for seed in range(50)]
    annotations = [one for images, _ in sets for one in images.truth["annotations"]]
    assert sum(one["iscrowd"] for one in annotations) > 50
    assert sum(isinstance(one["segmentation"], list) for one in annotations) > 100
    assert any(len({one["image_id"] for one in s.truth["annotations"]}) < len(s.image_ids) for s, _ in sets)
    assert any(len(d) < len(s.image_ids) for s, d in sets)
    assert any(len(set(one.scores.tolist())) < len(one.scores) for _, d in sets for one in d)
    aps = [average_precision(*both).ap for both in sets]
    assert 0.1 < np.mean(aps) < 0.9
    assert len(set(aps)) > 40


def one_class(boxes, sizes=(100, 100), **more):
    """One picture with objects of class "cat" (id 7), which are boxes and polygons."""
    annotations = [
        {
            "id": i,
            "image_id": 3,
            "category_id": 7,
            "iscrowd": 0,
            "bbox": [x, y, w, h],
            "area": w * h,
            "segmentation": [[x, y, x + w, y, x + w, y + h, x, y + h]],
            **more,
        }
        for i, (x, y, w, h) in enumerate(boxes)
    ]
    pictures = [{"id": 3, "height": sizes[0], "width": sizes[1]}]
    return Set({"images": pictures, "annotations": annotations, "categories": [{"id": 7, "name": "cat"}]})


def found(boxes, scores=None, labels=None, size=(100, 100), image_id=3):
    corners = np.array(boxes, float).reshape(-1, 4)
    corners[:, 2:] += corners[:, :2]
    masks = []
    for x0, y0, x1, y1 in corners.astype(int):
        bits = np.zeros(size, bool)
        bits[y0:y1, x0:x1] = True
        masks.append(encode(bits))
    n = len(corners)
    return Detected(
        image_id,
        corners,
        np.array(labels if labels else [1] * n, np.int64),
        np.array(scores if scores else [0.9] * n, float),
        masks,
    )


BOXES = [(5, 5, 10, 10), (20, 20, 40, 50), (70, 70, 20, 20)]


@pytest.mark.parametrize("kind", ["bbox", "segm"])
def test_perfect_detections_have_1_none_have_0_and_a_size_without_objects_has_minus_1(kind):
    images = one_class(BOXES)
    perfect, none = average_precision(images, [found(BOXES)], kind), average_precision(images, [], kind)
    for name in NAMES:
        expected = {"ap_large": (-1, -1), "ar_large": (-1, -1), "ar1": (1 / 3, 0)}.get(name, (1, 0))
        assert (perfect.numbers[name], none.numbers[name]) == pytest.approx(expected, abs=1e-12), name
    assert average_precision(images, [found([])], kind) == none
    assert perfect.curve == pytest.approx([1.0] * 101)
    assert shown(perfect.numbers["ap_large"]) == "no such objects"
    assert perfect.json()["ap_large"] is None
    assert json.loads(json.dumps(perfect.json()))["by_class"][0]["name"] == "cat"


def test_a_class_has_its_own_number_beside_how_many_objects_and_images_it_has():
    images, detected = with_objects(3)
    rows = average_precision(images, detected).by_class
    assert [(row.name, row.id) for row in rows] == [(c.name, c.id) for c in images.categories]
    of = [one for one in images.truth["annotations"] if not one["iscrowd"]]
    for row in rows:
        mine = [one for one in of if one["category_id"] == row.id]
        assert (row.objects, row.images) == (len(mine), len({one["image_id"] for one in mine}))
        assert (row.ap == -1) == (not mine)
    known = [row.ap for row in rows if row.objects]
    assert average_precision(images, detected).ap == pytest.approx(np.mean(known))


def test_more_detections_than_100_are_counted_at_1_10_and_that_many_and_labelled_so():
    boxes = [(x, y, 6, 6) for x in range(0, 130, 8) for y in range(0, 120, 8)]
    images = one_class(boxes, (130, 140))
    detected = [found(boxes, np.linspace(1, 0.1, len(boxes)).tolist(), size=(130, 140))]
    at_300 = average_precision(images, detected, max_detections=300)
    assert at_300.numbers["ar300"] == at_300.ap == pytest.approx(1)
    assert "ar100" not in at_300.numbers
    assert at_300.json()["max_detections"] == [1, 10, 300]
    for one in images.truth["annotations"]:
        one["id"] += 1  # pycocotools takes an object of id 0 for one not found
    theirs = pycocotools_numbers(images, detections_json(images, detected), "bbox", [1, 10, 300])
    assert at_300.ap == pytest.approx(theirs["precision"][..., 0, 2].mean(), abs=1e-12)
    at_100 = average_precision(images, detected)
    assert at_100.numbers["ar100"] == pytest.approx(100 / len(boxes)) != 1
    with pytest.raises(ValueError, match="max_detections=10: more than 10"):
        average_precision(images, detected, max_detections=10)


def test_a_set_without_objects_has_no_precision_and_says_which_classes_and_pictures():
    for images in (one_class([]), one_class(BOXES, iscrowd=1, segmentation=None)):
        with pytest.raises(BadData, match=r"1 images have no object of the classes cat .*3\.png"):
            average_precision(images, [found(BOXES)])
    with pytest.raises(BadData, match="no object with a mask"):
        average_precision(one_class(BOXES, segmentation=None), [found(BOXES)], "segm")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ([found(BOXES, image_id=4)], r"1 image ids with detections are not in the set: 4 \(its ids are 3\)"),
        ([found(BOXES), found(BOXES)], "1 images have their detections twice: 3"),
        ([found(BOXES, labels=[1, 2, 0])], "image id 3: labels 0, 2 are no classes of the set: 1 to 1 are cat"),
        ([found(BOXES)._replace(scores=np.ones(2))], "image id 3: 3 labels"),
        ([found(BOXES)._replace(masks=[])], "0 masks are not of one length"),
        ([found(BOXES)._replace(scores=np.full(3, np.nan))], "image id 3: a score or a box is not finite"),
        ([found(BOXES)._replace(masks=None)], "image id 3: 3 detections have no masks"),
    ],
)
def test_detections_of_another_set_are_refused_by_name(wrong, message):
    for judge in (average_precision, errors, detections_json):
        with pytest.raises(ValueError, match=message):
            judge(one_class(BOXES), wrong, "segm")


def test_an_object_without_a_mask_is_found_as_a_box_and_passed_over_as_a_mask():
    images = one_class(BOXES)
    del images.truth["annotations"][0]["segmentation"]
    assert average_precision(images, [found(BOXES)], "segm").ap == pytest.approx(1)
    assert average_precision(images, [found(BOXES[1:])], "segm").ap == pytest.approx(1)
    assert average_precision(images, [found(BOXES[1:])], "bbox").ap < 0.9


@pytest.mark.parametrize("kind", ["bbox", "segm"])
def test_ids_below_0_and_of_16_digits_change_no_number_and_come_back_in_the_results(kind):
    plain, found = with_objects(3)
    ids = plain.image_ids.tolist()
    # The order stays, since it decides ties of equal scores.
    other = dict(zip(ids, np.linspace(-9, 2**53 - 1, len(ids)).astype(np.int64).tolist(), strict=True))
    truth = json.loads(json.dumps(plain.truth))
    for row in truth["images"]:
        row["id"] = other[row["id"]]
    for row in truth["annotations"]:
        row["image_id"] = other[row["image_id"]]
    images, detected = Set(truth), [one._replace(image_id=other[one.image_id]) for one in found]
    assert average_precision(images, detected, kind) == average_precision(plain, found, kind)
    named = {row["image_id"] for row in detections_json(images, detected, kind)}
    assert named <= set(other.values())
    assert -9 in images.image_ids


def test_one_results_file_serves_boxes_and_masks_in_order_with_the_data_sets_own_ids():
    images, detected = with_objects(5)
    results = json.loads(json.dumps(detections_json(images, detected)))
    order = [(one["image_id"], -one["score"]) for one in results]
    assert order == sorted(order)
    assert {one["category_id"] for one in results} <= {c.id for c in images.categories}
    for kind in ("bbox", "segm"):
        expected = pycocotools_numbers(images, json.loads(json.dumps(results)), kind)
        numbers = average_precision(images, detected, kind).numbers
        of_all_sizes = [i for i, name in enumerate(NAMES) if kind == "bbox" or name[3:] not in SIZES]
        assert [numbers[NAMES[i]] for i in of_all_sizes] == pytest.approx(expected[of_all_sizes].tolist(), abs=1e-12)
    assert all(pycocotools.mask.area(one["segmentation"]) > 0 for one in results)


# ---- errors

TWO = [(0, 0, 20, 20), (50, 50, 20, 20)]


def two_classes():
    """A cat at each place of TWO, a dog at (0, 60)."""
    images = one_class([*TWO, (0, 60, 20, 20)])
    images.truth["annotations"][2]["category_id"] = 8
    images.truth["categories"].append({"id": 8, "name": "dog"})
    return Set(images.truth)


@pytest.mark.parametrize("kind", ["bbox", "segm"])
@pytest.mark.parametrize(
    ("box", "label", "expected"),
    [
        ((0, 0, 20, 20), 1, {"duplicate": 1}),
        ((50, 50, 20, 20), 2, {"class": 1, "missed": -1}),
        ((50, 58, 20, 20), 1, {"place": 1, "missed": -1}),
        ((50, 58, 20, 20), 2, {"both": 1}),
        ((80, 0, 20, 20), 1, {"background": 1}),
        ((50, 50, 20, 20), 1, {"missed": -1}),
    ],
)
def test_each_kind_of_error_is_told_from_the_others(kind, box, label, expected):
    boxes, labels = [TWO[0], box], [1, label]
    result = errors(two_classes(), [found(boxes, [0.9, 0.8], labels)], kind, score=0.5)
    assert result.counts == {**dict.fromkeys(ERROR_KINDS, 0), **expected, "missed": 2 + expected.get("missed", 0)}
    assert result.correct == (2 if expected == {"missed": -1} else 1)
    assert result.objects == 3


def test_what_lies_in_a_crowd_of_its_class_counts_neither_way():
    images = two_classes()
    images.truth["annotations"][1] |= {"iscrowd": 1}
    result = errors(images, [found([TWO[0], (52, 52, 5, 5)], [0.9, 0.8])], score=0.5)
    assert sum(result.counts.values()) == result.counts["missed"] == 1
    assert result.objects == 2
    assert result.by_image == {3: pytest.approx(2 / 3)}


def test_the_best_score_is_in_the_middle_of_where_f1_is_highest_and_is_used():
    detected = [found([*TWO, (80, 0, 20, 20)], [0.9, 0.6, 0.3])]
    result = errors(one_class(TWO), detected)
    assert result.best_score == result.score == pytest.approx(0.45)
    assert result.f1[45] == 1
    assert result.f1[20] == pytest.approx(0.8)
    assert result.f1[80] == pytest.approx(2 / 3)
    assert result.f1[95] == 0
    assert result.counts["background"] == 0 == result.counts["missed"]
    assert errors(one_class(TWO), detected, score=0.2).counts["background"] == 1
    assert json.loads(json.dumps(result.json()))["best_score"] == 0.45


def test_the_worst_pictures_come_first_and_pictures_without_objects_are_right_when_nothing_is_found():
    images = one_class(TWO)
    for image_id in (4, 5, 6):
        images.truth["images"].append({"id": image_id, "height": 100, "width": 100})
        images.truth["annotations"] += [
            {**a, "image_id": image_id} for a in images.truth["annotations"][:2] if image_id == 4
        ]
    images = Set(images.truth)
    result = errors(images, [found(TWO[:1]), found(TWO, image_id=4), found(TWO, image_id=6)], score=0.5)
    assert result.by_image == {3: pytest.approx(2 / 3), 4: 1, 5: 1, 6: 0}
    assert result.worst(2) == [6, 3]


def test_no_detections_at_all_miss_every_object():
    result = errors(two_classes(), [])
    assert result.counts == {**dict.fromkeys(ERROR_KINDS, 0), "missed": 3}
    assert max(result.f1) == 0


@pytest.mark.parametrize("seed", range(10))
def test_correct_detections_are_those_that_pycocotools_matches_at_iou_50(seed):
    images, detected = with_objects(seed)
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = json.loads(json.dumps(images.truth))
        truth.createIndex()
        evaluation = COCOeval(truth, truth.loadRes(detections_json(images, detected, "segm")), "segm")
        evaluation.evaluate()
    of_all_sizes = [one for one in evaluation.evalImgs[:] if one and one["aRng"] == evaluation.params.areaRng[0]]
    matched = sum(int(((one["dtMatches"][0] > 0) & ~one["dtIgnore"][0].astype(bool)).sum()) for one in of_all_sizes)
    assert errors(images, detected, "segm", score=0).correct == matched
