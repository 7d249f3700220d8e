"""Models, data, metrics and configurations for training with Lightning."""

from lightning_modules.base import CheckpointError, Task
from lightning_modules.seq2seq import Seq2Seq
from lightning_modules.tagger import Tagger

__all__ = ["CheckpointError", "Seq2Seq", "Tagger", "Task"]
