"""The benchmarks: whom they compare, with what the paper says, and that what they print is what a run gave."""

import copy
import json
import math
import statistics
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import timm
import torch
from conftest import batch, labelled
from timm.data import create_dataset, create_loader
from timm.loss import LabelSmoothingCrossEntropy
from timm.optim import create_optimizer_v2, optimizer_kwargs
from timm.scheduler import create_scheduler_v2, scheduler_kwargs
from torch import nn

import lambdanets
from benchmarks import figure, model, op, peers, public, rates, timm_train
from lambdanets.data.batches import Batches
from lambdanets.data.folders import folder
from lambdanets.data.transforms import View
from lambdanets.ops import planner, strategies
from lambdanets.ops.problem import Problem
from lambdanets.ops.reference import relative_embeddings
from lambdanets.training import optim
from lambdanets.training.distributed import Ranks
from lambdanets.training.learner import Learner

SMALL = {"lambda_resnet_tiny": 32, "test_efficientnet": 64}


def pair(paper: float = 1.55) -> model.Comparison:
    over, under = (model.Subject(name, px, 77.0 + i) for i, (name, px) in enumerate(SMALL.items()))
    return model.Comparison("figure", (over, under), (model.Claim(over, under, {"training": paper}, 1.5),))


# --- model.py: whom, and the paper's numbers ---


def test_table_12s_ratios_are_the_papers_and_its_models_exist():
    (words,) = model.comparisons(["table12"])
    assert {str(c.under) for c in words.claims} == {"resnet50_cccc at 224"}
    paper = {c.over.model[-4:]: c.paper["inference"] for c in words.claims}
    assert paper == {"llll": 0.16, "clll": 0.3, "ccll": 0.69, "cccl": 0.99}
    assert {s.model for s in words.subjects} <= set(lambdanets.list_models())
    assert list(model.AIMS["cpu", "inference"].values()) == [0.85, 0.9, 1.0, 1.0]
    assert list(model.AIMS["cuda", "training"].values()) == [0.8, 0.9, 1.0, 1.0]


def test_each_efficientnet_meets_the_papers_fastest_model_of_at_least_its_accuracy():
    pairs = [c for c in model.comparisons(["pairs"]) if c.table == "figure"]
    ours = [(c.claims[0].over.model.removeprefix("lambda_resnet"), c.claims[0].over.px) for c in pairs]
    assert ours == [("50", 128), ("50", 160), ("101", 160), ("101", 192), ("152", 224), ("152", 256), ("270", 256),
                    ("350", 320)]  # fmt: skip
    assert [c.claims[0].under.px for c in pairs] == [224, 240, 260, 300, 380, 456, 528, 600]
    assert all(c.claims[0].over.top1 >= c.claims[0].under.top1 for c in pairs)
    assert [c.claims[0].paper for c in pairs[-2:]] == [{"training": 4.4}, {"training": 3.2}]
    assert [c.claims[0].points for c in pairs] == [1.55, 1.69, 1.5, 1.7, 1.87, 3.08, 3.31, 3.15]
    for c in pairs:
        assert c.claims[0].over.model in lambdanets.list_models()
        assert timm.is_model(c.claims[0].under.model)


def test_table_5s_ratios_are_the_papers():
    table5 = model.comparisons(["pairs"])[-1]
    assert [(str(c.over), str(c.under)) for c in table5.claims] == [
        ("lambda_resnet152 at 288", "efficientnet_b7 at 600"),
        ("lambda_resnet152 at 288", "vit_large_patch16_384 at 384"),
    ]
    assert [c.paper for c in table5.claims] == [
        {"training": 9.5, "inference": 6.2},
        {"training": 9.0, "inference": 9.5},
    ]
    assert timm.is_model("vit_large_patch16_384")


def test_quick_leaves_the_large_models_out():
    assert [str(s) for c in model.comparisons(["pairs"], quick=True) for s in c.subjects] == [
        "lambda_resnet50 at 128", "efficientnet_b0 at 224", "lambda_resnet50 at 160", "efficientnet_b1 at 240",
    ]  # fmt: skip


@pytest.mark.parametrize(("name", "published"), [("efficientnet_b0", 0.39e9), ("resnet50_cccc", 4.09e9)])
def test_the_work_of_a_model_is_what_is_published(name, published):
    assert model.macs(model.Subject(name, 224, 0.0)) == pytest.approx(published, rel=0.03)


# --- model.py: what is measured ---


def row(table: str = "figure", passes: str = "training", rates: tuple[float, ...] = (30.0, 20.0), comparison=None):
    comparison = comparison or pair()
    found = {
        str(s): {
            "model": s.model, "px": s.px, "paper_top1": s.top1, "setting": "eager", "images_per_s": rate,
            "s_per_1024_images": 1024 / rate, "peak_mb": 10.0 * rate,
        }
        for s, rate in zip(comparison.subjects, rates, strict=True)
    }  # fmt: skip
    made = {"table": table, "dtype": "float32", "pass": passes, "batch": 8, "models": found, "left_out": {}}
    return {**made, "ratios": model.ratios(comparison, made, "cpu")}


