"""Export of trained models to ONNX, for a runtime without torch."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fusedrnn.attention_decoder import DecoderState
from fusedrnn.onnx import export

from .seq2seq import Seq2Seq
from .seq2seq_model import FrameEmbedding, Seq2SeqModel
from .tagger import Tagger
from .tagger_model import TaggerModel


class _Emissions(nn.Module):
    """A tagger's network up to the emissions of each task; it takes what it looks at."""

    def __init__(self, model: TaggerModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, words: Tensor, lengths: Tensor, **spelt: Tensor) -> tuple[Tensor, ...]:
        names = ("characters", "character_lengths", "spellings", "casings")
        features = self.model.encode(words, lengths, **(dict.fromkeys(names, words) | spelt))
        return tuple(head.emission(features) for head in self.model.heads)


class _Encoder(nn.Module):
    """What a decoder starts from, as tensors."""

    def __init__(self, model: Seq2SeqModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, source: Tensor, lengths: Tensor) -> tuple[Tensor, ...]:
        state = self.model.encode(source, lengths)
        assert isinstance(state, DecoderState)
        return (state.source.keys, *pytree.tree_leaves(state.layers))


def export_tagger(tagger: Tagger, path: str | Path) -> None:
    """Write a tagger up to its emissions.

    Inputs are `words` [B, T], `lengths` [B], `characters` [U, L], `character_lengths` [U] and
    `spellings` [B, T] and `casings` [U], all int64, as `TaggerModel.forward` and a `TaggingBatch`
    have them, but only those that the model looks at. The output is `emissions` [B, T, K], and
    `emissions_NAME` for each further task. Decoding stays outside: take the arg max of each word,
    or give the emissions to `fusedrnn.crf.CRF.decode`.

    Args:
        tagger: the model; its mode does not matter.
        path: the file to write.

    Raises:
        ValueError, ImportError: as `fusedrnn.onnx.export`.
    """
    inputs = {"words": torch.ones(2, 3, dtype=torch.int64), "lengths": torch.full((2,), 3)}
    if tagger.model.characters is not None:
        inputs["characters"] = torch.ones(4, 5, dtype=torch.int64)
        inputs["character_lengths"] = torch.full((4,), 5)
    if tagger.model.casings is not None:
        inputs["casings"] = torch.ones(4, dtype=torch.int64)
    if len(inputs) > 2:
        inputs["spellings"] = torch.ones(2, 3, dtype=torch.int64)
    dimensions = {
        "words": ("B", "T"),
        "lengths": ("B",),
        "characters": ("U", "L"),
        "character_lengths": ("U",),
        "spellings": ("B", "T"),
        "casings": ("U",),
    }
    outputs = ["emissions", *(f"emissions_{task.name}" for task in tagger.codec.tasks[1:])]
    export(_Emissions(tagger.model), path, inputs, dimensions, outputs)


def export_encoder(seq2seq: Seq2Seq, path: str | Path) -> None:
    """Write the encoder of a sequence-to-sequence model, with the bridge to its decoder.

    Inputs are `source` [B, S] and `lengths` [B], int64. Outputs are `keys` [B, S, Dk], what an
    attention looks at, zero past the lengths, and the decoder's initial states `h_l0` [1, B, H],
    (`c_l0`), `h_l1`, ... one for each of its layers.

    Args:
        seq2seq: the model; its mode does not matter.
        path: the file to write.

    Raises:
        ValueError: the model reads numbers, not symbols, or copies them.
        ValueError, ImportError: as `fusedrnn.onnx.export`.
    """
    model = seq2seq.model
    if isinstance(model.source_embedding, FrameEmbedding) or model.copy_gate is not None:
        raise ValueError("seq2seq: expected a model that reads symbols and does not copy them")
    inputs = {"source": torch.ones(2, 3, dtype=torch.int64), "lengths": torch.full((2,), 3)}
    dimensions = {"source": ("B", "S"), "lengths": ("B",)}
    states = "hc" if model.decoder.cell.startswith("lstm") else "h"
    names = [f"{s}_l{index}" for index in range(len(model.decoder.stack.layers)) for s in states]
    export(_Encoder(model), path, inputs, dimensions, ["keys", *names])
