"""Tar shards: packed, indexed, read by sample, streamed; what archives and stores of others do to them."""

import contextlib
import dataclasses
import errno
import fcntl
import functools
import gc
import hashlib
import io
import itertools
import json
import math
import os
import pickle
import random
import signal
import stat
import subprocess
import sys
import tarfile
import time
import tracemalloc
from pathlib import Path
from urllib.parse import unquote

import fsspec
import numpy as np
import pytest
import torch
from conftest import until
from fsspec.implementations.memory import MemoryFileSystem
from PIL import Image

from lambdanets import cli, data, files
from lambdanets.data import archive, index_files, shards
from lambdanets.data import pack as packing
from lambdanets.data.batches import Batches
from lambdanets.data.decode import open_image
from lambdanets.data.pack import index, pack
from lambdanets.data.transforms import View
from lambdanets.errors import BadData

VIEW = View(image_px=8, in_channels=3, mean=(0.5, 0.4, 0.3), std=(0.2, 0.25, 0.5))


def picture(seed: int, kind: str = "JPEG", size: tuple[int, int] = (24, 16)) -> bytes:
    levels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(levels).save(file, kind)
    return file.getvalue()


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """60 pictures of three classes to train on, nine to validate; names that archives and WebDataset find hard."""
    root = tmp_path_factory.mktemp("photos")
    hard = ["a.b.jpg", "a.b.png", "1 + 1.jpg", "ünï.jpg", "50%25.jpg", "x" * 120 + ".jpg", "deep.er/0.jpg", "UP.JPG"]
    for split, n in (("train", 20), ("val", 3)):
        for label, name in enumerate(("cat", "dog", "eel")):
            names = [f"{i}.jpg" for i in range(n)]
            if (split, name) == ("train", "dog"):
                names[: len(hard)] = hard
            for i, file in enumerate(names):
                path = root / split / name / file
                path.parent.mkdir(parents=True, exist_ok=True)
                kind = "PNG" if file.endswith("png") else "JPEG"
                path.write_bytes(picture(1000 * label + i + 100 * len(split), kind))
    (root / "train/eel/5.jpg").write_bytes(picture(5, "WEBP"))  # what a file is, its content says
    return root


@pytest.fixture(scope="module")
def packed(photos, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("packed") / "shards"
    done = pack(photos, out, shard_bytes=25_000)
    assert (done.train_images, done.val_images, done.left_out) == (60, 9, 0)
    assert done.shards >= 4
    return out


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def sampled(images) -> dict[str, tuple[int, bytes]]:
    return {images.names[i]: (int(images.labels[i]), images.load(i).tobytes()) for i in range(len(images))}


# ---- packed and read


def test_shards_hold_what_the_folder_holds(photos, packed):
    folder, found = data.folder(photos), data.folder(packed)
    assert found.train.classes == found.val.classes == ("cat", "dog", "eel")
    for one, two in ((folder.train, found.train), (folder.val, found.val)):
        assert sampled(two) == sampled(one)  # names, labels, pixels
    assert found.val.names[:] == list(folder.val.names)
    assert found.train.names[:] != list(folder.train.names)  # mixed, so that a shard holds every class
    assert "60 training and 9 validation images of 3 classes" in found.how
    data.check_labels(found.train)
    assert found.train.fingerprint() != found.val.fingerprint()
    assert data.folder(packed).train.fingerprint() == found.train.fingerprint()


def test_each_shard_is_a_tar_that_others_read_and_none_is_too_large(photos, packed):
    held = shards.manifest(str(packed))
    assert set(contents(packed)) == {
        "manifest.json", *(shard.name for of in held.splits.values() for shard in of),
        *(f"{split}.{column}.npy" for split in ("train", "val") for column in ("start", "bytes", "label")),
    }  # fmt: skip
    seen = {}
    for shard in held.splits["train"]:
        content = (packed / shard.name).read_bytes()
        assert (len(content), hashlib.sha256(content).hexdigest()) == (shard.bytes, shard.sha256)
        assert len(content) <= 25_000
        with tarfile.open(packed / shard.name, "r:") as tar:
            members = tar.getmembers()
            assert len(members) == 2 * shard.samples
            for image, label in zip(members[::2], members[1::2], strict=True):
                key = image.name.rpartition(".")[0]
                assert label.name == f"{key}.cls"
                seen[unquote(key)] = (int(tar.extractfile(label).read()), tar.extractfile(image).read(), image.name)
    files = [path for path in (photos / "train").rglob("*") if path.is_file()]
    stored = {name: content for name, (_, content, _) in seen.items()}
    assert stored == {path.relative_to(photos).as_posix(): path.read_bytes() for path in files}
    assert seen["train/eel/5.jpg"][2].endswith(".webp")
    assert seen["train/dog/UP.JPG"][2].endswith(".jpg")


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_webdataset_itself_reads_the_shards(packed):
    import webdataset as wds

    held = shards.manifest(str(packed)).splits["train"]
    urls = [str(packed / shard.name) for shard in held]
    read = list(wds.WebDataset(urls, shardshuffle=False))
    assert len(read) == 60
    assert sorted(int(sample["cls"]) for sample in read) == [0] * 20 + [1] * 20 + [2] * 20
    gc.collect()  # it leaves files open


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_of_shards_resume_to_the_bit_with_any_number_of_workers(packed, workers):
    train = data.folder(packed).train
    arguments = {"batch_images": 8, "training": True, "augment": "imagenet", "seed": 3}
    whole = list(Batches(train, VIEW, **arguments).epoch(2))
    rest = list(Batches(train, VIEW, workers=workers, **arguments).epoch(2, first_batch=3))
    assert [b.ids for b in rest] == [b.ids for b in whole[3:]]
    assert all(torch.equal(a.images, b.images) for a, b in zip(rest, whole[3:], strict=True))
    assert all(torch.equal(a.labels, b.labels) for a, b in zip(rest, whole[3:], strict=True))


def test_shards_travel_to_a_worker_that_is_not_forked(packed):
    train = data.folder(packed).train
    content = pickle.dumps(train)
    assert len(content) < 1000  # a name, no index
    again = pickle.loads(content)
    assert again.names[7] == train.names[7]
    assert again.load(7).tobytes() == train.load(7).tobytes()


@pytest.mark.parametrize("workers", [0, 2])
def test_larger_pictures_are_shrunk_and_smaller_ones_kept(workers, tmp_path):
    made = {"train/a/0": (300, 200), "train/a/1": (40, 64), "train/b/0": (64, 65), "train/b/1": (9, 9),
            "val/a/0": (100, 400), "val/b/0": (10, 10)}  # fmt: skip
    for place, size in made.items():
        path = tmp_path / "in" / f"{place}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture(1, "PNG", size))
    pack(tmp_path / "in", tmp_path / "out", max_side_px=64, workers=workers)
    found = data.folder(tmp_path / "out")
    sizes = {images.names[i]: images.load(i).size for images in (found.train, found.val) for i in range(len(images))}
    assert sizes == {"train/a/0.png": (64, 43), "train/a/1.png": (40, 64), "train/b/0.png": (63, 64),
                     "train/b/1.png": (9, 9), "val/a/0.png": (16, 64), "val/b/0.png": (10, 10)}  # fmt: skip
    kept = found.train.names[:].index("train/a/1.png")
    assert found.train.load(kept).tobytes() == open_image(picture(1, "PNG", (40, 64))).tobytes()


def test_unreadable_files_are_left_out_listed_and_counted(tmp_path):
    for name in ("train/a", "train/b", "val/a", "val/b"):
        (tmp_path / "in" / name).mkdir(parents=True)
        for i in range(6):
            (tmp_path / "in" / name / f"{i}.jpg").write_bytes(picture(i))
    (tmp_path / "in/train/a/2.jpg").write_bytes(picture(2)[:300])
    (tmp_path / "in/train/b/4.jpg").write_bytes(b"<html>")
    (tmp_path / "in/val/b/5.jpg").write_bytes(b"")
    done = pack(tmp_path / "in", tmp_path / "out", shard_bytes=6000, max_bad_frac=0.2)
    assert (done.train_images, done.val_images, done.left_out) == (10, 11, 3)
    assert "3 unreadable files left out, listed in bad_samples.jsonl" in str(done)
    lines = [json.loads(line) for line in (tmp_path / "out/bad_samples.jsonl").read_text().splitlines()]
    reasons = {line["name"]: line["reason"] for line in lines}
    assert set(reasons) == {"train/a/2.jpg", "train/b/4.jpg", "val/b/5.jpg"}
    assert "cut off" in reasons["train/a/2.jpg"]
    assert reasons["val/b/5.jpg"] == "the file is empty"
    found = data.folder(tmp_path / "out")
    assert "3 unreadable ones were left out" in found.how  # R51: the denominator says so
    assert not {*reasons} & {*found.train.names, *found.val.names}


def test_a_split_without_a_readable_picture_is_an_error(tmp_path):
    for name in ("train/a", "train/b", "val/a"):
        (tmp_path / "in" / name).mkdir(parents=True)
        (tmp_path / "in" / name / "0.jpg").write_bytes(picture(0) if name != "val/a" else b"")
    with pytest.raises(BadData, match=r"none of the 1 images of val can be read.*val/a/0\.jpg: the file is empty"):
        pack(tmp_path / "in", tmp_path / "out")


PACK = """
import os, sys, time
from lambdanets.data import archive, pack
left = [int(sys.argv[3])]  # dies at the n-th file that is put in place or line that is written; of 0, as on a slow disk
def step(real):
    def call(*args, **named):
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), 9)
        if left[0] < 0:
            time.sleep(0.01)
        return real(*args, **named)
    return call
os.replace, os.fsync = step(os.replace), step(os.fsync)
print(pack.pack(sys.argv[1], sys.argv[2], shard_bytes=25_000))
"""


def test_a_killed_pack_continues_to_the_same_bytes(photos, packed, tmp_path):
    """Killed at the third, fifth ... write that counts: nothing missing or twice, no finished shard written again."""
    out, kills, kept = tmp_path / "out", 0, {}
    while True:
        command = [sys.executable, "-c", PACK, str(photos), str(out), str(3 + 2 * kills)]
        code = subprocess.run(command, capture_output=True, text=True)
        for name, inode in kept.items():
            assert (out / name).stat().st_ino == inode  # not even replaced by an equal one
        lines = (out / "packing.jsonl").read_text().splitlines() if (out / "packing.jsonl").exists() else []
        whole = [json.loads(line) for line in lines[1:] if line.endswith("}")]
        kept = {line["shard"][0]: (out / line["shard"][0]).stat().st_ino for line in whole}
        if code.returncode == 0:
            break
        assert code.returncode == -signal.SIGKILL, code.stderr
        kills += 1
        assert kills < 40
    assert kills >= 4
    assert contents(out) == contents(packed)


@pytest.mark.slow
def test_a_pack_killed_at_any_moment_continues_to_the_same_bytes(photos, packed, tmp_path):
    dice, out, kills = random.Random(0), tmp_path / "out", 0
    for _ in range(60):
        process = subprocess.Popen([sys.executable, "-c", PACK, str(photos), str(out), "0"], stdout=subprocess.PIPE)
        try:
            process.communicate(timeout=dice.uniform(0.2, 0.6))
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            kills += 1
            continue
        break
    assert kills
    assert pack(photos, out, shard_bytes=25_000).train_images == 60
    assert contents(out) == contents(packed)


def test_packing_again_changes_nothing_and_packing_something_else_is_refused(photos, packed, tmp_path):
    before = {path.name: path.stat().st_mtime_ns for path in packed.iterdir()}
    assert pack(photos, packed, shard_bytes=25_000).train_images == 60
    assert {path.name: path.stat().st_mtime_ns for path in packed.iterdir()} == before
    with pytest.raises(BadData, match="holds the shards of another folder"):
        pack(photos, packed, shard_bytes=26_000)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").touch()
    with pytest.raises(BadData, match=r"not empty \(it holds notes.txt\)"):
        pack(photos, tmp_path / "full")
    with pytest.raises(BadData, match="lies in"):
        pack(photos, photos / "train" / "out")
    with pytest.raises(BadData, match="a data set of shards already"):
        pack(packed, tmp_path / "new")


def test_two_jobs_in_one_folder_and_another_jobs_journal_are_refused(photos, tmp_path, monkeypatch):
    out = tmp_path / "out"
    real = packing._pack_split

    def while_packing(job, *rest):
        with pytest.raises(BadData, match="is being written by another process"):
            pack(photos, out)
        raise KeyboardInterrupt

    monkeypatch.setattr(packing, "_pack_split", while_packing)
    with pytest.raises(KeyboardInterrupt):
        pack(photos, out)
    monkeypatch.setattr(packing, "_pack_split", real)
    with pytest.raises(BadData, match="holds an unfinished job on other pictures"):
        pack(photos, out, max_side_px=9)
    assert pack(photos, out).train_images == 60


def test_a_full_disk_leaves_no_debris_and_the_finished_shards(photos, packed, tmp_path, monkeypatch):
    real, placed = packing.placed, []

    class Full(io.FileIO):
        def write(self, content):
            raise OSError(28, "No space left on device")

    def placing(path):
        placed.append(path)
        if len(placed) == 4:
            monkeypatch.setattr(os, "fdopen", Full)
        return real(path)

    monkeypatch.setattr(packing, "placed", placing)
    with pytest.raises(BadData, match=r"cannot be written.*No space left.*finished shards are kept"):
        pack(photos, tmp_path / "out", shard_bytes=25_000)
    assert not list((tmp_path / "out").glob(".*.part"))
    first = next(name for name in contents(packed) if name.endswith("00000.tar"))
    assert (tmp_path / "out" / first).read_bytes() == (packed / first).read_bytes()
    monkeypatch.undo()
    pack(photos, tmp_path / "out", shard_bytes=25_000)
    assert contents(tmp_path / "out") == contents(packed)


@pytest.fixture
def small(tmp_path) -> Path:
    """Twelve pictures to train on and twelve to validate, of two classes."""
    for split, of, i in itertools.product(("train", "val"), "ab", range(6)):
        path = tmp_path / "in" / split / of / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture(i + 10 * (of == "b") + 100 * (split == "val")))
    return tmp_path / "in"


