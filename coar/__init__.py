"""Which parts of a trained network make this prediction, and what happens if they change?"""

from coar import outputs
from coar.attributions import Attributions
from coar.baselines import gradient_x_parameter, leave_one_out
from coar.components import ComponentGroup, ComponentSet
from coar.designs import Bernoulli, FixedSize, LeaveOneOut
from coar.discovery import component_rule, find_components
from coar.edit import Edit
from coar.editing import rank_components
from coar.evaluation import evaluate
from coar.executors.processes import Processes
from coar.executors.serial import Serial
from coar.experiments.ablation import ComponentAblation
from coar.gradients import GateGradientStudy, gate_gradients
from coar.recipes import task_factory
from coar.regression import Lasso, Ridge, fit
from coar.spec import ExecutionSpec, StudySpec
from coar.study import Study
from coar.task import Task

__all__ = [
    # what is studied
    "Task",
    "task_factory",
    "outputs",
    "ComponentGroup",
    "ComponentSet",
    "find_components",
    "component_rule",
    "ComponentAblation",
    # rows
    "Bernoulli",
    "FixedSize",
    "LeaveOneOut",
    "Study",
    "StudySpec",
    "ExecutionSpec",
    "Serial",
    "Processes",
    # attributions
    "Attributions",
    "Ridge",
    "Lasso",
    "fit",
    "gate_gradients",
    "GateGradientStudy",
    "leave_one_out",
    "gradient_x_parameter",
    # what they are good for
    "evaluate",
    "rank_components",
    "Edit",
]
