# mypy: disable-error-code="import-untyped"
"""The shop over HTTP: products, their stock, and orders that take from it, all or nothing.

This file is HTTP: schemas, routes, the application, the server, the command line. Every SQL
statement is in db.py, the tables are in schema.sql.

    python shop.py                 serve on http://127.0.0.1:8000
    python shop.py --help          list the other commands

    app = shop.create_app("sqlite:///db.sqlite3")   a WSGI application for any server

The way of a request from the socket to SQL:

    1 Channel.handle_read          its bytes are received and parsed
    2 Loop.take_turn               all requests that have arrived share a turn, and a commit
    3 Application.__call__         Bottle finds the route
    4 Plugin.apply                 the request is authorized, read and validated
    5 create_order, for instance   the route calls the Store and makes the response
    6 Store.create_order           the SQL runs
"""

import argparse
import base64
import collections
import configparser
import contextlib
import csv
import dataclasses
import datetime
import decimal
import functools
import hashlib
import hmac
import http.client
import inspect
import io
import ipaddress
import itertools
import json
import os
import re
import resource
import select
import shlex
import signal
import socket
import string
import sys
import time
import traceback
import types
import unicodedata
from collections.abc import Callable, Iterator
from decimal import Decimal
from typing import Any, NamedTuple, NoReturn, TextIO
from urllib.parse import parse_qsl, quote, urlencode, urlsplit

if sys.version_info < (3, 11):  # noqa: UP036
    raise SystemExit("shop: Python 3.11 or later is needed, this is " + sys.version.split()[0])

import bottle
import waitress.adjustments
import waitress.channel
import waitress.parser
import waitress.server
import waitress.task
import waitress.wasyncore
from waitress.parser import ParsingError, TransferEncodingNotImplemented
from waitress.utilities import BadRequest, build_http_date

import db

VERSION = "1.0.0"
MAX_BODY = 128 << 10  # bytes: more than a valid body has, unless nearly all its texts are longest
MAX_ERRORS = 300  # in one response: as many as an order of 100 lines can have
MAX_PARAMETERS = 20  # in a query
TOO_LARGE = f"The body may have at most {MAX_BODY} bytes."


# ---------------------------------------------------------------------------------------- schemas
# What a valid request or response is, as JSON Schema: validation, its messages and /openapi.json
# are made from it. Three keywords are the shop's own: `decimals` is how many digits a number may
# have after the point (validation turns 9.99 into 999), `unique_by` names the field in which the
# items of an array must differ, `message` is the error for a value that does not match `pattern`.
# `default` only documents what an absent field or parameter means.


def object_schema(required: str | None = None, /, **properties: dict) -> dict:
    """An object with these properties; `required` names the mandatory ones, None means all."""
    names = list(properties) if required is None else required.split()
    return {"type": "object", "properties": properties, "required": names}


def body_schema(defaults: dict, /, **properties: dict) -> dict:
    """The body of a request: a field without a default is required, an unknown one an error."""
    required = [name for name in properties if name not in defaults]
    for name, default in defaults.items():
        properties[name] = properties[name] | {"default": default}
    return object_schema(" ".join(required), **properties) | {"additionalProperties": False}


def update_schema(**properties: dict) -> dict:
    """The body of a request that changes at least one of these properties."""
    closed = {"additionalProperties": False, "minProperties": 1}
    return object_schema("", **properties) | closed


def page_schema(name: str, item: dict) -> dict:
    items: dict = {"type": "array", "items": item}
    return object_schema(**{name: items, "next": NEXT})


# Unicode's White_Space, spelled out because \s means something else in every dialect.
WHITE_SPACE = r"\t-\r \u0085\u00a0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"

STRING = {"type": "string"}
ID = {"type": "integer", "minimum": 1, "maximum": db.MAX_ID}
TEXT = {"type": "string", "pattern": r"^[^\u0000]*$", "message": "must be text without NUL"}
NAME = {
    "type": "string",
    "minLength": 1,
    "maxLength": 200,
    "pattern": rf"^[^\u0000]*[^\u0000{WHITE_SPACE}][^\u0000]*$",
    "message": "must be text, not only white space, without NUL",
}
PRICE = {"type": "number", "minimum": 0, "maximum": 10**9, "decimals": 2}
STOCK = {"type": "integer", "minimum": 0, "maximum": db.MAX_STOCK}
CHANGE = {"type": "integer", "minimum": -db.MAX_STOCK, "maximum": db.MAX_STOCK}
QUANTITY = {"type": "integer", "minimum": 1, "maximum": 100_000}
REFERENCE = TEXT | {
    "maxLength": 200,
    "description": "The caller's own text: a cart, a customer, a payment. It need not be unique.",
}
EDGE = rf"[^\u0000-\u001f\u007f-\u009f{WHITE_SPACE}]"  # the first and last character of a sku
SKU = {
    "type": "string",
    "maxLength": 64,
    "pattern": rf"^({EDGE}([^\u0000]*{EDGE})?)?(?!\n)$",  # Python's $ allows a line feed after it
    "message": "must have no NUL, and no white space or control characters at its ends",
    "description": "The shop's own article number, unique where it is not empty.",
}
METADATA: dict = {
    "type": "object",
    "additionalProperties": TEXT | {"maxLength": 500},
    "propertyNames": {
        "pattern": r"^[A-Za-z0-9_-]{1,40}(?!\n)$",
        "message": "must be a name of 1 to 40 letters, digits, _ or -",
    },
    "maxProperties": db.MAX_METADATA,
    "description": "Further data of the caller's own, as short texts by name.",
}
METADATA_PATCH = {
    "type": "object",
    "additionalProperties": METADATA["additionalProperties"] | {"type": ["string", "null"]},
    "propertyNames": METADATA["propertyNames"],
    "description": "Merged into the existing metadata; null removes an entry.",
}
STATUS = STRING | {"enum": ["pending", "completed", "cancelled"]}
NEW_STATUS = STRING | {"enum": ["completed", "cancelled"]}
TIME = STRING | {"format": "date-time", "pattern": "Z$"}
NEXT = {"type": ["string", "null"], "description": "The URL of the next page, or null."}

PRODUCT_FIELDS: dict[str, dict] = {
    "name": NAME,
    "description": TEXT | {"maxLength": 10_000},
    "price": PRICE,
    "stock": STOCK,
    "sku": SKU,
    "metadata": METADATA,
}
PRODUCT_DEFAULTS = {"description": "", "stock": 0, "sku": "", "metadata": {}}
PRODUCT = object_schema(id=ID, **PRODUCT_FIELDS)
NEW_PRODUCT = body_schema(PRODUCT_DEFAULTS, **PRODUCT_FIELDS)
PRODUCT_UPDATE = update_schema(**PRODUCT_FIELDS | {"metadata": METADATA_PATCH})
NOTE = TEXT | {"maxLength": 200, "description": "Why the stock changes."}
STOCK_UPDATE = body_schema({"note": ""}, change=CHANGE, note=NOTE)
MOVEMENT = object_schema(
    id=ID,
    change=CHANGE,
    stock=STOCK | {"description": "The stock after this change."},
    order_id={
        "type": ["integer", "null"],
        "description": "The order that caused the change; null if none did.",
    },
    note=NOTE,
    created_at=TIME,
)
MOVEMENTS = page_schema("movements", MOVEMENT)
PRODUCTS = page_schema("products", PRODUCT)

NEW_LINE = body_schema({}, product_id=ID, quantity=QUANTITY)
LINE = object_schema(product_id=ID, name=NAME, price=PRICE, quantity=QUANTITY, sku=SKU)
LINES = {"type": "array", "minItems": 1, "maxItems": 100}
ORDER = object_schema(
    id=ID,
    status=STATUS,
    total_price=PRICE | {"maximum": 10**13},
    created_at=TIME,
    reference=REFERENCE,
    metadata=METADATA,
    products=LINES | {"items": LINE},
)
NEW_ORDER = body_schema(
    {"reference": "", "metadata": {}},
    products=LINES | {"items": NEW_LINE, "unique_by": "product_id"},
    reference=REFERENCE,
    metadata=METADATA,
)
ORDER_UPDATE = update_schema(status=NEW_STATUS, reference=REFERENCE, metadata=METADATA_PATCH)
ORDERS = page_schema("orders", ORDER)

HEALTH = object_schema("status", status=STRING | {"enum": ["ok"]}, read_only={"type": "boolean"})
ERROR = object_schema("detail", detail=STRING, pointer=STRING, parameter=STRING)
SHORTAGE = object_schema(product_id=ID, requested=STOCK, available=STOCK)


def problem_schema(kind: str, /, **members: dict) -> dict:
    """Problem details of one type; it is constant, so that each problem matches one schema only."""
    status = {"type": "integer"}
    return object_schema(
        type=STRING | {"const": kind}, title=STRING, status=status, detail=STRING, **members
    )


PROBLEM = problem_schema("about:blank")
INSUFFICIENT_STOCK = problem_schema(
    "urn:problem-type:insufficient-stock", shortages={"type": "array", "items": SHORTAGE}
)
INVALID_TRANSITION = problem_schema("urn:problem-type:invalid-transition")
DUPLICATE_SKU = problem_schema("urn:problem-type:duplicate-sku", product_id=ID)
VALIDATION_FAILED = problem_schema(
    "urn:problem-type:validation", errors={"type": "array", "items": ERROR}
)
IDEMPOTENCY_KEY_REUSED = problem_schema("urn:problem-type:idempotency-key-reused")

KEY = {  # bare, or quoted as a string of RFC 8941
    "type": "string",
    "pattern": r'^([!#-~][!-~]{0,254}|"([!#-\[\]-~]|\\["\\]){1,255}")$',
    "description": "Repeating the request with the same key has no further effect.",
}
AFTER = ID | {
    "minimum": 0,
    "description": "Continue after the item with this id; 0 starts at the beginning.",
}
LIMIT = {"type": "integer", "minimum": 1, "maximum": 1000, "description": "Items per page."}
SORT = STRING | {"default": "id", "description": "The order of the items; a leading - reverses it."}
PAGING: dict[str, dict] = {
    "sort": SORT | {"enum": list(db.ID_ORDERS)},
    "limit": LIMIT | {"default": 100},
    "after": AFTER,
}

NO_QUERY = object_schema()
ANY_QUERY = object_schema()  # ignored, because monitors may add one to their requests
PRODUCT_QUERY = object_schema(
    "",
    q=TEXT | {"description": "Words in name or description, ignoring case and accents."},
    available={
        "type": "boolean",
        "description": "Only products in stock (true) or out of stock (false).",
    },
    sku=SKU | {"description": "Only the product with this sku; if empty, those without one."},
    sort=SORT | {"enum": list(db.PRODUCT_ORDERS)},
    limit=LIMIT,
    after=AFTER,
)
MOVEMENT_QUERY = object_schema("", **PAGING)
ORDER_QUERY = object_schema(
    "",
    status=STATUS | {"description": "Only orders with this status."},
    reference=REFERENCE | {"description": "Only orders with exactly this reference."},
    **PAGING,
)


# ----------------------------------------------------------------------------------------- routes
# The parameters of a route name what it needs: store, query, body, if_match, secured (which kinds
# of access need a token), the ids in its path. The Plugin reads them as the route's Spec says.

JSON = "application/json"


class Spec(NamedTuple):
    """All that the Plugin, the server and the documentation know about a route."""

    response: dict | None  # schema of the response's body
    status: int = 200  # of a success
    body: dict | None = None  # schema of the request's body
    query: dict = NO_QUERY
    media_types: tuple = (JSON,)  # accepted for the body
    access: str = "admin"  # whose token it needs, if one is set: admin, order or nobody
    etag: bool = False  # a success has an ETag
    if_match: bool = False  # If-Match guards the change
    conflicts: tuple = ()  # schemas of its 409s
    slow: bool = False  # may take long: the server runs it in another thread
    html: bool = False  # browsers get a page in place of JSON
    database: bool = True  # uses the database, and is a 503 while that is unavailable


# What the Specs of all PATCH routes have in common.
PATCH: dict[str, Any] = {
    "media_types": (JSON, "application/merge-patch+json"),
    "etag": True,
    "if_match": True,
}


def new_bottle() -> bottle.Bottle:
    """A Bottle whose rules may contain <name:id>: digits that fit into an integer of SQLite."""
    app = bottle.Bottle()
    app.router.add_filter("id", lambda config: (r"[0-9]{1,18}", int, str))
    return app


api = new_bottle()  # holds declarations only: each Application copies them into its own Bottle

INDEX = {
    "products": "/products/",
    "orders": "/orders/",
    "health": "/healthz",
    "openapi": "/openapi.json",
}
INDEX_SCHEMA = object_schema(**dict.fromkeys(INDEX, STRING))


@api.get("/", spec=Spec(INDEX_SCHEMA, access="nobody", html=True, database=False))
def get_index(secured):
    """List the paths; a browser gets a page that documents them."""
    bottle.response["Vary"] = "Accept"
    if not prefers_html(bottle.request.environ.get("HTTP_ACCEPT", "")):
        return json_response({name: mount_point() + path for name, path in INDEX.items()})
    bottle.response["Content-Type"] = "text/html; charset=utf-8"
    bottle.response["Content-Security-Policy"] = CONTENT_SECURITY_POLICY
    return render_page(mount_point(), secured).encode()


@api.get("/healthz", spec=Spec(HEALTH, query=ANY_QUERY, access="nobody"))
def get_health(store):
    """Report whether the database can be read."""
    store.check_health()
    health = {"status": "ok"} | ({"read_only": True} if store.read_only else {})
    return json_response(health, **{"Cache-Control": "no-store"})


