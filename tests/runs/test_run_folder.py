"""A run's folder read back, as it was written, damaged or a stranger's: right, or one sentence, at a bounded price."""

import contextlib
import copy
import json
import math
import os
import resource
import shutil
import threading
import time
from pathlib import Path

import pytest
import safetensors.torch
import torch
from PIL import Image

import lambdanets
import lambdanets.classification.report
from lambdanets.classification.report import page
from lambdanets.classification.run import open_run, read_record
from lambdanets.classification.train import train
from lambdanets.cli import main
from lambdanets.errors import BadRun
from lambdanets.recipes import choose
from lambdanets.recipes.recipe import Options
from lambdanets.runs import weights as weights_module
from lambdanets.runs.checkpoints import read_checkpoint
from lambdanets.runs.folder import choose_folder, evaluation_folder, next_numbered
from lambdanets.runs.weights import Weights, load_weights, read_weights, save_weights

COLOURS = ("blue", "green", "red")


@pytest.fixture(scope="module")
def _run(shared_colours, tmp_path_factory):
    torch.set_num_threads(1)
    recipe = choose("folder", model="lambda_resnet_tiny", image_px=8, epochs=2, batch_images=8)
    options = Options(save_steps=2)
    return train(recipe, shared_colours, out=tmp_path_factory.mktemp("runs") / "run", options=options).folder


@pytest.fixture
def run(_run, tmp_path):
    """The folder of a finished run with a checkpoint; a test may break it."""
    return shutil.copytree(_run, tmp_path / "run")


def record_of(folder):
    return json.loads((folder / "run.json").read_text())


def write_record(folder, record):
    (folder / "run.json").write_text(json.dumps(record))


# --- the record -------------------------------------------------------------------------------------------------------


def leaves(held, path=()):
    """Paths of all values, objects and lists among them; of a list its first and last."""
    yield path
    if isinstance(held, dict):
        for key, value in held.items():
            yield from leaves(value, (*path, key))
    elif isinstance(held, list) and held:
        for i in sorted({0, len(held) - 1}):
            yield from leaves(held[i], (*path, i))


def replaced(record, path, value):
    if not path:
        return value
    changed = copy.deepcopy(record)
    inner = changed
    for key in path[:-1]:
        inner = inner[key]
    if value is ...:
        del inner[path[-1]]
    else:
        inner[path[-1]] = value
    return changed


