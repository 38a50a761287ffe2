"""The Triton kernels: equal to the reference, forward and backward, wherever they run.

Without a GPU they run in Triton's interpreter, which has to be chosen before Triton is imported: the test at the end
starts this file again with TRITON_INTERPRET=1, and only there do the cases exist with device "cpu". On a GPU (marker
`gpu`) the same cases run compiled. A slow test compiles every kernel for Hopper, which needs no GPU.
"""

import math
import os
import re
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks import tiles
from lambdanets.ops import fused
from lambdanets.ops.problem import Problem
from lambdanets.ops.reference import lambda_reference, relative_embeddings

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
devices = pytest.mark.parametrize("device", ["cpu"] if INTERPRETED else [pytest.param("cuda", marks=pytest.mark.gpu)])
LOW = [torch.bfloat16, torch.float16]


@dataclass(frozen=True)
class Case:
    grid: tuple[int, ...]
    table: tuple[int, ...]
    b: int = 2
    h: int = 3
    k: int = 5
    v: int = 3
    u: int = 1
    content: bool = True

    def tensors(self, dtype: torch.dtype, device: str) -> dict[str, Tensor]:
        n = math.prod(self.grid)
        t = {
            "q": torch.randn(self.b, n, self.h, self.k),
            "values": torch.randn(self.b, n, self.v, self.u),
            "table": torch.randn(*self.table, self.k, self.u),
        }
        t = {name: x.to(device, dtype) for name, x in t.items()}
        if self.content:
            t["lam_c"] = torch.randn(self.b, self.k, self.v, device=device)
        return t

    def run(self, t: dict[str, Tensor]) -> Tensor:
        return fused.fused(t["q"], t["values"], t["table"], t.get("lam_c"), self.grid)

    def reference(self, t: dict[str, Tensor]) -> Tensor:
        y = lambda_reference(t["q"], None, t["values"], relative_embeddings(t["table"], self.grid))
        return y + torch.einsum("bnhk,bkv->bnhv", t["q"], t["lam_c"]) if self.content else y

    def problem(self, dtype: torch.dtype = torch.float32, device: str = "cuda") -> Problem:
        n = math.prod(self.grid)
        sizes = (self.b, n, n, self.h, self.k, self.v, self.u)
        return Problem(*sizes, self.grid, self.grid, self.table, dtype=dtype, device=device)


CASES = {
    "window": Case((5, 7), (3, 5), k=16, v=16),
    "global": Case((3, 4), (5, 7), v=16),
    "scope wider than the map": Case((3, 4), (9, 11), b=3, content=False),
    "H = 1": Case((1, 9), (5, 5), h=1, k=16),
    "W = 1": Case((9, 1), (5, 5), b=1),
    "one position": Case((1, 1), (3, 3), v=16),
    "u = 2": Case((4, 5), (3, 7), b=1, u=2, k=16, v=16),
    "u = 2, no content": Case((3, 4), (5, 3), u=2, content=False),
    "batch 1, one head": Case((4, 5), (3, 3), b=1, h=1, v=16),
    "three examples": Case((5, 3), (3, 5), b=3, k=16, v=16, content=False),
    "1-D window": Case((13,), (7,), k=16),
    "1-D global": Case((6,), (11,), b=1, h=1, u=2),
    "deep keys": Case((3, 4), (3, 5), h=2, k=33),
    "many heads": Case((3, 4), (3, 5), b=1, h=11, v=16),
}
# Small enough that the maps below need several of everything: strips, tiles, parts of v, steps, shifts and splits.
SMALL = fused.Tiles(32, 32, 16, 16, 32, 16 * 64, 16, 4, 2)
TILED = {
    "strips and steps": Case((4, 11), (3, 5), b=1, h=2, k=16, v=16),
    "parts of b and v": Case((2, 3), (3, 5), b=3, h=2, v=40),
    "global, u = 2": Case((3, 6), (5, 11), b=1, h=5, v=20, u=2),
    "1-D": Case((37,), (9,), b=1, h=1, content=False),
}