@api.get("/openapi.json", spec=Spec({"type": "object"}, access="nobody", database=False))
def get_openapi(secured):
    """Describe this interface as OpenAPI 3.1."""
    return json_response(openapi_document(mount_point(), secured))


@api.get(
    "/products/", spec=Spec(PRODUCTS, query=PRODUCT_QUERY, access="nobody", etag=True, slow=True)
)
def list_products(store, query):
    """List the products, all of them or a page.

    If limit is given, the URL of the next page is in next and in the Link header.
    """
    products, next_after = store.list_products_json(**query)
    return page_response("/products/", "products", f"[{products}]", query, next_after)


@api.post("/products/", spec=Spec(PRODUCT, 201, body=NEW_PRODUCT, conflicts=(DUPLICATE_SKU,)))
def create_product(store, body):
    """Add a product."""
    product = store.create_product(**body)
    location = f"{mount_point()}/products/{product['id']}/"
    return json_response(product_to_json(product), 201, Location=location)


@api.get("/products/<product_id:id>/", spec=Spec(PRODUCT, access="nobody", etag=True))
def get_product(store, product_id):
    """Get a product."""
    return product_response(store.get_product(product_id))


@api.patch(
    "/products/<product_id:id>/",
    spec=Spec(PRODUCT, body=PRODUCT_UPDATE, conflicts=(DUPLICATE_SKU,), **PATCH),
)
def update_product(store, product_id, body, if_match):
    """Change the given fields of a product; metadata is merged."""
    return product_response(store.update_product(product_id, if_match=if_match, **body))


@api.delete("/products/<product_id:id>/", spec=Spec(None, 204, if_match=True))
def delete_product(store, product_id, if_match):
    """Delete a product; orders keep their lines."""
    store.delete_product(product_id, if_match=if_match)
    bottle.response.status = 204
    return b""


@api.get("/products/<product_id:id>/stock/", spec=Spec(MOVEMENTS, query=MOVEMENT_QUERY, etag=True))
def list_movements(store, product_id, query):
    """List every change of a product's stock.

    The changes add up to the stock.
    """
    movements, next_after = store.list_movements(product_id, **query)
    path = f"/products/{product_id}/stock/"
    return page_response(path, "movements", json_encode(movements), query, next_after)


@api.post(
    "/products/<product_id:id>/stock/",
    spec=Spec(
        PRODUCT, body=STOCK_UPDATE, etag=True, if_match=True, conflicts=(INSUFFICIENT_STOCK,)
    ),
)
def update_stock(store, product_id, body, if_match):
    """Add to a product's stock, or take from it."""
    return product_response(store.update_stock(product_id, if_match=if_match, **body))


@api.get("/orders/", spec=Spec(ORDERS, query=ORDER_QUERY, etag=True, slow=True))
def list_orders(store, query):
    """List a page of the orders.

    To follow new orders, poll with after=<last id seen>; sort=-id begins with the newest.
    """
    orders, next_after = store.list_orders(**query)
    items = json_encode([order_to_json(order) for order in orders])
    return page_response("/orders/", "orders", items, query, next_after)


@api.post(
    "/orders/",
    spec=Spec(ORDER, 201, body=NEW_ORDER, access="order", conflicts=(INSUFFICIENT_STOCK,)),
)
def create_order(store, body):
    """Place an order: the stock of every line is deducted, or nothing is.

    Name, price and sku are copied: later changes of the product do not affect the order.
    """
    order = store.create_order(**body)
    location = f"{mount_point()}/orders/{order['id']}/"
    return json_response(order_to_json(order), 201, Location=location)


@api.get("/orders/<order_id:id>/", spec=Spec(ORDER, etag=True))
def get_order(store, order_id):
    """Get an order."""
    return order_response(store.get_order(order_id))


@api.patch(
    "/orders/<order_id:id>/",
    spec=Spec(ORDER, body=ORDER_UPDATE, conflicts=(INVALID_TRANSITION,), **PATCH),
)
def update_order(store, order_id, body, if_match):
    """Complete an order, or cancel it and put its stock back; change its reference or metadata.

    A completed order can be cancelled too, when its goods come back. A cancelled order stays
    cancelled.
    """
    return order_response(store.update_order(order_id, if_match=if_match, **body))


# Responses: each function sets the status and headers of bottle.response and returns the body.

json_encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode


def to_json(value) -> bytes:
    # Only a problem can contain an unpaired surrogate, in the name of an unknown field.
    return (json_encode(value) + "\n").encode("utf-8", "replace")


def json_response(value, status: int = 200, etag: str | None = None, /, **headers: str) -> bytes:
    """A success. Its body is the value as JSON; a value of bytes is JSON already."""
    response = bottle.response
    response.status = status
    response["Content-Type"] = JSON
    for name, text in headers.items():
        response[name] = text
    if etag:
        response["ETag"] = f'"{etag}"'
    return value if isinstance(value, bytes) else to_json(value)


def prefers_html(accept: str) -> bool:
    """Whether an Accept header puts HTML before JSON, as browsers do (RFC 9110, 12.5.1)."""
    weights = {}
    for item in accept.lower().replace(" ", "").split(","):
        media_range, *parameters = item.split(";")
        weight = next((text[2:] for text in parameters if text.startswith("q=")), "1")
        weights[media_range] = float(weight) if re.fullmatch(r"[01](\.\d{0,3})?", weight) else 0
    anything = weights.get("*/*", 0)
    for_html = weights.get("text/html", weights.get("text/*", anything))
    for_json = weights.get(JSON, weights.get("application/*", anything))
    return for_html > for_json


def product_to_json(product: dict) -> dict:
    return {**product, "price": product["price"] / 100}


def order_to_json(order: dict) -> dict:
    return {
        "id": order["id"],
        "status": order["status"],
        "total_price": order["total"] / 100,
        "created_at": order["created_at"],
        "reference": order["reference"],
        "metadata": order["metadata"],
        "products": [{**line, "price": line["price"] / 100} for line in order["lines"]],
    }


def product_response(product: dict) -> bytes:
    return json_response(product_to_json(product), 200, db.etag(product))


def order_response(order: dict) -> bytes:
    row = {name: value for name, value in order.items() if name != "lines"}
    return json_response(order_to_json(order), 200, db.etag(row))


def page_response(path: str, name: str, items: str, query: dict, next_after: int | None) -> bytes:
    """A page of a collection, from the JSON text of its items and where the next page begins."""
    url = None
    headers = {}
    if next_after:
        parameters = {
            key: value if isinstance(value, str) else json_encode(value)
            for key, value in {**query, "after": next_after}.items()
        }
        url = f"{mount_point()}{path}?{urlencode(parameters)}"
        headers["Link"] = f'<{url}>; rel="next"'
    body = f'{{"{name}":{items},"next":{json_encode(url)}}}\n'.encode()
    etag = hashlib.blake2b(body, digest_size=12).hexdigest()
    return json_response(body, 200, etag, **headers)


def mount_point() -> str:
    """The path under which the shop is mounted or published, without a last slash."""
    script_name = bottle.request.environ.get("SCRIPT_NAME", "")
    return quote(script_name.rstrip("/"), encoding="latin-1", errors="replace")


# ------------------------------------------------------------------------------------ application

# RFC 9110's: those of http.client depend on the version of Python.
PHRASES = http.client.responses | {413: "Content Too Large", 422: "Unprocessable Content"}


class Problem(bottle.HTTPResponse):
    """An error as problem details (RFC 9457): raise it anywhere in a request."""

    def __init__(self, status: int, detail: str, kind: str = "", headers=None, **members):
        phrase = PHRASES.get(status, "Error")
        problem = {
            "type": f"urn:problem-type:{kind}" if kind else "about:blank",
            "title": kind.replace("-", " ").capitalize() or phrase,
            "status": status,
            "detail": detail,
            **members,
        }
        always = {"Content-Type": "application/problem+json", "Cache-Control": "no-cache"}
        super().__init__(to_json(problem), f"{status} {phrase}", always | (headers or {}))


def unavailable(error: Exception) -> Problem:
    return Problem(503, str(error), headers={"Retry-After": "1"})


Error = tuple[tuple, str]  # the path to the place in a value, and what is wrong there


class ValidationError(Exception):
    """A body or a query does not match its schema."""

    def __init__(self, errors: list[Error], *, is_query: bool = False):
        super().__init__()
        self.errors = errors
        self.is_query = is_query


def validation_problem(error: ValidationError) -> Problem:
    """The 422 that lists the errors; its detail counts them and has the first three."""
    errors = error.errors[:MAX_ERRORS]
    count = f"{len(errors)} error{'s' if len(errors) > 1 else ''}"
    if len(error.errors) > MAX_ERRORS:
        count = f"More than {MAX_ERRORS} errors"
    messages = [f"{field_name(path)} {message}" for path, message in errors]
    more = f"; and {len(error.errors) - 3} more" if len(errors) > 3 else ""
    items = [
        {**locate(path, error.is_query), "detail": f"{message}."}
        for (path, _), message in zip(errors, messages, strict=True)
    ]
    detail = f"{count}: {'; '.join(messages[:3])}{more}."
    return Problem(422, detail, "validation", errors=items)


def invalid_body(path: tuple, message: object) -> Problem:
    return validation_problem(ValidationError([(path, str(message))]))


def field_name(path: tuple) -> str:
    if not path:
        return "The body"
    if isinstance(path[-1], int):
        return f"Item {path[-1]}"
    return path[-1] or '""'


def locate(path: tuple, is_query: bool) -> dict:
    """The place of an error: the name of a query parameter, or a JSON pointer into the body."""
    if is_query:
        return {"parameter": path[0]}
    steps = (str(step).replace("~", "~0").replace("/", "~1") for step in path)
    return {"pointer": "#" + quote("".join("/" + step for step in steps), errors="replace")}


def unknown_products(error: db.UnknownProducts) -> Problem:
    messages = {
        ("products", position): f"names product {product_id}, which does not exist"
        for position, product_id in error.lines.items()
    }
    return validation_problem(ValidationError(list(messages.items())))


def precondition_failed(error: db.PreconditionFailed) -> Problem:
    hint = "The resource has changed since you read it: fetch it again and retry."
    tags = entity_tags(bottle.request.environ.get("HTTP_IF_MATCH", ""))
    if tags and all(tag.startswith("W/") for tag in tags):
        hint = (
            "If-Match holds only weak tags, which never match: send the ETag without W/, "
            "or fetch the resource without compression."
        )
    return Problem(412, hint)


# How an exception becomes a response: by its class, or else by the nearest base class.
PROBLEMS: dict[type, Callable[[Any], Problem]] = {
    db.NotFound: lambda error: Problem(404, str(error)),
    db.PreconditionFailed: precondition_failed,
    db.InsufficientStock: lambda error: Problem(
        409, str(error), "insufficient-stock", shortages=error.shortages
    ),
    db.DuplicateSku: lambda error: Problem(
        409, str(error), "duplicate-sku", product_id=error.product_id
    ),
    db.InvalidTransition: lambda error: Problem(409, str(error), "invalid-transition"),
    db.IdempotencyKeyReused: lambda error: Problem(
        422,
        "This Idempotency-Key belongs to another request: use a new one.",
        "idempotency-key-reused",
    ),
    db.ExcessiveStock: lambda error: invalid_body(("change",), error),
    db.ExcessiveTotal: lambda error: invalid_body(("products",), error),
    db.ExcessiveMetadata: lambda error: invalid_body(("metadata",), error),
    db.UnknownProducts: unknown_products,
    db.UnknownPlace: lambda error: validation_problem(
        ValidationError([(("after",), str(error))], is_query=True)
    ),
    ValidationError: validation_problem,
    db.DatabaseUnavailable: unavailable,
}


def problem_for(error: Exception, log: TextIO | None = None) -> Problem:
    """The response to an exception. An unexpected one is a fault of ours, and is logged."""
    for kind in type(error).__mro__:
        if kind in PROBLEMS:
            return PROBLEMS[kind](error)
    traceback.print_exception(error, file=log)
    return Problem(500, "Internal error; it has been logged.")


def handle_http_error(error: bottle.HTTPError) -> bottle.HTTPResponse:
    """Respond to what Bottle itself rejects: an unknown path, or a wrong method."""
    if error.status_code == 404:
        return Problem(404, "No such path; GET / lists the paths.")
    if error.status_code != 405:
        return Problem(error.status_code, str(error.body))
    methods = {"OPTIONS", *error.headers["Allow"].split(",")}
    if "GET" in methods:
        methods.add("HEAD")
    allow = {"Allow": ", ".join(sorted(methods))}
    if bottle.request.method == "OPTIONS":
        return bottle.HTTPResponse(status=204, headers=allow)
    return Problem(405, f"Use one of {allow['Allow']} here.", headers=allow)


