"""Training and decoding against yoyodyne, JoeyNMT and OpenNMT-py, where they are installed.

Each peer meets the model of ours with its attention that feeds back what the peer feeds back.
Sizes, symbols, batches, loss, optimizer, gradient clipping and number of results are the same. No
model may end a word before it has the mean number of phonemes, nor go on after it, so that all
decode as many steps.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache, partial
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from .registry import Case, Row, benchmark, interleave

if TYPE_CHECKING:
    from lightning_modules.data.pairs import PairCodec

EMBEDDING, ENCODER, DECODER, DROPOUT = 64, 128, 256, 0.2
BATCH, BATCHES, UPDATES, ROUNDS, BEAM, LENGTH = 64, 8, 2, 25, 5, 7
NEVER = -1e4
PAD, BEGIN, END = 0, 2, 3


class Batch(NamedTuple):
    """Words and their phonemes, as numbers."""

    source: Tensor
    lengths: Tensor
    target: Tensor


@cache
def corpus() -> tuple[PairCodec, list[Batch]]:
    """The codec of the CMU Pronouncing Dictionary, and batches in an order by chance."""
    from lightning_modules.data.batching import lengths, pad
    from lightning_modules.data.pairs import PairData

    data = PairData(dataset="cmudict", source_symbols="characters", target_symbols="words")
    codec, pairs = data.codec, data.pairs("train")
    order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(0)).tolist()
    batches = []
    for start in range(0, BATCH * BATCHES, BATCH):
        rows = [pairs[i] for i in order[start : start + BATCH]]
        rows.sort(key=lambda pair: -len(pair[0]))  # JoeyNMT packs its batches
        sources = [codec.encode_source(source) for source, _ in rows]
        targets = [codec.encode_target(target) for _, target in rows]
        batches.append(Batch(pad(sources), lengths(sources), pad(targets)))
    return codec, batches


class Candidate:
    """A model with its optimizer."""

    model: Any

    def __init__(self, model: nn.Module) -> None:
        self.model, self.updates = model, 0
        self.optimizer = torch.optim.Adam(model.parameters(), 1e-3)

    def loss(self, batch: Batch) -> Tensor:
        """Mean cross entropy over the symbols after the first."""
        raise NotImplementedError

    def decode(self, batch: Batch, beam: int) -> Tensor:
        """The best result of each row, int64 [B, LENGTH], without gradients."""
        raise NotImplementedError

    def train(self, count: int) -> None:
        """Take updates on the next batches."""
        batches = corpus()[1]
        self.model.train()
        for _ in range(count):
            self.optimizer.zero_grad()
            self.loss(batches[self.updates % len(batches)]).backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            self.updates += 1

    def search(self, beam: int) -> Tensor:
        """Decode the first batch."""
        self.model.eval()
        with torch.no_grad():
            return self.decode(corpus()[1][0], beam)


class Ours(Candidate):
    """`Seq2SeqModel`."""

    def __init__(self, attention: str = "additive", **feedback: Any) -> None:
        from lightning_modules.seq2seq_model import Seq2SeqModel

        codec = corpus()[0]
        super().__init__(
            Seq2SeqModel(
                len(codec.source),
                len(codec.target),
                EMBEDDING,
                (ENCODER,),
                (DECODER,),
                attention=attention,
                dropout=DROPOUT,
                **feedback,
            )
        )

    def loss(self, batch: Batch) -> Tensor:
        """See `Candidate`."""
        logits, _ = self.model(batch.source, batch.lengths, batch.target[:, :-1])
        return cross_entropy(logits.flatten(0, 1), batch.target[:, 1:].flatten(), ignore_index=PAD)

    def decode(self, batch: Batch, beam: int) -> Tensor:
        """See `Candidate`; as many results as the peers return."""
        from lightning_modules.search import SearchOptions

        self.model.output.bias[END] = NEVER
        options = SearchOptions(beam_size=beam, n_best=beam)
        state = self.model.encode(batch.source, batch.lengths)
        limits = torch.full_like(batch.lengths, LENGTH)
        return options.run(self.model.step, state, limits, BEGIN, END).symbols[:, 0]


class Yoyodyne(Candidate):
    """Its LSTM with soft attention, whose context enters the cell."""

    def __init__(self) -> None:
        from yoyodyne.models import SoftAttentionLSTMModel, modules

        codec = corpus()[0]
        encoder = modules.LSTMEncoder(
            embedding_size=EMBEDDING, hidden_size=ENCODER, layers=1, dropout=DROPOUT
        )
        super().__init__(
            SoftAttentionLSTMModel(
                source_encoder=encoder,
                embedding_size=EMBEDDING,
                decoder_hidden_size=DECODER,
                decoder_layers=1,
                decoder_dropout=DROPOUT,
                max_target_length=LENGTH,
                vocab_size=len(codec.target) + len(codec.source),
                target_vocab_size=len(codec.target),
                compute_accuracy=False,
            )
        )

    def _source(self, batch: Batch) -> Any:
        from yoyodyne.data.batches import PaddedTensor

        # one table of embeddings for both sides, the target's symbols first
        moved = batch.source + len(corpus()[0].target)
        return PaddedTensor.from_tensor(moved.masked_fill(batch.source == PAD, PAD))

    def loss(self, batch: Batch) -> Tensor:
        """See `Candidate`."""
        target = batch.target[:, 1:]
        source = self._source(batch)
        whole = SimpleNamespace(
            source=source, target=SimpleNamespace(tensor=target), has_features=False
        )
        self.model.beam_width = 1
        return self.model.loss_func(self.model(whole), target)

    def decode(self, batch: Batch, beam: int) -> Tensor:
        """See `Candidate`."""
        self.model.beam_width = beam
        self.model.classifier.bias[END] = NEVER
        source = self._source(batch)
        encoded = self.model.source_encoder(source, self.model.embeddings)
        context = self.model.decoder.get_context(source.tensor, encoded)
        if beam == 1:
            return self.model.greedy_decode_predict_test(context, source.mask).argmax(1)
        return self.model.beam_decode(context, source.mask)[0][:, 0, 1:]


class _Vocabulary:
    """What JoeyNMT, and OpenNMT-py's search, ask of a vocabulary."""

    pad_index, unk_index, bos_index, eos_index, sep_index = PAD, 1, BEGIN, END, None
    specials: Sequence[str] = ()
    lang_tags: Sequence[str] = ()

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def lookup_token(self, token: str) -> int:
        """The number of a special symbol under OpenNMT-py's name for it."""
        return {"<blank>": PAD, "<s>": BEGIN, "</s>": END}.get(token, 1)


