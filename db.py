"""The database of the shop: connections, transactions and every SQL statement.

HTTP is left to shop.py, and schema.sql enforces what must always be true. Money is whole cents,
stock is in pieces, and times are UTC, written as 2026-11-22T10:15:30Z. Many threads may share a
Store: each reads through its own connection, and all write through the same one.

    store = Store("db.sqlite3")
    mug = store.create_product(name="Mug", price=999, stock=5)
    store.create_order([{"product_id": mug["id"], "quantity": 2}])
"""

import collections
import contextlib
import functools
import hashlib
import json
import logging
import os
import re
import sqlite3
import threading
import time
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

SCHEMA = Path(__file__).with_name("schema.sql")
SCHEMA_VERSION = 7
APPLICATION_ID = 1397247824  # "SHOP" in ASCII
MAX_STOCK = 1_000_000_000  # pieces
MAX_TOTAL = 10**15  # cents, of an order
MAX_METADATA = 50  # entries
MAX_ID = 10**18 - 1  # the largest id that a request may name
SQLITE_VERSION = sqlite3.sqlite_version
KEY_TTL = 24 * 3600  # seconds
PURGE_LIMIT = 4  # expired idempotency keys that are deleted when one is saved
WAL_LIMIT = 64 << 20  # bytes by which the WAL may grow before it is folded into the file
SMALL_WRITE = "PRAGMA application_id = 1397247824"  # writes a page even if the value is the same

log = logging.getLogger("shop")


# ------------------------------------------------------------------------------------ exceptions


class NotFound(Exception):
    """There is no such product or order."""

    def __init__(self, kind: str, row_id: int):
        super().__init__(f"There is no {kind} {row_id}.")


class UnknownProducts(Exception):
    """An order names missing products; `lines` maps positions of lines to product ids."""

    def __init__(self, lines: dict[int, int]):
        super().__init__(f"There are no products {', '.join(map(str, lines.values()))}.")
        self.lines = lines


class UnknownPlace(Exception):
    """A page cannot continue after a deleted product, whose name and price are unknown."""


class InsufficientStock(Exception):
    """`shortages` has a dict for each short line: product_id, requested and available pieces."""

    def __init__(self, shortages: list[dict]):
        sentence = "Product {product_id} has {available} left, {requested} were asked for."
        super().__init__(" ".join(sentence.format(**line) for line in shortages))
        self.shortages = shortages


class ExcessiveStock(Exception):
    """A change would raise a product's stock above MAX_STOCK."""


class ExcessiveTotal(Exception):
    """An order would cost more than MAX_TOTAL."""


class ExcessiveMetadata(Exception):
    """A product or an order would have more than MAX_METADATA entries of metadata."""


class DuplicateSku(Exception):
    """Another product, `product_id`, already has the sku."""

    def __init__(self, product_id: int, sku: str):
        super().__init__(f"Product {product_id} already has the sku '{sku}'.")
        self.product_id = product_id


class InvalidTransition(Exception):
    """The status of an order cannot change in this way."""

    def __init__(self, order_id: int, status: str, requested: str):
        super().__init__(f"Order {order_id} is {status} and cannot become {requested}.")


class PreconditionFailed(Exception):
    """The row does not meet the caller's Precondition."""


class IdempotencyKeyReused(Exception):
    """The idempotency key was used for another request."""


class DatabaseUnavailable(Exception):
    """The database cannot be read or written now. Nothing was changed."""


class TransactionLost(DatabaseUnavailable):
    """The transaction was rolled back, because one of its steps failed after a change."""


class OutcomeUnknown(DatabaseUnavailable):
    """A commit failed, and its changes may or may not be there after a crash."""

    def __init__(self) -> None:
        super().__init__(
            "The database failed while it stored this. It may or may not have been stored: "
            "check before you retry, or use an Idempotency-Key."
        )


class DatabaseBusy(DatabaseUnavailable):
    """Another connection holds the write lock."""


class DatabaseError(Exception):
    """The file cannot be used as the shop's database. It was not changed."""


BUSY_CODES = {sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_PROTOCOL}
UNAVAILABLE_CODES = {
    sqlite3.SQLITE_NOMEM: "SQLite is out of memory.",
    sqlite3.SQLITE_READONLY: "The database is read-only.",
    sqlite3.SQLITE_IOERR: "The disk cannot be read or written.",
    sqlite3.SQLITE_FULL: "The disk is full.",
    sqlite3.SQLITE_CANTOPEN: "The database cannot be opened.",
    sqlite3.SQLITE_CORRUPT: "The database is damaged.",
    sqlite3.SQLITE_NOTADB: "The file is not a database.",
}


def translate_error(error: BaseException) -> BaseException:
    """The exception to raise for an error: itself, unless SQLite could not use the file."""
    code = getattr(error, "sqlite_errorcode", 0) & 0xFF  # the low byte is the primary code
    if code in BUSY_CODES:
        return DatabaseBusy("The database is busy.")
    if code in UNAVAILABLE_CODES:
        return DatabaseUnavailable(UNAVAILABLE_CODES[code])
    return error


def file_id(path: Path) -> tuple | None:
    """Device and inode, which differ for another file at the path; None without a file."""
    with contextlib.suppress(OSError):
        status = path.stat()
        return status.st_dev, status.st_ino
    return None


def timestamp(seconds_ago: float = 0) -> str:
    """The UTC time this many seconds ago."""
    return format_time(int(time.time() - seconds_ago))


@functools.lru_cache(maxsize=8)
def format_time(seconds: int) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))


def etag(row: dict | sqlite3.Row) -> str:
    """A short text, the same for two rows of a table only if all their columns are equal."""
    return hashlib.blake2b(repr(tuple(dict(row).values())).encode(), digest_size=12).hexdigest()


# The caller's condition on the etag() of the row to be changed.
Precondition = Callable[[str], bool] | None


# -------------------------------------------------------------------------------------- Database


