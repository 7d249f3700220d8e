"""The functional API: one recurrent layer over a batch, on a backend of the caller's choice."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from . import native, reference, torch_loop
from .checks import (
    autocasts,
    check_backend,
    check_layer,
    check_lengths,
    check_probability,
    check_tensors,
)
from .spec import CELLS

State = tuple[Tensor, ...]


def draw_seed() -> int:
    """A seed for the masks of one layer, from torch's default generator."""
    return int(torch.randint(2**62, ()))


def precision(x: Tensor) -> tuple[torch.dtype, torch.dtype]:
    """The dtype that a recurrence over x computes in, and the one its results have.

    Results have x's dtype, or autocast's. A CPU computes bfloat16 and float16 in float32: its GEMMs
    in these are up to a hundred times slower where the processor has no instruction for them.
    """
    kind = x.device.type
    outside = x.dtype
    if autocasts(kind) and x.dtype != torch.float64:
        outside = torch.get_autocast_dtype(kind)
    low = outside in (torch.bfloat16, torch.float16)
    return (torch.float32 if low and kind == "cpu" else outside), outside


def without_autocast(x: Tensor) -> contextlib.AbstractContextManager[object]:
    """A context in which autocast leaves x's device alone."""
    if autocasts(x.device.type):
        return torch.autocast(x.device.type, enabled=False)
    return contextlib.nullcontext()


def without_padding(x: Tensor, lengths: Tensor) -> Tensor:
    """[T, B, I] with zeros past each row's end, whatever stood there."""
    padding = torch.arange(x.shape[0], device=x.device)[:, None] >= lengths
    return x.masked_fill(padding[..., None], 0.0)


def choose_backend(backend: str, x: Tensor, projected: bool = False) -> str:
    """Resolve "auto": triton on a GPU for what its kernels compute, torch for everything else.

    Args:
        backend: one of `BACKENDS`; what is not "auto" stays as it is.
        x: input of the recurrence.
        projected: whether h is projected, which the kernels have not.

    Raises:
        ValueError: the name is unknown.
    """
    check_backend(backend)
    if backend != "auto":
        return backend
    if not x.is_cuda or x.dtype == torch.float64 or projected:
        return "torch"
    return "triton" if importlib.util.find_spec("triton") else "torch"


def _wants_plain_operations() -> bool:
    """Whether an export, a trace or a transform of `torch.func` looks into what is computed."""
    transformed = torch._C._are_functorch_transforms_active()  # torch's own test, not public
    return torch.compiler.is_exporting() or torch.jit.is_tracing() or transformed


def _implementation(
    backend: str, native_cell: bool, recompute: bool
) -> Callable[..., tuple[Tensor, State]]:
    if backend == "torch" and native_cell:
        return native.recurrence
    if backend == "torch":
        return reference.recurrence if _wants_plain_operations() else torch_loop.recurrence
    if backend == "reference":
        return reference.recurrence
    if importlib.util.find_spec("triton") is None:
        raise RuntimeError("backend='triton' needs the package triton, which is not installed")
    from . import ops

    return partial(ops.recurrence, recompute=recompute)


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
    backend: str = "auto",
    recompute: bool = False,
) -> tuple[Tensor, State]:
    """One layer on the chosen backend; the arguments are taken as valid and of one dtype.

    All but `backend` and `recompute`, and the results, are those of `reference.recurrence`.

    Args:
        cell: name in `CELLS`.
        x: [T, B, I].
        w_ih: [D, G*H, I].
        w_hh: [D, G*H, P].
        b_ih: [D, G*H] or None.
        b_hh: [D, G*H] or None.
        params: extra parameters of the cell, name -> [D, n*H].
        state: initial h [D, B, P] and, for the LSTMs, c [D, B, H].
        w_hr: [D, P, H] or None.
        lengths: int64 [B] or None.
        recurrent_dropout: probability in [0, 1).
        zoneout: probability in [0, 1).
        training: whether masks are drawn.
        seed: seed of the masks.
        backend: "auto", "triton", "torch" (torch's own kernels where it has the cell, `torch_loop`
            otherwise, and in `torch.export`, `torch.jit.trace` and the transforms of `torch.func`
            the plain operations of the reference) or "reference".
        recompute: as in `lstm`.

    Returns:
        Output [T, B, D*P] and the final states, shaped as the initial ones.

    Raises:
        ValueError: `recompute` with a backend that has it not.
    """
    check_backend(backend, recompute)
    covered = native.covers(cell, recurrent_dropout, zoneout, training, lengths)
    chosen = choose_backend(backend, x, w_hr is not None)
    run = _implementation(chosen, covered, recompute)
    if lengths is not None and run is not native.recurrence:
        x = without_padding(x, lengths)
    return run(
        cell,
        x,
        w_ih,
        w_hh,
        b_ih,
        b_hh,
        params,
        state,
        w_hr=w_hr,
        lengths=lengths,
        recurrent_dropout=recurrent_dropout,
        zoneout=zoneout,
        training=training,
        seed=seed,
    )


