"""Class-to-video Latte, which diffusers lacks: the model and its pipeline. Imports diffusers."""

from skipcache.latte_class.pipeline import LatteClassPipeline, LatteClassPipelineOutput
from skipcache.latte_class.transformer import LatteClassTransformer3DModel

__all__ = ["LatteClassPipeline", "LatteClassPipelineOutput", "LatteClassTransformer3DModel"]