def test_a_ratio_stands_beside_the_papers_and_the_aim():
    speed, memory = row()["ratios"]
    assert (speed["measured"], speed["paper"], speed["paper_points"], speed["aim"]) == (1.5, 1.55, 1.5, None)
    assert (memory["what"], memory["measured"]) == ("peak_mb", 1.5)
    assert row(passes="inference")["ratios"][0]["paper"] is None  # the figure is of training steps
    (words,) = model.comparisons(["table12"])
    found = row("table12", "inference", (100.0, 85.0, 89.0, 100.0, 101.0), words)["ratios"]
    speeds = {r["over"][:13]: (r["measured"], r["aim"]) for r in found if r["what"] == "images_per_s"}
    assert speeds == {
        "resnet50_llll": (0.85, 0.85), "resnet50_clll": (0.89, 0.9), "resnet50_ccll": (1.0, 1.0),
        "resnet50_cccl": (1.01, 1.0),
    }  # fmt: skip
    met = {aim["what"].split(" ")[0]: aim["met"] for aim in model.summary([{**row(), "ratios": found}])["aims"]}
    assert met == {"resnet50_llll": True, "resnet50_clll": False, "resnet50_ccll": True, "resnet50_cccl": True}


def test_the_memory_aim_is_an_upper_bound():
    (words,) = model.comparisons(["table12"])
    made = row("table12", "training", (10.0, 13.0, 9.0, 9.0, 9.0), words)  # peaks are ten times that
    made["ratios"] = model.ratios(words, made, "cuda")
    assert [a for a in model.summary([made])["aims"] if "peak_mb" in a["what"]] == [
        {"what": "resnet50_llll at 224 / resnet50_cccc at 224, peak_mb, float32 training", "measured": 1.3, "aim": 1.3,
         "met": True}
    ]  # fmt: skip


def test_the_summary_is_the_geometric_mean_of_the_pairs():
    rows = [row(rates=(30.0, 20.0)), row(rates=(60.0, 10.0)), row("table5", rates=(90.0, 1.0))]
    assert model.summary(rows)["geometric_mean_of_pairs"] == {"float32 training": 3.0}


