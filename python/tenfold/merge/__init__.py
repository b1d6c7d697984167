# SPDX-License-Identifier: Apache-2.0
"""Merging whole models: recipes with mergekit's field names, on folders of safetensors or state dicts.

``merge_models(recipe, out)`` streams: what it needs of memory is a few tensors, not models. Its files have the
same bytes for any number of threads, any sharding of the inputs, and however often it was interrupted.
"""

from tenfold.merge.checkpoint import Checkpoint
from tenfold.merge.models import merge_models, merge_states, model_gram
from tenfold.merge.recipe import METHODS, Recipe, Source, load_recipe

__all__ = [
    "METHODS",
    "Checkpoint",
    "Recipe",
    "Source",
    "load_recipe",
    "merge_models",
    "merge_states",
    "model_gram",
]
