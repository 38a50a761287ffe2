"""The pictures and files of a run that is done."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lambdanets.detection.coco import CocoImages
from lambdanets.detection.precision import detections_json
from lambdanets.detection.run import DETECTIONS
from lambdanets.detection.scores import Scores
from lambdanets.files import write_atomically


def write_pictures(folder: Path, record: dict[str, Any], scores: Scores, images: CocoImages) -> None:
    """detections.json, in COCO's result format."""
    write_atomically(folder / DETECTIONS, json.dumps(detections_json(images, scores.detected)).encode())