class Joey(Candidate):
    """JoeyNMT's LSTM with additive attention and input feeding."""

    def __init__(self) -> None:
        from joeynmt.model import build_model

        side = {
            "type": "recurrent",
            "rnn_type": "lstm",
            "num_layers": 1,
            "embeddings": {"embedding_dim": EMBEDDING, "dropout": DROPOUT},
            "dropout": DROPOUT,
        }
        decoder = {
            "hidden_size": DECODER,
            "attention": "bahdanau",
            "input_feeding": True,
            "hidden_dropout": DROPOUT,
            "init_hidden": "bridge",
        }
        sizes = [len(vocabulary) for vocabulary in (corpus()[0].source, corpus()[0].target)]
        config = {
            "encoder": {**side, "hidden_size": ENCODER, "bidirectional": True},
            "decoder": {**side, **decoder},
        }
        model = build_model(config, *map(_Vocabulary, sizes))
        model.loss_function = ("crossentropy", 0.0)
        super().__init__(model)

    def loss(self, batch: Batch) -> Tensor:
        """See `Candidate`; JoeyNMT sums, and leaves the division to its trainer."""
        target = batch.target[:, 1:]
        total, *_ = self.model(
            return_type="loss",
            src=batch.source,
            src_length=batch.lengths,
            src_mask=(batch.source != PAD)[:, None],
            trg_input=batch.target[:, :-1],
            trg=target,
            trg_mask=(target != PAD)[:, None],
        )
        return total / (target != PAD).sum()

    def decode(self, batch: Batch, beam: int) -> Tensor:
        """See `Candidate`."""
        from joeynmt.search import beam_search, greedy

        mask = (batch.source != PAD)[:, None]
        outputs, hidden, *_ = self.model(
            return_type="encode", src=batch.source, src_length=batch.lengths, src_mask=mask
        )
        common = {"model": self.model, "encoder_output": outputs, "encoder_hidden": hidden}
        common |= {"src_mask": mask, "max_output_length": LENGTH, "min_output_length": LENGTH}
        if beam == 1:
            return torch.as_tensor(greedy(**common)[0])
        found, *_ = beam_search(**common, beam_size=beam, alpha=-1, n_best=beam)
        return torch.as_tensor(found)[::beam]


