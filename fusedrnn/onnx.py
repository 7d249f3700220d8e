"""Export to ONNX: every recurrent layer becomes a standard LSTM, GRU or RNN node.

Needs the extra `onnx`: `pip install "fusedrnn[onnx]"`.
"""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.nn.utils.rnn import PackedSequence
from torch.utils import _pytree as pytree

from .base import RecurrentBase
from .stack import RecurrentStack

# Operators that exist while a graph is exported and have no kernel: each becomes one node.
_ARGUMENTS = "Tensor x, Tensor w, Tensor r, Tensor? b, Tensor? lengths, Tensor? h_0"
torch.library.define(
    "fusedrnn::onnx_lstm",
    f"({_ARGUMENTS}, Tensor? c_0, Tensor? p) -> (Tensor, Tensor, Tensor)",
)
torch.library.define(
    "fusedrnn::onnx_gru", f"({_ARGUMENTS}, bool linear_before_reset) -> (Tensor, Tensor)"
)
torch.library.define("fusedrnn::onnx_rnn", f"({_ARGUMENTS}, str activation) -> (Tensor, Tensor)")

GATE_ORDER = {"LSTM": (0, 3, 1, 2), "GRU": (1, 0, 2), "RNN": (0,)}
"""ONNX's gate blocks as indices of ours: i o f c of i f g o, z r h of r z n."""


def _shapes(x: Tensor, r: Tensor, states: int) -> tuple[Tensor, ...]:
    directions, _, hidden = r.shape
    steps, batch, _ = x.shape
    final = [x.new_empty(directions, batch, hidden) for _ in range(states)]
    return (x.new_empty(steps, batch, directions * hidden), *final)


@torch.library.register_fake("fusedrnn::onnx_lstm")
def _(
    x: Tensor,
    w: Tensor,
    r: Tensor,
    b: Tensor | None,
    lengths: Tensor | None,
    h_0: Tensor | None,
    c_0: Tensor | None,
    p: Tensor | None,
) -> tuple[Tensor, ...]:
    return _shapes(x, r, 2)


def _hidden_shapes(
    x: Tensor,
    w: Tensor,
    r: Tensor,
    b: Tensor | None,
    lengths: Tensor | None,
    h_0: Tensor | None,
    _: object,
) -> tuple[Tensor, ...]:
    return _shapes(x, r, 1)


torch.library.register_fake("fusedrnn::onnx_gru", _hidden_shapes)
torch.library.register_fake("fusedrnn::onnx_rnn", _hidden_shapes)


def _translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """For each operator, what writes its ONNX node."""
    from onnxscript import INT32
    from onnxscript import opset18 as op

    def shared(w: Any, r: Any, lengths: Any) -> tuple[Any, dict[str, Any]]:
        directions, _, hidden = r.shape
        direction = "bidirectional" if int(directions) == 2 else "forward"
        steps = None if lengths is None else op.Cast(lengths, to=INT32.dtype)
        return steps, {"hidden_size": int(hidden), "direction": direction}

    def rows(y: Any) -> Any:
        """From [T, D, B, H] to [T, B, D*H]."""
        shape: Any = op.Constant(value_ints=[0, 0, -1])
        return op.Reshape(op.Transpose(y, perm=[0, 2, 1, 3]), shape)

    def lstm(x, w, r, b=None, lengths=None, h_0=None, c_0=None, p=None):
        steps, attributes = shared(w, r, lengths)
        y, h_n, c_n = op.LSTM(x, w, r, b, steps, h_0, c_0, p, **attributes)
        return rows(y), h_n, c_n

    def gru(x, w, r, b=None, lengths=None, h_0=None, linear_before_reset: bool = True):
        steps, attributes = shared(w, r, lengths)
        reset = int(linear_before_reset)
        y, h_n = op.GRU(x, w, r, b, steps, h_0, linear_before_reset=reset, **attributes)
        return rows(y), h_n

    def rnn(x, w, r, b=None, lengths=None, h_0=None, activation: str = "Tanh"):
        steps, attributes = shared(w, r, lengths)
        activations = [activation] * int(r.shape[0])
        y, h_n = op.RNN(x, w, r, b, steps, h_0, activations=activations, **attributes)
        return rows(y), h_n

    ops = torch.ops.fusedrnn
    return {ops.onnx_lstm.default: lstm, ops.onnx_gru.default: gru, ops.onnx_rnn.default: rnn}


