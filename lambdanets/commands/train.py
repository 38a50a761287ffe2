"""`lambdanets train`."""

from __future__ import annotations

import os
from dataclasses import fields
from typing import Any

from jsonargparse import ArgumentParser, Namespace
from jsonargparse.typing import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from lambdanets.commands.arguments import allow_source, told
from lambdanets.errors import EXIT_CODES_TEXT
from lambdanets.recipes.coco import Padding
from lambdanets.recipes.pseudo_labels import Labels, Mixture
from lambdanets.recipes.recipe import BatchNorm, Optimizer, Options, Precision, RecipeName

_OF_ANY = (
    "epochs", "batch_images", "lr_per_256", "optimizer", "accumulation", "clip_norm", "batch_norm", "precision",
    "flip_frac",
)  # fmt: skip
_OF_LABELS = (
    "min_crop_frac", "randaugment_ops", "randaugment_magnitude", "erase_frac", "mixup_alpha", "cutmix_alpha",
    "label_smoothing",
)  # fmt: skip
_OF_BOXES = ("padding", "scale_jitter", "turns", "detections")
_OF_MIXTURE = ("pseudo_ratio", "pseudo_labels", "pseudo_temperature")
_OF_PSEUDO = ("pseudo", "pseudo_data", "unchecked_overlap")
_OF_COCO = ("annotations", "images_dir", "class_names", "boxes_only", "skip_missing", "init_image_px")


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
        "or the folder or URL of `lambdanets pack`; or COCO files: then a detector is trained",
    )
    parser.add_argument(
        "--recipe", type=RecipeName, help="without it: by --data folder, detect or digits; three are the paper's"
    )
    parser.add_argument("--small", action="store_true", help="a small model and few steps, for a CPU")
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
    pseudo = parser.add_argument_group("of pictures that a teacher labelled")
    pseudo.add_argument(
        "--pseudo",
        type=str,
        metavar="SELECTION",
        help="the folder of `lambdanets select`: its pictures and those of --data are learnt in every step; an epoch "
        "is a pass over --data, --batch-images counts both",
    )
    pseudo.add_argument(
        "--pseudo-ratio",
        type=PositiveFloat,
        metavar="M",
        help="such pictures per labelled one (R: not in the paper; 1)",
    )
    pseudo.add_argument(
        "--pseudo-labels",
        type=Labels,
        help="the teacher's probabilities, or its first class (R: not in the paper; soft)",
    )
    pseudo.add_argument(
        "--pseudo-temperature", type=PositiveFloat, metavar="T", help="of soft ones: p^(1/T), divided by the sum (1)"
    )
    pseudo.add_argument(
        "--pseudo-data", type=str, metavar="SHARDS", help="where the selection's pictures lie now, if they moved"
    )
    pseudo.add_argument(
        "--unchecked-overlap",
        action="store_true",
        help="go on though SELECTION was made without --exclude of --data: held-out pictures may be in it",
    )
    boxes = parser.add_argument_group("of detectors")
    boxes.add_argument("--annotations", type=str, metavar="FILE", help="one COCO file, in any place, instead of --data")
    boxes.add_argument(
        "--images-dir", type=str, metavar="DIR", help="the folder that its file names are relative to (else: its own)"
    )
    boxes.add_argument("--class-names", type=str, metavar="FILE", help="the classes wanted, a line each, in that order")
    boxes.add_argument("--boxes-only", action="store_true", help="no masks")
    boxes.add_argument("--skip-missing", action="store_true", help="pictures that are missing are no error")
    boxes.add_argument(
        "--padding",
        type=Padding,
        help="masked: padding never changes an output; visible: as torchvision does it",
    )
    boxes.add_argument(
        "--scale-jitter", type=float, nargs=2, metavar=("LO", "HI"), help="a picture is shown at a size between these"
    )
    boxes.add_argument("--turns", action="store_true", help="all flips and quarter turns: pictures without an up")
    boxes.add_argument("--detections", type=PositiveInt, metavar="N", help="most objects kept an image")
    boxes.add_argument(
        "--init-image-px", type=PositiveInt, metavar="PX", help="at which the weights of --init-from FILE were trained"
    )
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
    from lambdanets.errors import BadRun
    from lambdanets.runs.record import begun_task

    options = Options(**{field.name: given[field.name] for field in fields(Options)})
    how: dict[str, Any] = {"device": given.device, "workers": given.workers, "resume": given.resume, "options": options}
    asked = ("recipe", "model", "image_px", "data", "init_from", "seed", "small")
    changed = any(told(given, asked + _OF_ANY + _OF_LABELS + _OF_MIXTURE + _OF_BOXES + _OF_COCO))
    try:
        begun = begun_task(given.out) if given.resume and given.out is not None else None
    except OSError as error:
        raise BadRun(f"--out {given.out} cannot be read ({error.strerror})") from error
    if begun is not None and not changed:  # the same, without being told
        return _again(given, begun, how)
    if given.init_image_px is not None and given.init_from is None:
        raise recipes.BadRecipe("--init-image-px says at which size the weights of --init-from were trained: give both")
    if begun == "detection" and given.data is None and given.annotations is None:
        return _detector(given, how)
    if given.data is None and given.annotations is None and given.recipe not in (None, "digits") and not given.small:
        remedy = "give --data FOLDER, or try --small on the digits"
        raise recipes.BadRecipe(f"--recipe {given.recipe} learns from a folder of images: {remedy}")
    if given.recipe in ("detect", "table6") or given.annotations is not None or _is_coco(given):
        for name in told(given, _OF_PSEUDO + _OF_MIXTURE):
            raise recipes.BadRecipe(
                f"--{name.replace('_', '-')} is of classification: a detector learns no pseudo-labels"
            )
        return _detector(given, how)
    if given.pseudo is None:
        for name in told(given, _OF_PSEUDO + _OF_MIXTURE):
            raise recipes.BadRecipe(f"--{name.replace('_', '-')} goes with --pseudo SELECTION: give both")
    for name in told(given, _OF_BOXES + _OF_COCO):
        raise recipes.BadRecipe(
            f"--{name.replace('_', '-')} is of detectors, which learn from --data with COCO files"
            + ("" if given.data is None else f", and {given.data} has none: leave it out")
        )
    recipe = recipes.choose(
        given.recipe or ("digits" if given.data is None else "folder"),
        model=given.model,
        image_px=given.image_px,
        small=given.small,
        **{name: given[name] for name in _OF_ANY + _OF_LABELS},
    )
    how |= {
        "out": given.out,
        "seed": given.seed or 0,
        "init_from": given.init_from,
        "allow_sources": given.allow_source,
    }
    if given.pseudo is not None:
        from lambdanets.pseudo_labels import train as joint

        mixture = Mixture(**{name.removeprefix("pseudo_"): given[name] for name in told(given, _OF_MIXTURE)})
        return _show(
            joint.train(recipe, given.data, given.pseudo, mixture, pictures=given.pseudo_data,
                        unchecked_overlap=given.unchecked_overlap, **how)
        )  # fmt: skip
    from lambdanets.classification.train import train

    return _show(train(recipe, given.data, **how))


