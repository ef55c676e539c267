"""A whole shop backend over HTTP: products, their stock, and orders that take from it, exactly.

This file is HTTP: the rules of a valid request, the routes, the server. All SQL is in db.py.

    python shop.py                 serve on http://127.0.0.1:8000
    python shop.py --help          what else it does

    app = shop.create_app("sqlite:///db.sqlite3")   a WSGI application, for any server or a larger program
"""

import collections
import contextlib
import decimal
import functools
import hashlib
import hmac
import http.client
import itertools
import json
import os
import re
import resource
import select
import signal
import socket
import string
import sys
import time
import traceback
from decimal import Decimal
from typing import Callable, NamedTuple
from urllib.parse import parse_qsl, quote, urlencode

import bottle
import waitress.adjustments
import waitress.channel
import waitress.parser
import waitress.server
import waitress.task
import waitress.utilities
import waitress.wasyncore
from waitress.parser import ParsingError, TransferEncodingNotImplemented

import db

MAX_BODY = 1 << 20  # bytes
MAX_FAULTS = 1000  # that one answer tells
RETRY_AFTER = "1"  # seconds


# ---------------------------------------------------------------------------------------- what a valid request is
# JSON Schema, as data. The checks, their messages and /openapi.json all read it.

def an_object(required: str = "", **properties) -> dict:
    return {"type": "object", "properties": properties, "required": required.split(), "additionalProperties": False}


# Unicode's White_Space, spelled out because \s means something else in every dialect.
BLANK = r"\t-\r \u0085\u00a0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
ID = {"type": "integer", "minimum": 1, "maximum": 10 ** 18 - 1}
NAME = {"type": "string", "minLength": 1, "maxLength": 200, "pattern": rf"^[^\u0000]*[^\u0000{BLANK}][^\u0000]*$",
        "description": "text, not only white space, without NUL"}
DESCRIPTION = {"type": "string", "maxLength": 10_000, "pattern": r"^[^\u0000]*$", "description": "text without NUL"}
PRICE = {"type": "number", "minimum": 0, "maximum": 1_000_000, "multipleOf": 0.01}
STOCK = {"type": "integer", "minimum": 0, "maximum": db.MAX_STOCK}
QUANTITY = {"type": "integer", "minimum": 1, "maximum": 100_000}
STATUS = {"type": "string", "enum": ["pending", "completed", "cancelled"]}

PRODUCT = an_object("id name description price stock", id=ID, name=NAME, description=DESCRIPTION, price=PRICE,
                    stock=STOCK)
NEW_PRODUCT = an_object("name price", name=NAME, description=DESCRIPTION | {"default": ""}, price=PRICE,
                        stock=STOCK | {"default": 0})
PRODUCT_CHANGE = an_object(name=NAME, description=DESCRIPTION, price=PRICE, stock=STOCK) | {"minProperties": 1}
STOCK_CHANGE = an_object("change", change={"type": "integer", "minimum": -db.MAX_STOCK, "maximum": db.MAX_STOCK})
LINE = an_object("product_id quantity", product_id=ID, quantity=QUANTITY)
NEW_ORDER = an_object("products", products={
    "type": "array", "minItems": 1, "maxItems": 100, "items": LINE, "x-unique": "product_id",
    "description": "each product once, which JSON Schema has no word for"})
ORDER_CHANGE = an_object("status", status=STATUS | {"enum": ["completed", "cancelled"]})
SOLD_LINE = an_object("product_id name price quantity", product_id=ID, name=NAME, price=PRICE, quantity=QUANTITY)
ORDER = an_object("id status total_price created_at products", id=ID, status=STATUS,
                  total_price={"type": "number", "minimum": 0, "maximum": 10 ** 13, "multipleOf": 0.01},
                  created_at={"type": "string", "format": "date-time", "pattern": "Z$"},
                  products={"type": "array", "minItems": 1, "maxItems": 100, "items": SOLD_LINE})
NEXT = {"type": ["string", "null"], "description": "where the next page is"}
PRODUCTS = an_object("products next", products={"type": "array", "items": PRODUCT}, next=NEXT)
ORDERS = an_object("orders next", orders={"type": "array", "items": ORDER}, next=NEXT)

PROBLEM = an_object(
    "type title status detail", type={"type": "string"}, title={"type": "string"}, status={"type": "integer"},
    detail={"type": "string"},
    errors={"type": "array", "items": an_object("detail", detail={"type": "string"}, pointer={"type": "string"},
                                                parameter={"type": "string"})},
    shortages={"type": "array", "items": an_object(
        "product_id requested available", product_id=ID, requested={"type": "integer"}, available={"type": "integer"})})

# Bare, or quoted as a string of RFC 8941.
KEY = {"type": "string", "pattern": r'^([!#-~][!-~]{0,254}|"([!#-\[\]-~]|\\["\\]){1,255}")$'}
AFTER = ID | {"minimum": 0, "description": "only what has a greater id"}
LIMIT = {"type": "integer", "minimum": 1, "maximum": 1000, "description": "how many to a page"}
NO_QUERY = an_object()
PRODUCT_QUERY = an_object(
    q={"type": "string", "pattern": r"^[^\u0000]*$", "description": "text without NUL in name or description"},
    available={"type": "boolean", "description": "only what has stock, or only what has none"}, limit=LIMIT,
    after=AFTER)
ORDER_QUERY = an_object(status=STATUS, limit=LIMIT | {"default": 100}, after=AFTER)


class Wrong(Exception):
    """A value breaks its rule; the text says what would be right."""


def validate(value, rule: dict, place: tuple, faults: list):
    """The value as the shop works with it. Whatever the rule forbids goes to faults, as (place, sentence)."""
    try:
        return VALIDATORS[rule["type"]](value, rule, place, faults)
    except Wrong as wrong:
        faults.append((place, str(wrong)))


def validate_object(value, rule, place, faults):
    if type(value) is not dict:
        raise Wrong("must be an object")
    known = rule["properties"]
    unknown = f"is unknown; there is {', '.join(known) or 'nothing to give'}"
    faults += [((*place, name), unknown) for name in value if name not in known]
    faults += [((*place, name), "is required") for name in rule["required"] if name not in value]
    if len(value) < rule.get("minProperties", 0):
        raise Wrong(f"must give at least one of {', '.join(known)}")
    return {name: validate(item, known[name], (*place, name), faults) for name, item in value.items() if name in known}


