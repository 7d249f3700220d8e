"""The tagger against flair's SequenceTagger and stanza's NERTagger on a CPU.

The same sentences, batches and sizes. All are a BiLSTM over trained word vectors and a character
BiLSTM, with a CRF, trained by Adam in a bare loop (no trainer's overhead on any side). Ours drops
half of the character vectors too, as stanza's does and flair's does not. Adam is torch's fused one,
as in our configurations, but in stanza, whose trainer makes its own. The others are installed
apart: `pip install flair stanza`.
"""

from __future__ import annotations

import importlib.util
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from .registry import Case, Row, benchmark, interleave

if TYPE_CHECKING:  # the other benchmarks run without Lightning
    from lightning_modules.data.readers import Sentence

DATA = "TAGGERS_CONLLU"
"""Environment variable: a CoNLL-U file to take in place of the built-in treebank."""

SENTENCES, BATCH, ROUNDS = 500, 32, 5
WORD, CHARACTER, CHARACTER_HIDDEN, HIDDEN, DROPOUT = 100, 25, 25, 150, 0.5

Candidates = Mapping[str, Callable[[], object]]


def _findings(rows: Sequence[Mapping[str, str]]) -> Iterator[str]:
    for row in rows:
        if row["name"] != row["baseline"]:
            yield (
                f"{row['task']}: {row['name']} takes {row['ratio']} times as long as "
                f"{row['baseline']} (quartiles {row['ratio_q1']} and {row['ratio_q3']})"
            )
    if all(row["name"] == row["baseline"] for row in rows):
        yield "neither flair nor stanza is installed, so nothing was compared"


@benchmark(_findings)
def taggers() -> Iterator[Case]:
    """Time an epoch of training and the prediction of the same sentences."""
    from lightning_modules.data import BucketBatchSampler
    from lightning_modules.data.readers import read_conllu
    from lightning_modules.data.tagging import read_builtin

    place = os.environ.get(DATA)
    sentences = (read_conllu(place) if place else read_builtin()["train"])[:SENTENCES]
    lengths = [len(sentence.tokens) for sentence in sentences]
    batches = list(BucketBatchSampler(lengths, BATCH, shuffle=True))
    train, predict = _ours(sentences, batches)
    training, prediction = {"fusedrnn": train}, {"fusedrnn": predict}
    for name, make in (("flair", _flair), ("stanza", _stanza)):
        if importlib.util.find_spec(name):
            training[name], prediction[name] = make(sentences, batches)
    data = os.path.basename(place) if place else "turkish-treebanks"
    key: Row = {"data": data, "sentences": len(sentences), "words": sum(lengths), "batch": BATCH}
    for task, candidates in (("training", training), ("prediction", prediction)):
        yield {"task": task} | key, partial(_measure, candidates, len(sentences))


def _measure(candidates: Candidates, sentences: int) -> Iterator[Row]:
    for row in interleave(candidates, ROUNDS):
        rate = 1e3 * sentences / float(str(row["milliseconds"]))
        yield row | {"sentences_per_second": round(rate, 1)}


def _ours(
    sentences: Sequence[Sentence], batches: Sequence[list[int]]
) -> tuple[Callable[[], object], Callable[[], object]]:
    """What trains an epoch and what predicts, with batches made anew each time."""
    from lightning_modules.data import TaggingCodec
    from lightning_modules.tagger import Tagger

    torch.manual_seed(0)
    codec = TaggingCodec.from_sentences(sentences)
    tagger = Tagger(
        codec,
        word_size=WORD,
        character_size=CHARACTER,
        character_hidden_size=CHARACTER_HIDDEN,
        hidden_sizes=[HIDDEN],
        dropout=DROPOUT,
        character_dropout=DROPOUT,
    )
    optimizer = torch.optim.Adam(tagger.parameters(), fused=True)
    rows = [codec.encode(sentence, training=True) for sentence in sentences]
    tokens = [sentence.tokens for sentence in sentences]

    def train() -> None:
        tagger.train()
        for indices in batches:
            batch = codec.batch([rows[i] for i in indices])
            total, count = tagger.model.loss(tagger(batch), batch.tags, batch.lengths)
            _step(total / count, tagger, optimizer)

    return train, partial(tagger.tag, tokens, batch_size=BATCH)


