"""A run judged on folders of images, and its page: right numbers, each image once, nothing from a stranger runs."""

import base64
import dataclasses
import io
import json
import os
import random
import re
import resource
import shutil
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.axes import Axes
from PIL import Image
from torch.nn import functional as F

import lambdanets
import lambdanets.data
from lambdanets.classification.evaluate_run import Evaluation, _write, evaluate_run, per_class
from lambdanets.classification.held_out import own_images
from lambdanets.classification.plots import confusion_png, curves_svg
from lambdanets.classification.report import _worst, write_report
from lambdanets.classification.run import Run, open_run
from lambdanets.classification.scores import Confusion, evaluate
from lambdanets.cli import main
from lambdanets.data.batches import Batches
from lambdanets.data.pack import pack
from lambdanets.data.transforms import View
from lambdanets.errors import BadData, BadImage, BadRun
from lambdanets.files import write_json
from lambdanets.recipes import choose
from lambdanets.runs.page import losses
from lambdanets.runs.weights import save_weights

CPU = torch.device("cpu")
CLASSES = ("ant", "bee", "cat", "dog", "eel", "fox", "<b>$5 & co")


def write_images(root, names, count, side_px=20):
    for c, name in enumerate(names):
        (root / name).mkdir(parents=True)
        for i in range(count):
            Image.new("RGB", (side_px, side_px), (30 * c, 25 * i % 256, 60)).save(root / name / f"{i}.png")


@pytest.fixture(scope="module")
def _made(tmp_path_factory):
    """A run folder as train writes it, with weights as they are before training, and its images."""
    torch.manual_seed(3)
    root = tmp_path_factory.mktemp("made")
    write_images(root / "photos" / "train", CLASSES, 2)
    write_images(root / "photos" / "val", CLASSES, 9)
    recipe = choose("folder", model="lambda_resnet_tiny", image_px=8, epochs=3)
    recipe = dataclasses.replace(recipe, eval_batch_images=4)
    found = lambdanets.data.folder(root / "photos")
    history = [
        {"epoch": e, "lr": 0.1 / e, "train_loss": 2 / e, "train_top1_frac": 0.2 * e, "val_loss": 1.5 / e,
         "val_top1_frac": 0.1 * e, "train_s": 4.0, "data_wait_s": 1.0, "images_per_s": 100.0}
        for e in (1, 2)
    ]  # fmt: skip
    record = {
        "status": "interrupted",
        "error": "Terminated('<script>alert(1)</script>')",
        "recipe": dataclasses.asdict(recipe),
        "view": dataclasses.asdict(View(8, 3, recipe.mean, recipe.std, recipe.crop_frac, recipe.interpolation)),
        "classes": list(found.val.classes),
        "data": {
            "source": str((root / "photos").resolve()), "how": found.how, "ignored": {}, "train_images": 14,
            "val_images": 63, "fingerprint": {"train": "t" * 64, "val": found.val.fingerprint()},
        },
        "seed": 5,
        "device": "cpu",
        "versions": {"torch": "2 <&>"},
        "history": history,
    }  # fmt: skip
    (root / "run").mkdir()
    write_json(root / "run" / "run.json", record)
    save_weights(lambdanets.create_model(recipe.model, num_classes=7), root / "run" / "weights.safetensors")
    return root


@pytest.fixture
def made(_made, tmp_path):
    """The same in a folder that a test may break: made/run, made/photos."""
    root = shutil.copytree(_made, tmp_path / "made")
    record = record_of(root / "run")
    record["data"]["source"] = str(root.resolve() / "photos")
    write_json(root / "run" / "run.json", record)
    return root


def record_of(run):
    return json.loads((run / "run.json").read_text())


