"""Digits with words beside them: a dual encoder in the manner of CLIP that can be fooled by writing.

An image [2, 24, 24] has two colours: a handwritten digit in blue, enlarged to 16 x 16 pixels, and a word
in small red letters above or below it. Two towers, one for images and one for captions, are trained to
agree (contrastive loss). The word of a training image always says what the digit is, some have no word,
and some have nothing but the word; so the image tower learns to read. In the task every held-out image is
there twice: without a word ("clean") and with the word of a wrong digit ("attacked").

The task's model is the image tower with the embeddings of ten prompts as a classifier, as in
`coar.tasks.clip` with `text="fixed"`: components of the text tower cannot be chosen by mistake.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_model
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import TensorDataset

from coar.errors import SettingError
from coar.outputs import zero_shot_margin
from coar.randomness import integers, permutation, uniform
from coar.recipes import task_factory
from coar.task import Task
from coar.tasks.digits import NUM_TRAIN
from coar.tasks.libraries import seeded

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
CAPTIONS = ("a {}", "the digit {}", "a picture of a {}", "somebody wrote {}")
PROMPT = "a picture of the digit {}"  # none of the captions
NUM_TEST = 700
SIDE, DIGIT, LETTER = 24, 16, 5  # pixels: of the image, of the digit, height of a letter
PALE = 0.6  # darkest blue, where red is 1: as in photographs, writing has the higher contrast
WORD_ALONE, WORD_AT_ALL = 0.2, 0.6  # shares of the training images
FILTERS = (48, 64, 128)
FEATURES = 32  # of the space that both towers share
SCALE = 20.0  # of the cosine similarities
EPOCHS, BATCH, LEARNING_RATE = 20, 64, 4e-3
# Letters of 3 x 5 pixels: an octal digit for each row, a bit for each pixel.
_ROWS = "74747 74644 74557 55755 72227 65555 75557 65655 74717 72222 55557 55552 55575 55255 71247"
LETTERS = dict(zip("efghinorstuvwxz", _ROWS.split(), strict=True))


@task_factory
def make_task(seed: int = 0, num_images: int = NUM_TEST, weights: str | None = None) -> Task:
    """The task of written digits: all images clean, then all attacked; the zero-shot margin as output.

    Metadata: `id`, `image` (the same for a clean image and the attacked one), `label`, `class` (the
    digit's name), `written` (the word, "" without one), `subpopulation` ("clean" or "attacked").

    Args:
        seed: of the split, the towers' initial weights, the order of training, and the wrong words.
        num_images: how many of the 700 held-out images to use; each makes two examples.
        weights: safetensors file of a model trained before; None trains one (about 10 seconds).

    Raises:
        SettingError: more images than there are.

    >>> task = make_task(num_images=50)                                         # doctest: +SKIP
    >>> len(task), task.metadata.written[60]                                    # doctest: +SKIP
    (100, 'eight')
    """
    if not 1 <= num_images <= NUM_TEST:
        raise SettingError("num_images out of range", expected=f"1 to {NUM_TEST}", got=num_images)
    digits, labels, order = load(seed)
    chosen = order[NUM_TRAIN:][:num_images]
    with seeded(seed):
        model, text = ZeroShot(ImageTower()), TextTower()
        if weights is None:
            train(model.image, text, digits[order[:NUM_TRAIN]], labels[order[:NUM_TRAIN]], seed)
    if weights is None:
        with torch.no_grad():
            model.classes.copy_(text(encode([PROMPT.format(word) for word in WORDS])))
    else:
        load_model(model, weights)
    table = _metadata(chosen.tolist(), labels[chosen].tolist(), seed)
    images = [
        write(digits[image], word, uniform(seed, "written digits places", image, 3))
        for image, word in zip(table["image"], table["written"], strict=True)
    ]
    return Task(
        model.eval(),
        TensorDataset(torch.stack(images), torch.tensor(table["label"])),
        outputs={"zero_shot_margin": zero_shot_margin},
        metadata=table,
        show=show,
        save_weights=True,
    )


# ------------------------------------------------------------------------------------------ images


def load(seed: int) -> tuple[Tensor, Tensor, np.ndarray]:
    """Enlarged digits [1797, 16, 16] between 0 and 1, their labels, and an order: training images first."""
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    images = torch.tensor(pixels / 16.0, dtype=torch.float32).view(-1, 1, 8, 8)
    images = functional.interpolate(images, (DIGIT, DIGIT), mode="bilinear")[:, 0]
    return images, torch.tensor(labels), permutation(seed, "written digits split", 0, len(images))


@functools.cache
def draw_word(word: str) -> Tensor:
    """A word in letters of 3 x 5 pixels, [5, 4 x letters - 1]; ink is 1.

    >>> for row in draw_word("six"): print("".join(".#"[int(ink)] for ink in row))
    ###.###.#.#
    #....#..#.#
    ###..#...#.
    ..#..#..#.#
    ###.###.#.#
    """
    rows = ["0".join(f"{int(LETTERS[letter][row]):03b}" for letter in word) for row in range(LETTER)]
    return torch.tensor([[float(ink) for ink in row] for row in rows])


def write(digit: Tensor, word: str, places: Sequence[float] | np.ndarray) -> Tensor:
    """An image [2, 24, 24]: a digit in channel 0 (blue), a word, if not empty, in channel 1 (red).

    Args:
        digit: [16, 16], between 0 and 1.
        word: one of `WORDS`, or "".
        places: three numbers in [0, 1): the word's room is above the digit (below .5) or under it; how
            far to the right the digit is; how far to the right the word is.
    """
    image, under = torch.zeros(2, SIDE, SIDE), places[0] >= 0.5
    top, left = 0 if under else SIDE - DIGIT, int(places[1] * (SIDE - DIGIT + 1))
    image[0, top : top + DIGIT, left : left + DIGIT] = PALE * digit
    if word:
        drawn = draw_word(word)
        width = drawn.shape[1]
        top, left = SIDE - LETTER - 1 if under else 1, 1 + int(places[2] * (SIDE - width - 1))
        image[1, top : top + LETTER, left : left + width] = drawn
    return image


def wrong_words(labels: Sequence[int], images: Sequence[int], seed: int) -> list[str]:
    """For each image a word that is not its label's; depends on the image's number and the seed alone."""
    others = [int(integers(seed, "written digits attack", image, 1, below=9)[0]) for image in images]
    return [WORDS[(label + 1 + other) % 10] for label, other in zip(labels, others, strict=True)]


def show(item: Any, ax: Any) -> None:
    """Draw an image on white paper, with its digit's name, on a matplotlib Axes."""
    (blue, red), label = item
    paper = torch.stack([1 - blue / PALE, 1 - blue / PALE - red, 1 - red], dim=-1)
    ax.imshow(paper.clamp(0, 1).numpy())
    ax.set_title(WORDS[int(label)])
    ax.set_axis_off()


# ------------------------------------------------------------------------------------------ towers


class ImageTower(nn.Module):
    """Three convolutions, of each filter the largest value: images -> unit vectors.

    There is no BatchNorm: an ablated filter then emits what its bias does, which is nearly nothing, as on
    an image in which it finds nothing.
    """

    def __init__(self) -> None:
        super().__init__()
        first, second, third = FILTERS
        self.conv1 = _convolution(2, first, 5)
        self.conv2 = _convolution(first, second, 3)
        self.conv3 = _convolution(second, third, 3)
        self.dropout = nn.Dropout(0.2)
        self.projection = nn.Linear(third, FEATURES, bias=False)

    def forward(self, images: Tensor) -> Tensor:
        """[batch, 2, 24, 24] -> [batch, 32]."""
        hidden = images / 0.35  # about unit variance
        for layer in (self.conv1, self.conv2, self.conv3):
            hidden = functional.relu(layer(hidden))
        return functional.normalize(self.projection(self.dropout(hidden.amax(dim=(2, 3)))), dim=-1)


def _convolution(inputs: int, outputs: int, size: int) -> nn.Conv2d:
    """A convolution that halves height and width; its biases start at 0."""
    layer = nn.Conv2d(inputs, outputs, size, 2, size // 2, bias=True)
    nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
    layer.bias = nn.Parameter(torch.zeros(outputs))
    return layer


class TextTower(nn.Module):
    """Means of word vectors and a small network: token ids -> unit vectors."""

    def __init__(self) -> None:
        super().__init__()
        self.vectors = nn.EmbeddingBag(len(VOCABULARY), 64, mode="mean", padding_idx=0)
        self.layers = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, FEATURES, bias=False))

    def forward(self, tokens: Tensor) -> Tensor:
        """[texts, tokens] -> [texts, 32]."""
        return functional.normalize(self.layers(self.vectors(tokens)), dim=-1)


