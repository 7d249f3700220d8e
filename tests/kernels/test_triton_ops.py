"""The operators as torch sees them: schemas, fakes, compilation, errors."""

import contextlib
import os
import subprocess
import sys
from functools import partial

import pytest
import torch
from torch.utils._pytree import tree_leaves
from triton.runtime import interpreter

import kernels
import kernels.attention.ops
import kernels.crf
from fusedrnn import GRU, LSTM, RNN, RecurrentStack
from kernels import ops
from kernels.persistent import plan as planning
from tests.kernels import attention_cases
from tests.kernels.cases import outputs, outputs_and_gradients, random_layer
from tests.kernels.crf import crf_cases
from tests.kernels.triton_cases import DEVICE

pytestmark = pytest.mark.skipif(
    DEVICE == "cuda", reason="written for the interpreter's CPU tensors"
)
MASKS = (7, 0.3, 0.2, True)


def small(cell, **shape):
    return random_layer(cell, 2, 3, 4, 5, directions=2, dtype=torch.float32, **shape)


def forward_arguments(cell, save="all"):
    layer = small(cell)
    gates = ops._input_part(
        cell,
        layer.x,
        layer.w_ih,
        layer.b_ih,
        *([layer.params["weight_ln_ih"]] if cell == "lstm_layernorm" else []),
    )
    names = planning.loop_parameters(cell)
    packed = torch.cat([layer.params[n] for n in names], -1) if names else None
    lengths = torch.tensor([2, 1, 2])
    tensors = (gates, layer.w_hh, layer.b_hh, packed, layer.state, lengths)

    def detach(value):
        if isinstance(value, list):
            return [tensor.detach() for tensor in value]
        return None if value is None else value.detach()

    return (*map(detach, tensors), cell, *MASKS, save)


@pytest.mark.parametrize("save", ["all", "state", "nothing"])
@pytest.mark.parametrize("cell", ["lstm_layernorm", "gru", "rnn_tanh"])
def test_forward_operator(cell, save):
    torch.library.opcheck(ops.recurrence_op, forward_arguments(cell, save))


@pytest.mark.parametrize("cell", ["lstm_layernorm", "gru", "rnn_tanh"])
def test_backward_operator(cell):
    arguments = forward_arguments(cell)
    _, w_hh, _, packed, state, lengths = arguments[:6]
    y, h_n, c_n, *saved = ops.recurrence_op(*arguments)
    final = [h_n, c_n][: len(state)]
    torch.library.opcheck(
        ops.backward_op, (y, final, w_hh, packed, state, y, saved, lengths, cell, *MASKS)
    )


@pytest.mark.parametrize("recompute", [False, True], ids=["saved", "recomputed"])
def test_compiles_whole_with_dynamic_steps_and_rows(recompute):
    def run(x, w_ih, w_hh, h_0, c_0):
        y, (h_n, c_n) = ops.recurrence(
            "lstm", x, w_ih, w_hh, None, None, {}, (h_0, c_0), recompute=recompute
        )
        return y.square().sum() + h_n.sum() + c_n.sum()

    compiled = torch.compile(run, fullgraph=True, dynamic=True, backend="aot_eager")
    counter = torch._dynamo.testing.CompileCounter()
    for steps, batch in [(2, 3), (4, 2), (3, 5)]:
        layer = random_layer("lstm", steps, batch, 4, 5, bias=False, dtype=torch.float32)
        leaves = [layer.x, layer.w_ih, layer.w_hh, *layer.state]
        expected = torch.autograd.grad(run(*leaves), leaves)
        actual = torch.autograd.grad(compiled(*leaves), leaves)
        for a, e in zip(actual, expected, strict=True):
            torch.testing.assert_close(a, e)
    torch._dynamo.reset()
    torch.compile(run, fullgraph=True, dynamic=True, backend=counter)(*leaves)
    for steps in (6, 7):
        x = torch.randn(steps, 5, 4, requires_grad=True)
        torch.compile(run, fullgraph=True, dynamic=True, backend=counter)(x, *leaves[1:])
    assert counter.frame_count == 1