class Database:
    """Connections to one SQLite file, and transactions on it.

    path: the file, created if it does not exist. lock_timeout: seconds that a write waits for the
    lock. read_only: open a copy that another process keeps up to date; writes then fail.
    checkpoints: fold the WAL into the file now and then. Only one process should, the server or
    Litestream: SQLite before 3.51.3 can damage a file that two processes write and checkpoint at
    the same moment. trace: called with the text of every statement.

    Raises DatabaseError for a file that is not a database, belongs to another program or a newer
    version of the shop, or cannot be written. A locked file is no error: the first call that finds
    it unlocked opens it.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        *,
        lock_timeout: float = 5.0,
        read_only: bool = False,
        checkpoints: bool = False,
        trace: Callable[[str], object] | None = None,
    ):
        if sqlite3.sqlite_version_info < (3, 37):
            raise DatabaseError(f"SQLite {sqlite3.sqlite_version} is too old: 3.37 is needed.")
        self.path = Path(os.path.realpath(path))  # SQLite puts the WAL next to a link's target
        self.lock_timeout = lock_timeout
        self.read_only = read_only
        self._wal = self.path.with_name(self.path.name + "-wal")
        self._checkpoints = checkpoints
        self._trace = trace
        self._writer: Any = None  # a sqlite3.Connection, once open
        self._writer_lock = threading.Lock()
        self._writer_thread: int | None = None  # the thread inside a transaction
        self._local = threading.local()  # .reader: the thread's own connection for reading
        self._must_roll_back = False  # because a step of the transaction failed after a change
        self._write_error: Exception | None = None  # why the last write failed, if it did
        self._next_trial = 0.0  # on the monotonic clock: when check_health() may try a write
        self._file_id: tuple | None = None  # of the open file
        self._next_check = 0.0  # on the monotonic clock: when to compare the file_id() again
        self._is_lost = False  # whether the open file has been deleted or replaced
        try:
            if read_only:
                self._inspect_file()
            else:
                self._open_writer()
        except (sqlite3.Error, OSError) as error:
            failure = translate_error(error)
            if isinstance(failure, sqlite3.Error):
                raise
            if not isinstance(failure, DatabaseBusy):
                raise DatabaseError(f"{self.path}: {failure}") from error

    def close(self) -> None:
        """Close this thread's connections; those of other threads close when the threads end.

        The last connection of all processes folds the WAL into the file as it closes.
        """
        for connection in getattr(self._local, "reader", None), self._writer:
            if connection:
                connection.close()

    def _connect(self, mode: str, timeout: float = 1.0) -> sqlite3.Connection:
        connection = sqlite3.connect(
            f"{self.path.as_uri()}?{mode}",
            uri=True,
            timeout=timeout,
            isolation_level=None,
            check_same_thread=False,
        )
        connection.row_factory = sqlite3.Row
        connection.set_trace_callback(self._trace)
        return connection

    def _inspect_file(self) -> None:
        """Raise DatabaseError if the file cannot be the shop's. Creates and writes no file."""
        size = self.path.stat().st_size if self.path.exists() else 0
        if self.path.exists() and not self.path.is_file():
            raise DatabaseError(f"{self.path} is not a file.")
        if size == 1:  # which SQLite takes for empty
            raise DatabaseError(f"{self.path} is not a database.")
        if size == 0 and not self.read_only:
            return
        connecting = self._connect(self._inspection_mode(), self.lock_timeout)
        with contextlib.closing(connecting) as connection:
            [(version, application_id, tables)] = connection.execute("""
                SELECT (SELECT user_version FROM pragma_user_version),
                       (SELECT application_id FROM pragma_application_id),
                       (SELECT count(*)
                          FROM sqlite_schema
                         WHERE name NOT LIKE '@_litestream%' ESCAPE '@')
            """)
        self._reject_newer_schema(version)
        is_empty = not version and not tables
        if application_id != APPLICATION_ID and (self.read_only or not is_empty):
            raise DatabaseError(f"{self.path} is the database of another program.")
        if self.read_only and version < SCHEMA_VERSION:
            raise DatabaseError(
                f"{self.path} has schema {version}, but {SCHEMA_VERSION} is needed: "
                "start the shop on it once, without READ_ONLY."
            )

    def _inspection_mode(self) -> str:
        if self.path.with_name(self.path.name + "-journal").exists():
            # The power failed in the first milliseconds of the file's life. SQLite must roll the
            # journal back before it reads, which needs a connection that may write.
            return "mode=rw"
        if self._wal.exists():
            return "mode=ro"
        return "mode=ro&immutable=1"  # the file is complete; "mode=ro" would create -wal and -shm

    def _reject_newer_schema(self, version: int) -> None:
        if version > SCHEMA_VERSION:
            raise DatabaseError(
                f"{self.path} was made by a newer version of the shop: its schema is {version}, "
                f"this version supports {SCHEMA_VERSION}."
            )

    def _open_writer(self) -> None:
        """Open the connection that writes; create or migrate the tables."""
        self._inspect_file()
        writer = self._connect("mode=rwc", self.lock_timeout)
        try:
            self._configure_writer(writer)
            self._prepare_schema(writer)
        except BaseException:
            writer.close()
            raise
        self._writer = writer
        self._file_id = file_id(self.path)
        self._wal_limit = self._wal.stat().st_size + WAL_LIMIT

    def _configure_writer(self, writer: sqlite3.Connection) -> None:
        if writer.execute("PRAGMA journal_mode = WAL").fetchone()["journal_mode"] != "wal":
            raise DatabaseError(f"{self.path}: its file system does not support WAL mode.")
        writer.execute("PRAGMA synchronous = FULL")
        writer.execute("PRAGMA fullfsync = ON")  # macOS: fsync alone does not reach the disk
        writer.execute("PRAGMA checkpoint_fullfsync = ON")
        writer.execute("PRAGMA foreign_keys = ON")
        writer.execute("PRAGMA journal_size_limit = 67108864")  # a large WAL shrinks again
        if self._checkpoints:
            # 16 MiB of WAL, not 4, so that a page that many orders change is written back once.
            writer.execute("PRAGMA wal_autocheckpoint = 4000")
        else:
            writer.execute("PRAGMA wal_autocheckpoint = 0")

    def _prepare_schema(self, writer: sqlite3.Connection) -> None:
        """Migrate an older file in one transaction, so that a crash leaves it unchanged.

        On a current file, a write that is rolled back shows at the start, not at the first order,
        whether the file can be written. BEGIN IMMEDIATE would not show it: on a file that cannot
        be written, SQLite silently begins a read transaction.
        """
        version = writer.execute("PRAGMA user_version").fetchone()["user_version"]
        try:
            writer.execute("BEGIN IMMEDIATE")
        except sqlite3.OperationalError as error:
            if version == SCHEMA_VERSION and error.sqlite_errorcode == sqlite3.SQLITE_BUSY:
                return  # another process writes, and reads need not wait for it
            raise
        version = writer.execute("PRAGMA user_version").fetchone()["user_version"]
        self._reject_newer_schema(version)
        writer.execute(SMALL_WRITE)
        if version < SCHEMA_VERSION:
            migrate(writer, version)
            writer.execute("COMMIT")
        else:
            writer.execute("ROLLBACK")

    def _reader(self) -> sqlite3.Connection:
        """This thread's connection for reading, whose file is checked about once a second."""
        if not self._writer:
            with self.transaction():
                pass  # opens the writer, which prepares the file
        reader = getattr(self._local, "reader", None)
        now = time.monotonic()
        if reader is None or self._is_lost or now >= self._next_check:
            self._next_check = now + 1
            self._check_file()
        if reader is None:
            reader = self._connect("mode=rw")
            reader.execute("PRAGMA query_only = ON")
            self._local.reader = reader
        return reader

    def _read(self, sql: str, parameters: dict | tuple = ()) -> list[sqlite3.Row]:
        """All rows of a query, because a cursor left open would keep checkpoints incomplete."""
        if self.read_only:
            # Litestream writes pages without SQLite's change counter, and none while a connection
            # is open in WAL mode: one that stayed open would read old pages, or block new ones.
            return list(self._stream(sql, parameters))
        try:
            return self._reader().execute(sql, parameters).fetchall()
        except sqlite3.Error as error:
            raise translate_error(error) from error

    def _stream(self, sql: str, parameters: dict | tuple = ()) -> Iterator[sqlite3.Row]:
        """The rows of a query one by one, from a connection of its own that closes after them."""
        mode = "mode=ro" if self.read_only else "mode=rw"
        try:
            if not self.read_only:
                self._reader()  # checks the file, or opens one that was locked before
            with contextlib.closing(self._connect(mode)) as reader:
                yield from reader.execute(sql, parameters)
        except sqlite3.Error as error:
            raise translate_error(error) from error

    def check_health(self) -> None:
        """Read the database; after a failed write also try a small one, at most once a second.

        Waits for no lock. Raises DatabaseUnavailable if either fails.
        """
        try:
            self._read("SELECT id FROM product LIMIT 1")
        except sqlite3.Error as error:
            raise DatabaseUnavailable("The database cannot be read.") from error
        if self._write_error and self._writer and time.monotonic() >= self._next_trial:
            self._next_trial = time.monotonic() + 1
            with contextlib.suppress(sqlite3.Error, DatabaseBusy), self._second_writer() as trial:
                self._configure_writer(trial)
                self._empty_wal(trial)
                trial.execute(SMALL_WRITE)
                self._write_error = None
        if self._write_error:
            raise DatabaseUnavailable(f"The last write failed: {self._write_error}")

    @contextlib.contextmanager
    def _second_writer(self) -> Iterator[sqlite3.Connection]:
        """A connection that waits for no lock, to write while no thread is in a transaction.

        Raises DatabaseBusy if one is, DatabaseUnavailable if the file has been replaced.
        """
        self._check_file()
        if not self._writer_lock.acquire(blocking=False):
            raise DatabaseBusy("The database is busy.")
        try:
            with contextlib.closing(self._connect("mode=rw", timeout=0)) as connection:
                yield connection
        finally:
            self._writer_lock.release()

    def checkpoint_if_large(self) -> None:
        """Fold a WAL that other processes have made large into the file, if that is possible now.

        To be called about once a second by the server, whose own commits checkpoint by themselves.
        Waits for no lock, raises nothing, and costs one stat() while the WAL is small.
        """
        with contextlib.suppress(OSError, sqlite3.Error, DatabaseUnavailable):
            if self._writer and self._checkpoints and self._has_large_wal():
                with self._second_writer() as connection:
                    # While nobody can write, the checkpoint reaches the end of the WAL, and nobody
                    # starts the WAL over under it, which SQLite before 3.51.3 might not notice.
                    connection.execute("BEGIN IMMEDIATE")
                    self._writer.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchall()
                    self._wal_limit = self._wal.stat().st_size + WAL_LIMIT

    def data_version(self) -> object:
        """A value that changes with every change of the data; None while it is unknown."""
        if not self.read_only:
            with contextlib.suppress(DatabaseUnavailable):
                [(version,)] = self._read("PRAGMA data_version")
                return self._reader(), version  # each connection has its own count
            return None
        with contextlib.suppress(FileNotFoundError):
            file = self.path.stat()
            # The modification time misses what is in the WAL, and the second of two changes in one
            # tick of the file system's clock.
            if not self._wal.exists() and time.time_ns() - file.st_mtime_ns >= 100_000_000:
                return file.st_ino, file.st_size, file.st_mtime_ns
        return None

    def _check_file(self) -> None:
        """Raise DatabaseUnavailable if the open file has been deleted or replaced."""
        was_lost = self._is_lost
        self._is_lost = file_id(self.path) != self._file_id
        if not self._is_lost:
            return
        if self._writer_thread in (None, threading.get_ident()):
            # The next start would replay the WAL into whatever file is at the path by then.
            with contextlib.suppress(sqlite3.Error):
                self._writer.rollback()
            self._empty_wal(self._writer)
        if not was_lost:
            log.warning(f"{self.path} has been deleted or replaced: restart the shop.")
        raise DatabaseUnavailable("The database file has been deleted or replaced.")

    @contextlib.contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """Run a block of writes that take effect together or not at all.

        Yields the connection that writes. Commits at the end of the block, rolls back if it raises.

        Inside another transaction of the same thread, the block is a step of the outer one, and
        only the outer one commits. A step that raises before its first change leaves the outer one
        intact; after one that raises later, the outer one rolls back and raises TransactionLost,
        even if the error was caught. (A savepoint could undo the step alone, but would take a tenth
        of the CPU of an order, since SQLite copies each page before it is changed.)

        Raises DatabaseBusy if the write lock is not free within lock_timeout seconds,
        OutcomeUnknown if the disk fails during the commit, or another DatabaseUnavailable.
        """
        if self._writer_thread == threading.get_ident():
            self._require_transaction()
            changes = self._writer.total_changes
            try:
                yield self._writer
            except BaseException as error:
                if self._writer.total_changes != changes:
                    self._must_roll_back = True
                self._note_failure(error)
                raise
            return
        if self.read_only:
            raise DatabaseUnavailable(
                "This is a read-only copy of the shop: send writes to the shop itself."
            )
        if not self._writer_lock.acquire(timeout=self.lock_timeout):
            raise DatabaseBusy("The database is busy.")
        try:
            if self._write_error:
                self._empty_wal(self._writer)  # or it would take the space that was freed since
            self._close_large_wal()
            if not self._writer:
                self._open_writer()  # the file was locked when the Store was made
            # IMMEDIATE takes the write lock before the first read, so that the stock that is
            # checked is the stock that is deducted.
            self._writer.execute("BEGIN IMMEDIATE")
            self._writer_thread = threading.get_ident()
            self._must_roll_back = False
            changes = self._writer.total_changes
            yield self._writer
            self._commit()
            if self._writer.total_changes != changes:
                self._write_error = None
        except BaseException as error:
            if self._writer:
                self._writer.rollback()
            self._note_failure(error)
            raise
        finally:
            self._writer_thread = None
            self._writer_lock.release()

    batch = transaction  # for the writes of many requests: each is a step, all share one commit

    def _require_transaction(self) -> None:
        # SQLite itself may have rolled back, after a full disk or an I/O error.
        if self._must_roll_back or not self._writer.in_transaction:
            raise TransactionLost("The transaction was rolled back.")

    def _commit(self) -> None:
        """COMMIT.

        If its fsync fails, the frames stay in the WAL and could be replayed after a crash. A small
        committed write overwrites the first of them, which makes the rest void.
        """
        self._require_transaction()
        self._check_file()
        try:
            self._writer.execute("COMMIT")
        except sqlite3.Error as failure:
            if failure.sqlite_errorcode != sqlite3.SQLITE_IOERR_FSYNC:
                raise
            try:
                self._writer.rollback()
                self._writer.execute(SMALL_WRITE)
            except sqlite3.Error as error:
                raise OutcomeUnknown from error
            raise

    def _note_failure(self, error: BaseException) -> None:
        """Translate a SQLite error, remember it for check_health(), and raise it."""
        failure = translate_error(error)
        if isinstance(error, DatabaseError):
            failure = DatabaseUnavailable(str(error))
        # A lock is no fault, and the one behind a TransactionLost has been remembered.
        is_ignored = isinstance(failure, (DatabaseBusy, TransactionLost))
        if isinstance(failure, DatabaseUnavailable) and not is_ignored:
            self._write_error = failure
        if failure is not error:
            raise failure from error

    def _close_large_wal(self) -> None:
        """Without checkpoints: close a large WAL, which deletes it unless others have it open."""
        if self._writer and not self._checkpoints and self._has_large_wal():
            self.close()
            self._local.reader = self._writer = None

    def _has_large_wal(self) -> bool:
        size = self._wal.stat().st_size if self._wal.exists() else 0
        self._wal_limit = min(self._wal_limit, size + WAL_LIMIT)  # a WAL may shrink
        return size > self._wal_limit

    def _empty_wal(self, connection: sqlite3.Connection | None) -> None:
        """Fold the WAL into the file, as far as its readers allow."""
        if self._checkpoints and connection:
            with contextlib.suppress(sqlite3.Error):
                connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()


