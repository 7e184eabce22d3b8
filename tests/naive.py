"""Slow, obvious references. Each follows its definition word by word; the library must agree with them.

Nothing here is shared with the code under test but the description of the components, so that one
mistake cannot be made on both sides.
"""

from __future__ import annotations

import copy
from itertools import pairwise
from statistics import fmean, pvariance

import numpy as np
import torch
from torch import nn

# ------------------------------------------------------------------------------------ models and masks


def ablated(model, components, keep, bias="keep", value="zero"):
    """A deep copy with the slices of the components of `keep == False` set to zero, entry by entry."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for index in np.flatnonzero(~np.asarray(keep, dtype=bool)):
            group, number = components.locate(int(index))
            module = model.get_submodule(group.module)
            for entry in entries(group, number):
                getattr(module, group.parameter).select(group.dimension, entry).zero_()
                if value != "zero":
                    _bias_of(module)[entry] = value
                elif bias == "ablate" and group.bias is not None:
                    getattr(module, group.bias)[entry] = 0.0
    return model


def entries(group, number):
    """Where a component lies along its group's dimension."""
    start = group.offset + number * group.width
    return range(start, start + group.width)


def _bias_of(module):
    if module.bias is None:
        module.bias = nn.Parameter(torch.zeros(len(module.weight), dtype=module.weight.dtype))
    return module.bias


def gated(model, components, gates, bias="keep", value="zero"):
    """A deep copy that gates captured activations, as the definition in `coar.gates` says.

    Only for groups that are all output units of a convolution or a Linear.
    """
    model = copy.deepcopy(model)
    for group, flat in components.slices():
        module = model.get_submodule(group.module)
        assert (group.dimension, group.offset, group.count) == (0, 0, len(module.weight))
        factors = torch.tensor(np.asarray(gates[flat], dtype=float), dtype=module.weight.dtype)
        module.register_forward_hook(_gating_hook(factors, bias, value))
    return model


def _gating_hook(factors, bias, value):
    def hook(module, _, activation):  # activation is W x + b
        spatial = 0 if isinstance(module, nn.Linear) else len(module.kernel_size)
        gate = factors.view(-1, *[1] * spatial)
        offset = 0.0 if module.bias is None else module.bias.detach().view(-1, *[1] * spatial)
        if value != "zero":
            return gate * activation + (1 - gate) * value
        if bias == "ablate":
            return gate * activation
        return gate * (activation - offset) + offset

    return hook


def outputs_of(task, model):
    """Columns of every output, {output: [columns]}, one example at a time."""
    found = {}
    for name, function in task.outputs.items():
        with torch.no_grad():
            values = [function(model, task.batch([i]))[0] for i in range(len(task))]
        found[name] = np.concatenate([value.reshape(-1).numpy() for value in values])
    return found


def rows(experiment, masks):
    """What a runner returns, {output: [rows, columns]}: a rebuilt model per mask, a forward per example."""
    task, components = experiment.task, experiment.component_set
    models = [ablated(task.model, components, mask, experiment.bias, experiment.value) for mask in masks]
    found = [outputs_of(task, model) for model in models]
    return {name: np.stack([row[name] for row in found]) for name in task.outputs}


# ---------------------------------------------------------------------------------------- attributions


def leave_one_out(experiment, output):
    """Output untouched - output without the component, [columns, components]."""
    count = len(experiment.component_set)
    everything = np.ones(count, dtype=bool)
    untouched = rows(experiment, [everything])[output][0]
    effects = []
    for component in range(count):
        keep = everything.copy()
        keep[component] = False
        effects.append(untouched - rows(experiment, [keep])[output][0])
    return np.stack(effects, axis=1)


def gradient_x_parameter(experiment, output):
    """Sum of gradient x parameter over each component's entries, float64 [columns, components]."""
    task = experiment.task
    found = []
    for example in range(len(task)):
        width = task.outputs[output](task.model, task.batch([example]))[0].numel()
        found.extend(_gradient_row(experiment, output, example, position) for position in range(width))
    return np.array(found)


def _gradient_row(experiment, output, example, position):
    model = copy.deepcopy(experiment.task.model).requires_grad_(True)
    batch = experiment.task.batch([example])
    experiment.task.outputs[output](model, batch)[0].reshape(-1)[position].backward()
    row = []
    for index in range(len(experiment.component_set)):
        group, number = experiment.component_set.locate(index)
        module = model.get_submodule(group.module)
        gated_parameters = [(getattr(module, group.parameter), group.dimension)]
        if experiment.bias == "ablate" and group.bias is not None:
            gated_parameters.append((getattr(module, group.bias), 0))
        total = 0.0
        for parameter, dimension in gated_parameters:
            for entry in entries(group, number) if parameter.grad is not None else ():
                product = parameter.grad.select(dimension, entry) * parameter.select(dimension, entry)
                total += float(product.detach().double().sum())
        row.append(total)
    return row