def validate_array(value, rule, place, faults):
    if type(value) is not list:
        raise Wrong("must be an array")
    if not rule["minItems"] <= len(value) <= rule["maxItems"]:
        raise Wrong(f"must have {rule['minItems']} to {rule['maxItems']} items, not {len(value)}")
    items = [validate(item, rule["items"], (*place, index), faults) for index, item in enumerate(value)]
    if name := rule.get("x-unique"):
        first = {}
        for index, item in enumerate(items):
            if item and item.get(name) and first.setdefault(item[name], index) != index:
                faults.append(((*place, index), f"gives {name} {item[name]} again"))
    return items


def validate_string(value, rule, place, faults):
    if type(value) is not str:
        raise Wrong("must be a string")
    if not rule.get("minLength", 0) <= len(value) <= rule.get("maxLength", MAX_BODY):
        raise Wrong(f"must be {rule.get('minLength', 0)} to {rule['maxLength']} characters long, not {len(value)}")
    if "enum" in rule and value not in rule["enum"]:
        raise Wrong(f"must be {' or '.join(rule['enum'])}")
    if "pattern" in rule and not re.search(rule["pattern"], value):
        raise Wrong(f"must be {rule['description']}")
    if not value.isascii() and re.search("[\ud800-\udfff]", value):
        raise Wrong("must be Unicode, without unpaired surrogates")
    return value


def validate_number(value, rule, place, faults):
    """A number with multipleOf comes back as the count of its steps: a price in cents."""
    step = rule.get("multipleOf", 1)
    if type(value) not in (int, Decimal):  # not bool, which is an int to isinstance
        raise Wrong("must be an integer" if step == 1 else "must be a number")
    if not rule["minimum"] <= value <= rule["maximum"]:
        raise Wrong(f"must be {rule['minimum']} to {rule['maximum']}")
    if step == 1 and type(value) is int:
        return value
    step = Decimal(str(step))
    if value != Decimal(value).quantize(step):
        raise Wrong("must be an integer" if step == 1 else "must have at most two decimals")
    return int(value / step)


def validate_boolean(value, rule, place, faults):
    if type(value) is not bool:
        raise Wrong("must be true or false")
    return value


VALIDATORS = {"object": validate_object, "array": validate_array, "string": validate_string, "integer": validate_number,
          "number": validate_number, "boolean": validate_boolean}


# ------------------------------------------------------------------------------------------------- the failures

encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode


def to_json(value) -> bytes:
    # Only a problem can hold half a surrogate pair: the name of an unknown field that it quotes.
    return (encode(value) + "\n").encode("utf-8", "replace")


class Problem(bottle.HTTPResponse):
    """A failure as RFC 9457 wants it told: raise it anywhere in a request."""

    def __init__(self, status: int, detail: str, kind: str | None = None, headers: dict | None = None, **more):
        title = kind.replace("-", " ").capitalize() if kind else http.client.responses[status]
        problem = {"type": f"urn:problem-type:{kind}" if kind else "about:blank", "title": title, "status": status,
                   "detail": detail, **more}
        super().__init__(to_json(problem), status, {"Content-Type": "application/problem+json", **(headers or {})})


def invalid(faults: list, name: Callable[[tuple], dict]) -> Problem:
    """The 422 that tells every fault; name() says where one is, as {"pointer": ...} or {"parameter": ...}."""
    more = f", the first {MAX_FAULTS} of {len(faults)}" if len(faults) > MAX_FAULTS else ""
    return Problem(422, f"The request breaks the rules in the places told under errors{more}.", "validation",
                   errors=[{**name(place), "detail": f"{subject(place)} {sentence}."}
                           for place, sentence in faults[:MAX_FAULTS]])


def subject(place: tuple) -> str:
    return "The body" if not place else f"Item {place[-1]}" if isinstance(place[-1], int) else place[-1]


def pointer(place: tuple) -> dict:
    """A JSON pointer as the fragment of a URI."""
    steps = (str(step).replace("~", "~0").replace("/", "~1") for step in place)
    return {"pointer": "#" + "".join("/" + quote(step, errors="replace") for step in steps)}


def parameter(place: tuple) -> dict:
    return {"parameter": place[0]}


def too_large() -> Problem:
    return Problem(413, f"The body may have {MAX_BODY} bytes.")


def unavailable(detail) -> Problem:
    return Problem(503, str(detail), headers={"Retry-After": RETRY_AFTER})


CHANGED = "It is not what If-Match names: read it again, then decide again."
# What db.py raises, and how it is told.
FAILURES = {
    db.NotFound: lambda failure: Problem(404, str(failure)),
    db.ContentChanged: lambda failure: Problem(412, CHANGED),
    db.InsufficientStock: lambda failure: Problem(409, str(failure), "insufficient-stock", shortages=failure.shortages),
    db.InvalidTransition: lambda failure: Problem(409, str(failure), "invalid-transition"),
    db.KeyReused: lambda failure: Problem(
        422, "This Idempotency-Key came with another request before: use a new one.", "idempotency-key-reused"),
    db.ExcessiveStock: lambda failure: invalid([(("change",), str(failure))], pointer),
    db.UnknownProducts: lambda failure: invalid(
        [(("products", line), f"names product {number}, which does not exist")
         for line, number in failure.lines.items()], pointer),
    db.Busy: unavailable,
    db.Unavailable: unavailable,
}


# ---------------------------------------------------------------------------------------------- reading a request

def refuse_constant(name: str):
    raise ValueError(f"{name} is no number of JSON")


def unique_names(pairs: list) -> dict:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name stands twice in one object")
    return found


def exact(text: str) -> Decimal:
    try:
        return Decimal(text)
    except decimal.InvalidOperation:  # an exponent of twenty digits: more than any rule allows, but of zero
        return Decimal("Infinity" if text.lower().partition("e")[0].strip("-0.") else 0)


decode = json.JSONDecoder(parse_float=exact, parse_int=lambda text: int(text) if len(text) < 20 else Decimal(text),
                          parse_constant=refuse_constant, object_pairs_hook=unique_names).decode


class Ask:
    """What a request asks for, read and checked by the rules of its route. Raises the Problem it finds."""

    def __init__(self, environ: dict, route, secured: bool):
        self.secured = secured
        self.mount = quote(environ.get("SCRIPT_NAME", "").rstrip("/"), encoding="latin-1", errors="replace")
        self.query = read_query(environ.get("QUERY_STRING"), route.query)
        self.seen = read_tags(environ.get("HTTP_IF_MATCH")) if route.guarded else None
        self.key = read_key(environ.get("HTTP_IDEMPOTENCY_KEY")) if route.method == "POST" else None
        if route.body:
            self.raw = read_body(environ, route.media)
            self.body = read_json(self.raw, route.body)


