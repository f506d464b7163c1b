"""DreamBooth for SDXL through MoSLoRA adapters: y = W0·x + s·B·M·A·x (arXiv 2406.11909).

The names below are imported on first use, so that `import dreambooth_moslora` costs nothing.
"""

__version__ = "0.1.0"

_PUBLIC_MODULES = {
    "UserError": "errors",
    "Base": "base.base",
    "TrainConfig": "settings.train_config",
    "TrainResult": "training.loop",
    "Event": "disk.events",
    "RunStarted": "disk.events",
    "PhaseProgress": "disk.events",
    "StepDone": "disk.events",
    "SamplesSaved": "disk.events",
    "StepEvaluated": "disk.events",
    "CheckpointSaved": "disk.events",
    "AdapterExported": "disk.events",
    "RunEnded": "disk.events",
    "GenerationParams": "generation.image_params",
    "MoSLoraConfig": "method.moslora",
    "inject": "method.moslora",
    "fold": "method.moslora",
    "SubjectPipeline": "generation.pipeline",
    "train": "training.loop",
    "train_subject": "cli.command_train",
    "evaluate_adapter": "evaluation.scoring",
}
"""Public name -> its module. `__init__.pyi` tells them to type checkers and editors."""

__all__ = ["__version__", *_PUBLIC_MODULES]


# Modules are imported inside of functions, so that editors complete public names alone.
def _prepare_libraries() -> None:
    """Let OpenMP's idle threads spin for a moment, then sleep, unless the environment decides, and
    silence bitsandbytes.

    If they sleep at once, a small UNet's step takes nearly twice as long on two free cores; if they
    spin for long while other programs use the cores, ten times as long.
    """
    import logging
    import os

    # libgomp reads both variables when torch is imported; later they only act on child processes.
    if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys():
        os.environ |= {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "2000"}

    # bitsandbytes warns of a missing GPU as soon as PEFT imports it, even if nothing uses it.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


_prepare_libraries()


def __dir__() -> list[str]:
    return sorted(__all__)


def __getattr__(name: str):
    from importlib import import_module

    if name not in _PUBLIC_MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_PUBLIC_MODULES[name]}"), name)