# ----------------------------------------------------------------------------------------- Store


class Store(Database):
    """The products, stock ledger, orders and idempotency keys of a shop, in one SQLite file."""

    _purged = ""  # the time before which no idempotency key is left

    # --- products

    def list_products(self, **query: Any) -> tuple[list[dict], int | None]:
        """The products, all of them or a page, and the id to continue after, or None.

        All arguments are optional. q: words that must all occur in name or description, compared
        by fold(). sku: the sku that a product must have; "" for none. available: whether it must
        be in stock, or must not. sort: a key of PRODUCT_ORDERS. after: the id to continue after;
        0 starts at the beginning. limit: products per page. Raises UnknownPlace.
        """
        sql, parameters = self._select_products(PRODUCT_COLUMNS, **query)
        rows, next_after = cut_page(self._read(sql, parameters), query.get("limit"))
        return [decode(row) for row in rows], next_after

    def list_products_json(self, **query: Any) -> tuple[str, int | None]:
        """Like list_products(), but as JSON objects joined by commas, with prices as decimals.

        SQLite writes JSON three times as fast as json.dumps, while other threads may run.
        """
        sql, parameters = self._select_products(PRODUCT_JSON, **query)
        if query.get("limit") is None:
            [(text,)] = self._read("SELECT group_concat(json) FROM (" + sql + ")", parameters)
            return text or "", None
        rows, next_after = cut_page(self._read(sql, parameters), query["limit"])
        return ",".join(row["json"] for row in rows), next_after

    def _select_products(
        self,
        columns: str,
        *,
        q: str | None = None,
        sku: str | None = None,
        available: bool | None = None,
        sort: str = "id",
        after: int = 0,
        limit: int | None = None,
    ) -> tuple[str, dict]:
        """The statement of list_products() for these columns, and its parameters."""
        words = sorted(set(fold(q or "").split()), key=len)
        conditions = {
            "(stock > 0) = :available": available is not None,
            "sku = :sku": sku is not None,
            "sku <> ''": sku,  # lets SQLite use the partial index
            HAS_LONGEST_WORD: words,
            HAS_OTHER_WORDS: words[1:],
        }
        by_name = sort.endswith("name")
        source = " FROM product"
        if words or by_name:
            source = FOUND_PRODUCT if sku else SEARCHED_PRODUCTS
        parameters: dict[str, Any] = {
            "sku": sku,
            "longest_word": words[-1] if words else None,
            "other_words": json.dumps(words[:-1]),
            "available": available,
            "after": after,
            "limit": -1 if limit is None else limit + 1,
        }
        if after and not sort.endswith("id"):
            rows = self._read(SELECT_PRODUCT, {"id": after})
            if not rows:
                raise UnknownPlace(
                    f"names product {after}, which does not exist: its place is unknown"
                )
            parameters["value"] = fold(rows[0]["name"]) if by_name else rows[0]["price"]
        select = "SELECT " + columns + source
        return select_page(select, conditions, PRODUCT_ORDERS[sort], after), parameters

    def get_product(self, product_id: int) -> dict:
        """The product, with its price in cents. Raises NotFound."""
        return only_row("product", product_id, self._read(SELECT_PRODUCT, {"id": product_id}))

    def create_product(self, **fields: Any) -> dict:
        """Add a product and return it.

        fields: name and price in cents; optionally description, stock in pieces, sku and
        metadata, a dict of texts. Raises DuplicateSku, ExcessiveMetadata.
        """
        with self.transaction() as connection:
            return self._save_product(connection, merge(PRODUCT_DEFAULTS, fields))

    def update_product(
        self, product_id: int, *, if_match: Precondition = None, **fields: Any
    ) -> dict:
        """Set the given fields (see create_product) and return the product.

        metadata: merged; None removes an entry, and entries that are not given stay. if_match: a
        condition on the product's etag(). Raises NotFound, PreconditionFailed, DuplicateSku,
        ExcessiveMetadata.
        """
        with self.transaction() as connection:
            before = read_to_change(connection, "product", product_id, if_match)
            return self._save_product(connection, merge(before, fields), before)

    def update_stock(
        self, product_id: int, change: int, note: str = "", *, if_match: Precondition = None
    ) -> dict:
        """Add `change` pieces to the stock, or remove them if negative, and return the product.

        note: the reason, for the ledger. if_match: as in update_product. Raises NotFound,
        PreconditionFailed, InsufficientStock, ExcessiveStock.
        """
        with self.transaction() as connection:
            before = read_to_change(connection, "product", product_id, if_match)
            stock = before["stock"]
            if stock + change < 0:
                short = {"product_id": product_id, "requested": -change, "available": stock}
                raise InsufficientStock([short])
            if stock + change > MAX_STOCK:
                raise ExcessiveStock(
                    f"must be at most {MAX_STOCK - stock}, to keep the stock within {MAX_STOCK}"
                )
            product = {**before, "stock": stock + change}
            return self._save_product(connection, product, before, note)

    def list_movements(
        self, product_id: int, *, sort: str = "id", after: int = 0, limit: int = 100
    ) -> tuple[list[dict], int | None]:
        """A page of a product's stock movements, and the id to continue after, or None.

        sort: a key of ID_ORDERS. after: the id to continue after; 0 starts at the beginning.
        limit: movements per page. Raises NotFound.
        """
        self.get_product(product_id)
        conditions = {"product_id = :product_id": True}
        rows = self._read(
            select_page(SELECT_MOVEMENTS, conditions, ID_ORDERS[sort], after),
            {"product_id": product_id, "after": after, "limit": limit + 1},
        )
        movements, next_after = cut_page(rows, limit)
        return [dict(row) for row in movements], next_after

    def delete_product(self, product_id: int, *, if_match: Precondition = None) -> None:
        """Delete a product; order lines keep their copies of its name, price and sku.

        if_match: as in update_product. Raises NotFound, PreconditionFailed.
        """
        with self.transaction() as connection:
            read_to_change(connection, "product", product_id, if_match)
            connection.execute("DELETE FROM product WHERE id = :id", {"id": product_id})

    def _save_product(
        self,
        connection: sqlite3.Connection,
        product: dict,
        before: dict | None = None,
        note: str = "",
    ) -> dict:
        """Write a product, its search texts and the change of its stock; return the product.

        product: its id is None if it is new. before: the product before the change. note: why the
        stock changes. Raises DuplicateSku.
        """
        if before is None or product["sku"] != before["sku"]:
            self._require_free_sku(connection, product["sku"])
        statement = SAVE_PRODUCT + " RETURNING " + PRODUCT_COLUMNS
        [row] = connection.execute(statement, encode(product)).fetchall()
        texts = ("name", "description")
        if before is None or any(row[name] != before[name] for name in texts):
            fill_search(connection, row["id"], row["id"])
        change = row["stock"] - (before["stock"] if before else 0)
        if change:
            connection.execute(
                """
                INSERT INTO movement (product_id, id, change, stock, note, created_at)
                SELECT id, movements, :change, stock, :note, :now
                  FROM product
                 WHERE id = :id
                """,
                {"id": row["id"], "change": change, "note": note, "now": timestamp()},
            )
        return decode(row)

    @staticmethod
    def _require_free_sku(connection: sqlite3.Connection, sku: str) -> None:
        """Raise DuplicateSku if a product has this sku, unless it is empty."""
        sql = "SELECT id FROM product WHERE sku = :sku AND sku <> ''"
        other = connection.execute(sql, {"sku": sku}).fetchone()
        if other:
            raise DuplicateSku(other["id"], sku)

    # --- spreadsheets

    def export_products(self) -> Iterator[dict]:
        """Every product by id, with its price in cents, all as of one moment."""
        yield from map(decode, self._stream(SELECT_PRODUCTS + " ORDER BY id"))

    def export_order_lines(self, first_day: str | None, last_day: str | None) -> Iterator[dict]:
        """Every line of the orders created in a period, by order, all as of one moment.

        first_day, last_day: as 2026-11-30, in UTC, both included; None sets no bound.
        """
        days = {"first": first_day, "end": last_day and last_day + "T23:59:59Z"}
        yield from map(dict, self._stream(SELECT_EXPORTED_LINES, days))

    def import_products(self, rows: Iterable[dict]) -> tuple[int, int, int]:
        """Add and change products, row by row, in one transaction.

        rows: fields as in create_product, or an id and fields as in update_product. Returns how
        many products were added, how many changed, and how many had these values already. Raises
        NotFound, DuplicateSku, ExcessiveMetadata; then nothing has changed.
        """
        with self.transaction() as connection:
            [(last,)] = connection.execute("SELECT coalesce(max(id), 0) FROM product").fetchall()
            counts = collections.Counter(self._import_product(connection, row) for row in rows)
            # All new products at once take a quarter of the time that _save_product would.
            fill_search(connection, last + 1)
            open_balances(connection, last + 1, "import")
        return counts["added"], counts["changed"], counts["unchanged"]

    def _import_product(self, connection: sqlite3.Connection, row: dict) -> str:
        """Import a row; return the count to raise. A new product still lacks search and ledger."""
        if row.get("id") is None:
            product = merge(PRODUCT_DEFAULTS, row)
            self._require_free_sku(connection, product["sku"])
            connection.execute(SAVE_PRODUCT, encode(product))
            return "added"
        before = read_to_change(connection, "product", row["id"])
        product = merge(before, row)
        if product == before:
            return "unchanged"
        self._save_product(connection, product, before, "import")
        return "changed"

    # --- orders

    def list_orders(
        self,
        *,
        status: str | None = None,
        reference: str | None = None,
        sort: str = "id",
        after: int = 0,
        limit: int = 100,
    ) -> tuple[list[dict], int | None]:
        """A page of the orders, and the id to continue after, or None.

        status, reference: those that an order must have. sort: a key of ID_ORDERS. after: the id
        to continue after; 0 starts at the beginning. limit: orders per page.
        """
        # The + keeps SQLite from the index of statuses: far fewer orders share a reference.
        has_status = "+status = :status" if reference else "status = :status"
        conditions = {
            has_status: status is not None,
            "reference = :reference": reference is not None,
            "reference <> ''": reference,  # lets SQLite use the partial index
        }
        rows = self._read(
            select_page(SELECT_ORDERS, conditions, ID_ORDERS[sort], after),
            {"status": status, "reference": reference, "after": after, "limit": limit + 1},
        )
        orders, next_after = cut_page(rows, limit)
        return with_lines(map(decode, orders), self._read), next_after

    def get_order(self, order_id: int) -> dict:
        """The order with its lines, money in cents. Raises NotFound."""
        order = only_row("order", order_id, self._read(SELECT_ORDER, {"id": order_id}))
        return with_lines([order], self._read)[0]

    def create_order(
        self, products: list[dict], reference: str = "", metadata: dict | None = None
    ) -> dict:
        """Deduct the stock of every line, or of none, and return the new order, which is pending.

        products: the lines, 1 to 100 dicts of product_id and quantity in pieces. reference,
        metadata: the caller's own text and dict of texts. Raises UnknownProducts or
        InsufficientStock, each with every line concerned, ExcessiveTotal, ExcessiveMetadata;
        ValueError if there are no lines or a product appears twice.
        """
        if not products:
            raise ValueError("An order needs at least one line.")
        if len({line["product_id"] for line in products}) < len(products):
            raise ValueError("An order names each product once.")
        given = merge({"reference": reference, "metadata": {}}, {"metadata": metadata or {}})
        with self.transaction() as connection:
            total, taken = self._take_stock(connection, products)
            order = {"total": total, "created_at": timestamp(), **given}
            order_id = connection.execute(
                """
                INSERT INTO orders (total, created_at, reference, metadata)
                VALUES (:total, :created_at, :reference, :metadata)
                """,
                encode(order),
            ).lastrowid
            connection.executemany(
                """
                INSERT INTO order_line (order_id, product_id, name, price, quantity, sku,
                                        position, stock, movement_id)
                VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)
                """,
                [(order_id, *line) for line in taken],
            )
        lines = [dict(zip(LINE_COLUMNS, line, strict=False)) for line in taken]
        return {"id": order_id, "status": "pending", **order, "lines": lines}

    @staticmethod
    def _take_stock(connection: sqlite3.Connection, products: list[dict]) -> tuple[int, list]:
        """Deduct the stock of every line; return the total and the rows of order_line."""
        total = 0
        taken = []
        unknown = {}
        shortages = []
        for position, line in enumerate(products):
            product_id = line["product_id"]
            quantity = line["quantity"]
            product = connection.execute(
                """
                SELECT name, price, stock, movements, sku
                  FROM product
                 WHERE id = :product_id
                """,
                line,
            ).fetchone()
            if product is None:
                unknown[position] = product_id
                continue
            name, price, stock, movements, sku = product
            if stock < quantity:
                short = {"product_id": product_id, "requested": quantity, "available": stock}
                shortages.append(short)
                continue
            total += price * quantity
            taken.append(
                (product_id, name, price, quantity, sku, position, stock - quantity, movements + 1)
            )
        if unknown:
            raise UnknownProducts(unknown)
        if shortages:
            raise InsufficientStock(shortages)
        if total > MAX_TOTAL:
            raise ExcessiveTotal(f"make a total over {MAX_TOTAL // 100}")
        # The check above only explains a shortage: this statement both checks and deducts.
        changed = connection.executemany(
            """
            UPDATE product
               SET stock = stock - :quantity, movements = movements + 1
             WHERE id = :product_id AND stock >= :quantity
            """,
            products,
        ).rowcount
        assert changed == len(products)
        return total, taken

    def update_order(self, order_id: int, *, if_match: Precondition = None, **fields: Any) -> dict:
        """Set any of status, reference and metadata of an order and return it.

        status: one that TRANSITIONS allows, or the present one. "cancelled" puts the stock back,
        up to MAX_STOCK, of each product that still exists. metadata: merged as in update_product.
        if_match: a condition on the etag() of the order without its lines. Raises NotFound,
        PreconditionFailed, InvalidTransition, ExcessiveMetadata.
        """
        with self.transaction() as connection:
            before = read_to_change(connection, "order", order_id, if_match)
            order = merge(before, fields)
            if order["status"] not in (before["status"], *TRANSITIONS[before["status"]]):
                raise InvalidTransition(order_id, before["status"], order["status"])
            if order != before:
                connection.execute(
                    """
                    UPDATE orders
                       SET status = :status, reference = :reference, metadata = :metadata
                     WHERE id = :id
                    """,
                    encode(order),
                )
            if order["status"] != before["status"] and order["status"] == "cancelled":
                self._put_stock_back(connection, order_id)
            return with_lines([order], connection.execute)[0]

    def expire_orders(self, before: str, *, limit: int = 4) -> int:
        """Cancel at most `limit` pending orders created before a timestamp(); return how many.

        Needs no write lock if there are none. Four orders of a hundred lines take at most 15 ms,
        which the server's loop can spare.
        """
        if not self._read(SELECT_EXPIRED, {"before": before, "limit": 1}):
            return 0
        with self.transaction() as connection:
            due = connection.execute(SELECT_EXPIRED, {"before": before, "limit": limit}).fetchall()
            connection.executemany("UPDATE orders SET status = 'cancelled' WHERE id = ?", due)
            for (order_id,) in due:
                self._put_stock_back(connection, order_id)
        return len(due)

    @staticmethod
    def _put_stock_back(connection: sqlite3.Connection, order_id: int) -> None:
        """Put back the stock that an order took, as update_order() says."""
        movements = connection.execute(
            """
            INSERT INTO movement (product_id, id, change, stock, order_id, created_at)
            SELECT product_id, movements + 1, min(quantity, :max - product.stock),
                   min(quantity + product.stock, :max), order_id, :now
              FROM order_line JOIN product ON product.id = product_id
             WHERE order_id = :id AND product.stock < :max
         RETURNING stock, id, product_id
            """,
            {"id": order_id, "max": MAX_STOCK, "now": timestamp()},
        ).fetchall()
        connection.executemany(
            "UPDATE product SET stock = ?, movements = ? WHERE id = ?", movements
        )

    # --- idempotency keys

    def get_idempotent(self, key: str, fingerprint: str) -> Any | None:
        """The result stored under an idempotency key in the last KEY_TTL seconds, or None.

        fingerprint: equal for equal requests. Call this and save_idempotent() in one transaction(),
        so that no request with the same key comes between. Raises IdempotencyKeyReused if the key
        was stored with another fingerprint.
        """
        stored = self._writer.execute(
            """
            SELECT fingerprint, answer
              FROM idempotency_key
             WHERE key = :key AND created_at >= :expired
            """,
            {"key": key, "expired": timestamp(KEY_TTL)},
        ).fetchone()
        if stored is None:
            return None
        if stored["fingerprint"] != fingerprint:
            raise IdempotencyKeyReused
        return json.loads(stored["answer"])

    def save_idempotent(self, key: str, fingerprint: str, result: object) -> None:
        """Store the result of a request under its key, in the transaction of its work.

        result: any value that JSON can carry, except None. Also deletes a few expired keys.
        """
        answer = json.dumps(result)
        self._writer.execute(
            """
            INSERT OR REPLACE INTO idempotency_key (key, fingerprint, answer, created_at)
            VALUES (:key, :fingerprint, :answer, :now)
            """,
            {"key": key, "fingerprint": fingerprint, "answer": answer, "now": timestamp()},
        )
        expired = timestamp(KEY_TTL)
        if expired == self._purged:
            return
        purged = self._writer.execute(
            """
            DELETE FROM idempotency_key
             WHERE id IN (SELECT id
                            FROM idempotency_key
                           WHERE created_at < :expired
                           ORDER BY created_at
                           LIMIT :limit)
            """,
            {"expired": expired, "limit": PURGE_LIMIT},
        ).rowcount
        if purged < PURGE_LIMIT:
            self._purged = expired  # the next key expires in the next second at the earliest