def by_hand(run, paths):
    """name -> (label, predicted, loss, in five), one image at a time."""
    opened = open_run(run)
    rows = {}
    for path in paths:
        label = opened.classes.index(path.parent.name)
        with torch.inference_mode():
            logits = opened.model(opened.view.evaluate(Image.open(path).convert("RGB"))[None])
        loss = F.cross_entropy(logits, torch.tensor([label])).item()
        rows[path] = label, int(logits.argmax()), loss, label in logits[0].topk(5).indices
    return rows


# --- numbers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
def test_the_numbers_are_those_of_one_image_after_another(made, workers):
    paths = sorted((made / "photos" / "val").glob("*/*.png"))
    (made / "photos" / "val" / "ant" / "notes.txt").write_text("no image")
    want = by_hand(made / "run", paths)
    found = evaluate_run(made / "run", made / "photos", batch_images=5, workers=workers, device=CPU)
    n = len(paths)
    assert found.scores.n == n == 63
    assert found.scores.top1_frac == sum(label == first for label, first, _, _ in want.values()) / n
    assert found.scores.top5_frac == sum(five for *_, five in want.values()) / n
    assert found.scores.loss == pytest.approx(sum(loss for _, _, loss, _ in want.values()) / n, rel=1e-5)
    written = json.loads((found.folder / "evaluation.json").read_text())
    assert found.folder == made / "run" / "evaluation-1"
    assert (written["n"], written["top1_frac"], written["loss"]) == (n, found.scores.top1_frac, found.scores.loss)
    classes = open_run(made / "run").classes
    wrong = [(loss, str(p), classes[a], classes[b]) for p, (a, b, loss, _) in want.items() if a != b]
    got = [(m["loss"], str(made / "photos" / m["name"]), m["label"], m["predicted"]) for m in written["mistakes"]]
    assert len(got) == len(wrong) == found.scores.errors > 24
    assert [m[0] for m in got] == sorted((m[0] for m in got), reverse=True)
    assert {m[1:] for m in got} == {m[1:] for m in wrong}
    assert {name: loss for loss, name, *_ in got} == pytest.approx({name: loss for loss, name, *_ in wrong}, rel=1e-4)
    with Image.open(found.folder / "confusion.png") as picture:
        assert picture.width > 500
        assert len(picture.convert("RGB").getcolors(2**24)) > 20
    assert evaluate_run(made / "run", made / "photos", device=CPU).folder.name == "evaluation-2"


def test_the_table_by_class_counts_labels_guesses_and_the_commonest_mistake():
    rows = per_class(Confusion.read([[5, 1, 2], [0, 0, 0], [1, 0, 3]], 3), ["a", "b", "c"])
    assert [row["recall_frac"] for row in rows] == [5 / 8, None, 3 / 4]
    assert [row["precision_frac"] for row in rows] == [5 / 6, 0.0, 3 / 5]
    assert [row["most_often_taken_for"] for row in rows] == [
        {"class": "c", "images": 2}, None, {"class": "a", "images": 1},
    ]  # fmt: skip


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 9), st.data())
def test_counts_by_pairs_are_those_of_a_matrix(classes, data):
    one = st.integers(0, classes - 1)
    pairs = data.draw(st.lists(st.tuples(one, one), min_size=1, max_size=60))
    want = torch.zeros(classes, classes, dtype=torch.int64)
    for label, predicted in pairs:
        want[label, predicted] += 1
    found = Confusion.of(classes, pairs)
    assert found.dense() == want.tolist()
    assert found.right == int(want.diagonal().sum())
    assert found.sums() == (want.sum(1).tolist(), want.sum(0).tolist())
    wrong = want - torch.diag(want.diagonal())
    assert [n for *_, n in found.mistakes()] == sorted(wrong[wrong > 0].tolist(), reverse=True)
    assert Confusion.read(json.loads(json.dumps(found.json())), classes) == found
    assert Confusion.read(found.dense(), classes) == found
    for label, row in enumerate(per_class(found, ["name"] * classes)):
        counts, column, own = want[label], want[:, label], int(want[label, label])
        assert (row["images"], row["right"]) == (int(counts.sum()), own)
        assert row["precision_frac"] == (own / int(column.sum()) if column.sum() else None)
        others = [int(n) for i, n in enumerate(counts) if i != label]
        taken = row["most_often_taken_for"]
        assert (0 if taken is None else taken["images"]) == max(others, default=0)


