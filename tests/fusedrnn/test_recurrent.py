import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import fusedrnn

I, H, B, T = 5, 7, 4, 6  # noqa: E741
LENGTHS = torch.tensor([3, 6, 1, 5])

KINDS = ["LSTM", "GRU", "RNN"]
SHAPES = [
    pytest.param({}, id="plain"),
    pytest.param({"num_layers": 2, "bidirectional": True}, id="2-layers-bidirectional"),
    pytest.param({"bias": False, "batch_first": True}, id="no-bias-batch_first"),
]
VARIANTS = [
    pytest.param("LSTM", {}, id="LSTM"),
    pytest.param("LSTM", {"peephole": True}, id="LSTM-peephole"),
    pytest.param("LSTM", {"layer_norm": True}, id="LSTM-layer_norm"),
    pytest.param("LSTM", {"proj_size": 3}, id="LSTM-proj_size"),
    pytest.param("GRU", {}, id="GRU"),
    pytest.param("GRU", {"reset_after": False}, id="GRU-reset_before"),
    pytest.param("RNN", {}, id="RNN"),
    pytest.param("RNN", {"nonlinearity": "relu"}, id="RNN-relu"),
]


def pair(kind, **options):
    """Our layer and torch's, from the same seed."""
    layers = []
    for module in (fusedrnn, nn):
        torch.manual_seed(0)
        layers.append(getattr(module, kind)(I, H, **options))
    return layers


def flat(results):
    """The tensors of (output, state) in order."""
    tensors = []
    for result in results:
        if isinstance(result, PackedSequence):
            tensors.append(result.data)
        elif isinstance(result, torch.Tensor):
            tensors.append(result)
        else:
            tensors += result
    return tensors


def gradients(layer, results, *inputs):
    generator = torch.Generator().manual_seed(2)
    loss = sum((r * torch.randn(r.shape, generator=generator)).sum() for r in flat(results))
    return torch.autograd.grad(loss, [*inputs, *layer.parameters()])


def initial(kind, layers, directions, batch=B, projected=None):
    sizes = (projected or H, H)[: 2 if kind == "LSTM" else 1]
    state = tuple(torch.randn(layers * directions, batch, s, requires_grad=True) for s in sizes)
    return state if kind == "LSTM" else state[0]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", KINDS)
def test_same_seed_gives_torchs_weights_in_torchs_order(kind, shape):
    ours, theirs = pair(kind, **shape)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for (name, value), expected in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert torch.equal(value, expected), name
    ours.load_state_dict(theirs.state_dict(), strict=True)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    assert [[w.shape for w in ws] for ws in ours.all_weights] == [
        [w.shape for w in ws] for ws in theirs.all_weights
    ]
    after = torch.rand(()), torch.manual_seed(0), getattr(nn, kind)(I, H, **shape), torch.rand(())
    torch.manual_seed(0)
    getattr(fusedrnn, kind)(I, H, **shape)
    assert torch.rand(()) == after[-1]


@pytest.mark.parametrize("kind", KINDS)
def test_attributes(kind):
    ours, theirs = pair(kind, num_layers=2, bidirectional=True, batch_first=True, dropout=0.25)
    names = [
        "mode",
        "input_size",
        "hidden_size",
        "num_layers",
        "bias",
        "batch_first",
        "dropout",
        "bidirectional",
        "proj_size",
    ]
    for name in names:
        assert getattr(ours, name) == getattr(theirs, name)
    assert repr(ours) == repr(theirs)


def test_positional_arguments():
    assert repr(fusedrnn.LSTM(3, 4, 2, False, True, 0.5, True, 2)) == repr(
        nn.LSTM(3, 4, 2, False, True, 0.5, True, 2)
    )
    assert repr(fusedrnn.GRU(3, 4, 2, False, True, 0.5, True)) == repr(
        nn.GRU(3, 4, 2, False, True, 0.5, True)
    )
    ours, theirs = (m.RNN(3, 4, 2, "relu", False, True, 0.5, True) for m in (fusedrnn, nn))
    assert repr(ours) == repr(theirs)
    assert ours.nonlinearity == theirs.nonlinearity


