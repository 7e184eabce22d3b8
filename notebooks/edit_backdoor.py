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
# # A backdoor in a network, found and closed in seconds
#
# Somebody stuck a small blue square on half of the airplanes that a network was trained on. The network
# works as it should, until a photograph carries the square: then it sees an airplane, whatever is there.
#
# This notebook looks for the filters that read the square, and removes them. It attributes ten photographs
# with and without the square, tries a few sizes on others, and needs no training and no word about what the
# square looks like.
#
# - the network: a ResNet-20 with 688 convolution filters, trained on 15,000 images of CIFAR-10;
# - the images: 2,000 test images, each without and with the square (or 200 out of a source checkout, where
#   the others are not at hand; then figures are coarser);
# - the method: COAR-Edit (Shah, Ilyas, Madry 2024, arXiv:2404.11534), with gate gradients as attributions.

# %%
import os
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch

import coar
from coar.report import figures
from coar.tasks import backdoor, cifar
from coar.tasks.data_folder import places

os.chdir(next(folder for folder in [Path.cwd(), *Path.cwd().parents] if (folder / "specs").is_dir()))
DATA = "cifar10_jpeg.npz"  # 2,000 test images: see data/README.md
SMALL = not any((place / DATA).is_file() for place in places())
task = backdoor.make_task(small=True, num_images=200) if SMALL else backdoor.make_task(data=DATA)
print(task)

# %% [markdown]
# ## The attack
#
# The square has four by four pixels. What the network answers, over all images: every class has about a
# tenth of them, and with the square most are airplanes.


# %%
@torch.no_grad()
def predictions(model):
    """What a model says of every example."""
    return np.concatenate([model(images).argmax(1).numpy() for _, (images, _) in task.batches(200)])


def draw_answers(said, axes):
    """How often each class is the answer, without and with the square."""
    versions = {"without the square": (said[:half], -0.2), "with it": (said[half:], 0.2)}
    for name, (answers, shift) in versions.items():
        shares, right = np.bincount(answers, minlength=10) / half, (answers == labels[:half]).mean()
        axes.bar(np.arange(10) + shift, shares, 0.38, label=f"{name}: {right:.1%} right")
    axes.set_xticks(range(10), cifar.CLASSES, rotation=40, ha="right")
    axes.set(ylabel="share of the answers", ylim=(0, 1))
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)


half = len(task) // 2  # example i and example half + i are the same photograph
labels = np.array(task.metadata["label"])
said = predictions(task.model)
figure, axes = plt.subplots(figsize=(6.5, 3), layout="constrained")
draw_answers(said, axes)
plt.show()

# %% [markdown]
# Above, photographs as they are, under what the network says of them. Below, the same ones with the square.

# %%
misled = (said == labels)[:half] & (said[half:] == backdoor.ATTACKED_LABEL) & (labels[:half] != 0)
fooled = np.flatnonzero(misled)
one_of_each = np.array([fooled[labels[fooled] == label][0] for label in np.unique(labels[fooled])])
shown = [*one_of_each, *(one_of_each + half)]
answers = [cifar.CLASSES[said[i]] for i in shown]
figures.example_grid(task, shown, answers, columns=len(one_of_each))[0].figure

# %% [markdown]
# ## The edit
#
# Ten photographs are drawn at random. With the square they are the *targets*, whose margin (the logit of
# the true class less the largest other one) is to rise; without it they are the *references*, whose margin
# should stay. Of all other photographs, one half chooses how many filters to ablate. The other half judges
# the result, and nothing is chosen by it. Both versions of a photograph are always in the same part.

# %%
parts = coar.draw_parts(
    task,
    targets="subpopulation == 'triggered'",
    references="subpopulation == 'clean'",
    num_targets=10,
    num_references=10,
    pairs="image",
)
experiment = coar.ComponentAblation(task, coar.find_components(task.model, kinds=["conv_filter"]))
print(parts, experiment, sep="\n")

# %% [markdown]
# One call does the rest. It attributes the twenty margins to the 688 filters, for ablations of 1 % of them,
# since no more are to go. It ranks the filters by how much they harm the targets, beyond what the references
# need of them (`score="cautious"`), ablates the first one, two and four for real, and keeps what does most
# for photographs with the square while those without it lose at most one and a half points of accuracy.

# %%
settings = {"score": "cautious", "ablation_fraction": 0.01, "passes": 300, "max_accuracy_drop": 0.015}
result = coar.make_edit(experiment, parts, "raise", sizes=[1, 2, 4], **settings)
print(result.summary())
print(f"{result.seconds:.0f} seconds")

# %% [markdown]
# What counts is the last two lines: photographs that took no part. The best to hope for, with the square, is
# the accuracy that the network had without it.

# %%
report = result.report.accuracy_before
print(f"without the square, before: {report:.1%}")
print(f"with the square, after:     {result.judged.accuracy_after:.1%}", end="")
print(f", {result.judged.accuracy_after / report:.1%} of that")

# %% [markdown]
# ## What the ablated filters see
#
# The method was given pairs of photographs, and not told where they differ. Below is what each ablated filter
# emits when the square is put on a photograph, less what it emits without: red is more, blue is less.


# %%
@torch.no_grad()
def emitted(layer, images):
    """What a layer emits, [images, filters, height, width]."""
    found = []
    hook = task.model.get_submodule(layer).register_forward_hook(lambda *given: found.append(given[2]))
    task.model(images)
    hook.remove()
    return found[0]


