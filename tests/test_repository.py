"""Rules that hold for the repository as a whole: what lies where, who imports whom, what may not be written."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "scale_guide"
TOP_LEVEL = {"pyproject.toml", "README.md", "scale_guide", "accelerate_configs", "ds_configs", "scripts", "tests"}
MAX_LINES = 300

# From the bottom up: a module imports from its own layer and from those before it.
LAYERS = [
    {"config", "disk", "finite_gradients", "gradient_watch", "lookup", "manifest", "rows", "running_statistics"},
    {"stopwatch"},
    {"statistics", "similarity", "models", "tasks", "activations", "guide", "guide_weights"},
    {"layer_weights"},
    {"objective", "layer_map", "data_order", "schedule", "reading", "distillation"},
    {"layer_rows"},
    {"step"},
    {"guidance"},
    {"recipe", "build"},
    {"tracking", "trackers", "launch", "sharding"},
    {"engine_state"},
    {"engine", "loading"},
    {"bad_steps", "checkpoint", "evaluate", "journal"},
    {"trainer", "networks", "analysis"},
    {"run"},
    {"commands"},
    {"__main__"},
]
LAYER = {name: depth for depth, names in enumerate(LAYERS) for name in names}
# Third-party module -> the parts of the package that may import it.
ONLY = {
    "torch.distributed": {"statistics"},
    "accelerate": {"engine", "launch"},
}
# Networks, data and measures know nothing of processes: of the package they see themselves and these.
ALONE = {"models": {"lookup"}, "tasks": {"lookup"}, "similarity": set[str]()}


def tracked_files() -> list[Path]:
    """Returns every file git tracks or would take in."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    return [path for name in sorted(set(names)) if (path := ROOT / name).is_file()]


FILES = tracked_files()
MODULES = [path for path in FILES if path.suffix == ".py" and path.is_relative_to(PACKAGE)]


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def part(path: Path) -> str:
    """Returns the first name below scale_guide: a sub-package or a module."""
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imports(path: Path) -> Iterator[str]:
    """Yields the full dotted name of each thing imported, wherever in the file, relative imports resolved."""
    here = path.relative_to(ROOT).parent.parts
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = here[: len(here) - node.level + 1] if node.level else ()
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield from (f"{module}.{alias.name}" for alias in node.names)


def parts_imported(path: Path) -> set[str]:
    """Returns the parts of the package that a module of it imports."""
    names = (name.split(".") for name in imports(path))
    return {name[1] for name in names if name[0] == "scale_guide" and len(name) > 1}


def test_the_top_level_holds_only_what_belongs_there() -> None:
    names = {relative(path).split("/")[0] for path in FILES}
    assert {name for name in names if not name.startswith(".")} <= TOP_LEVEL


@pytest.mark.parametrize("path", MODULES, ids=relative)
def test_imports_point_down(path: Path) -> None:
    if part(path) == "__init__":
        return
    assert part(path) in LAYER, f"say in LAYERS of this file where {part(path)} belongs"
    above = {name for name in parts_imported(path) if LAYER.get(name, 0) > LAYER[part(path)]}
    assert not above, f"{relative(path)} imports from above itself: {', '.join(sorted(above))}"


@pytest.mark.parametrize("path", MODULES, ids=relative)
def test_only_some_know_of_processes(path: Path) -> None:
    for module, allowed in ONLY.items():
        if part(path) not in allowed:
            found = [name for name in imports(path) if name == module or name.startswith(module + ".")]
            assert not found, f"{relative(path)} imports {found[0]}; only {', '.join(sorted(allowed))} may"


@pytest.mark.parametrize("path", [path for path in MODULES if part(path) in ALONE], ids=relative)
def test_networks_data_and_measures_stand_alone(path: Path) -> None:
    assert parts_imported(path) <= {part(path)} | ALONE[part(path)]


@pytest.mark.parametrize("path", MODULES, ids=relative)
def test_files_stay_short(path: Path) -> None:
    num_lines = len(path.read_text().splitlines())
    assert num_lines <= MAX_LINES, f"{relative(path)} has {num_lines} lines, more than {MAX_LINES}: split it"