# ------------------------------------------------------------------------------------ statements

PRODUCT_COLUMNS = "id, name, description, price, stock, sku, metadata"
PRODUCT_JSON = """
    id, json_object('id', id, 'name', name, 'description', description, 'price', price / 100.0,
                    'stock', stock, 'sku', sku, 'metadata', json(metadata)) AS json
"""
SELECT_PRODUCTS = "SELECT " + PRODUCT_COLUMNS + " FROM product"
SELECT_PRODUCT = SELECT_PRODUCTS + " WHERE id = :id"
# CROSS JOIN makes SQLite search the texts first and fetch only the products that it finds. It sorts
# these if they are requested by price.
SEARCHED_PRODUCTS = " FROM product_search CROSS JOIN product USING (id)"
FOUND_PRODUCT = " FROM product CROSS JOIN product_search USING (id)"  # at most one, by its sku
# For each sort: the condition that continues after an item, and ORDER BY. Equal values go by id.
# Each has its own index, except -name: see schema.sql.
ID_ORDERS = {"id": ("id > :after", "id"), "-id": ("id < :after", "id DESC")}
PRODUCT_ORDERS = ID_ORDERS | {
    "name": ("(folded_name, id) > (:value, :after)", "folded_name, id"),
    "-name": (
        "folded_name <= :value AND (folded_name < :value OR id > :after)",
        "folded_name DESC, id",
    ),
    "price": ("(price, id) > (:value, :after)", "price, id"),
    "-price": ("price <= :value AND (price < :value OR id > :after)", "price DESC, id"),
}
SELECT_MOVEMENTS = "SELECT id, change, stock, order_id, note, created_at FROM every_movement"
# The longest word comes first because it is likely the rarest. Words contain no blank, so that none
# matches across the one between name and description.
HAS_LONGEST_WORD = "(instr(folded_name, :longest_word) OR instr(folded_description, :longest_word))"
HAS_OTHER_WORDS = """
    NOT EXISTS (SELECT 1 FROM json_each(:other_words)
                 WHERE NOT instr(folded_name || ' ' || folded_description, value))
"""
TRANSITIONS = {"pending": ("completed", "cancelled"), "completed": ("cancelled",), "cancelled": ()}
SELECT_ORDERS = "SELECT id, status, total, created_at, reference, metadata FROM orders"
SELECT_ORDER = SELECT_ORDERS + " WHERE id = :id"
# Otherwise SQLite would find the pending orders by their status and sort them all.
SELECT_EXPIRED = """
    SELECT id
      FROM orders INDEXED BY orders_pending_by_time
     WHERE status = 'pending' AND created_at < :before
     ORDER BY created_at
     LIMIT :limit
"""
LINE_COLUMNS = ("product_id", "name", "price", "quantity", "sku")
# SQLite reads the lines order by order, and sorts only those of one order at a time.
SELECT_LINES = """
    SELECT order_id, product_id, name, price, quantity, sku
      FROM order_line
     WHERE order_id IN (SELECT value FROM json_each(:ids))
     ORDER BY order_id, position
"""
# Reads every order: a later id need not have a later time, since a clock may have been wrong.
SELECT_EXPORTED_LINES = """
    SELECT order_id, created_at, status, reference, product_id, sku, name, price, quantity
      FROM orders CROSS JOIN order_line ON order_id = id
     WHERE (:first IS NULL OR created_at >= :first) AND (:end IS NULL OR created_at <= :end)
     ORDER BY id, position
"""