class Plugin:
    """The Bottle plugin around every route: it authorizes, reads, validates and responds."""

    name = "shop"
    api = 2

    def __init__(self, store: db.Store, admin_token: str | None, order_token: str | None):
        self.store = store
        self.tokens: dict[str, list[str]] = {}  # by kind of access: those that grant it
        if admin_token:
            self.tokens["admin"] = [admin_token]
        if admin_token and order_token:
            self.tokens["order"] = [admin_token, order_token]
        self.secured = frozenset(self.tokens)

    def apply(self, callback: Callable, route: bottle.Route) -> Callable:
        spec = route.config.get("spec")
        if spec is None:  # an embedding program's own route
            return callback
        names = list(inspect.signature(callback).parameters)
        query_validator = compile_schema(spec.query)
        body_validator = compile_schema(spec.body) if spec.body else None

        def respond(environ: dict, path_ids: dict) -> Any:
            if environ.get("HTTP_EXPECT", "100-continue").lower() != "100-continue":
                raise Problem(417, "Expect may only be 100-continue.")
            if spec.access in self.tokens:
                authorize(environ, self.tokens[spec.access])
            arguments = {"store": self.store, "secured": self.secured, **path_ids}
            if spec.query is not ANY_QUERY:
                arguments["query"] = read_query(environ, spec.query, query_validator)
            arguments["if_match"] = read_if_match(environ)
            raw, body = b"", None
            if body_validator:
                raw = read_body(environ, spec.media_types)
                body = arguments["body"] = parse_body(raw, body_validator)
            action = functools.partial(callback, **{name: arguments[name] for name in names})
            if environ["REQUEST_METHOD"] == "POST" and "HTTP_IDEMPOTENCY_KEY" in environ:
                return self.respond_once(environ, raw, body, action)
            response = action()
            if environ["REQUEST_METHOD"] in ("GET", "HEAD"):
                bottle.response.headers.setdefault("Cache-Control", "no-cache")
                if is_unchanged(environ):
                    bottle.response.status = 304
                    return b""
            return response

        def call(**path_ids: int) -> Any:
            environ = bottle.request.environ
            try:
                return respond(environ, path_ids)
            except bottle.HTTPResponse as response:  # a Problem
                return response
            except Exception as error:
                return problem_for(error, environ["wsgi.errors"])

        return call

    def respond_once(self, environ: dict, raw: bytes, body: Any, action: Callable) -> bytes:
        """Run a route and store its response with its work; a repeat gets that response again."""
        key = read_key(environ["HTTP_IDEMPOTENCY_KEY"])
        digest = fingerprint(environ, canonical_json(body))
        response = bottle.response
        with self.store.transaction():
            try:
                stored = self.store.get_idempotent(key, digest)
            except db.IdempotencyKeyReused:
                # Before schema 7 the fingerprint was made from the bytes of the body.
                stored = self.store.get_idempotent(key, fingerprint(environ, raw))
            if stored is None:
                content = action()
                location, etag = response.get_header("Location"), response.get_header("ETag")
                result = [response.status_code, location, content.decode(), etag]
                self.store.save_idempotent(key, digest, result)
                return content
        status, location, text, *etags = stored  # keys from before version 2 have no ETag
        headers = {"Location": location, "ETag": etags and etags[0], "Idempotent-Replayed": "true"}
        headers = {name: value for name, value in headers.items() if value}
        return json_response(text.encode(), status, **headers)


def authorize(environ: dict, tokens: list[str]) -> None:
    scheme, _, token = environ.get("HTTP_AUTHORIZATION", "").partition(" ")
    sent = token.strip().encode()
    matching = [hmac.compare_digest(sent, valid.encode()) for valid in tokens]
    if scheme.lower() != "bearer" or not any(matching):
        hint = "A token is needed: Authorization: Bearer <token>"
        raise Problem(401, hint, headers={"WWW-Authenticate": "Bearer"})


def read_query(environ: dict, schema: dict, validator: "Validator") -> dict:
    """The query parameters, validated. Raises ValidationError."""
    query: dict[str, Any] = {}
    errors: list[Error] = []
    if not environ.get("QUERY_STRING"):
        return query  # no parameter is required
    pairs = environ["QUERY_STRING"].split("&")
    if len(pairs) > MAX_PARAMETERS:
        name = pairs[MAX_PARAMETERS].partition("=")[0]
        message = f"is one too many: a query may have {MAX_PARAMETERS} parameters"
        errors.append(((name,), message))
    text = "&".join(pairs[:MAX_PARAMETERS])
    for pair in parse_qsl(text, keep_blank_values=True, encoding="latin-1"):
        # WSGI passes bytes as latin-1. Invalid UTF-8 becomes surrogates, which fail validation.
        raw = (part.encode("latin-1", "replace") for part in pair)
        name, value = (part.decode("utf-8", "surrogateescape") for part in raw)
        if name in query:
            errors.append(((name,), "is given twice"))
        query[name] = parse_parameter(value, schema["properties"].get(name, {}).get("type"))
    query = validator(query, (), errors)
    if errors:
        raise ValidationError(errors, is_query=True)
    return query


def parse_parameter(text: str, kind: str | None) -> Any:
    if kind == "integer" and text.isascii() and text.isdigit():
        return Decimal(text)
    if kind == "boolean" and text in ("true", "false"):
        return text == "true"
    return text


def read_if_match(environ: dict) -> db.Precondition:
    """The condition that If-Match puts on the current ETag (RFC 9110, 13.1.1), or None."""
    if_match = environ.get("HTTP_IF_MATCH")
    if if_match is None:
        return None
    return lambda etag: matches(if_match, etag)


def is_unchanged(environ: dict) -> bool:
    """Whether If-None-Match names the ETag of the response to a GET (RFC 9110, 13.1.2)."""
    etag = bottle.response.get_header("ETag", "").strip('"')
    if_none_match = environ.get("HTTP_IF_NONE_MATCH")
    return bool(etag) and if_none_match is not None and matches(if_none_match, etag, weak=True)


ENTITY_TAG = r'(?:W/)?"[!#-~\x80-\xff]*"'
ENTITY_TAGS = re.compile(rf"[ \t,]*{ENTITY_TAG}(?:[ \t]*,[ \t,]*{ENTITY_TAG})*[ \t,]*")


def entity_tags(header: str) -> list[str]:
    """The entity tags of a list, as they stand in it; none if it is malformed."""
    return re.findall(ENTITY_TAG, header) if ENTITY_TAGS.fullmatch(header) else []


def matches(header: str, etag: str, *, weak: bool = False) -> bool:
    """Whether a list of entity tags names this one; weak tags never match unless `weak`."""
    if header.strip() == "*":
        return True
    return f'"{etag}"' in [tag.removeprefix("W/" if weak else "") for tag in entity_tags(header)]


def read_key(header: str) -> str:
    if not re.fullmatch(KEY["pattern"], header):
        rule = "1 to 255 visible ASCII characters, bare or in double quotes"
        raise Problem(400, f"Idempotency-Key must be {rule}.")
    return re.sub(r"\\(.)", r"\1", header[1:-1]) if header.startswith('"') else header


def fingerprint(environ: dict, content: str | bytes) -> str:
    """What makes two requests with one Idempotency-Key the same request."""
    path = environ["PATH_INFO"].rstrip("/") + "/"
    request = (environ["REQUEST_METHOD"], path, content)
    return hashlib.blake2b(repr(request).encode(), digest_size=12).hexdigest()


canonical_json = json.JSONEncoder(sort_keys=True).encode


def read_body(environ: dict, media_types: tuple) -> bytes:
    """The bytes of a body that is declared as JSON and not too large. Raises a Problem."""
    accept = {"Accept": ", ".join(media_types)}
    if not is_json(environ.get("CONTENT_TYPE", ""), media_types):
        hint = "Send JSON in UTF-8 and declare it; with curl: -H 'Content-Type: application/json'"
        raise Problem(415, hint, headers=accept)
    coding = environ.get("HTTP_CONTENT_ENCODING", "identity")
    if coding.strip().lower() not in ("identity", ""):
        hint = f"Send the body without Content-Encoding: {coding}"
        raise Problem(415, hint, headers=accept | {"Accept-Encoding": "identity"})
    raw = environ["wsgi.input"].read(min(body_length(environ), MAX_BODY + 1))
    if len(raw) > MAX_BODY:
        raise Problem(413, TOO_LARGE)
    return raw


def body_length(environ: dict) -> int:
    """How many bytes of the body to read. Raises a Problem."""
    length = environ.get("CONTENT_LENGTH")
    if length and not re.fullmatch("[0-9]{1,19}", length):
        raise Problem(400, "Content-Length must be a number.")
    if length:
        return int(length)
    # A server that decodes a chunked body may not know its length, but ends the stream there.
    if environ.get("wsgi.input_terminated"):
        return MAX_BODY + 1
    if "HTTP_TRANSFER_ENCODING" in environ:
        raise Problem(411, "Send the body with a Content-Length.")
    return 0


@functools.lru_cache(maxsize=64)
def is_json(content_type: str, media_types: tuple) -> bool:
    media_type, _, parameters = content_type.partition(";")
    charset = re.search(r'charset="?([^";\s]*)', parameters.lower())
    if charset and charset[1] not in ("utf-8", "utf8"):
        return False
    return media_type.strip().lower() in media_types


def parse_body(raw: bytes, validator: "Validator") -> Any:
    """The body, decoded and validated. Raises a Problem, or ValidationError."""
    if not raw:
        raise Problem(400, "The body is empty: send a JSON object.")
    try:
        value = json_decode(raw.decode("utf-8-sig"))  # Windows programs add a byte order mark
    except UnicodeDecodeError as error:
        raise Problem(400, f"The body is not UTF-8: see byte {error.start}.") from None
    except RecursionError:
        raise Problem(400, "The body is nested too deep.") from None
    except ValueError as error:
        raise Problem(400, f"The body is not JSON: {error}.") from None
    return validate(value, validator)


def reject_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not valid JSON")


def reject_duplicate_keys(pairs: list) -> dict:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        [(name, _)] = collections.Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f'duplicate key "{name}"')
    return fields


def parse_int(text: str) -> int | Decimal:
    # int() rejects thousands of digits.
    return int(text) if len(text) < 20 else Decimal(text)


def parse_decimal(text: str) -> Decimal:
    try:
        return Decimal(text)
    except decimal.InvalidOperation:  # its exponent has some twenty digits
        # Only a zero can be valid; Infinity fails validation.
        mantissa, _, _ = text.lower().partition("e")
        return Decimal("Infinity") if mantissa.strip("-0.") else Decimal(0)


json_decode = json.JSONDecoder(
    parse_int=parse_int,
    parse_float=parse_decimal,
    parse_constant=reject_constant,
    object_pairs_hook=reject_duplicate_keys,
).decode


# The headers that a page of another origin may send, and read (https://fetch.spec.whatwg.org).
CORS_REQUEST = "Authorization, Content-Type, Idempotency-Key, If-Match, If-None-Match"
CORS_RESPONSE = "ETag, Link, Location, Retry-After, Idempotent-Replayed"


class Application:
    """A shop as a WSGI application.

    .bottle has its routes, and an embedding program may add routes and plugins to it; .store is
    its database. It wraps a Bottle rather than being one, because a Bottle that is mounted in
    another loses its error handlers and hooks.
    """

    def __init__(
        self,
        store: db.Store,
        admin_token: str | None = None,
        order_token: str | None = None,
        cors_origins: frozenset[str] = frozenset(),
    ):
        self.store = store
        self.cors_origins = cors_origins
        self.bottle = new_bottle()
        self.bottle.default_error_handler = handle_http_error
        self.bottle.install(Plugin(store, admin_token, order_token))
        for route in api.routes:
            # A path works with or without its last slash.
            rules = {route.rule.rstrip("/") or "/", route.rule.rstrip("/") + "/"}
            self.bottle.route(
                sorted(rules), route.method, route.callback, skip=["json"], **route.config
            )

    def __call__(self, environ: dict, start_response: Callable):
        path = environ.get("PATH_INFO", "")
        if not (path.isascii() and path.isprintable()):
            # Bottle would drop a line feed at the end and bytes that are not UTF-8, and then find
            # a route. A quoted path matches no route.
            environ["PATH_INFO"] = quote(path, encoding="latin-1", errors="replace")

        def start(status: str, headers: list, exc_info=None):
            # exc_info is left out: a Bottle that mounts the shop would raise it again.
            return start_response(status, self.allow_origin(environ, headers))

        return self.bottle(environ, start)

    def allow_origin(self, environ: dict, headers: list) -> list:
        """Add the headers that let pages of the origins in CORS_ORIGINS read the response."""
        if not self.cors_origins:
            return headers
        origin = environ.get("HTTP_ORIGIN")
        allowed = "*" if "*" in self.cors_origins else origin
        added = {}
        if "*" not in self.cors_origins:
            vary = [value for name, value in headers if name == "Vary"]
            headers = [pair for pair in headers if pair[0] != "Vary"]
            added["Vary"] = ", ".join([*vary, "Origin"])
        if allowed in self.cors_origins:
            added["Access-Control-Allow-Origin"] = allowed
            added["Access-Control-Expose-Headers"] = CORS_RESPONSE
            allow = dict(headers).get("Allow")
            if allow and "HTTP_ACCESS_CONTROL_REQUEST_METHOD" in environ:
                added["Access-Control-Allow-Methods"] = allow
                requested = environ.get("HTTP_ACCESS_CONTROL_REQUEST_HEADERS")
                added["Access-Control-Allow-Headers"] = requested or CORS_REQUEST
                added["Access-Control-Max-Age"] = "600"
        return [*headers, *added.items()]

    def is_slow(self, environ: dict) -> bool:
        """Whether the route of a request may take long."""
        try:
            route, _ = self.bottle.match(environ)
        except bottle.HTTPError:
            return False
        spec = route.config.get("spec")
        return spec is not None and spec.slow

    def close(self) -> None:
        """Close the database."""
        self.store.close()


