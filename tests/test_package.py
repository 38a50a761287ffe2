"""The house itself: arrows between files, lazy imports, nothing unsafe, a README that runs."""

import ast
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "lambdanets"
MODULES = {".".join(p.relative_to(PACKAGE).with_suffix("").parts): p for p in PACKAGE.rglob("*.py")}

# Who may import whom, folder by folder; a folder's files may import one another, but in no circle.
ARROWS = {
    "errors": "",
    "files": "",
    "untouched": "",
    "ops": "",
    "paper": "errors",
    "recipes": "paper errors",
    "layers": "ops errors untouched",
    "models": "layers ops errors untouched",
    "data": "errors files",
    "runs": "recipes errors files",
    "training": "runs recipes data.order errors files untouched",
    "classification": "training models runs data recipes errors files",
    "detection": "training models layers runs data recipes errors files",
    "pseudo_labels": "classification training models runs data recipes errors files",
    "commands": "classification detection pseudo_labels training models runs data recipes errors files",
    "cli": "commands errors",
    "__main__": "cli",
}


def imports(name: str) -> set[str]:
    """Modules of ours that a file imports, at its top, inside functions and for types alone."""
    tree, package = ast.parse(MODULES[name].read_text()), ["lambdanets", *name.split(".")[:-1]]
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            path = [*base, *(node.module or "").split(".")] if node.module else base
            if path == ["lambdanets"] and [a.name for a in node.names] == ["__version__"]:
                continue
            if path[:1] == ["lambdanets"]:
                named = {".".join([*path[1:], a.name]) for a in node.names} & set(MODULES)
                whole = ".".join(path[1:])
                found |= named or {m for m in (whole, f"{whole}.__init__") if m in MODULES}
        elif isinstance(node, ast.Import):
            names = [a.name.removeprefix("lambdanets.") for a in node.names if a.name.startswith("lambdanets")]
            found |= {m for n in names for m in (n, f"{n}.__init__") if m in MODULES}
    return found - {name}


def test_a_folder_imports_only_what_lies_below_it() -> None:
    for name in MODULES:
        room = name.split(".")[0]
        if name == "__init__":  # it has the public names of all
            continue
        allowed = {room, *ARROWS[room].split()}
        wrong = {m for m in imports(name) if not {m, m.split(".")[0]} & allowed}
        assert not wrong, f"{name} imports {wrong}: {room} may import {ARROWS[room] or 'nothing of ours'}"


def test_no_file_imports_one_that_imports_it() -> None:
    left = {name: imports(name) - {"__init__"} for name in MODULES if not name.endswith("__init__")}
    while free := [name for name, of in left.items() if not of & set(left)]:
        for name in free:
            del left[name]
    assert not left, f"a circle among {sorted(left)}"


def test_no_file_is_a_drawer_for_everything_or_longer_than_500_lines() -> None:
    for name, path in MODULES.items():
        assert not set(name.split(".")) & {"utils", "common", "helpers", "misc", "base"}
        assert len(path.read_text().splitlines()) <= 500, f"{name} is long: split it by what a reader looks for"


def test_nothing_unpickles_evaluates_or_calls_a_shell() -> None:
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
    with pytest.raises(AttributeError, match="lambdanets has no 'LambdaConv'; it has Detector, HeadSizes, LambdaLayer"):
        lambdanets.LambdaConv  # noqa: B018


README = (ROOT / "README.md").read_text()
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_python_blocks_of_a_page_run_in_order(page: Path) -> None:
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.DOTALL)
    assert blocks or page.name != "README.md"
    if blocks:
        python("\n".join(blocks))


def test_every_command_on_a_page_is_understood_and_every_link_leads_somewhere(monkeypatch) -> None:
    from lambdanets import cli

    found = 0
    for page in PAGES:
        text = re.sub(r"\\\n\s*", "", page.read_text())  # a command may go over several lines
        for line in re.findall(r"^    (?:.* -m )?(lambdanets (?!\.).*)$", text, flags=re.MULTILINE):
            words = shlex.split(line.partition("  #")[0])[1:]
            if any(word in ("|", ">", "...", "&&") for word in words):
                continue
            found += 1
            cli._parser().parse_args(words)
        for link in re.findall(r"\]\((?!http)([^)#]+)\)", text):
            assert (page.parent / link).exists(), f"{page.name}: {link}"
    assert found >= 15


def test_the_readme_names_every_folder_and_contributing_every_file() -> None:
    folders = {name.split(".")[0] for name in MODULES if "." in name}
    assert set(re.findall(r"^\| `lambdanets/(\w+)/` \|", README, flags=re.MULTILINE)) == folders
    listed = set(re.findall(r"\b([\w/]+\.py)\b", (ROOT / "CONTRIBUTING.md").read_text()))
    files = {p.relative_to(PACKAGE).as_posix() for m, p in MODULES.items() if not m.endswith("__init__")}
    assert files <= listed, files - listed


def test_every_dependency_and_extra_has_its_reason_in_the_readme() -> None:
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = project["dependencies"] + [d for group in project["optional-dependencies"].values() for d in group]
    for requirement in wanted:
        name = re.match(r"[\w-]+", requirement)[0]
        assert re.search(rf"^\| .*`{name}`.* \|", README, flags=re.MULTILINE | re.IGNORECASE), name


def test_what_is_installed_is_pinned_and_older_versions_with_known_holes_are_refused() -> None:
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
    for page in PAGES:
        for path in re.findall(r"benchmarks/results/[\w.-]+\.json", page.read_text()):
            assert (ROOT / path).is_file(), path
