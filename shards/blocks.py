"""Samples from whole pieces of shards: large reads, made ahead, kept in bounded memory."""

from __future__ import annotations

import threading
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from pathlib import Path

import numpy as np
import numpy.typing as npt

from shards.errors import BadInput, BadSetting
from shards.index import HEADER_BYTES, ROW_BYTES, Shard, open_index, span_at
from shards.mix import Parts
from shards.order import Indices, as_indices, cut
from shards.reader import Pair, Reader, Verify, unpacked


@dataclass(frozen=True, slots=True)
class Place:
    """Where a piece lies: `n_bytes` from `start` of the shard's tar; `rows` are its index rows."""

    shard: int
    first_row: int
    rows: bytes
    start: int
    n_bytes: int


@dataclass(frozen=True, slots=True)
class Piece:
    """A piece as read; shorter than its place says where the tar is cut."""

    place: Place
    data: memoryview


class BlockReader(Reader):
    """Reads the pieces in which samples lie, each by one large read, and keeps the latest.

    For network file systems and object stores, with the order `shards.order.Blocks` of
    the same `piece_samples`. What `expect` tells is read ahead by a thread. Pieces take no more
    than `cache_bytes`; those of samples that a caller still holds are beside that.
    """

    def __init__(
        self,
        shards: Sequence[Shard],
        parts: Parts,
        index_cache: Path,
        verify: Verify,
        *,
        piece_samples: int,
        cache_bytes: int,
    ) -> None:
        super().__init__(shards, parts, index_cache, verify)
        self._first = cut(parts.n_P, piece_samples)
        self.pieces = PieceCache(self._place_of, self._load, cache_bytes)

    def each(self, indices: npt.ArrayLike) -> Iterator[tuple[int, Pair | BadInput]]:
        wanted, piece_of = self._with_pieces(indices)
        places = np.argsort(piece_of, kind="stable")
        _, rows = self._parts.locate(wanted[places])
        asked = zip(piece_of[places].tolist(), places.tolist(), rows.tolist(), strict=True)
        with self.pieces.in_use():
            for number, of_piece in groupby(asked, key=itemgetter(0)):
                piece = self._piece(number)
                for _, place, row in of_piece:
                    if isinstance(piece, BadInput):
                        yield place, piece
                    else:
                        yield place, self._unpacked(piece, row)

    def expect(self, indices: npt.ArrayLike) -> None:
        _, piece_of = self._with_pieces(indices)
        self.pieces.expect(tuple(np.unique(piece_of).tolist()))

    def close(self) -> None:
        self.pieces.close()

    def _with_pieces(self, indices: npt.ArrayLike) -> tuple[Indices, Indices]:
        # Copies of a sample are read from one piece.
        wanted = self._parts.sample_of(as_indices(indices))
        return wanted, np.searchsorted(self._first, wanted, side="right") - 1

    def _piece(self, number: int) -> Piece | BadInput:
        try:
            return self.pieces.get(number)
        except BadSetting:
            raise
        except BadInput as fault:
            return fault

    def _unpacked(self, piece: Piece, row: int) -> Pair | BadInput:
        place = piece.place
        span = span_at(place.rows, (row - place.first_row) * ROW_BYTES)
        start = span.start - place.start
        data = piece.data[start : start + span.size]
        return unpacked(data, span, self._shards[place.shard], row)

    def _place_of(self, number: int) -> Place:
        ends = np.array([self._first[number], self._first[number + 1] - 1])
        (s, _), (first, last) = (both.tolist() for both in self._parts.locate(ends))
        index = open_index(self._shards[s], self._index_cache)
        rows = index[HEADER_BYTES + first * ROW_BYTES : HEADER_BYTES + (last + 1) * ROW_BYTES]
        index.close()
        start, last_span = span_at(rows, 0).start, span_at(rows, len(rows) - ROW_BYTES)
        return Place(s, first, rows, start, last_span.start + last_span.size - start)

    def _load(self, place: Place) -> Piece:
        return Piece(place, self._files.read(place.shard, place.start, place.n_bytes))


