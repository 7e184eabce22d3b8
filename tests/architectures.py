"""Small random models of the architectures that people use, each with an example input.

`ARCHITECTURES` names them; `build(name)` makes a model in eval mode and an example: a tensor, or a dict
of keyword arguments. `COUNTS` says how many components of each kind there are, counted by hand from
the sizes here. A model whose library is missing skips its test.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tests.cases import random_numbers
from tests.conftest import require_or_skip

IMAGE = (2, 3, 32, 32)
NO_SPECIAL_TOKENS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}


def build(name: str) -> tuple[nn.Module, Tensor | dict[str, Tensor]]:
    """Model in eval mode and example input; the same weights each time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model, example = ARCHITECTURES[name]()
        randomise(model)
    return model.eval(), example


def run(model: nn.Module, example: Tensor | dict[str, Tensor]) -> Tensor:
    """All outputs as one flat tensor."""
    with torch.no_grad():
        out = model(**example) if isinstance(example, dict) else model(example)
    return torch.cat([part.flatten() for part in _tensors(out)])


def _tensors(out: Any) -> list[Tensor]:
    if isinstance(out, Tensor):
        return [out] if out.is_floating_point() else []
    if hasattr(out, "to_tuple"):
        out = out.to_tuple()
    return [part for entry in out for part in _tensors(entry)] if isinstance(out, tuple | list) else []


def randomise(model: nn.Module) -> None:
    """No weight or statistic is 0 or 1: what starts at such values would hide mistakes."""
    for module in model.modules():
        for key, parameter in module._parameters.items():
            if parameter is None:
                continue
            if parameter.ndim > 1:
                parameter.data.normal_(0.0, (parameter.numel() / len(parameter)) ** -0.5)
            else:
                parameter.data.normal_(1.0 if key in ("weight", "gamma") else 0.0, 0.3)
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0.0, 0.3)
            module.running_var.uniform_(0.5, 2.0)


# -------------------------------------------------------------------------------------- torchvision


def _torchvision(module: str) -> Any:
    return _library("torchvision", f"torchvision.models.{module}")


def _library(name: str, module: str) -> Any:
    import importlib
    import importlib.util

    require_or_skip(name, importlib.util.find_spec(name) is not None, f"{name} is not installed")
    return importlib.import_module(module)


def _images(shape: tuple[int, ...] = IMAGE) -> Tensor:
    return random_numbers(*shape)


def resnet18():
    """Four blocks of two convolutions, three of them with a shortcut convolution."""
    resnet = _torchvision("resnet")
    return resnet.ResNet(resnet.BasicBlock, [1, 1, 1, 1], num_classes=5), _images()


def resnet50():
    """The same with bottlenecks: three convolutions in each block, four shortcuts."""
    resnet = _torchvision("resnet")
    return resnet.ResNet(resnet.Bottleneck, [1, 1, 1, 1], num_classes=5, width_per_group=16), _images()


def convnext():
    convnext = _torchvision("convnext")
    config = convnext.CNBlockConfig
    stages = [config(8, 12, 2), config(12, None, 1)]
    return convnext.ConvNeXt(stages, layer_scale=0.5, num_classes=5), _images()


def mobilenet_v3():
    """Three blocks: with squeeze and excitation, strided (no shortcut), without expansion."""
    mobilenet = _torchvision("mobilenetv3")
    config = partial(mobilenet.InvertedResidualConfig, dilation=1, width_mult=1.0)
    blocks = [
        config(8, 3, 16, 8, True, "RE", stride=1),
        config(8, 3, 24, 16, False, "HS", stride=2),
        config(16, 5, 16, 16, True, "HS", stride=1),
    ]
    return mobilenet.MobileNetV3(blocks, last_channel=20, num_classes=5), _images()


def mobilenet_v2():
    mobilenet = _torchvision("mobilenetv2")
    settings = [[1, 8, 1, 1], [4, 8, 2, 2]]  # expansion, channels, blocks, stride
    return mobilenet.MobileNetV2(5, width_mult=0.5, inverted_residual_setting=settings), _images()


