-- The tables of the shop. They reject what must never be true; db.py checks first, for the sake of
-- better messages. Money is whole cents, stock is in pieces, and times are UTC, written as
-- 2026-11-22T10:15:30Z. Because of AUTOINCREMENT no id is ever reused, not even after a deletion.
--
-- Whoever changes a table or an index raises SCHEMA_VERSION and adds an item to MIGRATIONS, both in
-- db.py. New columns go to the end of their table, where ALTER TABLE puts them too.

PRAGMA application_id = 1397247824;  -- "SHOP" in ASCII: identifies the file as a shop's
PRAGMA user_version = 7;             -- SCHEMA_VERSION


-- What is for sale. The stock is in the product's row, so that one UPDATE checks and deducts it.
CREATE TABLE IF NOT EXISTS product (
    id          INTEGER PRIMARY KEY AUTOINCREMENT,
    name        TEXT NOT NULL CHECK (length(name) BETWEEN 1 AND 200 AND instr(name, char(0)) = 0),
    description TEXT NOT NULL DEFAULT ''
                CHECK (length(description) <= 10000 AND instr(description, char(0)) = 0),
    price       INTEGER NOT NULL CHECK (price BETWEEN 0 AND 100000000000),           -- cents
    stock       INTEGER NOT NULL DEFAULT 0 CHECK (stock BETWEEN 0 AND 1000000000),   -- pieces
    movements   INTEGER NOT NULL DEFAULT 0 CHECK (movements >= 0),     -- of the stock, see below
    sku         TEXT NOT NULL DEFAULT ''                               -- the shop's article number
                CHECK (length(sku) <= 64 AND instr(sku, char(0)) = 0),
    metadata    TEXT NOT NULL DEFAULT '{}'                             -- the caller's own, see db.py
                CHECK (json_valid(metadata) AND json_type(metadata) = 'object'),
    CHECK (trim(name, char(9, 10, 11, 12, 13, 32, 133, 160, 5760, 8192, 8193, 8194, 8195, 8196,
                           8197, 8198, 8199, 8200, 8201, 8202, 8232, 8233, 8239, 8287, 12288))
           <> '')
) STRICT;

-- For pages by price, up and down. Equal prices go by id in both: every index entry ends with the
-- id of its row, in ascending order.
CREATE INDEX IF NOT EXISTS product_by_price ON product (price);
CREATE INDEX IF NOT EXISTS product_by_price_down ON product (price DESC);

-- Partial, because any number of products may be without a sku.
CREATE UNIQUE INDEX IF NOT EXISTS product_by_sku ON product (sku) WHERE sku <> '';


-- The texts by which products are searched and sorted: name and description without case, accents
-- and other differences of spelling. Python computes them because SQLite cannot. They have their
-- own table, so that a search reads nothing else. The name is a column of its own because products
-- with equal names go by id, whatever their descriptions are.
CREATE TABLE IF NOT EXISTS product_search (
    id                 INTEGER PRIMARY KEY REFERENCES product (id) ON DELETE CASCADE,
    folded_name        TEXT NOT NULL,
    folded_description TEXT NOT NULL
) STRICT;

-- One index is enough for both directions: few products have equal names, and SQLite sorts only
-- those by id when it reads the index backwards.
CREATE INDEX IF NOT EXISTS product_by_name ON product_search (folded_name);


-- Orders are never deleted. (ORDER is a keyword of SQL, hence the plural.) The status is not
-- checked with IN, because SQLite would build a temporary table for the list with every INSERT, an
-- eighth of the work for an order.
CREATE TABLE IF NOT EXISTS orders (
    id         INTEGER PRIMARY KEY AUTOINCREMENT,
    status     TEXT NOT NULL DEFAULT 'pending'
               CHECK (status = 'pending' OR status = 'completed' OR status = 'cancelled'),
    total      INTEGER NOT NULL CHECK (total BETWEEN 0 AND 1000000000000000),  -- cents, all lines
    created_at TEXT NOT NULL CHECK (created_at GLOB '????-??-??T??:??:??Z'),
    reference  TEXT NOT NULL DEFAULT ''                                        -- the caller's own
               CHECK (length(reference) <= 200 AND instr(reference, char(0)) = 0),
    metadata   TEXT NOT NULL DEFAULT '{}'                                      -- likewise
               CHECK (json_valid(metadata) AND json_type(metadata) = 'object')
) STRICT;

