"""One file per model family. To add one: docs/adding-a-model.md."""

from .base import Component, Model, Sample
from .longcat_image import LongCatImage, LongCatImageEdit
from .ovis_image import OvisImage
from .qwen_image import QwenImage
from .qwen_image_edit import QwenImageEdit, QwenImageEditPlus, QwenImageLayered
from .sd3 import StableDiffusion3
from .wan import Wan
from .wan_image_to_video import WanImageToVideo
from .z_image import ZImage

FAMILIES: tuple[type[Model], ...] = (
    QwenImage,
    QwenImageEdit,
    QwenImageEditPlus,
    QwenImageLayered,
    ZImage,
    LongCatImage,
    LongCatImageEdit,
    OvisImage,
    StableDiffusion3,
    Wan,
    WanImageToVideo,
)

MODELS: dict[str, type[Model]] = {name: family for family in FAMILIES for name in family.pipelines}
"""Family by the pipeline class that model_index.json names."""

__all__ = ["MODELS", "Component", "Model", "Sample"]
