"""A selection from labelled pictures: held-out ones and copies of them are left out, a page shows what was taken."""

import io
import json
import shutil

import fsspec
import numpy as np
import pytest
from label_tables import by_class, labels_of, read, table, write
from PIL import Image

from lambdanets import cli
from lambdanets.data.pack import pack
from lambdanets.data.shards import open_pictures
from lambdanets.data.source import open_source
from lambdanets.errors import BadData
from lambdanets.pseudo_labels.hashes import bytes_hash, look_hash
from lambdanets.pseudo_labels.select import Asked, select

CLASSES = ["bird", "cat", "dog"]
PX = 160


@pytest.fixture(scope="module")
def parts_of_photographs():
    """60 different parts of two photographs."""
    from sklearn.datasets import load_sample_images

    whole = [Image.fromarray(levels) for levels in load_sample_images().images]
    places = [(of, x, y) for of in whole for x in range(0, 480, 80) for y in range(100, 265, 36)]  # below the sky
    return [of.crop((x, y, x + PX, y + PX)) for of, x, y in places]


def encoded(picture, form="PNG", **how):
    file = io.BytesIO()
    picture.save(file, form, **how)
    return file.getvalue()


@pytest.fixture(scope="module")
def world(tmp_path_factory, parts_of_photographs):
    """A labelled folder of pictures; unlabelled shards, among them copies of those: byte for byte, encoded again,
    halved; pictures that are there twice; and a file that is no picture."""
    root = tmp_path_factory.mktemp("world")
    pictures = parts_of_photographs
    for number, (split, of) in enumerate([("train", c) for c in CLASSES * 3] + [("val", c) for c in CLASSES * 2]):
        place = root / "labelled" / split / of / f"{number}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(encoded(pictures[number]))
    files = {f"new {number}.png": encoded(pictures[number]) for number in range(20, 60)}
    files |= {f"again {number}.png": encoded(pictures[number]) for number in (20, 21, 22)}
    files |= {"train same.png": encoded(pictures[0]), "held same.png": encoded(pictures[9])}
    files |= {"train near.jpg": encoded(pictures[1], "JPEG", quality=85)}
    files |= {"held near.jpg": encoded(pictures[10], "JPEG", quality=80)}
    files |= {"held half.png": encoded(pictures[11].resize((PX // 2, PX // 2)))}
    (root / "pictures").mkdir()
    for name, content in files.items():
        (root / "pictures" / name).write_bytes(content)
    pack(root / "pictures", root / "shards", shard_bytes=700_000, unlabelled=True)
    return root


def labelled(world, folder, *, hashes=True):
    """Labels of all pictures of the shards: the class by the number, the doubt small."""
    images = open_pictures(world / "shards")
    labels = labels_of(
        folder, CLASSES, images.shards, hashes=hashes, fingerprint=images.fingerprint(), place=world / "shards"
    )
    for shard, first in zip(images.shards, images.first_images.tolist(), strict=False):
        ids = np.arange(first, first + shard.samples)
        contents = [images.read(int(i))[1] for i in ids]
        given = {
            "bytes_hash": [bytes_hash(content) for content in contents],
            "look_hash": [look_hash(images.load(int(i))) for i in ids],
        }
        write(labels, shard, table(labels.schema, ids % 3, 0.01 + ids / 1000, classes=3, **given))
    return images


@pytest.fixture(scope="module")
def labels(world):
    labelled(world, world / "labels")
    return world / "labels"


def names_of(world, columns):
    images = open_pictures(world / "shards")
    return {images.names[int(i)] for i in columns["id"]}


def test_copies_of_held_out_pictures_are_left_out_listed_and_shown(world, labels, tmp_path, capsys):
    out = tmp_path / "out"
    data = world / "labelled"
    assert cli.main(["select", str(labels), "--out", str(out), "--per-class", "40", "--exclude", str(data)]) == 0
    held, columns = read(out)
    taken = names_of(world, columns)
    once = {f"new {n}.png" for n in range(23, 60)} | {"train same.png", "train near.jpg"}
    twice = [{f"new {n}.png", f"again {n}.png"} for n in (20, 21, 22)]
    assert taken - set.union(*twice) == once
    assert [len(taken & names) for names in twice] == [1, 1, 1]
    assert held["excluded"] == {
        "unreadable": 0, "held_out_equal": 1, "held_out_near": 2, "train_equal": 0, "train_near": 0,
        "repeated": 3, "doubtful": 0,
    }  # fmt: skip
    lines = [json.loads(line) for line in (out / "excluded.jsonl").read_text().splitlines()]
    images = open_pictures(world / "shards")
    assert [line["id"] for line in lines] == sorted(line["id"] for line in lines)
    by_name = {images.names[line["id"]]: line for line in lines}
    assert set(by_name) == {"held same.png", "held near.jpg", "held half.png"}
    assert by_name["held near.jpg"]["of"]["name"] == "cat/10.png"
    assert by_name["held near.jpg"]["reason"] == "held_out_near"
    assert 0 <= by_name["held half.png"]["bits"] <= 3
    _, val, _, _ = open_source(data, ())
    assert held["exclude"] == [{"source": str(data), "held_out": val.fingerprint(), "train": None}]
    said = capsys.readouterr().out
    assert said.startswith(f"{out}: 120 draws of 42 pictures for 3 of 3 classes, up to 40 a class; 48 were labelled")
    assert "left out: 1 held out equal, 2 held out near, 3 repeated" in said
    assert "a crop or a mirrored copy is not found" in said
    page = (out / "report.html").read_text()
    assert page.count("<img") == 1 + 24 + 2 * 2  # the classes, the most doubtful, two pairs
    assert "gone" not in page.split("<body>")[1]
    with Image.open(out / "classes.png") as drawn:
        assert drawn.width > 1000


def test_training_pictures_that_are_also_among_the_unlabelled_are_left_out_and_counted_if_asked(
    world, labels, tmp_path
):
    asked = Asked(per_class=40)
    for workers in (0, 2):
        out = tmp_path / f"out {workers}"
        select(labels, out, asked, exclude=[f"{world / 'labelled'}:all"], workers=workers)
        held, columns = read(out)
        assert not names_of(world, columns) & {"train same.png", "train near.jpg", "held same.png"}
        assert (held["excluded"]["train_equal"], held["excluded"]["train_near"]) == (1, 1)
        train, *_ = open_source(world / "labelled", ())
        assert held["exclude"][0]["train"] == train.fingerprint()
    for name in ("selection.json", "excluded.jsonl", "id.npy", "report.html"):
        assert (tmp_path / "out 0" / name).read_bytes() == (tmp_path / "out 2" / name).read_bytes()


def test_without_hashes_nothing_is_repeated_and_nothing_can_be_excluded(world, tmp_path):
    labelled(world, tmp_path / "labels", hashes=False)
    select(tmp_path / "labels", tmp_path / "out", Asked(per_class=40))
    held, columns = read(tmp_path / "out")
    assert (len(columns["id"]), held["excluded"]["repeated"]) == (48, 0)
    with pytest.raises(BadData, match=r"the labels have no hashes .*label again with hashes, or leave --exclude out"):
        select(tmp_path / "labels", tmp_path / "other", Asked(), exclude=[str(world / "labelled")])


def test_shards_that_moved_are_named_and_other_shards_refused(world, labels, tmp_path):
    moved = shutil.copytree(world / "shards", tmp_path / "moved")
    select(labels, tmp_path / "here", Asked(per_class=5))
    select(labels, tmp_path / "there", Asked(per_class=5), pictures=str(moved))
    assert read(tmp_path / "there")[0]["pictures"]["source"] == str(moved)
    assert by_class(read(tmp_path / "here")[1]) == by_class(read(tmp_path / "there")[1])
    pack(world / "pictures", tmp_path / "other", shard_bytes=400_000, unlabelled=True)
    with pytest.raises(BadData, match=r"give the shards that were labelled, with --data"):
        select(labels, tmp_path / "wrong", Asked(per_class=5), pictures=str(tmp_path / "other"))
    (moved / "unlabelled-00000.tar").write_bytes(b"")
    with pytest.raises(BadData, match=r"unlabelled-00000.tar has 0 bytes instead of"):
        select(labels, tmp_path / "cut", Asked(per_class=5), pictures=str(moved))


def test_labels_of_a_store_give_the_same_columns_and_may_not_send_us_elsewhere(world, labels, tmp_path):
    select(labels, tmp_path / "local", Asked(per_class=30))
    store = fsspec.filesystem("memory")
    store.put(str(labels), "/labels-of-b", recursive=True)
    with pytest.raises(BadData, match="names another place"):
        select("memory://labels-of-b", tmp_path / "remote", Asked(per_class=30))
    select("memory://labels-of-b", tmp_path / "remote", Asked(per_class=30), pictures=str(world / "shards"))
    assert by_class(read(tmp_path / "local")[1]) == by_class(read(tmp_path / "remote")[1])
    assert not (tmp_path / "remote" / ".labels").exists()
    store.rm("/labels-of-b", recursive=True)


def test_the_command_answers_what_is_wrong_with_one_sentence(world, labels, tmp_path, capsys):
    assert cli.main(["select", str(tmp_path / "none"), "--out", str(tmp_path / "out")]) == 2
    assert "is no folder of labels" in capsys.readouterr().err
    assert cli.main(["select", str(labels), "--out", str(tmp_path / "out"), "--near", "9"]) == 2
    assert "--near 9: 0 or more, and 0 to 7" in capsys.readouterr().err
    assert cli.main(["select", str(labels), "--out", str(tmp_path / "out"), "--exclude", str(tmp_path / "none")]) == 2
    assert "does not exist" in capsys.readouterr().err