class PieceCache:
    """Pieces by number, in no more than `limit` bytes; a thread loads those that are expected.

    A piece that is still expected makes room for no other that is only expected. `n_bytes` is what
    is held or being loaded, `n_loaded` counts the pieces that were.
    """

    def __init__(
        self, place_of: Callable[[int], Place], load: Callable[[Place], Piece], limit: int
    ) -> None:
        self.limit = limit
        self.n_bytes = 0
        self.n_loaded = 0
        self._place_of = place_of
        self._load = load
        self._changed = threading.Condition()
        self._held: OrderedDict[int, Piece] = OrderedDict()  # the latest used last
        self._loading: set[int] = set()
        self._expected: deque[tuple[int, ...]] = deque()  # a use each
        self._uses: Counter[int] = Counter()  # of these, and of the one that goes on
        self._queue: deque[int] = deque()
        self._closed = False
        self._thread: threading.Thread | None = None

    def expect(self, numbers: tuple[int, ...]) -> None:
        """Pieces that the next use but those already expected will ask for."""
        with self._changed:
            self._expected.append(numbers)
            self._uses.update(numbers)
            self._queue.extend(number for number in numbers if number not in self._held)
            self._changed.notify_all()
        if self._thread is None:
            self._thread = threading.Thread(target=self._ahead, name="read-ahead", daemon=True)
            self._thread.start()

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """While this use goes on, what was expected for it is kept."""
        numbers = self._expected.popleft() if self._expected else ()
        try:
            yield
        finally:
            with self._changed:
                self._uses -= Counter(numbers)  # which also forgets those that are expected no more
                self._changed.notify_all()

    def get(self, number: int) -> Piece:
        """The piece, loaded now if need be. Raises BadSetting if it alone is beyond the limit."""
        with self._changed:
            while number in self._loading:
                self._changed.wait()
            if (piece := self._held.get(number)) is not None:
                self._held.move_to_end(number)
                return piece
            self._loading.add(number)
        try:
            place = self._place_of(number)
            if place.n_bytes > self.limit:
                raise BadSetting(
                    "data_loading.cache_bytes",
                    expected=f"room for one piece, {place.n_bytes} bytes",
                    found=str(self.limit),
                    remedy="raise it, or lower data_loading.block.piece_samples",
                )
            with self._changed:
                while not self._has_room(place.n_bytes):
                    if self._held:
                        # Every piece here is expected. Pieces come again in the same turns, so the
                        # latest used is the one that is wanted last.
                        self._drop(next(reversed(self._held)))
                    else:
                        self._changed.wait()  # until what is being loaded ahead can be dropped
                self.n_bytes += place.n_bytes
            return self._loaded(number, place)
        finally:
            self._is_loading_no_more(number)

    def close(self) -> None:
        """Stop reading ahead and forget every piece."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join()
        self._held.clear()
        self.n_bytes = 0

    def _ahead(self) -> None:
        while (number := self._next_expected()) is not None:
            try:
                place = self._place_of(number)
                if self._reserved(number, place):
                    try:
                        self._loaded(number, place)
                    finally:
                        self._is_loading_no_more(number)
            except (BadInput, OSError):
                pass  # whoever asks for the piece meets the same, and is told

    def _next_expected(self) -> int | None:
        with self._changed:
            while not self._closed:
                if self._queue:
                    return self._queue.popleft()
                self._changed.wait()
        return None

    def _reserved(self, number: int, place: Place) -> bool:
        """Waits for room; False where the piece need not be loaded any more."""
        with self._changed:
            while self._is_missing(number) and not self._has_room(place.n_bytes):
                self._changed.wait()
            if not self._is_missing(number):
                return False
            self._loading.add(number)
            self.n_bytes += place.n_bytes
            return True

    def _is_missing(self, number: int) -> bool:
        there = number in self._held or number in self._loading
        return self._uses[number] > 0 and not there and not self._closed

    def _has_room(self, n_bytes: int) -> bool:
        """Drops pieces that nobody expects, the longest unused first, until there is room."""
        for number in [n for n in self._held if not self._uses[n]]:
            if self.n_bytes + n_bytes <= self.limit:
                break
            self._drop(number)
        return self.n_bytes + n_bytes <= self.limit

    def _drop(self, number: int) -> None:
        self.n_bytes -= self._held.pop(number).place.n_bytes

    def _loaded(self, number: int, place: Place) -> Piece:
        try:
            piece = self._load(place)
        except BaseException:
            with self._changed:
                self.n_bytes -= place.n_bytes
            raise
        with self._changed:
            self._held[number] = piece
            self.n_loaded += 1
        return piece

    def _is_loading_no_more(self, number: int) -> None:
        with self._changed:
            self._loading.discard(number)
            self._changed.notify_all()
