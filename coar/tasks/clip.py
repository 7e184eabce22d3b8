"""CLIP: zero-shot classification of images in a folder, with attacks by writing on them.

    data/images/golden_retriever/0001.jpg        one folder per class; its name is the name of the class

The logit of a class is `100 * <image, prompt>`: cosine similarity of the embeddings of an image and
of the class's prompts. What an ablation reaches is chosen with `text`:

- "fixed" (as in COAR's released code): class embeddings are computed once, by the intact model, and
  kept as the rows of a classifier. The text tower is no part of the task's model, so that none of its
  components can be chosen by mistake: they could change nothing.
- "ablated": the task's model holds the text tower as well and embeds the prompts in every pass.

`small=True` takes a tiny CLIP with random weights, which needs no download. It exercises the code;
what it predicts, and every number that follows, means nothing.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from coar.errors import SettingError, TaskError
from coar.outputs import zero_shot_margin
from coar.randomness import uniform
from coar.recipes import task_factory
from coar.task import Task
from coar.tasks.image_folders import Images, normalised, open_image, read_folder, sample_images, show
from coar.tasks.libraries import library, seeded

MODEL = "openai/clip-vit-base-patch16"
TEMPLATES = ("a photo of a {}.",)
SCALE = 100.0  # of the cosine similarities; what OpenAI's models have learned, too
ROOM = 224  # pixels of the shorter side, at least, of an image to write on
SMALL_PIXELS = 64


class ZeroShot(nn.Module):
    """A CLIP model as a classifier of images.

    Args:
        clip: a `transformers.CLIPModel` in eval mode.
        prompts: `input_ids` and `attention_mask` of all prompts, each [classes x templates, tokens];
            the prompts of one class follow each other.
        num_classes: how many classes.
        text: "fixed" or "ablated"; see the module's text.
    """

    def __init__(self, clip: Any, prompts: dict[str, Tensor], num_classes: int, text: str) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.vision_model = clip.vision_model
        if text == "ablated":
            self.text_model, self.text_projection = clip.text_model, clip.text_projection
            self.register_buffer("input_ids", prompts["input_ids"])
            self.register_buffer("attention_mask", prompts["attention_mask"])
        else:
            self.register_buffer("classes", embed_classes(clip, prompts, num_classes).detach())
        self.visual_projection = clip.visual_projection

    def forward(self, pixel_values: Tensor) -> Tensor:
        """[batch, 3, height, width] -> logits [batch, classes]."""
        pooled = self.vision_model(pixel_values=pixel_values).pooler_output
        images = functional.normalize(self.visual_projection(pooled), dim=-1)
        classes = self._buffers.get("classes")
        if classes is None:
            classes = embed_classes(self, dict(self._buffers), self.num_classes)
        return SCALE * images @ classes.T


def embed_classes(clip: Any, prompts: dict[str, Any], num_classes: int) -> Tensor:
    """Unit vectors [classes, features]: of each class the mean over its prompts' unit vectors, normalised."""
    pooled = clip.text_model(**prompts).pooler_output
    units = functional.normalize(clip.text_projection(pooled), dim=-1)
    means = units.view(num_classes, -1, units.shape[-1]).mean(dim=1)
    return functional.normalize(means, dim=-1)


