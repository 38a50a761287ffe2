"""The command line: arguments in, one function called, messages and exit codes out. torch waits for right arguments.

Exit codes: 0 done · 1 some images could not be predicted · 2 wrong argument, data, run or device · 3 the loss was not
finite · 4 nothing moved for --hang-timeout-s · 5 a process of the run, or a disk it reads, was lost · 129 the terminal
was closed (SIGHUP) · 130 interrupted · 143 SIGTERM. After the last five a run goes on with --resume. An error that is
none of these keeps its traceback.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any, Literal

from jsonargparse import ArgumentParser, Namespace
from jsonargparse.typing import ClosedUnitInterval, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

import lambdanets
from lambdanets.errors import printable, printable_text
from lambdanets.recipes import BatchNorm, Options, Precision, RecipeName

if TYPE_CHECKING:
    from lambdanets.results import Result

_CHANGES = (
    "epochs", "batch_images", "lr_per_256", "optimizer", "accumulation", "clip_norm", "batch_norm", "precision",
    "flip_frac", "min_crop_frac", "randaugment_ops", "randaugment_magnitude", "erase_frac", "mixup_alpha",
    "cutmix_alpha", "label_smoothing",
)  # fmt: skip
_EXIT_CODES = (
    "Exit codes: 0 done, 1 some images could not be predicted, 2 wrong argument, data, run or device, "
    "3 the loss was not finite, 4 nothing moved for --hang-timeout-s, 5 a process of the run (another rank, one that "
    "reads images), or a disk it reads, was lost, 129 hung up, 130 interrupted, 143 terminated. After 4, 5, 129, 130 "
    "and 143 a run goes on with --resume."
)


def main(args: Sequence[str] | None = None) -> int:
    """Run one command; `args` are those of the process by default. Gives the exit code; --help exits."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a letter that the terminal's encoding lacks ends no run
            stream.reconfigure(errors="backslashreplace")
    parsed = _parser().parse_args(args)
    if "OMP_WAIT_POLICY" not in os.environ:
        # OpenMP's threads spin while they wait. Beside one other busy process on two cores a training step took 2.0 s
        # instead of 0.13 s, and 0.36 s with this shorter spin, which costs nothing on a quiet machine.
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    _open_closed_streams()
    with _outliving_the_terminal() if parsed.command in ("train", "demo") else contextlib.nullcontext():
        try:
            return _run(parsed)
        except KeyboardInterrupt as error:
            print(f"\nlambdanets: {_message(error) or 'interrupted'}", file=sys.stderr)
            return 130
        except BrokenPipeError:  # `lambdanets predict ... | head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 1


def _open_closed_streams() -> None:
    """Where a shell closed a stream (`2>&-`), the next file opened would take its number, and what is meant for a
    person would be written into it."""
    while (opened := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(opened)
    for name, number in (("stdout", 1), ("stderr", 2)):
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, "w", closefd=False))  # noqa: SIM115  # for as long as the process lives


class _Dropping(io.FileIO):
    """What cannot be written is gone."""

    def write(self, content: Any) -> int:
        with contextlib.suppress(OSError):
            return super().write(content)
        return len(content)


@contextlib.contextmanager
def _outliving_the_terminal() -> Iterator[None]:
    """A run goes on where its output cannot be written (`| head`, a full disk, a terminal that is gone): log.jsonl has
    it. Streams that a caller has put in place of the process's own are left alone."""
    before = sys.stdout, sys.stderr
    for name, stream in zip(("stdout", "stderr"), before, strict=True):
        if stream is getattr(sys, f"__{name}__") and stream is not None:
            stream.flush()
            how: dict[str, Any] = {
                n: getattr(stream, n) for n in ("encoding", "errors", "line_buffering", "write_through")
            }
            raw = _Dropping(stream.fileno(), "w", closefd=False)
            setattr(sys, name, io.TextIOWrapper(io.BufferedWriter(raw), **how))
    try:
        yield
    finally:
        for name, stream in zip(("stdout", "stderr"), before, strict=True):
            getattr(sys, name).flush()
            setattr(sys, name, stream)


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
    from lambdanets.decode import BadData, BadImage, DiskFault
    from lambdanets.distributed import LostProcess, lost_reader
    from lambdanets.errors import NonFiniteLoss, NonFiniteState
    from lambdanets.recipes import BadRecipe
    from lambdanets.watchdog import LOST, Terminated

    try:
        if command == "train":
            return _train(given)
        if command == "predict":
            return _predict(given)
        if command == "evaluate":
            return _evaluate(given)
        if command == "report":
            return _report(given)
        from lambdanets.demo import demo

        demo(given.out, seed=given.seed, device=given.device)
        return 0
    except DiskFault as error:
        print(f"lambdanets {command}: {_message(error)}", file=sys.stderr)
        return LOST
    except (BadRun, BadRecipe, BadData, BadImage) as error:
        print(f"lambdanets {command}: {_message(error)}", file=sys.stderr)
        return 2
    except (NonFiniteLoss, NonFiniteState) as error:
        print(f"lambdanets {command}: {_message(error)}", file=sys.stderr)
        return 3
    except RuntimeError as error:
        lost = error if isinstance(error, LostProcess) else lost_reader(error)
        if lost is None:
            raise
        print(f"lambdanets {command}: {_message(lost)}", file=sys.stderr)
        return LOST
    except Terminated as error:
        print(f"lambdanets {command}: {_message(error)}", file=sys.stderr)
        return error.code