def failing(monkeypatch, fault: int, times: float, *names: str) -> list[str]:
    """Reading these files fails so many times each; gives what was asked for."""
    real, asked = packing.read_file, []

    def read_file(path, *most):
        asked.append(str(path))
        if path.name in names and asked.count(str(path)) <= times:
            raise OSError(fault, os.strerror(fault), str(path))
        return real(path, *most)

    monkeypatch.setattr(packing, "read_file", read_file)
    monkeypatch.setattr(files, "PAUSES_S", (0.0, 0.0, 0.0))
    return asked


@pytest.mark.parametrize("fault", [errno.EIO, errno.EACCES, errno.ENOENT, errno.ESTALE])
def test_a_disk_that_fails_for_a_moment_changes_nothing(small, tmp_path, monkeypatch, fault):
    pack(small, tmp_path / "good", shard_bytes=6000)
    asked = failing(monkeypatch, fault, 3, "2.jpg", "5.jpg")
    assert pack(small, tmp_path / "out", shard_bytes=6000).left_out == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "good")
    assert len(asked) == 24 + 3 * 8  # each file is read once, but for what failed


@pytest.mark.parametrize("fault", [errno.EIO, errno.EACCES, errno.ENOENT, errno.ESTALE])
def test_a_disk_that_stays_away_ends_packing_and_nothing_is_written_down(small, tmp_path, monkeypatch, capsys, fault):
    pack(small, tmp_path / "good", shard_bytes=6000)
    failing(monkeypatch, fault, math.inf, "4.jpg")
    asked = ["pack", str(small), str(tmp_path / "out"), "--shard-bytes", "6000"]
    assert cli.main(asked) == 2
    said = capsys.readouterr().err
    assert "4.jpg: cannot be read, though it was tried again: " + os.strerror(fault) in said
    assert said.count("\n") == 1
    lines = [json.loads(line) for line in (tmp_path / "out/packing.jsonl").read_text().splitlines()]
    assert not any(line["bad"] for line in lines[1:])
    monkeypatch.undo()
    assert cli.main(asked) == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "good")


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("workers", [0, 1])
def test_more_bad_pictures_than_allowed_end_packing_which_goes_on_once_they_are_repaired(
    small, tmp_path, split, workers
):
    out, how = tmp_path / "out", {"shard_bytes": 3000, "workers": workers}
    pack(small, tmp_path / "good", shard_bytes=3000)
    victims = {small / split / of / f"{i}.jpg": b"<html>" for of, i in itertools.product("ab", range(6)) if i != 3}
    good = {path: path.read_bytes() for path in victims}
    for path, content in victims.items():
        path.write_bytes(content)
    with pytest.raises(BadData, match=rf"at least 10 of the 12 images of {split} cannot be read, 1 allowed") as caught:
        pack(small, out, **how)
    listed = str(caught.value).splitlines()[1:]
    assert sorted(line.split(":")[0].strip() for line in listed) == sorted(
        path.relative_to(small).as_posix() for path in victims
    )
    with pytest.raises(BadData, match=r"9 allowed.*raise --max-bad-frac \(now 0\.8\)"):
        pack(small, out, **how, max_bad_frac=0.8)  # one less than there are
    for path, content in good.items():
        path.write_bytes(content)
    assert pack(small, out, **how).left_out == 0
    assert contents(out) == contents(tmp_path / "good")


def test_a_raised_bound_goes_on_with_the_same_job(small, tmp_path):
    for i in range(3):
        (small / f"val/a/{i}.jpg").write_bytes(b"<html>")
    with pytest.raises(BadData, match="of val cannot be read"):
        pack(small, tmp_path / "out", shard_bytes=3000)
    before = {path.name: path.stat().st_ino for path in (tmp_path / "out").glob("train-*.tar")}
    done = pack(small, tmp_path / "out", shard_bytes=3000, max_bad_frac=0.25)
    assert (done.train_images, done.val_images, done.left_out) == (12, 9, 3)
    assert {path.name: path.stat().st_ino for path in (tmp_path / "out").glob("train-*.tar")} == before


def test_a_picture_that_an_earlier_run_wrote_down_as_bad_is_looked_at_again(small, tmp_path, monkeypatch):
    """Also where an older version took a fault of the disk for a bad picture."""
    pack(small, tmp_path / "good", shard_bytes=3000)
    real = (small / "train/a/2.jpg").read_bytes()
    (small / "train/a/2.jpg").write_bytes(b"<html>")
    failing(monkeypatch, errno.EIO, math.inf, "5.jpg")
    with monkeypatch.context() as only:
        only.setattr(packing, "open_image", lambda content, name: open_image(content, name=name))
        real_content = packing._content
        only.setattr(packing, "_content", lambda path, name: real_content(path, name) if path.parts[-3] == "train" or
                     name != "val/b/5.jpg" else (_ for _ in ()).throw(data.DiskFault(name, "away")))  # fmt: skip
        only.setattr(packing, "read_file", files.read_file)
        with pytest.raises(data.DiskFault):
            pack(small, tmp_path / "out", shard_bytes=3000)
    monkeypatch.undo()
    journal = (tmp_path / "out/packing.jsonl").read_text()
    assert '"bad": {"train/a/2.jpg"' in journal
    assert '"split": "val"' in journal
    (small / "train/a/2.jpg").write_bytes(real)
    pack(small, tmp_path / "out", shard_bytes=3000)
    assert contents(tmp_path / "out") == contents(tmp_path / "good")


