"""Gates: put a factor in [0, 1] on every component of a model.

Two interchangeable ways, for one definition (`coar.gates.convention`):

- `ScaledWeights`: on the weights of a private copy. No hooks, nothing in the forward pass; one gate
  vector for all examples, no gradients. What studies run on.
- `GatedActivations`: on what layers read and emit. Differentiable, a gate vector per example if
  asked; what gate gradients run on. `PlacedActivations` puts the gates after a unit's own
  nonlinearity wherever it can, `verify_ends` holds that to the ablation, `require_derivatives` finds
  graphs that are cut.

`fold_batch_norm` makes both faster without changing what a gate means.
"""

from coar.gates.activations import GatedActivations
from coar.gates.convention import Bias, Means, Value, check_convention
from coar.gates.derivatives import require_derivatives
from coar.gates.ends import verify_ends
from coar.gates.folding import fold_batch_norm
from coar.gates.means import measure_means, pick_means
from coar.gates.placement import PlacedActivations
from coar.gates.reach import require_agreement, require_reached
from coar.gates.scaled_weights import ScaledWeights, ablated_copy
from coar.gates.sites import Site, make_sites

__all__ = [
    "Bias",
    "GatedActivations",
    "Means",
    "PlacedActivations",
    "ScaledWeights",
    "Site",
    "Value",
    "ablated_copy",
    "check_convention",
    "fold_batch_norm",
    "make_sites",
    "measure_means",
    "pick_means",
    "require_agreement",
    "require_derivatives",
    "require_reached",
    "verify_ends",
]
