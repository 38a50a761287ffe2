"""The detector: torchvision's own numbers with its weights; the same image on any canvas; nothing to find, and more."""

import copy

import pytest
import timm
import torch
from torch import nn
from torchvision.models.detection import maskrcnn_resnet50_fpn_v2
from torchvision.models.detection.image_list import ImageList

from lambdanets.detection.detector import LOSSES, HeadSizes, create_detector
from lambdanets.models.resnet import LambdaResNet
from lambdanets.models.sizes import Size

SMALL = HeadSizes(fpn_channels=16, rpn_convs=2, box_convs=1, box_fc=32, mask_convs=1, score_min=0.01, detections=50)


def body(stem="deep", **changes) -> LambdaResNet:
    """A body with every kind of layer: convolutions, strided and plain lambda layers, squeeze-and-excitation."""
    row = {"blocks": (1, 2, 2, 2), "lambdas": ("C", (2,), (1,), "L"), "width": 16, "stem": stem, "se_stages": "SSSS"}
    row |= {"lambda_args": {"key_depth": 4, "heads": 2, "scope": 7}} | changes
    return LambdaResNet(Size(**row), num_classes=0)


def settled(model: nn.Module, dtype=torch.float64) -> nn.Module:
    """With statistics and weights as after some training, so that no branch is zero."""
    torch.manual_seed(1)
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d | nn.BatchNorm1d)]
    for norm in norms:
        nn.init.uniform_(norm.weight, 0.7, 1.3)
        nn.init.normal_(norm.bias, 0, 0.2)
        norm.momentum = None
    model.to(dtype).train()
    targets = [{"boxes": torch.tensor([[10.0, 10, 60, 60]], dtype=dtype), "labels": torch.tensor([1])}] * 2
    for target in targets:
        target["masks"] = torch.ones(1, 128, 128, dtype=torch.uint8)
    model(list(torch.rand(2, 3, 128, 128, dtype=dtype)), targets)
    for norm in norms:
        norm.momentum = 0.1
    return model.eval()


