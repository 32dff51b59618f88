"""The `config.json` of a Mamba checkpoint, as arguments of `MambaLM`: the authors' format and that of transformers."""

from collections.abc import Mapping
from typing import Any

from archzoo.layers._check import check_whole
from archzoo.names import suggest
from archzoo.registry import layer_options

_LAYERS = {"Mamba1": "mamba", "Mamba2": "mamba2"}
_KNOWN = (
    *("d_model", "n_layer", "vocab_size", "ssm_cfg", "rms_norm", "residual_in_fp32", "fused_add_norm"),
    *("pad_vocab_size_multiple", "tie_embeddings", "d_intermediate", "attn_layer_idx", "attn_cfg"),
)
# Of the authors' mixers. These choose between kernels, or name the layer: the outputs are the same.
_WITHOUT_EFFECT = ("use_fast_path", "use_mem_eff_path", "layer_idx", "sequence_parallel")
# These are None in all models that were released. Where our mixer has one too, it is an option like the others.
_OFF = ("conv_init", "d_ssm", "process_group")

# transformers' names: those of `MambaLM` or its mixer, and what is meant where the key is left out.
_TRANSFORMERS: dict[str, tuple[str, Any]] = {
    "state_size": ("d_state", 16),
    "conv_kernel": ("d_conv", 4),
    "expand": ("expand", 2),
    "time_step_rank": ("dt_rank", "auto"),
    "time_step_min": ("dt_min", 0.001),
    "time_step_max": ("dt_max", 0.1),
    "time_step_floor": ("dt_init_floor", 1e-4),
    "time_step_scale": ("dt_scale", 1.0),
    "time_step_init_scheme": ("dt_init", "random"),
    "use_bias": ("bias", True),
    "use_conv_bias": ("conv_bias", True),
    "layer_norm_epsilon": ("norm_eps", 1e-5),
    "residual_in_fp32": ("residual_in_fp32", True),
    "tie_word_embeddings": ("tie_embeddings", True),
}


def arguments_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of `MambaLM`, by name, for the model that a `config.json` describes.

    Args:
        config: As the authors write it (`d_model`, `n_layer`, `vocab_size`, `ssm_cfg`, ...), or with `"model_type":
            "mamba"` as transformers writes it (`hidden_size`, `num_hidden_layers`, ...). Of the latter the keys that
            change what the model computes are read; there are many others.

    Raises:
        ValueError: If a size is missing, or a key is unknown or has a value that `MambaLM` cannot honour.
    """
    if "model_type" in config:
        return _from_transformers(config)
    for key, value in config.items():
        if key not in _KNOWN:
            raise ValueError(f"{key}={value!r}: is not known in a config of Mamba; {suggest(key, list(_KNOWN))}")
    _check_sizes(config, "d_model", "n_layer", "vocab_size")
    _check_only(config, "rms_norm", True, "MambaLM has RMSNorm alone")
    _check_only(config, "d_intermediate", 0, "MambaLM has no feed-forward net; `archzoo.models.decoder.Decoder` has")
    _check_only(config, "attn_layer_idx", [], "MambaLM has no attention")
    layer, options = _mixer(config.get("ssm_cfg") or {})
    return {
        "vocab_size": config["vocab_size"],
        "dim": config["d_model"],
        "depth": config["n_layer"],
        "layer": layer,
        "residual_in_fp32": _flag(config, "residual_in_fp32"),
        "tie_embeddings": _flag(config, "tie_embeddings"),
        "pad_vocab_size_multiple": config.get("pad_vocab_size_multiple", 8),
        **options,
    }


def _mixer(ssm_cfg: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """The registry name of the mixer and its options."""
    name = ssm_cfg.get("layer", "Mamba1")
    if name not in _LAYERS:
        raise ValueError(f"ssm_cfg.layer={name!r}: must be one of {', '.join(map(repr, _LAYERS))}")
    known = layer_options(_LAYERS[name]).keys() - {"bidirectional", "layer_idx"}
    options: dict[str, Any] = {"headdim": 64} if name == "Mamba2" else {}  # the authors' default, which ours adapts
    for key, value in ssm_cfg.items():
        if key in known:
            options[key] = tuple(value) if isinstance(value, list) else value
        elif key != "layer" and key not in _WITHOUT_EFFECT and not (key in _OFF and value is None):
            raise ValueError(f"ssm_cfg.{key}={value!r}: {name} has no such option; {suggest(key, sorted(known))}")
    return _LAYERS[name], options


def _from_transformers(config: Mapping[str, Any]) -> dict[str, Any]:
    if config["model_type"] != "mamba":
        raise ValueError(f"model_type={config['model_type']!r}: must be 'mamba', or absent in the authors' format")
    _check_sizes(config, "hidden_size", "num_hidden_layers", "vocab_size")
    _check_only(config, "hidden_act", "silu", "Mamba has no other activation")
    options = {ours: config.get(key, default) for key, (ours, default) in _TRANSFORMERS.items()}
    return {
        "vocab_size": config["vocab_size"],
        "dim": config["hidden_size"],
        "depth": config["num_hidden_layers"],
        "pad_vocab_size_multiple": 1,  # padded already
        **options,
    }


def _check_sizes(config: Mapping[str, Any], *keys: str) -> None:
    for key in keys:
        if key not in config:
            raise ValueError(f"{key} is missing: a config of Mamba has {', '.join(keys)}; this one has {list(config)}")
        check_whole(**{key: config[key]})


def _check_only(config: Mapping[str, Any], key: str, value: Any, why: str) -> None:
    """A ValueError unless the key has the only value there is for it, or is absent."""
    given = config.get(key, value)
    if given != value:
        raise ValueError(f"{key}={given!r}: must be {value!r}; {why}")


def _flag(config: Mapping[str, Any], key: str) -> bool:
    value = config.get(key, True)
    if not isinstance(value, bool):
        raise ValueError(f"{key}={value!r}: must be true or false")
    return value
