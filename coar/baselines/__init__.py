"""Baselines: other ways to attributions, for comparison at equal cost.

| baseline | what | cost in forwards (one value per example) |
|---|---|---|
| `leave_one_out` | output with all components less output with all but one | components + 1 |
| `gradient_x_parameter` | derivative by a gate on the parameters, all gates at 1 | 3 |
| `attribution_patching` | derivative by a gate behind the nonlinearity, all gates at one value | 3 |
| `integrated_gradients` | the same, averaged over all gates moving together from 0 to 1 | 3 each step |
| `kept_mean` | the same, where kept, other components being partly away | 3 each pass |
| `uniform_gradient_sampling` | derivative by a probe's gate at the layer, the plain mean | 3 each pass |
| `neuron_conductance` | integrated gradients over the input, what flows through a unit | 3 each step, and 1 |
| `internal_influence` | derivative by a unit's activation, averaged over the same path | 3 each step |
| `random_attributions` | standard normal weights: a floor | 0 |
| `weight_norm` | norm of a component's weights, the same for all columns: a floor | 0 |
| `hybrid` | ridge on what a scaled prior leaves of the rows | rows + the prior's |

All return `Attributions` on the experiment's axes; the provenance says what was spent. Intercepts of
all but the two means, the two floors and the hybrid make the untouched output exact.
"""

from coar.baselines.deletion import leave_one_out
from coar.baselines.diagonal import attribution_patching, integrated_gradients
from coar.baselines.floors import random_attributions, weight_norm
from coar.baselines.parameters import gradient_x_parameter
from coar.baselines.paths import internal_influence, neuron_conductance
from coar.baselines.residual import hybrid
from coar.baselines.sampling import kept_mean, uniform_gradient_sampling

__all__ = [
    "attribution_patching",
    "gradient_x_parameter",
    "hybrid",
    "integrated_gradients",
    "internal_influence",
    "kept_mean",
    "leave_one_out",
    "neuron_conductance",
    "random_attributions",
    "uniform_gradient_sampling",
    "weight_norm",
]