def test_a_record_with_any_value_of_another_type_is_read_whole_or_refused_in_one_sentence(run, monkeypatch):
    record = record_of(run)
    assert read_record(run) == record
    drawn = lambdanets.classification.report.curves_svg
    others = [None, True, 3, -1, 1.5, 10**400, "text", "", [], ["x"], {}, {"x": {"y": []}}, [[[1]]], ...]
    refused, accepted, curves = 0, 0, set()
    for path in leaves(record):
        for other in others:
            if other is ... and not path:
                continue
            write_record(run, replaced(record, path, other))
            try:
                read = read_record(run)
            except BadRun as error:
                refused += 1
                assert str(error).startswith(str(run / "run.json"))
                assert "\n" not in str(error)
                continue
            accepted += 1
            numbers = path[0] == "history" and isinstance(other, (int, float)) and path not in curves
            curves |= {path} if numbers else set()
            monkeypatch.setattr(lambdanets.classification.report, "curves_svg", drawn if numbers else lambda *a: "")
            page(read, scores=None, confusion=None, mistakes=[], notes=[], steps=[], bad_samples=0)
    assert refused > 700
    assert accepted > 100  # what nobody needs may be anything


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("[" * 100_000, "is not a run of lambdanets .*nested"),
        ('{"a":' * 500 + "1" + "}" * 500, "is not a run of lambdanets .*nested|no 'recipe'"),
        ("", "is not a run of lambdanets"),
        ("\0\1", "is not a run of lambdanets"),
        ('{"recipe": NaN}', "NaN is no JSON"),
    ],
)
def test_what_is_no_record_is_one_sentence_at_every_command(content, said, run, colours, capsys):
    (run / "run.json").write_text(content)
    with pytest.raises(BadRun, match=said):
        read_record(run)
    image = str(next(colours.glob("val/*/*.jpg")))
    for command in (["predict", str(run), image], ["evaluate", str(run)], ["report", str(run)]):
        assert main(command) == 2
        assert capsys.readouterr().err.count("\n") == 1
    assert main(["train", "--out", str(run), "--resume"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_record_that_is_nested_without_end_is_refused_before_it_is_walked(run):
    record = record_of(run)
    deep = []
    for _ in range(400):
        deep = [deep]
    write_record(run, record | {"versions": {"torch": deep}})
    with pytest.raises(BadRun, match="nested more than 8 levels"):
        read_record(run)


@pytest.mark.parametrize("name", ["run.json", "log.jsonl", "weights.safetensors", "bad_samples.jsonl"])
@pytest.mark.parametrize("kind", ["pipe", "folder", "loop", "sparse"])
def test_a_file_of_a_run_that_is_no_file_is_not_waited_for(kind, name, run, colours, capsys):
    path = run / name
    path.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "loop":
        path.symlink_to(path)
    else:
        with open(path, "wb") as file:
            file.truncate(1 << 34)
    image = str(next(colours.glob("val/*/*.jpg")))
    needed = name in ("run.json", "weights.safetensors")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert main(["report", str(run)]) == (2 if name == "run.json" else 0)
    if not (kind == "sparse" and not needed):  # the same reader
        assert main(["predict", str(run), image]) == (2 if needed else 0)
        assert main(["evaluate", str(run)]) == (2 if needed else 0)
    assert "Traceback" not in capsys.readouterr().err
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 800_000  # kB, of 16 GiB


def test_a_place_that_is_no_runs_is_one_sentence(tmp_path, capsys):
    (tmp_path / "file").write_text("x")
    for place in (tmp_path / "file", tmp_path / "none", tmp_path / ("n" * 300), tmp_path / "file" / "below"):
        for command in (["predict", str(place), "a.png"], ["evaluate", str(place)], ["report", str(place)]):
            assert main(command) == 2
            assert capsys.readouterr().err.count("\n") == 1
        with contextlib.suppress(SystemExit):
            assert main(["train", "--out", str(place), "--resume", "--epochs", "0"]) == 2
        assert "Traceback" not in capsys.readouterr().err


def test_a_record_of_the_first_release_is_read(run, capsys):
    """Its confusion is a list of rows, its weights have no checksum, its starts are not recorded."""
    record, found = record_of(run), read_weights(run)
    rows = [[0] * 3 for _ in range(3)]
    for label, predicted, n in record["result"]["confusion"]["cells"]:
        rows[label][predicted] = n
    record["result"]["confusion"] = rows
    del record["starts"]
    write_record(run, record)
    safetensors.torch.save_file(found, run / "weights.safetensors")
    assert sum(map(sum, rows)) == 9
    assert main(["report", str(run)]) == 0
    assert main(["train", "--out", str(run), "--resume"]) == 0
    assert "is finished" in capsys.readouterr().out
    (run / "weights.safetensors").unlink()  # the page then takes the numbers from the record
    assert main(["report", str(run)]) == 0
    assert "which class was taken for which" in (run / "report.html").read_text().lower()


# --- weights ----------------------------------------------------------------------------------------------------------


class Small(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = torch.nn.BatchNorm1d(3)
        self.brief = torch.nn.Parameter(torch.randn(2, 3).half())
        self.empty = torch.nn.Parameter(torch.zeros(0, 4))
        self.number = torch.nn.Parameter(torch.tensor(2.5, dtype=torch.float64))


def same(found, wanted):
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert found[name].dtype == value.dtype
        assert torch.equal(found[name], value), name


def test_weights_are_read_as_they_were_written_by_us_and_by_safetensors(tmp_path):
    model = Small()
    save_weights(model, tmp_path / "w.safetensors")
    same(read_weights(tmp_path / "w.safetensors"), model.state_dict())
    same(safetensors.torch.load_file(tmp_path / "w.safetensors"), model.state_dict())
    with safetensors.safe_open(tmp_path / "w.safetensors", "pt") as file:
        assert file.metadata()["format"] == "pt"
        assert len(file.metadata()["sha256"]) == 64
    safetensors.torch.save_file(model.state_dict(), tmp_path / "theirs.safetensors", metadata={"format": "pt"})
    same(read_weights(tmp_path / "theirs.safetensors"), model.state_dict())
    with Weights(tmp_path / "w.safetensors") as found:
        same(found.read(["brief", "number"]), {k: v for k, v in model.state_dict().items() if k in ("brief", "number")})
    first = (tmp_path / "w.safetensors").read_bytes()
    save_weights(model, tmp_path / "w.safetensors")
    assert (tmp_path / "w.safetensors").read_bytes() == first


def test_every_flipped_bit_of_a_file_of_weights_is_found_or_changes_nothing(tmp_path):
    model, path = Small(), tmp_path / "w.safetensors"
    save_weights(model, path)
    good, wanted = path.read_bytes(), model.state_dict()
    begins = 8 + int.from_bytes(good[:8], "little")
    unnoticed = 0
    for bit in range(8 * len(good)):
        flipped = bytearray(good)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        try:
            found = read_weights(path)
        except BadRun as error:
            assert str(path) in str(error)
            continue
        same(found, wanted)
        assert bit // 8 < begins  # of a tensor every bit is found
        unnoticed += 1
    assert unnoticed < 8 * len('"format":"pt","sha256"  ') + 64  # what the metadata are called


@pytest.mark.parametrize("at", [0.3, 0.7, 1.0])
def test_a_flipped_bit_ends_every_command_in_one_sentence(at, run, colours, tmp_path, capsys):
    path = run / "weights.safetensors"
    content = bytearray(path.read_bytes())
    content[int(at * (len(content) - 1))] ^= 1  # the lowest bit of some number: it stays finite
    path.write_bytes(content)
    image = str(next(colours.glob("val/*/*.jpg")))
    for command in (
        ["predict", str(run), image],
        ["evaluate", str(run)],
        ["train", "--out", str(run), "--resume"],
        ["train", "--data", str(colours), "--model", "lambda_resnet_tiny", "--image-px", "8", "--init-from", str(run),
         "--out", str(tmp_path / "new")],
    ):  # fmt: skip
        assert main(command) == 2
        said = capsys.readouterr().err
        assert "is not as it was written, its sha256 differs" in said
        assert said.count("\n") == 1
    assert main(["report", str(run)]) == 0
    assert "its sha256 differs" in (run / "report.html").read_text()
    assert not (tmp_path / "new").exists()


def header(entries, size_bytes, path):
    """A safetensors file of that header, and a hole of so many bytes."""
    text = json.dumps(entries).encode()
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + size_bytes)


def test_weights_that_claim_gigabytes_are_compared_with_the_model_before_anything_is_read(run, colours, tmp_path):
    own = {name: list(value.shape) for name, value in read_weights(run).items()}
    zeros = torch.zeros(own["layer1.0.conv1.weight"])
    n = 3_000_000_000
    for entries in (
        {"huge": {"dtype": "F32", "shape": [n], "data_offsets": [0, 4 * n]}},
        {name: {"dtype": "F32", "shape": [n] if name == "fc.bias" else shape, "data_offsets": None}
         for name, shape in own.items()},
    ):  # fmt: skip
        end = 0
        for entry in entries.values():
            entry["data_offsets"] = [end, end := end + 4 * math.prod(entry["shape"])]
        header(entries, end, run / "weights.safetensors")
        assert (run / "weights.safetensors").stat().st_blocks < 100
        began, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        with pytest.raises(BadRun, match="does not fit"):
            open_run(run)
        if "huge" in entries:  # the other file's classifier is for other classes, and left where it is
            with pytest.raises(BadRun, match="does not fit"):
                load_weights(lambdanets.create_model("lambda_resnet_tiny", num_classes=3), run)
        else:
            with Weights(run) as found:
                same(found.read(["layer1.0.conv1.weight"]), {"layer1.0.conv1.weight": zeros})
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # kB
        assert time.process_time() - began < 10


@pytest.mark.parametrize(
    ("entries", "size_bytes", "said"),
    [
        ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 9]}}, 9, "does not take the 9 bytes"),
        ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}, 9, "tells of 8 bytes, and it has 9"),
        ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]}}, 12, "begins at 4"),
        ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
          "b": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]}}, 12, "begins at 4"),
        ({"a": {"dtype": "F99", "shape": [2], "data_offsets": [0, 8]}}, 8, "type F99, unknown"),
        ({"a": {"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]}}, 8, "shape"),
        ({"a": {"dtype": "F32", "shape": [2.0], "data_offsets": [0, 8]}}, 8, "shape"),
        ({"a": {"dtype": "F32", "shape": [True, 2], "data_offsets": [0, 8]}}, 8, "shape"),
        ({"a": {"dtype": "F32", "shape": "2", "data_offsets": [0, 8]}}, 8, "shape"),
        ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [8]}}, 8, "lies at"),
        ({"a": [1]}, 8, "no 'dtype'"),
        ({"a": {"dtype": "F32", "shape": [2**62, 2**62], "data_offsets": [0, 8]}}, 8, "does not take"),
    ],
)  # fmt: skip
def test_a_header_that_contradicts_itself_or_the_file_is_refused(entries, size_bytes, said, tmp_path):
    header(entries, size_bytes, tmp_path / "w.safetensors")
    with pytest.raises(BadRun, match=said):
        read_weights(tmp_path / "w.safetensors")


