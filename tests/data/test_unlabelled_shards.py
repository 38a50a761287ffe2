"""Shards of pictures that nobody has labelled: packed, indexed, opened, and refused where labels are needed."""

import hashlib
import io
import itertools
import json
import pickle
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lambdanets import cli, data
from lambdanets.data import manifest as manifests
from lambdanets.data.images import Images
from lambdanets.data.pack import index, pack
from lambdanets.data.shards import open_pictures, stream
from lambdanets.errors import BadData


def picture(seed: int, kind: str = "PNG") -> bytes:
    levels = np.random.default_rng(seed).integers(0, 256, (9, 12, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(levels).save(file, kind)
    return file.getvalue()


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    """30 pictures, at the top and below, in folders that look like parts and like masks of one another."""
    root = tmp_path_factory.mktemp("tree")
    for place, n in (("", 5), ("train/cat", 5), ("val", 5), ("images", 5), ("masks", 5), ("deep/er.still", 5)):
        (root / place).mkdir(parents=True, exist_ok=True)
        for i in range(n):
            (root / place / f"{i}.png").write_bytes(picture(len(place) * 100 + i))
    (root / "notes.txt").write_text("not a picture")
    (root / "again.png").symlink_to(root / "0.png")  # the same file, counted once
    return root


@pytest.fixture(scope="module")
def packed(tree, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("packed") / "shards"
    done = pack(tree, out, shard_bytes=9_000, unlabelled=True)
    assert (done.unlabelled_images, done.train_images, done.val_images, done.left_out) == (30, 0, 0, 0)
    assert "30 images without labels in" in str(done)
    return out


def test_a_tree_of_pictures_becomes_shards_with_one_member_a_sample(tree, packed):
    held = manifests.manifest(str(packed))
    assert (list(held.splits), held.classes, held.labelled) == (["unlabelled"], (), False)
    assert set(held.columns["unlabelled"]) == {"start", "bytes"}
    names = [f"unlabelled-{number:05d}.tar" for number in range(len(held.splits["unlabelled"]))]
    assert [shard.name for shard in held.splits["unlabelled"]] == names
    assert len(names) >= 3
    columns = ("unlabelled.start.npy", "unlabelled.bytes.npy")
    assert {path.name for path in packed.iterdir()} == {"manifest.json", *names, *columns}
    for shard in held.splits["unlabelled"]:
        with tarfile.open(packed / shard.name) as tar:
            assert len(tar.getmembers()) == shard.samples
            assert all(member.name.endswith(".png") for member in tar.getmembers())
    images = open_pictures(packed)
    assert len(images) == 30
    assert images.classes == ()
    there = {path.relative_to(tree).as_posix() for path in tree.rglob("*.png")}
    assert set(images.names) == there - {"again.png"}
    for i in range(0, 30, 7):
        assert images.read(i)[1] == (tree / images.names[i]).read_bytes()
    assert list(images.names) != sorted(images.names)  # mixed


def test_unlabelled_pictures_travel_to_a_worker_and_have_labels_that_take_no_memory(packed):
    images = open_pictures(packed)
    again = pickle.loads(pickle.dumps(images))
    assert again.names[7] == images.names[7]
    assert again.fingerprint() == images.fingerprint()
    assert int(images.labels[29]) == 0
    assert images.labels.strides == (0,)
    assert [len(part) for part in images.label_parts()] == [30]
    assert [found.id for found in stream(images, resampled=False)] == list(range(30))


def test_the_fingerprint_of_pictures_is_that_of_their_shards_wherever_they_lie(packed, tmp_path):
    first = open_pictures(packed).fingerprint()
    moved = shutil.copytree(packed, tmp_path / "moved")
    assert open_pictures(moved).fingerprint() == first
    held = json.loads((moved / "manifest.json").read_text())
    held["splits"]["unlabelled"][0]["sha256"] = hashlib.sha256(b"other").hexdigest()
    (moved / "manifest.json").write_text(json.dumps(held))
    assert open_pictures(moved).fingerprint() != first


def test_of_a_labelled_set_every_picture_is_opened_training_ones_first(colours, tmp_path):
    pack(colours, tmp_path / "labelled")
    both = data.folder(tmp_path / "labelled")
    every = open_pictures(tmp_path / "labelled")
    assert list(every.names) == [*both.train.names, *both.val.names]
    assert len(every) == 33
    assert every.load(24).tobytes() == both.val.load(0).tobytes()
    assert every.first_images.tolist() == [0, 24, 33]
    assert not any(every.labels)
    again = pickle.loads(pickle.dumps(every))
    assert list(again.names) == list(every.names)


def test_training_on_pictures_without_labels_is_refused_and_says_what_they_are_for(packed, capsys):
    with pytest.raises(BadData, match=r"pictures without labels.*lambdanets label RUN --data"):
        data.folder(packed)
    assert cli.main(["train", "--recipe", "folder", "--data", str(packed), "--device", "cpu"]) == 2
    assert "pictures without labels" in capsys.readouterr().err


@pytest.mark.parametrize("workers", [0, 2])
def test_packing_that_was_cut_goes_on_to_the_same_bytes(tree, packed, workers, tmp_path, monkeypatch):
    from lambdanets.data import journal

    out, add, count = tmp_path / "out", journal.Job.add, itertools.count()

    def dies(*args: object, **how: object) -> None:
        add(*args, **how)
        if next(count) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(journal.Job, "add", dies)
    with pytest.raises(KeyboardInterrupt):
        pack(tree, out, shard_bytes=9_000, unlabelled=True, workers=workers)
    monkeypatch.undo()
    pack(tree, out, shard_bytes=9_000, unlabelled=True, workers=workers)
    assert {p.name: p.read_bytes() for p in out.iterdir()} == {p.name: p.read_bytes() for p in packed.iterdir()}


def test_bad_files_of_a_tree_are_left_out_listed_and_counted(tree, tmp_path, capsys):
    broken = shutil.copytree(tree, tmp_path / "tree", symlinks=False)
    (broken / "deep" / "empty.jpg").write_bytes(b"")
    out = tmp_path / "out"
    assert cli.main(["pack", str(broken), str(out), "--unlabelled"]) == 0
    assert "1 unreadable files left out" in capsys.readouterr().out
    assert "deep/empty.jpg" in (out / "bad_samples.jsonl").read_text()
    assert "deep/empty.jpg" not in list(open_pictures(out).names)


def archive(path: Path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def test_archives_of_others_are_indexed_and_what_lies_beside_a_picture_is_counted(tmp_path, capsys):
    archive(tmp_path / "b-10.tar", {"x.png": picture(1), "x.cls": b"no number", "y.png": picture(2)})
    archive(tmp_path / "b-9.tar", {"p.json": b"{]", "p.png": picture(3), "q.png": picture(4), "q.txt": b"a cat"})
    assert cli.main(["index", str(tmp_path), "--unlabelled"]) == 0
    said = capsys.readouterr().out
    assert "4 images without labels (3 with labels or other files beside them, ignored)" in said
    images = open_pictures(tmp_path)
    assert list(images.names) == ["b-9.tar/p", "b-9.tar/q", "b-10.tar/x", "b-10.tar/y"]
    assert [images.read(i)[1] for i in range(4)] == [picture(3), picture(4), picture(1), picture(2)]
    assert cli.main(["index", str(tmp_path)]) == 0  # compares
    assert cli.main(["index", str(tmp_path), "--unlabelled"]) == 0
    content = bytearray((tmp_path / "b-9.tar").read_bytes())
    content[1024 + 512 + 30] ^= 1
    (tmp_path / "b-9.tar").write_bytes(bytes(content))
    assert cli.main(["index", str(tmp_path), "--unlabelled"]) == 2
    assert "b-9.tar" in capsys.readouterr().err


def test_indexing_says_what_is_wrong_with_the_question(colours, tmp_path, capsys):
    with pytest.raises(BadData, match="has no archive"):
        index(tmp_path, unlabelled=True)
    with pytest.raises(BadData, match="--classes names what labels mean"):
        index(tmp_path, unlabelled=True, classes=tmp_path / "names.txt")
    pack(colours, tmp_path / "labelled")
    with pytest.raises(BadData, match="indexed already, with labels"):
        index(tmp_path / "labelled", unlabelled=True)
    (tmp_path / "empty").mkdir()
    with pytest.raises(BadData, match="no images below"):
        pack(tmp_path / "empty", tmp_path / "out", unlabelled=True)


@pytest.mark.parametrize("name", ["../out.png", "/etc/x.png", "a/../../x.png"])
def test_paths_that_climb_are_refused_in_archives_without_labels_too(name, tmp_path):
    archive(tmp_path / "a.tar", {name: picture(1)})
    with pytest.raises(BadData, match="leads out of the data set"):
        index(tmp_path, unlabelled=True)


def test_commands_pickles_and_strangers_in_an_unlabelled_index_are_refused(packed, tmp_path):
    with pytest.raises(BadData, match="would run a command"):
        open_pictures("pipe:cat x")
    place = shutil.copytree(packed, tmp_path / "set")
    np.save(place / "unlabelled.start.npy", np.array([object()] * 30), allow_pickle=True)
    with pytest.raises(BadData, match=r"unlabelled\.start\.npy"):
        open_pictures(place)
    held = json.loads((packed / "manifest.json").read_text())
    for wrong in ({"classes": ["cat", "dog"]}, {"splits": {"train": []}}, {"format": "lambdanets unlabelled shards 2"}):
        (place / "manifest.json").write_text(json.dumps({**held, **wrong}))
        with pytest.raises(BadData, match="is no manifest of shards"):
            open_pictures(place)


def test_manifests_with_labels_are_written_as_before() -> None:
    shard = manifests.Shard("train-00000.tar", 1, 2048, "0" * 64, "1" * 64)
    columns = {split: dict.fromkeys(manifests.COLUMNS, "2" * 64) for split in manifests.SPLITS}
    held = manifests.Manifest(("a", "b"), True, 0, "", {}, {"train": [shard], "val": []}, columns)
    text = held.text()
    assert text.startswith('{\n "format": "lambdanets shards 1",\n "classes": [')
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == "84b00c94a7c40330"


def test_an_unlabelled_set_is_a_list_of_images(packed):
    assert isinstance(open_pictures(packed), Images)
