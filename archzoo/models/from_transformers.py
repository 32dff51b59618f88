"""The trainer's model `transformers`: any causal language model of Hugging Face transformers, built from its config.

Layers of the zoo are swapped into it by `swap=…`. Nothing is downloaded.
"""

from typing import Any

import torch
from torch import Tensor, nn

from archzoo.models.model import LayerFactory, register_model
from archzoo.names import suggest

ATTENTION = ("eager", "sdpa")
"""Its own implementations of attention; by any other name, transformers may fetch a kernel and run it."""
# What transformers takes for places of code or of files.
_CODE = ("auto_map", "trust_remote_code", "name_or_path", "quantization_config", "experts_implementation")


class CausalModel(nn.Module):
    """A causal language model of transformers that gives its logits alone.

    Args:
        body: The model of transformers.

    Shape: ids (batch, length) -> (batch, length, vocabulary).
    """

    def __init__(self, body: nn.Module):
        super().__init__()
        self.body = body

    def arguments(self, tokens: Tensor) -> dict[str, Any]:
        """What the body is called with, for ids (batch, length)."""
        return {"input_ids": tokens, "use_cache": False}

    def forward(self, tokens: Tensor) -> Tensor:
        """Maps ids (batch, length) to logits of each next token."""
        logits: Tensor = self.body(**self.arguments(tokens)).logits
        return logits


@register_model("transformers")
def from_transformers(
    layer: LayerFactory,
    input_shape: tuple[int, ...],
    output_size: int,
    *,
    name: str,
    config: dict[str, Any] | None = None,
) -> CausalModel:
    """A causal language model of transformers with the vocabulary of a task, its weights drawn anew.

    Args:
        layer: Of no use here: what the contestant takes the place of is said by `swap`.
        input_shape: (length,) of a text.
        output_size: Tokens of the vocabulary.
        name: The type of its config, as `"gpt2"` or `"llama"`.
        config: Values of the config that are not the type's own, as `{"hidden_size": 64, "num_hidden_layers": 2}`.

    Raises:
        ValueError: If transformers is not installed, or has no such model, or refuses the config; if texts are longer
            than the model's positions; or if the model sees later tokens.
    """
    try:
        from transformers import AutoConfig, AutoModelForCausalLM
        from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as KNOWN
    except ImportError as error:
        raise ValueError(
            f"library='transformers': is not installed ({error}); pip install 'archzoo[transformers]'"
        ) from error
    if name not in KNOWN:
        raise ValueError(f"name={name!r}: transformers has no such causal model; {suggest(name, sorted(KNOWN))}")
    _check_config(config or {})
    # Its own special tokens need not be in the vocabulary; an encoder is causal as a decoder only.
    given = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id")) | {"is_decoder": True} | (config or {})
    try:
        chosen = AutoConfig.for_model(name, vocab_size=output_size, **given)
        model = AutoModelForCausalLM.from_config(chosen)
    except Exception as error:  # of anyone's model
        raise ValueError(f"config={config or {}}: {name} refuses it ({type(error).__name__}: {error})") from error
    positions = getattr(chosen, "max_position_embeddings", None)
    if isinstance(positions, int) and positions < input_shape[0]:
        raise ValueError(
            f"config={config or {}}: {name} has {positions} positions, and a text of the task {input_shape[0]} tokens; "
            f"set model.config.max_position_embeddings={input_shape[0]}"
        )
    built = CausalModel(model)
    if next(built.parameters()).device.type != "meta":
        _check_causal(built, output_size, name)
    return built


from_transformers.takes_tokens = True  # type: ignore[attr-defined]  # the trainer refuses a task that does not go with it


def _check_config(config: dict[str, Any]) -> None:
    """A ValueError for a value that could bring in somebody's code."""
    for key, value in config.items():
        if key.lstrip("_") == "attn_implementation":
            if value not in ATTENTION:
                raise ValueError(f"config={config}: {key}={value!r} must be one of {', '.join(ATTENTION)}")
        elif key.startswith("_") or key in _CODE:
            raise ValueError(f"config={config}: {key} is no size or option of a model; leave it out")
        if isinstance(value, dict):
            _check_config(value)


@torch.no_grad()
def _check_causal(model: CausalModel, vocabulary: int, name: str) -> None:
    """A ValueError if the last of four tokens changes what the model says of those before."""
    was_training = model.training
    tokens = torch.zeros(2, 4, dtype=torch.int64)
    tokens[1, -1] = vocabulary - 1
    first, second = model.eval()(tokens)[:, :-1].float()
    model.train(was_training)
    if not torch.allclose(first, second, rtol=1e-3, atol=1e-4):
        raise ValueError(f"name={name!r}: sees later tokens, and a task of next tokens needs a model that does not")