def _is_coco(given: Namespace) -> bool:
    """Whether --data has COCO files. Raises BadRecipe where a recipe of classification was asked for with them."""
    from lambdanets.detection.layouts import is_coco, other_format
    from lambdanets.errors import BadData, BadRecipe

    if not is_coco(given.data):
        if given.recipe is None and (said := other_format(given.data)) is not None:
            raise BadData(f"--data {given.data}: {said}")
        return False
    if given.recipe is not None:
        raise BadRecipe(
            f"--recipe {given.recipe} learns one label a picture, from a folder a class, and --data {given.data} has "
            "COCO files: give --recipe detect or table6"
        )
    return True


def _again(given: Namespace, task: str, how: dict[str, Any]) -> int:
    """The run in --out, as it was asked for; what it reads may have moved."""
    from lambdanets.errors import BadRun

    if task != "detection":
        from lambdanets.pseudo_labels import train as joint

        how |= {"out": given.out, "allow_sources": given.allow_source}
        both = joint.recorded(given.out, given.allow_source, selection=given.pseudo, pictures=given.pseudo_data)
        if both is not None:
            return _show(joint.train(**both._asdict(), **how))
    for name in told(given, _OF_PSEUDO):
        raise BadRun(
            f"--resume: the run in {given.out} learns without pseudo-labels: leave --{name.replace('_', '-')} out"
        )
    if task == "detection":
        from lambdanets.detection import train as detection

        run = detection.recorded(given.out)
        assert run is not None
        recipe, source, seed, init_from, init_image_px = run
        return _show(
            detection.train(recipe, source, out=given.out, seed=seed, init_from=init_from,
                            init_image_px=init_image_px, **how)
        )  # fmt: skip
    from lambdanets.classification import train as classification

    found = classification.recorded(given.out, given.allow_source)
    assert found is not None
    recipe_of_labels, data, seed, init_from = found
    return _show(classification.train(recipe_of_labels, data, seed=seed, init_from=init_from, **how))


def _detector(given: Namespace, how: dict[str, Any]) -> int:
    from lambdanets.detection.layouts import read_class_names
    from lambdanets.detection.source import CocoSource
    from lambdanets.detection.train import frozen_where_it_starts_trained, recorded, train
    from lambdanets.errors import BadData, BadRecipe
    from lambdanets.recipes import coco

    name, small, source = given.recipe or "detect", given.small, None
    nowhere = given.data is None and given.annotations is None
    run = recorded(given.out) if nowhere and given.resume and given.out is not None else None
    if run is not None:  # its data, and what else was said
        source, named = run[1], run[0].name
        name, small = given.recipe or named.removesuffix("_small"), given.small or named.endswith("_small")
    if nowhere and source is None:
        raise BadRecipe(f"--recipe {name} learns from COCO files: give --data COCO")
    if given.data is not None and given.annotations is not None:
        raise BadData("--data and --annotations are two places: give one of them")
    if given.recipe not in (None, "detect", "table6"):
        raise BadRecipe(f"--recipe {name} learns one label a picture, and --annotations names a COCO file")
    for unknown in told(given, _OF_LABELS):
        raise BadRecipe(f"--{unknown.replace('_', '-')} is of classification, and a detector is trained: leave it out")
    recipe = coco.choose(
        name,
        model=given.model,
        image_px=given.image_px,
        small=small,
        epochs=given.epochs,
        scale_jitter=None if given.scale_jitter is None else tuple(given.scale_jitter),
        masks=False if given.boxes_only else None,
        turns=given.turns or None,
        **{name: given[name] for name in (*_OF_ANY[1:], "padding", "detections")},
    )
    if given.batch_norm is None:
        recipe = frozen_where_it_starts_trained(recipe, given.init_from)
    names = None if given.class_names is None else tuple(read_class_names(given.class_names))
    source = source or CocoSource(given.data, given.annotations, given.images_dir, names, given.skip_missing)
    return _show(
        train(recipe, source, out=given.out, seed=given.seed or 0, init_from=given.init_from,
              init_image_px=given.init_image_px, **how)
    )  # fmt: skip


def _show(result: object) -> int:
    if os.environ.get("RANK", "0") == "0":  # of several processes one speaks
        print(result)
    return 0
