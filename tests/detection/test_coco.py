"""A COCO file becomes a list of pictures with objects, wherever it lies and however its masks are written."""

import json
import pickle
import random
import tracemalloc

import numpy as np
import pytest
from coco_sets import HIGH, WIDE, draw, held, pair, rectangle, write
from hypothesis import given, settings
from hypothesis import strategies as st

from lambdanets.data.procedural import coco_shapes
from lambdanets.detection.annotations import read_annotations
from lambdanets.detection.check import Category
from lambdanets.detection.coco import CocoImages, write_clean
from lambdanets.detection.layouts import every_picture, is_coco, look_at_coco, open_coco, read_class_names
from lambdanets.detection.run_lengths import compressed, read_runs
from lambdanets.errors import BadData

# pycocotools' own, of NumPy 2
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


def one_file(at, content, **more) -> CocoImages:
    """All pictures of a file."""
    draw(at / "images", content)
    return look_at_coco(write(at / "all.json", content), **more).train.whole()


# ---- run lengths


def masks(n: int) -> list[np.ndarray]:
    draws = np.random.default_rng(7)
    found = [np.zeros((3, 4), np.uint8), np.ones((5, 1), np.uint8), np.ones((1, 6), np.uint8)]
    for _ in range(n):
        grain = draws.integers(1, 9, 2)
        coarse = (draws.random(draws.integers(1, 20, 2)) < draws.random()).astype(np.uint8)
        found.append(np.kron(coarse, np.ones(grain, np.uint8)))
    found.append(np.kron(np.eye(2, dtype=np.uint8), np.ones((700, 900), np.uint8)))  # runs of several digits
    return found


def test_run_lengths_and_boxes_equal_those_of_pycocotools_and_areas_the_pixels_of_300_masks() -> None:
    from pycocotools import mask as oracle

    drawn = masks(300)
    codes = [oracle.encode(np.asfortranarray(mask)) for mask in drawn]
    content = [code["counts"] for code in codes]
    runs = read_runs(np.frombuffer(b"".join(content), np.uint8), np.cumsum([0, *map(len, content)]))
    assert runs.sound.all()
    assert runs.sums().tolist() == [mask.size for mask in drawn]
    assert runs.areas().tolist() == [mask.sum() for mask in drawn]
    bounds = runs.bounds(np.array([len(mask) for mask in drawn]))
    for at, code in enumerate(codes):
        assert compressed(runs.lengths[runs.starts[at] : runs.starts[at + 1]]) == code["counts"]
        if drawn[at].any():
            x, y, w, h = oracle.toBbox(code)
            assert bounds[at].tolist() == [x, y, x + w, y + h]
        else:
            assert bounds[at, 2] < bounds[at, 0]


@given(st.lists(st.binary(max_size=12), max_size=6))
def test_bytes_that_are_no_run_lengths_are_not_sound_and_spoil_no_other(content) -> None:
    good = compressed(np.array([2, 3, 300, 7]))
    runs = read_runs(np.frombuffer(b"".join([*content, good]), np.uint8), np.cumsum([0, *map(len, [*content, good])]))
    assert runs.lengths[runs.starts[-2] :].tolist() == [2, 3, 300, 7]
    assert runs.sound[-1]
    assert (runs.lengths >= 0).all()
    assert len(runs.sound) == len(content) + 1
    for at, written in enumerate(content):
        if not written or any(not 48 <= byte < 112 for byte in written) or written[-1] - 48 & 32:
            assert not runs.sound[at]


