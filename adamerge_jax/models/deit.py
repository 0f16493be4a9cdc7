"""DeiT (Touvron et al., 2021) for image classification: a ViT with a token of distillation.

The head reads the first token, as a ViT's does. Models with a second head, on the token of
distillation, run by their PyTorch forward.
"""

import dataclasses
from functools import partial

from adamerge_jax.models import vit
from adamerge_jax.models.layers import Prefixed

FAMILY = dataclasses.replace(
    vit.FAMILY,
    backbone=partial(
        Prefixed, "deit", partial(vit.Vit, tokens=("cls_token", "distillation_token"))
    ),
    prefixes=("deit.",),
)
