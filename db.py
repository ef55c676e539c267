"""The Store: connections, transactions and every SQL statement of the shop.

What a request or a response is, shop.py knows; what must never be true, schema.sql refuses.
Money is whole cents in every argument and result, stock is in pieces, a time is UTC as in
2026-11-22T10:15:30Z. Many threads may share a Store: each has a connection of its own to read
with, and all share the one that writes.

    store = Store("db.sqlite3")
    mug = store.create_product(name="Mug", price=999, stock=5)
    store.create_order([{"product_id": mug["id"], "quantity": 2}])
"""

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
SCHEMA_VERSION = 6
APPLICATION_ID = 1397247824  # "SHOP" in ASCII
MAX_STOCK = 1_000_000_000  # pieces
MAX_ID = 10**18 - 1
SQLITE_VERSION = sqlite3.sqlite_version
KEY_TTL = 24 * 3600  # seconds
PURGE_LIMIT = 4  # expired idempotency keys that go when a new one comes

log = logging.getLogger("shop")


# ------------------------------------------------------------------------------------ exceptions


class NotFound(Exception):
    """No such product or order."""

    def __init__(self, kind: str, row_id: int):
        super().__init__(f"There is no {kind} {row_id}.")


class UnknownProducts(Exception):
    """Lines of an order name products that do not exist; `lines` maps their positions to ids."""

    def __init__(self, lines: dict[int, int]):
        super().__init__(f"There are no products {', '.join(map(str, lines.values()))}.")
        self.lines = lines


class UnknownPlace(Exception):
    """A page cannot go on after a product that no longer exists: its place is unknown."""

    def __init__(self, product_id: int):
        super().__init__(f"names product {product_id}, which does not exist: its place is unknown")


class InsufficientStock(Exception):
    """`shortages` has product_id, requested and available of every line, in pieces."""

    def __init__(self, shortages: list[dict]):
        super().__init__(" ".join(map(self.describe, shortages)))
        self.shortages = shortages

    @staticmethod
    def describe(shortage: dict) -> str:
        return (
            f"Product {shortage['product_id']} has {shortage['available']} left, "
            f"{shortage['requested']} were asked for."
        )


class ExcessiveStock(Exception):
    """A change would lift a product's stock over MAX_STOCK."""

    def __init__(self, stock: int):
        super().__init__(
            f"must be at most {MAX_STOCK - stock}, to keep the stock within {MAX_STOCK}"
        )


class InvalidTransition(Exception):
    """An order that is no longer pending keeps its status."""

    def __init__(self, order_id: int, status: str, requested: str):
        super().__init__(
            f"Order {order_id} is {status} and cannot become {requested}: "
            f"only a pending order changes."
        )


class PreconditionFailed(Exception):
    """The row is not in the state that the caller requires."""


class IdempotencyKeyReused(Exception):
    """The idempotency key belongs to another request."""


class DatabaseUnavailable(Exception):
    """The database cannot do this now, and nothing was changed."""


class TransactionLost(DatabaseUnavailable):
    """The transaction cannot be committed: one of its steps failed after a change."""

    def __init__(self) -> None:
        super().__init__("The transaction was rolled back.")


class OutcomeUnknown(DatabaseUnavailable):
    """A commit failed so that what it held may, or may not, be there after a crash."""

    def __init__(self) -> None:
        super().__init__(
            "The database failed while it stored this. It may or may not have been stored: "
            "check before you retry, or use an Idempotency-Key."
        )


class DatabaseBusy(DatabaseUnavailable):
    """Another connection holds the write lock."""


class DatabaseError(Exception):
    """The file cannot serve as the shop's database, and was left as it is."""


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


def translate_error(error: sqlite3.Error) -> Exception:
    """The exception to raise for an error of SQLite's: itself where a statement of ours is to
    blame.
    """
    code = getattr(error, "sqlite_errorcode", 0) & 0xFF  # the low byte is the primary code
    if code in BUSY_CODES:
        return DatabaseBusy("The database is busy.")
    if code in UNAVAILABLE_CODES:
        return DatabaseUnavailable(UNAVAILABLE_CODES[code])
    return error


