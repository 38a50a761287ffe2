"""`lambdanets label`."""

from __future__ import annotations

import os
import re
from typing import Literal

from jsonargparse import ArgumentParser, Namespace
from jsonargparse.typing import NonNegativeFloat, PositiveInt

from lambdanets.commands.arguments import allow_source, workers_and_device
from lambdanets.errors import EXIT_CODES_TEXT, BadRecipe


def parser() -> ArgumentParser:
    parser = ArgumentParser(
        description="A teacher labels every image of a data set of shards: a file of labels a shard, for `lambdanets "
        "select`. On one machine as it is; on several GPUs under torchrun; as the tasks of a SLURM array with --part; "
        "on a Ray cluster with --engine ray. However it is ended, the same command goes on: finished shards are kept, "
        "and the labels are the same whichever way.",
        epilog=f"{EXIT_CODES_TEXT} Here 2 also says that shards stay undone, and there is no --resume: it always does.",
    )
    parser.add_argument(
        "teacher",
        type=str,
        nargs="?",
        metavar="RUN",
        help="a run of `lambdanets train`, or RUN/step-N: its running average labels. Or timm:NAME@WEIGHTS.safetensors",
    )
    parser.add_argument(
        "--data",
        type=str,
        metavar="SHARDS",
        help="of `lambdanets pack --unlabelled` or `index --unlabelled`; of a labelled set the labels are ignored",
    )
    parser.add_argument("--out", type=str, required=True, metavar="LABELS", help="a folder or URL for the labels")
    parser.add_argument("--classes", type=str, metavar="FILE", help="of a timm model: its classes, a name a line")
    parser.add_argument("--top", type=PositiveInt, default=10, metavar="K", help="classes kept an image")
    parser.add_argument("--batch-images", type=PositiveInt, help="images a batch (as the teacher's recipe evaluates)")
    parser.add_argument(
        "--precision",
        type=Literal["auto", "float32", "bfloat16"],
        default="auto",
        help="auto: bfloat16 on a GPU, float32 on a CPU",
    )
    parser.add_argument("--no-hashes", action="store_true", help="leave out what finds images that are there twice")
    parser.add_argument("--engine", type=Literal["none", "ray"], default="none", help="ray: on a cluster")
    parser.add_argument("--address", type=str, help="of a Ray cluster (without it: a local one, for this command)")
    parser.add_argument(
        "--part", type=str, metavar="I/N", help="only shards I, I + N, I + 2N ...; the parts are 0/N to N-1/N"
    )
    parser.add_argument("--verify", action="store_true", help="read every file of labels again, and count; label none")
    parser.add_argument(
        "--hang-timeout-s",
        type=NonNegativeFloat,
        default=1800.0,
        help="nothing moved for so long: exit code 4; 0: never",
    )
    allow_source(parser)
    workers_and_device(parser)
    return parser


def run(given: Namespace) -> int:
    part = _part(given.part)
    if given.verify:
        from lambdanets.pseudo_labels.verify import verify

        print(verify(given.out, given.data, allow_sources=given.allow_source))
        return 0
    if given.teacher is None or given.data is None:
        raise BadRecipe("label needs a teacher and images: lambdanets label RUN --data SHARDS --out LABELS")
    if given.engine == "none" and given.address is not None:
        raise BadRecipe(f"--address {given.address} is of a Ray cluster: add --engine ray, or leave it out")

    from lambdanets.training.distributed import Ranks

    if given.engine == "ray" and (part is not None or Ranks().ranks > 1):
        raise BadRecipe("--engine ray divides the shards itself: leave --part out, and start it once, without torchrun")

    from lambdanets.pseudo_labels.label_shards import Wishes, label, refuse_undone

    wishes = Wishes(
        teacher=given.teacher,
        data=given.data,
        out=given.out,
        classes_file=given.classes,
        allow_sources=tuple(given.allow_source),
        batch_images=given.batch_images,
        precision=given.precision,
        top=given.top,
        hashes=not given.no_hashes,
        workers=given.workers,
        device=given.device,
        hang_timeout_s=given.hang_timeout_s,
    )
    if given.engine == "ray":
        from lambdanets.pseudo_labels.engines import label_with_ray

        found = label_with_ray(wishes, address=given.address)
    else:
        found = label(wishes, part=part)
    refuse_undone(found, given.data)
    if os.environ.get("RANK", "0") == "0":  # of several processes one speaks
        print(found)
    return 0


def _part(text: str | None) -> tuple[int, int] | None:
    """I and N of "I/N". Raises BadRecipe."""
    if text is None:
        return None
    found = re.fullmatch(r"(\d{1,9})/(\d{1,9})", text)
    if found is None or int(found[2]) < 1 or int(found[1]) >= int(found[2]):
        raise BadRecipe(f"--part {text}: give I/N with I from 0 to N - 1, as 0/4, 1/4, 2/4 and 3/4")
    return int(found[1]), int(found[2])