@pytest.mark.parametrize(
    "held",
    [
        None, 3, [], [[1, 0]], [[1, 0], [0]], [[1, 0], [0, -1]], [[1, 0], [0, True]], [[1.5, 0], [0, 1]], {},
        {"classes": 3, "cells": []}, {"classes": 2}, {"classes": 2, "cells": {}}, {"classes": 2, "cells": [[0, 0]]},
        {"classes": 2, "cells": [[0, 2, 1]]}, {"classes": 2, "cells": [[-1, 0, 1]]},
        {"classes": 2, "cells": [[0, 0, 0]]}, {"classes": 2, "cells": [[0, 0, 1], [0, 0, 1]]},
        {"classes": 2, "cells": [[0, "0", 1]]},
    ],
)  # fmt: skip
def test_what_is_no_count_of_pairs_is_refused(held):
    with pytest.raises(ValueError, match=r"neither the cells nor the rows|cannot be a cell|is not a label"):
        Confusion.read(held, 2)


class Columns(torch.nn.Module):
    """The first class of an image is 256 red + green of its first pixel."""

    def forward(self, x):
        first = (x[:, 0, 0, 0] * 255).round().long() * 256 + (x[:, 1, 0, 0] * 255).round().long()
        return F.one_hot(first, MANY).float() * 20


MANY = 21_841


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Pixels(lambdanets.data.Images):
    predicted: list

    def load(self, index):
        return Image.new("RGB", (1, 1), (*divmod(self.predicted[index], 256), 0))


def many_classes(made):
    """Scores, picture, page and JSON of 4,000 images in 21,841 classes; gives seconds, memory and numbers."""
    began, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    names = tuple(f"n{i:08d}" for i in range(MANY))
    draw = random.Random(0)
    labels = [draw.randrange(MANY) for _ in range(4_000)]
    predicted = [label if i % 4 else (label + 1 + i % 3) % MANY for i, label in enumerate(labels)]
    images = Pixels(names, [f"{i}.png" for i in range(len(labels))], labels, predicted)
    batches = Batches(images, View(1, 3, (0.0,) * 3, (1.0,) * 3, 1.0), batch_images=64, training=False)
    scores = evaluate(Columns(), batches, classes=MANY, device=CPU)
    made = Path(made)
    record = record_of(made / "run") | {"classes": list(names)}
    run = Run(made / "run", Columns(), batches.view, names, record)
    folder = _write(Evaluation(scores, images, "how", {}, None), run, made / "run", "x", None)
    write_json(made / "run" / "run.json", record | {"result": {"confusion": scores.confusion.json()}})
    report = write_report(made / "run", record, scores, images)
    sizes = [p.stat().st_size for p in (folder / "evaluation.json", made / "run" / "run.json", report)]
    grown_mb = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1e3
    return [time.process_time() - began, grown_mb, scores.n, scores.errors, sizes]


def test_twenty_thousand_classes_are_judged_in_a_minute_and_a_gigabyte(made, children):
    seconds, grown_mb, n, errors, sizes = children.start(many_classes, str(made)).gave()
    assert (n, errors) == (4_000, 1_000)
    assert seconds < 60
    assert grown_mb < 700
    assert sizes[0] < 10e6
    assert max(sizes[1:]) < 3e6


