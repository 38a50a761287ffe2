"""What `check` leaves out and what it says: nothing silently, nothing twice, with what to do next."""

import pytest
from coco_sets import HIGH, WIDE, draw, held, pair, write
from PIL import Image

from lambdanets.cli import main
from lambdanets.detection.check import Wishes
from lambdanets.detection.layouts import every_picture, look_at_coco, open_coco, other_format
from lambdanets.errors import BadData

NAN = float("nan")


def change(*changes, n=4):
    content = held(n)
    for at, new in enumerate(changes):
        content["annotations"][at].update(new)
    return content


def table(found):
    return found.findings.table()


# ---- left out, and said


@pytest.mark.parametrize("gone", [{"bbox": [NAN, 1, 5, 5]}, {"bbox": [1, 1, 0, 5]}, {"bbox": [90, 1, 5, 5]}])
def test_pictures_that_lost_all_their_objects_are_left_out_and_named(gone, tmp_path, capsys) -> None:
    content = change(gone, gone, {}, gone)
    content["annotations"] = content["annotations"][:6]  # the fourth has none, and never had
    found = look_at_coco(pair(tmp_path / "bad", content))
    assert found.train.names == ["2.png", "3.png", "4.png"]
    assert "1 picture that lost all its objects to rows above: left out" in table(found)
    assert "1 picture without objects: kept" in table(found)
    main(["check", str(tmp_path / "bad"), "--fix", str(tmp_path / "good")])
    assert capsys.readouterr().out.splitlines()[-1] == "left out: 1 picture, 3 objects"
    assert open_coco(tmp_path / "good").train.names == found.train.names


def test_a_picture_whose_objects_are_of_classes_that_were_not_asked_for_is_one_without_objects(tmp_path) -> None:
    content = held(4, per_picture=1)  # cat, dog, cat, dog
    content["annotations"][2]["bbox"] = [1, 1, 0, 5]
    found = look_at_coco(pair(tmp_path, content), class_names=["cat"])
    assert found.train.names == ["1.png", "2.png", "4.png"]


def test_a_lone_crowd_that_is_dropped_takes_its_picture_with_it(tmp_path) -> None:
    content = held(3, per_picture=1)
    content["annotations"][0].update(iscrowd=1, bbox=[1, 1, 0, 5])
    assert look_at_coco(pair(tmp_path, content)).train.names == ["2.png", "3.png"]


def test_what_is_wrong_with_a_picture_hides_nothing_that_is_wrong_with_its_objects(tmp_path) -> None:
    content = change({"bbox": [NAN, 1, 5, 5]}, {"category_id": 99}, {"id": 105})
    content["images"][0]["width"] = content["images"][1]["width"] = 60
    found = look_at_coco(pair(tmp_path, content))
    assert {row.id for row in found.findings.errors} == {"R79", "R72", "R78", "R77"}
    (tmp_path / "images/1.png").unlink()
    assert "R72" in {row.id for row in look_at_coco(tmp_path).findings.errors}
    passed = look_at_coco(tmp_path, wishes=Wishes(skip_missing=True)).findings.errors
    assert {row.id for row in passed} == {"R79", "R77"}


def test_a_copy_without_any_object_is_not_written(tmp_path, capsys) -> None:
    content = change(*[{"bbox": [NAN, 1, 5, 5]}] * 8)
    assert main(["check", str(pair(tmp_path / "bad", content)), "--fix", str(tmp_path / "good")]) == 2
    assert not (tmp_path / "good").exists()
    assert capsys.readouterr().err


# ---- where the pictures are


def test_where_no_picture_is_found_the_folder_that_the_names_start_from_is_guessed(tmp_path, monkeypatch) -> None:
    content = held(4)
    draw(tmp_path / "labelme", content)
    for picture in content["images"]:
        picture["file_name"] = f"labelme/{picture['file_name']}"
    write(tmp_path / "out/train.json", content)
    monkeypatch.chdir(tmp_path)
    found = look_at_coco(None, annotations="out/train.json", images="labelme")
    (row,) = found.findings
    assert (row.id, row.count) == ("R70", 4)
    assert row.action == (
        "no picture was found below labelme; the names look like labelme/1.png: give the folder that they start from, "
        "--images-dir ."
    )
    assert not look_at_coco(None, annotations="out/train.json", images=".").findings.rows
    skipped = look_at_coco(None, annotations="out/train.json", images="labelme", wishes=Wishes(skip_missing=True))
    assert "error   R75  4 pictures, and no object to train on" in table(skipped)


# ---- decoded