def read_query(text: str | None, rule: dict) -> dict:
    if not text:
        return {}
    query, faults = {}, []
    for pair in parse_qsl(text, keep_blank_values=True, encoding="latin-1"):
        name, value = (part.encode("latin-1", "replace").decode("utf-8", "surrogateescape") for part in pair)
        if name in query:
            faults.append(((name,), "is given twice"))
        kind = rule["properties"].get(name, rule)["type"]
        if kind == "integer" and value.isascii() and value.isdigit():
            value = Decimal(value)
        elif kind == "boolean" and value in ("true", "false"):
            value = value == "true"
        query[name] = value
    query = validate(query, rule, (), faults)
    if faults:
        raise invalid(faults, parameter)
    return query


def read_tags(header: str | None) -> list[str] | None:
    """The strong tags of If-Match; None where any state of the resource will do."""
    if header is None or header.strip() == "*":
        return None
    return [tag for weak, tag in re.findall(r'(W/)?"([^"]*)"', header) if not weak]


def read_key(header: str | None) -> str | None:
    if header is None:
        return None
    if not re.fullmatch(KEY["pattern"], header):
        raise Problem(400, "Idempotency-Key must be 1 to 255 visible ASCII characters, bare or in double quotes.")
    return re.sub(r"\\(.)", r"\1", header[1:-1]) if header.startswith('"') else header


def read_body(environ: dict, media: tuple) -> bytes:
    kind, _, more = environ.get("CONTENT_TYPE", "").partition(";")
    charset = re.search(r'charset="?([^";\s]*)', more.lower())
    if kind.strip().lower() not in media or charset and charset[1] not in ("utf-8", "utf8"):
        raise Problem(415, "Send JSON in UTF-8 and say so, with curl: -H 'Content-Type: application/json'",
                      headers={"Accept": ", ".join(media)})
    length = environ.get("CONTENT_LENGTH") or "0"
    if not (length.isascii() and length.isdigit() and len(length) < 20):
        raise Problem(400, "Content-Length must be a number.")
    # A server that has undone a chunked body may not know its length, but says where it ends.
    terminated = environ.get("wsgi.input_terminated") and "CONTENT_LENGTH" not in environ
    raw = environ["wsgi.input"].read(MAX_BODY + 1 if terminated else min(int(length), MAX_BODY + 1))
    if len(raw) > MAX_BODY:
        raise too_large()
    return raw


