# mypy: disable-error-code="import-untyped"
"""The shop over HTTP: products, their stock, and orders that take from it, all or nothing.

This file is HTTP: schemas, routes, the application, the server, the command line. Every SQL
statement is in db.py, the tables are in schema.sql.

    python shop.py                 serve on http://127.0.0.1:8000
    python shop.py --help          what else it does

    app = shop.create_app("sqlite:///db.sqlite3")   a WSGI application for any server

A request from socket to SQL:

    1 Channel.handle_read          its bytes come in and are parsed
    2 Loop.serve_batch             it is served with all that have come in meanwhile
    3 Application.__call__         Bottle finds its route
    4 Plugin.respond               it is authorized, read and validated
    5 create_order, for instance   its route: read, call, answer
    6 Store.create_order           SQL
"""

import collections
import contextlib
import decimal
import functools
import hashlib
import hmac
import http.client
import inspect
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
from collections.abc import Callable
from decimal import Decimal
from typing import Any, NamedTuple
from urllib.parse import parse_qsl, quote, urlencode

if sys.version_info < (3, 11):  # noqa: UP036
    raise SystemExit("shop: Python 3.11 or later is needed, this is " + sys.version.split()[0])

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
MAX_ERRORS = 300  # of one response: what 100 lines of an order can have
RETRY_AFTER = "1"  # seconds


# ---------------------------------------------------------------------------------------- schemas
# What a valid request and response is, as JSON Schema. Validation, its messages and /openapi.json
# all read it. Four keywords are the shop's own, and /openapi.json leaves them out: `decimals` that
# a number may have (it is validated into whole hundredths), `unique_by` a field of an array's
# items, `default` of an absent field, and `message` for a pattern that does not match.


def object_schema(required: str = "", /, **properties: dict) -> dict:
    return {
        "type": "object",
        "properties": properties,
        "required": required.split(),
        "additionalProperties": False,
    }


# Unicode's White_Space, spelled out because \s means something else in every dialect.
WHITE_SPACE = r"\t-\r \u0085\u00a0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"

ID = {"type": "integer", "minimum": 1, "maximum": 10**18 - 1}
TEXT = {"type": "string", "pattern": r"^[^\u0000]*$", "message": "must be text without NUL"}
NAME = {
    "type": "string",
    "minLength": 1,
    "maxLength": 200,
    "pattern": rf"^[^\u0000]*[^\u0000{WHITE_SPACE}][^\u0000]*$",
    "message": "must be text, not only white space, without NUL",
}
DESCRIPTION = TEXT | {"maxLength": 10_000}
PRICE = {"type": "number", "minimum": 0, "maximum": 1_000_000, "decimals": 2}
STOCK = {"type": "integer", "minimum": 0, "maximum": db.MAX_STOCK}
CHANGE = {"type": "integer", "minimum": -db.MAX_STOCK, "maximum": db.MAX_STOCK}
QUANTITY = {"type": "integer", "minimum": 1, "maximum": 100_000}
STATUS = {"type": "string", "enum": ["pending", "completed", "cancelled"]}
NEW_STATUS = {"type": "string", "enum": ["completed", "cancelled"]}
TOTAL = {"type": "number", "minimum": 0, "maximum": 10**13, "decimals": 2}
TIME = {"type": "string", "format": "date-time", "pattern": "Z$"}
NEXT = {"type": ["string", "null"], "description": "The URL of the next page."}

PRODUCT = object_schema(
    "id name description price stock",
    id=ID,
    name=NAME,
    description=DESCRIPTION,
    price=PRICE,
    stock=STOCK,
)
NEW_PRODUCT = object_schema(
    "name price",
    name=NAME,
    description=DESCRIPTION | {"default": ""},
    price=PRICE,
    stock=STOCK | {"default": 0},
)
PRODUCT_UPDATE = object_schema(
    name=NAME,
    description=DESCRIPTION,
    price=PRICE,
    stock=STOCK,
) | {"minProperties": 1}
STOCK_UPDATE = object_schema("change", change=CHANGE)
PRODUCTS = object_schema("products next", products={"type": "array", "items": PRODUCT}, next=NEXT)

NEW_LINE = object_schema("product_id quantity", product_id=ID, quantity=QUANTITY)
LINE = object_schema(
    "product_id name price quantity",
    product_id=ID,
    name=NAME,
    price=PRICE,
    quantity=QUANTITY,
)
LINES = {"type": "array", "minItems": 1, "maxItems": 100}
ORDER = object_schema(
    "id status total_price created_at products",
    id=ID,
    status=STATUS,
    total_price=TOTAL,
    created_at=TIME,
    products=LINES | {"items": LINE},
)
NEW_ORDER = object_schema(
    "products",
    products=LINES | {"items": NEW_LINE, "unique_by": "product_id"},
)
ORDER_UPDATE = object_schema("status", status=NEW_STATUS)
ORDERS = object_schema("orders next", orders={"type": "array", "items": ORDER}, next=NEXT)

HEALTH = object_schema(
    "status",
    status={"type": "string", "enum": ["ok"]},
    read_only={"type": "boolean"},
)
ERROR = object_schema(
    "detail",
    detail={"type": "string"},
    pointer={"type": "string"},
    parameter={"type": "string"},
)
SHORTAGE = object_schema(
    "product_id requested available",
    product_id=ID,
    requested={"type": "integer"},
    available={"type": "integer"},
)
PROBLEM = object_schema(
    "type title status detail",
    type={"type": "string"},
    title={"type": "string"},
    status={"type": "integer"},
    detail={"type": "string"},
    errors={"type": "array", "items": ERROR},
    shortages={"type": "array", "items": SHORTAGE},
)

# Bare, or quoted as a string of RFC 8941.
KEY = {"type": "string", "pattern": r'^([!#-~][!-~]{0,254}|"([!#-\[\]-~]|\\["\\]){1,255}")$'}
AFTER = ID | {"minimum": 0, "description": "Only items after the one with this id."}
LIMIT = {"type": "integer", "minimum": 1, "maximum": 1000, "description": "Items of a page."}
NO_QUERY = object_schema()
PRODUCT_QUERY = object_schema(
    q=TEXT | {"description": "Text in name or description, ignoring case."},
    available={"type": "boolean", "description": "Only products with stock, or without."},
    limit=LIMIT,
    after=AFTER,
)
ORDER_QUERY = object_schema(status=STATUS, limit=LIMIT | {"default": 100}, after=AFTER)


# ----------------------------------------------------------------------------------------- routes
# A route takes, by the names of its parameters: store, query, body, if_match and its path's ids.
# Its Spec says what of them is valid; the plugin of part 3 reads, checks and passes them.

JSON = "application/json"
MERGE_PATCH = "application/merge-patch+json"


class Spec(NamedTuple):
    """What a route takes and returns."""

    response: dict | None  # schema of its body
    status: int = 200
    body: dict | None = None  # schema of the request's body
    query: dict = NO_QUERY
    media_types: tuple = (JSON,)  # that the body may have
    public: bool = False  # open to everyone, even when a token is set
    conflicts: bool = False  # can be 409


def new_bottle() -> bottle.Bottle:
    """A Bottle whose rules know <name:id>, an id as SQLite can hold it."""
    app = bottle.Bottle()
    app.router.add_filter("id", lambda config: (r"[0-9]{1,18}", int, str))
    return app


api = new_bottle()  # only declares the routes: create_app() serves them

INDEX = {
    "products": "/products/",
    "orders": "/orders/",
    "health": "/healthz",
    "openapi": "/openapi.json",
}
INDEX_SCHEMA = object_schema(**dict.fromkeys(INDEX, {"type": "string"}))


@api.get("/", spec=Spec(INDEX_SCHEMA, public=True))
def get_index():
    """List the paths."""
    return json_response({name: mount_point() + path for name, path in INDEX.items()})


@api.get("/healthz", spec=Spec(HEALTH, public=True))
def get_health(store):
    """Tell whether the database can be read."""
    store.check_health()
    return json_response({"status": "ok"} | ({"read_only": True} if store.read_only else {}))