def forward_and_gradients(f, t: dict[str, Tensor], dy: Tensor | None = None) -> tuple[dict[str, Tensor], Tensor]:
    """The result, the gradient of each input, and what came from above."""
    leaves = {name: x.detach().requires_grad_() for name, x in t.items()}
    y = f(leaves)
    dy = torch.randn(y.shape, device=y.device).to(y.dtype) if dy is None else dy.to(y.dtype)
    return {"y": y.detach(), **dict(zip(leaves, torch.autograd.grad(y, list(leaves.values()), dy), strict=True))}, dy


def assert_equals_the_reference(case: Case, device: str) -> None:
    t = case.tensors(torch.float32, device)
    got, dy = forward_and_gradients(case.run, t)
    want, _ = forward_and_gradients(case.reference, {name: x.double() for name, x in t.items()}, dy)
    for name, x in want.items():
        assert got[name].shape == x.shape
        scale = x.abs().max()
        torch.testing.assert_close(got[name].double(), x, rtol=0, atol=3e-6 * scale, msg=lambda m, n=name: f"{n}: {m}")


@devices
@pytest.mark.parametrize("name", CASES)
def test_equals_the_reference_forward_and_every_gradient(name: str, device: str) -> None:
    assert fused.why_not(CASES[name].problem(device=device)) is None
    assert_equals_the_reference(CASES[name], device)


@devices
@pytest.mark.parametrize("name", TILED)
def test_maps_of_many_tiles_equal_the_reference(name: str, device: str, monkeypatch) -> None:
    monkeypatch.setattr(fused, "_tiles", lambda *_: SMALL)
    monkeypatch.setattr(fused, "_PROGRAMS", 4)
    assert_equals_the_reference(TILED[name], device)


def plain(t: dict[str, Tensor], grid: tuple[int, ...]) -> Tensor:
    """The paper's order in the inputs' own dtype, as anybody would write it."""
    lam = torch.einsum("nmku,bmvu->bnkv", relative_embeddings(t["table"], grid), t["values"])
    return torch.einsum("bnhk,bnkv->bnhv", t["q"], lam + t["lam_c"].to(lam.dtype)[:, None])


@devices
@pytest.mark.parametrize("dtype", [torch.float32, *LOW], ids=str)
def test_rounding_is_within_3x_rms_and_5x_max_of_the_plain_einsum_in_the_same_dtype(dtype, device: str) -> None:
    case = Case((6, 5), (11, 5), h=4, k=16, v=12, u=2)
    t = case.tensors(dtype, device)
    t["lam_c"] = t["lam_c"].to(dtype).float()  # so that both start from the same numbers
    got, dy = forward_and_gradients(case.run, t)
    easy, _ = forward_and_gradients(lambda t: plain(t, case.grid), t, dy)
    exact, _ = forward_and_gradients(case.reference, {name: x.double() for name, x in t.items()}, dy)
    eps = torch.finfo(dtype).eps
    assert got["y"].dtype == dtype
    for name, x in exact.items():
        ours, theirs, scale = got[name].double() - x, easy[name].double() - x, x.square().mean().sqrt()
        assert ours.square().mean().sqrt() <= 3 * theirs.square().mean().sqrt() + 2 * eps * scale, name
        assert ours.abs().max() <= 5 * theirs.abs().max() + 4 * eps * scale, name


@devices
def test_a_lambda_beyond_float16_does_not_overflow_where_the_result_fits(device: str) -> None:
    case = Case((6, 6), (11, 11), b=1, h=4, k=16, v=16)
    t = case.tensors(torch.float16, device)
    t["q"], t["values"], t["table"] = t["q"] / 256, t["values"] * 128, t["table"] * 128
    lam = torch.einsum("nmku,bmvu->bnkv", relative_embeddings(t["table"].double(), case.grid), t["values"].double())
    got, _ = forward_and_gradients(case.run, t, torch.full((1, 36, 4, 16), 1e-3, device=device))
    assert lam.abs().max() > torch.finfo(torch.float16).max
    assert all(x.isfinite().all() for x in got.values())


