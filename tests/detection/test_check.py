"""Every case that is known to bite becomes one finding with its count, and what is done about it."""

import copy
import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from coco_sets import HIGH, WIDE, draw, held, pair, rectangle, write
from PIL import Image

from lambdanets.cli import main
from lambdanets.detection.check import Wishes
from lambdanets.detection.coco import CocoImages
from lambdanets.detection.findings import Finding
from lambdanets.detection.layouts import CocoData, look_at_coco, open_coco
from lambdanets.errors import BadData


def looked_at(at: Path, train, val=None, **more) -> CocoData:
    return look_at_coco(pair(at, train, val), **more)


def rows(found: CocoData, id: str, part: str = "train") -> list[Finding]:
    return [row for row in found.findings if row.id == id and row.part == part]


def only(found: CocoData, id: str, part: str = "train") -> Finding:
    (row,) = rows(found, id, part)
    return row


def change(*changes, n: int = 4) -> dict:
    """The small set, the first objects of it changed."""
    content = held(n)
    for at, new in enumerate(changes):
        content["annotations"][at].update(new)
    return content


def test_a_set_without_faults_has_no_findings(tmp_path) -> None:
    found = looked_at(tmp_path, held(), wishes=Wishes(all_headers=True, image_px=64, detections=100))
    assert not found.findings.rows, found.findings.table()
    assert found.train.n_objects == 8
    assert found.val.n_objects == 4


NAN, INF = float("nan"), float("inf")

# Of objects: id of the case, what the first objects are changed to, severity, count, and how many objects are left.
OBJECTS = {
    "no area": ("R71", [{"bbox": [1, 1, 0, 5]}, {"bbox": [9, 9, -3, 4]}], "dropped", 2, 6),
    "no box, no mask": ("R71", [{"bbox": None, "segmentation": []}], "dropped", 1, 7),
    "NaN": ("R72", [{"bbox": [NAN, 1, 5, 5]}, {"bbox": [1, 1, INF, 5]}], "error", 2, 6),
    "over the edge": ("R73", [{"bbox": [50, 10, 30, 20]}], "warning", 1, 8),
    "outside": ("R73", [{"bbox": [63.5, 10, 30, 20]}, {"bbox": [70, 10, 3, 3]}], "dropped", 2, 6),
    "crowd": ("R74", [{"iscrowd": 1}], "warning", 1, 7),
    "unknown category": ("R78", [{"category_id": 4}, {"category_id": 5}, {"category_id": 5}], "error", 3, 5),
    "unknown picture": ("R78", [{"image_id": 1000}], "error", 1, 7),
    "same id": ("R77", [{"id": 101}], "error", 1, 8),
    "empty polygon": ("R76", [{"segmentation": [[]]}], "dropped", 1, 8),
    "two points": ("R76", [{"segmentation": [[1, 2, 3, 4]]}, {"segmentation": [[1, 2, 3, 4]]}], "dropped", 2, 8),
    "odd": ("R76", [{"segmentation": [[1, 2, 3, 4, 5, 6, 7]]}], "dropped", 1, 8),
    "on a line": ("R76", [{"segmentation": [[1, 1, 2, 2, 3, 3]]}], "dropped", 1, 8),
    "NaN in a polygon": ("R76", [{"segmentation": [[1, 1, NAN, 2, 3, 9]]}], "dropped", 1, 8),
    "a polygon of 1e300": ("R76", [{"segmentation": [rectangle(0, 0, 1e300, 5)]}], "dropped", 1, 8),
    "an empty RLE": ("R76", [{"segmentation": {"size": [HIGH, WIDE], "counts": [HIGH * WIDE]}}], "dropped", 1, 8),
    "RLE of another size": ("R79", [{"segmentation": {"size": [5, 5], "counts": [10, 15]}}], "error", 1, 7),
    "no mask": ("D6", [{"segmentation": []}, {"segmentation": None}], "warning", 2, 8),
    "a flat list": ("D7", [{"segmentation": rectangle(2, 4, 20, 30)}], "warning", 1, 8),
    "box and mask apart": ("D8", [{"bbox": [40, 20, 10, 10], "area": 600}], "warning", 1, 8),
    "RLE too short": ("D9", [{"segmentation": {"size": [HIGH, WIDE], "counts": [5, 5]}}], "dropped", 1, 8),
    "RLE of rubbish": ("D9", [{"segmentation": {"size": [HIGH, WIDE], "counts": "~é\u0001ooo"}}], "dropped", 1, 8),
    "a hole": (
        "D10",
        [{"segmentation": [rectangle(2, 4, 20, 30), rectangle(8, 10, 5, 5)]}],
        "warning",
        1,
        8,
    ),
    "polygons as crowds": ("D11", [{"iscrowd": 1}, {"iscrowd": 1}], "warning", 2, 6),
    "area": ("D13", [{"area": None}, {"area": 5000}, {"area": 10}], "warning", 3, 8),
    "no box": ("D13", [{"bbox": None}], "warning", 1, 8),
    "no id": ("D14", [{"id": None}, {"id": 0}], "warning", 2, 8),
    "text for an id": ("D14", [{"image_id": "1"}, {"image_id": "1", "id": "101"}], "warning", 3, 8),
}