def select_page(select: str, conditions: dict[str, Any], order: tuple[str, str], after: int) -> str:
    """The statement for a page. It is composed of constants, so that it can use an index.

    conditions: maps each to whether it applies. order: an item of PRODUCT_ORDERS or ID_ORDERS.
    """
    continuation, order_by = order
    applied = [condition for condition, applies in conditions.items() if applies]
    where = " AND ".join([continuation if after else "TRUE", *applied])
    return " ".join([select, "WHERE", where, "ORDER BY", order_by, "LIMIT :limit"])


def cut_page(rows: list[sqlite3.Row], limit: int | None) -> tuple[list[sqlite3.Row], int | None]:
    """The rows of a page, and the id to continue after, or None if there is no row beyond it."""
    if limit is None or len(rows) <= limit:
        return rows, None
    return rows[:limit], rows[limit - 1]["id"]


def only_row(kind: str, row_id: int, rows: list[sqlite3.Row]) -> dict:
    if not rows:
        raise NotFound(kind, row_id)
    return decode(rows[0])


def read_to_change(
    connection: sqlite3.Connection, kind: str, row_id: int, if_match: Precondition = None
) -> dict:
    """A product or an order, inside a transaction. Raises NotFound, PreconditionFailed."""
    sql = SELECT_PRODUCT if kind == "product" else SELECT_ORDER
    row = only_row(kind, row_id, connection.execute(sql, {"id": row_id}).fetchall())
    if if_match is not None and not if_match(etag(row)):
        raise PreconditionFailed
    return row


