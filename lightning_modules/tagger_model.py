"""The tagger's network, apart from Lightning."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fusedrnn import LSTM, RecurrentStack
from fusedrnn.crf import CRF, PADDING
from fusedrnn.dropout import Dropout
from fusedrnn.saving import saveable

Head = Literal["crf", "softmax"]


class WordEmbedding(nn.Module):
    """Vectors of words: trained ones, and fixed ones of words that only a vector file knows.

    The fixed vectors are apart, so that training does not pay for them.

    Args:
        num_words: words with a trained vector, numbered from 0 (padding, which stays zero).
        num_fixed: words numbered after those.
        size: width of the vectors.
        vectors: [num_words + num_fixed, size], initial vectors, NaN rows for none; those without
            are drawn from U(-sqrt(3 / size), sqrt(3 / size)).
        freeze: whether the words of `vectors` keep their vectors.
    """

    fixed: Tensor
    frozen: Tensor

    def __init__(
        self,
        num_words: int,
        num_fixed: int,
        size: int,
        vectors: Tensor | None = None,
        freeze: bool = False,
    ) -> None:
        super().__init__()
        bound = math.sqrt(3 / size)
        table = torch.empty(num_words + num_fixed, size).uniform_(-bound, bound)
        given = torch.zeros(len(table), dtype=torch.bool)
        if vectors is not None:
            given = ~vectors.isnan().any(1)
            table = torch.where(given[:, None], vectors, table)
        table[0] = 0
        self.freeze = freeze
        self.words = nn.Parameter(table[:num_words].clone())
        self.register_buffer("fixed", table[num_words:].clone())
        self.register_buffer("frozen", given[:num_words] & freeze)

    def forward(self, numbers: Tensor) -> Tensor:
        """Look up words: int64 [*] to [*, size]."""
        own = numbers.clamp(max=len(self.words) - 1)
        found = F.embedding(own, self.words, padding_idx=0)
        if self.freeze:
            found = torch.where(self.frozen[own][..., None], found.detach(), found)
        if len(self.fixed) == 0:
            return found
        fixed = F.embedding((numbers - len(self.words)).clamp(min=0), self.fixed)
        return torch.where((numbers >= len(self.words))[..., None], fixed, found)


class CharacterEncoder(nn.Module):
    """What the spelling of words says: a bidirectional LSTM, a convolution, or both side by side.

    The two final states of the LSTM represent the word (Ling et al. 2015; Lample et al. 2016), and
    so does the maximum over the word of each filter of the convolution (Ma and Hovy 2016).

    Args:
        num_characters: characters, 0 being padding.
        size: width of their vectors.
        hidden_size: hidden units of each direction of the LSTM; 0: no LSTM.
        filters: filters of the convolution; 0: none.
        filter_width: characters that a filter sees, odd.
        dropout: probability that an element of the characters' vectors is zeroed, in training.
    """

    def __init__(
        self,
        num_characters: int,
        size: int,
        hidden_size: int,
        filters: int = 0,
        filter_width: int = 3,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(num_characters, size, padding_idx=0)
        bound = math.sqrt(3 / size)
        nn.init.uniform_(self.embedding.weight[1:], -bound, bound)
        self.dropout = Dropout(dropout)
        self.lstm = (
            LSTM(size, hidden_size, batch_first=True, bidirectional=True) if hidden_size else None
        )
        self.convolution = (
            nn.Conv1d(size, filters, filter_width, padding=filter_width // 2) if filters else None
        )
        self.output_size = 2 * hidden_size + filters

    def forward(self, characters: Tensor, lengths: Tensor) -> Tensor:
        """Encode U words: characters [U, L] int64 and lengths [U] to [U, output_size]."""
        embedded = self.dropout(self.embedding(characters))
        encoded = []
        if self.lstm is not None:
            _, (hidden, _) = self.lstm(embedded, lengths=lengths)
            encoded.append(hidden.transpose(0, 1).flatten(1))
        if self.convolution is not None:
            steps = torch.arange(characters.shape[1], device=characters.device)
            past = (steps >= lengths[:, None])[:, None]
            filtered = self.convolution(embedded.transpose(1, 2).masked_fill(past, 0))
            encoded.append(filtered.masked_fill(past, -math.inf).amax(2))
        return torch.cat(encoded, -1)


class SequenceDropout(nn.Module):
    """Dropout with one mask for all the words of a sentence (Gal and Ghahramani 2016).

    Args:
        probability: that a feature is zeroed, in training.
    """

    def __init__(self, probability: float) -> None:
        super().__init__()
        self.dropout = Dropout(probability)

    def forward(self, features: Tensor) -> Tensor:
        """Drop from [B, T, C]."""
        if not self.training:
            return features
        return features * self.dropout(torch.ones_like(features[:, :1]))


class TagHead(nn.Module):
    """From features of words to the tags of one task: a linear map, and a CRF or a softmax over it.

    Args:
        size: width of the features.
        tags: the names of the K tags.
        scheme: the scheme of `tags` that the CRF keeps to, or None.
        head: "crf" or "softmax".

    Raises:
        ValueError: an unknown head, no tags, tags outside the scheme.
    """

    def __init__(self, size: int, tags: Sequence[str], scheme: str | None, head: Head) -> None:
        super().__init__()
        self._build_head(size, tags, scheme, head)

    def _build_head(self, size: int, tags: Sequence[str], scheme: str | None, head: Head) -> None:
        if head not in ("crf", "softmax"):
            raise ValueError(f"head: expected crf or softmax, got {head!r}")
        if not tags:
            raise ValueError("tags: expected at least one")
        self.emission = nn.Linear(size, len(tags))
        self.crf = CRF(len(tags), tags, scheme) if head == "crf" else None

    def loss(self, emissions: Tensor, tags: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Sums the negative log-likelihood of the gold tags, in nats.

        Tags below 0 are unknown to the model and have no likelihood: the softmax leaves out the
        word, the CRF the sentence.

        Args:
            emissions: [B, T, K].
            tags: [B, T] int64.
            lengths: [B] int64.

        Returns:
            The sum and the number of words it is over.
        """
        valid = torch.arange(tags.shape[1], device=tags.device) < lengths[:, None]
        if self.crf is None:
            counted = valid & (tags >= 0)
            gold = torch.where(counted, tags, -100)
            total = F.cross_entropy(
                emissions.flatten(0, 1).float(), gold.flatten(), reduction="sum"
            )
            return total, counted.sum()
        counted = ((tags >= 0) | ~valid).all(1)
        likelihood = self.crf.log_likelihood(emissions, tags.clamp(min=0), lengths)
        return -torch.where(counted, likelihood, 0).sum(), (counted * lengths).sum()

    def decode(self, emissions: Tensor, lengths: Tensor) -> Tensor:
        """Find the best tags.

        Args:
            emissions: [B, T, K].
            lengths: [B] int64.

        Returns:
            [B, T] int64, -1 past the end.
        """
        if self.crf is not None:
            return self.crf.decode(emissions, lengths)[0]
        steps = torch.arange(emissions.shape[1], device=emissions.device)
        return emissions.argmax(-1).masked_fill(steps >= lengths[:, None], PADDING)

    def confidences(self, emissions: Tensor, paths: Tensor, lengths: Tensor) -> Tensor:
        """Compute the probability of each tag of some paths: with a CRF, its marginal.

        Args:
            emissions: [B, T, K].
            paths: [B, T] int64, from `decode`.
            lengths: [B] int64.

        Returns:
            [B, T] float; past the end without meaning.
        """
        if self.crf is not None:
            shares = self.crf.marginals(emissions, lengths)
        else:
            shares = emissions.float().softmax(-1)
        return shares.gather(-1, paths.clamp(min=0)[..., None])[..., 0]

    def span_confidences(
        self, emissions: Tensor, paths: Tensor, spans: Tensor, lengths: Tensor
    ) -> Tensor:
        """Compute the probability of entities: of all their tags, with a CRF also of their end.

        Args:
            emissions: [B, T, K].
            paths: [B, T] int64, from `decode`.
            spans: [N, 3] int64: row, first word, the one after the last.
            lengths: [B] int64.

        Returns:
            [N] float.
        """
        if self.crf is not None:
            return self.crf.span_marginals(emissions, paths, spans, lengths)
        logs = self.confidences(emissions, paths, lengths).double().log()
        sums = F.pad(logs.cumsum(1), (1, 0))
        rows, first, stop = spans.unbind(1)
        return (sums[rows, stop] - sums[rows, first]).exp()


