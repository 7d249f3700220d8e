"""torch's own fused kernels, for the cells that torch has: a whole stack of layers in one call.

`torch.compile` leaves them as they are, as it does torch.nn's layers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from . import narrow
from .spec import CELLS
from .untraced import untraced

State = tuple[Tensor, ...]

STEP, CALL = 10, 5000
"""What oneDNN's LSTM costs beside its rows: a step as much as `STEP` rows, a call as `CALL` / H."""

HELD = 1e30
"""What padded steps add to the gates before the sigmoid: exactly 0 or 1 after it, no gradient."""


def covers(
    cell: str,
    recurrent_dropout: float,
    zoneout: float,
    training: bool,
    lengths: Tensor | None = None,
) -> bool:
    """Whether torch's kernels compute `cell` with these options.

    With lengths they cannot be exported, because packing depends on the values.
    """
    exported = lengths is not None and torch.compiler.is_exporting()
    masked = zoneout > 0 or (recurrent_dropout > 0 and training)
    return CELLS[cell].torch_name is not None and not masked and not exported


@untraced
def padded_stack(
    cell: str,
    x: Tensor,
    weights: Sequence[Tensor],
    state: Sequence[Tensor],
    *,
    layers: int = 1,
    directions: int = 1,
    dropout: float = 0.0,
    training: bool = False,
    batch_first: bool = False,
    lengths: Tensor | None = None,
) -> tuple[Tensor, State]:
    """Run a stack of equal layers over a padded batch.

    Args:
        cell: name of a cell that `covers` accepts.
        x: [T, B, I], or [B, T, I] if `batch_first`.
        weights: for each layer, for each direction: w_ih, w_hh, then b_ih and b_hh where there are
            biases, then w_hr where there is a projection.
        state: initial h [layers * D, B, P] and, for the LSTM, c [layers * D, B, H].
        layers: number of layers.
        directions: D.
        dropout: probability that an output of a layer but the last is zeroed, in training.
        training: whether dropout acts.
        batch_first: layout of x.
        lengths: valid steps of each row, int64 [B], or None. The batch is packed, unless `_holds`
            and another way is faster: on a GPU this waits for the lengths, which cuDNN wants on the
            host. Packing costs time at every step, and oneDNN's faster LSTM takes no packed batch.

    Returns:
        Output in the layout of x, and the final states shaped as the initial ones.
    """
    if lengths is not None and _holds(cell, x, weights, state):
        rows, hidden = x.transpose(0, 1) if batch_first else x, state[0].shape[-1]
        end, result = (layers, dropout, training), None
        if not narrow.short(rows, hidden):
            result = _grouped_stack(rows, weights, state, lengths, *end)
        elif narrow.suits(hidden):
            result = narrow.stack(rows, weights, lengths, directions, *end)
        if result is not None:
            y, last = result
            return y.transpose(0, 1) if batch_first else y, last
    if lengths is not None and len(lengths):  # an empty batch cannot be packed
        packed = pack_padded_sequence(x, lengths.cpu(), batch_first, enforce_sorted=False)
        packed, final = packed_stack(
            cell,
            packed,
            weights,
            state,
            layers=layers,
            directions=directions,
            dropout=dropout,
            training=training,
        )
        steps = x.shape[1 if batch_first else 0]
        return pad_packed_sequence(packed, batch_first, total_length=steps)[0], final
    options = (_biases(weights), layers, dropout, training, directions == 2, batch_first)
    y, *results = _kernel(cell)(x, _hidden(state), weights, *options)
    return y, tuple(results)


def _holds(cell: str, x: Tensor, weights: Sequence[Tensor], state: Sequence[Tensor]) -> bool:
    """Whether `_held_stack` gives the right results; a trace of it would fit one batch only."""
    projected = len(state) > 1 and state[0].shape[-1] != state[1].shape[-1]
    if cell != "lstm" or projected or not x.numel() or torch.is_autocast_enabled("cpu"):
        return False
    if torch.jit.is_tracing():
        return False
    if x.device.type != "cpu" or x.dtype != torch.float32 or weights[0].dtype != x.dtype:
        return False
    # The backward direction begins with padded steps, which hold a state of zeros only.
    return bool(torch.backends.mkldnn.enabled) and not any(
        s.requires_grad or s.any() for s in state
    )


def _groups(lengths: Sequence[int], call: float) -> list[int]:
    """How many rows to run together, longest first: groups of like lengths have little padding.

    Args:
        lengths: of the rows, descending.
        call: what a call costs, in rows and steps.
    """
    rows, longest = len(lengths), lengths[0]
    saved = {
        k: longest * (rows - k) - length * (rows - k + STEP)
        for k, length in enumerate(lengths)
        if k and length < lengths[k - 1]
    }
    cut = max(saved, key=saved.__getitem__, default=0)
    if not cut or saved[cut] <= call:
        return [rows]
    return _groups(lengths[:cut], call) + _groups(lengths[cut:], call)


