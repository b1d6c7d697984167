# SPDX-License-Identifier: Apache-2.0
"""Makes transformers' ``AutoProcessor`` find a saved ``PixelProcessor``.

``AutoProcessor`` reads ``processor_class`` from ``processor_config.json`` and looks for a class of that name among
those registered. ``AutoImageProcessor`` takes subclasses of its own base class only, which wants images: it is
not served.
"""

from __future__ import annotations

from typing import Any


def register(config_class: Any = None) -> None:
    """Registers ``PixelProcessor`` for a model's configuration class; without one, for saved processors alone.

    Importing transformers is what it costs, so it is not done by importing tenfold.
    """
    from transformers import AutoProcessor, PreTrainedConfig

    from tenfold.pixelgpt.processor import PixelProcessor

    if config_class is None:

        class PixelRendererConfig(PreTrainedConfig):
            """Stands for a renderer without a model."""

            model_type = "tenfold_pixel_renderer"

        config_class = PixelRendererConfig
    AutoProcessor.register(config_class, PixelProcessor, exist_ok=True)