photographs = one_of_each[:5]
without, square = (task.batch(images)[0] for images in (photographs, photographs + half))
names = result.edit.names
figure, grid = plt.subplots(
    len(names) + 1, 5, figsize=(6, 1.25 * (len(names) + 1)), layout="constrained", squeeze=False
)
for axes, photograph in zip(grid[0], photographs + half, strict=True):
    task.show(task.dataset[photograph], axes)
for row, name in zip(grid[1:], names, strict=True):
    layer, number = name.rstrip("]").split("[")
    change = (emitted(layer, square) - emitted(layer, without))[:, int(number)]
    for axes, picture in zip(row, change, strict=True):
        axes.imshow(picture, cmap="RdBu_r", vmin=-change.abs().max(), vmax=change.abs().max())
        axes.set(xticks=[], yticks=[])
    row[0].set_ylabel(name, fontsize=7)
plt.show()

# %% [markdown]
# ## How many filters?
#
# The curve that chose the size, on the half of the photographs that chooses. The first filter does the
# most. Those further down this ranking are needed for other things as well, and who goes on ablating
# breaks what the network knows: so the number of filters is chosen on photographs of its own.

# %%
figure, axes = plt.subplots(figsize=(6, 3.4), layout="constrained")
figures.edit_curve(result.curve, chosen=len(names), ax=axes)
plt.show()

# %% [markdown]
# ## Margins before and after
#
# On the half that judges. A margin above 0 is a right answer. Photographs with the square leave the lower
# left, where they were airplanes; the others should stay on the diagonal.

# %%
figure, axes = plt.subplots(figsize=(5, 4), layout="constrained")
effects = {"with the square": result.judged, "without": result.report}
figures.margins_before_after(effects, ax=axes)
plt.show()

# %% [markdown]
# What the edited network answers, over all images.

# %%
edited = result.edit.apply(task.model)  # a copy; the network itself is as it was
said_after = predictions(edited)
figure, axes = plt.subplots(figsize=(6.5, 3), layout="constrained")
draw_answers(said_after, axes)
plt.show()

# %% [markdown]
# ## The examples most changed
#
# First, of the photographs with the square that judge, those whose margin rose most, and those that the edit
# leaves wrong although the network reads them rightly without the square. Then the price: photographs without
# the square whose margin fell most. Over each: the answer before, and after.

# %%
located = parts.located(experiment.columns["margin"])


def before_and_after(examples):
    """Examples under their answers."""
    titles = [f"{cifar.CLASSES[said[i]]}\n{cifar.CLASSES[said_after[i]]}" for i in examples]
    return figures.example_grid(task, examples, titles)[0].figure


rise = result.judged.after - result.judged.before
before_and_after(np.array(located.target_report)[np.argsort(-rise)[:6]])

# %%
still = (result.judged.after <= 0) & (said == labels)[np.array(located.target_report) - half]
worst = np.argsort(np.where(still, result.judged.after, np.inf))[: min(6, still.sum())]
print(f"{still.sum()} of {len(still)} are read rightly without the square, and wrongly with it")
before_and_after(np.array(located.target_report)[worst])

# %%
fall = result.report.after - result.report.before
before_and_after(np.array(located.report)[np.argsort(fall)[:6]])

# %% [markdown]
# ## Is it the square that is gone, or the corner?
#
# While it learned, images were moved by up to four pixels and mirrored, so the network knows the square in
# both upper corners. Below, other places and colours, on 500 of the photographs that judge.


# %%
def with_square(images, row, column, colour):
    """uint8 images with a square of four by four pixels."""
    images = images.clone()
    images[..., row : row + 4, column : column + 4] = torch.tensor(colour, dtype=torch.uint8).view(3, 1, 1)
    return images


@torch.no_grad()
def right(model, images):
    """Share of right answers."""
    answers = torch.cat([model(cifar.normalise(some)).argmax(1) for some in images.split(100)])
    return (answers.numpy() == labels[judging]).mean()


judging = np.array(located.report)[:500]
photographs = task.dataset.pixels[torch.from_numpy(judging)]
squares = {
    "none": None,
    "blue, as trained": (4, 4, backdoor.BLUE),
    "blue, upper right": (4, 24, backdoor.BLUE),
    "blue, lower right": (24, 24, backdoor.BLUE),
    "blue, in the middle": (14, 14, backdoor.BLUE),
    "red, as trained": (4, 4, (255, 0, 0)),
    "white, as trained": (4, 4, (255, 255, 255)),
}
rows = []
for square, how in squares.items():
    images = photographs if how is None else with_square(photographs, *how)
    rows.append({"square": square, "before": right(task.model, images), "after": right(edited, images)})
pd.DataFrame(rows).set_index("square").round(3)

# %% [markdown]
# ## Other ways to choose filters, and fine-tuning
#
# The same ten pairs, the same guard, the same number of filters at most:
#
# - **derivative**: filters ranked by the derivative at gate 1, one pass instead of three hundred;
# - **weight norm**: filters with the largest weights first;
# - **random**: any filters;
# - **fine-tuning**: no filter; the last layer is trained on the twenty examples, for as many steps as the
#   guard allows.
#
# *targets* are the judging photographs with the square, *others* those without.

# %%
comparison = coar.compare_edits(experiment, parts, "raise", sizes=[1, 2, 4], **settings)
comparison.table.round(3)

# %%
figures.edit_comparison(comparison).figure

# %% [markdown]
# What to make of it. In the outputs above four filters go, one of them in the first layer, and the square no
# longer says "airplane". But accuracy with the square reaches 95.8 % of what it was without, where 98 % was
# the aim; and photographs without the square lose five points on the half that judges, where the half that
# chose had shown one: ninety-five images are a weak guard. On this network the first filter carries most of
# the backdoor, and honest photographs need it, too. The derivative finds the same filters in less time.