def path_integral(experiment, output, steps, conductance, start=0.0, embedding=None):
    """Conductance or internal influence of every component, float64 [columns, components].

    One column and one component at a time, by plain hooks, on captum's points; `start` is the baseline,
    `embedding` names the module whose result moves where inputs are tokens.
    """
    points, shares = np.polynomial.legendre.leggauss(steps + 1 if conductance else steps)
    found = []
    for example in range(len(experiment.task)):
        batch = experiment.task.batch([example])
        width = experiment.task.outputs[output](experiment.task.model, batch)[0].numel()
        for position in range(width):
            told = [
                _activations_and_slopes(experiment, output, batch, position, (1 + p) / 2, start, embedding)
                for p in points
            ]
            rows = range(len(experiment.component_set))
            if conductance:
                pairs = list(pairwise(told))
                found.append(
                    [sum(float((a[1][i] * (b[0][i] - a[0][i])).sum()) for a, b in pairs) for i in rows]
                )
            else:
                slopes = [[float(slope[i].sum()) for i in rows] for _, slope in told]
                found.append(np.array(shares) / 2 @ np.array(slopes))
    return np.array(found)


def _activations_and_slopes(experiment, output, batch, position, fraction, start, embedding):
    """Per component, its activations on one point of the path, and the derivatives by them."""
    model = copy.deepcopy(experiment.task.model).requires_grad_(False)
    kept = {}
    for group in experiment.component_set.groups:
        module = model.get_submodule(group.module)
        if group.side == "input":
            module.register_forward_pre_hook(lambda _, given, key=group.name: (_keep(kept, key, given[0]),))
        else:
            module.register_forward_hook(lambda _, __, y, key=group.name: _keep(kept, key, y))

    def moved(x):
        return (start + fraction * (x - start)).requires_grad_()

    if embedding:
        model.get_submodule(embedding).register_forward_hook(lambda _, __, y: moved(y))
    elif isinstance(batch, dict):
        batch = batch | {"tokens": moved(batch["tokens"])}
    else:
        batch = (moved(batch[0]), *batch[1:])
    experiment.task.outputs[output](model, batch)[0].reshape(-1)[position].backward()
    values, slopes = [], []
    for index in range(len(experiment.component_set)):
        group, number = experiment.component_set.locate(index)
        tensor = kept[group.name]
        convolution = isinstance(model.get_submodule(group.module), nn.Conv1d | nn.Conv2d | nn.Conv3d)
        channels = 1 if convolution else -1
        own = torch.tensor(list(entries(group, number)))
        values.append(tensor.detach().double().index_select(channels, own))
        grad = torch.zeros_like(tensor) if tensor.grad is None else tensor.grad
        slopes.append(grad.double().index_select(channels, own))
    return values, slopes


def _keep(kept, key, tensor):
    tensor.retain_grad()
    kept[key] = tensor
    return tensor


# ------------------------------------------------------------------------------------------ regression


def least_squares(masks, outputs):
    """Ordinary least squares with intercept: weights [columns, components], intercepts [columns]."""
    design = np.column_stack([masks, np.ones(len(masks))]).astype(np.float64)
    solution = np.linalg.lstsq(design, np.asarray(outputs, dtype=np.float64), rcond=None)[0]
    return solution[:-1].T, solution[-1]


def ridge(masks, outputs, penalty):
    """Ridge at one penalty on standardised masks: weights [columns, components], intercepts [columns].

    Minimises (1 / 2 rows) |y - z w - b|^2 + (penalty / 2) |w|^2, where z are the masks with mean 0 and
    deviation 1 (0 where constant), by its normal equations; weights are returned per component kept.
    """
    masks, outputs = np.asarray(masks, dtype=np.float64), np.asarray(outputs, dtype=np.float64)
    standard, scale = standardised(masks)
    left = standard.T @ standard / len(masks) + penalty * np.eye(masks.shape[1])
    right = standard.T @ (outputs - outputs.mean(axis=0)) / len(masks)
    weights = (np.linalg.solve(left, right) / scale[:, None]).T
    return weights, outputs.mean(axis=0) - weights @ masks.mean(axis=0)


def leave_one_row_out_errors(masks, outputs, penalty):
    """Each row's output minus its prediction by a fit that never saw the row, [rows, columns].

    The fit is `ridge` without the row; the masks' scale and the weight of the penalty beside the sum of
    squares (rows x penalty) are those of all rows, the intercept is free.
    """
    masks, outputs = np.asarray(masks, dtype=np.float64), np.asarray(outputs, dtype=np.float64)
    design = np.column_stack([standardised(masks)[0], np.ones(len(masks))])
    stiffness = np.diag([len(masks) * penalty] * masks.shape[1] + [0.0])
    errors = []
    for row in range(len(masks)):
        others = np.arange(len(masks)) != row
        x, y = design[others], outputs[others]
        solution = np.linalg.solve(x.T @ x + stiffness, x.T @ y)
        errors.append(outputs[row] - design[row] @ solution)
    return np.stack(errors)


def standardised(masks):
    """Masks with mean 0 and deviation 1, and the deviations (1 where a mask is constant)."""
    deviation = masks.std(axis=0)
    scale = np.where(deviation > 0, deviation, 1.0)
    return (masks - masks.mean(axis=0)) / scale, scale


# --------------------------------------------------------------------------------------- single numbers


def margins(logits, labels):
    """Correct logit minus the largest other one, by loops."""
    found = []
    for row, label in zip(logits.tolist(), labels.tolist(), strict=True):
        found.append(row[label] - max(value for number, value in enumerate(row) if number != label))
    return found


def welch_t(targets, references):
    """Welch's t per component, population variances; targets and references are [columns, components]."""
    found = []
    for ours, theirs in zip(np.asarray(targets).T.tolist(), np.asarray(references).T.tolist(), strict=True):
        difference = fmean(ours) - fmean(theirs)
        found.append(difference / (pvariance(ours) / len(ours) + pvariance(theirs) / len(theirs)) ** 0.5)
    return found
