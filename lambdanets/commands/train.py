"""`lambdanets train`."""

from __future__ import annotations

import os
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from jsonargparse import ArgumentParser, Namespace
from jsonargparse.typing import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from lambdanets.commands.arguments import allow_source
from lambdanets.errors import EXIT_CODES_TEXT
from lambdanets.recipes.recipe import BatchNorm, Optimizer, Options, Precision, RecipeName

if TYPE_CHECKING:
    from lambdanets.classification.run import Result

_CHANGES = (
    "epochs", "batch_images", "lr_per_256", "optimizer", "accumulation", "clip_norm", "batch_norm", "precision",
    "flip_frac", "min_crop_frac", "randaugment_ops", "randaugment_magnitude", "erase_frac", "mixup_alpha",
    "cutmix_alpha", "label_smoothing",
)  # fmt: skip


def parser() -> ArgumentParser:
    parser = ArgumentParser(
        description="Train a model on images. With nothing else said: a small LambdaResNet on handwritten digits.",
        epilog=EXIT_CODES_TEXT,
    )
    parser.add_argument(
        "--data",
        type=str,
        metavar="FOLDER",
        help="FOLDER/train/CLASS/*.jpg and FOLDER/val/CLASS/*.jpg, or FOLDER/CLASS/*.jpg, a tenth of it held out; "
        "or the folder or URL of `lambdanets pack`",
    )
    parser.add_argument(
        "--recipe", type=RecipeName, help="without it: folder with --data, else digits; two are the paper's"
    )
    parser.add_argument("--small", action="store_true", help="the recipe on a small model and few epochs, for a CPU")
    parser.add_argument("--model", type=str, help="a name of `lambdanets models`")
    parser.add_argument("--image-px", type=PositiveInt, help="side of the images that the model sees, pixels")
    parser.add_argument("--epochs", type=PositiveInt, help="passes over the images; the warm-up keeps its share")
    parser.add_argument("--batch-images", type=PositiveInt, help="images a step; the learning rate follows")
    parser.add_argument("--lr-per-256", type=PositiveFloat, help="learning rate for 256 images a step")
    parser.add_argument("--optimizer", type=Optimizer, help="in place of the recipe's")
    parser.add_argument("--accumulation", type=PositiveInt, help="parts that a step's images are taken in: less memory")
    parser.add_argument("--clip-norm", type=NonNegativeFloat, help="largest norm of the gradient; 0: any")
    parser.add_argument("--batch-norm", type=BatchNorm, help="statistics: of a process, of all, or as they are")
    parser.add_argument("--precision", type=Precision, help="auto: bfloat16 on a GPU, float32 on a CPU")
    parser.add_argument("--flip-frac", type=float, help="of the images; 0 where left and right tell classes apart")
    parser.add_argument("--min-crop-frac", type=float, help="smallest random crop, a part of the image's area; 1: all")
    parser.add_argument("--randaugment-ops", type=int, help="RandAugment operations an image; 0: none")
    parser.add_argument("--randaugment-magnitude", type=int, help="their level, 3 to 15")
    parser.add_argument("--erase-frac", type=float, help="of the images: a random rectangle of them is erased")
    parser.add_argument("--mixup-alpha", type=float, help="0: no mixup; 0.2 is usual")
    parser.add_argument("--cutmix-alpha", type=float, help="0: no cutmix; 1 is usual")
    parser.add_argument("--label-smoothing", type=float, help="share of the target spread over all classes")
    parser.add_argument(
        "--init-from", type=str, metavar="WEIGHTS", help="first weights: safetensors, RUN or RUN/step-N"
    )
    parser.add_argument("--workers", type=NonNegativeInt, default=0, help="processes that read images")
    parser.add_argument("--out", type=str, metavar="RUN", help="a new folder (without it: the next runs/NAME-NUMBER)")
    parser.add_argument(
        "--resume", action="store_true", help="go on with the run in --out; with nothing else said, as it was asked for"
    )
    parser.add_argument("--save-minutes", type=NonNegativeFloat, default=10.0, help="between checkpoints; 0: never")
    parser.add_argument("--save-steps", type=NonNegativeInt, default=0, help="between checkpoints; 0: never")
    parser.add_argument("--keep-checkpoints", type=PositiveInt, default=3, help="the newest ones")
    parser.add_argument("--milestone-epochs", type=NonNegativeInt, default=0, help="between checkpoints kept for ever")
    parser.add_argument("--keep-best", action="store_true", help="the checkpoint of the best epoch on held-out images")
    parser.add_argument(
        "--skip-non-finite", type=NonNegativeInt, default=0, metavar="STEPS", help="in a row to leave out, at most 10"
    )
    parser.add_argument("--hang-timeout-s", type=NonNegativeFloat, default=1800.0, help="then exit with 4; 0: never")
    parser.add_argument("--log-steps", type=PositiveInt, default=10, help="between lines of log.jsonl")
    parser.add_argument("--tensorboard", action="store_true", help="write events to RUN/tensorboard too")
    parser.add_argument("--channels-last", action="store_true", help="memory format of images and kernels")
    parser.add_argument("--compile-model", action="store_true", help="torch.compile")
    parser.add_argument("--recompute", action="store_true", help="activations, in the backward pass: less memory")
    parser.add_argument(
        "--fsdp", action="store_true", help="divide the state among the processes instead of copying it"
    )
    allow_source(parser)
    parser.add_argument("--seed", type=NonNegativeInt, help="two runs with one seed are equal on a CPU (default: 0)")
    parser.add_argument("--device", type=str, default="auto", help="cpu, cuda, cuda:1, or auto: a GPU if there is one")
    return parser


def run(given: Namespace) -> int:
    from lambdanets import recipes
    from lambdanets.classification.train import recorded, train
    from lambdanets.errors import BadRun

    options = Options(**{field.name: given[field.name] for field in fields(Options)})
    how: dict[str, Any] = {"device": given.device, "workers": given.workers, "resume": given.resume, "options": options}
    how["allow_sources"] = given.allow_source
    asked = ("recipe", "model", "image_px", "data", "init_from", "seed", "small", *_CHANGES)
    told = any(given[name] is not None and given[name] is not False for name in asked)  # a 0 tells something
    again = given.resume and given.out is not None and not told
    try:
        run = recorded(given.out, given.allow_source) if again else None
    except OSError as error:
        raise BadRun(f"--out {given.out} cannot be read ({error.strerror})") from error
    if run is not None:  # the same, without being told
        recipe, data, seed, init_from = run
        return _show(train(recipe, data, out=given.out, seed=seed, init_from=init_from, **how))
    if given.data is None and given.recipe not in (None, "digits") and not given.small:
        remedy = "give --data FOLDER, or try --small on the digits"
        raise recipes.BadRecipe(f"--recipe {given.recipe} learns from a folder of images: {remedy}")
    recipe = recipes.choose(
        given.recipe or ("digits" if given.data is None else "folder"),
        model=given.model,
        image_px=given.image_px,
        small=given.small,
        **{name: given[name] for name in _CHANGES},
    )
    return _show(train(recipe, given.data, out=given.out, seed=given.seed or 0, init_from=given.init_from, **how))


def _show(result: Result) -> int:
    if os.environ.get("RANK", "0") == "0":  # of several processes one speaks
        print(result)
    return 0
