"""Symbols and their numbers."""

from collections.abc import Iterable, Mapping, Sequence

SPECIALS = ("<pad>", "<unk>", "<bos>", "<eos>")


class Vocabulary:
    """A list of distinct symbols, numbered from 0, the special ones first.

    The special symbols (`<pad>`, `<unk>`, `<bos>`, `<eos>`) have numbers but cannot be reached from
    text: a word that happens to be spelt `<pad>` is an unknown word.

    Args:
        symbols: distinct strings. A list that already starts with a special symbol (one from
            `to_list`) is taken as it is, so `Vocabulary(vocabulary.to_list(), ())` restores any
            vocabulary.
        specials: special symbols to put in front; `()` for a vocabulary of labels.

    Attributes:
        symbols: list of all symbols; the number of a symbol is its place.
        pad, unk, bos, eos: numbers of the special symbols, None for those that are absent; `pad` is
            0 when present.

    Raises:
        TypeError: a symbol is not a string.
        ValueError: a symbol occurs twice, or `specials` names something else than the four above.
    """

    def __init__(self, symbols: Iterable[str], specials: Sequence[str] = SPECIALS[:2]) -> None:
        unknown = [special for special in specials if special not in SPECIALS]
        if unknown:
            raise ValueError(f"specials: {unknown[0]!r} is not one of {', '.join(SPECIALS)}")
        listed = list(symbols)
        for symbol in listed:
            if not isinstance(symbol, str):
                raise TypeError(f"symbols: expected strings, got {symbol!r}")
        self.symbols = listed if listed and listed[0] in SPECIALS else [*specials, *listed]
        ordinary = next((i for i, s in enumerate(self.symbols) if s not in SPECIALS), len(self))
        head = {symbol: i for i, symbol in enumerate(self.symbols[:ordinary])}
        self._numbers = {s: i for i, s in enumerate(self.symbols[ordinary:], start=ordinary)}
        if len(head) + len(self._numbers) != len(self) or head.get("<pad>", 0) != 0:
            twice = [s for s in self.symbols if self.symbols.count(s) > 1]
            problem = f"more than one {twice[0]}" if twice else "<pad> not in first place"
            raise ValueError(f"symbols: expected distinct symbols, got {problem}")
        self.pad, self.unk, self.bos, self.eos = (head.get(special) for special in SPECIALS)

    @classmethod
    def from_counts(
        cls,
        counts: Mapping[str, int],
        min_count: int = 1,
        specials: Sequence[str] = SPECIALS[:2],
    ) -> "Vocabulary":
        """Build a vocabulary from counts, the most frequent first, ties in alphabetical order.

        Args:
            counts: how often each symbol occurs in the training split.
            min_count: symbols seen less often are left out (and so map to `<unk>`).
            specials: special symbols to put in front. Counted symbols spelt like a special one are
                left out.
        """
        kept = [s for s, n in counts.items() if n >= min_count and s not in SPECIALS]
        return cls(sorted(kept, key=lambda s: (-counts[s], s)), specials)

    def __len__(self) -> int:
        return len(self.symbols)

    def __contains__(self, symbol: object) -> bool:
        return symbol in self._numbers

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Vocabulary) and self.symbols == other.symbols

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"Vocabulary({len(self)} symbols)"

    def index(self, symbol: str, default: int | None = None) -> int:
        """Return the number of a symbol of the text.

        Args:
            symbol: any string.
            default: what to return for an unknown symbol instead of `unk`, such as -100 for a label
                to ignore.

        Raises:
            ValueError: the symbol is unknown, and there is neither a default nor an `<unk>`.
        """
        number = self._numbers.get(symbol, self.unk if default is None else default)
        if number is None:
            raise ValueError(f"symbol: {symbol!r} is not in this vocabulary, which has no <unk>")
        return number

    def encode(self, symbols: Iterable[str]) -> list[int]:
        """Return the numbers of a sequence of symbols."""
        if self.unk is None:
            return [self.index(symbol) for symbol in symbols]
        find, unknown = self._numbers.get, self.unk
        return [find(symbol, unknown) for symbol in symbols]

    def decode(self, numbers: Iterable[int]) -> list[str]:
        """Return the symbols of a sequence of numbers, special ones included."""
        return [self.symbols[number] for number in numbers]

    def to_list(self) -> list[str]:
        """Return all symbols in order, for a checkpoint."""
        return list(self.symbols)
