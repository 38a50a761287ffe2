"""Prints the paper's tables, and beside each row what was counted here, what was measured, and what is only quoted.

    python -m benchmarks.tables             seconds: nothing is run but shapes, on PyTorch's meta device
    python -m benchmarks.tables --write     the same, and into docs/evidence.md

Each number that the paper prints has one state. Counted and equal: parameters, multiply-adds or bytes that are counted
here agree with all the digits that it prints. Counted and different: they do not, and the last line names them.
Measured: a speed, on another machine than the paper's, from a file of benchmarks/results; nothing follows about the
paper's own number. Quoted only: everything else, all accuracies among it.
"""

import argparse
import functools
import json
import re
import sys
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from torch.overrides import TorchFunctionMode

import lambdanets
from lambdanets import paper
from lambdanets.paper import TABLES, Quantity, Table

RESULTS = Path(__file__).parent / "results"
PAGE = Path(__file__).parents[1] / "docs" / "evidence.md"
BEGIN, END = "<!-- python -m benchmarks.tables --write: from here -->", "<!-- to here -->"

EQUAL, DIFFERENT, MEASURED, QUOTED = "counted and equal", "counted and different", "measured", "quoted only"
STATES = (EQUAL, DIFFERENT, MEASURED, QUOTED)

Place = tuple[str, str, str]  # table, row, quantity


class Count(NamedTuple):
    """A number counted here, in the paper's unit, and as it is shown."""

    value: float
    text: str


class Row(NamedTuple):
    """A row of a table, its cells as they are shown, and the state of each number that the paper prints in it."""

    name: str
    quoted: str
    counted: str
    measured: str
    states: dict[str, str]


# --- counted ---------------------------------------------------------------------------------------------------------

LAYERS = dict(
    zip(
        paper.TABLE3.rows,
        ("resnet50_cccc", "resnet50_se", "resnet50_double_attention", "resnet50_eeee", "resnet50_caaa", "resnet50_rrrr",
         None, None, "resnet50_llll", "resnet50_llll_u4"),
        strict=True,
    )
)  # fmt: skip
"""Table 3's rows as models. LR-Net (Hu 2019) and SAN (Zhao 2020) are other networks, no layer in place of a 3x3."""

STUDY = dict(
    zip(
        paper.C4.rows,
        ("resnet101_d", "resnet101_d_se", "lambda_resnet101", "lambda_resnet101_c4", "resnet152_d", "resnet152_d_se",
         "lambda_resnet152", "lambda_resnet152_c4"),
        strict=True,
    )
)  # fmt: skip

EXTRA = dict(zip(paper.TABLE5.rows, ("lambda_resnet152", "efficientnet_b7", "vit_large_patch16_384"), strict=True))


class _Unfilled(TorchFunctionMode):
    """First weights are not drawn: on the meta device that takes most of a model's time, and there are none."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in ("normal_", "uniform_", "trunc_normal_", "kaiming_uniform_"):
            return args[0] if args else (kwargs or {})["tensor"]
        return func(*args, **(kwargs or {}))


@functools.cache
def _model(name: str, **lambda_args: Any) -> torch.nn.Module:
    with torch.device("meta"), _Unfilled():
        if not name.startswith(("resnet50_", "resnet101_", "resnet152_", "lambda_")):
            return timm.create_model(name)
        return lambdanets.create_model(name, lambda_args=lambda_args or None)


def parameters(name: str, **lambda_args: Any) -> Count:
    """The parameters of a model of ours or of timm's, in millions."""
    count = sum(p.numel() for p in _model(name, **lambda_args).parameters())
    return Count(count / 1e6, f"{count:,}")


@functools.cache
def gflops(name: str, **lambda_args: Any) -> Count:
    """Twice the multiply-adds of one image of 224 px, by the paper's convention (docs/paper.md section 3)."""
    value = 2e-9 * sum(stage.macs for stage in lambdanets.model_cost(_model(name, **lambda_args), 224))
    return Count(value, f"{value:.2f}")


def map_gigabytes(numbers_a_pair: float, contexts: int = 56 * 56) -> Count:
    """The maps of c2's three layers, of float32: so many numbers for each of 56² queries and each of its contexts."""
    value = 4 * 3 * numbers_a_pair * 56 * 56 * contexts / 1e9
    return Count(value, f"{value:.3g} GB")