@saveable
class TaggerModel(TagHead):
    """Words and their characters -> recurrent stack -> a score for each tag -> softmax or CRF.

    Huang et al. 2015; Lample et al. 2016; Ma and Hovy 2016. With more than one task the stack is
    shared; the model itself is the head of the first, `heads` has them all.

    Args:
        num_words: words with a trained vector; 0 is padding and 1 the unknown word.
        num_fixed: words with a fixed vector, numbered after those.
        num_characters: characters, 0 being padding.
        num_casings: classes of casing.
        tags: the names of the K tags.
        scheme: the scheme of `tags` that the CRF keeps to, or None.
        other_tasks: tags and scheme of each further task.
        first_rare: the words from this number on, up to `num_words`, occur once in training.
        word_size: width of the word vectors.
        character_size: width of the character vectors.
        character_hidden_size: hidden units of the character LSTM, each direction; 0: no LSTM.
        character_filters: filters of the character convolution; 0: none.
        character_filter_width: characters that a filter sees, odd.
        casing_size: width of the vectors of casing; 0: none.
        hidden_sizes: hidden units of each layer of the stack, each direction.
        cell: the cell of the stack, a name in `kernels.CELLS` or "lstm", "gru", "rnn".
        dropout: of the stack's input, between its layers and of its output.
        recurrent_dropout: of the stack's recurrent products.
        variational_dropout: whether `dropout` draws one mask for all words of a sentence.
        character_dropout: of the character vectors.
        unk_probability: how often a rare word is taken for the unknown word, in training.
        word_dropout: how often any other word is.
        residual: whether a layer of the stack above the first adds its input to its output.
        layer_norm: whether the input of those layers is normalised.
        head: "crf" or "softmax", for all tasks or a list with one for each.
        vectors: pretrained word vectors, as for `WordEmbedding`.
        freeze_vectors: whether they stay as they are.

    Raises:
        ValueError: a size that is not positive, an even `character_filter_width`, a probability
            outside [0, 1), an unknown head or cell, no tags, tags outside the scheme, not as many
            heads as tasks.
    """

    def __init__(
        self,
        num_words: int,
        num_fixed: int,
        num_characters: int,
        tags: Sequence[str],
        scheme: str | None = None,
        other_tasks: Sequence[tuple[Sequence[str], str | None]] = (),
        num_casings: int = 0,
        first_rare: int | None = None,
        word_size: int = 100,
        character_size: int = 30,
        character_hidden_size: int = 50,
        character_filters: int = 0,
        character_filter_width: int = 3,
        casing_size: int = 0,
        hidden_sizes: Sequence[int] = (200,),
        cell: str = "lstm",
        dropout: float = 0.5,
        recurrent_dropout: float = 0.0,
        variational_dropout: bool = False,
        character_dropout: float = 0.0,
        unk_probability: float = 0.0,
        word_dropout: float = 0.0,
        residual: bool = False,
        layer_norm: bool = False,
        head: Head | Sequence[Head] = "crf",
        vectors: Tensor | None = None,
        freeze_vectors: bool = False,
    ) -> None:
        for name, sizes in (
            ("word_size", [word_size]),
            ("character_size", [character_size]),
            ("hidden_sizes", list(hidden_sizes)),
        ):
            if not sizes or min(sizes) < 1:
                raise ValueError(f"{name}: expected positive numbers, got {sizes}")
        for name, size in (
            ("character_hidden_size", character_hidden_size),
            ("character_filters", character_filters),
            ("casing_size", casing_size),
        ):
            if size < 0:
                raise ValueError(f"{name}: expected 0 or more, got {size}")
        if character_filter_width < 1 or character_filter_width % 2 == 0:
            raise ValueError(
                f"character_filter_width: expected an odd number, got {character_filter_width}"
            )
        for name, value in (
            ("dropout", dropout),
            ("character_dropout", character_dropout),
            ("unk_probability", unk_probability),
            ("word_dropout", word_dropout),
        ):
            if not 0 <= value < 1:
                raise ValueError(f"{name}: expected a number in [0, 1), got {value}")
        heads = [head] * (1 + len(other_tasks)) if isinstance(head, str) else list(head)
        if len(heads) != 1 + len(other_tasks):
            raise ValueError(
                f"head: expected one for each of {1 + len(other_tasks)} tasks, got {head}"
            )
        if vectors is not None and vectors.shape[1] != word_size:
            raise ValueError(
                f"word_size: expected {vectors.shape[1]}, the width of the pretrained vectors, "
                f"got {word_size}"
            )
        nn.Module.__init__(self)  # the head comes last: optimizer states go by this order
        self.words = WordEmbedding(num_words, num_fixed, word_size, vectors, freeze_vectors)
        self.characters = None
        width = word_size + casing_size
        if character_hidden_size or character_filters:
            self.characters = CharacterEncoder(
                num_characters,
                character_size,
                character_hidden_size,
                character_filters,
                character_filter_width,
                character_dropout,
            )
            width += self.characters.output_size
        self.casings = nn.Embedding(num_casings, casing_size) if casing_size else None
        self.dropout = SequenceDropout(dropout) if variational_dropout else Dropout(dropout)
        self.stack = RecurrentStack(
            width,
            hidden_sizes,
            cell=cell,
            bidirectional=True,
            dropout=dropout,
            variational_dropout=variational_dropout,
            residual=residual,
            layer_norm=layer_norm,
            batch_first=True,
            recurrent_dropout=recurrent_dropout,
        )
        self._build_head(self.stack.output_size, tags, scheme, heads[0])
        self.others = nn.ModuleList(
            TagHead(self.stack.output_size, *task, kind)
            for task, kind in zip(other_tasks, heads[1:], strict=True)
        )
        self.rare = range(num_words if first_rare is None else first_rare, num_words)
        self.unk_probability = unk_probability
        self.word_dropout = word_dropout

    @property
    def heads(self) -> list[TagHead]:
        """The head of each task, the first being this model."""
        return [self, *cast(Iterable[TagHead], self.others)]

    def forward(
        self,
        words: Tensor,
        lengths: Tensor,
        characters: Tensor,
        character_lengths: Tensor,
        spellings: Tensor,
        casings: Tensor | None = None,
    ) -> Tensor:
        """Scores the tags of each word in the first task.

        Args:
            words: [B, T] int64, numbers of the words.
            lengths: [B] int64.
            characters: [U, L] int64, of the distinct spellings.
            character_lengths: [U] int64.
            spellings: [B, T] int64, the row of `characters` of each word.
            casings: [U] int64, the casing of each distinct spelling; None where `casing_size` is 0.

        Returns:
            Emissions [B, T, K].
        """
        return self.emission(
            self.encode(words, lengths, characters, character_lengths, spellings, casings)
        )

    def encode(
        self,
        words: Tensor,
        lengths: Tensor,
        characters: Tensor,
        character_lengths: Tensor,
        spellings: Tensor,
        casings: Tensor | None = None,
    ) -> Tensor:
        """Return what the heads of all tasks look at, [B, T, C]; arguments as for `forward`."""
        features = [self.words(self._forget(words))]
        if self.characters is not None:
            spelt = self.characters(characters, character_lengths)
            features.append(F.embedding(spellings, spelt))
        if self.casings is not None:
            if casings is None:
                raise ValueError(
                    "casings: expected [U] int64, because casing_size is positive, got None"
                )
            features.append(F.embedding(spellings, self.casings(casings)))
        encoded, _ = self.stack(self.dropout(torch.cat(features, -1)), lengths=lengths)
        return self.dropout(encoded)

    def _forget(self, words: Tensor) -> Tensor:
        """Take some words for the unknown one: its vector is learnt, and spellings matter more."""
        if not self.training:
            return words
        rare = (words >= self.rare.start) & (words < self.rare.stop)
        probability = torch.where(rare, self.unk_probability, self.word_dropout)
        drawn = torch.rand(words.shape, device=words.device) < probability
        return torch.where(drawn & (words > 0), 1, words)
