"""The kernels on a card: what the interpreter cannot show, races, fences, graphs, streams."""

import pytest
import torch

from fusedrnn import GRU, LSTM
from kernels import CELLS, ops
from kernels.persistent import launch
from tests.kernels.cases import outputs_and_gradients, random_layer
from tests.kernels.triton_cases import assert_accurate, poison, relative_error, to_device

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
DEVICE = "cuda"
DTYPES = {
    "fp32": torch.float32,
    "tf32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
}


def layer_of(cell, dtype=torch.float32, **shape):
    """Weights of the usual size 1 / sqrt(H): larger ones make long recurrences chaotic."""
    shape = {"steps": 20, "batch": 33, "inputs": 16, "hidden": 64, "directions": 2} | shape
    layer = random_layer(cell, dtype=torch.float64, **shape)
    scale = 2 * shape["hidden"] ** -0.5
    with torch.no_grad():
        layer.w_ih.mul_(0.5)
        layer.w_hh.mul_(scale)
    return to_device(layer, DEVICE, dtype)


def lengths_of(layer):
    steps, batch = layer.x.shape[:2]
    lengths = torch.randint(0, steps + 1, (batch,), generator=torch.Generator().manual_seed(0))
    return lengths.to(DEVICE)


def run(layer, **options):
    return outputs_and_gradients(ops.recurrence, layer, **options)


def assert_equal(first, second):
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


@pytest.fixture
def tf32(request):
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


@pytest.mark.parametrize("hidden", [64, 512])
def test_programs_meet(hidden, monkeypatch):
    """First of all, with bounded waits: what would hang elsewhere is an error here."""
    monkeypatch.setattr(launch, "BARRIER", "bounded")
    layer = layer_of("lstm", torch.bfloat16, hidden=hidden, steps=3)
    assert all(value.isfinite().all() for value in run(layer).values())


@pytest.mark.parametrize("hidden", [37, 64, 200, 512, 1024, 1500])
@pytest.mark.parametrize("precision", DTYPES)
@pytest.mark.parametrize("cell", CELLS)
def test_agrees_with_float64(cell, precision, hidden, request):
    if precision == "tf32":
        request.getfixturevalue("tf32")
    layer = layer_of(cell, DTYPES[precision], hidden=hidden)
    assert_accurate(ops.recurrence, layer, lengths=lengths_of(layer))


@pytest.mark.parametrize(
    "shape", [{"steps": 1}, {"batch": 1}, {"hidden": 1}, {"batch": 300}], ids=lambda s: str(s)
)
@pytest.mark.parametrize("cell", ["lstm", "gru_reset_before"])
def test_edges(cell, shape):
    assert_accurate(ops.recurrence, layer_of(cell, **shape))


@pytest.mark.parametrize("hidden", [1, 2, 15, 16, 17, 100, 129, 768, 2048])
@pytest.mark.parametrize("cell", ["lstm", "gru_reset_before"])
def test_hidden_sizes(cell, hidden):
    layer = layer_of(cell, torch.bfloat16, hidden=hidden, steps=5)
    assert_accurate(ops.recurrence, layer, lengths=lengths_of(layer))


@pytest.mark.parametrize("busy", [False, True], ids=["alone", "busy"])
@pytest.mark.parametrize("cell", CELLS)
def test_a_hundred_runs_are_bitwise_equal(cell, busy):
    layer = layer_of(cell, torch.bfloat16, hidden=512, steps=32)
    first = run(layer)
    other = torch.cuda.Stream() if busy else None
    a = torch.randn(2048, 2048, device=DEVICE).bfloat16()
    out = torch.empty_like(a)
    torch.cuda.synchronize()
    for _ in range(100):
        with torch.cuda.stream(other):  # None: nothing changes
            for _ in range(20 if busy else 0):
                torch.mm(a, a, out=out)
        assert_equal(run(layer), first)


@pytest.mark.parametrize("hidden", [64, 200])
@pytest.mark.parametrize("ragged", [False, True], ids=["full", "lengths"])
@pytest.mark.parametrize("cell", CELLS)
def test_unwritten_memory_is_never_read(cell, ragged, hidden, monkeypatch):
    layer = layer_of(cell, torch.bfloat16, hidden=hidden)
    options = {"lengths": lengths_of(layer)} if ragged else {}
    expected = run(layer, **options)
    poison(monkeypatch)
    assert_equal(run(layer, **options), expected)


@pytest.mark.parametrize("variant", ["load", "bounded"])
def test_barrier_variants_agree(variant, monkeypatch):
    layer = layer_of("lstm", torch.bfloat16, hidden=512, steps=64)
    expected = run(layer)
    monkeypatch.setattr(launch, "BARRIER", variant)
    assert_equal(run(layer), expected)