@devices
def test_equal_inputs_give_equal_bits(device: str) -> None:
    case = Case((6, 7), (5, 5), b=3, k=16, v=16) if device == "cpu" else Case((28, 28), (23, 23), b=64, h=4, k=16, v=32)
    t = case.tensors(torch.bfloat16, device)
    first, dy = forward_and_gradients(case.run, t)
    for _ in range(1 if device == "cpu" else 20):
        again, _ = forward_and_gradients(case.run, t, dy)
        assert all(torch.equal(again[name], x) for name, x in first.items())


@devices
def test_only_the_gradients_that_are_asked_for_are_computed(device: str, monkeypatch) -> None:
    case, ran, launch = Case((3, 4), (3, 3), h=1), [], fused._launch
    monkeypatch.setattr(fused, "_launch", lambda name, *a, **k: ran.append(name) or launch(name, *a, **k))
    t = case.tensors(torch.float32, device)
    t["table"].requires_grad_()
    y = case.run(t)
    torch.autograd.grad(y.sum(), t["table"])
    assert ran == ["lambda_kernel", "table_kernel", "fold_kernel"]


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # opcheck reads it itself
@devices
@pytest.mark.parametrize("u", [1, 2])
def test_the_operators_pass_opcheck(u: int, device: str) -> None:
    case = Case((3, 4), (3, 5), h=1, u=u)
    t = {name: x.requires_grad_() for name, x in case.tensors(torch.float32, device).items()}
    torch.library.opcheck(fused._fused, (*t.values(), [3, 4]))
    torch.library.opcheck(fused._fused, (t["q"], t["values"], t["table"], None, [3, 4]))
    q, values, table, lam_c = (x.detach() for x in t.values())
    dy = torch.randn(2, 12, 1, 3, device=device)
    for op, args in (
        (fused._fused_dq, (values, table, lam_c, dy, [3, 4])),
        (fused._fused_dvalues, (q, table, dy, [3, 4])),
        (fused._fused_dtable, (q, values, dy, [3, 4], [3, 5])),
        (fused._fused_dcontent, (q, dy)),
    ):
        torch.library.opcheck(op, args)


@devices
def test_compiles_as_one_graph_and_strided_inputs_give_the_same_numbers(device: str) -> None:
    case = Case((3, 4), (3, 5), h=2, u=2)
    t = case.tensors(torch.float32, device)
    want, dy = forward_and_gradients(case.run, t)
    got, _ = forward_and_gradients(torch.compile(case.run, fullgraph=True, backend="aot_eager"), t, dy)
    strided = {name: x.transpose(0, -1).contiguous().transpose(0, -1) for name, x in t.items()}
    also, _ = forward_and_gradients(case.run, strided, dy)
    for name, x in want.items():
        assert torch.equal(got[name], x)
        assert torch.equal(also[name], x)


@devices
def test_autocast_gives_its_dtype_and_float32_gradients(device: str) -> None:
    case = Case((3, 4), (3, 3), h=1, v=16)
    t = case.tensors(torch.float32, device)
    with torch.autocast(device, torch.bfloat16):
        got, _ = forward_and_gradients(case.run, t)
    assert got.pop("y").dtype == torch.bfloat16
    assert all(g.dtype == torch.float32 for g in got.values())


@devices
def test_a_second_derivative_raises(device: str) -> None:
    t = {name: x.requires_grad_() for name, x in Case((1, 2), (1, 3), b=1).tensors(torch.float32, device).items()}
    (dq,) = torch.autograd.grad(Case((1, 2), (1, 3), b=1).run(t).square().sum(), t["q"], create_graph=True)
    with pytest.raises(RuntimeError, match="autograd"):
        dq.sum().backward()


