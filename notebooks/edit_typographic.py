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
# # A network that reads where it should look: the typographic attack
#
# CLIP learns from pictures and their captions, and learns to read on the way. So an apple with a note that
# says "iPod" becomes an iPod. This notebook finds the components of such a network that read, and removes
# them, without any training.
#
# Small (the default): a dual encoder in the manner of CLIP, trained here in about ten seconds. Its images
# are handwritten digits in blue, with or without a word in red. Where there is a folder `data/typographic`
# with a folder of images per class, the same cells attack and edit CLIP itself (ViT-B/16); that takes a GPU,
# or patience.
#
# The method is COAR-Edit (Shah, Ilyas, Madry 2024, arXiv:2404.11534), with gate gradients as attributions.

# %%
import os
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch

import coar
from coar.report import figures
from coar.tasks import clip, written_digits

os.chdir(next(folder for folder in [Path.cwd(), *Path.cwd().parents] if (folder / "specs").is_dir()))
DATA = Path("data/typographic")
SMALL = not DATA.is_dir()
if SMALL:
    task, kinds = written_digits.make_task(), ["conv_filter"]
else:
    task = clip.make_task(data=str(DATA), attack="both", cache="runs/typographic")
    kinds = ["mlp_neuron", "attention_head"]
print(task)

# %% [markdown]
# An image that the network has not seen, without a word and with that of a wrong digit:

