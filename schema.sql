-- The tables of the shop. They refuse what must never be true; db.py explains it kindly beforehand.
-- Money is whole cents, stock is pieces, times are UTC as 2026-11-22T10:15:30Z. Ids come from
-- AUTOINCREMENT and are therefore never given twice, not even after a deletion.
--
-- A change to this file raises SCHEMA_VERSION in db.py and adds to MIGRATIONS there. New columns
-- go to the end of their table, where ALTER TABLE puts them too.

PRAGMA application_id = 1397247824;  -- "SHOP" in ASCII: the file is ours
PRAGMA user_version = 6;             -- SCHEMA_VERSION


-- What is for sale. The stock lives in the row of the price, so that one UPDATE checks and takes
-- it.
CREATE TABLE IF NOT EXISTS product (
    id          INTEGER PRIMARY KEY AUTOINCREMENT,
    name        TEXT NOT NULL CHECK (length(name) BETWEEN 1 AND 200 AND instr(name, char(0)) = 0),
    description TEXT NOT NULL DEFAULT ''
                CHECK (length(description) <= 10000 AND instr(description, char(0)) = 0),
    price       INTEGER NOT NULL CHECK (price BETWEEN 0 AND 100000000),              -- cents
    stock       INTEGER NOT NULL DEFAULT 0 CHECK (stock BETWEEN 0 AND 1000000000),   -- pieces
    movements   INTEGER NOT NULL DEFAULT 0 CHECK (movements >= 0),     -- of the stock, see below
    CHECK (trim(name, char(9, 10, 11, 12, 13, 32, 133, 160, 5760, 8192, 8193, 8194, 8195, 8196,
                           8197, 8198, 8199, 8200, 8201, 8202, 8232, 8233, 8239, 8287, 12288))
           <> '')
) STRICT;

-- Pages by price: a product's id stands in an index by itself, ascending in both directions.
CREATE INDEX IF NOT EXISTS product_by_price ON product (price);
CREATE INDEX IF NOT EXISTS product_by_price_down ON product (price DESC);


-- What products are searched and sorted by, as Python folds it, for SQLite cannot: the name without
-- case, and name and description without case and accents. A table of its own, so that a search
-- reads nothing else.
CREATE TABLE IF NOT EXISTS product_search (
    product_id INTEGER PRIMARY KEY REFERENCES product (id) ON DELETE CASCADE,
    sort_name  TEXT NOT NULL,
    words      TEXT NOT NULL
) STRICT;

CREATE INDEX IF NOT EXISTS product_by_name ON product_search (sort_name);
CREATE INDEX IF NOT EXISTS product_by_name_down ON product_search (sort_name DESC);


-- What was bought, and what became of it ("order" alone is a word of SQL). Never deleted. The check
-- of the status is not an IN, for which SQLite makes a table of the list each time: one eighth of
-- what it does for an order.
CREATE TABLE IF NOT EXISTS orders (
    id         INTEGER PRIMARY KEY AUTOINCREMENT,
    status     TEXT NOT NULL DEFAULT 'pending'
               CHECK (status = 'pending' OR status = 'completed' OR status = 'cancelled'),
    total      INTEGER NOT NULL CHECK (total BETWEEN 0 AND 1000000000000000),  -- cents, all lines
    created_at TEXT NOT NULL CHECK (created_at GLOB '????-??-??T??:??:??Z'),
    reference  TEXT NOT NULL DEFAULT ''                                        -- the caller's own
               CHECK (length(reference) <= 200 AND instr(reference, char(0)) = 0)
) STRICT;

-- Orders without a reference are not in it, and pay nothing for it.
CREATE INDEX IF NOT EXISTS orders_by_reference ON orders (reference) WHERE reference <> '';

-- Pages of the orders of one status. An index holds the id by itself.
CREATE INDEX IF NOT EXISTS orders_by_status ON orders (status);

