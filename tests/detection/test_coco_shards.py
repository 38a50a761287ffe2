"""COCO data sets in tar shards: packed, killed, read from a folder and a store, learnt from as from the data itself."""

import hashlib
import json
import signal
import subprocess
import sys
import tarfile
from pathlib import Path

import fsspec
import numpy as np
import pytest
import safetensors.torch
import torch
from coco_sets import draw, held, pair, write
from PIL import Image
from test_detector_training import tiny

from lambdanets import data
from lambdanets.cli import main
from lambdanets.data.procedural import coco_shapes
from lambdanets.detection import shards
from lambdanets.detection.batches import evaluation_batches
from lambdanets.detection.coco import CocoImages
from lambdanets.detection.layouts import every_picture, is_coco, open_coco
from lambdanets.detection.pack import pack_coco
from lambdanets.detection.run import open_run
from lambdanets.detection.scores import evaluate
from lambdanets.detection.train import train
from lambdanets.errors import BadData, BadRun
from lambdanets.recipes.recipe import Options
from lambdanets.training import loop

SHARD_BYTES = 60_000


@pytest.fixture(scope="module")
def shapes(tmp_path_factory) -> Path:
    """Eight pictures to train and five to hold out; polygons and run lengths, pictures without objects."""
    folder = tmp_path_factory.mktemp("coco") / "shapes"
    coco_shapes(folder, images=13, split=5, seed=3, image_px=96, objects=(0, 4))
    return folder


