# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Fix one error of a network, without training
#
# A network reads an image wrongly. Some of its filters speak for the right class, some against it. If a few
# filters do the harm, and hardly any other image needs them, then they can go: the error is fixed, and the
# rest stays as it was.
#
# This notebook finds such filters for single images, ablates them (their weights become zero), and counts
# what it costs. Then it goes the other way and makes the network err on an image that it read rightly.
#
# - the network: a ResNet-20 with 688 convolution filters and 400 test images of CIFAR-10, all of which come
#   with a source checkout; where the 2,000 images of `data/README.md` are at hand, a ResNet-56 with 2,032;
# - the method: COAR-Edit (Shah, Ilyas, Madry 2024, arXiv:2404.11534), with gate gradients as attributions.

# %%
import os
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch

import coar
from coar.errors import EditError
from coar.report import figures
from coar.tasks import cifar
from coar.tasks.data_folder import find_data, places

os.chdir(next(folder for folder in [Path.cwd(), *Path.cwd().parents] if (folder / "specs").is_dir()))
DATA = "cifar10_jpeg.npz"  # 2,000 test images: see data/README.md
SMALL = not any((place / DATA).is_file() for place in places())
if SMALL:
    task = cifar.make_task("resnet20", small=True, num_examples=400)
else:
    task = cifar.make_task("resnet56", data=str(find_data(DATA)))
experiment = coar.ComponentAblation(task, coar.find_components(task.model, kinds=["conv_filter"]))
print(task, experiment.component_set, sep="\n")

# %% [markdown]
# ## The errors
#
# Some images that the network reads wrongly. Over each: what it is, and what the network says.


# %%
@torch.no_grad()
def logits_of(model):
    """Logits of every image, [images, classes]."""
    return torch.cat([model(images) for _, (images, _) in task.batches(200)]).numpy()


def answers_over(images, *answers):
    """Images under their class and what is said of them."""
    titles = ["\n".join([classes[labels[i]], *(classes[said[i]] for said in answers)]) for i in images]
    return figures.example_grid(task, images, titles)[0].figure


classes, labels = np.array(cifar.CLASSES), np.array(task.metadata["label"])
logits = logits_of(task.model)
before = logits.argmax(axis=1)
errors = np.flatnonzero(before != labels)
print(f"{len(errors)} of {len(task)} images are read wrongly")
answers_over(errors[:12], before)

# %% [markdown]
# ## Fix one
#
# The target is one of them. Its margin (the logit of its class less the largest other one) is below 0, and
# is to rise. Fifty images that are read rightly are the references, whose margins should stay. Of all other
# images one half chooses how many filters to ablate; the other half judges the edit, and nothing is chosen
# by it.

# %%
TARGET = 203
order = np.random.default_rng(0).permutation(len(task))
order = order[order != TARGET]
right = order[(before == labels)[order]]
references, rest = right[:50], np.setdiff1d(order, right[:50])
parts = coar.EditParts([TARGET], references, holdout=rest[::2], report=rest[1::2])
print(parts)

# %% [markdown]
# One call does the rest. It attributes the margins of the target and of the references to the filters (for
# each filter, how much ablating it would change the margin). It ranks the filters by how far the target lies
# from the references, in units of the references' spread: Welch's t with a single target. It ablates the
# first, the first two, the first four, ... for real. And it keeps the smallest number that fixes the error
# while the holdout loses at most two points of accuracy.

# %%
SIZES = [1, 2, 4, 6] if SMALL else [1, 2, 4, 8, 12, 16, 20]  # at most 1 % of the filters
settings = {"sizes": SIZES, "max_accuracy_drop": 0.02, "passes": 20 if SMALL else 60}
result = coar.make_edit(experiment, parts, "raise", **settings)
print(result.summary())

# %% [markdown]
# The edit names what it ablates. Applied to the network it gives a copy that reads the image rightly.

# %%
edited = result.edit.apply(task.model)  # the network itself is as it was
logits_after = logits_of(edited)
after = logits_after.argmax(axis=1)
figure, (left, middle) = plt.subplots(1, 2, figsize=(7, 2.6), width_ratios=[1, 3], layout="constrained")
task.show(task.dataset[TARGET], left)
for name, said, shift in [("before", logits, -0.2), ("after", logits_after, 0.2)]:
    chances = np.exp(said[TARGET]) / np.exp(said[TARGET]).sum()
    middle.bar(np.arange(10) + shift, chances, 0.38, label=name)
