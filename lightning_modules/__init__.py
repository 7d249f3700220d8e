"""Models, data, metrics and configurations for training with Lightning."""

from lightning_modules.base import CheckpointError, Task

__all__ = ["CheckpointError", "Task"]