@pytest.fixture(scope="module")
def packed(shapes, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("packed") / "shards"
    done = pack_coco(shapes, out, shard_bytes=SHARD_BYTES)
    assert (done.train_images, done.val_images, done.left_out) == (8, 5, 0)
    assert done.shards >= 4
    return out


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def copied(folder: Path, to: Path) -> Path:
    for name, content in contents(folder).items():
        (to / name).parent.mkdir(parents=True, exist_ok=True)
        (to / name).write_bytes(content)
    return to


def seen(images: CocoImages) -> list:
    """All that is learnt from: pictures and objects, in order."""
    found = []
    for index in range(len(images)):
        ids, labels, boxes, crowd, areas, masks = images.objects(index)
        outlines = [m if m is None or isinstance(m, bytes) else [p.tolist() for p in m] for m in masks]
        columns = [part.tolist() for part in (ids, labels, boxes, crowd, areas)]
        found.append([images.names[index], images.load(index).tobytes(), columns, outlines])
    return found


# ---- written


def test_shards_hold_the_pictures_and_objects_of_the_data_in_its_order(shapes, packed):
    one, two = open_coco(shapes), open_coco(packed)
    for folder, found in ((one.train, two.train), (one.val, two.val)):
        assert seen(found) == seen(folder)
        assert found.categories == folder.categories
        assert CocoImages.fingerprint(found) == folder.fingerprint()  # to the last bit of every box and mask
        assert found.fingerprint() != folder.fingerprint()  # which says every byte of the pictures too
    assert two.train.fingerprint() == open_coco(packed).train.fingerprint() != two.val.fingerprint()
    assert two.how.startswith(f"shards {packed}: 8 pictures")


def test_a_sample_is_a_picture_as_it_was_and_its_annotations_in_a_tar_that_anyone_reads(shapes, packed):
    wanted = {}
    for part in ("train", "val"):
        of = json.loads((shapes / f"{part}.json").read_text())
        for picture in of["images"]:
            rows = [row for row in of["annotations"] if row["image_id"] == picture["id"]]
            wanted[f"{part}/{picture['file_name']}"] = (picture, rows)
    met = []
    for file in sorted(packed.glob("*.tar")):
        assert file.stat().st_size <= SHARD_BYTES
        with tarfile.open(file, "r:") as tar:
            members = tar.getmembers()
            for picture, beside in zip(members[::2], members[1::2], strict=True):
                key, _, suffix = picture.name.rpartition(".")
                assert (beside.name, suffix, "." in key) == (f"{key}.json", "png", False)
                said = json.loads(tar.extractfile(beside).read())
                name = key.replace("%2E", ".")
                image, rows = wanted[name]
                assert said["image"] == image
                shown = ("id", "image_id", "category_id", "bbox", "iscrowd", "area")
                assert [[r[k] for k in shown] for r in said["annotations"]] == [[r[k] for k in shown] for r in rows]
                assert all(row["segmentation"] for row in said["annotations"])
                assert tar.extractfile(picture).read() == (shapes / "images" / image["file_name"]).read_bytes()
                met.append(name)
    assert met == list(wanted)  # the data's order


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_pycocotools_reads_the_files_beside_the_archives(shapes, packed, capsys):
    coco = pytest.importorskip("pycocotools.coco")
    for part in ("train", "val"):
        ours = coco.COCO(str(packed / f"annotations/instances_{part}.json"))
        theirs = coco.COCO(str(shapes / f"{part}.json"))
        assert ours.getImgIds() == theirs.getImgIds()
        assert ours.loadCats(ours.getCatIds()) == theirs.loadCats(theirs.getCatIds())
        assert ours.getAnnIds() == theirs.getAnnIds()
        for id in ours.getAnnIds():
            assert np.array_equal(ours.annToMask(ours.anns[id]), theirs.annToMask(theirs.anns[id]))


def test_boxes_with_any_decimals_are_read_back_to_the_bit(tmp_path):
    rng, content = np.random.default_rng(0), held(100, per_picture=20)
    for row in content["annotations"]:
        x, y, w, h = rng.uniform(0, 30, 4) * 10.0 ** rng.integers(-3, 1, 4)
        row |= {"bbox": [x, y, w + 1, h + 1], "segmentation": [], "area": (w + 1) * (h + 1)}
    pair(tmp_path / "in", content)
    pack_coco(tmp_path / "in", tmp_path / "out")
    one, two = open_coco(tmp_path / "in").train, open_coco(tmp_path / "out").train
    assert one.n_objects == two.n_objects == 2000
    assert CocoImages.fingerprint(two) == one.fingerprint()


def test_names_alike_in_both_parts_and_hard_ones_are_kept_apart(tmp_path):
    train, val = held(4), held(2)
    names = ["a.b.png", "deep//er/1 + 1.png", "ünï.png", "50%25.png"]
    for content, part in ((train, "train"), (val, "val")):
        for picture, name in zip(content["images"], names, strict=False):
            picture["file_name"] = name
            place = tmp_path / f"in/{part}2017" / name
            place.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (64, 48), (len(part), picture["id"], 0)).save(place)
        write(tmp_path / f"in/annotations/instances_{part}2017.json", content)
    pack_coco(tmp_path / "in", tmp_path / "out")
    one, two = open_coco(tmp_path / "in"), open_coco(tmp_path / "out")
    assert (seen(two.train), seen(two.val)) == (seen(one.train), seen(one.val))
    assert main(["index", str(tmp_path / "out")]) == 0
    train["images"][1]["file_name"] = "a.b.png"
    write(tmp_path / "in/annotations/instances_train2017.json", train)
    with pytest.raises(BadData, match=r"lists 1 pictures a second time \(train/a\.b\.png\)"):
        pack_coco(tmp_path / "in", tmp_path / "again")


def test_one_file_is_split_as_it_is_when_it_is_trained_on(tmp_path):
    write(tmp_path / "in/all.json", held(30))
    draw(tmp_path / "in/images", held(30))
    pack_coco(tmp_path / "in/all.json", tmp_path / "out")
    one, two = open_coco(tmp_path / "in/all.json"), open_coco(tmp_path / "out")
    assert (seen(two.train), seen(two.val)) == (seen(one.train), seen(one.val))