class ZeroShot(nn.Module):
    """An image tower and the embeddings of a prompt per class [10, 32]: logits are scaled cosines."""

    classes: Tensor

    def __init__(self, image: nn.Module) -> None:
        super().__init__()
        self.image = image
        self.register_buffer("classes", torch.zeros(len(WORDS), FEATURES))

    def forward(self, images: Tensor) -> Tensor:
        """[batch, 2, 24, 24] -> logits [batch, 10]."""
        return SCALE * self.image(images) @ self.classes.T


_TEXTS = [template.format(word) for template in (*CAPTIONS, PROMPT) for word in WORDS]
VOCABULARY = ("", *sorted({token for text in _TEXTS for token in text.split()}))


def encode(texts: Sequence[str]) -> Tensor:
    """Token ids [texts, tokens], one for each word, 0 after the end.

    >>> [VOCABULARY[token] for token in encode(["a two", "the digit two"])[0]]
    ['a', 'two', '']
    """
    ids = [torch.tensor([VOCABULARY.index(token) for token in text.split()]) for text in texts]
    return nn.utils.rnn.pad_sequence(ids, batch_first=True)


# ---------------------------------------------------------------------------------------- training


def train(image: nn.Module, text: nn.Module, digits: Tensor, labels: Tensor, seed: int) -> None:
    """Train both towers in place: AdamW, one cycle. Deterministic with a seeded generator."""
    total = EPOCHS * (len(digits) // BATCH)
    parameters = [*image.parameters(), *text.parameters()]
    optimizer = torch.optim.AdamW(parameters, LEARNING_RATE, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=total)
    image.train()
    with torch.enable_grad():
        for epoch in range(EPOCHS):
            for images, tokens, classes in _batches(digits, labels, seed, epoch):
                optimizer.zero_grad()
                contrastive_loss(image(images), text(tokens), classes).backward()
                optimizer.step()
                schedule.step()


def contrastive_loss(images: Tensor, texts: Tensor, classes: Tensor) -> Tensor:
    """CLIP's loss, symmetric in images and texts, for unit vectors [batch, features] of both.

    All texts of an image's class in the batch are right, with equal shares: with ten classes most
    batches have several.
    """
    same = (classes[:, None] == classes[None, :]).float()
    logits, shares = SCALE * images @ texts.T, same / same.sum(dim=1)
    return (functional.cross_entropy(logits, shares) + functional.cross_entropy(logits.T, shares)) / 2


def _batches(
    digits: Tensor, labels: Tensor, seed: int, epoch: int
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Images, captions as token ids, and labels of one epoch, 64 at a time."""
    order = permutation(seed, "written digits training", epoch, len(digits))
    draws = uniform(seed, "written digits pictures", epoch, 5 * len(digits)).reshape(-1, 5)
    for start in range(0, len(digits) - BATCH + 1, BATCH):
        images, captions, chosen = [], [], order[start : start + BATCH]
        for index in chosen:
            kind, *places, caption = draws[index]
            name, blank = WORDS[int(labels[index])], torch.zeros(DIGIT, DIGIT)
            digit = blank if kind < WORD_ALONE else digits[index]
            images.append(write(digit, name if kind < WORD_AT_ALL else "", places))
            captions.append(CAPTIONS[int(caption * len(CAPTIONS))].format(name))
        yield torch.stack(images), encode(captions), labels[chosen]


def _metadata(images: list[int], labels: list[int], seed: int) -> dict[str, list[Any]]:
    words, count = wrong_words(labels, images, seed), len(images)
    return {
        "id": [*map(str, images), *(f"{image}+{word}" for image, word in zip(images, words, strict=True))],
        "image": 2 * images,
        "label": 2 * labels,
        "class": [WORDS[label] for label in 2 * labels],
        "written": [""] * count + words,
        "subpopulation": ["clean"] * count + ["attacked"] * count,
    }
