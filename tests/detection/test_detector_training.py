"""A detector's run: learnt, judged alike in any batch and on any ranks, killed and resumed, started from another."""

import json
import os
import re
import signal
from dataclasses import replace

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn

from lambdanets.cli import main
from lambdanets.data.procedural import coco_shapes
from lambdanets.detection.batches import evaluation_batches, training_batches
from lambdanets.detection.detector import HeadSizes, create_detector
from lambdanets.detection.layouts import open_coco
from lambdanets.detection.run import detector_of, open_run
from lambdanets.detection.scores import evaluate
from lambdanets.detection.starting import load_detector_weights, map_sides
from lambdanets.detection.task import CocoSource, Detection
from lambdanets.detection.train import recorded, train
from lambdanets.detection.transforms import DetectionView
from lambdanets.errors import BadData, BadRecipe, BadRun
from lambdanets.models.create import create_model
from lambdanets.recipes import coco
from lambdanets.recipes.recipe import Options
from lambdanets.training import loop
from lambdanets.training.distributed import Ranks
from lambdanets.training.learner import Learner, train_mode
from lambdanets.training.sync_batch_norm import sync_batch_norm


def tiny(**changes) -> coco.DetectionRecipe:
    """Three epochs of four steps on 64 px."""
    own = {
        "name": "tiny", "image_px": 64, "epochs": 3, "min_steps": 0, "batch_images": 2, "warmup_steps": 2,
        "fpn_channels": 16, "box_fc": 32, "mask_convs": 1, "proposals": (60, 30, 60, 30), "rois_per_image": 8,
        "eval_batch_images": 3,
    }  # fmt: skip
    return replace(coco.detect(small=True), **(own | changes))


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    """Eight pictures to train and five to hold out, some without objects."""
    folder = tmp_path_factory.mktemp("coco") / "shapes"
    coco_shapes(folder, images=13, split=5, seed=3, image_px=96, objects=(0, 4))
    return folder


def weights(folder):
    return {name: t.tolist() for name, t in safetensors.torch.load_file(folder / "weights.safetensors").items()}


def rows(folder):
    history = json.loads((folder / "run.json").read_text())["history"]
    shown = ("train_loss", "train_loss_mask", "val_loss", "val_box_ap", "val_mask_ap", "lr")
    return [{name: row.get(name) for name in shown} for row in history]


def learn(folder, data, kill_at=None, resume=False, **changes):
    """Train in this process; killed before that step where it is asked for."""
    if kill_at is not None:
        step = loop._Run._step

        def killing(run, *rest):
            if run.at.step == kill_at and run.ranks.rank == run.ranks.ranks - 1:
                os.kill(os.getpid(), signal.SIGKILL)
            return step(run, *rest)

        loop._Run._step = killing
    train(tiny(**changes), data, out=folder, seed=5, device="cpu", resume=resume, options=Options(save_steps=2))
    return [weights(folder), rows(folder)]


@pytest.fixture(scope="module")
def made(shapes, tmp_path_factory):
    """The folder of a run that is done."""
    folder = tmp_path_factory.mktemp("made") / "run"
    torch.manual_seed(99)  # whatever was drawn before
    learn(folder, shapes)
    return folder


def test_a_run_leaves_weights_numbers_and_detections_that_a_new_process_reads(made, shapes):
    record = json.loads((made / "run.json").read_text())
    assert (record["task"], record["status"], len(record["history"])) == ("detection", "finished", 3)
    assert [c["name"] for c in record["categories"]] == [c.name for c in open_coco(shapes).train.categories]
    assert set(record["result"]["losses"]) == {
        "loss_classifier", "loss_box_reg", "loss_mask", "loss_objectness", "loss_rpn_box_reg"
    }  # fmt: skip
    run = open_run(made)
    assert (len(run.classes), run.view.image_px, run.model.training) == (5, 64, False)
    assert json.loads((made / "detections.json").read_text())[0].keys() >= {"image_id", "category_id", "bbox", "score"}
    recipe, source, seed, init_from, init_px = recorded(made)
    assert (recipe, source, seed, init_from, init_px) == (tiny(), CocoSource(str(shapes.resolve())), 5, None, None)