def on_canvas(image: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """The image at the top left; what is around it must not matter, so it is noise."""
    canvas = torch.rand(1, 3, height, width, dtype=image.dtype)
    canvas[0, :, : image.shape[1], : image.shape[2]] = image
    return canvas


def frozen_train(model: nn.Module) -> nn.Module:
    model.train()
    for norm in model.modules():
        if isinstance(norm, nn.modules.batchnorm._BatchNorm):
            norm.eval()
    return model


CANVASES = [(192, 256), (256, 256), (320, 448), (512, 512)]


@pytest.mark.parametrize("kind", [{}, {"stem": "plain", "deep_shortcut": False}])
def test_an_image_gets_the_same_detections_on_any_canvas_and_in_any_batch(kind) -> None:
    model = settled(create_detector(body(**kind), classes=3, heads=SMALL))
    image = torch.rand(3, 150, 203, dtype=torch.float64)
    with torch.no_grad():
        expected = model([image])[0]
        assert len(expected["boxes"]) == 50
        others = [model(on_canvas(image, *canvas), sizes=[(150, 203)])[0] for canvas in CANVASES]
        others.append(model([torch.rand(3, 260, 120, dtype=torch.float64), image])[1])
        for found in others:
            assert torch.equal(found["labels"], expected["labels"])
            for name in ("boxes", "scores", "masks"):
                torch.testing.assert_close(found[name], expected[name], rtol=0, atol=1e-10)


def test_padding_that_is_seen_moves_the_detections_and_masked_padding_does_not_in_float32_either() -> None:
    seen = settled(create_detector(body(), classes=3, heads=SMALL, padding="visible"))
    image = torch.rand(3, 150, 203, dtype=torch.float64)
    with torch.no_grad():
        a, b = (seen(on_canvas(image, *canvas), sizes=[(150, 203)])[0] for canvas in CANVASES[1:3])
        assert len(a["scores"]) != len(b["scores"]) or (a["scores"] - b["scores"]).abs().max() > 1e-3
        model = settled(create_detector(body(), classes=3, heads=SMALL), torch.float32)
        image = image.float()
        a, b = (model(on_canvas(image, *canvas), sizes=[(150, 203)])[0] for canvas in CANVASES[::3])
        torch.testing.assert_close(a["boxes"][:5], b["boxes"][:5], rtol=0, atol=1e-2)


def targets_of(image: torch.Tensor) -> dict[str, torch.Tensor]:
    boxes = torch.tensor([[5, 8, 60, 70], [80, 20, 200, 148], [30, 100, 75, 149]], dtype=image.dtype)
    masks = torch.zeros(3, *image.shape[1:], dtype=torch.uint8)
    for mask, (x0, y0, x1, y1) in zip(masks, boxes.long().tolist(), strict=True):
        mask[y0:y1, x0 : (x0 + x1) // 2] = 1
    return {"boxes": boxes, "labels": torch.tensor([1, 3, 2]), "masks": masks}


def losses_and_gradients(model, images, target, sizes=None):
    frozen_train(model).zero_grad()
    torch.manual_seed(7)
    losses = model(images, [target], sizes=sizes)
    sum(losses.values()).backward()
    return losses, {name: p.grad.clone() for name, p in model.named_parameters()}


def test_the_losses_and_every_gradient_are_the_same_on_any_canvas_and_differ_where_padding_is_seen() -> None:
    image = torch.rand(3, 150, 203, dtype=torch.float64)
    target = targets_of(image)
    model = settled(create_detector(body(), classes=3, heads=SMALL))
    expected, gradients = losses_and_gradients(model, [image], target)
    assert set(expected) == set(LOSSES)
    for canvas in CANVASES[1:]:
        losses, found = losses_and_gradients(model, on_canvas(image, *canvas), target, [(150, 203)])
        for name, value in expected.items():
            torch.testing.assert_close(losses[name], value, rtol=1e-12, atol=1e-12)
        for name, value in gradients.items():
            assert (found[name] - value).norm() <= 1e-11 * value.norm() + 1e-13, name
    seen = settled(create_detector(body(), classes=3, heads=SMALL, padding="visible"))
    (_, a), (_, b) = (losses_and_gradients(seen, on_canvas(image, *c), target, [(150, 203)]) for c in CANVASES[1:3])
    assert max(((a[n] - b[n]).norm() / (a[n].norm() + 1e-9)).item() for n in a) > 1


@pytest.fixture(scope="module")
def torchvisions():
    """torchvision's model, with weights and statistics that find something, and its numbers on one image."""
    torch.manual_seed(0)
    theirs = maskrcnn_resnet50_fpn_v2(
        weights=None, weights_backbone=None, min_size=128, max_size=128, rpn_post_nms_top_n_train=1000
    )
    theirs.transform.image_mean, theirs.transform.image_std = [0.0] * 3, [1.0] * 3
    for m in theirs.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.momentum = None
    theirs.train()
    image = torch.rand(3, 128, 128)
    target = {"boxes": torch.tensor([[10.0, 12, 70, 80], [60, 40, 120, 126]]), "labels": torch.tensor([3, 90])}
    target["masks"] = torch.zeros(2, 128, 128, dtype=torch.uint8)
    target["masks"][0, 20:70, 15:60] = target["masks"][1, 50:110, 70:115] = 1
    theirs([image, image.flip(2)], [target, target])
    nn.init.normal_(theirs.roi_heads.box_predictor.cls_score.weight, 0, 0.2)
    return theirs, image, target


def ours_with_weights_of(theirs: nn.Module, **changes) -> nn.Module:
    heads = HeadSizes(**({"proposals": (2000, 1000, 1000, 1000)} | changes))
    ours = create_detector("resnet50_cccc", classes=90, mean=(0,) * 3, std=(1,) * 3, heads=heads)
    state = {}
    for name, value in theirs.state_dict().items():
        name = name.replace("downsample.1.", "downsample.2.").replace("downsample.0.", "downsample.1.")
        state[name] = value
    missing, extra = ours.load_state_dict(state, strict=False)
    assert (missing, extra) == (["mean", "std"], [])
    return ours


def test_with_torchvisions_weights_detections_and_losses_are_torchvisions_to_the_last_bit(torchvisions) -> None:
    theirs, image, target = torchvisions
    ours = ours_with_weights_of(theirs)
    assert sum(p.numel() for p in ours.parameters()) == 46_359_409  # what torchvision publishes
    theirs.eval(), ours.eval()
    with torch.no_grad():
        features = theirs.backbone(image[None])
        proposals, _ = theirs.rpn(ImageList(image[None], [(128, 128)]), features)
        expected, _ = theirs.roi_heads(features, proposals, [(128, 128)])
        for padding in ("masked", "visible"):
            ours.padding = padding
            found = ours([image])[0]
            assert len(found["boxes"]) > 10
            for name in ("boxes", "labels", "scores"):
                assert torch.equal(found[name], expected[0][name]), name
            assert torch.equal(found["masks"], expected[0]["masks"][:, 0])
    frozen_train(theirs), frozen_train(ours)
    torch.manual_seed(3)
    proposals, of_regions = theirs.rpn(ImageList(image[None], [(128, 128)]), theirs.backbone(image[None]), [target])
    _, of_heads = theirs.roi_heads(theirs.backbone(image[None]), proposals, [(128, 128)], [target])
    torch.manual_seed(3)
    losses = ours([image], [target])
    for name, value in {**of_regions, **of_heads}.items():
        assert torch.equal(losses[name], value), name


COUNTS = {  # detector of 80 classes, body, classifier of 1,000
    "resnet50_cccc": (46_305_589, 23_508_032, 25_557_032),
    "resnet101_d": (65_353_941, 42_556_384, 44_605_384),
    "resnet101_d_se": (84_367_253, 61_569_696, 63_618_696),
    "resnet152_d": (80_997_589, 58_200_032, 60_249_032),
    "resnet152_d_se": (107_370_133, 84_572_576, 86_621_576),
    "lambda_resnet50": (39_711_829, 16_914_272, 18_963_272),
    "lambda_resnet101": (57_615_477, 34_817_920, 36_866_920),
    "lambda_resnet152": (72_153_253, 49_355_696, 51_404_696),
    "lambda_resnet101_c4": (46_730_677, 23_933_120, 25_982_120),
    "lambda_resnet152_c4": (55_826_053, 33_028_496, 35_077_496),
    "lambda_resnet200": (78_741_669, 55_944_112, 57_993_112),
}


@pytest.mark.parametrize("name", COUNTS)
def test_the_detectors_have_the_parameters_that_their_parts_add_up_to(name) -> None:
    def count(module: nn.Module) -> int:
        return sum(p.numel() for p in module.parameters())

    with torch.device("meta"):
        model = create_detector(name, classes=80)
        assert (count(model), count(model.backbone.body)) == COUNTS[name][:2]
        assert count(timm.create_model(name)) == COUNTS[name][2]
    parts = count(model.backbone.fpn), count(model.rpn), count(model.roi_heads)
    assert parts == (3_346_432, 1_184_015, 15_622_549 + 2_644_561)


def test_the_maps_of_1024_pixels_and_of_a_photograph_have_their_sizes() -> None:
    with torch.device("meta"):
        model = create_detector("lambda_resnet50", classes=80)
        maps = model.maps(torch.zeros(1, 3, 1024, 1024))
        assert [tuple(x.shape[1:]) for x in maps.features] == [(256, side, side) for side in (256, 128, 64, 32, 16)]
        assert sum(x[0].numel() for x in model.rpn.head(maps.features, maps.reals)[0]) == 261_888
        maps = model.maps([torch.zeros(3, 1000, 667)])
    assert tuple(maps.canvas.shape[2:]) == (1024, 704)
    masks = create_detector("lambda_resnet_small", classes=1, heads=SMALL).maps([torch.zeros(3, 1000, 667)]).reals
    seen = [(int(real[0, 0, :, 0].sum()), int(real[0, 0, 0].sum())) for real in masks]
    assert seen == [(250, 167), (125, 84), (63, 42), (32, 21), (16, 11)]


def test_a_batch_without_objects_has_finite_losses_and_a_gradient_for_every_parameter() -> None:
    model = create_detector(body(), classes=3, heads=SMALL).train()
    images = [torch.rand(3, 100, 128), torch.rand(3, 128, 90)]
    nothing = [
        {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64),
         "masks": torch.zeros(0, *image.shape[1:], dtype=torch.uint8)}
        for image in images
    ]  # fmt: skip
    losses = model(images, nothing)
    assert all(torch.isfinite(value) for value in losses.values())
    assert losses["loss_mask"] == losses["loss_box_reg"] == losses["loss_rpn_box_reg"] == 0
    sum(losses.values()).backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not torch.isfinite(p.grad).all()] == []
    assert all(torch.isfinite(b).all() for b in model.buffers())


