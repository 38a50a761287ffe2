"""The numbers that the paper prints, once: its tables, its ablations, the points of its speed-accuracy figure.

Bello, *LambdaNetworks*, ICLR 2021. Nothing here was measured by us: `python -m benchmarks.tables` prints what was
counted and measured beside each row, and docs/evidence.md has it. A number's mark says how it is known (docs/paper.md):
CONFIRMED was read in the paper or agrees exactly with counting, REPORTED is second-hand, UNCONFIRMED is remembered.
"""

from dataclasses import dataclass
from typing import NamedTuple

CONFIRMED, REPORTED, UNCONFIRMED = "confirmed", "reported", "unconfirmed"


class Quantity(NamedTuple):
    """A column of a table: its name, unit, how many decimals the paper prints, and its mark."""

    name: str
    unit: str
    decimals: int
    mark: str = CONFIRMED


@dataclass(frozen=True)
class Table:
    """A table of the paper: `rows` has each row's numbers, in the order of `quantities`, None where none is given.

    >>> TABLE3.of("lambda layers", "top-1")
    78.4
    """

    name: str
    title: str
    quantities: tuple[Quantity, ...]
    rows: dict[str, tuple[float | None, ...]]

    def of(self, row: str, quantity: str) -> float | None:
        """One number. Raises KeyError for a row or a quantity that the table has not."""
        names = [q.name for q in self.quantities]
        if quantity not in names:
            raise KeyError(quantity)
        return self.rows[row][names.index(quantity)]


PARAMETERS = Quantity("parameters", "M", 1)
TOP1 = Quantity("top-1", "%", 1)
UNCONFIRMED_TOP1 = TOP1._replace(mark=UNCONFIRMED)
GFLOPS = Quantity("GFLOPs", "", 1)
RATE = Quantity("speed", "examples/s", 0)

TABLE3 = Table(
    "Table 3",
    "ResNet-50 with each kind of layer, ImageNet at 224 px, 90 epochs",
    (PARAMETERS, TOP1),
    {
        "3x3 convolution": (25.6, 76.9),
        "squeeze-and-excitation, Hu 2018": (28.1, 77.6),
        "linear attention, Chen 2018": (33.0, 77.0),
        "linear attention, Shen 2018": (None, 77.3),
        "convolution + relative self-attention, Bello 2019": (25.8, 77.7),
        "local relative self-attention, Ramachandran 2019": (18.0, 77.4),
        "local relative self-attention, Hu 2019": (23.3, 77.3),
        "local relative self-attention, Zhao 2020": (20.5, 78.2),
        "lambda layers": (15.0, 78.4),
        "lambda layers, u = 4": (16.0, 78.9),
    },
)

# The memory is that of the maps of c2's layers, of float32, at a batch of 128.
TABLE4 = Table(
    "Table 4",
    "memory and speed of ResNet-50 with each kind of layer",
    (Quantity("memory", "GB", 2), RATE, TOP1),
    {
        "global self-attention (out of memory)": (120, None, None),
        "axial self-attention": (4.8, 960, 77.5),
        "local self-attention, 7x7": (None, 440, 77.4),
        "lambda layers": (1.9, 1160, 78.4),
        "lambda layers, k = 8": (0.95, 1640, 77.9),
        "lambda layers, shared tables": (0.63, 1210, 78.0),
        "lambda convolution, 7x7": (None, 1100, 78.1),
    },
)

TABLE5 = Table(
    "Table 5",
    "training with extra pseudo-labelled images",
    (
        Quantity("parameters", "M", 0, REPORTED),
        Quantity("training", "examples/s", 0, REPORTED),
        Quantity("inference", "examples/s", 0, REPORTED),
        Quantity("top-1", "%", 1, REPORTED),
    ),
    {
        "LambdaResNet-152 at 288 px": (51, 1620, 6100, 86.7),
        "EfficientNet-B7, Noisy Student, at 600 px": (66, 170, 980, 86.7),
        "ViT-L/16 at 384 px": (307, 180, 640, 87.1),
    },
)

TABLE6 = Table(
    "Table 6",
    "Mask R-CNN on COCO at 1,024 px: average precision of boxes and masks, and by size",
    tuple(
        Quantity(f"{what} AP{size}", "", 1) for what in ("box", "mask") for size in ("", " small", " medium", " large")
    ),
    {
        "ResNet-101": (48.2, 29.9, 50.9, 64.9, 42.6, 24.2, 45.6, 60.0),
        "ResNet-101 with SE": (48.5, None, None, None, 42.8, None, None, None),
        "LambdaResNet-101": (49.4, 31.7, 52.2, 65.6, 43.5, 25.9, 46.5, 60.8),
        "ResNet-152": (48.9, None, None, None, 43.2, None, None, None),
        "ResNet-152 with SE": (49.4, None, None, None, 43.5, None, None, None),
        "LambdaResNet-152": (50.0, 31.8, 53.4, 67.0, 43.9, 25.5, 47.3, 62.0),
    },
)

TABLE12 = Table(
    "Table 12",
    "hybrids of ResNet-50 at 224 px: convolutions or lambda layers in c2 to c5",
    (PARAMETERS, RATE, TOP1),
    {
        "CCCC": (25.6, 7240, 76.9),
        "LCCC": (25.5, 1880, 77.3),
        "LLCC": (25.0, 1280, 77.2),
        "LLLC": (21.7, 1160, 77.8),
        "LLLL": (15.0, 1160, 78.4),
        "CLLL": (15.1, 2200, 78.3),
        "CCLL": (15.4, 4980, 78.3),
        "CCCL": (18.8, 7160, 77.3),
    },
)