def _layer(
    cell: str,
    x: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    biases: Sequence[Tensor | None],
    params: Mapping[str, Tensor],
    initial: Mapping[str, Tensor | None],
    *,
    w_hr: Tensor | None = None,
    lengths: Tensor | None,
    recurrent_dropout: float,
    zoneout: float,
    training: bool,
    seed: int | None,
    backend: str,
    recompute: bool,
) -> tuple[Tensor, State]:
    """Validate, add the direction axis, settle the precision, and run."""
    check_backend(backend, recompute)
    check_probability("recurrent_dropout", recurrent_dropout)
    check_probability("zoneout", zoneout)
    spec = CELLS[cell]
    given = {name: s for name, s in initial.items() if s is not None}
    optional = {"b_ih": biases[0], "b_hh": biases[1], "w_hr": w_hr}
    named = {"w_ih": w_ih, "w_hh": w_hh} | {k: v for k, v in optional.items() if v is not None}
    check_tensors({"x": x} | named | dict(params) | given)
    lead = w_ih.dim() == 3
    if not lead:
        named, params, given = ({k: v[None] for k, v in g.items()} for g in (named, params, given))
    check_layer(spec, x, named, params, given)
    if lengths is not None:
        check_lengths(lengths, x.shape[0], x.shape[1], x.device)
    inside, outside = precision(x)
    with without_autocast(x):
        x = x.to(inside)
        named, params, given = (
            {k: v.to(inside) for k, v in g.items()} for g in (named, params, given)
        )
        directions, rows, size = named["w_hh"].shape
        sizes = {"h_0": size, "c_0": rows // spec.gates}
        state = [
            given[name] if name in given else x.new_zeros(directions, x.shape[1], sizes[name])
            for name in initial
        ]
        y, final = recurrence(
            cell,
            x,
            named["w_ih"],
            named["w_hh"],
            named.get("b_ih"),
            named.get("b_hh"),
            params,
            state,
            w_hr=named.get("w_hr"),
            lengths=lengths,
            recurrent_dropout=recurrent_dropout,
            zoneout=zoneout,
            training=training,
            seed=draw_seed() if seed is None else seed,
            backend=backend,
            recompute=recompute,
        )
        return y.to(outside), tuple(s.to(outside) if lead else s.to(outside)[0] for s in final)


def _lstm_cell(params: Mapping[str, Tensor | None]) -> tuple[str, dict[str, Tensor]]:
    given = {name: value for name, value in params.items() if value is not None}
    for cell in ("lstm", "lstm_peephole", "lstm_layernorm"):
        if given.keys() == CELLS[cell].parameters.keys():
            return cell, given
    choices = "; or ".join(
        ", ".join(CELLS[c].parameters) for c in ("lstm_peephole", "lstm_layernorm")
    )
    raise ValueError(
        f"an LSTM takes none of its extra parameters, or all of {choices}; got {', '.join(given)}"
    )


def lstm(
    x: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    h_0: Tensor | None = None,
    c_0: Tensor | None = None,
    *,
    weight_ci: Tensor | None = None,
    weight_cf: Tensor | None = None,
    weight_co: Tensor | None = None,
    weight_ln_ih: Tensor | None = None,
    weight_ln_hh: Tensor | None = None,
    weight_ln_c: Tensor | None = None,
    bias_ln_c: Tensor | None = None,
    w_hr: Tensor | None = None,
    lengths: Tensor | None = None,
    recurrent_dropout: float = 0.0,
    zoneout: float = 0.0,
    training: bool = False,
    seed: int | None = None,
    backend: str = "auto",
    recompute: bool = False,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Run one LSTM layer: plain, with peepholes, or with layer normalisation inside the cell.

    i, f, o = sigmoid(.), g = tanh(.) of W_ih x_t + b_ih + W_hh h_{t-1} + b_hh; c_t = f c_{t-1} + i
    g; h_t = o tanh(c_t). The variants' equations stand in `kernels.reference`.

    Weights, parameters and states may all go without their direction axis; the final states then do
    too.

    Args:
        x: input [T, B, I].
        w_ih: input matrix [D, 4*H, I], gate blocks i, f, g, o; D = 2 adds the direction from last
            step to first.
        w_hh: recurrent matrix [D, 4*H, P]; P = H without projection.
        b_ih: bias [D, 4*H]; None: zero.
        b_hh: second bias [D, 4*H]; None: zero.
        h_0: initial h [D, B, P]; None: zero.
        c_0: initial c [D, B, H]; None: zero.
        weight_ci: peephole from c_{t-1} to i, [D, H]. The three peepholes come together.
        weight_cf: peephole from c_{t-1} to f, [D, H].
        weight_co: peephole from c_t to o, [D, H].
        weight_ln_ih: gain of the normalised input part of the gates, [D, 4*H]. The four
            layer-norm parameters come together.
        weight_ln_hh: gain of the normalised recurrent part, [D, 4*H].
        weight_ln_c: gain of the normalised c_t inside the tanh of the output, [D, H].
        bias_ln_c: its bias, [D, H].
        w_hr: projection [D, P, H] of h (Sak et al. 2014); None: no projection.
        lengths: valid steps of each row, int64 [B] on x's device, any order; None: T everywhere.
            Past its end a row's output is zero; its final state is that of its last step.
        recurrent_dropout: probability in [0, 1) that the recurrent product does not see a unit of
            h, drawn once per sequence (Gal & Ghahramani 2016). Acts in training.
        zoneout: probability in [0, 1) that a unit of h or c keeps its old value at a step (Krueger
            et al. 2016); outside training the expectation is taken.
        training: whether masks are drawn.
        seed: seed of the masks; None draws one from torch's default generator.
        backend: "auto" (triton on a GPU, torch on a CPU), "triton", "torch" or "reference". An
            explicit choice never falls back.
        recompute: keep only h and c for the gradient (with layer norm, the input part of the gates
            too), and rebuild the gates in the backward pass by one product: about a third of the
            memory for one more forward product. Only the Triton kernels have it: no effect where
            "auto" takes torch, as on a CPU.

    Returns:
        y [T, B, D*P] and (h_n [D, B, P], c_n [D, B, H]).

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.
        RuntimeError: T is 0, or the backend cannot do this.
    """
    extra = {
        "weight_ci": weight_ci,
        "weight_cf": weight_cf,
        "weight_co": weight_co,
        "weight_ln_ih": weight_ln_ih,
        "weight_ln_hh": weight_ln_hh,
        "weight_ln_c": weight_ln_c,
        "bias_ln_c": bias_ln_c,
    }
    cell, params = _lstm_cell(extra)
    y, (h_n, c_n) = _layer(
        cell,
        x,
        w_ih,
        w_hh,
        (b_ih, b_hh),
        params,
        {"h_0": h_0, "c_0": c_0},
        w_hr=w_hr,
        lengths=lengths,
        recurrent_dropout=recurrent_dropout,
        zoneout=zoneout,
        training=training,
        seed=seed,
        backend=backend,
        recompute=recompute,
    )
    return y, (h_n, c_n)


def gru(
    x: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    h_0: Tensor | None = None,
    *,
    reset_after: bool = True,
    lengths: Tensor | None = None,
    recurrent_dropout: float = 0.0,
    zoneout: float = 0.0,
    training: bool = False,
    seed: int | None = None,
    backend: str = "auto",
    recompute: bool = False,
) -> tuple[Tensor, Tensor]:
    """Run one GRU layer: h_t = (1 - z) n + z h_{t-1}.

    The textbook's update gate is 1 - z here (Cho et al. 2014 and torch agree with us). What is not
    explained here is as in `lstm`.

    Args:
        x: input [T, B, I].
        w_ih: [D, 3*H, I], gate blocks r, z, n.
        w_hh: [D, 3*H, H].
        b_ih: [D, 3*H] or None.
        b_hh: [D, 3*H] or None.
        h_0: [D, B, H] or None.
        reset_after: True: n = tanh(W_in x + b_in + r (W_hn h + b_hn)), torch's; False: n =
            tanh(W_in x + b_in + W_hn (r h) + b_hn), the original.
        lengths: int64 [B] or None.
        recurrent_dropout: probability in [0, 1).
        zoneout: probability in [0, 1).
        training: whether masks are drawn.
        seed: seed of the masks.
        backend: "auto", "triton", "torch" or "reference".
        recompute: as in `lstm`.

    Returns:
        y [T, B, D*H] and h_n [D, B, H].

    Raises:
        TypeError, ValueError, RuntimeError: as `lstm`.
    """
    y, (h_n,) = _layer(
        "gru" if reset_after else "gru_reset_before",
        x,
        w_ih,
        w_hh,
        (b_ih, b_hh),
        {},
        {"h_0": h_0},
        lengths=lengths,
        recurrent_dropout=recurrent_dropout,
        zoneout=zoneout,
        training=training,
        seed=seed,
        backend=backend,
        recompute=recompute,
    )
    return y, h_n


def rnn(
    x: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    h_0: Tensor | None = None,
    *,
    nonlinearity: str = "tanh",
    lengths: Tensor | None = None,
    recurrent_dropout: float = 0.0,
    zoneout: float = 0.0,
    training: bool = False,
    seed: int | None = None,
    backend: str = "auto",
    recompute: bool = False,
) -> tuple[Tensor, Tensor]:
    """Run one Elman layer: h_t = tanh or relu of W_ih x_t + b_ih + W_hh h_{t-1} + b_hh.

    What is not explained here is as in `lstm`.

    Args:
        x: input [T, B, I].
        w_ih: [D, H, I].
        w_hh: [D, H, H].
        b_ih: [D, H] or None.
        b_hh: [D, H] or None.
        h_0: [D, B, H] or None.
        nonlinearity: "tanh" or "relu".
        lengths: int64 [B] or None.
        recurrent_dropout: probability in [0, 1).
        zoneout: probability in [0, 1).
        training: whether masks are drawn.
        seed: seed of the masks.
        backend: "auto", "triton", "torch" or "reference".
        recompute: as in `lstm`.

    Returns:
        y [T, B, D*H] and h_n [D, B, H].

    Raises:
        TypeError, ValueError, RuntimeError: as `lstm`.
    """
    if nonlinearity not in ("tanh", "relu"):
        raise ValueError(f"nonlinearity must be 'tanh' or 'relu', got {nonlinearity!r}")
    y, (h_n,) = _layer(
        f"rnn_{nonlinearity}",
        x,
        w_ih,
        w_hh,
        (b_ih, b_hh),
        {},
        {"h_0": h_0},
        lengths=lengths,
        recurrent_dropout=recurrent_dropout,
        zoneout=zoneout,
        training=training,
        seed=seed,
        backend=backend,
        recompute=recompute,
    )
    return y, h_n
