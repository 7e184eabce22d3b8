"""Kinds of components: rules that cut the modules of a model into components.

One module per family of layers. A rule is a function from a module (and its name) to groups, and
is keyed by qualified class names, so that no library is imported for it to exist.
"""

from coar.kinds import attention, blocks, layers, mlp  # each registers its rules

__all__ = ["attention", "blocks", "layers", "mlp"]