@api.get("/openapi.json", spec=Spec({"type": "object"}, public=True))
def get_openapi(store, secured):
    """Describe this interface as OpenAPI 3.1."""
    return json_response(openapi_document(mount_point(), secured))


@api.get("/products/", spec=Spec(PRODUCTS, query=PRODUCT_QUERY, public=True))
def list_products(store, query):
    """List the products by id, all of them or a page."""
    products, next_after = store.list_products(**query)
    return page_response("/products/", "products", products, query, next_after)


@api.post("/products/", spec=Spec(PRODUCT, 201, body=NEW_PRODUCT))
def create_product(store, body):
    """Add a product."""
    product = store.create_product(**body)
    location = f"{mount_point()}/products/{product['id']}/"
    return json_response(product_to_json(product), 201, Location=location)


@api.get("/products/<product_id:id>/", spec=Spec(PRODUCT, public=True))
def get_product(store, product_id):
    """Get a product."""
    return product_response(store.get_product(product_id))


@api.patch(
    "/products/<product_id:id>/",
    spec=Spec(PRODUCT, body=PRODUCT_UPDATE, media_types=(JSON, MERGE_PATCH)),
)
def update_product(store, product_id, body, if_match):
    """Change the given fields of a product."""
    return product_response(store.update_product(product_id, if_match=if_match, **body))


@api.delete("/products/<product_id:id>/", spec=Spec(None, 204))
def delete_product(store, product_id, if_match):
    """Delete a product; orders keep their lines."""
    store.delete_product(product_id, if_match=if_match)
    return bottle.HTTPResponse(status=204)


@api.post(
    "/products/<product_id:id>/stock/",
    spec=Spec(PRODUCT, body=STOCK_UPDATE, conflicts=True),
)
def update_stock(store, product_id, body, if_match):
    """Add to a product's stock, or take from it."""
    return product_response(store.update_stock(product_id, if_match=if_match, **body))


@api.get("/orders/", spec=Spec(ORDERS, query=ORDER_QUERY))
def list_orders(store, query):
    """List a page of the orders by id."""
    orders, next_after = store.list_orders(**query)
    items = json_encode([order_to_json(order) for order in orders])
    return page_response("/orders/", "orders", items, query, next_after)


@api.post("/orders/", spec=Spec(ORDER, 201, body=NEW_ORDER, public=True, conflicts=True))
def create_order(store, body):
    """Place an order: the stock of every line is deducted, or nothing is."""
    order = store.create_order(**body)
    location = f"{mount_point()}/orders/{order['id']}/"
    return json_response(order_to_json(order), 201, Location=location)


@api.get("/orders/<order_id:id>/", spec=Spec(ORDER))
def get_order(store, order_id):
    """Get an order."""
    return order_response(store.get_order(order_id))


@api.patch("/orders/<order_id:id>/", spec=Spec(ORDER, body=ORDER_UPDATE, conflicts=True))
def update_order(store, order_id, body, if_match):
    """Complete a pending order, or cancel it and put its stock back."""
    return order_response(store.update_order(order_id, if_match=if_match, **body))


# Responses, as the routes make them.

json_encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode


def to_json(value) -> bytes:
    # Only a problem can hold half a surrogate pair: in an unknown field's name that it quotes.
    return (json_encode(value) + "\n").encode("utf-8", "replace")


def json_response(value, status: int = 200, etag: str | None = None, /, **headers: str):
    """A success: the value as JSON, or the bytes of JSON."""
    body = value if isinstance(value, bytes) else to_json(value)
    response = bottle.HTTPResponse(body, status, {"Content-Type": JSON, **headers})
    if etag:
        response.set_header("ETag", f'"{etag}"')
        response.set_header("Cache-Control", "no-cache")
    return response


def product_to_json(product: dict) -> dict:
    return {**product, "price": product["price"] / 100}


def order_to_json(order: dict) -> dict:
    return {
        "id": order["id"],
        "status": order["status"],
        "total_price": order["total"] / 100,
        "created_at": order["created_at"],
        "products": [{**line, "price": line["price"] / 100} for line in order["lines"]],
    }


def product_response(product: dict):
    return json_response(product_to_json(product), 200, db.etag(product))


def order_response(order: dict):
    row = {name: value for name, value in order.items() if name != "lines"}
    return json_response(order_to_json(order), 200, db.etag(row))


def page_response(path: str, name: str, items: str, query: dict, next_after: int | None):
    """A page of a collection: the JSON text of its items, and where the next page is."""
    url = next_url(path, query, next_after) if next_after else None
    body = f'{{"{name}":{items},"next":{json_encode(url)}}}\n'.encode()
    etag = hashlib.blake2b(body, digest_size=12).hexdigest()
    headers = {"Link": f'<{url}>; rel="next"'} if url else {}
    return json_response(body, 200, etag, **headers)


def next_url(path: str, query: dict, next_after: int) -> str:
    parameters = {
        name: json_encode(value) if isinstance(value, bool) else value
        for name, value in query.items()
    }
    return f"{mount_point()}{path}?{urlencode(parameters | {'after': next_after})}"


def mount_point() -> str:
    """The path under which a larger program has mounted the shop, without a last slash."""
    script_name = bottle.request.environ.get("SCRIPT_NAME", "")
    return quote(script_name.rstrip("/"), encoding="latin-1", errors="replace")


# ------------------------------------------------------------------------------------ application

# As RFC 9110 has them: http.client's differ from one Python to the next.
PHRASES = http.client.responses | {413: "Content Too Large", 422: "Unprocessable Content"}


class Problem(bottle.HTTPResponse):
    """An error as problem details (RFC 9457): raise it anywhere in a request."""

    def __init__(
        self,
        status: int,
        detail: str,
        kind: str | None = None,
        headers: dict | None = None,
        **members,
    ):
        problem = {
            "type": f"urn:problem-type:{kind}" if kind else "about:blank",
            "title": kind.replace("-", " ").capitalize() if kind else PHRASES[status],
            "status": status,
            "detail": detail,
            **members,
        }
        super().__init__(
            to_json(problem),
            f"{status} {PHRASES[status]}",
            {"Content-Type": "application/problem+json", **(headers or {})},
        )


def too_large() -> Problem:
    return Problem(413, f"The body may have {MAX_BODY} bytes.")


def unavailable(error) -> Problem:
    return Problem(503, str(error), headers={"Retry-After": RETRY_AFTER})


def invalid_body(errors: list) -> Problem:
    return validation_problem(errors, lambda path: {"pointer": json_pointer(path)})


def invalid_query(errors: list) -> Problem:
    return validation_problem(errors, lambda path: {"parameter": path[0]})


def validation_problem(errors: list, locate: Callable[[tuple], dict]) -> Problem:
    """The 422 for errors of validation, each a path and a message."""
    messages = [f"{field_name(path)} {message}" for path, message in errors]
    more = f"; and {len(errors) - 3} more" if len(errors) > 3 else ""
    count = f"{len(errors)} error{'s' if len(errors) > 1 else ''}"
    return Problem(
        422,
        f"{count}: {'; '.join(messages[:3])}{more}.",
        "validation",
        errors=[
            {**locate(path), "detail": f"{message}."}
            for (path, _), message in zip(errors, messages, strict=True)
        ],
    )


def field_name(path: tuple) -> str:
    if not path:
        return "The body"
    if isinstance(path[-1], int):
        return f"Item {path[-1]}"
    return path[-1]


def json_pointer(path: tuple) -> str:
    """RFC 6901, as the fragment of a URI."""
    steps = (str(step).replace("~", "~0").replace("/", "~1") for step in path)
    return "#" + "".join("/" + quote(step, errors="replace") for step in steps)


def unknown_products(error: db.UnknownProducts) -> Problem:
    return invalid_body(
        [
            (("products", position), f"names product {product_id}, which does not exist")
            for position, product_id in error.lines.items()
        ]
    )


