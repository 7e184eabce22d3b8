"""A small GPT-2 that reads characters: four layers of width 128, trained on Shakespeare's plays.

The class is transformers' own `GPT2LMHeadModel`; only size and vocabulary differ from the published
model. Its vocabulary is the 65 characters of the text.
"""

from __future__ import annotations

import json
from typing import Any

from torch import nn

from coar.errors import MissingDependencyError, install_hint
from coar.tasks.data_folder import load_weights, read_model_file

NETWORK = "gpt2"
POSITIONS, WIDTH, LAYERS, HEADS = 128, 128, 4, 4


def small_gpt2(weights: str | None = None) -> tuple[nn.Module, dict[str, int]]:
    """The trained network in eval mode, and its vocabulary (character to token).

    Args:
        weights: safetensors file of other weights; None takes the trained ones of the data folder.

    Raises:
        StoreError: the data folder is missing, or a file in it is not the one that was trained.

    >>> model, vocabulary = small_gpt2()                                        # doctest: +SKIP
    >>> len(vocabulary)                                                         # doctest: +SKIP
    65
    """
    vocabulary: dict[str, int] = json.loads(read_model_file(NETWORK, "vocabulary"))
    return load_weights(build_gpt2(len(vocabulary)), NETWORK, weights), vocabulary


def build_gpt2(vocabulary_size: int, dropout: float = 0.0) -> Any:
    """An untrained network; initial weights come from torch's global generator.

    Raises:
        MissingDependencyError: transformers is not installed.
    """
    try:
        from transformers import GPT2Config, GPT2LMHeadModel
    except ImportError as error:
        raise MissingDependencyError(
            "the small GPT-2 is a class of transformers",
            expected="transformers installed",
            got=str(error),
            todo=install_hint("language"),
        ) from error
    config = GPT2Config(
        vocab_size=vocabulary_size,
        n_positions=POSITIONS,
        n_embd=WIDTH,
        n_layer=LAYERS,
        n_head=HEADS,
        resid_pdrop=dropout,
        embd_pdrop=dropout,
        attn_pdrop=dropout,
        bos_token_id=None,
        eos_token_id=None,
        use_cache=False,
    )
    return GPT2LMHeadModel(config)