@pytest.mark.parametrize("line", [1, 2])
@pytest.mark.parametrize(
    "damage",
    [b"", b"\xff\xfe", b"[" * 100_000, b"[]", b'{"split": "train"}',
     b'{"split": 3, "shard": null, "next": 1, "bad": {}}',
     b'{"split": "train", "shard": ["../x", 1, 9, "0"], "next": 1, "bad": {}}',
     b'{"split": "train", "shard": 7, "next": 1, "bad": {}}',
     b'{"split": "train", "shard": null, "next": 1, "bad": [1]}',
     b'{"split": "train", "shard": null, "next": "x", "bad": {}}'],
)  # fmt: skip
def test_a_damaged_line_of_the_journal_is_said_and_its_shards_are_made_again(
    photos, packed, tmp_path, capsys, damage, line
):
    out = stopped(photos, tmp_path / "out")
    lines = (out / "packing.jsonl").read_bytes().splitlines()
    lines[line] = damage
    (out / "packing.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    assert pack(photos, out, shard_bytes=25_000).train_images == 60
    assert contents(out) == contents(packed)
    assert f"packing.jsonl, line {line + 1} is damaged (" in capsys.readouterr().err


def stopped(photos: Path, out: Path) -> Path:
    """A job that was stopped at its last file but one."""
    with pytest.MonkeyPatch.context() as only:
        only.setattr(packing.Job, "finish", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            pack(photos, out, shard_bytes=25_000)
    return out


@pytest.mark.parametrize("damage", [b"\xff", b"[]", b'{"plan": 3}', b"[" * 100_000, b"{"])
def test_a_journal_whose_job_is_not_known_is_refused(photos, tmp_path, damage):
    out = stopped(photos, tmp_path / "out")
    lines = (out / "packing.jsonl").read_bytes().splitlines()
    (out / "packing.jsonl").write_bytes(b"\n".join([damage, *lines[1:], b""]))
    with pytest.raises(BadData, match=r"packing\.jsonl, line 1 is damaged .*: remove .*out and give the same command"):
        pack(photos, out, shard_bytes=25_000)


@pytest.mark.parametrize("name", [".train-00000.tar.npy", ".train-00001.tar.npy"])
def test_damaged_rows_of_a_finished_shard_are_an_error(photos, tmp_path, name):
    out = stopped(photos, tmp_path / "out")
    for content in (b"", b"x", np.lib.format.magic(2, 0) + b"\xff" * 4, (out / name).read_bytes()[:-9]):
        (out / name).write_bytes(content)
        with pytest.raises(BadData, match=rf"{name} .*(is no index|has \d+ bytes, where).* begin again"):
            pack(photos, out, shard_bytes=25_000)


def test_a_link_or_a_pipe_in_the_journals_place_is_not_followed(photos, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "victim").write_text("mine\n")
    (tmp_path / "out/packing.jsonl").symlink_to(tmp_path / "victim")
    with pytest.raises(BadData, match="cannot be written"):
        pack(photos, tmp_path / "out")
    assert (tmp_path / "victim").read_text() == "mine\n"
    (tmp_path / "out/packing.jsonl").unlink()
    os.mkfifo(tmp_path / "out/packing.jsonl")
    with pytest.raises(BadData, match="cannot be written"):
        pack(photos, tmp_path / "out")


@pytest.mark.parametrize("fault", [errno.EINVAL, errno.ENOTSUP])
def test_a_disk_without_locks_that_synchronises_no_folders_is_packed_to(photos, packed, tmp_path, monkeypatch, fault):
    real = os.fsync

    def fsync(opened):
        if stat.S_ISDIR(os.fstat(opened).st_mode):
            raise OSError(fault, "no")
        real(opened)

    def flock(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(fcntl, "flock", flock)
    pack(photos, tmp_path / "out", shard_bytes=25_000)
    assert contents(tmp_path / "out") == contents(packed)


def test_names_too_long_for_the_disk_are_errors_and_the_longest_are_indexed(photos, tmp_path):
    with pytest.raises(BadData, match="File name too long"):
        pack(photos, tmp_path / ("x" * 256))
    place = foreign(tmp_path / "theirs")
    name = "train-" + "y" * 245 + ".tar"
    (place / "train-1.tar").rename(place / name)
    index(place)
    assert data.folder(place).train.names[4] == f"{name}/0000"
    assert {path.suffix for path in place.iterdir()} == {".tar", ".npy", ".json"}
    assert not [path for path in place.iterdir() if path.name.startswith(".")]


@pytest.fixture
def large(tmp_path) -> Path:
    """Pictures that take some time each."""
    file = io.BytesIO()
    Image.new("RGB", (2000, 2000), "teal").save(file, "PNG")
    for split, of, i in itertools.product(("train", "val"), "ab", range(12)):
        path = tmp_path / "in" / split / of / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(file.getvalue())
    return tmp_path / "in"


def family(pid: int) -> set[int]:
    """The processes below that one."""
    try:
        below = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except FileNotFoundError:
        return set()
    return {*below, *(one for child in below for one in family(child))}


@pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")
@pytest.mark.parametrize(
    "sent",
    [
        pytest.param(signal.SIGKILL, marks=pytest.mark.slow),
        pytest.param(signal.SIGTERM, marks=pytest.mark.slow),
        signal.SIGINT,
    ],
)
def test_no_worker_outlives_a_pack_that_was_ended_and_the_same_command_goes_on(large, tmp_path, sent, children):
    out = tmp_path / "out"
    command = [sys.executable, "-m", "lambdanets", "pack", str(large), str(out), "--workers", "2"]
    command += ["--shard-bytes", "10000", "--max-side-px", "64"]
    process = children.program(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    until(lambda: (out / "train-00001.tar").exists(), 60)
    workers = family(process.pid)
    assert len(workers) >= 2
    process.send_signal(sent)
    error = process.communicate(timeout=30)[1]
    until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in workers), 10)
    if sent == signal.SIGINT:
        assert process.returncode == 130
        assert error.strip() == "lambdanets: interrupted: the same command goes on, finished shards are kept"
    else:
        assert process.returncode == -sent
    finished = [json.loads(line)["shard"][0] for line in (out / "packing.jsonl").read_text().splitlines()[1:]]
    kept = {name: (out / name).stat().st_ino for name in finished}
    assert subprocess.run(command, capture_output=True).returncode == 0
    assert {name: (out / name).stat().st_ino for name in kept} == kept
    pack(large, tmp_path / "good", max_side_px=64, shard_bytes=10_000)
    assert contents(out) == contents(tmp_path / "good")


def test_a_worker_that_is_killed_ends_packing_with_an_error(large, tmp_path, children):
    command = [sys.executable, "-m", "lambdanets", "pack", str(large), str(tmp_path / "out"), "--workers", "1"]
    process = children.program(command, stderr=subprocess.PIPE, text=True)

    def reading() -> list[int]:
        return [pid for pid in family(process.pid) if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]

    until(lambda: reading() and list((tmp_path / "out").glob("*.part")) + list((tmp_path / "out").glob(".*.part")), 60)
    os.kill(reading()[0], signal.SIGKILL)
    assert "a process that reads pictures was killed: give the same command" in process.communicate(timeout=60)[1]
    assert process.returncode == 2


# ---- damaged


def copied(packed: Path, to: Path) -> Path:
    to.mkdir()
    for path in packed.iterdir():
        (to / path.name).write_bytes(path.read_bytes())
    return to


def test_a_truncated_or_missing_shard_is_found_at_opening(packed, tmp_path):
    place = copied(packed, tmp_path / "cut")
    victim = place / "train-00001.tar"
    whole = victim.read_bytes()
    victim.write_bytes(whole[:-1000])
    with pytest.raises(BadData, match=rf"train-00001\.tar has {len(whole) - 1000:,} bytes instead of {len(whole):,}"):
        data.folder(place)
    victim.unlink()
    with pytest.raises(BadData, match=r"1 of \d+ shards .* train-00001\.tar is missing"):
        data.folder(place)


def test_a_damaged_header_is_an_error_that_names_the_shard_never_a_shorter_epoch(packed, tmp_path):
    place = copied(packed, tmp_path / "bad")
    found = data.folder(place)
    shard, start = "train-00001.tar", int(found.train.starts[int(found.train.first_images[1]) + 3])
    content = bytearray((place / shard).read_bytes())
    content[start : start + 512] = b"\xff" * 512
    (place / shard).write_bytes(content)
    victim = int(found.train.first_images[1]) + 3
    with pytest.raises(BadData, match=rf"{shard}, byte {start:,}: no header of a file"):
        found.train.load(victim)
    assert found.train.names[victim] == f"{shard}/sample 3"
    assert found.train.load(victim + 1).size == (24, 16)  # its neighbours are unharmed
    for workers in (0, 1):
        training = Batches(found.train, VIEW, batch_images=6, training=True, workers=workers)
        with pytest.raises(BadData, match=shard):  # not replaced: the data set is not what it was
            list(training.epoch(0))
    with pytest.raises(BadData, match=rf"1 files .* damaged or changed:\n.*{shard}, byte {start:,}"):
        index(place)
    content[start : start + 512] = (packed / shard).read_bytes()[start : start + 512]
    content[start + 700] ^= 1  # one bit of a picture
    (place / shard).write_bytes(content)
    with pytest.raises(BadData, match=rf"{shard}: found .* the manifest says"):
        index(place)
    assert index(packed).train_images == 60


def test_a_shard_replaced_by_another_of_its_size_is_noticed(packed, tmp_path):
    place = copied(packed, tmp_path / "swapped")
    found = data.folder(place)
    file = bytearray((place / "val-00000.tar").read_bytes())
    with tarfile.open(place / "val-00000.tar") as tar:
        second = tar.getmembers()[2]
    info = tarfile.TarInfo(second.name)
    info.size = second.size - 1
    file[second.offset : second.offset + 512] = info.tobuf()
    (place / "val-00000.tar").write_bytes(file)
    with pytest.raises(BadData, match=r"where the index has .* changed after it was indexed"):
        found.val.load(1)


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda held: held.update(format="else"), "its format is 'else'"),
        (lambda held: held["splits"]["train"][0].update(name="../x.tar"), "no plain file name"),
        (lambda held: held["splits"]["train"][0].update(name="/etc/passwd"), "no plain file name"),
        (lambda held: held["splits"]["train"][0].update(samples=-1), "-1 samples and"),
        (lambda held: held["splits"]["train"][0].update(samples=10**9), "1,000,000,000 samples and"),
        (lambda held: held["splits"]["train"][0].update(samples=10**30, bytes=10**40), "samples and"),
        (lambda held: held["splits"]["train"][0].update(name="x::ftp"), "no plain file name"),
        (lambda held: held["splits"]["train"][0].update(name="x" * 300), "is missing|File name too long"),
        (
            lambda held: held["splits"]["train"].append(held["splits"]["train"][0]),
            "8 shards of train and 7 heads",
        ),
        (lambda held: held["splits"]["val"][0].update(name="train-00000.tar"), "a shard twice"),
        (lambda held: held["splits"]["val"][0].update(sha256="../../x"), "the sha256 '../../x' of"),
        (lambda held: held["columns"]["val"].update(label="/etc/passwd"), "the sha256 '/etc/passwd' of val.label"),
        (lambda held: held["columns"]["val"].update(label="A" * 64), "the sha256 'A{64}' of val.label"),
        (lambda held: held["heads"]["val"].__setitem__(0, "../x"), "the sha256 '../x' of head of val-00000.tar"),
        (lambda held: held.update(classes=["a", "a", "b"]), "should be different names"),
        (lambda held: held["splits"]["train"][0].update(samples=3), "belongs to other shards"),
        (lambda held: held["splits"].pop("val"), "'val'"),
        (lambda held: held.update(classes=["only"]), r"1 class\(es\)"),
        (lambda held: held.update(base="pipe:echo"), "would run a command"),
        (
            lambda held: held.update(base="nonsense://x"),
            "names another place, nonsense://x.*--allow-source nonsense://x",
        ),
    ],
)
def test_a_manifest_that_cannot_be_right_is_refused(packed, tmp_path, edit, words):
    place = copied(packed, tmp_path / "edited")
    held = json.loads((place / "manifest.json").read_text())
    edit(held)
    (place / "manifest.json").write_text(json.dumps(held))
    with pytest.raises(BadData, match=words):
        data.folder(place)


