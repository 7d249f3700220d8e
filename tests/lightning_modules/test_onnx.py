import onnx
import onnxruntime
import pytest
import torch
from torch.utils import _pytree as pytree

from lightning_modules.data import lengths, pad
from lightning_modules.data.pairs import PairCodec, Symbols
from lightning_modules.data.readers import Sentence
from lightning_modules.data.tagging import TaggingCodec
from lightning_modules.onnx import export_encoder, export_tagger
from lightning_modules.seq2seq import Seq2Seq
from lightning_modules.tagger import Tagger

SENTENCES = [
    Sentence(["we", "saw", "Mr", "Jones"], ["O", "O", "O", "B-PER"]),
    Sentence(["go"], ["O"]),
    Sentence(["Ada", "Lovelace", "wrote", "it"], ["B-PER", "I-PER", "O", "O"]),
]
PAIRS = [("cat", "K AE T"), ("a", "AH"), ("through", "TH R UW")]


def run(path, feeds):
    model = onnx.load(path)
    onnx.checker.check_model(model, full_check=True)
    session = onnxruntime.InferenceSession(path)
    wanted = {node.name for node in session.get_inputs()}
    feeds = {name: feeds[name].numpy() for name in wanted}
    names = [node.name for node in session.get_outputs()]
    return dict(zip(names, map(torch.from_numpy, session.run(None, feeds)), strict=True)), model


@pytest.mark.parametrize("characters", [6, 0], ids=["characters", "words-only"])
def test_tagger_up_to_its_emissions(tmp_path, characters):
    torch.manual_seed(0)
    codec = TaggingCodec.from_sentences(SENTENCES, "BIO", "BIOES")
    tagger = Tagger(
        codec,
        word_size=6,
        character_size=5,
        character_hidden_size=characters,
        hidden_sizes=[8, 6],
        cell="lstm_peephole",
        unk_probability=0.9,
        residual=True,
        layer_norm=True,
    )
    export_tagger(tagger, tmp_path / "tagger.onnx")
    batches = [SENTENCES, SENTENCES[1:2], SENTENCES[:1] * 4]
    for batch in (codec.batch([codec.encode(s) for s in sentences]) for sentences in batches):
        results, model = run(tmp_path / "tagger.onnx", batch._asdict())
        expected = tagger.eval()(batch).detach()
        torch.testing.assert_close(results["emissions"], expected, rtol=0, atol=1e-5)
        decoded = tagger.model.decode(results["emissions"], batch.lengths)
        assert torch.equal(decoded, tagger.model.decode(expected, batch.lengths))
    assert [n.op_type for n in model.graph.node].count("LSTM") == 2 + (characters > 0)
    assert len(model.graph.input) == (5 if characters else 2)


@pytest.mark.parametrize("filters", [4, 0], ids=["filters", "casing-only"])
def test_tagger_of_two_tasks(tmp_path, filters):
    torch.manual_seed(0)
    sentences = [s._replace(others=([w[:1] for w in s.tokens],)) for s in SENTENCES]
    codec = TaggingCodec.from_sentences(sentences, "BIO", others=["initial"])
    options = {"character_hidden_size": 0, "character_filters": filters, "casing_size": 3}
    tagger = Tagger(codec, word_size=6, hidden_sizes=[8], variational_dropout=True, **options)
    export_tagger(tagger, tmp_path / "tagger.onnx")
    tagger.eval()
    for rows in (sentences, sentences[1:2]):
        batch = codec.batch([codec.encode(s) for s in rows])
        results, model = run(tmp_path / "tagger.onnx", batch._asdict())
        features = tagger.model.encode(*batch[:6]).detach()
        for name, head in zip(("emissions", "emissions_initial"), tagger.model.heads, strict=True):
            torch.testing.assert_close(results[name], head.emission(features), rtol=0, atol=1e-5)
    assert len(model.graph.input) == (6 if filters else 4)


@pytest.mark.parametrize("cell", ["lstm", "gru_reset_before"])
@pytest.mark.parametrize("decoder_sizes", [[8, 8], [7]], ids=["exact-bridge", "learnt-bridge"])
def test_encoder_and_bridge(tmp_path, cell, decoder_sizes):
    torch.manual_seed(0)
    codec = PairCodec.from_pairs(PAIRS, Symbols("characters"), Symbols("words"))
    model = Seq2Seq(
        codec,
        embedding_size=5,
        encoder_sizes=[4, 4],
        decoder_sizes=decoder_sizes,
        cell=cell,
        dropout=0.5,
    )
    export_encoder(model, tmp_path / "encoder.onnx")
    model.eval()
    for texts in (["cat", "a", "through"], ["a"], ["tac", "cat"]):
        rows = [codec.encode_source(text) for text in texts]
        feeds = {"source": pad(rows), "lengths": lengths(rows)}
        results, graph = run(tmp_path / "encoder.onnx", feeds)
        state = model.model.encode(*feeds.values())
        states = pytree.tree_leaves(state.layers)
        assert len(results) == 1 + len(states)
        for actual, expected in zip(results.values(), [state.source.keys, *states], strict=True):
            torch.testing.assert_close(actual, expected.detach(), rtol=0, atol=1e-5)
    per_layer = ["h", "c"] if cell == "lstm" else ["h"]
    names = [f"{s}_l{index}" for index in range(len(decoder_sizes)) for s in per_layer]
    assert list(results) == ["keys", *names]
    assert [n.op_type for n in graph.graph.node].count(cell.partition("_")[0].upper()) == 2


def test_an_encoder_that_copies_is_refused(tmp_path):
    codec = PairCodec.from_pairs(PAIRS, Symbols("characters"), Symbols("characters"), copy=True)
    model = Seq2Seq(codec, embedding_size=4, encoder_sizes=[4], decoder_sizes=[4])
    with pytest.raises(ValueError, match="seq2seq: expected a model that reads symbols"):
        export_encoder(model, tmp_path / "encoder.onnx")