class _Nodes(nn.Module):
    """Stands for a recurrent layer while it is exported, its weights in ONNX's order."""

    def __init__(self, layer: RecurrentBase) -> None:
        super().__init__()
        self.layer_count = layer.num_layers
        self.directions = layer.num_directions
        self.batch_first = layer.batch_first
        self.input_size = layer.input_size
        self.kind = layer.mode.partition("_")[0]
        self.option = {
            "gru": True,
            "gru_reset_before": False,
            "rnn_tanh": "Tanh",
            "rnn_relu": "Relu",
        }.get(layer.cell)
        self.states = 2 if self.kind == "LSTM" else 1
        for index in range(layer.num_layers):
            stacked = {
                name: self._stack(layer, f"{name}_l{index}", GATE_ORDER[self.kind])
                for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")[
                    : 4 if layer.bias else 2
                ]
            }
            self.register_buffer(f"W_l{index}", stacked["weight_ih"])
            self.register_buffer(f"R_l{index}", stacked["weight_hh"])
            biases = [stacked[name] for name in ("bias_ih", "bias_hh") if name in stacked]
            self.register_buffer(f"B_l{index}", torch.cat(biases, 1) if biases else None)
            peepholes = [
                self._stack(layer, f"weight_c{gate}_l{index}", (0,))
                for gate in ("iof" if layer.cell == "lstm_peephole" else "")
            ]
            self.register_buffer(f"P_l{index}", torch.cat(peepholes, 1) if peepholes else None)

    def _stack(self, layer: RecurrentBase, name: str, order: Sequence[int]) -> Tensor:
        """One parameter of all directions, [D, rows, ...], its gate blocks reordered."""
        suffixes = ("", "_reverse")[: self.directions]
        each = [getattr(layer, name + suffix).detach().chunk(len(order)) for suffix in suffixes]
        return torch.stack([torch.cat([blocks[gate] for gate in order]) for blocks in each])

    def forward(
        self,
        input: Tensor,
        hx: Tensor | tuple[Tensor, Tensor] | None = None,
        lengths: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | tuple[Tensor, ...]]:
        if isinstance(input, PackedSequence) or input.dim() != 3:
            raise ValueError("ONNX has no packed or unbatched layers: give 3-D input and lengths")
        y = input.transpose(0, 1) if self.batch_first else input
        initial = (None,) * self.states if hx is None else hx if isinstance(hx, tuple) else (hx,)
        finals: list[list[Tensor]] = []
        for index in range(self.layer_count):
            part = slice(index * self.directions, (index + 1) * self.directions)
            weights = (getattr(self, f"{name}_l{index}") for name in "WRB")
            state = [None if s is None else s[part] for s in initial]
            y, *final = self._node(index, y, *weights, lengths, *state)
            finals.append(final)
        y = y.transpose(0, 1) if self.batch_first else y
        h_n, *c_n = (torch.cat(s) for s in zip(*finals, strict=True))
        return y, (h_n, *c_n) if c_n else h_n

    def _node(self, index: int, *arguments: Tensor | None) -> tuple[Tensor, ...]:
        last = getattr(self, f"P_l{index}") if self.kind == "LSTM" else self.option
        return getattr(torch.ops.fusedrnn, f"onnx_{self.kind.lower()}")(*arguments, last)


class _Adapter(nn.Module):
    """Calls a module with a list of tensors and returns its results as a flat tuple."""

    def __init__(self, module: nn.Module, names: Sequence[str]) -> None:
        super().__init__()
        self.module = module
        self.names = list(names)

    def forward(self, tensors: list[Tensor]) -> tuple[Tensor, ...]:
        named = dict(zip(self.names, tensors, strict=True))
        if isinstance(self.module, _Nodes):
            x, states = named.pop("x"), [v for k, v in named.items() if k != "lengths"]
            hx = None if not states else states[0] if len(states) == 1 else tuple(states)
            result = self.module(x, hx, named.get("lengths"))
        elif isinstance(self.module, RecurrentStack):
            result = self.module(named["x"], self._stack_states(named), named.get("lengths"))
        else:
            result = self.module(**named)
        return tuple(pytree.tree_leaves(result))

    def _stack_states(self, named: Mapping[str, Tensor]) -> list[Any] | None:
        if "h_0_l0" not in named:
            return None
        layers = [
            [named[f"{s}_0_l{index}"] for s in "hc" if f"{s}_0_l{index}" in named]
            for index in range(sum(name.startswith("h_0_l") for name in named))
        ]
        return [tuple(states) if len(states) > 1 else states[0] for states in layers]