def test_a_wrong_index_and_a_pickled_one_are_refused(packed, tmp_path):
    place = copied(packed, tmp_path / "edited")
    np.save(place / "train.label.npy", np.array([object()]), allow_pickle=True)
    with pytest.raises(BadData, match=r"train\.label\.npy is no index"):
        data.folder(place)
    np.save(place / "train.label.npy", np.zeros(60, "<i8"))
    with pytest.raises(BadData, match=r"int64 \(60,\) instead of int32 \(60,\)"):
        data.folder(place)
    np.save(place / "train.label.npy", np.full(60, 3, "<i4"))
    with pytest.raises(BadData, match=r"train\.label\.npy: its sha256 is"):
        data.folder(place)
    held = json.loads((place / "manifest.json").read_text())
    held["columns"]["train"]["label"] = hashlib.sha256((place / "train.label.npy").read_bytes()).hexdigest()
    (place / "manifest.json").write_text(json.dumps(held))
    with pytest.raises(BadData, match="has the label 3: labels run from 0 to 2"):  # R64
        Batches(data.folder(place).train, VIEW, batch_images=4, training=True)
    with pytest.raises(BadData, match=r"train-00000\.tar: \(start, bytes, label\) of .* the index says \(0, \d+, 3\)"):
        index(place)  # what the archives themselves say


@pytest.mark.parametrize("column", ["train.label", "val.label", "train.start", "val.bytes"])
def test_an_index_that_was_changed_is_found_at_opening(packed, tmp_path, column):
    place = copied(packed, tmp_path / "changed")
    path = place / f"{column}.npy"
    good = np.load(path)
    for edited in (good[::-1], good ^ np.eye(1, len(good), 5, dtype=good.dtype)[0]):  # reversed; a flipped bit
        np.save(path, np.ascontiguousarray(edited))
        for where in (place, f"stream:{place}"):
            with pytest.raises(BadData, match=rf"{column}\.npy: its sha256 is \w+, not the manifest's \w+, so it was"):
                data.folder(where)
        with pytest.raises(BadData, match=rf"1 files of .*\n.*{column}\.npy: its sha256"):
            index(place)
    np.save(path, good)
    assert len(data.folder(place).train) == 60


@pytest.fixture
def alike(tmp_path) -> Path:
    """Shards of others, of one size and with members of one size at the same places."""
    place = tmp_path / "alike"
    place.mkdir()
    for number, name in enumerate(("train-0.tar", "train-1.tar", "val-0.tar")):
        members = [(f"{i}.{end}", body) for i in range(4) for end, body in
                   (("bmp", picture(10 * number + i, "BMP")), ("cls", str((number + i) % 2).encode()))]  # fmt: skip
        archived(place / name, members)
    index(place)
    return place


def swapped(place: Path) -> None:
    one, two = place / "train-0.tar", place / "train-1.tar"
    content = one.read_bytes(), two.read_bytes()
    assert len(content[0]) == len(content[1])
    one.write_bytes(content[1])
    two.write_bytes(content[0])


def test_two_shards_of_one_size_that_were_swapped_are_found_at_opening(alike):
    swapped(alike)
    with pytest.raises(
        BadData, match=r"2 of 3 shards .*train-0\.tar is not the archive that was indexed.*train-1\.tar"
    ):
        data.folder(alike)
    with pytest.raises(BadData, match=r"train-0\.tar: found .*\n.*train-1\.tar: found"):
        index(alike)
    found = data.folder(f"stream:{alike}")
    with pytest.raises(BadData, match=r"train-[01]\.tar holds 4 samples with the sha256"):
        list(Batches(found.train, VIEW, batch_images=4, training=True).epoch(0))


def test_manifests_without_heads_of_shards_stay_readable_and_index_finds_a_swap(alike, packed, tmp_path):
    for place in (alike, copied(packed, tmp_path / "copied")):
        held = json.loads((place / "manifest.json").read_text())
        assert set(held["splits"]["train"][0]) == {"name", "samples", "bytes", "sha256"}  # as older versions read them
        del held["heads"]
        fingerprint = data.folder(place).train.fingerprint()
        (place / "manifest.json").write_text(json.dumps(held))
        assert data.folder(place).train.fingerprint() == fingerprint  # a run that began with it resumes
        assert data.folder(place).train.load(3).size == (24, 16)
        assert index(place).shards == sum(len(of) for of in held["splits"].values())
    swapped(alike)
    with pytest.raises(BadData, match=r"train-0\.tar: found .*\n.*train-1\.tar: found"):
        index(alike)


def test_an_archive_whose_labels_are_not_those_of_the_index_is_found_by_comparing_all(alike):
    """Manifest and index agree with each other: what the archives say is compared as well."""
    held = json.loads((alike / "manifest.json").read_text())
    labels = np.load(alike / "train.label.npy")
    np.save(alike / "train.label.npy", 1 - labels)
    held["columns"]["train"]["label"] = hashlib.sha256((alike / "train.label.npy").read_bytes()).hexdigest()
    (alike / "manifest.json").write_text(json.dumps(held))
    data.folder(alike)
    with pytest.raises(BadData, match=r"train-0\.tar: \(start, bytes, label\) of '0' are \(0, \d+, 0\), .* 1\)"):
        index(alike)


@pytest.mark.parametrize(
    ("column", "value"), [("bytes", 2**32 - 1), ("start", 2**64 - 1), ("start", 2**63), ("bytes", 0)]
)
def test_an_index_that_points_out_of_the_shard_reads_nothing(alike, column, value):
    path = alike / f"train.{column}.npy"
    rows = np.load(path)
    rows[2] = value
    np.save(path, rows)
    held = json.loads((alike / "manifest.json").read_text())
    held["columns"]["train"][column] = hashlib.sha256(path.read_bytes()).hexdigest()
    (alike / "manifest.json").write_text(json.dumps(held))
    found = data.folder(alike)
    with pytest.raises(BadData, match=r"train-0\.tar.* compare all: lambdanets index|train-0.tar, byte .*damaged"):
        found.train.load(2)
    assert found.train.names[2] == "train-0.tar/sample 2"


# ---- of strangers


HOSTILE = [None, True, -1, 1.5, 10**30, "x", "", "\ud800", "../x", [], [1], [[]], {}, {"train": 1}, {"a": []}]


def everywhere(held, path=()):
    """The path of every value in some JSON."""
    yield path
    for key in held if isinstance(held, dict) else range(len(held)) if isinstance(held, list) else ():
        yield from everywhere(held[key], (*path, key))


