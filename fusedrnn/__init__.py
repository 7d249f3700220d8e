"""Recurrent layers for PyTorch, stacks of them, attention, and a linear-chain CRF."""

import kernels as _kernels

if not hasattr(_kernels, "CellSpec"):
    raise ImportError(
        "fusedrnn needs its own package 'kernels', but found another one at "
        f"{getattr(_kernels, '__file__', None)}; Hugging Face's distribution 'kernels' has the "
        "same import name and cannot share an environment with fusedrnn: uninstall it and "
        "reinstall fusedrnn, or use a fresh environment"
    )

from .attention_decoder import AttentionDecoder
from .crf import CRF
from .recurrent import GRU, LSTM, RNN
from .saving import load, save
from .stack import RecurrentStack

__version__ = _kernels.__version__
__all__ = ["CRF", "GRU", "LSTM", "RNN", "AttentionDecoder", "RecurrentStack", "load", "save"]