def decode(row: sqlite3.Row) -> dict:
    """A product or an order as a dict, with its metadata parsed."""
    return {**row, "metadata": json.loads(row["metadata"])}


encode_json = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode


def encode(item: dict) -> dict:
    """A product or an order as parameters of a statement, with its metadata as JSON."""
    return {**item, "metadata": encode_json(item["metadata"])}


def merge(item: dict, fields: dict) -> dict:
    """A product or an order after an update of these fields. Raises ExcessiveMetadata."""
    metadata = item["metadata"]
    if fields.get("metadata"):
        metadata = {**metadata, **fields["metadata"]}
        metadata = {name: value for name, value in metadata.items() if value is not None}
    if len(metadata) > MAX_METADATA:
        raise ExcessiveMetadata(f"must have at most {MAX_METADATA} entries, not {len(metadata)}")
    return {**item, **fields, "metadata": metadata}


def with_lines(orders: Iterable[dict], read: Callable[..., Iterable]) -> list[dict]:
    """The orders with their lines, which `read` queries. (No transaction: lines never change.)"""
    by_id: dict[int, dict] = {order["id"]: {**order, "lines": []} for order in orders}
    for row in read(SELECT_LINES, {"ids": json.dumps(list(by_id))}):
        line = dict(row)
        by_id[line.pop("order_id")]["lines"].append(line)
    return list(by_id.values())