@devices
@pytest.mark.parametrize("name", tiles.CANDIDATES)
def test_every_kernel_is_timed_with_other_tiles_and_these_change_nothing(name: str, device: str, monkeypatch) -> None:
    monkeypatch.setitem(tiles.CANDIDATES, name, [{}, {"columns": 32, "rows": 64, "positions": 32, "pairs": 64 * 32}])
    row = tiles.bench(name, (4, 3, 16), 2, torch.float32, device, 0.0)
    assert set(row["ms"]) == {"today", "columns 32, rows 64, positions 32, pairs 2048"}
    assert row["best"] in row["ms"]
    assert not row["left_out"]


def test_the_rate_of_the_tiles_counts_the_contexts_within_window_and_map() -> None:
    pairs = relative_embeddings(torch.ones(5, 5, 1, 1), (6, 6)).sum().item()
    assert tiles.macs((6, 5, 24), 3) == 3 * pairs * 16 * 24


# --- what it refuses ------------------------------------------------------------------------------------------------

PROBLEM = Case((14, 14), (23, 23), b=8, h=4, k=16, v=64).problem()


@pytest.mark.parametrize(
    ("problem", "reason"),
    [
        (PROBLEM, None),
        (replace(PROBLEM, dtype=torch.bfloat16), None),
        (replace(PROBLEM, grid=(196,), context_grid=(196,), table=(27,)), None),
        (replace(PROBLEM, device="cpu"), None if INTERPRETED else "not on cpu"),
        (replace(PROBLEM, dtype=torch.float64), "not float64"),
        (replace(PROBLEM, table=None), "no positions"),
        (replace(PROBLEM, table=None, embeddings=True), "got embeddings"),
        (replace(PROBLEM, grid=(4, 7, 7), context_grid=(4, 7, 7), table=(3, 3, 3)), r"1 or 2 axes.*\(4, 7, 7\)"),
        (replace(PROBLEM, context_grid=(28, 7)), r"\(14, 14\) and the context grid \(28, 7\) differ"),
        (replace(PROBLEM, mask="queries"), "mask by query, here 196 x 196"),
        (replace(PROBLEM, k=65), "k = 65, h = 4"),
        (replace(PROBLEM, h=17), "k = 16, h = 17"),
        (replace(PROBLEM, b=0), "nothing to compute: b=0"),
        (replace(PROBLEM, b=10**6), "here 50,176,000,000 and 196"),
    ],
)
def test_why_not_gives_the_reason_with_the_sizes(problem: Problem, reason: str | None) -> None:
    answer = fused.why_not(problem)
    assert answer is None if reason is None else re.search(reason, answer or ""), answer


def test_importing_the_module_imports_no_triton() -> None:
    code = "import sys, lambdanets.ops.fused; sys.exit('triton' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("scope", [3, 7, 13, 23, 55, 111])