def test_nothing_is_decoded_unless_all_images_are_asked_for_and_that_is_said(tmp_path, capsys) -> None:
    pair(tmp_path, held())
    place = tmp_path / "images/2.png"
    Image.effect_noise((WIDE, HIGH), 90).convert("RGB").save(place)
    place.write_bytes(place.read_bytes()[:1500])
    assert main(["check", str(tmp_path)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "no picture was decoded: --all-images decodes every one"
    assert main(["check", str(tmp_path), "--all-images"]) == 2
    shown = capsys.readouterr()
    assert "takes long" in shown.err
    assert "error   R70  train: 1 picture that cannot be read: " in shown.out
    assert "2.png: cannot be read: " in shown.out
    assert "no picture was decoded" not in shown.out


# ---- words


def test_one_is_one_and_none_is_left_out(tmp_path) -> None:
    content = change({"segmentation": [[1, 2, 3, 4]]}, {"iscrowd": 1})
    found = look_at_coco(pair(tmp_path, content, held(1, first=50)))
    assert "1 polygon that has fewer than three points" in table(found)
    assert "1 object that is a crowd" in table(found)
    assert "train.json to train (4 pictures with 7 objects and 1 crowd), " in found.how
    assert "val.json held out (1 picture with 2 objects), of 2 classes" in found.how


def test_objects_of_other_classes_are_counted_by_class(tmp_path) -> None:
    content = held(10)
    content["categories"] += [{"id": i, "name": f"kind {i}"} for i in range(10, 22)]
    for i in range(10, 22):
        content["annotations"][i - 10]["category_id"] = i
    found = look_at_coco(pair(tmp_path / "many", content), class_names=["dog"])
    row = next(row for row in found.findings if row.id == "D1")
    assert (row.what, row.names[0]) == ("objects of 13 classes that were not asked for", "cat (4)")
    assert "kind 18 (1) and 3 more" in table(found)
    found = look_at_coco(pair(tmp_path / "one", held(10)), class_names=["dog"])
    assert "train: 10 objects of cat: left out" in table(found)


def test_names_in_other_letter_case_are_a_warning_and_a_hint(tmp_path) -> None:
    content = held(4)
    content["categories"].append({"id": 9, "name": "Dog"})
    found = look_at_coco(pair(tmp_path / "a", content))
    assert "warning D3   train: 1 category name that differs in letter case alone" in table(found)
    assert "dog = Dog" in table(found)
    with pytest.raises(BadData, match="in other letter case: cat"):
        open_coco(pair(tmp_path / "b", held()), class_names=["Cat"])
    with pytest.raises(BadData, match="in other letter case: cat"):
        every_picture(tmp_path / "b", class_names=["CAT"])
    val = held(2, first=50)
    val["categories"][0]["name"] = "DOG"
    assert "; in other letter case: dog" in table(look_at_coco(pair(tmp_path / "c", held(), val)))
    judged = every_picture(tmp_path / "b", class_names=["Dog", "cat"])[2].table()
    assert "2 objects of dog, which this run never learnt: not counted; in other letter case: Dog" in judged


def test_data_without_an_object_cannot_be_judged_on(tmp_path) -> None:
    write(tmp_path / "all.json", {**held(), "annotations": []})
    draw(tmp_path, held())
    with pytest.raises(BadData, match="cannot be judged on") as error:
        every_picture(tmp_path)
    assert "trained" not in str(error.value)
    with pytest.raises(BadData, match="cannot be trained on"):
        open_coco(tmp_path)


def test_a_category_without_objects_suggests_naming_the_classes_and_the_usage_names_the_command_once(
    tmp_path, capsys
) -> None:
    content = held()
    content["categories"].append({"id": 9, "name": "cow"})
    assert "--class-names" in table(look_at_coco(pair(tmp_path, content)))
    assert main(["check"]) == 2
    assert capsys.readouterr().err.count("lambdanets check") == 1


# ---- other formats


OTHERS = {
    "LabelMe": ("a.json", '{"version": "5.0", "shapes": []}', "labelme2coco.convert("),
    "YOLO": ("labels/a.txt", "0 0.5 0.5 0.25 0.25\n", "from_yolo("),
    "Pascal VOC": ("xml/a.xml", "<annotation></annotation>", "from_pascal_voc("),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_files_of_another_format_are_named_with_the_lines_that_convert_them(kind, tmp_path) -> None:
    name, content, line = OTHERS[kind]
    write(tmp_path / name, content)
    said = other_format(tmp_path)
    assert said is not None
    assert f"files of {kind}" in said
    assert line in said
    with pytest.raises(BadData) as error:
        open_coco(tmp_path)
    assert said in str(error.value)


def test_a_folder_of_classes_a_coco_set_and_an_address_are_of_no_other_format(tmp_path) -> None:
    (tmp_path / "classes/cat").mkdir(parents=True)
    Image.new("RGB", (4, 4)).save(tmp_path / "classes/cat/1.png")
    coco = pair(tmp_path / "coco", held())
    for data in (tmp_path / "classes", coco, coco / "train.json", "https://example.org/shards", None):
        assert other_format(data) is None


def test_the_lines_that_convert_are_those_of_the_page() -> None:
    from pathlib import Path

    page = (Path(__file__).parents[2] / "docs/detection.md").read_text()
    from lambdanets.detection.layouts import _CONVERTED

    for lines in _CONVERTED.values():
        for line in lines.splitlines()[1:]:
            assert line.strip() in page