def test_what_runs_end_to_end_is_what_is_printed_and_kept(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(model, "comparisons", lambda only, quick: [pair()])
    out, png = tmp_path / "model.json", tmp_path / "pairs.png"
    model.main(["--quick", "--only", "pairs", "--dtype", "float32", "bfloat16", "--channels-last", "--batch", "2",
                "--budget-s", "0.01", "--threads", "1", "--out", str(out), "--figure", str(png)])  # fmt: skip
    lines = capsys.readouterr().out.splitlines()
    result = json.loads(lines[-1])
    assert json.loads(out.read_text()) == result
    assert png.read_bytes().startswith(b"\x89PNG")
    assert [(r["dtype"], r["pass"]) for r in result["rows"]] == [
        (dtype, passes) for dtype in ("float32", "bfloat16") for passes in ("inference", "training")
    ]
    for made in result["rows"]:
        assert made["left_out"] == {}
        rates = []
        for name, px in SMALL.items():
            one = made["models"][f"{name} at {px}"]
            assert set(one["ms"]) == {"eager", "channels_last"}
            assert one["setting"] == min(one["ms"], key=one["ms"].__getitem__)
            assert one["images_per_s"] == pytest.approx(1000 * made["batch"] / one["ms"][one["setting"]], rel=0.01)
            assert one["s_per_1024_images"] == pytest.approx(1024 / one["images_per_s"], rel=0.01)
            weights = sum(p.numel() for p in timm.create_model(name).parameters()) * 4e-6
            # Training holds weights, gradients and momentum, three times the weights, before any activation.
            assert one["peak_mb"] > weights * (3 if made["pass"] == "training" else 0.45)
            rates.append(one["images_per_s"])
        assert made["ratios"][0]["measured"] == pytest.approx(rates[0] / rates[1], rel=0.01)


def test_an_interrupted_run_keeps_the_rows_it_has(monkeypatch, tmp_path):
    def one_row(*_):
        yield row()
        raise KeyboardInterrupt

    monkeypatch.setattr(model, "comparisons", lambda only, quick: [pair()])
    monkeypatch.setattr(model, "bench", one_row)
    with pytest.raises(KeyboardInterrupt):
        model.main(["--only", "pairs", "--out", str(tmp_path / "model.json")])
    assert json.loads((tmp_path / "model.json").read_text())["rows"] == [json.loads(json.dumps(row()))]
    assert [p.name for p in tmp_path.iterdir()] == ["model.json"]


def test_a_model_that_fuse_changes_is_not_timed_and_the_exit_says_so(monkeypatch, tmp_path):
    def wrong(net: nn.Module) -> nn.Module:
        net = copy.deepcopy(net).eval()
        if hasattr(net, "fc"):  # ours; timm's EfficientNet has a `classifier`
            with torch.no_grad():
                net.fc.bias += 1e-4
        return net

    monkeypatch.setattr(lambdanets, "fuse", wrong, raising=False)
    monkeypatch.setattr(model, "comparisons", lambda only, quick: [pair()])
    out = tmp_path / "model.json"
    with pytest.raises(SystemExit, match=r"not everything was timed.*lambda_resnet_tiny at 32"):
        model.main(["--quick", "--only", "pairs", "--budget-s", "0.01", "--threads", "1", "--out", str(out)])
    for made in json.loads(out.read_text())["rows"]:
        assert list(made["models"]) == ["test_efficientnet at 64"]
        assert "fuse(model) and the model disagree in float64" in made["left_out"]["lambda_resnet_tiny at 32"]
        assert made["ratios"] == []


def test_a_setting_that_fails_is_left_out_and_named(monkeypatch):
    def fails(*_):
        raise RuntimeError("no compiler\nmore")

    monkeypatch.setattr(lambdanets, "fuse", lambda net: copy.deepcopy(net).eval(), raising=False)
    monkeypatch.setattr(model, "compiled", fails)
    made = next(model.bench(pair(), [torch.float32], ["eager", "compiled"], "cpu", model.Limits(2, 0.0, 1)))
    assert set(made["left_out"]) == {f"{name} at {px}, compiled" for name, px in SMALL.items()}
    assert set(made["left_out"].values()) == {"RuntimeError: no compiler"}
    assert {m["setting"] for m in made["models"].values()} == {"eager"}
    assert len(made["models"]) == 2


def test_a_batch_is_halved_until_it_fits_into_memory():
    assert model.fitting(64, 1, "cpu") == 64
    assert model.fitting(64, 1 << 60, "cpu") == 1


def test_a_training_step_changes_the_weights_and_inference_does_not():
    net, x = model.build(model.Subject("lambda_resnet_tiny", 16, 0.0), "cpu")
    timed = model.ready(net, x, 3, "eager", True, torch.float32)
    before = timed.net.fc.weight.detach().clone()
    timed.call()
    assert not torch.equal(timed.net.fc.weight, before)
    assert torch.equal(net.fc.weight, before)  # the copy learns, the model that others are compared with does not
    assert timed.images.shape == (3, 3, 16, 16)


def test_a_figure_that_nobody_asked_rows_for_is_refused_before_the_run(capsys):
    with pytest.raises(SystemExit):
        model.main(["--only", "table12", "--figure", "x.png"])
    assert "--figure x.png draws the pairs" in capsys.readouterr().err


# --- figure.py ---


def measured(slower: float, passes: tuple[str, ...] = ("inference", "training")) -> dict:
    """A result whose seconds are the paper's, ours times `slower`; no run gave it."""
    seconds = {(name, px): s for name, px, s, _ in model.FIGURE_OURS + model.FIGURE_THEIRS}
    rows = []
    for comparison in model.comparisons(["pairs"])[:-1]:
        for one in passes:
            rates = [
                1024 / (seconds[s.model, s.px] * (slower if "lambda" in s.model else 1)) for s in comparison.subjects
            ]
            rows.append(row("figure", one, tuple(rates), comparison))
    about = {"device": "a machine", "threads": 2, "torch": "2", "timm": "1"}
    return {"machine": about, "settings": ["eager"], "rows": rows}


@pytest.mark.parametrize("slower", [1.0, 1.9, 3.2])
def test_the_figure_labels_every_point_and_no_label_covers_another(slower):
    _, labels = figure._figure(measured(slower))
    assert len(labels) == 2
    for axes, boxes in labels.items():
        assert len(boxes) == len(axes.texts) == 16
        assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
        assert axes.get_xscale() == "log"
        inside = axes.get_window_extent()
        assert all(inside.x0 <= b.x0 and b.x1 <= inside.x1 and inside.y0 <= b.y0 and b.y1 <= inside.y1 for b in boxes)


def test_the_figure_says_that_the_accuracies_are_the_papers():
    result = measured(1.0, ("training",))
    drawn, labels = figure._figure(result)
    assert "accuracy as the paper reports it" in drawn.get_suptitle()
    assert "the paper's, not measured here" in next(iter(labels)).get_ylabel()
    assert "Top-1: the figures of the paper" in drawn.get_supxlabel().replace("\n", " ")
    families = figure.points(result, "float32", "training")
    assert families["EfficientNet"][-1] == (pytest.approx(6.02), 84.7, "B7, 600 px (3.2x)")
    assert families["LambdaResNet"][0] == (pytest.approx(0.058), 77.4, "50, 128 px")


def test_the_figure_is_drawn_from_a_file(monkeypatch, tmp_path):
    source, target = tmp_path / "model.json", tmp_path / "pairs.png"
    source.write_text(json.dumps(measured(1.0)))
    monkeypatch.setattr("sys.argv", ["figure", str(source), str(target)])
    figure.main()
    assert target.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="no rows of the figure's pairs among the 0"):
        figure.draw({**measured(1.0), "rows": []})


# --- op.py and peers.py ---


@pytest.mark.parametrize("scope", [3, 23, None])
def test_every_peer_computes_our_layers_function(scope):
    torch.manual_seed(0)
    layers = peers.contenders(5, 16, scope)
    x = torch.randn(2, 16, 5, 5, dtype=torch.float64)
    want = layers["auto"].double().eval()(x)
    assert set(peers.PEERS) <= set(layers)
    for name in peers.PEERS:
        assert torch.allclose(layers[name].double().eval()(x), want, rtol=1e-10, atol=1e-10), name


def test_the_fastest_peer_is_named_and_ours_is_the_fastest_of_its_forms():
    found = op.ratios(
        {"timm": 8.0, "conv2d": 5.0, "conv2d compiled": 4.0, "auto": 2.0, "auto compiled": 1.0, "conv": 0.5}
    )
    assert found == {"times_timm": 8.0, "times_fastest": 4.0, "fastest": "conv2d compiled", "ours": "auto compiled"}
    assert op.ratios({"timm": 8.0, "auto": 4.0, "fuse": 2.0})["ours"] == "fuse"
    assert op.ratios({"plain einsum": 3.0, "auto": 2.0}) == {
        "times_fastest": 1.5, "fastest": "plain einsum", "ours": "auto"
    }  # fmt: skip


