"""benchmarks.detector: it times only what agrees, counts what it compares, and hides no miss."""

import json
from types import SimpleNamespace

import pytest
import torch

from benchmarks import detector, detector_outside, detector_targets
from benchmarks.model import Disagreement
from benchmarks.op import seconds
from lambdanets.detection.coco import CocoImages

FEW = detector.Counts((40, 20, 40, 20), 8, 5)


@pytest.fixture(scope="module")
def made():
    return detector.models([detector.THEIRS, "resnet50_cccc visible"], FEW, "cpu")


def test_torchvisions_weights_give_torchvisions_numbers_and_a_changed_weight_is_noticed(made) -> None:
    theirs, ours = made[detector.THEIRS], made[detector.BASE]
    about = detector.agree(theirs, ours, 64, "cpu")
    assert about["detections"] == 5
    assert 5 < about["proposals"] <= 20
    weight = ours.roi_heads.mask_predictor.mask_fcn_logits.weight
    before = weight.detach().clone()
    with torch.no_grad():
        weight.mul_(1 + 1e-6)
    with pytest.raises(Disagreement, match="masks at 64 px differ from torchvision's by up to"):
        detector.agree(theirs, ours, 64, "cpu")
    with torch.no_grad():
        weight.copy_(before)


def test_a_contender_is_shown_its_canvas_and_a_tight_one_is_a_masked_square_without_its_padding(made) -> None:
    ours = made[detector.BASE].eval()
    images, sizes, targets = detector.shown(detector.CONTENDERS["resnet50_cccc masked"], 256, 2, "cpu")
    assert (images.shape, sizes, targets[1]["masks"].shape) == ((2, 3, 192, 256), None, (8, 192, 256))
    images, sizes, targets = detector.shown(detector.CONTENDERS["resnet50_cccc masked, square"], 256, 1, "cpu")
    assert (images.shape, sizes) == ((1, 3, 256, 256), [(192, 256)])
    seen, _, of_seen = detector.shown(detector.CONTENDERS[detector.THEIRS], 256, 1, "cpu")
    assert torch.equal(images, seen)
    assert all(torch.equal(targets[0][key], of_seen[0][key]) for key in ("boxes", "labels"))
    assert torch.equal(targets[0]["masks"], of_seen[0]["masks"][:, :192])
    assert not of_seen[0]["masks"][:, 192:].any()
    names = ("resnet50_cccc masked", "resnet50_cccc masked, square", "resnet50_cccc visible")
    maps = [detector.work(ours, detector.CONTENDERS[n], 256, 1, "cpu", False, True)() for n in names]
    torch.testing.assert_close(maps[1][0][:, :, :48], maps[0][0], rtol=1e-3, atol=1e-4)
    assert (maps[2][0][:, :, :48] - maps[0][0]).abs().max() > 1e-2


def test_what_is_run_is_printed_judged_and_kept(made, monkeypatch, tmp_path, capsys) -> None:
    monkeypatch.setattr(detector, "models", lambda *given: made)
    monkeypatch.setattr(
        detector, "measure", lambda calls, *limits: {name: [seconds(call, "cpu")] for name, call in calls.items()}
    )
    monkeypatch.setattr(detector, "in_a_child", lambda **asked: {"before_mb": 100.0, "peak_mb": 450.0})
    monkeypatch.setattr(detector_outside, "LARGE", (30, 40))
    out = tmp_path / "found.json"
    detector.main(["--quick", "--px", "64", "--threads", "1", "--out", str(out)])
    printed = capsys.readouterr().out.splitlines()
    result = json.loads(printed[-1])
    assert result == json.loads(out.read_text())
    assert [(row["section"], row["pass"]) for row in result["rows"]] == [
        ("whole", "inference"), ("whole", "training"), ("trunk", "inference"), ("trunk", "training"),
    ]  # fmt: skip
    whole, trunk = result["rows"][0], result["rows"][-1]
    assert list(whole["contenders"]) == detector.QUICK
    assert {one["mask_regions"] for one in whole["contenders"].values()} == {5}
    regions = [(one["box_regions"], one["mask_regions"]) for one in result["rows"][1]["contenders"].values()]
    assert regions == [(8, 2)] * 3  # a quarter is on objects
    assert whole["same_counts"]
    assert result["rows"][1]["same_counts"]
    assert "proposals" not in trunk["contenders"]["torchvision"]
    pairs = {(r["contender"], r["reference"]): r for r in trunk["ratios"]}
    assert ("resnet50_cccc masked, square", "resnet50_cccc visible") in pairs
    ours = pairs["resnet50_cccc visible", "torchvision"]
    assert ours["spread"][0] <= ours["ratio"] <= ours["spread"][1]
    assert result["outside"]["picture_mb"] == 350.0
    assert result["memory"]["contenders"]["lambda_resnet50 masked, square"]["ratio"] == 1.0
    verdicts = {t["what"]: t["reached"] for t in result["targets"]}
    assert len(verdicts) == len(detector_targets.TARGETS)
    assert verdicts["MB beyond the model: 12 million pixels, 100 detections"] is False
    assert verdicts["s of make demo-detection: not measured here"] is None
    lines = [text for text in printed if text.startswith("MB beyond the model")]
    assert lines[0].split(" | ")[2:] == ["350", "missed"]


