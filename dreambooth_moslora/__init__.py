"""DreamBooth for SDXL through MoSLoRA adapters: y = W0·x + s·B·M·A·x (arXiv 2406.11909).

The names below are imported on first use, so that `import dreambooth_moslora` costs nothing.
"""

from importlib import import_module

__version__ = "0.1.0"

_HOME = {
    "UserError": "core.errors",
    "TrainConfig": "core.config.train_config",
    "GenerationParams": "generation.params",
    "MoSLoraConfig": "adapters.moslora",
    "inject": "adapters.moslora",
    "fold": "adapters.moslora",
    "SubjectPipeline": "generation.pipeline",
    "train": "training.loop",
    "evaluate_adapter": "evaluation.evaluate",
}

__all__ = ["__version__", *_HOME]


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
