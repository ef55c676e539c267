"""The shop's Store: connections, transactions and every SQL statement.

What a request is, and how an answer looks, is left to shop.py; what must never be true, to schema.sql. Money is
whole cents in every argument and result, a time is UTC as in 2026-11-22T10:15:30Z. A Store may be used by many
threads: each has a reading connection of its own, and all share one that writes.

    store = Store("db.sqlite3")
    mug = store.add_product(name="Mug", price=999, stock=5)
    store.place_order([{"product_id": mug["id"], "quantity": 2}])
"""

import collections
import contextlib
import hashlib
import json
import os
import sqlite3
import threading
import time
from pathlib import Path

SCHEMA = Path(__file__).with_name("schema.sql")
SCHEMA_VERSION = 1
APPLICATION_ID = 1397247824
MAX_STOCK = 1_000_000_000
KEY_LIFE = 24 * 3600  # seconds
KEPT_BYTES = 32 << 20  # of rendered answers, a thread


# --------------------------------------------------------------------------------------------------- failures

class NotFound(Exception):
    """There is no such product or order."""

    def __init__(self, kind: str, number: int):
        super().__init__(f"There is no {kind} {number}.")


class UnknownProducts(Exception):
    """Lines of an order name products that do not exist; `lines` maps their positions to the ids."""

    def __init__(self, lines: dict[int, int]):
        super().__init__(f"Products that do not exist: {', '.join(map(str, lines.values()))}.")
        self.lines = lines


class InsufficientStock(Exception):
    """`shortages` says of every short line what was requested and what is available, in pieces."""

    def __init__(self, shortages: list[dict]):
        super().__init__(" ".join(f"Product {short['product_id']} has {short['available']} left, "
                                  f"{short['requested']} were asked for." for short in shortages))
        self.shortages = shortages


class ExcessiveStock(Exception):
    """A delivery would lift a product's stock over MAX_STOCK."""

    def __init__(self, stock: int):
        super().__init__(f"must be at most {MAX_STOCK - stock}, for the stock to stay within {MAX_STOCK}")


class InvalidTransition(Exception):
    """An order that is no longer pending keeps its status."""

    def __init__(self, order_id: int, status: str, wanted: str):
        super().__init__(f"Order {order_id} is {status} and cannot become {wanted}: only a pending order changes.")


class ContentChanged(Exception):
    """The row is no longer the one whose fingerprint the caller has seen."""


class KeyReused(Exception):
    """The idempotency key belongs to another request."""


class Unavailable(Exception):
    """The database cannot do this now, and nothing was changed."""


class Busy(Unavailable):
    """Somebody else holds the write lock."""


class Unusable(Exception):
    """The file cannot serve as the shop's database, and was left as it is."""


REASONS = {
    sqlite3.SQLITE_BUSY: "The database is busy.",
    sqlite3.SQLITE_LOCKED: "The database is busy.",
    sqlite3.SQLITE_NOMEM: "The database is out of memory.",
    sqlite3.SQLITE_READONLY: "The database cannot be written.",
    sqlite3.SQLITE_IOERR: "The disk does not read or write.",
    sqlite3.SQLITE_FULL: "The disk is full.",
    sqlite3.SQLITE_CANTOPEN: "The database cannot be opened.",
    sqlite3.SQLITE_PROTOCOL: "The database is busy.",
    sqlite3.SQLITE_CORRUPT: "The database is damaged.",
    sqlite3.SQLITE_NOTADB: "The database is damaged.",
}


def explain(error: BaseException) -> BaseException:
    """The failure to raise for an error: Busy or Unavailable where SQLite means that, else the error itself."""
    reason = REASONS.get(getattr(error, "sqlite_errorcode", 0) & 0xFF)
    return (Busy if reason == REASONS[sqlite3.SQLITE_BUSY] else Unavailable)(reason) if reason else error


def as_unavailable(error: BaseException) -> BaseException:
    """The same where no statement of ours can be to blame: whatever ails SQLite or its file, it is unavailable."""
    failure = explain(error)
    return Unavailable("The database cannot be used.") if isinstance(failure, (sqlite3.Error, Unusable)) else failure


def fingerprint(*columns) -> str:
    """A short text that two rows share only if their columns are equal."""
    return hashlib.blake2b(repr(columns).encode(), digest_size=12).hexdigest()