def read_json(raw: bytes, rule: dict):
    try:
        value = decode(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise Problem(400, f"The body is not UTF-8: see byte {error.start}.") from None
    except RecursionError:
        raise Problem(400, "The body is nested too deep.") from None
    except ValueError as error:
        raise Problem(400, f"The body is not JSON: {error}.") from None
    faults = []
    body = validate(value, rule, (), faults)
    if faults:
        raise invalid(faults, pointer)
    return body


# --------------------------------------------------------------------------------------------------- the routes

def answer(value, status: int = 200, tag: str | None = None, **headers) -> bottle.HTTPResponse:
    """A success: the value as JSON, or the bytes of JSON."""
    body = value if isinstance(value, bytes) else to_json(value)
    headers = {"Content-Type": "application/json", **headers}
    if tag:
        headers |= {"ETag": f'"{tag}"', "Cache-Control": "no-cache"}
    return bottle.HTTPResponse(body, status, headers)


def show_product(product: dict) -> dict:
    return {**product, "price": product["price"] / 100}


def show_order(order: dict) -> dict:
    return {"id": order["id"], "status": order["status"], "total_price": order["total"] / 100,
            "created_at": order["created_at"],
            "products": [{**line, "price": line["price"] / 100} for line in order["lines"]]}


def answer_product(product: dict) -> bottle.HTTPResponse:
    return answer(show_product(product), tag=db.fingerprint(*product.values()))


def answer_order(order: dict) -> bottle.HTTPResponse:
    return answer(show_order(order), tag=db.fingerprint(order["id"], order["status"]))


def show_page(ask: Ask, path: str, name: str, items: str, following: int | None) -> bottle.HTTPResponse:
    """A page of a collection, from the JSON text of its items, and where the next one is."""
    sent = {field: encode(value) if isinstance(value, bool) else value for field, value in ask.query.items()}
    url = f"{ask.mount}{path}?{urlencode(sent | {'after': following})}" if following else None
    body = f'{{"{name}":{items},"next":{encode(url)}}}\n'.encode()
    tag = hashlib.blake2b(body, digest_size=12).hexdigest()
    return answer(body, tag=tag, **({"Link": f'<{url}>; rel="next"'} if url else {}))


def show_index(store: db.Store, ask: Ask):
    """What there is."""
    return answer({name: ask.mount + path for name, path in INDEX.items()})


def check_health(store: db.Store, ask: Ask):
    """Whether the database can be read."""
    store.check_health()
    return answer({"status": "ok", "read_only": True} if store.read_only else {"status": "ok"})


def show_openapi(store: db.Store, ask: Ask):
    """This interface, as OpenAPI 3.1."""
    return answer(describe(ask.mount, ask.secured))


def list_products(store: db.Store, ask: Ask):
    """The products by id, all of them or a page."""
    items, following = store.list_products(**ask.query)
    return show_page(ask, "/products/", "products", items, following)


def add_product(store: db.Store, ask: Ask):
    """Add a product."""
    product = store.add_product(**ask.body)
    return answer(show_product(product), 201, Location=f"{ask.mount}/products/{product['id']}/")


def read_product(store: db.Store, ask: Ask, id: int):
    """One product."""
    return answer_product(store.read_product(id))


def change_product(store: db.Store, ask: Ask, id: int):
    """Change what is given of a product."""
    return answer_product(store.change_product(id, seen=ask.seen, **ask.body))


def change_stock(store: db.Store, ask: Ask, id: int):
    """Add to a product's stock, or take from it."""
    return answer(show_product(store.change_stock(id, ask.body["change"], seen=ask.seen)))


def remove_product(store: db.Store, ask: Ask, id: int):
    """Delete a product; orders keep their lines."""
    store.remove_product(id, seen=ask.seen)
    return bottle.HTTPResponse(status=204)


def list_orders(store: db.Store, ask: Ask):
    """A page of the orders by id."""
    orders, following = store.list_orders(**ask.query)
    return show_page(ask, "/orders/", "orders", encode([show_order(order) for order in orders]), following)


def place_order(store: db.Store, ask: Ask):
    """Place an order: the stock of every line is taken, or nothing is."""
    order = store.place_order(ask.body["products"])
    return answer(show_order(order), 201, Location=f"{ask.mount}/orders/{order['id']}/")


def read_order(store: db.Store, ask: Ask, id: int):
    """One order."""
    return answer_order(store.read_order(id))


def change_order(store: db.Store, ask: Ask, id: int):
    """Complete a pending order, or cancel it and put its stock back."""
    return answer_order(store.change_order(id, ask.body["status"], seen=ask.seen))


JSON, MERGE_PATCH = ("application/json",), ("application/json", "application/merge-patch+json")


class Route(NamedTuple):
    method: str
    path: str  # {id} is a product's or an order's
    call: Callable
    status: int = 200
    answer: dict | None = None  # the rule of what comes back
    body: dict | None = None  # the rule of what is sent
    query: dict = NO_QUERY
    media: tuple = JSON
    open: bool = False  # to everyone, also when a token is set
    kept: bool = False  # the answer holds until the database changes
    guarded: bool = False  # heeds If-Match
    conflicts: bool = False  # with the stock, or with what became of the order


HEALTH = an_object("status", status={"type": "string", "enum": ["ok"]}, read_only={"type": "boolean"})
INDEX = {"products": "/products/", "orders": "/orders/", "health": "/healthz", "openapi": "/openapi.json"}
ROUTES = [
    Route("GET", "/", show_index, 200, an_object("", **dict.fromkeys(INDEX, {"type": "string"})), open=True),
    Route("GET", "/healthz", check_health, 200, HEALTH, open=True),
    Route("GET", "/openapi.json", show_openapi, 200, {"type": "object"}, open=True),
    Route("GET", "/products/", list_products, 200, PRODUCTS, query=PRODUCT_QUERY, open=True, kept=True),
    Route("POST", "/products/", add_product, 201, PRODUCT, NEW_PRODUCT),
    Route("GET", "/products/{id}/", read_product, 200, PRODUCT, open=True, kept=True),
    Route("PATCH", "/products/{id}/", change_product, 200, PRODUCT, PRODUCT_CHANGE, media=MERGE_PATCH, guarded=True),
    Route("DELETE", "/products/{id}/", remove_product, 204, guarded=True),
    Route("POST", "/products/{id}/stock/", change_stock, 200, PRODUCT, STOCK_CHANGE, guarded=True, conflicts=True),
    Route("GET", "/orders/", list_orders, 200, ORDERS, query=ORDER_QUERY, kept=True),
    Route("POST", "/orders/", place_order, 201, ORDER, NEW_ORDER, open=True, conflicts=True),
    Route("GET", "/orders/{id}/", read_order, 200, ORDER, kept=True),
    Route("PATCH", "/orders/{id}/", change_order, 200, ORDER, ORDER_CHANGE, guarded=True, conflicts=True),
]


# ------------------------------------------------------------------------------------------ the description of it

def a_string(**more) -> dict:
    return {"schema": {"type": "string", **more}}


SCHEMAS = {"Product": PRODUCT, "NewProduct": NEW_PRODUCT, "ProductChange": PRODUCT_CHANGE, "StockChange": STOCK_CHANGE,
           "Products": PRODUCTS, "Order": ORDER, "NewOrder": NEW_ORDER, "OrderChange": ORDER_CHANGE, "Orders": ORDERS,
           "Health": HEALTH, "Problem": PROBLEM}
REFUSALS = {
    400: ("The request or its body cannot be read.", {}),
    401: ("A token is set, and the request lacks it.", {"WWW-Authenticate": a_string()}),
    404: ("There is no such product or order.", {}),
    408: ("The request took too long to arrive.", {}),
    409: ("The stock does not suffice, or the status of the order does not allow it.", {}),
    412: ("If-Match does not hold.", {}),
    413: ("The body is over 1 MiB.", {}),
    415: ("The body is not declared as JSON.", {"Accept": a_string()}),
    417: ("Expect is not 100-continue.", {}),
    422: ("The request breaks a rule, or its Idempotency-Key came with another one.", {}),
    431: ("The headers are over 16 KiB.", {}),
    500: ("A fault of the shop.", {}),
    503: ("The database is busy, full or out of reach. Nothing was changed.", {"Retry-After": a_string()}),
}


def describe(mount: str, secured: bool) -> dict:
    """The interface as an OpenAPI 3.1 document, for a shop mounted there, with a token set or not."""
    paths = {}
    for route in ROUTES:
        paths.setdefault(route.path, {})[route.method.lower()] = describe_route(route, secured)
    return {
        "openapi": "3.1.0",
        "info": {"title": "Shop", "version": str(db.SCHEMA_VERSION), "description":
                 "Products, their stock, and orders that take from it, exactly. HEAD answers wherever GET does; "
                 "OPTIONS tells the methods of a path."},
        "servers": [{"url": mount or "/"}],
        "paths": paths,
        "components": {
            "schemas": SCHEMAS,
            "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}},
            "responses": {str(status): {"description": text, "headers": headers, "content": {
                "application/problem+json": {"schema": {"$ref": "#/components/schemas/Problem"}}}}
                for status, (text, headers) in REFUSALS.items()}},
    }


def describe_route(route: Route, secured: bool) -> dict:
    def content(rule, *media):
        name = next((name for name, known in SCHEMAS.items() if known is rule), None)
        return {kind: {"schema": {"$ref": f"#/components/schemas/{name}"} if name else rule} for kind in media}

    parameters = [{"name": name, "in": "query", "schema": rule} for name, rule in route.query["properties"].items()]
    headers, refusals = {}, {400, 408, 413, 417, 422, 431, 500}
    if "{id}" in route.path:
        parameters.append({"name": "id", "in": "path", "required": True, "schema": ID})
        refusals |= {404}
    if route.method == "POST":
        parameters.append({"name": "Idempotency-Key", "in": "header", "schema": KEY})
        headers |= {"Idempotent-Replayed": a_string(enum=["true"])}
    if route.status == 201:
        headers |= {"Location": a_string()}
    if route.guarded or route.kept:
        parameters.append({"name": "If-Match", "in": "header", **a_string()})
        refusals |= {412}
    if route.kept:
        parameters.append({"name": "If-None-Match", "in": "header", **a_string()})
    if route.kept or route.method == "PATCH":
        headers |= {"ETag": a_string(), "Cache-Control": a_string(enum=["no-cache"])}
    if "limit" in route.query["properties"]:
        headers |= {"Link": a_string()}
    for status, reachable in [(401, secured and not route.open), (409, route.conflicts), (415, route.body),
                              (503, route.call not in (show_index, show_openapi))]:
        refusals |= {status} if reachable else set()
    responses = {str(route.status): {"description": "Done.", "headers": headers}}
    if route.answer:
        responses[str(route.status)]["content"] = content(route.answer, "application/json")
    if route.kept:
        responses["304"] = {"description": "What If-None-Match names is still current.", "headers": headers}
    responses |= {str(status): {"$ref": f"#/components/responses/{status}"} for status in sorted(refusals)}
    described = {"operationId": route.call.__name__, "summary": route.call.__doc__, "parameters": parameters,
                 "security": [{"token": []}] if secured and not route.open else [], "responses": responses}
    if route.body:
        described["requestBody"] = {"required": True, "content": content(route.body, *route.media)}
    return described


# ---------------------------------------------------------------------------------------------- the application

SPELLING = {"Etag": "ETag", "Www-Authenticate": "WWW-Authenticate"}  # where Bottle's differs from everybody's


class Shop:
    """The WSGI application. Of Bottle it takes the router and the response, and not the thread-local rest."""

    def __init__(self, store: db.Store, admin_token: str | None = None):
        self.store, self.admin_token = store, admin_token
        self.router = bottle.Router()
        for route in ROUTES:
            rule = route.path.replace("{id}", "<id:re:[0-9]{1,18}>").removesuffix("/") + "/"
            self.router.add(rule, route.method, route)

    def __call__(self, environ: dict, start_response: Callable) -> list[bytes]:
        # A path works with its last slash and without. What is not ASCII stays escaped, and so is no path of ours.
        path = environ.get("PATH_INFO", "").removesuffix("/") + "/"
        environ["PATH_INFO"] = path if path.isascii() else quote(path, encoding="latin-1", errors="replace")
        try:
            made = self.respond(environ, *self.router.match(environ))
        except bottle.HTTPError as error:
            made = self.refuse(environ, error)
        except bottle.HTTPResponse as problem:
            made = problem
        except Exception:  # the one place that turns a fault into a 500
            traceback.print_exc(file=environ["wsgi.errors"])
            made = Problem(500, "The shop made a mistake. It has been logged.")
        body = b"" if made.status_code in (204, 304) else made.body
        headers = [(SPELLING.get(name, name), value) for name, value in made.headerlist]
        start_response(made.status_line, headers + ([("Content-Length", str(len(body)))] if body else []))
        return [body] if environ["REQUEST_METHOD"] != "HEAD" else []

    def respond(self, environ: dict, route: Route, ids: dict) -> bottle.HTTPResponse:
        """Every request comes through here, and every failure of db.py becomes an answer here."""
        try:
            if self.admin_token and not route.open:
                self.authorize(environ)
            if not route.kept:
                return self.work(route, environ, ids)
            key = environ.get("SCRIPT_NAME"), environ["PATH_INFO"], environ.get("QUERY_STRING")
            found = self.store.kept(key, lambda: self.render(route, environ, ids))
            seen, tags = read_tags(environ.get("HTTP_IF_MATCH")), environ.get("HTTP_IF_NONE_MATCH")
            if seen is not None and found["ETag"].strip('"') not in seen:
                return Problem(412, CHANGED)
            if tags and (tags.strip() == "*" or found["ETag"] in re.findall(r'"[^"]*"', tags)):
                return bottle.HTTPResponse(status=304, headers=found.headerlist)
            return found
        except tuple(FAILURES) as failure:
            return FAILURES[type(failure)](failure)

    def render(self, route: Route, environ: dict, ids: dict) -> tuple[bottle.HTTPResponse, int]:
        made = self.work(route, environ, ids)
        return made, len(made.body) + len(environ.get("QUERY_STRING", "")) + 1000

    def work(self, route: Route, environ: dict, ids: dict) -> bottle.HTTPResponse:
        ask = Ask(environ, route, secured=bool(self.admin_token))
        call = functools.partial(route.call, self.store, ask, **{name: int(text) for name, text in ids.items()})
        if not ask.key:
            return call()

        def call_once():
            made = call()
            return made.status_code, made.get_header("Location"), made.body.decode()

        request = db.fingerprint(route.method, environ["PATH_INFO"], ask.raw)
        (status, location, body), repeated = self.store.once(ask.key, request, call_once)
        headers = {"Location": location} if location else {}
        return answer(body.encode(), status, **headers, **({"Idempotent-Replayed": "true"} if repeated else {}))

    def authorize(self, environ: dict) -> None:
        scheme, _, token = environ.get("HTTP_AUTHORIZATION", "").partition(" ")
        if scheme.lower() != "bearer" or not hmac.compare_digest(token.strip().encode(), self.admin_token.encode()):
            raise Problem(401, "This needs the shop's token: Authorization: Bearer <token>",
                          headers={"WWW-Authenticate": "Bearer"})

    def refuse(self, environ: dict, error: bottle.HTTPError) -> bottle.HTTPResponse:
        """What Bottle's router refuses: 404 and 405."""
        if error.status_code == 404:
            return Problem(404, "There is no such path; the index at / lists those that there are.")
        allowed = {"OPTIONS", *error.headers["Allow"].split(",")}
        allow = {"Allow": ", ".join(sorted(allowed | ({"HEAD"} if "GET" in allowed else set())))}
        if environ["REQUEST_METHOD"] == "OPTIONS":
            return bottle.HTTPResponse(status=204, headers=allow)
        return Problem(405, f"Use one of {allow['Allow']} here.", headers=allow)


# -------------------------------------------------------------------------------------------------- the settings

class Settings(NamedTuple):
    database: str = "db.sqlite3"  # a path
    admin_token: str | None = None
    host: str = "127.0.0.1"
    port: int = 8000
    debug: bool = False
    access_log: bool = True
    read_only: bool = False
    litestream: bool = False


class Unsuitable(Exception):
    """A setting cannot be used."""


def read_settings(environ: dict) -> Settings:
    """The settings that an environment gives. Raises Unsuitable for what cannot be used."""
    unset = Settings()

    def flag(name):
        text = (environ.get(name) or str(getattr(unset, name.lower()))).lower()
        if text not in ("true", "1", "yes", "on", "false", "0", "no", "off"):
            raise Unsuitable(f"{name} must be true or false, not {text!r}.")
        return text in ("true", "1", "yes", "on")

    url, port = environ.get("DATABASE_URL") or f"sqlite:///{unset.database}", environ.get("PORT") or str(unset.port)
    token = environ.get("ADMIN_TOKEN") or None
    if not url.startswith("sqlite:///") or url[10:] in ("", "/", ":memory:") or "\0" in url:
        raise Unsuitable(f"DATABASE_URL must be sqlite:///FILE, or sqlite:////FILE for an absolute path, not {url!r}.")
    if not (port.isascii() and port.isdigit() and len(port) < 6 and int(port) < 65536):
        raise Unsuitable(f"PORT must be a number up to 65535, not {port!r}.")
    if token and not re.fullmatch(r"[!-~]+", token):
        raise Unsuitable("ADMIN_TOKEN must be visible ASCII characters without blanks.")
    return Settings(url[10:], token, environ.get("HOST") or unset.host, int(port), flag("DEBUG"), flag("ACCESS_LOG"),
                    flag("READ_ONLY"), flag("LITESTREAM"))


def environment() -> dict:
    """What is set, and beneath it what a file .env in the working directory sets, as NAME=value."""
    try:
        with open(".env", encoding="utf-8") as file:
            lines = [line.strip() for line in file if not line.lstrip().startswith("#")]
    except FileNotFoundError:
        lines = []
    except (OSError, UnicodeDecodeError) as error:
        raise Unsuitable(f"The file .env cannot be read: {error}.") from error
    pairs = (line.partition(" #")[0].partition("=") for line in lines)
    return {name.strip(): value.strip().strip("'\"") for name, _, value in pairs} | os.environ


def open_shop(settings: Settings, wait: float = 5.0) -> Shop:
    store = db.Store(settings.database, wait=wait, read_only=settings.read_only,
                     autocheckpoint=not settings.litestream, trace=log_statement if settings.debug else None)
    return Shop(store, settings.admin_token)


def create_app(database_url: str | None = None, admin_token: str | None = None, debug: bool = False) -> Shop:
    """Make the WSGI application, for any WSGI server with threads, or mounted in a larger program.

    database_url: as sqlite:///db.sqlite3; None takes all settings from the environment. admin_token: what
    Authorization: Bearer must carry; None leaves the shop open to everyone. debug: log every SQL statement.
    Raises Unsuitable for a setting, db.Unusable for a database that cannot be used.
    """
    base = environment() if database_url is None else {"DATABASE_URL": database_url}
    given = {"ADMIN_TOKEN": admin_token, "DEBUG": "true" if debug else None}
    return open_shop(read_settings(base | {name: value for name, value in given.items() if value}))


def log_statement(sql: str) -> None:
    print(" ".join(sql.split()), file=sys.stderr)


# ---------------------------------------------------------------------------------------------------- the server
# waitress without its worker threads: with them its main loop and they take the interpreter from each other. One
# loop polls, serves every request that has come in, commits once for all that write, and only then sends their
# answers. It leans on the inside of waitress, so the version is pinned and a test watches what it leans on.

MAX_HEADER = 16 << 10  # bytes
SAFE_METHODS = ("GET", "HEAD", "OPTIONS")
PATIENCE = 30  # seconds for an idle connection, or for a request to arrive
LOCK_WAIT = 5  # seconds that a write waits for another process
# What will never become a head, however long one waits: a first byte of no method, or a line feed without its CR.
NO_REQUEST = re.compile(rb"^[\r\n]*[^\r\n!#$%&'*+.^_`|~0-9A-Za-z-]|(?<!\r)\n")
BLANKS = re.compile(rb"[ \t]{64}")
TRANSFER_CODING = re.compile(rb"\ntransfer-encoding[ \t]*:[ \t]*([^\r\n]*)", re.I)


class Parser(waitress.parser.HTTPRequestParser):
    """Refuses, besides what waitress refuses, whatever would stall it, get past it or could be read in two ways."""

    def __init__(self, adj):
        super().__init__(adj)
        self.began = time.monotonic()

    def received(self, data: bytes) -> int:
        consumed = super().received(data)
        if self.error:
            pass
        elif not self.headers_finished:
            if NO_REQUEST.search(self.header_plus):
                self.refuse(Problem(400, "This is no request of HTTP, whose lines end in CR LF."))
        elif self.chunked:
            framing = self.body_rcv.control_line
            if len(self.body_rcv) > MAX_BODY:
                self.refuse(too_large())
            elif b"\n" in framing or len(framing) > 1024 or len(self.body_rcv.trailer) > MAX_HEADER:
                self.refuse(Problem(400, "The chunks of the body cannot be read."))
        if self.completed:  # waitress would ask for a body that is not to come, and wait for it
            self.expect_continue = False
        return consumed

    def refuse(self, problem: Problem) -> None:
        self.error, self.completed = waitress.utilities.BadRequest(problem), True

    def parse_header(self, header_plus: bytes) -> None:
        if BLANKS.search(header_plus):  # the time of waitress's pattern grows with their square
            raise ParsingError("A header has too many blanks in a row.")
        line, *rest = header_plus.split(b"\r\n", 1)
        if not line.isascii():  # curl sends ?q=é as it is typed
            header_plus = b"\r\n".join([quote(line, safe=string.printable).encode(), *rest])
        try:
            super().parse_header(header_plus)
        except TransferEncodingNotImplemented:
            raise ParsingError("The only transfer coding is chunked.") from None
        except ValueError:
            raise ParsingError("The target or the Content-Length cannot be read.") from None
        codings = TRANSFER_CODING.findall(header_plus)
        if codings and (self.version != "1.1" or "CONTENT_LENGTH" in self.headers
                        or [coding.strip().lower() for coding in codings] != [b"chunked"]):
            raise ParsingError("Where the body ends could be read in two ways.")
        if self.version not in ("1.0", "1.1"):
            raise ParsingError("The request line must end in HTTP/1.1 or HTTP/1.0.")
        if "," in self.headers.get("HOST", ""):
            raise ParsingError("There must be one Host.")
        if self.content_length > MAX_BODY:
            raise ParsingError(too_large())
        if self.version == "1.1" and self.headers.get("EXPECT", "100-continue").lower() != "100-continue":
            raise ParsingError(Problem(417, "The only expectation that can be met is 100-continue."))


class Head:
    """What Task and ErrorTask share."""

    def __init__(self, channel, request):
        super().__init__(channel, request)
        channel.task, self.asked = self, channel.asked

    def build_response_header(self) -> bytes:
        # waitress's own closes the connection after a 204 or 304, for want of a length.
        wish = self.request.headers.get("CONNECTION", "").lower().replace(" ", "").split(",")
        self.close_on_finish |= "close" in wish or self.version == "1.0" and "keep-alive" not in wish
        lines = [f"HTTP/{self.version} {self.status}", *map(": ".join, self.response_headers),
                 f"Date: {self.channel.server.loop.date}"]
        if self.close_on_finish or self.version == "1.0":
            lines.append(f"Connection: {'close' if self.close_on_finish else 'keep-alive'}")
        return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")


class Task(Head, waitress.task.WSGITask):
    """One request that the shop answers."""


class ErrorTask(Head, waitress.task.ErrorTask):
    """What waitress refuses, told as the rest of the shop tells it."""

    def execute(self) -> None:
        error = self.request.error
        problem = error.body if isinstance(error.body, Problem) else Problem(error.code, str(error.body))
        self.status, self.content_length, self.close_on_finish = problem.status_line, len(problem.body), True
        self.response_headers = [*problem.headerlist, ("Content-Length", str(len(problem.body)))]
        self.write(problem.body)


class Channel(waitress.channel.HTTPChannel):
    """A connection. What is to be sent waits in `out`, as it is, and leaves head and body together."""

    task_class, error_task_class, parser_class = Task, ErrorTask, Parser
    task = None
    lingering = 0.0  # until when a connection that is closed to one side is still listened to
    asked = 0.0  # when the request was complete

    def __init__(self, *args, **kwargs):
        self.out = collections.deque()
        super().__init__(*args, **kwargs)

    def write_soon(self, data: bytes) -> int:
        if not self.connected:
            raise waitress.channel.ClientDisconnected
        if data:
            self.out.append(data)
            self.total_outbufs_len += len(data)
        return len(data)

    def _flush_some(self, do_close: bool = True) -> None:
        while self.out:
            try:
                sent = self.socket.sendmsg(itertools.islice(self.out, 64))
            except BlockingIOError:
                return
            self.last_activity = time.time()
            self.total_outbufs_len -= sent
            while self.out and sent >= len(self.out[0]):
                sent -= len(self.out.popleft())
            if sent:
                self.out[0] = memoryview(self.out[0])[sent:]

    def send_continue(self) -> None:
        self.request.expect_continue = False
        self.sent_continue = True
        self.write_soon(b"HTTP/1.1 100 Continue\r\n\r\n")  # after the commit of what waits before it

    def readable(self):
        return self.lingering > 0 or super().readable()

    def handle_read(self) -> None:
        try:
            part = self.socket.recv(self.adj.recv_bytes)
        except OSError:
            return self.handle_close()
        if self.lingering:
            return None if part else self.handle_close()
        if part:
            self.last_activity = time.time()
            self.received(part)
        elif self.request:
            self.refuse(Problem(400, "The request ended before it was complete."))
        else:
            self.handle_close()

    def handle_write(self) -> None:
        self._flush_exception(self._flush_some)
        if self.will_close:
            self.handle_close()
        elif not self.out and self.close_when_flushed:
            self.linger()
        elif not self.out and self.requests:
            self.server.add_task(self)

    def handle_expt(self) -> None:
        self.handle_close()  # urgent data are no part of HTTP, and poll tells of them without end

    def linger(self) -> None:
        """Say that nothing more comes, and hear the client out: closing would reset it before it reads its answer."""
        self.close_when_flushed, self.lingering = False, time.monotonic() + 5
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_WR)

    def refuse(self, problem: Problem) -> None:
        """Answer a request that has not come in full, and close."""
        self.request.refuse(problem)
        self.requests, self.request = [self.request], None
        self.server.add_task(self)

    def retract(self, problem: Problem) -> None:
        """Answer with the problem instead of what waits to be sent, and close."""
        request, self.requests = self.task.request, []
        self.out.clear()
        self.total_outbufs_len, self.close_when_flushed = 0, True
        request.error = waitress.utilities.BadRequest(problem)
        ErrorTask(self, request).service()


