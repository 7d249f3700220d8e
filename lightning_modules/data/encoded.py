"""Encoded rows in Arrow files, made once and mapped into memory."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar, overload

if TYPE_CHECKING:
    import pyarrow

R = TypeVar("R", bound=tuple)


class EncodedRows(Sequence[R], Generic[R]):
    """Rows that lie in an Arrow file in the cache of `datasets`, not in memory.

    The file is made when it is not there, by one process of a run while the others wait; all of
    them, their workers and later runs read it. Its name is a digest of the key and of the code that
    encodes, so that no change of either finds an old file.

    Args:
        kind: the NamedTuple of a row; of ints, strings, None, and lists of these.
        encode: makes the rows; called only if they are not there.
        key: all that the rows depend on, as data that JSON can hold.

    Raises:
        Exception: what `encode` raised.
    """

    def __init__(self, kind: type[R], encode: Callable[[], Iterable[R]], key: Any) -> None:
        import datasets  # here, because a trained model is used without

        digest = hashlib.sha256(_code())
        digest.update(json.dumps([kind.__name__, key]).encode())

        def generate() -> Iterator[dict[str, Any]]:
            return (row._asdict() for row in encode())  # type: ignore[attr-defined]

        bars = datasets.are_progress_bars_disabled()
        datasets.disable_progress_bars()
        try:
            self._data = datasets.Dataset.from_generator(generate, fingerprint=digest.hexdigest())
        except datasets.exceptions.DatasetGenerationError as error:
            raise error.__cause__ or error from None
        finally:
            if not bars:
                datasets.enable_progress_bars()
        self._kind = kind

    def __len__(self) -> int:
        return len(self._data)

    @overload
    def __getitem__(self, place: int) -> R: ...
    @overload
    def __getitem__(self, place: slice) -> list[R]: ...
    def __getitem__(self, place: int | slice) -> R | list[R]:
        if isinstance(place, slice):
            return self.__getitems__(list(range(len(self))[place]))
        return self._kind(**self._data[place])

    def __getitems__(self, places: list[int]) -> list[R]:
        """Return some rows at once, as a `DataLoader` asks for them."""
        columns = self._data[places]
        cells = zip(*(columns[name] for name in self._kind._fields), strict=True)  # type: ignore[attr-defined]
        return [self._kind(*row) for row in cells]

    def column(self, name: str) -> pyarrow.ChunkedArray:
        """Return a field of all rows, as it lies in the file.

        Args:
            name: the field.
        """
        return self._data.data.column(name)

    def lengths(self, name: str) -> list[int]:
        """Return the length of a list in every row.

        Args:
            name: the field that holds it.
        """
        import pyarrow.compute

        return pyarrow.compute.list_value_length(self.column(name)).to_pylist()


@cache
def _code() -> bytes:
    """Digest the modules that encode."""
    files = sorted(Path(__file__).parent.glob("*.py"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).digest()
