"""A detector used: pictures predicted and drawn, judged on data by names of classes, and the page of its run."""

import base64
import dataclasses
import io
import json
import random
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from lambdanets.cli import main
from lambdanets.data.procedural import coco_shapes
from lambdanets.detection import report, scores
from lambdanets.detection.evaluate_run import evaluate_run
from lambdanets.detection.gallery import pairs
from lambdanets.detection.layouts import open_coco
from lambdanets.detection.masks import decode
from lambdanets.detection.mistakes import errors
from lambdanets.detection.plots import curves_png
from lambdanets.detection.precision import Detected, Precision, detections_json
from lambdanets.detection.predict import DetectionPrediction, predict
from lambdanets.detection.report import write_report
from lambdanets.detection.run import open_run, read_record
from lambdanets.detection.scores import write_detections
from lambdanets.detection.source import CocoSource
from lambdanets.detection.tables import class_rows, precision_rows
from lambdanets.detection.train import train
from lambdanets.errors import BadData, BadRecipe, BadRun
from lambdanets.recipes.coco import detect
from lambdanets.runs.record import task_of

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """A run of three steps on twelve pictures of 96 px: root/run, root/shapes."""
    root = tmp_path_factory.mktemp("made")
    coco_shapes(root / "shapes", images=12, seed=4, image_px=96, split=4)
    recipe = dataclasses.replace(
        detect(small=True), image_px=64, epochs=3, min_steps=0, batch_images=8, warmup_steps=0, eval_epochs=2,
        fpn_channels=16, box_fc=32, mask_convs=1, proposals=(60, 30, 60, 30), rois_per_image=8, score_min=0.01,
        detections=30,
    )  # fmt: skip
    torch.manual_seed(0)
    torch.set_num_threads(1)
    train(recipe, root / "shapes", out=root / "run", seed=1, device="cpu")
    return root


@pytest.fixture
def made(shared, tmp_path):
    """The same in a folder that a test may break."""
    root = shutil.copytree(shared, tmp_path / "made")
    change(root / "run", lambda record: record["data"].update(source=str(root / "shapes")))
    return root


@pytest.fixture
def undrawn(monkeypatch):
    """An evaluation without its curves, which another test looks at: they take more time than all the rest of it."""
    monkeypatch.setattr("lambdanets.detection.evaluate_run.precision_png", lambda *given: b"undrawn")


def result_of(made):
    """The numbers of the run on what it held out."""
    return json.loads((made / "run" / "run.json").read_text())["result"]


def change(run, how):
    record = json.loads((run / "run.json").read_text())
    how(record)
    (run / "run.json").write_text(json.dumps(record))


def pixels(path):
    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB"))


def command(capsys, *args):
    """Exit code, standard output and error of a command."""
    code = main([str(arg) for arg in args])
    said = capsys.readouterr()
    return code, said.out, said.err


# --- predict ----------------------------------------------------------------------------------------------------------


def test_a_picture_gives_the_same_objects_as_the_evaluation_found_in_it(made):
    run, images = open_run(made / "run"), open_coco(made / "shapes").val
    held = json.loads((made / "run" / "detections.json").read_text())
    for index, image_id in enumerate(images.image_ids.tolist()):
        (found,) = predict(run, [images.root / images.names[index]], device=CPU, score=0)
        want = [one for one in held if one["image_id"] == image_id]
        assert found.size == (96, 96)
        assert len(found.names) == len(want) > 0
        assert found.scores.tolist() == [one["score"] for one in want]
        got = found.boxes - found.boxes[:, [0, 1, 0, 1]] * [0, 0, 1, 1]
        assert got.tolist() == [one["bbox"] for one in want]
        assert list(found.category_ids) == [one["category_id"] for one in want]
        assert [m.decode() for m in found.masks] == [one["segmentation"]["counts"] for one in want]
        assert list(found.names) == [images.classes[i - 1] for i in found.category_ids]