def precondition_failed(error: db.PreconditionFailed | None = None) -> Problem:
    return Problem(412, "The resource has changed since you read it: fetch it again and retry.")


def internal_error(error: Exception) -> Problem:
    traceback.print_exception(error, file=bottle.request.environ["wsgi.errors"])
    return Problem(500, "The shop made a mistake. It has been logged.")


# The one place where an exception becomes a response: by its class, or else by a base of it.
PROBLEMS: dict[type, Callable[[Any], Problem]] = {
    db.NotFound: lambda error: Problem(404, str(error)),
    db.PreconditionFailed: precondition_failed,
    db.InsufficientStock: lambda error: Problem(
        409, str(error), "insufficient-stock", shortages=error.shortages
    ),
    db.InvalidTransition: lambda error: Problem(409, str(error), "invalid-transition"),
    db.IdempotencyKeyReused: lambda error: Problem(
        422,
        "This Idempotency-Key belongs to another request: use a new one.",
        "idempotency-key-reused",
    ),
    db.ExcessiveStock: lambda error: invalid_body([(("change",), str(error))]),
    db.UnknownProducts: unknown_products,
    db.DatabaseUnavailable: unavailable,
    Exception: internal_error,
}


def problem_for(error: Exception) -> Problem:
    known = next(kind for kind in type(error).__mro__ if kind in PROBLEMS)
    return PROBLEMS[known](error)


def handle_http_error(error: bottle.HTTPError) -> bottle.HTTPResponse:
    """Answer what Bottle itself refuses: no such path, or not with this method."""
    if error.status_code == 404:
        return Problem(404, "No such path; GET / lists the paths.")
    if error.status_code != 405:
        return Problem(error.status_code, str(error.body))
    methods = {"OPTIONS", *error.headers["Allow"].split(",")}
    if "GET" in methods:
        methods.add("HEAD")
    allow = {"Allow": ", ".join(sorted(methods))}
    if bottle.request.environ["REQUEST_METHOD"] == "OPTIONS":
        return bottle.HTTPResponse(status=204, headers=allow)
    return Problem(405, f"Use one of {allow['Allow']} here.", headers=allow)


class Plugin:
    """The Bottle plugin around every route: it authorizes, reads, validates and answers."""

    name = "shop"
    api = 2

    def __init__(self, store: db.Store, admin_token: str | None):
        self.store = store
        self.admin_token = admin_token

    def apply(self, callback: Callable, route: bottle.Route) -> Callable:
        spec = route.config.get("spec")
        if spec is None:  # an embedding program's own route
            return callback
        names = list(inspect.signature(callback).parameters)

        def call(**path_ids):
            try:
                return self.respond(callback, names, spec, path_ids)
            except bottle.HTTPResponse as response:  # a Problem
                return response
            except Exception as error:
                return problem_for(error)

        return call

    def respond(self, callback: Callable, names: list, spec: Spec, path_ids: dict):
        """The response of a route to the request that Bottle is handling."""
        environ = bottle.request.environ
        if self.admin_token and not spec.public:
            self.authorize(environ)
        arguments = {
            "store": self.store,
            "secured": bool(self.admin_token),
            "query": read_query(environ.get("QUERY_STRING"), spec.query),
            **path_ids,
        }
        if "if_match" in names:
            arguments["if_match"] = read_preconditions(environ)
        raw = b""
        if spec.body:
            raw = read_body(environ, spec.media_types)
            arguments["body"] = parse_body(raw, spec.body)
        action = functools.partial(callback, **{name: arguments[name] for name in names})
        key = environ.get("HTTP_IDEMPOTENCY_KEY")
        if key is not None and environ["REQUEST_METHOD"] == "POST":
            return self.respond_once(read_key(key), fingerprint(environ, raw), action)
        response = action()
        if "ETag" in response.headers and environ["REQUEST_METHOD"] in ("GET", "HEAD"):
            return if_modified(response, environ)
        return response

    def respond_once(self, key: str, request_fingerprint: str, action: Callable):
        """The response to the first request with this key, stored with what it did."""

        def storable() -> tuple:
            response = action()
            return response.status_code, response.get_header("Location"), response.body.decode()

        result, replayed = self.store.run_idempotent(key, request_fingerprint, storable)
        status, location, body = result
        response = json_response(body.encode(), status)
        if location:
            response.set_header("Location", location)
        if replayed:
            response.set_header("Idempotent-Replayed", "true")
        return response

    def authorize(self, environ: dict) -> None:
        scheme, _, token = environ.get("HTTP_AUTHORIZATION", "").partition(" ")
        same = hmac.compare_digest(token.strip().encode(), (self.admin_token or "").encode())
        if scheme.lower() != "bearer" or not same:
            raise Problem(
                401,
                "A token is needed: Authorization: Bearer <token>",
                headers={"WWW-Authenticate": "Bearer"},
            )


def read_query(text: str | None, schema: dict) -> dict:
    """The query parameters, validated. Raises a Problem."""
    if not text:
        return {}
    query: dict[str, Any] = {}
    errors: list = []
    for pair in parse_qsl(text, keep_blank_values=True, encoding="latin-1"):
        name, value = (part.encode("latin-1", "replace") for part in pair)
        read_parameter(name, value, schema, query, errors)
    query = compile_schema(schema)(query, (), errors)
    if errors:
        raise invalid_query(errors)
    return query


def read_parameter(raw_name: bytes, raw: bytes, schema: dict, query: dict, errors: list) -> None:
    name = raw_name.decode("utf-8", "surrogateescape")
    value: Any = raw.decode("utf-8", "surrogateescape")
    if name in query:
        errors.append(((name,), "is given twice"))
    kind = schema["properties"].get(name, schema)["type"]
    if kind == "integer" and value.isascii() and value.isdigit():
        value = Decimal(value)
    elif kind == "boolean" and value in ("true", "false"):
        value = value == "true"
    query[name] = value


def read_preconditions(environ: dict) -> db.Precondition:
    """The condition that If-Match puts on a resource's current ETag; None where there is none."""
    if_match = environ.get("HTTP_IF_MATCH")
    if if_match is None:
        return None
    return lambda etag: matches(if_match, etag)


def matches(header: str, etag: str, *, weak: bool = False) -> bool:
    """Whether a list of entity tags names this one. Weak tags count only where asked for."""
    if header.strip() == "*":
        return True
    tags = re.findall(r'(W/)?"([^"]*)"', header)
    return any(tag == etag and (weak or not prefix) for prefix, tag in tags)


def if_modified(response: bottle.HTTPResponse, environ: dict):
    """The response to a GET, or 412 or 304 as the request's conditions want (RFC 9110, 13.2.2)."""
    etag = response.headers["ETag"].strip('"')
    if_match = environ.get("HTTP_IF_MATCH")
    if if_match is not None and not matches(if_match, etag):
        return precondition_failed()
    if_none_match = environ.get("HTTP_IF_NONE_MATCH")
    if if_none_match is not None and matches(if_none_match, etag, weak=True):
        return bottle.HTTPResponse(status=304, headers=response.headerlist)
    return response


def read_key(header: str) -> str:
    if not re.fullmatch(KEY["pattern"], header):
        raise Problem(
            400,
            "Idempotency-Key must be 1 to 255 visible ASCII characters, bare or in double quotes.",
        )
    if header.startswith('"'):
        return re.sub(r"\\(.)", r"\1", header[1:-1])
    return header


def fingerprint(environ: dict, raw: bytes) -> str:
    """What makes two requests with one Idempotency-Key the same request."""
    path = environ["PATH_INFO"].rstrip("/") + "/"
    request = (environ["REQUEST_METHOD"], path, raw)
    return hashlib.blake2b(repr(request).encode(), digest_size=12).hexdigest()