def test_objects_with_a_box_alone_teach_no_mask_and_all_else_is_the_same() -> None:
    model = frozen_train(settled(create_detector(body(), classes=3, heads=SMALL)))
    image = torch.rand(3, 150, 203, dtype=torch.float64)

    def losses(has_mask):
        torch.manual_seed(5)
        return model([image], [targets_of(image) | {"has_mask": torch.tensor(has_mask)}])

    everything, two, none = losses([True] * 3), losses([True, False, True]), losses([False] * 3)
    torch.manual_seed(5)
    assert torch.equal(model([image], [targets_of(image)])["loss_mask"], everything["loss_mask"])
    assert none["loss_mask"] == 0
    assert two["loss_mask"] != everything["loss_mask"]
    for name in set(LOSSES) - {"loss_mask"}:
        assert torch.equal(everything[name], none[name])


def test_the_losses_of_an_evaluation_are_of_each_image_alone() -> None:
    model = settled(create_detector(body(), classes=3, heads=SMALL))
    image, other = torch.rand(3, 150, 203, dtype=torch.float64), torch.rand(3, 200, 260, dtype=torch.float64)
    with torch.no_grad():
        ambient = torch.get_rng_state()
        found, (alone,) = model([image], [targets_of(image)], seeds=[11])
        _, (_, both) = model([other, image], [targets_of(other), targets_of(image)], seeds=[5, 11])
        assert torch.equal(found[0]["boxes"], model([image])[0]["boxes"])
    assert torch.equal(ambient, torch.get_rng_state())
    for name in LOSSES:
        torch.testing.assert_close(both[name], alone[name], rtol=0, atol=1e-10)