def timestamp(seconds_ago: int = 0) -> str:
    """The time so many seconds ago, in UTC."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time() - seconds_ago))


# ------------------------------------------------------------------------------------------------------ Store

class Queue:
    """A lock that threads get in the order in which they came: SQLite's own busy handler polls, and is unfair."""

    def __init__(self):
        self.tickets, self.mutex = collections.deque(), threading.Lock()

    def enter(self, seconds: float) -> bool:
        """Wait for this thread's turn; False when it has not come by then."""
        ticket = threading.Lock()
        ticket.acquire()
        with self.mutex:
            self.tickets.append(ticket)
            if self.tickets[0] is ticket:
                return True
        if ticket.acquire(timeout=seconds):
            return True
        with self.mutex:
            if self.tickets[0] is ticket:  # it came at the last moment
                return True
            self.tickets.remove(ticket)
        return False

    def leave(self) -> None:
        with self.mutex:
            self.tickets.popleft()
            if self.tickets:
                self.tickets[0].release()


class Kept(threading.local):
    """What a thread keeps: its reading connection, and what was rendered at which version of the data."""

    reader, version, rendered, size = None, None, None, 0


class Store:
    """Products, orders and idempotency keys in one SQLite file.

    path: the file, made where it is missing. wait: the seconds that a write waits for the lock before Busy.
    read_only: open a copy that another process renews; every write is then Unavailable. autocheckpoint: False
    leaves the checkpoints to Litestream. trace: called with the text of every statement.
    Raises Unusable for a file that is no database, not the shop's, made by a newer shop, or not writable. A file
    that is merely locked is no failure: the Store gets ready with the first call that finds it free.
    """

    def __init__(self, path, *, wait: float = 5.0, read_only: bool = False, autocheckpoint: bool = True, trace=None):
        if sqlite3.sqlite_version_info < (3, 37):
            raise Unusable(f"SQLite {sqlite3.sqlite_version} is too old: the shop needs 3.37 or later.")
        self.path, self.wait, self.read_only = Path(path).absolute(), wait, read_only
        self._wal = self.path.with_name(self.path.name + "-wal")
        self._autocheckpoint, self._trace = autocheckpoint, trace
        self._writer, self._writing_thread, self._queue = None, None, Queue()
        self._kept = Kept()
        try:
            if read_only:
                self._check_origin()
            else:
                self._prepare()
        except Busy:
            pass
        except (Unavailable, OSError) as error:
            raise Unusable(f"{self.path}: {error}") from error

    def close(self) -> None:
        """Close the connections, the writing one last: it folds the WAL into the file.

        What other threads read with is closed when they end.
        """
        for connection in self._kept.reader, self._writer:
            if connection:
                connection.close()

    def _open(self, mode: str, wait: float = 1.0) -> sqlite3.Connection:
        connection = sqlite3.connect(f"{self.path.as_uri()}?{mode}", uri=True, timeout=wait, isolation_level=None,
                                     check_same_thread=False)
        connection.row_factory = sqlite3.Row
        connection.set_trace_callback(self._trace)
        connection.create_function("casefold", 1, str.casefold, deterministic=True)
        connection.create_function("fingerprint", -1, fingerprint, deterministic=True)
        return connection

    def _check_origin(self) -> None:
        """Raise Unusable unless the file is new or ours. Nothing is written to it, nor beside it."""
        if not self.read_only and (not self.path.is_file() or not self.path.stat().st_size):
            return
        # Without a WAL the file alone tells all, and immutable=1 makes no -wal and -shm.
        mode = "mode=ro" if self._wal.exists() else "mode=ro&immutable=1"
        try:
            with contextlib.closing(self._open(mode, self.wait)) as connection:
                found = connection.execute("""
                    SELECT (SELECT user_version FROM pragma_user_version) AS version,
                           (SELECT application_id FROM pragma_application_id) AS origin,
                           (SELECT count(*)
                              FROM sqlite_schema
                             WHERE name NOT LIKE '@_litestream%' ESCAPE '@') AS things
                """).fetchone()
        except sqlite3.DatabaseError as error:
            if error.sqlite_errorcode & 0xFF == sqlite3.SQLITE_NOTADB:
                raise Unusable(f"{self.path} is not a database.") from error
            raise explain(error) from error
        if found["version"] > SCHEMA_VERSION:
            raise Unusable(f"{self.path} was made by a newer version of the shop: it has schema "
                           f"{found['version']}, this one knows {SCHEMA_VERSION}.")
        if found["origin"] != APPLICATION_ID and (found["version"] or found["things"] or self.read_only):
            raise Unusable(f"{self.path} is the database of another program.")

    def _prepare(self) -> None:
        """Open the writing connection, and make the tables in a new file."""
        self._check_origin()
        try:
            writer = self._open("mode=rwc", self.wait)
        except sqlite3.Error as error:
            raise explain(error) from error
        try:
            if writer.execute("PRAGMA journal_mode = WAL").fetchone()["journal_mode"] != "wal":
                raise Unusable(f"{self.path}: its file system does not carry a write-ahead log.")
            writer.execute("PRAGMA synchronous = FULL")
            writer.execute("PRAGMA foreign_keys = ON")
            # 16 MiB of WAL rather than 4: the pages that many orders touch are then written back once. Litestream
            # checkpoints by itself, long before 200 MiB, which bound the WAL where it does not run.
            writer.execute("PRAGMA wal_autocheckpoint = 4000" if self._autocheckpoint else
                           "PRAGMA wal_autocheckpoint = 50000")
            # That it can be written is to show here, not with the first order. BEGIN IMMEDIATE alone does not tell:
            # on a file that cannot be written SQLite quietly makes a read transaction of it.
            writer.execute("BEGIN IMMEDIATE")
            version = writer.execute("PRAGMA user_version").fetchone()["user_version"]
            writer.execute("PRAGMA application_id = 1397247824")
            writer.execute("ROLLBACK")
            if version < SCHEMA_VERSION:
                writer.executescript(SCHEMA.read_text())
        except BaseException as error:
            writer.close()
            raise explain(error)
        self._writer = writer

    def _reader(self) -> sqlite3.Connection:
        """This thread's reading connection."""
        if self._kept.reader is None:
            if not self._writer:
                with self.transaction():
                    pass
            self._kept.reader = self._open("mode=rw")
            self._kept.reader.execute("PRAGMA query_only = ON")
        return self._kept.reader

    def _read(self, sql: str, parameters=()) -> list[sqlite3.Row]:
        """Every row of a query. No read is ever left open: it would keep the WAL from being folded in."""
        try:
            if not self.read_only:
                return self._reader().execute(sql, parameters).fetchall()
            # Litestream writes pages into a copy past SQLite's change counter, and not while somebody has the file
            # open as a WAL: a connection that stayed would read its old pages for ever, or stop the copy.
            with contextlib.closing(self._open("mode=ro")) as reader:
                return reader.execute(sql, parameters).fetchall()
        except sqlite3.Error as error:
            raise explain(error) from error

    def _version(self):
        """What differs after every change of the data; None where that cannot be told."""
        if not self.read_only:
            return self._read("PRAGMA data_version")[0]["data_version"]
        files = []
        for file in self.path, self._wal:
            with contextlib.suppress(FileNotFoundError):
                files.append(file.stat())
        # Within the grain of the file system's clock a second change might look like the first.
        if time.time_ns() - max((file.st_mtime_ns for file in files), default=0) < 100_000_000:
            return None
        return [(file.st_ino, file.st_size, file.st_mtime_ns) for file in files]

    # ------------------------------------------------------------------------------------------ transactions

    def begin(self) -> None:
        """Take the write lock for this thread, in the order of arrival, and open a transaction.

        Raises Busy after `wait` seconds, Unavailable where the database cannot be written at all.
        """
        if self.read_only:
            raise Unavailable("This is a read-only copy of the shop: send what writes to the shop itself.")
        if not self._queue.enter(self.wait):
            raise Busy(REASONS[sqlite3.SQLITE_BUSY])
        try:
            if not self._writer:
                self._prepare()  # it was locked when the Store was made
            # IMMEDIATE takes the write lock before the first read, so the stock that is checked is the stock that
            # is deducted.
            self._writer.execute("BEGIN IMMEDIATE")
            self._writing_thread = threading.get_ident()
        except BaseException as error:
            self._queue.leave()
            raise as_unavailable(error)

    def commit(self) -> None:
        """Make durable what happened since begin(). Raises Unavailable, and nothing has happened, if it cannot be."""
        try:
            # After a full disk or an I/O error SQLite may have rolled back by itself.
            if not self._writer.in_transaction:
                raise Unavailable("The database gave the transaction up.")
            self._writer.execute("COMMIT")
        except sqlite3.Error as error:
            raise as_unavailable(error) from error
        finally:
            self.rollback()

    def rollback(self) -> None:
        """End the transaction, if it is still open, without a trace of it, and hand the write lock on."""
        try:
            if self._writer.in_transaction:
                self._writer.execute("ROLLBACK")
        finally:
            self._writing_thread = None
            self._queue.leave()

    @contextlib.contextmanager
    def transaction(self):
        """All or nothing: yields the writing connection, commits at the end and rolls back on any exception.

        Between begin() and commit() of this thread it is a savepoint in that transaction. Raises as these two do.
        """
        if self._writing_thread != threading.get_ident():
            self.begin()
            try:
                yield self._writer
            except BaseException as error:
                self.rollback()
                raise explain(error)
            self.commit()
            return
        con = self._writer
        # A savepoint without a transaction around it would begin one of its own, and commit it.
        if not con.in_transaction:
            raise Unavailable("The database gave the transaction up.")
        try:
            con.execute("SAVEPOINT step")
            yield con
            con.execute("RELEASE step")
        except BaseException as error:
            if con.in_transaction:
                con.execute("ROLLBACK TO step")
                con.execute("RELEASE step")
            raise explain(error)

    def kept(self, key, make):
        """What make() gave for this key, until anything in the database changes: for answers dear to render.

        make() returns it and its size in bytes: what a thread keeps is bounded.
        """
        kept, version = self._kept, self._version()
        if version is None or version != kept.version:
            kept.version, kept.rendered, kept.size = version, {}, 0
        if key not in kept.rendered:
            kept.rendered[key] = made = make()
            kept.size += made[1]
            while kept.size > KEPT_BYTES and len(kept.rendered) > 1:
                kept.size -= kept.rendered.pop(next(iter(kept.rendered)))[1]
        return kept.rendered[key][0]

    def check_health(self) -> None:
        """Really read the database. Raises Unavailable if that fails in whatever way."""
        try:
            self._read("SELECT id FROM product LIMIT 1")
        except sqlite3.Error as error:
            raise Unavailable("The database cannot be read.") from error

    # ---------------------------------------------------------------------------------------------- products

    def list_products(self, *, q: str | None = None, available: bool | None = None, after: int = 0,
                      limit: int | None = None) -> tuple[str, int | None]:
        """The products by id as the text of a JSON array, and the id to go on after (None where nothing follows).

        q: only what contains this text in name or description, ignoring case. available: only with stock, or
        without. after, limit: a page. SQLite renders the rows, 2.5 times as fast as dicts and json.dumps, so that
        prices come as the decimals of JSON here.
        """
        rows = self._read("""
            SELECT id, json_object('id', id, 'name', name, 'description', description,
                                   'price', price / 100.0, 'stock', stock) AS product
              FROM product
             WHERE id > :after
               AND (:available IS NULL OR (stock > 0) = :available)
               AND (:q IS NULL OR instr(casefold(name), :q) OR instr(casefold(description), :q))
             ORDER BY id
             LIMIT :limit
        """, {"q": q and q.casefold(), "available": available, "after": after, "limit": limit + 1 if limit else -1})
        page = rows[:limit]
        return f"[{','.join(row['product'] for row in page)}]", page[-1]["id"] if len(page) < len(rows) else None

    def read_product(self, product_id: int) -> dict:
        """The product, its price in cents. Raises NotFound."""
        rows = self._read("""
            SELECT id, name, description, price, stock
              FROM product
             WHERE id = :id
        """, {"id": product_id})
        if not rows:
            raise NotFound("product", product_id)
        return dict(rows[0])

    def add_product(self, *, name: str, price: int, description: str = "", stock: int = 0) -> dict:
        """Add a product, price in cents, stock in pieces, and return it."""
        with self.transaction() as con:
            [product] = con.execute("""
                INSERT INTO product (name, description, price, stock)
                VALUES (:name, :description, :price, :stock)
                RETURNING id, name, description, price, stock
            """, {"name": name, "description": description, "price": price, "stock": stock}).fetchall()
        return dict(product)

    def change_product(self, product_id: int, *, name: str | None = None, description: str | None = None,
                       price: int | None = None, stock: int | None = None, seen: list[str] | None = None) -> dict:
        """Set what is given, price in cents, and return the product.

        seen: change it only if fingerprint() of its row is one of these. Raises NotFound, ContentChanged.
        """
        with self.transaction() as con:
            changed = con.execute("""
                UPDATE product
                   SET name = coalesce(:name, name), description = coalesce(:description, description),
                       price = coalesce(:price, price), stock = coalesce(:stock, stock)
                 WHERE id = :id
                   AND (:seen = 'null'
                        OR fingerprint(id, name, description, price, stock) IN (SELECT value FROM json_each(:seen)))
                RETURNING id, name, description, price, stock
            """, {"id": product_id, "name": name, "description": description, "price": price, "stock": stock,
                  "seen": json.dumps(seen)}).fetchall()
            if not changed:
                self._explain_unchanged(con, product_id, seen)
        return dict(changed[0])

    def change_stock(self, product_id: int, change: int, *, seen: list[str] | None = None) -> dict:
        """Add `change` pieces to the stock, or take them where it is negative, and return the product.

        Raises NotFound, ContentChanged (see change_product), InsufficientStock and ExcessiveStock.
        """
        with self.transaction() as con:
            changed = con.execute("""
                UPDATE product
                   SET stock = stock + :change
                 WHERE id = :id AND stock + :change BETWEEN 0 AND :max
                   AND (:seen = 'null'
                        OR fingerprint(id, name, description, price, stock) IN (SELECT value FROM json_each(:seen)))
                RETURNING id, name, description, price, stock
            """, {"id": product_id, "change": change, "max": MAX_STOCK, "seen": json.dumps(seen)}).fetchall()
            if not changed:
                self._explain_unchanged(con, product_id, seen, change)
        return dict(changed[0])

    def remove_product(self, product_id: int, *, seen: list[str] | None = None) -> None:
        """Delete a product; the lines of orders keep their copies. Raises NotFound, ContentChanged."""
        with self.transaction() as con:
            removed = con.execute("""
                DELETE FROM product
                 WHERE id = :id
                   AND (:seen = 'null'
                        OR fingerprint(id, name, description, price, stock) IN (SELECT value FROM json_each(:seen)))
                RETURNING id
            """, {"id": product_id, "seen": json.dumps(seen)}).fetchall()
            if not removed:
                self._explain_unchanged(con, product_id, seen)

    def _explain_unchanged(self, con: sqlite3.Connection, product_id: int, seen: list[str] | None, change: int = 0):
        """Raise the reason for which a statement above left the product alone."""
        product = con.execute("""
            SELECT id, name, description, price, stock
              FROM product
             WHERE id = :id
        """, {"id": product_id}).fetchone()
        if not product:
            raise NotFound("product", product_id)
        if seen is not None and fingerprint(*product) not in seen:
            raise ContentChanged
        if change > 0:
            raise ExcessiveStock(product["stock"])
        raise InsufficientStock([{"product_id": product_id, "requested": -change, "available": product["stock"]}])

    # ------------------------------------------------------------------------------------------------ orders

    def list_orders(self, *, status: str | None = None, after: int = 0,
                    limit: int = 100) -> tuple[list[dict], int | None]:
        """A page of the orders by id, money in cents, and the id to go on after (None where nothing follows).

        status: only orders of this one. after, limit: the page.
        """
        page = {"status": status, "after": after, "limit": limit + 1}
        # Two statements: with "OR :status IS NULL" the index could not serve.
        orders = self._read("""
            SELECT id, status, total, created_at
              FROM orders
             WHERE id > :after
             ORDER BY id
             LIMIT :limit
        """, page) if status is None else self._read("""
            SELECT id, status, total, created_at
              FROM orders
             WHERE id > :after AND status = :status
             ORDER BY id
             LIMIT :limit
        """, page)
        following = orders[limit - 1]["id"] if len(orders) > limit else None
        return self._with_lines(orders[:limit]), following

    def read_order(self, order_id: int) -> dict:
        """The order with its lines, money in cents. Raises NotFound."""
        orders = self._read("""
            SELECT id, status, total, created_at
              FROM orders
             WHERE id = :id
        """, {"id": order_id})
        if not orders:
            raise NotFound("order", order_id)
        return self._with_lines(orders)[0]

    def _with_lines(self, orders: list[sqlite3.Row], con: sqlite3.Connection | None = None) -> list[dict]:
        # Orders keep their lines for ever, so a second statement cannot see others than the first meant.
        lines = (con.execute if con else self._read)("""
            SELECT order_id, product_id, name, price, quantity
              FROM order_line
             WHERE order_id IN (SELECT value FROM json_each(:ids))
             ORDER BY order_id, position
        """, {"ids": json.dumps([order["id"] for order in orders])})
        of_order = {order["id"]: {**order, "lines": []} for order in orders}
        for order_id, *line in lines:
            of_order[order_id]["lines"].append(dict(zip(("product_id", "name", "price", "quantity"), line)))
        return list(of_order.values())

    def place_order(self, lines: list[dict]) -> dict:
        """Take the stock of every line, or of none, and return the new, pending order, its money in cents.

        lines: {"product_id", "quantity"} each, every product once, quantity in pieces. Raises UnknownProducts, or
        InsufficientStock with every short line.
        """
        sold, unknown, shortages = [], {}, []
        with self.transaction() as con:
            for position, line in enumerate(lines):
                taken = con.execute("""
                    UPDATE product
                       SET stock = stock - :quantity
                     WHERE id = :product_id AND stock >= :quantity
                    RETURNING name, price
                """, line).fetchall()
                if taken:
                    [(name, price)] = taken
                    sold.append({"product_id": line["product_id"], "name": name, "price": price,
                                 "quantity": line["quantity"]})
                    continue
                left = con.execute("""
                    SELECT stock
                      FROM product
                     WHERE id = :product_id
                """, line).fetchone()
                if left:
                    shortages.append({"product_id": line["product_id"], "requested": line["quantity"],
                                      "available": left["stock"]})
                else:
                    unknown[position] = line["product_id"]
            if unknown:
                raise UnknownProducts(unknown)
            if shortages:
                raise InsufficientStock(shortages)
            order = {"total": sum(line["price"] * line["quantity"] for line in sold), "created_at": timestamp()}
            order_id = con.execute("""
                INSERT INTO orders (total, created_at)
                VALUES (:total, :created_at)
            """, order).lastrowid
            con.executemany("""
                INSERT INTO order_line (order_id, product_id, position, name, price, quantity)
                VALUES (?, ?, ?, ?, ?, ?)
            """, [(order_id, line["product_id"], position, line["name"], line["price"], line["quantity"])
                  for position, line in enumerate(sold)])
        return {"id": order_id, "status": "pending", **order, "lines": sold}

    def change_order(self, order_id: int, status: str, *, seen: list[str] | None = None) -> dict:
        """Complete or cancel a pending order and return it; the status it already has changes nothing.

        Cancelling puts the stock back, up to MAX_STOCK and where the product still exists. seen: change it only if
        fingerprint(id, status) is one of these. Raises NotFound, ContentChanged, InvalidTransition.
        """
        with self.transaction() as con:
            changed = con.execute("""
                UPDATE orders
                   SET status = :status
                 WHERE id = :id AND status = 'pending'
                   AND (:seen = 'null' OR fingerprint(id, status) IN (SELECT value FROM json_each(:seen)))
                RETURNING id
            """, {"id": order_id, "status": status, "seen": json.dumps(seen)}).fetchall()
            if changed and status == "cancelled":
                con.execute("""
                    UPDATE product
                       SET stock = min(stock + order_line.quantity, :max)
                      FROM order_line
                     WHERE order_line.order_id = :id AND product.id = order_line.product_id
                """, {"id": order_id, "max": MAX_STOCK})
            order = con.execute("""
                SELECT id, status, total, created_at
                  FROM orders
                 WHERE id = :id
            """, {"id": order_id}).fetchone()
            if not order:
                raise NotFound("order", order_id)
            if not changed and seen is not None and fingerprint(order_id, order["status"]) not in seen:
                raise ContentChanged
            if order["status"] != status:
                raise InvalidTransition(order_id, order["status"], status)
            return self._with_lines([order], con)[0]

    # ------------------------------------------------------------------------------------------- idempotency

    def once(self, key: str, request: str, work) -> tuple[object, bool]:
        """Do work() and keep its answer under `key` in the same transaction; a repeat gets that answer instead.

        request: a fingerprint of what is asked for. work: changes the shop and returns a value that JSON can carry.
        Returns the answer and whether it is a repeat's. Raises KeyReused where the key came with another request,
        and what work raises; then nothing is kept. Keys live KEY_LIFE seconds.
        """
        with self.transaction() as con:
            expired = timestamp(KEY_LIFE)
            kept = con.execute("""
                SELECT fingerprint, answer
                  FROM idempotency_key
                 WHERE key = :key AND created_at >= :expired
            """, {"key": key, "expired": expired}).fetchone()
            if kept and kept["fingerprint"] != request:
                raise KeyReused
            if kept:
                return json.loads(kept["answer"]), True
            answer = work()
            con.execute("""
                INSERT OR REPLACE INTO idempotency_key (key, fingerprint, answer, created_at)
                VALUES (:key, :request, :answer, :now)
            """, {"key": key, "request": request, "answer": json.dumps(answer), "now": timestamp()})
            # Each new key takes the oldest few along: they go as fast as they come, and never many at once.
            con.execute("""
                DELETE FROM idempotency_key
                 WHERE id IN (SELECT id FROM idempotency_key ORDER BY id LIMIT 4)
                   AND created_at < :expired
            """, {"expired": expired})
        return answer, False