def read_body(environ: dict, media_types: tuple) -> bytes:
    """The bytes of the body, declared as JSON and not too many. Raises a Problem."""
    if not is_json(environ.get("CONTENT_TYPE", ""), media_types):
        raise Problem(
            415,
            "Send JSON in UTF-8 and say so, with curl: -H 'Content-Type: application/json'",
            headers={"Accept": ", ".join(media_types)},
        )
    length = environ.get("CONTENT_LENGTH") or "0"
    if not (length.isascii() and length.isdigit() and len(length) < 20):
        raise Problem(400, "Content-Length must be a number.")
    # A server that has undone a chunked body may not know its length, but says where it ends.
    terminated = environ.get("wsgi.input_terminated") and "CONTENT_LENGTH" not in environ
    size = MAX_BODY + 1 if terminated else min(int(length), MAX_BODY + 1)
    raw = environ["wsgi.input"].read(size)
    if len(raw) > MAX_BODY:
        raise too_large()
    return raw


def is_json(content_type: str, media_types: tuple) -> bool:
    media_type, _, parameters = content_type.partition(";")
    charset = re.search(r'charset="?([^";\s]*)', parameters.lower())
    if charset and charset[1] not in ("utf-8", "utf8"):
        return False
    return media_type.strip().lower() in media_types


def parse_body(raw: bytes, schema: dict) -> Any:
    """The body as the routes work with it, validated. Raises a Problem."""
    try:
        value = json_decode(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise Problem(400, f"The body is not UTF-8: see byte {error.start}.") from None
    except RecursionError:
        raise Problem(400, "The body is nested too deep.") from None
    except ValueError as error:
        raise Problem(400, f"The body is not JSON: {error}.") from None
    errors: list = []
    body = compile_schema(schema)(value, (), errors)
    if errors:
        raise invalid_body(errors)
    return body


def refuse_constant(name: str):
    raise ValueError(f"{name} is not valid JSON")


def reject_duplicate_keys(pairs: list) -> dict:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in fields if names.count(name) > 1)
        raise ValueError(f'duplicate key "{twice}"')
    return fields


def parse_int(text: str) -> int | Decimal:
    return int(text) if len(text) < 20 else Decimal(text)


def parse_decimal(text: str) -> Decimal:
    try:
        return Decimal(text)
    except decimal.InvalidOperation:
        # An exponent of twenty digits: more than any schema allows, except of a zero.
        mantissa = text.lower().partition("e")[0]
        return Decimal("Infinity" if mantissa.strip("-0.") else 0)


json_decode = json.JSONDecoder(
    parse_int=parse_int,
    parse_float=parse_decimal,
    parse_constant=refuse_constant,
    object_pairs_hook=reject_duplicate_keys,
).decode


# Bottle spells these in its own way.
HEADER_NAMES = {"Etag": "ETag", "Www-Authenticate": "WWW-Authenticate"}


class Application:
    """A shop as a WSGI application.

    .bottle holds its routes, and takes an embedding program's own routes and plugins; .store is
    its database. It holds a Bottle and is none: a Bottle that is mounted in another one loses its
    error handlers and hooks.
    """

    def __init__(self, store: db.Store, admin_token: str | None = None):
        self.store = store
        self.bottle = new_bottle()
        self.bottle.default_error_handler = handle_http_error
        self.bottle.install(Plugin(store, admin_token))
        for route in api.routes:
            # A path works with its last slash and without.
            rules = {route.rule.rstrip("/") or "/", route.rule.rstrip("/") + "/"}
            self.bottle.route(sorted(rules), route.method, route.callback, **route.config)

    def __call__(self, environ: dict, start_response: Callable):
        path = environ.get("PATH_INFO", "")
        if not (path.isascii() and path.isprintable()):
            # Bottle would drop bytes that are no UTF-8, and a line feed at the end. Quoted they
            # are no path of ours.
            environ["PATH_INFO"] = quote(path, encoding="latin-1", errors="replace")

        def start(status: str, headers: list, exc_info=None):
            spelled = [(HEADER_NAMES.get(name, name), value) for name, value in headers]
            return start_response(status, spelled, exc_info)

        return self.bottle(environ, start)

    def close(self) -> None:
        """Close the database."""
        self.store.close()


def create_app(
    database_url: str | None = None,
    admin_token: str | None = None,
    debug: bool = False,
    *,
    read_only: bool = False,
    litestream: bool = False,
    lock_timeout: float = 5.0,
) -> Application:
    """Make the WSGI application, for any WSGI server with threads, or to be mounted in a program.

    database_url: as sqlite:///db.sqlite3; None takes what is not given from the environment.
    admin_token: what Authorization: Bearer must carry; None leaves the shop open to everyone.
    debug: log every SQL statement. read_only: serve a copy that another process renews.
    litestream: leave checkpoints to Litestream. lock_timeout: seconds that a write waits for
    another process. Raises ConfigError for a setting, db.DatabaseError for a database that cannot
    be used.
    """
    environ = read_environment() if database_url is None else {"DATABASE_URL": database_url}
    arguments = {
        "ADMIN_TOKEN": admin_token,
        "DEBUG": debug and "true",
        "READ_ONLY": read_only and "true",
        "LITESTREAM": litestream and "true",
    }
    given = {name: value for name, value in arguments.items() if value}
    return open_application(read_settings(environ | given), lock_timeout)


# ------------------------------------------------------------------------------------- validation
# compile_schema() makes of a schema a function that validates a value: it returns the value as the
# routes work with it, and appends what is wrong to a list, as paths and messages.

Validator = Callable[[Any, tuple, list], Any]


class ValidationError(Exception):
    """A value breaks its schema; the text says what would be right."""


def compile_schema(schema: dict) -> Validator:
    """The validator of a schema, made once."""
    if id(schema) not in VALIDATORS:
        VALIDATORS[id(schema)] = make_validator(schema)
    return VALIDATORS[id(schema)]


# By the identity of a schema: dicts have no hash, and the schemas are constants of this module.
VALIDATORS: dict[int, Validator] = {}


def make_validator(schema: dict) -> Validator:
    convert = CONVERTERS[schema["type"]](schema)

    def validate(value: Any, path: tuple, errors: list) -> Any:
        if len(errors) >= MAX_ERRORS:
            return None
        try:
            return convert(value, path, errors)
        except ValidationError as error:
            errors.append((path, str(error)))
            return None

    return validate


def object_converter(schema: dict) -> Validator:
    properties = {name: make_validator(item) for name, item in schema["properties"].items()}
    names = ", ".join(properties)
    unknown = f"is an unknown field; allowed: {names}" if names else "is an unknown field"
    required = schema["required"]
    least = schema.get("minProperties", 0)

    def convert(value: Any, path: tuple, errors: list) -> dict:
        if type(value) is not dict:
            raise ValidationError("must be an object")
        errors += [((*path, name), unknown) for name in value if name not in properties]
        errors += [((*path, name), "is required") for name in required if name not in value]
        if len(value) < least:
            raise ValidationError(f"must have at least one of {names}")
        return {
            name: properties[name](item, (*path, name), errors)
            for name, item in value.items()
            if name in properties
        }

    return convert


def array_converter(schema: dict) -> Validator:
    item_validator = make_validator(schema["items"])
    least = schema["minItems"]
    most = schema["maxItems"]
    key = schema.get("unique_by")

    def convert(value: Any, path: tuple, errors: list) -> list:
        if type(value) is not list:
            raise ValidationError("must be an array")
        if not least <= len(value) <= most:
            raise ValidationError(f"must have {least} to {most} items, not {len(value)}")
        items = [item_validator(item, (*path, n), errors) for n, item in enumerate(value)]
        if key:
            errors += find_repeated(items, key, path)
        return items

    return convert


def find_repeated(items: list, key: str, path: tuple) -> list:
    """Errors for the items whose key an earlier item has."""
    first: dict[Any, int] = {}
    return [
        ((*path, n), f"repeats {key} {item[key]}")
        for n, item in enumerate(items)
        if item and item.get(key) and first.setdefault(item[key], n) != n
    ]