def test_what_cannot_be_learnt_from_is_refused_by_name() -> None:
    model = create_detector(body(), classes=3, heads=SMALL).train()
    image = torch.rand(3, 150, 203)
    good = targets_of(image)
    wrong = {
        "1 to 3, 0 is the background": {"labels": torch.tensor([1, 0, 2])},
        "labels \\[1, 4, 2\\]: 1 to 3": {"labels": torch.tensor([1, 4, 2])},
        "no width or height": {"boxes": torch.tensor([[5.0, 8, 5, 70], [80, 20, 200, 148], [30, 100, 75, 149]])},
        "not finite": {"boxes": good["boxes"] * float("nan")},
        "one an object": {"masks": good["masks"][:2]},
        "uint8": {"masks": good["masks"].float()},
        "floating": {"boxes": good["boxes"].long()},
        "masks hold 255: 0 and 1": {"masks": good["masks"] * 255},
        r"has_mask is torch.int64 \(3,\), and bool": {"has_mask": torch.ones(3, dtype=torch.int64)},
        r"has_mask is torch.bool \(2,\), and bool": {"has_mask": torch.ones(2, dtype=torch.bool)},
    }
    for message, change in wrong.items():
        with pytest.raises(ValueError, match=message):
            model([image], [good | change])
    with pytest.raises(ValueError, match="has no masks"):
        model([image], [{k: v for k, v in good.items() if k != "masks"}])
    with pytest.raises(ValueError, match=r"multiples of 64 pixels, and are \(150, 203\)"):
        model(image[None], [good])
    with pytest.raises(ValueError, match=r"image 0 is torch\.uint8"):
        model([(image * 255).byte()], [good])
    with pytest.raises(ValueError, match="needs targets"):
        model([image])
    with pytest.raises(ValueError, match=r"call it under torch\.autocast"):
        copy.deepcopy(model).half()([image.half()], [good])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"detections": 0}, "detections is 0"),
        ({"score_min": 0.0}, "score_min 0.0"),
        ({"proposals": (1, 2, 3)}, "four counts"),
    ],
)
def test_sizes_of_heads_that_cannot_be_are_refused(wrong, message) -> None:
    with pytest.raises(ValueError, match=message):
        HeadSizes(**wrong)
    with pytest.raises(ValueError, match=r"classes is 2\.5: a whole number"):
        create_detector(body(), classes=2.5)


