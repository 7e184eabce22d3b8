"""output_heads: the layers whose units are a model's answers (classes, tokens) rather than parts of it."""

from __future__ import annotations

from itertools import pairwise

from torch import nn

PRETRAINED = "transformers.modeling_utils.PreTrainedModel"
HEAD_NAMES = {"classifier", "score", "qa_outputs", "lm_head", "cls", "head", "heads", "fc"}


def output_heads(model: nn.Module) -> set[str]:
    """Names of final classifiers and tied output heads.

    In this order: what the model itself says (transformers' `get_output_embeddings`, timm's
    `get_classifier`); every Linear tied to an embedding; else the last Linear, unless it lies in one
    of several blocks of the same class, as in a language model without its head.
    """
    names = {id(module): name for name, module in model.named_modules()}
    declared = {names[id(head)] for head in _declared(model) if id(head) in names}
    tied = _tied(model)
    if declared | tied:
        return declared | tied
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    if not linear or _in_repeated_block(model, linear[-1]):
        return set()
    if _is_pretrained(model) and linear[-1].split(".")[0] not in HEAD_NAMES:
        return set()  # a pooler, a projection: part of the computation
    return {linear[-1]}


def _is_pretrained(model: nn.Module) -> bool:
    return any(f"{base.__module__}.{base.__qualname__}" == PRETRAINED for base in type(model).__mro__)


def _declared(model: nn.Module) -> list[nn.Module]:
    getters = ["get_output_embeddings"] if _is_pretrained(model) else []
    getters += ["get_classifier"] if type(model).__module__.startswith("timm.") else []
    found = [getattr(model, getter)() for getter in getters if hasattr(model, getter)]
    heads = [head for entry in found for head in (entry if isinstance(entry, tuple) else (entry,))]
    return [head for head in heads if isinstance(head, nn.Linear)]


def _tied(model: nn.Module) -> set[str]:
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    modules = model.named_modules()
    return {name for name, m in modules if isinstance(m, nn.Linear) and id(m.weight) in tables}


def _in_repeated_block(model: nn.Module, name: str) -> bool:
    """Whether a module lies in one of several siblings of the same class that hold modules themselves."""
    parts = name.split(".")
    path = [model.get_submodule(".".join(parts[:depth])) for depth in range(len(parts) + 1)]
    for parent, child in pairwise(path):
        # torchvision's `features` and `classifier` are both a Sequential, and no repetition.
        plain = isinstance(child, nn.Sequential | nn.ModuleList | nn.ModuleDict)
        alike = [] if plain else [m for m in parent.children() if type(m) is type(child)]
        if len(alike) > 1 and any(True for _ in child.children()):
            return True
    return False