def string_converter(schema: dict) -> Validator:
    least = schema.get("minLength", 0)
    most = schema.get("maxLength", MAX_BODY)
    enum = schema.get("enum")
    search = re.compile(schema.get("pattern", "")).search
    has_surrogate = re.compile("[\ud800-\udfff]").search

    def convert(value: Any, path: tuple, errors: list) -> str:
        if type(value) is not str:
            raise ValidationError("must be a string")
        if not least <= len(value) <= most:
            raise ValidationError(f"must be {least} to {most} characters long, not {len(value)}")
        if enum and value not in enum:
            raise ValidationError(f"must be {' or '.join(enum)}")
        if not search(value):
            raise ValidationError(schema["message"])
        if not value.isascii() and has_surrogate(value):
            raise ValidationError("must be Unicode, without unpaired surrogates")
        return value

    return convert


def integer_converter(schema: dict) -> Validator:
    least = schema["minimum"]
    most = schema["maximum"]

    def convert(value: Any, path: tuple, errors: list) -> int:
        if type(value) is not int:  # not bool, which is an int to isinstance
            if type(value) is not Decimal:
                raise ValidationError("must be an integer")
            if least <= value <= most and value != int(value):
                raise ValidationError("must be an integer")
        if not least <= value <= most:
            raise ValidationError(f"must be {least} to {most}")
        return int(value)

    return convert


def number_converter(schema: dict) -> Validator:
    """A number with two decimals comes back in whole hundredths: a price in cents."""
    least = schema["minimum"]
    most = schema["maximum"]

    def convert(value: Any, path: tuple, errors: list) -> int:
        if type(value) is not int and type(value) is not Decimal:
            raise ValidationError("must be a number")
        if not least <= value <= most:
            raise ValidationError(f"must be {least} to {most}")
        if type(value) is Decimal and value != value.quantize(Decimal("0.01")):
            raise ValidationError("must have at most two decimals")
        return int(value * 100)

    return convert


def boolean_converter(schema: dict) -> Validator:
    def convert(value: Any, path: tuple, errors: list) -> bool:
        if type(value) is not bool:
            raise ValidationError("must be true or false")
        return value

    return convert


CONVERTERS = {
    "object": object_converter,
    "array": array_converter,
    "string": string_converter,
    "integer": integer_converter,
    "number": number_converter,
    "boolean": boolean_converter,
}


# ---------------------------------------------------------------------------------- documentation


def string_header(**keywords) -> dict:
    return {"schema": {"type": "string", **keywords}}


SCHEMAS = {
    "Product": PRODUCT,
    "NewProduct": NEW_PRODUCT,
    "ProductUpdate": PRODUCT_UPDATE,
    "StockUpdate": STOCK_UPDATE,
    "Products": PRODUCTS,
    "Order": ORDER,
    "NewOrder": NEW_ORDER,
    "OrderUpdate": ORDER_UPDATE,
    "Orders": ORDERS,
    "Health": HEALTH,
    "Problem": PROBLEM,
}
ERROR_RESPONSES: dict[int, tuple[str, dict]] = {
    400: ("The request or its body cannot be read.", {}),
    401: ("A token is set, and the request lacks it.", {"WWW-Authenticate": string_header()}),
    404: ("No such product or order.", {}),
    408: ("The request took too long to arrive.", {}),
    409: ("The stock does not suffice, or the order's status does not allow it.", {}),
    412: ("If-Match does not hold.", {}),
    413: ("The body is over 1 MiB.", {}),
    415: ("The body is not declared as JSON.", {"Accept": string_header()}),
    417: ("Expect is not 100-continue.", {}),
    422: ("The request is not valid, or its Idempotency-Key belongs to another one.", {}),
    431: ("The headers are over 16 KiB.", {}),
    500: ("A fault of the shop.", {}),
    503: (
        "The database is busy, full or unreachable. Nothing was changed.",
        {"Retry-After": string_header()},
    ),
}
EVERYWHERE = {400, 408, 413, 417, 422, 431, 500}


def openapi_document(script_name: str, secured: bool) -> dict:
    """The interface as OpenAPI 3.1, for a shop mounted there, with a token set or not."""
    paths: dict[str, dict] = {}
    for route in api.routes:
        path = re.sub("<(.*?):id>", r"{\1}", route.rule)
        paths.setdefault(path, {})[route.method.lower()] = describe_operation(route, secured)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Shop",
            "version": str(db.SCHEMA_VERSION),
            "description": "Products, their stock, and orders that take from it, all or nothing. "
            "HEAD answers wherever GET does; OPTIONS lists the methods of a path.",
        },
        "servers": [{"url": script_name or "/"}],
        "paths": paths,
        "components": {
            "schemas": {name: describe_schema(schema) for name, schema in SCHEMAS.items()},
            "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}},
            "responses": {
                str(status): describe_error(text, headers)
                for status, (text, headers) in ERROR_RESPONSES.items()
            },
        },
    }


def describe_schema(schema: dict) -> dict:
    """The schema as others know JSON Schema: the shop's own keywords become standard ones."""
    described: dict[str, Any] = {}
    for name, value in schema.items():
        if name == "decimals":
            described["multipleOf"] = 0.01
        elif name == "unique_by":
            described["description"] = f"Each {value} once."
        elif name == "properties":
            described[name] = {key: describe_schema(item) for key, item in value.items()}
        elif name == "items":
            described[name] = describe_schema(value)
        elif name != "message":
            described[name] = value
    return described


def describe_error(text: str, headers: dict) -> dict:
    schema = {"$ref": "#/components/schemas/Problem"}
    content = {"application/problem+json": {"schema": schema}}
    return {"description": text, "headers": headers, "content": content}


def describe_content(schema: dict, *media_types: str) -> dict:
    name = next((name for name, known in SCHEMAS.items() if known is schema), None)
    described = {"$ref": f"#/components/schemas/{name}"} if name else describe_schema(schema)
    return {media_type: {"schema": described} for media_type in media_types}


def describe_operation(route: bottle.Route, secured: bool) -> dict:
    spec = route.config["spec"]
    needs_token = secured and not spec.public
    operation = {
        "operationId": route.callback.__name__,
        "summary": route.callback.__doc__,
        "parameters": describe_parameters(route, spec),
        "security": [{"token": []}] if needs_token else [],
        "responses": describe_responses(route, spec, needs_token),
    }
    if spec.body:
        content = describe_content(spec.body, *spec.media_types)
        operation["requestBody"] = {"required": True, "content": content}
    return operation


def has_etag(route: bottle.Route) -> bool:
    is_item = route.method in ("PATCH", "GET") or takes_if_match(route)
    return is_item and route.rule.startswith(("/products/", "/orders/"))


def describe_parameters(route: bottle.Route, spec: Spec) -> list[dict]:
    parameters = [
        {"name": name, "in": "query", "schema": describe_schema(schema)}
        for name, schema in spec.query["properties"].items()
    ]
    for name in re.findall("<(.*?):id>", route.rule):
        parameters.append({"name": name, "in": "path", "required": True, "schema": ID})
    if route.method == "POST":
        parameters.append({"name": "Idempotency-Key", "in": "header", "schema": KEY})
    if has_etag(route) and (route.method == "GET" or takes_if_match(route)):
        parameters.append({"name": "If-Match", "in": "header", **string_header()})
    if has_etag(route) and route.method == "GET":
        parameters.append({"name": "If-None-Match", "in": "header", **string_header()})
    return parameters


def takes_if_match(route: bottle.Route) -> bool:
    return "if_match" in inspect.signature(route.callback).parameters


def describe_responses(route: bottle.Route, spec: Spec, needs_token: bool) -> dict:
    headers = describe_headers(route, spec)
    success: dict[str, Any] = {"description": "Success.", "headers": headers}
    if spec.response:
        success["content"] = describe_content(spec.response, JSON)
    responses = {str(spec.status): success}
    if has_etag(route) and route.method == "GET":
        responses["304"] = {"description": "If-None-Match names the ETag.", "headers": headers}
    for status in sorted(error_statuses(route, spec, needs_token)):
        responses[str(status)] = {"$ref": f"#/components/responses/{status}"}
    return responses