@task_factory
def make_task(
    *,
    data: str | None = None,
    model: str | None = None,
    small: bool = False,
    class_names: list[str] | None = None,
    templates: list[str] | None = None,
    text: Literal["fixed", "ablated"] = "fixed",
    attack: Literal["none", "label", "both"] = "none",
    seed: int = 0,
    num_examples: int | None = None,
    cache: str | None = None,
    device: str = "auto",
) -> Task:
    """The CLIP task: images, the margin of the right class among all classes as output.

    Args:
        data: folder with `CLASS/IMAGE`; needed unless `small`, which takes the sample of CIFAR-10.
        model: name of a model on the Hugging Face hub, or a folder with model and processor.
        small: a tiny CLIP with random weights; its numbers mean nothing.
        class_names: of the sorted folders; default the folders' names with spaces for underscores.
        templates: prompts with `{}` for the class's name; their embeddings are averaged.
        text: whether ablations reach the text tower, see the module's text.
        attack: "label" writes the name of a wrong class on every image; "both" has every image
            without, and then every image with it, told apart by `subpopulation` in the metadata; `image`
            names what the two have in common, `written` what is on it.
        seed: of the wrong classes and where they are written.
        num_examples: how many images, at even distances; None takes all.
        cache: folder for a file of decoded images, written at first use.
        device: see `coar.Task`.

    Raises:
        TaskError: model or images are not there.

    >>> make_task(small=True, num_examples=8, attack="both")                        # doctest: +SKIP
    Task(ZeroShot, 16 examples, outputs ['zero_shot_margin'])
    """
    choices = {"text": (text, ("fixed", "ablated")), "attack": (attack, ("none", "label", "both"))}
    for name, (value, allowed) in choices.items():
        if value not in allowed:
            raise SettingError(f"unknown {name}", expected=" or ".join(allowed), got=repr(value))
    for template in templates or ():
        if "{}" not in template:
            raise SettingError("a template has no place for the name", expected="{}", got=repr(template))
    clip, processor, tokenize = _small() if small else _published(model or MODEL)
    found = sample_images() if small and data is None else _folder(data, class_names)
    images = pictures(found, attack, seed, num_examples)
    images.decode = functools.partial(pixels, processor=processor)
    prompts = [template.format(name) for name in images.classes for template in templates or TEMPLATES]
    settings = f"{model or MODEL} {small} {attack} {seed} {processor.size} {processor.crop_size}"
    return Task(
        ZeroShot(clip.eval(), tokenize(prompts), len(images.classes), text).eval(),
        images.cached(cache, settings, [path for path in map(_path, images.sources) if path]),
        outputs={"zero_shot_margin": zero_shot_margin},
        collate=functools.partial(normalised, mean=processor.image_mean, std=processor.image_std),
        metadata=_metadata(images),
        show=functools.partial(show, classes=images.classes),
        device=device,
    )


@dataclass(frozen=True)
class Picture:
    """An image and what is written on it.

    Attributes:
        source: a path, or a uint8 tensor [3, height, width].
        words: what is written; "" leaves the image as it is.
        across: from the left (0) to the right (1) of where there is room.
        down: from the top (0) to the bottom (1).
    """

    source: Any
    words: str = ""
    across: float = 0.0
    down: float = 0.0


def pictures(images: Images, attack: str, seed: int, num_examples: int | None) -> Images:
    """Images with `Picture`s as sources: clean, with the name of a wrong class on each, or both."""
    clean = [Picture(source) for source in images.sources]
    written = [_with_wrong_name(images, index, seed) for index in range(len(images))]
    names = [f"{name}+{picture.words}" for name, picture in zip(images.ids, written, strict=True)]
    parts = {
        "none": [Images(clean, images.labels, images.ids, images.classes)],
        "label": [Images(written, images.labels, names, images.classes)],
    }
    chosen = [part.pick(1, num_examples) for part in parts.get(attack, parts["none"] + parts["label"])]
    sources, labels, ids = (
        [entry for part in chosen for entry in getattr(part, field)] for field in ("sources", "labels", "ids")
    )
    return Images(sources, labels, ids, images.classes)


def pixels(picture: Picture, processor: Any) -> Tensor:
    """uint8 pixels [3, height, width] of a picture: a CLIP image processor without its normalisation."""
    image = write_on(_enlarged(picture.source), picture)
    found = processor(image, do_rescale=False, do_normalize=False, return_tensors="pt")["pixel_values"][0]
    return found.round().clamp(0, 255).to(torch.uint8)


