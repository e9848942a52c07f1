"""``skipcache demo``: a real trained model in the wheel, sampled with and without the cache."""

from skipcache.demo.model import CLASS_NAMES, MODEL_FOLDER, load_pipeline
from skipcache.demo.show import DemoResult, run_demo

__all__ = ["CLASS_NAMES", "MODEL_FOLDER", "DemoResult", "load_pipeline", "run_demo"]