PRODUCT_DEFAULTS: dict = {"id": None, "description": "", "stock": 0, "sku": "", "metadata": {}}
SAVE_PRODUCT = """
    INSERT INTO product (id, name, description, price, stock, movements, sku, metadata)
    VALUES (:id, :name, :description, :price, :stock, :stock > 0, :sku, :metadata)
        ON CONFLICT (id) DO UPDATE
       SET name = excluded.name, description = excluded.description,
           price = excluded.price, stock = excluded.stock,
           movements = movements + (stock <> excluded.stock),
           sku = excluded.sku, metadata = excluded.metadata
"""


def open_balances(
    connection: sqlite3.Connection, first: int = 1, note: str = "opening balance"
) -> None:
    """Begin the ledger of each product whose id is at least `first` with its stock."""
    connection.execute(
        """
        INSERT INTO movement (product_id, id, change, stock, note, created_at)
        SELECT id, movements, stock, stock, :note, :now
          FROM product
         WHERE id >= :first AND stock > 0
        """,
        {"first": first, "note": note, "now": timestamp()},
    )


def fill_search(connection: sqlite3.Connection, first: int = 1, last: int = MAX_ID) -> None:
    """Make the products with ids from `first` to `last` searchable."""
    sql = "SELECT id, name, description FROM product WHERE id BETWEEN :first AND :last"
    products = connection.execute(sql, {"first": first, "last": last})
    connection.executemany(
        """
        INSERT OR REPLACE INTO product_search (id, folded_name, folded_description)
        VALUES (?, ?, ?)
        """,
        ((row["id"], fold(row["name"]), fold(row["description"])) for row in products),
    )


# Letters that Unicode does not decompose, and what people type instead of an apostrophe (modifier
# letters, primes and accents that look like one) or a hyphen (dashes, minus).
SPELLINGS = str.maketrans(
    "ⱥƀȼđðɇǥħıɨɉꝁłƚøŋᵽɍŧⱦʉɏƶ’‘‛ʼʻʽʹˈˊˋ`´᾽᾿′‵՚׳ꞌ‐‑‒–—―−⁃˗־֊᠆⸺⸻",
    "abcddeghiijkllonprttuyz'''''''''''''''''''--------------",
) | str.maketrans({"æ": "ae", "œ": "oe", "þ": "th"})


def fold(text: str) -> str:
    """The text as searching and sorting compare it.

    Without case, accents, strokes and ligatures, and with one kind of apostrophe and of hyphen:
    "Smørrebrød – O’Neill" becomes "smorrebrod - o'neill".
    """
    if text.isascii():
        return text.lower().replace("`", "'")
    # Apostrophes before NFKD, which splits some of them into a blank and an accent; letters again
    # after it, because it uncovers some under their accents: ǿ has a stroke too.
    letters = unicodedata.normalize("NFKD", text.casefold().translate(SPELLINGS))
    folded = "".join(letter for letter in letters if not unicodedata.combining(letter))
    return folded.casefold().translate(SPELLINGS)


# ------------------------------------------------------------------------------------ migrations
# An older file is migrated in one transaction: the `alter` statements of all pending migrations
# change its tables, then schema.sql creates what is missing, then each `fill` adds rows.


class Migration(NamedTuple):
    """The step from one schema version to the next."""

    alter: tuple[str, ...] = ()
    fill: Callable[[sqlite3.Connection], None] = lambda connection: None


MIGRATIONS = [
    Migration(),  # 0 to 1: a new file
    Migration(),  # 1 to 2: product_search, which 6 to 7 replaces
    Migration(),  # 2 to 3: idempotency_key_by_time
    Migration(  # 3 to 4: references of orders
        alter=("ALTER TABLE orders ADD COLUMN reference TEXT NOT NULL DEFAULT ''",),
    ),
    Migration(  # 4 to 5: the ledger, orders_pending_by_time
        alter=(
            "ALTER TABLE product ADD COLUMN movements INTEGER NOT NULL DEFAULT 0",
            "UPDATE product SET movements = 1 WHERE stock > 0",
            "ALTER TABLE order_line ADD COLUMN stock INTEGER",
            "ALTER TABLE order_line ADD COLUMN movement_id INTEGER",
        ),
        fill=open_balances,
    ),
    Migration(),  # 5 to 6: another CHECK of orders.status
    Migration(  # 6 to 7: sku, metadata, higher prices, another product_search
        alter=(
            "ALTER TABLE product ADD COLUMN sku TEXT NOT NULL DEFAULT ''",
            "ALTER TABLE product ADD COLUMN metadata TEXT NOT NULL DEFAULT '{}'",
            "ALTER TABLE orders ADD COLUMN metadata TEXT NOT NULL DEFAULT '{}'",
            "ALTER TABLE order_line ADD COLUMN sku TEXT NOT NULL DEFAULT ''",
            "DROP TABLE IF EXISTS product_search",
        ),
        fill=fill_search,
    ),
]


def migrate(connection: sqlite3.Connection, version: int) -> None:
    """Migrate the tables from a schema version to the current one, inside a transaction."""
    pending = MIGRATIONS[version:]
    if version:
        for migration in pending:
            for statement in migration.alter:
                connection.execute(statement)
    script = SCHEMA.read_text()
    statement = ""
    for line in script.splitlines(keepends=True):
        statement += line
        if sqlite3.complete_statement(statement):
            connection.execute(statement)  # executescript() would commit the transaction first
            statement = ""
    for migration in pending:
        migration.fill(connection)
    restore_table_texts(connection, script)


def restore_table_texts(connection: sqlite3.Connection, script: str) -> None:
    """Give each table the text of schema.sql, so that migrated and new files have equal schemas.

    ALTER TABLE leaves a text of its own. The new text must describe the columns that the table
    really has: https://www.sqlite.org/lang_altertable.html#otheralter
    """
    with contextlib.closing(sqlite3.connect(":memory:")) as new:
        new.executescript(script)
        texts = new.execute("SELECT sql, name FROM sqlite_schema WHERE sql NOT NULL").fetchall()
    connection.execute("PRAGMA writable_schema = ON")
    connection.executemany("UPDATE sqlite_schema SET sql = ? WHERE name = ?", texts)
    connection.execute("PRAGMA writable_schema = RESET")


