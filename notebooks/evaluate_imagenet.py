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
# # How well do attributions predict ablations? ResNet-50 on ImageNet
#
# The steps of `evaluate_cifar`, for the published set-up on ImageNet: 22,720 filters of torchvision's
# ResNet-50, 50,000 images, 100,000 ablations. Such a study takes days on a GPU; where
# `scripts/evaluate_imagenet_resnet50.sh` has been run, the cells below show its results.
#
# Elsewhere (the default) they run in two minutes on **an untrained small network of the same class**, and the
# images are **50 of CIFAR-10**, 32 x 32 pixels, since none of ImageNet come with the checkout. That exercises
# every step and **says nothing about ImageNet**: for a small network that has learned something see
# `evaluate_cifar`.

# %%
import os
import warnings
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

import coar
from coar.baselines.named import make_baseline
from coar.errors import CoarWarning
from coar.interop import load_weights, save_weights
from coar.report import figures

os.chdir(next(folder for folder in [Path.cwd(), *Path.cwd().parents] if (folder / "specs").is_dir()))
SMALL = not Path("runs/imagenet_resnet50/attributions").is_dir()
NAME = "imagenet_resnet50_small" if SMALL else "imagenet_resnet50"
ROWS = 60 if SMALL else 100  # held-out ablations at each fraction
warnings.filterwarnings("ignore", category=CoarWarning)  # the small study has few rows, and says so

# %% [markdown]
# ## Ablate, and fit

# %%
study = coar.Study.from_spec(f"runs/{NAME}", coar.StudySpec.load(f"specs/{NAME}.json"))
study.run(progress=False)
path = study.attributions_path("ridge")
ridge = coar.Attributions.load(path) if path.exists() else coar.fit(study, save_as="ridge")
print(study.status().summary())
print(ridge)

# %% [markdown]
# ## Other methods, and how good they are
#
# Fitted at 5 % of the filters ablated, tested there and further away. The ceiling, that of the best linear
# model, is told by gate gradients, and known only at the fraction that they were made for. Leave-one-out
# needs an ablation per filter, a quarter of the full study.
#
# Beside them, a published file: the original code keeps attributions in `.pt` files, `weight` as
# `[components, examples]`. This one was written by `save_weights`; published ones are read with
# `standardised_by=0.05, nan="zero"` (see docs/interop.md), and need the names of the study, in the same
# order.

# %%
names = ["gate-gradients", "leave-one-out", "gradient-x-parameter", "neuron-conductance"]
names += ["internal-influence", "weight-norm"]
methods = {"ridge": ridge} | {name: make_baseline(study, name, progress=False) for name in names}
published = study.directory / "published-gate-gradients.pt"
published.unlink(missing_ok=True)  # of an earlier run
save_weights(methods["gate-gradients"], published, dtype="float16")
axes_of = {"components": study.components, "columns": study.columns["margin"]}
methods["a published file"] = load_weights(published, output="margin", **axes_of)

options = {"num_rows": ROWS, "seed": 1, "directory": study.directory / "held-out"}
evaluation = coar.evaluate(study.experiment, methods, [0.075, 0.0625, 0.05], progress=False, **options)
print(evaluation.summary())

# %%
figure, axes = plt.subplots(figsize=(8, 4), layout="constrained")
evaluation.plot(ax=axes)
plt.show()

# %%
figure, axes = plt.subplots(figsize=(8, 4), layout="constrained")
figures.correlation_by_compute(evaluation, fraction=0.05, ax=axes)
plt.show()

# %%
chosen = evaluation.table[evaluation.table.method.isin(["ridge", "gate-gradients", "leave-one-out"])]
figure, axes = plt.subplots(figsize=(6, 3.5), layout="constrained")
figures.correlation_histogram(chosen, ax=axes, fraction=0.05)
plt.show()

# %% [markdown]
# ## One image
#
# True against predicted margins under the held-out ablations, by the method with the highest mean
# correlation, for the image whose own correlation is the median one.

# %%
means = evaluation.means().query("ablation_fraction == 0.05").set_index("method")
best = means.correlation.drop("a published file").idxmax()
own = evaluation.table.query("ablation_fraction == 0.05 and method == @best").pearson.to_numpy()
column = int(np.nanargmin(abs(own - np.nanmedian(own))))
figure, (left, right) = plt.subplots(1, 2, figsize=(7, 2.8), width_ratios=[1, 2], layout="constrained")
study.experiment.task.show(study.experiment.task.dataset[column], left)
figures.predictions(*evaluation.example(column, best, 0.05), ax=right, title=best)
plt.show()

# %% [markdown]
# And the filters behind it: their weights for this image, and the images that need each of them most.

# %%
figures.top_component_images(methods[best], column, study.experiment.task, components=3, images=6).figure

# %% [markdown]
# By layer, over all images: how much a filter matters on average. Colours end where 99 % of the values do:
# the arrow at the end of the colour bar says that a few are beyond, and as dark.

# %%
labels = study.experiment.task.metadata["class"] if SMALL else ["all"] * len(study.experiment.task)
figures.layer_heat_map(methods[best], by=labels, value="magnitude").figure
