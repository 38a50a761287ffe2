"""The command line: arguments in, one function called, messages and exit codes out. torch waits for right arguments.

Exit codes: 0 done · 1 some images could not be predicted · 2 wrong argument, data, run or device · 3 the loss was not
finite · 130 interrupted. An error that is none of these keeps its traceback.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from jsonargparse import ArgumentParser, Namespace
from jsonargparse.typing import NonNegativeInt, PositiveFloat, PositiveInt

import lambdanets
from lambdanets.recipes import RecipeName

_EXIT_CODES = (
    "Exit codes: 0 done, 1 some images could not be predicted, 2 wrong argument, data, run or device, "
    "3 the loss was not finite, 130 interrupted."
)


def main(args: Sequence[str] | None = None) -> int:
    """Run one command; `args` are those of the process by default. Gives the exit code; --help exits."""
    parsed = _parser().parse_args(args)
    if "OMP_WAIT_POLICY" not in os.environ:
        # OpenMP's threads spin while they wait. Beside one other busy process on two cores a training step took 2.0 s
        # instead of 0.13 s, and 0.36 s with this shorter spin, which costs nothing on a quiet machine.
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    try:
        return _run(parsed)
    except KeyboardInterrupt as error:
        print(f"\nlambdanets: {_message(error) or 'interrupted'}", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `lambdanets predict ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _run(parsed: Namespace) -> int:
    command, given = parsed.command, parsed[parsed.command]
    if command == "models":
        from lambdanets.cost import models_text

        print(models_text())
        return 0
    if command == "plan":
        return _plan(given.model, given.image)
    if command in ("pack", "index"):
        return _shards(command, given)

    from lambdanets.checkpoint import BadRun
    from lambdanets.data import BadData, BadImage
    from lambdanets.recipes import BadRecipe
    from lambdanets.train import NonFiniteLoss

    try:
        if command == "train":
            return _train(given)
        if command == "predict":
            return _predict(given)
        from lambdanets.demo import demo

        demo(given.out, seed=given.seed, device=given.device)
        return 0
    except (BadRun, BadRecipe, BadData, BadImage) as error:
        print(f"lambdanets {command}: {_message(error)}", file=sys.stderr)
        return 2
    except NonFiniteLoss as error:
        print(f"lambdanets {command}: {_message(error)}", file=sys.stderr)
        return 3


def _message(error: BaseException) -> str:
    return "\n".join([part for part in [str(error), *getattr(error, "__notes__", [])] if part])


def _train(given: Namespace) -> int:
    from lambdanets import recipes
    from lambdanets.train import train

    if given.data is None and given.recipe not in (None, "digits") and not given.small:
        remedy = "give --data FOLDER, or try --small on the digits"
        raise recipes.BadRecipe(f"--recipe {given.recipe} learns from a folder of images: {remedy}")
    recipe = recipes.choose(
        given.recipe or ("digits" if given.data is None else "folder"),
        model=given.model,
        image_px=given.image_px,
        epochs=given.epochs,
        batch_images=given.batch_images,
        lr_per_256=given.lr_per_256,
        small=given.small,
    )
    result = train(recipe, given.data, out=given.out, seed=given.seed, device=given.device, workers=given.workers)
    print(result)
    return 0


def _predict(given: Namespace) -> int:
    from lambdanets.checkpoint import open_run
    from lambdanets.evaluate import predict
    from lambdanets.train import choose_device

    device = choose_device(given.device)
    run = open_run(given.run)
    failed = False
    for found in predict(run.model.to(device), run.view, given.images, device=device):
        failed = failed or found.error is not None
        if given.json:
            print(found.json(run.classes, given.top), flush=True)
        elif found.error is not None:
            print(f"lambdanets predict: {found.image}: {found.error}", file=sys.stderr)
        else:
            print(found.text(run.classes, given.top), flush=True)
    return 1 if failed else 0


def _shards(command: str, given: Namespace) -> int:
    from lambdanets.data import BadData
    from lambdanets.pack import SHARD_BYTES, index, pack

    try:
        if command == "pack":
            sizes = {"max_side_px": given.max_side_px, "shard_bytes": given.shard_bytes or SHARD_BYTES}
            print(pack(given.folder, given.out, workers=given.workers, **sizes))
        else:
            print(index(given.shards, out=given.out, classes=given.classes))
        return 0
    except BadData as error:
        print(f"lambdanets {command}: {_message(error)}", file=sys.stderr)
        return 2


def _plan(model: str, image_px: int) -> int:
    from lambdanets.cost import plan_text

    try:
        text = plan_text(model, image_px)
    except ValueError as error:  # an unknown name, or an image too small for it
        print(f"lambdanets plan: {error}", file=sys.stderr)
        return 2
    print(text)
    return 0


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="lambdanets",
        description="LambdaNetworks (Bello, ICLR 2021): train, predict, and see what a model costs.",
        epilog=_EXIT_CODES,
        version=lambdanets.__version__,
    )
    commands = parser.add_subcommands(required=True, dest="command")

    train = ArgumentParser(
        description="Train a model on images. With nothing else said: a small LambdaResNet on handwritten digits.",
        epilog=_EXIT_CODES,
    )
    train.add_argument(
        "--data",
        type=str,
        metavar="FOLDER",
        help="FOLDER/train/CLASS/*.jpg and FOLDER/val/CLASS/*.jpg, or FOLDER/CLASS/*.jpg, a tenth of it held out; "
        "or the folder or URL of `lambdanets pack`",
    )
    train.add_argument(
        "--recipe", type=RecipeName, help="without it: folder with --data, else digits; the other two are the paper's"
    )
    train.add_argument("--small", action="store_true", help="the paper's recipe on a small model and few epochs")
    train.add_argument("--model", type=str, help="a name of `lambdanets models`")
    train.add_argument("--image-px", type=PositiveInt, help="side of the images that the model sees, pixels")
    train.add_argument("--epochs", type=PositiveInt, help="passes over the images; the warm-up keeps its share")
    train.add_argument("--batch-images", type=PositiveInt, help="images a step; the learning rate follows")
    train.add_argument("--lr-per-256", type=PositiveFloat, help="learning rate for 256 images a step")
    train.add_argument("--workers", type=NonNegativeInt, default=0, help="processes that read images")
    train.add_argument("--out", type=str, metavar="RUN", help="a new folder (without it: the next runs/NAME-NUMBER)")
    _seed_and_device(train)
    commands.add_subcommand("train", train, help="train on a folder of images, or on handwritten digits")

    predict = ArgumentParser(description="The top classes of image files and their probabilities.", epilog=_EXIT_CODES)
    predict.add_argument("run", type=str, metavar="RUN", help="the folder of a run of `lambdanets train`")
    predict.add_argument("images", type=str, nargs="+", metavar="IMAGE", help="JPEG, PNG, WebP, GIF or BMP files")
    predict.add_argument("--json", action="store_true", help="one line of JSON an image, with the errors among them")
    predict.add_argument("--top", type=PositiveInt, default=3, metavar="K", help="classes an image")
    predict.add_argument("--device", type=str, default="auto", help="cpu, cuda, cuda:1, or auto")
    commands.add_subcommand("predict", predict, help="classify image files with a run")

    pack = ArgumentParser(
        description="Pack a folder of images into tar shards (WebDataset layout) with an index. After a fault, again: "
        "finished shards are kept. Unreadable images are left out and listed in OUT/bad_samples.jsonl.",
        epilog=_EXIT_CODES,
    )
    pack.add_argument("folder", type=str, metavar="FOLDER", help="as for `lambdanets train --data`; split as there")
    pack.add_argument("out", type=str, metavar="OUT", help="a new folder: give it to `lambdanets train --data`")
    pack.add_argument("--max-side-px", type=PositiveInt, metavar="N", help="shrink larger images to this longer side")
    pack.add_argument("--shard-bytes", type=PositiveInt, metavar="N", help="largest shard, bytes (without it: 1 GiB)")
    pack.add_argument("--workers", type=NonNegativeInt, default=0, help="processes that read images")
    commands.add_subcommand("pack", pack, help="pack a folder of images into tar shards")

    index = ArgumentParser(
        description="Index the tar shards of others, or compare every byte of indexed ones with their manifest.",
        epilog=_EXIT_CODES,
    )
    index.add_argument("shards", type=str, metavar="SHARDS", help="a folder or URL with train-*.tar and val-*.tar")
    index.add_argument("--out", type=str, metavar="FOLDER", help="where the index goes if SHARDS cannot be written")
    index.add_argument("--classes", type=str, metavar="FILE", help="names of the classes, one a line")
    commands.add_subcommand("index", index, help="index tar shards, or verify them")

    models = ArgumentParser(description="Every model: name, parameters, GFLOPs.")
    commands.add_subcommand("models", models, help="list the models")

    plan = ArgumentParser(description="What a model costs, a stage at a time.")
    plan.add_argument("model", type=str, metavar="MODEL", help="a name of `lambdanets models`")
    plan.add_argument("--image", type=PositiveInt, default=224, metavar="PX", help="side of the image, pixels")
    commands.add_subcommand("plan", plan, help="what a model costs, a stage at a time")

    demo = ArgumentParser(
        description="Train on the digits, write held-out digits as PNG files, predict them.", epilog=_EXIT_CODES
    )
    demo.add_argument("--out", type=str, metavar="RUN", help="a new folder (without it: the next runs/digits-N)")
    _seed_and_device(demo)
    commands.add_subcommand("demo", demo, help="train on handwritten digits, then predict some")
    return parser


def _seed_and_device(parser: ArgumentParser) -> None:
    parser.add_argument("--seed", type=NonNegativeInt, default=0, help="two runs with one seed are equal on a CPU")
    parser.add_argument("--device", type=str, default="auto", help="cpu, cuda, cuda:1, or auto: a GPU if there is one")