def test_an_unreadable_picture_is_left_out_with_its_objects_and_listed(shapes, tmp_path, capsys):
    source = copied(shapes, tmp_path / "in")
    (source / "images/000002.png").write_bytes((source / "images/000002.png").read_bytes()[:3000])
    (source / "images/000009.png").write_bytes(b"<html>")
    assert main(["pack", str(source), str(tmp_path / "out"), "--shard-bytes", "60000"]) == 0
    said = capsys.readouterr()
    assert "7 training and 4 validation images" in said.out
    assert "2 unreadable files left out, listed in bad_samples.jsonl" in said.out
    assert "1 picture whose header cannot be read" in said.err
    bad = [json.loads(line) for line in (tmp_path / "out/bad_samples.jsonl").read_text().splitlines()]
    assert [line["name"] for line in bad] == ["train/000002.png", "val/000009.png"]
    one, two = open_coco(shapes), open_coco(tmp_path / "out")
    assert seen(two.train) == [row for row in seen(one.train) if row[0] != "000002.png"]
    assert seen(two.val) == [row for row in seen(one.val) if row[0] != "000009.png"]
    clean = json.loads((tmp_path / "out/annotations/instances_train.json").read_text())
    assert 3 not in {row["image_id"] for row in clean["annotations"]} | {row["id"] for row in clean["images"]}
    for name in ("000003.png", "000004.png"):
        (source / "images" / name).write_bytes(b"<html>")
    with pytest.raises(BadData, match=r"3 of the 8 images of train cannot be read, 1 allowed"):
        pack_coco(source, tmp_path / "more")


def test_what_is_wrong_with_the_data_is_said_before_anything_is_packed(tmp_path, capsys):
    source = pair(tmp_path / "in", held(4))
    (source / "images/1.png").unlink()
    assert main(["pack", str(source), str(tmp_path / "out")]) == 2
    assert "1 picture that is missing" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert main(["pack", str(source), str(tmp_path / "out"), "--skip-missing"]) == 0
    assert open_coco(tmp_path / "out").train.names == ["2.png", "3.png", "4.png"]
    Image.new("RGB", (64, 49)).save(source / "images/1.png")
    assert main(["pack", str(source), str(tmp_path / "new")]) == 2
    assert "1 picture of another height and width than the file says" in capsys.readouterr().err


PACK = """
import os, sys
from lambdanets.detection.pack import pack_coco
left = [int(sys.argv[3])]  # dies at the n-th file that is put in place or line that is written
def step(real):
    def call(*args, **named):
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), 9)
        return real(*args, **named)
    return call
os.replace, os.fsync = step(os.replace), step(os.fsync)
print(pack_coco(sys.argv[1], sys.argv[2], shard_bytes=60_000))
"""


def test_a_killed_pack_goes_on_with_finished_shards_and_ends_in_the_same_bytes(shapes, packed, tmp_path):
    out, kept, kills = tmp_path / "out", {}, 0
    while True:
        done = subprocess.run([sys.executable, "-c", PACK, str(shapes), str(out), str(13 + 7 * kills)])
        assert all((out / name).stat().st_ino == inode for name, inode in kept.items())
        if done.returncode == 0:
            break
        assert done.returncode == -signal.SIGKILL
        lines = [json.loads(line) for line in (out / "packing.jsonl").read_text().splitlines(keepends=True)[1:]
                 if line.endswith("\n")]  # fmt: skip
        kept = {line["shard"][0]: (out / line["shard"][0]).stat().st_ino for line in lines}
        kills += 1
    assert kills >= 3
    assert contents(out) == contents(packed)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    assert pack_coco(shapes, out, shard_bytes=SHARD_BYTES).train_images == 8
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before


def test_processes_that_read_change_nothing(shapes, packed, tmp_path):
    pack_coco(shapes, tmp_path / "out", shard_bytes=SHARD_BYTES, workers=1)
    assert contents(tmp_path / "out") == contents(packed)


# ---- learnt from


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(folder / "weights.safetensors")


def learn(folder, source, **how):
    options = Options(save_steps=2)
    return train(tiny(epochs=1), source, out=folder, seed=5, device="cpu", options=options, **how).folder


