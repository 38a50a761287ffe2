"""The paper's tables beside what was counted and measured: no number without a state, and a page that says the same."""

import json
import re
import shutil
from pathlib import Path

import pytest

from benchmarks import model, tables
from lambdanets import paper
from lambdanets.recipes.imagenet import PARETO

PAGE = tables.PAGE.read_text()


@pytest.fixture(scope="module")
def counts() -> dict:
    return tables.counted()


@pytest.fixture(scope="module")
def text() -> str:
    return tables.text()


def test_the_page_has_what_the_command_prints(text: str, capsys, monkeypatch) -> None:
    assert tables.on_page(PAGE, text) == PAGE, "run python -m benchmarks.tables --write"
    monkeypatch.setattr(tables, "text", lambda: text)
    tables.main([])
    assert capsys.readouterr().out == text + "\n"


def test_the_last_line_counts_every_number_that_the_paper_prints_once(text: str) -> None:
    numbers = sum(value is not None for table in paper.TABLES for values in table.rows.values() for value in values)
    rows = sum(len(table.rows) for table in paper.TABLES)
    last = list(map(int, re.findall(r"\d+", text.rsplit("\n", 1)[-1])))
    assert last[:2] == [numbers, rows]
    assert sum(last[2:6]) == numbers
    assert last[3] == text.split("### Counted and different")[1].count("\n- ") == 5


def test_what_is_counted_is_a_number_of_the_papers_or_said_to_be_none(counts: dict) -> None:
    rows = {(table.name, row, q.name) for table in paper.TABLES for row in table.rows for q in table.quantities}
    assert set(counts) <= rows
    assert set(tables.measured()) <= rows
    assert {place[:2] for place in tables.besides()} <= {place[:2] for place in rows}


def test_the_five_counts_that_differ_from_the_papers_are_these_and_all_others_agree(counts: dict) -> None:
    different = set()
    for table in paper.TABLES:
        for row, values in table.rows.items():
            for quantity, value in zip(table.quantities, values, strict=True):
                found = counts.get((table.name, row, quantity.name))
                if found is not None and value is not None and not tables.agrees(quantity, value, found.value):
                    different.add((table.name, row, value, found.text))
    assert different == {
        ("Table 3", "linear attention, Chen 2018", 33.0, "32,927,784"),
        ("Table 4", "axial self-attention", 4.8, "4.32 GB"),
        ("Table 4", "lambda layers, k = 8", 0.95, "0.944 GB"),
        ("Table 5", "ViT-L/16 at 384 px", 307, "304,715,752"),
        ("Table 12", "CCLL", 15.4, "15,559,736"),
    }


def test_accuracies_are_never_more_than_quoted(text: str) -> None:
    for table in paper.TABLES:
        for row in tables.rows(table, tables.counted(), tables.measured(), tables.besides()):
            assert all(state == tables.QUOTED for name, state in row.states.items() if "top-1" in name or "AP" in name)
    assert "top-1 measured" not in text


def test_a_speed_is_the_files_and_another_file_gives_another(tmp_path: Path) -> None:
    results = tmp_path / "results"
    shutil.copytree(tables.RESULTS, results)
    before = tables.measured(results)
    assert before == tables.measured()
    path = results / "table12-cpu.json"
    result = json.loads(path.read_text())
    (row,) = [r for r in result["rows"] if (r["dtype"], r["pass"]) == ("float32", "training")]
    base, own = (row["models"][f"resnet50_{word} at 224"] for word in ("cccc", "llll"))
    assert f"{own['images_per_s']:.2f} images/s, {own['images_per_s'] / base['images_per_s']:.2f} of CCCC's" in str(
        before
    )
    own["images_per_s"] = 3.21
    path.write_text(json.dumps(result))
    changed = {place for place, shown in tables.measured(results).items() if shown != before[place]}
    assert changed == {("Table 12", "LLLL", "speed")}
    assert "3.21 images/s" in tables.measured(results)["Table 12", "LLLL", "speed"]


def test_agreement_is_to_the_digits_that_are_printed() -> None:
    millions, memory = paper.Quantity("parameters", "M", 1), paper.Quantity("memory", "GB", 2)
    assert tables.agrees(millions, 25.0, 24.992888)
    assert not tables.agrees(millions, 25.0, 24.94)
    assert tables.agrees(memory, 120, 120.8)
    assert not tables.agrees(memory, 0.95, 0.944)


def test_a_page_without_its_markers_is_refused() -> None:
    with pytest.raises(ValueError, match="the page must have"):
        tables.on_page("# Evidence", "new")
    page = f"a\n{tables.BEGIN}\nold\n{tables.END}\nb\n"
    assert tables.on_page(page, "new") == f"a\n{tables.BEGIN}\n\nnew\n\n{tables.END}\nb\n"
    with pytest.raises(ValueError, match="the page must have"):
        tables.on_page(page + page, "new")


def test_the_pages_counts_of_models_are_those_of_the_models() -> None:
    listed = re.findall(r"\| `(resnet50_\w+)` \| ([\d,]+) \|$", PAGE, flags=re.MULTILINE)
    assert len(listed) == 11
    assert [(name, tables.parameters(name).text) for name, _ in listed] == listed


def test_the_papers_numbers_stand_in_one_place() -> None:
    assert paper.TABLE12.of("LLLL", "speed") == model.TABLE12["resnet50_llll"][0] == 1160
    assert PARETO[152, 224] == (0.38, 83.2)
    assert list(paper.FIGURE) == model.FIGURE_OURS + model.FIGURE_THEIRS
    assert model.TABLE5[0] == ("lambda_resnet152", 288, 1620, 6100, 86.7)
    with pytest.raises(KeyError):
        paper.TABLE12.of("LLLL", "memory")
    for table in paper.TABLES:
        assert all(len(values) == len(table.quantities) for values in table.rows.values()), table.name
        assert {quantity.mark for quantity in table.quantities} <= {
            paper.CONFIRMED, paper.REPORTED, paper.UNCONFIRMED
        }  # fmt: skip
