"""Models of your own on the Hugging Face Hub, or in a folder, with what was swapped in them.

>>> import tempfile
>>> from torch import nn
>>> from archzoo.hub import HubMixin
>>> class Net(nn.Module, HubMixin):
...     def __init__(self, width=64):
...         super().__init__()
...         self.fc1, self.fc2 = nn.Linear(32, width), nn.Linear(width, 10)
>>> net = Net(width=128)
>>> report = net.swap({"fc*": "phm"}, phm={"n": 2})
>>> folder = tempfile.mkdtemp()
>>> _ = net.save_pretrained(folder)
>>> Net.from_pretrained(folder).fc2
Loading weights from local directory
PHMLinear(128, 10, bias=True, n=2, rule='learned')

Models of timm have `timm.models.save_for_hf` and `push_to_hf_hub`, ours in its registry included.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self

import torch
from huggingface_hub import PyTorchModelHubMixin
from torch import nn

from archzoo.surgery import SwapReport, swap

__all__ = ["HubMixin"]

_KEY = "archzoo_swaps"


class HubMixin(PyTorchModelHubMixin):
    """huggingface_hub's mixin, with `swap` as a method that the model's config remembers.

    `save_pretrained`, `push_to_hub` and `from_pretrained` are huggingface_hub's. `from_pretrained` builds the class
    with the arguments it was built with, swaps again, and loads the weights, all of them. Arguments must be plain
    values, as JSON has them. Weights are read from `model.safetensors`, and torch's generator stays where it was.
    """

    def swap(
        self,
        rules: Mapping[str, Any],
        *,
        match: Literal["params"] | None = None,
        init: Literal["fresh", "from_original"] = "fresh",
        **options: Any,
    ) -> SwapReport:
        """`archzoo.swap` of this model, in a form that can be stored.

        Args:
            rules: Globs over names of modules -> a layer's name, (name, options), or None.
            match: `"params"`, or None: a count of FLOPs depends on a batch, which is not stored.
            init: See `archzoo.swap`.
            options: What else `archzoo.swap` takes: `optimizer`, `calibration`, `allow_unmatched`, and options of a
                layer by its name, as `phm={"n": 4}`.

        Raises:
            TypeError: If a rule or an option cannot be stored.
            ValueError: As `archzoo.swap`, or if the model itself would be replaced.
        """
        of_layers = {
            key: value for key, value in options.items() if isinstance(value, Mapping) and key != "calibration"
        }
        call: dict[str, Any] = {"rules": dict(rules), "match": match, "init": init, **of_layers}
        if options.get("allow_unmatched"):
            call["allow_unmatched"] = True
        if match not in (None, "params"):
            raise ValueError(f"match={match!r}: must be 'params' or None; a batch to count FLOPs on is not stored")
        config: Any = self._hub_mixin_config
        if not isinstance(config, dict | None):
            raise TypeError(f"config of {type(config).__name__}: has no place for what is swapped; use a dict")
        if not all(isinstance(rule, str) for rule in rules):
            raise TypeError(f"rules={rules!r}: only globs over names can be stored, as {{'blocks.*.mlp.fc*': 'kan'}}")
        try:
            stored = json.loads(json.dumps(call))
        except TypeError as error:
            raise TypeError(f"rules={rules!r}, options={of_layers!r}: cannot be stored as JSON ({error})") from error
        if "" in rules:
            raise ValueError("rules['']: replaces the model itself, which then is no longer this class")
        assert isinstance(self, nn.Module)
        report = swap(self, rules, match=match, init=init, **options)
        if not report.dry_run:
            self._hub_mixin_config = {**(config or {}), _KEY: [*(config or {}).get(_KEY, []), stored]}
        return report

    @classmethod
    def _from_pretrained(cls, **arguments: Any) -> Self:
        arguments.pop(_KEY, None)  # which a class that takes any argument would be given
        with torch.random.fork_rng(devices=[]):  # weights are drawn, only to be replaced
            return super()._from_pretrained(**{"strict": True, **arguments})

    @classmethod
    def _load_as_safetensor(cls, model: Any, model_file: str, map_location: str, strict: bool) -> Any:
        config = Path(model_file).with_name("config.json")  # fetched before, into the same folder
        for call in json.loads(config.read_text()).get(_KEY, []) if config.exists() else []:
            if not isinstance(call, dict) or not isinstance(call.get("rules"), dict):
                raise ValueError(f"{config}: {_KEY} holds {call!r}, which is not what `HubMixin.swap` stores: no rules")
            rules = {
                rule: tuple(choice) if isinstance(choice, list) else choice for rule, choice in call["rules"].items()
            }
            model.swap(**{**call, "rules": rules})
        return super()._load_as_safetensor(model, model_file, map_location, strict)

    @classmethod
    def _load_as_pickle(cls, model: Any, model_file: str, map_location: str, strict: bool) -> Any:
        raise ValueError(f"{model_file}: is a pickle, which could run code; weights are read from model.safetensors")