def test_masks_are_the_same_however_they_are_written(tmp_path) -> None:
    from pycocotools import mask as oracle

    drawn = np.zeros((HIGH, WIDE), np.uint8)
    drawn[5:20, 8:30] = 1
    drawn[9:12, 12:20] = 0
    text = oracle.encode(np.asfortranarray(drawn))["counts"].decode()
    flat = drawn.T.ravel()
    ends = np.flatnonzero(np.diff(flat)) + 1
    numbers = np.diff([0, *ends, flat.size]).tolist()
    content = held()
    for at, counts in enumerate((text, numbers)):
        box, mask = [8, 5, 22, 15], {"size": [HIGH, WIDE], "counts": counts}
        content["annotations"][at].update(segmentation=mask, bbox=box, area=int(drawn.sum()))
    content["annotations"][2]["segmentation"] = [[[2, 4], [22, 4], [22, 34]], rectangle(30, 4, 5, 5)]
    found = one_file(tmp_path, content)
    assert found.objects(0).segmentations == [text.encode()] * 2
    points, other = found.objects(1).segmentations[0]
    assert points.dtype == np.float64
    assert points.tolist() == [[2, 4], [22, 4], [22, 34]]
    assert other.shape == (4, 2)


# ---- objects


def test_objects_come_in_the_files_order_with_its_ids_and_labels_from_1_in_the_order_of_ids(tmp_path) -> None:
    content = held()
    random.Random(0).shuffle(content["annotations"])
    found = one_file(tmp_path, content)
    assert found.categories == (Category(3, "cat"), Category(7, "dog"))
    assert found.classes == ("cat", "dog")
    assert found.image_ids.tolist() == [1, 2, 3, 4]
    assert len(found) == 4
    for at, id in enumerate(found.image_ids):
        rows = [row for row in content["annotations"] if row["image_id"] == id]
        objects = found.objects(at)
        assert objects.ids.tolist() == [row["id"] for row in rows]
        assert objects.labels.tolist() == [{3: 1, 7: 2}[row["category_id"]] for row in rows]
        boxes = [[x, y, x + w, y + h] for x, y, w, h in (row["bbox"] for row in rows)]
        assert objects.boxes.tolist() == boxes
        assert objects.boxes.dtype == np.float64
        assert objects.areas.tolist() == [600, 600]
        assert not objects.crowd.any()
        assert [polygon.ravel().tolist() for (polygon,) in objects.segmentations] == [
            row["segmentation"][0] for row in rows
        ]


@pytest.mark.parametrize("ids", [(0, 1), (90, 17), ("12", "3"), (7.0, -2)])
def test_category_ids_with_gaps_from_0_unsorted_or_as_text_become_labels(ids, tmp_path) -> None:
    content = held()
    content["categories"] = [{"id": ids[0], "name": "dog"}, {"id": ids[1], "name": "cat"}]
    for row in content["annotations"]:
        row["category_id"] = {7: ids[0], 3: ids[1]}[row["category_id"]]
    found = one_file(tmp_path, content)
    order = sorted([(int(ids[0]), "dog"), (int(ids[1]), "cat")])
    assert [tuple(category) for category in found.categories] == order
    assert [found.classes[label - 1] for label in found.objects(0).labels] == ["cat", "dog"]


def test_ids_as_text_match_and_missing_ones_are_made_unique_and_above_0(tmp_path) -> None:
    content = held()
    for row, id in zip(content["annotations"], [0, None, "5", 5000, 3, 0, 2, 1], strict=True):
        row.update(id=id, image_id=str(row["image_id"]))
    found = one_file(tmp_path, content)
    ids = np.concatenate([found.objects(i).ids for i in range(4)]).tolist()
    assert ids == [5001, 5002, 5, 5000, 3, 5003, 2, 1]


def test_a_part_travels_to_another_process_and_stays_what_it_is(tmp_path) -> None:
    found = open_coco(pair(tmp_path, held())).train
    again = pickle.loads(pickle.dumps(found))
    assert again.fingerprint() == found.fingerprint()
    assert again.load(1).tobytes() == found.load(1).tobytes()