def create_app(
    database_url: str | None = None,
    admin_token: str | None = None,
    debug: bool = False,
    *,
    order_token: str | None = None,
    cors_origins: str = "",
    read_only: bool = False,
    litestream: bool = False,
    lock_timeout: float = 5.0,
) -> Application:
    """Make the WSGI application, to be served with threads or mounted in another application.

    database_url: such as sqlite:///db.sqlite3; if None, it and all other settings that are not
    passed come from the environment. admin_token: the token for changing products and orders; if
    None, everything is open to everyone. order_token: the token for placing orders; if None, anyone
    can order. debug: log every SQL statement. cors_origins: origins whose pages may call the shop.
    read_only: serve a database that another process updates. litestream: leave checkpoints to
    Litestream. lock_timeout: seconds that a write waits for another process.
    Raises ConfigError for an unusable setting, db.DatabaseError for an unusable database.
    """
    given = {
        "database": database_url and read_database_url("DATABASE_URL", database_url),
        "admin_token": admin_token and read_token("ADMIN_TOKEN", admin_token),
        "order_token": order_token and read_token("ORDER_TOKEN", order_token),
        "cors_origins": read_origins("CORS_ORIGINS", cors_origins),
        "debug": debug,
        "read_only": read_only,
        "litestream": litestream,
    }
    environ = read_environment() if database_url is None else {}
    settings = read_settings(environ, **{name: value for name, value in given.items() if value})
    return open_application(settings, lock_timeout)


def open_application(settings: "Settings", lock_timeout: float) -> Application:
    store = open_store(settings, lock_timeout, checkpoints=not settings.litestream)
    return Application(store, settings.admin_token, settings.order_token, settings.cors_origins)


def open_store(settings: "Settings", lock_timeout: float, checkpoints: bool = False) -> db.Store:
    try:
        return db.Store(
            settings.database,
            lock_timeout=lock_timeout,
            read_only=settings.read_only,
            checkpoints=checkpoints,
            trace=log_statement if settings.debug else None,
        )
    except db.DatabaseError as error:
        raise db.DatabaseError(f"DATABASE_URL: {error}") from error


def log_statement(sql: str) -> None:
    print(" ".join(sql.split()), file=sys.stderr)


# ------------------------------------------------------------------------------------- validation
# compile_schema() turns a schema into a function that validates a value: it returns the value in
# the form that the routes use (prices in cents), and appends each Error to a list.

Validator = Callable[[Any, tuple, list[Error]], Any]


def validate(value: Any, validator: Validator) -> Any:
    """The value in the form that the routes use. Raises ValidationError with all errors."""
    errors: list[Error] = []
    valid = validator(value, (), errors)
    if errors:
        raise ValidationError(errors)
    return valid


def compile_schema(schema: dict) -> Validator:
    if isinstance(schema["type"], list):  # such as ["string", "null"]
        kind, _ = schema["type"]
        validator = compile_schema(schema | {"type": kind})
        return lambda value, *place: None if value is None else validator(value, *place)
    if "propertyNames" in schema:
        return compile_map(schema)
    return COMPILERS[schema["type"]](schema)


def compile_object(schema: dict) -> Validator:
    properties = {name: compile_schema(item) for name, item in schema["properties"].items()}
    names = ", ".join(properties)
    unknown = f"is an unknown field; allowed: {names}" if names else "is an unknown field"
    required = schema["required"]
    least = schema.get("minProperties", 0)

    def validate_object(value: Any, path: tuple, errors: list[Error]) -> dict:
        if type(value) is not dict:
            errors.append((path, "must be an object"))
            return {}
        if len(value) < least:
            errors.append((path, f"must have at least one of {names}"))
        if not value.keys() <= properties.keys():
            errors += [(path + (name,), unknown) for name in value if name not in properties]
            value = {name: value[name] for name in properties if name in value}
        for name in required:
            if name not in value:
                errors.append((path + (name,), "is required"))
        fields = {}
        for name, item in value.items():
            fields[name] = properties[name](item, path + (name,), errors)
        return fields

    return validate_object


def compile_map(schema: dict) -> Validator:
    """An object with any names that match propertyNames; all its values have one schema."""
    validate_name = compile_string(schema["propertyNames"])
    validate_value = compile_schema(schema["additionalProperties"])
    most = schema.get("maxProperties", MAX_BODY)

    def validate_map(value: Any, path: tuple, errors: list[Error]) -> dict:
        if type(value) is not dict:
            errors.append((path, "must be an object"))
            return {}
        if len(value) > most:
            errors.append((path, f"must have at most {most} entries, not {len(value)}"))
        for name, item in value.items():
            validate_name(name, path + (name,), errors)
            validate_value(item, path + (name,), errors)
        return value

    return validate_map


def compile_array(schema: dict) -> Validator:
    validate_item = compile_schema(schema["items"])
    least = schema["minItems"]
    most = schema["maxItems"]
    key = schema["unique_by"]

    def validate_array(value: Any, path: tuple, errors: list[Error]) -> list:
        if type(value) is not list:
            errors.append((path, "must be an array"))
            return []
        if not least <= len(value) <= most:
            errors.append((path, f"must have {least} to {most} items, not {len(value)}"))
            return []
        items = []
        seen = set()
        for position, item in enumerate(value):
            fields = validate_item(item, path + (position,), errors)
            items.append(fields)
            item_id = fields.get(key)
            if item_id in seen and item_id:  # neither absent (None) nor invalid (0)
                errors.append((path + (position,), f"repeats {key} {item_id}"))
            seen.add(item_id)
        return items

    return validate_array


def compile_string(schema: dict) -> Validator:
    least = schema.get("minLength", 0)
    most = schema.get("maxLength", MAX_BODY)
    enum = schema.get("enum")
    matches_pattern = re.compile(schema.get("pattern", "(?s:.*)")).fullmatch
    has_surrogate = re.compile("[\ud800-\udfff]").search

    def validate_string(value: Any, path: tuple, errors: list[Error]) -> str:
        if type(value) is not str:
            message = "must be a string"
        elif not least <= len(value) <= most:
            message = f"must be {least} to {most} characters long, not {len(value)}"
        elif enum and value not in enum:
            message = f"must be {' or '.join(enum)}"
        elif not matches_pattern(value):
            message = schema["message"]
        elif not value.isascii() and has_surrogate(value):
            message = "must be valid UTF-8, without unpaired surrogates"
        else:
            return value
        errors.append((path, message))
        return ""

    return validate_string


def compile_number(schema: dict) -> Validator:
    """An integer; or a number with `decimals`, which is validated into whole cents."""
    least = schema["minimum"]
    most = schema["maximum"]
    decimals = schema.get("decimals", 0)
    factor = 10**decimals
    step = Decimal(1) / factor
    wrong_type = "must be a number" if decimals else "must be an integer"
    too_fine = "must have at most two decimals" if decimals else wrong_type

    def validate_number(value: Any, path: tuple, errors: list[Error]) -> int:
        if type(value) not in (int, Decimal):  # isinstance would accept a bool
            message = wrong_type
        elif not least <= value <= most:
            message = f"must be {least} to {most}"
        elif type(value) is Decimal and value != value.quantize(step):
            message = too_fine
        else:
            return int(value * factor)
        errors.append((path, message))
        return 0

    return validate_number


def validate_boolean(value: Any, path: tuple, errors: list[Error]) -> bool:
    if type(value) is not bool:
        errors.append((path, "must be true or false"))
    return value


COMPILERS = {
    "object": compile_object,
    "array": compile_array,
    "string": compile_string,
    "integer": compile_number,
    "number": compile_number,
    "boolean": lambda schema: validate_boolean,
}


# ---------------------------------------------------------------------------------- documentation
# /openapi.json, and from it the page at /: built from the routes and their schemas.

MUG = {"id": 1, "name": "Mug", "description": "Blue", "price": 9.99, "stock": 12}
MUG |= {"sku": "MUG-BL", "metadata": {"image": "https://img.example/mug.jpg"}}
ORDERED_MUG = {"product_id": 1, "quantity": 2}
SOLD_MUG = {"product_id": 1, "name": "Mug", "price": 9.99, "quantity": 2, "sku": "MUG-BL"}
SHORT_MUG = {"product_id": 1, "requested": 15, "available": 12}
SOLD_AT = "2026-11-22T10:15:30Z"
SALE = {"id": 12, "change": -2, "stock": 10, "order_id": 7, "note": "", "created_at": SOLD_AT}
CART = {
    "id": 7,
    "status": "pending",
    "total_price": 19.98,
    "created_at": SOLD_AT,
    "reference": "cart-17",
    "metadata": {"email": "buyer@example.org"},
    "products": [SOLD_MUG],
}
# Each schema that has a name in /openapi.json, with an example or the exception that makes it.
SCHEMAS: dict[str, tuple[dict, dict | Exception]] = {
    "Product": (PRODUCT, MUG),
    "NewProduct": (NEW_PRODUCT, {name: MUG[name] for name in PRODUCT_FIELDS}),
    "ProductUpdate": (PRODUCT_UPDATE, {"price": 8.5}),
    "StockUpdate": (STOCK_UPDATE, {"change": -3, "note": "broken"}),
    "Movement": (MOVEMENT, SALE),
    "MovementList": (MOVEMENTS, {"movements": [SALE], "next": None}),
    "ProductList": (PRODUCTS, {"products": [MUG], "next": None}),
    "Order": (ORDER, CART),
    "OrderLine": (LINE, SOLD_MUG),
    "NewOrder": (NEW_ORDER, {"products": [ORDERED_MUG], "reference": "cart-17"}),
    "NewOrderLine": (NEW_LINE, ORDERED_MUG),
    "OrderUpdate": (ORDER_UPDATE, {"status": "completed"}),
    "OrderList": (ORDERS, {"orders": [CART], "next": None}),
    "Health": (HEALTH, {"status": "ok"}),
    "Index": (INDEX_SCHEMA, INDEX),
    "Problem": (PROBLEM, db.NotFound("product", 1)),
    "InsufficientStock": (INSUFFICIENT_STOCK, db.InsufficientStock([SHORT_MUG])),
    "Shortage": (SHORTAGE, SHORT_MUG),
    "InvalidTransition": (INVALID_TRANSITION, db.InvalidTransition(7, "cancelled", "completed")),
    "DuplicateSku": (DUPLICATE_SKU, db.DuplicateSku(4, "MUG-BL")),
    "ValidationFailed": (VALIDATION_FAILED, ValidationError([(("price",), "must be a number")])),
    "InvalidField": (ERROR, {"pointer": "#/price", "detail": "price must be a number."}),
    "IdempotencyKeyReused": (IDEMPOTENCY_KEY_REUSED, db.IdempotencyKeyReused()),
}
PATH_ID = ID | {"description": "The id that the shop gave it."}
IF_MATCH = STRING | {"description": "ETags: 412 unless one of them is current."}
IF_NONE_MATCH = STRING | {"description": "ETags: 304 if one of them is current."}
RESPONSE_HEADERS = {
    "Accept": "The media types accepted for the body.",
    "Accept-Encoding": "identity, if the body was compressed.",
    "Cache-Control": "no-cache (revalidate before reuse) or no-store.",
    "Content-Security-Policy": "Limits what the page can load and run.",
    "ETag": "The version of the content.",
    "Idempotent-Replayed": "true if this is the response to an earlier request.",
    "Link": '<...>; rel="next": the next page.',
    "Location": "The URL of the new item.",
    "Retry-After": "Seconds to wait before retrying.",
    "Vary": "Accept.",
    "WWW-Authenticate": "Bearer.",
}
# The problems of type about:blank, and the headers that each has.
ERRORS: dict[int, tuple[str, list[str]]] = {
    400: ("The request or its body cannot be read.", []),
    401: ("The token is missing or wrong.", ["WWW-Authenticate"]),
    404: ("There is no such product or order.", []),
    411: ("The length of the body is missing.", []),
    412: ("If-Match does not match.", []),
    413: ("The body is over 128 KiB.", []),
    415: ("The body is not declared as JSON, or is compressed.", ["Accept", "Accept-Encoding"]),
    417: ("Expect is not 100-continue.", []),
    431: ("The headers are over 16 KiB.", []),
    500: ("An internal error.", []),
    503: ("The database is busy, full or unreachable; nothing was changed.", ["Retry-After"]),
}
TAGS = {
    "products": "What is for sale, and how much is left.",
    "orders": "Sales, with the names and prices of that time.",
    "service": "The index, this description, and the health check.",
}
# The shop's own keywords, as sentences.
OWN_KEYWORDS = {
    "decimals": "At most two decimals.",
    "unique_by": "Each {} only once.",
    "default": "Default: {}.",
}


@functools.lru_cache(maxsize=16)
def openapi_document(script_name: str, secured: frozenset[str]) -> dict:
    """The interface as OpenAPI 3.1.

    script_name: where the shop is mounted. secured: the values of Spec.access that need a token.
    """
    paths: dict[str, dict] = {}
    for route in api.routes:
        path = re.sub("<(.*?):id>", r"{\1}", route.rule)
        paths.setdefault(path, {})[route.method.lower()] = describe_operation(route, secured)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Shop",
            "version": VERSION,
            "description": "Products, their stock, and orders that take from it, all or nothing. "
            "HEAD works wherever GET does; OPTIONS lists the methods of a path.",
        },
        "servers": [{"url": script_name or "/"}],
        "tags": [{"name": name, "description": text} for name, text in TAGS.items()],
        "paths": paths,
        "components": {
            "schemas": {
                name: describe_schema(schema, is_component=True)
                for name, (schema, _) in SCHEMAS.items()
            },
            "responses": {str(status): describe_error(status) for status in ERRORS},
            "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}},
        },
    }


