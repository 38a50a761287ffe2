"""The paper's two ImageNet recipes (docs/paper.md section 4), fine-tuning, and the small form of each for a CPU.

R in a docstring marks a value that the paper's text could not confirm: change it with `dataclasses.replace`.
A batch of 4,096 is that of many accelerators together: on one, give `--batch-images`; the learning rate follows.
"""

from __future__ import annotations

from dataclasses import replace

from lambdanets.errors import BadRecipe
from lambdanets.paper import FIGURE
from lambdanets.recipes.recipe import Recipe

# Depth -> stochastic depth (R). The paper names 50 and 101, 152 and 270, 350 and 420; 200 takes its neighbours' value.
_DROP_PATH = {50: 0.0, 101: 0.0, 152: 0.1, 200: 0.1, 270: 0.1, 350: 0.2, 420: 0.2}

# (depth, px) -> seconds a step of 1,024 images and top-1, %, of the speed-accuracy figure.
PARETO = {
    (int(point.model.removeprefix("lambda_resnet")), point.image_px): (point.step_s, point.top1)
    for point in FIGURE
    if point.model.startswith("lambda_resnet")
}


def layer_comparison(*, small: bool = False) -> Recipe:
    """ResNet-50 with one kind of layer exchanged, 224 px, 90 epochs: the run behind Tables 3, 4 and 12.

        lambdanets train --recipe layer_comparison --model resnet50_llll --data IMAGENET --batch-images 256

    Top-1 the paper reports (Table 12, not measured here): resnet50_cccc 76.9, _lccc 77.3, _llcc 77.2, _lllc 77.8,
    _llll 78.4, _clll 78.3, _ccll 78.3, _cccl 77.3; with u = 4 (Table 3, resnet50_llll_u4) 78.9.
    Hours to expect: Table 12 has 1,160 images/s for LLLL, so 90 epochs of 1.28M images took 28 hours there (CLLL 2,200
    images/s, 15 hours; CCCC 7,240, 4.4 hours). No hour was measured here.
    SGD: the optimiser and its momentum of 0.9 are R. Batch 4,096, 0.1 per 256, 5 epochs of warm-up, cosine to 0, weight
    decay 1e-4, label smoothing 0.1, random crop and flip, EMA 0.9999. Interpolation and crop: not given there, ours.

    >>> run = layer_comparison()
    >>> run.epochs, run.batch_images, run.weight_decay, run.ema_decay
    (90, 4096, 0.0001, 0.9999)
    """
    run = Recipe(
        name="layer_comparison",
        model="resnet50_llll",
        image_px=224,
        epochs=90,
        batch_images=4096,
        optimizer="sgd",
        momentum=0.9,
        lr_per_256=0.1,
        warmup_epochs=5,
        weight_decay=1e-4,
        label_smoothing=0.1,
        augment="imagenet",
        ema_decay=0.9999,
    )
    return _small(run) if small else run