@pytest.mark.parametrize("path", MODULES, ids=relative)
def test_what_is_public_is_documented(path: Path) -> None:
    tree = ast.parse(path.read_text())
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    owners = [tree, *(node for node in tree.body if isinstance(node, ast.ClassDef) and not node.name.startswith("_"))]
    public = [node for owner in owners for node in owner.body if isinstance(node, kinds) and node.name[0] != "_"]
    missing = [f"{node.name} (line {node.lineno})" for node in public if not ast.get_docstring(node)]
    assert ast.get_docstring(tree) or not tree.body, f"{relative(path)} does not say what it is for"
    assert not missing, f"{relative(path)}: no docstring: {', '.join(missing)}"


@pytest.mark.parametrize("path", MODULES, ids=relative)
def test_no_exception_is_swallowed(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ExceptHandler):
            caught = ast.unparse(node.type) if node.type else "everything"
            assert not re.search(r"everything|\b(Base)?Exception\b", caught), f"{relative(path)}:{node.lineno}"


# Put together from pieces, so that this file passes its own test.
FORBIDDEN = {
    "a path of one machine": "/(?:" + "|".join(["wo" + "rk", "ro" + "ot", "ho" + "me", "Us" + "ers"]) + r")/\w",
    "a package registry": "|".join(
        ["pypi" + r"\.org", "python" + r"hosted\.org", "--index" + "-url", "find" + "-links"]
    ),
}


@pytest.mark.parametrize("path", FILES, ids=relative)
@pytest.mark.parametrize("what", FORBIDDEN)
def test_no_file_names_one_machine_or_registry(path: Path, what: str) -> None:
    found = re.search(FORBIDDEN[what], path.read_text(errors="replace"))
    assert not found, f"{relative(path)} holds {what}: {found and found.group(0)}"


def readme_commands() -> list[str]:
    """Returns the shell lines of the README's fenced blocks, continued lines joined."""
    readme = ROOT / "README.md"
    text = readme.read_text() if readme.exists() else ""
    blocks = re.findall(r"^```(?:bash|sh|shell|console)?\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    return [line for block in blocks for line in block.replace("\\\n", " ").splitlines() if line.strip()]


@pytest.mark.parametrize("command", readme_commands())
def test_files_named_in_readme_commands_exist(command: str) -> None:
    files = re.findall(r"\b(?:accelerate_configs|ds_configs|scripts|tests)/[\w./-]+", command)
    assert [file for file in files if not (ROOT / file).exists()] == []
    for recipe in re.findall(r"--config[ =]([\w-]+)(?![\w./-])", command):
        if recipe.islower():
            assert (PACKAGE / "recipes" / f"{recipe}.yaml").exists(), f"no recipe {recipe}"


def test_readme_has_the_two_commands() -> None:
    text = "\n".join(readme_commands())
    assert 'pip install -e ".[test]" && pytest' in text
    assert re.search(r"pip install -e \. && accelerate launch --config_file accelerate_configs/cpu\.yaml", text)


def test_ci_runs_the_readme_test_command() -> None:
    script = ROOT / ".ci" / "run"
    assert script.stat().st_mode & 0o111
    assert 'pip install -e ".[test]" && ' in script.read_text()
    assert "bash .ci/run" in (ROOT / ".github" / "workflows" / "ci.yml").read_text()


def test_console_script_is_the_module() -> None:
    assert 'scale-guide = "scale_guide.__main__:main"' in (ROOT / "pyproject.toml").read_text()
    assert callable(importlib.import_module("scale_guide.__main__").main)


@pytest.mark.slow
def test_the_wheel_ships_every_recipe(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(tmp_path), str(ROOT)]
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL)
    (wheel,) = tmp_path.glob("*.whl")
    shipped = {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("scale_guide/")}
    ours = {relative(path) for path in FILES if path.is_relative_to(PACKAGE)}
    assert ours == shipped