@pytest.mark.parametrize("content", [b"", b"\xff" * 8, b"\xff" * 8 + b"{}", b"\x02" + b"\0" * 7 + b"[]", b"\0" * 99])
def test_what_is_no_safetensors_is_refused(content, tmp_path):
    (tmp_path / "w.safetensors").write_bytes(content)
    with pytest.raises(BadRun, match="cannot be read"):
        read_weights(tmp_path / "w.safetensors")


def test_whole_numbers_in_the_place_of_weights_are_refused(run):
    tensors = read_weights(run)
    whole = {name: v.to(torch.int8) if name == "fc.weight" else v for name, v in tensors.items()}
    safetensors.torch.save_file(whole, run / "weights.safetensors")
    with pytest.raises(BadRun, match=r"fc\.weight of .* are torch\.int8, no floating-point numbers"):
        open_run(run)
    tensors = {n: v.bfloat16() if v.is_floating_point() else v for n, v in tensors.items()}
    safetensors.torch.save_file(tensors, run / "weights.safetensors")
    assert open_run(run).model.fc.weight.dtype == torch.float32


def test_first_weights_may_lack_the_counters_of_batch_norm_as_with_torch(run, tmp_path):
    own = read_weights(run)
    without = {name: value for name, value in own.items() if not name.endswith("num_batches_tracked")}
    safetensors.torch.save_file(without, tmp_path / "w.safetensors")
    model = lambdanets.create_model("lambda_resnet_tiny", num_classes=3)
    assert "all of it" in load_weights(model, tmp_path / "w.safetensors")["said"]
    same({name: value for name, value in model.state_dict().items() if name in without}, without)