def cell(side: int, scope: int | None, dtype: str = "float32", **measured_there: float) -> dict:
    peak = {"auto": measured_there.pop("peak_mb")} if "peak_mb" in measured_there else {}
    ms = {"auto": 1.3, "scores": 1.0, "lambdas": 1.2}
    return {"side": side, "dim": 3584 // side, "scope": scope, "dtype": dtype, "backward": False, "peak_mb": peak,
            "auto_takes": "lambdas" if side == 64 else "scores", "ms": ms, **measured_there}  # fmt: skip


def test_the_aims_of_the_layer_stand_beside_what_was_measured():
    rows = [
        cell(7, 23, times_fastest=4.0, times_timm=9.9), cell(14, None, times_fastest=2.4, times_timm=4.1),
        cell(28, 23, times_fastest=1.2, times_timm=3.0), cell(56, 23, times_fastest=0.99, times_timm=3.0),
        cell(56, 7, times_fastest=1.0, times_timm=3.0),
        cell(64, None, times_fastest=2.0, peak_mb=64**4 * 16 * 4 / 8e6 + 1),
    ]  # fmt: skip
    found = op.summary(rows, "cpu")
    missed = {(aim["cell"].split(" float32")[0], aim["what"]) for aim in found["aims"] if not aim["met"]}
    assert missed == {
        ("7² d512 r=23", "times_timm"), ("14² d256 r=all", "times_fastest"), ("56² d64 r=23", "times_fastest"),
        ("64² d56 r=all", "peak_mb"), ("the better of 28² and 56², r=23", "times_fastest"),
        ("plan", "cells where auto is within 15% of the best, share"),
    }  # fmt: skip
    timm_ratios = [9.9, 4.1, 3.0, 3.0, 3.0]
    assert found["geometric_mean_times_timm"] == {"float32 fwd": round(statistics.geometric_mean(timm_ratios), 2)}
    assert found["aims"][-1] == {"cell": "plan", "what": "auto's time over the best strategy's, worst cell",
                                 "measured": 1.2, "aim": 1.5, "met": True}  # fmt: skip
    grid = op.summary([cell(14, 7, times_fastest=1.0, times_timm=5.9)] * len(op.SHAPES), "cpu")["aims"]
    assert {aim["what"]: aim["met"] for aim in grid if "geometric" in aim["cell"]} == {"times_timm": False}
    assert op.aims(cell(7, 23, "bfloat16"), "cpu") == {"times_fastest": 4.0, "times_timm": 12.0}
    assert op.aims(cell(7, 23, "bfloat16"), "cuda") == {"times_fastest": 5.0, "roofline": 0.5}