def test_a_manifest_with_any_field_of_another_type_is_refused_or_read(alike):
    good = json.loads((alike / "manifest.json").read_text())
    refused = 0
    for path, value in itertools.product(everywhere(good), HOSTILE):
        held = json.loads(json.dumps(good))
        if not path:
            held = value
        else:
            *above, last = path
            functools.reduce(lambda at, key: at[key], above, held)[last] = value
        (alike / "manifest.json").write_text(json.dumps(held))
        try:
            data.folder(alike)
        except BadData as error:
            refused += 1
            assert "\n" not in str(error)
        unmarked = value == "" and path[:1] == ("heads",)  # a shard that an older version packed
        if path and path[0] not in ("plan", "left_out", "classes", "paths", "base") and not unmarked:
            with pytest.raises(BadData):
                index(alike)
    assert refused > 400


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "no manifest of shards"),
        (b"\xff\xfe{}", "no manifest of shards: 'utf-8' codec"),
        (b"[" * 1_000_000, "nested too deeply"),
        (b'{"plan": ' * 100_000, "nested too deeply"),
        (b'{"format": NaN}', "NaN is no JSON"),
        (b"[]", "no object but a list"),
        (b"{\"format\": \"\x1b[31m\"}", "no manifest of shards: "),
    ],
    ids=["empty", "bytes", "lists", "objects", "nan", "list", "escape"],
)  # fmt: skip
def test_a_manifest_that_is_no_json_of_ours_is_refused_in_one_line(alike, content, words):
    (alike / "manifest.json").write_bytes(content)
    for call in (data.folder, index, lambda place: pack(alike, place)):
        with pytest.raises(BadData) as caught:
            call(alike)
        assert "\n" not in str(caught.value)
        assert "\x1b" not in str(caught.value)
    with pytest.raises(BadData, match=words):
        shards.manifest(str(alike))


def test_a_pipe_or_a_file_without_end_is_not_waited_for(alike, tmp_path, monkeypatch):
    monkeypatch.setattr(files, "PAUSES_S", (0.0,))
    (alike / "manifest.json").unlink()
    os.mkfifo(alike / "manifest.json")
    for call in (shards.open_shards, index, lambda place: data.folder(f"stream:{place}")):
        with pytest.raises(BadData, match=r"manifest\.json: cannot be read: it is no file but a folder, a pipe"):
            call(alike)
    (alike / "manifest.json").unlink()
    with open(alike / "manifest.json", "wb") as file:
        file.truncate(1 << 40)  # sparse
    with pytest.raises(BadData, match=r"manifest\.json has 1,099,511,627,776 bytes, at most 67,108,864 allowed"):
        data.folder(alike)
    (alike / "manifest.json").unlink()
    (alike / "train-1.tar").unlink()
    os.mkfifo(alike / "train-1.tar")
    with pytest.raises(BadData, match=r"train-1\.tar: cannot be read: it is no file but a folder, a pipe"):
        index(alike, out=tmp_path / "index")


@pytest.mark.parametrize(
    ("place", "named", "by", "allowed"),
    [
        ("s3://bucket/set", ["s3://bucket/set"], "s3://bucket/set/manifest.json", True),
        ("s3://bucket/set/", ["s3://bucket/set"], "s3://bucket/set/manifest.json", True),
        ("s3://bucket/set/a/b", ["s3://bucket/set/"], "x", True),
        ("stream:s3://bucket/set/a", ["stream:s3://bucket/set"], "run.json", True),
        ("s3://bucket/set", ["/home/me/index", "s3://bucket"], "/home/me/index/manifest.json", True),
        ("/data/set", [], "/home/me/index/manifest.json", True),
        ("file:///data/set", [], "/home/me/index/manifest.json", True),
        ("stream:/data/set", [], "run.json", True),
        ("scikit-learn digits", [], "run.json", True),
        ("/data/set", ["s3://bucket/set"], "s3://bucket/set/manifest.json", False),
        ("/data/set", ["s3://bucket/set", "/data"], "s3://bucket/set/manifest.json", True),
        ("ftp://stranger/set", ["/home/me/index"], "/home/me/index/manifest.json", False),
        ("ftp://stranger/set", [], "run.json", False),
        ("s3://bucket/settle", ["s3://bucket/set"], "x", False),
        ("s3://bucket/set/../other", ["s3://bucket/set"], "x", False),
        ("s3://bucket/set/%2e%2E/other", ["s3://bucket/set"], "x", False),
        ("s3://bucket/set/..\\other", ["s3://bucket/set"], "x", False),
        ("s3://bucket/set/x::ftp://stranger", ["s3://bucket/set"], "x", False),
        ("https://host@stranger/a", ["https://host"], "x", False),
        ("https://host.stranger/a", ["https://host"], "x", False),
        ("simplecache::ftp://stranger/a", ["simplecache"], "run.json", False),
        ("file::ftp://stranger/a", [], "run.json", False),
        ("data:text/plain,x", [], "run.json", False),
        ("s3://bucket", ["s3://bucket/set"], "x", False),
    ],
)
def test_a_file_sends_the_program_only_where_the_user_said(place, named, by, allowed):
    if allowed:
        archive.check_source(place, named, by)
    else:
        with pytest.raises(BadData, match=r"names another place, .*: nothing was read from there; .*--allow-source"):
            archive.check_source(place, named, by)


@pytest.mark.parametrize(
    "base", ["ftp://stranger/set", "unreliable://bucket/other", "simplecache::unreliable://bucket/set"]
)
def test_a_place_that_nobody_allowed_is_not_asked_for_anything(alike, store, monkeypatch, base):
    held = json.loads((alike / "manifest.json").read_text())
    (alike / "manifest.json").write_text(json.dumps({**held, "base": base}))
    asked = []
    real = fsspec.core.url_to_fs
    monkeypatch.setattr(fsspec.core, "url_to_fs", lambda url: asked.append(url) or real(url))
    for call in (data.folder, index, lambda place: data.folder(f"stream:{place}")):
        with pytest.raises(BadData, match=rf"manifest\.json names another place, {base}: "):
            call(alike)
    assert not [url for url in asked if not url.startswith(str(alike))]


def test_shards_on_this_machine_may_lie_elsewhere_but_not_by_the_word_of_a_store(alike, store, tmp_path):
    for name in (
        "manifest.json",
        *(f"{split}.{column}.npy" for split in ("train", "val") for column in shards.COLUMNS),
    ):
        (alike / name).unlink()
    index(alike, out=tmp_path / "index")
    assert data.folder(tmp_path / "index").train.load(0).size == (24, 16)
    for path in (tmp_path / "index").iterdir():
        store.pipe_file(f"/bucket/index/{path.name}", path.read_bytes())
    with pytest.raises(BadData, match=f"names another place, {alike}"):
        data.folder("unreliable://bucket/index")
    found = shards.open_shards("unreliable://bucket/index", allow_sources=[str(tmp_path)])
    assert found.train.load(0).size == (24, 16)


def test_the_commands_take_places_to_allow(alike, store, capsys):
    assert cli.main(["index", str(alike)]) == 0
    held = json.loads((alike / "manifest.json").read_text())
    (alike / "manifest.json").write_text(json.dumps({**held, "base": "unreliable://bucket/alike"}))
    for path in alike.glob("*.tar"):
        store.pipe_file(f"/bucket/alike/{path.name}", path.read_bytes())
    capsys.readouterr()
    assert cli.main(["index", str(alike)]) == 2
    assert "--allow-source unreliable://bucket/alike" in capsys.readouterr().err
    both = ["--allow-source", "ftp://else", "--allow-source", "unreliable://bucket/alike"]
    assert cli.main(["index", str(alike), *both]) == 0


def test_a_hash_in_a_manifest_removes_no_file(store, tmp_path):
    victim = tmp_path / "cache/lambdanets/../../victim.npy"
    (tmp_path / "cache/lambdanets").mkdir(parents=True)
    victim.write_bytes(b"mine")
    name = "/bucket/set/manifest.json"
    held = json.loads(store.store[name].getvalue())
    held["columns"]["train"]["label"] = "../../victim"
    store.pipe_file(name, json.dumps(held).encode())
    with pytest.raises(BadData, match=r"the sha256 '\.\./\.\./victim' of train\.label is none"):
        data.folder("unreliable://bucket/set")
    assert victim.read_bytes() == b"mine"


@pytest.mark.parametrize(
    "content",
    [np.lib.format.magic(2, 0) + b"\xf0\xff\xff\xff", np.lib.format.magic(1, 0) + b"\xff\xff" + b"(" * 65535,
     np.lib.format.magic(1, 0) + b"\x00\x27" + b"[" * 0x2700, b"PK\x03\x04", b"\x93NUMPY", b"",
     np.lib.format.magic(3, 0) + b"\xf0\xff\xff\xff"],
    ids=["four GB of header", "long", "deep", "zip", "cut", "empty", "version 3"],
)  # fmt: skip
def test_a_hostile_index_file_is_refused_by_its_first_bytes(alike, content):
    with open(alike / "train.label.npy", "wb") as file:
        file.write(content)
        file.truncate(5 << 30)  # sparse
    tracemalloc.start()
    with pytest.raises(BadData, match=r"train\.label\.npy is no index: "):
        data.folder(alike)
    assert tracemalloc.get_traced_memory()[1] < 20e6
    tracemalloc.stop()
    np.save(alike / "train.label.npy", np.zeros(8, "<i4"))
    with open(alike / "train.label.npy", "ab") as file:
        file.truncate(1 << 40)
    with pytest.raises(BadData, match=r"has 1,099,511,627,776 bytes, where 8 samples take 160"):
        data.folder(alike)


def test_a_label_that_no_count_bears_out_is_refused_at_once(alike, tmp_path):
    archived(alike / "train-1.tar", {"0.jpg": picture(0), "0.cls": b"50000000"})
    (alike / "manifest.json").unlink()
    tracemalloc.start()
    with pytest.raises(BadData, match=r"'0' has the label 50000000: labels run from 0 to 999999 .* --classes FILE"):
        index(alike)
    assert tracemalloc.get_traced_memory()[1] < 20e6
    tracemalloc.stop()
    archived(alike / "train-1.tar", {"0.jpg": picture(0), "0.cls": b"21840"})
    index(alike)
    assert len(data.folder(alike).train.classes) == 21841


