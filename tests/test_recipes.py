import sys
import textwrap

import pytest
import torch

from coar.errors import SpecError
from coar.recipes import build_task, import_object, task_factory
from coar.task import Recipe, Task
from tests import cases
from tests.refused import refused


@task_factory
def tiny_task(seed=0, *, scale=1.0, weights=None):
    model = torch.nn.Linear(1, 1).eval()
    model.scale, model.seed, model.weights_path = scale, seed, weights
    return Task(model, [torch.zeros(1)], device="cpu")


@task_factory
def open_task(**options):
    model = torch.nn.Linear(1, 1).eval()
    model.options = options
    return Task(model, [torch.zeros(1)], device="cpu")


class TestTaskFactory:
    def test_records_where_it_is_and_its_arguments(self):
        assert cases.make_task(name="mlp").recipe == Recipe("tests.cases:make_task", {"name": "mlp"})
        assert tiny_task(3, scale=0.5).recipe == Recipe(f"{__name__}:tiny_task", {"seed": 3, "scale": 0.5})

    def test_rebuilds_the_same_task(self):
        task = cases.make_task("grouped")
        again = build_task(task.recipe)
        assert again is not task
        assert again.model_fingerprint() == task.model_fingerprint()
        assert again.data_fingerprint() == task.data_fingerprint()

    def test_does_not_record_the_path_of_weights_but_gets_it_when_rebuilt(self):
        task = tiny_task(1, weights="here.safetensors")
        assert task.recipe.args == {"seed": 1}
        assert build_task(task.recipe, weights="there.safetensors").model.weights_path == "there.safetensors"

    def test_without_such_a_parameter_gets_no_weights(self):
        assert build_task(cases.make_task("mlp").recipe, weights="there.safetensors").recipe.args == {
            "name": "mlp"
        }

    def test_takes_any_named_arguments(self):
        task = open_task(depth=2, name="a")
        assert task.recipe.args == {"depth": 2, "name": "a"}
        assert build_task(task.recipe).model.options == {"depth": 2, "name": "a"}

    def test_that_cannot_be_imported_elsewhere_leaves_no_recipe(self):
        @task_factory
        def nested():
            return Task(torch.nn.Linear(1, 1).eval(), [torch.zeros(1)], device="cpu")

        assert nested().recipe is None

    @pytest.mark.parametrize("argument", [object(), {1, 2}, torch.zeros(1)])
    def test_refuses_arguments_that_a_spec_cannot_hold(self, argument):
        with refused(
            SpecError, "JSON values", "numbers, strings", type(argument).__name__, "inside the factory"
        ):
            tiny_task(argument)

    def test_keeps_its_name_and_docstring(self):
        assert cases.make_task.__name__ == "make_task"
        assert cases.make_task.__doc__.startswith("Five examples")


class TestBuildTask:
    def test_refuses_a_function_that_is_no_factory(self):
        with refused(SpecError, "not a task factory", "@coar.task_factory", "function", "def make_task():"):
            build_task(Recipe("tests.cases:make_model", {"name": "mlp"}))

    @pytest.mark.parametrize("args", [{}, {"name": "mlp", "depth": 3}])
    def test_refuses_arguments_that_do_not_fit(self, args):
        with refused(SpecError, "tests.cases:make_task does not take these arguments", "got:"):
            build_task(Recipe("tests.cases:make_task", args))


class TestImportObject:
    def test_finds_functions_and_what_is_inside_classes(self):
        assert import_object("tests.cases:make_task") is cases.make_task
        assert import_object("tests.cases:Case.experiment") is cases.Case.experiment

    @pytest.mark.parametrize(
        "name", ["", "tests.cases", "tests.cases:", ":make_task", ".cases:make_task", "a b:c"]
    )
    def test_refuses_what_is_no_import_string(self, name):
        with refused(SpecError, "not an import string", "package.module:object", repr(name)):
            import_object(name)

    @pytest.mark.parametrize("name", ["no_such_package.tasks:make", "tests.cases:no_such_function"])
    def test_says_what_cannot_be_imported(self, name):
        with refused(SpecError, f"cannot import {name}", "Error: ", "PYTHONPATH"):
            import_object(name)


class TestAllowImport:
    @pytest.mark.parametrize("prefixes", [["tests"], ["tests."], ["tests.cases"], ["other", "tests"]])
    def test_a_module_under_a_prefix_is_imported(self, prefixes):
        assert import_object("tests.cases:make_task", prefixes) is cases.make_task

    @pytest.mark.parametrize("prefixes", [[], ["test"], ["tests.case"], ["tests.cases.more"], [""]])
    def test_any_other_is_refused_before_it_runs(self, prefixes):
        with refused(SpecError, "asks to import tests.cases", "a module under", "--allow-import PREFIX"):
            import_object("tests.cases:make_task", prefixes)

    def test_a_refused_module_is_not_run(self, tmp_path, monkeypatch):
        ran = tmp_path / "ran"
        (tmp_path / "evil_module.py").write_text(f"open({str(ran)!r}, 'w')")
        monkeypatch.syspath_prepend(tmp_path)
        with refused(SpecError, "evil_module"):
            build_task(Recipe("evil_module:make"), allow_import=["coar"])
        assert not ran.exists()
        assert "evil_module" not in sys.modules

    @pytest.mark.parametrize(
        "name", ["coar.files:os.system", "coar.files:os", "coar.files:Path", "coar.files:json.loads"]
    )
    def test_an_allowed_module_is_no_door_to_what_it_imports_itself(self, name):
        with refused(SpecError, "asks to import", "a module under coar", name, "--allow-import PREFIX"):
            import_object(name, ["coar"])

    def test_task_and_spec_of_a_folder_on_the_path(self, tmp_path, monkeypatch):
        module = tmp_path / "my_tasks_of_test.py"
        module.write_text(
            textwrap.dedent("""
                import torch, coar

                @coar.task_factory
                def make_task(scale):
                    return coar.Task(torch.nn.Linear(1, 1).eval(), [torch.full((1,), scale)], device="cpu")
            """)
        )
        monkeypatch.syspath_prepend(tmp_path)
        task = build_task(
            Recipe("my_tasks_of_test:make_task", {"scale": 2.0}), allow_import=["my_tasks_of_test"]
        )
        assert task.dataset[0].item() == 2.0
        assert task.recipe == Recipe("my_tasks_of_test:make_task", {"scale": 2.0})
