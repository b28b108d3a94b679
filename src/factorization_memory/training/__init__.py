"""Training on one device: the loop, the optimizer and guards. Files on disk are handled by `runs`, whose names can
also be imported from here, as in version 0.1."""

from factorization_memory.models.device import resolve_device
from factorization_memory.runs.checkpoint import load_checkpoint, save_checkpoint
from factorization_memory.runs.checkpoint_folder import CheckpointError, find_checkpoint, list_checkpoints
from factorization_memory.runs.exporting import export_run
from factorization_memory.runs.importing import import_model
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
    "export_run",
    "find_checkpoint",
    "import_model",
    "initial_config",
    "learning_rate",
    "list_checkpoints",
    "load_checkpoint",
    "load_model",
    "resolve_device",
    "save_checkpoint",
]