@pytest.mark.parametrize(("grid", "table"), [((5, 4), (3, 7)), ((3, 3), (23, 23)), ((6, 2), (1, 1))])
def test_the_least_work_counts_the_contexts_in_the_window_and_on_the_map(grid, table):
    seen = relative_embeddings(torch.ones(*table, 1, 1), grid).sum().item()  # pairs of a query and a context
    n = grid[0] * grid[1]
    p = Problem(2, n, n, 4, 16, 8, grid=grid, context_grid=grid, table=table, dtype=torch.bfloat16)
    macs, moved = op.least_work(p, 32)
    assert macs == 2 * seen * min(16 * 8, 4 * (16 + 8)) + 2 * n * (32 * (64 + 16 + 8) + 16 * 8 + 4 * 16 * 8)
    assert moved == 2 * 2 * n * (32 + 32)
    assert op.least_work(replace(p, training=True), 32) == (3 * macs, moved * 5 // 2)


def test_the_ceilings_are_measured_and_a_row_says_how_near_it_comes(monkeypatch):
    monkeypatch.setitem(op.CEILING, "cpu", (256, 1 << 22))
    op.ceilings.cache_clear()
    reached = op.ceilings("cpu", torch.float32)
    op.ceilings.cache_clear()
    assert 1e8 < reached["macs_per_s"] < 1e14
    assert 1e8 < reached["bytes_per_s"] < 1e13
    monkeypatch.setattr(op, "ceilings", lambda device, dtype: {"macs_per_s": 1e9, "bytes_per_s": 1e30})
    for made in op.bench_shape(4, 16, 3, 2, torch.float32, "cpu", 0.0, False):
        took_ms = made["ms"][made["ours"]]  # long on a loaded machine, and the share is written with three digits
        assert made["least_ms"] == pytest.approx(made["roofline"] * took_ms, rel=0.01, abs=1e-3 + 5e-4 * took_ms)
        assert made["least_ms"] > 0


def test_a_contender_that_takes_too_long_is_reported_and_left_out(capsys):
    rows = op.bench_shape(4, 16, 3, 2, torch.float32, "cpu", 0.0, False, 1e-9)
    assert rows == []
    assert (
        "conv2d is left out at 4², d 16: TooSlow: a call took 0.0 s, over the limit of 1e-09 s"
        in capsys.readouterr().err
    )


def test_a_contender_that_fails_does_not_end_the_run_but_the_exit_says_so(monkeypatch, tmp_path, capsys):
    class Fails(nn.Module):
        def forward(self, x):
            raise RuntimeError("no engine was found\nfor this convolution")

    monkeypatch.setattr(op, "contenders", lambda *sizes: {**peers.contenders(*sizes), "conv2d": Fails()})
    monkeypatch.setattr(op, "SHAPES", [(4, 16, 3, 2)])
    monkeypatch.setitem(op.CEILING, "cpu", (256, 1 << 22))
    op.ceilings.cache_clear()
    command = ["op", "--cells", "4:3", "--dtype", "float32", "--budget-s", "0", "--out", str(tmp_path / "op.json")]
    monkeypatch.setattr("sys.argv", command)
    with pytest.raises(SystemExit, match="not everything was timed: conv2d at 4²: RuntimeError: no engine was found"):
        op.main()
    op.ceilings.cache_clear()
    kept = json.loads((tmp_path / "op.json").read_text())
    assert kept == json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [row["failed"] for row in kept["rows"]] == [["conv2d"], ["conv2d"]]
    assert set(kept["machine"]["ceilings_float32"]) == {"macs_per_s", "bytes_per_s"}
    assert all("timm" in row["ms"] for row in kept["rows"])


def test_some_of_the_shapes_can_be_asked_for(monkeypatch, capsys):
    assert op.cell("64:all") == (64, 256, None, 2)
    assert [op.cell(f"{side}:{scope or 'all'}") for side, _, scope, _ in op.SHAPES] == op.SHAPES
    monkeypatch.setattr("sys.argv", ["op", "--cells", "56:22"])
    with pytest.raises(SystemExit):
        op.main()
    assert "'56:22' is none of 7:23, 14:23" in capsys.readouterr().err


def test_the_fit_finds_the_rates_that_made_the_times(monkeypatch):
    key = ("cpu", False, False)
    machine = strategies.Rates(
        lambdas=strategies.Rate(1e11, 2e10), scores=strategies.Rate(3e10, 1e10), conv=strategies.Rate(2e11, 3e10),
        fourier=strategies.Rate(5e10, 1e10), far=4.0, block_s=1e-4,
    )  # fmt: skip
    problems = [rates.problem(shape, torch.float32, False, "cpu") for shape in rates.SHAPES]
    with rates.with_rates(key, machine):
        priced = [[planner._price(p, name, None) for name in strategies.STRATEGIES] for p in problems]
    times = [{c.strategy: c.seconds for c in costs if c.why_not is None} for costs in priced]
    group = list(zip(problems, times, strict=True))
    assert max(rates.choices(key, strategies.RATES[key], group)) > 1.5
    found = rates.fit(key, group)
    assert max(rates.choices(key, found, group)) < 1.05
    for order in ("lambdas", "scores", "conv"):
        assert found.of(order).macs == pytest.approx(machine.of(order).macs, rel=0.2)


def test_rates_are_measured_kept_and_fitted_again_from_the_file(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(rates, "SHAPES", [(4, 3, 8, 1), (5, None, 8, 2)])
    monkeypatch.setattr(rates, "FAR", 1e9)
    monkeypatch.setattr("sys.argv", ["rates", "--budget-s", "0", "--out", str(tmp_path / "rates.json")])
    rates.main()
    first = capsys.readouterr().out
    made = json.loads((tmp_path / "rates.json").read_text())["rows"]
    assert len(made) == 2 * 2 * 2
    assert all({"scores", "lambdas", "conv"} <= set(row["ms"]) for row in made)
    monkeypatch.setattr("sys.argv", ["rates", "--fit", str(tmp_path / "rates.json")])
    rates.main()
    again = capsys.readouterr().out
    assert first.endswith(again)
    assert again.count("fitted: within 15% of the fastest in") == 4


def test_a_peer_that_does_not_compile_is_reported_and_left_out(monkeypatch, capsys):
    class Fails(nn.Module):
        def forward(self, x):
            raise RuntimeError("no working C++ compiler")

    monkeypatch.setattr(op, "compiled", lambda layer, device, training: Fails())
    rows = op.bench_shape(4, 16, 3, 2, torch.float32, "cpu", 0.0, True)
    for made in rows:
        forms = {"timm", "plain einsum", "conv2d", "auto"} | (set() if made["backward"] else {"fuse"})
        assert set(made["left_out"]) == {f"{name} compiled" for name in forms}
        assert {"timm", "plain einsum", "conv2d", "auto"} <= set(made["ms"])
        assert made["times_fastest"] > 0
    assert "conv2d compiled is left out at 4², d 16: RuntimeError: no working" in capsys.readouterr().err


def test_a_peer_that_would_hang_in_the_library_is_reported_and_not_run(monkeypatch, capsys):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    forward, both = op.bench_shape(4, 16, 7, 2, torch.bfloat16, "cpu", 0.0, False)
    assert forward["left_out"] == {}
    assert "timm" in forward["ms"]
    assert both["left_out"].keys() == {"timm"}
    assert "timm" not in both["ms"]
    assert "times_timm" not in both
    assert "timm is left out at 4², d 16: oneDNN's bfloat16 gradient" in capsys.readouterr().err


@pytest.mark.slow
def test_peers_and_ours_compile_and_agree_with_the_reference():
    for made in op.bench_shape(4, 16, 3, 2, torch.float32, "cpu", 0.0, True):
        assert made["left_out"] == {}
        assert {f"{name} compiled" for name in ("timm", "plain einsum", "conv2d", "auto")} <= set(made["ms"])


def test_without_a_compiler_it_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    assert "g++ or clang++" in peers.why_not_compiled("cpu")
    monkeypatch.setenv("CXX", "/nowhere/c++")
    assert "/nowhere/c++" in peers.why_not_compiled("cpu")
    assert peers.why_not_compiled("cuda") is None


def test_peak_memory_counts_what_a_call_leaves_behind_but_not_what_was_there():
    kept = []
    there = torch.zeros(1000)

    def call():
        if not kept:
            kept.append(torch.zeros(300))
        there.add_(1)
        return (torch.zeros(50) + 1).sum()

    assert op.peak_bytes(call, "cpu", [there]) == 4 * (300 + 50 + 50)


def test_a_model_as_if_trained_shows_every_block():
    x = torch.randn(2, 3, 32, 32)
    net = public.as_if_trained(lambdanets.create_model("lambda_resnet_tiny"), x)
    assert not net.training
    assert all(m.weight.all() for m in net.modules() if isinstance(m, nn.BatchNorm2d))
    assert math.isclose(net.forward_features(x).std().item(), 1, rel_tol=0.7)


# --- timm_train.py: the settings are the same ---


def as_timm_parses(of) -> SimpleNamespace:
    """timm's arguments as its script hands them to timm's factories."""
    found: dict = {}
    for word in timm_train.timm_arguments(of):
        if word.startswith("--"):
            name = word[2:].replace("-", "_")
            found[name] = []
        else:
            found[name].append(float(word) if "." in word or "e-" in word else int(word) if word.isdigit() else word)
    return SimpleNamespace(**{key: True if not v else v[0] if len(v) == 1 else v for key, v in found.items()})


def timm_rates(of, cfg: SimpleNamespace) -> list[float]:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=cfg.lr)
    steps = timm_train.STEPS
    schedule, epochs = create_scheduler_v2(optimizer, **scheduler_kwargs(cfg), updates_per_epoch=steps)
    assert epochs == of.epochs
    rates = []
    for step in range(epochs * steps):
        rates.append(optimizer.param_groups[0]["lr"])
        schedule.step_update(step + 1)
        if (step + 1) % steps == 0:
            schedule.step((step + 1) // steps)
    return rates


@pytest.mark.parametrize("epochs", [2, 8, 90])
def test_the_learning_rates_of_timms_schedule_and_ours_agree_at_every_step(epochs):
    of = timm_train.recipe(epochs)
    theirs = timm_rates(of, as_timm_parses(of))
    total, warmup = len(theirs), round(of.warmup_epochs * timm_train.STEPS)
    ours = [optim.learning_rate(s, of.peak_lr, warmup_steps=warmup, total_steps=total) for s in range(total)]
    assert ours[:warmup] == pytest.approx(theirs[:warmup], rel=1e-12)
    assert max(ours) == max(theirs) == of.peak_lr
    assert all(abs(a - b) < of.peak_lr / (total - warmup) for a, b in zip(ours, theirs, strict=True))
    assert ours[warmup:] == pytest.approx(theirs[warmup:], rel=2.5 / (total - warmup))


def test_timms_script_and_ours_start_from_the_same_weights_and_make_the_same_steps():
    of = timm_train.recipe(3)
    cfg = as_timm_parses(of)
    torch.manual_seed(5)
    net = timm.create_model(
        cfg.model, pretrained=False, in_chans=3, num_classes=cfg.num_classes, drop_rate=cfg.drop, drop_path_rate=None,
        drop_block_rate=None, global_pool=None, bn_momentum=None, bn_eps=None, scriptable=False, checkpoint_path="",
    ).double()  # fmt: skip
    optimizer = create_optimizer_v2(net, **optimizer_kwargs(cfg=cfg))
    loss_of = LabelSmoothingCrossEntropy(cfg.smoothing)
    torch.manual_seed(5)
    cpu = torch.device("cpu")
    learner = Learner(
        replace(of, precision="float64"), labelled(of, cfg.num_classes), batch_images=4, seed=5, device=cpu,
        ranks=Ranks.alone(),
    )  # fmt: skip
    learner.parallelise()
    assert net.state_dict().keys() == learner.model.state_dict().keys()
    assert all(torch.equal(net.state_dict()[name], t) for name, t in learner.model.state_dict().items())
    names = {p: name for name, p in net.named_parameters()} | {p: name for name, p in learner.model.named_parameters()}

    def groups(of_side):
        settings = ("weight_decay", "momentum", "dampening", "nesterov", "foreach", "fused")
        return [([names[p] for p in g["params"]], *(g[key] for key in settings)) for g in of_side.param_groups]

    assert groups(optimizer) == groups(learner.optimizer)
    assert {g["weight_decay"] for g in optimizer.param_groups} == {0.0, of.weight_decay}
    net.train()
    for step in range(3):
        images, labels = torch.randn(4, 3, 8, 8, dtype=torch.float64), torch.tensor([0, 3, 9, 3])
        found = learner.gradients(batch(images, labels), step)
        learner.apply(step, 0.05, found.norm)
        for group in optimizer.param_groups:
            group["lr"] = 0.05
        optimizer.zero_grad()
        loss = loss_of(net(images), labels)
        loss.backward()
        optimizer.step()
        assert found.loss_sum / 4 == pytest.approx(loss.item(), rel=1e-12)
    for name, tensor in net.state_dict().items():
        assert torch.allclose(tensor, learner.model.state_dict()[name], rtol=1e-9, atol=1e-12), name
        assert torch.equal(learner.average.module.state_dict()[name], learner.model.state_dict()[name]), name


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # timm's reader leaves them to the collector
def test_timm_and_ours_read_the_same_images_and_labels_from_the_folder(tmp_path):
    timm_train.write_digits(tmp_path)
    of = timm_train.recipe(2)
    cfg = as_timm_parses(of)
    view = View(of.image_px, of.in_channels, of.mean, of.std, of.crop_frac, of.interpolation)
    found = folder(tmp_path)
    both = {"train": (found.train, timm_train.TRAIN_IMAGES), "val": (found.val, timm_train.VAL_IMAGES)}
    for split, (ours, n) in both.items():
        training = split == "train"
        batch = of.batch_images if training else of.eval_batch_images
        theirs = create_dataset("", root=str(tmp_path), split=split, is_training=training, input_img_mode="RGB")
        loader = create_loader(
            theirs, input_size=tuple(cfg.input_size), batch_size=batch, is_training=training, no_aug=cfg.no_aug,
            interpolation=cfg.interpolation, crop_pct=cfg.crop_pct, mean=tuple(cfg.mean), std=tuple(cfg.std),
            num_workers=0, device=torch.device("cpu"),
        )  # fmt: skip
        assert len(ours) == len(theirs) == n
        assert [name for name, _ in sorted(theirs.reader.class_to_idx.items(), key=lambda of: of[1])] == [*ours.classes]
        names = [f"{split}/{theirs.filename(i)}" for i in range(n)]
        labels = dict(zip(names, (label for _, label in theirs.reader.samples), strict=True))
        assert labels == dict(zip(ours.names, ours.labels, strict=True))
        batches = Batches(ours, view, batch_images=batch, training=training, augment=of.augment)
        assert len(batches) == len(loader) == (timm_train.STEPS if training else 3)
        at = {name: i for i, name in enumerate(names)}
        for mine in list(batches.epoch(0))[:2]:
            levels = torch.stack([theirs[at[ours.names[i]]][0] for i in mine.ids]).float()
            assert torch.allclose(mine.images, (levels - loader.mean) / loader.std, rtol=0, atol=1e-6)
            assert mine.labels.tolist() == [labels[ours.names[i]] for i in mine.ids]
        images, _ = next(iter(loader))
        assert images.shape == mine.images.shape
        if not training:
            assert torch.allclose(images, next(batches.epoch(0)).images, rtol=0, atol=1e-6)


# --- timm_train.py: what is read and said ---

TIMM_LOG = """
Scheduled epochs: 2 (warmup_epochs + epochs + cooldown_epochs).
Train: 0 [   0/44 (  2%)]  Loss: 2.29 (2.29)  Time: 0.305s,  104.59/s  (0.305s,  104.59/s)  LR: 1.111e-03  Data: 0.109 (0.109)
Train: 0 [  43/44 (100%)]  Loss: 1.55 (2.03)  Time: 0.137s,  233.27/s  (0.160s,  200.00/s)  LR: 4.889e-02  Data: 0.000 (0.028)
Test: [   0/2]  Time: 1.555 (1.555)  Loss:   1.732 ( 1.732)  Acc@1:  30.833 ( 30.833)  Acc@5:  95.833 ( 95.833)
Test: [   2/2]  Time: 1.203 (1.349)  Loss:   2.222 ( 2.013)  Acc@1:   0.000 ( 16.944)  Acc@5:  75.833 ( 82.222)
Train: 1 [   0/44 (  2%)]  Loss: 1.59 (1.59)  Time: 0.182s,  176.05/s  (0.182s,  176.05/s)  LR: 5.000e-02  Data: 0.043 (0.043)
Train: 1 [  43/44 (100%)]  Loss: 1.01 (1.17)  Time: 0.137s,  233.68/s  (0.130s,  246.15/s)  LR: 6.369e-05  Data: 0.000 (0.025)
Test: [   0/2]  Time: 1.335 (1.335)  Loss:   4.723 ( 4.723)  Acc@1:  99.167 ( 99.167)  Acc@5: 100.000 (100.000)
Test: [   2/2]  Time: 1.231 (1.267)  Loss:   8.667 ( 6.020)  Acc@1: 100.000 ( 99.444)  Acc@5: 100.000 (100.000)
*** Best metric: 99.44444444444444 (epoch 1)
"""  # noqa: E501


def test_timms_log_gives_the_last_accuracy_and_every_epochs_speed():
    of = timm_train.recipe(2)
    assert timm_train.read_timm(TIMM_LOG, of) == timm_train.Trained(358, 360, [200.0, 246.15])


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("4.889e-02", "4.781e-02", "learning rate of step 43 is 4.781e-02, ours 4.889e-02"),
        ("6.369e-05", "7.369e-05", "learning rate of step 87"),
        ("/44 ", "/45 ", "the ends of 0 epochs and 2 evaluations, not 2"),
        ("[   0/44", "[   0/45", r"shows \{.*45.*\} steps an epoch"),
        ("Test: [   2/2]", "Test: [   3/3]", "batches of held-out images"),
        ("Acc@1", "Acc", "2 epochs and 0 evaluations"),
    ],
)
def test_a_log_of_timms_that_shows_another_run_is_refused(old, new, said):
    with pytest.raises(SystemExit, match=said):
        timm_train.read_timm(TIMM_LOG.replace(old, new), timm_train.recipe(2))