@pytest.mark.parametrize("case", OBJECTS)
def test_a_case_of_objects_is_counted_named_and_acted_upon(case, tmp_path) -> None:
    id, changes, severity, count, left = OBJECTS[case]
    found = looked_at(tmp_path, change(*changes))
    row = only(found, id)
    assert (row.severity, row.count) == (severity, count), found.findings.table()
    assert case.startswith("text") or row.names[0].startswith(("1.png", "image_id 1000")), row.names
    assert found.train.n_objects == left
    assert {other.id for other in found.findings} - {id} <= {"D13", "D11", "R74", "R75", "D8"}
    if severity == "error":
        with pytest.raises(BadData, match=id):
            open_coco(tmp_path)


def test_the_first_ten_names_are_shown_and_the_rest_counted(tmp_path) -> None:
    found = looked_at(tmp_path, change(*[{"bbox": [1, 1, 0, 5]}] * 13, n=10))
    row = only(found, "R71")
    assert row.count == 13
    assert len(row.names) == 10
    assert row.names[:2] == ("1.png #100", "1.png #101")
    assert "and 3 more" in found.findings.table()


def test_boxes_over_the_edge_are_clipped_and_a_missing_box_is_taken_around_the_mask(tmp_path) -> None:
    found = looked_at(tmp_path, change({"bbox": [50, 30, 30, 30]}, {"bbox": None}))
    assert found.train.objects(0).boxes.tolist() == [[50, 30, 64, 48], [5, 5, 25, 35]]


def test_a_missing_picture_is_an_error_or_left_out_on_request(tmp_path) -> None:
    pair(tmp_path, held())
    (tmp_path / "images/2.png").unlink()
    row = only(look_at_coco(tmp_path), "R70")
    assert (row.severity, row.count, row.names) == ("error", 1, ("2.png",))
    found = open_coco(tmp_path, wishes=Wishes(skip_missing=True))
    assert only(found, "R70").severity == "dropped"
    assert found.train.names == ["1.png", "3.png", "4.png"]
    assert found.train.n_objects == 6


def test_a_picture_without_objects_is_kept_and_a_file_without_any_is_refused(tmp_path) -> None:
    content = held()
    content["annotations"] = content["annotations"][:4]
    found = looked_at(tmp_path / "some", content)
    row = only(found, "R75")
    assert (row.severity, row.count, row.names) == ("warning", 2, ("3.png", "4.png"))
    empty = found.train.objects(3)
    assert empty.boxes.shape == (0, 4)
    assert empty.labels.shape == (0,)
    assert empty.segmentations == []
    content["annotations"] = []
    assert only(looked_at(tmp_path / "none", content), "R75").severity == "error"
    assert only(looked_at(tmp_path / "val", held(), content), "D18", "val").severity == "error"


