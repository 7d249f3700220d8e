"""The table of recurrent cells: what each one computes with, in one place."""

from __future__ import annotations

from dataclasses import dataclass, field

LAYER_NORM_EPS = 1e-5


@dataclass(frozen=True)
class CellSpec:
    """What a recurrence needs to know of a cell, apart from its equations.

    Attributes:
        name: key in `CELLS`; the step in every backend carries the same name.
        gates: number G of gate blocks; weight matrices have G*H rows, in torch's gate order.
        states: state tensors carried through time, `("h",)` or `("h", "c")`.
        parameters: extra parameters, name -> size as a multiple of H.
        exchanges: times per step that programs sharing one sequence must exchange data.
        torch_name: torch's own fused kernel for the cell (`torch.lstm`, `torch.gru`, ...), or None.
    """

    name: str
    gates: int
    states: tuple[str, ...]
    parameters: dict[str, int] = field(default_factory=dict)
    exchanges: int = 1
    torch_name: str | None = None


CELLS: dict[str, CellSpec] = {
    spec.name: spec
    for spec in (
        CellSpec("rnn_tanh", 1, ("h",), torch_name="rnn_tanh"),
        CellSpec("rnn_relu", 1, ("h",), torch_name="rnn_relu"),
        CellSpec("lstm", 4, ("h", "c"), torch_name="lstm"),
        CellSpec("lstm_peephole", 4, ("h", "c"), {"weight_ci": 1, "weight_cf": 1, "weight_co": 1}),
        CellSpec(
            "lstm_layernorm",
            4,
            ("h", "c"),
            {"weight_ln_ih": 4, "weight_ln_hh": 4, "weight_ln_c": 1, "bias_ln_c": 1},
            exchanges=3,
        ),
        CellSpec("gru", 3, ("h",), torch_name="gru"),
        CellSpec("gru_reset_before", 3, ("h",), exchanges=2),
    )
}
