"""Training on anyone's folder of images."""

from __future__ import annotations

from dataclasses import replace

from lambdanets.recipes.recipe import Recipe


def folder(*, small: bool = False) -> Recipe:
    """LambdaResNet-50 from scratch at 160 px, 100 epochs: a start for a few thousand to a few hundred thousand images.

        lambdanets train --data FOLDER

    The values are the paper's for LambdaResNet-50 at 160 px (`imagenet.pareto(50, 160)`), with what one machine and
    fewer images need changed: a batch of 64, 100 epochs, RandAugment at 9. No published number belongs to it. On a
    CPU start with `small`: lambda_resnet_tiny at 32 px, 20 epochs.

    >>> folder().batch_images
    64
    """
    run = Recipe(
        name="folder",
        model="lambda_resnet50",
        image_px=160,
        epochs=100,
        batch_images=64,
        eval_batch_images=64,
        optimizer="sgd",
        momentum=0.9,
        lr_per_256=0.1,
        warmup_epochs=5,
        weight_decay=4e-5,
        label_smoothing=0.1,
        augment="imagenet",
        randaugment_ops=2,
        randaugment_magnitude=9,
        drop_rate=0.2,
        ema_decay=0.9999,
    )
    small_model = replace(run.with_epochs(20), name="folder_small", model="lambda_resnet_tiny", image_px=32)
    return small_model if small else run