def test_of_many_classes_the_picture_shows_the_mistakes_and_of_few_the_matrix(monkeypatch):
    shown, matrix, bars = [], Axes.imshow, Axes.barh
    monkeypatch.setattr(Axes, "imshow", lambda *a, **k: shown.append("matrix") or matrix(*a, **k))
    monkeypatch.setattr(Axes, "barh", lambda axes, y, n, **k: shown.append(n) or bars(axes, y, n, **k))
    names = [f"class {i}" for i in range(60)]
    confusion_png(Confusion.of(50, [(0, 1), (2, 2)]), names[:50], "")
    confusion_png(Confusion.of(51, [(0, 1), (0, 1), (5, 4), (2, 2)]), names[:51], "")
    confusion_png(Confusion.of(60, [(i, i) for i in range(60)]), names, "")
    confusion_png(Confusion.of(60, [(i, (i + 1) % 60) for i in range(60)]), names, "")
    assert shown == ["matrix", [2, 1], [], [1] * 25]


def test_the_command_prints_the_numbers_and_the_table(made, capsys):
    shutil.rmtree(made / "photos" / "val" / "bee")
    assert main(["evaluate", str(made / "run"), "--data", str(made / "photos"), "--batch-images", "7"]) == 0
    out = capsys.readouterr().out
    found = evaluate_run(made / "run", made / "photos", device=CPU)
    assert f"{54 - found.scores.errors} of 54 right: top-1 {found.scores.top1_frac:.2%}, top-5" in out
    assert f"loss {found.scores.loss:.4f} nats" in out
    assert "1 classes without images" in out
    rows = [line for line in out.splitlines() if re.match(r"(ant|cat|dog|eel|fox) ", line)]
    assert len(rows) == 5
    assert all(row.split()[1] == "9" for row in rows)
    assert str(made / "run" / "evaluation-1") in out


def test_another_folder_for_the_numbers_must_be_new(made, tmp_path):
    evaluate_run(made / "run", made / "photos", out=tmp_path / "new" / "place", device=CPU)
    assert (tmp_path / "new" / "place" / "confusion.png").is_file()
    with pytest.raises(BadRun, match="is not empty"):
        evaluate_run(made / "run", made / "photos", out=tmp_path / "new" / "place", device=CPU)


