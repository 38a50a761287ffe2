"""The pictures and files of a run that is done."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lambdanets.detection.coco import CocoImages
from lambdanets.detection.run import DETECTIONS
from lambdanets.detection.scores import Scores, write_detections


def write_pictures(folder: Path, record: dict[str, Any], scores: Scores, images: CocoImages) -> None:
    """detections.json, in COCO's result format."""
    write_detections(folder / DETECTIONS, images, scores.detected)
