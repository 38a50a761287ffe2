"""Which models label, what they see, and what is refused."""

import dataclasses
import shutil

import pytest
import timm
import torch
from labelling import CLASSES, write_teacher
from safetensors.torch import save_file

from lambdanets.classification.run import open_run
from lambdanets.errors import BadData, BadRun
from lambdanets.pseudo_labels.label_files import sha256_of_plan
from lambdanets.pseudo_labels.teacher import open_teacher

TIMM = "test_resnet.r160_in1k"  # of 0.5 million parameters


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return write_teacher(tmp_path_factory.mktemp("teacher") / "run")


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("timm")
    save_file(timm.create_model(TIMM, num_classes=3).state_dict(), folder / "w.safetensors")
    (folder / "names.txt").write_text("ant\nbee\ncat\n")
    return folder


def test_a_run_labels_with_its_own_model_fused_in_its_own_view(run):
    teacher, opened = open_teacher(run), open_run(run)
    assert teacher.classes == CLASSES
    assert teacher.view == opened.view
    assert teacher.batch_images == 4
    assert not teacher.model.training
    assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in teacher.model.layer1.modules())
    images = torch.randn(3, 3, 8, 8)
    with torch.inference_mode():
        torch.testing.assert_close(teacher.model(images), opened.model(images), rtol=1e-4, atol=1e-4)


def test_the_plan_says_what_labels_and_not_where_it_lies(run, tmp_path):
    moved = shutil.copytree(run, tmp_path / "moved")
    first, second = open_teacher(run), open_teacher(moved)
    assert first.plan == second.plan
    assert first.place != second.place
    other = write_teacher(tmp_path / "other", seed=1)
    assert sha256_of_plan(open_teacher(other).plan) != sha256_of_plan(first.plan)


def test_a_model_of_timm_labels_in_the_view_of_its_pretrained_cfg(weights):
    teacher = open_teacher(f"timm:{TIMM}@{weights / 'w.safetensors'}", classes_file=weights / "names.txt")
    assert teacher.classes == ("ant", "bee", "cat")
    told = timm.create_model(TIMM).pretrained_cfg
    assert dataclasses.asdict(teacher.view) == {
        "image_px": 160, "in_channels": 3, "mean": tuple(told["mean"]), "std": tuple(told["std"]),
        "crop_frac": told["crop_pct"], "interpolation": told["interpolation"],
    }  # fmt: skip
    with torch.inference_mode():
        assert teacher.model(torch.randn(2, 3, 160, 160)).shape == (2, 3)


def test_the_papers_teacher_is_in_timm_with_the_view_that_it_was_published_with():
    told = timm.models.get_pretrained_cfg("tf_efficientnet_l2.ns_jft_in1k")
    from lambdanets.pseudo_labels.teacher import _view_of

    view = _view_of("tf_efficientnet_l2.ns_jft_in1k", told.to_dict())
    assert (view.image_px, view.crop_frac, view.interpolation) == (800, 0.96, "bicubic")


def test_what_cannot_label_is_refused_by_name(run, weights, tmp_path):
    file = weights / "w.safetensors"
    for source, classes, why in [
        (tmp_path / "none", None, "none"),
        (run, weights / "names.txt", "a run has its own classes"),
        (f"timm:{TIMM}", None, "does not say which weights"),
        (f"timm:{TIMM}@{file}", None, "what its classes are called"),
        (f"timm:resnet_of_nobody@{file}", weights / "names.txt", "timm has no model 'resnet_of_nobody'"),
        (f"timm:resnet10t@{file}", weights / "names.txt", "is not the weights of timm's resnet10t"),
        (f"timm:{TIMM}@{tmp_path / 'w'}", weights / "names.txt", "does not exist"),
    ]:
        with pytest.raises(BadRun, match=why):
            open_teacher(source, classes_file=classes)
    (tmp_path / "four.txt").write_text("a\nb\nc\nd\n")
    with pytest.raises(BadRun, match="with 4 classes"):
        open_teacher(f"timm:{TIMM}@{file}", classes_file=tmp_path / "four.txt")
    (tmp_path / "twice.txt").write_text("a\nb\na\n")
    with pytest.raises(BadData, match="3 names, 2 different"):
        open_teacher(f"timm:{TIMM}@{file}", classes_file=tmp_path / "twice.txt")


def test_a_view_that_this_project_has_not_is_refused():
    from lambdanets.pseudo_labels.teacher import _view_of

    told = timm.create_model(TIMM).pretrained_cfg
    for wrong in ({"crop_mode": "squash"}, {"input_size": (3, 160, 128)}, {"interpolation": "nearest"}):
        with pytest.raises(BadRun, match="a teacher sees a square from its centre"):
            _view_of("one", {**told, **wrong})