def outcomes(ours: list[int], theirs: list[int], speed: float = 1.0) -> list[dict]:
    return [
        timm_train.row(side, seed, timm_train.Trained(right, 360, [1.0, rate, rate]), 60.0)
        for seed, pair_of in enumerate(zip(ours, theirs, strict=True))
        for side, right, rate in zip(("ours", "timm"), pair_of, (200.0 * speed, 200.0), strict=True)
    ]


def test_a_difference_counts_where_seeds_and_images_cannot_explain_it():
    same = timm_train.compare(outcomes([357, 355, 356], [355, 356, 357]))["top1"]
    assert same["within_noise"]
    assert same["difference"] == 0
    assert same["of_seeds"] == pytest.approx(math.sqrt(2 / 3) / 360, abs=1e-5)  # each side's deviation is one image
    assert same["of_images"] == pytest.approx(math.sqrt(2 * 356 * 4 / 360**3), abs=1e-5)
    assert same["ours"]["spread"] == [round(355 / 360, 5), round(357 / 360, 5)]
    worse = timm_train.compare(outcomes([340, 341, 342], [356, 355, 356]))["top1"]
    assert not worse["within_noise"]
    assert worse["difference"] < -2 * worse["standard_error"] < 0
    assert timm_train.compare(outcomes([360, 360], [360, 360]))["top1"]["within_noise"]
    assert timm_train.compare(outcomes([1], [360]))["top1"]["within_noise"] is None
    assert timm_train.compare(outcomes([356], [356])[:1]) == {}