KEY_DEPTH_HEADS_INTRA = Table(
    "Ablation of k, h and u",
    "ResNet-50 LLLL",
    (Quantity("parameters", "M", 2),),
    {
        "k = 2, h = 4, u = 1": (14.61,),
        "k = 4, h = 4, u = 1": (14.67,),
        "k = 8, h = 4, u = 1": (14.78,),
        "k = 16, h = 4, u = 1": (15.00,),
        "k = 32, h = 4, u = 1": (15.44,),
        "k = 8, h = 8, u = 1": (14.74,),
        "k = 16, h = 8, u = 1": (15.08,),
        "k = 32, h = 8, u = 1": (15.76,),
        "k = 8, h = 8, u = 4": (15.26,),
        "k = 8, h = 8, u = 8": (16.04,),
        "k = 16, h = 4, u = 4": (16.04,),
    },
)

SCOPE = Table(
    "Ablation of the scope",
    "ResNet-50 CLLL at 224 px",
    (GFLOPS, UNCONFIRMED_TOP1),
    {
        "scope 3": (5.7, 77.6),
        "scope 7": (6.1, 78.2),
        "scope 15": (7.8, 78.5),
        "scope 23": (10.0, 78.3),
        "scope 31": (12.4, 78.5),
        "global": (19.4, 78.4),
    },
)

CONTENT_POSITION = Table(
    "Ablation of content and position",
    "ResNet-50 LLLL at 224 px",
    (GFLOPS, TOP1),
    {
        "content only": (5.0, 68.8),
        "position only": (11.9, 78.1),
        "content and position": (12.0, 78.4),
    },
)

NORMALISATION = Table(
    "Ablation of the normalisation",
    "ResNet-50 LLLL at 224 px",
    (UNCONFIRMED_TOP1,),
    {
        "softmax on keys": (78.4,),
        "softmax on keys and queries": (78.1,),
        "L2 norm on keys": (78.0,),
        "no normalisation of keys": (70.0,),
        "no batch norm on queries and values": (76.2,),
    },
)

C4 = Table(
    "Study of c4",
    "lambda layers in some or in all blocks of c4",
    (PARAMETERS,),
    {
        "ResNet-101": (44.6,),
        "ResNet-101 with SE": (63.6,),
        "LambdaResNet-101": (36.9,),
        "LambdaResNet-101-C4": (26.0,),
        "ResNet-152": (60.2,),
        "ResNet-152 with SE": (86.6,),
        "LambdaResNet-152": (51.4,),
        "LambdaResNet-152-C4": (35.1,),
    },
)


class Point(NamedTuple):
    """A point of the speed-accuracy figure, digitised: a model by its name here or in timm, the side of its images,
    seconds a training step of 1,024 images on 8 TPUv3 cores, top-1 in percent."""

    model: str
    image_px: int
    step_s: float
    top1: float


FIGURE = (
    Point("lambda_resnet50", 128, 0.058, 77.4),
    Point("lambda_resnet50", 160, 0.089, 79.2),
    Point("lambda_resnet101", 160, 0.14, 80.8),
    Point("lambda_resnet101", 192, 0.20, 81.9),
    Point("lambda_resnet152", 192, 0.28, 82.5),
    Point("lambda_resnet152", 224, 0.38, 83.2),
    Point("lambda_resnet152", 256, 0.49, 83.8),
    Point("lambda_resnet270", 256, 0.91, 84.2),
    Point("lambda_resnet350", 256, 1.16, 84.4),
    Point("lambda_resnet350", 288, 1.48, 84.5),
    Point("lambda_resnet350", 320, 1.91, 84.7),
    Point("lambda_resnet420", 320, 2.25, 84.85),
    Point("efficientnet_b0", 224, 0.09, 77.1),
    Point("efficientnet_b1", 240, 0.15, 79.1),
    Point("efficientnet_b2", 260, 0.21, 80.1),
    Point("efficientnet_b3", 300, 0.34, 81.6),
    Point("efficientnet_b4", 380, 0.71, 82.9),
    Point("efficientnet_b5", 456, 1.51, 83.7),
    Point("efficientnet_b6", 528, 3.01, 84.0),
    Point("efficientnet_b7", 600, 6.02, 84.7),
)
"""LambdaResNets first, by seconds, then EfficientNets."""

PRINTED_SPEEDUPS = {"efficientnet_b6": 4.4, "efficientnet_b7": 3.2}
"""How many times faster LambdaResNets reach the accuracy of an EfficientNet in training, as the paper prints it."""

_POINTS = Table(
    "Speed-accuracy figure",
    "seconds a training step of 1,024 images on 8 TPUv3 cores, and top-1; digitised",
    (Quantity("step", "s", 3), Quantity("top-1", "%", 2)),
    {f"{point.model} at {point.image_px} px": (point.step_s, point.top1) for point in FIGURE},
)

TABLES = (
    TABLE3, TABLE4, TABLE5, TABLE6, TABLE12, KEY_DEPTH_HEADS_INTRA, SCOPE, CONTENT_POSITION, NORMALISATION, C4, _POINTS,
)  # fmt: skip
"""Every table, the figure's points as the last."""