def test_more_steps_than_sixteen_bits_count():
    steps = 70_000
    layer = LSTM(4, 32, backend="triton").to(DEVICE)
    exact = torch.nn.LSTM(4, 32).to(DEVICE, torch.float64)
    exact.load_state_dict(layer.state_dict())
    x = torch.randn(steps, 2, 4, device=DEVICE, requires_grad=True)
    cotangent = torch.randn(steps, 2, 32, device=DEVICE)
    y, _ = layer(x)
    first, state = exact(x[: steps // 2].double())  # cuDNN takes no more than 65,535 steps at once
    second, _ = exact(x[steps // 2 :].double(), state)
    expected = torch.cat([first, second])
    # A contractive recurrence forgets its roundings: a few units remain, however long it is.
    assert (y - expected).abs().max() < 50 * torch.finfo(torch.float32).eps
    (actual,) = torch.autograd.grad(y, x, cotangent)
    (wanted,) = torch.autograd.grad(expected, x, cotangent.double())
    assert relative_error(actual, wanted.double()) < 1e-5


def test_more_elements_than_32_bits_count():
    steps, batch, size = 4352, 128, 1024  # of gates: 2.3e9
    layer = LSTM(16, size, backend="triton").to(DEVICE, torch.bfloat16)
    x = torch.randn(steps, batch, 16, device=DEVICE, dtype=torch.bfloat16)
    with torch.no_grad():
        y, final = layer(x)
        first, state = layer(x[: steps // 2])
        second, last = layer(x[steps // 2 :], state)
    # Far below what another element's value would do; cuBLAS may round a shorter product otherwise.
    torch.testing.assert_close(y[: steps // 2], first, atol=0.03, rtol=0)
    torch.testing.assert_close(y[steps // 2 :], second, atol=0.03, rtol=0)
    torch.testing.assert_close(final[0], last[0], atol=0.03, rtol=0)


def test_streams_side_by_side():
    layers = [layer_of("lstm", torch.bfloat16, hidden=1024, steps=64, seed=seed) for seed in (0, 1)]
    expected = [run(layer) for layer in layers]
    torch.cuda.synchronize()
    results = []
    for layer in layers:
        with torch.cuda.stream(torch.cuda.Stream()):
            results.append(run(layer))
    torch.cuda.synchronize()
    for result, value in zip(results, expected, strict=True):
        assert_equal(result, value)


@pytest.mark.parametrize("ragged", [False, True], ids=["full", "lengths"])
@pytest.mark.parametrize("hidden", [64, 512])
def test_cuda_graph(hidden, ragged):
    layer = LSTM(16, hidden, bidirectional=True, backend="triton").to(DEVICE, torch.bfloat16)
    x = torch.randn(20, 32, 16, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    cotangent = torch.randn(20, 32, 2 * hidden, device=DEVICE, dtype=torch.bfloat16)
    lengths = torch.arange(32, device=DEVICE) % 20 + 1 if ragged else None

    def step():
        y, _ = layer(x, lengths=lengths)
        return y, *torch.autograd.grad(y, [x, *layer.parameters()], cotangent)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for _ in range(3):
        with torch.no_grad():
            x.normal_()
        expected = step()
        for value in captured:
            value.detach().zero_()
        graph.replay()
        assert torch.equal(captured[0], expected[0])
        torch.testing.assert_close(captured, expected)


@pytest.mark.parametrize("layer", [LSTM, GRU])
def test_compiled_by_inductor(layer):
    net = layer(16, 200, num_layers=2, bidirectional=True, backend="triton").to(DEVICE)
    x = torch.randn(20, 32, 16, device=DEVICE, requires_grad=True)
    y, _ = torch.compile(net, fullgraph=True)(x)
    expected, _ = net(x)
    torch.testing.assert_close(y, expected)
    (actual,) = torch.autograd.grad(y.sum(), x)
    (wanted,) = torch.autograd.grad(expected.sum(), x)
    torch.testing.assert_close(actual, wanted)


def test_autocast_and_grad_scaler():
    layer = LSTM(16, 128, backend="triton").to(DEVICE)
    optimizer = torch.optim.SGD(layer.parameters(), 0.1)
    scaler = torch.amp.GradScaler("cuda")
    x = torch.randn(20, 32, 16, device=DEVICE)
    before = layer.weight_hh_l0.detach().clone()
    with torch.autocast("cuda", torch.float16):
        loss = layer(x)[0].float().square().mean()
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    assert layer.weight_hh_l0.isfinite().all()
    assert not torch.equal(layer.weight_hh_l0, before)


@pytest.mark.parametrize("cell", ["lstm", "gru"])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_agrees_with_cudnn(cell, bidirectional):
    sizes, shape = (16, 256), {"num_layers": 2, "bidirectional": bidirectional}
    theirs = {"lstm": torch.nn.LSTM, "gru": torch.nn.GRU}[cell](*sizes, **shape).to(DEVICE)
    ours = {"lstm": LSTM, "gru": GRU}[cell](*sizes, **shape, backend="triton").to(DEVICE)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(50, 32, 16, device=DEVICE)
    torch.testing.assert_close(ours(x)[0], theirs(x)[0], atol=1e-3, rtol=0)  # cuDNN may use tf32