@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.REGTYPE])
@pytest.mark.parametrize("size", [-512, -(1 << 62), 1 << 62])
def test_a_header_with_a_size_that_cannot_be_reads_nothing_more(alike, kind, size):
    info = tarfile.TarInfo("x.jpg")
    info.type = kind
    block = bytearray(info.tobuf(tarfile.GNU_FORMAT)[:512])
    block[124:136] = (b"\xff" if size < 0 else b"\x80") + (size % 256**11).to_bytes(11, "big")
    block[148:156] = b"%06o\0 " % tarfile.calc_chksums(bytes(block))[0]
    (alike / "manifest.json").unlink()
    with open(alike / "train-1.tar", "wb") as file:
        file.write(block)
        file.truncate(8 << 30)  # sparse
    with pytest.raises(BadData, match=r"train-1\.tar, byte 0: .*has [-\d,]+ bytes|extended header of [-\d,]+ bytes"):
        index(alike)


def test_headers_of_any_content_are_read_or_refused(tmp_path):
    """Extended headers with bytes changed at random, and chains of them."""
    dice = random.Random(0)
    keys = [
        "size",
        "mtime",
        "path",
        "uid",
        *(f"GNU.sparse.{key}" for key in ("map", "major", "minor", "realsize", "name")),
    ]
    values = ["1", "-1", "9" * 5000, "nan", "x", "0,1,2", "1\n2"]
    for trial in range(400):
        parts = []
        for _ in range(600 if trial % 100 == 0 else dice.choice([1, 2])):
            info = tarfile.TarInfo("x" * dice.choice([5, 150]) + ".jpg")
            info.pax_headers = {key: dice.choice(values) for key in dice.sample(keys, 2)}
            block = info.tobuf(dice.choice([tarfile.PAX_FORMAT, tarfile.GNU_FORMAT]))
            parts.append(block[: dice.choice([None, -512])] or block)
        content = bytearray(b"".join(parts))
        for _ in range(dice.choice([0, 0, 3])):
            content[dice.randrange(len(content))] = dice.randrange(256)
        file = io.BytesIO(bytes(content) + bytes(2048))
        with contextlib.suppress(BadData):
            list(archive.samples(file, "shard", lambda _: None))
        file.seek(0)
        with contextlib.suppress(BadData):
            archive.header(file.read, "shard", 0)


# ---- archives of others


def archived(path: Path, members: dict[str, bytes] | list[tuple[str, bytes]], **fields: object) -> Path:
    with tarfile.open(path, "w", format=fields.pop("format", tarfile.PAX_FORMAT)) as tar:
        for name, content in members.items() if isinstance(members, dict) else members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            for field, value in fields.items():
                setattr(info, field, value)
            tar.addfile(info, io.BytesIO(content))
    return path


def foreign(place: Path, n: int = 4, label: str = "cls", **fields: object) -> Path:
    place.mkdir()
    for name in ("train-0.tar", "train-1.tar", "val-0.tar"):
        members = []
        for i in range(n):
            text = str(i % 2) if label == "cls" else json.dumps({"label": i % 2, "caption": "a cat"})
            members += [(f"./{i:04d}.jpg", picture(i)), (f"./{i:04d}.{label}", text.encode())]
        archived(place / name, members, **fields)
    return place