class OpenNMT(Candidate):
    """OpenNMT-py's LSTM with what it has by default, general attention and input feeding."""

    def __init__(self) -> None:
        from onmt.decoders.decoder import InputFeedRNNDecoder
        from onmt.encoders.rnn_encoder import RNNEncoder
        from onmt.models import NMTModel
        from onmt.modules import Embeddings

        sizes = [len(vocabulary) for vocabulary in (corpus()[0].source, corpus()[0].target)]
        source, target = (Embeddings(EMBEDDING, size, PAD, dropout=DROPOUT) for size in sizes)
        encoder = RNNEncoder("LSTM", True, 1, 2 * ENCODER, embeddings=source)
        decoder = InputFeedRNNDecoder(
            "LSTM", True, 1, DECODER, "general", dropout=DROPOUT, embeddings=target
        )
        model = NMTModel(encoder, decoder)
        model.generator = nn.Linear(DECODER, sizes[1])
        for parameter in model.parameters():  # their embeddings are built without values
            nn.init.uniform_(parameter, -0.1, 0.1)
        super().__init__(model)

    def loss(self, batch: Batch) -> Tensor:
        """See `Candidate`."""
        features, _ = self.model(batch.source[..., None], batch.target[..., None], batch.lengths)
        logits = self.model.generator(features).flatten(0, 1)
        return cross_entropy(logits, batch.target[:, 1:].flatten(), ignore_index=PAD)

    def decode(self, batch: Batch, beam: int) -> Tensor:
        """See `Candidate`."""
        from onmt.translate import GNMTGlobalScorer, Translator

        self.model.generator.bias[END] = NEVER
        vocabulary = _Vocabulary(len(corpus()[0].target))
        translator = Translator(
            self.model,
            {"tgt": vocabulary, "decoder_start_token": "<s>"},
            n_best=beam,
            beam_size=beam,
            min_length=LENGTH,
            max_length=LENGTH,
            max_length_ratio=0,
            global_scorer=GNMTGlobalScorer(0.0, 0.0, "none", "none"),
        )
        given = {"src": batch.source[..., None], "srclen": batch.lengths}
        found = translator.translate_batch(given, attn_debug=False)["predictions"]
        return torch.stack([results[0] for results in found])


class Pair(NamedTuple):
    """A peer and the model of ours that it meets, and the peer's package."""

    package: str
    theirs: Callable[[], Candidate]
    ours: Callable[[], Candidate]


PAIRS = {
    "yoyodyne": Pair("yoyodyne", Yoyodyne, partial(Ours, feedback="context")),
    "JoeyNMT": Pair("joeynmt", Joey, partial(Ours, input_feeding=True)),
    "OpenNMT-py": Pair("onmt", OpenNMT, partial(Ours, "general", input_feeding=True)),
}


@cache
def built(peer: str) -> dict[str, Candidate]:
    """The peer, if it is installed, and our model, by name."""
    torch.manual_seed(0)
    package, theirs, ours = PAIRS[peer]
    installed = importlib.util.find_spec(package) is not None
    return ({peer: theirs()} if installed else {}) | {"fusedrnn": ours()}


def findings(rows: Sequence[Mapping[str, str]]) -> Iterator[str]:
    """Say how many times faster ours is."""
    for row in rows:
        if row["name"] != row["baseline"]:
            times = 1 / float(row["ratio"])
            yield f"{row['task']}: {times:.2f} times the speed of {row['peer']}"
        elif row["name"] != row["peer"]:
            yield f"{row['task']}: {row['peer']} is not installed"


@benchmark(findings)
def seq2seq_speed() -> Iterator[Case]:
    """Compare training, greedy search and beam search with each peer."""
    for peer in PAIRS:
        for task, beam in (("train", 0), ("greedy", 1), (f"beam {BEAM}", BEAM)):
            yield {"task": task, "peer": peer}, partial(_measure, peer, beam)


def _measure(peer: str, beam: int) -> Iterator[Row]:
    """Rows with the rate: target symbols a second in training, words a second in decoding."""
    candidates = built(peer)
    if beam == 0:
        calls: dict[str, Callable[[], object]] = {
            name: partial(one.train, UPDATES) for name, one in candidates.items()
        }
        symbols = [(batch.target[:, 1:] != PAD).sum().item() for batch in corpus()[1]]
        amount = UPDATES * sum(symbols) / len(symbols)
    else:
        calls = {name: partial(one.search, beam) for name, one in candidates.items()}
        amount = BATCH
    for row in interleave(calls, ROUNDS):
        one = candidates[str(row["name"])]
        row["per_second"] = round(1000 * amount / float(str(row["milliseconds"])))
        row["parameters"] = sum(p.numel() for p in one.model.parameters())
        if beam and one.search(beam).shape != (BATCH, LENGTH):
            raise ValueError(f"{row['name']} decoded {list(one.search(beam).shape)}")
        row["load"] = round(os.getloadavg()[0], 1)
        yield row
