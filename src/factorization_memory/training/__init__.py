"""Training on one device: the loop, its optimizer, checkpoints and records."""

from factorization_memory.training.checkpoint import load_checkpoint, save_checkpoint
from factorization_memory.training.checkpoint_folder import CheckpointError, find_checkpoint, list_checkpoints
from factorization_memory.training.device import resolve_device
from factorization_memory.training.guard import RunLockedError, TrainingDivergedError
from factorization_memory.training.pretrained import export_run, import_model, initial_config, load_model
from factorization_memory.training.progress import RichProgress, TrainingObserver
from factorization_memory.training.record import RunFolderError
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
