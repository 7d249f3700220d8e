"""Recurrent kernels: RNN, LSTM and GRU layers and their variants, as functions of tensors.

Dimensions: T time steps, B batch rows, I input size, H hidden size, P projected size (H without
projection), G gates, D directions (the second runs from each row's last step to its first). Inputs
are [T, B, I], weights [D, G*H, I] and [D, G*H, P], states [D, B, P], outputs [T, B, D*P].

Needs torch; the Triton backend, imported when first used, needs triton.
"""

from .api import gru, lstm, recurrence, rnn
from .spec import CELLS, CellSpec

__version__ = "0.1.0"
__all__ = ["CELLS", "CellSpec", "__version__", "gru", "lstm", "recurrence", "rnn"]