def test_json_has_the_datas_own_ids_boxes_in_hundredths_and_masks_that_others_read(made, capsys):
    change(made / "run", lambda r: [c.update(id=10 * c["id"]) for c in r["categories"]])
    picture = made / "shapes" / "images" / "000001.png"
    code, out, err = command(capsys, "predict", made / "run", picture, made / "none.png", "--json", "--score", "0.02")
    assert code == 1
    assert err.startswith(
        "lambdanets: objects with a score of at least 0.02 (--score; `lambdanets evaluate` names the best score"
    )
    line, lost = map(json.loads, out.splitlines())
    assert lost == {"image": str(made / "none.png"), "error": "cannot be read: No such file or directory"}
    (found,) = predict(open_run(made / "run"), [picture], device=CPU, score=0.02)
    assert (line["image"], line["width"], line["height"]) == (str(picture), 96, 96)
    assert len(line["objects"]) == len(found.names) > 0
    for i, one in enumerate(line["objects"]):
        assert one["category_id"] % 10 == 0
        assert one["name"] == found.names[i]
        x0, y0, x1, y1 = found.boxes[i]
        assert one["bbox"] == pytest.approx([x0, y0, x1 - x0, y1 - y0], abs=0.0051)
        assert all(side == round(side, 2) for side in one["bbox"])
        assert one["score"] >= 0.02
        assert one["segmentation"]["size"] == [96, 96]
        assert decode(one["segmentation"]["counts"].encode(), 96, 96).shape == (96, 96)


def test_the_line_for_a_person_names_ten_objects_and_counts_all():
    one = DetectionPrediction("a\n.jpg", names=("car", "cat"), scores=np.array([0.971, 0.5]))
    assert one.text() == "a\\n.jpg  2 objects: car 0.97, cat 0.50"
    many = dataclasses.replace(one, names=("car",) * 13, scores=np.full(13, 0.9))
    assert many.text().endswith("car 0.90 and 3 more")
    assert many.text().count("car") == 10