def test_a_resumed_run_that_is_finished_computes_nothing_and_gives_its_result(made, shapes, capsys):
    result = train(tiny(), shapes, out=made, seed=5, device="cpu", resume=True)
    assert "nothing to go on with" in capsys.readouterr().out
    assert result.box.ap == json.loads((made / "run.json").read_text())["result"]["box"]["ap"]


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_killed_detector_run_ends_as_the_undisturbed_one_to_the_bit(ranks, made, shapes, tmp_path, children):
    def run(folder, *how):
        asked = (learn, folder, shapes, *how)
        return children.ranks(ranks, *asked) if ranks > 1 else [children.start(*asked)]

    whole = [weights(made), rows(made)] if ranks == 1 else run(tmp_path / "whole")[0].gave()
    for child in run(tmp_path / "killed", 7):
        assert child.wait(120) != 0
    assert run(tmp_path / "killed", None, True)[0].gave() == json.loads(json.dumps(whole))


def judged(folder, data, batch_images):
    """AP and what was found, of a run's model on its held-out pictures."""
    run, images = open_run(folder), open_coco(data).val
    with Ranks() as ranks:
        batches = evaluation_batches(images, run.view, batch_images=batch_images, rank=ranks.rank, ranks=ranks.ranks)
        scores = evaluate(run.model, batches, images, device=torch.device("cpu"), ranks=ranks)
    found = [[d.image_id, d.boxes.tolist(), d.labels.tolist(), d.scores.tolist(), [m.decode() for m in d.masks]]
             for d in scores.detected]  # fmt: skip
    return [scores.json(), found if ranks.first else []]


def test_a_detector_is_judged_alike_in_any_batch_and_on_any_number_of_ranks(made, shapes, children):
    run = open_run(made)
    assert run.model.roi_heads.score_thresh == 0.05
    one = judged(made, shapes, 1)
    assert one[0]["n"] == 5
    assert judged(made, shapes, 3) == one
    assert judged(made, shapes, 8) == one
    two, three = children.ranks(2, judged, made, shapes, 3), children.ranks(3, judged, made, shapes, 4)
    told = [child.gave() for child in (*two, *three)]
    assert all(given[0] == json.loads(json.dumps(one[0])) for given in told)
    assert told[0][1] == told[2][1] == json.loads(json.dumps(one[1]))