def efficientnet():
    """FusedMBConv without expansion (ends in SiLU), with expansion; MBConv without and with shortcut."""
    efficientnet = _torchvision("efficientnet")
    fused, plain = efficientnet.FusedMBConvConfig, efficientnet.MBConvConfig
    stages = [fused(1, 3, 1, 8, 8, 1), fused(2, 3, 1, 8, 8, 1), plain(2, 3, 2, 8, 16, 2)]
    return efficientnet.EfficientNet(stages, dropout=0.0, num_classes=5, last_channel=24), _images()


def swin():
    swin = _torchvision("swin_transformer")
    return swin.SwinTransformer([4, 4], 8, [2, 1], [2, 4], [4, 4], mlp_ratio=2.0, num_classes=5), _images()


def swin_v2():
    """The norms come after attention and MLP, in the branch."""
    swin = _torchvision("swin_transformer")
    model = swin.SwinTransformer(
        [4, 4],
        8,
        [2],
        [2],
        [4, 4],
        mlp_ratio=2.0,
        num_classes=5,
        block=swin.SwinTransformerBlockV2,
        downsample_layer=swin.PatchMergingV2,
    )
    return model, _images()


def vit():
    transformer = _torchvision("vision_transformer").VisionTransformer
    model = transformer(
        image_size=32, patch_size=16, num_layers=2, num_heads=2, hidden_dim=8, mlp_dim=12, num_classes=5
    )
    return model, _images()


# --------------------------------------------------------------------------------------------- timm


def timm_vit():
    timm = _library("timm", "timm")
    sizes = {"img_size": 32, "embed_dim": 8, "depth": 2, "num_heads": 2, "mlp_ratio": 1.5, "init_values": 0.5}
    return timm.create_model("vit_tiny_patch16_224", pretrained=False, num_classes=5, **sizes), _images()


def timm_resnet():
    """A stem of 64 and four blocks; squeeze and excitation at the end of each branch."""
    timm = _library("timm", "timm")
    options = {"layers": [1] * 4, "channels": (8, 8, 12, 12), "block_args": {"attn_layer": "se"}}
    return timm.create_model("resnet18", pretrained=False, num_classes=5, **options), _images()


def timm_convnext():
    timm = _library("timm", "timm")
    sizes = {"depths": (1, 2, 1, 1), "dims": (8, 12, 12, 12), "ls_init_value": 0.5}
    return timm.create_model("convnext_tiny", pretrained=False, num_classes=5, **sizes), _images()


# ------------------------------------------------------------------------------------- transformers


def _transformers() -> Any:
    return _library("transformers", "transformers")


def tokens(length: int = 6, below: int = 20) -> Tensor:
    numbers = random_numbers(2, length, seed=5)
    return (numbers.abs() * 1000).long() % (below - 2) + 1


def _text(**more: Any) -> dict[str, Any]:
    return {"input_ids": tokens(), "use_cache": False} | more


def gpt2(cls: str = "GPT2LMHeadModel"):
    library = _transformers()
    config = library.GPT2Config(
        vocab_size=20, n_positions=8, n_embd=8, n_layer=2, n_head=2, n_inner=12, **NO_SPECIAL_TOKENS
    )
    return getattr(library, cls)(config), _text()


SMALL = {"vocab_size": 20, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4}
SMALL |= {"intermediate_size": 12, "max_position_embeddings": 16}


def _decoder(prefix: str, suffix: str, **more: Any):
    library = _transformers()
    config = getattr(library, f"{prefix}Config")(**SMALL, **NO_SPECIAL_TOKENS, **more)
    return getattr(library, f"{prefix}{suffix}")(config), _text()


gpt_neox = partial(_decoder, "GPTNeoX", "ForCausalLM")
llama = partial(_decoder, "Llama", "ForCausalLM", num_key_value_heads=2, tie_word_embeddings=False)
llama_bare = partial(_decoder, "Llama", "Model", num_key_value_heads=2)
phi = partial(_decoder, "Phi", "ForCausalLM")
phi3 = partial(_decoder, "Phi3", "ForCausalLM", num_key_value_heads=2)
qwen2 = partial(_decoder, "Qwen2", "ForCausalLM", num_key_value_heads=2)
gemma2 = partial(
    _decoder, "Gemma2", "ForCausalLM", num_key_value_heads=2, head_dim=8, query_pre_attn_scalar=8
)