class Server(waitress.server.TcpWSGIServer):
    """A listening socket."""

    channel_class = Channel

    def __init__(self, loop, *args, **kwargs):
        self.loop = loop
        super().__init__(*args, **kwargs)

    def handle_accept(self) -> None:
        before = -1  # waitress accepts one connection a turn: take all that wait
        while before < len(self.active_channels) and len(self._map) < self.adj.connection_limit:
            before = len(self.active_channels)
            super().handle_accept()

    def add_task(self, channel: Channel) -> None:
        if not channel.out:  # else it comes again when all is sent: answers leave in the order of the requests
            channel.asked = time.perf_counter()
            self.loop.ready.append(channel)

    def pull_trigger(self) -> None:
        """Nobody is to be woken: the thread that would call it is the loop's."""

    def maintenance(self, now: float) -> None:
        for channel in list(self.active_channels.values()):
            if channel.lingering:
                channel.will_close = channel.lingering < time.monotonic()
            elif channel.requests and not channel.out:
                continue  # they wait for the lock
            elif channel.request and not channel.requests and channel.request.began < time.monotonic() - PATIENCE:
                channel.refuse(Problem(408, f"The request took more than {PATIENCE} seconds to arrive."))
            elif channel.last_activity < now - PATIENCE:
                channel.will_close = True


