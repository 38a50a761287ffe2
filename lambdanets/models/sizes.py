"""The table of sizes: one row a model (docs/paper.md section 2)."""

from dataclasses import dataclass, field, replace
from typing import Any

# What a letter puts in the place of a bottleneck's 3x3 convolution. "I" stays free: timm has a resnet50_clip.
LETTERS = {
    "A": "augmented convolution",
    "C": "convolution",
    "D": "depthwise convolution of a large kernel",
    "E": "efficient (linear) attention",
    "G": "global attention",
    "L": "lambda layer",
    "P": "convolution with the lambda layer's pooling",
    "R": "local relative attention",
    "X": "axial attention",
}


@dataclass(frozen=True)
class Size:
    """One row of the table of sizes.

    blocks       blocks in c2..c5
    lambdas      for each stage a letter of LETTERS ("C" convolutions, "L" lambda layers, or a counterpart of the lambda
                 layer), or the 1-based blocks that are lambda layers
    stem         "plain" (7x7, max pool), "deep" (ResNet-D: three 3x3, then a strided 3x3), "small" (one 3x3, no stride)
    deep_shortcut   ResNet-D: 2x2 average pooling before the shortcut's 1x1, instead of a strided 1x1
    se_stages, se_ratio   "S" for stages with squeeze-and-excitation, its width as a fraction of the block's output; "2"
                 for stages with double attention in its place
    width        channels inside c2's blocks; doubles every stage
    lambda_args  arguments of `LambdaLayer` other than its defaults
    """

    blocks: tuple[int, int, int, int]
    lambdas: tuple[str | tuple[int, ...], ...]
    stem: str = "deep"
    deep_shortcut: bool = True
    se_stages: str = "SS--"
    se_ratio: float = 0.25
    width: int = 64
    lambda_args: dict[str, Any] = field(default_factory=dict)

    @staticmethod
    def hybrid(word: str, **changes: Any) -> "Size":
        """ResNet-50 of Table 12: plain stem, no SE, v1.5 blocks; a letter of LETTERS for each stage."""
        row = Size((3, 4, 6, 3), tuple(word.upper()), "plain", deep_shortcut=False, se_stages="----")
        return replace(row, **changes)


def _every(step: int, last: int) -> tuple[int, ...]:
    return tuple(range(step, last + 1, step))


# docs/paper.md section 2. Which blocks of c4 are lambda layers is unconfirmed, how many is known by counting.
SIZES: dict[str, Size] = {
    "lambda_resnet50": Size((3, 4, 6, 3), ("C", "C", (3,), "L")),
    "lambda_resnet101": Size((3, 4, 23, 3), ("C", "C", _every(6, 18), "L")),
    "lambda_resnet152": Size((3, 8, 36, 3), ("C", "C", _every(5, 30), "L")),
    "lambda_resnet200": Size((3, 24, 36, 3), ("C", "C", _every(5, 30), "L")),
    "lambda_resnet270": Size((4, 29, 53, 4), ("C", "C", _every(8, 48), "L")),
    "lambda_resnet350": Size((4, 36, 72, 4), ("C", "C", _every(10, 60), "L")),
    "lambda_resnet420": Size((4, 44, 87, 4), ("C", "C", _every(10, 80), "L")),
    "lambda_resnet101_c4": Size((3, 4, 23, 3), tuple("CCLL")),
    "lambda_resnet152_c4": Size((3, 8, 36, 3), tuple("CCLL")),
    "lambda_resnet200_c4": Size((3, 24, 36, 3), tuple("CCLL")),
    "resnet50_se": Size.hybrid("CCCC", se_stages="SSSS", se_ratio=1 / 16),
    "resnet50_llll_u4": Size.hybrid("LLLL", lambda_args={"intra_depth": 4, "scope": 7}),
    # The counterparts of Tables 3 and 4; any other word of LETTERS is a model as well (`create_model`).
    "resnet50_double_attention": Size.hybrid("CCCC", se_stages="-22-"),
    "resnet50_caaa": Size.hybrid("CAAA"),
    "resnet50_rrrr": Size.hybrid("RRRR"),
    "resnet50_xxxx": Size.hybrid("XXXX"),
    "resnet50_gggg": Size.hybrid("GGGG"),
    "resnet50_eeee": Size.hybrid("EEEE"),
    # Controls, ours: the lambda layer's reach without its queries, and its places without them.
    "resnet50_dddd": Size.hybrid("DDDD"),
    "resnet50_pppp": Size.hybrid("PPPP"),
    # The convolutional counterparts of Table 6, by their counts ResNet-D (timm has other models called resnet101).
    "resnet101_d": Size((3, 4, 23, 3), tuple("CCCC"), se_stages="----"),
    "resnet101_d_se": Size((3, 4, 23, 3), tuple("CCCC"), se_stages="SSSS"),
    "resnet152_d": Size((3, 8, 36, 3), tuple("CCCC"), se_stages="----"),
    "resnet152_d_se": Size((3, 8, 36, 3), tuple("CCCC"), se_stages="SSSS"),
    # Ours, the body of a detector that a CPU trains.
    "lambda_resnet_small": Size((1, 1, 2, 1), tuple("CCLL"), se_stages="----", width=32),
    # Ours, for images of 8 to 64 pixels and for tests: the same block, a stem without stride.
    "lambda_resnet_tiny": Size(
        (1, 1, 1, 1), tuple("CLLL"), "small", se_stages="----", width=16, lambda_args={"scope": 15, "key_depth": 8}
    ),
}
for _word in ("".join("CL"[i >> s & 1] for s in range(4)) for i in range(16)):
    SIZES[f"resnet50_{_word.lower()}"] = Size.hybrid(_word)