# float32 against itself: torch's own kernels give the same bits; the reference rounds in another
# order, over sums of H + I terms.
@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("given", [False, True], ids=["zeros", "initial-state"])
@pytest.mark.parametrize("form", ["padded", "unbatched", "packed"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", KINDS)
def test_agrees_with_torch(kind, shape, form, given, backend):
    ours, theirs = pair(kind, **shape)
    ours.backend = backend
    torch.manual_seed(1)
    batch_first = shape.get("batch_first", False)
    x = torch.randn(*((B, T) if batch_first else (T, B)), I, requires_grad=True)
    directions, layers = ours.num_directions, ours.num_layers
    state = initial(kind, layers, directions) if given else None
    leaves = [x] + ([] if state is None else flat([state]))
    if form == "unbatched":
        inputs = x[0] if batch_first else x[:, 0]
        if state is not None:
            state = tuple(s[:, 0] for s in state) if kind == "LSTM" else state[:, 0]
    else:
        inputs = x

    def run(layer):
        if form != "packed":
            return layer(inputs, state)
        return layer(pack_padded_sequence(x, LENGTHS, batch_first, enforce_sorted=False), state)

    results = [run(layer) for layer in (ours, theirs)]
    assert [type(r) for r in results[0]] == [type(r) for r in results[1]]
    tolerance = {"rtol": 0, "atol": 0} if backend == "auto" else {"rtol": 1e-4, "atol": 1e-5}
    for actual, expected in zip(flat(results[0]), flat(results[1]), strict=True):
        torch.testing.assert_close(actual, expected, **tolerance)
    both = [gradients(m, r, *leaves) for m, r in zip((ours, theirs), results, strict=True)]
    for actual, expected in zip(*both, strict=True):
        torch.testing.assert_close(actual, expected, **tolerance)


def test_packed_rows_of_equal_length_keep_their_order():
    lengths = torch.tensor([3, 5, 3, 5, 3, 3, 5, 3] * 5)
    layer = fusedrnn.LSTM(I, H, peephole=True)
    x = torch.randn(5, len(lengths), I)
    expected = layer(x, lengths=lengths)[0]
    packed = layer(pack_padded_sequence(x, lengths, enforce_sorted=False))[0]
    assert torch.equal(pad_packed_sequence(packed)[0], expected)
    in_order = lengths.sort(descending=True, stable=True)[1]
    packed = layer(pack_padded_sequence(x[:, in_order], lengths[in_order]))[0]
    torch.testing.assert_close(pad_packed_sequence(packed)[0], expected[:, in_order])


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_projection_agrees_with_torch(packed, backend):
    ours, theirs = pair("LSTM", num_layers=2, bidirectional=True, proj_size=3)
    ours.backend = backend
    x = torch.randn(T, B, I, requires_grad=True)
    state = initial("LSTM", 2, 2, projected=3)
    results = [
        layer(pack_padded_sequence(x, LENGTHS, enforce_sorted=False) if packed else x, state)
        for layer in (ours, theirs)
    ]
    both = [gradients(m, r, x, *state) for m, r in zip((ours, theirs), results, strict=True)]
    for actual, expected in zip(flat(results[0]), flat(results[1]), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    for actual, expected in zip(*both, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_dropout_between_layers_draws_as_torch_does(kind):
    ours, theirs = pair(kind, num_layers=3, dropout=0.5)
    x = torch.randn(T, B, I)
    results = []
    for layer in (ours, theirs):
        torch.manual_seed(3)
        results.append(layer(x)[0])
    assert torch.equal(*results)
    assert torch.equal(ours.eval()(x)[0], theirs.eval()(x)[0])
    assert not torch.equal(results[0], ours(x)[0])


def test_dropout_between_layers_of_the_other_cells():
    layer = fusedrnn.LSTM(I, H, 2, peephole=True, dropout=1.0)
    x = torch.randn(T, B, I)
    torch.testing.assert_close(layer(x)[0], layer(2 * x)[0])
    assert not torch.equal(layer.eval()(x)[0], layer(2 * x)[0])


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize(("kind", "options"), VARIANTS)
def test_lengths_equal_packing_and_equal_each_row_alone(kind, options, backend):
    layer = getattr(fusedrnn, kind)(
        I, H, num_layers=2, bidirectional=True, backend=backend, dtype=torch.float64, **options
    )
    x = torch.randn(T, B, I, dtype=torch.float64)
    y, state = layer(x, lengths=LENGTHS)
    packed, packed_state = layer(pack_padded_sequence(x, LENGTHS, enforce_sorted=False))
    torch.testing.assert_close(pad_packed_sequence(packed)[0], y)
    for actual, expected in zip(flat([packed_state]), flat([state]), strict=True):
        torch.testing.assert_close(actual, expected)
    for row, length in enumerate(LENGTHS):
        alone, alone_state = layer(x[:length, row])
        torch.testing.assert_close(y[:length, row], alone)
        assert not y[length:, row].any()
        for actual, expected in zip(flat([state]), flat([alone_state]), strict=True):
            torch.testing.assert_close(actual[:, row], expected)


@pytest.mark.parametrize(("kind", "options"), VARIANTS)
def test_pickle_deepcopy_and_state_dict(kind, options):
    layer = getattr(fusedrnn, kind)(I, H, num_layers=2, bidirectional=True, zoneout=0.1, **options)
    x = torch.randn(T, B, I)
    expected = layer.eval()(x)[0]
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    fresh = getattr(fusedrnn, kind)(I, H, num_layers=2, bidirectional=True, zoneout=0.1, **options)
    fresh.load_state_dict(torch.load(file, weights_only=True), strict=True)
    for other in (fresh.eval(), copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(x)[0], expected)
        assert repr(other) == repr(layer)


def test_extra_parameters_come_last_and_are_initialised():
    torch.manual_seed(0)
    layer = fusedrnn.LSTM(I, H, bidirectional=True, peephole=True)
    names = [name for name, _ in layer.named_parameters()]
    assert names[8:] == [
        f"weight_c{gate}_l0{suffix}" for suffix in ("", "_reverse") for gate in "ifo"
    ]
    bound = H**-0.5
    assert all(p.abs().max() <= bound and p.std() > 0 for p in layer.parameters())
    normed = fusedrnn.LSTM(I, H, layer_norm=True)
    assert normed.weight_ln_ih_l0.shape == normed.weight_ln_hh_l0.shape == (4 * H,)
    assert (normed.weight_ln_c_l0 == 1).all()
    assert (normed.bias_ln_c_l0 == 0).all()
    before = layer.weight_ci_l0.detach().clone()
    layer.reset_parameters()
    assert not torch.equal(before, layer.weight_ci_l0)


def test_forget_bias():
    layer = fusedrnn.LSTM(I, H, 2, bidirectional=True, forget_bias=1.0)
    for name, bias in layer.named_parameters():
        if name.startswith("bias"):
            assert (bias[H : 2 * H] == float(name.startswith("bias_ih"))).all()
            assert bias[:H].std() > 0
    layer.reset_parameters()
    assert (layer.bias_ih_l1_reverse[H : 2 * H] == 1).all()


@pytest.mark.parametrize(
    ("kind", "gates"), [("LSTM", 4), ("GRU", 3), ("RNN", 1)], ids=["LSTM", "GRU", "RNN"]
)
def test_parameter_counts(kind, gates):
    """4 d (d + m) for the LSTM and 3 d (d + m) for the GRU, plus two biases."""
    count = sum(p.numel() for p in getattr(fusedrnn, kind)(I, H).parameters())
    assert count == gates * H * (H + I) + 2 * gates * H
    without = sum(p.numel() for p in getattr(fusedrnn, kind)(I, H, bias=False).parameters())
    assert without == gates * H * (H + I)


def test_stacking_feeds_each_layer_with_the_one_below():
    two = fusedrnn.LSTM(I, H, 2, bidirectional=True)
    x = below = torch.randn(T, B, I)
    for layer, size in enumerate((I, 2 * H)):
        one = fusedrnn.LSTM(size, H, bidirectional=True)
        weights = {
            name.replace(f"_l{layer}", "_l0"): value
            for name, value in two.state_dict().items()
            if f"_l{layer}" in name
        }
        one.load_state_dict(weights, strict=True)
        below = one(below)[0]
    torch.testing.assert_close(two(x)[0], below)


@pytest.mark.parametrize("batch_first", [False, True], ids=["time-first", "batch-first"])
@pytest.mark.parametrize("batched", [True, False], ids=["batched", "unbatched"])
@pytest.mark.parametrize(("kind", "options"), VARIANTS)
def test_steps_equal_the_whole_sequence(kind, options, batched, batch_first):
    layer = getattr(fusedrnn, kind)(
        I, H, 2, batch_first=batch_first, zoneout=0.2, dtype=torch.float64, **options
    ).eval()
    x = torch.randn(*((T, B) if batched else (T,)), I, dtype=torch.float64)
    y, final = layer(x.transpose(0, 1) if batched and batch_first else x)
    state, ys = None, []
    for x_t in x:
        y_t, state = layer.step(x_t, state)
        ys.append(y_t)
    torch.testing.assert_close(torch.stack(ys), y.transpose(0, 1) if batched and batch_first else y)
    for actual, expected in zip(flat([state]), flat([final]), strict=True):
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_bidirectional_layers_refuse_to_stream(kind):
    with pytest.raises(RuntimeError, match="bidirectional layer cannot stream"):
        getattr(fusedrnn, kind)(I, H, bidirectional=True).step(torch.randn(B, I))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize(("kind", "options"), VARIANTS)
def test_low_precision_computes_in_float32(kind, options, dtype):
    layer = getattr(fusedrnn, kind)(I, H, dtype=dtype, **options)
    exact = copy.deepcopy(layer).float()
    x = torch.randn(T, B, I, dtype=dtype)
    results, expected = layer(x), exact(x.float())
    for actual, value in zip(flat(results), flat(expected), strict=True):
        assert actual.dtype == dtype
        assert torch.equal(actual, value.to(dtype))
    flat(results)[0].float().sum().backward()
    assert layer.weight_hh_l0.grad.dtype == dtype


@pytest.mark.parametrize(("kind", "options"), VARIANTS)
def test_autocast(kind, options):
    layer = getattr(fusedrnn, kind)(I, H, **options)
    x = torch.randn(T, B, I)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        results = layer(x)
        mixed = layer(x.bfloat16())
    for actual, expected in zip(flat(results), flat(layer(x)), strict=True):
        assert torch.equal(actual, expected.bfloat16())
    assert flat(mixed)[0].dtype == torch.bfloat16


@pytest.mark.parametrize(("kind", "options"), VARIANTS)
def test_empty_batch_and_empty_sequence_as_torch(kind, options):
    layer = getattr(fusedrnn, kind)(I, H, bidirectional=True, **options)
    y, state = layer(torch.randn(T, 0, I))
    assert y.shape == (T, 0, 2 * (options.get("proj_size") or H))
    assert flat([state])[0].shape[1] == 0
    assert layer(torch.randn(T, 0, I), lengths=LENGTHS[:0])[0].shape == y.shape
    with pytest.raises(RuntimeError, match="Expected sequence length to be larger than 0 in RNN"):
        layer(torch.randn(0, B, I))


@pytest.mark.parametrize(("kind", "options"), VARIANTS)
def test_shapes_without_data(kind, options):
    layer = getattr(fusedrnn, kind)(I, H, 2, bidirectional=True, device="meta", **options)
    real = getattr(fusedrnn, kind)(I, H, 2, bidirectional=True, **options)
    results = zip(flat(layer(torch.empty(T, B, I, device="meta"))), flat(real(X)), strict=True)
    assert all(one.is_meta and one.shape == other.shape for one, other in results)


@pytest.mark.parametrize("options", [{}, {"peephole": True}], ids=["plain", "peephole"])
def test_functional_call_uses_the_given_weights(options):
    layer = fusedrnn.LSTM(I, H, **options)
    zeros = {name: torch.zeros_like(p) for name, p in layer.named_parameters()}
    y, _ = torch.func.functional_call(layer, zeros, (torch.randn(T, B, I),))
    assert not y.any()


def test_masks_are_drawn_anew_and_only_in_training():
    layer = fusedrnn.GRU(I, H, 2, recurrent_dropout=0.5)
    x = torch.randn(T, B, I)
    assert not torch.equal(layer(x)[0], layer(x)[0])
    plain = fusedrnn.GRU(I, H, 2)
    plain.load_state_dict(layer.state_dict())
    assert torch.equal(layer.eval()(x)[0], plain(x)[0])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((0, H), ValueError, "input_size must be greater than zero"),
        ((I, 0), ValueError, "hidden_size must be greater than zero"),
        ((I, H, 0), ValueError, "num_layers must be greater than zero"),
        ((I, 2.5), TypeError, "hidden_size should be of type int"),
    ],
    ids=["input_size", "hidden_size", "num_layers", "type"],
)
def test_bad_sizes(kind, arguments, error, message):
    with pytest.raises(error, match=message):
        getattr(fusedrnn, kind)(*arguments)


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("LSTM", {"peephole": True, "layer_norm": True}, "peephole and layer_norm exclude"),
        ("LSTM", {"forget_bias": 1.0, "bias": False}, "forget_bias needs bias=True"),
        ("LSTM", {"proj_size": H}, "proj_size has to be smaller than hidden_size"),
        ("GRU", {"recurrent_dropout": 1.5}, r"recurrent_dropout must be a number in \[0, 1\)"),
        ("GRU", {"zoneout": True}, r"zoneout must be a number in \[0, 1\)"),
        ("GRU", {"dropout": 2}, r"dropout should be a number in range \[0, 1\]"),
        ("RNN", {"backend": "gpu"}, "backend must be one of auto, triton, torch, reference"),
        ("RNN", {"nonlinearity": "gelu"}, "nonlinearity must be 'tanh' or 'relu'"),
        *(
            (kind, {"recompute": True, "backend": "torch"}, "recompute=True needs backend='triton'")
            for kind in KINDS
        ),
    ],
)
def test_bad_options(kind, options, message):
    with pytest.raises(ValueError, match=message):
        getattr(fusedrnn, kind)(I, H, **options)