# ------------------------------------------------------------------------------------------- copies and checks

def back_up(path, target, *, overwrite: bool = False, progress=None) -> dict:
    """Copy the database to a file while it is in use: the state of one moment, checked, whole or not there at all.

    progress: called with the pages that remain and the pages in all. Returns the copy's products, orders and bytes.
    Raises Unusable for a source that is no shop's database, a target that exists (unless overwrite) or is the source
    itself, and a copy that cannot be made.
    """
    path, target = Path(path).absolute(), Path(target).absolute()
    if target.exists() and (not overwrite or not target.is_file() or target.samefile(path)):
        raise Unusable(f"{target} exists already.")
    # SQLite would take a WAL that lies beside the copy for the copy's own.
    for end in "-wal", "-shm", "-journal":
        if target.name.endswith(end) or target.with_name(target.name + end).exists():
            raise Unusable(f"{target} is, or has beside it, what belongs to a database in use.")
    partial = target.with_name(f"{target.name}.partial-{os.getpid()}")
    source = Store(path, read_only=True)
    try:
        with (contextlib.closing(sqlite3.connect(partial, isolation_level=None)) as copy,
              contextlib.closing(source._open("mode=ro")) as reader):
            reader.execute("BEGIN")  # holds one state, or each order that comes meanwhile would start the copy again
            reader.execute("SELECT count(*) FROM product").fetchall()
            reader.backup(copy, pages=1000, progress=lambda _, *pages: progress and progress(*pages))
            copy.execute("PRAGMA journal_mode = DELETE")  # one file, without a WAL beside it
            [(verdict,)] = copy.execute("PRAGMA integrity_check(1)")
            if verdict != "ok":
                raise Unusable(f"The copy would not be sound: {verdict}")
            products, orders = copy.execute("""
                SELECT (SELECT count(*) FROM product), (SELECT count(*) FROM orders)
            """).fetchone()
        partial.chmod(path.stat().st_mode & 0o777)
        with open(partial, "rb") as file:
            os.fsync(file.fileno())
        size = partial.stat().st_size
        partial.replace(target)
        directory = os.open(target.parent, os.O_RDONLY)
        os.fsync(directory)
        os.close(directory)
    except (OSError, sqlite3.Error) as error:
        raise Unusable(f"{target} cannot be made: {error}.") from error
    finally:
        partial.unlink(missing_ok=True)
    return {"products": products, "orders": orders, "bytes": size}