def one_rank_has_no_object(data):
    """Steps on two ranks, of which the second has no objects, then both: losses, parameters without gradient."""
    recipe = tiny(batch_norm="sync")
    with Ranks() as ranks:
        task = Detection(recipe, CocoSource(data), workers=0, seed=0)
        task.open()
        batches = training_batches(task._data.train, task.view, recipe, rank=ranks.rank, ranks=ranks.ranks)
        learner = Learner(recipe, task, batch_images=2, seed=0, device=torch.device("cpu"), ranks=ranks)
        learner.parallelise()
        train_mode(learner.model, recipe)
        steps = []
        for number, batch in enumerate(batches.epoch(0)):
            if ranks.rank == 1 or number == 1:  # in the second step nobody has one
                empty = torch.zeros_like(batch.counts)
                batch = batch._replace(
                    counts=empty, boxes=batch.boxes[:0], labels=batch.labels[:0], has_mask=batch.has_mask[:0],
                    masks=batch.masks[:0],
                )  # fmt: skip
            found = learner.gradients(batch, number)
            missing = [n for n, p in learner.model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
            steps.append([found.loss_sum, missing])
            learner.apply(number, 1e-4, found.norm)
        finite = all(b.isfinite().all() for b in learner.model.buffers())
    return [steps, bool(finite)]


def test_ranks_without_objects_take_part_in_every_step_and_break_no_statistics(shapes, children):
    for child in children.ranks(2, one_rank_has_no_object, shapes):
        steps, finite = child.gave()
        assert finite
        assert len(steps) == 4
        assert all(np.isfinite(loss) and missing == [] for loss, missing in steps)


def norm_of_nothing_on_one_rank():
    """Sync batch norm where one of two ranks has no sample, and where none has."""
    torch.manual_seed(0)
    x = torch.randn(6, 4, 3, 3)
    with Ranks() as ranks:
        part = x if ranks.first else x[:0]
        want, ours = nn.BatchNorm2d(4), sync_batch_norm(nn.Sequential(nn.BatchNorm2d(4)), torch.device("cpu"))
        mine = part.clone().requires_grad_()
        whole = x.clone().requires_grad_()
        y = want(whole)
        (y * x.cos()).sum().backward()
        z = ours(mine)
        (z * part.cos()).sum().backward()
        torch.testing.assert_close(z, y if ranks.first else y[:0], rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(mine.grad, whole.grad if ranks.first else whole.grad[:0], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(ours[0].running_var, want.running_var, rtol=1e-6, atol=1e-6)
        before = {name: t.clone() for name, t in ours.state_dict().items()}
        ours.zero_grad()
        nothing = x[:0].clone().requires_grad_()
        ours(nothing).sum().backward()
        assert all(torch.equal(t, before[name]) for name, t in ours.state_dict().items())
        assert ours[0].weight.grad.abs().sum() == ours[0].bias.grad.abs().sum() == 0
    return "equal"


def test_batch_norm_over_ranks_knows_what_no_sample_is(children):
    assert [child.gave() for child in children.ranks(2, norm_of_nothing_on_one_rank)] == ["equal"] * 2


def test_offsets_that_no_map_had_get_no_gradient_and_are_zero_at_a_larger_size():
    body = create_model("lambda_resnet50", num_classes=0, drop_path_rate=0.0)
    sides = map_sides(body, 224)
    assert sides["layer4.0.conv2.table"] == (14, 14)  # it strides after its lambdas
    assert sides["layer4.1.conv2.table"] == sides["layer4.2.conv2.table"] == (7, 7)
    body = create_model("lambda_resnet_small", num_classes=3)
    layers = {"layer4.0.conv2.table": body.layer4[0].conv2}
    (height, width) = map_sides(body, 96)["layer4.0.conv2.table"]
    nn.init.ones_(body.layer4[0].bn3.weight)  # else its branch is 0
    body(torch.rand(2, 3, 96, 96)).square().sum().backward()
    table = layers["layer4.0.conv2.table"].table
    far = torch.ones(23, 23, dtype=torch.bool)
    far[11 - height + 1 : 11 + height, 11 - width + 1 : 11 + width] = False
    assert 0 < far.sum() == 529 - (2 * height - 1) * (2 * width - 1)
    assert table.grad[far].abs().max() == 0
    assert (table.grad[~far].abs().amax((1, 2)) > 0).all()


def test_a_detector_starts_from_a_classifier_whose_untrained_offsets_are_zero(tmp_path, colours):
    from lambdanets.classification.train import train as train_classifier
    from lambdanets.recipes import choose

    recipe = replace(
        choose("folder", small=True),
        model="lambda_resnet_small",
        image_px=96,
        epochs=1,
        warmup_epochs=0,
        batch_images=8,
    )
    train_classifier(recipe, colours, out=tmp_path / "classifier", device="cpu")
    model = detector_of(tiny(), classes=5, masks=True)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    said = load_detector_weights(model, tmp_path / "classifier", classes=list("abcde"))["said"]
    assert "the backbone of a classifier; all other layers start new" in said
    held = safetensors.torch.load_file(tmp_path / "classifier/weights.safetensors")
    sides = map_sides(model.backbone.body, 96)
    far_of = {}
    for name, (height, width) in sides.items():
        reach = (torch.arange(23) - 11).abs()
        far_of[name] = (reach >= height)[:, None] | (reach >= width)
        table = model.backbone.body.state_dict()[name]
        assert table[far_of[name]].abs().sum() == 0
        assert torch.equal(table[~far_of[name]], held[name][~far_of[name]])
    zeroed = sum(int(far.sum()) for far in far_of.values())
    assert f"{zeroed:,} of {529 * len(sides):,} offsets of its tables are farther than maps of 96 px are wide" in said
    for name, t in model.state_dict().items():
        if not name.startswith("backbone.body."):
            assert torch.equal(t, before[name]), name
        elif not name.endswith("table"):
            assert torch.equal(t, held[name.removeprefix("backbone.body.")]), name
    safetensors.torch.save_file(held, tmp_path / "alone.safetensors")
    with pytest.raises(BadRun, match="give --init-image-px PX"):
        load_detector_weights(model, tmp_path / "alone.safetensors", classes=list("abcde"))
    again = load_detector_weights(model, tmp_path / "alone.safetensors", classes=list("abcde"), image_px=96)
    assert f"{zeroed:,} of" in again["said"]


def test_a_detector_starts_from_another_whose_classes_are_others_or_the_same(made, tmp_path):
    record = json.loads((made / "run.json").read_text())
    names = [category["name"] for category in record["categories"]]
    held = safetensors.torch.load_file(made / "weights.safetensors")
    by_class = re.compile(r"roi_heads\.(box_predictor|mask_predictor\.mask_fcn_logits)\.")
    same, other, fewer = (detector_of(tiny(), classes=n, masks=True) for n in (5, 5, 2))
    assert "classes" not in load_detector_weights(same, made, classes=names)["said"]
    for model, classes in ((other, names[::-1]), (fewer, names[:2])):
        assert "what has a class each starts new" in load_detector_weights(model, made, classes=classes)["said"]
    tables = {f"backbone.body.{name}" for name in map_sides(same.backbone.body, 64)}
    for name, t in held.items():
        if name not in tables:
            assert torch.equal(same.state_dict()[name], t), name
            assert by_class.match(name) or torch.equal(fewer.state_dict()[name], t)
            assert by_class.match(name) or torch.equal(other.state_dict()[name], t)
    assert not torch.equal(
        other.roi_heads.box_predictor.cls_score.weight, held["roi_heads.box_predictor.cls_score.weight"]
    )
    boxes = detector_of(tiny(), classes=5, masks=False)
    assert "its mask head is left out" in load_detector_weights(boxes, made, classes=names)["said"]
    wider = detector_of(replace(tiny(), fpn_channels=32), classes=5, masks=True)
    with pytest.raises(BadRun, match="shapes differ"):
        load_detector_weights(wider, made, classes=names)


def test_a_file_of_torchvisions_detector_is_taken(tmp_path):
    from torchvision.models.detection import maskrcnn_resnet50_fpn_v2

    theirs = maskrcnn_resnet50_fpn_v2(weights=None, weights_backbone=None).state_dict()
    safetensors.torch.save_file(theirs, tmp_path / "v2.safetensors")
    model = create_detector("resnet50_cccc", classes=80, heads=HeadSizes())
    said = load_detector_weights(model, tmp_path / "v2.safetensors", classes=[str(i) for i in range(80)])["said"]
    assert "its classes are others" in said
    own = model.state_dict()
    at = "backbone.body.layer1.0.downsample."
    assert torch.equal(own[f"{at}1.weight"], theirs[f"{at}0.weight"])
    assert torch.equal(own["rpn.head.conv.1.0.weight"], theirs["rpn.head.conv.1.0.weight"])
    assert own["mean"].flatten().tolist() == pytest.approx([0.485, 0.456, 0.406])
    whole = create_detector("resnet50_cccc", classes=90)
    said = load_detector_weights(whole, tmp_path / "v2.safetensors", classes=[str(i) for i in range(90)])["said"]
    assert said.endswith(": its class names are not known and are taken to be these")


def test_the_loader_sees_the_same_with_any_number_of_workers_and_ranks(shapes):
    images, recipe = open_coco(shapes).train, tiny(photometric=True, turns=True, scale_jitter=(0.3, 2.0))
    view = DetectionView(64)

    def seen(**how):
        found = {}
        for batch in training_batches(images, view, recipe, seed=4, **how).epoch(2):
            for i, image, target in zip(batch.ids, batch.images(), batch.targets(), strict=True):
                found[i] = [image.tolist(), *(target[name].tolist() for name in sorted(target))]
        return found

    one = seen()
    assert len(one) == 8
    assert seen(workers=2) == one
    assert {**seen(rank=0, ranks=2), **seen(rank=1, ranks=2)} == one


@pytest.mark.parametrize("way", range(8))
def test_boxes_and_masks_go_with_the_picture_in_all_eight_ways(way, shapes):
    from lambdanets.detection.transforms import turned

    images = open_coco(shapes).train
    index = next(i for i in range(len(images)) if len(images.objects(i).labels) > 1)
    picture, objects = images.load(index), images.objects(index)
    view = DetectionView(96)
    plain = view.evaluate(picture, objects).targets
    seen = view.evaluate(*turned(picture, objects, way)).targets
    expected = plain.masks.flip(2) if way & 1 else plain.masks
    expected = expected.flip(1) if way & 2 else expected
    expected = expected.transpose(1, 2) if way & 4 else expected
    assert (seen.masks != expected).float().mean() < 0.005  # a polygon's edge is drawn from the other side
    for box, mask in zip(seen.boxes, seen.masks, strict=True):
        ys, xs = mask.nonzero(as_tuple=True)
        tight = torch.stack([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1])
        assert (box - tight).abs().max() <= 1.5
    assert torch.equal(seen.labels, plain.labels)


def test_a_picture_that_is_scaled_and_cropped_keeps_its_objects_where_they_are(shapes):
    images = open_coco(shapes).train
    view = DetectionView(64)
    cut = 0
    for index in range(len(images)):
        for seed in range(6):
            torch.manual_seed(seed)
            sample = view.train(
                images.load(index), images.objects(index), scale_jitter=(0.2, 2.0), flip_frac=0.5, turns=False,
                photometric=False,
            )  # fmt: skip
            image, targets = sample.image, sample.targets
            assert max(image.shape[1:]) <= 64
            assert targets.masks.shape == (len(targets.labels), *image.shape[1:])
            assert set(targets.masks.unique().tolist()) <= {0, 1}
            cut += len(targets.labels) < len(images.objects(index).labels)
            for box, mask in zip(targets.boxes, targets.masks, strict=True):
                assert (box[2:] - box[:2]).min() >= 1
                assert 0 <= box.min() <= box[[0, 2]].max() <= image.shape[2]
                assert box[[1, 3]].max() <= image.shape[1]
                ys, xs = mask.nonzero(as_tuple=True)
                tight = torch.stack([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1])
                assert (box - tight).abs().max() <= 5  # the tip of a triangle is in its box, and hardly in its mask
    assert cut > 1  # some objects do fall out of the crop


def test_a_picture_of_another_size_than_its_file_says_ends_the_run_by_name(shapes, tmp_path):
    import shutil

    from PIL import Image

    folder = shutil.copytree(shapes, tmp_path / "shapes")
    data = open_coco(folder)
    name = data.train.names[3]
    Image.new("RGB", (50, 40)).save(data.train.root / name)
    batches = training_batches(data.train, DetectionView(64), tiny())
    with pytest.raises(BadData, match=rf"{name} is 50 x 40 pixels .* says 96 x 96"):
        list(batches.epoch(0))


@pytest.mark.parametrize("name", ["detect", "table6"])
def test_each_recipe_s_small_form_does_a_step_and_an_evaluation(name, shapes, tmp_path):
    recipe = replace(coco.choose(name, small=True), image_px=64, min_steps=0, steps=1, warmup_steps=0)
    result = train(recipe, shapes, out=tmp_path / "run", device="cpu")
    assert result.n == 5
    assert len(result.history) == 1


def test_the_command_trains_a_detector_where_it_finds_coco_files_and_resumes_it(shapes, tmp_path, capsys):
    asked = [
        "train",
        "--data",
        str(shapes),
        "--small",
        "--image-px",
        "64",
        "--epochs",
        "1",
        "--out",
        str(tmp_path / "r"),
    ]
    assert main([*asked, "--scale-jitter", "0.5", "1.5", "--boxes-only"]) == 0
    said = capsys.readouterr()
    assert "box AP" in said.out
    assert "mask AP" not in said.out
    assert "batch norm has statistics of 4 images at a time" in said.err
    record = json.loads((tmp_path / "r/run.json").read_text())
    assert (record["recipe"]["scale_jitter"], record["recipe"]["masks"]) == ([0.5, 1.5], False)
    assert main(["train", "--resume", "--out", str(tmp_path / "r")]) == 0
    assert "nothing to go on with" in capsys.readouterr().out
    assert main(["train", "--resume", "--out", str(tmp_path / "r"), "--epochs", "9"]) == 2
    assert "has epochs 1, not 9" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("asked", "answer"),
    [
        (["--recipe", "pareto"], "give --recipe detect or table6"),
        (["--mixup-alpha", "0.2"], "--mixup-alpha is of classification"),
        (["--batch-norm", "frozen"], "without --init-from they are new"),
        (["--annotations", "x.json"], "give one of them"),
        (["--scale-jitter", "2", "0.5"], "scale_jitter must be two factors, ascending"),
        (["--model", "resnet101"], "no model is called 'resnet101'"),
        (["--init-image-px", "96"], "give both"),
    ],
)
def test_what_does_not_go_together_is_refused_in_a_sentence(asked, answer, shapes, tmp_path, capsys):
    assert main(["train", "--data", str(shapes), "--out", str(tmp_path / "run"), *asked]) == 2
    assert answer in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_recipe_of_detectors_on_a_folder_of_classes_says_what_it_looked_for(colours, tmp_path, capsys):
    assert main(["train", "--recipe", "detect", "--data", str(colours), "--out", str(tmp_path / "run")]) == 2
    assert "instances_" in capsys.readouterr().err
    assert main(["train", "--data", str(colours), "--turns", "--out", str(tmp_path / "run")]) == 2
    assert "--turns is of detectors" in capsys.readouterr().err


def test_colours_are_changed_in_training_and_never_exchanged(shapes):
    from PIL import Image

    images = open_coco(shapes).train
    red, found = Image.new("RGB", (96, 96), (200, 30, 30)), set()
    for seed in range(60):
        torch.manual_seed(seed)
        sample = DetectionView(64).train(
            red, images.objects(0), scale_jitter=(1, 1), flip_frac=0, turns=False, photometric=True
        )
        colour = sample.image.float().mean((1, 2))
        assert colour.argmax() == 0
        found.add(tuple(colour.round().tolist()))
    assert len(found) > 20


def test_weights_of_a_run_with_another_backbone_are_refused_by_its_name(made):
    model = detector_of(replace(tiny(), model="resnet50_cccc"), classes=5, masks=True)
    with pytest.raises(BadRun, match="is a run of lambda_resnet_small, and here the backbone is resnet50_cccc: give"):
        load_detector_weights(model, made, classes=list("abcde"), backbone="resnet50_cccc")


def test_norms_stay_as_they_were_learnt_where_a_detector_starts_from_weights(made, shapes, tmp_path):
    out = tmp_path / "tuned"
    assert main(["train", "--data", str(shapes), "--small", "--image-px", "64", "--epochs", "1", "--out", str(out),
                 "--init-from", str(made)]) == 2  # fmt: skip  # its heads are smaller
    result = train(replace(tiny(epochs=1), batch_norm="frozen"), shapes, out=out, init_from=made, device="cpu")
    was, now = (safetensors.torch.load_file(f / "weights.safetensors") for f in (made, result.folder))
    assert all(torch.equal(was[n], now[n]) for n in was if "running" in n)
    with pytest.raises(BadRecipe, match="without --init-from"):
        train(replace(tiny(), batch_norm="frozen"), shapes, out=tmp_path / "no", device="cpu")
