"""A teacher's labels: right, each picture once, the same whoever made them and however often they were killed."""

import dataclasses
import hashlib
import io
import json
import os
import random
import shutil
import struct
import tarfile
import zlib

import numpy as np
import pytest
import torch
from conftest import until
from labelling import CLASSES, contents, manifest, picture, table, wishes, write_shards, write_teacher

from lambdanets import cli
from lambdanets.classification.run import open_run
from lambdanets.classification.scores import evaluate
from lambdanets.data.batches import Batches
from lambdanets.data.folders import folder
from lambdanets.data.pack import index, pack
from lambdanets.data.shards import open_pictures
from lambdanets.data.sklearn_digits import digits
from lambdanets.data.transforms import View
from lambdanets.errors import HANG, BadData, BadRecipe
from lambdanets.pseudo_labels import label_files, label_shards
from lambdanets.pseudo_labels.doubt import rows_of
from lambdanets.pseudo_labels.hashes import bytes_hash, look_hash
from lambdanets.pseudo_labels.label_files import file_of, read_labels
from lambdanets.pseudo_labels.label_shards import label, missing_ones
from lambdanets.pseudo_labels.teacher import open_teacher
from lambdanets.pseudo_labels.verify import verify


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return write_teacher(tmp_path_factory.mktemp("teacher") / "run")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """60 pictures in shards of 10."""
    return write_shards(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def made(teacher, data, tmp_path_factory):
    """Their labels, made in one undisturbed go."""
    out = tmp_path_factory.mktemp("labels") / "labels"
    found = label(wishes(teacher, data, out))
    assert (found.shards, found.before, len(found.did), found.failed) == (6, 0, 6, {})
    assert sum(pictures for pictures, _ in found.did.values()) == 60
    return out


# ---- the rows


def test_every_picture_has_a_row_in_its_place(made, data):
    assert set(contents(made)) == {file_of(shard["name"]) for shard in manifest(data)}
    found = set()
    for shard in manifest(data):
        rows = table(made, shard["name"])
        assert rows.column("sample").to_pylist() == list(range(shard["samples"]))
        assert rows.column("error").null_count == shard["samples"]
        found |= set(rows.column("class").to_pylist())
    assert found == set(range(len(CLASSES)))


def test_rows_are_those_of_the_fused_teacher_in_its_view(made, data, teacher):
    opened, images = open_teacher(teacher), open_pictures(data)
    for number, shard in enumerate(images.shards):
        first = int(images.first_images[number])
        ids = range(first, first + shard.samples)
        rows = table(made, shard.name)
        with torch.inference_mode():
            batches = [ids[start : start + 4] for start in range(0, len(ids), 4)]
            seen = [torch.stack([opened.view.evaluate(images.load(i)) for i in batch]) for batch in batches]
            logits = torch.cat([opened.model(batch) for batch in seen])
        expected = rows_of(logits.numpy(), 10)
        for name, values in (
            ("class", expected.number),
            ("doubt", expected.doubt),
            ("confidence", expected.confidence),
        ):
            assert rows.column(name).to_numpy().tolist() == values.tolist()
        top = rows.column("top_class").combine_chunks().flatten().to_numpy().reshape(-1, len(CLASSES))
        assert top.tolist() == expected.top_class.tolist()
        contents_of = [images.read(i)[1] for i in ids]
        assert rows.column("bytes_hash").to_pylist() == [bytes_hash(content) for content in contents_of]
        assert rows.column("look_hash").to_pylist() == [look_hash(images.load(i)) for i in ids]


def smaller(model):
    """Logits so near to each other that float16 holds each probability."""
    model.get_classifier().weight.mul_(0.3)
    model.get_classifier().bias.mul_(0.3)


def test_labels_of_held_out_digits_are_what_evaluate_predicts_for_all_360(tmp_path):
    _, held_out = digits()
    view = View(16, 1, (0.3,), (0.4,), 1.0, "bicubic")  # not the one of any recipe
    seen = [held_out.load(i) for i in range(60)]
    run = write_teacher(tmp_path / "run", classes=held_out.classes, view=view, pictures=seen, change=smaller)
    for split in ("train", "val"):
        for i in range(len(held_out) if split == "val" else 20):
            place = tmp_path / "tree" / split / held_out.classes[held_out.labels[i]] / f"{i:03d}.png"
            place.parent.mkdir(parents=True, exist_ok=True)
            held_out.load(i).save(place)
    pack(tmp_path / "tree", tmp_path / "shards", shard_bytes=200_000)
    images = open_pictures(tmp_path / "shards")
    opened = open_run(run)
    val = folder(tmp_path / "shards").val
    batches = Batches(val, view, batch_images=64, training=False)
    scores = evaluate(opened.model, batches, classes=10, device=torch.device("cpu"))
    label(wishes(run, tmp_path / "shards", tmp_path / "labels", batch_images=64))
    shards = [(n, shard) for n, shard in enumerate(images.shards) if shard.name.startswith("val")]
    assert sum(shard.samples for _, shard in shards) == len(val) == 360
    rows = [table(tmp_path / "labels", shard.name) for _, shard in shards]
    labelled = np.concatenate([of.column("class").to_numpy() for of in rows])
    assert labelled.tolist() == scores.predicted
    assert len(set(labelled.tolist())) > 5  # a teacher that says one thing would show nothing
    kept = [[of.column(c).combine_chunks().flatten().to_numpy().reshape(-1, 10) for of in rows] for c in
            ("top_class", "top_prob")]  # fmt: skip
    classes, probabilities = map(np.concatenate, kept)
    of_label = probabilities[classes == np.asarray(val.labels)[:, None]].astype(np.float64)
    assert -np.log(of_label).mean() == pytest.approx(scores.loss, abs=1e-3)


def test_another_mean_deviation_or_size_of_the_teacher_gives_other_labels(made, data, teacher, tmp_path):
    held = open_run(teacher).view
    for change in ({"mean": (0.1, 0.2, 0.3)}, {"std": (0.9, 0.5, 0.7)}, {"image_px": 16}, {"crop_frac": 1.0}):
        run = shutil.copytree(teacher, tmp_path / f"run{len(list(tmp_path.iterdir()))}")
        record = json.loads((run / "run.json").read_text())
        record["view"] |= change
        (run / "run.json").write_text(json.dumps(record))
        with pytest.raises(BadData, match=rf"teacher\.view\.{next(iter(change))} was"):
            label(wishes(run, data, made))
        label(wishes(run, data, tmp_path / f"{run.name}-labels"))
        name = manifest(data)[0]["name"]
        new = table(tmp_path / f"{run.name}-labels", name).column("doubt").to_pylist()
        assert new != table(made, name).column("doubt").to_pylist()
        assert dataclasses.replace(held, **change) != held


def test_bfloat16_is_asked_for_by_the_plan_and_gives_other_bits(made, data, teacher, tmp_path):
    label(wishes(teacher, data, tmp_path / "half", precision="bfloat16"))
    assert read_labels(tmp_path / "half").plan["precision"] == "bfloat16"
    name = manifest(data)[0]["name"]
    half, full = (np.array(table(of, name).column("doubt").to_pylist()) for of in (tmp_path / "half", made))
    assert not np.array_equal(half, full)
    assert np.abs(half - full).max() < 0.15


@pytest.mark.gpu
def test_a_gpu_gives_labels_near_those_of_a_cpu(made, data, teacher, tmp_path):
    asked = dataclasses.replace(wishes(teacher, data, tmp_path / "out", precision="float32"), device="cuda")
    label(asked)
    assert read_labels(tmp_path / "out").plan["cpu_threads"] is None
    for shard in manifest(data):
        here, there = (
            np.array(table(of, shard["name"]).column("doubt").to_pylist()) for of in (made, tmp_path / "out")
        )
        assert np.abs(here - there).max() < 1e-3


def test_fewer_classes_and_no_hashes_are_kept_where_that_is_asked(data, teacher, tmp_path, made):
    label(wishes(teacher, data, tmp_path / "few", top=2, hashes=False))
    name = manifest(data)[0]["name"]
    rows, all_of = table(tmp_path / "few", name), table(made, name)
    assert rows.schema.names == ["sample", "class", "confidence", "doubt", "top_class", "top_prob", "error"]
    assert rows.column("top_class").to_pylist() == [of[:2] for of in all_of.column("top_class").to_pylist()]
    assert rows.column("doubt").equals(all_of.column("doubt"))


# ---- the same bytes, whoever labels


@pytest.mark.parametrize("workers", [1, 2])
def test_processes_that_read_change_nothing(workers, made, data, teacher, tmp_path):
    label(wishes(teacher, data, tmp_path / "out", workers=workers))
    assert contents(tmp_path / "out") == contents(made)


def _label(*args, **others):
    return len(label(wishes(*args, **others)).did)


def test_ranks_of_torchrun_share_the_shards_and_write_the_same_bytes(made, data, teacher, tmp_path, children):
    both = children.ranks(2, _label, teacher, data, tmp_path / "out")
    did = [child.gave() for child in both]
    assert contents(tmp_path / "out") == contents(made)
    assert min(did) >= 3  # its own; a shard that both did is no harm


def test_a_rank_does_what_another_one_never_did(made, data, teacher, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("RANK", "1")
    assert _label(teacher, data, tmp_path / "out") == 6
    assert contents(tmp_path / "out") == contents(made)


def test_a_rank_begins_with_its_own_and_takes_what_is_missing_from_another_place():
    done = {0}
    order = []
    for number in missing_ones(range(10), set(done), lambda: done, rank=1, ranks=2):
        order.append(number)
        done.add(number)
    assert order == [2, 4, 6, 8, 5, 7, 9, 3, 1] or order[:4] == [2, 4, 6, 8]
    assert sorted(order) == list(range(1, 10))
    assert order[4] not in (1, 9)  # not where rank 0 begins
    assert list(missing_ones(range(4), set(), lambda: {0, 1, 2, 3}, rank=0, ranks=2)) == [0, 2]


def test_the_number_of_threads_is_that_of_the_first_process_since_bits_depend_on_it(data, teacher, tmp_path):
    out = tmp_path / "out"
    try:
        torch.set_num_threads(2)
        label(wishes(teacher, data, out), part=(0, 6))
        torch.set_num_threads(1)
        label(wishes(teacher, data, out), part=(1, 6))
        assert torch.get_num_threads() == 1  # given back
    finally:
        torch.set_num_threads(1)
    assert read_labels(out).plan["cpu_threads"] == 2
    assert len(contents(out)) == 2


def test_parts_are_disjoint_together_all_and_steal_nothing(made, data, teacher, tmp_path):
    out, names = tmp_path / "out", [file_of(shard["name"]) for shard in manifest(data)]
    for part in range(4):
        label(wishes(teacher, data, out), part=(part, 4))
        assert set(contents(out)) == {name for n, name in enumerate(names) if n % 4 <= part}
    assert contents(out) == contents(made)


def test_two_jobs_on_the_same_shards_leave_one_whole_file_each(made, data, teacher, tmp_path, children):
    started = [children.start(_label, teacher, data, tmp_path / "out") for _ in range(2)]
    assert [child.wait() for child in started] == [0, 0]
    assert contents(tmp_path / "out") == contents(made)
    assert not list((tmp_path / "out").glob(".*"))


# ---- killed and begun again


def killed_label(children, teacher, data, out, kills, seed):
    """Starts and kills until so many starts were killed at a random moment; then to the end. Gives all starts."""
    draw = random.Random(seed)
    done = set()
    for start in range(kills):
        child = children.start(_label, teacher, data, out, workers=start % 2)
        at = len(done) + draw.randint(0, 2)
        until(lambda at=at, child=child: len(contents(out)) >= at or not child.process.is_alive())
        child.process.kill()
        child.process.join()
        now = {name: (out / name).stat().st_ino for name in contents(out)}
        assert done <= now.items()  # what was finished is not done again
        done = now.items()
    return label(wishes(teacher, data, out))


def _check_kills(children, teacher, tmp_path, kills, pictures, shards):
    data = write_shards(tmp_path, pictures, shards)
    label(wishes(teacher, data, tmp_path / "undisturbed"))
    found = killed_label(children, teacher, data, tmp_path / "out", kills, seed=7)
    assert found.before + len(found.did) == found.shards
    assert contents(tmp_path / "out") == contents(tmp_path / "undisturbed")
    verified = verify(tmp_path / "out")
    assert (verified.pictures, verified.bad) == (pictures, 0)  # each picture once


def test_labels_after_five_kills_are_those_of_an_undisturbed_job_to_the_byte(children, teacher, tmp_path):
    _check_kills(children, teacher, tmp_path, 5, 600, 12)


@pytest.mark.slow
def test_labels_after_thirty_kills_are_those_of_an_undisturbed_job_to_the_byte(children, teacher, tmp_path):
    _check_kills(children, teacher, tmp_path, 30, 1200, 40)


def test_a_killed_process_costs_one_shard_at_most(children, data, teacher, tmp_path):
    out = tmp_path / "out"
    child = children.start(_label_that_dies, teacher, data, out)
    assert child.wait() == 9
    assert len(contents(out)) == 3
    assert len(label(wishes(teacher, data, out)).did) == 3


def _label_that_dies(*args):
    add = label_shards._Collected.add

    def dies_in_the_fourth(self, part, logits):
        if self.number == 3 and part.last:
            os._exit(9)
        return add(self, part, logits)

    label_shards._Collected.add = dies_in_the_fourth
    return _label(*args)


def test_a_finished_folder_is_left_alone_and_says_so(made, data, teacher, capsys):
    before = {path.name: path.stat().st_mtime_ns for path in made.iterdir()}
    command = ["label", str(teacher), "--data", str(data), "--out", str(made), "--batch-images", "4", "--device", "cpu"]
    assert cli.main(command) == 0
    assert "6 of 6 shards are labelled; there was nothing to do" in capsys.readouterr().out
    assert {path.name: path.stat().st_mtime_ns for path in made.iterdir()} == before


def test_ctrl_c_and_sigterm_end_it_and_the_same_command_goes_on(made, data, teacher, tmp_path, monkeypatch, capsys):
    import signal

    write = label_files.write

    def signalled(home, shard, content):
        write(home, shard, content)
        signal.raise_signal(number)

    out = tmp_path / "out"
    command = ["label", str(teacher), "--data", str(data), "--out", str(out), "--batch-images", "4", "--device", "cpu"]
    for asked, code in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
        number = asked
        monkeypatch.setattr(label_files, "write", signalled)
        before = len(contents(out))
        assert cli.main(command) == code
        assert "the same command goes on, finished shards are kept" in capsys.readouterr().err
        assert before < len(contents(out)) < 6
        monkeypatch.setattr(label_files, "write", write)
    assert cli.main(command) == 0
    assert contents(out) == contents(made)


# ---- another plan


def test_another_teacher_data_batch_or_view_is_refused_with_each_difference(made, data, teacher, tmp_path):
    other = write_teacher(tmp_path / "other", seed=1, classes=("ant", "bee", "cat", "dog", "fox"))
    few = write_shards(tmp_path / "few", 10, 1)
    for asked, why in [
        (wishes(other, data, made), r"teacher\.weights_sha256 was .*teacher\.classes was .*fox"),
        (wishes(teacher, few, made), r"data\.fingerprint was .*data\.shards was 6, and is 1; data\.samples was 60"),
        (wishes(teacher, data, made, batch_images=3), "batch_images was 4, and is 3"),
        (wishes(teacher, data, made, top=2), "top was 5, and is 2"),
        (wishes(teacher, data, made, hashes=False), "hashes was true, and is false"),
        (wishes(teacher, data, made, precision="bfloat16"), 'precision was "float32", and is "bfloat16"'),
    ]:
        with pytest.raises(BadData, match=f"(?s)labels of another plan: .*{why}.*another --out"):
            label(asked)


def test_data_and_teacher_may_move_between_starts(made, data, teacher, tmp_path):
    out = shutil.copytree(made, tmp_path / "out")
    gone = sorted(contents(out))[2]
    (out / gone).unlink()
    moved = shutil.copytree(data, tmp_path / "moved"), shutil.copytree(teacher, tmp_path / "run")
    assert list(label(wishes(moved[1], moved[0], out)).did) == [gone.replace(".parquet", ".tar")]
    assert contents(out) == contents(made)


def test_a_file_of_another_plan_in_the_folder_is_named_when_it_is_read(made, data, teacher, tmp_path):
    out = shutil.copytree(made, tmp_path / "out")
    label(wishes(teacher, data, tmp_path / "other", top=2))
    name = sorted(contents(out))[1]
    shutil.copy(tmp_path / "other" / name, out / name)
    with pytest.raises(BadData, match=f"{name} is of another plan"):
        label_files.read_file_of(read_labels(out), name)
    with pytest.raises(BadData, match=f"{name} is of another plan"):
        verify(out)
    shutil.copy(made / sorted(contents(made))[0], out / name)
    with pytest.raises(BadData, match=f"{name} has the labels of unlabelled-00000.tar"):
        label_files.read_footer(read_labels(out), name)


def test_a_folder_with_something_else_is_not_written_into(data, teacher, tmp_path):
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(BadData, match=r"is not empty \(it holds thesis.tex\)"):
        label(wishes(teacher, data, tmp_path))
    with pytest.raises(BadData, match=r"thesis.tex is a file: name a new folder"):
        label(wishes(teacher, data, tmp_path / "thesis.tex"))


# ---- pictures and shards that are bad


def big_png() -> bytes:
    """A PNG that says it has 400 million pixels."""
    head = b"IHDR" + struct.pack(">IIBBBBB", 20_000, 20_000, 8, 2, 0, 0, 0)
    data = b"IDAT" + zlib.compress(bytes(60_001 * 10))
    chunks = [struct.pack(">I", len(of) - 4) + of + struct.pack(">I", zlib.crc32(of)) for of in (head, data, b"IEND")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def archive(path, pictures: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, content in pictures.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


@pytest.mark.parametrize("workers", [0, 2])
def test_pictures_that_cannot_be_read_are_rows_with_the_reason(workers, teacher, tmp_path):
    bad = {3: b"", 17: bytes(100_000), 18: picture(1)[:90], 40: big_png(), 77: b"GIF89a"}
    for shard in range(2):
        ids = range(50 * shard, 50 * shard + 50)
        archive(tmp_path / f"{shard}.tar", {f"{i:03d}.png": bad.get(i, picture(i)) for i in ids})
    archive(tmp_path / "2.tar", {"a.png": b"x", "b.png": b"y"})  # a batch without a picture that can be read
    index(tmp_path, unlabelled=True)
    found = label(wishes(teacher, tmp_path, tmp_path / "labels", workers=workers))
    assert sum(pictures for pictures, _ in found.did.values()) == 102
    assert "7 of these cannot be read, their rows say why" in str(found)
    rows = [row for shard in ("0.tar", "1.tar") for row in table(tmp_path / "labels", shard).to_pylist()]
    assert {i for i, row in enumerate(rows) if row["error"] is not None} == set(bad)
    for i, content in bad.items():
        assert rows[i]["class"] == -1
        assert (rows[i]["confidence"], rows[i]["doubt"]) == (0.0, 1.0)
        assert rows[i]["top_class"] == [-1] * 5
        assert rows[i]["top_prob"] == [0] * 5
        assert (rows[i]["bytes_hash"], rows[i]["look_hash"]) == (bytes_hash(content), 0)
    assert rows[40]["error"].startswith("is too large to decode")
    assert rows[3]["error"] == "the file is empty"
    assert [row["sample"] for row in rows] == [*range(50), *range(50)]
    good = [i for i in range(100) if i not in bad]
    assert [rows[i]["bytes_hash"] for i in good] == [bytes_hash(picture(i)) for i in good]
    assert verify(tmp_path / "labels").bad == 7


def test_a_shard_that_was_cut_or_changed_fails_and_the_others_are_labelled(made, data, teacher, tmp_path, capsys):
    place = shutil.copytree(data, tmp_path / "data")
    names = [shard["name"] for shard in manifest(data)]
    cut, flipped, gone = (place / names[i] for i in (1, 3, 4))
    cut.write_bytes(cut.read_bytes()[:-2000])
    content = bytearray(flipped.read_bytes())
    content[len(content) // 2] ^= 1  # a picture's byte, which no header shows
    flipped.write_bytes(content)
    gone.unlink()
    command = ["label", str(teacher), "--data", str(place), "--out", str(tmp_path / "out"), "--batch-images", "4"]
    assert cli.main([*command, "--device", "cpu"]) == 2
    said = capsys.readouterr().err
    for path, why in ((cut, "bytes"), (flipped, "has the sha256"), (gone, "No such file")):
        assert any(path.name in line and why in line for line in said.splitlines()), said
    assert "3 of 6 shards are labelled" in said
    assert "3 shards of" in said
    assert set(contents(tmp_path / "out")) == {file_of(names[i]) for i in (0, 2, 5)}
    with pytest.raises(BadData, match="3 of 6 shards are not labelled"):
        verify(tmp_path / "out", place)
    for path in (cut, flipped, gone):
        shutil.copy(data / path.name, path)
    assert cli.main([*command, "--device", "cpu"]) == 0  # mended, the same command finishes
    assert contents(tmp_path / "out") == contents(made)


def test_logits_that_are_not_finite_fail_the_shard_and_name_the_picture(data, teacher, tmp_path, monkeypatch):
    logits = label_shards.Labeller._logits
    third = open_pictures(data).load(22)

    @torch.inference_mode()
    def nan_for_one(self, images):
        found = logits(self, images)
        same = (images == self.teacher.view.evaluate(third)).flatten(1).all(1)
        found[same, 2] = float("nan")
        return found

    monkeypatch.setattr(label_shards.Labeller, "_logits", nan_for_one)
    found = label(wishes(teacher, data, tmp_path / "out"))
    assert list(found.failed) == ["unlabelled-00002.tar"]
    why = found.failed["unlabelled-00002.tar"]
    assert f"logits of {open_pictures(data).names[22]} are not finite" in why
    assert len(contents(tmp_path / "out")) == 5
    assert "unlabelled-00002.parquet" not in contents(tmp_path / "out")
    with pytest.raises(BadData, match=r"1 shards of .* stay undone, though tried twice"):
        label_shards.refuse_undone(found, str(data))


def test_a_teacher_that_overflows_labels_nothing(data, tmp_path):
    run = write_teacher(tmp_path / "run", change=lambda model: model.get_classifier().weight.sign_().mul_(3e38))
    found = label(wishes(run, data, tmp_path / "out", precision="bfloat16"))
    assert len(found.failed) == 6
    assert contents(tmp_path / "out") == {}
    assert all("--precision float32" in why for why in found.failed.values())


# ---- disks, hangs, strangers


def test_a_full_disk_keeps_what_is_done_and_the_same_command_goes_on(made, data, teacher, tmp_path, largest_file):
    out = tmp_path / "out"
    label(wishes(teacher, data, out), part=(0, 3))
    smallest = min(map(len, contents(made).values()))
    with largest_file(smallest - 1), pytest.raises(BadData) as error:
        label(wishes(teacher, data, out))
    assert str(out) in str(error.value)
    assert "bytes, cannot be written: File too large" in str(error.value)
    assert "finished shards are kept" in str(error.value)
    assert {path.name for path in out.iterdir()} == {"labels.json", *contents(out)}  # no parts
    assert len(contents(out)) == 2
    label(wishes(teacher, data, out))
    assert contents(out) == contents(made)


def _label_that_hangs(*args):
    import threading

    read = label_shards.ShardReader.parts

    def hangs(self, numbers):
        for part in read(self, numbers):
            if part.number == 2 and part.last:
                threading.Event().wait()
            yield part

    label_shards.ShardReader.parts = hangs
    label(wishes(*args, hang_timeout_s=1.0))


def test_a_hang_ends_with_its_stacks_and_no_half_shard(made, data, teacher, tmp_path, children):
    child = children.start(_label_that_hangs, teacher, data, tmp_path / "out")
    assert child.wait() == HANG
    said = child.said()
    assert "nothing has moved for 1 s" in said
    assert "in hangs" in said  # the stack
    assert "the same command goes on" in said
    held = contents(made)
    assert contents(tmp_path / "out") == {name: held[name] for name in sorted(held)[:2]}


def test_a_label_file_that_was_cut_or_changed_names_the_shard_and_the_remedy(made, tmp_path):
    out = shutil.copytree(made, tmp_path / "out")
    name = sorted(contents(out))[0]
    labels, good = read_labels(out), (out / name).read_bytes()
    rows = label_files.read_file_of(labels, name)[0]
    draw = random.Random(0)
    refused = 0
    places = [*range(0, len(good), 61), *range(len(good) - 20, len(good))]
    for place in places:
        content = bytearray(good)
        content[place] ^= 1 << draw.randrange(8)
        (out / name).write_bytes(content)
        try:
            found = label_files.read_file_of(labels, name)[0]
        except BadData as error:
            refused += 1
            assert name in str(error)
            assert "remove it, and label again" in str(error)
        else:
            assert found.equals(rows)  # of the file's own words: a version, a statistic
    assert refused > len(places) / 2
    for length in (0, 4, 11, 12, len(good) // 2, len(good) - 1):
        (out / name).write_bytes(good[:length])
        with pytest.raises(BadData, match=f"{name} is damaged.*remove it"):
            label_files.read_file_of(labels, name)
    (out / name).write_bytes(good[:11])
    assert name not in label_files.finished(str(out))  # too short for any parquet: it is labelled again
    with pytest.raises(BadData, match="1 of 6 shards are not labelled"):
        verify(out)


def test_verify_counts_and_names_what_is_damaged_missing_or_of_other_data(made, data, tmp_path, capsys):
    assert str(verify(made)).endswith("all 6 shards are labelled, 60 images; 0 of these cannot be read")
    assert cli.main(["label", "--verify", "--out", str(made)]) == 0
    assert "all 6 shards are labelled" in capsys.readouterr().out
    out = shutil.copytree(made, tmp_path / "out")
    first, second, *_ = sorted(contents(out))
    content = bytearray((out / first).read_bytes())
    content[60] ^= 255
    (out / first).write_bytes(content)
    (out / second).unlink()
    assert cli.main(["label", "--verify", "--out", str(out)]) == 2
    said = capsys.readouterr().err
    assert first in said
    assert "1 of 6 shards are not labelled: unlabelled-00001.tar" in said
    few = write_shards(tmp_path / "few", 10, 1)
    with pytest.raises(BadData, match="holds other shards than"):
        verify(made, few)


def test_files_of_strangers_are_refused(made, tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    out = shutil.copytree(made, tmp_path / "out")
    labels, name = read_labels(out), sorted(contents(made))[0]
    rows, footer = label_files.read_file_of(labels, name)
    told = {b"lambdanets": json.dumps({"format": label_files.FORMAT, **footer._asdict()}).encode()}
    more = rows.append_column("payload", pa.array(["x"] * len(rows)))
    other = rows.set_column(3, "doubt", rows.column("doubt").cast(pa.float64()))
    for stranger in (more, other, rows.drop_columns(["error"])):
        pq.write_table(stranger.replace_schema_metadata(told), out / name)
        with pytest.raises(BadData, match="has other columns than its plan says"):
            label_files.read_file_of(labels, name)
    pq.write_table(rows, out / name)
    with pytest.raises(BadData, match="is damaged, or no label file"):
        label_files.read_file_of(labels, name)
    with pytest.raises(BadData, match="would run a command"):
        read_labels("pipe:cat /etc/passwd")
    held = json.loads((out / "labels.json").read_text())
    for wrong in ({"format": "x"}, {"plan": {**held["plan"], "top": 0}}, {"plan": {**held["plan"], "top": 3}},
                  {"plan_sha256": "0"}, {"places": 3}):  # fmt: skip
        (out / "labels.json").write_text(json.dumps({**held, **wrong}))
        with pytest.raises(BadData, match="does not tell of labels"):
            read_labels(out)
    (out / "labels.json").write_text(json.dumps({**held, "places": {"data": "https://stranger/set"}}))
    with pytest.raises(BadData, match="names another place, https://stranger/set"):
        verify(out)


def test_arguments_that_cannot_be_meant_are_refused(data, teacher, tmp_path, capsys):
    out = ["--out", str(tmp_path / "out")]
    for words, why in [
        (["label", str(teacher), *out], "label needs a teacher and images"),
        (["label", str(teacher), "--data", str(data), *out, "--part", "3/3"], "--part 3/3: give I/N"),
        (["label", str(teacher), "--data", str(data), *out, "--part", "1"], "--part 1: give I/N"),
        (["label", str(teacher), "--data", str(data), *out, "--address", "auto"], "--address auto is of a Ray cluster"),
        (["label", str(teacher), "--data", str(data), *out, "--engine", "ray", "--part", "0/2"], "divides the shards"),
        (["label", str(teacher), "--data", str(tmp_path), *out], "manifest.json"),
    ]:
        assert cli.main([*words, "--device", "cpu"]) == 2
        assert why in capsys.readouterr().err
    with pytest.raises(BadRecipe):
        label(wishes(teacher, data, tmp_path / "out"), part=(4, 4))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("classes", "bits"), [(32_767, 16), (32_768, 32)])
def test_more_classes_than_sixteen_bits_hold_take_thirty_two(classes, bits, tmp_path):
    import pyarrow as pa

    kind = pa.int16() if bits == 16 else pa.int32()
    columns = label_files.schema(classes=classes, top=10, hashes=True)
    assert columns.field("class").type == kind
    assert columns.field("top_class").type.value_type == kind


def test_the_digest_of_a_plan_is_kept_beside_it(made):
    held = json.loads((made / "labels.json").read_text())
    text = json.dumps(held["plan"], sort_keys=True, separators=(",", ":"))
    assert held["plan_sha256"] == hashlib.sha256(text.encode()).hexdigest()
    assert held["format"] == "lambdanets labels 1"
