"""Whole networks made of layers. Importing this package also registers ours with timm: `archzoo_vit_tiny`, ….

>>> import timm
>>> import archzoo.models
>>> timm.list_models("archzoo_*caps*")
['archzoo_capsnet', 'archzoo_capsnet_small', 'archzoo_capsule_classifier', 'archzoo_efficient_capsnet']
>>> timm.list_models("archzoo_*net*18")
['archzoo_padenet18', 'archzoo_resnet18']
"""

from importlib import import_module

_WITH_TIMM = (
    "bpu_classifier",
    "capsnet",
    "capsule_classifier",
    "efficient_capsnet",
    "timm_families",
    "vision_mamba",
    "vit",
)

for _name in _WITH_TIMM:  # which register as they are imported
    import_module(f"archzoo.models.{_name}")