class Loop:
    """Serves a shop in the calling thread until a signal ends it."""

    def __init__(self, shop: Shop, settings: Settings):
        self.store, self.log = shop.store, Log() if settings.access_log and sys.stdout else None
        self.map, self.ready, self.waiting, self.stopping = {}, [], False, None
        adj = waitress.adjustments.Adjustments(
            host=settings.host, port=settings.port, ident=None, clear_untrusted_proxy_headers=False,
            recv_bytes=1 << 16, outbuf_high_watermark=1 << 62,  # above it waitress waits for a second thread
            max_request_header_size=MAX_HEADER + 1, max_request_body_size=8 << 20, inbuf_overflow=16 << 20,
            connection_limit=allow_connections(), cleanup_interval=1, log_socket_errors=False)
        self.servers = [Server(self, shop, self.map, dispatcher=self, adj=adj, sockinfo=sockinfo)
                        for sockinfo in adj.listen]
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.stop)

    def run(self) -> None:
        while not self.stopping or self.wind_up():
            pause = 0.01 if self.waiting or self.stopping else 0 if self.ready else 1
            waitress.wasyncore.poll2(pause, self.map)
            found = 0
            while len(self.ready) > found:  # what comes while the first are read shares their commit
                found = len(self.ready)
                waitress.wasyncore.poll2(0, self.map)
            self.take_turn()
        waitress.wasyncore.close_all(self.map)

    def take_turn(self) -> None:
        """Serve every request that has come in; all that write share one transaction and its commit."""
        self.date = waitress.utilities.build_http_date(time.time())
        channels, self.ready, self.waiting = [channel for channel in self.ready if channel.connected], [], False
        writers = [channel for channel in channels
                   if not channel.requests[0].error and channel.requests[0].command not in SAFE_METHODS]
        together = False
        if writers:
            try:
                self.store.begin()
                together = True
            except db.Busy:  # reads go on, and the writes try again
                patient = [channel for channel in writers if time.perf_counter() - channel.asked < self.lock_wait()]
                channels = [channel for channel in channels if channel not in patient]
                self.ready, self.waiting = patient, bool(patient)
            except db.Unavailable:
                pass  # each write finds out by itself, and says so
        for channel in channels:
            if self.stopping:
                channel.requests[0].headers["CONNECTION"] = "close"
            channel.service()
        if together:
            try:
                self.store.commit()
            except db.Unavailable as failure:
                for channel in writers:
                    if channel.connected:
                        channel.retract(unavailable(failure))
        for channel in channels:
            if channel.connected:
                channel.handle_write()
        if self.log and channels:
            stamp = db.timestamp()
            self.log.write("".join(access_line(stamp, channel) for channel in channels))

    def lock_wait(self) -> float:
        return 0 if self.stopping and time.monotonic() > self.stopping + 2 else LOCK_WAIT

    def stop(self, number: int, frame) -> None:
        if self.stopping:
            os._exit(128 + number)
        self.stopping = time.monotonic()
        self.servers[0].trigger.pull_trigger()

    def wind_up(self) -> bool:
        """Take no more requests; whether there is still something to answer, and time for it."""
        late = time.monotonic() - self.stopping
        for server in self.servers:
            if server.accepting:
                server.handle_accept()  # what connected before the signal may have asked already
                server.accepting = False
                self.map.pop(server._fileno)
                server.socket.close()
                return True
        channels = [channel for channel in self.map.values() if isinstance(channel, Channel)]
        for channel in channels:
            if channel.request and not channel.requests and late > 1:
                channel.refuse(unavailable("The shop closes: send it again."))
            idle = not (channel.out or channel.requests or channel.request)
            if late > (1 if idle else 4.5):
                channel.handle_close()
            elif idle and not channel.lingering:
                channel.linger()
        return any(channel.connected for channel in channels)