def _message(error: BaseException) -> str:
    return printable_text("\n".join([part for part in [str(error), *getattr(error, "__notes__", [])] if part]))


def _train(given: Namespace) -> int:
    from lambdanets import recipes
    from lambdanets.checkpoint import BadRun
    from lambdanets.start import recorded
    from lambdanets.train import train

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


def _predict(given: Namespace) -> int:
    from lambdanets.checkpoint import open_run
    from lambdanets.evaluate import predict
    from lambdanets.start import choose_device

    device = choose_device(given.device)
    run = open_run(given.run)
    failed = False
    for found in predict(run.model.to(device), run.view, given.images, device=device):
        failed = failed or found.error is not None
        if given.json:
            print(found.json(run.classes, given.top), flush=True)
        elif found.error is not None:
            print(f"lambdanets predict: {printable(found.image)}: {printable(found.error)}", file=sys.stderr)
        else:
            print(found.text(run.classes, given.top), flush=True)
    return 1 if failed else 0


def _evaluate(given: Namespace) -> int:
    from lambdanets.distributed import Ranks
    from lambdanets.results import NotWritten, evaluate_run
    from lambdanets.start import choose_device

    try:
        found = evaluate_run(
            given.run,
            given.data,
            out=given.out,
            batch_images=given.batch_images,
            workers=given.workers,
            device=choose_device(given.device, Ranks()),
            exclude_bad=given.exclude_bad,
            allow_sources=given.allow_source,
        )
    except NotWritten as error:  # all is computed: first the numbers
        print(error.found, flush=True)
        raise
    if os.environ.get("RANK", "0") == "0":  # of several processes one speaks
        print(found)
    return 0


def _report(given: Namespace) -> int:
    from lambdanets.results import write_report
    from lambdanets.start import choose_device

    print(
        printable(
            write_report(
                given.run, device=choose_device(given.device), workers=given.workers, allow_sources=given.allow_source
            )
        )
    )
    return 0


def _shards(command: str, given: Namespace) -> int:
    from lambdanets.decode import BadData
    from lambdanets.pack import SHARD_BYTES, index, pack

    try:
        if command == "pack":
            sizes = {"max_side_px": given.max_side_px, "shard_bytes": given.shard_bytes or SHARD_BYTES}
            print(pack(given.folder, given.out, workers=given.workers, max_bad_frac=given.max_bad_frac, **sizes))
        else:
            print(index(given.shards, out=given.out, classes=given.classes, allow_sources=given.allow_source))
        return 0
    except KeyboardInterrupt:
        raise KeyboardInterrupt("interrupted: the same command goes on, finished shards are kept") from None
    except BadData as error:
        print(f"lambdanets {command}: {_message(error)}", file=sys.stderr)
        return 2