def test_two_pictures_of_one_id_are_an_error_that_lists_both(tmp_path) -> None:
    content = held()
    content["images"][1]["id"] = 1
    row = only(looked_at(tmp_path, content), "R77")
    assert row.severity == "error"
    assert row.names == ("1.png", "2.png")


@pytest.mark.parametrize("name", ["../out.png", "a/../../out.png", "/etc/passwd", "a\0.png", "\ud800.png"])
def test_a_name_that_leads_out_of_the_folder_is_refused(name, tmp_path) -> None:
    pair(tmp_path, held())
    Image.new("RGB", (WIDE, HIGH)).save(tmp_path / "out.png")
    content = held()
    content["images"][0]["file_name"] = name
    write(tmp_path / "train.json", content)
    found = look_at_coco(tmp_path)
    assert only(found, "R80").severity == "error"
    assert name not in found.train.names


def test_wrong_sizes_are_found_in_the_headers_and_a_turned_picture_is_told_apart(tmp_path) -> None:
    content = held(5)
    content["images"][0].update(width=60)
    content["images"][1].update(width=HIGH, height=WIDE)
    content["images"][3].update(width=None, height=None)
    pair(tmp_path, content)
    turn = Image.Exif()
    turn[0x0112] = 6
    Image.new("RGB", (WIDE, HIGH)).save(tmp_path / "images/3.png", "JPEG", exif=turn)
    found = look_at_coco(tmp_path)
    wrong, filled = rows(found, "R79")
    assert (wrong.severity, wrong.names) == ("error", ("1.png (width x height: said 60 x 48, is 64 x 48)",))
    assert (filled.severity, filled.names) == ("warning", ("4.png",))
    before, swapped = rows(found, "D12")
    assert (before.severity, before.names) == ("error", ("3.png",))
    assert "EXIF" in before.what
    assert (swapped.severity, swapped.names) == ("error", ("2.png",))
    assert "no EXIF" in swapped.what
    assert found.train.names == ["4.png", "5.png"]
    assert found.train.sizes.tolist() == [[HIGH, WIDE]] * 2


def test_a_file_that_is_no_picture_is_a_warning_and_one_of_unknown_size_an_error(tmp_path) -> None:
    content = held()
    del content["images"][1]["width"]
    pair(tmp_path, content)
    (tmp_path / "images/1.png").write_bytes(b"rubbish")
    (tmp_path / "images/2.png").write_bytes(b"")
    found = look_at_coco(tmp_path)
    assert only(found, "R70").severity == "warning"
    assert only(found, "R70").names[0].startswith("1.png: ")
    assert only(found, "R79").severity == "error"
    assert only(found, "R79").names == ("2.png",)


def test_a_thousand_headers_are_read_unless_all_are_asked_for(tmp_path, monkeypatch) -> None:
    from lambdanets.detection import pictures

    monkeypatch.setattr(pictures, "HEADERS", 2)
    content = held(6)
    for picture in content["images"]:
        picture["width"] = 63
    pair(tmp_path, content)
    assert only(look_at_coco(tmp_path), "R79").count == 2
    assert "2 looked at" in only(look_at_coco(tmp_path), "R79").what
    assert only(look_at_coco(tmp_path, wishes=Wishes(all_headers=True)), "R79").count == 6


def test_a_picture_too_large_to_decode_is_an_error(tmp_path) -> None:
    content = held()
    content["images"][0].update(width=10**6, height=10**6)
    assert any("50,000,000" in row.what for row in rows(looked_at(tmp_path, content), "R79")) is False
    (tmp_path / "images/1.png").write_bytes(b"no header")
    assert any("50,000,000" in row.what for row in rows(look_at_coco(tmp_path), "R79"))


def test_categories_that_no_object_has_are_kept_and_counted(tmp_path) -> None:
    content = held()
    content["categories"].append({"id": 0, "name": "things"})
    found = looked_at(tmp_path, content, content)
    assert only(found, "D2").names == ("things",)
    assert found.train.classes == ("things", "cat", "dog")