def error_statuses(route: bottle.Route, spec: Spec, needs_token: bool) -> set[int]:
    reachable = {
        401: needs_token,
        404: "<" in route.rule,
        409: spec.conflicts,
        412: takes_if_match(route) or (has_etag(route) and route.method == "GET"),
        415: spec.body is not None,
        503: route.callback not in (get_index, get_openapi),
    }
    return EVERYWHERE | {status for status, can_happen in reachable.items() if can_happen}


def describe_headers(route: bottle.Route, spec: Spec) -> dict:
    headers = {}
    if route.method == "POST":
        headers["Idempotent-Replayed"] = string_header(enum=["true"])
    if spec.status == 201:
        headers["Location"] = string_header()
    if has_etag(route) and spec.status != 204:
        headers["ETag"] = string_header()
        headers["Cache-Control"] = string_header(enum=["no-cache"])
    if "limit" in spec.query["properties"]:
        headers["Link"] = string_header()
    return headers


# ---------------------------------------------------------------------------------- configuration


class Settings(NamedTuple):
    database: str = "db.sqlite3"  # a path
    admin_token: str | None = None
    host: str = "127.0.0.1"
    port: int = 8000
    debug: bool = False
    access_log: bool = True
    read_only: bool = False
    litestream: bool = False


class ConfigError(Exception):
    """A setting cannot be used."""


FLAGS = dict.fromkeys(("true", "1", "yes", "on"), True)
FLAGS |= dict.fromkeys(("false", "0", "no", "off"), False)


def read_settings(environ: dict) -> Settings:
    """The settings that an environment gives. Raises ConfigError for one that cannot be used."""
    unset = Settings()
    return Settings(
        database=read_database_url(environ.get("DATABASE_URL") or f"sqlite:///{unset.database}"),
        admin_token=read_token(environ, "ADMIN_TOKEN"),
        host=environ.get("HOST") or unset.host,
        port=read_port(environ.get("PORT") or str(unset.port)),
        debug=read_flag(environ, "DEBUG", unset.debug),
        access_log=read_flag(environ, "ACCESS_LOG", unset.access_log),
        read_only=read_flag(environ, "READ_ONLY", unset.read_only),
        litestream=read_flag(environ, "LITESTREAM", unset.litestream),
    )


def read_database_url(url: str) -> str:
    path = url.removeprefix("sqlite:///")
    if path == url or path in ("", "/", ":memory:") or "\0" in path:
        raise ConfigError(
            "DATABASE_URL must be sqlite:///FILE, or sqlite:////FILE for an absolute path, "
            f"not {url!r}."
        )
    return path


def read_port(text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 6 and int(text) < 65536):
        raise ConfigError(f"PORT must be a number up to 65535, not {text!r}.")
    return int(text)


def read_token(environ: dict, name: str) -> str | None:
    token = environ.get(name) or None
    if token and not re.fullmatch(r"[!-~]+", token):
        raise ConfigError(f"{name} must be visible ASCII characters without blanks.")
    return token


def read_flag(environ: dict, name: str, default: bool) -> bool:
    text = environ.get(name)
    if not text:
        return default
    if text.lower() not in FLAGS:
        raise ConfigError(f"{name} must be true or false, not {text!r}.")
    return FLAGS[text.lower()]


def read_environment() -> dict:
    """What is set, and beneath it what a file .env in the working directory sets."""
    try:
        with open(".env", encoding="utf-8") as file:
            lines = [line.strip() for line in file if not line.lstrip().startswith("#")]
    except FileNotFoundError:
        lines = []
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"The file .env cannot be read: {error}.") from error
    pairs = (line.partition(" #")[0].partition("=") for line in lines)
    values = {name.strip(): value.strip().strip("'\"") for name, _, value in pairs}
    return values | os.environ


def open_application(settings: Settings, lock_timeout: float) -> Application:
    store = db.Store(
        settings.database,
        lock_timeout=lock_timeout,
        read_only=settings.read_only,
        autocheckpoint=not settings.litestream,
        trace=log_statement if settings.debug else None,
    )
    return Application(store, settings.admin_token)


def log_statement(sql: str) -> None:
    print(" ".join(sql.split()), file=sys.stderr)


# ----------------------------------------------------------------------------------------- server
# waitress without its worker threads: they and its main loop take the interpreter from each other.
# One loop polls, serves the requests that have come in, commits once for all that write, and only
# then sends their responses. It overrides internals of waitress, so the version is pinned and a
# test watches them; each override says why it is there.

MAX_HEADER = 16 << 10  # bytes
SAFE_METHODS = ("GET", "HEAD", "OPTIONS")
IDLE_TIMEOUT = 30  # seconds of an idle connection, or for a request to arrive
LOCK_TIMEOUT = 5  # seconds that a write waits for another process
LINGER_TIMEOUT = 5  # seconds that a client has to read the last response
DRAIN_TIMEOUT = 4.5  # seconds after a signal for the requests under way
# What can never become a request: a first byte of no method, or a line feed without its CR.
INVALID_START = re.compile(rb"^[\r\n]*[^\r\n!#$%&'*+.^_`|~0-9A-Za-z-]|(?<!\r)\n")
LONG_WHITESPACE = re.compile(rb"[ \t]{64}")
TRANSFER_CODING = re.compile(rb"\ntransfer-encoding[ \t]*:[ \t]*([^\r\n]*)", re.I)


class RequestParser(waitress.parser.HTTPRequestParser):
    """Refuses also what would stall waitress's parser, pass it, or could be read in two ways.

    All of it could go if waitress read requests as strictly as RFC 9112 allows.
    """

    def __init__(self, adj):
        super().__init__(adj)
        self.received_at = time.monotonic()

    def received(self, data: bytes) -> int:
        consumed = super().received(data)
        if not self.error:
            self.check_progress()
        if self.completed:  # waitress would ask for a body that is not to come, and wait for it
            self.expect_continue = False
        return consumed

    def check_progress(self) -> None:
        """Refuse at once what can no longer become a request."""
        if not self.headers_finished:
            if INVALID_START.search(self.header_plus):
                self.refuse(Problem(400, "Malformed request: lines must end in CRLF."))
            return
        if not self.chunked:
            return
        framing = self.body_rcv.control_line
        if len(self.body_rcv) > MAX_BODY:
            self.refuse(too_large())
        elif b"\n" in framing or len(framing) > 1024 or len(self.body_rcv.trailer) > MAX_HEADER:
            self.refuse(Problem(400, "Malformed chunked body."))

    def refuse(self, problem: Problem) -> None:
        self.error = waitress.utilities.BadRequest(problem)
        self.completed = True

    def parse_header(self, header_plus: bytes) -> None:
        # The time of waitress's pattern for a field grows with the square of these.
        if LONG_WHITESPACE.search(header_plus):
            raise ParsingError("A header has too many blanks in a row.")
        line, *rest = header_plus.split(b"\r\n", 1)
        if not line.isascii():  # curl sends ?q=é as it is typed
            line = quote(line, safe=string.printable).encode()
        try:
            super().parse_header(b"\r\n".join([line, *rest]))
        except TransferEncodingNotImplemented:
            raise ParsingError("The only transfer coding is chunked.") from None
        except ValueError:
            raise ParsingError("The target or the Content-Length cannot be read.") from None
        self.check_length(TRANSFER_CODING.findall(header_plus))
        self.check_head()

    def check_length(self, codings: list[bytes]) -> None:
        """RFC 9112, 6.3: a length that could be read in two ways is an error."""
        if codings and (
            self.version != "1.1"
            or "CONTENT_LENGTH" in self.headers
            or [coding.strip().lower() for coding in codings] != [b"chunked"]
        ):
            raise ParsingError("Ambiguous message length.")
        if self.content_length > MAX_BODY:
            raise ParsingError(too_large())

    def check_head(self) -> None:
        if self.version not in ("1.0", "1.1"):
            raise ParsingError("The request line must end in HTTP/1.1 or HTTP/1.0.")
        if "," in self.headers.get("HOST", ""):
            raise ParsingError("There must be one Host.")
        expectation = self.headers.get("EXPECT", "100-continue").lower()
        if self.version == "1.1" and expectation != "100-continue":
            raise ParsingError(
                Problem(417, "The only expectation that can be met is 100-continue.")
            )


