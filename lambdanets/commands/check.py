"""`lambdanets check`."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

from jsonargparse import ArgumentParser, Namespace
from jsonargparse.typing import NonNegativeInt, PositiveInt

from lambdanets.errors import EXIT_CODES_TEXT, BadData, BadImage, DiskFault, printable_text
from lambdanets.files import to_stderr

if TYPE_CHECKING:
    from lambdanets.detection.layouts import CocoData


def parser() -> ArgumentParser:
    parser = ArgumentParser(
        description="Look for what is wrong with a COCO data set, without training: a table of cases, each with what "
        "is done about it, how often it is met, and the first ten names.",
        epilog=EXIT_CODES_TEXT,
    )
    parser.add_argument("data", type=str, nargs="?", metavar="DATA", help="as for `lambdanets train --data`")
    parser.add_argument("--annotations", type=str, metavar="FILE", help="one COCO file, in any place, instead of DATA")
    parser.add_argument("--images-dir", type=str, metavar="DIR", help="where its file names start (else: beside it)")
    parser.add_argument(
        "--all-images",
        action="store_true",
        help="decode every one: takes long (else: 1,000 headers)",
    )
    parser.add_argument("--skip-missing", action="store_true", help="pictures that are missing are no error")
    parser.add_argument("--image-px", type=PositiveInt, metavar="N", help="of the run: which objects are too small?")
    parser.add_argument("--detections", type=PositiveInt, metavar="N", help="most per picture of the run")
    parser.add_argument("--class-names", type=str, metavar="FILE", help="the classes wanted, a line each")
    parser.add_argument("--seed", type=NonNegativeInt, default=0, help="of the split, where one file is all there is")
    parser.add_argument("--fix", type=str, metavar="OUT", help="a new folder for a copy without what is wrong")
    parser.add_argument("--draw", type=str, metavar="OUT", help="a folder for pictures with their objects drawn")
    parser.add_argument("--draw-images", type=PositiveInt, default=24, metavar="N", help="that many, the first ones")
    return parser


def run(given: Namespace) -> int:
    from lambdanets.detection.check import Wishes
    from lambdanets.detection.findings import counted
    from lambdanets.detection.layouts import look_at_coco, read_class_names, write_fixed

    if (given.data is None) == (given.annotations is None):
        raise BadData("give DATA or --annotations FILE, one of the two")
    if given.all_images:
        to_stderr("--all-images: every picture is decoded, which takes long")
    found = look_at_coco(
        given.data,
        annotations=given.annotations,
        images=given.images_dir,
        seed=given.seed,
        class_names=None if given.class_names is None else read_class_names(given.class_names),
        wishes=Wishes(given.skip_missing, given.all_images, given.image_px, given.detections, decode=given.all_images),
    )
    wrong = len(found.findings.errors)
    if len(found.findings):
        print(printable_text(found.findings.table()))
    others = counted(len(found.findings) - wrong, "other finding")
    print(printable_text(f"{counted(wrong, 'error')}, {others}. {found.how}"))
    if not given.all_images:
        print("no picture was decoded: --all-images decodes every one")
    if given.draw is not None:
        print(printable_text(_draw(found, given.draw, given.draw_images)))
    if given.fix is not None:
        print(printable_text(write_fixed(found, given.fix)))
        return 0
    return 2 if wrong else 0


def _draw(found: CocoData, out: str, most: int) -> str:
    """Draws the first pictures, those to train on first; gives a sentence. Raises BadRun."""
    from lambdanets.detection.gallery import draw_truth
    from lambdanets.detection.new_pictures import NewPictures

    pictures, unread, drawn = NewPictures(out), [], 0
    places = ((part, index) for part in (found.train, found.val) for index in range(len(part)))
    for images, index in itertools.islice(places, most):
        name = images.names[index]
        try:
            height, width = images.sizes[index].tolist()
            picture = images.load(index)
            if picture.size != (width, height):
                raise BadImage(name, f"is {picture.size} pixels, and {width} x {height} by its annotations")
        except (BadImage, DiskFault) as error:
            unread.append(str(error))
            continue
        pictures.save(draw_truth(images, index, picture), name)
        drawn += 1
    said = f"{drawn:,} {'picture is' if drawn == 1 else 'pictures are'} drawn to {out}"
    return "\n".join([said, *(f"not drawn: {why}" for why in unread)])