def _grouped_stack(
    x: Tensor,
    weights: Sequence[Tensor],
    state: Sequence[Tensor],
    lengths: Tensor,
    layers: int,
    dropout: float,
    training: bool,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Run LSTMs over a padded batch [T, B, I], rows of like lengths together."""
    options = layers, dropout, training
    sizes, order = lengths.sort(descending=True, stable=True)
    groups = _groups(sizes.tolist(), CALL / state[0].shape[-1])
    if len(groups) == 1:
        return _held_stack(x, weights, state, lengths, *options)
    parts = zip(x.index_select(1, order).split(groups, 1), sizes.split(groups), strict=True)
    runs = []
    for rows, own in parts:
        given = [s[:, : len(own)] for s in state]
        y, final = _held_stack(rows[: int(own[0])], weights, given, own, *options)
        runs.append((F.pad(y, (0, 0, 0, 0, 0, len(x) - len(y))), *final))
    places = order.argsort()
    y, h, c = (torch.cat(run, 1).index_select(1, places) for run in zip(*runs, strict=True))
    return y, (h, c)


def _held_stack(
    x: Tensor,
    weights: Sequence[Tensor],
    state: Sequence[Tensor],
    lengths: Tensor,
    layers: int,
    dropout: float,
    training: bool,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Run LSTMs over a padded batch [T, B, I] whose padded steps leave the cell state as it is.

    One more input, 1 in padded steps, closes the input gate and opens the forget gate, so that
    c_t = c_{t-1} there: at the end of a row forwards, and zero before its end backwards.
    """
    directions, size = len(state[0]) // layers, state[0].shape[-1]
    number, row = len(weights) // len(state[0]), torch.arange(len(lengths))
    padding = (torch.arange(len(x))[:, None] >= lengths)[..., None]
    gates = x.new_tensor([-HELD, HELD, 0, 0]).repeat_interleave(size)[:, None]
    y, finals = x, []
    for layer in range(layers):
        places = slice(layer * directions, (layer + 1) * directions)
        own = list(weights[places.start * number : places.stop * number])
        own[::number] = [torch.cat([w, gates], 1) for w in own[::number]]
        y = F.dropout(y, dropout, training) if layer else y
        y = torch.cat([y.masked_fill(padding, 0.0), padding.to(y.dtype)], -1)
        given = [s[places] for s in state]
        options = (_biases(weights), 1, 0.0, training, directions == 2, False)
        y, h, c = torch.lstm(y, given, own, *options)
        ends = y[lengths - 1, row, :size]
        finals.append((torch.cat([ends[None], h[1:]]), c))
    h, c = map(torch.cat, zip(*finals, strict=True))
    return y.masked_fill(padding, 0.0), (h, c)


@untraced
def packed_stack(
    cell: str,
    x: PackedSequence,
    weights: Sequence[Tensor],
    state: Sequence[Tensor],
    *,
    layers: int = 1,
    directions: int = 1,
    dropout: float = 0.0,
    training: bool = False,
) -> tuple[PackedSequence, State]:
    """Run a stack of equal layers over a packed batch.

    Args:
        cell: as in `padded_stack`.
        x: the packed input.
        weights: as in `padded_stack`.
        state: as in `padded_stack`, rows in the order that they had before packing.
        layers: as in `padded_stack`.
        directions: as in `padded_stack`.
        dropout: as in `padded_stack`.
        training: as in `padded_stack`.

    Returns:
        Output packed as x, and the final states shaped and ordered as the initial ones.
    """
    data, batch_sizes, order, inverse = x
    if order is not None:
        state = [s.index_select(1, order) for s in state]
    options = (_biases(weights), layers, dropout, training, directions == 2)
    y, *results = _kernel(cell)(data, batch_sizes, _hidden(state), weights, *options)
    if inverse is not None:
        results = [s.index_select(1, inverse) for s in results]
    return PackedSequence(y, batch_sizes, order, inverse), tuple(results)


def _kernel(cell: str) -> Callable[..., Sequence[Tensor]]:
    return getattr(torch, str(CELLS[cell].torch_name))


def _biases(weights: Sequence[Tensor]) -> bool:
    return any(w.dim() == 1 for w in weights)


def _hidden(state: Sequence[Tensor]) -> Tensor | list[Tensor]:
    return state[0] if len(state) == 1 else list(state)


def recurrence(
    cell: str,
    x: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    params: Mapping[str, Tensor],
    state: Sequence[Tensor],
    *,
    w_hr: Tensor | None = None,
    lengths: Tensor | None = None,
    recurrent_dropout: float = 0.0,
    zoneout: float = 0.0,
    training: bool = False,
    seed: int = 0,
) -> tuple[Tensor, State]:
    """One layer; the arguments are those of `reference.recurrence`, of which `covers` must hold."""
    if b_ih is None and b_hh is not None:
        b_ih = torch.zeros_like(b_hh)
    if b_hh is None and b_ih is not None:
        b_hh = torch.zeros_like(b_ih)
    given = [w for w in (w_ih, w_hh, b_ih, b_hh, w_hr) if w is not None]
    weights = [w[d] for d in range(w_ih.shape[0]) for w in given]
    return padded_stack(cell, x, weights, state, directions=w_ih.shape[0], lengths=lengths)
