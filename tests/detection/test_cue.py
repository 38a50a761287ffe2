"""The benchmark of the long-range cue: equal models, and a count of discs called rightly that can tell."""

import numpy as np
import pytest
import torch

from benchmarks import detection_cue as cue
from lambdanets.data.procedural import coco_shapes
from lambdanets.detection.layouts import open_coco
from lambdanets.detection.precision import Detected


def test_the_two_detectors_differ_by_less_than_a_percent_and_in_the_body_alone():
    with torch.device("meta"):
        parts = {
            body: {name: p.shape for name, p in cue.detector(body, cue.recipe(100), 6).named_parameters()}
            for body in cue.BODIES
        }
    counts = {body: sum(shape.numel() for shape in of.values()) for body, of in parts.items()}
    assert counts["convolution"] == pytest.approx(counts["lambda"], rel=0.01)
    heads = [
        {name: shape for name, shape in of.items() if not name.startswith(("backbone.body", "backbone.fpn.inner"))}
        for of in parts.values()
    ]
    assert heads[0] == heads[1]


def test_the_convolutions_do_not_see_as_far_as_a_far_disc_is_from_its_marker_and_the_lambdas_do():
    for body, sees in (("convolution", False), ("lambda", True)):
        torch.manual_seed(0)
        model = cue.detector(body, cue.recipe(100), 6).double().eval()
        for name, p in model.named_parameters():
            if name.endswith("bn3.weight"):  # new blocks are their shortcuts, and see nothing
                torch.nn.init.ones_(p)
        x = torch.rand(1, 3, 256, 256, dtype=torch.float64, requires_grad=True)
        model.maps(x).features[0][0, :, 24, 40].sum().backward()
        reached = x.grad[0].abs().sum(0) > 0
        rows, columns = (torch.arange(256) - at for at in (24 * 4 + 2, 40 * 4 + 2))
        far = (rows.abs()[:, None] > cue.FAR_PX) | (columns.abs() > cue.FAR_PX)
        assert bool((reached & far).any()) == sees


def test_discs_are_called_rightly_where_the_class_of_the_surest_detection_on_them_is_theirs(tmp_path):
    data = coco_shapes(tmp_path / "set", images=8, split=6, seed=5, cue=True, objects=(1, 3))
    images = open_coco(data).val
    right, wrong, none = [], [], []
    for i in range(len(images)):
        objects, id = images.objects(i), int(images.image_ids[i])
        discs = np.isin(objects.labels, cue.DISCS)
        boxes, labels = objects.boxes[discs], objects.labels[discs]
        both = np.concatenate([boxes, boxes]), np.concatenate([labels, 3 - labels])
        sure, less = np.full(len(labels), 0.9), np.full(len(labels), 0.6)
        right.append(Detected(id, *both, np.concatenate([sure, less])))
        wrong.append(Detected(id, *both, np.concatenate([less, sure])))
        none.append(Detected(id, boxes + 100, labels, sure))
    counts = [cue.called(images, of) for of in (right, wrong, none)]
    total = [{k: of["near"][k] + of["far"][k] for k in of["near"]} for of in counts]
    discs = total[0]["discs"]
    assert discs >= 6
    assert counts[0]["far"]["discs"] > 0
    assert total == [{"discs": discs, "found": f, "right": r} for f, r in ((discs, discs), (discs, 0), (0, 0))]


def test_the_difference_is_paired_by_seed():
    discs = {"near": {"discs": 1, "found": 1, "right": 1}, "far": {"discs": 2, "found": 1, "right": 0}}
    runs = [
        {"body": body, "seed": seed, "discs": discs, **dict.fromkeys(cue.COMPARED, value)}
        for body, values in (("lambda", (0.5, 0.7, 0.9)), ("convolution", (0.4, 0.6, 0.8)))
        for seed, value in enumerate(values)
    ]
    found = cue.summary(runs)
    assert found["disc_ap"]["lambda"] == {"mean": 0.7, "sd": 0.2}
    assert found["disc_ap"]["difference"] == {"mean": 0.1, "interval95": [0.1, 0.1]}
    assert found["lambda_far"] == {"discs": 6, "found": 3, "right": 0}