@pytest.mark.parametrize("label", ["cls", "json"])
@pytest.mark.parametrize("format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
def test_shards_of_others_are_indexed_and_read(tmp_path, label, format):
    place = foreign(tmp_path / "theirs", label=label, format=format)
    with pytest.raises(BadData, match=r"holds 3 archives and no manifest.json: lambdanets index"):
        data.folder(place)
    done = index(place)
    assert (done.train_images, done.val_images, done.shards) == (8, 4, 3)
    found = data.folder(place)
    assert found.train.classes == ("0", "1")
    assert found.train.names[5] == "train-1.tar/0001"
    assert found.train.labels.tolist() == [0, 1] * 4
    assert found.val.load(2).tobytes() == open_image(picture(2)).tobytes()
    assert index(place) == done  # now it compares


@pytest.mark.parametrize("format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_long_names_folders_and_other_members_are_understood(tmp_path, format):
    place = foreign(tmp_path / "theirs")
    long = "./ключ/" + "y" * 150
    with tarfile.open(place / "train-1.tar", "w", format=format) as tar:
        folder = tarfile.TarInfo("./ключ")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        content = {".jpg": picture(3), ".cls": b"1\n", ".txt": b"a cat", ".pyd": b"cos\nsystem\n(S'false'\ntR."}
        for suffix, body in content.items():
            info = tarfile.TarInfo(long + suffix)
            info.size = len(body)
            tar.addfile(info, io.BytesIO(body))
    index(place, classes=None)
    found = data.folder(place).train
    assert found.names[4] == f"train-1.tar/{long[2:]}"
    assert found.load(4).tobytes() == open_image(picture(3)).tobytes()
    assert found.labels.tolist() == [0, 1, 0, 1, 1]


def test_class_names_and_an_index_beside_a_folder_that_cannot_be_written(tmp_path):
    place = foreign(tmp_path / "theirs")
    (tmp_path / "names.txt").write_text("cat\ndog\neel\n")
    done = index(place, out=tmp_path / "index", classes=tmp_path / "names.txt")
    assert done.place == str(tmp_path / "index")
    assert not (place / "manifest.json").exists()
    found = data.folder(tmp_path / "index")
    assert found.train.classes == ("cat", "dog", "eel")
    assert found.train.load(0).size == (24, 16)
    (tmp_path / "names.txt").write_text("cat\ncat\n")
    with pytest.raises(BadData, match="2 names, 1 different"):
        index(place, out=tmp_path / "more", classes=tmp_path / "names.txt")


@pytest.mark.parametrize(
    ("members", "fields", "words"),
    [
        ({"../0.jpg": b"x"}, {}, "'../0.jpg' leads out"),
        ({"a/../../0.jpg": b"x"}, {}, "leads out"),
        ({"/etc/0.jpg": b"x"}, {}, "'/etc/0.jpg' leads out"),
        ({"a\\..\\0.jpg": b"x"}, {}, "leads out"),
        ({"../" + "x" * 150 + ".jpg": b"x"}, {}, "leads out"),
        ({"0.jpg": b""}, {"type": tarfile.SYMTYPE, "linkname": "/etc/passwd"}, "link, device or sparse"),
        ({"0.jpg": b""}, {"type": tarfile.LNKTYPE, "linkname": "0.cls"}, "link, device or sparse"),
        ({"0.jpg": b""}, {"type": tarfile.CHRTYPE, "devmajor": 1, "devminor": 5}, "link, device or sparse"),
        ({"0.jpg": b""}, {"type": tarfile.FIFOTYPE}, "link, device or sparse"),
        ({"0.jpg": b""}, {"type": tarfile.GNUTYPE_SPARSE}, "link, device or sparse"),
        ({"0.jpg": b"x"}, {"pax_headers": {"GNU.sparse.map": "0,1", "GNU.sparse.size": "9"}}, "link, device or sparse"),
        ({"0.cls": b"1" * (1 << 20) + b"1"}, {}, "a label in 1,048,577 bytes"),
        ({"0.jpg": b"x", "1.cls": b"0"}, {}, "the sample '0' has no label"),
        ({"0.cls": b"0", "0.txt": b"x"}, {}, "the sample '0' has 0 pictures"),
        ({"0.jpg": b"x", "0.png": b"x", "0.cls": b"0"}, {}, "the sample '0' has 2 pictures"),
        ({"0.jpg": b"x", "0.cls": b"-1"}, {}, "the sample '0' has the label -1"),
        ({"0.jpg": b"x", "0.cls": b"-100"}, {}, "the sample '0' has the label -100"),
        ({"0.jpg": b"x", "0.cls": b"9"}, {}, "'0' has the label 9: labels run from 0 to 2"),
        ({"0.jpg": b"x", "0.cls": b"cat"}, {}, "0.cls is no label"),
        ({"0.jpg": b"x", "0.json": b"[1"}, {}, "0.json is no label"),
        ({"0.jpg": b"x", "0.json": b'{"label": "1"}'}, {}, "its label is '1'"),
        ({"0.jpg": b"x", "0.json": b'{"label": true}'}, {}, "its label is True"),
        ({"0.jpg": b"x", "0.json": b"[" * 100_000}, {}, "is no label"),
        ({}, {}, "holds no sample"),
    ],
)
def test_members_that_cannot_be_trusted_are_refused(tmp_path, members, fields, words):
    place = foreign(tmp_path / "theirs")
    archived(place / "train-1.tar", members, **fields)
    (tmp_path / "names.txt").write_text("a\nb\nc\n")
    with pytest.raises(BadData, match=words.replace("(", r"\(").replace(".", r"\.")) as caught:
        index(place, classes=tmp_path / "names.txt")
    assert str(place / "train-1.tar") in str(caught.value)
    assert not (place / "manifest.json").exists()
    assert not list(tmp_path.glob("0*"))


def test_a_size_beyond_the_cap_is_refused_by_its_header(tmp_path):
    place = foreign(tmp_path / "theirs")
    info = tarfile.TarInfo("0.jpg")
    info.size = 300 << 30
    (place / "train-1.tar").write_bytes(info.tobuf(tarfile.GNU_FORMAT) + bytes(1024))
    with pytest.raises(BadData, match=f"'0.jpg' has {300 << 30:,} bytes, {256 << 20:,} allowed"):
        index(place)
    pax = tarfile.TarInfo("PaxHeader")
    pax.type, pax.size = tarfile.XHDTYPE, 1 << 30
    (place / "train-1.tar").write_bytes(pax.tobuf() + bytes(1024))
    with pytest.raises(BadData, match=f"extended header of {1 << 30:,} bytes"):
        index(place)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda tar: tar[: len(tar) // 2], "is cut off"),
        (lambda tar: tar[: len(tar.rstrip(b"\0")) // 512 * 512 + 512], "is cut off"),  # at the end of a member
        (lambda tar: b"", "is cut off: 0 bytes"),
        (lambda tar: tar[:1536] + b"\xff" * 512 + tar[2048:], "no header of a file"),
        (lambda tar: tar + tar, "goes on after its end"),
        (lambda tar: b"\x1f\x8b" + tar[2:], "no header of a file"),
    ],
    ids=["half", "at a member", "empty", "header", "two", "gzip"],
)
def test_damaged_shards_of_others_are_refused_where_webdataset_ends_early(tmp_path, damage, words):
    place = foreign(tmp_path / "theirs")
    victim = place / "train-1.tar"
    victim.write_bytes(damage(victim.read_bytes()))
    with pytest.raises(BadData, match=words) as caught:
        index(place)
    assert str(victim) in str(caught.value)
    victim.write_bytes((place / "train-0.tar").read_bytes())
    assert index(place).train_images == 8


def test_archives_to_train_on_and_to_validate_are_both_needed(tmp_path):
    place = foreign(tmp_path / "theirs")
    (place / "val-0.tar").rename(place / "valley-0.tar")
    with pytest.raises(BadData, match="3 archives to train on and 0 called val-"):
        index(place)


# ---- stores


class Unreliable(MemoryFileSystem):
    """Of the reads 10% fail, 1% are short, and those in `stalls` hang."""

    protocol = "unreliable"
    store: dict = {}  # noqa: RUF012  # as its parent's
    pseudo_dirs = [""]  # noqa: RUF012
    dice, reads, stalls, ranges = random.Random(0), 0, (), True

    @classmethod
    def _strip_protocol(cls, path):
        return path.removeprefix("unreliable:/").rstrip("/")

    def cat_file(self, path, start=None, end=None, **kwargs):
        Unreliable.reads += 1
        if Unreliable.reads in self.stalls:
            time.sleep(1.5)
        chance = self.dice.random()
        if chance < 0.10:
            raise ConnectionResetError("the store hung up")
        content = super().cat_file(path, start=start if self.ranges else None, end=end if self.ranges else None)
        return content[:-7] if chance < 0.11 else content


fsspec.register_implementation("unreliable", Unreliable)


@pytest.fixture
def store(packed, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(archive, "FIRST_PAUSE_S", 0.001)
    monkeypatch.setattr(archive, "READ_TIMEOUT_S", 0.3)
    monkeypatch.setattr(Unreliable, "store", {})
    monkeypatch.setattr(Unreliable, "pseudo_dirs", [""])
    monkeypatch.setattr(Unreliable, "dice", random.Random(0))
    monkeypatch.setattr(Unreliable, "reads", 0)
    found = Unreliable()
    for path in packed.iterdir():
        found.pipe_file(f"/bucket/set/{path.name}", path.read_bytes())
    return found


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")  # the stalled reads, in 3.12
@pytest.mark.parametrize("workers", [0, 2])
def test_reads_that_fail_are_short_or_stall_are_retried_in_the_same_order(store, packed, monkeypatch, workers):
    monkeypatch.setattr(Unreliable, "stalls", (20, 33))
    arguments = {"batch_images": 6, "training": True, "augment": "imagenet"}
    expected = list(Batches(data.folder(packed).train, VIEW, **arguments).epoch(0))
    started = time.monotonic()
    remote = data.folder("unreliable://bucket/set")
    seen = list(Batches(remote.train, VIEW, workers=workers, **arguments).epoch(0))
    assert time.monotonic() - started < 8 + 10 * workers
    assert [b.ids for b in seen] == [b.ids for b in expected]
    assert all(torch.equal(a.images, b.images) for a, b in zip(seen, expected, strict=True))
    if not workers:
        assert Unreliable.reads > 67  # 60 pictures, the manifest and the index: there were faults
    assert remote.train.names[:] == data.folder(packed).train.names[:]


def test_a_batch_waits_for_a_distant_store_only_a_few_times(store, monkeypatch):
    monkeypatch.setattr(Unreliable, "dice", type("Best", (), {"random": lambda: time.sleep(0.05) or 1.0}))
    train = data.folder("unreliable://bucket/set").train
    batches_ = Batches(train, VIEW, batch_images=32, training=True)
    started = time.monotonic()
    next(batches_.epoch(0))
    assert time.monotonic() - started < 1.4  # 32 answers of 0.05 s, 16 at a time; one after another 1.6 s


def test_a_store_that_stays_away_ends_the_run_with_an_error(store, monkeypatch):
    remote = data.folder("unreliable://bucket/set")
    monkeypatch.setattr(archive, "READ_ATTEMPTS", 4)
    monkeypatch.setattr(Unreliable, "dice", type("Worst", (), {"random": lambda: 0.0}))
    Unreliable.reads = 0
    with pytest.raises(BadData, match=r"train-0000\d\.tar, bytes .*in 4 attempts, at the last: the store hung up"):
        remote.train.load(0)
    assert Unreliable.reads == 4
    del Unreliable.store["/bucket/set/train-00000.tar"]
    monkeypatch.setattr(Unreliable, "dice", type("Best", (), {"random": lambda: 1.0}))
    Unreliable.reads = 0
    with pytest.raises(BadData, match=r"train-00000\.tar.*FileNotFoundError"):
        remote.train.load(0)
    assert Unreliable.reads == 1  # waiting would not bring it


def test_a_remote_index_is_copied_once_and_checked(store, tmp_path):
    data.folder("unreliable://bucket/set")
    assert len(list((tmp_path / "cache" / "lambdanets").glob("*.npy"))) == 6
    column = next(name for name in store.store if name.endswith("train.start.npy"))
    good = store.cat_file_whole = store.store[column].getvalue()
    bad = bytearray(good)
    bad[-1] ^= 1
    store.pipe_file(column, bytes(bad))
    data.folder("unreliable://bucket/set")  # the copy is there
    store.pipe_file(column, good)
    for copy in (tmp_path / "cache" / "lambdanets").iterdir():
        copy.write_bytes(b"damaged" + copy.read_bytes()[7:])
    reads = Unreliable.reads
    assert sampled(data.folder("unreliable://bucket/set").val)  # fetched again
    assert Unreliable.reads >= reads + 6
    store.pipe_file(column, bytes(bad))
    for copy in (tmp_path / "cache" / "lambdanets").iterdir():
        copy.unlink()
    with pytest.raises(BadData, match=r"train\.start\.npy has the sha256"):
        data.folder("unreliable://bucket/set")


def test_a_remote_index_that_is_too_large_or_a_cache_that_is_full_is_an_error(store, monkeypatch):
    column = next(name for name in store.store if name.endswith("train.start.npy"))
    good = store.store[column].getvalue()
    store.pipe_file(column, good + bytes(1 << 20))
    with pytest.raises(BadData, match=r"train\.start\.npy has 1,049,184 bytes, where the samples .* take 480"):
        data.folder("unreliable://bucket/set")
    store.pipe_file(column, good)

    def full(path):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(index_files, "placed", full)
    with pytest.raises(BadData, match=r"train\.start\.npy cannot be kept in .*: No space left"):
        data.folder("unreliable://bucket/set")


def test_heads_of_many_shards_on_a_store_are_read_side_by_side(store, packed, monkeypatch):
    monkeypatch.setattr(Unreliable, "dice", type("Best", (), {"random": lambda: time.sleep(0.05) or 1.0}))
    held = shards.manifest(str(packed))
    one = held.splits["train"][0]
    many = [one._replace(name=f"train-{i:05d}.tar") for i in range(128)]
    for shard in many:
        store.pipe_file(f"/bucket/many/{shard.name}", (packed / one.name).read_bytes())
    started = time.monotonic()
    held = dataclasses.replace(held, splits={"train": many, "val": []})
    assert not shards.differing("unreliable://bucket/many", held, heads=True)
    assert time.monotonic() - started < 5  # 128 answers of 0.05 s, 32 at a time; one after another 6.4 s
    broken = bytearray((packed / one.name).read_bytes())
    broken[600] ^= 1
    store.pipe_file("/bucket/many/train-00077.tar", bytes(broken))
    assert set(shards.differing("unreliable://bucket/many", held, heads=True)) == {"train-00077.tar"}


def test_shards_on_a_store_are_indexed_from_here(store, tmp_path):
    for name in [name for name in store.store if not name.endswith(".tar")]:
        del store.store[name]
    with pytest.raises(BadData, match="--out FOLDER"):
        index("unreliable://bucket/set")
    assert index("unreliable://bucket/set", out=tmp_path / "index").train_images == 60
    with pytest.raises(
        BadData, match=r"index/manifest\.json names another place, unreliable://bucket/set: .*--allow-s"
    ):
        shards.open_shards(tmp_path / "index")
    with pytest.raises(BadData, match="--allow-source unreliable://bucket/set"):
        index(tmp_path / "index")
    found = shards.open_shards(tmp_path / "index", allow_sources=["unreliable://bucket"])
    assert found.train.load(59).size == (24, 16)
    assert "train-00000.tar/train/" in found.train.names[0]
    assert pickle.loads(pickle.dumps(found.train)).load(59).size == (24, 16)  # in a worker, which is not asked again
    done = index(tmp_path / "index", allow_sources=["unreliable://bucket/set"])
    assert str(done).endswith(f"; train with --data {tmp_path}/index --allow-source unreliable://bucket/set")


def test_a_store_without_parts_of_files_says_how_to_stream(store, packed, monkeypatch):
    remote = data.folder("unreliable://bucket/set")
    assert remote.train.fingerprint() == data.folder(packed).train.fingerprint()  # the place does not count
    monkeypatch.setattr(Unreliable, "ranges", False)
    with pytest.raises(BadData, match=r"serves no parts of files .* --data stream:unreliable://bucket/set"):
        remote.train.load(3)


@pytest.mark.parametrize("url", ["pipe:touch {}", "stream:pipe:touch {}", "pipe:touch {} |", "stream:x | touch {}"])
def test_a_url_that_is_a_command_is_not_run(url, tmp_path):
    with pytest.raises(BadData, match="would run a command"):
        data.folder(url.format(tmp_path / "ran"))
    with pytest.raises(BadData, match="would run a command"):
        index(url.removeprefix("stream:").format(tmp_path / "ran"))
    assert not (tmp_path / "ran").exists()


class Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


def test_pickles_in_shards_are_never_opened(tmp_path):
    place = foreign(tmp_path / "theirs")
    bomb = pickle.dumps(Bomb(tmp_path / "ran"))
    members = [("0.jpg", picture(0)), ("0.cls", b"1"), ("0.pyd", bomb), ("0.pickle", bomb), ("0.pth", bomb)]
    archived(place / "train-1.tar", members)
    index(place)
    for where in (place, f"stream:{place}"):
        batches_ = Batches(data.folder(where).train, VIEW, batch_images=5, training=True)
        assert len(list(batches_.epoch(0))) == 1
    archived(place / "train-1.tar", [("0.jpg", picture(0)), ("0.cls", bomb)])
    for left in place.glob("*.npy"):
        left.unlink()
    (place / "manifest.json").unlink()
    with pytest.raises(BadData, match="is no label"):
        index(place)
    assert not (tmp_path / "ran").exists()
    pickle.loads(bomb)
    assert (tmp_path / "ran").exists()  # it would have


# ---- streamed


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stream_draws_shards_at_random_says_so_and_repeats_with_its_seed(packed, workers):
    found = data.folder(f"stream:{packed}")
    assert "streamed by webdataset: shards are drawn at random, so a resumed run draws anew" in found.how
    arguments = {"batch_images": 10, "training": True, "augment": "imagenet", "workers": workers}
    streamed = Batches(found.train, VIEW, seed=1, **arguments)
    first, again = list(streamed.epoch(0)), list(streamed.epoch(0))
    assert [len(b.ids) for b in first] == [10] * 6
    assert [b.ids for b in again] == [b.ids for b in first]
    assert all(torch.equal(a.images, b.images) for a, b in zip(first, again, strict=True))
    ids = [i for b in first for i in b.ids]
    assert len(set(ids)) > 25  # of 60, drawn with replacement
    exact = data.folder(packed).train
    for batch in first:
        assert batch.labels.tolist() == [int(exact.labels[i]) for i in batch.ids]
    others = [streamed.epoch(1), streamed.epoch(0, first_batch=2), Batches(found.train, VIEW, **arguments).epoch(0)]
    for other in others:
        assert [b.ids for b in other][:4] not in ([b.ids for b in first][:4], [b.ids for b in first][2:])
    ranks = [Batches(found.train, VIEW, seed=1, rank=r, ranks=2, **arguments) for r in range(2)]
    parts = [[b.ids for b in part.epoch(0)] for part in ranks]
    assert [[len(ids) for ids in part] for part in parts] == [[5] * 6] * 2
    assert parts[0] != parts[1]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_streamed_evaluation_sees_every_image_once_on_any_number_of_ranks(packed, workers):
    exact, found = data.folder(packed), data.folder(f"stream:{packed}")
    expected = list(Batches(exact.val, VIEW, batch_images=4, training=False).epoch(0))
    seen = list(Batches(found.val, VIEW, batch_images=4, training=False, workers=workers).epoch(0))
    assert [b.ids for b in seen] == [b.ids for b in expected]
    assert all(torch.equal(a.images, b.images) for a, b in zip(seen, expected, strict=True))
    assert all(torch.equal(a.labels, b.labels) for a, b in zip(seen, expected, strict=True))
    apart = [Batches(found.val, VIEW, batch_images=4, training=False, rank=r, ranks=3) for r in range(3)]
    assert sorted(i for part in apart for b in part.epoch(0) for i in b.ids) == list(range(9))


def test_a_streamed_shard_that_is_not_the_manifests_is_an_error(packed, tmp_path):
    place = copied(packed, tmp_path / "bad")
    found = data.folder(f"stream:{place}")
    for path in place.glob("train-*.tar"):
        content = bytearray(path.read_bytes())
        content[700] ^= 1
        path.write_bytes(content)
    with pytest.raises(BadData, match=r"train-0000\d\.tar holds \d+ samples with the sha256"):
        list(Batches(found.train, VIEW, batch_images=50, training=True, max_bad_frac=1).epoch(0))


def test_a_stream_skips_bad_pictures_and_counts_them(tmp_path):
    place = foreign(tmp_path / "theirs", n=8)
    members = [("0.jpg", picture(0)), ("0.cls", b"1"), ("1.jpg", b"<html>"), ("1.cls", b"0")]
    archived(place / "train-1.tar", members)
    index(place)
    found = data.folder(f"stream:{place}")
    batches_ = Batches(found.train, VIEW, batch_images=10, training=True, bad_file=tmp_path / "bad.jsonl")
    for epoch in range(4):
        assert [len(b.ids) for b in batches_.epoch(epoch)] == [10]
    assert list(batches_.bad) == ["train-1.tar/1"]
    assert json.loads((tmp_path / "bad.jsonl").read_text())["name"] == "train-1.tar/1"


def test_a_stream_survives_a_store_that_fails(store, packed, monkeypatch):
    class Cut(io.BytesIO):
        def read(self, size=-1):
            if Unreliable.dice.random() < 0.1:
                raise ConnectionResetError("the store hung up")
            return super().read(min(size, 5000))

    monkeypatch.setattr(Unreliable, "_open", lambda self, path, *a, **k: Cut(self.store[path].getvalue()))
    found = data.folder("stream:unreliable://bucket/set")
    expected = list(Batches(data.folder(f"stream:{packed}").train, VIEW, batch_images=9, training=True).epoch(0))
    seen = list(Batches(found.train, VIEW, batch_images=9, training=True).epoch(0))
    assert [b.ids for b in seen] == [b.ids for b in expected]


def test_streaming_without_webdataset_says_what_to_install(packed, monkeypatch):
    monkeypatch.setitem(sys.modules, "webdataset", None)
    found = data.folder(f"stream:{packed}")
    with pytest.raises(ImportError, match=r"pip install lambdanets\[stream\]"):
        list(Batches(found.train, VIEW, batch_images=9, training=True).epoch(0))


def test_a_place_means_the_same_in_another_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert data.absolute("photos") == str(tmp_path / "photos")
    assert data.absolute("stream:photos/x") == f"stream:{tmp_path}/photos/x"
    for url in ("s3://bucket/set", "stream:https://host/a//b"):
        assert data.absolute(url) == url


# ---- the command line, and size


def test_the_commands_pack_index_and_train_on_shards(photos, tmp_path, capsys):
    out = tmp_path / "out"
    assert cli.main(["pack", str(photos), str(out), "--max-side-px", "16", "--shard-bytes", "30000"]) == 0
    assert "60 training and 9 validation images in" in capsys.readouterr().out
    assert cli.main(["index", str(out)]) == 0
    (out / "val-00000.tar").write_bytes(b"x")
    assert cli.main(["index", str(out)]) == 2
    assert "lambdanets index: 1 files of" in capsys.readouterr().err
    assert cli.main(["pack", str(tmp_path / "nowhere"), str(out)]) == 2
    assert "does not exist" in capsys.readouterr().err


SCALE = """
import re, sys, time
import numpy as np
from PIL import Image
from lambdanets.data.batches import Batches
from lambdanets.data.manifest import Shard
from lambdanets.data.shards import ShardImages
from lambdanets.data.transforms import View

class Names:
    def __len__(self):
        return 130_000_000
    def __getitem__(self, index):
        return f"{index:09d}.jpg"

class Grey(ShardImages):
    def load(self, index):
        assert self._shard(index).name == f"train-{index // 10_000:05d}.tar"
        assert int(self.starts[index]) + int(self.lengths[index]) == 0  # the index is looked at
        return Image.new("L", (8, 8), index % 256)

def memory_mib(what):
    return int(re.search(rf"{what}:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) / 1024

open("/proc/self/clear_refs", "w").write("5")  # the highest so far is forgotten: the imports'
before, start = memory_mib("VmRSS"), time.monotonic()
columns = [np.load(f"{sys.argv[1]}/{name}.npy", mmap_mode="r") for name in ("label", "start", "bytes")]
shards = [Shard(f"train-{i:05d}.tar", 10_000, 1, "0" * 64) for i in range(13_000)]
first_images = np.arange(13_001) * 10_000
classes = tuple(str(i) for i in range(1000))
images = Grey(classes, (), columns[0], "b", "h", "train", shards, first_images, *columns[1:], False, False, "")
batches = Batches(images, View(4, 1, (0.0,), (1.0,), 1.0), batch_images=256, training=True, workers=2)
stream = batches.epoch(3, first_batch=400_000)
first = next(stream)
second = next(stream)
print(time.monotonic() - start, memory_mib("VmHWM") - before)
assert len(batches) == 130_000_000 // 256 and len(set(first.ids) | set(second.ids)) == 512
assert max(first.ids) > 100_000_000
"""


def test_130_million_samples_start_in_5_s_and_200_mb(tmp_path):
    for name, kind in (("label", "<i4"), ("start", "<u8"), ("bytes", "<u4")):
        np.lib.format.open_memmap(tmp_path / f"{name}.npy", "w+", kind, (130_000_000,))  # sparse on the disk
    command = [sys.executable, "-c", SCALE, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    seconds, mib = map(float, done.stdout.split())
    assert seconds < 5
    assert mib < 200