@pytest.mark.parametrize("again", [{"id": 9, "name": "cat"}, {"id": 3, "name": "cow"}])
def test_a_category_whose_name_or_id_comes_twice_is_an_error(again, tmp_path) -> None:
    content = held()
    content["categories"].append(again)
    assert only(looked_at(tmp_path, content), "D3").severity == "error"


def test_boxes_written_as_two_corners_are_an_error_that_says_so(tmp_path) -> None:
    content = held(10)
    for row in content["annotations"]:
        x, y, w, h = row["bbox"]
        row["bbox"] = [x + 30, y + 10, x + 30 + w, y + 10 + h / 2]
    row = only(looked_at(tmp_path, content), "D4")
    assert row.severity == "error"
    assert "x0, y0, x1, y1" in row.what
    assert row.count == 20


def test_boxes_within_0_and_1_are_an_error_that_names_the_page(tmp_path) -> None:
    content = held()
    for row in content["annotations"]:
        row["bbox"] = [0.5, 0.5, 0.25, 0.25]
    row = only(looked_at(tmp_path, content), "D5")
    assert row.severity == "error"
    assert "docs/detection.md" in row.action


def test_a_set_without_any_mask_says_so_and_has_none(tmp_path) -> None:
    content = held()
    for row in content["annotations"]:
        row["segmentation"] = []
    found = looked_at(tmp_path, content)
    assert "--boxes-only" in only(found, "D6").action
    assert not found.train.has_masks
    assert found.val.has_masks


def test_the_same_picture_in_both_parts_is_found_by_its_content(tmp_path) -> None:
    pair(tmp_path, held())
    (tmp_path / "images/50.png").write_bytes((tmp_path / "images/3.png").read_bytes())
    row = only(look_at_coco(tmp_path), "D15", "")
    assert (row.severity, row.count, row.names) == ("warning", 1, ("3.png = 50.png",))


def test_small_objects_propose_a_larger_image_px(tmp_path) -> None:
    content = held()
    for row in content["annotations"][:5]:
        row.update(bbox=[1, 1, 4, 4], segmentation=[rectangle(1, 1, 4, 4)], area=16)
    row = only(looked_at(tmp_path, content, wishes=Wishes(image_px=64)), "D16")
    assert row.count == 5
    assert "--image-px 128" in row.action
    assert not rows(looked_at(tmp_path, content, wishes=Wishes(image_px=128)), "D16")


def test_more_objects_than_detections_are_said(tmp_path) -> None:
    row = only(looked_at(tmp_path, held(2, per_picture=5), wishes=Wishes(detections=4)), "D17")
    assert row.count == 2
    assert "--detections 5" in row.action


def test_all_errors_are_shown_together(tmp_path) -> None:
    content = change({"bbox": [NAN, 1, 1, 1]}, {"category_id": 99})
    content["images"][3]["file_name"] = "../4.png"
    with pytest.raises(BadData) as error:
        open_coco(pair(tmp_path, content))
    assert all(id in str(error.value) for id in ("R72", "R78", "R80"))


# ---- the command


def test_check_prints_the_table_and_answers_2_where_there_is_an_error(tmp_path, capsys) -> None:
    assert main(["check", str(pair(tmp_path / "good", held()))]) == 0
    assert "0 errors, 0 other findings" in capsys.readouterr().out
    assert main(["check", str(pair(tmp_path / "bad", change({"bbox": [NAN, 1, 1, 1]})))]) == 2
    out = capsys.readouterr().out
    assert "error   R72  train: 1 object with a box that is NaN" in out
    assert "1.png #100" in out
    assert main(["check"]) == 2
    assert "DATA or --annotations" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # pycocotools' own
