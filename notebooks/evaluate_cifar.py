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
# # How well do attributions predict ablations? A ResNet on CIFAR-10
#
# An *ablation* sets some filters of a trained network to zero. An *attribution* of an example is a linear
# model that predicts what the network will then say of it: one weight per filter, added up over the filters
# that are kept. So it can be tested: ablate filters that nobody has ablated before, run the network, and
# compare.
#
# Small (the default): a ResNet-20 with 688 filters, 100 images, 400 ablations, all of which come with a
# source checkout; about two minutes. Where `scripts/evaluate_cifar_resnet.sh` has been run, the same cells
# show its study: COAR's network of 2,304 filters, 10,000 images, 50,000 ablations.

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
from coar.report.activations import measure_activations

os.chdir(next(folder for folder in [Path.cwd(), *Path.cwd().parents] if (folder / "specs").is_dir()))
SMALL = not Path("runs/cifar_resnet/attributions").is_dir()
NAME = "cifar_resnet_small" if SMALL else "cifar_resnet"
ROWS = 60 if SMALL else 100  # held-out ablations at each fraction
warnings.filterwarnings("ignore", category=CoarWarning)  # the small study has few rows, and says so

# %% [markdown]
# ## Ablate, and fit
#
# A study draws filters at random, a tenth of them for each row, and writes down the margin of every image:
# the logit of its class less the largest other one. The fit then explains these margins by which filters
# were kept.

# %%
spec = coar.StudySpec.load(f"specs/{NAME}.json")
study = coar.Study.from_spec(f"runs/{NAME}", spec)
study.run(progress=False)
path = study.attributions_path("ridge")
ridge = coar.Attributions.load(path) if path.exists() else coar.fit(study, save_as="ridge")
print(study.status().summary())
print(ridge)

# %% [markdown]
# The filters that matter most for the first image. Blue ones hold the margin up, red ones hold it down. The
# error bars are 95 % intervals, 1.96 standard errors of the fit: what other rows of the same number would
# change. They do not contain what the fit shrinks: with fewer rows than filters it pulls weights to zero.

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(8, 3), width_ratios=[1, 3], layout="constrained")
study.experiment.task.show(study.experiment.task.dataset[0], left)
figures.top_components(ridge, 0, count=8, ax=right)
plt.show()

# %% [markdown]
# ## Evaluate on ablations that no fit has seen
#
# At three fractions, as published. Correlations are over ablations, one for each image, then averaged; the
# intervals are of a bootstrap over both. Rows are kept in the study's folder and never computed twice.
#
# No linear model, however well fitted, can predict a network perfectly. The *ceiling* says how far the best
# one would come. It is known only at the fraction of the study; here the study's own rows tell it.

# %%
options = {"num_rows": ROWS, "seed": 1, "directory": study.directory / "held-out", "progress": False}
evaluation = coar.evaluate(study.experiment, {"ridge": ridge}, [0.15, 0.125, 0.10], ceiling=study, **options)
print(evaluation.summary())

# %% [markdown]
# One image, neither the best predicted nor the worst: the one with the median correlation. Each point is an
# ablation. A good attribution need not be right about everything; it has to get the order right, and on the
# line also the size.

# %%
correlations = evaluation.table.query("ablation_fraction == 0.1").pearson.to_numpy()
column = int(np.nanargmin(abs(correlations - np.nanmedian(correlations))))
figure, (left, right) = plt.subplots(1, 2, figsize=(7, 2.8), width_ratios=[1, 2], layout="constrained")
study.experiment.task.show(study.experiment.task.dataset[column], left)
figures.predictions(*evaluation.example(column, fraction=0.10), ax=right)
plt.show()

