"""Training on one device: the loop, the optimizer and guards. Files on disk are handled by `runs`."""

from factorization_memory.runs.checkpoint_folder import CheckpointError
from factorization_memory.runs.loading import load_model
from factorization_memory.runs.lock import RunLockedError
from factorization_memory.runs.record import RunFolderError
from factorization_memory.training.guard import TrainingDivergedError
from factorization_memory.training.initial import initial_config
from factorization_memory.training.progress import RichProgress, TrainingObserver
from factorization_memory.training.schedule import learning_rate
from factorization_memory.training.trainer import Trainer

__all__ = [
    "CheckpointError",
    "RichProgress",
    "RunFolderError",
    "RunLockedError",
    "Trainer",
    "TrainingDivergedError",
    "TrainingObserver",
    "initial_config",
    "learning_rate",
    "load_model",
]