def test_of_a_checkpoint_only_the_running_average_is_read(run, monkeypatch):
    (step, *_) = sorted(run.glob("step-*"))
    wanted = read_checkpoint(step).load()["learner"]["average"]
    monkeypatch.setattr(weights_module.torch, "frombuffer", counted := Counting(torch.frombuffer))
    same(read_weights(step), wanted)
    assert counted.bytes == sum(v.nbytes for v in wanted.values())
    assert counted.bytes < (step / "tensors.safetensors").stat().st_size / 2
    assert open_run(step).classes == COLOURS
    state = json.loads((step / "state.json").read_text())
    state["learner"]["average"]["fc.bias"] = {"$tensor": "nowhere"}
    monkeypatch.setattr(weights_module, "read_checkpoint", lambda path: None)  # as if a stranger had signed it
    (step / "state.json").write_text(json.dumps(state))
    with pytest.raises(BadRun, match=r"lacks tensors that state\.json names: nowhere"):
        open_run(step)


class Counting:
    def __init__(self, call):
        self.call, self.bytes = call, 0

    def __call__(self, content, **named):
        self.bytes += len(content)
        return self.call(content, **named)


def test_weights_that_are_replaced_while_they_are_read_are_read_as_they_were(run):
    wanted = read_weights(run)
    with Weights(run) as found:
        other = lambdanets.create_model("lambda_resnet_tiny", num_classes=3)
        save_weights(other, run / "weights.safetensors")
        same(found.read(), wanted)
    same(read_weights(run), other.state_dict())