def test_the_speed_is_compared_seed_by_seed_without_the_first_epoch():
    slow = timm_train.compare(outcomes([356, 356], [356, 356], 0.94))["speed_over_timm"]
    assert slow == {"by_seed": [0.94, 0.94], "median": 0.94, "aim": 0.95, "met": False}
    assert timm_train.compare(outcomes([356], [356], 0.95))["speed_over_timm"]["met"]


def test_the_last_line_is_the_result_and_the_runs_take_turns(monkeypatch, tmp_path, capsys):
    turns = []

    def trained(side, rate):
        def call(*given):
            turns.append((side, given[-2]))
            return timm_train.Trained(350 + given[-2], 360, [1.0, rate])

        return call

    monkeypatch.setattr(timm_train, "check_script", lambda script, of: script)
    monkeypatch.setattr(timm_train, "write_digits", lambda root: None)
    monkeypatch.setattr(timm_train, "train_ours", trained("ours", 210.0))
    monkeypatch.setattr(timm_train, "train_timm", trained("timm", 200.0))
    script, out = tmp_path / "train.py", tmp_path / "out.json"
    script.write_text("")
    timm_train.main(["--timm-train", str(script), "--seeds", "3", "1", "--threads", "1", "--out", str(out)])
    assert turns == [("ours", 3), ("timm", 3), ("ours", 1), ("timm", 1)]
    text = capsys.readouterr().out.splitlines()[-1]
    assert out.read_text() == text + "\n"
    said = json.loads(text)
    assert said["speed_over_timm"]["by_seed"] == [1.05, 1.05]
    assert [r["right"] for r in said["rows"]] == [353, 353, 351, 351]
    assert said["machine"]["timm"] == timm.__version__
    assert str(tmp_path) not in text


