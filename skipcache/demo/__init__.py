"""``skipcache demo``: real trained models in the wheel, sampled with and without the cache."""

from skipcache.demo.model import (
    CLASS_NAMES,
    MODEL_FOLDER,
    MODELS,
    MOTIONS,
    DemoModel,
    load_pipeline,
)
from skipcache.demo.show import DemoResult, run_demo
from skipcache.demo.tasks import TASKS, Task

__all__ = [
    "CLASS_NAMES",
    "MODELS",
    "MODEL_FOLDER",
    "MOTIONS",
    "TASKS",
    "DemoModel",
    "DemoResult",
    "Task",
    "load_pipeline",
    "run_demo",
]