def test_a_body_that_cannot_be_told_of_padding_sees_it_and_masks_are_left_out_on_request() -> None:
    resnet = timm.create_model("resnet18", features_only=True)
    with pytest.raises(ValueError, match="cannot be told what is padding"):
        create_detector(resnet, classes=2, padding="masked")
    model = create_detector(resnet, classes=2, masks=False, heads=SMALL)
    assert (model.padding, model.masks) == ("visible", False)
    losses = model.train()(
        [torch.rand(3, 64, 90)], [{"boxes": torch.tensor([[1.0, 2, 30, 40]]), "labels": torch.ones(1).long()}]
    )
    assert "loss_mask" not in losses
    assert len(losses) == 4
    hint = (
        r"no model is called .resnet18.*create_detector\(timm.create_model\(.resnet18., features_only=True\), classes=2"
    )
    with pytest.raises(ValueError, match=hint):
        create_detector("resnet18", classes=2)
    with pytest.raises(ValueError, match=r"must be in \[0, 1\) and is 2$"):
        create_detector("lambda_resnet50", classes=2, drop_path_rate=2)
    with pytest.raises(ValueError, match="four are needed"):
        create_detector(timm.create_model("resnet18", features_only=True, out_indices=(2, 3, 4)), classes=2)
    public = create_detector("lambda_resnet26t", classes=2, heads=SMALL)
    assert public.padding == "visible"
    assert public.eval()([torch.rand(3, 64, 64)])[0]["boxes"].shape[1] == 4


def test_classification_is_as_it_was_without_a_mask_and_with_one_as_if_the_image_were_alone() -> None:
    model = body()
    model.reset_classifier(5)
    model = model.double().eval()
    image = torch.rand(1, 3, 96, 160, dtype=torch.float64)
    stages = model.maxpool(model.act1(model.bn1(model.conv1(image))))
    for stage in model.stages():
        stages = stage(stages)
    assert torch.equal(model(image), model.fc(stages.mean((2, 3)))) or torch.equal(
        model(image), model.forward_head(stages)
    )
    assert torch.equal(model.forward_maps(image)[0][-1], stages)
    canvas = on_canvas(image[0], 128, 192)
    padding = torch.zeros(1, 128, 192, dtype=torch.bool)
    padding[:, :96, :160] = True
    torch.testing.assert_close(model.forward_padded(canvas, padding), model(image), rtol=0, atol=1e-10)
    for wrong in (torch.zeros_like(padding), padding.flip(1), padding & (torch.rand(128, 192) < 0.9)):
        with pytest.raises(ValueError, match="rectangle at the top left of each image"):
            model.forward_padded(canvas, wrong)
    with pytest.raises(ValueError, match="padding must be bool"):
        model.forward_padded(canvas, padding[:, :96])
    clone = copy.deepcopy(model)
    clone.reset_classifier(5, "max")
    with pytest.raises(ValueError, match="global_pool is 'max'"):
        clone.forward_padded(canvas, padding)