def describe_schema(schema: dict, *, is_component: bool = False) -> dict:
    """The schema in JSON Schema's own keywords; one that has a name becomes a reference to it."""
    name = next((name for name, (named, _) in SCHEMAS.items() if named is schema), "")
    if name and not is_component:
        return {"$ref": f"#/components/schemas/{name}"}
    described: dict[str, Any] = {}
    sentences = [schema["description"]] if "description" in schema else []
    for keyword, value in schema.items():
        if keyword == "properties":
            described[keyword] = {field: describe_schema(value[field]) for field in value}
        elif keyword in OWN_KEYWORDS:
            sentences.append(OWN_KEYWORDS[keyword].format(json_encode(value)))
        elif isinstance(value, dict):  # a schema within this one
            described[keyword] = describe_schema(value)
        elif keyword != "message":
            described[keyword] = value
    if sentences:
        described["description"] = " ".join(sentences)
    if name:
        example = SCHEMAS[name][1]
        if isinstance(example, Exception):
            example = json.loads(problem_for(example).body)
        described["examples"] = [example]
    return described


def describe_headers(*names: str) -> dict:
    return {name: {"description": RESPONSE_HEADERS[name], "schema": STRING} for name in names}


def describe_problem(text: str, headers: list[str], *schemas: dict, **example: dict) -> dict:
    described = [describe_schema(schema) for schema in schemas]
    schema = {"oneOf": described} if len(described) > 1 else described[0]
    return {
        "description": text,
        "headers": describe_headers("Cache-Control", *headers),
        "content": {"application/problem+json": {"schema": schema, **example}},
    }


def describe_error(status: int) -> dict:
    text, headers = ERRORS[status]
    return describe_problem(text, headers, PROBLEM, example=json.loads(Problem(status, text).body))


def describe_operation(route: bottle.Route, secured: frozenset[str]) -> dict:
    spec = route.config["spec"]
    needs_token = spec.access in secured
    tag = route.rule.split("/")[1]
    summary, _, description = inspect.cleandoc(route.callback.__doc__).partition("\n\n")
    operation = {
        "operationId": route.callback.__name__,
        "tags": [tag if tag in TAGS else "service"],
        "summary": summary,
        "description": description or summary,
        "parameters": describe_parameters(route, spec),
        "security": [{"token": []}] if needs_token else [],
        "responses": describe_success(route, spec) | describe_failures(route, spec, needs_token),
    }
    if spec.body:
        content = dict.fromkeys(spec.media_types, {"schema": describe_schema(spec.body)})
        operation["requestBody"] = {"required": True, "content": content}
    return operation


def describe_parameters(route: bottle.Route, spec: Spec) -> list[dict]:
    schemas = [("query", name, schema) for name, schema in spec.query["properties"].items()]
    schemas += [("path", name, PATH_ID) for name in re.findall("<(.*?):id>", route.rule)]
    if route.method == "POST":
        schemas.append(("header", "Idempotency-Key", KEY))
    if spec.if_match:
        schemas.append(("header", "If-Match", IF_MATCH))
    if spec.etag and route.method == "GET":
        schemas.append(("header", "If-None-Match", IF_NONE_MATCH))
    parameters = []
    for place, name, schema in schemas:
        described = describe_schema(schema)
        text = described.pop("description")
        parameter = {"name": name, "in": place, "required": place == "path", "description": text}
        parameters.append(parameter | {"schema": described})
    return parameters


def describe_success(route: bottle.Route, spec: Spec) -> dict:
    possible = {
        "Cache-Control": route.method == "GET",
        "Content-Security-Policy": spec.html,
        "ETag": spec.etag,
        "Idempotent-Replayed": route.method == "POST",
        "Link": "limit" in spec.query["properties"],
        "Location": spec.status == 201,
        "Vary": spec.html,
    }
    headers = describe_headers(*(name for name in possible if possible[name]))
    success: dict[str, Any] = {"description": "Success.", "headers": headers}
    if spec.response:
        success["content"] = {JSON: {"schema": describe_schema(spec.response)}}
    if spec.html:
        success["content"]["text/html"] = {"schema": STRING}
    responses = {str(spec.status): success}
    if spec.etag and route.method == "GET":
        responses["304"] = {
            "description": "If-None-Match has the current ETag.",
            "headers": headers,
        }
    return responses


def describe_failures(route: bottle.Route, spec: Spec, needs_token: bool) -> dict:
    possible = dict.fromkeys(ERRORS, True) | {
        401: needs_token,
        404: "<" in route.rule,
        411: spec.body is not None,
        412: spec.if_match,
        415: spec.body is not None,
        503: spec.database,
    }
    statuses = [status for status in ERRORS if possible[status]]
    responses = {str(status): {"$ref": f"#/components/responses/{status}"} for status in statuses}
    if spec.conflicts:
        text = "The state of the product or order does not allow it."
        responses["409"] = describe_problem(text, [], *spec.conflicts)
    schemas = [VALIDATION_FAILED]
    if route.method == "POST":
        schemas.append(IDEMPOTENCY_KEY_REUSED)
    responses["422"] = describe_problem("The request is not valid.", [], *schemas)
    return dict(sorted(responses.items()))


PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><link rel="icon" href="data:,">
<meta name="viewport" content="width=device-width"><title>Shop</title><style>
:root { color-scheme: light dark }
* { box-sizing: border-box; min-width: 0; overflow-wrap: anywhere }
body { max-width: 76rem; margin: auto; padding: 1rem 1rem 5rem }
body, input, button { font: 1rem/1.6 system-ui, sans-serif }
code, pre, textarea { font: .9rem/1.55 ui-monospace, Menlo, Consolas, monospace }
small { opacity: .75; font-weight: 400 }
details { margin: .6rem 0; border: 1px solid #8886; border-radius: .5rem }
summary { padding: .8rem 1rem }
article { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr));
  gap: 0 3rem; padding: 0 1.2rem 1.2rem }
