"""The row cache: what a model pass costs is kept per row, under a key of its content.

One SQLite file serves all runs of a user, at the same time. A value is written once and never
changed; what two processes compute at once is stored by the first. A batch, or an answer of a
server, is one transaction, so that a killed run leaves whole ones behind.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from leaf_distill.io import StoreError, digest, make_directory
from leaf_distill.ranks import Ranks, current
from leaf_distill.terminal import Progress

FILE = "rows.sqlite"
WAIT_S = 60.0  # for another process that is writing
KEYS_A_QUERY = 500  # SQLite limits the variables of a statement


def default_cache_directory() -> Path:
    """Return LEAF_CACHE_DIR, else leaf-distill in XDG_CACHE_HOME or ~/.cache; ~ stays as it is."""
    if own := os.environ.get("LEAF_CACHE_DIR"):
        return Path(own)
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base) / "leaf-distill"


class RowCache:
    """Bytes by key, in `directory`/rows.sqlite; use it as a context manager.

    Raises:
        StoreError: the file is no cache, is damaged, or cannot be written.
    """

    def __init__(self, directory: Path) -> None:
        make_directory(directory)
        self.path = directory / FILE
        with self._errors():
            self._db = sqlite3.connect(self.path, timeout=WAIT_S, isolation_level=None)
            # Write-ahead logs need memory that all processes share, which two hosts do not have.
            self._db.execute("PRAGMA journal_mode=TRUNCATE")
            # A power cut may lose the last batches; a killed process loses none.
            self._db.execute("PRAGMA synchronous=NORMAL")
            self._db.execute(
                "CREATE TABLE IF NOT EXISTS rows (key TEXT PRIMARY KEY, crc INTEGER NOT NULL, "
                "value BLOB NOT NULL) WITHOUT ROWID"
            )

    def __enter__(self) -> RowCache:
        return self

    def __exit__(self, *error: object) -> None:
        self._db.close()

    def get(self, keys: Sequence[str]) -> dict[str, bytes]:
        """Return the values that are there; one whose checksum is wrong is not."""
        found: dict[str, bytes] = {}
        wanted = list(dict.fromkeys(keys))
        with self._errors():
            for start in range(0, len(wanted), KEYS_A_QUERY):
                part = wanted[start : start + KEYS_A_QUERY]
                marks = ",".join("?" * len(part))
                lines = self._db.execute(
                    f"SELECT key, crc, value FROM rows WHERE key IN ({marks})", part
                )
                found.update((key, value) for key, crc, value in lines if zlib.crc32(value) == crc)
        return found

    def put(self, values: Mapping[str, bytes]) -> dict[str, bytes]:
        """Store values in one transaction and return what the cache now holds for their keys."""
        with self._errors():
            self._db.execute("BEGIN IMMEDIATE")
            try:
                for key, value in values.items():
                    line = self._db.execute("SELECT crc, value FROM rows WHERE key = ?", (key,))
                    old = line.fetchone()
                    if old is None or zlib.crc32(old[1]) != old[0]:
                        self._db.execute(
                            "INSERT OR REPLACE INTO rows VALUES (?, ?, ?)",
                            (key, zlib.crc32(value), value),
                        )
                self._db.execute("COMMIT")
            except BaseException:
                with contextlib.suppress(sqlite3.Error):
                    self._db.execute("ROLLBACK")
                raise
        return self.get(list(values))

    def add(self, values: Mapping[str, bytes]) -> None:
        """Store those values whose keys the cache lacks."""
        keys = list(values)
        for start in range(0, len(keys), KEYS_A_QUERY):
            part = keys[start : start + KEYS_A_QUERY]
            there = self.get(part)
            if new := {key: values[key] for key in part if key not in there}:
                self.put(new)

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            reason = str(error)
            if "full" in reason:
                cure = "free some space and run the same command again; what was done is kept"
            elif "malformed" in reason or "not a database" in reason:
                cure = "delete it; its answers and saliencies are then computed again"
            elif "locked" in reason:
                cure = "another process holds it: wait for its end, or give another cache_dir"
            else:
                cure = "give another cache_dir"
            raise StoreError(f"the cache {self.path} cannot be used ({reason}): {cure}") from error


def compute_missing(
    cache: RowCache,
    keys: Sequence[str],
    batches: Sequence[Sequence[int]],
    compute: Callable[[list[int]], Sequence[bytes]],
    *,
    description: str,
    whole_batches: bool = False,
    keep: Callable[[bytes], bool] = lambda value: True,
) -> list[bytes]:
    """Return the value of each key, computing those that the cache lacks.

    The processes of a run share the batches, the dearest first where the plan has them first, and
    each stores what it computes in its cache. All return the same values. The first process also
    stores those of the others, so that its cache is whole where each machine has its own.

    Args:
        cache: where values are looked up and stored.
        keys: one for each row; rows of equal content may share a key.
        batches: positions in `keys`, each in one batch. The plan covers all rows, also those that
            are in the cache, so that a killed run computes the rest in the same batches.
        compute: returns the values of some positions of one batch.
        description: what the progress says.
        whole_batches: compute all rows of a batch where one is missing, for values that depend on
            the batch's shape.
        keep: whether a value is stored; the others are computed again by the next run.

    Raises:
        RankError: another process of the run has failed, or has other keys or batches.
    """
    ranks = current()
    if ranks.size > 1:
        plan = (np.asarray(batch, dtype=np.int64).tobytes() for batch in batches)
        ranks.agree(digest([*map(str.encode, keys), *plan]))
    found = cache.get(keys)
    unique = list(dict.fromkeys(keys))
    number = {key: at for at, key in enumerate(unique)}
    known, sent = _known(unique, found, ranks)
    parts = _lacking(keys, batches, known, whole_batches=whole_batches)
    if parts:
        shown = ranks.rank == 0
        with Progress(sum(map(len, parts)), description, shown=shown) as progress:
            for index in ranks.share(len(parts)):
                part = parts[index]
                values = dict(zip((keys[at] for at in part), compute(part), strict=True))
                values |= cache.put({key: one for key, one in values.items() if keep(one)})
                found |= values
                sent.update((number[key], value) for key, value in values.items())
                progress.update(ranks.done(len(part)))
    if ranks.size > 1:
        given = {unique[at]: value for at, value in ranks.exchange(sent).items()}
        found |= given
        if ranks.rank == 0:
            cache.add({key: value for key, value in given.items() if keep(value)})
    return [found[key] for key in keys]


def _lacking(
    keys: Sequence[str],
    batches: Sequence[Sequence[int]],
    known: set[str],
    *,
    whole_batches: bool,
) -> list[list[int]]:
    """Return of each batch what is to be computed, where a key is not known; each key once."""
    planned = set(known)
    parts: list[list[int]] = []
    for batch in batches:
        part = []
        for at in batch:
            if keys[at] not in planned:
                planned.add(keys[at])
                part.append(at)
        if part:
            parts.append(list(batch) if whole_batches else part)
    return parts


def store_missing(
    cache: RowCache,
    keys: Sequence[str],
    ask: Callable[[Sequence[int], bool], Iterable[tuple[int, bytes]]],
    *,
    description: str,
    keep: Callable[[bytes], bool],
) -> list[bytes]:
    """Return the value of each key, asking for those that the cache lacks; each is stored at once.

    The processes of a run share what is missing evenly.

    Args:
        cache: where values are looked up and stored.
        keys: one for each row; rows of equal content may share a key, and are asked for once.
        ask: yields positions in `keys` with their values, in any order, for the positions given. It
            is also told whether any value is known already.
        description: what the progress says.
        keep: whether a value is stored; the others are asked for again by the next run.

    Raises:
        RankError: another process of the run has failed, or has other keys.
    """
    ranks = current()
    if ranks.size > 1:
        ranks.agree(digest(keys))
    found = cache.get(keys)
    first: dict[str, int] = {}
    for at, key in enumerate(keys):
        first.setdefault(key, at)
    unique = list(first)
    number = {key: at for at, key in enumerate(unique)}
    known, sent = _known(unique, found, ranks)
    missing = [first[key] for key in unique if key not in known][ranks.rank :: ranks.size]
    if missing:
        with Progress(len(missing), description, shown=ranks.rank == 0) as progress:
            for at, value in ask(missing, bool(known)):
                found[keys[at]] = value
                if keep(value):
                    found |= cache.put({keys[at]: value})
                sent[number[keys[at]]] = found[keys[at]]
                progress.update(1)
    if ranks.size > 1:
        given = {unique[at]: value for at, value in ranks.exchange(sent).items()}
        found |= given
        if ranks.rank == 0:
            cache.add({key: value for key, value in given.items() if keep(value)})
    return [found[key] for key in keys]


def numbered(keys: Sequence[str]) -> list[str]:
    """Return a key for each draw: that of its prompt with the number of draws before it."""
    seen: Counter[str] = Counter()
    draws = []
    for key in keys:
        draws.append(digest([key, seen[key]]))
        seen[key] += 1
    return draws


def _known(
    keys: Sequence[str], found: Mapping[str, bytes], ranks: Ranks
) -> tuple[set[str], dict[int, bytes]]:
    """Return the keys that a rank has found, and the values that this rank has to send for them.

    The lowest rank sends its value where not every rank has one, or where they differ.
    """
    if ranks.size == 1:
        return set(found), {}
    crc = np.asarray([zlib.crc32(found[key]) if key in found else -1 for key in keys], np.int64)
    owner = np.where(crc >= 0, ranks.rank, ranks.size)
    owner, least, most = ranks.least(np.stack([owner, crc, -crc]))
    known = {key for key, one in zip(keys, owner, strict=True) if one < ranks.size}
    mine = (owner == ranks.rank) & (least != -most)
    return known, {at: found[keys[at]] for at in np.flatnonzero(mine).tolist()}