def write_on(image: Any, picture: Picture) -> Any:
    """Copy of a PIL image with a card on it, inside the central square: black letters on white."""
    if not picture.words:
        return image
    draw_on, fonts = library("PIL.ImageDraw", "vision"), library("PIL.ImageFont", "vision")
    image, side = image.copy(), min(image.size)
    draw = draw_on.Draw(image)
    for size in range(side // 6, 7, -1):  # the largest letters that fit
        box = draw.textbbox((0, 0), picture.words, font=fonts.load_default(size))
        if box[2] + size <= side:
            break
    width, height = box[2] + size // 2, box[3] + size // 2
    left = (image.width - side) // 2 + int(picture.across * max(0, side - width))
    top = (image.height - side) // 2 + int(picture.down * max(0, side - height))
    draw.rectangle((left, top, left + width, top + height), fill="white")
    draw.text((left + size // 4, top + size // 4), picture.words, fill="black", font=fonts.load_default(size))
    return image


# -------------------------------------------------------------------------- where they come from


def _published(name: str) -> tuple[Any, Any, Callable[[list[str]], dict[str, Tensor]]]:
    library("torchvision", "vision")  # the processor and the folders need it
    transformers = library("transformers", "language")
    try:
        clip = transformers.CLIPModel.from_pretrained(name)
        processor = transformers.CLIPProcessor.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise TaskError(
            f"cannot load the model {name}",
            got=f"{type(error).__name__}: {error!s:.300}",
            todo="pass model=, a folder that save_pretrained wrote",
        ) from error

    def tokenize(prompts: list[str]) -> dict[str, Tensor]:
        found = processor.tokenizer(prompts, padding=True, truncation=True, return_tensors="pt")
        return {key: found[key] for key in ("input_ids", "attention_mask")}

    return clip, processor.image_processor, tokenize


def _small() -> tuple[Any, Any, Callable[[list[str]], dict[str, Tensor]]]:
    library("torchvision", "vision")
    transformers = library("transformers", "language")
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = tower | {"vocab_size": 128, "max_position_embeddings": 48, "bos_token_id": 1, "eos_token_id": 127}
    vision = tower | {"image_size": SMALL_PIXELS, "patch_size": 16}
    with seeded(0):
        config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)
        clip = transformers.CLIPModel(config)
    sizes = {"size": {"shortest_edge": SMALL_PIXELS}, "crop_size": SMALL_PIXELS}
    return clip, transformers.CLIPImageProcessor(**sizes), _letters


def _letters(prompts: list[str]) -> dict[str, Tensor]:
    """ASCII codes as token ids, between 1 (begin) and 127 (end); enough for a model without training."""
    ids = [torch.tensor([1, *prompt.encode("ascii", "replace")[:46], 127]) for prompt in prompts]
    pad = functools.partial(nn.utils.rnn.pad_sequence, batch_first=True)
    return {"input_ids": pad(ids), "attention_mask": pad([torch.ones_like(tokens) for tokens in ids])}


def _folder(data: str | None, class_names: list[str] | None) -> Images:
    if data is None:
        raise SettingError(
            "the CLIP task needs images", expected="data=, a folder with CLASS/IMAGE", got=None
        )
    todo = "data= names a folder with one folder of images per class, class_names= their names"
    found = read_folder(Path(data), len(class_names) if class_names else None, None, todo)
    if len(found.classes) < 2:
        raise TaskError("a margin compares classes", expected="at least 2 classes", got=len(found.classes))
    found.classes = class_names or [name.replace("_", " ") for name in found.classes]
    return found


def _with_wrong_name(images: Images, index: int, seed: int) -> Picture:
    which, across, down = uniform(seed, "typographic attack", index, 3)
    others = len(images.classes) - 1
    wrong = (images.labels[index] + 1 + int(which * others)) % len(images.classes)
    return Picture(images.sources[index], images.classes[wrong], float(across), float(down))


def _metadata(images: Images) -> dict[str, list[Any]]:
    words = [picture.words for picture in images.sources]
    state = ["attacked" if written else "clean" for written in words]
    both = zip(images.ids, words, strict=True)
    image = [name.removesuffix(f"+{written}") if written else name for name, written in both]
    return images.metadata() | {"image": image, "written": words, "subpopulation": state}


def _path(picture: Picture) -> str | None:
    return picture.source if isinstance(picture.source, str) else None


def _enlarged(source: Any) -> Any:
    """PIL image of a source; small ones are made larger first, so that one can write on them."""
    pil = library("PIL.Image", "vision")
    if isinstance(source, Tensor):
        image = pil.fromarray(source.permute(1, 2, 0).numpy())
    else:
        image = open_image(source)
    factor = ROOM / min(image.size)
    if factor <= 1:
        return image
    return image.resize(tuple(round(length * factor) for length in image.size), pil.Resampling.BICUBIC)
