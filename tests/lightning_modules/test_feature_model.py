"""The encoder-decoder over features: frames as its source, numbers as its target."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_modules.seq2seq_model import FrameEmbedding, Seq2SeqModel

FEATURES, INPUTS, PREDICTED = 3, 4, 2
SIZES = {"embedding_size": 5, "encoder_sizes": [4], "decoder_sizes": [8]}


def speech(seed=0, **arguments):
    torch.manual_seed(seed)
    options = {"source_features": FEATURES, **SIZES, **arguments}
    return Seq2SeqModel(0, 7, **options).double().eval()


def series(seed=0, **arguments):
    torch.manual_seed(seed)
    options = {"source_features": FEATURES, "target_features": PREDICTED, **SIZES, **arguments}
    return Seq2SeqModel(0, 0, target_inputs=INPUTS, **options).double().eval()


def frames(lengths, width=None, seed=0, fill=0.0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.full((len(lengths), width or max(lengths), FEATURES), fill).double()
    for row, length in enumerate(lengths):
        x[row, :length] = torch.randn(length, FEATURES, generator=generator).double()
    return x, torch.tensor(lengths)


def test_frames_are_put_side_by_side():
    embedding = FrameEmbedding(FEATURES, 5, stride=2).double()
    x, lengths = frames([5, 2])
    embedded, shorter = embedding(x, lengths)
    assert embedded.shape == (2, 3, 5)
    assert shorter.tolist() == [3, 1]
    weight, bias = embedding.linear.weight, embedding.linear.bias
    expected = weight @ torch.cat([x[0, 2], x[0, 3]]) + bias
    torch.testing.assert_close(embedded[0, 1], expected)
    last = weight @ torch.cat([x[0, 4], torch.zeros(FEATURES).double()]) + bias
    torch.testing.assert_close(embedded[0, 2], last)


@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 7), min_size=1, max_size=4),
    stride=st.integers(1, 3),
    extra=st.integers(0, 4),
    attention=st.sampled_from(["none", "general", "additive"]),
    feeding=st.booleans(),
)
def test_padding_and_company_change_nothing(lengths, stride, extra, attention, feeding):
    options = {"source_stride": stride, "attention": attention}
    model = speech(input_feeding=feeding and attention != "none", **options)
    target = torch.tensor([[2, 4, 5]] * len(lengths))
    together, _ = model(*frames(lengths, max(lengths) + extra, fill=1e3), target)
    x, sizes = frames(lengths)
    for row in range(len(lengths)):
        alone, _ = model(x[row : row + 1, : lengths[row]], sizes[row : row + 1], target[:1])
        torch.testing.assert_close(together[row], alone[0])


def test_numbers_are_predicted_from_the_features_of_each_step():
    """Without attention y_t = W h_t + b, h_t the decoder's output on the embedded inputs."""
    model = series(attention="none")
    x, lengths = frames([4, 6])
    inputs = torch.randn(2, 3, INPUTS).double()
    predicted, weights = model(x, lengths, inputs)
    assert predicted.shape == (2, 3, PREDICTED)
    assert weights is None
    state = model.encode(x, lengths)
    hidden, _ = model.decoder.stack(model.target_embedding(inputs), state.layers)
    torch.testing.assert_close(predicted, hidden @ model.output.weight.T + model.output.bias)


@pytest.mark.parametrize("attention", ["none", "general"])
def test_regression_is_fed_its_own_predictions(attention):
    """Forcing the decoder with what it predicted itself must predict the same."""
    model = series(attention=attention)
    x, lengths = frames([4, 6])
    given, first = torch.randn(2, 5, INPUTS - PREDICTED), torch.randn(2, PREDICTED)
    free, weights = model.regress(x, lengths, given.double(), first.double())
    previous = torch.cat([first[:, None].double(), free[:, :-1]], 1)
    forced, expected = model(x, lengths, torch.cat([given.double(), previous], -1))
    torch.testing.assert_close(free, forced)
    if attention == "general":
        torch.testing.assert_close(weights, expected)


def test_gradient_flows_through_the_predictions():
    model = series(attention="general")
    x, lengths = frames([4, 6])
    first = torch.randn(2, PREDICTED).double().requires_grad_()
    free, _ = model.regress(x, lengths, torch.randn(2, 3, 2).double(), first)
    free[:, -1].sum().backward()
    assert first.grad.abs().min() > 0


def test_numbers_cannot_be_sampled():
    x, lengths = frames([4, 6])
    with pytest.raises(ValueError, match="sampling_probability: expected 0 where numbers"):
        series()(x, lengths, torch.zeros(2, 3, INPUTS).double(), 0.5)


@pytest.mark.parametrize(
    ("sizes", "arguments", "message"),
    [
        ((0, 5), {}, "one of source_size and source_features"),
        ((4, 5), {"source_features": 3}, "one of source_size and source_features"),
        ((4, 0), {}, "one of target_size and target_features"),
        ((4, -1), {}, "one of target_size and target_features"),
        ((4, 0), {"target_features": 2}, "target_inputs must be at least 1, got 0"),
        ((0, 5), {"source_features": 3, "source_stride": 0}, "source_stride must be at least 1"),
        (
            (4, 0),
            {"target_features": 2, "target_inputs": 1, "tied_embeddings": True},
            "tied_embeddings needs symbols",
        ),
    ],
    ids=["no-source", "two-sources", "no-target", "negative", "inputs", "stride", "tied"],
)
def test_wrong_sizes_are_named(sizes, arguments, message):
    with pytest.raises(ValueError, match=message):
        Seq2SeqModel(*sizes, **arguments)