def counted() -> dict[Place, Count]:
    """Every number of the paper's that can be counted, as it is counted here."""
    found: dict[Place, Count] = {}
    for table, models in ((paper.TABLE3, LAYERS), (paper.C4, STUDY), (paper.TABLE5, EXTRA)):
        found |= {(table.name, row, "parameters"): parameters(name) for row, name in models.items() if name}
    # The attention of 8 heads is one map for each image of the batch of 128; E has k numbers a pair, and no batch.
    heads, batch, k = 8, 128, 16
    found |= {
        (paper.TABLE4.name, row, "memory"): count
        for row, count in {
            "global self-attention (out of memory)": map_gigabytes(batch * heads),
            "axial self-attention": map_gigabytes(batch * heads, contexts=56 + 56),
            "lambda layers": map_gigabytes(k),
            "lambda layers, k = 8": map_gigabytes(8),
            "lambda layers, shared tables": map_gigabytes(k / 3),
        }.items()
    }
    for word in paper.TABLE12.rows:
        found[paper.TABLE12.name, word, "parameters"] = parameters(f"resnet50_{word.lower()}")
    for row in paper.KEY_DEPTH_HEADS_INTRA.rows:
        key_depth, heads, intra_depth = map(int, re.findall(r"\d+", row))
        given = {
            "key_depth": key_depth,
            "heads": heads,
            "intra_depth": intra_depth,
            "scope": 23 if intra_depth == 1 else 7,
        }
        found[paper.KEY_DEPTH_HEADS_INTRA.name, row, "parameters"] = parameters("resnet50_llll", **given)
    for row in paper.SCOPE.rows:
        scope = 2 * 56 - 1 if row == "global" else int(row.removeprefix("scope "))
        found[paper.SCOPE.name, row, "GFLOPs"] = gflops("resnet50_clll", scope=scope)
    for row, parts in (("content only", {"position": False}), ("position only", {"content": False}),
                       ("content and position", {})):  # fmt: skip
        found[paper.CONTENT_POSITION.name, row, "GFLOPs"] = gflops("resnet50_llll", **parts)
    return found


def besides() -> dict[tuple[str, str], str]:
    """What is counted for a row though the paper prints no such number there."""
    found = {(paper.TABLE3.name, row): f"{gflops(name).text} GFLOPs" for row, name in LAYERS.items() if name}
    found |= {
        (paper.TABLE12.name, word): f"{gflops(f'resnet50_{word.lower()}').text} GFLOPs" for word in paper.TABLE12.rows
    }
    names = {
        "global self-attention (out of memory)": "resnet50_gggg",
        "axial self-attention": "resnet50_xxxx",
        "local self-attention, 7x7": "resnet50_rrrr",
        "lambda layers": "resnet50_llll",
    }
    for row, name in names.items():
        found[paper.TABLE4.name, row] = f"{parameters(name).text} parameters, {gflops(name).text} GFLOPs"
    return found


# --- measured --------------------------------------------------------------------------------------------------------


def _read(results: Path, name: str) -> dict[str, Any]:
    result: dict[str, Any] = json.loads((results / name).read_text())
    return result


def _rates(result: dict[str, Any], table: str, one_pass: str) -> dict[str, float]:
    """Images a second of each "model at px" of a result of `benchmarks.model`, in float32."""
    wanted = (table, "float32", one_pass)
    rows = [row for row in result["rows"] if (row["table"], row["dtype"], row["pass"]) == wanted]
    return {name: model["images_per_s"] for row in rows for name, model in row["models"].items()}


HYBRIDS, PAIRS = ("table12-cpu.json", "table12-cpu-amd.json"), "pairs-cpu.json"


def measured(results: Path = RESULTS) -> dict[Place, str]:
    """What lies in benchmarks/results about a number of the paper's, as it is shown."""
    found: dict[Place, str] = {}
    texts: dict[str, list[str]] = {}
    for name in HYBRIDS:
        rates = _rates(_read(results, name), "table12", "training")
        base = rates["resnet50_cccc at 224"]
        for model, rate in rates.items():
            word = model.removeprefix("resnet50_").removesuffix(" at 224").upper()
            texts.setdefault(word, []).append(f"{rate:.2f} images/s, {rate / base:.2f} of CCCC's ({name})")
    for word, text in texts.items():
        own = (paper.TABLE12.of(word, "speed") or 0) / (paper.TABLE12.of("CCCC", "speed") or 1)
        found[paper.TABLE12.name, word, "speed"] = f"a training step: {'; '.join(text)}; the paper's {own:.2f}"
    found[paper.TABLE4.name, "lambda layers", "speed"] = "as LLLL of Table 12"
    pairs = _read(results, PAIRS)
    for one_pass in ("training", "inference"):
        rates = _rates(pairs, "table5", one_pass)
        for row, model in EXTRA.items():
            rate = next(rate for name, rate in rates.items() if name.startswith(f"{model} at "))
            found[paper.TABLE5.name, row, one_pass] = f"{one_pass}: {rate:.2f} images/s ({PAIRS})"
    figure = TABLES[-1]
    for name, rate in _rates(pairs, "figure", "training").items():
        found[figure.name, f"{name} px", "step"] = f"{1024 / rate:,.0f} s ({PAIRS})"
    return found


def machines(results: Path = RESULTS) -> str:
    """A line for each file that is quoted: on which machine, at which commit, how."""
    lines = []
    for name in (*HYBRIDS, PAIRS):
        result = _read(results, name)
        about = result["machine"]
        batches = sorted({row["batch"] for row in result["rows"] if row["dtype"] == "float32"})
        lines.append(
            f"- `benchmarks/results/{name}`: {about['device']}, {about['threads']} threads, commit {about['commit']}, "
            f"float32, batch {', '.join(map(str, batches))}."
        )
    return "\n".join(lines)