def test_a_score_leaves_out_what_is_below_it_and_only_that(made, capsys):
    run, picture = open_run(made / "run"), made / "shapes" / "images" / "000001.png"
    (whole,) = predict(run, [picture], device=CPU, score=0)
    cut = float(whole.scores[len(whole.scores) // 2])
    (part,) = predict(run, [picture], device=CPU, score=cut)
    assert part.scores.tolist() == [s for s in whole.scores.tolist() if s >= cut]
    for score in (-0.1, 1.1, float("nan")):
        with pytest.raises(BadRecipe, match=f"--score must be from 0 to 1, not {score:g}"):
            predict(run, [], device=CPU, score=score)
    code, _, err = command(capsys, "predict", made / "run", picture, "--score", "2")
    assert (code, err) == (2, "lambdanets predict: --score must be from 0 to 1, not 2\n")


def test_a_folder_is_its_pictures_in_natural_order_and_what_cannot_be_read_is_told(made, tmp_path, capsys):
    frames = tmp_path / "frames"
    frames.mkdir()
    for name in ("10.png", "9.png", ".hidden.png", "notes.txt"):
        shutil.copy(made / "shapes" / "images" / "000001.png", frames / name)
    (frames / "11.png").write_bytes(b"<html>")
    (tmp_path / "empty").mkdir()
    code, out, err = command(capsys, "predict", made / "run", frames, tmp_path / "empty", "--score", "1")
    assert code == 1
    assert [line.split()[0] for line in out.splitlines()] == [str(frames / "9.png"), str(frames / "10.png")]
    assert all(line.endswith("no objects") for line in out.splitlines())
    assert f"{frames / '11.png'}: is no JPEG" in err
    assert f"{tmp_path / 'empty'}: is a folder without pictures" in err


@pytest.mark.slow
def test_another_size_is_said_not_to_be_the_runs_and_changes_what_is_seen(made, capsys):
    picture = made / "shapes" / "images" / "000001.png"
    asked = ("predict", made / "run", picture, "--json", "--score", "0")
    small, large = command(capsys, *asked), command(capsys, *asked, "--image-px", "96")
    assert "--image-px 96 is not what the run was trained and judged at: 64" in large[2]
    assert "--image-px" not in small[2]
    assert json.loads(small[1])["objects"] != json.loads(large[1])["objects"]
    (own,) = predict(open_run(made / "run"), [picture], device=CPU, score=0, image_px=64)
    assert own.json() == small[1].strip()
    code, _, err = command(capsys, *asked, "--image-px", "9999999")
    assert (code, "image_px is 9,999,999" in err) == (2, True)


def test_drawn_pictures_have_names_of_their_own_and_nothing_is_written_over(made, tmp_path, capsys):
    source = made / "shapes" / "images" / "000001.png"
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        shutil.copy(source, tmp_path / folder / "x.png")
    Image.fromarray(pixels(source)).save(tmp_path / "a" / "y.jpg")
    out = tmp_path / "out"
    out.mkdir()
    (out / "x.png").write_text("mine")
    asked = [tmp_path / "a" / "x.png", tmp_path / "b" / "x.png", tmp_path / "a" / "y.jpg"]
    code, said, _ = command(capsys, "predict", made / "run", *asked, "--score", "0", "--draw", out)
    assert code == 0
    assert [line.rpartition("  -> ")[2] for line in said.splitlines()] == [
        str(out / name) for name in ("x-2.png", "x-3.png", "y.jpg")
    ]
    assert (out / "x.png").read_text() == "mine"
    assert (pixels(out / "x-2.png") != pixels(source)).any(2).mean() > 0.01
    assert pixels(out / "y.jpg").shape == (96, 96, 3)
    assert (out / "y.jpg").read_bytes().startswith(b"\xff\xd8")
    code, said, _ = command(capsys, "predict", made / "run", source, "--score", "1", "--json", "--draw", out)
    plain = json.loads(said)["drawn"]  # nothing was found
    assert np.array_equal(pixels(plain), pixels(source))
    code, _, err = command(capsys, "predict", made / "run", source, "--draw", source)
    assert (code, "name another folder" in err) == (2, True)


def test_the_kind_of_a_run_decides_and_options_of_the_other_kind_are_refused(made, capsys):
    run, picture = made / "run", made / "shapes" / "images" / "000001.png"
    assert task_of(run) == "detection"
    code, _, err = command(capsys, "predict", run, picture, "--top", "3")
    assert code == 2
    assert "is a run of detection, and --top is for one of classification: leave that out" in err
    for option in (["--exclude-bad"], ["--allow-source", "x"]):
        code, _, err = command(capsys, "evaluate", run, *option)
        assert (code, option[0] in err) == (2, True)
    change(run, lambda record: record.pop("task"))
    assert task_of(run) == "classification"  # as 0.1.0 writes it
    code, _, err = command(capsys, "predict", run, picture, "--draw", made / "out", "--score", "0.1")
    assert code == 2
    assert "is a run of classification, and --score, --draw is for one of detection" in err
    code, _, err = command(capsys, "evaluate", run, "--annotations", "x.json", "--image-px", "64")
    assert (code, "--annotations, --image-px" in err) == (2, True)
    with pytest.raises(BadRun, match="is not the folder of a run"):
        task_of(made)


PEAK = """
import dataclasses, resource, sys, torch
from lambdanets.detection.predict import predict
from lambdanets.detection.run import open_run, read_record
torch.set_num_threads(1)
run = open_run(sys.argv[1])
heads = run.model.roi_heads
heads.score_thresh, heads.nms_thresh, heads.detections_per_img = 0.0, 2.0, 100
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
list(predict(run, [sys.argv[2]], device=torch.device("cpu"), score=0))
before = peak()
(found,) = predict(run, [sys.argv[3]], device=torch.device("cpu"), score=0)
found.json()
best = dict(boxes=found.boxes[:9], names=found.names[:9], scores=found.scores[:9], masks=found.masks[:9])
dataclasses.replace(found, **best).drawn()
print(len(found.names), peak() - before)
"""


@pytest.mark.slow
def test_a_picture_of_twelve_megapixels_with_a_hundred_objects_takes_less_than_300_mb(made, tmp_path):
    big = tmp_path / "big.jpg"
    Image.fromarray(pixels(made / "shapes" / "images" / "000001.png")).resize((4000, 3000)).save(big)
    asked = [made / "run", made / "shapes" / "images" / "000001.png", big]
    done = subprocess.run(
        [sys.executable, "-c", PEAK, *map(str, asked)], capture_output=True, text=True, timeout=120,
        cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    n, grown_mb = done.stdout.split()
    assert int(n) == 100
    assert float(grown_mb) < 300


# --- evaluate ---------------------------------------------------------------------------------------------------------


def pycocotools_ap(annotations, results, kind, capsys):
    truth = COCO(str(annotations))
    found = COCOeval(truth, truth.loadRes(str(results)), kind)
    found.evaluate()
    found.accumulate()
    found.summarize()
    capsys.readouterr()
    return found.stats.tolist()


def test_the_numbers_are_those_of_pycocotools_on_the_file_that_is_written(made, capsys):
    code, out, _ = command(capsys, "evaluate", made / "run", "--device", "cpu", "--batch-images", "3")
    assert code == 0
    folder = made / "run" / "evaluation-1"
    written = json.loads((folder / "evaluation.json").read_text())
    boxes = pycocotools_ap(made / "shapes" / "val.json", folder / "detections.json", "bbox", capsys)
    masks = pycocotools_ap(made / "shapes" / "val.json", folder / "detections.json", "segm", capsys)
    names = ["ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large", "ar1", "ar10", "ar100"]
    held = [written["box"][name] for name in names]
    assert [-1 if value is None else value for value in held] == pytest.approx(boxes[:9], abs=1e-12)
    assert [written["mask"][name] for name in names[:3]] == pytest.approx(masks[:3], abs=1e-12)
    result = json.loads((made / "run" / "run.json").read_text())["result"]
    assert (written["box"], written["mask"], written["losses"]) == (result["box"], result["mask"], result["losses"])
    assert f"box AP {boxes[0]:.3f}" in out
    assert "AP, large (from 96² px)      no such objects  no such objects" in out
    best = written["errors"]["best_score"]
    told = f"--score {best:.2f} gives the best F1 here" if max(written["errors"]["f1"]) else "no score finds any object"
    assert told in out
    assert re.search(r"loss \S+ \(class \S+, box \S+, mask \S+, object \S+, anchor \S+\)", out)
    assert len(written["errors"]["f1"]) == 101
    assert written["errors"]["f1"][round(100 * best)] == max(written["errors"]["f1"])
    f1 = [row["f1"] for row in written["worst_images"]]
    assert len(f1) == 4
    assert f1 == sorted(f1)
    assert "the 4 pictures that the run held out" in written["how"]
    with Image.open(folder / "precision.png") as picture:
        assert picture.width > 800


@pytest.mark.usefixtures("undrawn")
def test_the_best_score_is_told_with_its_command_and_where_nothing_is_found_there_is_none(made, monkeypatch):
    found = evaluate_run(made / "run", device=CPU)
    images = found.judged.images
    objects = [images.objects(i) for i in range(len(images))]
    every = [
        Detected(image_id, one.boxes, one.labels, np.full(len(one.labels), 0.5))
        for image_id, one in zip(images.image_ids.tolist(), objects, strict=True)
    ]
    none = [Detected(one.image_id, np.zeros((0, 4)), one.labels[:0], one.scores[:0]) for one in every]
    told = dataclasses.replace(found, errors=errors(images, every, "bbox"), run="my run", folder=Path("e"))
    assert str(told).endswith("next: lambdanets predict 'my run' PICTURES --draw found --score 0.25")
    assert "--score 0.25 gives the best F1 here, 1.000; with it" in str(told)
    told = dataclasses.replace(told, errors=errors(images, none, "bbox"))
    assert "no score finds any object here (masks at IoU 0.5); the errors at --score 0.50 are" in str(told)
    assert str(told).endswith("e: evaluation.json, detections.json, precision.png")
    monkeypatch.setattr(report, "curves_svg", lambda *given: "")
    shown = {"kinds": told.kinds, "errors": told.errors, "loss": None, "n": 0, "chosen": [], "worst": [], "notes": []}
    text = Page(report.page(read_record(made / "run"), **shown, steps=[], bad_samples=0)).text
    assert "no score finds any object here" in text
    assert "best F1" not in text


def test_the_tables_name_what_there_is_none_of_and_the_worst_classes_of_many(made):
    box = open_run(made / "run").record["result"]["box"]
    rows = [{"name": f"c{i}", "id": i, "ap": i / 100, "ap50": 0.5, "objects": 2, "images": 1} for i in range(50)]
    rows.append({"name": "none", "id": 99, "ap": None, "ap50": None, "objects": 0, "images": 0})
    kind = Precision.read({**box, "by_class": rows[::-1]})
    shown, notes = class_rows([kind], 40)
    assert [row[0] for row in shown] == [f"c{i}" for i in range(40)]
    assert shown[7] == ["c7", "2", "1", "0.070", "0.500"]
    assert notes == ["no such objects: none", "the 40 worst of 50 classes"]
    assert len(precision_rows([kind])) == 12
    assert ["AP, large (from 96² px)", "no such objects"] in precision_rows([kind])


def other_data(made, place, keep, ids):
    """val.json's pictures under other category ids, by name; `keep` says which classes the file has."""
    held = json.loads((made / "shapes" / "val.json").read_text())
    old = {c["id"]: c["name"] for c in held["categories"]}
    held["categories"] = [{"id": ids[name], "name": name} for name in old.values() if name in keep]
    held["annotations"] = [
        {**one, "category_id": ids[old[one["category_id"]]]}
        for one in held["annotations"]
        if old[one["category_id"]] in keep
    ]
    place.write_text(json.dumps(held))
    return held


@pytest.mark.usefixtures("undrawn")
def test_other_data_is_matched_by_the_names_of_its_classes_and_keeps_its_ids(made, tmp_path, capsys):
    names = [category.name for category in open_run(made / "run").categories]
    ids = {name: 70 - i for i, name in enumerate(names)}
    other_data(made, tmp_path / "x.json", names, ids)
    own = result_of(made)
    asked = ("--annotations", tmp_path / "x.json", "--images-dir", made / "shapes" / "images", "--out", tmp_path / "o")
    assert command(capsys, "evaluate", made / "run", *asked)[0] == 0
    written = json.loads((tmp_path / "o" / "evaluation.json").read_text())
    assert (written["box"]["ap"], written["mask"]["ap"]) == (own["box"]["ap"], own["mask"]["ap"])
    assert {row["name"]: row["id"] for row in written["box"]["by_class"]} == ids
    found = json.loads((tmp_path / "o" / "detections.json").read_text())
    assert {one["category_id"] for one in found} <= set(ids.values())
    assert pycocotools_ap(tmp_path / "x.json", tmp_path / "o" / "detections.json", "bbox", capsys)[0] == pytest.approx(
        own["box"]["ap"], abs=1e-12
    )
    code, _, err = command(capsys, "evaluate", made / "run", *asked)
    assert (code, "is not empty" in err) == (2, True)


@pytest.mark.usefixtures("undrawn")
def test_classes_that_the_data_lacks_are_listed_and_what_is_found_of_them_counts_nowhere(made, tmp_path):
    names = [category.name for category in open_run(made / "run").categories]
    keep = names[:2] if names[0] != "L" else names[1:3]
    other_data(made, tmp_path / "x.json", keep, {name: i for i, name in enumerate(names, 1)})
    part = evaluate_run(made / "run", CocoSource(None, tmp_path / "x.json", made / "shapes" / "images"), device=CPU)
    lacking = {i for i, name in enumerate(names, 1) if name not in keep}
    every = json.loads((made / "run" / "detections.json").read_text())
    gone = sum(one["category_id"] in lacking for one in every)
    assert part.passed == gone > 0
    assert f"the data has no class {', '.join(n for n in names if n not in keep)}: {gone:,} detections" in str(part)
    found = json.loads((part.folder / "detections.json").read_text())
    assert {one["category_id"] for one in found} <= {names.index(name) + 1 for name in keep}
    of = {row["name"]: -1 if row["ap"] is None else row["ap"] for row in result_of(made)["box"]["by_class"]}
    assert {row.name: row.ap for row in part.scores.box.by_class if row.name in keep} == {n: of[n] for n in keep}
    other_data(made, tmp_path / "y.json", [], dict.fromkeys(names, 1))
    held = json.loads((tmp_path / "y.json").read_text()) | {"categories": [{"id": 1, "name": "cow"}]}
    (tmp_path / "y.json").write_text(json.dumps(held))
    with pytest.raises(BadData, match="has none of the classes"):
        evaluate_run(made / "run", CocoSource(None, tmp_path / "y.json", made / "shapes" / "images"), device=CPU)


@pytest.mark.usefixtures("undrawn")
def test_held_out_pictures_that_changed_are_not_taken_for_the_runs_and_moved_ones_are(made, tmp_path):
    held = json.loads((made / "shapes" / "val.json").read_text())
    own = result_of(made)
    shutil.copytree(made / "shapes", tmp_path / "moved")
    held["annotations"][0]["bbox"][2] += 1
    (made / "shapes" / "val.json").write_text(json.dumps(held))
    with pytest.raises(BadData, match="not those of the run any more"):
        evaluate_run(made / "run", device=CPU)
    found = evaluate_run(made / "run", tmp_path / "moved", device=CPU).scores.json()
    assert {name: own[name] for name in found} == found


@pytest.mark.slow
@pytest.mark.usefixtures("undrawn")
def test_of_one_file_that_the_run_divided_only_what_it_held_out_is_judged(made, tmp_path):
    shutil.copytree(made / "shapes" / "images", tmp_path / "one" / "images")
    shutil.copy(made / "shapes" / "train.json", tmp_path / "one" / "all.json")
    val = open_coco(tmp_path / "one").val

    def divided(record):
        record["data"] |= {
            "source": str(tmp_path / "one"),
            "val_images": len(val),
            "fingerprint": {"val": val.fingerprint()},
        }

    change(made / "run", divided)
    assert 1 <= len(val) < 8
    own = evaluate_run(made / "run", device=CPU)
    again = evaluate_run(made / "run", tmp_path / "one" / "all.json", device=CPU)
    assert again.scores.n == own.scores.n == len(val)
    assert "that the run held out" in again.how


@pytest.mark.usefixtures("undrawn")
def test_an_evaluation_that_cannot_be_written_prints_its_numbers_first(made, largest_file, capsys):
    with largest_file(3_000):
        code, out, err = command(capsys, "evaluate", made / "run")
    assert code == 2
    assert "box AP" in out
    assert "nothing of this evaluation is written to" in err


@pytest.mark.slow
@pytest.mark.usefixtures("undrawn")
def test_ranks_share_the_pictures_and_one_writes(made, children):
    one = evaluate_run(made / "run", device=CPU)
    told = [child.gave() for child in children.ranks(2, judged, str(made / "run"))]
    assert told[0] == told[1]
    assert told[0][:2] == [json.loads(json.dumps(one.scores.json())), str(made / "run" / "evaluation-2")]
    assert not (made / "run" / "evaluation-3").exists()
    first, second = (
        sorted(json.loads((made / "run" / f"evaluation-{n}" / "detections.json").read_text()), key=str) for n in (1, 2)
    )
    assert first == second


def judged(run):
    found = evaluate_run(run, device=CPU)
    return [found.scores.json(), str(found.folder)]


def test_detections_are_written_piece_by_piece_as_they_are_in_one(made, tmp_path, monkeypatch):
    images = open_coco(made / "shapes").train
    draw = np.random.default_rng(0)
    detected = []
    for image_id in images.image_ids[::-1].tolist():
        n = int(draw.integers(0, 4))
        boxes = draw.random((n, 2)) * 40
        detected.append(Detected(image_id, np.hstack([boxes, boxes + 9]), draw.integers(1, 4, n), draw.random(n)))
    monkeypatch.setattr(scores, "_AT_ONCE", 3)
    write_detections(tmp_path / "d.json", images, detected)
    assert json.loads((tmp_path / "d.json").read_text()) == detections_json(images, detected)
    write_detections(tmp_path / "e.json", images, [])
    assert json.loads((tmp_path / "e.json").read_text()) == []


# --- the page ---------------------------------------------------------------------------------------------------------


class Page(HTMLParser):
    """What a browser would see: text, tags, attributes, pictures; and whether the tags are balanced."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.open, self.words, self.attributes = [], [], [], []
        self.feed(text)
        self.close()
        self.pictures = [
            Image.open(io.BytesIO(base64.b64decode(value.partition("base64,")[2])))
            for tag, name, value in self.attributes
            if (tag, name) == ("img", "src")
        ]
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attrs):
        self.handle_startendtag(tag, attrs)
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


def test_a_finished_run_has_curves_and_a_page_that_fetches_and_runs_nothing(shared):
    with Image.open(shared / "run" / "curves.png") as curves:
        assert curves.width > 1000
    text = (shared / "run" / "report.html").read_text()
    seen = Page(text)
    assert not seen.open
    assert not {"script", "link", "iframe", "object"} & set(seen.tags)
    assert "default-src 'none'" in text
    for tag, name, value in seen.attributes:
        if name in ("src", "href", "xlink:href", "action", "data", "poster"):
            assert value.startswith(("data:image/", "#")), (tag, name)
        assert not name.startswith("on")
    assert seen.tags.count("svg") == 1
    told = ["finished, 3 of 3 epochs", "AP of boxes", "AP50 of masks", "By class", "triangle", "Errors", "duplicate"]
    told += ["IoU 0.5", "The worst", "What was found in the data", "detect_small", "versions.torch"]
    assert [words for words in told if words not in seen.text] == []
    pictures = [picture for picture in seen.pictures if picture.format == "JPEG"]
    names = open_coco(shared / "shapes").val.names
    shown = re.findall(r"(\d{6}\.png), F1", seen.text)
    assert shown[:4] == list(names)
    assert len(pictures) == 2 * len(shown)
    assert all(320 <= max(picture.size) <= 640 for picture in pictures)
    assert len(text) < 5e6


def test_epochs_that_were_not_judged_have_no_held_out_numbers(shared, monkeypatch):
    history = json.loads((shared / "run" / "run.json").read_text())["history"]
    assert ["val_box_ap" in row for row in history] == [False, True, True]
    monkeypatch.setattr("lambdanets.detection.plots.saved", lambda figure, kind: figure)
    loss, parts, precision = curves_png(history[:1], "").axes
    assert [len(axes.lines) for axes in (loss, parts, precision)] == [1, 5, 0]
    assert [text.get_text() for text in parts.get_legend().texts] == ["class", "box", "mask", "object", "anchor"]
    table = Page((shared / "run" / "report.html").read_text()).text
    row = re.search(rf"\b1 {history[0]['lr']:.3g} {history[0]['train_loss']:.4f} ([\d.]+) ", table)
    assert float(row[1]) == pytest.approx(history[0]["images_per_s"], abs=0.5)  # the next that there is


def test_pictures_show_the_truth_beside_what_was_found_and_large_ones_are_made_smaller(made):
    images = open_coco(made / "shapes").val
    n = len(images.objects(0).labels)
    objects = images.objects(0)
    found = Detected(int(images.image_ids[0]), objects.boxes, objects.labels, np.linspace(0.9, 0.1, n))
    (one,) = pairs(images, [0], [found], 0.5, {found.image_id: 0.25})
    assert (one.name, one.f1, one.objects, one.shown) == (images.names[0], 0.25, n, int((found.scores >= 0.5).sum()))
    truth, shown = (Image.open(io.BytesIO(picture)) for picture in (one.truth, one.found))
    assert truth.size == shown.size == (384, 384)
    (images.root / images.names[0]).unlink()
    (one,) = pairs(images, [0], [found], 0.5, {found.image_id: 0.25})
    assert (one.truth, one.found) == (None, None)


def test_a_page_is_written_while_the_run_goes_on_and_says_what_is_missing(made, capsys):
    def going_on(record):
        record.update(status="interrupted", error="Terminated('stopped after <script>alert(1)</script>')")
        record["data"]["findings"] = [["R71", "train", "dropped", "<b>objects</b>", 3], "odd", [1]]
        del record["result"], record["history"][2]

    change(made / "run", going_on)
    code, out, _ = command(capsys, "report", made / "run", "--device", "cpu")
    assert (code, out.strip()) == (0, str(made / "run" / "report.html"))
    seen = Page((made / "run" / "report.html").read_text())
    assert "interrupted, 2 of 3 epochs" in seen.text
    assert "epochs done; seed 1, on cpu stopped after <script>alert(1)</script> " in seen.text
    assert "R71 train dropped <b>objects</b> 3" in seen.text
    assert "The worst" in seen.text  # evaluated again
    (made / "run" / "weights.safetensors").unlink()
    change(made / "run", lambda record: record.update(history=[], status="running"))
    (made / "run" / "log.jsonl").unlink()
    seen = Page(write_report(made / "run").read_text())
    assert "No evaluation of the weights: " in seen.text
    assert "it has no weights.safetensors" in seen.text
    assert not seen.pictures
    assert "svg" not in seen.tags


def leaves(held, path=()):
    if path:
        yield path
    inner = held.items() if isinstance(held, dict) else list(enumerate(held))[:2] if isinstance(held, list) else ()
    for key, value in inner:
        yield from leaves(value, (*path, key))


@pytest.mark.slow
def test_a_record_with_a_value_of_another_type_is_shown_or_refused_in_one_sentence(shared, tmp_path, monkeypatch):
    monkeypatch.setattr(report, "curves_svg", lambda *a: "")
    text = (shared / "run" / "run.json").read_text()
    paths = list(leaves(json.loads(text)))
    refused = 0
    for path in random.Random(0).sample(paths, 40):
        for other in (None, "text", [], {"x": []}, 10**400):
            record = json.loads(text)
            inner = record
            for key in path[:-1]:
                inner = inner[key]
            inner[path[-1]] = other
            (tmp_path / "run.json").write_text(json.dumps(record))
            try:
                read = read_record(tmp_path)
            except BadRun as error:
                refused += 1
                assert "\n" not in str(error)
                continue
            result = read.get("result") or {}
            kinds = [Precision.read(result[name]) for name in ("box", "mask") if result.get(name) is not None]
            report.page(
                read, kinds=kinds, loss=None, n=0, errors=None, chosen=[], worst=[], notes=[], steps=[], bad_samples=0
            )
    assert refused > 60


# --- check ------------------------------------------------------------------------------------------------------------


def test_check_draws_the_objects_of_the_first_pictures(made, tmp_path, capsys):
    first = made / "shapes" / "images" / "000000.png"
    code, out, _ = command(capsys, "check", made / "shapes", "--draw", tmp_path / "out", "--draw-images", "10")
    assert code == 0
    assert f"10 pictures are drawn to {tmp_path / 'out'}" in out
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [f"{i:06d}.png" for i in range(10)]
    images = open_coco(made / "shapes").train
    (x0, y0, x1, y1) = np.floor(images.objects(0).boxes[0]).astype(int)
    drawn, before = pixels(tmp_path / "out" / "000000.png"), pixels(first)
    assert (drawn[y0:y1, x0:x1] != before[y0:y1, x0:x1]).any()
    assert (drawn != before).any(2).mean() < 0.9
    first.write_bytes(b"cut")
    code, out, _ = command(capsys, "check", made / "shapes", "--draw", tmp_path / "out", "--draw-images", "1")
    assert "pictures are drawn" in out