def pareto(depth: int, image_px: int, *, small: bool = False) -> Recipe:
    """LambdaResNet-`depth` at `image_px`, 350 epochs: the runs of the speed-accuracy figure.

        lambdanets train --recipe pareto --model lambda_resnet152 --image-px 224 --data IMAGENET --batch-images 256

    Top-1 the paper reports, digitised (depth, px; not measured here): 50,128 77.4 · 50,160 79.2 · 101,160 80.8 ·
    101,192 81.9 · 152,192 82.5 · 152,224 83.2 · 152,256 83.8 · 270,256 84.2 · 350,256 84.4 · 350,288 84.5 ·
    350,320 84.7 · 420,320 84.85. Other sizes than these 12 rows have no published number.
    Hours to expect: `pareto_hours`, from the seconds a step of 1,024 images in the same figure (8 TPUv3 cores): 50 at
    128 px 7 hours, 152 at 224 px 46, 420 at 320 px 274. No hour was measured here.
    SGD with momentum 0.9, batch 4,096, 0.1 per 256, 5 epochs of warm-up, cosine to 0, weight decay 4e-5, label
    smoothing 0.1, random crop, flip, RandAugment with 2 operations of magnitude 10 up to 160 px and 15 above, EMA
    0.9999. The magnitude is on the scale of the published TensorFlow code, which 15 exceeds by half.
    R: dropout 0.2 to 0.3, here 0.2 up to depth 152 and 0.3 above; stochastic depth 0 (50, 101), 0.1 (152 to 270),
    0.2 (350, 420).
    Raises BadRecipe for a depth that has no LambdaResNet.

    >>> pareto(50, 160).randaugment_magnitude, pareto(350, 256).randaugment_magnitude
    (10, 15)
    """
    if depth not in _DROP_PATH:
        raise BadRecipe(f"depth must be one of {', '.join(map(str, _DROP_PATH))}, not {depth}")
    run = Recipe(
        name="pareto",
        model=f"lambda_resnet{depth}",
        image_px=image_px,
        epochs=350,
        batch_images=4096,
        optimizer="sgd",
        momentum=0.9,
        lr_per_256=0.1,
        warmup_epochs=5,
        weight_decay=4e-5,
        label_smoothing=0.1,
        augment="imagenet",
        randaugment_ops=2,
        randaugment_magnitude=10 if image_px <= 160 else 15,
        drop_rate=0.2 if depth <= 152 else 0.3,
        drop_path_rate=_DROP_PATH[depth],
        ema_decay=0.9999,
    )
    return _small(run) if small else run


def pareto_hours(depth: int, image_px: int) -> float:
    """Hours of `pareto(depth, image_px)` on the paper's 8 TPUv3 cores: its seconds a step, 350 epochs of 1.28M images.

    Raises BadRecipe for a row that the figure lacks.

    >>> round(pareto_hours(152, 224))
    46
    """
    if (depth, image_px) not in PARETO:
        rows = ", ".join(f"{d} at {px}" for d, px in PARETO)
        raise BadRecipe(f"depth {depth} at image_px {image_px} is no row of the paper's figure; those are {rows}")
    return PARETO[depth, image_px][0] * 350 * 1_281_167 / 1024 / 3600


def finetune(model: str = "lambda_resnet50", image_px: int = 224, *, small: bool = False) -> Recipe:
    """Trained weights on other images and classes: 30 epochs at a tenth of the rate, no average, a frozen batch norm.

        lambdanets train --recipe finetune --init-from WEIGHTS --data FOLDER --model lambda_resnet50

    All of it is R: the paper fine-tunes nothing, and no accuracy or hour belongs to it. It is common practice for
    ResNets on a few thousand images: SGD with momentum 0.9, batch 64 at 0.01 per 256, a warm-up of one epoch, cosine to
    0, weight decay 4e-5, label smoothing 0.1, random crop and flip, the gradient's norm clipped to 1. Batch norm keeps
    the statistics of the weights, since small batches of few images have poorer ones. Hours to expect: 30 passes at the
    speed of the model, so 13 minutes for 30,000 images at the 1,160 images/s of `layer_comparison`.

    >>> finetune().batch_norm
    'frozen'
    """
    run = Recipe(
        name="finetune",
        model=model,
        image_px=image_px,
        epochs=30,
        batch_images=64,
        eval_batch_images=64,
        optimizer="sgd",
        momentum=0.9,
        lr_per_256=0.01,
        warmup_epochs=1,
        clip_norm=1.0,
        weight_decay=4e-5,
        label_smoothing=0.1,
        augment="imagenet",
        batch_norm="frozen",
    )
    return _small(run) if small else run


def _small(run: Recipe) -> Recipe:
    """The same optimiser, schedule, smoothing, augmentation and averaging, on a model and images for a CPU.

    It shows that every part of the recipe runs, on the digits or on a folder of a thousand images. It promises no
    accuracy: flips and crops of a tenth of the area are no help in reading digits.
    """
    return replace(
        run.with_epochs(5),
        name=f"{run.name}_small",
        model="lambda_resnet_tiny",
        image_px=16,
        batch_images=64,
        eval_batch_images=64,
    )