@pytest.mark.parametrize("how", ["gone", "cut", "other"])
def test_a_finished_run_without_its_weights_is_not_taken_for_finished(how, run, capsys):
    path = run / "weights.safetensors"
    if how == "gone":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-5] if how == "cut" else b"PK")
    assert main(["train", "--out", str(run), "--resume"]) == 2
    said = capsys.readouterr().err
    assert "is finished, but without its weights" in said
    assert said.count("\n") == 1


# --- names of folders -------------------------------------------------------------------------------------------------


def at_once(count, call):
    """What so many threads get that call it at the same moment."""
    gate, got = threading.Barrier(count), []

    def one():
        gate.wait()
        try:
            got.append(call())
        except BadRun as error:
            got.append(error)

    threads = [threading.Thread(target=one) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return got


def test_of_many_that_ask_at_once_each_gets_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = at_once(16, lambda: next_numbered(tmp_path / "run", "evaluation"))
    assert sorted(int(path.name.removeprefix("evaluation-")) for path in found) == list(range(1, 17))
    assert {path.name for path in at_once(4, lambda: choose_folder(None, "digits"))} == {
        f"digits-{i}" for i in range(1, 5)
    }
    assert all(path.is_dir() for path in found)


def test_of_many_evaluations_into_one_folder_one_gets_it(tmp_path):
    def write():
        with evaluation_folder(tmp_path, tmp_path / "out") as folder:
            time.sleep(0.02)
            (folder / "evaluation.json").write_text("{}")

    found = at_once(8, write)
    assert sum(isinstance(one, BadRun) for one in found) == 7
    assert all("is not empty" in str(one) for one in found if one is not None)


def test_a_run_that_cannot_start_leaves_no_folder_in_runs(colours, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    model = ["--model", "lambda_resnet_tiny", "--image-px", "8"]
    assert main(["train", "--data", str(tmp_path / "none"), *model]) == 2
    assert not (tmp_path / "runs").exists()
    assert main(["train", "--data", str(colours), "--init-from", str(tmp_path / "none"), *model]) == 2
    assert not (tmp_path / "runs").exists()
    (tmp_path / "runs").write_text("")
    assert main(["train", "--data", str(colours), *model]) == 2
    assert "no folder can be made in runs" in capsys.readouterr().err


def test_an_evaluation_that_cannot_be_written_prints_its_numbers_first(run, largest_file, capsys):
    assert main(["evaluate", str(run)]) == 0
    whole = capsys.readouterr().out
    with largest_file(100):
        assert main(["evaluate", str(run)]) == 2
    said = capsys.readouterr()
    assert said.out.splitlines() == whole.splitlines()[:-1]  # all but where the files are
    assert "nothing of this evaluation is written" in said.err
    assert "give another --out" in said.err
    assert [path.name for path in run.glob("evaluation-*")] == ["evaluation-1"]
    assert main(["evaluate", str(run)]) == 0
    assert sorted(path.name for path in run.glob("evaluation-*")) == ["evaluation-1", "evaluation-2"]


# --- names of classes and files ---------------------------------------------------------------------------------------

NAMES = {
    "no UTF-8": (b"caf\xe9", "caf\\xe9"),
    "escapes": (b"\x1b[31mred\x07", "\\x1b[31mred\\x07"),
    "lines": (b"two\nlines", "two\\nlines"),
    "turned": ("a\u202egnp".encode(), "a\\u202egnp"),
    "mathematics": (b"$\\alpha$ & $5", "$\\alpha$ & $5"),
    "glyphs": ("猫🦊".encode(), "猫🦊"),
    "long": (b"n" * 240, "n" * 240),
}


@pytest.mark.parametrize(
    "kind",
    [name if name in ("no UTF-8", "lines", "long") else pytest.param(name, marks=pytest.mark.slow) for name in NAMES],
)
def test_a_run_with_any_name_of_a_class_and_of_a_file_is_trained_judged_and_shown(kind, tmp_path, capsys):
    raw, shown = NAMES[kind]
    root, name = tmp_path / "photos", os.fsdecode(raw)
    for part in ("train", "val"):
        for folder, colour in ((name, "red"), ("zebra", "red")):  # alike: mistakes are certain
            (root / part / folder).mkdir(parents=True)
            for i in range(4):
                Image.new("RGB", (16, 16), colour).save(root / part / folder / f"{i}{name[:200]}.png")
    out = tmp_path / "run"
    asked = ["--model", "lambda_resnet_tiny", "--image-px", "8", "--epochs", "1", "--batch-images", "4"]
    assert main(["train", "--data", str(root), "--out", str(out), *asked]) == 0
    record = read_record(out)
    assert sorted(record["classes"]) == sorted([name, "zebra"])  # labels stay as they are on the disk
    assert record["data"]["fingerprint"]["val"] == lambdanets.data.folder(root).val.fingerprint()
    assert main(["train", "--out", str(out), "--resume"]) == 0
    assert main(["report", str(out)]) == 0
    assert main(["evaluate", str(out)]) == 0
    image = root / "val" / name / f"0{name[:200]}.png"
    capsys.readouterr()
    assert main(["predict", str(out), str(image), "--json"]) == 0
    line = json.loads(capsys.readouterr().out)
    assert line["image"].endswith(f"0{shown[:200]}.png")
    assert {top["class"] for top in line["top"]} == {shown, "zebra"}
    bad = tmp_path / f"bad{name[:200]}"
    bad.write_bytes(b"nothing")
    assert main(["predict", str(out), str(image), str(bad)]) == 1
    said = capsys.readouterr()
    assert len(said.out.splitlines()) == len(said.err.splitlines()) == 1
    assert shown in said.out
    evaluation = (out / "evaluation-1" / "evaluation.json").read_text()
    judged = json.loads(evaluation)
    json.dumps(judged, ensure_ascii=False).encode()  # no half letters, which other readers refuse
    assert {row["class"] for row in judged["classes"]} == {shown, "zebra"}
    assert len(judged["mistakes"]) == 4
    seen = (out / "report.html").read_bytes().decode()  # strictly
    assert shown.replace("&", "&amp;")[:150] in seen
    for text in (said.out, said.err, evaluation, seen):
        assert not any(c in text for c in "\x1b\x07\u202e")


def test_a_terminal_that_lacks_a_letter_ends_no_command(run, colours, children):
    child = children.start(in_ascii, str(run), str(next(colours.glob("val/*/*.jpg"))), PYTHONIOENCODING="ascii")
    assert child.gave() == [0, 1]


def in_ascii(run, image):
    import sys

    sys.stdout = open(1, "w", encoding="ascii", errors="strict", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", encoding="ascii", errors="strict", closefd=False)  # noqa: SIM115
    other = Path(run).parent / "猫\udce9.jpg"
    shutil.copy(image, other)
    bad = other.with_name("é.jpg")
    bad.write_bytes(b"nothing")
    return [main(["predict", run, str(other)]), main(["predict", run, str(bad)])]
