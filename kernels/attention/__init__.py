"""The attention decoder: a recurrent decoder that looks at encoder states inside its time loop."""

from .api import decode
from .spec import FEEDBACKS, Decoded, DecoderWeights, LayerWeights, Masks, Problem, Sampling

__all__ = [
    "FEEDBACKS",
    "Decoded",
    "DecoderWeights",
    "LayerWeights",
    "Masks",
    "Problem",
    "Sampling",
    "decode",
]