-- Partial, so that it costs orders without a reference nothing. A list of just those orders reads
-- all orders by id.
CREATE INDEX IF NOT EXISTS orders_by_reference ON orders (reference) WHERE reference <> '';

-- For pages of the orders with a given status.
CREATE INDEX IF NOT EXISTS orders_by_status ON orders (status);

-- Finds the pending orders that have expired.
CREATE INDEX IF NOT EXISTS orders_pending_by_time ON orders (created_at) WHERE status = 'pending';


-- One product of one order. Name, price and sku are copies, which later edits do not change. The
-- product may be deleted, so product_id is not a foreign key. The primary key stores the lines of an
-- order together and allows each product once.
CREATE TABLE IF NOT EXISTS order_line (
    order_id    INTEGER NOT NULL REFERENCES orders (id),
    product_id  INTEGER NOT NULL CHECK (product_id > 0),
    position    INTEGER NOT NULL CHECK (position BETWEEN 0 AND 99),        -- in the request
    name        TEXT NOT NULL CHECK (length(name) BETWEEN 1 AND 200),
    price       INTEGER NOT NULL CHECK (price BETWEEN 0 AND 100000000000), -- cents for one
    quantity    INTEGER NOT NULL CHECK (quantity BETWEEN 1 AND 100000),    -- pieces
    stock       INTEGER CHECK (stock >= 0),             -- left after it; NULL: before the ledger
    movement_id INTEGER CHECK (movement_id > 0),        -- of the product; NULL likewise
    sku         TEXT NOT NULL DEFAULT '' CHECK (length(sku) <= 64),
    PRIMARY KEY (order_id, product_id)
) STRICT, WITHOUT ROWID;


-- The changes of stock that are not sales, each written in the transaction of the change; a
-- cancelled order is one for each of its products. With the lines of orders they make the ledger.
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

-- A sale has no row in movement: its order line has the number of the movement and the stock after
-- it. The index entry takes 8 % of the CPU of an order; a row in movement would take twice that.
CREATE INDEX IF NOT EXISTS order_line_by_movement ON order_line (product_id, movement_id)
 WHERE movement_id IS NOT NULL;

-- The whole ledger. The CASTs give both halves columns of the same types: only then does SQLite
-- merge them in the order of their indexes. Otherwise each page would sort all movements of its
-- product.
CREATE VIEW IF NOT EXISTS every_movement AS
SELECT product_id, id, change, stock, order_id, note, created_at
  FROM movement
 UNION ALL
SELECT product_id, movement_id, CAST(-quantity AS INTEGER), stock, order_id, CAST('' AS TEXT),
       created_at
  FROM order_line JOIN orders ON orders.id = order_id
 WHERE movement_id IS NOT NULL;


-- The response to a POST with an Idempotency-Key, written in the transaction of its work, so that
-- neither exists without the other.
CREATE TABLE IF NOT EXISTS idempotency_key (
    id          INTEGER PRIMARY KEY,
    key         TEXT NOT NULL UNIQUE CHECK (length(key) BETWEEN 1 AND 255),
    fingerprint TEXT NOT NULL,                                                   -- of the request
    answer      TEXT NOT NULL CHECK (json_valid(answer)),
    created_at  TEXT NOT NULL CHECK (created_at GLOB '????-??-??T??:??:??Z')
) STRICT;

-- Finds the oldest keys, which are purged first, even if a wrong clock dated others in the future.
CREATE INDEX IF NOT EXISTS idempotency_key_by_time ON idempotency_key (created_at);
