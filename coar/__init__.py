"""Which parts of a trained network make this prediction, and what happens if they change?"""

from coar import outputs
from coar.attributions import Attributions
from coar.baselines import (
    attribution_patching,
    gradient_x_parameter,
    hybrid,
    integrated_gradients,
    internal_influence,
    kept_mean,
    leave_one_out,
    neuron_conductance,
    random_attributions,
    uniform_gradient_sampling,
    weight_norm,
)
from coar.checking import calibrate, check
from coar.components import ComponentGroup, ComponentSet
from coar.designs import Bernoulli, FixedSize, LeaveOneOut
from coar.discovery import component_rule, find_components
from coar.editing import Edit, EditParts, compare_edits, draw_parts, fine_tune, make_edit, rank_components
from coar.evaluation import Evaluation, evaluate, linear_ceiling, split_half
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
    # baselines
    "leave_one_out",
    "gradient_x_parameter",
    "attribution_patching",
    "integrated_gradients",
    "kept_mean",
    "uniform_gradient_sampling",
    "neuron_conductance",
    "internal_influence",
    "hybrid",
    "random_attributions",
    "weight_norm",
    # what they are good for
    "check",
    "calibrate",
    "evaluate",
    "Evaluation",
    "linear_ceiling",
    "split_half",
    "rank_components",
    "Edit",
    "EditParts",
    "draw_parts",
    "make_edit",
    "compare_edits",
    "fine_tune",
]