def bert(cls: str = "BertForSequenceClassification"):
    library = _transformers()
    return getattr(library, cls)(library.BertConfig(**SMALL)), {"input_ids": tokens()}


def t5():
    library = _transformers()
    config = library.T5Config(
        vocab_size=20, d_model=8, d_kv=3, d_ff=12, num_layers=2, num_heads=2, decoder_start_token_id=0
    )
    return library.T5ForConditionalGeneration(config), _text(decoder_input_ids=tokens(4))


def t5_gated():
    library = _transformers()
    sizes = {"vocab_size": 20, "d_model": 8, "d_kv": 3, "d_ff": 12, "num_layers": 1, "num_heads": 2}
    return library.T5EncoderModel(library.T5Config(**sizes, feed_forward_proj="gated-gelu")), {
        "input_ids": tokens()
    }


def hf_vit():
    library = _transformers()
    sizes = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 12}
    config = library.ViTConfig(**sizes, image_size=32, patch_size=16, num_labels=5)
    return library.ViTForImageClassification(config), {"pixel_values": _images()}


def clip():
    library = _transformers()
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 12}
    text = library.CLIPTextConfig(
        **sizes, vocab_size=20, max_position_embeddings=8, bos_token_id=18, eos_token_id=19, pad_token_id=0
    )
    vision = library.CLIPVisionConfig(**sizes, image_size=32, patch_size=16)
    config = library.CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=6)
    ids = torch.cat([tokens(5), torch.full((2, 1), 19)], dim=1)
    return library.CLIPModel(config), {"input_ids": ids, "pixel_values": _images()}


# -------------------------------------------------------------------------------------------- torch


def torch_encoder():
    """In eval mode its layers run as one fused function that calls no module in them."""
    layer = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True)
    return nn.TransformerEncoder(layer, 2), random_numbers(2, 5, 8)


ARCHITECTURES = {
    "resnet18": resnet18,
    "resnet50": resnet50,
    "convnext": convnext,
    "mobilenet_v2": mobilenet_v2,
    "mobilenet_v3": mobilenet_v3,
    "efficientnet": efficientnet,
    "swin": swin,
    "swin_v2": swin_v2,
    "vit": vit,
    "timm_vit": timm_vit,
    "timm_resnet": timm_resnet,
    "timm_convnext": timm_convnext,
    "gpt2": gpt2,
    "gpt2_bare": partial(gpt2, "GPT2Model"),
    "gpt_neox": gpt_neox,
    "llama": llama,
    "llama_bare": llama_bare,
    "phi": phi,
    "phi3": phi3,
    "qwen2": qwen2,
    "gemma2": gemma2,
    "bert": bert,
    "bert_bare": partial(bert, "BertModel"),
    "t5": t5,
    "t5_gated": t5_gated,
    "hf_vit": hf_vit,
    "clip": clip,
    "torch_encoder": torch_encoder,
}


def _transformer(
    heads: int, values: int, hidden: int, blocks: int, neurons: int, **more: int
) -> dict[str, int]:
    counts = {"attention_head": heads, "attention_neuron": values, "mlp_neuron": hidden}
    return counts | {"block": blocks, "neuron": neurons} | more