def _flair(
    sentences: Sequence[Sentence], batches: Sequence[list[int]]
) -> tuple[Callable[[], object], Callable[[], object]]:
    """The same with flair, whose sentences are made beforehand."""
    import flair
    from flair.data import Dictionary
    from flair.embeddings import CharacterEmbeddings, OneHotEmbeddings, StackedEmbeddings
    from flair.models import SequenceTagger

    logging.getLogger("flair").setLevel(logging.WARNING)  # it prints whole vocabularies
    flair.device = torch.device("cpu")
    torch.manual_seed(0)
    theirs = [flair.data.Sentence(sentence.tokens) for sentence in sentences]
    labels, words, letters = Dictionary(add_unk=False), Dictionary(), Dictionary()
    for sentence, gold in zip(theirs, sentences, strict=True):
        for token, tag in zip(sentence, gold.tags, strict=True):
            token.add_label("upos", tag)
            labels.add_item(tag)
            words.add_item(token.text)
            for letter in token.text:
                letters.add_item(letter)
    characters: Any = CharacterEmbeddings(letters, CHARACTER, CHARACTER_HIDDEN)
    vectors: Any = OneHotEmbeddings(words, embedding_length=WORD)
    tagger = SequenceTagger(
        StackedEmbeddings([vectors, characters]),
        tag_dictionary=labels,
        tag_type="upos",
        hidden_size=HIDDEN,
        reproject_embeddings=False,
        use_crf=True,
    )
    optimizer = torch.optim.Adam(tagger.parameters(), fused=True)

    def train() -> None:
        tagger.train()
        for indices in batches:
            batch = [theirs[i] for i in indices]
            loss, count = tagger.forward_loss(batch)
            _step(loss / count, tagger, optimizer)
            for sentence in batch:
                sentence.clear_embeddings()

    predict = partial(
        tagger.predict,
        theirs,
        mini_batch_size=BATCH,
        label_name="found",
        embedding_storage_mode="none",
    )
    return train, predict


def _stanza(
    sentences: Sequence[Sentence], batches: Sequence[list[int]]
) -> tuple[Callable[[], object], Callable[[], object]]:
    """The same with stanza, its loader making batches anew each time, words as they are cased."""
    from stanza.models.ner.data import DataLoader
    from stanza.models.ner.trainer import Trainer

    logging.getLogger("stanza").setLevel(logging.WARNING)
    torch.manual_seed(0)
    arguments = {
        "word_emb_dim": WORD,
        "char_emb_dim": CHARACTER,
        "char_hidden_dim": CHARACTER_HIDDEN,
        "hidden_dim": HIDDEN,
        "num_layers": 1,
        "char_num_layers": 1,
        "char": True,
        "dropout": DROPOUT,
        "optim": "adam",
        "lr": 1e-3,
        "max_grad_norm": 5.0,
        "shorthand": "xx_x",
    }
    unused = ["charlm", "lowercase", "emb_finetune_known_only", "bert_model", "use_peft"]
    unused += ["bert_finetune", "momentum", "word_dropout", "locked_dropout", "char_rec_dropout"]
    arguments |= dict.fromkeys(unused, 0)
    make = partial(DataLoader, _Document(sentences), BATCH, arguments, preprocess_tags=False)
    vocabulary = make().vocab
    loader = make(vocab=vocabulary, evaluation=True)  # else it shuffles
    rows = [row for chunk in loader.data for row in chunk]
    loader.data = [[rows[i] for i in indices] for indices in batches]
    trainer = Trainer(arguments, vocabulary, device="cpu")

    def train() -> None:
        for batch in loader:
            trainer.update(batch)

    @torch.no_grad()
    def predict() -> list[list[list[str]]]:
        return [trainer.predict(batch) for batch in loader]

    return train, predict


class _Document:
    """What stanza's loader asks of its Document: each word, its tag, and its other tags."""

    def __init__(self, sentences: Sequence[Sentence]) -> None:
        self.sentences = sentences

    def get(self, *_: object, **__: object) -> list[list[tuple[str, str, None]]]:
        return [
            [(token, tag, None) for token, tag in zip(s.tokens, s.tags, strict=True)]
            for s in self.sentences
        ]


def _step(loss: torch.Tensor, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
    optimizer.step()