CHANGES = {
    "a box": lambda c: c["annotations"][0].update(bbox=[2, 4, 20, 29]),
    "an area": lambda c: c["annotations"][0].update(area=599),
    "a label": lambda c: c["annotations"][0].update(category_id=7),
    "an id": lambda c: c["annotations"][0].update(id=1),
    "a crowd": lambda c: c["annotations"][0].update(iscrowd=1),
    "a point": lambda c: c["annotations"][0]["segmentation"][0].__setitem__(0, 2.01),
    "a mask": lambda c: c["annotations"][0].update(segmentation=[]),
    "points in two polygons": lambda c: c["annotations"][0].update(
        segmentation=[rectangle(2, 4, 20, 30)[:6], [2, 4, 22, 34, 2, 34]]
    ),
    "an object less": lambda c: c["annotations"].pop(),
    "a picture less": lambda c: c["images"].pop(3) and c["annotations"].__delitem__(slice(6, 8)),
    "a name": lambda c: c["images"][0].update(file_name="other.png"),
    "a picture's id": lambda c: [c["images"][3].update(id=9), *(r.update(image_id=9) for r in c["annotations"][6:])],
    "a category's name": lambda c: c["categories"][0].update(name="wolf"),
    "a category's id": lambda c: (
        [c["categories"][0].update(id=8)] + [r.update(category_id=8) for r in c["annotations"][1::2]]
    ),
}


@pytest.mark.parametrize("what", CHANGES)
def test_the_fingerprint_changes_with(what, tmp_path) -> None:
    content = held()
    before = one_file(tmp_path / "a", content).fingerprint()
    assert one_file(tmp_path / "b", content).fingerprint() == before
    CHANGES[what](content)
    assert one_file(tmp_path / "c", content).fingerprint() != before


def test_the_fingerprint_changes_with_run_lengths(tmp_path) -> None:
    content, prints = held(), set()
    for counts in ([500, 5, HIGH * WIDE - 505], [501, 5, HIGH * WIDE - 506]):
        content["annotations"][0]["segmentation"] = {"size": [HIGH, WIDE], "counts": counts}
        prints.add(one_file(tmp_path, content).fingerprint())
    assert len(prints) == 2


def test_the_stamp_changes_with_the_pictures(tmp_path) -> None:
    found = open_coco(pair(tmp_path, held())).train
    before = found.stamp()
    (tmp_path / "images/1.png").write_bytes(b"another picture")
    assert found.stamp()["sizes"] != before["sizes"]
    assert found.stamp()["times"] != before["times"]


def test_a_clean_copy_gives_the_same_objects(tmp_path) -> None:
    content = held()
    content["annotations"][0]["segmentation"] = {"size": [HIGH, WIDE], "counts": [200, 1300, HIGH * WIDE - 1500]}
    content["annotations"][1]["segmentation"] = []
    found = one_file(tmp_path, content)
    write_clean(found, tmp_path / "copy.json")
    copy = look_at_coco(None, annotations=tmp_path / "copy.json").train.whole()
    assert copy.fingerprint() == found.fingerprint()


def test_masks_of_a_million_numbers_take_their_bytes_and_little_more(tmp_path) -> None:
    content = held(10, per_picture=10)
    for row in content["annotations"]:
        row["segmentation"] = [[1.25, 2.5] * 5_000]
    file = write(tmp_path / "all.json", content)
    tracemalloc.start()
    try:
        read = read_annotations(file)
        kept, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert read.points.nbytes == 8_000_000
    assert kept < 10e6
    assert peak < 8e6 + 2.2 * file.stat().st_size + 2e6


# ---- layouts


def coco(at):
    for part, content in (("train", held()), ("val", held(2, first=50))):
        write(at / f"annotations/instances_{part}2017.json", content)
        draw(at / f"{part}2017", content)
    write(at / "annotations/captions_train2017.json", {"annotations": []})


def roboflow(at, name="valid"):
    for part, content in (("train", held()), (name, held(2, first=50))):
        write(at / part / "_annotations.coco.json", content)
        draw(at / part, content)


