"""Who may import whom: the rules of docs/architecture.md, checked on the source and on what gets loaded."""

import ast
import re
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "python" / "helexa"
COMMON = {"errors", "settings", "log"}
ALLOWED = {
    "errors": set(),
    "log": set(),
    "settings": {"errors"},
    "serving": {"errors"},
    "server": {"wire"},
    "quant": set(),
    "ops": {"quant", "_C"},
    "layers": {"ops", "quant"},
    "weights": {"ops", "quant"},
    "models": {"layers", "ops", "quant"},
    "engine": {"models", "layers", "weights", "ops", "quant"},
    "wire": set(),
    "gateway": {"server", "serving", "wire"},
    "neuron": {"engine", "server", "serving", "weights", "wire"},
    "cli": {"gateway", "neuron", "serving", "wire", "engine", "weights"},
}
LIGHT = {"errors", "settings", "log", "server", "serving", "wire", "gateway", "cli"}
HEAVY = {"torch", "numpy", "transformers", "tokenizers", "jinja2"}
# Files that may import inside a function, because what they import is heavy and often not wanted.
DEFERRING = ("cli/", "models/__init__.py")


def modules() -> dict[str, Path]:
    """Dotted module name to file, for every module of the package."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def imports(path: Path, *, top_only: bool) -> list[tuple[str, int]]:
    """What a file imports as dotted names with line numbers; type-checking-only imports do not count."""
    tree = ast.parse(path.read_text("utf-8"))
    nodes = _top_level(tree.body) if top_only else ast.walk(tree)
    names = []
    for node in nodes:
        if isinstance(node, ast.Import):
            names += [(alias.name, node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import; write the full name"
            names += [(f"{node.module}.{alias.name}", node.lineno) for alias in node.names]
    return names


def _top_level(body: list[ast.stmt]) -> list[ast.stmt]:
    """Statements that run on import, through if and try but not `if TYPE_CHECKING`."""
    found = []
    for node in body:
        found.append(node)
        if isinstance(node, ast.If) and "TYPE_CHECKING" not in ast.unparse(node.test):
            found += _top_level(node.body + node.orelse)
        elif isinstance(node, ast.Try):
            found += _top_level(node.body + node.orelse + node.finalbody)
    return found


def part_of(name: str) -> str | None:
    """`helexa.engine.sampler.Sampler` → `engine`; None for names of other packages and the package itself."""
    pieces = name.split(".")
    if pieces[0] != "helexa" or len(pieces) == 1 or pieces[1] == "__version__":
        return None
    return pieces[1]


def module_of(name: str) -> str | None:
    """The module that an imported name lives in: the longest prefix that is a module of ours."""
    pieces = name.split(".")
    for length in range(len(pieces), 1, -1):
        if ".".join(pieces[:length]) in MODULES:
            return ".".join(pieces[:length])
    return None


@pytest.mark.parametrize("module", sorted(MODULES))
def test_a_module_imports_only_what_lies_below_it(module: str) -> None:
    own = part_of(module + ".x") if module != "helexa" else None
    if own is None:
        return
    assert own in ALLOWED, (
        f"{own} is a new part of the package: give it a row in ALLOWED and in docs/architecture.md"
    )
    allowed = ALLOWED[own] | {own} | (COMMON if own not in COMMON else set())
    for name, line in imports(MODULES[module], top_only=False):
        part = part_of(name)
        assert part is None or part in allowed, f"{MODULES[module]}:{line}: {own} must not import {name}"


@pytest.mark.parametrize("module", sorted(MODULES))
def test_heavy_libraries_stay_out_of_the_light_parts(module: str) -> None:
    if part_of(module + ".x") not in LIGHT:
        return
    for name, line in imports(MODULES[module], top_only=True):
        assert name.split(".")[0] not in HEAVY, f"{MODULES[module]}:{line}: {name} at module level"


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_inside_functions_are_only_where_deferring_is_agreed(module: str) -> None:
    path = MODULES[module]
    if path.relative_to(PACKAGE).as_posix().startswith(DEFERRING):
        return
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            inner = [n for n in ast.walk(node) if isinstance(n, ast.Import | ast.ImportFrom)]
            assert not inner, f"{path}:{inner[0].lineno}: import inside {node.name}"


def test_there_is_no_import_cycle() -> None:
    graph = {
        module: {
            found
            for name, _ in imports(path, top_only=True)
            if (found := module_of(name)) not in (None, module)
        }
        for module, path in MODULES.items()
    }
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"import cycle: {' -> '.join(error.args[1])}")


def test_importing_gateway_and_command_line_loads_nothing_heavy() -> None:
    light = [name for name in MODULES if part_of(name + ".x") in LIGHT and not name.endswith("__main__")]
    code = (
        "import importlib, sys\n"
        f"for name in {light!r}: importlib.import_module(name)\n"
        f"loaded = sorted(({HEAVY!r} | {{'helexa._C'}}) & set(sys.modules))\n"
        "sys.exit(f'loaded: {loaded}' if loaded else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def includes(path: Path) -> list[str]:
    return re.findall(r'^\s*#\s*include\s+["<]([^">]+)[">]', path.read_text("utf-8"), re.MULTILINE)


CSRC = sorted(
    path for path in (ROOT / "csrc").rglob("*") if path.suffix in {".h", ".cuh", ".cpp", ".cu", ".def"}
)


@pytest.mark.parametrize("path", CSRC, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_the_extension_knows_no_torch_and_its_layers_point_down(path: Path) -> None:
    layer = path.relative_to(ROOT / "csrc").parts[0]
    forbidden = {"core": ("ops/", "quant/", "comm/"), "quant": ("ops/", "comm/")}.get(layer, ())
    for name in includes(path):
        assert not name.startswith(("torch/", "ATen/", "c10/")), f"{path}: includes {name}"
        assert not name.startswith(forbidden), f"{path}: {layer} includes {name}"
        assert path.name == "bindings.cpp" or not name.startswith(("pybind11", "Python.h")), f"{path}: {name}"
