"""Models, data, metrics and configurations for training with Lightning.

The networks alone, in `tagger_model`, `seq2seq_model` and `memory_model`, can be imported without
Lightning.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_modules.base import CheckpointError, Task
    from lightning_modules.memory import Memory
    from lightning_modules.seq2seq import Seq2Seq, SpeechToText
    from lightning_modules.series import AnomalyDetector, Forecaster
    from lightning_modules.tagger import Tagger

__all__ = [
    "AnomalyDetector",
    "CheckpointError",
    "Forecaster",
    "Memory",
    "Seq2Seq",
    "SpeechToText",
    "Tagger",
    "Task",
]


def __getattr__(name: str) -> Any:
    """Import all tasks, and Lightning with them, when the first is asked for."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from lightning_modules import base, memory, seq2seq, series, tagger

    for module in (base, memory, seq2seq, series, tagger):
        globals().update({n: vars(module)[n] for n in __all__ if n in vars(module)})
    return globals()[name]