class Log:
    """Standard output, for as long as somebody reads it: a pipe that is full must not stop the shop."""

    def __init__(self):
        self.descriptor, self.poll = sys.stdout.fileno(), select.poll()
        self.poll.register(self.descriptor, select.POLLOUT)

    def write(self, text: str) -> None:
        lines = text.encode()
        while lines:
            # So much is written without waiting, or not at all; whole lines, where they fit.
            end = lines.rfind(b"\n", 0, select.PIPE_BUF) + 1 or select.PIPE_BUF
            if self.poll.poll(0):
                with contextlib.suppress(OSError):
                    os.write(self.descriptor, lines[:end])
            lines = lines[end:]


def access_line(stamp: str, channel: Channel) -> str:
    task, request = channel.task, channel.task.request
    path = "-" if request.error else request.request_uri.partition("?")[0]
    if not (path.isascii() and path.isprintable()):
        path = quote(path, safe=string.punctuation, encoding="latin-1")
    method, milliseconds = "-" if request.error else request.command, (time.perf_counter() - task.asked) * 1000
    return (f"{stamp} {channel.addr[0]} {method} {path} {task.status[:3]} {task.content_bytes_written} "
            f"{milliseconds:.1f}\n")


def allow_connections() -> int:
    """Raise the limit of open files as far as it goes; how many connections that leaves room for."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    files = 1 << 16 if hard == resource.RLIM_INFINITY else min(hard, 1 << 16)
    resource.setrlimit(resource.RLIMIT_NOFILE, (files, hard))
    return max(files - 64, 16)


# ---------------------------------------------------------------------------------------------- the command line

HELP = """usage: python shop.py [serve]                        serve the shop until SIGTERM or SIGINT
       python shop.py backup FILE [--overwrite]     copy the database to FILE, while it is in use
       python shop.py check [FILE]                  see whether a database is sound; without FILE, the shop's own