LIKE_TIMMS = "# from timm, create_scheduler_v2\ndef train_one_epoch():\n    ...\n"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "does not exist: take train.py of github.com/huggingface/pytorch-image-models at the tag v"),
        ("print('hello')", "is not timm's train.py, it has no 'from timm' in it: take train.py"),
        (LIKE_TIMMS + "print('--model-ema --lr-base')", r"does not take --model, .*--lr, .*--output: take train.py"),
        (LIKE_TIMMS + "import timm.none_such", r"(?s)--help, with timm .* failed with exit code 1.*none_such"),
    ],
)
def test_a_script_that_is_not_timms_is_refused_before_anything_is_trained(monkeypatch, tmp_path, text, said):
    monkeypatch.setattr(timm_train, "write_digits", lambda root: pytest.fail("it went on"))
    path = tmp_path / "train.py"
    if text is not None:
        path.write_text(text)
    with pytest.raises(SystemExit, match=said):
        timm_train.main(["--timm-train", str(path)])


def test_without_the_script_it_says_where_to_get_it(tmp_path, capsys):
    with pytest.raises(SystemExit, match=r"--timm-train PATH is missing: take train.py"):
        timm_train.main([])
    with pytest.raises(SystemExit, match="is not a file"):
        timm_train.main(["--timm-train", str(tmp_path)])
    for wrong, said in ((["--epochs", "1"], "2 at least"), (["--seeds", "1", "1"], "each one once")):
        with pytest.raises(SystemExit):
            timm_train.main(wrong)
        assert said in capsys.readouterr().err


def test_a_training_that_fails_shows_the_end_of_its_output(tmp_path):
    script = tmp_path / "train.py"
    script.write_text("import sys\nprint('first'), print('middle\\n' * 40), sys.exit('out of luck')")
    with pytest.raises(SystemExit) as failed:
        timm_train.train_timm(Path(script), timm_train.recipe(2), tmp_path, tmp_path, 7, 1)
    assert "timm's training, seed 7, failed with exit code 1" in str(failed.value)
    assert "out of luck" in str(failed.value)
    assert "first" not in str(failed.value)