class ResponseHeaderMixin:
    """The head of a response, as both of waitress's tasks send it."""

    def __init__(self, channel, request):
        super().__init__(channel, request)
        channel.task = self
        self.received_at = channel.received_at

    def build_response_header(self):
        # waitress's own closes the connection after a 204 or 304, for want of a length.
        wishes = self.request.headers.get("CONNECTION", "").lower().replace(" ", "").split(",")
        if "close" in wishes or (self.version == "1.0" and "keep-alive" not in wishes):
            self.close_on_finish = True
        lines = [
            f"HTTP/{self.version} {self.status}",
            *map(": ".join, self.response_headers),
            f"Date: {self.channel.server.loop.date}",
        ]
        if self.close_on_finish:
            lines.append("Connection: close")
        elif self.version == "1.0":
            lines.append("Connection: keep-alive")
        return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")


class Task(ResponseHeaderMixin, waitress.task.WSGITask):
    """A request that the application answers."""


class ErrorTask(ResponseHeaderMixin, waitress.task.ErrorTask):
    """A request that the server refuses: as problem details, where waitress has plain text."""

    def execute(self):
        error = self.request.error
        problem = error.body
        if not isinstance(problem, Problem):
            problem = Problem(error.code, str(error.body))
        self.status = problem.status_line
        self.content_length = len(problem.body)
        self.close_on_finish = True
        length = ("Content-Length", str(self.content_length))
        self.response_headers = [*problem.headerlist, length]
        self.write(problem.body)


class Channel(waitress.channel.HTTPChannel):
    """A connection. What is to be sent waits in `output`, and head and body leave together.

    Its overrides could go if waitress could serve without worker threads: they take away locks and
    buffers that stand between a loop and its threads, and let a client read its last response.
    """

    task_class = Task
    error_task_class = ErrorTask
    parser_class = RequestParser
    task: Any = None
    lingering_until = 0.0  # a connection that is closed for writing is read until then
    received_at = 0.0  # when the request was complete

    def __init__(self, *args, **kwargs):
        self.output = collections.deque()
        super().__init__(*args, **kwargs)

    def write_soon(self, data):
        if not self.connected:
            raise waitress.channel.ClientDisconnected
        if data:
            self.output.append(data)
            self.total_outbufs_len += len(data)
        return len(data)

    def _flush_some(self, do_close=True):
        while self.output:
            try:
                sent = self.socket.sendmsg(itertools.islice(self.output, 64))
            except BlockingIOError:
                return
            self.last_activity = time.time()
            self.total_outbufs_len -= sent
            while self.output and sent >= len(self.output[0]):
                sent -= len(self.output.popleft())
            if sent:
                self.output[0] = memoryview(self.output[0])[sent:]

    def send_continue(self):
        # waitress's own flushes at once, before the commit of what waits to be sent.
        self.request.expect_continue = False
        self.sent_continue = True
        self.write_soon(b"HTTP/1.1 100 Continue\r\n\r\n")

    def readable(self):
        return self.lingering_until > 0 or super().readable()

    def handle_read(self):
        try:
            data = self.socket.recv(self.adj.recv_bytes)
        except OSError:
            return self.handle_close()
        if self.lingering_until:
            return None if data else self.handle_close()
        if data:
            self.last_activity = time.time()
            self.received(data)
        elif self.request:
            self.refuse(Problem(400, "The request ended before it was complete."))
        else:
            self.handle_close()

    def handle_write(self):
        self._flush_exception(self._flush_some)
        if self.will_close:
            self.handle_close()
        elif not self.output and self.close_when_flushed:
            self.lingering_close()
        elif not self.output and self.requests:
            self.server.add_task(self)

    def handle_expt(self) -> None:
        # Urgent data are no part of HTTP, and poll tells of them without end.
        self.handle_close()

    def lingering_close(self):
        """Close for writing only: a client that still sends would lose its response to a reset."""
        self.close_when_flushed = False
        self.lingering_until = time.monotonic() + LINGER_TIMEOUT
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_WR)

    def refuse(self, problem):
        """Answer a request that has not come in full, and close."""
        self.request.refuse(problem)
        self.requests = [self.request]
        self.request = None
        self.server.add_task(self)

    def replace_response(self, problem):
        """Send the problem in place of what waits to be sent, and close."""
        request = self.task.request
        self.requests = []
        self.output.clear()
        self.total_outbufs_len = 0
        self.close_when_flushed = True
        request.error = waitress.utilities.BadRequest(problem)
        ErrorTask(self, request).service()


class Server(waitress.server.TcpWSGIServer):
    """A listening socket. Its overrides stand for the threads that waitress would wake."""

    channel_class = Channel

    def __init__(self, loop, *args, **kwargs):
        self.loop = loop
        super().__init__(*args, **kwargs)

    def handle_accept(self) -> None:
        # waitress accepts one connection each time it polls: accept all that wait.
        before = -1
        while before < len(self.active_channels) and len(self._map) < self.adj.connection_limit:
            before = len(self.active_channels)
            super().handle_accept()

    def add_task(self, channel: Channel) -> None:
        # With output left it comes again when all is sent: responses leave in their order.
        if not channel.output:
            channel.received_at = time.perf_counter()
            self.loop.ready.append(channel)

    def pull_trigger(self) -> None:
        """Nobody is to be woken: the thread that would call this is the loop's."""

    def maintenance(self, now: float) -> None:
        # waitress's own knows no slow requests, and would close what waits for the lock.
        for channel in list(self.active_channels.values()):
            if channel.lingering_until:
                channel.will_close = channel.lingering_until < time.monotonic()
            elif not channel.requests:
                self.check_timeouts(channel, now)
            elif channel.output and channel.last_activity < now - IDLE_TIMEOUT:
                channel.will_close = True

    def check_timeouts(self, channel: Channel, now: float) -> None:
        request = channel.request
        if request and request.received_at < time.monotonic() - IDLE_TIMEOUT:
            channel.refuse(
                Problem(408, f"The request took more than {IDLE_TIMEOUT} seconds to arrive.")
            )
        elif channel.last_activity < now - IDLE_TIMEOUT:
            channel.will_close = True


