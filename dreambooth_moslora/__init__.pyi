"""Public names. `python -m tools.tables` writes this file."""

from dreambooth_moslora.base.base import Base as Base
from dreambooth_moslora.cli.command_train import train_subject as train_subject
from dreambooth_moslora.disk.events import AdapterExported as AdapterExported
from dreambooth_moslora.disk.events import CheckpointSaved as CheckpointSaved
from dreambooth_moslora.disk.events import Event as Event
from dreambooth_moslora.disk.events import PhaseProgress as PhaseProgress
from dreambooth_moslora.disk.events import RunEnded as RunEnded
from dreambooth_moslora.disk.events import RunStarted as RunStarted
from dreambooth_moslora.disk.events import SamplesSaved as SamplesSaved
from dreambooth_moslora.disk.events import StepDone as StepDone
from dreambooth_moslora.disk.events import StepEvaluated as StepEvaluated
from dreambooth_moslora.errors import UserError as UserError
from dreambooth_moslora.evaluation.scoring import evaluate_adapter as evaluate_adapter
from dreambooth_moslora.generation.image_params import GenerationParams as GenerationParams
from dreambooth_moslora.generation.pipeline import SubjectPipeline as SubjectPipeline
from dreambooth_moslora.method.moslora import MoSLoraConfig as MoSLoraConfig
from dreambooth_moslora.method.moslora import fold as fold
from dreambooth_moslora.method.moslora import inject as inject
from dreambooth_moslora.settings.train_config import TrainConfig as TrainConfig
from dreambooth_moslora.training.loop import TrainResult as TrainResult
from dreambooth_moslora.training.loop import train as train

__version__: str
__all__ = [
    "__version__",
    "UserError",
    "Base",
    "TrainConfig",
    "TrainResult",
    "Event",
    "RunStarted",
    "PhaseProgress",
    "StepDone",
    "SamplesSaved",
    "StepEvaluated",
    "CheckpointSaved",
    "AdapterExported",
    "RunEnded",
    "GenerationParams",
    "MoSLoraConfig",
    "inject",
    "fold",
    "SubjectPipeline",
    "train",
    "train_subject",
    "evaluate_adapter",
]
