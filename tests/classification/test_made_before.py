"""What an earlier version made is still read: a run goes on to the bit, a finished one is used, shards are read.

made_before/0.1.0.tar.xz was made by main at 6aa8a28 (2026-11-26), on the processor that its platform.json names:

    colours    24 and 9 pictures of three classes
    whole      a run of lambda_resnet_tiny with 4 channels, undisturbed (without its page and picture)
    stopped    the same run, stopped after step 5 of 9, with its checkpoint
    shards     the pictures, packed
"""

import json
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch
from PIL import ImageChops
from test_loss_curve import here

from lambdanets import data
from lambdanets.classification.run import open_run
from lambdanets.cli import main
from lambdanets.data import shards
from lambdanets.models import create as resnet

MADE = Path(__file__).parent / "made_before"


@pytest.fixture(params=sorted(path.name for path in MADE.glob("*.tar.xz")))
def made(request, tmp_path, monkeypatch):
    with tarfile.open(MADE / request.param) as archive:
        archive.extractall(tmp_path, filter="data")
    monkeypatch.chdir(tmp_path)
    small = replace(resnet.SIZES["lambda_resnet_tiny"], width=4, lambda_args={"scope": 5, "key_depth": 4})
    monkeypatch.setitem(resnet.SIZES, "lambda_resnet_tiny", small)  # else its weights were 4 MB
    return tmp_path


def test_a_run_that_an_earlier_version_began_goes_on_to_the_weights_of_the_undisturbed_one(made, capsys):
    assert main(["train", "--resume", "--out", "stopped"]) == 0
    said = capsys.readouterr()
    assert "goes on after step 5 of 9" in said.out
    assert "lambdanets:" not in said.err
    found, want = (safetensors.torch.load_file(made / run / "weights.safetensors") for run in ("stopped", "whole"))
    assert found.keys() == want.keys()
    same = json.loads((made / "platform.json").read_text()) == here()
    for name, value in want.items():
        if same:
            assert torch.equal(found[name], value), name
        else:
            torch.testing.assert_close(found[name], value, rtol=0.02, atol=0.02)
    records = [json.loads((made / run / "run.json").read_text()) for run in ("stopped", "whole")]
    assert [row["epoch"] for row in records[0]["history"]] == [1, 2, 3]
    assert records[0]["data"]["fingerprint"] == records[1]["data"]["fingerprint"]
    if same:
        assert [row["val_loss"] for row in records[0]["history"]] == [row["val_loss"] for row in records[1]["history"]]


def test_a_run_that_an_earlier_version_finished_is_finished_judged_shown_and_predicted_with(made, capsys):
    record = json.loads((made / "whole" / "run.json").read_text())
    assert main(["train", "--resume", "--out", "whole"]) == 0
    assert "is finished" in capsys.readouterr().out
    assert main(["evaluate", "whole", "--out", "judged"]) == 0
    judged = json.loads((made / "judged" / "evaluation.json").read_text())
    assert judged["n"] == record["result"]["n"] == 9
    assert judged["top1_frac"] == record["result"]["top1_frac"]
    assert judged["loss"] == pytest.approx(record["result"]["loss"], rel=1e-4)
    assert main(["report", "whole"]) == 0
    assert (made / "whole" / "report.html").stat().st_size > 10_000
    assert main(["predict", "whole", "colours/val/red/0.jpg", "--json"]) == 0
    assert open_run("whole").classes == ("blue", "green", "red")


def test_shards_that_an_earlier_version_packed_give_the_pictures_of_the_folder(made):
    found, folder = shards.open_shards("shards"), data.folder("colours")
    for packed, images in ((found.train, folder.train), (found.val, folder.val)):
        assert sorted(packed.names) == sorted(images.names)
        for i, name in enumerate(packed.names):
            at = list(images.names).index(name)
            assert packed.labels[i] == images.labels[at]
            assert ImageChops.difference(packed.load(i), images.load(at)).getbbox() is None
    assert main(["index", "shards"]) == 0


@pytest.mark.parametrize(
    "place", ["ftp://stranger/set", "https://stranger/set", "stream:https://stranger/set", "memory://x"]
)
@pytest.mark.parametrize(
    "command", [["evaluate", "whole"], ["report", "whole"], ["train", "--resume", "--out", "stopped"]]
)
def test_nobody_is_called_because_the_file_of_a_stranger_says_so(made, command, place, monkeypatch, capsys):
    def called(*args, **named):
        raise AssertionError(f"somebody was called: {args}")

    monkeypatch.setattr("fsspec.core.url_to_fs", called)
    for run in ("whole", "stopped"):
        record = json.loads((made / run / "run.json").read_text())
        record["data"]["source"] = place
        (made / run / "run.json").write_text(json.dumps(record))
    code = main(command)
    said = capsys.readouterr()
    if command[0] == "report":  # what there is without the pictures
        page = (made / "whole" / "report.html").read_text()
        assert code == 0
        assert f"--allow-source {place.removeprefix('stream:')}" in page
    else:
        assert code == 2
        assert f"--allow-source {place.removeprefix('stream:')}" in said.err
