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
# # Make a network forget a class
#
# A network tells ten classes. It shall no longer know one of them, and know the other nine as before. Nobody
# trains it again: a few of its filters are ablated (their weights become zero), found with twenty images of
# that class and sixty others.
#
# - the network: a ResNet-20 with 688 convolution filters and 800 test images of CIFAR-10, all of which come
#   with a source checkout; where the 2,000 images of `data/README.md` are at hand, a ResNet-56 with 2,032;
# - the method: COAR-Edit (Shah, Ilyas, Madry 2024, arXiv:2404.11534), with gate gradients as attributions.

# %%
import os
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch

import coar
from coar.report import figures
from coar.tasks import cifar
from coar.tasks.data_folder import find_data, places

os.chdir(next(folder for folder in [Path.cwd(), *Path.cwd().parents] if (folder / "specs").is_dir()))
DATA = "cifar10_jpeg.npz"  # 2,000 test images: see data/README.md
SMALL = not any((place / DATA).is_file() for place in places())
FORGET = "automobile"
if SMALL:
    task = cifar.make_task("resnet20", small=True, num_examples=800)
else:
    task = cifar.make_task("resnet56", data=str(find_data(DATA)))
experiment = coar.ComponentAblation(task, coar.find_components(task.model, kinds=["conv_filter"]))
print(task, experiment.component_set, sep="\n")

# %% [markdown]
# ## What it knows
#
# Accuracy by class, before anything is done.


# %%
@torch.no_grad()
def answers_of(model):
    """What a model says of every image."""
    return np.concatenate([model(images).argmax(1).numpy() for _, (images, _) in task.batches(200)])


classes, labels = np.array(cifar.CLASSES), np.array(task.metadata["label"])
before = answers_of(task.model)
accuracy = {name: (before == labels)[labels == number].mean() for number, name in enumerate(classes)}
print("  ".join(f"{name} {share:.0%}" for name, share in accuracy.items()))
of_class = np.flatnonzero(classes[labels] == FORGET)
figures.example_grid(task, of_class[:6], classes[before[of_class[:6]]])[0].figure

# %% [markdown]
# ## The edit
#
# Twenty images of the class are drawn; their margins (the logit of their class less the largest other one)
# are to fall. Sixty other images are the references. The rest is split: one half chooses how many filters to
# ablate, the other half judges, and nothing is chosen by it.

# %%
parts = coar.draw_parts(
    task, f"`class` == '{FORGET}'", f"`class` != '{FORGET}'", num_targets=20, num_references=60
)
print(parts)

# %% [markdown]
# One call does the rest. It attributes the eighty margins to the filters, ranks the filters by `contrast`
# (how much the targets need a filter, by how much the references do), ablates the first one, two, four, ...
# for real, and keeps the number that makes the network misread most images of the class while the others
# lose at most 1.5 points of accuracy. At most 1.5 % of the filters may go.

# %%
SIZES = [1, 2, 4, 8, 10] if SMALL else [1, 2, 4, 8, 12, 16, 20, 30]
settings = {"score": "contrast", "sizes": SIZES, "max_accuracy_drop": 0.015, "passes": 30 if SMALL else 60}
result = coar.make_edit(experiment, parts, "lower", **settings)
print(result.summary())

# %% [markdown]
# ## How many filters?
#
# Accuracies here are of the half that chooses.

# %%
figure, axes = plt.subplots(figsize=(6, 3.4), layout="constrained")
figures.edit_curve(result.curve, chosen=len(result.edit.names), ax=axes)
plt.show()

# %% [markdown]
# ## Margins before and after
#
# Of the images that judge.

# %%
figure, axes = plt.subplots(figsize=(5, 4), layout="constrained")
figures.margins_before_after({FORGET: result.judged, "all others": result.report}, ax=axes)
plt.show()

# %% [markdown]
# What the network says instead, over all images of the class.

# %%
edited = result.edit.apply(task.model)  # a copy; the network itself is as it was
after = answers_of(edited)
figure, axes = plt.subplots(figsize=(6.5, 2.8), layout="constrained")
for name, said, shift in [("before", before, -0.2), ("after", after, 0.2)]:
    shares = np.bincount(said[of_class], minlength=10) / len(of_class)
    axes.bar(np.arange(10) + shift, shares, 0.38, label=name)
axes.set_xticks(range(10), classes, rotation=40, ha="right")
axes.set(ylabel=f"share of the answers,\nimages of {FORGET}", ylim=(0, 1))
axes.legend(frameon=False)
plt.show()

# %% [markdown]
# The other classes one by one, over all images: who pays, and who gains. Where two classes were mixed up
# before, forgetting one of them makes room for the other.

# %%
figure, axes = plt.subplots(figsize=(6.5, 2.6), layout="constrained")
points = [100 * ((after == labels)[labels == i].mean() - accuracy[classes[i]]) for i in range(10)]
others = [i for i in range(10) if classes[i] != FORGET]
axes.bar(classes[others], [points[i] for i in others])
axes.axhline(0, color="#999999", linewidth=1)
axes.tick_params(axis="x", labelrotation=40)
axes.set(ylabel="change of accuracy, points")
plt.show()

# %% [markdown]
# ## The examples most changed
#
# Of the other classes, among the images that judge: those whose margin rose most, then those whose margin
# fell most. Over each: its class, the answer before, the answer after.


# %%
def answers_over(images):
    """Images under their class and what is said of them."""
    titles = [f"{classes[labels[i]]}\n{classes[before[i]]}\n{classes[after[i]]}" for i in images]
    return figures.example_grid(task, images, titles)[0].figure


change = result.report.after - result.report.before
judges = np.array(parts.report)
answers_over(judges[np.argsort(-change)[:6]])

# %%
answers_over(judges[np.argsort(change)[:6]])

# %% [markdown]
# ## Other ways
#
# The same images and the same guard:
#
# - **derivative**: filters ranked by the derivative at gate 1, one pass;
# - **weight norm**: filters with the largest weights first;
# - **random**: any filters;
# - **fine-tuning**: no filter; the last layer is trained on targets and references, for as many steps as the
#   guard allows.

# %%
comparison = coar.compare_edits(experiment, parts, "lower", **settings)
comparison.table.drop(columns="seconds").round(3)

# %%
figures.edit_comparison(comparison).figure

# %% [markdown]
# On this network the derivative at gate 1 does as well, and takes one pass: where a class hangs on a few
# filters, their derivatives show it. Fine-tuning the last layer on eighty images moves the class far less
# before the guard stops it. Ten filters do not remove what the network knows of the class: they make it
# answer something else, mostly what looks alike.