def test_fix_writes_a_copy_that_pycocotools_reads_and_check_finds_nothing_in(tmp_path, capsys) -> None:
    from pycocotools.coco import COCO

    square = {"size": [HIGH, WIDE], "counts": [HIGH * 4, HIGH * 8, HIGH * (WIDE - 12)]}
    content = change(
        {"bbox": [NAN, 1, 1, 1]},
        {"category_id": 99},
        {"id": 103},
        {"bbox": [4, 0, 8, HIGH], "segmentation": square, "area": HIGH * 8, "iscrowd": 1},
        {"segmentation": rectangle(2, 8, 20, 30)},
    )
    content["images"][3]["file_name"] = "../4.png"
    assert main(["check", str(pair(tmp_path / "bad", content)), "--fix", str(tmp_path / "good")]) == 0
    assert main(["check", str(tmp_path / "good")]) == 0
    assert "0 errors" in capsys.readouterr().out
    found = COCO(tmp_path / "good/annotations/instances_train.json")
    assert sorted(found.imgs) == [2, 3]  # the first lost both of its objects
    assert sorted(found.cats) == [3, 7]
    assert sorted(found.anns) == [103, 104, 105, 108]  # a made id is none that the file has
    crowd = next(row for row in found.anns.values() if row["iscrowd"])
    assert found.annToMask(crowd).sum() == HIGH * 8
    assert found.annToMask(crowd)[:, 4:12].all()
    kept = open_coco(tmp_path / "good").train
    before = look_at_coco(tmp_path / "bad").train
    assert kept.names == before.names
    assert kept.fingerprint() == before.fingerprint()
    assert kept.load(0).size == (WIDE, HIGH)
    assert main(["check", str(tmp_path / "bad"), "--fix", str(tmp_path / "good")]) == 2
    assert "not empty" in capsys.readouterr().err


def test_fix_keeps_one_file_one_so_that_the_same_pictures_are_held_out(tmp_path) -> None:
    draw(tmp_path / "a/images", held(30))
    write(tmp_path / "a/all.json", held(30))
    assert main(["check", str(tmp_path / "a"), "--fix", str(tmp_path / "b")]) == 0
    assert open_coco(tmp_path / "b").val.names == open_coco(tmp_path / "a").val.names


def test_what_leaving_out_cannot_mend_is_not_written(tmp_path, capsys) -> None:
    content = held()
    content["categories"].append({"id": 9, "name": "cat"})
    assert main(["check", str(pair(tmp_path / "bad", content)), "--fix", str(tmp_path / "good")]) == 2
    assert "D3" in capsys.readouterr().err
    assert not (tmp_path / "good").exists()


# ---- files of strangers

VALUES = [None, True, -1, 10**400, 1e999, "x", "1", [], [[]], [[[[1]]]], {}, {"image_id": 1}, {"size": 3}]
PLACES = [
    (),
    ("images",),
    ("images", 0),
    *(("images", 0, key) for key in ("id", "file_name", "width", "height")),
    ("annotations",),
    ("annotations", 0),
    *(("annotations", 0, key) for key in ("id", "image_id", "category_id", "bbox", "area", "iscrowd", "segmentation")),
    ("annotations", 0, "bbox", 1),
    ("annotations", 0, "segmentation", 0),
    ("annotations", 0, "segmentation", 0, 3),
    ("categories",),
    ("categories", 0),
    ("categories", 0, "id"),
    ("categories", 0, "name"),
]