def _plan(model: str, image_px: int) -> int:
    from lambdanets.cost import plan_text

    try:
        text = plan_text(model, image_px)
    except ValueError as error:  # an unknown name, or an image too small for it
        print(f"lambdanets plan: {_message(error)}", file=sys.stderr)
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
        "--recipe", type=RecipeName, help="without it: folder with --data, else digits; two are the paper's"
    )
    train.add_argument("--small", action="store_true", help="the recipe on a small model and few epochs, for a CPU")
    train.add_argument("--model", type=str, help="a name of `lambdanets models`")
    train.add_argument("--image-px", type=PositiveInt, help="side of the images that the model sees, pixels")
    train.add_argument("--epochs", type=PositiveInt, help="passes over the images; the warm-up keeps its share")
    train.add_argument("--batch-images", type=PositiveInt, help="images a step; the learning rate follows")
    train.add_argument("--lr-per-256", type=PositiveFloat, help="learning rate for 256 images a step")
    train.add_argument("--optimizer", type=Literal["sgd", "adamw", "lamb"], help="in place of the recipe's")
    train.add_argument("--accumulation", type=PositiveInt, help="parts that a step's images are taken in: less memory")
    train.add_argument("--clip-norm", type=NonNegativeFloat, help="largest norm of the gradient; 0: any")
    train.add_argument("--batch-norm", type=BatchNorm, help="statistics: of a process, of all, or as they are")
    train.add_argument("--precision", type=Precision, help="auto: bfloat16 on a GPU, float32 on a CPU")
    train.add_argument("--flip-frac", type=float, help="of the images; 0 where left and right tell classes apart")
    train.add_argument("--min-crop-frac", type=float, help="smallest random crop, a part of the image's area; 1: all")
    train.add_argument("--randaugment-ops", type=int, help="RandAugment operations an image; 0: none")
    train.add_argument("--randaugment-magnitude", type=int, help="their level, 3 to 15")
    train.add_argument("--erase-frac", type=float, help="of the images: a random rectangle of them is erased")
    train.add_argument("--mixup-alpha", type=float, help="0: no mixup; 0.2 is usual")
    train.add_argument("--cutmix-alpha", type=float, help="0: no cutmix; 1 is usual")
    train.add_argument("--label-smoothing", type=float, help="share of the target spread over all classes")
    train.add_argument("--init-from", type=str, metavar="WEIGHTS", help="first weights: safetensors, RUN or RUN/step-N")
    train.add_argument("--workers", type=NonNegativeInt, default=0, help="processes that read images")
    train.add_argument("--out", type=str, metavar="RUN", help="a new folder (without it: the next runs/NAME-NUMBER)")
    train.add_argument(
        "--resume", action="store_true", help="go on with the run in --out; with nothing else said, as it was asked for"
    )
    train.add_argument("--save-minutes", type=NonNegativeFloat, default=10.0, help="between checkpoints; 0: never")
    train.add_argument("--save-steps", type=NonNegativeInt, default=0, help="between checkpoints; 0: never")
    train.add_argument("--keep-checkpoints", type=PositiveInt, default=3, help="the newest ones")
    train.add_argument("--milestone-epochs", type=NonNegativeInt, default=0, help="between checkpoints kept for ever")
    train.add_argument("--keep-best", action="store_true", help="the checkpoint of the best epoch on held-out images")
    train.add_argument(
        "--skip-non-finite", type=NonNegativeInt, default=0, metavar="STEPS", help="in a row to leave out, at most 10"
    )
    train.add_argument("--hang-timeout-s", type=NonNegativeFloat, default=1800.0, help="then exit with 4; 0: never")
    train.add_argument("--log-steps", type=PositiveInt, default=10, help="between lines of log.jsonl")
    train.add_argument("--tensorboard", action="store_true", help="write events to RUN/tensorboard too")
    train.add_argument("--channels-last", action="store_true", help="memory format of images and kernels")
    train.add_argument("--compile-model", action="store_true", help="torch.compile")
    train.add_argument("--recompute", action="store_true", help="activations, in the backward pass: less memory")
    train.add_argument("--fsdp", action="store_true", help="divide the state among the processes instead of copying it")
    _allow_source(train)
    train.add_argument("--seed", type=NonNegativeInt, help="two runs with one seed are equal on a CPU (default: 0)")
    train.add_argument("--device", type=str, default="auto", help="cpu, cuda, cuda:1, or auto: a GPU if there is one")
    commands.add_subcommand("train", train, help="train on a folder of images, or on handwritten digits")

    predict = ArgumentParser(description="The top classes of image files and their probabilities.", epilog=_EXIT_CODES)
    predict.add_argument("run", type=str, metavar="RUN", help="the folder of a run, or a checkpoint RUN/step-N")
    predict.add_argument("images", type=str, nargs="+", metavar="IMAGE", help="JPEG, PNG, WebP, GIF or BMP files")
    predict.add_argument("--json", action="store_true", help="one line of JSON an image, with the errors among them")
    predict.add_argument("--top", type=PositiveInt, default=3, metavar="K", help="classes an image")
    predict.add_argument("--device", type=str, default="auto", help="cpu, cuda, cuda:1, or auto")
    commands.add_subcommand("predict", predict, help="classify image files with a run")

    evaluate = ArgumentParser(
        description="A run's accuracy on a folder of images: top-1, top-5, loss, a table by class, every mistake. Each "
        "image counts once, also under torchrun.",
        epilog=_EXIT_CODES,
    )
    evaluate.add_argument("run", type=str, metavar="RUN", help="the folder of a run of `lambdanets train`")
    evaluate.add_argument(
        "--data",
        type=str,
        metavar="FOLDER",
        help="FOLDER/val/CLASS/*.jpg, or all of FOLDER/CLASS/*.jpg; without it: the images that the run held out",
    )
    evaluate.add_argument("--batch-images", type=PositiveInt, help="images a batch: changes memory and time only")
    evaluate.add_argument(
        "--exclude-bad", action="store_true", help="leave out images that cannot be read, and say so; else an error"
    )
    evaluate.add_argument("--out", type=str, metavar="NEW", help="a new folder (without it: RUN/evaluation-NUMBER)")
    _allow_source(evaluate)
    _workers_and_device(evaluate)
    commands.add_subcommand("evaluate", evaluate, help="a run's accuracy on a folder of images")

    report = ArgumentParser(
        description="Write RUN/report.html again, with the weights as they are now: also while the run goes on.",
        epilog=_EXIT_CODES,
    )
    report.add_argument("run", type=str, metavar="RUN", help="the folder of a run, finished or not")
    _allow_source(report)
    _workers_and_device(report)
    commands.add_subcommand("report", report, help="curves, mistakes and speed of a run in one HTML file")

    pack = ArgumentParser(
        description="Pack a folder of images into tar shards (WebDataset layout) with an index. After a fault, again: "
        "finished shards are kept. Unreadable images are left out and listed in OUT/bad_samples.jsonl.",
        epilog=_EXIT_CODES,
    )
    pack.add_argument("folder", type=str, metavar="FOLDER", help="as for `lambdanets train --data`; split as there")
    pack.add_argument("out", type=str, metavar="OUT", help="a new folder: give it to `lambdanets train --data`")
    pack.add_argument("--max-side-px", type=PositiveInt, metavar="N", help="shrink larger images to this longer side")
    pack.add_argument("--shard-bytes", type=PositiveInt, metavar="N", help="largest shard, bytes (without it: 1 GiB)")
    pack.add_argument(
        "--max-bad-frac",
        type=ClosedUnitInterval,
        default=0.001,
        help="of the training or the validation images, and one: more that cannot be decoded end the command",
    )
    pack.add_argument("--workers", type=NonNegativeInt, default=0, help="processes that read images")
    commands.add_subcommand("pack", pack, help="pack a folder of images into tar shards")

    index = ArgumentParser(
        description="Index the tar shards of others, or compare every byte of indexed ones with their manifest.",
        epilog=_EXIT_CODES,
    )
    index.add_argument("shards", type=str, metavar="SHARDS", help="a folder or URL with train-*.tar and val-*.tar")
    index.add_argument("--out", type=str, metavar="FOLDER", help="where the index goes if SHARDS cannot be written")
    index.add_argument("--classes", type=str, metavar="FILE", help="names of the classes, one a line")
    _allow_source(index)
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
    demo.add_argument("--seed", type=NonNegativeInt, default=0, help="two runs with one seed are equal on a CPU")
    demo.add_argument("--device", type=str, default="auto", help="cpu, cuda, cuda:1, or auto: a GPU if there is one")
    commands.add_subcommand("demo", demo, help="train on handwritten digits, then predict some")
    return parser


def _workers_and_device(parser: ArgumentParser) -> None:
    parser.add_argument("--workers", type=NonNegativeInt, default=0, help="processes that read images")
    parser.add_argument("--device", type=str, default="auto", help="cpu, cuda, cuda:1, or auto: a GPU if there is one")


def _allow_source(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--allow-source",
        type=str,
        action="append",
        default=[],
        metavar="URL",
        help="a place that a manifest or run may name, and all below it; repeatable; what you name yourself is allowed",
    )