def export(
    module: nn.Module,
    path: str | Path,
    inputs: Mapping[str, Tensor] | None = None,
    dimensions: Mapping[str, Sequence[str | None]] | None = None,
    outputs: Sequence[str] | None = None,
    *,
    lengths: bool = False,
    initial_state: bool = False,
) -> None:
    """Write a module as an ONNX file in which recurrent layers are LSTM, GRU and RNN nodes.

    It is exported as in evaluation, whatever mode it is in. The numbers of time steps and rows stay
    free. A layer takes `x`, then `lengths` (int64 [B]) and the initial states `h_0`, `c_0` where
    asked for, and gives `y`, `h_n`, `c_n`, all in the shapes of its `forward`; in a
    `RecurrentStack` the names of states end in `_l0`, `_l1`, ... Lengths must be at least 1 and at
    most T, which no node checks.

    Args:
        module: an LSTM, GRU, RNN or RecurrentStack, or any module that holds such; float32.
        path: the file to write.
        inputs: for any other module: keyword arguments of its `forward` by name, examples whose
            free dimensions are 2 or more.
        dimensions: for any other module: for each input the names of its dimensions, None for a
            fixed one; dimensions of one name are equal.
        outputs: for any other module: names of the tensors that it returns, in order.
        lengths: for a layer or stack: whether the graph takes `lengths`.
        initial_state: for a layer or stack: whether the graph takes initial states; they are zero
            otherwise.

    Raises:
        ValueError: a layer has what ONNX cannot express (zoneout, layer normalisation inside the
            cell, a projection) or is not float32; or the inputs are missing.
        ImportError: onnx or onnxscript is not installed.
    """
    for package in ("onnx", "onnxscript"):
        if importlib.util.find_spec(package) is None:
            raise ImportError(
                f'the export needs {package}, which is not installed: pip install "fusedrnn[onnx]"'
            )
    for name, layer in module.named_modules():
        if isinstance(layer, RecurrentBase):
            _check(name or type(layer).__name__, layer)
    if isinstance(module, RecurrentBase | RecurrentStack):
        inputs, dimensions, outputs = _signature(module, lengths, initial_state)
    elif inputs is None or dimensions is None or outputs is None:
        raise ValueError(f"inputs, dimensions and outputs are needed for a {type(module).__name__}")
    free = {dim: Dim(dim) for dims in dimensions.values() for dim in dims if dim is not None}
    shapes = [
        {axis: free[dim] for axis, dim in enumerate(dimensions[name]) if dim is not None}
        for name in inputs
    ]
    adapter = _Adapter(_with_nodes(module), list(inputs)).eval()
    program = torch.onnx.export(
        adapter,
        (list(inputs.values()),),
        dynamo=True,
        input_names=list(inputs),
        output_names=list(outputs),
        dynamic_shapes=(shapes,),
        custom_translation_table=_translations(),
        verbose=False,
    )
    assert program is not None  # it is None only for a path
    program.save(str(path))


def _check(name: str, layer: RecurrentBase) -> None:
    missing = {
        "zoneout": layer.zoneout > 0,
        "layer normalisation inside the cell": layer.cell == "lstm_layernorm",
        "projection (proj_size)": layer.proj_size > 0,
    }
    for what, present in missing.items():
        if present:
            raise ValueError(f"{name}: ONNX's {layer.mode.partition('_')[0]} node has no {what}")
    dtype = layer.weight_ih_l0.dtype
    if dtype != torch.float32:
        raise ValueError(f"{name}: the export needs float32, got {dtype}; call module.float()")


def _signature(
    module: RecurrentBase | RecurrentStack, lengths: bool, initial_state: bool
) -> tuple[dict[str, Tensor], dict[str, Sequence[str | None]], list[str]]:
    """Inputs, their dimensions and the names of the outputs of a layer or stack."""
    steps, batch = 3, 2
    shape = (batch, steps) if module.batch_first else (steps, batch)
    inputs = {"x": torch.zeros(*shape, module.input_size)}
    dimensions: dict[str, Sequence[str | None]] = {
        "x": ("B", "T", None) if module.batch_first else ("T", "B", None)
    }
    if lengths:
        inputs["lengths"] = torch.full((batch,), steps)
        dimensions["lengths"] = ("B",)
    stacked = isinstance(module, RecurrentStack)
    outputs = ["y"]
    layers = [m for m in module.modules() if isinstance(m, RecurrentBase)]
    for index, layer in enumerate(layers):
        suffix = f"_l{index}" if stacked else ""
        for state in "hc" if layer.mode == "LSTM" else "h":
            outputs.append(f"{state}_n{suffix}")
            if initial_state:
                name = f"{state}_0{suffix}"
                count = layer.num_layers * layer.num_directions
                inputs[name] = torch.zeros(count, batch, layer.hidden_size)
                dimensions[name] = (None, "B", None)
    return inputs, dimensions, outputs


def _with_nodes(module: nn.Module) -> nn.Module:
    """A copy on the CPU, its recurrent layers replaced."""
    module = copy.deepcopy(module).cpu()
    if isinstance(module, RecurrentBase):
        return _Nodes(module)
    for name, layer in list(module.named_modules()):
        if isinstance(layer, RecurrentBase):
            parent, _, child = name.rpartition(".")
            setattr(module.get_submodule(parent), child, _Nodes(layer))
    return module