@pytest.fixture(scope="module")
def made(shapes, tmp_path_factory) -> Path:
    """A run of four steps on the folder."""
    return learn(tmp_path_factory.mktemp("made") / "run", shapes)


def scores(folder: Path) -> tuple:
    record = json.loads((folder / "run.json").read_text())
    shown = [[row["train_loss"], row["val_loss"], row["val_box_ap"]] for row in record["history"]]
    return shown, record["result"]["box"], (folder / "detections.json").read_bytes()


def test_a_detector_learns_from_shards_what_it_learns_from_the_folder_to_the_bit(made, packed, tmp_path):
    folder = learn(tmp_path / "run", packed, workers=1)
    one, two = weights(made), weights(folder)
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert scores(folder) == scores(made)


def test_a_run_on_shards_that_was_stopped_goes_on_from_them(made, packed, shapes, tmp_path, monkeypatch):
    step = loop._Run._step

    def failing(run, *rest):
        if run.at.step == 3:  # a checkpoint is of step 2
            raise ArithmeticError("the power went")
        return step(run, *rest)

    with monkeypatch.context() as only:
        only.setattr(loop._Run, "_step", failing)
        with pytest.raises(ArithmeticError):
            learn(tmp_path / "run", packed)
    assert (tmp_path / "run/step-2").is_dir()
    with pytest.raises(BadRun, match="other"):  # which pictures a folder holds, no fingerprint says
        learn(tmp_path / "run", shapes, resume=True)
    folder = learn(tmp_path / "run", packed, resume=True)
    assert all(torch.equal(one, weights(folder)[name]) for name, one in weights(made).items())
    assert scores(folder) == scores(made)


def test_a_run_is_judged_by_shards_as_by_the_folder(made, shapes, packed):
    run = open_run(made)
    found = []
    for source in (shapes, packed):
        images, said, _ = every_picture(source, class_names=run.classes)
        batches = evaluation_batches(images, run.view, batch_images=3)
        found.append(evaluate(run.model, batches, images, device=torch.device("cpu")).json())
    assert said == f"the held-out part of the shards {packed}: 5 pictures with 18 objects"
    assert found[0] == found[1]
    assert found[0]["n"] == 5


# ---- opened


def with_files(folder: Path, **parts) -> Path:
    """The COCO files replaced, as by somebody who tells the manifest so."""
    held = json.loads((folder / "manifest.json").read_text())
    for part, content in parts.items():
        place = write(folder / f"annotations/instances_{part}.json", content)
        held["files"][f"annotations/instances_{part}.json"] = hashlib.sha256(place.read_bytes()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(held))
    return folder


def test_a_coco_file_that_is_not_the_archives_is_refused(packed, tmp_path, monkeypatch, capsys):
    place = copied(packed, tmp_path / "set")
    file = place / "annotations/instances_train.json"
    content = json.loads(file.read_text())
    file.write_text(file.read_text().replace("000003.png", "000033.png"))
    with pytest.raises(BadData, match=r"instances_train\.json: its sha256 is .* so it was changed"):
        open_coco(place)
    assert main(["index", str(place)]) == 2
    assert "1 files of" in capsys.readouterr().err
    file.unlink()
    with pytest.raises(BadData, match=r"instances_train\.json is missing, and manifest\.json names it"):
        open_coco(place)
    assert is_coco(place)  # never a folder for a classifier
    assert open_coco(with_files(place, train=content)).train.names[3] == "000003.png"
    images = content["images"]
    with pytest.raises(BadData, match=r"lists 7 pictures, and the archives hold 8"):
        open_coco(with_files(place, train=content | {"images": images[1:]}))
    swapped = content | {"images": [images[1], images[0], *images[2:]]}
    with pytest.raises(BadData, match=r"has train/000001\.png where the archives of .* hold train/000000\.png"):
        open_coco(with_files(place, train=swapped))
    monkeypatch.setattr(shards, "_ASKED", 1)
    swapped = content | {"images": [*images[:4], images[5], images[4], *images[6:]]}
    found = open_coco(with_files(place, train=swapped)).train  # seen when it is read, at the latest
    assert found.load(3).size == (96, 96)
    with pytest.raises(BadData, match=r"has train/000005\.png where the archives of .* hold train/000004\.png"):
        found.load(4)