# %%
figure, pair = plt.subplots(1, 2, figsize=(3.2, 1.8), layout="constrained")
for axes, example in zip(pair, (0, len(task) // 2), strict=True):
    task.show(task.dataset[example], axes)
plt.show()

# %% [markdown]
# ## The attack
#
# The network has seen no word that was wrong: in training a word, where there was one, said what the digit
# is. It classifies an image by ten prompts, "a picture of the digit seven" and so on: the one whose embedding
# is nearest to that of the image. Above: images that it has not seen, and its answers. Below: the same
# images with the word of a wrong digit.


# %%
@torch.no_grad()
def answers(model):
    """Number of the class that a model says of every example."""
    return np.concatenate([model(images).argmax(1).numpy() for _, (images, _) in task.batches(100)])


def grid(examples, said, columns=6):
    """Examples, under what is said of each."""
    titles = [classes[said[i]] for i in examples]
    return figures.example_grid(task, examples, titles, columns)[0]


table = task.metadata
labels, half = table.label.to_numpy(), len(task) // 2  # example i and example half + i are the same image
classes = dict(zip(table.label, table["class"], strict=True))
before = answers(task.model)
fooled = np.flatnonzero((before == labels)[:half] & (before != labels)[half:])[:6]
grid([*fooled, *(fooled + half)], before).figure

# %%
says_word = [classes[said] == word for said, word in zip(before[half:], table.written[half:], strict=True)]
print(f"right without a word:          {(before == labels)[:half].mean():.1%}")
print(f"right beside a wrong word:     {(before == labels)[half:].mean():.1%}")
print(f"says the word that is written: {np.mean(says_word):.1%}")

# %% [markdown]
# ## The edit
#
# Twenty attacked images are drawn at random. They are the *targets*: their margin (the logit of the right
# class less the largest other one) is to rise. The same twenty without a word, and forty more, are the
# *references*, whose margin should stay. Of all other images one half chooses how many components to ablate.
# The other half judges the result, and nothing is chosen by it. Both versions of an image are always in the
# same part.

# %%
parts = coar.draw_parts(
    task,
    targets="subpopulation == 'attacked'",
    references="subpopulation == 'clean'",
    num_targets=20,
    num_references=60,
    pairs="image",
)
components = coar.find_components(task.model, kinds=kinds)
experiment = coar.ComponentAblation(task, components)
print(parts, experiment, sep="\n")

# %% [markdown]
# One call does the rest: it attributes the eighty margins to the components, ranks these by how much more
# they harm the targets than the references, really ablates the first one, two, four, ... of them, and keeps
# the number that does most while clean images lose at most one point. It does so with both scores, Welch's t
# and the difference of means, and keeps the better edit.

# %%
settings = {"score": "best", "max_accuracy_drop": 0.01}
result = coar.make_edit(experiment, parts, "raise", **settings)
print(result.summary())
print(f"{result.seconds:.0f} seconds")

# %%
attacked, clean = result.judged, result.report
lost = clean.accuracy_before - attacked.accuracy_before
print(f"the attack costs {100 * lost:.1f} points;", end=" ")
print(f"the edit gives back {(attacked.accuracy_after - attacked.accuracy_before) / lost:.0%} of them")

# %% [markdown]
# ## How many components?
#
# The curve that chose the size, on the half of the images that chooses. Reading is spread over many
# components: each takes a little of it away.

# %%
size = len(result.edit.names)
figure, axes = plt.subplots(figsize=(6, 3.2), layout="constrained")
figures.edit_curve(result.curve, chosen=size, ax=axes)
plt.show()

# %% [markdown]
# Where they are, and how many there are in all:

# %%
layers = [name.partition("[")[0] for name in result.edit.names]
for group in components.groups:
    print(f"{group.name:20} {layers.count(group.name):3} of {group.count}")

# %% [markdown]
# ## Margins before and after
#
# On the half that judges. A margin above 0 is a right answer. Attacked images should move up, out of the
# lower left; clean ones should stay on the diagonal.

# %%
figure, axes = plt.subplots(figsize=(5, 4), layout="constrained")
figures.margins_before_after({"beside a wrong word": attacked, "without a word": clean}, ax=axes)
plt.show()

# %% [markdown]
# ## The examples most changed
#
# Attacked images that judge, under the answers of the edited network: those whose margin rose most, then
# those that fool it still.

# %%
after = answers(result.edit.apply(task.model))  # a copy; the network itself is as it was
judging = np.asarray(parts.target_report)
rise = attacked.after - attacked.before
grid(judging[np.argsort(-rise)[:6]], after).figure

# %%
grid(judging[np.argsort(attacked.after)[:6]], after).figure

# %% [markdown]
# And the price: images without a word whose margin fell most.

# %%
fall = clean.after - clean.before
grid(np.asarray(parts.report)[np.argsort(fall)[:6]], after).figure

# %% [markdown]
# ## Can it still read?
#
# Images with nothing but a word, at twenty places each. Most of these words are still read: the edit has
# not removed all of what reads. Writing counts for less, so that the digit wins where there is one.

# %%
if SMALL:
    places = np.random.default_rng(0).random((20, 3))
    blank = torch.zeros(written_digits.DIGIT, written_digits.DIGIT)
    words = torch.stack(
        [written_digits.write(blank, word, place) for word in written_digits.WORDS for place in places]
    )
    for name, model in {"before": task.model, "after": result.edit.apply(task.model)}.items():
        with torch.no_grad():
            read = model(words).argmax(1).numpy() == np.repeat(np.arange(10), len(places))
        print(f"words read {name}: {read.mean():.1%}")

# %% [markdown]
# ## Other ways
#
# On the same examples, with the same guard:
#
# - **derivative**: components ranked by the derivative at gate 1, one pass instead of sixty;
# - **weight norm**: components with the largest weights first;
# - **random**: any components;
# - **fine-tuning**: no component; the last layer is trained on the same eighty images, for as many steps as
#   the guard allows.
#
# *targets* are the judging images beside a wrong word, *others* those without a word.

# %%
comparison = coar.compare_edits(experiment, parts, "raise", **settings)
comparison.table.round(3)

# %%
figures.edit_comparison(comparison).figure

# %% [markdown]
# Gate gradients do best here. That is not always so: on other networks of this kind, trained from other
# seeds, the derivative, which is cheaper, came close or ahead (`python -m benchmarks.editing`). And this
# task is made to be solvable: digits and words have different colours, so that the first layer can keep
# them apart. In trials with both in one colour, less came back.