b, button { color: #fff; background: #1c5cc0 }
b { display: inline-block; width: 5em; border-radius: 4px; text-align: center; font-size: .8rem }
.POST { background: #17703f }
.PATCH { background: #8a4b00 }
.DELETE { background: #b3261e }
table { width: 100%; table-layout: fixed; border-collapse: collapse }
tr { border-top: 1px solid #8886; vertical-align: top }
th { width: 8.6rem; text-align: left }
th, td { padding: .5rem .5rem .5rem 0 }
th small { display: block }
pre, input, textarea, button { padding: .5rem .8rem; border: 0; border-radius: .5rem }
pre { max-height: 30rem; overflow: auto; white-space: pre-wrap; background: #8882 }
input, textarea { display: block; width: 100%; margin: .3rem 0; border: 1px solid gray }
#token { -webkit-text-security: disc }
p:empty, pre:empty { display: none }
</style><header><h1>Shop</h1>
<p>{{document["info"]["description"]}} <a href="{{base}}/openapi.json">OpenAPI document</a></p>
<label>Token <small>for every request below; forgotten when you leave the page</small>
<input id="token" autocomplete="off" spellcheck="false"></label></header><main>
% for tag, operations in groups.items():
<h2>{{tag.title()}}</h2>
% for path, verb, operation in operations:
% fields, body = show_body(operation.get("requestBody", {}))
% token = ' -H "Authorization: Bearer $TOKEN"' if operation["security"] else ""
<details id="{{operation["operationId"]}}"><summary><b class="{{verb}}">{{verb}}</b>
<code>{{path}}</code> {{operation["summary"]}} <small>{{"(token)" * bool(token)}}</small></summary>
<article><form data-method="{{verb}}" data-path="{{base + path}}" autocomplete="off">
<p>{{operation["description"].removeprefix(operation["summary"])}}</p><h4>Request</h4><table>
% for field in operation["parameters"] + fields:
<tr><th>{{field["name"]}} <small>{{field["in"]}}</small><td>{{explain(field)}}
% if field["in"] != "body":
<input name="{{field["name"]}}" aria-label="{{field["name"]}}" data-in="{{field["in"]}}"
  {{"required" if field["required"] else ""}}>
% end
% end
</table>
% if body:
<input type="hidden" name="Content-Type" data-in="header" value="application/json">
<label>Body
<textarea name="body" data-in="body" rows="9" spellcheck="false">{{body}}</textarea></label>
% end
<button>Send</button><pre role="status" tabindex="0"></pre></form>
<section><h4>With curl</h4><pre>curl -X {{verb}}{{token}} <span>http://localhost:8000</span>\
{{base + path.format(product_id=1, order_id=1)}}\
{{body and f" -H 'Content-Type: application/json' -d {shlex.quote(body)}"}}</pre>
<h4>Responses</h4><table>
% for status, response in operation["responses"].items():
<tr><th>{{status}} <td>{{resolve(response)["description"]}} <pre>{{show_body(response)[1]}}</pre>
% end
</table></section></article></details>
% end
% end
</main><script>
for (const host of document.querySelectorAll("pre>span")) host.innerText = location.origin;
async function send(form, token) {
  const given = { path: {}, query: {}, header: {}, body: {} };
  if (token) given.header.Authorization = `Bearer ${token}`;
  for (const { dataset, name, value } of form) if (value) given[dataset.in][name] = value;
  const path = form.dataset.path.replace(/{(.*?)}/g, (_, id) => encodeURIComponent(given.path[id]));
  const response = await fetch(`${path}?${new URLSearchParams(given.query)}`, {
    method: form.dataset.method, headers: given.header, body: given.body.body, cache: "no-store" });
  const headers = Array.from(response.headers, (pair) => pair.join(": "));
  let body = await response.text();
  try { body = JSON.stringify(JSON.parse(body), null, 2); } catch { /* not JSON */ }
  return [`${response.status} ${response.statusText}`, ...headers, "", body].join("\\n");
}
document.addEventListener("submit", (event) => {
  event.preventDefault();
  const show = (text) => { event.target.querySelector("pre").textContent = text; };
  send(event.target, document.getElementById("token").value).then(show, show);
});
</script>
"""
# The page loads nothing, and runs nothing but its own script.
STYLE_SOURCE, SCRIPT_SOURCE = (
    f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
    for text in re.findall("<(?:style|script)>(.*?)</", PAGE, re.DOTALL)
)
CONTENT_SECURITY_POLICY = (
    f"default-src 'none'; style-src {STYLE_SOURCE}; script-src {SCRIPT_SOURCE}; "
    "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


@functools.lru_cache(maxsize=16)
def render_page(script_name: str, secured: frozenset[str]) -> str:
    """The OpenAPI document as a page, with a form that sends each of its requests."""
    document = openapi_document(script_name, secured)
    groups: dict[str, list] = {tag: [] for tag in TAGS}
    for path, verbs in document["paths"].items():
        for verb, operation in verbs.items():
            groups[operation["tags"][0]].append((path, verb.upper(), operation))

    def resolve(node: dict) -> dict:
        if "$ref" not in node:
            return node
        _, _, kind, name = node["$ref"].split("/")
        return document["components"][kind][name]

    def show_body(part: dict) -> tuple[list, str]:
        """The fields and the example of a request or response; of several schemas, the first."""
        media: dict = next(iter(part.get("content", {}).values()), {"schema": {}})
        schema = resolve(media["schema"].get("oneOf", [media["schema"]])[0])
        examples = [json.dumps(example, indent=2) for example in schema.get("examples", [])]
        return list(body_fields(schema)), "".join(examples)

    def body_fields(schema: dict, prefix: str = ""):
        for name, field in schema.get("properties", {}).items():
            required = name in schema["required"]
            yield {"name": prefix + name, "in": "body", "required": required, "schema": field}
            yield from body_fields(resolve(field.get("items", {})), f"{prefix}{name}[].\u200b")

    helpers = {"show_body": show_body, "resolve": resolve, "explain": explain, "shlex": shlex}
    return bottle.template(PAGE, helpers, base=script_name, document=document, groups=groups)


def explain(field: dict) -> str:
    """What a parameter or field can be, such as: required integer, 1 to 1,000. Items per page."""
    schema = field["schema"] | field
    text = " or ".join(schema.get("enum") or [schema.get("type", "any")])
    for bound, unit in ("imum", ""), ("Length", " characters"), ("Items", " items"):
        if schema.get(f"max{bound}", db.MAX_ID) < db.MAX_ID:
            text += f", {schema.get(f'min{bound}', 0):,} to {schema[f'max{bound}']:,}{unit}"
    if field["required"]:
        text = f"required {text}"
    return f"{text}. {schema.get('description', '')}"


# ---------------------------------------------------------------------------------- configuration


class ConfigError(Exception):
    """A setting cannot be used."""


def shown(value: str) -> str:
    """The value, quoted for a message and cut to 100 characters."""
    text = repr(value[:101])
    return text if len(text) <= 100 else text[:99] + "…"


def read_database_url(name: str, url: str) -> str:
    path = url.removeprefix("sqlite:///")
    wanted = f"{name} must be sqlite:///FILE, or sqlite:////FILE for an absolute path"
    if path == url:
        # Only the scheme is shown: the URL of another database may have a password.
        scheme = re.match(r"[A-Za-z][A-Za-z0-9+.-]*(?=://)", url)
        raise ConfigError(f"{wanted}{f', not {shown(scheme[0])}' if scheme else ''}.")
    if path in ("", ":memory:") or re.search(r"[?#\0]", path):
        raise ConfigError(f"{wanted}, without ? and #, not {shown(url)}.")
    if os.path.isdir(path):
        raise ConfigError(f"{name} must be a file, not the directory {shown(path)}.")
    directory = os.path.dirname(path) or "."
    if not os.path.isdir(directory):
        raise ConfigError(f"{name}: there is no directory {shown(directory)}.")
    try:
        with contextlib.suppress(FileNotFoundError):  # db.py creates it
            os.lstat(path)
    except OSError as error:
        raise ConfigError(f"{name}: {error.strerror}: {shown(path)}.") from error
    return path


def read_port(name: str, text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 6 and int(text) < 65536):
        raise ConfigError(f"{name} must be a number up to 65535, not {shown(text)}.")
    return int(text)


def read_token(name: str, token: str) -> str:
    if not re.fullmatch(r"[!-~]+", token):
        raise ConfigError(f"{name} must be visible ASCII characters without blanks.")
    return token


def read_url_prefix(name: str, text: str) -> str:
    if not re.fullmatch(r"(/(?!\.{1,2}(/|$))[A-Za-z0-9._~-]+)*/?", text):
        example = "/shop, with only letters, digits and ._~- between slashes"
        raise ConfigError(f"{name} must be a path such as {example}, not {shown(text)}.")
    return text.removesuffix("/")


def read_proxy(name: str, text: str) -> str:
    try:
        return text if text == "*" else str(ipaddress.ip_address(text))
    except ValueError as error:
        raise ConfigError(f"{name} must be an IP address or *, not {shown(text)}.") from error


def read_origins(name: str, text: str) -> frozenset[str]:
    origins = set()
    for origin in text.replace(",", " ").split():
        try:
            origins.add(origin if origin == "*" else normalize_origin(origin))
        except ValueError as error:
            wanted = "* or origins such as https://shop.example or https://xn--strae-oqa.example"
            raise ConfigError(f"{name} must be {wanted}, not {shown(origin)}.") from error
    return frozenset(origins)


def normalize_origin(text: str) -> str:
    """An origin as browsers send it. Raises ValueError if no browser sends it.

    Python's codec implements IDNA 2003, browsers UTS 46. They agree on the hosts accepted here, for
    which lower case, composed letters (NFC) and Punycode are enough.
    """
    parts = urlsplit(text)
    origin = f"{parts.scheme}://{parts.netloc}"
    # The characters at the end are variation selectors newer than the codec, which browsers drop.
    never = "^(file|wss?):|@|:$|[\u180f\U000e0100-\U000e01ef]"
    host = unicodedata.normalize("NFC", parts.hostname or "")
    folded = unicodedata.normalize("NFKC", host.casefold())
    if text.lower() != origin.lower() or re.search(never, origin) or host != folded:
        raise ValueError
    encoded = f"[{ipaddress.IPv6Address(host)}]" if "[" in text else host.encode("idna").decode()
    is_same = host.isascii() or (host.isprintable() and encoded.encode().decode("idna") == host)
    if not is_same or not re.fullmatch(r"\[[0-9a-f:]+\]|[a-z0-9_.-]*[a-z0-9_-]\.?", encoded):
        raise ValueError
    if re.search(r"(^|\.)([0-9]+|0x[0-9a-f]*)\.?$", encoded):
        ipaddress.IPv4Address(encoded)  # browsers rewrite other numbers
    default_port = {"http": 80, "https": 443}.get(parts.scheme)
    port = "" if parts.port in (None, default_port) else f":{parts.port}"
    return f"{parts.scheme}://{encoded}{port}"


def read_minutes(name: str, text: str) -> float:
    if not re.fullmatch(r"[0-9]{1,8}(\.[0-9]{1,9})?", text) or float(text) == 0:
        raise ConfigError(f"{name} must be a number of minutes above 0, not {shown(text)}.")
    return float(text)


def read_flag(name: str, text: str) -> bool:
    flags = configparser.ConfigParser.BOOLEAN_STATES  # 1/0, yes/no, true/false, on/off
    if text.lower() not in flags:
        raise ConfigError(f"{name} must be true or false, not {shown(text)}.")
    return flags[text.lower()]


def setting(read: Callable[[str, str], Any], default: Any = None) -> Any:
    return dataclasses.field(default=default, metadata={"read": read})


@dataclasses.dataclass(frozen=True)
class Settings:
    """The settings of a shop, with the function that reads each and its default."""

    database: str = setting(read_database_url, "db.sqlite3")  # a path
    admin_token: str | None = setting(read_token)
    order_token: str | None = setting(read_token)
    cors_origins: frozenset[str] = setting(read_origins, frozenset())
    order_timeout: float | None = setting(read_minutes)  # minutes
    host: str = setting(lambda name, text: text, "127.0.0.1")
    port: int = setting(read_port, 8000)
    url_prefix: str = setting(read_url_prefix, "")  # or /shop
    trusted_proxy: str | None = setting(read_proxy)  # an IP address, or *
    debug: bool = setting(read_flag, False)
    access_log: bool = setting(read_flag, True)
    read_only: bool = setting(read_flag, False)
    litestream: bool = setting(read_flag, False)


def read_settings(environ: dict[str, str], **given: Any) -> Settings:
    """The settings given, and the others from an environment, where empty means not set."""
    for field in dataclasses.fields(Settings):
        name = "DATABASE_URL" if field.name == "database" else field.name.upper()
        if environ.get(name) and field.name not in given:
            given[field.name] = field.metadata["read"](name, environ[name])
    settings = Settings(**given)
    if settings.order_token and not settings.admin_token:
        raise ConfigError("ORDER_TOKEN needs ADMIN_TOKEN: without that, everything is open.")
    return settings


# A line that docker compose, systemd and a shell read alike: without a ~ or { that a shell expands,
# and without a backslash before a closing quote or at the end of the line.
ENV_LINE = re.compile(
    r"""
    (?! .* (?: [\r\0\ud800-\udfff] | \\ \Z ) )
    [ \t]* (?: \# .*
    | (?: export [ \t]+ (?! [^\s'"]* \{ ) )? (?P<name> [A-Za-z_][A-Za-z0-9_]* ) =
      (?: ' (?P<single> [^']* ) (?<! \\ ) '
      | " (?P<double> [^"$`\\]* ) "
      | (?P<bare> (?: [^\s'"$`\\;&|<>()~] | (?<! [=:] ) ~ )+ ) (?: [ \t]* [ ] \# .* )?
      )? [ \t]*
    )?
    """,
    re.VERBOSE,
)


def read_environment() -> dict[str, str]:
    """The environment, and what it does not set from a file .env in the working directory."""
    try:
        with open(".env", encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            lines = file.read().split("\n")
    except FileNotFoundError:
        lines = []
    except OSError as error:
        raise ConfigError(f"The file .env cannot be read: {error.strerror}.") from error
    values: dict[str, str] = {}
    for number, line in enumerate(lines, 1):
        match = ENV_LINE.fullmatch(line.removesuffix("\r"))
        if not match:
            # Nothing of the line is shown: it may be a secret.
            raise ConfigError(f"Line {number} of .env is not plain NAME=value, or NAME='value'.")
        if match["name"]:
            values[match["name"]] = match["single"] or match["double"] or match["bare"] or ""
    return values | os.environ


# ----------------------------------------------------------------------------------------- server
# waitress, with our own loop in place of its threads, which would compete with its main loop for
# the interpreter. A turn of the loop polls, computes the response to every request that has
# arrived, commits all writes at once, and only then responds. Reads that may take long run in one
# thread of waitress's. A test lists every internal of waitress that is used here.

MAX_HEADER = 16 << 10  # bytes of the head of a request
MAX_CACHE = 32 << 20  # bytes of responses
UNLIMITED = 1 << 40  # for limits of waitress that must never be reached
IDLE_TIMEOUT = 130  # seconds: longer than proxies keep idle connections open (Caddy: 120)
REQUEST_TIMEOUT = 30  # seconds from the first byte of a request to its last
LINGER_TIMEOUT = 5  # seconds that a client has to read the last response
LOCK_TIMEOUT = 5  # seconds that a write waits for another process
DRAIN_TIMEOUT = 4.5  # seconds that the requests under way have after a signal

# RFC 9112, 2.1 to 5. Each pattern takes linear time: no two neighbours can match the same byte.
TOKEN = rb"[!#$%&'*+.^_`|~0-9A-Za-z-]"
HOST = rb"(?:\[[0-9A-Fa-f:.]+\]|(?:[\w.~!$&'()*+;=-]|%[0-9A-Fa-f]{2})+)(?::[0-9]*)?"
TARGET = rb"(?:/|(?i:https?)://" + HOST + rb"(?=[/? ]))[^\x00-\x20\x7f#]*"
REQUEST_LINE = rb"%b+ %b HTTP/1\.[01]" % (TOKEN, TARGET)
FIELD = rb"\r\n%b+:[^\x00-\x08\x0a-\x1f\x7f]*" % TOKEN
HEAD = re.compile(rb"(?:%b(?:%b)*)?\r\n\r\n" % (REQUEST_LINE, FIELD))  # or an empty line
BEGINNING = re.compile(rb"(?:%b(?:[^\r\n]++|\r\n)*+)?\r?" % TOKEN)  # of an incomplete head
BLANKS = re.compile(rb"(\r\n%b+:)[ \t]{2,}" % TOKEN)
VALID_HOST = re.compile(f"(?:{HOST.decode()})?", re.ASCII)


def header_value(head: bytes, name: bytes) -> str | None:
    """The value of a header in the head of a request; of several, a list (RFC 9110, 5.3)."""
    values = re.findall(rb"\r\n%b:([^\r]*)" % name, head, re.IGNORECASE)
    return b",".join(values).decode("latin-1").strip(" \t") if values else None


class Response(NamedTuple):
    status: str  # three digits
    head: bytes  # without Date and "Connection: close"
    body: bytes
    is_last: bool  # the connection is closed after it


class Request(waitress.parser.HTTPRequestParser):
    """A request as waitress reads it, after a stricter check of its head."""

    raw = b""  # its head
    response: Any = None  # its Response, once that has been computed
    channel: "Channel"  # once it is complete
    received_at: float  # likewise; by time.perf_counter()

    @property
    def is_write(self):
        return not self.error and self.raw.startswith((b"POST ", b"PATCH ", b"DELETE "))

    def received(self, data):
        if not self.headers_finished:
            text = self.header_plus + data
            head, end, _ = text.partition(b"\r\n\r\n")
            self.raw = head.removeprefix(b"\r\n") + end
            valid = HEAD if end else BEGINNING
            if not valid.fullmatch(self.raw) or text.startswith(b"\r\n" * 9):
                hint = "then headers such as Name: value; end each line with CRLF"
                self.error = BadRequest(f"Send METHOD /path HTTP/1.1, {hint}.")
                self.completed = True
                return len(data)
        consumed = super().received(data)
        if self.error or self.body_rcv is None:
            self.expect_continue = False  # or waitress would wait for a body
        return consumed

    def parse_header(self, header_plus):
        # waitress rejects a target with bytes above 0x7f, which curl sends, and takes quadratic
        # time for blanks before a value.
        end = header_plus.index(b"\r\n")
        line = quote(header_plus[:end], safe=string.printable).encode()
        fields = BLANKS.sub(rb"\1", header_plus[end:])
        try:
            super().parse_header(line + fields)
        except (ValueError, TransferEncodingNotImplemented) as error:
            raise ParsingError("The target, a length or a transfer coding is invalid.") from error
        host = self.headers.get("HOST", "" if self.version == "1.0" else None)
        if host is None or not VALID_HOST.fullmatch(host):  # RFC 9112, 3.2
            raise ParsingError("HTTP/1.1 needs exactly one valid Host header.")
        coding = header_value(header_plus, b"Transfer-Encoding")
        has_length = self.version == "1.0" or "CONTENT_LENGTH" in self.headers
        if coding is not None and (has_length or coding.lower() != "chunked"):
            raise ParsingError("Ambiguous message length.")  # RFC 9112, 6.1 and 6.3
        if "close" in self.headers.get("CONNECTION", "").lower():
            self.connection_close = True
        if self.content_length > MAX_BODY:  # waitress's limit has room for the framing of chunks
            self.content_length = UNLIMITED

    def set_response(self, status, headers, body):
        lines = [f"HTTP/1.1 {status}", *map(": ".join, headers), ""]
        is_last = bool(self.error or self.connection_close)
        if self.version == "1.0" and not is_last:
            lines.insert(1, "Connection: keep-alive")
        self.response = Response(status[:3], "\r\n".join(lines).encode("latin-1"), body, is_last)


class Task(waitress.task.WSGITask):
    """Sends the response that has been computed to a request."""

    def execute(self):
        request, loop = self.request, self.channel.server.task_dispatcher
        if not request.response:  # waitress reports a fault while sending the first one
            loop.reject(request)
        _, head, body, is_last = request.response
        self.close_on_finish = is_last or (loop.stopped_at and len(self.channel.requests) == 1)
        self.wrote_header = True  # or waitress would write its own
        close = b"Connection: close\r\n" if self.close_on_finish else b""
        self.channel.write_soon(b"%b%b%b\r\n%b" % (head, loop.date, close, body))


class Channel(waitress.channel.HTTPChannel):
    """A connection."""

    parser_class = Request
    task_class = error_task_class = Task
    # Urgent data is not HTTP, and poll would keep reporting it.
    handle_expt = waitress.channel.HTTPChannel.handle_close
    deadline = 0.0  # of the monotonic clock: the connection is then closed
    is_lingering = False  # closed for writing, but read until the client closes it too

    def handle_read(self):
        request = self.request
        super().handle_read()
        if not (self.request or self.is_lingering):
            self.deadline = time.monotonic() + IDLE_TIMEOUT
        elif self.request is not request:
            self.deadline = time.monotonic() + REQUEST_TIMEOUT

    def received(self, data):
        if self.is_lingering:
            return False
        loop = self.server.task_dispatcher
        if self.request or self.requests or data not in loop.cache:
            return super().received(data)
        # A request whose response is in the cache need not be parsed.
        self.requests.append(Request(self.adj))
        self.requests[0].raw = data
        loop.add_task(self)
        return True

    def write_soon(self, data):
        # waitress's buffers are only needed for what the socket does not take at once.
        sent = 0 if self.total_outbufs_len else self.send(data, do_close=False)
        return sent + super().write_soon(data[sent:])

    def handle_write(self):
        self.deadline = time.monotonic() + IDLE_TIMEOUT
        is_last = self.close_when_flushed
        self.close_when_flushed = False  # or waitress would close it without lingering
        super().handle_write()
        if self.total_outbufs_len:
            self.close_when_flushed = is_last
        elif is_last and self.connected:
            # Closing at once would reset the connection of a client that still sends: it could
            # not read the response (RFC 9112, 9.6).
            self.is_lingering = True
            self.deadline = time.monotonic() + LINGER_TIMEOUT
            with contextlib.suppress(OSError):
                self.socket.shutdown(socket.SHUT_WR)
        elif self.requests:
            self.server.add_task(self)


class Server(waitress.server.TcpWSGIServer):
    """A listening socket."""

    channel_class = Channel

    def handle_accept(self):
        # waitress accepts one connection a poll, so that a burst of clients would wait long.
        before = -1
        while before < len(self.active_channels) and len(self._map) < self.adj.connection_limit:
            before = len(self.active_channels)
            super().handle_accept()

    def pull_trigger(self):
        """Do nothing: after each response it would wake the loop, which is the one that sends."""


class Loop:
    """Serves an application until a signal ends it: waitress's loop and task dispatcher in one."""

    def __init__(self, app: Application, settings: Settings):
        self.app = app
        self.store = app.store
        self.settings = settings
        self.map: dict[int, Any] = {}  # waitress's sockets by descriptor
        self.ready: collections.deque[Request] = collections.deque()  # to be answered in a turn
        self.cache: dict[bytes, Response] = {}  # by the bytes of the request
        self.cache_size = 0  # bytes
        self.cache_version: object = None  # the version of the data in it
        self.is_locked = False  # another process has the write lock, and writes wait for it
        self.stopped_at = 0.0  # when the first signal came
        self.next_check = 0.0  # when the next check_each_second() is due
        self.date = b""
        adj = waitress.adjustments.Adjustments(
            host=settings.host,
            port=settings.port,
            url_prefix=settings.url_prefix,
            connection_limit=allow_connections(),
            recv_bytes=2 << 10,  # bounds what chunks of one byte cost a turn
            max_request_header_size=MAX_HEADER + 1,
            max_request_body_size=2 * MAX_BODY,  # with the framing of chunks: see read_body()
            outbuf_overflow=UNLIMITED,
            outbuf_high_watermark=UNLIMITED,  # above it waitress would block the loop
            channel_timeout=UNLIMITED,  # the wall clock may be set: see Channel.deadline
            log_socket_errors=False,
        )
        options = {"map": self.map, "dispatcher": self, "adj": adj}
        self.servers = [Server(app, sockinfo=sockinfo, **options) for sockinfo in adj.listen]
        waitress.task.queue_logger.disabled = True  # it warns whenever a slow read has to wait
        self.thread = waitress.task.ThreadedTaskDispatcher()
        self.thread.set_thread_count(1)
        for number in signal.SIGTERM, signal.SIGINT, signal.SIGHUP:
            signal.signal(number, self.stop)

    def channels(self) -> list[Channel]:
        return [c for server in self.servers for c in server.active_channels.values()]

    def add_task(self, channel: Channel) -> None:
        # While a response is still being sent, the next one waits: see Channel.handle_write().
        if not channel.total_outbufs_len:
            request = channel.requests[0]
            request.channel, request.received_at = channel, time.perf_counter()
            self.ready.append(request)

    def run(self) -> None:
        sys.setswitchinterval(0.0005)  # seconds, after which a slow read lets the loop run
        while not self.stopped_at or self.drain():
            pause = 1.0
            if self.is_locked or self.stopped_at:
                pause = 0.01
            elif self.ready or not self.next_check:
                pause = 0.0
            waitress.wasyncore.poll2(pause, self.map)
            count = 0
            while count < len(self.ready) and self.ready[-1].is_write:
                count = len(self.ready)  # writes that arrive during the poll share the commit
                waitress.wasyncore.poll2(0, self.map)
            try:
                self.take_turn()
                self.check_each_second()
            except Exception:  # a fault in one turn does not end the process
                traceback.print_exc()
        self.thread.shutdown(cancel_pending=False, timeout=1)
        waitress.wasyncore.close_all(self.map)

    def take_turn(self) -> None:
        """Compute the responses to all requests that have arrived, then send them."""
        requests = [self.ready.popleft() for _ in range(len(self.ready))]
        requests = [request for request in requests if request.channel.connected]
        if not requests:
            return
        self.date = f"Date: {build_http_date(time.time())}\r\n".encode()
        try:
            version = self.store.data_version()
            if version is None or version != self.cache_version or self.cache_size > MAX_CACHE:
                self.cache = {}  # a new one, because a slow read may still add to the old one
                self.cache_size = 0
                self.cache_version = version
            for request in requests:
                request.response = request.response or self.cache.get(request.raw)
            self.compute([request for request in requests if not request.response])
        except Exception as error:
            problem = problem_for(error)
            for request in requests:
                self.reject(request, problem)
        stamp = db.timestamp()
        lines = []
        for request in requests:
            if request.response:
                lines.append(self.access_line(stamp, request))
                request.channel.service()
            elif not request.is_write:
                read = functools.partial(self.read_slowly, request, self.cache)
                self.thread.add_task(types.SimpleNamespace(service=read))
        if self.settings.access_log:
            write_log("".join(lines))

    def compute(self, requests: list[Request]) -> None:
        """Compute the responses to requests; writes share one commit."""
        writes = sum(request.is_write for request in requests)
        self.is_locked = False
        try:
            with self.store.batch() if writes else contextlib.nullcontext():
                for request in requests:
                    self.compute_one(request, self.cache)
            return
        except db.DatabaseUnavailable as error:
            failure = error
        # Each write is tried again by itself, unless it might then be done twice.
        is_retried = writes > 1 and not isinstance(failure, db.OutcomeUnknown)
        is_busy = isinstance(failure, db.DatabaseBusy) and not self.stopped_at
        for request in requests:
            waited = time.perf_counter() - request.received_at
            if request.is_write and is_busy and waited < LOCK_TIMEOUT:
                self.is_locked = True
                self.ready.append(request)
            elif not request.response or (request.is_write and is_retried):
                self.compute_one(request, self.cache)
            elif request.is_write and request.response.status < "400":
                self.reject(request, unavailable(failure))

    def compute_one(self, request: Request, cache: dict, *, in_thread: bool = False) -> None:
        """Compute the response to a request, but leave a slow read to the thread."""
        if not (request.headers_finished or request.error):
            request.received(request.raw)  # its response was in a cache that has been replaced
        if request.error:
            self.reject(request)
            return
        started: list = []
        try:
            environ = Task(request.channel, request).get_environment()
            if request.path.startswith("//"):  # waitress makes one slash of them
                environ["PATH_INFO"] = request.path
            if not (in_thread or request.is_write) and self.app.is_slow(environ):
                return
            environ["wsgi.input"].seek(0)  # a write may be computed a second time
            body = b"".join(self.app(environ, lambda *start: started.append(start)))
            status, headers, *_ = started[-1]
            request.set_response(status, headers, body)
            if "Etag" in dict(headers) and not (request.is_write or request.body_rcv):
                cache[request.raw] = request.response
                self.cache_size += len(request.raw) + len(request.response.head) + len(body)
        except Exception as error:
            self.reject(request, problem_for(error))

    def read_slowly(self, request: Request, cache: dict) -> None:
        request.response = cache.get(request.raw)  # of an equal read before it
        if request.channel.connected and not request.response:
            self.compute_one(request, cache, in_thread=True)
        self.ready.append(request)
        self.servers[0].trigger.pull_trigger()

    def reject(self, request: Request, problem: Problem | None = None) -> None:
        """Set the response to a problem; None means the error that the parser has found."""
        error = request.error
        messages = {413: TOO_LARGE, 431: f"The headers may have at most {MAX_HEADER} bytes."}
        problem = problem or Problem(error.code, messages.get(error.code, error.body))
        length = ("Content-Length", str(len(problem.body)))
        environ = {"HTTP_ORIGIN": header_value(request.raw, b"Origin")}
        headers = self.app.allow_origin(environ, [*problem.headerlist, length])
        body = b"" if request.raw.startswith(b"HEAD ") else problem.body  # RFC 9110, 9.3.2
        request.set_response(problem.status_line, headers, body)

    def access_line(self, stamp: str, request: Request) -> str:
        client = request.channel.addr[0]
        if self.settings.trusted_proxy in ("*", client):
            addresses = header_value(request.raw, b"X-Forwarded-For") or ""
            last = addresses.rpartition(",")[2].strip(" \t")
            with contextlib.suppress(ValueError):  # not an address, or with a zone (any text)
                client = str(ipaddress.ip_address(last.replace("%", " ")))
        method = target = "-"
        if not request.error:
            method, target, _ = request.raw.decode("latin-1").split(" ", 2)
        path = target.partition("?")[0]
        if not path.isascii():
            path = quote(path, safe=string.punctuation, encoding="latin-1")
        result = f"{request.response.status} {len(request.response.body)}"
        milliseconds = (time.perf_counter() - request.received_at) * 1000
        return f"{stamp} {client} {method} {path} {result} {milliseconds:.1f}\n"

    def check_each_second(self) -> None:
        """Check the WAL, the deadlines of connections, and for orders pending too long."""
        now = time.monotonic()
        if now < self.next_check:
            return
        self.next_check = now + 1
        self.store.checkpoint_if_large()
        for channel in self.channels():
            channel.deadline = channel.deadline or now + IDLE_TIMEOUT  # a new connection
            # One with requests and nothing to send waits for the lock or for a slow read.
            if channel.deadline < now and (channel.total_outbufs_len or not channel.requests):
                channel.handle_close()
        if self.settings.order_timeout and not self.settings.read_only:
            with contextlib.suppress(db.DatabaseUnavailable):  # the next try is a second later
                if self.store.expire_orders(db.timestamp(self.settings.order_timeout * 60)):
                    self.next_check = 0.0  # more orders may be due: go on after the next turn

    def stop(self, number: int, frame) -> None:
        if not self.stopped_at:  # at a later signal the trigger may be closed
            self.stopped_at = time.monotonic()
            self.servers[0].trigger.pull_trigger()

    def drain(self) -> bool:
        """Accept no more connections, end those without a request; return whether any are left."""
        for server in self.servers:
            if server.accepting:
                server.handle_accept()  # a client that has connected may have sent a request
                waitress.wasyncore.dispatcher.close(server)
                return True
        is_late = time.monotonic() > self.stopped_at + DRAIN_TIMEOUT
        for channel in self.channels():
            has_work = channel.requests or channel.request or channel.total_outbufs_len
            if is_late or not (has_work or channel.is_lingering):
                channel.handle_close()
        return bool(self.channels())


def write_log(text: str) -> None:
    """Write to standard output what it takes at once: a full pipe must not stop the shop."""
    lines = text.encode()
    with contextlib.suppress(OSError):
        while lines and sys.stdout and select.select([], [sys.stdout], [], 0)[1]:
            # A pipe that is ready takes PIPE_BUF bytes without blocking. Whole lines, if they fit.
            end = lines.rfind(b"\n", 0, select.PIPE_BUF) + 1 or select.PIPE_BUF
            os.write(sys.stdout.fileno(), lines[:end])
            lines = lines[end:]


def allow_connections() -> int:
    """Raise the limit of open files as far as allowed; return how many connections it admits."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    files = 1 << 16 if hard == resource.RLIM_INFINITY else min(hard, 1 << 16)
    resource.setrlimit(resource.RLIMIT_NOFILE, (files, hard))
    return max(files - 64, 16)


# ----------------------------------------------------------------------------------- command line

COMMAND_LOCK_TIMEOUT = 4.5  # seconds to wait for another process: once to open, once to write


class Parser(argparse.ArgumentParser):
    """A parser that reports an error in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"shop: {' '.join(message.split())[:150]}; see {self.prog} --help\n")


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    epilog = "Settings come from the environment and from a file .env: see .env.example."
    parser = Parser(prog="python shop.py", epilog=epilog, allow_abbrev=False)
    version = f"shop {VERSION}, Python {sys.version.split()[0]}, SQLite {db.SQLITE_VERSION}"
    parser.add_argument("--version", action="version", version=version)
    commands = parser.add_subparsers(title="commands", dest="command", metavar="COMMAND")
    parser.set_defaults(command="serve", run=run_serve)

    def add_command(name: str, run: Callable, text: str, usage: str = "") -> Parser:
        command = commands.add_parser(name, usage=f"%(prog)s {usage}", help=text, description=text)
        command.allow_abbrev = False
        command.set_defaults(run=run)
        if usage:
            command.add_argument("file", nargs="?", help=argparse.SUPPRESS)
        return command

    add_command("serve", run_serve, "serve the shop until SIGTERM or SIGINT (the default)")
    text = "copy the database to FILE while it is in use"
    command = add_command("backup", run_backup, text, "FILE [--overwrite]")
    command.add_argument("--overwrite", action="store_true", help="replace an existing file")
    add_command("check", run_check, "check FILE, or the database of DATABASE_URL", "[FILE]")
    text = "add and change products from a CSV file, or from standard input (-)"
    command = add_command("import", run_import, text, "FILE.csv [--stock]")
    command.add_argument("--stock", action="store_true", help="also set existing products' stock")
    text = "write all products for import, or all lines of orders, to FILE.csv or standard output"
    usage = "[--orders] [FILE.csv] [--from DAY] [--to DAY]"
    command = add_command("export", run_export, text, usage)
    command.add_argument("--orders", action="store_true", help="write a row for each order line")
    for option, name in ("--from", "first_day"), ("--to", "last_day"):
        command.add_argument(option, dest=name, type=day, metavar="DAY", help="YYYY-MM-DD (UTC)")
    add_command("expire", run_expire, "cancel pending orders older than ORDER_TIMEOUT")

    options = parser.parse_args(arguments)
    command = commands.choices[options.command]
    file = getattr(options, "file", None)
    if file and re.match("-.", file):  # argparse takes -1 and "-x y" as files
        command.error(f"unrecognized arguments: {file}")
    # argparse would report a missing file rather than an unknown option.
    if options.command in ("backup", "import") and file is None:
        command.error(f"{options.command} needs a file")
    has_days = options.command == "export" and (options.first_day or options.last_day)
    if has_days and not options.orders:
        command.error("--from and --to need --orders")
    return options


def day(text: str) -> str:
    """A day written as YYYY-MM-DD. Raises ValueError."""
    if datetime.date.fromisoformat(text).isoformat() != text:
        raise ValueError
    return text


def main(arguments: list[str]) -> int:
    """Run a command; return the exit status."""
    for stream in filter(None, (sys.stdout, sys.stderr)):  # None: closed by the caller
        stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    options = parse_arguments(arguments)
    try:
        return options.run(read_settings(read_environment()), options)
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except BrokenPipeError:
        return 1  # nobody reads the rest of the output
    except OSError as error:
        if "file" not in options:
            raise
        lines = [f"{options.file or 'standard output'}: {error.strerror}."]
    except (SpreadsheetError, db.NotFound, db.DuplicateSku, db.ExcessiveMetadata) as error:
        # Those of db.py: somebody has changed a product since the rows were checked.
        lines = [f"{options.file}: {fault}" for fault in error.args]
        lines[-1] += " Nothing has been imported."
    except (ConfigError, db.DatabaseError, db.DatabaseUnavailable) as error:
        lines = [str(error)]
    for line in lines:
        print(f"shop: {' '.join(line.split())}", file=sys.stderr)
    return 2 if options.run is run_serve else 1


def run_serve(settings: Settings, options: argparse.Namespace) -> int:
    # The loop itself waits for the lock, and serves reads meanwhile.
    app = open_application(settings, lock_timeout=0)
    try:
        loop = Loop(app, settings)
    except (OSError, ValueError) as error:  # of the listening socket
        reason = getattr(error, "strerror", None) or "there is no such host"
        address = f"HOST {shown(settings.host)}, PORT {settings.port}"
        raise ConfigError(f"cannot listen on {address}: {reason}.") from error
    host, port = loop.servers[0].effective_host, loop.servers[0].effective_port
    host = f"[{host}]" if ":" in host else host
    print(f"Serving http://{host}:{port}/ from {app.store.path}", flush=True)
    if not settings.admin_token:
        print("ADMIN_TOKEN is not set: everything is open to everyone.", flush=True)
    loop.run()
    app.close()
    return 0


def run_backup(settings: Settings, options: argparse.Namespace) -> int:
    def show_progress(remaining: int, total: int) -> None:
        if sys.stderr.isatty():
            print(f"\r{remaining} of {total} pages left", end="\r", file=sys.stderr)

    copy = db.backup(
        settings.database, options.file, overwrite=options.overwrite, progress=show_progress
    )
    counts = f"{copy['products']} products, {copy['orders']} orders, {copy['bytes']} bytes"
    print(f"{options.file}: {counts}")
    return 0


def run_check(settings: Settings, options: argparse.Namespace) -> int:
    file = options.file or settings.database
    errors = db.check_integrity(file)
    for line in errors or ["sound"]:
        print(f"{file}: {line}")
    return 1 if errors else 0


def run_expire(settings: Settings, options: argparse.Namespace) -> int:
    if settings.order_timeout is None:
        raise ConfigError("ORDER_TIMEOUT is not set: no order expires.")
    cancelled = 0
    before = db.timestamp(settings.order_timeout * 60)
    with contextlib.closing(open_store(settings, COMMAND_LOCK_TIMEOUT)) as store:
        while portion := store.expire_orders(before):
            cancelled += portion
    print(f"{cancelled} orders cancelled")
    return 0


# Spreadsheets: tables with a header line, as spreadsheet programs save them in any country.

COLUMNS = ["id", "sku", *(name for name in PRODUCT_FIELDS if name not in ("sku", "metadata"))]
COLUMN = re.compile(rf"{'|'.join(COLUMNS)}|metadata\.[A-Za-z0-9_-]{{1,40}}")
ORDER_COLUMNS = ["order_id", "created_at", "status", "reference"]
ORDER_COLUMNS += ["product_id", "sku", "name", "price", "quantity", "amount"]


class SpreadsheetError(Exception):
    """A spreadsheet cannot be imported; each argument is one error."""


def run_import(settings: Settings, options: argparse.Namespace) -> int:
    with open(0 if options.file == "-" else options.file, "rb") as file:
        data = file.read()
    with contextlib.closing(open_store(settings, COMMAND_LOCK_TIMEOUT)) as store:
        # Every row is checked first: the lock is held only while writing.
        rows, differing = read_rows(data, store, options.stock)
        added, changed, unchanged = store.import_products(rows)
    if differing:
        stocks = f"the stock of {differing} product{'s' if differing > 1 else ''} differs"
        print(f"shop: {options.file}: {stocks}: --stock would change it.", file=sys.stderr)
    print(f"{options.file}: {added} products added, {changed} changed, {unchanged} unchanged")
    return 0


def read_table(data: bytes) -> Iterator[tuple[int, dict[str, str]]]:
    """Each row that is not empty: the number of its first line, and its cells by column.

    A value in a column without a name has the key "". Raises SpreadsheetError.
    """
    encoding = "utf-16" if data.startswith((b"\xff\xfe", b"\xfe\xff")) else "utf-8-sig"
    columns: list[str] = []
    line = 1
    try:
        text = data.decode(encoding)
        lines = io.StringIO(text, newline="")
        first = next((row for row in lines if re.search(r'[^\s,;"]', row)), "")
        if first.lstrip().startswith(("PK\3\4", "<")) or "\0" in first:
            raise UnicodeError  # a ZIP file, HTML or XML, or UTF-16 without a byte order mark
        hint = re.fullmatch(r'[\s"]*sep=([,;\t])[\s,;"]*', first, re.IGNORECASE)
        separator = hint[1] if hint else max(",;\t", key=first.count)
        # The reader accepts no white space before or after a cell in quotes.
        blanks = rf"(?:(?![{separator}\r\n])\s)*"
        quoted = rf'(^|[{separator}\r\n]){blanks}("(?:[^"]|"")*"){blanks}(?=[{separator}\r\n]|\Z)'
        source = io.StringIO(re.sub(quoted, r"\1\2", text), newline="")
        # Strict, because otherwise a quote that is never closed takes in the rest of the file.
        reader = csv.reader(source, delimiter=separator, strict=True)
        for cells in reader:
            cells = [cell.strip() for cell in cells]
            if columns and any(cells):
                pairs = itertools.zip_longest(columns, cells, fillvalue="")
                yield line, dict(pair for pair in pairs if any(pair))
            elif hint and any(cells):
                hint = None  # this row is sep=
            elif any(cells):
                columns = read_header(cells, line)
            line = reader.line_num + 1
    except csv.Error as error:
        raise SpreadsheetError(f"line {line}: {error}; the rest has not been checked.") from error
    except UnicodeError as error:
        kind = "this is a workbook, a web page or text in another encoding"
        raise SpreadsheetError(f"{kind}: save it as CSV UTF-8.") from error
    if not columns:
        raise SpreadsheetError("there is no header line.")


def read_header(cells: list[str], line: int) -> list[str]:
    columns: list[str] = []
    for cell in cells:
        kind, dot, name = cell.partition(".")
        column = kind.lower() + dot + name
        if column and (not COLUMN.fullmatch(column) or column in columns):
            known = f"{', '.join(COLUMNS)} and metadata.NAME, each once"
            raise SpreadsheetError(f"line {line}: the header can name {known}, not {shown(cell)}.")
        columns.append(column)
    return columns


def read_rows(data: bytes, store: db.Store, with_stock: bool) -> tuple[list[dict], int]:
    """The rows for import_products(), and in how many the stock differs but is not to be set.

    Raises SpreadsheetError with the errors of all lines.
    """
    by_id = {str(product["id"]): product for product in store.export_products()}
    by_sku = {product["sku"]: product for product in by_id.values() if product["sku"]}
    skus = set(by_sku)  # those in use after the rows so far
    lines: dict[int, int] = {}  # the line of each product
    validators = compile_schema(NEW_PRODUCT), compile_schema(PRODUCT_UPDATE)
    rows = []
    errors: list[str] = []
    differing = 0
    try:
        for line, cells in read_table(data):
            id_text = cells.pop("id", "")
            product = by_sku.get(cells.get("sku", ""))
            if id_text:
                product = by_id.get(id_text.lstrip("0"))
            row, faults = read_row(cells, product, validators[bool(id_text or product)])
            if id_text and not product:
                faults.append(f"there is no product with id {shown(id_text)}")
            if product and "sku" in row:
                skus.discard(product["sku"])
            if row.get("sku"):
                if row["sku"] in skus:
                    faults.append(f"another product or row has sku {shown(row['sku'])}")
                skus.add(row["sku"])
            if product:
                row["id"] = product["id"]
                first = lines.setdefault(product["id"], line)
                if first != line:
                    faults.append(f"line {first} also changes product {product['id']}")
                if not with_stock:
                    differing += row.pop("stock", product["stock"]) != product["stock"]
            rows.append(row)
            errors += [f"line {line}: {fault}." for fault in faults]
            if line % 10_000 == 0 and sys.stderr.isatty():
                print(f"\r{line} lines checked", end="\r", file=sys.stderr)
    except SpreadsheetError as error:
        errors += error.args
    if errors:
        raise SpreadsheetError(*errors)
    return rows, differing


def read_row(cells: dict, product: dict | None, validator: Validator) -> tuple[dict, list[str]]:
    """The fields of a new product, or those to change in this one; and what is wrong with them."""
    exported = to_cells(product) if product else {}
    fields: dict[str, Any] = {}
    for column, cell in cells.items():
        kind, _, name = column.partition(".")
        if cell == str(exported.get(column, "")).strip() or (kind == "stock" and not cell):
            continue
        if name:
            fields.setdefault("metadata", {})[name] = cell or None
        elif kind in ("price", "stock"):
            fields[kind] = read_number(cell)
        else:
            fields[kind] = cell
    faults = []
    if "" in fields:
        faults.append(f"a column without a name has the value {shown(fields.pop(''))}")
    row: dict[str, Any] = {}
    try:
        row = validate(fields, validator) if fields else {}
        db.merge(product or db.PRODUCT_DEFAULTS, row)
    except db.ExcessiveMetadata as error:
        faults.append(f"metadata {error}")
    except ValidationError as error:
        for path, message in error.errors:
            column = ".".join(path)
            value = f": {shown(cells[column])}" if column in cells else ""
            faults.append(f"{column} {message}{value}")
    return row, faults


def read_number(text: str) -> Decimal | str:
    """The number, or else the text for the validator to reject: 1,299 could be two numbers."""
    if re.fullmatch(r"-?[0-9]+([.,][0-9]{1,2})?", text):
        return Decimal(text.replace(",", "."))
    return text


def run_export(settings: Settings, options: argparse.Namespace) -> int:
    store = open_store(dataclasses.replace(settings, read_only=True), COMMAND_LOCK_TIMEOUT)
    if options.orders:
        columns = ORDER_COLUMNS
        rows = store.export_order_lines(options.first_day, options.last_day)
    else:
        products = list(store.export_products())
        names = {f"metadata.{name}" for product in products for name in product["metadata"]}
        columns = COLUMNS + sorted(names)
        rows = iter(products)
    # Not sys.stdout, whose encoding is the terminal's.
    target = 1 if options.file in (None, "-") else options.file
    with open(target, "w", encoding="utf-8", newline="", closefd=target != 1) as file:
        # Lines end as in RFC 4180. With a bare LF, Python before 3.13 does not quote a CR.
        writer = csv.DictWriter(file, columns, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(map(to_cells, rows))
    return 0


def to_cells(item: dict) -> dict[str, Any]:
    """The cells, by column, of a product or a line of an order."""
    cells = item | {f"metadata.{name}": text for name, text in item.get("metadata", {}).items()}
    if "quantity" in item:
        cells["amount"] = item["price"] * item["quantity"]
    for name in cells.keys() & {"price", "amount"}:
        cells[name] = f"{cells[name] // 100}.{cells[name] % 100:02}"
    return cells


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
