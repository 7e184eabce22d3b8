"""The house: what may import what, and that `import coar` stays light."""

import ast
import json
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import coar

# From the ground up: each module (or folder of modules) may import those above it in this list, also
# inside functions and for type checkers, and never those below.
ORDER = [
    "errors",
    "files",
    "settings",
    "randomness",
    "signed_arrays",
    "axes",
    "progress",
    "metrics",
    "outputs",
    "fingerprints",
    "task",
    "recipes",
    "component_group",
    "component_fit",
    "components",
    "kinds",
    "discovery",
    "gates",
    "designs",
    "experiments",
    "precision",
    "spec",
    "store",
    "rows",
    "work",
    "attribution_blocks",
    "attributions",
    "plan",
    "executors",
    "creation",
    "study_folder",
    "saved_attributions",
    "study",
    "regression",
    "gradients",
    "studies",
    "interop",
    "report",
    "baselines",
    "evaluation",
    "checking",
    "editing",
    "tasks",
    "testing",
    "doctor",
    "demo",
    "cli",
    "__init__",
]
# Libraries that only tasks know; a task that needs none is a task like any other.
OF_TASKS = {"torchvision", "transformers"}
NOT_LOADED = [
    *("torchvision", "transformers", "timm", "datasets", "ray", "submitit", "captum", "numba"),
    *("matplotlib", "pandas", "sklearn", "scipy", "typer", "yaml", "cupy"),
]

PACKAGE = Path(coar.__file__).parent


def module_name(path):
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


TREES = {
    module_name(path): ast.parse(path.read_text(encoding="utf-8")) for path in sorted(PACKAGE.rglob("*.py"))
}


def imported_names(tree):
    """Every dotted name that some import statement of a module names, wherever it stands."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def imported_modules(tree):
    """Modules of this package that a module imports."""
    for name in imported_names(tree):
        if name.split(".")[0] == "coar":
            # `from coar.axes import Axis` names coar.axes.Axis: the longest prefix that is a module
            while name not in TREES:
                name = name.rpartition(".")[0]
            yield name


IMPORTS = {module: set(imported_modules(tree)) - {module} for module, tree in TREES.items()}


def place(module):
    """Position in ORDER of a module, or of the folder that it is in."""
    return ORDER.index(module.split(".")[1] if "." in module else "__init__")


class TestHouse:
    def test_every_module_has_its_place(self):
        found = {module.split(".")[1] for module in TREES if "." in module} | {"__init__"}
        assert found == set(ORDER)
        assert len(set(ORDER)) == len(ORDER)

    @pytest.mark.parametrize("module", TREES)
    def test_modules_import_only_those_above_them(self, module):
        below = {other for other in IMPORTS[module] if place(other) > place(module)}
        assert not below

    def test_there_is_no_circle(self):
        try:
            list(TopologicalSorter(IMPORTS).static_order())
        except CycleError as error:
            pytest.fail(" -> ".join(error.args[1]))

    @pytest.mark.parametrize("module", TREES)
    def test_every_module_says_what_it_is(self, module):
        assert ast.get_docstring(TREES[module])

    def test_no_module_is_a_drawer_for_everything(self):
        parts = {part for module in TREES for part in module.split(".")}
        assert not parts & {"utils", "util", "helpers", "helper", "misc", "common"}

    def test_only_tasks_import_vision_and_language_libraries(self):
        roots = {module: {name.split(".")[0] for name in imported_names(TREES[module])} for module in TREES}
        importers = {module for module in TREES if roots[module] & OF_TASKS}
        assert {module for module in importers if not module.startswith("coar.tasks.")} == set()

    @pytest.mark.parametrize("module", TREES)
    def test_no_name_has_two_meanings(self, module):
        """`alpha` was the share kept in one project and the share ablated in another, and so on."""
        names = {
            getattr(node, "id", None) or getattr(node, "arg", None) or getattr(node, "name", None)
            for node in ast.walk(TREES[module])
            if isinstance(node, ast.Name | ast.arg | ast.FunctionDef | ast.ClassDef)
        }
        assert not names & {"alpha", "subsample_prob", "comp", "attb", "dm"}


class TestImportIsLight:
    PROBE = f"""if True:
        import json, sys, time
        start = time.perf_counter()
        import torch
        middle = time.perf_counter()
        of_torch = set(sys.modules)
        import coar
        end = time.perf_counter()
        loaded = [name for name in {NOT_LOADED} if name in sys.modules and name not in of_torch]
        print(json.dumps({{"torch": middle - start, "coar": end - middle, "loaded": loaded}}))
    """

    @classmethod
    def probe(cls):
        found = subprocess.run([sys.executable, "-c", cls.PROBE], capture_output=True, text=True, check=True)
        return json.loads(found.stdout)

    @pytest.mark.slow
    def test_loads_no_heavy_library_and_adds_at_most_half_a_second_to_torch(self):
        # The one time that a test asserts: the promise is about it. Best of three, since machines are shared.
        probes = [self.probe() for _ in range(3)]
        assert [probe["loaded"] for probe in probes] == [[], [], []]
        assert min(probe["coar"] for probe in probes) <= 0.5