def find_faults(path) -> list[str]:
    """Sentences that tell what is wrong in a database: its pages, its limits, its references, the sums of its orders.

    Raises Unusable for a file that is no shop's database.
    """
    try:
        # Not mode=ro: there SQLite leaves the CHECK constraints out.
        with contextlib.closing(Store(path, read_only=True)._open("mode=rw")) as con:
            con.execute("PRAGMA query_only = ON")
            sound = con.execute("PRAGMA integrity_check").fetchall()
            missing = con.execute("PRAGMA foreign_key_check").fetchall()
            wrong = con.execute("""
                SELECT orders.id AS id, total, count(order_line.order_id) AS lines,
                       coalesce(sum(price * quantity), 0) AS sum
                  FROM orders LEFT JOIN order_line ON order_line.order_id = orders.id
                 GROUP BY orders.id
                HAVING total <> sum OR lines = 0
            """).fetchall()
    except sqlite3.DatabaseError as error:
        return [f"{error}."]
    return [row["integrity_check"] for row in sound if row["integrity_check"] != "ok"] + [
        f"A row of {row['table']} refers to one of {row['parent']} that is missing." for row in missing] + [
        f"Order {row['id']} has a total of {row['total']} cents, but {row['lines']} lines that make {row['sum']}."
        for row in wrong]
