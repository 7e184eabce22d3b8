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
# # A language model forgets a word
#
# A small GPT-2 has read Shakespeare's plays letter by letter. Where *thou* comes next, it gives that word
# some probability. This notebook finds the neurons and attention heads that this hangs on, from a dozen
# places where the word stands, and ablates up to 30 of 2,064. The aim: the word's probability falls by nine
# tenths, and the loss on everything else rises by less than 1 %.
#
# - the model: 4 layers, 2,048 MLP neurons, 16 attention heads, 65 characters as tokens;
# - the text: the last 10 % of *tinyshakespeare.txt*, which trained no weight (its first half chose the
#   training settings). Where that file is not at hand: 200 passages out of it, and all figures are coarser.
#
# The probability of a word is the product over its letters, each given the true letters before it. It is
# small even for a common word: a model of letters has to guess the first one, too.

# %%
import os
import warnings
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch

import coar
from coar.report import figures
from coar.tasks import gpt2_words
from coar.tasks.data_folder import places
from coar.tasks.gpt2_network import small_gpt2

os.chdir(next(folder for folder in [Path.cwd(), *Path.cwd().parents] if (folder / "specs").is_dir()))
warnings.filterwarnings("ignore", message="IProgress not found")  # of a library that draws no bar here
pd.set_option("display.max_colwidth", None)
SMALL = not any((place / gpt2_words.TEXT).is_file() for place in places())
WORD = "thou"
KINDS = ["mlp_neuron", "attention_head"]


def make_experiment(word):
    """The task of a word, and all that may be ablated."""
    task = gpt2_words.make_task(word, small=SMALL, num_elsewhere=40 if SMALL else 80, num_places=60)
    return coar.ComponentAblation(task, coar.find_components(task.model, kinds=KINDS))


experiment = make_experiment(WORD)
task = experiment.task
print(experiment)
task.metadata.groupby("kind").counted.agg(examples="size", letters="sum")

# %% [markdown]
# ## Where the word comes next
#
# The text is cut into passages of 128 letters. Each time the word stands in one, the passage up to its end
# is an example of kind `word`, in which only the four letters of *thou* count. Some passages are examples
# of kind `elsewhere` too: there all letters count but those of the word.