@pytest.mark.parametrize("cut", ["train-00001.tar", "val.start.npy"])
def test_damage_of_archives_or_index_is_found_as_in_shards_of_labels(packed, tmp_path, cut, capsys):
    place = copied(packed, tmp_path / "set")
    (place / cut).write_bytes((place / cut).read_bytes()[:-8])
    with pytest.raises(BadData, match=cut):
        open_coco(place)
    content = bytearray((packed / cut).read_bytes())
    content[-1] ^= 1
    (place / cut).write_bytes(content)
    assert main(["index", str(place)]) == 2
    assert cut in capsys.readouterr().err


def test_shards_in_a_store_are_read_by_picture_and_a_stream_is_refused(packed, shapes, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    store = fsspec.filesystem("memory")
    for name, content in contents(packed).items():
        store.pipe_file(f"/coco-shards/{name}", content)
    try:
        assert is_coco("memory://coco-shards")
        one, two = open_coco(shapes), open_coco("memory://coco-shards")
        two.train.expect([1, 2])
        assert (seen(two.train), seen(two.val)) == (seen(one.train), seen(one.val))
        assert two.train.fingerprint() == open_coco(packed).train.fingerprint()  # the place does not count
        assert {path.suffix for path in (tmp_path / "cache/lambdanets").iterdir()} == {".npy", ".json"}
        for where in ("memory://coco-shards", packed):
            assert is_coco(f"stream:{where}")
            with pytest.raises(BadData, match="a detector reads pictures in any order, and a stream has one"):
                open_coco(f"stream:{where}")
        store.rm("/coco-shards/manifest.json")
        with pytest.raises(BadData, match=r"coco-shards/manifest\.json"):
            is_coco("memory://coco-shards")
    finally:
        store.rm("/coco-shards", recursive=True)


def test_a_manifest_that_is_no_coco_sets_or_leads_elsewhere_is_refused(packed, tmp_path):
    good = json.loads((packed / "manifest.json").read_text())
    place = copied(packed, tmp_path / "set")
    for change, words in (
        ({"files": {}}, "has no 'files'"),
        ({"files": {"../up.json": "0" * 64}}, "does not lie beside the manifest"),
        ({"files": {"x.json": 3}}, "is none"),
        ({"files": {"x.json": "0" * 64}}, r"names no annotations/instances_train\.json"),
        ({"base": "memory://elsewhere"}, "names another place for its archives, memory://elsewhere"),
    ):
        (place / "manifest.json").write_text(json.dumps(good | change))
        with pytest.raises(BadData, match=words):
            open_coco(place)


def test_what_does_not_fit_shards_of_coco_is_refused_in_a_sentence(shapes, packed, tmp_path, capsys):
    def refused(*asked: object) -> str:
        assert main([str(one) for one in asked]) == 2
        return capsys.readouterr().err

    assert "whose boxes and masks are in the pictures' own pixels" in refused(
        "pack", shapes, tmp_path / "o", "--max-side-px", 64
    )
    assert "is a data set of shards already" in refused("pack", packed, tmp_path / "o")
    assert "holds the shards of another folder, or of other sizes" in refused("pack", shapes, packed)
    assert "has COCO files: give --recipe detect" in refused("train", "--recipe", "folder", "--data", packed)
    assert "leave --images-dir out" in refused("train", "--data", packed, "--images-dir", shapes)
    assert "these lie in shards" in refused("check", packed, "--fix", tmp_path / "o")
    (tmp_path / "plain/a").mkdir(parents=True)
    assert "--skip-missing is of COCO files" in refused("pack", tmp_path / "plain", tmp_path / "o", "--skip-missing")
    with pytest.raises(BadData, match=r"holds no label a picture but annotations/instances_train\.json"):
        data.folder(packed)
    assert main(["check", str(packed)]) == 0