# ------------------------------------------------------------------------------ backup and check


def backup(
    path: str | os.PathLike,
    target: str | os.PathLike,
    *,
    overwrite: bool = False,
    progress: Callable[[int, int], object] | None = None,
) -> dict:
    """Copy a database, which may be in use, to a file: a consistent and checked copy, or nothing.

    overwrite: replace an existing target. progress: called with the number of pages that remain
    and of all pages. Returns the numbers of products, orders and bytes in the copy. Raises
    DatabaseError if the source is not a shop's, the target may not be written, or copying fails.
    """
    source = Store(path, read_only=True)
    target = Path(target).absolute()
    partial = target.with_name(f"{target.name}.partial-{os.getpid()}")
    try:
        check_target(source.path, target, overwrite)
        remove_partial_copies(target)
        summary = copy_database(source, partial, progress or (lambda remaining, total: None))
        partial.chmod(source.path.stat().st_mode & 0o777)
        flush_file(partial)
        summary["bytes"] = partial.stat().st_size
        partial.replace(target)
        flush_file(target.parent)
        return summary
    except (OSError, sqlite3.Error) as error:
        raise DatabaseError(f"{target} cannot be written: {error}.") from error
    finally:
        for suffix in "", "-journal", "-wal", "-shm":
            with contextlib.suppress(OSError):
                partial.with_name(partial.name + suffix).unlink()


def check_target(source: Path, target: Path, overwrite: bool) -> None:
    """Raise DatabaseError if a backup may not be written to the target."""
    if target.exists() and (not target.is_file() or target.samefile(source)):
        raise DatabaseError(f"{target} is not a file that a backup may overwrite.")
    if target.exists() and not overwrite:
        raise DatabaseError(f"{target} already exists: --overwrite replaces it.")
    # SQLite would apply a WAL next to the copy as if it were the copy's.
    for suffix in "-wal", "-shm", "-journal":
        if target.name.endswith(suffix) or target.with_name(target.name + suffix).exists():
            raise DatabaseError(f"{target} is, or is next to, a file of a database in use.")


def remove_partial_copies(target: Path) -> None:
    """Remove what backups to this target left when they were killed."""
    name = re.compile(re.escape(target.name) + r"\.partial-([0-9]+)(-journal|-wal|-shm)?")
    for file in target.parent.iterdir():
        match = name.fullmatch(file.name)
        if match:
            try:
                os.kill(int(match[1]), 0)  # only asks whether the process runs
            except PermissionError:
                pass  # it does, for another user
            except (ProcessLookupError, OverflowError):
                file.unlink(missing_ok=True)


def copy_database(source: Store, target: Path, progress: Callable[[int, int], object]) -> dict:
    """Copy page by page, check the copy, and return its numbers of products and orders."""
    with (
        contextlib.closing(sqlite3.connect(target, isolation_level=None)) as copy,
        contextlib.closing(source._connect("mode=ro")) as reader,
    ):
        # Without a read transaction each order placed meanwhile would restart the copy.
        reader.execute("BEGIN")
        reader.execute("SELECT count(*) FROM product").fetchall()
        reader.backup(copy, pages=1000, progress=lambda status, *pages: progress(*pages))
        [(mode,)] = copy.execute("PRAGMA journal_mode = DELETE")  # a single file, without a WAL
        if mode != "delete":
            raise DatabaseError(f"The copy would not be a single file: its mode is {mode}.")
        [(verdict,)] = copy.execute("PRAGMA integrity_check(1)")
        if verdict != "ok":
            raise DatabaseError(f"The copy is damaged: {verdict}")
        [(products, orders)] = copy.execute("""
            SELECT (SELECT count(*) FROM product), (SELECT count(*) FROM orders)
        """)
    return {"products": products, "orders": orders}


def flush_file(path: Path) -> None:
    """Flush a file, or the entries of a directory, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_integrity(path: str | os.PathLike) -> list[str]:
    """Check a database; return a sentence for each fault that is found, see FAULTS.

    Raises DatabaseError for a file that is not a shop's.
    """
    store = Store(path, read_only=True)
    errors = []
    try:
        # With mode=ro, SQLite would leave the CHECK constraints out.
        with contextlib.closing(store._connect("mode=rw")) as connection:
            connection.execute("PRAGMA query_only = ON")
            for sentence, sql in FAULTS.items():
                for row in connection.execute(sql):
                    errors += sentence.format(**row).splitlines()
    except sqlite3.DatabaseError as error:
        errors.append(f"{error}.")
    return errors


# A query for each kind of fault, and the sentence for each row that it returns.
FAULTS = {
    "{integrity_check}": """
        SELECT integrity_check
          FROM pragma_integrity_check
         WHERE integrity_check <> 'ok'
    """,
    "A row of {table} refers to a missing row of {parent}.": "PRAGMA foreign_key_check",
    "Order {id} has a total of {total} cents, but {lines} lines that make {sum}.": """
        SELECT orders.id AS id, total, count(order_line.order_id) AS lines,
               coalesce(sum(price * quantity), 0) AS sum
          FROM orders LEFT JOIN order_line ON order_line.order_id = orders.id
         GROUP BY orders.id
        HAVING total <> sum OR lines = 0
    """,
    "Movement {id} of product {product_id} does not follow the one before.": """
        SELECT product_id, id
          FROM (SELECT product_id, id, stock, row_number() OVER ledger AS number,
                       sum(change) OVER ledger AS sum
                  FROM every_movement
                WINDOW ledger AS (PARTITION BY product_id ORDER BY id))
         WHERE (id <> number OR stock <> sum) AND product_id IN (SELECT id FROM product)
    """,
    "Product {id} has a stock of {stock} after {movements} movements, "
    "but there are {count}, which make {sum}.": """
        SELECT product.id AS id, stock, movements, coalesce(count, 0) AS count,
               coalesce(sum, 0) AS sum
          FROM product LEFT JOIN (SELECT product_id, count(*) AS count, sum(change) AS sum
                                    FROM every_movement
                                   GROUP BY product_id) ON product_id = product.id
         WHERE movements <> coalesce(count, 0) OR stock <> coalesce(sum, 0)
    """,
    "Product {id} cannot be found: it is not in product_search.": """
        SELECT id
          FROM product
         WHERE id NOT IN (SELECT id FROM product_search)
    """,
    # NOT INDEXED: the unique index may be what is wrong.
    "Products {ids} have the same sku {sku!r}.": """
        SELECT sku, group_concat(id, ', ') AS ids
          FROM product NOT INDEXED
         WHERE sku <> ''
         GROUP BY sku
        HAVING count(*) > 1
    """,
    # Constraints reject what is not an object.
    "{kind} {id} has invalid metadata: at most 50 short texts are allowed.": """
        SELECT kind, item.id AS id
          FROM (SELECT 'Product' AS kind, id, metadata FROM product
                 UNION ALL
                SELECT 'Order', id, metadata FROM orders) AS item,
               json_each(iif(json_valid(metadata), metadata, '{}'))
         GROUP BY kind, item.id
        HAVING count(*) > 50
            OR max(type <> 'text' OR length(key) NOT BETWEEN 1 AND 40
                   OR key GLOB '*[^A-Za-z0-9_-]*' OR length(value) > 500)
    """,
}