X = torch.randn(T, B, I)


@pytest.mark.parametrize(
    ("inputs", "error", "message"),
    [
        ({"input": X[..., 1:]}, RuntimeError, "input.size.-1. must be equal to input_size"),
        ({"input": X[None]}, ValueError, "Expected input to be 2D or 3D, got 4D"),
        ({"input": X.double()}, ValueError, "dtype .torch.float64. does not match weight dtype"),
        ({"input": X, "hx": torch.zeros(1, B, H + 1)}, RuntimeError, "Expected hidden"),
        ({"input": X, "hx": torch.zeros(B, H)}, RuntimeError, "hx should also be 3-D"),
        ({"input": X[0], "hx": torch.zeros(1, B, H)}, RuntimeError, "hx should also be 2-D"),
        ({"input": X[0], "lengths": LENGTHS}, ValueError, "lengths must be None for unbatched"),
        (
            {"input": X, "lengths": LENGTHS + 1},
            ValueError,
            r"lengths must lie in 1\.\.6, row 1 has 7",
        ),
        (
            {"input": X, "lengths": LENGTHS - 1},
            ValueError,
            r"lengths must lie in 1\.\.6, row 2 has 0",
        ),
        ({"input": X, "lengths": LENGTHS.tolist()}, TypeError, "lengths must be an int64 tensor"),
        (
            {"input": pack_padded_sequence(X, LENGTHS, enforce_sorted=False), "lengths": LENGTHS},
            ValueError,
            "lengths must be None for a PackedSequence",
        ),
    ],
)
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_bad_input(inputs, error, message, backend):
    with pytest.raises(error, match=message):
        fusedrnn.GRU(I, H, backend=backend)(**inputs)


@pytest.mark.parametrize("options", [{}, {"peephole": True}], ids=["plain", "peephole"])
@pytest.mark.parametrize("count", [1, 3])
def test_another_number_of_states(options, count):
    with pytest.raises(ValueError, match=rf"hx must be \(h_0, c_0\), got {count} tensors"):
        fusedrnn.LSTM(I, H, **options)(X, [torch.zeros(1, B, H)] * count)


@pytest.mark.parametrize(("kind", "options"), VARIANTS)
def test_recompute_has_no_effect_where_auto_takes_torch(kind, options):
    plain, recomputing = (
        getattr(fusedrnn, kind)(I, H, **options, recompute=recompute) for recompute in (False, True)
    )
    recomputing.load_state_dict(plain.state_dict())
    for a, e in zip(flat(recomputing(X)), flat(plain(X)), strict=True):
        assert torch.equal(a, e)
    assert "recompute=True" in repr(recomputing)
    assert "recompute" not in repr(plain)


def test_explicit_triton_on_a_cpu_tensor_raises(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setattr("kernels.ops.interpreted", lambda kernel: False)
    with pytest.raises(ValueError, match="backend='triton' needs a CUDA tensor, got one on cpu"):
        fusedrnn.LSTM(I, H, backend="triton")(X)
