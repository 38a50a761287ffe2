"""What detectors are to reach in speed and memory, and the verdict on what `benchmarks.detector` found."""

from __future__ import annotations

from typing import Any, NamedTuple

REFERENCE = "torchvision"


class Target(NamedTuple):
    """A line of specification: what, its bound (the most, or the least), the section, and what in it is looked at."""

    what: str
    bound: float
    most: bool
    section: str
    contender: str = ""
    reference: str = ""
    passes: tuple[str, ...] = ("inference", "training")
    px: int | None = None


TARGETS = [
    Target("visible against torchvision, whole detector, inference", 0.97, False, "whole", "resnet50_cccc visible",
           REFERENCE, ("inference",)),
    Target("visible against torchvision, whole detector, training", 0.97, False, "whole", "resnet50_cccc visible",
           REFERENCE, ("training",)),
    Target("masked, tight, against torchvision, whole detector, inference", 1.15, False, "whole",
           "resnet50_cccc masked", REFERENCE, ("inference",)),
    Target("masked, tight, against torchvision, body + FPN, inference", 1.25, False, "trunk", "resnet50_cccc masked",
           REFERENCE, ("inference",)),
    Target("masked, tight, against torchvision, body + FPN, training", 1.25, False, "trunk", "resnet50_cccc masked",
           REFERENCE, ("training",)),
    Target("the mask's share of time, body + FPN", 0.07, True, "trunk", "resnet50_cccc masked, square",
           "resnet50_cccc visible"),
    Target("the same, the multiplication folded into the ReLU", 0.04, True, "trunk", "resnet50_cccc masked, square",
           "resnet50_cccc visible"),
    Target("lambda_resnet101 against resnet101_d at 1024 px, whole, inference", 0.95, False, "whole",
           "lambda_resnet101 masked, square", "resnet101_d masked, square", ("inference",), 1024),
    Target("lambda_resnet101 against resnet101_d at 1024 px, whole, training", 0.95, False, "whole",
           "lambda_resnet101 masked, square", "resnet101_d masked, square", ("training",), 1024),
    Target("peak memory of a step, lambda_resnet50 in the square over torchvision's", 1.05, True, "memory",
           "lambda_resnet50 masked, square"),
    Target("MB beyond the model: 12 million pixels, 100 detections", 300, True, "outside", "picture_mb"),
    Target("ms of 100 detections at 640 x 480: paste, run lengths", 60, True, "outside", "paste_ms"),
    Target("loader images/s a core: jitter, 8 polygons, 1024 px", 12, False, "outside", "loader_images_per_s"),
    Target("s of average precision of 5,000 images: not measured here", 60, True, "elsewhere"),
    Target("s of make demo-detection: not measured here", 150, True, "elsewhere"),
]  # fmt: skip


def judged(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Each target beside the worst that was found, where, and whether that reaches it; None where it is not known."""
    out = []
    for t in TARGETS:
        found: list[tuple[float, str]] = []
        for row in result["rows"]:
            if row["section"] == t.section and row["pass"] in t.passes and t.px in (None, row["px"]):
                where = f"{row['px']} px b={row['batch']} {row['pass']}"
                found += [
                    (round(1 / r["ratio"] - 1, 3) if t.most else r["ratio"], where)
                    for r in row["ratios"]
                    if (r["contender"], r["reference"]) == (t.contender, t.reference)
                ]
        if t.section == "memory" and result.get("memory"):
            one = result["memory"]["contenders"].get(t.contender, {})
            found += [(one["ratio"], f"{result['memory']['px']} px")] if "ratio" in one else []
        if t.section == "outside" and t.contender in result.get("outside", {}):
            found.append((result["outside"][t.contender], ""))
        worst = (max if t.most else min)(found, default=(None, ""))
        reached = None if worst[0] is None else worst[0] <= t.bound if t.most else worst[0] >= t.bound
        out.append({"what": t.what, "target": f"{'<=' if t.most else '>='} {t.bound:g}", "found": worst[0],
                    "where": worst[1], "of": len(found), "reached": reached})  # fmt: skip
    return out


def table(targets: list[dict[str, Any]]) -> str:
    said = {True: "reached", False: "missed", None: "not measured"}
    rows = [("target", "", "found", "")]
    for t in targets:
        where = f" ({t['where']}{', the worst of ' + str(t['of']) if t['of'] > 1 else ''})" if t["where"] else ""
        found = "-" if t["found"] is None else f"{t['found']:g}{where}"
        rows.append((t["what"], t["target"], found, said[t["reached"]]))
    return "\n".join(f"{what:<72} | {bound:<7} | {found} | {verdict}" for what, bound, found, verdict in rows)