# --- the tables ------------------------------------------------------------------------------------------------------


def agrees(quantity: Quantity, quoted: float, found: float) -> bool:
    """Whether a count has all the digits that the paper prints; those of a memory are two."""
    if quantity.unit == "GB":
        return f"{found:.2g}" == f"{quoted:.2g}"
    return round(found, quantity.decimals) == round(quoted, quantity.decimals)


def shown(quantity: Quantity, value: float) -> str:
    digitised = quantity.unit in ("GB", "s") or (quantity.unit == "%" and quantity.decimals > 1)  # as many as there are
    number = f"{value:g}" if digitised else f"{value:,.{quantity.decimals}f}"
    return f"{quantity.name} {number}" + {"": "", "%": "%"}.get(quantity.unit, f" {quantity.unit}")


def rows(
    table: Table, counts: dict[Place, Count], times: dict[Place, str], more: dict[tuple[str, str], str]
) -> list[Row]:
    found = []
    for name, values in table.rows.items():
        quoted, own, speeds, states = [], [], [], {}
        for quantity, value in zip(table.quantities, values, strict=True):
            place = (table.name, name, quantity.name)
            if place in counts:
                own.append(f"{quantity.name} {counts[place].text}")
            if place in times:
                speeds.append(times[place])
            if value is None:
                continue
            quoted.append(shown(quantity, value))
            states[quantity.name] = QUOTED
            if place in counts:
                states[quantity.name] = EQUAL if agrees(quantity, value, counts[place].value) else DIFFERENT
            elif place in times:
                states[quantity.name] = MEASURED
        own += [more[table.name, name]] if (table.name, name) in more else []
        found.append(Row(name, " · ".join(quoted), " · ".join(own), " · ".join(speeds), states))
    return found


def _state(states: dict[str, str]) -> str:
    """Each state with its quantities, where a row has several."""
    if len(set(states.values())) == 1:
        return next(iter(states.values()))
    named = {state: [name for name, own in states.items() if own == state] for state in STATES}
    return " · ".join(f"{', '.join(names)} {state}" for state, names in named.items() if names)


def text(results: Path = RESULTS) -> str:
    """All tables as Markdown, what was measured where, and the last line: how many numbers of each state."""
    counts, times, more = counted(), measured(results), besides()
    blocks, every, different = [], Counter[str](), []
    lines_of = {table.name: rows(table, counts, times, more) for table in TABLES}
    for table in TABLES:
        marks = {quantity.mark for quantity in table.quantities}
        mark = next(iter(marks)) if len(marks) == 1 else ", ".join(f"{q.name} {q.mark}" for q in table.quantities)
        lines = [f"### {table.name}: {table.title}", "", f"Marks: {mark}.", ""]
        lines += ["| row | quoted | counted here | measured here | state |", "|---|---|---|---|---|"]
        for row in lines_of[table.name]:
            cells = (row.name, row.quoted, row.counted or "–", row.measured or "–", _state(row.states))
            lines.append(f"| {' | '.join(cells)} |")
            every.update(row.states.values())
            different += [
                f"{table.name}, {row.name}: {counts[table.name, row.name, name].text} for {shown(quantity, value)}"
                for quantity, value in zip(table.quantities, table.rows[row.name], strict=True)
                for name in [quantity.name]
                if row.states.get(name) == DIFFERENT and value is not None
            ]
        blocks.append("\n".join(lines))
    listed = [row for found in lines_of.values() for row in found]
    quoted_alone = sum(set(row.states.values()) == {QUOTED} for row in listed)
    blocks.append("### Where it was measured\n\n" + machines(results))
    blocks.append("### Counted and different\n\n" + "\n".join(f"- {line}" for line in different))
    blocks.append(
        f"{sum(every.values())} numbers in {len(listed)} rows: {every[EQUAL]} counted and equal, {every[DIFFERENT]} "
        f"counted and different, {every[MEASURED]} measured on another machine, {every[QUOTED]} quoted only; "
        f"{quoted_alone} rows are quoted only."
    )
    return "\n\n".join(blocks)


def on_page(page: str, tables: str) -> str:
    """The page with these tables between its markers. Raises ValueError where it has not one pair of them."""
    if page.count(BEGIN) != 1 or page.count(END) != 1 or page.index(BEGIN) > page.index(END):
        raise ValueError(f"the page must have {BEGIN!r} once, and {END!r} once after it")
    before, rest = page.split(BEGIN)
    return f"{before}{BEGIN}\n\n{tables}\n\n{END}{rest.split(END)[1]}"


def main(given: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tables", description=__doc__.split("\n")[0])
    parser.add_argument("--write", action="store_true", help="write the tables into docs/evidence.md as well")
    asked = parser.parse_args(given)
    tables = text()
    if asked.write:
        PAGE.write_text(on_page(PAGE.read_text(), tables))
    print(tables)


if __name__ == "__main__":
    main(sys.argv[1:])
