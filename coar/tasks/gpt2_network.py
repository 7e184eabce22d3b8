"""Small GPT-2s that read characters: layers of width 128, trained on Shakespeare's plays.

| network | layers | MLP neurons | attention heads |
|---|---|---|---|
| `gpt2` | 4 | 2,048 | 16 |
| `gpt2_deep` | 12 | 6,144 | 48 |

The class is transformers' own `GPT2LMHeadModel`; only size and vocabulary differ from the published
model. Their vocabulary is the 65 characters of the text, in one file for both.
"""

from __future__ import annotations

import json
from typing import Any

from torch import nn

from coar.errors import MissingDependencyError, SettingError, install_hint
from coar.tasks.data_folder import load_weights, read_model_file

NETWORK = "gpt2"
LAYERS = {NETWORK: 4, "gpt2_deep": 12}
POSITIONS, WIDTH, HEADS = 128, 128, 4


def small_gpt2(weights: str | None = None, network: str = NETWORK) -> tuple[nn.Module, dict[str, int]]:
    """A trained network in eval mode, and its vocabulary (character to token).

    Args:
        weights: safetensors file of other weights; None takes the trained ones of the data folder.
        network: "gpt2" or "gpt2_deep".

    Raises:
        SettingError: there is no network of this name.
        StoreError: the data folder is missing, or a file in it is not the one that was trained.

    >>> model, vocabulary = small_gpt2()                                        # doctest: +SKIP
    >>> len(vocabulary)                                                         # doctest: +SKIP
    65
    """
    _require_known(network)
    vocabulary: dict[str, int] = json.loads(read_model_file(network, "vocabulary"))
    return load_weights(build_gpt2(len(vocabulary), network=network), network, weights), vocabulary


def build_gpt2(vocabulary_size: int, dropout: float = 0.0, network: str = NETWORK) -> Any:
    """An untrained network; initial weights come from torch's global generator.

    Raises:
        SettingError: there is no network of this name.
        MissingDependencyError: transformers is not installed.
    """
    _require_known(network)
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
        n_layer=LAYERS[network],
        n_head=HEADS,
        resid_pdrop=dropout,
        embd_pdrop=dropout,
        attn_pdrop=dropout,
        bos_token_id=None,
        eos_token_id=None,
        use_cache=False,
    )
    return GPT2LMHeadModel(config)


def _require_known(network: str) -> None:
    if network not in LAYERS:
        raise SettingError("unknown small GPT-2", expected=f"one of: {', '.join(LAYERS)}", got=repr(network))