-- Orders that wait for payment, for those that have waited too long.
CREATE INDEX IF NOT EXISTS orders_pending_by_time ON orders (created_at) WHERE status = 'pending';


-- One product of one order. Name and price are copies: later edits do not touch them, and the
-- product may be deleted, so product_id refers to nothing. The key keeps an order's lines together
-- and each product once.
CREATE TABLE IF NOT EXISTS order_line (
    order_id    INTEGER NOT NULL REFERENCES orders (id),
    product_id  INTEGER NOT NULL CHECK (product_id > 0),
    position    INTEGER NOT NULL CHECK (position BETWEEN 0 AND 99),        -- in the request
    name        TEXT NOT NULL CHECK (length(name) BETWEEN 1 AND 200),
    price       INTEGER NOT NULL CHECK (price BETWEEN 0 AND 100000000),    -- cents for one
    quantity    INTEGER NOT NULL CHECK (quantity BETWEEN 1 AND 100000),    -- pieces
    stock       INTEGER CHECK (stock >= 0),             -- left after it; NULL: before the ledger
    movement_id INTEGER CHECK (movement_id > 0),        -- of the product; NULL likewise
    PRIMARY KEY (order_id, product_id)
) STRICT, WITHOUT ROWID;


-- The ledger, together with the lines of orders: every change of a stock that no order made, and
-- the stock that cancelled orders gave back, each written in the same transaction.
CREATE TABLE IF NOT EXISTS movement (
    product_id INTEGER NOT NULL REFERENCES product (id) ON DELETE CASCADE,
    id         INTEGER NOT NULL CHECK (id > 0),               -- counted from 1 for each product
    change     INTEGER NOT NULL CHECK (change <> 0),                                 -- pieces
    stock      INTEGER NOT NULL CHECK (stock BETWEEN 0 AND 1000000000),              -- after it
    order_id   INTEGER REFERENCES orders (id),                               -- that was cancelled
    note       TEXT NOT NULL DEFAULT '' CHECK (length(note) <= 200 AND instr(note, char(0)) = 0),
    created_at TEXT NOT NULL CHECK (created_at GLOB '????-??-??T??:??:??Z'),
    PRIMARY KEY (product_id, id)
) STRICT, WITHOUT ROWID;

-- A sale is in the ledger by its line alone, with the number of the movement and the stock that
-- was left: one entry of an index a line, some 8 % of an order's CPU. Rows of their own took twice
-- that.
CREATE INDEX IF NOT EXISTS order_line_by_movement ON order_line (product_id, movement_id)
 WHERE movement_id IS NOT NULL;

-- Both halves have columns of the same types: only then does SQLite read them as one, each in the
-- order of its index, instead of all the movements of a product for each page.
CREATE VIEW IF NOT EXISTS every_movement AS
SELECT product_id, id, change, stock, order_id, note, created_at
  FROM movement
 UNION ALL
SELECT product_id, movement_id, CAST(-quantity AS INTEGER), stock, order_id, CAST('' AS TEXT),
       created_at
  FROM order_line JOIN orders ON orders.id = order_id
 WHERE movement_id IS NOT NULL;


-- The response to a POST with an Idempotency-Key, written in the same transaction as the work
-- itself, so that there is never one without the other.
CREATE TABLE IF NOT EXISTS idempotency_key (
    id          INTEGER PRIMARY KEY,
    key         TEXT NOT NULL UNIQUE CHECK (length(key) BETWEEN 1 AND 255),
    fingerprint TEXT NOT NULL,                                                   -- of the request
    answer      TEXT NOT NULL CHECK (json_valid(answer)),
    created_at  TEXT NOT NULL CHECK (created_at GLOB '????-??-??T??:??:??Z')
) STRICT;

-- The oldest keys are purged first, whatever a clock that was wrong has stamped on others.
CREATE INDEX IF NOT EXISTS idempotency_key_by_time ON idempotency_key (created_at);
