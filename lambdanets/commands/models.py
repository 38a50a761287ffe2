"""`lambdanets models`."""

from __future__ import annotations

from jsonargparse import ArgumentParser, Namespace


def parser() -> ArgumentParser:
    parser = ArgumentParser(description="Every model: parameters, those of a detector of 80 classes on it, GFLOPs.")
    return parser


def run(given: Namespace) -> int:
    import torch

    from lambdanets.detection.detector import create_detector
    from lambdanets.models.cost import models_text

    def detector_params(name: str) -> int:
        with torch.device("meta"):
            return sum(p.numel() for p in create_detector(name, classes=80).parameters())

    print(models_text(detector_params=detector_params))
    return 0