# Kinds that are not named have no component.
COUNTS = {
    # stem; per stage conv1, conv2, shortcut (the first stage has none)
    "resnet18": {"conv_filter": 64 + 2 * 64 + 3 * (128 + 256 + 512), "block": 4},
    # per stage conv1, conv2 (16, 32, 64, 128), conv3 and shortcut (256, 512, 1024, 2048)
    "resnet50": {"conv_filter": 64 + (2 * 16 + 2 * 256) * (1 + 2 + 4 + 8), "block": 4},
    # stem, downsampling and depthwise; hidden 4 x width; the two Linears of a block, without the classifier
    "convnext": {
        "conv_filter": 8 + 12 + (8 + 8 + 12),
        "mlp_neuron": 32 + 32 + 48,
        "neuron": 2 * (32 + 8) + (48 + 12),
        "block": 3,
    },
    # stem, block without expansion, strided block, block with shortcut, last convolution
    "mobilenet_v2": {"conv_filter": 16 + (16 + 8) + 2 * (32 + 32 + 8) + 1280, "block": 1},
    # expand, depthwise, squeeze, excite, project; the 20 are the hidden layer of the classifier
    "mobilenet_v3": {
        "conv_filter": 8 + (16 + 16 + 8 + 16 + 8) + (24 + 24 + 16) + (16 + 8 + 16 + 16) + 96,
        "neuron": 20,
        "block": 2,
    },
    "efficientnet": {
        "conv_filter": 8 + 8 + (16 + 8) + (16 + 16 + 2 + 16 + 16) + (32 + 32 + 4 + 32 + 16) + 24,
        "block": 3,
    },
    # 2 blocks of width 8 and 2 heads, 1 of width 16 and 4 heads; the 16 neurons between merge patches
    "swin": _transformer(4 + 4, 2 * 24 + 48, 2 * 16 + 32, 6, 2 * 56 + 16 + 112, conv_filter=8),
    # 514: the MLP that computes position biases
    "swin_v2": _transformer(4, 2 * 24, 2 * 16, 4, 2 * (24 + 8 + 16 + 8 + 514), conv_filter=8),
    # two layers: queries, keys, values 24, projection 8, hidden 12, down 8
    "vit": _transformer(4, 48, 24, 4, 2 * 52, conv_filter=8),
    "timm_vit": _transformer(4, 48, 24, 4, 2 * 52, conv_filter=8),
    "hf_vit": _transformer(4, 48, 24, 4, 2 * 52, conv_filter=8),
    "torch_encoder": _transformer(4, 48, 24, 4, 2 * 52),
    "gpt2": _transformer(4, 48, 24, 4, 2 * 52, conv1d_input_row=2 * (8 + 8 + 8 + 12)),
    "gpt2_bare": _transformer(4, 48, 24, 4, 2 * 52, conv1d_input_row=2 * (8 + 8 + 8 + 12)),
    # conv1, conv2, shortcut, squeeze and excite of each stage
    "timm_resnet": {"conv_filter": 64 + 2 * (3 * 8 + 8 + 8) + 2 * (3 * 12 + 8 + 12), "block": 4},
    "timm_convnext": {
        "conv_filter": 8 + 3 * 12 + (8 + 4 * 12),
        "mlp_neuron": 32 + 4 * 48,
        "neuron": (32 + 8) + 4 * (48 + 12),
        "block": 5,
    },
    # two layers of width 16 and 4 query heads: q, k, v, output, hidden (twice if gated), down
    "gpt_neox": _transformer(8, 96, 24, 4, 2 * (48 + 16 + 12 + 16)),
    "phi": _transformer(8, 96, 24, 4, 2 * (48 + 16 + 12 + 16)),
    "llama": _transformer(8, 64, 24, 4, 2 * (16 + 8 + 8 + 16 + 24 + 16)),
    "llama_bare": _transformer(8, 64, 24, 4, 2 * (16 + 8 + 8 + 16 + 24 + 16)),
    "phi3": _transformer(8, 64, 24, 4, 2 * (32 + 16 + 24 + 16)),
    "qwen2": _transformer(8, 64, 24, 4, 2 * (16 + 8 + 8 + 16 + 24 + 16)),
    "gemma2": _transformer(8, 128, 24, 4, 2 * (32 + 16 + 16 + 16 + 24 + 16)),  # heads of 8, not 16 / 4
    "bert": _transformer(8, 96, 24, 4, 2 * (48 + 16 + 12 + 16) + 16),  # the pooler is no classifier
    "bert_bare": _transformer(8, 96, 24, 4, 2 * (48 + 16 + 12 + 16) + 16),
    # 2 heads of 3; encoder, and decoder with attention to it
    "t5": _transformer(4 + 8, 6 * 18, 4 * 12, 2 * 2 + 2 * 3, 4 * (18 + 8 + 12 + 8) + 2 * (18 + 8)),
    "t5_gated": _transformer(2, 18, 12, 2, 18 + 8 + 12 + 12 + 8),
    # text and image layer, and the two projections
    "clip": _transformer(4, 48, 24, 4, 2 * 52 + 6 + 6, conv_filter=8),
}