def test_the_worst_cell_decides_whether_a_target_is_reached() -> None:
    def row(px, ratio):
        one = {"contender": "resnet50_cccc visible", "reference": "torchvision", "ratio": ratio}
        mask = {"contender": "resnet50_cccc masked, square", "reference": "resnet50_cccc visible", "ratio": ratio}
        return [
            {"section": "whole", "pass": "inference", "px": px, "batch": 1, "ratios": [one]},
            {"section": "trunk", "pass": "training", "px": px, "batch": 1, "ratios": [mask]},
        ]

    found = detector_targets.judged({"rows": [*row(512, 0.99), *row(1024, 0.95)]})
    first = found[0]
    assert (first["found"], first["where"], first["of"]) == (0.95, "1024 px b=1 inference", 2)
    assert first["reached"] is False
    masks = {t["target"]: (t["found"], t["reached"]) for t in found if "mask's" in t["what"] or "folded" in t["what"]}
    assert masks == {"<= 0.07": (0.053, True), "<= 0.04": (0.053, False)}
    assert detector_targets.judged({"rows": row(512, 0.97)})[0]["reached"] is True
    assert "0.95 (1024 px b=1 inference, the worst of 2) | missed" in detector_targets.table(found)


def test_a_ratio_is_the_median_of_the_turns_and_not_of_the_times() -> None:
    found = detector.ratio({"ours": [1.0, 2.0, 8.0], "theirs": [2.0, 2.0, 4.0, 9.0]}, "ours", "theirs")
    assert (found["ratio"], found["spread"]) == (1.0, [0.5, 2.0])


def test_a_childs_measure_comes_back_and_its_failure_is_said(tmp_path, monkeypatch) -> None:
    file = tmp_path / "photo.jpg"
    detector_outside.photograph(file, (600, 800), 0)
    found = detector.child({"what": "picture", "small": str(file), "file": str(file), "px": 64, "threads": 1})
    assert 0 < found["before_mb"] <= found["peak_mb"]
    killed = SimpleNamespace(returncode=-9, stdout="", stderr="")
    monkeypatch.setattr(detector.subprocess, "run", lambda *command, **options: killed)
    assert detector.in_a_child(what="step") == {"failed": "exit code -9: "}


def test_the_set_that_is_loaded_has_8_objects_a_photograph(tmp_path) -> None:
    data = detector_outside.open_coco(None, annotations=detector_outside.draw_set(tmp_path / "set", 3),
                                      images=tmp_path / "set" / "images")  # fmt: skip
    images: CocoImages = data.train
    assert images.sizes.tolist() == [[480, 640]] * len(images.names)
    assert [len(images.objects(i).labels) for i in range(len(images.names))] == [8] * len(images.names)
    masks, boxes = detector_outside.detections((480, 640))
    assert masks.shape == (100, 28, 28)
    assert (boxes.min() >= 0, boxes[:, 2].max() <= 640, boxes[:, 3].max() <= 480) == (True, True, True)
    assert 0.3 < (masks > 0.5).float().mean() < 0.9