def test_ranks_share_the_images_and_each_counts_once(made):
    for extra in range(2):  # 65 images, which two ranks cannot halve
        shutil.copy(made / "photos" / "val" / "ant" / "0.png", made / "photos" / "val" / "ant" / f"more{extra}.png")
    (made / "photos" / "val" / "fox" / "cut.png").write_bytes(b"")
    one = evaluate_run(made / "run", made / "photos", exclude_bad=True, device=CPU)
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "lambdanets",
         "evaluate", str(made / "run"), "--data", str(made / "photos"), "--exclude-bad", "--device", "cpu"],
        capture_output=True, text=True, cwd=root, env={**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("of 65 right") == 1  # one speaks
    first, second = (json.loads((made / "run" / f"evaluation-{i}" / "evaluation.json").read_text()) for i in (1, 2))
    assert first["n"] == one.scores.n == 65
    assert second["excluded"] == [{"name": "val/fox/cut.png", "reason": "the file is empty"}]
    for key in ("n", "top1_frac", "top5_frac", "confusion", "excluded", "classes"):
        assert second[key] == first[key]
    assert second["loss"] == pytest.approx(first["loss"], rel=1e-6)


# --- which images -----------------------------------------------------------------------------------------------------


def test_an_empty_class_folder_moves_no_label(made):
    before = evaluate_run(made / "run", made / "photos", device=CPU).scores.confusion.dense()
    for path in (made / "photos" / "val" / "bee").iterdir():
        path.unlink()
    after = evaluate_run(made / "run", made / "photos", device=CPU).scores.confusion.dense()
    bee = open_run(made / "run").classes.index("bee")
    assert sum(after[bee]) == 0
    assert [row for i, row in enumerate(after) if i != bee] == [row for i, row in enumerate(before) if i != bee]


def test_a_class_that_the_run_does_not_know_is_an_error_with_both_lists(made):
    (made / "photos" / "val" / "fox").rename(made / "photos" / "val" / "wolf")
    (made / "photos" / "train" / "fox").rename(made / "photos" / "train" / "wolf")
    with pytest.raises(BadData, match=r"1 classes of .* are unknown to the run: wolf; its 7 classes are .*ant, bee"):
        evaluate_run(made / "run", made / "photos", device=CPU)
    assert not list((made / "run").glob("evaluation-*"))


@pytest.mark.parametrize("layout", ["", "val", "test"])
def test_classes_are_matched_by_name_in_any_folder(layout, made, tmp_path):
    other = tmp_path / "other" / layout
    for name in ("fox", "cat"):  # two of seven, which would be the labels 0 and 1 if they were counted
        shutil.copytree(made / "photos" / "val" / name, other / name)
    (other / "cat" / "alone").mkdir()
    shutil.copytree(made / "photos" / "val" / "cat", other / ".hidden")
    found = evaluate_run(made / "run", tmp_path / "other", device=CPU)
    whole = evaluate_run(made / "run", made / "photos", device=CPU).scores.confusion.dense()
    classes = open_run(made / "run").classes
    rows = {classes[i]: row for i, row in enumerate(found.scores.confusion.dense()) if sum(row)}
    assert rows == {name: whole[classes.index(name)] for name in ("cat", "fox")}
    assert "all 18 images of" in found.how
    assert "ignored (hidden or system): " in found.how


def test_one_class_with_one_image_is_enough_to_be_judged(made, tmp_path):
    (tmp_path / "one" / "dog").mkdir(parents=True)
    shutil.copy(made / "photos" / "val" / "dog" / "3.png", tmp_path / "one" / "dog")
    assert evaluate_run(made / "run", tmp_path / "one", device=CPU).scores.n == 1


def test_a_folder_that_was_divided_for_training_is_judged_by_its_held_out_part_wherever_it_lies(made, tmp_path):
    shutil.rmtree(made / "photos")
    write_images(made / "photos", CLASSES, 9)
    held_out = lambdanets.data.folder(made / "photos").val
    record = record_of(made / "run")
    record["data"] |= {"val_images": len(held_out), "fingerprint": {"val": held_out.fingerprint()}}
    write_json(made / "run" / "run.json", record)
    assert 7 <= len(held_out) < 63
    own = evaluate_run(made / "run", device=CPU)
    (made / "photos").rename(tmp_path / "moved")
    moved = evaluate_run(made / "run", tmp_path / "moved", device=CPU)
    assert moved.scores == own.scores
    assert moved.scores.n == len(held_out)
    assert "that the run held out" in moved.how
    with pytest.raises(BadData, match="does not exist"):
        evaluate_run(made / "run", device=CPU)
    shutil.copytree(tmp_path / "moved", made / "photos")
    (made / "photos" / "fox" / "new.png").write_bytes((made / "photos" / "fox" / "1.png").read_bytes())
    again = evaluate_run(
        made / "run", made / "photos", device=CPU
    )  # one more image, and still none that it learnt from
    assert {again.images.names[i] for i in again.scores.ids} - {held_out.names[i] for i in own.scores.ids} <= {
        "fox/new.png"
    }


def test_shards_are_judged_as_the_folder_that_was_packed(made, tmp_path):
    pack(made / "photos", tmp_path / "shards")
    want = evaluate_run(made / "run", made / "photos", device=CPU).scores
    found = evaluate_run(made / "run", tmp_path / "shards", device=CPU)
    assert (found.scores.n, found.scores.confusion) == (want.n, want.confusion)
    assert "of its val split" in found.how


def test_held_out_images_that_changed_are_not_taken_for_the_runs(made):
    (made / "photos" / "val" / "ant" / "0.png").rename(made / "photos" / "val" / "bee" / "99.png")
    with pytest.raises(BadData, match="not those of the run any more"):
        evaluate_run(made / "run", device=CPU)


# --- bad images -------------------------------------------------------------------------------------------------------


def test_a_bad_image_is_an_error_that_names_it(made, capsys):
    (made / "photos" / "val" / "eel" / "4.png").write_bytes(b"<html>")
    with pytest.raises(BadImage, match=r"val/eel/4\.png"):
        evaluate_run(made / "run", made / "photos", device=CPU)
    assert main(["evaluate", str(made / "run"), "--data", str(made / "photos")]) == 2
    said = capsys.readouterr().err
    assert "val/eel/4.png" in said
    assert "--exclude-bad" in said


@pytest.mark.parametrize("workers", [0, 2])
def test_excluded_images_are_in_no_number_and_the_denominator_is_shown(workers, made):
    whole = evaluate_run(made / "run", made / "photos", device=CPU)
    for name in ("eel/4", "ant/0"):
        path = made / "photos" / "val" / f"{name}.png"
        path.write_bytes(path.read_bytes()[:40])
    found = evaluate_run(made / "run", made / "photos", exclude_bad=True, workers=workers, device=CPU)
    assert found.scores.n == 61
    assert "2 of 63 images cannot be read and are in none of these numbers" in str(found)
    assert sorted(found.excluded) == ["val/ant/0.png", "val/eel/4.png"]
    assert {c: sum(row) for c, row in zip(found.images.classes, found.scores.confusion.dense(), strict=True)} == {
        c: 8 if c in ("ant", "eel") else 9 for c in CLASSES
    }
    names = {found.images.names[i] for i in found.scores.ids}
    assert names == set(whole.images.names) - set(found.excluded)
    written = json.loads((found.folder / "evaluation.json").read_text())
    assert {row["name"] for row in written["excluded"]} == set(found.excluded)


def test_nothing_but_bad_images_is_an_error(made, tmp_path):
    (tmp_path / "bad" / "ant").mkdir(parents=True)
    (tmp_path / "bad" / "ant" / "0.png").write_bytes(b"")
    with pytest.raises(BadData, match="0 image"):
        evaluate_run(made / "run", tmp_path / "bad", exclude_bad=True, device=CPU)


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
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


def test_the_page_shows_an_interrupted_run_and_loads_and_runs_nothing(made):
    (made / "run" / "bad_samples.jsonl").write_text('{"name": "a"}\n{"name": "b"}\n')
    (made / "run" / "log.jsonl").write_text('{"step": 9, "loss": 2.5}\n{"step": 19, "loss": 2.25}\n')
    path = write_report(made / "run")
    assert path == made / "run" / "report.html"
    text = path.read_text()
    seen = Page(text)
    assert not seen.open
    assert not {"script", "link", "iframe", "object", "b>"} & set(seen.tags)
    assert "default-src 'none'" in text
    for tag, name, value in seen.attributes:  # what a browser would fetch
        if name in ("src", "href", "xlink:href", "action", "data", "poster"):
            assert value.startswith(("data:image/", "#")), (tag, name)
        assert not name.startswith("on")
    assert "<script>alert(1)</script>" in seen.text  # as text
    assert "<b>$5 & co" in seen.text
    assert "2 <&>" in seen.text
    told = ["interrupted, 2 of 3 epochs", "25.0% of training time waited for data", "100 training images a second"]
    told += ["2 training images unreadable", "lambda_resnet_tiny", "fingerprint.val", "Worst mistakes"]
    assert [words for words in told if words not in seen.text] == []
    assert seen.tags.count("svg") == 1
    assert seen.pictures[0].width > 500  # the confusion matrix
    assert len(seen.pictures) == 1 + 24


def test_the_losses_of_single_steps_are_those_of_the_log(tmp_path):
    lines = [{"step": 9, "loss": 2.5}, {"step": 19, "loss": "nan"}, {"step": 19, "val_loss": 1}]
    lines.append({"step": 29, "loss": 2})
    (tmp_path / "log.jsonl").write_text("\n".join(map(json.dumps, lines)) + '\n{"step": 39, "lo')
    assert losses(tmp_path) == [(9, 2.5), (29, 2.0)]
    assert losses(tmp_path / "none") == []
    long = curves_svg([], [(step, 1.0) for step in range(100_000)])
    assert len(long) < 40_000  # stretches, not points
    assert curves_svg([], [(9, 2.5), (29, 2.0)]).startswith("<svg")


def test_the_worst_mistakes_are_those_of_highest_loss_with_their_pictures(made):
    opened = open_run(made / "run")
    images, _ = own_images(opened.record, opened.folder)
    batches = Batches(images, opened.view, batch_images=9, training=False)
    scores = evaluate(opened.model, batches, classes=7, device=CPU)
    want = by_hand(made / "run", [made / "photos" / name for name in images.names])
    losses = sorted((loss for a, b, loss, _ in want.values() if a != b), reverse=True)
    worst = _worst(scores, images)
    assert [m.loss for m in worst] == pytest.approx(losses[:24], rel=1e-4)
    for mistake in worst:
        label, predicted, loss, _ = want[made / "photos" / mistake.name]
        assert (mistake.label, mistake.predicted) == (opened.classes[label], opened.classes[predicted])
        assert mistake.loss == pytest.approx(loss, rel=1e-4)
        with Image.open(made / "photos" / mistake.name) as picture, Image.open(io.BytesIO(mistake.picture)) as shown:
            assert shown.getpixel((3, 3)) == picture.getpixel((3, 3))
    seen = Page(write_report(made / "run", record_of(made / "run"), scores, images).read_text())
    assert seen.text.count(" taken for ") == 1 + 24  # a headline, too
    assert f"{worst[0].label} taken for {worst[0].predicted} loss {worst[0].loss:.2f} {worst[0].name}" in seen.text


def test_a_page_is_written_without_weights_images_or_epochs_and_says_what_is_missing(made, capsys):
    shutil.rmtree(made / "photos")
    assert main(["report", str(made / "run"), "--device", "cpu"]) == 0
    assert capsys.readouterr().out.strip() == str(made / "run" / "report.html")
    seen = Page((made / "run" / "report.html").read_text())
    assert "No evaluation of the weights: " in seen.text
    assert "does not exist" in seen.text
    assert not seen.pictures
    (made / "run" / "weights.safetensors").unlink()
    record = record_of(made / "run")
    record |= {"history": [], "status": "running"}
    write_json(made / "run" / "run.json", record)
    seen = Page(write_report(made / "run").read_text())
    assert "it has no weights.safetensors" in seen.text
    assert "running, 0 of 3 epochs" in seen.text
    assert "svg" not in seen.tags


def test_a_page_is_of_a_run(tmp_path, capsys):
    assert main(["report", str(tmp_path)]) == 2
    assert "is not the folder of a run" in capsys.readouterr().err
    (tmp_path / "run.json").write_text("[]")
    with pytest.raises(BadRun, match="is not a run of lambdanets"):
        write_report(tmp_path)


def test_a_big_thumbnail_is_small_and_a_run_without_mistakes_says_so(made):
    opened = open_run(made / "run")
    images, _ = own_images(opened.record, opened.folder)
    Image.new("RGB", (900, 300), "teal").save(made / "photos" / images.names[0])
    scores = evaluate(opened.model, Batches(images, opened.view, batch_images=9, training=False), classes=7, device=CPU)
    predicted = [int(images.labels[i]) for i in scores.ids]
    wrong_first = [*predicted]
    wrong_first[0] = 1 - wrong_first[0]
    (mistake,) = _worst(dataclasses.replace(scores, predicted=wrong_first), images)
    with Image.open(io.BytesIO(mistake.picture)) as shown:
        assert (shown.format, shown.size) == ("JPEG", (112, 37))
    right = dataclasses.replace(scores, predicted=predicted, confusion=Confusion(7, {(i, i): 9 for i in range(7)}))
    seen = Page(write_report(made / "run", record_of(made / "run"), right, images).read_text())
    assert "None: all 63 held-out images are right." in seen.text