middle.set_xticks(range(10), classes, rotation=40, ha="right")
middle.set(ylabel="probability", ylim=(0, 1))
middle.legend(frameon=False)
plt.show()

# %% [markdown]
# ## How many filters?
#
# What chose the size. The dotted line is what the linear models expect of the target.

# %%
figure, axes = plt.subplots(figsize=(6, 3.4), layout="constrained")
figures.edit_curve(result.curve, chosen=len(result.edit.names), ax=axes)
plt.show()

# %% [markdown]
# ## Margins before and after
#
# Of the target, and of the images that judge. On the diagonal nothing changes; what crosses the horizontal
# line downwards is broken.

# %%
figure, axes = plt.subplots(figsize=(5, 4), layout="constrained")
figures.margins_before_after({"the target": result.targets, "images that judge": result.report}, ax=axes)
plt.show()

# %% [markdown]
# The images whose margins changed most, first upwards, then downwards: what the ablated filters were for.
# Over each: its class, the answer before, the answer after.

# %%
change = result.report.after - result.report.before
judges = np.array(parts.report)
answers_over(judges[np.argsort(-change)[:6]], before, after)

# %%
answers_over(judges[np.argsort(change)[:6]], before, after)

# %% [markdown]
# ## One after the other
#
# Is that one image a lucky one? Here are more errors, the first ones in the order of the data set, each fixed
# by an edit of its own. Their attributions are made in one go. *others* is the accuracy of the images that
# judge, in points.

# %%
some = [int(i) for i in errors if i in set(rest)][: 4 if SMALL else 20]
rest = np.setdiff1d(rest, some)
attributions = coar.gate_gradients(
    experiment, 0.05, passes=settings["passes"], examples=[*some, *references], progress=False
)


def tried(target, direction):
    """A line of the table: one image, by an edit of its own."""
    others = coar.EditParts([target], references, holdout=rest[::2], report=rest[1::2])
    try:
        made = coar.make_edit(experiment, others, direction, method=attributions, **settings)
    except EditError as error:
        return {"image": target, "class": classes[labels[target]], "done": False, "why not": error.got}
    return {
        "image": target,
        "class": classes[labels[target]],
        "read as": classes[before[target]],
        "done": (made.targets.after[0] > 0) == (direction == "raise"),
        "filters": len(made.edit.names),
        "margin": made.targets.before[0],
        "then": made.targets.after[0],
        "others": 100 * (made.report.accuracy_after - made.report.accuracy_before),
    }


fixed = pd.DataFrame([tried(target, "raise") for target in some])
cost = fixed[fixed.done].others.median()
print(f"{fixed.done.sum()} of {len(fixed)} fixed; median change of the others {cost:+.1f} points")
fixed.round(2)

# %% [markdown]
# ## Induce one
#
# The same with the other sign: an image that the network reads rightly, and the filters without which it
# does not. It shows what the network relies on for this image. The image is one of median margin among those
# that are read rightly: neither an easy one nor a close call.

# %%
margin = np.sort(logits, axis=1)[:, -1] - np.sort(logits, axis=1)[:, -2]  # of images that are read rightly
free = np.intersect1d(rest, right)
chosen = int(free[np.argsort(margin[free])[len(free) // 2]])
rest = np.setdiff1d(rest, [chosen])
induced = coar.make_edit(
    experiment, coar.EditParts([chosen], references, rest[::2], rest[1::2]), "lower", **settings
)
print(induced.summary())
answers_over([chosen], before, logits_of(induced.edit.apply(task.model)).argmax(axis=1))

# %% [markdown]
# ## Other ways
#
# The same target, the same references and the same guard:
#
# - **derivative**: filters ranked by the derivative at gate 1, one pass;
# - **weight norm**: filters with the largest weights first;
# - **random**: any filters;
# - **fine-tuning**: no filter; the last layer is trained on target and references, for as many steps as the
#   guard allows.

# %%
comparison = coar.compare_edits(experiment, parts, "raise", **settings)
comparison.table.drop(columns="seconds").round(3)

# %%
figures.edit_comparison(comparison).figure

# %% [markdown]
# An error close to the boundary is easily fixed, and so other ways may fix it as well: the derivative does
# with fewer passes, and so does the last layer trained on the one image. Even filters at random may, by luck.
# What tells the ways apart is how many errors they fix, also the deep ones, and what the others pay for it:
# `python -m benchmarks.editing` measures that on 150 errors of a ResNet-56. Where a table above says "done:
# False", no number of filters within the guard was enough, and nothing was applied.