@pytest.mark.parametrize(("height", "width"), [(56, 56), (28, 28), (7, 7), (1, 50), (9, 1), (19, 5)])
def test_the_tiles_cover_the_map_and_every_offset_once(height: int, width: int, scope: int) -> None:
    ry = rx = scope
    for positions in (4, 16, 128):
        cut = fused._strips(height, width, ry, rx, positions)
        seen = []
        for tile in range(cut.tiles):
            left = tile // cut.tiles_each * cut.columns
            across = min(cut.columns, width - left)
            for i in range(tile % cut.tiles_each * positions, (tile % cut.tiles_each + 1) * positions):
                if i < height * across:
                    seen.append((i // across, left + i % across))
        assert sorted(seen) == [(y, x) for y in range(height) for x in range(width)]
    for K in (16, 32, 64):
        cut = fused._shifts(height, width, ry, rx, 4, K, 128 * 256)
        tall, wide = cut.down * cut.Y, cut.across * cut.X
        assert cut.N * K * cut.Y * cut.X <= 128 * 256
        for oy in range(-min(ry // 2, height - 1), min(ry // 2, height - 1) + 1):
            assert 0 <= oy - cut.low_y < tall
        for x0 in range(0, width, cut.N):  # what a row of queries at x0 meets within the window and the map
            for m in range(max(0, x0 - rx // 2), min(width, x0 + cut.N + rx // 2)):
                assert 0 <= m - x0 - cut.low_x < wide


# --- compiled without a GPU, emulated without a GPU ------------------------------------------------------------------

if not INTERPRETED:

    @pytest.mark.slow
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, "tf32"], ids=str)
    @pytest.mark.parametrize(
        ("side", "scope", "v", "u"), [(56, 23, 16, 1), (28, 7, 32, 4), (14, 27, 64, 1), (7, 13, 128, 1)]
    )
    def test_every_kernel_compiles_for_hopper_without_spills(
        dtype, side: int, scope: int, v: int, u: int, monkeypatch, tmp_path: Path
    ) -> None:
        compiled = {}

        def launch(name: str, programs: int, launched: fused.Tiles, **given) -> None:
            compiled[f"{name} {given.get('GRADIENT', '')}"] = compile_for_hopper(name, launched, given)

        monkeypatch.setattr(fused, "_launch", launch)
        monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
        case = Case((side, side), (scope, scope), b=128, h=4, k=16, v=v, u=u)  # tiles depend on it
        t = case.tensors(torch.float32 if dtype == "tf32" else dtype, "cpu")
        torch.set_float32_matmul_precision("high" if dtype == "tf32" else "highest")
        try:
            forward_and_gradients(case.run, t)
        finally:
            torch.set_float32_matmul_precision("highest")
        assert len(compiled) == 6
        for name, (kernel, usage) in compiled.items():
            # Without tensor cores ptxas may spill a few registers to fit one more program on a multiprocessor.
            assert int(usage["STACK"]) <= (32 if dtype == torch.float32 else 0), (name, usage)
            assert int(usage["LOCAL"]) == 0, (name, usage)
            assert int(usage["REG"]) <= 255
            assert kernel.metadata.shared <= 227 * 1024, name
            if dtype in LOW and name.split("_")[0] in ("lambda", "values", "table"):
                assert "wgmma" in kernel.asm["ptx"], name
            if dtype in LOW and name.split("_")[0] in ("values", "table"):  # else each step would wait for its loads
                assert "ld.global" not in kernel.asm["ptx"], name

    def compile_for_hopper(name: str, tiles: fused.Tiles, given: dict):
        """The kernel as `_launch` would ask for it, for compute capability 9.0, and what ptxas made of it."""
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource

        from lambdanets.ops import fused_kernels

        kernel = getattr(fused_kernels, name)
        types = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}
        signature, constants, aligned = {}, {}, {}
        for place, parameter in enumerate(kernel.params):
            a = given[parameter.name]
            kind = types[a.dtype] if isinstance(a, Tensor) else "i32"
            if parameter.is_constexpr or (kind == "i32" and a == 1):  # triton.jit makes a 1 a constant
                kind, constants[parameter.name] = "constexpr", a
            elif isinstance(a, Tensor) or a % 16 == 0:
                aligned[place,] = [["tt.divisibility", 16]]
            signature[parameter.name] = kind
        options = {"num_warps": tiles.warps, "num_stages": tiles.stages, "enable_fp_fusion": True}
        binary = triton.compile(ASTSource(kernel, signature, constants, aligned), GPUTarget("cuda", 90, 32), options)
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        cubin = Path(os.environ["TRITON_CACHE_DIR"]) / "kernel.cubin"
        cubin.write_bytes(binary.asm["cubin"])
        text = subprocess.run([tool, "-res-usage", cubin], check=True, capture_output=True, text=True).stdout
        return binary, dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", text))

    @pytest.mark.parametrize("part", ["reference and not tiles", "not reference or tiles"])
    def test_the_kernels_pass_this_file_in_the_interpreter(part: str) -> None:
        command = [
            sys.executable,
            "-m",
            "pytest",
            __file__,
            "-q",
            "-m",
            "not gpu",
            "-k",
            part,
            "-p",
            "no:cacheprovider",
        ]
        done = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-1000:]