def file_id(path: Path) -> tuple | None:
    """What tells a file from another one put in its place; None where there is none."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino


def timestamp(seconds_ago: float = 0) -> str:
    """The UTC time so many seconds ago."""
    return format_time(int(time.time() - seconds_ago))


@functools.lru_cache(maxsize=8)
def format_time(seconds: int) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))


def etag(row: dict | sqlite3.Row) -> str:
    """A short text that two rows of a table share only if all their columns are equal."""
    return hashlib.blake2b(repr(tuple(dict(row).values())).encode(), digest_size=12).hexdigest()


# A caller's condition on the etag() of the row that it is about to change.
Precondition = Callable[[str], bool] | None


def check_precondition(row: dict, if_match: Precondition) -> None:
    """Raise PreconditionFailed where the row is not as the caller requires."""
    if if_match is not None and not if_match(etag(row)):
        raise PreconditionFailed


# ----------------------------------------------------------------------------------------- Store


class Store:
    """Products, orders and idempotency keys in one SQLite file.

    path: the file; it is made where there is none. lock_timeout: seconds that a write waits for
    the lock. read_only: open a copy that another process renews; no write is possible then.
    autocheckpoint: False leaves checkpoints to Litestream. trace: called with the text of every
    statement.

    Raises DatabaseError for a file that is no database, not the shop's, made by a newer shop or
    not writable. A file that is merely locked is no error: the Store opens it with the first
    call that finds it free.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        *,
        lock_timeout: float = 5.0,
        read_only: bool = False,
        autocheckpoint: bool = True,
        trace: Callable[[str], object] | None = None,
    ):
        if sqlite3.sqlite_version_info < (3, 37):
            raise DatabaseError(f"SQLite {sqlite3.sqlite_version} is too old: 3.37 is needed.")
        self.path = Path(path).resolve()  # SQLite puts the WAL beside what a link names
        self.lock_timeout = lock_timeout
        self.read_only = read_only
        self._wal = self.path.with_name(self.path.name + "-wal")
        self._journal = self.path.with_name(self.path.name + "-journal")
        self._autocheckpoint = autocheckpoint
        self._trace = trace
        self._writer: Any = None  # a sqlite3.Connection, once open
        self._writer_lock = threading.Lock()
        self._writer_thread: int | None = None  # that is inside a transaction
        self._local = threading.local()  # .reader: a thread's own connection to read with
        self._must_roll_back = False  # a step has failed after a change
        self._purged = ""  # every idempotency key older than this has been deleted
        self._write_error: Exception | None = None  # of the last write, if it failed
        self._file_id: tuple | None = None  # device and inode of the file that is open
        self._next_look = 0.0  # at the files, by the monotonic clock
        self._is_lost = False  # the file at the path is another one
        try:
            if read_only:
                self._check_current()
            else:
                self._open_writer()
        except DatabaseBusy:
            pass
        except (DatabaseUnavailable, OSError) as error:
            raise DatabaseError(f"{self.path}: {error}") from error

    def close(self) -> None:
        """Close this thread's connection and, last, the one that writes: it folds the WAL into
        the file.

        Other threads' connections are closed when they end.
        """
        for connection in getattr(self._local, "reader", None), self._writer:
            if connection:
                connection.close()

    # --- connections

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

    def _check_application_id(self) -> int:
        """The schema version of the file, 0 of a new one. Raises DatabaseError for one not ours.

        Nothing is written to the file, nor beside it.
        """
        is_new = not self.path.is_file() or self.path.stat().st_size == 0
        if is_new and not self.read_only:
            return 0
        try:
            connecting = self._connect(self._inspection_mode(), self.lock_timeout)
            with contextlib.closing(connecting) as connection:
                header = connection.execute("""
                    SELECT (SELECT user_version FROM pragma_user_version) AS version,
                           (SELECT application_id FROM pragma_application_id) AS application_id,
                           (SELECT count(*)
                              FROM sqlite_schema
                             WHERE name NOT LIKE '@_litestream%' ESCAPE '@') AS tables
                """).fetchone()
        except sqlite3.Error as error:
            raise translate_error(error) from error
        self._check_version(header["version"])
        is_empty = not header["version"] and not header["tables"]
        if header["application_id"] != APPLICATION_ID and (self.read_only or not is_empty):
            raise DatabaseError(f"{self.path} is the database of another program.")
        return header["version"]

    def _inspection_mode(self) -> str:
        if self._journal.exists():
            # Power was lost in the first milliseconds of a file. SQLite rolls the journal back
            # before it reads, which takes a connection that may write.
            return "mode=rw"
        if self._wal.exists():
            return "mode=ro"
        return "mode=ro&immutable=1"  # the file alone tells all; this makes no -wal and -shm

    def _check_version(self, version: int) -> None:
        if version > SCHEMA_VERSION:
            raise DatabaseError(
                f"{self.path} was made by a newer version of the shop: it has schema "
                f"{version}, this one knows {SCHEMA_VERSION}."
            )

    def _check_current(self) -> None:
        """Raise DatabaseError for a file that only a writing shop could bring up to date."""
        version = self._check_application_id()
        if version < SCHEMA_VERSION:
            raise DatabaseError(
                f"{self.path} has schema {version}, this shop needs {SCHEMA_VERSION}: "
                "start the shop on it once, without READ_ONLY."
            )

    def _open_writer(self) -> None:
        """Open the connection that writes, make the tables, or bring them up to date."""
        self._check_application_id()
        try:
            writer = self._connect("mode=rwc", self.lock_timeout)
        except sqlite3.Error as error:
            raise translate_error(error) from error
        try:
            self._configure_writer(writer)
            self._prepare_schema(writer)
        except sqlite3.Error as error:
            writer.close()
            raise translate_error(error) from error
        except BaseException:
            writer.close()
            raise
        self._writer = writer
        self._file_id = file_id(self.path)

    def _configure_writer(self, writer: sqlite3.Connection) -> None:
        if writer.execute("PRAGMA journal_mode = WAL").fetchone()["journal_mode"] != "wal":
            raise DatabaseError(f"{self.path}: its file system cannot carry a write-ahead log.")
        writer.execute("PRAGMA synchronous = FULL")
        writer.execute("PRAGMA foreign_keys = ON")
        writer.execute("PRAGMA journal_size_limit = 67108864")  # a WAL that has grown shrinks again
        # 16 MiB of WAL instead of 4: pages that many orders touch are then written back once.
        # Litestream checkpoints by itself, long before 200 MiB, which bound the WAL without it.
        if self._autocheckpoint:
            writer.execute("PRAGMA wal_autocheckpoint = 4000")
        else:
            writer.execute("PRAGMA wal_autocheckpoint = 50000")

    def _prepare_schema(self, writer: sqlite3.Connection) -> None:
        """Migrate an older file, in one transaction: a crash leaves it as it was.

        A current one is not changed, but that it can be written shows here and not with the first
        order. BEGIN IMMEDIATE alone does not tell: on a file that cannot be written, SQLite
        quietly makes it a read transaction.
        """
        version = writer.execute("PRAGMA user_version").fetchone()["user_version"]
        try:
            writer.execute("BEGIN IMMEDIATE")
        except sqlite3.OperationalError as error:
            if version == SCHEMA_VERSION and error.sqlite_errorcode == sqlite3.SQLITE_BUSY:
                return  # another process writes; reads need not wait for it
            raise
        version = writer.execute("PRAGMA user_version").fetchone()["user_version"]
        self._check_version(version)
        writer.execute("PRAGMA application_id = 1397247824")
        if version < SCHEMA_VERSION:
            migrate(writer, version)
            writer.execute("COMMIT")
        else:
            writer.execute("ROLLBACK")

    def _reader(self) -> sqlite3.Connection:
        """This thread's connection to read with."""
        reader = getattr(self._local, "reader", None)
        if reader is None:
            if not self._writer:
                with self.transaction():
                    pass
            self._check_file()
            reader = self._connect("mode=rw")
            reader.execute("PRAGMA query_only = ON")
            self._local.reader = reader
        return reader

    def _read(self, sql: str, parameters: dict | tuple = ()) -> list[sqlite3.Row]:
        """Every row of a query. No read stays open: it would keep the WAL from being
        checkpointed.
        """
        try:
            if not self.read_only:
                self._look_at_files()
                return self._reader().execute(sql, parameters).fetchall()
            # Litestream writes pages into a copy past SQLite's change counter, and not while
            # another process has the file open as a WAL: a connection that stayed open would
            # read old pages for ever, or stop the copy.
            with contextlib.closing(self._connect("mode=ro")) as reader:
                return reader.execute(sql, parameters).fetchall()
        except sqlite3.Error as error:
            raise translate_error(error) from error

    def check_health(self) -> None:
        """Really read the database.

        Raises DatabaseUnavailable if that fails in whatever way, or if the last write failed.
        """
        try:
            self._read("SELECT id FROM product LIMIT 1")
        except sqlite3.Error as error:
            raise DatabaseUnavailable("The database cannot be read.") from error
        if self._write_error:
            raise DatabaseUnavailable(f"The last write failed: {self._write_error}")

    def data_version(self) -> object:
        """A value that differs after every change of the data; None where that cannot be told."""
        if not self.read_only:
            with contextlib.suppress(DatabaseUnavailable):
                return self._read("PRAGMA data_version")[0]["data_version"]
            return None
        if self._wal.exists():  # a writer is at work, and may change data before the file's time
            return None
        try:
            file = self.path.stat()
        except FileNotFoundError:
            return None
        # Within the grain of the file system's clock a second change may look like the first.
        if time.time_ns() - file.st_mtime_ns < 100_000_000:
            return None
        return file.st_ino, file.st_size, file.st_mtime_ns

    def _look_at_files(self) -> None:
        """Check once a second that the file is still there."""
        now = time.monotonic()
        if not self._writer or (now < self._next_look and not self._is_lost):
            return
        self._next_look = now + 1
        self._check_file()

    def _check_file(self) -> None:
        """Raise DatabaseUnavailable where the open file is no longer the one at the path."""
        was_lost = self._is_lost
        self._is_lost = file_id(self.path) != self._file_id
        if not self._is_lost:
            return
        if self._writer_thread in (None, threading.get_ident()):
            # Or the next start would replay the WAL into whatever file is there then.
            with contextlib.suppress(sqlite3.Error):
                if self._writer.in_transaction:
                    self._writer.execute("ROLLBACK")
            self._empty_wal()
        if not was_lost:
            log.warning(f"{self.path} has been deleted or replaced: restart the shop.")
        raise DatabaseUnavailable("The database file has been deleted or replaced.")

    # --- transactions

    @contextlib.contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """Run a block of writes that take effect together or not at all.

        Yields the connection that writes. Commits at the end of the block; rolls back if the block
        raises.

        Inside another transaction of the same thread the block is a step of the outer one, which
        alone commits. A step that raises before its first change leaves the outer transaction
        intact. One that raises after a change condemns it: even if the error is caught, the outer
        transaction rolls back and raises TransactionLost. A savepoint could undo just the step,
        but SQLite copies every page that changes after one, a tenth of the CPU of an order; code
        that checks everything before its first change has no need of it.

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
            if not self._writer:
                self._open_writer()  # the file was locked when the Store was made
            # IMMEDIATE takes the write lock before the first read, so the stock that is checked
            # is the stock that is deducted.
            self._writer.execute("BEGIN IMMEDIATE")
            self._writer_thread = threading.get_ident()
            self._must_roll_back = False
            yield self._writer
            self._commit()
        except BaseException as error:
            if self._writer and self._writer.in_transaction:
                self._writer.execute("ROLLBACK")
            self._note_failure(error)
            raise
        finally:
            self._writer_thread = None
            self._writer_lock.release()

    def batch(self) -> contextlib.AbstractContextManager[object]:
        """A transaction for the writes of many requests, which then share one commit.

        A write that fails before its first change does not affect the others; one that fails
        after a change undoes them all. Raises DatabaseBusy or another DatabaseUnavailable before
        the block runs; after it TransactionLost, OutcomeUnknown or another DatabaseUnavailable.
        """
        return self.transaction()

    def _require_transaction(self) -> None:
        # After a full disk or an I/O error SQLite may have rolled back by itself.
        if self._must_roll_back or not self._writer.in_transaction:
            raise TransactionLost

    def _commit(self) -> None:
        """COMMIT.

        If its fsync fails, the frames stay in the WAL and could be replayed after a crash; a small
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
                if self._writer.in_transaction:
                    self._writer.execute("ROLLBACK")
                self._writer.execute("PRAGMA application_id = 1397247824")
            except sqlite3.Error as error:
                raise OutcomeUnknown from error
            raise
        self._write_error = None

    def _note_failure(self, error: BaseException) -> None:
        """Translate a SQLite error, remember it for check_health(), and raise it."""
        failure: BaseException = error
        if isinstance(error, sqlite3.Error):
            failure = translate_error(error)
        elif isinstance(error, DatabaseError):
            failure = DatabaseUnavailable(str(error))
        # The error behind a TransactionLost was remembered when its step failed.
        is_passing = isinstance(failure, (DatabaseBusy, TransactionLost))
        if isinstance(failure, DatabaseUnavailable) and not is_passing:
            self._write_error = failure
            self._empty_wal()  # on a full disk this may make the room that the next write needs
        if failure is not error:
            raise failure from error

    def _empty_wal(self) -> None:
        """Fold the WAL into the file, as far as that is possible now."""
        if self._writer and not self._writer.in_transaction:
            with contextlib.suppress(sqlite3.Error):
                self._writer.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()

    # --- products

    def list_products(self, **query: Any) -> tuple[list[dict], int | None]:
        """The products, all of them or a page, and the id to continue after, or None.

        q: only products with each of these words in name or description, in any order, ignoring
        case and accents. available: only those with stock (True) or without (False). sort: a key
        of PRODUCT_ORDERS. after, limit: the page. All are optional. Raises UnknownPlace.
        """
        sql, parameters = self._select_products(PRODUCT_COLUMNS, **query)
        rows, next_after = cut_page(self._read(sql, parameters), query.get("limit"))
        return [dict(row) for row in rows], next_after

    def list_products_json(self, **query: Any) -> tuple[str, int | None]:
        """The same as the text of JSON objects joined by commas, with prices as decimals.

        SQLite renders it, three times as fast as json.dumps and without holding the interpreter.
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
        available: bool | None = None,
        sort: str = "id",
        after: int = 0,
        limit: int | None = None,
    ) -> tuple[str, dict]:
        """The statement that reads these columns of the products, and its parameters."""
        words = sorted(set(fold(q or "").split()), key=len)
        conditions = []
        if available is not None:
            conditions.append("(stock > 0) = :available")
        if words:
            conditions.append("instr(words, :longest_word)")  # most likely the rarest
        if len(words) > 1:
            conditions.append(HAS_OTHER_WORDS)
        by_name = sort.endswith("name")
        source = SEARCHED_PRODUCTS if words or by_name else " FROM product"
        parameters: dict[str, Any] = {
            "longest_word": words.pop() if words else None,
            "other_words": json.dumps(words),
            "available": available,
            "after": after,
            "limit": -1 if limit is None else limit + 1,
        }
        if after and not sort.endswith("id"):
            rows = self._read(SELECT_PRODUCT, {"id": after})
            if not rows:
                raise UnknownPlace(after)
            parameters["value"] = rows[0]["name"].casefold() if by_name else rows[0]["price"]
        select = "SELECT " + columns + source
        return select_page(select, conditions, PRODUCT_ORDERS[sort], after), parameters

    def get_product(self, product_id: int) -> dict:
        """The product, its price in cents. Raises NotFound."""
        rows = self._read(SELECT_PRODUCT, {"id": product_id})
        return self._one("product", product_id, rows)

    def create_product(self, **fields: Any) -> dict:
        """Add a product and return it.

        fields: name, price in cents; optional: description, stock in pieces.
        """
        with self.transaction() as connection:
            return self._save_product(connection, {**PRODUCT_DEFAULTS, **fields})

    def update_product(
        self, product_id: int, *, if_match: Precondition = None, **fields: Any
    ) -> dict:
        """Set the given fields (see create_product) and return the product.

        if_match: a condition on the etag() of its row. Raises NotFound, PreconditionFailed.
        """
        with self.transaction() as connection:
            product = self._lock_product(connection, product_id, if_match)
            return self._save_product(connection, {**product, **fields}, product)

    def update_stock(
        self, product_id: int, change: int, note: str = "", *, if_match: Precondition = None
    ) -> dict:
        """Add `change` pieces to the stock, or take them where it is negative; return the product.

        note: why, for the ledger. Raises NotFound, PreconditionFailed (see update_product),
        InsufficientStock, ExcessiveStock.
        """
        with self.transaction() as connection:
            product = self._lock_product(connection, product_id, if_match)
            stock = product["stock"] + change
            if stock < 0:
                raise InsufficientStock([shortage(product_id, -change, product["stock"])])
            if stock > MAX_STOCK:
                raise ExcessiveStock(product["stock"])
            return self._save_product(connection, {**product, "stock": stock}, product, note)

    def list_movements(
        self, product_id: int, *, sort: str = "id", after: int = 0, limit: int = 100
    ) -> tuple[list[dict], int | None]:
        """A page of a product's movements of stock, and the id to go on after, or None.

        sort: a key of ID_ORDERS. after, limit: the page. Raises NotFound.
        """
        self.get_product(product_id)
        rows = self._read(
            select_page(SELECT_MOVEMENTS, ["product_id = :product_id"], ID_ORDERS[sort], after),
            {"product_id": product_id, "after": after, "limit": limit + 1},
        )
        movements, next_after = cut_page(rows, limit)
        return [dict(row) for row in movements], next_after

    def delete_product(self, product_id: int, *, if_match: Precondition = None) -> None:
        """Delete a product; the lines of orders keep their copies. Raises NotFound,
        PreconditionFailed.
        """
        with self.transaction() as connection:
            self._lock_product(connection, product_id, if_match)
            connection.execute("DELETE FROM product WHERE id = :id", {"id": product_id})

    def _lock_product(
        self, connection: sqlite3.Connection, product_id: int, if_match: Precondition
    ) -> dict:
        """The product as it is under the write lock. Raises NotFound, PreconditionFailed."""
        rows = connection.execute(SELECT_PRODUCT, {"id": product_id}).fetchall()
        product = self._one("product", product_id, rows)
        check_precondition(product, if_match)
        return product

    def _save_product(
        self,
        connection: sqlite3.Connection,
        product: dict,
        before: dict | None = None,
        note: str = "",
    ) -> dict:
        """Write a product, a new one where its id is None, and return it.

        before: what it was; note: why its stock changes.
        """
        statement = SAVE_PRODUCT + " RETURNING " + PRODUCT_COLUMNS
        [row] = connection.execute(statement, product).fetchall()
        texts = ("name", "description")
        if before is None or any(row[name] != before[name] for name in texts):
            connection.execute(SAVE_SEARCH, search_row(row))
        change = row["stock"] - (before["stock"] if before else 0)
        if change:
            self._record_movement(connection, row["id"], change, note=note)
        return dict(row)

    @staticmethod
    def _record_movement(
        connection: sqlite3.Connection,
        product_id: int,
        change: int,
        *,
        order_id: int | None = None,
        note: str = "",
    ) -> None:
        """Write into the ledger what has just changed the stock of a product."""
        [(movement_id, stock)] = connection.execute(
            """
            UPDATE product
               SET movements = movements + 1
             WHERE id = :id
            RETURNING movements, stock
            """,
            {"id": product_id},
        ).fetchall()
        connection.execute(
            """
            INSERT INTO movement (product_id, id, change, stock, order_id, note, created_at)
            VALUES (:product_id, :id, :change, :stock, :order_id, :note, :created_at)
            """,
            {
                "product_id": product_id,
                "id": movement_id,
                "change": change,
                "stock": stock,
                "order_id": order_id,
                "note": note,
                "created_at": timestamp(),
            },
        )

    # --- spreadsheets

    def export_products(self) -> Iterator[dict]:
        """Every product by id, its price in cents, as they are at one moment."""
        mode = "mode=ro" if self.read_only else "mode=rw"
        try:
            with contextlib.closing(self._connect(mode)) as reader:
                yield from map(dict, reader.execute(SELECT_PRODUCTS + " ORDER BY id"))
        except sqlite3.Error as error:
            raise translate_error(error) from error

    def import_products(self, rows: Iterable[dict]) -> tuple[int, int]:
        """Add and change products in one transaction; return how many were added and changed.

        rows: fields as in create_product; one with an id changes the fields it has of that
        product. Raises NotFound, and then nothing is changed.
        """
        new = []
        changed = 0
        with self.transaction() as connection:
            for row in rows:
                if row.get("id") is None:
                    new.append(row)
                    continue
                product = self._lock_product(connection, row["id"], None)
                self._save_product(connection, {**product, **row}, product, "import")
                changed += 1
            self._insert_products(connection, new)
        return len(new), changed

    @staticmethod
    def _insert_products(connection: sqlite3.Connection, rows: list[dict]) -> None:
        """Add many products, at a quarter of what _save_product takes for each."""
        [(last,)] = connection.execute("""
            SELECT coalesce(max(seq), 0)
              FROM sqlite_sequence
             WHERE name = 'product'
        """).fetchall()
        products = [
            {**PRODUCT_DEFAULTS, **row, "id": product_id}
            for product_id, row in enumerate(rows, last + 1)
        ]
        connection.executemany(SAVE_PRODUCT, products)
        connection.executemany(SAVE_SEARCH, map(search_row, products))
        open_balances(connection, after=last, note="import")

    @staticmethod
    def _one(kind: str, row_id: int, rows: list[sqlite3.Row]) -> dict:
        if not rows:
            raise NotFound(kind, row_id)
        return dict(rows[0])

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
        """A page of the orders, and the id to go on after (None where nothing follows).

        status, reference: only orders that have these. sort: a key of ID_ORDERS. after, limit:
        the page.
        """
        conditions = []
        if status is not None:
            conditions.append("status = :status")
        if reference is not None:
            conditions.append("reference = :reference")
        if reference:
            conditions.append("reference <> ''")  # lets SQLite use the partial index
        rows = self._read(
            select_page("SELECT * FROM orders", conditions, ID_ORDERS[sort], after),
            {"status": status, "reference": reference, "after": after, "limit": limit + 1},
        )
        orders, next_after = cut_page(rows, limit)
        # Lines never change, so a second statement sees the lines that the first one meant.
        return with_lines(orders, self._read(SELECT_LINES, ids_of(orders))), next_after

    def get_order(self, order_id: int) -> dict:
        """The order with its lines, money in cents. Raises NotFound."""
        order = self._one("order", order_id, self._read(SELECT_ORDER, {"id": order_id}))
        return with_lines([order], self._read(SELECT_LINES, ids_of([order])))[0]

    def create_order(self, products: list[dict], reference: str = "") -> dict:
        """Take the stock of every line, or of none, and return the new, pending order.

        products: the lines, 1 to 100 dicts of product_id and quantity in pieces, each product
        once. reference: the caller's own text. Raises UnknownProducts, InsufficientStock with
        every short line, ValueError where there is no line.
        """
        if not products:
            raise ValueError("An order needs at least one line.")
        with self.transaction() as connection:
            taken = self._take_stock(connection, products)
            lines = [
                {"product_id": product_id, "name": name, "price": price, "quantity": quantity}
                for product_id, _, name, price, quantity, *_ in taken
            ]
            order = {
                "total": sum(line["price"] * line["quantity"] for line in lines),
                "created_at": timestamp(),
                "reference": reference,
            }
            order_id = connection.execute(
                """
                INSERT INTO orders (total, created_at, reference)
                VALUES (:total, :created_at, :reference)
                """,
                order,
            ).lastrowid
            connection.executemany(
                """
                INSERT INTO order_line (order_id, product_id, position, name, price, quantity,
                                        stock, movement_id)
                VALUES (?, ?, ?, ?, ?, ?, ?, ?)
                """,
                [(order_id, *line) for line in taken],
            )
        return {"id": order_id, "status": "pending", **order, "lines": lines}

    @staticmethod
    def _take_stock(connection: sqlite3.Connection, products: list[dict]) -> list[tuple]:
        """Take the stock of every line; return the columns of order_line behind order_id."""
        taken = []
        unknown = {}
        shortages = []
        for position, line in enumerate(products):
            product_id = line["product_id"]
            quantity = line["quantity"]
            product = connection.execute(
                """
                SELECT name, price, stock, movements
                  FROM product
                 WHERE id = :product_id
                """,
                line,
            ).fetchone()
            if product is None:
                unknown[position] = product_id
                continue
            name, price, stock, movements = product
            if stock < quantity:
                shortages.append(shortage(product_id, quantity, stock))
                continue
            taken.append(
                (product_id, position, name, price, quantity, stock - quantity, movements + 1)
            )
        if unknown:
            raise UnknownProducts(unknown)
        if shortages:
            raise InsufficientStock(shortages)
        # Whatever was seen before: the statement that takes is the one that checks.
        changed = connection.executemany(
            """
            UPDATE product
               SET stock = stock - :quantity, movements = movements + 1
             WHERE id = :product_id AND stock >= :quantity
            """,
            products,
        ).rowcount
        if changed != len(products):
            raise ValueError("An order names each product once.")
        return taken

    def update_order(self, order_id: int, status: str, *, if_match: Precondition = None) -> dict:
        """Complete or cancel a pending order and return it; the status it already has changes
        nothing.

        Cancelling puts the stock back, up to MAX_STOCK and where the product still exists.
        if_match: a condition on the etag() of the order's row. Raises NotFound,
        PreconditionFailed, InvalidTransition.
        """
        with self.transaction() as connection:
            rows = connection.execute(SELECT_ORDER, {"id": order_id}).fetchall()
            order = self._one("order", order_id, rows)
            check_precondition(order, if_match)
            if order["status"] not in ("pending", status):
                raise InvalidTransition(order_id, order["status"], status)
            if order["status"] != status:
                self._set_status(connection, order_id, status)
            lines = connection.execute(SELECT_LINES, ids_of([order])).fetchall()
        return with_lines([{**order, "status": status}], lines)[0]

    def expire_orders(self, minutes: float, *, limit: int = 4) -> int:
        """Cancel pending orders older than so many minutes, at most `limit`; return how many.

        Four of a hundred lines take the loop 15 ms.
        """
        with self.transaction() as connection:
            expired = {"due": timestamp(minutes * 60), "limit": limit}
            due = connection.execute(SELECT_EXPIRED, expired).fetchall()
            for order in due:
                self._set_status(connection, order["id"], "cancelled")
        return len(due)

    def has_expired_orders(self, minutes: float) -> bool:
        """Whether expire_orders() would find something: without the write lock."""
        return bool(self._read(SELECT_EXPIRED, {"due": timestamp(minutes * 60), "limit": 1}))

    def _set_status(self, connection: sqlite3.Connection, order_id: int, status: str) -> None:
        connection.execute(
            """
            UPDATE orders
               SET status = :status
             WHERE id = :id
            """,
            {"id": order_id, "status": status},
        )
        if status == "cancelled":
            self._put_stock_back(connection, order_id)

    def _put_stock_back(self, connection: sqlite3.Connection, order_id: int) -> None:
        """As far as the products of an order still exist, and MAX_STOCK allows."""
        lines = connection.execute(
            """
            SELECT product_id, min(quantity, :max - product.stock) AS change
              FROM order_line JOIN product ON product.id = product_id
             WHERE order_id = :id
            """,
            {"id": order_id, "max": MAX_STOCK},
        ).fetchall()
        for product_id, change in lines:
            if change:
                connection.execute(
                    """
                    UPDATE product
                       SET stock = stock + :change
                     WHERE id = :id
                    """,
                    {"id": product_id, "change": change},
                )
                self._record_movement(connection, product_id, change, order_id=order_id)

    # --- idempotency

    def get_idempotent(self, key: str, fingerprint: str) -> Any | None:
        """The result stored under an idempotency key in the last KEY_TTL seconds, or None.

        fingerprint: of the request. Call it inside transaction(), so that no other request with
        the key can come between this and save_idempotent(). Raises IdempotencyKeyReused.
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
        """Store the result of the request with this key, in the transaction of its work.

        result: any value that JSON can carry, except None. A few expired keys are deleted.
        """
        self._writer.execute(
            """
            INSERT OR REPLACE INTO idempotency_key (key, fingerprint, answer, created_at)
            VALUES (:key, :fingerprint, :answer, :now)
            """,
            {
                "key": key,
                "fingerprint": fingerprint,
                "answer": json.dumps(result),
                "now": timestamp(),
            },
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
            self._purged = expired  # no other key expires before the next second


PRODUCT_COLUMNS = "id, name, description, price, stock"
PRODUCT_JSON = """
    id, json_object('id', id, 'name', name, 'description', description, 'price', price / 100.0,
                    'stock', stock) AS json
"""
SELECT_PRODUCTS = "SELECT " + PRODUCT_COLUMNS + " FROM product"
SELECT_PRODUCT = SELECT_PRODUCTS + " WHERE id = :id"
# CROSS JOIN makes SQLite search the words first, and fetch only the products that have them.
SEARCHED_PRODUCTS = " FROM product_search CROSS JOIN product ON id = product_id"
# The condition that continues a page after an item, and the order. Equal values go by id. Each
# order has its index.
ID_ORDERS = {"id": ("id > :after", "id"), "-id": ("id < :after", "id DESC")}
PRODUCT_ORDERS = ID_ORDERS | {
    "name": (
        "(sort_name, product_id) > (:value, :after)",
        "sort_name, product_id",
    ),
    "-name": (
        "sort_name <= :value AND (sort_name < :value OR product_id > :after)",
        "sort_name DESC, product_id",
    ),
    "price": (
        "(price, id) > (:value, :after)",
        "price, id",
    ),
    "-price": (
        "price <= :value AND (price < :value OR id > :after)",
        "price DESC, id",
    ),
}
SELECT_MOVEMENTS = """
    SELECT id, change, stock, order_id, note, created_at
      FROM every_movement
"""
HAS_OTHER_WORDS = """
    NOT EXISTS (SELECT 1 FROM json_each(:other_words) WHERE NOT instr(words, value))
"""
SELECT_ORDER = "SELECT * FROM orders WHERE id = :id"
SELECT_EXPIRED = """
    SELECT id
      FROM orders
     WHERE status = 'pending' AND created_at < :due
     ORDER BY created_at
     LIMIT :limit
"""
SELECT_LINES = """
    SELECT order_id, product_id, name, price, quantity
      FROM order_line
     WHERE order_id IN (SELECT value FROM json_each(:ids))
     ORDER BY order_id, position
"""


def select_page(select: str, conditions: list[str], order: tuple[str, str], after: int) -> str:
    """A query for a page, put together from constants: so that each can use its index."""
    going_on, order_by = order
    where = " AND ".join([going_on if after else "TRUE", *conditions])
    return " ".join([select, "WHERE", where, "ORDER BY", order_by, "LIMIT :limit"])


def cut_page(rows: list[sqlite3.Row], limit: int | None) -> tuple[list[sqlite3.Row], int | None]:
    """The page out of rows, one of them too many if more follow; and the id to continue after."""
    if limit is None or len(rows) <= limit:
        return rows, None
    return rows[:limit], rows[limit - 1]["id"]


def ids_of(rows: list) -> dict:
    return {"ids": json.dumps([row["id"] for row in rows])}


def with_lines(orders: list, lines: list[sqlite3.Row]) -> list[dict]:
    """The orders as dicts, each with its own of the lines."""
    by_id: dict[int, dict] = {order["id"]: {**order, "lines": []} for order in orders}
    for row in lines:
        line = dict(row)
        by_id[line.pop("order_id")]["lines"].append(line)
    return list(by_id.values())


def shortage(product_id: int, requested: int, available: int) -> dict:
    """A line of InsufficientStock, in pieces."""
    return {"product_id": product_id, "requested": requested, "available": available}


PRODUCT_DEFAULTS = {"id": None, "description": "", "stock": 0}
SAVE_PRODUCT = """
    INSERT INTO product (id, name, description, price, stock)
    VALUES (:id, :name, :description, :price, :stock)
        ON CONFLICT (id) DO UPDATE
       SET name = excluded.name, description = excluded.description,
           price = excluded.price, stock = excluded.stock
"""
SAVE_SEARCH = """
    INSERT INTO product_search (product_id, sort_name, words)
    VALUES (:id, :sort_name, :words)
        ON CONFLICT (product_id) DO UPDATE
       SET sort_name = excluded.sort_name, words = excluded.words
"""


def open_balances(
    connection: sqlite3.Connection, after: int = 0, note: str = "opening balance"
) -> None:
    """Begin the ledger of the products with a greater id than `after`, with the stock they have."""
    connection.execute(
        """
        INSERT INTO movement (product_id, id, change, stock, note, created_at)
        SELECT id, 1, stock, stock, :note, :now
          FROM product
         WHERE id > :after AND stock > 0
        """,
        {"after": after, "note": note, "now": timestamp()},
    )
    connection.execute(
        "UPDATE product SET movements = 1 WHERE id > :after AND stock > 0", {"after": after}
    )


def fold(text: str) -> str:
    """The text without case and accents, as searches compare it: "Café" becomes "cafe"."""
    if text.isascii():
        return text.lower()
    letters = unicodedata.normalize("NFKD", text.casefold())
    folded = "".join(letter for letter in letters if not unicodedata.combining(letter))
    return folded.casefold().replace("ı", "i")  # whose capital is that of i


def search_row(product: dict | sqlite3.Row) -> dict:
    text = f"{product['name']}\n{product['description']}"
    return {"id": product["id"], "sort_name": product["name"].casefold(), "words": fold(text)}


# ------------------------------------------------------------------------------------ migrations
# A file of an older version is brought up to date in one transaction: first the `alter` statements
# of each migration that is due, which change the tables that there are; then schema.sql, which
# makes the tables and indexes that are missing; then each `fill`, which puts in what SQL cannot.


class Migration(NamedTuple):
    """The way from one schema version to the next."""

    alter: tuple[str, ...] = ()
    fill: Callable[[sqlite3.Connection], None] = lambda connection: None


def fill_search(connection: sqlite3.Connection) -> None:
    products = connection.execute("SELECT id, name, description FROM product")
    connection.executemany(SAVE_SEARCH, map(search_row, products))


MIGRATIONS = [
    Migration(),  # 0 to 1: a new file
    Migration(),  # 1 to 2: product_search, made anew by 3 to 4
    Migration(),  # 2 to 3: idempotency_key_by_time
    Migration(  # 3 to 4: references of orders, product_search with names to sort by
        alter=(
            "ALTER TABLE orders ADD COLUMN reference TEXT NOT NULL DEFAULT ''",
            "DROP TABLE IF EXISTS product_search",
        ),
        fill=fill_search,
    ),
    Migration(  # 4 to 5: the ledger, orders_pending_by_time
        alter=(
            "ALTER TABLE product ADD COLUMN movements INTEGER NOT NULL DEFAULT 0",
            "ALTER TABLE order_line ADD COLUMN stock INTEGER",
            "ALTER TABLE order_line ADD COLUMN movement_id INTEGER",
        ),
        fill=open_balances,
    ),
    Migration(),  # 5 to 6: the check of orders.status
]


def migrate(connection: sqlite3.Connection, version: int) -> None:
    """Bring the tables from a schema version to the current one, inside a transaction."""
    due = MIGRATIONS[version:]
    if version:
        for migration in due:
            for statement in migration.alter:
                connection.execute(statement)
    script = SCHEMA.read_text()
    for statement in split_statements(script):
        connection.execute(statement)
    for migration in due:
        migration.fill(connection)
    restore_table_texts(connection, script)


def split_statements(script: str) -> Iterator[str]:
    # executescript() would commit the transaction first.
    statement = ""
    for line in script.splitlines(keepends=True):
        statement += line
        if sqlite3.complete_statement(statement):
            yield statement
            statement = ""


def restore_table_texts(connection: sqlite3.Connection, script: str) -> None:
    """Give each table the text of schema.sql, so that old and new files are alike to the letter.

    After an ALTER TABLE the text differs, if only in its layout. What the text means must be what
    the table holds: https://www.sqlite.org/lang_altertable.html#otheralter
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
    """Copy a database to a file while it is in use: the state of one moment, checked, whole or
    not there at all.

    progress: called with the pages that remain and the pages in all. Returns the copy's
    products, orders and bytes. Raises DatabaseError for a source that is no shop's database, a
    target that exists (unless overwrite) or is the source itself, and a copy that cannot be
    made.
    """
    source = Store(path, read_only=True)
    target = Path(target).absolute()
    check_target(source.path, target, overwrite)
    partial = target.with_name(f"{target.name}.partial-{os.getpid()}")
    try:
        remove_partial_copies(target)
        summary = copy_database(source, partial, progress or (lambda remaining, total: None))
        partial.chmod(source.path.stat().st_mode & 0o777)
        flush_file(partial)
        summary["bytes"] = partial.stat().st_size
        partial.replace(target)
        flush_file(target.parent)
    except (OSError, sqlite3.Error) as error:
        raise DatabaseError(f"{target} cannot be made: {error}.") from error
    finally:
        for suffix in "", "-journal", "-wal", "-shm":
            partial.with_name(partial.name + suffix).unlink(missing_ok=True)
    return summary


def check_target(source: Path, target: Path, overwrite: bool) -> None:
    """Raise DatabaseError where a backup must not go."""
    if target.exists() and (not target.is_file() or target.samefile(source)):
        raise DatabaseError(f"{target} is nothing that a backup may replace.")
    if target.exists() and not overwrite:
        raise DatabaseError(f"{target} exists already: --overwrite replaces it.")
    # SQLite would take a WAL that lies beside the copy for the copy's own.
    for suffix in "-wal", "-shm", "-journal":
        if target.name.endswith(suffix) or target.with_name(target.name + suffix).exists():
            raise DatabaseError(f"{target} is, or has beside it, a file of a database in use.")


def remove_partial_copies(target: Path) -> None:
    """Remove what backups to this target left that were killed."""
    name = re.compile(re.escape(target.name) + r"\.partial-([0-9]+)(-journal|-wal|-shm)?")
    for file in target.parent.iterdir():
        match = name.fullmatch(file.name)
        if match and not is_running(int(match[1])):
            file.unlink(missing_ok=True)


def is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass  # somebody else's
    return True


def copy_database(source: Store, target: Path, progress: Callable[[int, int], object]) -> dict:
    """Copy page by page, check the copy, and return how many products and orders it has."""
    with (
        contextlib.closing(sqlite3.connect(target, isolation_level=None)) as copy,
        contextlib.closing(source._connect("mode=ro")) as reader,
    ):
        # Holds one state, or each order that comes meanwhile would start the copy again.
        reader.execute("BEGIN")
        reader.execute("SELECT count(*) FROM product").fetchall()
        reader.backup(copy, pages=1000, progress=lambda status, *pages: progress(*pages))
        [(mode,)] = copy.execute("PRAGMA journal_mode = DELETE")  # one file, no WAL beside it
        if mode != "delete":
            raise DatabaseError(f"The copy would need a file beside it: its mode is {mode}.")
        [(verdict,)] = copy.execute("PRAGMA integrity_check(1)")
        if verdict != "ok":
            raise DatabaseError(f"The copy would not be sound: {verdict}")
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
    """What is wrong in a database, a sentence each: pages, limits, references, sums, the ledger.

    Raises DatabaseError for a file that is no shop's database.
    """
    store = Store(path, read_only=True)
    try:
        # Not mode=ro: there SQLite leaves the CHECK constraints out.
        with contextlib.closing(store._connect("mode=rw")) as connection:
            connection.execute("PRAGMA query_only = ON")
            return [
                *damaged_pages(connection),
                *missing_references(connection),
                *wrong_totals(connection),
                *wrong_stocks(connection),
                *missing_searches(connection),
            ]
    except sqlite3.DatabaseError as error:
        return [f"{error}."]


def damaged_pages(connection: sqlite3.Connection) -> list[str]:
    rows = connection.execute("PRAGMA integrity_check").fetchall()
    lines = "\n".join(row["integrity_check"] for row in rows).splitlines()
    return [line for line in lines if line != "ok"]


def missing_references(connection: sqlite3.Connection) -> list[str]:
    rows = connection.execute("PRAGMA foreign_key_check").fetchall()
    return [f"A row of {row['table']} refers to a missing row of {row['parent']}." for row in rows]


def wrong_totals(connection: sqlite3.Connection) -> list[str]:
    rows = connection.execute("""
        SELECT orders.id AS id, total, count(order_line.order_id) AS lines,
               coalesce(sum(price * quantity), 0) AS sum
          FROM orders LEFT JOIN order_line ON order_line.order_id = orders.id
         GROUP BY orders.id
        HAVING total <> sum OR lines = 0
    """).fetchall()
    return [
        f"Order {row['id']} has a total of {row['total']} cents, "
        f"but {row['lines']} lines that make {row['sum']}."
        for row in rows
    ]


def wrong_stocks(connection: sqlite3.Connection) -> list[str]:
    """What the ledger does not account for: read once, in the order of its movements."""
    products = connection.execute("SELECT id, stock, movements FROM product").fetchall()
    counts = {row["id"]: 0 for row in products}
    stocks = dict(counts)
    errors = []
    for product_id, movement_id, change, stock in connection.execute("""
        SELECT product_id, id, change, stock
          FROM movement
         UNION ALL
        SELECT product_id, movement_id, CAST(-quantity AS INTEGER), stock
          FROM order_line
         WHERE movement_id IS NOT NULL
         ORDER BY product_id, id
    """):
        if product_id not in stocks:
            continue  # deleted
        counts[product_id] += 1
        if movement_id != counts[product_id] or stock != stocks[product_id] + change:
            errors.append(f"Movement {movement_id} of product {product_id} does not follow.")
        stocks[product_id] += change
    return errors + [
        f"Product {row['id']} has a stock of {row['stock']} after {row['movements']} movements, "
        f"but there are {counts[row['id']]}, which make {stocks[row['id']]}."
        for row in products
        if (row["stock"], row["movements"]) != (stocks[row["id"]], counts[row["id"]])
    ]


def missing_searches(connection: sqlite3.Connection) -> list[str]:
    rows = connection.execute("""
        SELECT id
          FROM product
         WHERE id NOT IN (SELECT product_id FROM product_search)
    """).fetchall()
    return [f"Product {row['id']} cannot be searched: its row of words is missing." for row in rows]
