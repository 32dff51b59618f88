"""Whole networks made of layers. Importing this package also registers ours with timm: `archzoo_vit_tiny`, ….

>>> import timm
>>> import archzoo.models
>>> timm.list_models("archzoo_*caps*")
['archzoo_capsnet', 'archzoo_capsnet_small', 'archzoo_capsule_classifier', 'archzoo_efficient_capsnet']
>>> timm.list_models("archzoo_*net*18")
['archzoo_padenet18', 'archzoo_resnet18']
"""

from archzoo.models import bpu_classifier as _bpu_classifier  # noqa: F401 - these register with timm
from archzoo.models import capsnet as _capsnet  # noqa: F401
from archzoo.models import capsule_classifier as _capsule_classifier  # noqa: F401
from archzoo.models import efficient_capsnet as _efficient_capsnet  # noqa: F401
from archzoo.models import timm_families as _timm_families  # noqa: F401
from archzoo.models import vision_mamba as _vision_mamba  # noqa: F401
from archzoo.models import vit as _vit  # noqa: F401