Settings come from the environment, and from a file .env in the working directory:
    DATABASE_URL   sqlite:///db.sqlite3; four slashes for an absolute path
    HOST, PORT     where to listen: 127.0.0.1, 8000
    ADMIN_TOKEN    what changes the shop or reads orders must carry it as Authorization: Bearer; unset: open to everyone
    ACCESS_LOG     true: a line a request on standard output
    DEBUG          false; true logs every SQL statement on standard error
    READ_ONLY      false; true serves a copy that another process renews, and refuses every write
    LITESTREAM     false; true leaves the checkpoints to a Litestream that replicates the database
"""


def main(arguments: list[str]) -> int:
    """Do what the command line says; returns the exit status."""
    match arguments:
        case [] | ["serve"]:
            return serve()
        case ["backup", file] | ["backup", file, "--overwrite"] | ["backup", "--overwrite", file] if file[:1] != "-":
            return back_up(file, overwrite="--overwrite" in arguments)
        case ["check"]:
            return find_faults()
        case ["check", file] if file[:1] != "-":
            return find_faults(file)
    asked = {"-h", "--help"} & set(arguments)
    print(HELP, end="", file=sys.stdout if asked else sys.stderr)
    return 0 if asked else 2


def fail(reason, status: int) -> int:
    print(f"shop: {' '.join(str(reason).split())}", file=sys.stderr)
    return status


def serve() -> int:
    try:
        settings = read_settings(environment())
        shop = open_shop(settings, wait=0)  # the loop waits for the lock itself, and serves reads meanwhile
    except (Unsuitable, db.Unusable) as failure:
        return fail(failure, 2)
    try:
        loop = Loop(shop, settings)
    except (OSError, ValueError) as failure:  # of the listening socket
        reason = getattr(failure, "strerror", None) or "there is no such host"
        return fail(f"cannot listen on HOST {settings.host}, PORT {settings.port}: {reason}.", 2)
    host, port = loop.servers[0].effective_host, loop.servers[0].effective_port
    print(f"Serving http://{f'[{host}]' if ':' in host else host}:{port}/ from {shop.store.path}", flush=True)
    if not settings.admin_token:
        print("ADMIN_TOKEN is not set: everyone may read orders and change products.", flush=True)
    loop.run()
    shop.store.close()
    return 0


def back_up(file: str, overwrite: bool) -> int:
    began = time.monotonic()

    def show_progress(remaining: int, pages: int) -> None:
        if sys.stderr.isatty() and time.monotonic() - began > 1:
            print(f"\r{100 - 100 * remaining // max(pages, 1)} %", end="\r" if remaining else "\n", file=sys.stderr)

    try:
        database = read_settings(environment()).database
        made = db.back_up(database, file, overwrite=overwrite, progress=show_progress)
    except (Unsuitable, db.Unusable) as failure:
        return fail(failure, 1)
    print(f"{file}: {made['products']} products, {made['orders']} orders, {made['bytes']} bytes")
    return 0


def find_faults(file: str | None = None) -> int:
    try:
        file = file or read_settings(environment()).database
        faults = db.find_faults(file)
    except (Unsuitable, db.Unusable) as failure:
        return fail(failure, 1)
    print("\n".join(faults) or f"{file}: sound")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
