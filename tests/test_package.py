"""The house itself: arrows between files, lazy imports, nothing unsafe, a README that runs."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "lambdanets"
MODULES = {".".join(p.relative_to(PACKAGE).with_suffix("").parts): p for p in PACKAGE.rglob("*.py")}

# Who may import whom: a module imports only from rooms to its left, or from its own.
ROOMS = [
    {"errors", "files", "untouched"},
    {"ops.reference", "ops.content", "ops.blocks", "ops.fused_kernels"},
    {"ops.eager", "ops.fused"},
    {"ops.convolution"},
    {"ops.fourier"},
    {"ops.strategies"},
    {"ops.tune"},
    {"ops.lambda_op"},
    {"ops.__init__"},
    {"projections"},
    {"layer"},
    {"resnet"},
    {"cost", "weights"},
    {"inference"},
    {"recipes.__init__", "recipes.digits", "recipes.folder", "recipes.imagenet"},
    {"optim", "state"},
    {"run_lock"},
    {"steps"},
    {"order"},
    {"decode"},
    {"listing"},
    {"data", "archive", "manifest", "shards"},  # data.folder opens a folder of shards
    {"journal", "transforms"},
    {"pack", "batches", "distributed", "watchdog"},
    {"evaluate"},
    {"record", "report"},
    {"checkpoint"},
    {"page", "log", "learner"},
    {"results", "start"},
    {"train"},
    {"demo"},
    {"cli"},
    {"__main__"},
]
# These know nothing of the operation or the models.
FREE_OF_MODELS = {
    "decode",
    "listing",
    "order",
    "data",
    "archive",
    "manifest",
    "shards",
    "journal",
    "pack",
    "transforms",
    "batches",
    "optim",
    "evaluate",
    "report",
    "page",
}
FREE_OF_MODELS |= {"recipes.__init__"}


def imports(name: str) -> set[str]:
    """Modules of ours that a file imports, at the top or inside functions; the lazy names of __init__ not counted."""
    tree, package = ast.parse(MODULES[name].read_text()), ["lambdanets", *name.split(".")[:-1]]
    found = set()
    for node in list(ast.walk(tree)):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = []  # types are no arrows
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            path = [*base, *(node.module or "").split(".")] if node.module else base
            if path[:1] == ["lambdanets"]:
                named = {".".join([*path[1:], a.name]) for a in node.names} & set(MODULES)
                whole = ".".join(path[1:])
                found |= named or {m for m in (whole, f"{whole}.__init__") if m in MODULES}
    return found - {name}


def test_every_module_imports_only_from_the_rooms_before_it() -> None:
    room = {m: i for i, names in enumerate(ROOMS) for m in names}
    assert set(MODULES) - {"__init__"} <= set(room)
    for name in MODULES:
        if name != "__init__":
            late = {m for m in imports(name) if room[m] > room[name]}
            assert not late, f"{name} imports {late}"


def test_data_and_recipes_know_nothing_of_the_models() -> None:
    models = {m for names in ROOMS[1:9] for m in names}
    for name in FREE_OF_MODELS & set(MODULES):
        assert not imports(name) & models, name
    assert {"layer", "ops.__init__"} & imports("resnet") == {"layer"}  # the models know the layer, not its strategies


def test_no_file_is_a_drawer_for_everything_or_longer_than_500_lines() -> None:
    for name, path in MODULES.items():
        assert not set(name.split(".")) & {"utils", "common", "helpers", "misc", "base"}
        assert len(path.read_text().splitlines()) <= 500, f"{name} is long: split it by what a reader looks for"


def test_r90_nothing_unpickles_evaluates_or_calls_a_shell() -> None:
    unsafe = re.compile(
        r"pickle\.load|weights_only\s*=\s*False|yaml\.load\(|\beval\(|shell\s*=\s*True|(?<!safetensors\.)torch\.load\(|except:"
    )
    for name, path in MODULES.items():
        for line in path.read_text().splitlines():
            assert not unsafe.search(line) or ".eval()" in line, f"{name}: {line.strip()}"


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_the_package_and_its_recipes_does_not_import_torch() -> None:
    assert (
        python("import sys, lambdanets, lambdanets.recipes, lambdanets.cli; print('torch' in sys.modules)") == "False\n"
    )


@pytest.mark.parametrize(
    "order",
    ["import lambdanets, timm", "import timm, lambdanets", "import lambdanets; from timm.layers import SEModule"],
)
def test_the_models_are_in_timm_whichever_is_imported_first(order: str) -> None:
    assert python(f"{order}\nimport timm; print(timm.is_model('lambda_resnet152'))") == "True\n"


def test_every_public_name_is_there_and_an_unknown_one_says_what_is() -> None:
    import lambdanets

    assert all(getattr(lambdanets, name) is not None for name in lambdanets.__all__)
    assert set(lambdanets.__all__) <= set(dir(lambdanets))
    with pytest.raises(AttributeError, match="lambdanets has no 'LambdaConv'; it has LambdaLayer"):
        lambdanets.LambdaConv  # noqa: B018


README = (ROOT / "README.md").read_text()


def test_the_python_blocks_of_the_readme_run_in_order() -> None:
    blocks = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert blocks
    python("\n".join(blocks))


def test_the_readme_names_every_file_and_no_other() -> None:
    listed = set(re.findall(r"^\| `(lambdanets/[\w/]+\.py)` \|", README, flags=re.MULTILINE))
    skip = {"__init__", "__main__", "ops.__init__"}
    assert listed == {f"lambdanets/{p.relative_to(PACKAGE).as_posix()}" for m, p in MODULES.items() if m not in skip}


def test_every_dependency_and_extra_has_its_reason_in_the_readme() -> None:
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = project["dependencies"] + [d for group in project["optional-dependencies"].values() for d in group]
    for requirement in wanted:
        name = re.match(r"[\w-]+", requirement)[0]
        assert re.search(rf"^\| .*`{name}`.* \|", README, flags=re.MULTILINE | re.IGNORECASE), name


def test_R97_what_is_installed_is_pinned_and_older_versions_with_known_holes_are_refused() -> None:
    import tomllib

    def numbers(version: str) -> tuple[int, ...]:
        return tuple(int(part) for part in re.findall(r"\d+", version.split("+")[0])[:3])

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = project["dependencies"] + [d for group in project["optional-dependencies"].values() for d in group]
    floors = dict(re.fullmatch(r"([\w-]+)(?:\[\w+\])?>=([\d.]+)", requirement).groups() for requirement in wanted)
    assert numbers(floors["torch"]) >= (2, 10)  # CVE-2026-24747
    assert numbers(floors["pillow"]) >= (12, 3)
    lines = (ROOT / "constraints.txt").read_text().split()
    pins = {name.lower().replace("_", "-"): version for name, version in (line.split("==") for line in lines)}
    for name, floor in floors.items():
        assert numbers(pins[name]) >= numbers(floor), name
    lock = [line for line in (ROOT / "requirements.lock").read_text().splitlines() if not line.startswith("#")]
    locked = dict(re.fullmatch(r"([\w.-]+)==(\S+) --hash=sha256:[0-9a-f]{64}", line).groups() for line in lock)
    assert {name.lower().replace("_", "-"): version for name, version in locked.items()} == pins


def test_every_quoted_result_file_exists() -> None:
    for path in re.findall(r"benchmarks/results/[\w.-]+\.json", README):
        assert (ROOT / path).is_file(), path
