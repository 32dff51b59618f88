"""Whole networks made of layers. Importing this package also registers ours with timm: `archzoo_vit_tiny`, ….

>>> import timm
>>> import archzoo.models
>>> timm.list_models("archzoo_*")
['archzoo_vikanformer_mnist', 'archzoo_vit_base', 'archzoo_vit_small', 'archzoo_vit_tiny']
"""

from archzoo.models import vit as _vit  # noqa: F401 - registers with timm
