"""Models, data, metrics and configurations for training with Lightning.

The networks alone, `tagger_model` and `seq2seq_model`, can be imported without Lightning.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_modules.base import CheckpointError, Task
    from lightning_modules.seq2seq import Seq2Seq
    from lightning_modules.tagger import Tagger

__all__ = ["CheckpointError", "Seq2Seq", "Tagger", "Task"]


def __getattr__(name: str) -> Any:
    """Imports all tasks, and Lightning with them, when the first is asked for."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from lightning_modules import base, seq2seq, tagger

    for module in (base, seq2seq, tagger):
        globals().update({n: vars(module)[n] for n in __all__ if n in vars(module)})
    return globals()[name]