@pytest.mark.parametrize("layer", [LSTM, GRU])
def test_layer_compiles_whole(layer):
    torch._dynamo.reset()
    net = layer(4, 5, num_layers=2, bidirectional=True, backend="triton")
    x = torch.randn(3, 2, 4)
    y, _ = torch.compile(net, fullgraph=True, backend="aot_eager")(x)
    expected, _ = net(x)
    torch.testing.assert_close(y, expected)


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_layers_agree_with_torch(cell):
    torch.manual_seed(0)
    ours = {"lstm": LSTM, "gru": GRU}[cell](
        4, 5, num_layers=2, bidirectional=True, backend="triton"
    )
    theirs = {"lstm": torch.nn.LSTM, "gru": torch.nn.GRU}[cell](4, 5, 2, bidirectional=True)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(3, 2, 4)
    torch.testing.assert_close(ours(x)[0], theirs(x)[0])


LAYERS = [
    pytest.param(partial(layer, 4, 5, num_layers=2, bidirectional=True, **options), id=name)
    for name, layer, options in (
        ("lstm", LSTM, {}),
        ("lstm_peephole", LSTM, {"peephole": True}),
        ("lstm_layernorm", LSTM, {"layer_norm": True}),
        ("gru", GRU, {"recurrent_dropout": 0.3, "zoneout": 0.2}),
        ("gru_reset_before", GRU, {"reset_after": False}),
        ("rnn", RNN, {"nonlinearity": "relu"}),
    )
] + [pytest.param(partial(RecurrentStack, 4, [5, 6], ["gru", "lstm"], residual=True), id="stack")]


@pytest.mark.parametrize("make", LAYERS)
def test_layers_that_recompute_have_the_same_gradients_and_keep_less(make):
    results, kept = [], []
    for recompute in (False, True):
        torch.manual_seed(0)
        layer = make(backend="triton", recompute=recompute)
        x = torch.randn(4, 3, 4, requires_grad=True)
        saved = {}

        def keep(tensor, saved=saved):
            saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            y, final = layer(x, lengths=torch.tensor([4, 1, 2]))
        loss = sum((i + 1) * r.square().sum() for i, r in enumerate(tree_leaves((y, final))))
        results.append([y, *torch.autograd.grad(loss, [x, *layer.parameters()])])
        kept.append(sum(saved.values()))
    torch.testing.assert_close(results[1], results[0])
    assert kept[1] < kept[0]


@pytest.mark.parametrize(("run", "gates"), [(kernels.lstm, 4), (kernels.gru, 3), (kernels.rnn, 1)])
def test_functions_reach_the_recomputation(run, gates, monkeypatch):
    used = []
    rebuild = ops.rebuild
    monkeypatch.setattr(ops, "rebuild", lambda *rest: used.append(1) or rebuild(*rest))
    torch.manual_seed(0)
    weights = [torch.randn(gates * 5, n, requires_grad=True) for n in (4, 5)]
    x = torch.randn(3, 2, 4)
    plain, recomputed = (
        torch.autograd.grad(
            run(x, *weights, backend="triton", recompute=recompute)[0].square().sum(), weights
        )
        for recompute in (False, True)
    )
    assert used == [1]
    torch.testing.assert_close(recomputed, plain)


def test_autocast_reaches_the_kernels():
    layer = LSTM(4, 5, backend="triton")
    with torch.autocast("cpu", torch.bfloat16):
        y, _ = layer(torch.randn(3, 2, 4))
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert layer.weight_hh_l0.grad.dtype == torch.float32


def test_views_and_expanded_cotangents():
    layer = small("gru")
    x = layer.x.detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
    strided = layer._replace(x=x, w_hh=layer.w_hh.detach().mT.contiguous().mT.requires_grad_())
    expected = outputs_and_gradients(ops.recurrence, layer)
    for name, value in outputs_and_gradients(ops.recurrence, strided).items():
        torch.testing.assert_close(value, expected[name])
    y = outputs(ops.recurrence, layer)["y"]
    y.sum().backward()