class Loop:
    """Serves an application in the calling thread until a signal ends it."""

    def __init__(self, app: Application, settings: Settings):
        self.store = app.store
        self.log = Log() if settings.access_log and sys.stdout else None
        self.map: dict[int, Any] = {}
        self.ready: list[Channel] = []
        self.waiting = False  # for the write lock
        self.stopped_at: float | None = None
        self.date = ""
        adj = waitress.adjustments.Adjustments(
            host=settings.host,
            port=settings.port,
            ident=None,
            clear_untrusted_proxy_headers=False,
            recv_bytes=1 << 16,
            outbuf_high_watermark=1 << 62,  # above it waitress waits for a second thread
            max_request_header_size=MAX_HEADER + 1,
            max_request_body_size=8 << 20,
            inbuf_overflow=16 << 20,
            connection_limit=allow_connections(),
            cleanup_interval=1,
            log_socket_errors=False,
        )
        self.servers = [
            Server(self, app, self.map, dispatcher=self, adj=adj, sockinfo=sockinfo)
            for sockinfo in adj.listen
        ]
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.stop)

    @property
    def url(self) -> str:
        host = self.servers[0].effective_host
        if ":" in host:
            host = f"[{host}]"
        return f"http://{host}:{self.servers[0].effective_port}/"

    def run(self) -> None:
        while not self.stopped_at or self.drain():
            self.poll()
            self.serve_batch()
        waitress.wasyncore.close_all(self.map)

    def poll(self) -> None:
        pause = 1.0
        if self.waiting or self.stopped_at:
            pause = 0.01
        elif self.ready:
            pause = 0
        waitress.wasyncore.poll2(pause, self.map)
        known = 0
        while len(self.ready) > known:  # what comes while the first are read shares their commit
            known = len(self.ready)
            waitress.wasyncore.poll2(0, self.map)

    def serve_batch(self) -> None:
        """Serve every request that has come in; all that write share one transaction."""
        self.date = waitress.utilities.build_http_date(time.time())
        channels = [channel for channel in self.ready if channel.connected]
        self.ready = []
        self.waiting = False
        writers = [channel for channel in channels if is_write(channel.requests[0])]
        in_group = False
        if writers:
            try:
                self.store.begin()
                in_group = True
            except db.DatabaseBusy:  # reads go on, and the writes try again
                channels = self.postpone(channels, writers)
            except db.DatabaseUnavailable:
                pass  # each write finds out by itself, and says so
        for channel in channels:
            if self.stopped_at:
                channel.requests[0].headers["CONNECTION"] = "close"
            channel.service()
        if in_group:
            self.commit(writers)
        for channel in channels:
            if channel.connected:
                channel.handle_write()
        if self.log and channels:
            stamp = db.timestamp()
            self.log.write("".join(access_line(stamp, channel) for channel in channels))

    def postpone(self, channels: list, writers: list) -> list:
        """Let writes wait that have not yet waited too long; return what is left to serve."""
        now = time.perf_counter()
        self.ready = [
            channel for channel in writers if now - channel.received_at < self.lock_timeout()
        ]
        self.waiting = bool(self.ready)
        return [channel for channel in channels if channel not in self.ready]

    def commit(self, writers: list) -> None:
        try:
            self.store.commit()
        except db.DatabaseUnavailable as error:
            for channel in writers:
                if channel.connected:
                    channel.replace_response(unavailable(error))

    def lock_timeout(self) -> float:
        if self.stopped_at and time.monotonic() > self.stopped_at + 2:
            return 0
        return LOCK_TIMEOUT

    def stop(self, number: int, frame) -> None:
        if self.stopped_at:
            os._exit(128 + number)
        self.stopped_at = time.monotonic()
        self.servers[0].trigger.pull_trigger()

    def drain(self) -> bool:
        """Take no more requests; whether there is something left to answer, and time for it."""
        for server in self.servers:
            if server.accepting:
                self.stop_accepting(server)
                return True
        elapsed = time.monotonic() - (self.stopped_at or 0)
        channels = [channel for channel in self.map.values() if isinstance(channel, Channel)]
        for channel in channels:
            self.drain_channel(channel, elapsed)
        return any(channel.connected for channel in channels)

    def stop_accepting(self, server: Server) -> None:
        server.handle_accept()  # what connected before the signal may have sent its request
        server.accepting = False
        self.map.pop(server._fileno)
        server.socket.close()

    def drain_channel(self, channel: Channel, elapsed: float) -> None:
        if channel.request and not channel.requests and elapsed > 1:
            channel.refuse(unavailable("The server is shutting down: retry."))
        is_idle = not (channel.output or channel.requests or channel.request)
        if elapsed > (1 if is_idle else DRAIN_TIMEOUT):
            channel.handle_close()
        elif is_idle and not channel.lingering_until:
            channel.lingering_close()


def is_write(request: RequestParser) -> bool:
    return not request.error and request.command not in SAFE_METHODS


class Log:
    """Standard output, as long as somebody reads it: a full pipe must not stop the shop."""

    def __init__(self):
        self.descriptor = sys.stdout.fileno()
        self.poll = select.poll()
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
    task = channel.task
    request = task.request
    method = "-" if request.error else request.command
    path = "-" if request.error else request.request_uri.partition("?")[0]
    if not (path.isascii() and path.isprintable()):
        path = quote(path, safe=string.punctuation, encoding="latin-1")
    milliseconds = (time.perf_counter() - task.received_at) * 1000
    return (
        f"{stamp} {channel.addr[0]} {method} {path} {task.status[:3]} "
        f"{task.content_bytes_written} {milliseconds:.1f}\n"
    )


def allow_connections() -> int:
    """Raise the limit of open files as far as it goes; return how many connections fit."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    files = 1 << 16 if hard == resource.RLIM_INFINITY else min(hard, 1 << 16)
    resource.setrlimit(resource.RLIMIT_NOFILE, (files, hard))
    return max(files - 64, 16)


# ----------------------------------------------------------------------------------- command line

HELP = """\
usage: python shop.py [serve]                       serve the shop until SIGTERM or SIGINT
       python shop.py backup FILE [--overwrite]     copy the database to FILE, while it is in use
       python shop.py check [FILE]                  check FILE, or else the shop's own database

Settings come from the environment, and from a file .env in the working directory:
    DATABASE_URL   sqlite:///db.sqlite3; four slashes for an absolute path
    HOST, PORT     where to listen: 127.0.0.1, 8000
    ADMIN_TOKEN    that Authorization: Bearer must carry, except to read products and to order;
                   unset: everything is open to everyone
    ACCESS_LOG     true: a line a request on standard output
    DEBUG          false; true logs every SQL statement on standard error
    READ_ONLY      false; true serves a copy that another process renews, and refuses writes
    LITESTREAM     false; true leaves checkpoints to a Litestream that replicates the database
"""


def main(arguments: list[str]) -> int:
    """Do what the command line says; return the exit status."""
    command, *words = arguments or ["serve"]
    options = [word for word in words if word.startswith("-")]
    files = [word for word in words if not word.startswith("-")]
    if {"-h", "--help"} & set(arguments):
        print(HELP, end="")
        return 0
    if command == "serve" and not words:
        return serve()
    if command == "backup" and len(files) == 1 and set(options) <= {"--overwrite"}:
        return run_backup(files[0], overwrite=bool(options))
    if command == "check" and len(files) <= 1 and not options:
        return run_check(*files)
    print(HELP, end="", file=sys.stderr)
    return 2


def fail(reason: object, status: int) -> int:
    print(f"shop: {' '.join(str(reason).split())}", file=sys.stderr)
    return status


def serve() -> int:
    try:
        settings = read_settings(read_environment())
        # The loop waits for the lock itself, and serves reads meanwhile.
        app = open_application(settings, lock_timeout=0)
    except (ConfigError, db.DatabaseError) as error:
        return fail(error, 2)
    try:
        loop = Loop(app, settings)
    except (OSError, ValueError) as error:  # of the listening socket
        reason = getattr(error, "strerror", None) or "there is no such host"
        return fail(f"cannot listen on HOST {settings.host}, PORT {settings.port}: {reason}.", 2)
    print(f"Serving {loop.url} from {app.store.path}", flush=True)
    if not settings.admin_token:
        print("ADMIN_TOKEN is not set: anyone may read orders and change products.", flush=True)
    loop.run()
    app.close()
    return 0


def run_backup(file: str, overwrite: bool) -> int:
    started_at = time.monotonic()

    def show_progress(remaining: int, total: int) -> None:
        if sys.stderr.isatty() and time.monotonic() - started_at > 1:
            percent = 100 - 100 * remaining // max(total, 1)
            print(f"\r{percent} %", end="\r" if remaining else "\n", file=sys.stderr)

    try:
        database = read_settings(read_environment()).database
        copy = db.backup(database, file, overwrite=overwrite, progress=show_progress)
    except (ConfigError, db.DatabaseError) as error:
        return fail(error, 1)
    print(f"{file}: {copy['products']} products, {copy['orders']} orders, {copy['bytes']} bytes")
    return 0


def run_check(file: str | None = None) -> int:
    try:
        file = file or read_settings(read_environment()).database
        errors = db.check_integrity(file)
    except (ConfigError, db.DatabaseError) as error:
        return fail(error, 1)
    print("\n".join(errors) or f"{file}: sound")
    return 1 if errors else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