LAYOUTS = {
    "coco": coco,
    "roboflow": roboflow,
    "roboflow-val": lambda at: roboflow(at, "val"),
    "pair": lambda at: pair(at, held()),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_of_two_parts_is_recognised(layout, tmp_path) -> None:
    LAYOUTS[layout](tmp_path)
    assert is_coco(tmp_path)
    found = open_coco(tmp_path)
    assert found.train.names == ["1.png", "2.png", "3.png", "4.png"]
    assert found.val.names == ["50.png", "51.png"]
    assert ".json to train (4 pictures with 8 objects), " in found.how
    assert found.how.endswith(".json held out (2 pictures with 4 objects), of 2 classes")
    assert found.train.load(0).size == (WIDE, HIGH)
    held_out, how, _ = every_picture(tmp_path)
    assert held_out.names == ["50.png", "51.png"]
    assert "2 pictures" in how


@pytest.mark.parametrize("beside", ["images", ""])
@pytest.mark.parametrize("given_as", ["all.json", ""])
def test_of_one_file_alone_a_tenth_is_held_out(beside, given_as, tmp_path) -> None:
    write(tmp_path / "all.json", held(300))
    draw(tmp_path / beside, held(300))
    assert is_coco(tmp_path / given_as)
    found = open_coco(tmp_path / given_as)
    assert 15 <= len(found.val) <= 50
    assert len(found.train) + len(found.val) == 300
    assert not set(found.train.names) & set(found.val.names)
    assert "about a tenth of its pictures held out by a hash of (seed 0, image id)" in found.how
    assert len(every_picture(tmp_path)[0]) == 300


def test_the_split_depends_on_seed_and_image_id_alone_and_a_new_picture_moves_no_other(tmp_path) -> None:
    content = held(300)
    before = one_file(tmp_path / "a", content) and open_coco(tmp_path / "a/all.json").val
    more = held(301)
    random.Random(0).shuffle(more["images"])
    one_file(tmp_path / "b", more)
    after = open_coco(tmp_path / "b/all.json").val
    assert set(before.names) <= set(after.names) <= {*before.names, "301.png"}
    assert set(open_coco(tmp_path / "a/all.json", seed=1).val.names) != set(before.names)
    objects = {id for i in range(len(after)) for id in after.objects(i).ids.tolist()}
    assert len(objects) == after.n_objects == 2 * len(after)


def test_of_two_pictures_with_objects_one_is_held_out_and_of_one_none_can_be(tmp_path) -> None:
    one_file(tmp_path / "two", held(2))
    found = open_coco(tmp_path / "two")
    assert len(found.train) == len(found.val) == 1
    draw(tmp_path / "one/images", held(1))
    write(tmp_path / "one/all.json", held(1))
    with pytest.raises(BadData, match=r"D18.*none is left to hold out"):
        open_coco(tmp_path / "one")


def test_any_file_and_any_folder_of_pictures_can_be_named(tmp_path) -> None:
    file = write(tmp_path / "somewhere/labels.json", held(20))
    draw(tmp_path / "elsewhere", held(20))
    found = open_coco(None, annotations=file, images=tmp_path / "elsewhere")
    assert len(found.train) + len(found.val) == 20
    with pytest.raises(BadData, match="20 pictures that are missing: no picture was found below"):
        open_coco(None, annotations=file, images=tmp_path / "somewhere")
    with pytest.raises(BadData, match="no folder"):
        open_coco(None, annotations=file, images=tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("file", "prefix", "pictures"),
    [
        ("annotations/instances_default.json", "", "images"),  # CVAT
        ("result.json", "images/", "images"),  # Label Studio
        ("annotations/all.json", "", "."),
        ("labels.json", "", "."),
    ],
)
def test_a_file_as_tools_export_it_finds_its_pictures(file, prefix, pictures, tmp_path) -> None:
    content = held(20)
    draw(tmp_path / pictures, content)
    for picture in content["images"]:
        picture["file_name"] = prefix + picture["file_name"]
    write(tmp_path / file, content)
    assert is_coco(tmp_path)
    found = open_coco(tmp_path)
    assert len(found.train) + len(found.val) == 20


def test_two_years_at_once_are_coco_data_and_an_error_that_asks_which(tmp_path) -> None:
    for year in (2014, 2017):
        write(tmp_path / f"annotations/instances_train{year}.json", held())
    assert is_coco(tmp_path)
    with pytest.raises(BadData, match=r"instances_train2014.json, instances_train2017.json: which one"):
        open_coco(tmp_path)


OTHERS = {
    "LabelMe": ("a.json", '{"version": "5.0", "shapes": []}'),
    "Pascal VOC": ("Annotations/a.xml", "<annotation><object/></annotation>"),
    "YOLO": ("labels/train/a.txt", "0 0.5 0.5 0.25 0.25\n"),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_where_nothing_is_found_the_layouts_are_listed_and_another_format_named(kind, tmp_path) -> None:
    name, content = OTHERS[kind]
    write(tmp_path / name, content)
    assert not is_coco(tmp_path)
    with pytest.raises(BadData) as error:
        open_coco(tmp_path)
    text = str(error.value)
    for part in ("instances_{train,val}2017.json", "_annotations.coco.json", "DIR/images/", "one JSON file alone"):
        assert part in text
    assert f"files of {kind}" in text
    assert "pip install" in text
    assert f"found: {name.split('/')[0]}" in text


def test_class_folders_archives_and_urls_are_no_coco_data(tmp_path) -> None:
    draw(tmp_path / "cats", held())
    draw(tmp_path / "dogs", held())
    write(tmp_path / "notes.json", {"images": 3})
    assert not is_coco(tmp_path)
    assert not is_coco(None)
    assert not is_coco("pipe:cat x")
    assert not is_coco(tmp_path / "no")
    with pytest.raises(BadData, match="does not exist"):
        open_coco(tmp_path / "no")


# ---- classes


def test_other_ids_of_the_same_names_in_the_held_out_file_are_matched_by_name(tmp_path) -> None:
    val = held(2, first=50)
    val["categories"] = [{"id": 1, "name": "cat"}, {"id": 3, "name": "dog"}]
    for row in val["annotations"]:
        row["category_id"] = {3: 1, 7: 3}[row["category_id"]]
    found = open_coco(pair(tmp_path, held(), val))
    assert found.train.classes == found.val.classes == ("cat", "dog")
    assert found.val.categories == (Category(1, "cat"), Category(3, "dog"))
    assert found.val.objects(0).labels.tolist() == [1, 2]
    (row,) = [row for row in found.findings if row.id == "D3"]
    assert (row.severity, row.count, row.names) == ("warning", 2, ("cat", "dog"))


def test_a_class_that_the_held_out_file_lacks_keeps_its_label_and_one_that_training_lacks_is_an_error(tmp_path) -> None:
    val = held(2, first=50)
    val["categories"] = [{"id": 3, "name": "dog"}]
    for row in val["annotations"]:
        row["category_id"] = 3
    found = open_coco(pair(tmp_path / "a", held(), val))
    assert found.val.classes == ("cat", "dog")
    assert found.val.objects(0).labels.tolist() == [2, 2]
    assert found.val.categories == (Category(4, "cat"), Category(3, "dog"))  # 3 is dog there
    val["categories"][0]["name"] = "cow"
    with pytest.raises(BadData, match=r"D3 .*1 category of objects that the training file does not have"):
        open_coco(pair(tmp_path / "b", held(), val))


def test_class_names_choose_and_order_the_classes_and_what_is_left_out_is_counted(tmp_path) -> None:
    pair(tmp_path, held())
    swapped = open_coco(tmp_path, class_names=["dog", "cat"])
    assert swapped.train.objects(0).labels.tolist() == [2, 1]
    assert swapped.val.classes == ("dog", "cat")
    found = open_coco(tmp_path, class_names=["dog"])
    assert found.train.n_objects == 4
    assert found.train.objects(0).labels.tolist() == [1]
    left = [row for row in found.findings if row.id == "D1"]
    assert [(row.part, row.severity, row.count, row.what) for row in left] == [
        ("train", "dropped", 4, "objects of cat"),
        ("val", "dropped", 2, "objects of cat"),
    ]
    for names in (["cow"], [], ["cat", "cat"]):
        with pytest.raises(BadData, match=r"has no classes cow: it has cat, dog|expected one or more, each once"):
            open_coco(tmp_path, class_names=names)


def test_a_run_is_judged_by_the_classes_that_its_names_share_with_the_data(tmp_path) -> None:
    one_file(tmp_path, held())
    found, how, findings = every_picture(tmp_path, class_names=["cow", "dog"])
    assert found.categories == (Category(8, "cow"), Category(7, "dog"))
    assert found.objects(0).labels.tolist() == [2]
    assert "4 pictures with 4 objects" in how
    left, idle = findings
    assert (left.id, left.count) == ("D1", 4)
    assert (idle.id, idle.names) == ("D2", ("cow",))
    assert "--class-names" not in idle.action
    assert "4 objects of cat, which this run never learnt: not counted" in findings.table()
    with pytest.raises(BadData, match="none of the classes: its classes are dog, cat, those asked for cow"):
        every_picture(tmp_path, class_names=["cow"])


def test_class_names_are_read_from_lines(tmp_path) -> None:
    write(tmp_path / "names.txt", "\ufeffdog\r\n\n traffic light \n")
    assert read_class_names(tmp_path / "names.txt") == ["dog", "traffic light"]
    with pytest.raises(BadData, match="one a line"):
        read_class_names(tmp_path)


# ---- files of strangers


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_a_file_with_bytes_changed_gives_objects_that_are_sound_or_bad_data(data, tmp_path_factory) -> None:
    at = tmp_path_factory.getbasetemp() / "changed"
    content = held(2)
    content["annotations"][1]["segmentation"] = {"size": [HIGH, WIDE], "counts": "d2T2000"}
    text = bytearray(json.dumps(content).encode())
    if not at.is_dir():
        draw(at, content)
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(text) - 1))
        text[place : place + data.draw(st.integers(0, 3))] = data.draw(
            st.sampled_from(
                [b"9", b"-", b"e9", b"null", b"[", b"]", b"{", b'"', b",", b"1e400", b"\xff", b"NaN", b"\\"]
            )
        )
    (at / "all.json").write_bytes(text)
    try:
        found = look_at_coco(None, annotations=at / "all.json")
    except BadData as error:
        assert str(at / "all.json") in str(error)
        return
    for part in (found.train, found.val):
        part.fingerprint()
        for index, (high, wide) in enumerate(part.sizes.tolist()):
            objects = part.objects(index)
            assert (objects.labels >= 1).all()
            assert (objects.labels <= len(part.categories)).all()
            assert (objects.boxes >= 0).all()
            assert (objects.boxes <= [wide, high, wide, high]).all()
            assert (objects.boxes[:, 2:] > objects.boxes[:, :2]).all()
            assert (objects.ids > 0).all()
            for mask in objects.segmentations:
                if isinstance(mask, bytes):
                    runs = read_runs(np.frombuffer(mask, np.uint8), np.array([0, len(mask)]))
                    assert runs.sound.all()
                    assert runs.sums()[0] == high * wide
                elif mask is not None:
                    assert mask
                    assert all(np.isfinite(polygon).all() and len(polygon) >= 3 for polygon in mask)


def test_two_files_whose_names_start_in_their_own_folder_are_a_layout(tmp_path):
    """As labelme2coco writes them: train.json and val.json beside the folder of the pictures."""
    folder = coco_shapes(tmp_path / "shapes", images=4, split=1, image_px=64)
    (folder / "images").rename(folder / "pictures")
    for name in ("train.json", "val.json"):
        held = json.loads((folder / name).read_text())
        for picture in held["images"]:
            picture["file_name"] = f"pictures/{picture['file_name']}"
        (folder / name).write_text(json.dumps(held))
    assert is_coco(folder)
    found = open_coco(folder)
    assert (len(found.train), len(found.val)) == (3, 1)
    assert found.train.load(0).size == (64, 64)
