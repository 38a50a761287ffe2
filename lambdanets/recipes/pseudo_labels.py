"""How labelled and pseudo-labelled pictures are mixed in a step, beside a recipe that says everything else."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from lambdanets.errors import BadRecipe

Labels = Literal["soft", "hard"]


@dataclass(frozen=True, kw_only=True)
class Mixture:
    """Both kinds in every batch; an epoch is a pass over the labelled pictures (Noisy Student's code).

        lambdanets train --recipe pareto --model lambda_resnet152 --image-px 288 --data IMAGENET --pseudo SELECTION

    The run of the paper's Table 5: 86.7% top-1, quoted, not measured here. Teacher (its authors': 88.4%), joint
    training and the recipe's values are the source's; a threshold of 0.3 and 130,000 draws a class are those of
    Noisy Student's script. R, since no source was found for them: ratio, labels, temperature; fine-tuning at a larger
    size.

    ratio        pseudo-labelled pictures per labelled one (R; Noisy Student 1 to 3, 14 for its largest)
    labels       "soft": the teacher's probabilities, of the classes that were kept; the rest is spread evenly over
                 the others. "hard": the class of the selection, smoothed as true labels are
    temperature  of soft ones: p^(1 / temperature), divided by the sum (R; Noisy Student 1)

    `batch_images` of the recipe counts both kinds, and the learning rate follows it. With SGD the steps are those of
    Noisy Student, which divides both sums by the labelled pictures and takes the rate of these, but for weight decay:
    it is 1 + ratio times stronger here, and no second rule is offered.

    >>> Mixture().labelled(4096), Mixture(ratio=14).labelled(4096)
    (2048, 273)
    >>> 1_281_167 // Mixture().labelled(4096)  # steps of an epoch, a pass over ImageNet
    625
    """

    ratio: float = 1.0
    labels: Labels = "soft"
    temperature: float = 1.0

    def __post_init__(self) -> None:
        for name in ("ratio", "temperature"):
            value = getattr(self, name)
            if not (math.isfinite(value) and 1e-3 <= value <= 1e3):
                raise BadRecipe(f"pseudo_{name} must be in 0.001 to 1,000, not {value}")
        if self.labels not in get_args(Labels):
            raise BadRecipe(f"pseudo_labels must be 'soft' or 'hard', not {self.labels!r}")
        if self.labels == "hard" and self.temperature != 1:
            raise BadRecipe(f"pseudo_temperature is {self.temperature}, but hard labels have none: leave it out")

    def labelled(self, batch_images: int) -> int:
        """Labelled pictures in a batch: round(batch_images / (1 + ratio)), and one of each kind at least."""
        if batch_images < 2:
            raise BadRecipe(f"batch_images is {batch_images}: a batch of both kinds of pictures has two at least")
        return min(max(1, round(batch_images / (1 + self.ratio))), batch_images - 1)

    def fits(self, images: int) -> int:
        """The largest batch_images whose labelled part is at most so many; 1 where none is."""
        size = int((images + 0.5) * (1 + self.ratio)) + 2
        while size > 1 and self.labelled(size) > images:
            size -= 1
        return size