@pytest.mark.parametrize("place", PLACES, ids=lambda place: ".".join(map(str, place)) or "all")
def test_no_value_in_any_place_gives_another_error_than_bad_data(place, tmp_path) -> None:
    draw(tmp_path / "images", held())
    refused = 0
    for value in VALUES:
        content = copy.deepcopy(held())
        if place:
            inside = content
            for key in place[:-1]:
                inside = inside[key]
            inside[place[-1]] = value
        else:
            content = value
        file = write(tmp_path / "all.json", json.dumps(content))
        try:
            found = look_at_coco(None, annotations=file)
        except BadData as error:
            refused += 1
            assert str(file) in str(error)
            assert "Traceback" not in str(error)
        else:
            for part in (found.train, found.val):
                assert all(np.isfinite(part.objects(i).boxes).all() for i in range(len(part)))
    assert refused >= 2


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "line 1, column 1"),
        (b'{"images": [', "line 1, column 13"),
        (b"\xff\xfe{}", "not UTF-8 at byte 0"),
        (b'{"a": ' * 100_000, "nested"),
        (b"[" * 100_000, "nested"),
        (b'{"images": ' + b"9" * 5000 + b"}", "cannot be read"),
        (b"[1, 2]", "a list of 2"),
        (b'{"info": {}}', "its 'images' is missing or null"),
        (b'{"images": [], "annotations": [], "categories": []}', "images is empty"),
    ],
    ids=lambda value: value[:20] if isinstance(value, str) else "",
)
def test_what_is_no_coco_file_is_refused_with_its_first_wrong_place(content, says, tmp_path) -> None:
    (tmp_path / "all.json").write_bytes(content)
    with pytest.raises(BadData, match=says) as error:
        look_at_coco(None, annotations=tmp_path / "all.json")
    assert len(str(error.value)) < 500


def test_the_first_wrong_place_is_named_by_its_position(tmp_path) -> None:
    content = change({}, {}, {"bbox": [1, 2, 3]}, {"bbox": "x"})
    content["info"] = {"image_id": 1, "bbox": "looks like an object, and is none"}
    file = write(tmp_path / "all.json", content)
    with pytest.raises(BadData, match=r"annotations\[2\]\.bbox is a list of 3: expected four numbers"):
        look_at_coco(None, annotations=file)
    content["annotations"][2]["bbox"] = content["annotations"][3]["bbox"] = [2, 4, 20, 30]
    draw(tmp_path, content)
    assert look_at_coco(None, annotations=write(file, content)).findings.errors == []


def test_a_file_cut_anywhere_is_refused(tmp_path) -> None:
    text = json.dumps(held())
    for cut in range(0, len(text), len(text) // 40):
        file = write(tmp_path / "all.json", text[:cut])
        with pytest.raises(BadData, match="is no JSON"):
            look_at_coco(None, annotations=file)


def test_a_pipe_and_a_folder_are_no_coco_file(tmp_path) -> None:
    import os

    os.mkfifo(tmp_path / "pipe.json")
    for name in ("pipe.json", "", "missing.json"):
        with pytest.raises(BadData):
            look_at_coco(None, annotations=tmp_path / name, images=tmp_path)


def test_names_are_shown_without_control_characters(tmp_path, capsys) -> None:
    content = held()
    content["images"][0]["file_name"] = "\x1b[31mred.png"
    pair(tmp_path, content)
    (tmp_path / "images/\x1b[31mred.png").unlink()
    assert main(["check", str(tmp_path)]) == 2
    assert "\x1b" not in capsys.readouterr().out


def test_pictures_are_read_upright(tmp_path) -> None:
    found = looked_at(tmp_path, held())
    assert isinstance(found.train, CocoImages)
    assert found.train.load(0).size == (WIDE, HIGH)
    file = io.BytesIO()
    found.train.load(1).save(file, "PNG")
    assert found.train.load(1).getpixel((0, 0)) == (2, 0, 7)


def test_check_takes_any_file_and_the_classes_wanted_and_imports_no_torch(tmp_path) -> None:
    draw(tmp_path / "pictures", held(20))
    file = write(tmp_path / "labels.json", held(20))
    names = write(tmp_path / "names.txt", "dog\n")
    words = ["check", "--annotations", file, "--images-dir", tmp_path / "pictures", "--class-names", names]
    code = "import sys; from lambdanets.cli import main; print(main(sys.argv[1:]), 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, timeout=60)
    assert done.stdout.endswith("0 False\n"), done.stdout + done.stderr
    assert "20 objects of cat: left out" in done.stdout
    assert "of 1 class" in done.stdout