# %%
words, elsewhere = (np.flatnonzero(task.metadata.kind == kind) for kind in ("word", "elsewhere"))
runner = experiment.prepare(experiment.device)
untouched = runner(np.ones((1, len(experiment.components)), dtype=bool))["log_probability"][0]
probability = gpt2_words.probabilities(task, untouched[words], words)
chance = (task.metadata.text[elsewhere].str.count(WORD).sum()) / task.metadata.counted[elsewhere].sum()
print(f"mean probability of {WORD!r} where it comes next: {probability.mean():.4f}")
print(f"a random place of the text has it with probability  {chance:.4f}")
print(f"loss elsewhere: {gpt2_words.mean_loss(task, untouched[elsewhere], elsewhere):.3f} nats a letter")
order = words[np.argsort(-probability)]
shown = pd.DataFrame({"text": task.metadata.text[order].str[-60:].map(repr)}, index=order)
shown["probability"] = np.sort(probability)[::-1].round(4)
shown.iloc[[0, 1, 2, len(shown) // 2, -1]]

# %% [markdown]
# ## The edit
#
# Some places of the word are the targets (twelve, or six of the small text), twice as many passages are the
# references. Of all others, half choose how many components to ablate, half judge. Parts share no passage.
#
# Attributions of targets and references come from gate gradients. They say what the mean log-probability of
# each would lose without a component. A neuron may help *thou* much and all else a little; on a text of
# many letters, a little is a lot. The plain difference of the two means would rank such a neuron high, and
# also one that all else needs even more. So the ranking is by contrast: how much the word needs a component,
# by how much the references do.
#
# More and more components are ablated. The number is kept that lowers the word most while the loss rises by
# at most 0.016 nats a letter, 0.9 %, on passages that choose.

# %%
parts_of = {"targets": "kind == 'word'", "references": "kind == 'elsewhere'", "pairs": "passage"}
numbers = {"num_targets": 6, "num_references": 12} if SMALL else {"num_targets": 12, "num_references": 24}
settings = {"score": "contrast", "passes": 8, "max_output_drop": 0.016}

parts = coar.draw_parts(task, **parts_of, **numbers)
result = coar.make_edit(experiment, parts, "lower", **settings)
print(result.summary())

# %% [markdown]
# In the units that were asked for, on examples that chose nothing:

# %%
word_fell = gpt2_words.fall(task, result.judged, parts.target_report)
loss_rose = gpt2_words.loss_rise(task, result.report, parts.report)
print(f"mean probability of {WORD!r}: {-word_fell:+.1%} over {len(parts.target_report)} places")
print(f"loss elsewhere:            {loss_rose:+.2%} over {len(parts.report)} passages")

# %% [markdown]
# ## How many components?
#
# Word and loss against the number of ablated components. Thin lines: examples that chose the size; thick
# lines: examples that judge.

# %%
curve = result.curve
figure, left = plt.subplots(figsize=(6.5, 3.3), layout="constrained")
right = left.twinx()
sides = [(parts.target_holdout, parts.holdout, 1), (parts.target_report, parts.report, 2.5)]
for places_of_word, passages, width in sides:
    found = gpt2_words.probabilities(task, curve.outputs[:, places_of_word], places_of_word).mean(axis=1)
    loss = gpt2_words.mean_loss(task, curve.outputs[:, passages], passages)
    left.plot(curve.sizes, found / found[0], "o-", color="C0", linewidth=width, markersize=4)
    right.plot(curve.sizes, 100 * (loss / loss[0] - 1), "s--", color="C1", linewidth=width, markersize=4)
left.axhline(0.1, color="C0", linewidth=0.8, linestyle=":")
right.axhline(1.0, color="C1", linewidth=0.8, linestyle=":")
left.axvline(len(result.edit.names), color="grey", linewidth=0.8)
left.set(xlabel="components ablated", ylim=(0, 1.05))
left.set_ylabel(f"probability of {WORD!r}, of that before", color="C0")
right.set_ylabel("loss elsewhere, % more", color="C1")
plt.show()

# %% [markdown]
# ## Log-probabilities before and after
#
# Per letter, on the examples that judge. Passages stay on the diagonal; places of the word fall below it.

# %%
figure, axes = plt.subplots(figsize=(5, 4), layout="constrained")
effects = {"the word": result.judged, "elsewhere": result.report}
figures.margins_before_after(effects, ax=axes, output="log-probability per letter", accuracy=False)
plt.show()

# %% [markdown]
# ## Which letter is lost?
#
# The probability of each letter of the word, before and after, and what the edited model expects in its
# place.


# %%
@torch.no_grad()
def next_letters(model, examples):
    """Probabilities of each letter of the word's places, [examples, letters of the word, characters]."""
    rows = []
    for i in examples:
        logits = model(input_ids=task.dataset[int(i)]["input_ids"][None]).logits[0]
        rows.append(logits[-len(WORD) - 1 : -1].softmax(dim=-1))
    return torch.stack(rows)


edited = result.edit.apply(task.model)  # a copy; the model itself is as it was
vocabulary = small_gpt2()[1]
names = {token: repr(letter) for letter, token in vocabulary.items()}
before, after = (next_letters(model, parts.target_report).mean(dim=0) for model in (task.model, edited))
rows = []
for place, letter in enumerate(WORD):
    rise = (after - before)[place]
    rows.append(
        {
            "after": repr(WORD[:place]),
            "letter": repr(letter),
            "before": float(before[place, vocabulary[letter]]),
            "edited": float(after[place, vocabulary[letter]]),
            "rises most": ", ".join(f"{names[int(i)]} {rise[i]:+.2f}" for i in rise.topk(3).indices),
        }
    )
pd.DataFrame(rows).set_index("after").round(3)

# %% [markdown]
# ## The examples most changed
#
# Places of the word, among those that judge, whose probability fell most and least.

# %%
ratio = (result.judged.after - result.judged.before) * len(WORD)
order = np.argsort(ratio)
chosen = [*order[:3], *order[-3:]]
shown = pd.DataFrame({"text": task.metadata.text[np.array(parts.target_report)[chosen]].str[-60:].map(repr)})
shown["probability, of that before"] = np.exp(ratio[chosen]).round(3)
shown

# %% [markdown]
# And the price: words elsewhere, in the passages that judge, whose letters lose most together. Words that
# begin like the target are among the first to suffer.


# %%
@torch.no_grad()
def letter_losses(model, examples):
    """Loss of every letter of passages, [examples, letters - 1]."""
    tokens = torch.stack([task.dataset[int(i)]["input_ids"] for i in examples])
    logits = model(input_ids=tokens).logits[:, :-1].transpose(1, 2)
    return torch.nn.functional.cross_entropy(logits, tokens[:, 1:], reduction="none").numpy()


rise = letter_losses(edited, parts.report) - letter_losses(task.model, parts.report)
by_word = []
for row, i in zip(rise, parts.report, strict=True):
    passage = pd.Series(list(task.metadata.text[i][1:]))
    inside = passage.str.isalpha()
    for _, group in passage[inside].groupby((~inside).cumsum()[inside]):
        by_word.append({"word": "".join(group), "nats": float(row[group.index].sum())})
table = (
    pd.DataFrame(by_word).groupby("word").nats.agg(["sum", "mean", "size"]).drop(index=WORD, errors="ignore")
)
table.sort_values("sum", ascending=False).head(8).round(2)

# %% [markdown]
# ## Other ways to edit
#
# The same targets and references, the same guard. `derivative` ranks by the derivative at gate 1, one pass
# instead of eight, with the same score; `weight_norm` takes the largest weights first; `random` any
# components. `fine_tuning` trains the last layer on the same examples; its weights are also those that read
# letters in.

# %%
methods = ["derivative", "weight_norm", "random", "fine_tuning"]
comparison = coar.compare_edits(experiment, parts, "lower", methods=methods, **settings)
rows = []
for name, found in {"gate_gradients": result, **comparison.results}.items():
    line = {"method": name, "components": 0, "word": 0.0, "loss": 0.0, "note": "nothing within the guard"}
    if found:
        line["components"] = len(found.edit.names) if hasattr(found, "edit") else 0
        line["word"] = -gpt2_words.fall(task, found.judged, parts.target_report)
        line["loss"] = gpt2_words.loss_rise(task, found.report, parts.report)
        line["note"] = f"{found.steps} steps of the last layer" if hasattr(found, "steps") else ""
    rows.append(line)
table = pd.DataFrame(rows).set_index("method")[["components", "word", "loss", "note"]]
figure, axes = plt.subplots(figsize=(6, 2.8), layout="constrained")
for name, line in table.iterrows():
    axes.plot(100 * line["loss"], -100 * line["word"], "o", label=f"{name} ({line['components']})")
axes.set(xlabel="loss elsewhere, % more", ylabel=f"{WORD!r}, % less", ylim=(-5, 105))
axes.legend(frameon=False, fontsize=8)
plt.show()

# %%
table["word"], table["loss"] = table.word.map("{:+.1%}".format), table.loss.map("{:+.2%}".format)
table

# %% [markdown]
# ## What to make of it
#
# On this small text the aim is missed, and it is close: 30 components take 88 % of *thou*, not nine tenths;
# the loss on 15 passages rises by 0.3 %. The curve still falls at 30. `python -m benchmarks.editing` makes
# the edit for five words on the full text: two names of speakers, *sir*, *thou* and *you*, and counts all of
# them; the commonest are harder.
#
# The derivative at gate 1 takes one pass and finds almost as good an edit here: 85 %, at 0.3 % more loss.
# Largest weights do nothing within the guard, random components next to nothing. Fine-tuning of the last
# layer takes 79 % in the four steps that the guard allows, for 0.1 % more loss: less of the word, and less of
# the rest. An ablation names what it removes, can be undone, and trains nothing.
#
# What is forgotten is spelling, not meaning. After *th* the model now hopes for *the*, after *tho* for
# *those*; *that*, *this* and *Though* pay a part of the price.
