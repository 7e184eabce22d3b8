"""All figures. Each function draws on one matplotlib Axes and returns it; none touches pyplot's state.

| module | figures | of |
|---|---|---|
| `fraction_figures` | `correlation_by_fraction` | an `Evaluation`, or its `means()` |
| `compute_figures` | `correlation_by_compute` | likewise |
| `evaluation_figures` | `correlation_histogram` | an `Evaluation`, or its `table` |
| | `predictions` | true and predicted outputs of a column |
| `attribution_figures` | `top_components`, `layer_heat_map` | `Attributions` |
| `component_images` | `top_component_images` | `Attributions`, the task, `measure_activations` |
| `edit_figures` | `edit_curve` | a sweep of an edit |
| | `margins_before_after` | an `Effect`, or several by name |
| | `edit_comparison` | an `EditComparison` |
| | `example_grid` | examples of a task |
"""

from coar.report.attribution_figures import layer_heat_map, top_components
from coar.report.component_images import top_component_images
from coar.report.compute_figures import correlation_by_compute
from coar.report.edit_figures import edit_comparison, edit_curve, example_grid, margins_before_after
from coar.report.evaluation_figures import correlation_histogram, predictions
from coar.report.fraction_figures import correlation_by_fraction
from coar.report.style import COLOURS, RIGHT, WRONG, new_figure, save_figure

__all__ = [
    "COLOURS",
    "RIGHT",
    "WRONG",
    "correlation_by_compute",
    "correlation_by_fraction",
    "correlation_histogram",
    "edit_comparison",
    "edit_curve",
    "example_grid",
    "layer_heat_map",
    "margins_before_after",
    "new_figure",
    "predictions",
    "save_figure",
    "top_component_images",
    "top_components",
]