# %% [markdown]
# ## Other methods
#
# - **leave-one-out** ablates every filter alone: exact, and blind to what happens when many are gone;
# - **gradient x parameter** is its first-order guess, from one backward pass;
# - **neuron conductance** and **internal influence** watch the filters while the image fades in from grey;
# - **gate gradients** average derivatives while other filters are partly away (docs/gate-gradients.md);
# - **random** weights know nothing: the floor.
#
# The ceiling is now told by gate gradients, from fewer passes than a study needs rows: it is the same
# quantity as before, and the two need not agree by more than their intervals.

# %%
names = ["gate-gradients", "leave-one-out", "gradient-x-parameter", "neuron-conductance"]
names += ["internal-influence", "random-attributions"]
methods = {"ridge": ridge} | {name: make_baseline(study, name, progress=False) for name in names}
evaluation = coar.evaluate(study.experiment, methods, [0.15, 0.125, 0.10], **options)
print(evaluation.summary())

# %%
figure, axes = plt.subplots(figsize=(8, 4), layout="constrained")
evaluation.plot(ax=axes)
plt.show()

# %% [markdown]
# A mean may hide that some images are predicted well and others not at all.

# %%
chosen = evaluation.table[evaluation.table.method.isin(["ridge", "gate-gradients", "leave-one-out"])]
figure, axes = plt.subplots(figsize=(6, 3.5), layout="constrained")
figures.correlation_histogram(chosen, ax=axes, fraction=0.10)
plt.show()

# %% [markdown]
# Is a difference larger than chance? Both methods see the same ablations, so their difference is known
# better than either.

# %%
evaluation.compare("gate-gradients", "ridge").round(3)

# %% [markdown]
# ## What does it cost?
#
# Fits to some of the rows, and gate gradients from few passes, against the forward passes that they took.
# In the small study rows are fewer than filters, so the regression is far from the ceiling; gate gradients
# come near it for a third of the cost. (A pass of gate gradients is worth three forward passes.)

# %%
curves = dict(methods)
for rows in [study.num_rows // 4, study.num_rows // 2]:
    curves[f"ridge, {rows} rows"] = coar.fit(study, rows=range(rows))
for passes in [10, 30]:
    curves[f"gate gradients, {passes} passes"] = coar.gate_gradients(
        study.experiment, 0.10, passes=passes, progress=False
    )
costs = coar.evaluate(study.experiment, curves, 0.10, **options)
figure, axes = plt.subplots(figsize=(8, 4), layout="constrained")
costs.plot(ax=axes, against="compute")
plt.show()

# %% [markdown]
# ## Where the components are
#
# The method with the highest correlation, by layer and class. Colours end where 99 % of the values do: the
# arrow at the end of the colour bar says that a few are beyond, and as dark. Then the same image as above:
# the filters that matter most for it, and the images that need each of them most, or activate it most.

# %%
means = evaluation.means().query("ablation_fraction == 0.1").set_index("method")
best_name = means.correlation.idxmax()
best = methods[best_name]
classes = study.experiment.task.metadata["class"]
figures.layer_heat_map(best, by=classes, value="magnitude").figure

# %%
activations = measure_activations(study.experiment, progress=False)
figures.top_component_images(
    best, column, study.experiment.task, components=3, images=4, activations=activations
).figure

# %% [markdown]
# ## Published attributions
#
# The original code keeps attributions in `.pt` files: `weight` is `[components, examples]`, transposed, and
# `bias`. Any such file is evaluated like the others, once it is told which components and examples it is
# of. Published ones come from fast_l1, which does not scale its weights back: `load_weights(path,
# standardised_by=0.05)` does (see docs/interop.md), and `nan="zero"` accepts the NaN that some of them
# hold. Here one is written first, in float16 as theirs are.

# %%
published = study.directory / f"published-{best_name}.pt"
published.unlink(missing_ok=True)  # of an earlier run
save_weights(best, published, dtype="float16")
loaded = load_weights(
    published, components=study.components, columns=study.columns["margin"], output="margin"
)
found = coar.evaluate(study.experiment, {"published": loaded, "before it was written": best}, 0.10, **options)
found.means()[["method", "correlation", "r2", "slope"]].round(3)