def spread_out(tensor):
    """The same values, each with another behind it."""
    return torch.stack([tensor, torch.full_like(tensor, 9)], -1)[..., 0]


def test_lengths_biases_and_parameters_need_not_lie_densely():
    layer, lengths = small("lstm_peephole"), torch.tensor([2, 1, 2])
    arguments = [*forward_arguments("lstm_peephole")]
    expected = ops.recurrence_op(*arguments)
    for index in (2, 3, 5):
        arguments[index] = spread_out(arguments[index])
    for actual, value in zip(ops.recurrence_op(*arguments), expected, strict=True):
        assert torch.equal(actual, value)
    expected = outputs_and_gradients(ops.recurrence, layer, lengths=lengths)
    actual = outputs_and_gradients(ops.recurrence, layer, lengths=spread_out(lengths))
    for name, value in expected.items():
        assert torch.equal(actual[name], value), name


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_fake_gradients_of_states_lie_as_the_real_ones(cell):
    arguments = [*forward_arguments(cell)]
    arguments[4] = [state.transpose(0, 1).contiguous().transpose(0, 1) for state in arguments[4]]
    _, w_hh, _, packed, state, lengths = arguments[:6]
    y, h_n, c_n, *saved = ops.recurrence_op(*arguments)
    final = [h_n, c_n][: len(state)]
    torch.library.opcheck(
        ops.backward_op, (y, final, w_hh, packed, state, y, saved, lengths, cell, *MASKS)
    )


def test_launches_are_on_the_device_of_their_tensors(monkeypatch):
    """Triton launches on the current device, which need not be the tensors'."""
    guards, launches = [], []

    @contextlib.contextmanager
    def device_of(tensor):
        guards.append(tensor.device)
        yield
        guards.pop()

    real = interpreter.GridExecutor.__call__

    def launch(self, *arguments, **options):
        launches.append([*guards])
        return real(self, *arguments, **options)

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    monkeypatch.setattr(interpreter.GridExecutor, "__call__", launch)
    outputs_and_gradients(ops.recurrence, small("lstm"))
    attention_cases.outputs_and_gradients(
        kernels.attention.ops.decode, attention_cases.random_case(dtype=torch.float32)
    )
    problem = crf_cases.random_problem()
    crf_cases.results(problem, "triton")
    kernels.crf.n_best(*problem[:5], n=1, backend="triton")
    # The CRF's sums: of three values forward, of two and the marginals backward; then the paths.
    assert launches == [[torch.device("cpu")]] * (2 + 2 + 6 + 1)


def test_gradient_of_a_gradient_names_the_reference():
    layer = small("lstm")
    y = outputs(ops.recurrence, layer)["y"]
    with pytest.raises(RuntimeError, match="backend='reference'"):
        torch.autograd.grad(y.sum(), layer.x, create_graph=True)


def test_float64_and_projection_are_refused():
    with pytest.raises(ValueError, match="backend='reference' for float64"):
        outputs(ops.recurrence, random_layer("lstm"))
    with pytest.raises(ValueError, match="proj_size needs backend='torch'"):
        outputs(ops.recurrence, random_layer("lstm", projected=2, dtype=torch.float32))


def test_cpu_tensor_outside_the_interpreter_is_refused():
    code = "import torch, fusedrnn\nfusedrnn.LSTM(2, 3, backend='triton')(torch.zeros(1, 1, 2))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=_environment()
    )
    assert done.returncode != 0
    assert "backend='triton' needs a CUDA tensor" in done.stderr.splitlines()[-1]


def _environment():
    return {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONPATH": "."}


def test_kernels_do_not_import_fusedrnn():
    code = (
        "import sys, kernels.ops, kernels\n"
        "assert kernels.lstm\n"
        "assert not {'fusedrnn', 'lightning', 'lightning_modules'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env=_environment())
    assert kernels.lstm
