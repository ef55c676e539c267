"""What the shop does, one sentence a test.

Most tests call the WSGI application. Those that need the whole truth run `python shop.py`.

    python -m pytest
"""

import base64
import calendar
import concurrent.futures
import contextlib
import csv
import dataclasses
import errno
import functools
import getopt
import hashlib
import http.client
import inspect
import io
import itertools
import json
import os
import pkgutil
import random
import re
import resource
import select
import shlex
import shutil
import signal
import socket
import sqlite3
import struct
import subprocess
import sys
import threading
import time
import urllib.parse
from decimal import Decimal
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import bottle
import pytest
import waitress.adjustments
import webtest

import db
import shop as shop_module

pytestmark = pytest.mark.filterwarnings("ignore:Unknown REQUEST_METHOD")
HERE = Path(__file__).parent
JSON = {"Content-Type": "application/json"}


# ---------------------------------------------------------------------------- fixtures and helpers


class Client:
    """Calls an application through WSGI: client("POST", "/orders/", {...}).

    Every error must be a problem of its status, and every response one that /openapi.json
    declares. script_name: where the shop is mounted in the application. status: the one that the
    response must have.
    """

    def __init__(self, app, script_name=""):
        self.app = webtest.TestApp(app)
        self.script_name = script_name

    def __call__(self, method, path, body=None, headers=None, status=None):
        headers = ({} if body is None else JSON) | (headers or {})
        if not isinstance(body, bytes):
            body = b"" if body is None else json.dumps(body).encode()
        response = self.app.request(
            self.script_name + path, method=method, body=body, headers=headers, expect_errors=True
        )
        assert status in (None, response.status_int), response
        if response.status_int >= 400 and method != "HEAD":
            assert_problem(response)
        assert_declared(method, path, response)
        return response

    def product(self, **fields):
        return self("POST", "/products/", {"name": "Mug", "price": 9.99, "stock": 5, **fields}).json

    def order(self, *lines, status=None, **headers):
        return self("POST", "/orders/", order_of(*lines), headers, status)

    def stock(self, product):
        return self("GET", f"/products/{product['id']}/").json["stock"]

    def ids(self, path):
        """The ids of the products or orders on a page."""
        page = self("GET", path, status=200).json
        return [item["id"] for item in page.get("products") or page.get("orders", [])]


# RFC 9110's phrases; 413 has an older one in Python before 3.13.
TITLES = {status.value: status.phrase for status in http.HTTPStatus} | {413: "Content Too Large"}


def assert_problem(response):
    assert response.content_type == "application/problem+json", response
    problem = response.json
    assert problem["status"] == response.status_int
    assert problem["title"]
    assert problem["detail"]
    if problem["status"] not in (409, 422):
        assert (problem["type"], problem["title"]) == ("about:blank", TITLES[problem["status"]])


def assert_declared(method, path, response):
    """The response is one that /openapi.json declares for the request, headers and fields too."""
    operation = declared_operation(method, path.partition("?")[0])
    if operation is None:
        assert response.status_int in (204, 404, 405)
        return
    declared = resolve(operation["responses"][str(response.status_int)])
    assert sent_headers(response) <= {name.lower() for name in declared.get("headers", {})}
    if response.body:
        schema = declared["content"][response.content_type]["schema"]
        value = response.json if "json" in response.content_type else response.text
        assert list(schema_errors(value, schema, closed=True)) == [], response


def sent_headers(response):
    """The headers that /openapi.json has to declare: not those that CORS_ORIGINS adds."""
    names = {name.lower() for name in response.headers} - {"content-type", "content-length"}
    if response.headers.get("Vary") == "Origin":
        names.remove("vary")
    return {name for name in names if not name.startswith("access-control-")}


@functools.cache
def openapi():
    return shop_module.openapi_document("", frozenset({"admin", "order"}))


def declared_operation(method, path):
    """The operation in /openapi.json of a request, or None for a path or method not in it."""
    method = "get" if method == "HEAD" else method.lower()
    for template, operations in openapi()["paths"].items():
        pattern = re.sub(r"\{\w+\}", "[0-9]+", template.removesuffix("/")) + "/?"
        if re.fullmatch(pattern, path):
            return operations.get(method)
    return None


def resolve(declaration):
    """What a {"$ref": "#/components/..."} refers to; anything else is returned unchanged."""
    if "$ref" not in declaration:
        return declaration
    target = openapi()
    for step in declaration["$ref"].removeprefix("#/").split("/"):
        target = target[step]
    return target


# JSON Schema's validation, as far as /openapi.json uses it.

IS_A = {
    "object": lambda value: isinstance(value, dict),
    "array": lambda value: isinstance(value, list),
    "string": lambda value: isinstance(value, str),
    "boolean": lambda value: isinstance(value, bool),
    "null": lambda value: value is None,
    "number": lambda value: isinstance(value, (int, float)) and not isinstance(value, bool),
    "integer": lambda value: IS_A["number"](value) and value == int(value),
}
HOLDS = {
    # A type or a list of types, no name of which is part of another.
    "type": lambda value, types: any(IS_A[kind](value) for kind in IS_A if kind in types),
    "enum": lambda value, values: value in values,
    "const": lambda value, constant: value == constant,
    "minimum": lambda value, least: not IS_A["number"](value) or value >= least,
    "maximum": lambda value, most: not IS_A["number"](value) or value <= most,
    "minLength": lambda value, least: not isinstance(value, str) or len(value) >= least,
    "maxLength": lambda value, most: not isinstance(value, str) or len(value) <= most,
    # In ECMAScript a $ is the very end, not also the place before a last line feed.
    "pattern": lambda value, text: (
        not isinstance(value, str) or bool(re.search(text.replace("$", r"\Z"), value))
    ),
    "minItems": lambda value, least: not isinstance(value, list) or len(value) >= least,
    "maxItems": lambda value, most: not isinstance(value, list) or len(value) <= most,
    "minProperties": lambda value, least: not isinstance(value, dict) or len(value) >= least,
    "maxProperties": lambda value, most: not isinstance(value, dict) or len(value) <= most,
    "required": lambda value, names: not isinstance(value, dict) or set(names) <= value.keys(),
}
KEYWORDS = {*HOLDS, "properties", "propertyNames", "additionalProperties", "items", "oneOf"}
KEYWORDS |= {"description", "examples", "format"}


def schema_errors(value, schema, path="#", *, closed=False):
    """Where a value breaks a schema of /openapi.json, and by which keyword.

    closed: a field that the schema does not declare is an error too, though clients must expect
    it: no response of ours may have one.
    """
    schema = resolve(schema)
    assert schema.keys() <= KEYWORDS
    for keyword, given in schema.items():
        if keyword in HOLDS and not HOLDS[keyword](value, given):
            yield f"{path} {keyword}"
    properties = schema.get("properties", {})
    others = schema.get("additionalProperties", not (closed and properties))
    for name, field in value.items() if isinstance(value, dict) else ():
        declared = properties.get(name, others)
        if isinstance(declared, dict):
            yield from schema_errors(field, declared, f"{path}/{name}", closed=closed)
        elif not declared:
            yield f"{path}/{name} additionalProperties"
        yield from schema_errors(name, schema.get("propertyNames", {}), f"{path}/{name}")
    for position, item in enumerate(value if isinstance(value, list) else ()):
        yield from schema_errors(item, schema.get("items", {}), f"{path}/{position}", closed=closed)
    if "oneOf" in schema:
        yield from schema_errors(value, branch_of(schema["oneOf"], value), path, closed=closed)


def branch_of(schemas, value):
    """The schema of a oneOf that the value's `type` decides for, as a client would."""
    kinds = {resolve(schema)["properties"]["type"]["const"]: schema for schema in schemas}
    assert len(kinds) == len(schemas)
    return kinds[value["type"]]


@pytest.fixture
def database(tmp_path):
    return tmp_path / "db.sqlite3"


@pytest.fixture
def url(database):
    return f"sqlite:///{database}"


@pytest.fixture
def make_shop(url):
    """Makes a client of a new application, which is closed after the test."""
    with contextlib.ExitStack() as stack:

        def make(database_url=url, **settings):
            app = shop_module.create_app(database_url, **settings)
            stack.callback(app.close)
            return Client(app)

        yield make


@pytest.fixture
def shop(make_shop):
    return make_shop()


@pytest.fixture
def mug(shop):
    return shop.product()


def order_of(*lines):
    """The body of an order: order_of((1, 3)) is for three pieces of product 1."""
    return {"products": [{"product_id": number, "quantity": count} for number, count in lines]}


def bearer(token):
    return {"Authorization": f"Bearer {token}"}


def errors_of(response):
    """What is wrong at each pointer or parameter that a 422 names."""
    assert response.status_int == 422, response
    assert response.json["type"] == "urn:problem-type:validation"
    errors = response.json["errors"]
    parts = [error["detail"].removesuffix(".") for error in errors[:3]]
    if len(errors) > 3:
        parts.append(f"and {len(errors) - 3} more")
    noun = "error" if len(errors) == 1 else "errors"
    assert response.json["detail"] == f"{len(errors)} {noun}: {'; '.join(parts)}."
    return {error.get("pointer", error.get("parameter")): error["detail"] for error in errors}


def at_once(number, work):
    """The results of work(0), work(1), ... in as many threads, started together."""
    gate = threading.Barrier(number)

    def start(n):
        gate.wait()
        return work(n)

    with concurrent.futures.ThreadPoolExecutor(number) as pool:
        return list(pool.map(start, range(number)))


def start_threads(number, work):
    threads = [threading.Thread(target=work, args=(n,)) for n in range(number)]
    for thread in threads:
        thread.start()
    return threads


def join_all(threads):
    for thread in threads:
        thread.join()


@contextlib.contextmanager
def connect(path):
    """A connection to a database past the shop, which commits and closes at the end."""
    with contextlib.closing(sqlite3.connect(path)) as connection, connection:
        yield connection


def lock(path):
    """A connection that holds the write lock of a database, as another process would."""
    connection = sqlite3.connect(path, isolation_level=None)
    connection.execute("BEGIN EXCLUSIVE")
    return connection


# ---------------------------------------------------------------------------------------- products


def test_a_product_is_created_and_read_back_as_it_was_given(shop):
    fields = {"name": "Mug ☕", "description": "Blue", "price": 9.99, "stock": 12}
    fields |= {"sku": "MUG-BL", "metadata": {"image": "https://img.example/mug.jpg"}}
    response = shop("POST", "/products/", fields, status=201)
    assert response.headers["Location"] == "/products/1/"
    assert response.json == {"id": 1, **fields}
    assert shop("GET", "/products/1/").json == response.json
    assert shop("GET", "/products/").json == {"products": [response.json], "next": None}


@pytest.mark.parametrize(
    "body",
    [
        *(b'{"name": "x", "price": %b}' % number for number in (b"0", b"2.0", b"1e1", b"9.990")),
        *(b'{"name": "x", "price": 1, "stock": %b}' % number for number in (b"2.0", b"1e2", b"-0")),
        b'{"name": "x", "price": 1000000000, "stock": 1000000000}',
        '{"name": "\u2000x\u3000", "price": 0.01, "description": "\\ud83d\\ude00\\t"}'.encode(),
        b'{"name": "x", "price": 1, "description": "%s"}' % (b"y" * 10_000),
        b'\xef\xbb\xbf{"name": "\xef\xbb\xbfx", "price": 1}',  # only the first byte order mark goes
    ],
)
def test_whatever_the_schema_allows_is_accepted_and_all_but_name_and_price_is_optional(shop, body):
    product = {"id": 1, "description": "", "stock": 0} | EMPTY | json.loads(body)
    assert shop("POST", "/products/", body, status=201).json == product


EDGES = "\0\t\n \x1b\x7f\x9f\u3000\u2028"  # what a sku may not begin or end with
INVALID_FIELDS = {
    "name": ["", "   ", "\u2003\t\n", "x" * 201, "a\0b", "\ud800", 5, None, True, ["x"], {}],
    "description": ["y" * 10_001, "\0", "x\udfff", 5, None],
    "price": [-0.01, 1000000000.01, 9.999, "9.99", None, True, [], 1e300],
    "stock": [-1, 1000000001, 1.5, "2", True, None, 10**30],
    "sku": ["x" * 65, "a\0b", "\ud800", 5, None, ["x"], *EDGES]
    + [text for edge in EDGES for text in (edge + "x", "x" + edge)],
    "metadata": [None, [], "x", 5],
    "id": [7],
    "colour": ["red"],
}
ABSURD_NUMBERS = ["1e999", "-1e999", "1e1000000000", "1e-1000000000", "1e99999999999999999999"]
ABSURD_NUMBERS += ["1e-99999999999999999999", "1" * 5000, "9" * 60_000, "0." + "1" * 60_000]


@pytest.mark.parametrize("number", ABSURD_NUMBERS)
def test_absurd_numbers_are_rejected_at_once(shop, number):
    body = f'{{"name": "x", "price": {number}, "stock": {number}}}'
    assert list(errors_of(shop("POST", "/products/", body.encode()))) == ["#/price", "#/stock"]


def test_all_errors_are_reported_at_once_and_each_field_by_its_first(shop):
    body = {"price": 1_000_000_000.125, "stock": -0.5, "sku": "x\x1b", "colour": "red", "": 1}
    body |= {"metadata": FULL_METADATA | {"n": None}, "a/b~c d": 1}
    fields = "name, description, price, stock, sku, metadata"
    unknown = f"is an unknown field; allowed: {fields}."
    ends = "no white space or control characters at its ends"
    assert errors_of(shop("POST", "/products/", body)) == {
        "#/name": "name is required.",
        "#/price": "price must be 0 to 1000000000.",
        "#/stock": "stock must be 0 to 1000000000.",
        "#/sku": f"sku must have no NUL, and {ends}.",
        "#/metadata": "metadata must have at most 50 entries, not 51.",
        "#/metadata/n": "n must be a string.",
        "#/colour": f"colour {unknown}",
        "#/a~1b~0c%20d": f"a/b~c d {unknown}",
        "#/": f'"" {unknown}',
    }
    for path, names in ("/products/1/", fields), ("/orders/1/", "status, reference, metadata"):
        errors = {"#": f"The body must have at least one of {names}."}
        assert errors_of(shop("PATCH", path, {})) == errors


@pytest.mark.parametrize(
    "body, detail",
    [
        *((body, "JSON") for body in (b"", b"{", b"nonsense", b'{"name": "a\nb"}', b"{} {}")),
        *((body, "JSON") for body in (b"\xef\xbb\xbf", b"\xef\xbb\xbf{")),
        (b'{"name": NaN}', "NaN is not valid JSON"),
        (b'{"name": -Infinity}', "Infinity is not valid JSON"),
        *((b'{"name": "\xff"}', "UTF-8"), ('{"name": "x"}'.encode("utf-16"), "UTF-8")),
        (b'{"name": "a", "name": "b", "price": 1}', 'duplicate key "name"'),
        (b"[" * 100_000, "nested"),
    ],
)
def test_a_body_that_is_not_json_is_a_400(shop, body, detail):
    assert detail in shop("POST", "/products/", body, status=400).json["detail"]


def test_a_body_of_20000_levels_is_rejected(shop):
    body = b'{"a":' * 20_000 + b"1" + b"}" * 20_000
    detail = shop("POST", "/products/", body).json["detail"]
    # How deep json can read depends on the Python.
    assert re.search("nested too deep|a is an unknown field", detail)


@pytest.mark.parametrize("body", [b"[]", b'"x"', b"5", b"null", b"true"])
def test_a_body_must_be_an_object(shop, body):
    assert errors_of(shop("POST", "/products/", body)) == {"#": "The body must be an object."}


NOT_JSON = "text/plain application/x-www-form-urlencoded application/json;charset=latin-1 "
NOT_JSON += "application/jsonp application/merge-patch+json"


@pytest.mark.parametrize("content_type", ["", *NOT_JSON.split()])
def test_a_body_not_declared_as_json_is_a_415_that_helps_a_curl_user(shop, content_type):
    refused = shop("POST", "/products/", BODY, {"Content-Type": content_type}, status=415)
    assert refused.headers["Accept"] == "application/json"
    assert "-H 'Content-Type: application/json'" in refused.json["detail"]


def test_json_may_be_declared_in_any_of_its_spellings(shop):
    for content_type in "Application/JSON; charset=UTF-8", 'application/json;charset="utf-8"':
        shop("POST", "/products/", BODY, {"Content-Type": content_type}, status=201)


def test_a_body_over_128_kibibytes_is_a_413_and_one_of_just_that_is_read(shop):
    shop("POST", "/products/", BODY.ljust(128 << 10), status=201)
    refused = shop("POST", "/products/", BODY.ljust((128 << 10) + 1), status=413)
    assert refused.json["detail"] == "The body may have at most 131072 bytes."


INVALID_SORTS = "sort= sort=stock sort=Id sort=--id sort=+id sort=id,name sort=id&sort=id"
INVALID_QUERIES = dict.fromkeys(["/", "/openapi.json", "/products/1/", "/orders/1/"], "x=1") | {
    "/products/": (
        "limit=0 limit=1001 limit= limit=1_0 limit=%205 limit=%2B5 limit=%D9%A3 limit=1.0 limit=-1 "
        f"limit=1&limit=2 after=-1 after={'9' * 20} after={'9' * 5000} after=x "
        f"available=yes available=True available= q=%00 q=%FF q=%ED%A0%80 {INVALID_SORTS} "
        f"sku=%20x sku=x%0A sku=x%00y sku=%FF sku=x%1F sku={'x' * 65} sku=x&sku=y "
        "colour=red Q=x %FF=1"
    ),
    "/orders/": (
        f"limit=1001 status=lost status= q=x sort=name {INVALID_SORTS} "
        f"reference={'x' * 201} reference=%00 reference=%FF reference=a&reference=a"
    ),
}


@pytest.mark.parametrize("path, queries", INVALID_QUERIES.items())
def test_an_invalid_or_unknown_query_parameter_is_named(shop, mug, path, queries):
    shop.order((1, 1))
    for query in queries.split():
        response = shop("GET", f"{path}?{query}")
        assert list(errors_of(response)) == [query.partition("=")[0].replace("%FF", "?")]
        assert "parameter" in response.json["errors"][0]
    assert list(errors_of(shop("POST", "/orders/?x=1", order_of((1, 1))))) == ["x"]


UNKNOWN_IDS = "0 7 abc %ff1 1%ff 99999999999999999999 9223372036854775808 -1 +1 "
UNKNOWN_IDS += "1_0 %201 %D9%A3 1.0 1%00 1%0A %F0%9F%98%80"


@pytest.mark.parametrize("number", UNKNOWN_IDS.split())
def test_an_id_that_does_not_exist_is_a_404(shop, mug, number):
    for _, method, path, body in ACCESS.values():
        if "/1/" in path:
            shop(method, path.replace("1", number), body, status=404)


def test_every_path_works_without_its_last_slash_for_every_method(shop, mug):
    shop.order((1, 1))
    for _, method, path, body in ACCESS.values():
        response = shop(method, path.rstrip("/") or "/", body)
        assert response.status_int in (200, 201, 204), path
        assert method != "GET" or response.json == shop("GET", path).json


def test_a_path_that_does_not_exist_is_a_404(shop):
    paths = "/product /products// /products/1/2/ /orders/1/stock/ // /products/1/stock/x"
    for path in paths.split():
        detail = shop("GET", path, status=404).json["detail"]
        assert detail == "No such path; GET / lists the paths."


def test_an_update_changes_only_the_fields_it_gives(shop, mug):
    for fields in {"price": 12.5}, {"name": "Cup", "description": "d", "stock": 0}:
        mug |= fields
        response = shop("PATCH", "/products/1/", fields, status=200)
        assert response.json == shop("GET", "/products/1/").json == mug


GUARDED_CHANGES = [
    ("PATCH", "/products/1/", {"price": 2}, 200),
    ("PATCH", "/products/1/", {"sku": "A"}, 200),
    ("PATCH", "/products/1/", {"metadata": {"a": "1"}}, 200),
    ("POST", "/products/1/stock/", {"change": 1}, 200),
    ("PATCH", "/orders/1/", {"status": "completed"}, 200),
    ("PATCH", "/orders/1/", {"reference": "a"}, 200),
    ("PATCH", "/orders/1/", {"metadata": {"a": "1"}}, 200),
    ("DELETE", "/products/1/", None, 204),
]


def etag_of(shop, path):
    """The ETag of the resource that a request to the path changes."""
    return shop("GET", path.removesuffix("stock/")).headers["ETag"]


def test_if_match_guards_every_change_and_the_412_says_what_to_do(shop, mug):
    shop.order((1, 1))
    changed = "The resource has changed since you read it: fetch it again and retry."
    weak = "only weak tags, which never match: send the ETag without W/"
    for method, path, body, status in GUARDED_CHANGES:
        etag = etag_of(shop, path)
        assert re.fullmatch('"[!#-~]+"', etag)
        before = everything(shop)
        collection = path[: path.index("/", 1) + 1]
        old = etag_of(shop, collection)
        malformed = f"w/{etag}", f"x{etag}", f"{etag}x", f'{etag}"', f"'{etag}'", f"{etag}{etag}"
        for tags in '"other"', "nonsense", "", '"a", "b"', f'"other", W/{etag}', *malformed:
            refused = shop(method, path, body, {"If-Match": tags}, status=412)
            assert refused.json["detail"] == changed
        for tags in f"W/{etag}", f'W/"other", W/{etag}':
            refused = shop(method, path, body, {"If-Match": tags}, status=412)
            assert weak in refused.json["detail"]
        assert everything(shop) == before
        response = shop(method, path, body, {"If-Match": f' , "other"\t,,{etag} ,'}, status=status)
        assert response.headers.get("ETag") != etag
        assert etag_of(shop, collection) != old
        shop(method, path, body, {"If-Match": etag}, status=404 if method == "DELETE" else 412)
    shop("PATCH", "/products/1/", {"price": 2}, {"If-Match": "*"}, status=404)
    shop("PATCH", "/orders/1/", {"status": "completed"}, {"If-Match": "*"}, status=200)


@pytest.mark.parametrize("key", [{}, {"Idempotency-Key": "k"}])
def test_the_etag_of_a_change_is_the_one_of_the_next_read(shop, mug, key):
    shop.order((1, 1))
    for method, path, body, _ in [change for change in GUARDED_CHANGES[:-1] for _ in range(2)]:
        assert shop(method, path, body, key).headers["ETag"] == etag_of(shop, path)


def test_conditions_are_ignored_where_nothing_is_guarded(shop, mug):
    for condition in {"If-None-Match": "*"}, {"If-Match": '"x"'}, {"If-Match": 'W/"x"'}:
        shop("POST", "/products/", {"name": "x", "price": 1}, condition, status=201)
        shop("POST", "/orders/", order_of((1, 1)), condition, status=201)
    for path in "/products/", "/products/1/":
        shop("GET", path, None, {"If-Match": '"x"'}, status=200)
    shop("PATCH", "/products/1/", {"price": 2}, {"If-None-Match": "*"}, status=200)


def test_stock_is_added_to_and_taken_from(shop, mug):
    path = "/products/1/stock/"
    assert shop("POST", path, {"change": 7}).json == {**mug, "stock": 12}
    assert shop("POST", path, {"change": -12}).json == {**mug, "stock": 0}
    short = shop("POST", path, {"change": -3}, status=409)
    assert short.json["shortages"] == [{"product_id": 1, "requested": 3, "available": 0}]
    shop("PATCH", "/products/1/", {"stock": 999_999_999})
    for change in 2, 1.5, "1", None, True, 10**10:
        assert list(errors_of(shop("POST", path, {"change": change}))) == ["#/change"]
        assert shop.stock(mug) == 999_999_999


def test_a_read_is_answered_304_as_long_as_nothing_has_changed(shop, mug):
    paths = "/orders/1/ /products/ /products/1/ /products/?limit=1 /products/1/stock/ /orders/"
    for path in paths.split():
        shop("PATCH", "/products/1/", {"stock": 10})
        shop.order((1, 1))
        etag = shop("GET", path).headers["ETag"]
        for etags in etag, "W/" + etag, '"x", ' + etag, "*":
            response = shop("GET", path, None, {"If-None-Match": etags}, status=304)
            assert (response.headers["ETag"], response.body) == (etag, b"")
        shop.order((1, 1))
        shop("PATCH", "/orders/1/", {"status": "cancelled"})
        fresh = shop("GET", path, None, {"If-None-Match": etag}, status=200)
        assert fresh.headers["ETag"] != etag


# ----------------------------------------------------------------------------------------- sorting

# Name, price, stock: equal names as a search compares them, equal prices, and letters that differ
# in UTF-16 and UTF-8.
UNSORTED = "ZZ 9 1, A 2 0, a 2 5, B 1 0, SS 3 2, ß 2 0, Zo& 0 1, zÖ& 0 9, "
UNSORTED += "\ue000 1000000000 1, 😀 1 1, zö& 4 0"
# Their ids in each order, once the first is "b 3 1"; equal ones by id, in reversed orders too.
SORTED = {
    "id": [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11],
    "-id": [11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1],
    "name": [2, 3, 1, 4, 5, 6, 7, 8, 11, 9, 10],
    "-name": [10, 9, 7, 8, 11, 5, 6, 1, 4, 2, 3],
    "price": [7, 8, 4, 10, 2, 3, 6, 1, 5, 11, 9],
    "-price": [9, 11, 1, 5, 2, 3, 6, 4, 10, 7, 8],
}


def fill_unsorted(shop):
    """Creates the products of UNSORTED, the first of which is changed afterwards."""
    for row in UNSORTED.split(", "):
        name, price, stock = row.split()
        shop.product(name=name, price=int(price), stock=int(stock))
    shop("PATCH", "/products/1/", {"name": "b", "price": 3})


def walk_pages(shop, path, name):
    """The items of all pages from a path on, each found by the page before it."""
    items = []
    while path:
        page = shop("GET", path, status=200)
        assert page.json[name] or not items
        assert not any(item in items for item in page.json[name])  # or the walk would never end
        items += page.json[name]
        path = page.json["next"]
        assert page.headers.get("Link") == (f'<{path}>; rel="next"' if path else None)
    return items


@pytest.mark.parametrize("sort", ["", *SORTED])
def test_products_are_sorted_as_they_are_now_and_equal_ones_by_id_through_all_pages(shop, sort):
    fill_unsorted(shop)
    order = SORTED[sort or "id"]
    for query, found in [
        *(("", order), ("q=s&", [5, 6]), ("q=z%C3%96+%26&available=true&", [7, 8])),
        *(("available=true&", [1, 3, 5, 7, 8, 9, 10]), ("available=false&", [2, 4, 6, 11])),
    ]:
        path = f"/products/?{query}" + (f"sort={sort}&" if sort else "")
        products = [shop("GET", f"/products/{n}/").json for n in order if n in found]
        assert shop("GET", path).json == {"products": products, "next": None}
        next_url = f"{path}limit=1&after={products[0]['id']}"
        assert shop("GET", f"{path}limit=1").json["next"] == next_url
        for page in "limit=1", "limit=2", "limit=3", "limit=11", "limit=1000", "limit=4&after=0":
            assert walk_pages(shop, path + page, "products") == products
        # One that the search does not find has a place all the same.
        for position, after in enumerate(order, 1):
            rest = [product for product in products if product["id"] in order[position:]]
            assert shop("GET", f"{path}after={after}").json == {"products": rest, "next": None}


def test_a_page_continues_after_a_deleted_product_where_its_place_is_known(shop):
    fill_unsorted(shop)
    shop("DELETE", "/products/3/")
    for query, ids in [
        *(("after=3", [4, 5, 6, 7, 8, 9, 10, 11]), ("sort=-id&after=3", [2, 1])),
        *(("after=99", []), ("sort=-id&after=99", [11, 10, 9, 8, 7, 6, 5, 4, 2, 1])),
    ]:
        assert shop.ids("/products/?" + query) == ids
    orders = "name", "-name", "price", "-price"
    more = "", "&limit=2", "&q=a&available=true"
    for sort, after, rest in itertools.product(orders, (3, 99), more):
        refused = shop("GET", f"/products/?sort={sort}&after={after}{rest}")
        unknown = f"after names product {after}, which does not exist: its place is unknown."
        assert errors_of(refused) == {"after": unknown}
        assert "parameter" in refused.json["errors"][0]


# A list from its start, which is in the order of an index.
LIST = r"WHERE TRUE (AND \(stock > 0\) = 1 )?(AND (sku|reference) = '' )?ORDER BY"
# What may be read or sorted without a search in an index, and in which statements.
REASONS = {
    "SCAN (product|orders)": LIST,
    "SCAN product USING INDEX product_by_price(_down)?": LIST,
    "SCAN product_search USING COVERING INDEX product_by_name": LIST,
    "SCAN product_search( USING INDEX product_by_name)?": "instr",  # a search reads all texts
    "USE TEMP B-TREE FOR ORDER BY": "instr.*ORDER BY (price|folded_name)",  # and sorts its finds
    "USE TEMP B-TREE FOR PART OF ORDER BY": "folded_name DESC|FROM order_line",  # equal ones
    "USE TEMP B-TREE FOR( PART OF)? ORDER BY": "AND sku = 'S1'",  # one product
    "SCAN product USING COVERING INDEX .*": "SELECT id FROM product LIMIT 1",  # for the health
}
# The index that finds the rows of a statement with this condition, whatever else it has.
INDEXES = {"sku = 'S1'": "product_by_sku", "reference = 'cart'": "orders_by_reference"}


def test_no_statement_reads_or_sorts_more_than_it_must(tmp_path):
    statements = []
    store = db.Store(tmp_path / "store", trace=lambda sql: statements.append(" ".join(sql.split())))
    statements.clear()
    for number in range(1, 7):
        store.create_product(name="x", price=1, stock=9, sku=f"S{number}")
        store.create_order([{"product_id": 1, "quantity": 1}], "cart" if number > 1 else "")
    for q, sku, available, sort, after, limit in itertools.product(
        [None, "x", "x 1"], [None, "", "S1"], [None, True], db.PRODUCT_ORDERS, [0, 5], [None, 3]
    ):
        query = {"q": q, "sku": sku, "available": available, "sort": sort, "after": after}
        store.list_products(**query, limit=limit)
        store.list_products_json(**query, limit=limit)
    for sort, after in itertools.product(db.ID_ORDERS, [0, 5]):
        store.list_movements(1, sort=sort, after=after)
        for status, reference in itertools.product([None, "pending"], [None, "", "cart"]):
            store.list_orders(status=status, reference=reference, sort=sort, after=after)
    store.update_product(1, name="y", stock=3, sku="new", metadata={"a": "b"})
    store.update_stock(1, 1)
    for status in "completed", "cancelled":
        store.update_order(1, status=status, metadata={"a": "b"})
    store.get_order(1)
    store.delete_product(2)
    with store.transaction():
        assert store.get_idempotent("k", "f") is None
        store.save_idempotent("k", "f", 1)
    assert store.expire_orders(db.timestamp(-100)) == 4
    store.check_health()
    store.close()
    with connect(tmp_path / "store") as connection:
        plans = {
            text: [row[3] for row in connection.execute("EXPLAIN QUERY PLAN " + text)]
            for text in statements
            if text.startswith(("SELECT", "INSERT", "UPDATE", "DELETE"))
        }
        insert = next(text for text in plans if text.startswith("INSERT INTO orders"))
        opcodes = {row[1] for row in connection.execute("EXPLAIN " + insert)}
    assert "OpenEphemeral" not in opcodes  # a CHECK with IN would make a table for each order
    assert len(plans) > 150
    for text, plan in plans.items():
        for condition, index in INDEXES.items():
            assert condition not in text or f"INDEX {index} " in str(plan), (text, plan)
        for step in plan:
            step = re.sub("RIGHT PART|LAST TERM|LAST 2 TERMS", "PART", step)
            if re.match(r"SCAN (?!json_each|CONSTANT|\(subquery)|.*(TEMP|AUTOMATIC)", step):
                kinds = [kind for known, kind in REASONS.items() if re.fullmatch(known, step)]
                assert any(re.search(kind, text) for kind in kinds), (step, text)


# -------------------------------------------------------------------------------------- every path


# What each route needs where its token is set, and a request to it.
ACCESS = {
    "get_index": ("nobody", "GET", "/", None),
    "get_health": ("nobody", "GET", "/healthz", None),
    "get_openapi": ("nobody", "GET", "/openapi.json", None),
    "list_products": ("nobody", "GET", "/products/", None),
    "get_product": ("nobody", "GET", "/products/1/", None),
    "create_order": ("order", "POST", "/orders/", order_of((1, 1))),
    "list_orders": ("admin", "GET", "/orders/", None),
    "get_order": ("admin", "GET", "/orders/1/", None),
    "update_order": ("admin", "PATCH", "/orders/1/", {"status": "completed"}),
    "create_product": ("admin", "POST", "/products/", {"name": "x", "price": 1}),
    "update_product": ("admin", "PATCH", "/products/1/", {"price": 2}),
    "update_stock": ("admin", "POST", "/products/1/stock/", {"change": 1}),
    "list_movements": ("admin", "GET", "/products/1/stock/", None),
    "delete_product": ("admin", "DELETE", "/products/1/", None),
}
METHODS = {
    path: {"HEAD", "OPTIONS", *(method for _, method, other, _ in ACCESS.values() if other == path)}
    for _, _, path, _ in ACCESS.values()
}


@pytest.mark.parametrize("path, methods", METHODS.items())
def test_options_lists_the_methods_of_a_path_and_the_others_are_a_405(shop, mug, path, methods):
    allow = ", ".join(sorted(methods))
    options = shop("OPTIONS", path, status=204)
    assert (options.headers["Allow"], options.body) == (allow, b"")
    for method in {"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "TRACE", "BREW"} - methods:
        assert shop(method, path, status=405).headers["Allow"] == allow


def test_head_answers_with_the_headers_of_get(shop, mug):
    shop.order((1, 1))
    for path in *METHODS, "/products/?limit=1", "/products/9/", "/nowhere/":
        get = shop("GET", path)
        head = shop("HEAD", path)
        assert (head.status, head.headerlist, head.body) == (get.status, get.headerlist, b"")


def test_the_index_names_the_paths_and_health_is_ok(shop):
    index = {"products": "/products/", "orders": "/orders/", "health": "/healthz"}
    assert shop("GET", "/").json == index | {"openapi": "/openapi.json"}
    assert shop("GET", "/healthz").json == {"status": "ok"}


def mounted(shop, catchall=True):
    """A client of another Bottle, in which the shop is mounted at /a/b/."""
    parent = bottle.Bottle()
    parent.catchall = catchall
    parent.mount("/a/b/", shop.app.app)
    return Client(parent, "/a/b")


@pytest.mark.parametrize("catchall", [None, True, False])
def test_an_unexpected_error_is_a_500_that_reveals_nothing(shop, mug, database, catchall):
    if catchall is not None:
        shop = mounted(shop, catchall)
    shop("GET", "/products/", status=200)
    with connect(database) as connection:
        connection.execute("ALTER TABLE product RENAME TO secret_name")
    assert_reveals_nothing(shop("GET", "/products/"))
    assert_reveals_nothing(shop.order((1, 1)))
    shop("GET", "/healthz", status=503)
    shop("GET", "/openapi.json", status=200)


def assert_reveals_nothing(response):
    """A 500 whose cause is in the log only."""
    assert response.status_int == 500
    assert "secret" not in response.text
    assert "no such table" not in response.text
    assert "Traceback" in response.errors


# --------------------------------------------------------------------------------------- embedding


def test_urls_carry_the_script_name_of_a_mounted_shop(shop):
    client = mounted(shop)
    product = client("POST", "/products/", {"name": "x", "price": 1, "stock": 9})
    assert product.headers["Location"] == "/a/b/products/1/"
    client("POST", "/products", {"name": "y", "price": 1}, status=201)
    order = client("POST", "/orders/", order_of((1, 1)), status=201)
    assert order.headers["Location"] == "/a/b/orders/1/"
    page = client("GET", "/products/?limit=1")
    assert page.json["next"] == "/a/b/products/?limit=1&after=1"
    assert "</a/b/" in page.headers["Link"]
    assert client("GET", "/").json["orders"] == "/a/b/orders/"
    assert client("GET", "/openapi.json").json["servers"] == [{"url": "/a/b"}]
    client("GET", "/products/%E6%97%A5/", status=404)


def test_an_embedding_program_adds_routes_and_plugins_of_its_own(shop, mug):
    calls = []

    def count_calls(callback):
        return lambda **ids: calls.append(ids) or callback(**ids)

    shop.app.app.bottle.get("/hello")(lambda: "hi")
    assert shop.app.get("/hello").text == "hi"
    shop.app.app.bottle.install(count_calls)
    assert shop.app.get("/hello").text == "hi"
    assert shop("GET", "/products/1/").json == mug
    shop.order((1, 1), status=201)
    assert len(calls) == 3


def test_two_shops_in_one_process_do_not_touch_each_other(make_shop, shop, tmp_path):
    other = make_shop(f"sqlite:///{tmp_path}/other.sqlite3", admin_token="secret")
    shop.product()
    assert other("GET", "/products/").json["products"] == []
    other("GET", "/orders/", status=401)
    shop("GET", "/orders/", status=200)


def test_the_store_rejects_an_order_without_lines_or_with_two_for_a_product(store):
    line = {"product_id": 1, "quantity": 1}
    for lines, message in ([], "at least one line"), ([line, line], "each product once"):
        with pytest.raises(ValueError, match=message):
            store.create_order(lines)


def run_python(folder, program):
    """Run a program that can import the shop."""
    command = [sys.executable, "-c", program]
    environment = {"PYTHONPATH": str(HERE)}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def test_an_older_python_gets_one_clear_line(tmp_path):
    program = "import sys; sys.version_info = (3, 10, 0, 'final', 0); import shop"
    ended = run_python(tmp_path, program)
    assert ended.returncode == 1
    assert re.fullmatch(r"shop: Python 3\.11 or later is needed, this is [^\n]+\n", ended.stderr)


def test_importing_the_shop_has_no_effects(tmp_path):
    assert run_python(tmp_path, "import shop, db").returncode == 0
    assert list(tmp_path.iterdir()) == []


def test_db_knows_no_http_and_shop_no_sql():
    http_modules = r"^ *(import|from) (bottle|http|shop|urllib|waitress|wsgiref)\b"
    assert not re.search(http_modules, (HERE / "db.py").read_text(), re.M)
    sql = r"\b(SELECT|INSERT INTO|DELETE FROM|BEGIN|COMMIT|ROLLBACK|PRAGMA|SAVEPOINT)\b"
    assert not re.search(f"{sql}|import sqlite3", (HERE / "shop.py").read_text())


# ------------------------------------------------------------------------------------------ orders


def test_an_order_takes_the_stock_and_copies_name_price_and_sku(shop):
    mug = shop.product(sku="MUG", metadata={"not": "copied"})
    tea = shop.product(name="Tea", price=4.99, stock=1)
    response = shop.order((tea["id"], 1), (mug["id"], 2), status=201)
    assert response.headers["Location"] == "/orders/1/"
    created_at = time.strptime(response.json["created_at"], "%Y-%m-%dT%H:%M:%SZ")
    assert abs(time.time() - calendar.timegm(created_at)) < 60
    assert response.json == {
        **{"id": 1, "status": "pending", "total_price": 24.97, "reference": "", "metadata": {}},
        "created_at": response.json["created_at"],
        "products": [
            {"product_id": 2, "name": "Tea", "price": 4.99, "quantity": 1, "sku": ""},
            {"product_id": 1, "name": "Mug", "price": 9.99, "quantity": 2, "sku": "MUG"},
        ],
    }
    assert (shop.stock(mug), shop.stock(tea)) == (3, 0)
    shop("PATCH", "/products/1/", {"name": "Cup", "price": 1, "sku": "CUP"})
    shop("DELETE", "/products/2/")
    assert shop("GET", "/orders/1/").json == response.json
    assert shop("GET", "/orders/").json["orders"][0] == response.json


def test_an_order_that_is_short_of_anything_changes_nothing(shop, mug):
    shop.product(name="Tea", stock=1)
    shop.product(name="Jam", stock=50)
    before = everything(shop)
    short = shop.order((1, 6), (3, 50), (2, 2), status=409).json
    assert short["title"] == "Insufficient stock"
    assert short["shortages"] == [
        {"product_id": 1, "requested": 6, "available": 5},
        {"product_id": 2, "requested": 2, "available": 1},
    ]
    assert short["detail"].startswith("Product 1 has 5 left, 6 were asked for.")
    assert everything(shop) == before


NO_LINE = "#/products/0/product_id #/products/0/quantity"
INVALID_ORDERS = [
    *((body, "#/products") for body in ({}, {"products": []}, {"products": {}})),
    *((body, NO_LINE) for body in ({"products": [{}]}, order_of((0, 0)), order_of((True, "2")))),
    *((order_of((1, quantity)), "#/products/0/quantity") for quantity in (100_001, 1.5)),
    *((order_of((number, 1), (1.0, 1)), "#/products/1") for number in (1, 1.0)),
    ({"products": [1]}, "#/products/0"),
    (order_of((1, 1), (1, 0)), "#/products/1/quantity #/products/1"),
    (order_of(*((number, 1) for number in range(1, 102))), "#/products"),
    ({"products": [{"product_id": 1, "quantity": 1, "price": 1}]}, "#/products/0/price"),
    (order_of((10**20, 1)) | {"total": 5}, "#/total #/products/0/product_id"),
]


def test_money_is_exact_to_the_cent(shop):
    dice = random.Random(1)
    prices = [1, 7, 110, 99_999, 99_999_999_99, 99_999_999_999, 10**11]
    prices += [dice.randrange(0, 10**11 + 1) for _ in range(93)]
    quantities = [dice.randrange(1, 150) for _ in prices]
    for cents in prices:
        body = f'{{"name": "x", "price": {Decimal(cents) / 100}, "stock": 1000000}}'
        shop("POST", "/products/", body.encode())
    order = json.loads(shop.order(*enumerate(quantities, 1)).text, parse_float=Decimal)
    assert order["total_price"] == Decimal(sum(map(int.__mul__, prices, quantities))) / 100
    exact_prices = [Decimal(cents) / 100 for cents in prices]
    assert [line["price"] for line in order["products"]] == exact_prices
    sent = [str(float(price)) for price in exact_prices]
    for query in "", "?limit=100", "?q=x", "?sort=name":
        assert re.findall(r'"price":([^,]+)', shop("GET", "/products/" + query).text) == sent
    for product_id, price in enumerate(sent, 1):
        assert f'"price":{price},' in shop("GET", f"/products/{product_id}/").text


def test_the_greatest_order_there_can_be_has_an_exact_total(shop):
    for price in 10**9, 10**9, 999_999_999.99, 0.01, 0.02:
        shop.product(price=price, stock=100_000)
    nearly = [(1, 4_999), (2, 5_000), (3, 1)]
    totals = ["9999999999999.99", "10000000000000.0"]
    for order_id, lines in (1, nearly), (2, [*nearly, (4, 1)]):
        for response in shop.order(*lines), shop("GET", f"/orders/{order_id}/"):
            assert f'"total_price":{totals[order_id - 1]},' in response.text
    before = everything(shop)
    for lines in [*nearly, (5, 1)], [(1, 10_000), (4, 1)], [(1, 90_000)]:
        errors = {"#/products": "products make a total over 10000000000000."}
        assert errors_of(shop.order(*lines)) == errors
    assert everything(shop) == before
    assert re.findall(r'"total_price":([^,]+)', shop("GET", "/orders/").text) == totals


def test_orders_are_paged_filtered_sorted_and_polled(shop):
    shop.product(stock=1000)
    assert shop("GET", "/orders/").json == {"orders": [], "next": None}
    references = ["cart-1", "", "cart-2", "cart-1", "CART-1", "cart-1", "cart-10", *["x"] * 98]
    for reference in references:
        shop("POST", "/orders/", referring(reference, (1, 1)))
    for number in 2, 3, 4:
        shop("PATCH", f"/orders/{number}/", {"status": "completed"})
    for query, ids, next_after in [
        *(("", [*range(1, 101)], 100), ("limit=1000", [*range(1, 106)], None)),
        *(("after=100", [*range(101, 106)], None), ("after=105", [], None)),
        *(("after=0&limit=105", [*range(1, 106)], None), ("sort=id&after=103", [104, 105], None)),
        *(("sort=-id", [*range(105, 5, -1)], 6), ("sort=-id&limit=10", [*range(105, 95, -1)], 96)),
        ("sort=-id&after=0&limit=105", [*range(105, 0, -1)], None),
        ("sort=-id&after=999&limit=105", [*range(105, 0, -1)], None),
        *(("sort=-id&after=3", [2, 1], None), ("status=cancelled", [], None)),
        *(("status=completed&limit=2", [2, 3], 3), ("status=completed&limit=2&after=3", [4], None)),
        ("status=completed&sort=-id&limit=2", [4, 3], 3),
        ("status=completed&sort=-id&limit=2&after=3", [2], None),
        *(("reference=cart-1", [1, 4, 6], None), ("reference=cart-2", [3], None)),
        *((f"reference={text}", [], None) for text in ("cart", "%25", "&status=pending")),
        *(("reference=", [2], None), ("reference=cart-1&sort=-id", [6, 4, 1], None)),
        ("reference=cart-1&sort=-id&after=6", [4, 1], None),
        ("reference=cart-1&status=pending", [1, 6], None),
        *(("reference=cart-1&limit=2", [1, 4], 4), ("reference=cart-1&limit=2&after=4", [6], None)),
    ]:
        page = shop("GET", "/orders/?" + query).json
        assert [order["id"] for order in page["orders"]] == ids
        next_path = f"/orders/?{query}&after={next_after}".replace("?&", "?")
        assert page["next"] == (next_path if next_after else None)
    for limit, (sort, step) in itertools.product((4, 35), [("id", 1), ("-id", -1)]):
        walked = walk_pages(shop, f"/orders/?sort={sort}&limit={limit}", "orders")
        assert [order["id"] for order in walked] == [*range(1, 106)][::step]


@pytest.mark.parametrize("statuses", [[], ["completed", "completed"]])
def test_a_cancelled_order_puts_its_stock_back_once_and_for_good(shop, mug, database, statuses):
    shop.order((1, 4))
    for status in *statuses, *["cancelled"] * 3:
        etag = etag_of(shop, "/orders/1/")
        before = shop("GET", "/orders/1/").json
        changed = shop("PATCH", "/orders/1/", {"status": status}, status=200)
        assert changed.json == {**before, "status": status}
        assert (changed.headers["ETag"] == etag) == (before["status"] == status)
        assert shop.stock(mug) == (5 if status == "cancelled" else 1)
    for more in {}, {"reference": "lost", "metadata": {"lost": "x"}}:
        refused = shop("PATCH", "/orders/1/", {"status": "completed"} | more, status=409)
        assert refused.json["detail"] == "Order 1 is cancelled and cannot become completed."
    assert shop("GET", "/orders/1/").json == changed.json
    assert steps_of(shop) == [(5, 5, None, ""), (-4, 1, 1, ""), (4, 5, 1, "")]
    assert db.check_integrity(database) == []


# --- references


def referring(reference, *lines):
    return order_of(*lines) | {"reference": reference}


@pytest.mark.parametrize("reference", ["", "cart-17", "é" * 200, "😀" * 200, " \t\n", "ﬁ/?&=#%00"])
def test_a_reference_is_text_of_the_caller_that_stays_with_the_order(shop, mug, reference):
    created = shop("POST", "/orders/", referring(reference, (1, 1)), status=201)
    assert created.json["reference"] == reference
    assert shop("GET", "/orders/1/").json == created.json
    assert shop("GET", "/orders/").json["orders"] == [created.json]
    cancelled = shop("PATCH", "/orders/1/", {"status": "cancelled"})
    assert cancelled.json == {**created.json, "status": "cancelled"}
    assert shop.ids("/orders/?" + urllib.parse.urlencode({"reference": reference})) == [1]


# --- skus and metadata

SKUS = ["x" * 64, "😀" * 64, "a b", "a\tb", "a\x1fb", "a&b=c#d", "0", "00", "%", "_", "'", "\\"]
SKUS += [*"\u00c9\u00e9K\u212akﬁ\u00ad\ufeff", "E\u0301", "e\u0301", "fi"]


def ids_by_sku(shop, sku, more=""):
    path = "/products/?" + urllib.parse.urlencode({"sku": sku}) + more
    return [product["id"] for product in walk_pages(shop, path, "products")]


def test_a_sku_is_any_text_of_64_characters_and_found_code_point_by_code_point(shop):
    products = [shop.product(sku=sku) for sku in SKUS]
    assert [product["sku"] for product in products] == SKUS
    assert shop("GET", "/products/").json["products"] == products
    assert [ids_by_sku(shop, sku) for sku in SKUS] == [[product["id"]] for product in products]
    for sku in "x", "E", "\u0301", "nothing":
        assert ids_by_sku(shop, sku) == []


def test_products_are_found_by_their_sku_or_by_having_none(shop):
    for name, sku, stock in ("b", "M", 0), ("c", "", 1), ("a", "", 0), ("d", "m", 1):
        shop.product(name=name, sku=sku, stock=stock)
    for sort in SORTED:
        assert ids_by_sku(shop, "M", f"&q=b&available=false&sort={sort}&limit=1") == [1]
        assert ids_by_sku(shop, "m", f"&sort={sort}") == [4]
    assert ids_by_sku(shop, "M", "&available=true") == ids_by_sku(shop, "M", "&q=c") == []
    assert ids_by_sku(shop, "", "&sort=name&limit=1") == [3, 2]
    assert ids_by_sku(shop, "", "&available=true") == [2]
    assert shop("GET", "/products/?sku=&limit=1").json["next"] == "/products/?sku=&limit=1&after=2"


def duplicate_sku(product_id, sku):
    """The problem of a second product with a sku; product_id: the first."""
    problem = {"type": "urn:problem-type:duplicate-sku", "title": "Duplicate sku", "status": 409}
    detail = f"Product {product_id} already has the sku '{sku}'."
    return problem | {"product_id": product_id, "detail": detail}


def test_a_second_product_with_a_sku_is_rejected_until_it_is_free(shop, database):
    for sku in "A", "a", "", "":
        shop.product(sku=sku)
    products = shop("GET", "/products/").json
    key = {"Idempotency-Key": "k"}
    new = {"name": "x", "price": 1, "stock": 3, "sku": "A"}
    patch = {"name": "lost", "stock": 9, "metadata": {"lost": "x"}, "sku": "A"}
    assert shop("POST", "/products/", new, key).json == duplicate_sku(1, "A")
    for path in "/products/2/", "/products/3/":
        assert shop("PATCH", path, patch).json == duplicate_sku(1, "A")
    assert shop("GET", "/products/").json == products
    assert shop("PATCH", "/products/1/", {"sku": "A", "price": 3}).json["price"] == 3
    assert shop("PATCH", "/products/1/", {"sku": "B"}).json["sku"] == "B"
    created = shop("POST", "/products/", new, key)  # a rejected request may be repeated
    assert created.json["id"] == 5
    assert "Idempotent-Replayed" not in created.headers
    assert shop("POST", "/products/", new).json == duplicate_sku(5, "A")
    shop("DELETE", "/products/5/")
    assert shop("POST", "/products/", new).json["id"] == 6
    shop("PATCH", "/products/6/", {"sku": ""})
    shop("PATCH", "/products/4/", {"sku": "A"}, status=200)
    skus = [product["sku"] for product in shop("GET", "/products/").json["products"]]
    assert skus == ["B", "a", "", "A", ""]
    assert db.check_integrity(database) == []


def test_one_of_sixteen_threads_creates_a_sku_and_the_others_get_the_id_of_its_product(shop):
    responses = at_once(16, lambda n: Client(shop.app.app).product(name=f"n{n}", sku="MUG-BL"))
    [created] = shop("GET", "/products/").json["products"]
    responses.remove(created)
    assert responses == [duplicate_sku(created["id"], "MUG-BL")] * 15


FULL_METADATA = {f"{number:040}": "😀" * 500 for number in range(3)}
FULL_METADATA |= {f"Key_{number}-": "" for number in range(47)}
ODD_TEXT = '\x01\n\t\x7f"\\/<é\u2028😀 '
# Names that no entry may have, and how a pointer writes them.
BAD_NAMES = {"": "", "n" * 41: "n" * 41, "a b": "a%20b", "a/b~c": "a~1b~0c", "a.b": "a.b"}
BAD_NAMES |= {"a\n": "a%0A", "a\0": "a%00", "é": "%C3%A9", "٣": "%D9%A3", "\ud800": "%3F"}
INVALID_METADATA = [
    *(({name: "x"}, f"#/metadata/{pointer}") for name, pointer in BAD_NAMES.items()),
    *((value, "#/metadata") for value in (None, [], "x")),
    ({"a": "x", "b": 5, "c": True, "d": ["x"]}, "#/metadata/b #/metadata/c #/metadata/d"),
    *(({"long": "x" * 501}, "#/metadata/long"), ({"nul": "a\0b"}, "#/metadata/nul")),
    ({"surrogate": "\ud800"}, "#/metadata/surrogate"),
]


def writes_of(field, value):
    """The writes that may carry metadata; only those of orders carry a reference."""
    writes = [
        ("POST", "/orders/", order_of((1, 1))),
        ("PATCH", "/orders/1/", {"status": "completed"}),
        ("POST", "/products/", {"name": "x", "price": 1}),
        ("PATCH", "/products/1/", {"stock": 1}),
    ]
    number = 2 if field == "reference" else 4
    return [(method, path, body | {field: value}) for method, path, body in writes[:number]]


def everything(shop):
    return shop("GET", "/products/").json, shop("GET", "/orders/").json


def test_metadata_is_fifty_texts_of_500_characters_by_short_names(shop, mug):
    shop.order((1, 1))
    for entries in {}, {"a": ""}, {"a": ODD_TEXT}, FULL_METADATA:
        for method, path, body in writes_of("metadata", entries):
            response = shop(method, path, body)
            assert response.json["metadata"] == entries or path.endswith("/1/")
            item = f"{path.removesuffix('1/')}{response.json['id']}/"
            assert shop("GET", item).json == response.json
        shop("PATCH", "/products/1/", {"stock": 5, "metadata": dict.fromkeys("a")})
        shop("PATCH", "/orders/1/", {"metadata": {"a": None}})
    products, orders = everything(shop)
    for items in products["products"], orders["orders"]:
        kept = [item["metadata"] for item in items]
        assert kept == [FULL_METADATA, {}, {"a": ""}, {"a": ODD_TEXT}, FULL_METADATA]


@pytest.mark.parametrize("path", ["/products/1/", "/orders/1/"])
@pytest.mark.parametrize("media_type", ["application/json", "application/merge-patch+json"])
def test_a_patch_merges_metadata_and_null_removes_an_entry(shop, mug, path, media_type):
    shop.order((1, 1))
    item = shop("GET", path).json
    for patch, merged in [
        ({"a": "1", "b": "2"}, {"a": "1", "b": "2"}),
        ({}, {"a": "1", "b": "2"}),
        ({"a": "3", "unknown": None}, {"a": "3", "b": "2"}),
        ({"b": None}, {"a": "3"}),
        ({"A": "4"}, {"a": "3", "A": "4"}),
        (dict.fromkeys(["a", "A"]), {}),
    ]:
        changed = shop("PATCH", path, {"metadata": patch}, {"Content-Type": media_type}).json
        assert changed == shop("GET", path).json == {**item, "metadata": merged}


def test_a_patch_in_another_media_type_is_a_415_that_names_both_accepted_ones(shop):
    headers = {"Content-Type": "application/json-patch"}
    for path in "/products/1/", "/orders/1/":
        refused = shop("PATCH", path, {"metadata": {}}, headers, status=415)
        assert refused.headers["Accept"] == "application/json, application/merge-patch+json"


def test_more_than_fifty_entries_after_a_merge_are_rejected_with_the_rest_of_the_patch(shop, mug):
    shop.order((1, 1))
    for path, rest in [
        ("/products/1/", {"name": "lost", "stock": 9, "sku": "lost"}),
        ("/orders/1/", {"status": "cancelled", "reference": "lost"}),
    ]:
        shop("PATCH", path, {"metadata": FULL_METADATA})
        before = everything(shop)
        refused = shop("PATCH", path, rest | {"metadata": {"x": "", "unknown": None}})
        too_many = "metadata must have at most 50 entries, not 51."
        assert errors_of(refused) == {"#/metadata": too_many}
        assert everything(shop) == before
        swapped = shop("PATCH", path, {"metadata": {"x": "", "Key_0-": None}}).json["metadata"]
        assert swapped.keys() == (FULL_METADATA | {"x": ""}).keys() - {"Key_0-"}


def test_neither_sku_nor_metadata_is_searched(shop):
    shop.product(name="Mug", sku="ZEBRA", metadata={"animal": "zebra"})
    for q, ids in ("mug", [1]), ("zebra", []), ("animal", []), ("mug zebra", []):
        assert find_ids(shop, q) == ids


def test_a_patch_of_an_order_takes_any_of_its_three_fields_in_every_status(shop, mug):
    metadata = {"email": "buyer@example.org"}
    order = shop("POST", "/orders/", referring("cart", (1, 2)) | {"metadata": metadata}).json
    assert order["metadata"] == metadata
    for status in "pending", "completed", "cancelled":
        both = {"reference": "", "metadata": {status: "y"}}
        for patch in {"reference": status}, {"metadata": {status: "x"}}, both:
            if status != "pending":
                patch["status"] = status
            metadata = metadata | patch.get("metadata", {})
            order |= patch | {"metadata": metadata}
            response = shop("PATCH", "/orders/1/", patch, status=200)
            assert response.json == shop("GET", "/orders/1/").json == order
            assert shop.ids(f"/orders/?reference={order['reference']}&status={status}") == [1]
    assert shop.stock(mug) == 5


# --- invalid bodies

BAD_REFERENCES = ["x" * 201, "\0", "a\0b", "\ud800", None, 17, ["x"], True]
# Invalid bodies, and pointers to all that is wrong with them.
INVALID_BODIES = [
    *(("POST", "/orders/", body, pointers) for body, pointers in INVALID_ORDERS),
    ("POST", "/orders/", order_of((1, 1), (77, 1), (10**17, 1)), "#/products/1 #/products/2"),
    *(
        ("POST", "/products/", {"name": "x", "price": 1, field: value}, f"#/{field}")
        for field, values in INVALID_FIELDS.items()
        for value in values
    ),
    *((*write, at) for texts, at in INVALID_METADATA for write in writes_of("metadata", texts)),
    *((*write, "#/reference") for text in BAD_REFERENCES for write in writes_of("reference", text)),
    # Only in a PATCH is null allowed, and the sum of the entries unknown.
    *((*write, "#/metadata/b") for write in writes_of("metadata", {"a": "x", "b": None})[::2]),
    *((*write, "#/metadata") for write in writes_of("metadata", FULL_METADATA | {"more": ""})[::2]),
    ("PATCH", "/products/1/", {"name": None, "id": 2}, "#/id #/name"),
    ("PATCH", "/orders/1/", {"status": "pending"}, "#/status"),
    ("PATCH", "/orders/1/", {"status": "shipped", "reference": "lost"}, "#/status"),
    ("PATCH", "/orders/1/", {"status": None, "reference": None}, "#/status #/reference"),
    ("PATCH", "/orders/1/", {"status": "completed", "total_price": 0}, "#/total_price"),
]


def test_an_invalid_body_is_rejected_with_a_pointer_to_each_error_and_nothing_is_done(shop, mug):
    shop.order((1, 1))
    before = everything(shop)
    for method, path, body, pointers in INVALID_BODIES:
        assert list(errors_of(shop(method, path, body))) == pointers.split(), body
    assert everything(shop) == before


# ------------------------------------------------------------------------------------- idempotency


def test_a_key_is_for_one_request_and_a_repeat_gets_its_first_response_and_does_nothing(shop, mug):
    metadata = {"metadata": {"a": "1"}}
    product = {"name": "x", "price": 1, "sku": "A"} | metadata
    others = {"metadata": {}}, {"metadata": {"a": "2"}}, {"metadata": {"b": "1"}}
    for path, body, changes in [
        ("/orders/", order_of((1, 1)) | metadata, [order_of((1, 2)), {"reference": "b"}, *others]),
        ("/products/", product, [{"sku": "B"}, {"sku": ""}, {"price": 1.01}, *others]),
        ("/products/1/stock/", {"change": 1}, [{"change": 2}, {"note": "x"}]),
    ]:
        key = {"Idempotency-Key": "key" + path}
        first = shop("POST", path, body, key)
        assert first.status_int in (200, 201)
        assert "Idempotent-Replayed" not in first.headers
        before = everything(shop)
        again = shop("POST", path.rstrip("/"), body, {"Idempotency-Key": f'"key{path}"'})
        assert (again.status, again.body) == (first.status, first.body)
        assert again.headers.get("Location") == first.headers.get("Location")
        assert again.headers["Idempotent-Replayed"] == "true"
        requests = [(path, body | change) for change in changes]
        for other_path, other in *requests, ("/products/", {"name": "x", "price": 1}):
            refused = shop("POST", other_path, other, key)
            assert refused.json["type"] == "urn:problem-type:idempotency-key-reused"
        assert everything(shop) == before


def test_a_repeat_may_write_the_same_json_in_another_way(shop, mug):
    orders = [
        b'{"products": [{"product_id": 1, "quantity": 2}], "reference": "till-4", "metadata":'
        b' {"b": "\xc3\xa9", "a": "1"}}',
        b'\xef\xbb\xbf{\n  "reference": "till-4",\n  "metadata": {"a": "\\u0031", "b": "\\u00e9"},'
        b' "products": [{"quantity": 2.0, "product_id": 1e0}]\n}\n',
    ]
    products = b'{"name": "x", "price": 1.5}', b'{"price": 1.50, "name": "x"}'
    for path, bodies in ("/orders/", orders), ("/products/", products):
        key = {"Idempotency-Key": path}
        first, repeat = (shop("POST", path, body, key, status=201) for body in bodies)
        assert repeat.headers["Idempotent-Replayed"] == "true"
        assert repeat.body == first.body
    assert shop.stock(mug) == 3


VALID_KEYS = ['abc"def', "x" * 255, f'"{"y" * 255}"', '"a\\"b"', "!#$%&'*+-.^_`|~:;<>()"]
INVALID_KEYS = ["", '""', "a b", "a\tb", "é", '"', '"a', '"a"b"', '"a\\b"', "x" * 256]
INVALID_KEYS += [f'"{"y" * 256}"']


@pytest.mark.parametrize("keys, status", [(VALID_KEYS, 201), (INVALID_KEYS, 400)])
def test_a_key_is_1_to_255_visible_ascii_characters_bare_or_quoted(shop, keys, status):
    shop.product(stock=99)
    for key in keys:
        shop.order((1, 1), **{"Idempotency-Key": key}, status=status)


# ------------------------------------------------------------------------------------------ access

ADMIN = {"admin_token": "adm1n~"}
BOTH = ADMIN | {"order_token": "0rder"}
WRONG_CREDENTIALS = [{}, bearer(""), bearer("other"), bearer("adm1n~x"), bearer("é")]
WRONG_CREDENTIALS += [{"Authorization": value} for value in ("adm1n~", "Basic adm1n~")]


@pytest.mark.parametrize(
    "settings, headers, allowed",
    [
        *(({}, headers, "nobody order admin") for headers in ({}, bearer("other"))),
        *((ADMIN, headers, "nobody order") for headers in ({}, bearer("other"))),
        (ADMIN, bearer("adm1n~"), "nobody order admin"),
        *((BOTH, headers, "nobody") for headers in WRONG_CREDENTIALS),
        (BOTH, bearer("0rder"), "nobody order"),
        (BOTH, {"Authorization": "bearer adm1n~"}, "nobody order admin"),
        ({"admin_token": "same", "order_token": "same"}, bearer("same"), "nobody order admin"),
    ],
)
def test_each_route_is_open_to_the_tokens_its_access_names(make_shop, settings, headers, allowed):
    assert set(ACCESS) == {route.callback.__name__ for route in shop_module.api.routes}
    shop = make_shop(**settings)
    store = shop.app.app.store
    store.create_product(name="x", price=100, stock=9)
    store.create_order([{"product_id": 1, "quantity": 1}])
    for name, (access, method, path, body) in ACCESS.items():
        if access in allowed.split():
            assert shop(method, path, body, headers).status_int in (200, 201, 204), name
            continue
        before = store.list_products(), store.list_orders()
        # Nothing else is looked at before the token.
        for request in (path, body), (path.replace("1", "99") + "?x=1", b"{"):
            refused = shop(method, *request, headers | {"Idempotency-Key": "k"}, status=401)
            assert refused.headers["WWW-Authenticate"] == "Bearer"
            assert not re.search("0rder|adm1n", refused.text)
        assert (store.list_products(), store.list_orders()) == before


# ---------------------------------------------------------------------------------------- browsers


def names_in(header):
    return {name.strip() for name in header.split(",")}


ORIGIN = "https://shop.example"
CORS_SETTINGS = [ORIGIN, f"http://localhost:3000 , {ORIGIN},", f" {ORIGIN}  http://[::1]:80 "]
CORS_SETTINGS += [f"http://a,{ORIGIN}", "*", f"*,{ORIGIN}"]
EXPOSED_HEADERS = names_in("ETag, Link, Location, Retry-After, Idempotent-Replayed")
PREFLIGHT_HEADERS = names_in("Authorization,Content-Type,Idempotency-Key,If-Match,If-None-Match")

# Each status of the application, and a request to it by somebody without a token.
CORS_REQUESTS = [
    ("GET", "/", None, {}, 200),
    ("GET", "/", None, {"Accept": "text/html"}, 200),
    ("GET", "/healthz", None, {}, 200),
    ("GET", "/products/?limit=1", None, {}, 200),
    ("HEAD", "/products/1/", None, {}, 200),
    ("POST", "/orders/", order_of((1, 1)), {}, 201),
    ("POST", "/orders/", order_of((1, 1)), {"Idempotency-Key": "k"}, 201),
    ("GET", "/products/1/", None, {"If-None-Match": "*"}, 304),
    ("POST", "/orders/", b"{", {}, 400),
    ("GET", "/orders/", None, {}, 401),
    ("GET", "/products/9/", None, {}, 404),
    ("GET", "/nowhere/", None, {}, 404),
    ("PUT", "/products/", None, {}, 405),
    ("POST", "/orders/", order_of((1, 999)), {}, 409),
    ("PATCH", "/products/1/", {"price": 2}, {"If-Match": '"x"'} | bearer("secret"), 412),
    ("POST", "/orders/", b" " * ((128 << 10) + 1), {}, 413),
    ("POST", "/orders/", b"{}", {"Content-Type": "text/plain"}, 415),
    ("GET", "/products/?colour=red", None, {}, 422),
    ("OPTIONS", "/products/", None, {}, 204),
]


def cors_headers(response):
    prefix = "access-control-"
    headers = {name.lower(): value for name, value in response.headers.items()}
    return {name.removeprefix(prefix): headers[name] for name in headers if name.startswith(prefix)}


@pytest.fixture(params=[False, True], ids=["alone", "mounted"])
def cors_shop(request, make_shop):
    """Makes a shop for pages of some origins, with two products; alone or in another Bottle."""

    def make(origins):
        shop = make_shop(cors_origins=origins, admin_token="secret")
        for _ in range(2):
            shop.app.app.store.create_product(name="x", price=100, stock=9)
        return mounted(shop) if request.param else shop

    return make


OTHER_ORIGINS = (
    "https://other.example http://shop.example https://shop.example:8443 null * "
    "https://shop.example.other.example https://www.shop.example"
)


@pytest.mark.parametrize(
    "setting, origin, allowed",
    [
        *((setting, ORIGIN, "*" if "*" in setting else ORIGIN) for setting in CORS_SETTINGS),
        *((CORS_SETTINGS[1], origin, None) for origin in (*OTHER_ORIGINS.split(), "", None)),
        ("", ORIGIN, None),
    ],
)
def test_only_pages_of_listed_origins_may_see_the_responses(cors_shop, setting, origin, allowed):
    shop = cors_shop(setting)
    asked = {"Cookie": "session=1"} | ({} if origin is None else {"Origin": origin})
    vary_origin = {"Origin"} if setting and "*" not in setting else set()
    for method, path, body, headers, status in CORS_REQUESTS:
        response = shop(method, path, body, asked | headers, status=status)
        assert "Set-Cookie" not in response.headers
        sent = cors_headers(response)
        assert sent.get("allow-origin") == allowed
        if allowed:
            assert sent.keys() == {"allow-origin", "expose-headers"}
            assert names_in(sent["expose-headers"]) == EXPOSED_HEADERS
        else:
            preflight = {"Access-Control-Request-Method": "GET"}
            assert sent == cors_headers(shop("OPTIONS", path, None, asked | preflight)) == {}
        [vary] = [value for name, value in response.headers.items() if name == "Vary"] or [""]
        assert names_in(vary) - {""} == ({"Accept"} if path == "/" else set()) | vary_origin


@pytest.mark.parametrize("origins", CORS_SETTINGS)
def test_a_preflight_is_a_204_that_allows_the_methods_and_headers_of_the_path(cors_shop, origins):
    shop = cors_shop(origins)
    for path, methods in METHODS.items():
        for method in methods - {"OPTIONS"}:
            asked = {"Origin": ORIGIN, "Access-Control-Request-Method": method}
            response = shop("OPTIONS", path, None, asked, status=204)
            assert response.body == b""
            sent = cors_headers(response)
            assert sent["allow-origin"] == ("*" if "*" in origins else ORIGIN)
            assert names_in(sent["allow-methods"]) == methods
            assert names_in(sent["allow-headers"]) == PREFLIGHT_HEADERS
            named = {"Access-Control-Request-Headers": "content-type,traceparent,x-requested-with"}
            sent = cors_headers(shop("OPTIONS", path, None, asked | named))
            assert sent["allow-headers"] == "content-type,traceparent,x-requested-with"


def test_a_page_sees_what_the_server_rejects_before_the_application(start_server):
    origin = b"Origin: %b\r\n" % ORIGIN.encode()
    large = HEAD + origin + b"Content-Length: 999999\r\n\r\n"
    wide = b"GET / HTTP/1.1\r\n" + origin + b"A: " + b"a" * 17_000 + b"\r\n\r\n"
    for setting, allowed in (ORIGIN, ORIGIN), ("*", "*"), ("https://a.example", None), ("", None):
        server = start_server(CORS_ORIGINS=setting)
        for request, status in (large, 413), (wide, 431):
            [response] = server.send(request)
            assert response.status == status
            assert response.headers["access-control-allow-origin"] == allowed
            assert response.headers["vary"] == ("Origin" if "https" in setting else None)


def test_a_page_may_see_a_500_and_a_503(cors_shop, make_shop, database):
    shop = cors_shop(ORIGIN)
    copy = make_shop(read_only=True, cors_origins=ORIGIN)
    refused = copy.order((1, 1), Origin=ORIGIN, status=503)
    with connect(database) as connection:
        connection.execute("ALTER TABLE product RENAME TO secret_name")
    failed = shop("GET", "/products/", None, {"Origin": ORIGIN}, status=500)
    for response in refused, failed:
        assert cors_headers(response)["allow-origin"] == ORIGIN


UNCHANGED_ORIGINS = (
    "http://shop.example:443 http://my_host-1 https://shop.example. http://192.0.2.1:8080 "
    "https://xn--mller-kva.example capacitor://localhost ionic://localhost:80 "
    "chrome-extension://abcdefghijklmnop"
)


@pytest.mark.parametrize(
    "setting, origin",
    [
        ("https://Shop.example:443", "https://shop.example"),
        ("HTTPS://SHOP.EXAMPLE:8443", "https://shop.example:8443"),
        ("http://shop.example:80", "http://shop.example"),
        ("http://localhost:03000", "http://localhost:3000"),
        ("http://[2001:DB8:0:0:0::1]:80", "http://[2001:db8::1]"),
        ("https://müller.example", "https://xn--mller-kva.example"),
        ("https://MU\u0308LLER.example:443", "https://xn--mller-kva.example"),
        ("https://XN--strae-oqa.example", "https://xn--strae-oqa.example"),
        ("https://日本語.example", "https://xn--wgv71a119e.example"),
        ("https://हिन्दी.example", "https://xn--j2bd4cyah0f.example"),
        *((origin, origin) for origin in UNCHANGED_ORIGINS.split()),
    ],
)
def test_origins_are_compared_as_browsers_send_them(make_shop, setting, origin):
    response = make_shop(cors_origins=setting)("GET", "/", None, {"Origin": origin})
    assert cors_headers(response)["allow-origin"] == origin


INVALID_ORIGINS = (
    "https://me@shop.example https://shop.example/ https://shop.example? "
    "https://shop.example# https://shop.example\\ https://shop.example: "
    "https://shop.example:port https://shop.example:٣ https://shop.example:65536 "
    "https://shop.example:443:443 https://:443 https://. https://.shop.example "
    "https://shop..example https://*.example https://shop%2eexample https://shop;example "
    "https:shop.example ://shop.example 1https://shop.example file://shop.example "
    "wss://shop.example capacitor:// http://[::1 http://[::1%25eth0] http://[shop] "
    "http://127.1 http://192.0.2.256 http://0x7f000001 http://192.0.2.01 "
    # Python's codec would make another host of these than browsers do.
    "https://straße.example https://STRAẞE.example https://σοφος-λόγος.example "
    "https://نامه\u200cای.example https://क्\u200dष.example https://a\u00adb.example "
    "https://a\U000e0101b.example https://ᏸ.example https://ﬁ.example https://a\u2024example "
    "https://a\u0378b.example"
)


@pytest.mark.parametrize("origin", [*INVALID_ORIGINS.split(), f"https://{'x' * 64}.example"])
def test_an_origin_that_no_browser_sends_cannot_be_used(make_shop, origin):
    for setting in origin, f"{ORIGIN} {origin}", f"*,{origin}":
        with pytest.raises(shop_module.ConfigError) as raised:
            make_shop(cors_origins=setting)
        assert str(raised.value).startswith("CORS_ORIGINS must be ")
        assert str(raised.value).endswith(f"not {shop_module.shown(origin)}.")


# --- the page at /

FIREFOX = "text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8"
CHROME = FIREFOX.replace("*/*", "image/avif,image/webp,image/apng,*/*")
PREFER_HTML = (
    "text/html | TEXT/HTML | text/html;charset=utf-8 | text/* | text/html, */*;q=0.1 | "
    "text/html;q=0.9, application/json;q=0.8 | */*;q=0.5, text/html | "
    "text/html ; q=1.000 , application/json ; q=0.001 | application/json;q=0, text/html;q=0.001 | "
    f"{FIREFOX} | {CHROME}"
)
PREFER_JSON = (
    " | */* | application/json | application/* | application/*, text/html;q=0.9 | image/png | "
    "text/html, application/json | application/json, text/html | text/html;q=0.5, */* | "
    "text/html;q=0.5, application/json | text/html;q=0, */*;q=0.1 | text/html;q=0 | ,;=,q=1 | "
    "*/*, text/html;q=0.9 | application/problem+json, application/json | "
    "text/html;q=nonsense, application/json;q=0.1"
)


@pytest.mark.parametrize(
    "accept, content_type",
    [
        *((accept, "text/html; charset=utf-8") for accept in PREFER_HTML.split(" | ")),
        *((accept, "application/json") for accept in PREFER_JSON.split(" | ")),
    ],
)
def test_the_index_is_a_page_for_those_that_prefer_html_only(shop, accept, content_type):
    headers = {"Accept": accept}
    response = shop("GET", "/", None, headers, status=200)
    assert response.headers["Content-Type"] == content_type
    assert response.headers["Vary"] == "Accept"
    is_page = response.text.startswith("<!doctype html>")
    assert is_page == ("html" in content_type) == ("Content-Security-Policy" in response.headers)
    assert is_page or response.json == shop("GET", "/").json  # without an Accept
    assert shop("HEAD", "/", None, headers).headerlist == response.headerlist
    for path in "/products/", "/healthz", "/nowhere/":
        assert "json" in shop("GET", path, None, headers).content_type


def get_page(shop):
    """The page as a browser reads it, by BeautifulSoup."""
    return shop("GET", "/", None, {"Accept": CHROME}).html


def curl_of(page, name):
    """The command line that the page shows for an operation."""
    [curl] = [pre.text for pre in page.select(f"#{name} pre") if pre.text.startswith("curl")]
    return curl


def test_the_page_runs_nothing_but_its_own_two_blocks_and_loads_nothing_from_elsewhere(shop):
    response = shop("GET", "/", None, {"Accept": CHROME})
    header = response.headers["Content-Security-Policy"]
    policy = dict(directive.strip().split(" ", 1) for directive in header.split(";"))
    for tag in "style", "script":
        [block] = response.html.find_all(tag)
        digest = base64.b64encode(hashlib.sha256(block.string.encode()).digest()).decode()
        assert policy[f"{tag}-src"] == f"'sha256-{digest}'"
        assert not re.search(r"@import|url\(", block.string)
    assert policy["default-src"] == "'none'"
    assert policy["connect-src"] == "'self'"
    assert policy["frame-ancestors"] == "'none'"
    assert "unsafe" not in header
    for element in response.html.find_all():
        assert element.name not in ("iframe", "img", "object", "embed", "base")
        for name, value in element.attrs.items():
            assert not re.match("on|style|action|formaction|srcset", name), (element.name, name)
            assert name not in ("src", "href") or re.match(r"data:,|/(?!/)|#", value), value
    assert not re.search(r"//[^\s<\"']*\.", response.html.script.string)


def test_the_page_is_made_for_a_phone_and_for_both_colour_schemes(shop):
    page = get_page(shop)
    assert len(page.select("meta[name=viewport][content*='width=device-width']")) == 1
    assert "color-scheme: light dark" in page.style.string
    assert page.html["lang"] == "en"


def test_the_page_documents_each_operation_and_has_a_form_that_sends_it(shop):
    page = get_page(shop)
    assert sorted(details["id"] for details in page.select("details")) == sorted(ACCESS)
    assert page.select("input#token")
    for method, path, operation in operations_of_openapi(shop("GET", "/openapi.json").json):
        name = operation["operationId"]
        part = page.find(id=name)
        assert (part.form["data-method"], part.form["data-path"]) == (method, path)
        inputs = {(field["data-in"], field["name"]) for field in part.select("input")}
        inputs.discard(("header", "Content-Type"))
        assert inputs == {(item["in"], item["name"]) for item in operation["parameters"]}
        assert path in part.text
        assert operation["summary"] in part.text
        words = [*operation["responses"]]
        assert ("requestBody" in operation) == bool(part.textarea)
        if part.textarea:
            schema = resolve(operation["requestBody"]["content"]["application/json"]["schema"])
            assert json.loads(part.textarea.text) == schema["examples"][0]
            words += schema["properties"]
        for word in words:
            assert re.search(rf"\b{word}\b", part.text), (name, word)


def test_each_curl_line_of_the_page_does_what_it_says(make_shop, tmp_path):
    for name in ACCESS:
        shop = make_shop(f"sqlite:///{tmp_path}/{name}.sqlite3")
        shop.product(stock=99)
        shop.order((1, 1))
        method, path, headers, body = parse_curl(curl_of(get_page(shop), name))
        assert (method, path) == ACCESS[name][1:3]
        response = shop(method, path, (body or "").encode(), headers)
        assert response.status_int in (200, 201, 204), name


def test_the_page_shows_where_the_shop_needs_a_token(make_shop):
    for settings, secured in ({}, set()), (ADMIN, {"admin"}), (BOTH, {"admin", "order"}):
        page = get_page(make_shop(**settings))
        for name, (access, *_) in ACCESS.items():
            assert ("Authorization: Bearer $TOKEN" in curl_of(page, name)) == (access in secured)
            assert ("(token)" in page.find(id=name).summary.text) == (access in secured)
        assert "adm1n" not in page.text


def test_the_page_of_a_mounted_shop_stays_under_its_mount_point(shop):
    page = get_page(mounted(shop))
    assert [link["href"] for link in page.select("a")] == ["/a/b/openapi.json"]
    paths = {form["data-path"] for form in page.select("form")}
    assert paths == {"/a/b" + path for path in openapi()["paths"]}
    for name in ACCESS:
        assert "http://localhost:8000/a/b/" in curl_of(page, name)


def test_nothing_in_the_page_is_taken_for_html(shop, monkeypatch):
    html = "</textarea></pre><script>alert(1)</script>&amp;\"'"
    monkeypatch.setitem(shop_module.MUG, "name", html)
    monkeypatch.setitem(shop_module.SCHEMAS["NewProduct"][1], "name", html)
    mount_point = {"SCRIPT_NAME": '/"><script>x</script>'}  # for which no page is cached
    page = shop.app.get("/", headers={"Accept": CHROME}, extra_environ=mount_point).html
    assert len(page.select("script")) == 1
    assert json.loads(page.find(id="create_product").textarea.text)["name"] == html


# ------------------------------------------------------------------------------------------- races


def test_fifty_pieces_make_fifty_sales_to_sixty_four_threads(shop):
    mug = shop.product(stock=50)
    statuses = at_once(64, lambda _: Client(shop.app.app).order((mug["id"], 1)).status_int)
    assert sorted(statuses) == [201] * 50 + [409] * 14
    assert shop.stock(mug) == 0


def test_forty_equal_requests_with_one_key_make_one_order_and_forty_equal_responses(shop, mug):
    key = {"Idempotency-Key": "k"}
    responses = at_once(40, lambda _: Client(shop.app.app).order((1, 1), **key, status=201))
    assert len({response.body for response in responses}) == 1
    assert sum("Idempotent-Replayed" not in response.headers for response in responses) == 1
    assert shop.stock(mug) == 4
    assert len(shop("GET", "/orders/").json["orders"]) == 1


def test_many_cancels_of_one_order_put_the_stock_back_once(shop, mug):
    shop.order((1, 3))

    def change(n):
        body = {"status": "cancelled" if n % 2 else "completed"}
        return Client(shop.app.app)("PATCH", "/orders/1/", body).json["status"]

    results = at_once(24, change)  # the order's status, or 409 of a problem
    assert results[1::2] == ["cancelled"] * 12
    assert set(results[::2]) <= {"completed", 409}
    assert shop("GET", "/orders/1/").json["status"] == "cancelled"
    assert steps_of(shop) == [(5, 5, None, ""), (-3, 2, 1, ""), (3, 5, 1, "")]


def test_changes_guarded_by_one_etag_have_one_winner(shop, mug):
    request = "PATCH", "/products/1/", {"price": 20}, {"If-Match": etag_of(shop, "/products/1/")}
    statuses = at_once(16, lambda _: Client(shop.app.app)(*request).status_int)
    assert sorted(statuses) == [200] + [412] * 15


# -------------------------------------------------------------------------------- the real process


class Response(NamedTuple):
    status: int
    headers: dict
    body: bytes

    @property
    def json(self):
        return json.loads(self.body) if self.body else None


class Server:
    """A `python shop.py` on a port of its own, with a folder as its working directory."""

    def __init__(self, folder, **settings):
        self.folder = folder
        self.settings = settings

    def environment(self):
        defaults = {"PATH": os.environ["PATH"], "PYTHONPATH": str(HERE), "PORT": "0"}
        return defaults | {"DATABASE_URL": "sqlite:///db.sqlite3"} | self.settings

    def run(self, *arguments):
        """Run it to its end."""
        command = [sys.executable, HERE / "shop.py", *arguments]
        options = {"cwd": self.folder, "env": self.environment(), "timeout": 30}
        return subprocess.run(command, **options, capture_output=True, text=True)

    def fail(self, *arguments, status=None):
        """Run it to an error in one line, and return that. Status 2: it does not start to serve."""
        result = self.run(*arguments)
        assert result.returncode == (status or (1 if arguments else 2)), result
        assert result.stdout == ""
        assert re.fullmatch(r"shop: [^\n]+\n", result.stderr), result
        return result.stderr

    def start(self, program=None, *, reads_log=True):
        """Start it, or a program that does so in its own way, and wait until it listens."""
        command = [sys.executable, *(["-c", program] if program else [HERE / "shop.py"])]
        options = {"cwd": self.folder, "env": self.environment(), "stdout": subprocess.PIPE}
        with (self.folder / "stderr").open("a") as stderr:
            self.process = subprocess.Popen(command, **options, stderr=stderr, text=True, bufsize=1)
        line = self.process.stdout.readline()
        assert line.startswith("Serving http://"), (line, self.stderr())
        self.port = int(re.search(r":(\d+)/ from ", line)[1])
        self.log = [line]
        read = functools.partial(self.log.extend, self.process.stdout)
        self.reader = threading.Thread(target=read, daemon=True)
        if reads_log:
            self.reader.start()
        return self

    def end(self, number=signal.SIGTERM):
        """Send a signal; returns the exit status and the seconds that it took."""
        started = time.monotonic()
        self.process.send_signal(number)
        status = self.process.wait(20)
        self.reader.join(5)
        self.process.stdout.close()
        return status, time.monotonic() - started

    def stderr(self):
        return (self.folder / "stderr").read_text()

    def assert_ends_well(self):
        assert (self.end()[0], self.stderr()) == (0, "")

    def connect(self, **options):
        connection = socket.create_connection(("127.0.0.1", self.port), 10)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for name, value in options.items():
            connection.setsockopt(socket.SOL_SOCKET, getattr(socket, name), value)
        return connection

    def send(self, *parts, half_close=False):
        """Send bytes on a new connection, a packet each, and return every response to them."""
        with self.connect() as connection:
            with contextlib.suppress(ConnectionError):  # the server need not take them all
                for part in parts:
                    connection.sendall(part)
                if half_close:
                    connection.shutdown(socket.SHUT_WR)
            return read_responses(connection)

    def __call__(self, method, path, body=None, **headers):
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        with contextlib.closing(connection):
            data = json.dumps(body) if body is not None else None
            connection.request(method, path, data, JSON | headers)
            response = connection.getresponse()
            return Response(response.status, response.headers, response.read())

    def product(self, **fields):
        return self("POST", "/products/", {"name": "x", "price": 1, **fields})

    def order(self, product_id=1, quantity=1, **headers):
        return self("POST", "/orders/", order_of((product_id, quantity)), **headers)


def read_responses(connection):
    """Every response until the server closes the connection or is silent for half a second."""
    responses = []
    connection.settimeout(0.5)
    with connection.makefile("rb") as file, contextlib.suppress(TimeoutError):
        while line := file.readline():
            headers = http.client.parse_headers(file)
            body = file.read(int(headers.get("Content-Length", 0)))
            responses.append(Response(int(line.split()[1]), headers, body))
    return responses


def read_to_end(connection):
    with connection.makefile("rb") as file:
        return file.read()


@pytest.fixture
def start_server(tmp_path):
    """Starts servers, which must end well; setup is Python that runs before."""
    servers = []

    def start(setup="", *, ends_silently=True, **settings):
        program = f"import gc, os, time, db, shop\n{setup}\nraise SystemExit(shop.main([]))"
        server = Server(tmp_path, **settings).start(program if setup else None)
        servers.append((server, ends_silently and "DEBUG" not in settings))
        return server

    yield start
    for server, ends_silently in servers:
        if server.process.poll() is None:
            assert server.end()[0] == 0
        assert server.stderr() == "" or not ends_silently


@pytest.fixture
def server(start_server):
    return start_server()


def test_a_catalogue_is_filled_sold_by_thirty_buyers_killed_and_nothing_is_lost(server, database):
    for number in range(1000):
        assert server.product(name=f"P{number}", price=1.25, stock=1000).status == 201
    sent = {}  # the body of each order, by its key
    received = {}  # the response, where one came

    def buy(run, n):
        dice = random.Random(30 * run + n)
        for number in itertools.count():
            products = dice.sample(range(1, 1001), 3)
            key = f"{run}-{n}-{number}"
            sent[key] = order_of(*((product, dice.randint(1, 3)) for product in products))
            try:
                response = server("POST", "/orders/", sent[key], **{"Idempotency-Key": key})
            except (OSError, http.client.HTTPException):
                return
            received[key] = response.status, response.json

    for run in 1, 2:
        threads = start_threads(30, functools.partial(buy, run))
        wait_for(lambda run=run: len(received) >= 300 * run, 60)
        assert server.end(signal.SIGKILL)[0] == -signal.SIGKILL
        join_all(threads)
        server.start()
    for key, body in sent.items():
        again = server("POST", "/orders/", body, **{"Idempotency-Key": key})
        assert again.status == 201
        if key in received:
            assert received[key] == (201, again.json)
            assert again.headers["Idempotent-Replayed"] == "true"
    with connect(database) as connection:
        left = "(SELECT sum(stock) FROM product)"
        sql = f"SELECT count(DISTINCT order_id), sum(quantity) + {left} FROM order_line"
        assert connection.execute(sql).fetchone() == (len(sent), 1_000_000)
    assert server.run("check").stdout == "db.sqlite3: sound\n"


BODY = b'{"name": "x", "price": 1}'
HEAD = b"POST /products/ HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
POST = HEAD + b"Content-Length: 25\r\n\r\n" + BODY
CHUNKED = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"
GET_PRODUCTS = b"GET /products/ HTTP/1.1\r\nHost: x\r\n\r\n"
GET_HEALTH = b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n"
LAST_CHUNK = b"\r\n0\r\n\r\n"
TRAILER = CHUNKED + b"19\r\n" + BODY + b"\r\n0\r\n"


def get(target=b"/healthz", fields=b"Host: x", version=b"1.1"):
    return b"GET %b HTTP/%b\r\n%b\r\n\r\n" % (target, version, fields)


BAD_LINES = (
    b"nonsense | \x16\x03\x01\x02\x00\x01\x00 | GET | GET / | GET / HTTP/2.0 | GET / HTTP/9.9 | "
    b"get / HTTP/1.1 | GET / HTTP/1.1 x | GET / FTP/1.1 | GET http://[ HTTP/1.1 | GET * HTTP/1.1 | "
    b"CONNECT example.org:80 HTTP/1.1 | OPTIONS * HTTP/1.1 | GET products/ HTTP/1.1 | "
    b"GET /products/ /x HTTP/1.1 | GET  /products/ HTTP/1.1 | GET\t/products/ HTTP/1.1 | "
    b"GET /pro\tducts/ HTTP/1.1 | GET /pro\0ducts/ HTTP/1.1 | GET /pro\x1fducts/ HTTP/1.1 | "
    b"GET /pro\x7fducts/ HTTP/1.1 | GET /pro\rducts/ HTTP/1.1 | GET /products/?q=\t HTTP/1.1 | "
    b"GET http://user@x/healthz HTTP/1.1 | GET / HTTP/1.1\r\n x: y | GET /healthz HTTP/1.1\nA: b"
)
BAD_FIELDS = (
    b"Host: x | Host: y | Host x | A: b\r\n folded | A: b\r\n\tfolded | A: b\nC: d | A: b\n | "
    b"\nA: b | A: b\rc | A: b\0c | A : b | : b"
)
BAD_HOSTS = b"Host: a/b | Host: user@x | Host: x:abc | Host: x y | Host: x, y | Host: \xe9 | A: b"
BAD_LENGTHS = (
    b"Content-Length: -1 | Content-Length: +25 | Content-Length: 25, 25 | "
    b"Content-Length: 25\r\nContent-Length: 25 | Content-Length: 25\r\nTransfer-Encoding: | "
    b"Transfer-Encoding: gzip | Transfer-Encoding: chunked, chunked | "
    b"Transfer-Encoding : chunked | Transfer-Encoding: chunked\r\n\tx"
)
BAD_SIZES = b"19 ", b" 19", b"0x19", b"+19", b"1_9", b"-1", b";a=b", b"xyz"
CHUNK_ENDS = b"\n\r\n", b";a\n\r\n", b";a\r\r"
TRAILERS = [GET_HEALTH[:-4], b"A: b\nC: d", b" A: b", b"A : b", b"A: \0", b"A: b\r\nC: d"]
TRAILERS += [b"\n" + GET_HEALTH[:-4], b"A: " + b"b" * 17_000]
RAW_REQUESTS = [
    *((line + b"\r\nHost: x\r\n\r\n", 400) for line in BAD_LINES.split(b" | ")),
    *((blanks + GET_HEALTH, 400) for blanks in (b" ", b"\t", b"\n", b"\r", b"\r\n\n")),
    *((get(fields=b"Host: x\r\n" + field), 400) for field in BAD_FIELDS.split(b" | ")),
    *((HEAD + field + b"\r\n\r\n" + BODY, 400) for field in BAD_LENGTHS.split(b" | ")),
    *((get(fields=host), 400) for host in BAD_HOSTS.split(b" | ")),
    *((get(b"http://x/healthz", b"A: b"), 400), (get(fields=b"Host: a/b", version=b"1.0"), 400)),
    *((get(fields=b"Host: %b" % host), 200) for host in (b"example.org:8000", b"[::1]:80")),
    *((get(fields=b"A: b", version=b"1.0"), 200), (get(b"http://example.org/healthz"), 200)),
    *((get(target), 404) for target in (b"/%ff", b"//healthz", b"/\xff\xfe")),
    *((b"\r\n\r\n" + GET_HEALTH, 200), (b"BREW / HTTP/1.1\r\nHost: x\r\n\r\n", 405)),
    # what a monitor may add to the health check
    *((get(b"/healthz?" + query), 200) for query in (b"", b"t=17", b"a=1&a=2&=&%ff", b"x=1&" * 99)),
    # the length of a head
    (get(b"/" + b"a" * 17_000), 431),
    (get(fields=b"Host: x\r\nA:" + b" " * 16_000 + b"\1"), 400),
    (get(fields=b"Host: x\r\nA: " + b"a" * 16_000), 200),
    (get(fields=b"Host: x\r\nA: " + b"a" * 17_000), 431),
    (GET_HEALTH[:-2] + b"A: " + b"a" * 40_000, 431),
    # the length of a body
    (HEAD + b"Content-Length: " + b"9" * 5000 + b"\r\n\r\n", 400),
    (HEAD + b"Content-Length: 9\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + GET_HEALTH, 400),
    (CHUNKED.replace(b"1.1", b"1.0") + b"0\r\n\r\n", 400),
    (HEAD + b"Transfer-Encoding: chunked\r\n" + TRAILER[len(HEAD) :] + b"\r\n", 400),
    (HEAD + b"Content-Length: 131073\r\n\r\n", 413),
    (HEAD + b"Content-Length: 131073\r\nExpect: 100-continue\r\n\r\n", 413),
    (HEAD + b"Content-Length: 25\r\nExpect: 100-continue\r\n\r\n" + BODY, 201),
    (HEAD + b"Expect: 100-continue\r\n\r\n", 400),
    (HEAD + b"Content-Length: 25\r\nExpect: a miracle\r\n\r\n" + BODY, 417),
    # chunks: as waitress reads them, but never as two requests
    *((CHUNKED + size + b"\r\n" + BODY + LAST_CHUNK, 400) for size in BAD_SIZES),
    *((CHUNKED + b"19\r\n" + BODY + end + b"0\r\n\r\n", 400) for end in (b"\n", b"xx")),
    (CHUNKED + b"5\r\nabcdefgh", 400),
    *((CHUNKED + b"5" + end + b"hello" + LAST_CHUNK, 400) for end in CHUNK_ENDS),
    (CHUNKED + b"a\r\n" + BODY[:10] + b"f\r\n" + BODY[10:] + LAST_CHUNK, 400),
    (CHUNKED + b"a\r\n" + BODY[:10] + b"\r\n\r\nf\r\n" + BODY[10:] + LAST_CHUNK, 201),
    (CHUNKED + b"\r\n19\r\n" + BODY + LAST_CHUNK, 201),
    (CHUNKED + b"19;" + b"a" * 300 + b"\r\n" + BODY + LAST_CHUNK, 201),
    (CHUNKED.replace(b"chunked", b"Chunked") + b"19;a=b\r\n" + BODY + LAST_CHUNK, 201),
    *((TRAILER + trailer + b"\r\n\r\n", 201) for trailer in TRAILERS),
]


def assert_answered(responses, request, status):
    """There is one response, of this status, in JSON."""
    responses = [response for response in responses if response.status != 100]
    assert statuses_of(responses) == [status], request
    [response] = responses
    if status < 300:
        assert response.headers["content-type"] == "application/json"
        assert response.json
        return
    assert response.headers["content-type"] == "application/problem+json"
    assert (response.json["status"], response.json["title"]) == (status, TITLES[status])
    # If the head is accepted, the server may keep the connection open.
    if status in (400, 413, 431) and not request.startswith((CHUNKED, HEAD + b"Expect")):
        assert response.headers["connection"] == "close"


def test_every_request_is_read_strictly_and_answered_in_json(server):
    for request, status in RAW_REQUESTS:
        assert_answered(server.send(request, half_close=True), request, status)
        if len(request) < 1000:
            bytes_ = (bytes([byte]) for byte in request)
            assert_answered(server.send(*bytes_, half_close=True), request, status)


def test_a_chunked_body_is_measured_without_its_framing(server):
    def send_chunked(size):
        body = BODY.ljust(size)
        parts = [body[start : start + 500] for start in range(0, size, 500)]
        chunks = b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in parts)
        return server.send(closing(CHUNKED) + chunks, b"0\r\n\r\n")[0].status

    assert send_chunked(128 << 10) == 201
    assert send_chunked((128 << 10) + 1) == 413


def test_a_client_that_sends_too_much_can_still_read_the_413(server):
    for head in HEAD + b"Content-Length: 8000000\r\n\r\n", CHUNKED + b"7a1200\r\n":
        [response] = server.send(head, *[b"x" * 80_000] * 100)
        assert response.status == response.json["status"] == 413
        assert response.headers["connection"] == "close"


def test_requests_in_one_packet_are_answered_in_their_order(server):
    chunked = TRAILER + b"A: b\r\n\r\n\r\n"
    responses = server.send((POST + GET_PRODUCTS + chunked + GET_PRODUCTS) * 10)
    assert [response.status for response in responses] == [201, 200] * 20
    assert [len(response.json["products"]) for response in responses[1::2]] == [*range(1, 21)]


def test_a_body_with_the_bytes_of_a_cached_request_is_a_body(server):
    assert [response.status for response in server.send(GET_PRODUCTS, GET_PRODUCTS)] == [200, 200]
    head = HEAD + b"Content-Length: %d\r\n\r\n" % len(GET_PRODUCTS)
    with server.connect() as connection:
        connection.sendall(head)
        assert server("GET", "/healthz").status == 200  # by now it has been read
        connection.sendall(GET_PRODUCTS)
        assert [response.status for response in read_responses(connection)] == [400]


def test_a_search_may_be_typed_into_curl_unquoted(server):
    server.product(name="CAFÉ")
    [response] = server.send(closing(get("/products/?q=é".encode())))
    assert [product["id"] for product in response.json["products"]] == [1]


def test_what_can_never_become_a_request_is_rejected_before_its_end(server):
    bare_lf = b"GET / HTTP/1.1\nHost: x\n\n"
    for beginning in bare_lf, GET_HEALTH[:-4] + b"\n", b"\x16\x03\x01\x02\x00", b"\r\n{":
        assert_answered(server.send(beginning), beginning, 400)


def test_a_connection_is_kept_until_one_side_closes_it(server):
    server.product()
    close = get(fields=b"Host: x\r\nConnection: te, close")
    close_1_0 = b"GET /healthz HTTP/1.0\r\n\r\n"
    for first, last, status, connection in [
        (b"OPTIONS / HTTP/1.1\r\nHost: x\r\n\r\n", close, 204, None),
        (b"DELETE /products/1/ HTTP/1.1\r\nHost: x\r\n\r\n", close, 204, None),
        (get(b"/products/", b"Host: x\r\nIf-None-Match: *"), close, 304, None),
        (get(fields=b"Connection: Keep-Alive", version=b"1.0"), close_1_0, 200, "keep-alive"),
    ]:
        responses = server.send(first + last + first)
        assert [response.status for response in responses] == [status, 200]
        assert [answer.headers.get("connection") for answer in responses] == [connection, "close"]


def test_proxy_headers_of_a_stranger_change_nothing(server):
    forged = b"X-Forwarded-Host: evil\r\nX-Forwarded-Prefix: /evil\r\nX-Script-Name: /evil\r\n"
    [response] = server.send(closing(HEAD) + forged + b"Content-Length: 25\r\n\r\n" + BODY)
    assert response.status == 201
    assert response.headers["location"] == "/products/1/"
    assert "server" not in response.headers


FORWARDED = {
    b"X-Forwarded-For: 203.0.113.9, 198.51.100.7\r\n": "198.51.100.7",
    b"X-Forwarded-For: 1.1.1.1\r\nX-Forwarded-For: 2001:DB8::1\r\n": "2001:db8::1",
    b"x-forwarded-for:198.51.100.8 \r\n": "198.51.100.8",
}
NOT_FORWARDED = [b":1.2", b"198.51.100.7, unknown", b"198.51.100.7,", b"\xe9", b"::1%x 200 GET"]
NOT_FORWARDED += [b" " * 9000 + b"x" + b" " * 5000 + b"y"]
FORWARDED |= {b"X-Forwarded-For: %b\r\n" % value: "127.0.0.1" for value in NOT_FORWARDED}
FORWARDED |= {b"Forwarded: for=198.51.100.7\r\n": "127.0.0.1", b"": "127.0.0.1"}


@pytest.mark.parametrize("proxy", ["127.0.0.1", "*", "127.0.0.2", ""])
def test_the_client_in_the_log_is_the_one_that_a_trusted_proxy_names(start_server, proxy):
    server = start_server(TRUSTED_PROXY=proxy)
    for header in FORWARDED:
        for path in b"/healthz", b"/products/", b"/products/":  # the last is in the cache
            get = b"GET %b HTTP/1.1\r\nHost: x\r\n%b\r\n" % (path, header)
            assert server.send(closing(get))[0].status == 200
    server.end()
    clients = [line.split()[1] for line in server.log if " GET " in line]
    is_trusted = proxy in ("127.0.0.1", "*")
    expected = [client if is_trusted else "127.0.0.1" for client in FORWARDED.values()]
    assert clients == [client for client in expected for _ in range(3)]


@pytest.mark.parametrize("sent", ["", "/shop"])
def test_urls_begin_with_the_prefix_whether_or_not_the_proxy_strips_it(start_server, sent):
    server = start_server(URL_PREFIX="/shop/")
    for number in 1, 2:
        created = server("POST", f"{sent}/products/", {"name": "x", "price": 1})
        assert created.headers["Location"] == f"/shop/products/{number}/"
    next_path = server("GET", f"{sent}/products/?limit=1").json["next"]
    assert next_path == "/shop/products/?limit=1&after=1"
    assert server("GET", next_path).json["products"][0]["id"] == 2
    for index in f"{sent}/", sent or "/":
        assert server("GET", index).json["products"] == "/shop/products/"
    assert server("GET", f"{sent}/products/9/").status == 404
    assert server("GET", "/shopping/").status == 404


def test_idle_and_slow_clients_do_not_hold_up_the_others(server):
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    files = min(hard, 4096)
    resource.setrlimit(resource.RLIMIT_NOFILE, (files, hard))
    server.product(stock=1000)
    idle = [server.connect() for _ in range(files // 2 - 248)]  # 1800
    slow = [server.connect() for _ in range(100)]
    for byte in HEAD[:8]:
        for connection in slow:
            connection.sendall(bytes([byte]))
        started = time.monotonic()
        assert server.order().status == 201
        assert time.monotonic() - started < 1
    for connection in idle + slow:
        connection.close()


def test_idle_connections_and_requests_that_drip_in_are_closed(start_server):
    server = start_server("shop.IDLE_TIMEOUT = shop.REQUEST_TIMEOUT = 1")
    beginnings = b"", POST, b"\r\n", POST[:20], POST[:-3]

    def measure(n):
        with server.connect() as connection:
            connection.sendall(beginnings[n])
            started = time.monotonic()
            # A byte now and then does not keep an unfinished request alive.
            while not select.select([connection], [], [], 0.1)[0] or connection.recv(1 << 16):
                if beginnings[n] == POST[:20] and time.monotonic() < started + 5:
                    with contextlib.suppress(OSError):
                        connection.send(b"x")
            return time.monotonic() - started

    for seconds in at_once(len(beginnings), measure):
        assert 0.5 < seconds < 4


def test_a_write_may_wait_for_the_lock_longer_than_an_idle_connection_lives(start_server, database):
    server = start_server("shop.IDLE_TIMEOUT = shop.REQUEST_TIMEOUT = 1; shop.LOCK_TIMEOUT = 3")
    with contextlib.closing(lock(database)), server.connect() as connection:
        connection.sendall(POST * 2 + HEAD)
        assert connection.recv(20) == b"HTTP/1.1 503 Service"
    assert server.product().status == 201


def fill(database, products, size=10_000):
    """Add so many products of so many bytes, past the shop."""
    with connect(database) as connection:
        sql = "INSERT INTO product (name, description, price, stock) VALUES (?, ?, 100, 9)"
        connection.executemany(sql, [("x", "y" * size)] * products)
        connection.execute("INSERT INTO product_search SELECT id, name, description FROM product")


def test_a_slow_reader_gets_large_responses_in_full_while_signals_stop_the_server(server, database):
    fill(database, 1800)  # waitress would wait for a second thread above 16 MiB
    with server.connect(SO_RCVBUF=1 << 16) as reader, server.connect() as idle:
        reader.sendall(GET_PRODUCTS * 2)
        idle.sendall(b"GET /healthz HTTP/1.1\r\n")
        reader.recv(1, socket.MSG_PEEK)
        assert server.order().status == 201  # the others go on
        reader.sendall(GET_HEALTH)  # what is not read must not make the end a reset
        for number in signal.SIGTERM, signal.SIGHUP, signal.SIGTERM:  # systemd may send two
            server.process.send_signal(number)
        assert read_to_end(reader).count(b'"next":null}') == 2
    assert server.process.wait(5) == 0


def test_responses_that_a_client_does_not_read_are_not_piled_up(server, database):
    fill(database, 1800)
    memory = resident_memory(server)
    with server.connect() as reader:
        reader.sendall(GET_PRODUCTS * 20)
        reader.recv(1, socket.MSG_PEEK)
        for _ in range(60):
            assert server("GET", "/healthz").status == 200
        assert resident_memory(server) - memory < 180 << 20  # all would take 360 MB


def test_an_upload_under_way_at_a_signal_is_answered(server):
    with server.connect() as connection:
        connection.sendall(POST[:-9])
        assert server("GET", "/healthz").status == 200
        server.process.terminate()
        with pytest.raises(OSError):
            wait_for(lambda: server.connect().close())
        connection.sendall(POST[-9:])
        assert read_to_end(connection).startswith(b"HTTP/1.1 201 ")
    assert server.process.wait(5) == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_signals_end_the_server_with_status_0_and_without_a_wal(start_server, database, number):
    server = start_server(  # another signal comes while the database is closed
        "close = shop.Application.close\n"
        "shop.Application.close = lambda app: (os.kill(os.getpid(), 15), close(app))"
    )
    with server.connect(), server.connect():
        server.product(stock=9)
        assert len(server("GET", "/products/").json["products"]) == 1
        status, seconds = server.end(number)
    assert status == 0
    assert seconds < 3
    assert not database.with_name("db.sqlite3-wal").exists()


def test_an_urgent_byte_closes_its_connection_and_no_more(server):
    with server.connect() as connection:
        connection.send(b"x", socket.MSG_OOB)
        with contextlib.suppress(ConnectionResetError):
            assert read_to_end(connection) == b""
    assert server("GET", "/healthz").status == 200


RESET_ON_CLOSE = {"SO_LINGER": struct.pack("ii", 1, 0)}


def test_a_connection_that_is_reset_between_two_requests_does_no_harm(server, database):
    fill(database, 300)
    unfinished = HEAD + b"Expect: 100-continue\r\nContent-Length: 60\r\n\r\n"
    for number in range(100):
        with server.connect(**RESET_ON_CLOSE) as connection:
            search = b"GET /products/?q=z%d HTTP/1.1\r\nHost: x\r\n\r\n" % number
            connection.sendall(search + unfinished)
            select.select([connection], [], [], number / 50_000)
    assert server("GET", "/healthz").status == 200


def test_clients_that_vanish_leave_nothing_behind(start_server):
    server = start_server("gc.disable()")  # all is freed without it
    server.product(stock=10**9)
    half = HEAD + b"Content-Length: 131072\r\n\r\n" + b"x" * 100_000
    order = order_request(1)

    def files_and_memory():
        assert server("GET", "/healthz").status == 200
        return len(os.listdir(f"/proc/{server.process.pid}/fd")), resident_memory(server)

    files, memory = files_and_memory()
    for number in range(16):
        connections = [server.connect(**RESET_ON_CLOSE if number % 2 else {}) for _ in range(60)]
        for connection in connections:
            connection.sendall(half)
        for _ in range(len(half) // (2 << 10) + 2):
            server("GET", "/healthz")  # in each turn the server reads a piece of every one
        for connection in connections:
            connection.close()
        for missing in (0, 40, 80) * 35:
            with server.connect(**RESET_ON_CLOSE) as connection:
                connection.sendall(order[: len(order) - missing])
    later_files, later_memory = files_and_memory()
    assert later_files <= files + 3
    assert later_memory < memory + (30 << 20)  # 96 MB have been sent
    assert server.order().status == 201


def test_a_shop_locked_by_another_process_starts_reads_and_lets_writes_wait(start_server, database):
    place_orders(database, 0)
    other = lock(database)
    server = start_server("shop.LOCK_TIMEOUT = 2")
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        orders = [pool.submit(server.order) for _ in range(3)]
        while not all(order.done() for order in orders):
            for path in "healthz", "products/", "products/?q=x", "orders/", "products/1/":
                started = time.monotonic()
                response = server("GET", f"/{path}")
                assert time.monotonic() - started < 0.5
                assert response.status == 200
            assert response.json["stock"] == 10_000
        for order in orders:
            assert_unavailable(order.result(), "The database is busy.")
        orders = [pool.submit(server.order) for _ in range(3)]
        assert server("GET", "/healthz").status == 200
        other.close()
        assert [order.result().status for order in orders] == [201] * 3
    assert server("GET", "/products/1/").json["stock"] == 9_997


def assert_unavailable(response, *details):
    """The response is a 503 with one of these details."""
    assert (response.status, response.headers["Retry-After"]) == (503, "1")
    assert response.json["detail"] in details


def test_a_database_that_is_locked_at_the_start_is_used_once_it_is_free(start_server, database):
    with connect(database) as connection:
        connection.execute("PRAGMA user_version = 0")
    other = lock(database)
    other.execute("CREATE TABLE _litestream_seq (x)")
    server = start_server()
    for path in "/products/", "/healthz":
        assert_unavailable(server("GET", path), "The database is busy.")
    other.execute("COMMIT")
    other.close()
    assert server.product().status == 201
    assert server("GET", "/healthz").status == 200


def set_file_size(server, limit):
    """Limit the files of a server to so many bytes, as a full disk would; -1 ends it."""
    resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE, (limit, -1))


def fill_disk(server):
    """Create products until the disk is full; returns how many, and the last response."""
    set_file_size(server, 900_000)
    created = 0
    while (response := server.product(description="y" * 10_000, stock=9)).status == 201:
        created += 1
    assert created > 10
    return created, response


def test_a_full_disk_is_a_503_that_changes_nothing_and_passes(server, database):
    created, response = fill_disk(server)
    assert_unavailable(response, "The disk is full.", "The disk cannot be read or written.")
    assert len(server("GET", "/products/").json["products"]) == created
    body = json.dumps({"name": "x", "description": "y" * 9000, "price": 1}).encode()
    head = HEAD + b"Content-Length: %d\r\n" % len(body)
    set_file_size(server, 1)  # not even a WAL that has been emptied has room now
    # The 100 Continue of the second request must not take a 201 of the first along.
    responses = server.send(head + b"\r\n" + body + head + b"Expect: 100-continue\r\n\r\n")
    assert [response.status for response in responses] == [503, 100]
    set_file_size(server, -1)
    assert server.order().status == 201
    assert server.product().json["id"] == created + 1
    assert db.check_integrity(database) == []


def test_a_failed_commit_is_reported_to_all_that_shared_it_and_undone(store):
    with pytest.raises(db.TransactionLost), store.batch():
        store.create_product(name="Mug", price=1)
        store._writer.execute("ROLLBACK")  # as SQLite does by itself when the disk is full
        with pytest.raises(db.TransactionLost):
            store.create_product(name="Jug", price=1)
    assert store.list_products() == ([], None)
    assert store.create_product(name="Cup", price=1)["id"] == 1


def test_the_access_log_has_one_line_a_request_that_says_how_long_it_took(start_server, tmp_path):
    server = start_server(SLOW_LISTS)
    with server.connect() as connection:
        connection.sendall(GET_PRODUCTS + closing(GET_HEALTH))
        assert not select.select([connection], [], [], 0.3)[0]
        (tmp_path / "go").touch()
        assert read_to_end(connection).count(b"HTTP/1.1 200 OK") == 2
    server.product()
    server("GET", "/products/1/?secret=1")
    for request in get(b"/a%0Ab\xe9"), get(b"/a\x1b"), b"nonsense\r\n\r\n":
        server.send(closing(request))
    server.end()
    line = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ 127\.0\.0\.1 (.+) (\d+) (\d+\.\d)\n")
    found = [line.fullmatch(text).groups() for text in server.log[2:]]
    assert [request for request, *_ in found] == [
        *("GET /products/ 200", "GET /healthz 200", "POST /products/ 201", "GET /products/1/ 422"),
        *("GET /a%0Ab%E9 404", "- - 400", "- - 400"),
    ]
    assert [size for _, size, _ in found[:3]] == ["28", "16", "82"]
    assert float(found[0][2]) > max(250, float(found[1][2]))


def test_the_access_log_can_be_off_and_the_token_is_nowhere_in_a_log(start_server):
    server = start_server(ACCESS_LOG="false", ADMIN_TOKEN="s3cret", DEBUG="true")
    assert server("POST", "/products/", {"name": "x", "price": 1}, **bearer("s3cret")).status == 201
    server.end()
    assert server.log[1:] == []
    assert "INSERT INTO product" in server.stderr()
    assert "s3cret" not in server.stderr()


def test_nobody_needs_to_read_the_log(tmp_path):
    server = Server(tmp_path).start(reads_log=False)
    for _ in range(4):
        # 100 KB of log lines, and a pipe holds 64
        assert len(server.send(GET_PRODUCTS * 399 + closing(GET_PRODUCTS))) == 400
    server.process.stdout.close()
    assert len(server.send(closing(GET_PRODUCTS))) == 1
    server.process.terminate()
    assert server.process.wait(5) == 0


# ---------------------------------------------------------------------------------------- settings

DIGITS = "7" * 5000
UNUSABLE_PREFIXES = "shop // /a//b /a/./b /.. /é /%41 /a?b /a;b https://shop.example/"
UNUSABLE_PROXIES = "proxy 10.0.0.0/8 10.0.0.1,10.0.0.2 10.0.0.1:80 [::1] **"
# Values of each setting that cannot be used. More of CORS_ORIGINS are among the tests of browsers.
UNUSABLE_VALUES = {
    "PORT": ["http", "65536", "-1", DIGITS],
    "DEBUG": ["maybe", "2", DIGITS],
    **dict.fromkeys(["ACCESS_LOG", "READ_ONLY", "LITESTREAM"], ["x"]),
    "ADMIN_TOKEN": ["a b", "s3cret two"],
    "HOST": ["no.such.host.invalid", "192.0.2.1", DIGITS],
    "CORS_ORIGINS": ["shop.example", f"{ORIGIN} https://me@other.example", "null", DIGITS],
    "URL_PREFIX": ["/a b", *UNUSABLE_PREFIXES.split(), DIGITS],
    "TRUSTED_PROXY": [*UNUSABLE_PROXIES.split(), DIGITS],
    "DATABASE_URL": [
        *("postgres://x", "sqlite:///", "sqlite:////", "sqlite:///:memory:", "sqlite:///a?b"),
        *("sqlite:///a#b", "sqlite:///" + "x" * 256, "sqlite:////dev/null", "sqlite:////proc/shop"),
        *(f"x{DIGITS}://x", f"sqlite:///{DIGITS}", f"sqlite:///{DIGITS}/db.sqlite3"),
    ],
}
UNUSABLE_FILES = {
    "sqlite:///none/such/db.sqlite3": "there is no directory 'none/such'",
    "sqlite:///.": "must be a file, not the directory",
    "sqlite:///text": "not a database",
    "sqlite:///byte": "not a database",
    "sqlite:///foreign": "another program",
    "sqlite:///short": "damaged",
    "sqlite:///newer": "newer version",
}
UNUSABLE_SETTINGS = [
    *(({name: value}, name) for name, values in UNUSABLE_VALUES.items() for value in values),
    *(({"DATABASE_URL": url}, f"DATABASE_URL.*{words}") for url, words in UNUSABLE_FILES.items()),
    ({"ADMIN_TOKEN": "x", "ORDER_TOKEN": "s3cret é"}, "ORDER_TOKEN"),
    ({"ORDER_TOKEN": "x"}, "ORDER_TOKEN needs ADMIN_TOKEN"),
    ({"DATABASE_URL": "sqlite:///newer", "READ_ONLY": "true"}, "DATABASE_URL: .*newer version"),
    ({"DATABASE_URL": "sqlite:///none", "READ_ONLY": "true"}, "DATABASE_URL: .*cannot be opened"),
]


@pytest.mark.parametrize("settings, words", UNUSABLE_SETTINGS)
def test_a_setting_that_cannot_be_used_ends_the_start_with_one_line(tmp_path, settings, words):
    (tmp_path / "text").write_text("no database " * 100)
    (tmp_path / "byte").write_text("x")
    db.Store(tmp_path / "newer").close()
    (tmp_path / "short").write_bytes((tmp_path / "newer").read_bytes()[:5000])
    later = f"PRAGMA user_version = {db.SCHEMA_VERSION + 1}"
    for name, statement in ("foreign", "CREATE TABLE x (y)"), ("newer", later):
        with connect(tmp_path / name) as connection:
            connection.execute(statement)
            connection.execute("PRAGMA journal_mode = WAL")
    files = contents(tmp_path)
    line = Server(tmp_path, **settings).fail()
    assert re.fullmatch(r"shop: .{,290}\.\n", line)
    assert re.search(words, line)
    assert "s3cret" not in line
    if any(DIGITS in value for value in settings.values()):
        assert 30 < line.count("7") <= 100
    # Only whether it can listen on HOST shows after the database is open.
    assert "HOST" in settings or contents(tmp_path) == files


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


URLS_WITH_A_SCHEME = (
    "postgresql://admin:s3cret@db.s3cret.example/s3cret postgresql+psycopg://admin:s3cret@/s3cret "
    "mysql://s3cret sqlite://s3cret"
)
URLS_WITHOUT_A_SCHEME = "admin:s3cret@db.example/s3cret s3cret/:// /var/s3cret s3cret"


@pytest.mark.parametrize(
    "url, end",
    [
        *((url, f", not '{url.partition(':')[0]}'.") for url in URLS_WITH_A_SCHEME.split()),
        *((url, "an absolute path.") for url in URLS_WITHOUT_A_SCHEME.split()),
    ],
)
def test_of_another_databases_url_only_the_scheme_is_shown(tmp_path, url, end):
    for command in [], ["check"], ["export"]:
        line = Server(tmp_path, DATABASE_URL=url).fail(*command)
        assert re.fullmatch(f"shop: DATABASE_URL .+{re.escape(end)}\n", line)
        assert not re.search("s3cret|admin", line)


def test_prefix_and_proxy_are_normalized():
    kept = "/a.b/c_d~/-/..."
    for text, prefix in {"/shop": "/shop", "/shop/": "/shop", kept: kept, "/": "", "": ""}.items():
        assert shop_module.read_settings({"URL_PREFIX": text}).url_prefix == prefix
    proxies = {"10.0.0.1": "10.0.0.1", "2001:DB8:0:0::1": "2001:db8::1", "*": "*", "": None}
    for text, proxy in proxies.items():
        assert shop_module.read_settings({"TRUSTED_PROXY": text}).trusted_proxy == proxy


@pytest.mark.parametrize("settings", [{}, {"READ_ONLY": "true"}, {"ADMIN_TOKEN": "x"}])
def test_the_start_says_whether_everything_is_open(tmp_path, database, settings):
    db.Store(database).close()
    server = Server(tmp_path, **settings).start()
    server.assert_ends_well()
    warning = ["ADMIN_TOKEN is not set: everything is open to everyone.\n"]
    assert server.log[1:] == ([] if "ADMIN_TOKEN" in settings else warning)


def test_what_is_no_file_is_no_database_and_nothing_is_left_beside_it(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to("loop")
    for name in "pipe", "loop":
        for command in [], ["export"], ["check"]:
            assert name in Server(tmp_path, DATABASE_URL=f"sqlite:///{name}").fail(*command)
    assert {path.name for path in tmp_path.iterdir()} == {"pipe", "loop"}


def test_a_port_in_use_ends_the_start_with_one_line(server, tmp_path):
    line = Server(tmp_path, PORT=str(server.port)).fail()
    assert re.fullmatch(r"shop: cannot listen .+ in use\.\n", line)


def test_a_second_start_with_settings_from_the_file_env_changes_nothing(tmp_path):
    (tmp_path / ".env").write_text(
        "\ufeffexport ADMIN_TOKEN='s3$cret'\nORDER_TOKEN=0rder # theirs\n\n"
        "# mine\nDATABASE_URL='sqlite:///mine.sqlite3'\nACCESS_LOG=false\n"
    )
    files = []
    for _ in range(2):
        server = Server(tmp_path)
        server.environment = lambda: {"PATH": os.environ["PATH"], "PORT": "0"}
        assert server.start().log[0].endswith("/mine.sqlite3\n")
        server.assert_ends_well()  # at once: signals are handled before the line is printed
        files.append((tmp_path / "mine.sqlite3").read_bytes())
    assert files[0] == files[1]
    server.start()
    assert server("GET", "/orders/").status == server.order().status == 401
    assert server("GET", "/orders/", **bearer("s3$cret")).status == 200
    assert server.order(**bearer("0rder")).status == 422
    server.assert_ends_well()


# Texts that set NAME to "value".
VALUE_IN_ENV = [
    # Before and behind it.
    *("export NAME=value", "export\tNAME='value'", "  NAME=value \t", "NAME='value'  "),
    *('NAME="value"\t', "name_2=x\nNAME=value\n", "NAME=first\nNAME='value'"),
    # Comments, byte order marks and ends of lines.
    *("NAME=value # it's a $comment", "# NAME=no $(\nNAME=value", "NAME=value # no\r\n"),
    *("   # NAME=no\n\n \t\nNAME=value\n#NAME=no", "NAME=value\r\n\r\n# no\r\nOTHER='x'\r\n"),
    *("\ufeffNAME=value", "\ufeffexport NAME='value'"),
]
ENV_LINES = [
    *((f"NAME={value}", value) for value in ("", "a=b:c==", "sqlite:////data/db.sqlite3", "a#b")),
    *((f"NAME={value}", value) for value in ("#b", "a~b/~", "*", "%?[a]{b,c}!^@+,-", "naïve☕")),
    *((f"NAME='{value}'", value) for value in ("", "sun$flower", " a # b ", 'a"b`c\\d')),
    *((f"NAME='{value}'", value) for value in ("a\u2028b\x0cc\x85", "~", "{a,b}")),
    *((f'NAME="{value}"', value) for value in ("", " a # b ", "it's; a & b | <c> (~)")),
    *((text, "value") for text in VALUE_IN_ENV),
    *(("NAME=  ", ""), ("NAME=value= \t #", "value=")),
]


@pytest.mark.parametrize("text, value", ENV_LINES)
def test_a_file_env_is_read_as_a_shell_reads_it_below_the_environment(
    tmp_path, monkeypatch, text, value
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("NAME", raising=False)
    (tmp_path / ".env").write_bytes(text.encode())
    assert shop_module.read_environment()["NAME"] == value
    (tmp_path / ".env").write_bytes(text.removeprefix("\ufeff").replace("\r", "").encode())
    shell = subprocess.run(["sh", "-c", '. ./.env; printf %s "$NAME"'], capture_output=True)
    assert (shell.stdout.decode(), shell.stderr) == (value, b"")
    monkeypatch.setenv("NAME", "")  # the environment outranks the file
    assert shop_module.read_environment()["NAME"] == ""


@pytest.mark.parametrize(
    "line",
    [
        # Names, and what is before them.
        *("KEY", "s3cret", "=s3cret", "1KEY=s3cret", "A KEY=s3cret", "A-KEY=s3cret"),
        *("A.KEY=s3cret", "ÄKEY=s3cret", "export KEY", "exportKEY=a s3cret", "set KEY=s3cret"),
        *("; KEY=s3cret", "\fKEY=s3cret", '"KEY=s3cret"', '{"KEY": "s3cret"}'),
        # Between name and value.
        *("KEY s3cret", "KEY: s3cret", "KEY:s3cret", "KEY =s3cret", "KEY= s3cret"),
        *("KEY= 's3cret'", "KEY= # s3cret"),
        # Bare values.
        *(f"KEY=s3cret{character}x" for character in "$`\\;&|<>()\r\v\0\u2028 \"'"),
        *("KEY=two s3cret", "KEY=s3cret\xa0", "KEY=s3cret\t# mine", "export KEY={s3cret,x}"),
        *("KEY=~/s3cret", "KEY=/a:~/s3cret", "KEY=it's3cret", 'KEY=a"s3cret"', "s3cret" * 1000),
        # Values in quotes.
        *("KEY='s3cret", 'KEY="s3cret', "KEY='s3cret' x", "KEY='s3cret' # x", 'KEY="s3cret" # x'),
        *("KEY='s3cret'x", "KEY='s3cret''x'", "KEY='it\\'s3cret'", "KEY='s3cret\\'"),
        *(f"KEY='s3cret{character}x'" for character in "\r\0\udcff"),
        *(f'KEY="s3cret{character}x"' for character in "$`\\\r\0"),
        # Comments.
        *("# s3cret \\", "# \rKEY=s3cret", "# \0s3cret", "KEY=s3cret # mine \\"),
    ],
)
def test_a_line_of_env_that_others_read_differently_is_named_by_its_number_alone(
    tmp_path, monkeypatch, line
):
    monkeypatch.chdir(tmp_path)
    for end in "\n", "\r\n":
        text = f"# settings{end}PORT='0\u2028'{end}{end}{line}{end}DEBUG=false{end}"
        (tmp_path / ".env").write_bytes(text.encode(errors="surrogateescape"))
        with pytest.raises(shop_module.ConfigError) as raised:
            shop_module.read_environment()
        assert re.fullmatch(r"Line 4 of \.env .{,180}", str(raised.value))
        assert "s3cret" not in str(raised.value)


def test_a_file_env_that_cannot_be_used_ends_every_command_with_one_line(tmp_path):
    folder = tmp_path / "folder"
    (folder / ".env").mkdir(parents=True)
    (tmp_path / ".env").write_text("\nexport ADMIN_TOKEN\n")
    for command in "", "check", "backup copy", "import -", "export", "expire":
        assert Server(tmp_path).fail(*command.split()).startswith("shop: Line 2 of .env ")
        assert Server(folder).fail(*command.split()).startswith("shop: The file .env ")


def test_an_application_without_a_url_takes_what_is_not_given_from_the_environment(
    make_shop, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DATABASE_URL", "sqlite:///mine.sqlite3")
    monkeypatch.setenv("ADMIN_TOKEN", "theirs")
    monkeypatch.setenv("DEBUG", "false")
    shop = make_shop(None)
    assert shop("GET", "/orders/").status_int == 401
    assert shop("GET", "/orders/", None, bearer("theirs")).status_int == 200
    assert (tmp_path / "mine.sqlite3").exists()
    assert capsys.readouterr().err == ""
    monkeypatch.setenv("ORDER_TOKEN", "theirs")
    monkeypatch.setenv("CORS_ORIGINS", "nonsense")
    shop = make_shop(None, admin_token="mine", cors_origins="*", debug=True)
    assert shop.order().status_int == 401
    assert shop("GET", "/orders/", None, bearer("theirs")).status_int == 401
    assert shop("GET", "/orders/", None, bearer("mine")).status_int == 200
    assert shop("GET", "/", None, {"Origin": "https://a"}).headers["Access-Control-Allow-Origin"]
    assert "SELECT" in capsys.readouterr().err


def test_an_application_with_a_url_takes_nothing_from_the_environment(make_shop, url, monkeypatch):
    monkeypatch.setenv("ADMIN_TOKEN", "theirs")
    monkeypatch.setenv("CORS_ORIGINS", "nonsense")
    assert make_shop(url)("GET", "/orders/").status_int == 200
    with pytest.raises(shop_module.ConfigError, match="ADMIN_TOKEN"):
        make_shop(url, admin_token="a b")


def test_the_shop_runs_under_a_server_with_threads(tmp_path):
    server = Server(tmp_path)
    command = "-m waitress --listen=127.0.0.1:0 --threads=8 --call shop:create_app"
    options = {"cwd": tmp_path, "env": server.environment(), "stderr": subprocess.PIPE}
    process = subprocess.Popen([sys.executable, *command.split()], **options, text=True)
    server.port = int(re.search(r":(\d+)$", process.stderr.readline())[1])
    server.product(stock=20)
    statuses = at_once(32, lambda n: server.order().status)
    process.terminate()
    process.communicate()
    assert sorted(statuses) == [201] * 20 + [409] * 12


@pytest.mark.parametrize("litestream, pages", [(False, 4000), (True, 0)])
def test_every_commit_is_flushed_one_connection_checkpoints_and_the_wal_shrinks(
    make_shop, litestream, pages
):
    store = make_shop(litestream=litestream).app.app.store
    store.list_orders()

    def pragmas(connection, *names):
        return [connection.execute(f"PRAGMA {name}").fetchone()[0] for name in names]

    flushing = "journal_mode", "synchronous", "fullfsync", "checkpoint_fullfsync", "foreign_keys"
    assert pragmas(store._writer, *flushing, "wal_autocheckpoint") == ["wal", 2, 1, 1, 1, pages]
    assert pragmas(store._local.reader, "query_only", "busy_timeout") == [1, 1000]


def test_all_writes_of_a_batch_share_one_commit(start_server, database):
    server = start_server(DEBUG="true")
    server.product(stock=9)
    commits = server.stderr().count("COMMIT")
    responses = serve_as_batch(server, database, [2] * 6)
    assert [response.status for response in responses] == [201] * 4 + [409] * 2
    assert server.stderr().count("COMMIT") == commits + 1


# -------------------------------------------------------------------------------- backup and check


def test_a_backup_under_load_is_one_consistent_state(server, tmp_path):
    for _ in range(3):
        server.product(price=1.5, stock=10**6)
    stop = threading.Event()

    def buy(n):
        while not stop.is_set():
            server("POST", "/orders/", order_of((1, 1), (2, 2)))

    threads = start_threads(4, buy)
    for name in "copy0", "copy1", "copy2":
        result = server.run("backup", name)
        with contextlib.closing(db.Store(tmp_path / name)) as copy:
            number = len(copy.list_orders(limit=10**6)[0])
            stocks = [product["stock"] for product in copy.list_products()[0]]
        assert stocks == [10**6 - number, 10**6 - 2 * number, 10**6]
        size = (tmp_path / name).stat().st_size
        summary = f"{name}: 3 products, {number} orders, {size} bytes\n"
        assert (result.returncode, result.stdout) == (0, summary), result.stderr
        assert server.run("check", name).stdout == f"{name}: sound\n"
    stop.set()
    join_all(threads)


def test_a_backup_rejects_a_bad_target_and_leaves_it_alone(server, tmp_path):
    server.product()
    (tmp_path / "mine").write_text("mine")
    (tmp_path / "used-wal").write_text("")
    for words in [
        *("mine", "db.sqlite3-wal --overwrite", "used", "db.sqlite3", "db.sqlite3 --overwrite"),
        *("none/such", "mine/such", "x" * 250, "x" * 300, ". --overwrite"),
    ]:
        target, *options = words.split()
        line = server.fail("backup", target, *options)
        # The option that helps is named, and only where it does.
        assert (f"{target}" in line and "--overwrite" in line) == (target == "mine"), line
        with pytest.raises(db.DatabaseError):
            db.backup(tmp_path / "db.sqlite3", tmp_path / target, overwrite=bool(options))
    assert (tmp_path / "mine").read_text() == "mine"
    assert server("GET", "/products/1/").status == 200
    assert server.run("backup", "mine", "--overwrite").returncode == 0
    assert not list(tmp_path.glob("*partial*"))
    assert server.run("check", "mine").returncode == 0


def test_check_names_a_file_that_is_missing_or_no_database(tmp_path):
    (tmp_path / "text").write_text("no database " * 100)
    for name in "text", "none":
        assert re.search(rf"\b{name}\b", Server(tmp_path).fail("check", name))


DAMAGE = {
    "UPDATE orders SET total = total + 1": "a total of 1000 cents, but 1 lines that make 999.",
    "DELETE FROM order_line": "Order 1 has a total",
    "UPDATE product SET stock = -1": "CHECK constraint failed in product",
    "UPDATE product SET metadata = '[]'": "CHECK constraint failed in product",
    "UPDATE orders SET metadata = '{'": "CHECK constraint failed in orders",
    """UPDATE product SET metadata = '{"a":"b","colour":1}'""": "Product 1 has invalid metadata",
    """UPDATE orders SET metadata = '{"a b":"x"}'""": "Order 1 has invalid metadata",
    """UPDATE product SET metadata = '{"":"x"}'""": "Product 1 has invalid metadata",
    "UPDATE orders SET metadata = json_object('a', printf('%.501c', 'x'))": "Order 1 has invalid",
    f"UPDATE orders SET metadata = '{json.dumps(dict.fromkeys(range(51), ''))}'": "Order 1 has",
    "DROP INDEX product_by_sku; UPDATE product SET sku = 'M';"
    "INSERT INTO product (name, price, sku) VALUES ('x', 1, 'M')": "Products 1, 2 have the same",
    "DELETE FROM orders": "A row of order_line refers to a missing row of orders.",
}


def assert_damaged(folder, *arguments, message=""):
    """The command check reports damage, a line a problem, and this one among them."""
    result = Server(folder).run("check", *arguments)
    assert (result.returncode, result.stderr) == (1, "")
    assert re.fullmatch(r"(db\.sqlite3: [^\n]+\n)+", result.stdout)
    assert message in result.stdout


@pytest.mark.parametrize("statement, message", DAMAGE.items())
def test_check_finds_planted_damage(shop, mug, database, tmp_path, statement, message):
    shop.order((1, 1))
    assert db.check_integrity(database) == []
    with connect(database) as connection:
        connection.executescript(f"PRAGMA ignore_check_constraints = ON; {statement}")
    assert_damaged(tmp_path, message=message)


def test_check_has_nothing_against_metadata_at_its_limits(store):
    store.create_product(name="x", price=1, stock=1, metadata=FULL_METADATA)
    store.create_order([{"product_id": 1, "quantity": 1}], metadata=FULL_METADATA)
    assert db.check_integrity(store.path) == []


def test_check_finds_a_damaged_page(shop, tmp_path, database):
    for _ in range(100):
        shop.product(description="y" * 1000)
    shop.app.app.close()
    with database.open("r+b") as file:
        file.seek(10 * 4096)
        file.write(os.urandom(4096))
    assert_damaged(tmp_path, "db.sqlite3")


def test_help_lists_every_command_and_says_where_settings_are_listed(tmp_path):
    help_ = Server(tmp_path).run("--help")
    assert help_.returncode == 0
    commands = ["serve", "backup", "check", "import", "export", "expire"]
    for word in *commands, "--version", ".env.example":
        assert word in help_.stdout
    for command in commands:
        assert f"usage: python shop.py {command} " in Server(tmp_path).run(command, "--help").stdout


# Command lines, with | between the arguments. The last argument of these is the one that is wrong:
UNRECOGNIZED = (
    "--nonsense check|-x serve|--overwrite serve|a --vers backup|--force backup|x|--over export|-1 "
    "import|-|--stock|- export|--orders|a|b import|-|--orders"
)
NO_DAYS = "20261101", "2026-11-1", "2026-11-31", "2026-W45-1", "2026-11-01T00:00:00Z", "٢٠٢٦-11-01"
WRONG_COMMAND_LINES = {
    **{name: f"invalid choice: '{name}'" for name in ("bakcup", "", "-")},
    "two\nlines" * 500: "invalid choice: 'two",
    **{line: f"unrecognized arguments: {line.split('|')[-1]};" for line in UNRECOGNIZED.split()},
    "export|-a b": "unrecognized arguments: -a b;",
    "check|a|" + "two\nlines" * 500: "unrecognized arguments: two linestwo",
    **{name: f"{name} needs a file" for name in ("backup", "import")},
    "backup|--overwrite=yes|x": "--overwrite",
    "export|--from|2026-11-01": "--from and --to need --orders",
    "export|--to|2026-11-01|out.csv": "--from and --to need --orders",
    "export|--orders|--from": "--from",
    "export|--orders|--from|" + "yesterday" * 500: "--from: invalid day value: 'yes",
    **{f"export|--orders|--to|{day}": f"--to: invalid day value: '{day}'" for day in NO_DAYS},
}


def test_a_wrong_command_line_is_one_line_that_names_what_is_wrong(tmp_path):
    for arguments, words in WRONG_COMMAND_LINES.items():
        line = Server(tmp_path).fail(*arguments.split("|"), status=2)
        assert re.fullmatch(r"shop: .{1,200}\n", line)
        assert words in line
        assert "--help" in line
    assert list(tmp_path.iterdir()) == []


def test_the_version_is_one_line(tmp_path):
    result = Server(tmp_path, PORT="nonsense").run("--version")
    assert (result.returncode, result.stderr) == (0, "")
    version = re.escape(shop_module.VERSION)
    assert re.fullmatch(rf"shop {version}, Python [\d.]+\S*, SQLite [\d.]+\n", result.stdout)
    assert openapi()["info"]["version"] == shop_module.VERSION


def test_a_read_only_server_shows_every_change_and_rejects_writes(server, start_server, tmp_path):
    copy = start_server(READ_ONLY="true")
    assert copy("GET", "/healthz").json == {"status": "ok", "read_only": True}
    for count in 1, 2, 3:
        server.product(stock=9)
        server.order()
        for seconds_ago in 0, 10:  # a file that has not changed for a while is cached
            for name in "db.sqlite3", "db.sqlite3-wal":
                changed_at = time.time() - seconds_ago
                os.utime(tmp_path / name, (changed_at, changed_at))
            for path in ["/products/", "/products/1/", "/orders/", f"/orders/{count}/"] * 3:
                assert copy("GET", path).json == server("GET", path).json
    for _, method, path, body in ACCESS.values():
        if method != "GET":
            refused = copy(method, path, body, **{"Idempotency-Key": "k"})
            detail = "This is a read-only copy of the shop: send writes to the shop itself."
            assert_unavailable(refused, detail)
    assert server("GET", "/products/1/").json["stock"] == 6


# ------------------------------------------------------------------- pins, README, OpenAPI, Docker

README = (HERE / "README.md").read_text()
README_WORDS = " ".join(README.split())  # in one line
SETTINGS = {field.name.upper() for field in dataclasses.fields(shop_module.Settings)}

# Every internal of waitress that the server overrides or calls, and a hash of its source.
WAITRESS_INTERNALS = """
adjustments.Adjustments 475cc98278b2             buffers.OverflowableBuffer 545747c4f2e2
channel.HTTPChannel aa3da44fa174                 parser.HTTPRequestParser f2b09de756c1
parser.ParsingError 19c4a507b52b                 parser.TransferEncodingNotImplemented 76fdb80eaf52
parser.crack_first_line 5ef0eba51166             parser.get_header_lines 968a7db45a59
parser.split_uri 2959428735d4                    receiver.ChunkedReceiver 7d4fd7a3f8c5
receiver.FixedStreamReceiver 434997a7017f        server.BaseWSGIServer 82ab2f37dc85
server.TcpWSGIServer b2cb32f191a1                task.Task 407d67e51639
task.ThreadedTaskDispatcher 541f30c57f08         task.WSGITask.get_environment 3bb57be6c7db
trigger.trigger 48bf86fea4c8                     utilities.BadRequest 6502b0d69646
utilities.build_http_date 323d7932141e           utilities.find_double_newline 2feb10fa9a60
wasyncore.close_all 6b588549e991                 wasyncore.dispatcher 4d74dc7e94b4
wasyncore.poll2 f2ea2bd150ff                     wasyncore.readwrite 2467235cc3f4
"""


def test_waitress_is_still_what_the_server_relies_on():
    pins = dict(line.split("==") for line in (HERE / "requirements.txt").read_text().split())
    assert set(pins) == {"bottle", "waitress", "pytest", "webtest"}
    assert metadata.version("waitress") == pins["waitress"]
    assert metadata.version("bottle") == pins["bottle"]
    words = WAITRESS_INTERNALS.split()
    found = []
    for name in words[::2]:
        source = inspect.getsource(pkgutil.resolve_name(f"waitress.{name}"))
        found += [name, hashlib.sha256(source.encode()).hexdigest()[:12]]
    assert found == words, (
        "waitress has changed. Read what these parts do now, adapt the part `server` of shop.py, "
        "run the tests and put the new hashes here."
    )


def parse_curl(command):
    """What `curl` would send, with the options that README and page use."""
    options, [url] = getopt.gnu_getopt(shlex.split(command)[1:], "X:H:d:")
    headers = dict(value.split(": ", 1) for name, value in options if name == "-H")
    body = dict(options).get("-d")
    if body:
        headers.setdefault("Content-Type", "application/x-www-form-urlencoded")
    method = dict(options).get("-X", "POST" if body else "GET")
    return method, re.sub("^(http://)?localhost:8000", "", url), headers, body


def run_curl(server, command):
    """What `curl` would print."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port)
    with contextlib.closing(connection):
        method, path, headers, body = parse_curl(command)
        connection.request(method, path, body, headers)
        return connection.getresponse().read().decode()


def test_every_example_of_the_readme_answers_as_the_readme_says(server):
    blocks = re.findall(r"```console\n(.*?)```", README, re.S)
    examples = [example.partition("\n") for block in blocks for example in block.split("$ ")[1:]]
    assert 10 <= len(examples) <= 15
    for command, _, output in examples:
        texts = run_curl(server, command), output
        printed, due = (re.sub(r"\d{4}-\d\d-\d\dT[\d:]+Z", "then", text) for text in texts)
        assert printed == due


def test_the_statement_that_the_readme_quotes_is_the_one_that_takes_stock():
    quoted = re.search(r"^    UPDATE product\n(?:    .*\n)+", README, re.M)[0]
    source = (HERE / "db.py").read_text()
    assert f'""" {" ".join(quoted.split())} """' in " ".join(source.split())


def with_ids(path):
    """The path of a template of /openapi.json, every id being 1."""
    return re.sub(r"\{\w+\}", "1", path)


def test_the_readme_names_every_status_and_setting():
    for status in *openapi()["components"]["responses"], "401", "409", "422":
        assert re.search(rf"^- .*\*\*{status}\*\*.*: ", README, re.M), status
    example = (HERE / ".env.example").read_text()
    for name in SETTINGS - {"DATABASE"} | {"DATABASE_URL"}:
        assert f"`{name}`" in README
        assert re.search(rf"^#?{name}=", example, re.M)


def test_the_readme_names_every_path_parameter_field_and_column():
    for route in shop_module.api.routes:
        spec = route.config["spec"]
        path = re.sub("<.+?>", "1", route.rule)
        item = re.search(rf"^- `{route.method} {re.escape(path)}`.*\n(  .*\n)*", README, re.M)[0]
        for name in spec.query["properties"]:
            assert f"`{name}=" in item
        for name in spec.body["properties"] if spec.body else ():
            assert f"`{name}`" in item or f'"{name}":' in item
    item = re.search(r"^- `import .*\n(  .*\n)*", README, re.M)[0]
    for name in *shop_module.COLUMNS, "metadata.NAME", "--stock":
        assert f"`{name}`" in item


def test_the_readme_states_the_limits_that_the_schemas_set():
    total = shop_module.ORDER["properties"]["total_price"]
    limits = [
        f"`name` has 1 to {shop_module.NAME['maxLength']} characters",
        f"`description` up to {shop_module.PRODUCT_FIELDS['description']['maxLength']:,}",
        f"`reference` (yours, such as a cart) up to {shop_module.REFERENCE['maxLength']}.",
        f"`sku`, your article number, has up to {shop_module.SKU['maxLength']} ",
        f"`price` has at most two decimals and is 0 to {shop_module.PRICE['maximum']:,};",
        f"an order's total is at most {total['maximum']:,}.",
        f"`stock` (0 to {shop_module.STOCK['maximum']:,})",
        f"`quantity` (1 to {shop_module.QUANTITY['maximum']:,})",
        f"up to {shop_module.METADATA['maxProperties']} texts",
        f"of up to {shop_module.METADATA['additionalProperties']['maxLength']} characters",
        f"1 to {shop_module.LINES['maxItems']} `products`",
        f"1 to {shop_module.LIMIT['maximum']} items per page",
    ]
    assert [limit for limit in limits if limit not in README_WORDS] == []
    [idle] = re.findall(r"least (\d+) seconds while idle", README_WORDS)
    assert int(idle) < shop_module.IDLE_TIMEOUT
    assert f"within some {shop_module.REQUEST_TIMEOUT} seconds" in README_WORDS


def test_the_readme_normalises_an_origin_and_finds_words_as_the_code_does(shop):
    [(origin, normalised)] = re.findall("`(https://[^` ]+)` means `(https://[^`]+)`", README_WORDS)
    assert shop_module.normalize_origin(origin) == normalised
    found = re.findall("`q=([^`]+)` finds `([^`]+)`", README_WORDS)
    [(first, second)] = re.findall("sorted likewise, `(.+?)` before `(.+?)`", README_WORDS)
    for name in second, first, *(name for _, name in found):
        shop.product(name=name)
    assert [find_ids(shop, word) for word, _ in found] == [[3], [4]]
    order = shop.ids("/products/?sort=name")
    assert order.index(2) < order.index(1)


def test_other_servers_read_all_settings_but_those_that_the_readme_names():
    excepted = re.search("reads the settings above, except (.+?):", README_WORDS)[1]
    functions = shop_module.open_application, shop_module.open_store
    read = re.findall(r"settings\.(\w+)", "".join(map(inspect.getsource, functions)))
    ignored = SETTINGS - {name.upper() for name in read}
    assert set(re.findall("`(\\w+)`", excepted)) == ignored


def test_the_settings_that_the_readme_shows_can_be_used():
    lines = re.findall(r"^ {4}([A-Z_]+=.*)$|`([A-Z_]+=\S+)`", README, re.M)
    texts = [line or inline for line, inline in lines]
    assert {"TRUSTED_PROXY=*", "TRUSTED_PROXY=127.0.0.1", "URL_PREFIX=/shop"} <= set(texts)
    for text in texts:
        assert shop_module.ENV_LINE.fullmatch(text)
        name, _, value = text.partition("=")
        shop_module.read_settings({name: value})


def test_the_commands_of_the_readme_are_those_of_the_command_line():
    _, _, part = README.partition("The commands of `python shop.py`")
    named = re.findall("^- `(.+?)`", part.partition("\n## ")[0], re.M)
    for command in named:
        options = shop_module.parse_arguments(re.sub(r"[\[\]]", "", command).split())
        assert options.command == command.split()[0]
    commands = {command.split()[0] for command in named}
    assert commands == {"import", "export", "expire", "backup", "check"}


def test_the_script_of_the_readme_runs(tmp_path, monkeypatch):
    script = re.search(r"^    import db\n(    .*\n)+", README, re.M)[0]
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(re.sub("^    ", "", script, flags=re.M), names)
    order = names["store"].get_order(names["order"]["id"])
    assert order["total"] == 2 * names["mug"]["price"] == 2 * 999
    assert [line["sku"] for line in order["lines"]] == ["MUG-BL"]
    names["store"].close()


def test_openapi_describes_every_route_with_its_parameters_and_media_types(shop):
    document = shop("GET", "/openapi.json").json
    assert document["openapi"] == "3.1.0"
    described = set()
    for method, path, operation in operations_of_openapi(document):
        described.add((operation["operationId"], method, with_ids(path)))
        parameters = {(item["in"], item["name"]) for item in operation["parameters"]}
        assert (("header", "Idempotency-Key") in parameters) == (method == "POST")
        in_path = {name for place, name in parameters if place == "path"}
        assert in_path == set(re.findall(r"\{(\w+)\}", path))
        if "requestBody" in operation:
            patch = ["application/merge-patch+json"] * (method == "PATCH")
            assert list(operation["requestBody"]["content"]) == ["application/json", *patch]
    assert described == {(name, method, path) for name, (_, method, path, _) in ACCESS.items()}


@pytest.mark.parametrize("tokens", [(), ("admin",), ("admin", "order")])
def test_openapi_requires_the_token_where_the_shop_does(make_shop, tokens):
    shop = make_shop(**{f"{name}_token": f"{name}-secret" for name in tokens})
    for method, path, operation in operations_of_openapi(shop("GET", "/openapi.json").json):
        refused = shop(method, with_ids(path)).status_int == 401
        assert refused == bool(operation["security"])
        assert refused == ("401" in operation["responses"])


def reachable(part):
    """The kind and name of every component that a part of /openapi.json leads to."""
    found = set()
    parts = [part]
    while parts:
        new = set(re.findall(r'"#/components/(\w+)/(\w+)"', json.dumps(parts))) - found
        parts = [openapi()["components"][kind][name] for kind, name in new]
        found |= new
    return found


def operations_of_openapi(document=None):
    """Each operation with its method and path."""
    return [
        (method.upper(), path, operation)
        for path, operations in (document or openapi())["paths"].items()
        for method, operation in operations.items()
    ]


def keywords_in(part):
    """Every key in a part of /openapi.json."""
    keys = set()
    json.loads(json.dumps(part), object_hook=lambda fields: keys.update(fields) or fields)
    return keys


def test_every_schema_of_openapi_has_examples_that_it_accepts():
    for name, schema in openapi()["components"]["schemas"].items():
        assert schema["examples"], name
        for example in schema["examples"]:
            assert list(schema_errors(example, schema, closed=True)) == [], name


def test_openapi_has_no_keyword_that_generators_and_validators_stumble_over():
    schemas = openapi()["components"]["schemas"].values()
    fields = {name for schema in schemas for name in schema.get("properties", ())}
    for keyword in keywords_in(openapi()) - fields:
        assert keyword not in ("multipleOf", "default", "decimals", "unique_by", "message")
        assert not keyword.lower().startswith("x-"), keyword


DEFAULTS_OF_BODIES = {
    "NewProduct": {"description": '""', "stock": "0", "sku": '""', "metadata": "{}"},
    "StockUpdate": {"note": '""'},
    "NewOrder": {"reference": '""', "metadata": "{}"},
}
DEFAULTS_OF_QUERIES = {"/products/": {"sort": '"id"'}, "/orders/": {"sort": '"id"', "limit": "100"}}


def test_two_decimals_unique_products_and_defaults_are_described_in_words():
    schemas = openapi()["components"]["schemas"]
    for name in "Product", "NewProduct", "ProductUpdate", "OrderLine":
        assert "two decimals" in schemas[name]["properties"]["price"]["description"]
    lines = schemas["NewOrder"]["properties"]["products"]["description"]
    assert lines == 'Each "product_id" only once.'
    for name, defaults in DEFAULTS_OF_BODIES.items():
        fields = schemas[name]["properties"]
        assert fields.keys() - schemas[name]["required"] == defaults.keys()
        for field, default in defaults.items():
            assert f"Default: {default}." in fields[field]["description"]
    for name in "Product", "ProductUpdate", "Order", "OrderUpdate":
        assert "Default" not in json.dumps(schemas[name])
    for path, defaults in DEFAULTS_OF_QUERIES.items():
        for item in openapi()["paths"][path]["get"]["parameters"]:
            default = defaults.get(item["name"])
            assert (f"Default: {default}." in item["description"]) == (default is not None)


def test_only_the_schemas_of_requests_are_closed_to_new_fields():
    operations = [operation for _, _, operation in operations_of_openapi()]
    requests = reachable([operation.get("requestBody") for operation in operations])
    responses = reachable([operation["responses"] for operation in operations])
    assert not requests & responses
    for name, schema in openapi()["components"]["schemas"].items():
        if ("schemas", name) in requests:
            assert schema["additionalProperties"] is False, name
        else:
            assert '"additionalProperties": false' not in json.dumps(schema), name


def test_openapi_declares_conditions_and_etags_only_where_they_have_an_effect():
    if_match = {"update_product", "update_stock", "delete_product", "update_order"}
    if_none_match = {"list_products", "get_product", "list_movements", "list_orders", "get_order"}
    for _, _, operation in operations_of_openapi():
        name = operation["operationId"]
        headers = {item["name"] for item in operation["parameters"] if item["in"] == "header"}
        assert ("If-Match" in headers) == ("412" in operation["responses"]) == (name in if_match)
        has_304 = "304" in operation["responses"]
        assert ("If-None-Match" in headers) == has_304 == (name in if_none_match), name
        success = operation["responses"][min(operation["responses"])]
        has_etag = name in if_none_match | if_match - {"delete_product"}
        assert ("ETag" in success["headers"]) == has_etag, name


def test_openapi_has_just_the_components_that_it_refers_to():
    components = openapi()["components"]
    defined = {(kind, name) for kind in ("schemas", "responses") for name in components[kind]}
    assert reachable(openapi()["paths"]) == defined
    security = [item for *_, operation in operations_of_openapi() for item in operation["security"]]
    assert set().union(*security) == set(components["securitySchemes"])
    assert not {"409", "422"} & set(components["responses"])


def test_nested_schemas_are_references():
    for schema in openapi()["components"]["schemas"].values():
        for field in schema.get("properties", {}).values():
            assert "properties" not in keywords_in(field)
    for _, _, operation in operations_of_openapi():
        for response in operation["responses"].values():
            for media_type, content in resolve(response).get("content", {}).items():
                if media_type != "text/html" and operation["operationId"] != "get_openapi":
                    assert content["schema"].keys() <= {"$ref", "oneOf"}


def test_every_operation_and_parameter_is_described_and_every_tag_used():
    operations = [operation for _, _, operation in operations_of_openapi()]
    for operation in operations:
        assert operation["summary"].strip()
        assert operation["description"].strip()
        for item in operation["parameters"]:
            assert item["description"].endswith("."), item["name"]
            assert item["required"] == (item["in"] == "path")
    used = {tag for operation in operations for [tag] in [operation["tags"]]}
    assert used == {tag["name"] for tag in openapi()["tags"]}


# The schemas of each operation's 409.
CONFLICTS = dict.fromkeys(["create_product", "update_product"], {"DuplicateSku"})
CONFLICTS |= dict.fromkeys(["create_order", "update_stock"], {"InsufficientStock", "Shortage"})
CONFLICTS |= {"update_order": {"InvalidTransition"}}
PROBLEMS = {
    "InsufficientStock": ("insufficient-stock", {"shortages"}),
    "InvalidTransition": ("invalid-transition", set()),
    "DuplicateSku": ("duplicate-sku", {"product_id"}),
    "ValidationFailed": ("validation", {"errors"}),
    "IdempotencyKeyReused": ("idempotency-key-reused", set()),
}


def test_each_type_of_a_409_and_a_422_has_a_schema_of_its_own():
    for method, _, operation in operations_of_openapi():
        conflicts = CONFLICTS.get(operation["operationId"], set())
        reused = ["IdempotencyKeyReused"] * (method == "POST")
        invalid = {"ValidationFailed", "InvalidField", *reused}
        for status, names in ("409", conflicts), ("422", invalid):
            declared = reachable(operation["responses"].get(status))
            assert declared == {("schemas", name) for name in names}
    for name, (kind, members) in PROBLEMS.items():
        schema = openapi()["components"]["schemas"][name]
        assert schema["properties"]["type"]["const"] == f"urn:problem-type:{kind}"
        assert set(schema["required"]) == {"type", "title", "status", "detail"} | members


def test_the_schemas_of_openapi_accept_and_reject_what_the_shop_does(shop, mug):
    shop.order((1, 1))
    x = {"name": "x", "price": 1}
    order = order_of((1, 1))
    full, overfull = ({"metadata": FULL_METADATA | more} for more in ({}, {"more": ""}))
    nulls = [{"metadata": dict.fromkeys(map(str, range(number)))} for number in (0, 1, 99)]
    fields = [{field: value} for field, values in INVALID_FIELDS.items() for value in values]
    fields += [{"price": 0.29}, {"name": "\u3000x", "price": 1e1, "stock": 2.0}, full]
    fields += [{"name": "😀" * 200, "price": 10**9}, *({"sku": sku} for sku in SKUS)]
    metadata = [{"metadata": entries} for entries, _ in INVALID_METADATA]
    orders = [body for body, _ in INVALID_ORDERS]
    references = [{"reference": text} for text in ("é" * 200, "x" * 201, "\0", None)]
    notes = [{"change": 1, "note": text} for text in ("é" * 200, "x" * 201, "\0", None)]
    changes = [{"change": number} for number in (-0.0, 10**9 + 1, -(10**9) - 1)]
    new = [overfull, nulls[1], *metadata]  # with null, which no new item may have
    bodies = {
        "create_product": [x | more for more in (*fields, *new)],
        "update_product": [{}, *fields, *metadata, *nulls],
        "update_stock": [{"note": "x"}, *changes, *notes],
        "create_order": [*orders, *(order | more for more in (full, *references, *new))],
        "update_order": [{}, {"status": "pending"}, *references, *metadata, *nulls],
    }
    # What only words say is wrong.
    in_words = [{"price": 9.999}, {"name": "\ud800"}, {"sku": "\ud800"}, {"description": "x\udfff"}]
    in_words += [{"metadata": {"surrogate": "\ud800"}}]
    in_words += [x | field for field in in_words] + [order | in_words[-1], order_of((1, 1), (1, 1))]
    for method, path, operation in operations_of_openapi():
        for body in bodies.get(operation["operationId"], ()):
            schema = operation["requestBody"]["content"]["application/json"]["schema"]
            status = shop(method, with_ids(path), body).status_int
            assert status in (200, 201, 409, 422), body
            is_wrong = status == 422 and body not in in_words
            assert any(schema_errors(body, schema)) == is_wrong, body


def test_dockerfile_compose_file_and_readme_agree(tmp_path):
    names = "Dockerfile", "docker-compose.yml", ".env.example"
    dockerfile, compose, example = ((HERE / name).read_text() for name in names)
    web, _, replica = compose.partition("\n  replica:\n")
    both = 'read_only: true | cap_drop: [ALL] | "no-new-privileges:true" | '
    both += "- data:/data | tmpfs: [/tmp] | restart: unless-stopped"
    assert re.search(r"image: litestream/litestream:0\.5\.\d+$", replica, re.M)
    for text, parts in [
        (dockerfile, "FROM python:3.14-slim\n | USER 10001:10001 | VOLUME /data | EXPOSE 8000"),
        (dockerfile, 'CMD ["python", "shop.py"]'),
        (web, 'name: shop | ports: ["${PUBLISH:-8000}:8000"] | ' + both),
        (web, "required: false # Docker Compose 2.24.0 or later"),
        (replica, 'user: "10001:10001" | profiles: [replica] | ' + both),
        (README, "user 10001 | PUBLISH=127.0.0.1:8000 | encode gzip | shop_data"),
        (README, "docker compose --profile replica up -d | Compose 2.24.0 or later"),
    ]:
        assert [part for part in parts.split(" | ") if part not in text] == []
    assert "profiles" not in web
    url = "sqlite:////data/db.sqlite3"
    for name, value in ("DATABASE_URL", url), ("HOST", "0.0.0.0"), ("PORT", "8000"):
        assert re.search(rf"\b{name}={re.escape(value)}\b", dockerfile)
        assert re.search(rf'^ +{name}: "?{re.escape(value)}"?$', web, re.M)
        # Only in the container is there a folder /data.
        assert shop_module.read_settings({name: value.replace("/data", str(tmp_path))})
    for name in set(re.findall(r"\$\{(\w+)", compose)):
        assert f"{name}=" in README, name
        assert f"#{name}=" in example, name


def health_checks(port):
    """The health checks of Dockerfile and compose file, as commands, of a shop at a port."""
    texts = (HERE / "Dockerfile").read_text(), (HERE / "docker-compose.yml").read_text()
    for text in texts:
        pattern = r'^(?:HEALTHCHECK .*\n +CMD \[| +test: \["CMD", )"python", ("-c", .+)\]$'
        [arguments] = re.findall(pattern, text, re.M)
        for_port = arguments.replace("8000", str(port))
        yield [sys.executable, *json.loads(f"[{for_port}]")]


def test_the_health_checks_ask_the_shop_itself_and_want_a_200():
    statuses = b"200 OK", b"204 No", b"302 Found\r\nLocation: /", b"404 Not Found", b"503 No"
    with socket.create_server(("", 0)) as shop, socket.create_server(("", 0)) as proxy:
        shop.settimeout(10)
        port = shop.getsockname()[1]
        names = "http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"
        environment = dict.fromkeys(names, f"http://127.0.0.1:{proxy.getsockname()[1]}")
        environment["PORT"] = str(port)
        for command, status in itertools.product(health_checks(port), statuses):
            process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE)
            with shop.accept()[0] as connection:
                assert connection.recv(9999).startswith(b"GET /healthz HTTP/1.1\r\n")
                connection.sendall(b"HTTP/1.1 " + status + b"\r\nContent-Length: 0\r\n\r\n")
                assert process.communicate(timeout=10) == (None, b"")
            assert process.returncode == (status != b"200 OK")
    for command in health_checks(port):  # where nothing listens
        result = subprocess.run(command, env=environment, stderr=subprocess.DEVNULL)
        assert result.returncode == 1


def test_the_image_contains_every_file_that_the_tests_read():
    dockerignore = HERE / ".dockerignore"
    if not dockerignore.exists():
        pytest.skip("inside the image itself")
    copied = dockerignore.read_text().split()
    for name in re.findall(r"HERE / \"([\w.-]+)\"", Path(__file__).read_text()):
        assert f"!{name}" in copied or name == ".dockerignore", name


# -------------------------------------------------------------------------------------- migrations

# The tables as the first version of the shop made them, and what it wrote into them.
SCHEMA_1 = """
    PRAGMA journal_mode = WAL; PRAGMA application_id = 1397247824; PRAGMA user_version = 1;
    CREATE TABLE product (
        id INTEGER PRIMARY KEY AUTOINCREMENT,
        name TEXT NOT NULL CHECK (length(name) BETWEEN 1 AND 200),
        description TEXT NOT NULL DEFAULT '' CHECK (length(description) <= 10000),
        price INTEGER NOT NULL CHECK (price BETWEEN 0 AND 100000000),
        stock INTEGER NOT NULL DEFAULT 0 CHECK (stock BETWEEN 0 AND 1000000000)
    ) STRICT;
    CREATE TABLE orders (
        id INTEGER PRIMARY KEY AUTOINCREMENT,
        status TEXT NOT NULL DEFAULT 'pending'
            CHECK (status IN ('pending', 'completed', 'cancelled')),
        total INTEGER NOT NULL CHECK (total BETWEEN 0 AND 1000000000000000),
        created_at TEXT NOT NULL CHECK (created_at GLOB '????-??-??T??:??:??Z')
    ) STRICT;
    CREATE INDEX orders_by_status ON orders (status);
    CREATE TABLE order_line (
        order_id INTEGER NOT NULL REFERENCES orders (id),
        product_id INTEGER NOT NULL CHECK (product_id > 0),
        position INTEGER NOT NULL CHECK (position BETWEEN 0 AND 99),
        name TEXT NOT NULL CHECK (length(name) BETWEEN 1 AND 200),
        price INTEGER NOT NULL CHECK (price BETWEEN 0 AND 100000000),
        quantity INTEGER NOT NULL CHECK (quantity BETWEEN 1 AND 100000),
        PRIMARY KEY (order_id, product_id)
    ) STRICT, WITHOUT ROWID;
    CREATE TABLE idempotency_key (
        id INTEGER PRIMARY KEY, key TEXT NOT NULL UNIQUE CHECK (length(key) BETWEEN 1 AND 255),
        fingerprint TEXT NOT NULL, answer TEXT NOT NULL CHECK (json_valid(answer)),
        created_at TEXT NOT NULL CHECK (created_at GLOB '????-??-??T??:??:??Z')
    ) STRICT;

    INSERT INTO product VALUES
        (1, 'Café', '', 999, 3), (2, 'Tea – Łódź', 'in a BLÜE tin', 499, 7), (9, 'gone', '', 1, 1);
    DELETE FROM product WHERE id = 9;
    INSERT INTO orders VALUES (1, 'pending', 1998, '2026-11-24T18:26:25Z'),
                              (2, 'cancelled', 1498, '2026-11-24T18:26:25Z');
    INSERT INTO order_line VALUES
        (1, 1, 0, 'Café', 999, 2), (2, 1, 1, 'Café', 999, 1), (2, 2, 0, 'Tea', 499, 1);
    INSERT INTO idempotency_key VALUES
        (1, 'k1', '6fe335022035e90e3369da5d', '[201, "/orders/1/", "{}"]',
         strftime('%Y-%m-%dT%H:%M:%SZ', 'now'));
"""

EMPTY = {"sku": "", "metadata": {}}  # the fields of a product from before schema 7

# What the versions up to 6 made of SCHEMA_1.
SCHEMA_6 = f"""
    {SCHEMA_1}
    ALTER TABLE orders ADD COLUMN reference TEXT NOT NULL DEFAULT '';
    ALTER TABLE product ADD COLUMN movements INTEGER NOT NULL DEFAULT 0;
    ALTER TABLE order_line ADD COLUMN stock INTEGER;
    ALTER TABLE order_line ADD COLUMN movement_id INTEGER;
    CREATE INDEX product_by_price ON product (price);
    CREATE INDEX product_by_price_down ON product (price DESC);
    CREATE TABLE product_search (
        product_id INTEGER PRIMARY KEY REFERENCES product (id) ON DELETE CASCADE,
        sort_name TEXT NOT NULL, words TEXT NOT NULL
    ) STRICT;
    CREATE INDEX product_by_name ON product_search (sort_name);
    CREATE INDEX product_by_name_down ON product_search (sort_name DESC);
    INSERT INTO product_search VALUES (1, 'café', 'cafe' || char(10)), (2, 'tea', 'tea');
    CREATE INDEX orders_by_reference ON orders (reference) WHERE reference <> '';
    CREATE INDEX orders_pending_by_time ON orders (created_at) WHERE status = 'pending';
    CREATE TABLE movement (
        product_id INTEGER NOT NULL REFERENCES product (id) ON DELETE CASCADE,
        id INTEGER NOT NULL CHECK (id > 0), change INTEGER NOT NULL CHECK (change <> 0),
        stock INTEGER NOT NULL CHECK (stock BETWEEN 0 AND 1000000000),
        order_id INTEGER REFERENCES orders (id), note TEXT NOT NULL DEFAULT '',
        created_at TEXT NOT NULL CHECK (created_at GLOB '????-??-??T??:??:??Z'),
        PRIMARY KEY (product_id, id)
    ) STRICT, WITHOUT ROWID;
    INSERT INTO movement VALUES (1, 1, 3, 3, NULL, '', '2026-11-24T18:26:25Z'),
                                (2, 1, 7, 7, NULL, '', '2026-11-24T18:26:25Z');
    UPDATE product SET movements = 1;
    CREATE INDEX idempotency_key_by_time ON idempotency_key (created_at);
    PRAGMA user_version = 6;
"""


def make_old(path, schema=SCHEMA_1):
    with connect(path) as connection:
        connection.executescript(schema)


def dump(path):
    """The version and everything in a database, as SQL."""
    with connect(path) as connection:
        [version] = connection.execute("PRAGMA user_version").fetchone()
        return version, list(connection.iterdump())


@pytest.mark.parametrize("schema", [SCHEMA_1, SCHEMA_6], ids=["1", "6"])
def test_a_shop_of_an_older_version_comes_along_with_all_it_has(make_shop, database, schema):
    make_old(database, schema)
    shop = make_shop()
    tea = {"id": 2, "name": "Tea – Łódź", "description": "in a BLÜE tin", "price": 4.99, "stock": 7}
    cafe = {"id": 1, "name": "Café", "description": "", "price": 9.99, "stock": 3}
    assert shop("GET", "/products/").json["products"] == [cafe | EMPTY, tea | EMPTY]
    assert find_ids(shop, "cafe") == [1]
    assert find_ids(shop, "blue tea lodz -") == [2]  # as only the newest version folds
    cafe_line = {"product_id": 1, "name": "Café", "price": 9.99, "quantity": 2, "sku": ""}
    tea_line = {"product_id": 2, "name": "Tea", "price": 4.99, "quantity": 1, "sku": ""}
    order = {"id": 1, "status": "pending", "total_price": 19.98, "products": [cafe_line]}
    order |= {"created_at": "2026-11-24T18:26:25Z", "reference": "", "metadata": {}}
    cancelled = order | {"id": 2, "status": "cancelled", "total_price": 14.98}
    cancelled["products"] = [tea_line, cafe_line | {"quantity": 1}]
    # Its fingerprint was of the bytes of the body.
    key = {"Idempotency-Key": "k1"} | JSON
    repeat = shop.app.post("/orders/", json.dumps(order_of((1, 2))), headers=key)
    assert repeat.headers["Idempotent-Replayed"] == "true"
    assert (repeat.headers["Location"], repeat.body) == ("/orders/1/", b"{}")
    other = shop("POST", "/orders/", order_of((1, 1)), key)
    assert other.json["type"] == "urn:problem-type:idempotency-key-reused"
    assert shop("GET", "/orders/?reference=").json["orders"] == [order, cancelled]
    assert shop("GET", "/orders/1/").json == order
    assert shop.stock({"id": 1}) == 3
    assert shop("PATCH", "/orders/1/", {"status": "cancelled"}).status_int == 200
    assert shop.stock({"id": 1}) == 5
    assert shop.product()["id"] == 10  # 9 is not given twice
    assert shop.order((1, 1)).json["id"] == 3
    assert db.check_integrity(database) == []


NEW_PRODUCT = "INSERT INTO product (name, price, sku, metadata) VALUES (?, ?, ?, ?)"
NEW_ORDER = """
    INSERT INTO orders (status, total, created_at, reference, metadata)
    VALUES (?, ?, '2026-11-24T18:26:25Z', ?, ?)
"""
NEW_LINE = "INSERT INTO order_line VALUES (1, 7, 0, 'x', ?, 1, ?, ?, ?)"
REJECTED_ROWS = {
    NEW_PRODUCT: [
        *(("x", price, "y", "{}") for price in (-1, 10**11 + 1)),
        *(("x", 1, sku, "{}") for sku in ("y" * 65, "y\0", "used", None)),
        *(("x", 1, "y", metadata) for metadata in ("", "[]", "{", None)),
        ("\u2003", 1, "y", "{}"),
    ],
    NEW_ORDER: [
        *(("paid", 1, "", "{}"), ("pending", 10**15 + 1, "", "{}")),
        *(("pending", 1, reference, "{}") for reference in ("y" * 201, "y\0")),
        *(("pending", 1, "", metadata) for metadata in ("null", '"text"')),
    ],
    NEW_LINE: [
        *((10**11 + 1, None, None, ""), (1, None, None, "y" * 65)),
        *((1, -1, None, ""), (1, None, 0, "")),
    ],
    "UPDATE product SET movements = ?": [(-1,)],
}


def test_a_migration_to_schema_7_rewrites_no_order(database):
    make_old(database, SCHEMA_6)
    with connect(database) as connection:
        order = "INSERT INTO orders VALUES (?, 'pending', 999, '2026-11-24T18:26:25Z', 'cart')"
        connection.executemany(order, ([n] for n in range(3, 20_000)))
        line = "INSERT INTO order_line VALUES (?, 1, 0, 'Café', 999, 1, NULL, NULL)"
        connection.executemany(line, ([n] for n in range(3, 20_000)))
    store = db.Store(database)
    assert store._wal.stat().st_size < database.stat().st_size / 10
    assert store.get_order(19_999)["lines"][0]["sku"] == ""
    store.close()


@pytest.mark.parametrize("schema", ["", SCHEMA_1, SCHEMA_6], ids=["new", "1", "6"])
def test_the_tables_of_an_old_file_are_those_of_a_new_one_and_reject_bad_rows(tmp_path, schema):
    make_old(tmp_path / "old", schema)
    for name in "old", "new":
        db.Store(tmp_path / name).close()
    with connect(tmp_path / "old") as connection, connect(tmp_path / "new") as new:
        [(version,)] = connection.execute("PRAGMA user_version")
        assert version == db.SCHEMA_VERSION == len(db.MIGRATIONS)
        rows = "SELECT type, name, tbl_name, sql FROM sqlite_schema ORDER BY type, name"
        assert [*connection.execute(rows)] == [*new.execute(rows)]
        connection.execute(NEW_PRODUCT, ("x", 1, "used", "{}"))
        order = "INSERT OR IGNORE INTO orders VALUES (1, 'pending', 1, ?, '', '{}')"
        connection.execute(order, [db.timestamp()])
        before = list(connection.iterdump())
        for statement, rows in REJECTED_ROWS.items():
            for row in rows:
                with pytest.raises(sqlite3.IntegrityError):
                    connection.execute(statement, row)
                assert list(connection.iterdump()) == before, row
        connection.execute(NEW_LINE, (10**11, 0, 1, "y" * 64))
        connection.rollback()


FAILING_MIGRATION = """
import db, os

def fail(connection):
    db.fill_search(connection)
    connection.execute("DELETE FROM idempotency_key")
    raise ZeroDivisionError("planted")

def die(connection):
    db.fill_search(connection)
    os.kill(os.getpid(), 9)

db.MIGRATIONS.append(db.Migration(fill=%s))
db.Store("db.sqlite3")
"""


@pytest.mark.parametrize("step, status, error", [("fail", 1, "planted"), ("die", -9, "")])
def test_a_migration_that_fails_or_is_killed_leaves_the_old_file_whole(
    make_shop, tmp_path, database, step, status, error
):
    make_old(database)
    before = dump(database)
    ended = run_python(tmp_path, FAILING_MIGRATION % step)
    assert ended.returncode == status
    assert error in ended.stderr
    assert dump(database) == before
    assert find_ids(make_shop(), "cafe") == [1]


def test_what_only_reads_rejects_an_older_file_and_leaves_it_alone(make_shop, tmp_path, database):
    make_old(database)
    before = contents(tmp_path)
    with pytest.raises(db.DatabaseError, match="start the shop on it once"):
        make_shop(read_only=True)
    assert contents(tmp_path) == before
    for command in "", "check", "check db.sqlite3", "backup copy":
        server = Server(tmp_path, READ_ONLY="false" if command else "true")
        assert "start the shop on it once" in server.fail(*command.split())
        assert contents(tmp_path) == before


# ------------------------------------------------------------------------------------------ search


def find_ids(shop, q):
    response = shop("GET", f"/products/?q={urllib.parse.quote(q)}")
    assert response.status_int == 200, response
    return [product["id"] for product in response.json["products"]]


def test_a_search_finds_each_word_in_any_order_ignoring_case_and_accents(shop):
    for name, description in [
        ("Blue Café", ""),
        ("Cafe", "with a BLÜE rim"),
        ("Straße nach İstanbul", "E\u0301tude, ﬁne"),
        ("blueberry", "100% \\ _ 'quoted'"),
    ]:
        shop.product(name=name, description=description)
    for queries, ids in [
        (["cafe blue", "BLUE   cafe\t", "lue caf"], [1, 2]),
        (["cafe blue rim"], [2]),
        (["blue", "blue blue", " ".join(["blue"] * 1000)], [1, 2, 4]),
        (["STRASSE", "straße", "istanbul ISTANBUL İSTANBUL", "étude", "Étude FINE", "ﬁne"], [3]),
        (["0% _", "'quoted' \\", "%", " ".join("bluery" * 300)], [4]),
        (["", " \u3000 "], [1, 2, 3, 4]),
        (["bluecafe", "cafewith", "cafe green", " ".join(map(str, range(1000)))], []),
    ]:
        for q in queries:
            assert find_ids(shop, q) == ids, q
    assert list(errors_of(shop("GET", "/products/?q=blue%00"))) == ["q"]


def test_texts_are_compared_without_case_accents_strokes_ligatures_and_kinds_of_marks():
    for text, folded in [
        *(("Äpfel", "apfel"), ("Ǿ ǽ ḷ Ư", "o ae l u"), ("O`NEILL", "o'neill"), ("\u0301", "")),
        *(("ŁØĐÆŒÞĦIıÐẞŦŊ", "lodaeoethhiidsstn"), ("łøđæœþħİíðßŧŋ", "lodaeoethhiidsstn")),
        *(("’‘‛ʼʻ`´′＇｀ꞌ", "'" * 11), ("‐‑‒–—―−﹣－﹘⁻", "-" * 11)),
        *(("Ⅻ ﬁ Å ²", "xii fi a 2"), ("ΣΊΣΥΦΟΣ Йод", "σισυφοσ иод")),
    ]:
        assert db.fold(text) == folded


def test_a_folded_text_is_the_same_folded_again_and_in_capitals():
    for code in *range(0x40000), *range(0xE0000, 0xE0200):  # all that Unicode has assigned
        character = chr(code)
        folded = db.fold(character)
        assert db.fold(folded) == folded == db.fold("ø" + character)[1:], hex(code)
        assert db.fold(character.upper()) == db.fold(character.lower()), hex(code)


def test_a_search_finds_a_product_as_it_is_now(shop, mug):
    assert find_ids(shop, "mug") == [1]
    shop("PATCH", "/products/1/", {"name": "Tasse à café"})
    assert (find_ids(shop, "mug"), find_ids(shop, "cafe tasse")) == ([], [1])
    shop("PATCH", "/products/1/", {"description": "Émail"})
    assert find_ids(shop, "email tasse") == [1]
    shop("POST", "/products/1/stock/", {"change": 1})
    shop.order((1, 1))
    assert find_ids(shop, "email") == [1]
    shop("DELETE", "/products/1/")
    assert find_ids(shop, "email") == find_ids(shop, "") == []
    shop.product(name="other")
    assert find_ids(shop, "email") == []


# ------------------------------------------------------------------------------------- strict HTTP


def parse(request, *cuts):
    """What the parser makes of the requests in some bytes that are cut there into packets."""
    adj = waitress.adjustments.Adjustments(max_request_header_size=(16 << 10) + 1)
    results = []
    parser = shop_module.Request(adj)
    for start, end in zip((0, *cuts), (*cuts, len(request)), strict=True):
        packet = request[start:end]
        while packet:
            packet = packet[parser.received(packet) :]
            if parser.completed and parser.error:
                return [*results, parser.error.code]
            if parser.completed:
                if not parser.empty:
                    body = parser.get_body_stream().read()
                    results.append((parser.command, parser.path, body))
                parser = shop_module.Request(adj)
    return results


PARSED_REQUESTS = [
    *(request for request, _ in RAW_REQUESTS if len(request) < 600),
    TRAILER + b"\r\n" + GET_HEALTH,
    b"\r\n" * 8 + GET_HEALTH,
    b"GET / HTTP/1.1\r\nA: b\rc",
    b"GET / HTTP/1.1\nA",
    b"HEAD / HTTP/1.1\r\nHost: x\r\nA\r\n\r\n",
]


def test_what_a_request_means_does_not_depend_on_where_it_is_cut():
    for request in PARSED_REQUESTS:
        whole = parse(request)
        assert parse(request, *range(1, len(request))) == whole, request
        for cut in range(1, len(request)):
            assert parse(request, cut) == whole, (request, cut)


def test_a_rejected_head_gets_no_body(server):
    for target, field, status in [
        *((b"/nowhere", b"A: b", 404), (b"/", b"A : b", 400), (b"/", b"Expect: a miracle", 417)),
        *((b"/", b"Content-Length: 131073", 413), (b"/", b"A: " + b"a" * 17_000, 431)),
    ]:
        with server.connect() as connection:
            connection.sendall(b"HEAD %b HTTP/1.1\r\nHost: x\r\n%b\r\n\r\n" % (target, field))
            connection.shutdown(socket.SHUT_WR)
            head, _, body = read_to_end(connection).partition(b"\r\n\r\n")
        assert (int(head.split()[1]), body) == (status, b"")
        assert int(re.search(rb"Content-Length: (\d+)", head)[1]) > 0


@pytest.mark.parametrize("coding", ["gzip", "br", "identity, gzip", "x"])
def test_a_compressed_body_is_a_415_that_names_its_coding(shop, coding):
    headers = {"Content-Encoding": coding}
    refused = shop("POST", "/products/", {"name": "x", "price": 1}, headers)
    assert refused.status_int == 415
    assert refused.json["detail"].endswith(f"Content-Encoding: {coding}")
    assert refused.headers["Accept-Encoding"] == "identity"
    plain = {"Content-Encoding": "Identity"}
    assert shop("POST", "/products/", {"name": "x", "price": 1}, plain).json["id"] == 1


def test_only_health_may_not_be_stored_and_all_else_is_revalidated(shop, mug):
    shop.order((1, 1))
    assert shop("GET", "/healthz").headers["Cache-Control"] == "no-store"
    paths = "/ /openapi.json /products/ /products/1/ /orders/ /orders/1/ /products/7/ /nowhere"
    for path in paths.split():
        assert shop("GET", path).headers["Cache-Control"] == "no-cache"


def test_a_body_of_unknown_length_is_a_411_and_an_empty_one_a_400(shop):
    def post(**environ):
        request = webtest.TestRequest.blank("/products/", method="POST", body=BODY, headers=JSON)
        del request.environ["CONTENT_LENGTH"]
        request.environ.update(environ)
        response = request.send(shop.app.app)
        return response.status_int, response.json

    chunked = {"HTTP_TRANSFER_ENCODING": "chunked"}
    terminated = {"wsgi.input_terminated": True}
    status, problem = post(**chunked)
    assert (status, problem["title"]) == (411, "Length Required")
    assert "Content-Length" in problem["detail"]
    assert post(**chunked, **terminated)[0] == 201
    assert post(**terminated)[1]["name"] == "x"
    empty = shop("POST", "/products/", b"").json
    assert empty["detail"] == "The body is empty: send a JSON object."
    for answer in post(), post(CONTENT_LENGTH=""), post(CONTENT_LENGTH="0"):
        assert answer == (400, empty)


def test_a_route_of_an_embedding_program_may_stream(shop):
    shop.app.app.bottle.get("/stream")(lambda: iter(["a", "b", "c"]))
    response = shop.app.get("/stream")
    assert response.body == b"abc"
    assert "Connection" not in response.headers


# --------------------------------------------------------------------------- nothing holds the loop


def cpu_seconds(server):
    """The CPU time that the server has used, however busy the machine is with others."""
    fields = Path(f"/proc/{server.process.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def post_of(body):
    return HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body


def order_request(quantity):
    body = json.dumps(order_of((1, quantity))).encode()
    return post_of(body).replace(b"products", b"orders", 1)


@contextlib.contextmanager
def in_one_batch(server, database):
    """What is sent inside is read by the server while another process has the write lock."""
    other = lock(database)
    yield
    server("GET", "/healthz")  # by now it has all been read
    other.execute("ROLLBACK")
    other.close()


def exchange(server, requests, meanwhile=None):
    """The first response to each request, all of which are sent on connections of their own.

    meanwhile: a context in which they are sent.
    """
    with contextlib.ExitStack() as stack:
        connections = [stack.enter_context(server.connect()) for _ in requests]
        with meanwhile or contextlib.nullcontext():
            for connection, request in zip(connections, requests, strict=True):
                connection.sendall(closing(request))
        return [read_responses(connection)[0] for connection in connections]


def serve_as_batch(server, database, quantities):
    """The responses to orders that are served in one batch."""
    requests = [order_request(quantity) for quantity in quantities]
    return exchange(server, requests, in_one_batch(server, database))


def closing(request):
    """The request, after which the server is to close the connection."""
    return request.replace(b"Host: x\r\n", b"Host: x\r\nConnection: close\r\n", 1)


UNKNOWN_FIELDS = b'{"x":0' + b"".join(b',"x%d":0' % number for number in range(11_500)) + b"}"
LINES = b'{"product_id":0},' * 7000
FLOODS = [
    (CHUNKED + b"1\r\nx\r\n" * 60_000, 413),
    (CHUNKED + (b"1;" + b"x" * 200 + b"\r\nx\r\n") * 2000, 413),
    (CHUNKED + b"\r\n" * 1_000_000, 413),
    (TRAILER + b"A:\r\n" * 100_000, 413),
    (b"\r\n" * 1_000_000, 400),
    (get(b"/", fields=b"Host: x\r\nA:" + b" " * 16_000 + b"x"), 200),
    (get(b"/products/?" + b"a=1&" * 2000), 422),
    (get(b"/products/?" + b"&".join(b"a%d=1" % number for number in range(2000))), 422),
    (post_of(UNKNOWN_FIELDS), 422),
    (post_of(b'{"products":[' + LINES[:-1] + b"]}").replace(b"products/", b"orders/"), 422),
    (post_of(b'{"name":"' + b"x" * 131_000 + b'","price":1}'), 422),
    (post_of(b'{"name":"' + b"\\ud800" * 21_000 + b'","price":1}'), 422),
    (post_of(b'{"price":' + b"1" * 131_000 + b"}"), 422),
    (post_of(b"[" * 131_000), 400),
    (post_of(b'"' * 131_000), 400),
    (post_of(b"{" + b'"a":1,' * 21_000 + b'"b":1}'), 400),
    (HEAD + b"A:x\r\n" * 10_000, 431),
]
LARGE_READS = [GET_PRODUCTS, *(get(b"/products/?q=z%d" % number) for number in range(3))]


def test_a_flood_is_rejected_at_little_cost(server):
    for flood, status in FLOODS:
        before = cpu_seconds(server)
        for _ in range(3):
            [response] = server.send(closing(flood))
            assert response.status == status, flood[:200]
            assert status != 422 or len(response.json["errors"]) <= 300
        assert cpu_seconds(server) - before < 3 * 0.15, flood[:200]


def test_a_query_with_too_many_parameters_names_the_first_that_is_too_many(shop):
    query = "&".join(f"a{n}=1" for n in range(2000))
    errors = errors_of(shop("GET", f"/products/?limit=1&{query}"))
    assert len(errors) < 25
    assert "one too many" in errors["a19"]


def time_health(server):
    """The seconds that a health check takes."""
    started = time.monotonic()
    assert server("GET", "/healthz").status == 200
    return time.monotonic() - started


# Attackers, in a process of their own: else they would take the interpreter from the clock.
ATTACK = """
import socket, threading
from contextlib import suppress

def attack(n):
    while True:
        with suppress(OSError), socket.create_connection(("127.0.0.1", port), 10) as connection:
            connection.sendall(floods[n % len(floods)])
            connection.shutdown(socket.SHUT_WR)
            while connection.recv(1 << 16):
                pass

for n in range(8):
    threading.Thread(target=attack, args=(n,)).start()
print("attacking", flush=True)
"""


@contextlib.contextmanager
def attackers(server, floods):
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-"], **pipes) as process:
        try:
            process.stdin.write(f"port, floods = {server.port, floods}\n{ATTACK}".encode())
            process.stdin.close()
            assert process.stdout.readline() == b"attacking\n"
            yield
        finally:
            process.kill()


@pytest.mark.parametrize("requests", [[flood for flood, _ in FLOODS], LARGE_READS])
def test_eight_attackers_do_not_hold_up_the_others(server, database, requests):
    fill(database, 20_000, 100)
    seconds = []
    with attackers(server, requests):
        for price in range(50):
            server.product(price=price)  # which makes the next large read a new one
            seconds.append(time_health(server))
            assert seconds[-1] < 1
    assert sorted(seconds)[25] < 0.15


def test_equal_reads_of_a_large_catalogue_get_equal_responses(start_server, database):
    server = start_server(DEBUG="true")
    fill(database, 20_000, 100)
    reads = server.stderr().count("group_concat")
    first, second, third = (response.body for response in exchange(server, [GET_PRODUCTS] * 3))
    assert len(json.loads(first)["products"]) == 20_000
    assert first == second == third
    assert server.stderr().count("group_concat") == reads + 1


@pytest.mark.parametrize("read_only", ["false", "true"])
def test_a_read_sent_after_a_write_never_shares_one_that_began_before(
    server, start_server, tmp_path, database, read_only
):
    fill(database, 20_000, 100)
    reader = start_server(READ_ONLY=read_only)
    for price in range(2, 5):
        with reader.connect() as early, reader.connect() as late:
            os.utime(tmp_path / "db.sqlite3-wal")  # as if it had just changed
            early.sendall(closing(GET_PRODUCTS))
            assert reader("GET", "/healthz").status == 200  # by now the first read is under way
            assert server("PATCH", "/products/1/", {"price": price}).status == 200
            late.sendall(closing(GET_PRODUCTS))
            assert read_responses(late)[0].json["products"][0]["price"] == price
            assert len(read_responses(early)[0].json["products"]) == 20_000


# A list of products waits for a file "go", as one of millions would take a while.
SLOW_LISTS = """
def list_slowly(store, list_products=db.Store.list_products_json, **query):
    end = time.monotonic() + 5
    while not os.path.exists("go") and time.monotonic() < end:
        time.sleep(0.01)
    return list_products(store, **query)

db.Store.list_products_json = list_slowly
"""


def test_a_long_read_does_not_hold_up_the_others(start_server, tmp_path):
    server = start_server(SLOW_LISTS)
    with server.connect() as connection:
        connection.sendall(closing(GET_PRODUCTS))
        assert server("GET", "/healthz").status == 200
        assert server.product().status == 201
        assert server("GET", "/products/1/").status == 200
        assert not select.select([connection], [], [], 0)[0]  # it is not answered yet
        (tmp_path / "go").touch()
        assert b" 200 OK" in read_to_end(connection)


def resident_memory(server):
    """Bytes of memory that the server's process holds."""
    status = Path(f"/proc/{server.process.pid}/status").read_text()
    return int(re.search(r"VmRSS:\s+(\d+) kB", status)[1]) << 10


# ------------------------------------------------------------------------------------------- cache


def test_a_read_after_a_write_shows_it_over_two_processes(start_server):
    servers = [start_server(), start_server()]
    for _ in range(4):
        servers[0].product()

    def write_and_read(n):
        path = f"/products/{n + 1}/"
        for price in range(1, 31):
            changed = servers[price % 2]("PATCH", path, {"price": price})
            assert changed.status == 200
            for reader in servers:
                product = reader("GET", path)
                assert product.json["price"] == price
                assert product.headers["ETag"] == changed.headers["ETag"]
            listed = servers[(price + n) // 2 % 2]("GET", "/products/").json["products"]
            assert listed[n]["price"] == price
        return True

    assert at_once(4, write_and_read) == [True] * 4


def test_a_repeated_read_is_answered_from_the_cache_until_something_changes(start_server):
    server = start_server(DEBUG="true")
    server.product(stock=9)
    server.order()

    def get(path):
        """The response, and the statements that it took."""
        before = len(server.stderr())
        response = server("GET", path)
        return response, server.stderr()[before:]

    for path in "/products/1/", "/products/", "/products/?q=x", "/orders/", "/orders/1/":
        first, statements = get(path)
        assert "SELECT" in statements
        again, statements = get(path)
        assert set(statements.splitlines()) == {"PRAGMA data_version"}
        assert (again.body, again.headers["ETag"]) == (first.body, first.headers["ETag"])
    head = server("HEAD", "/products/1/")
    assert head.body == b""
    assert head.headers["Content-Length"] == str(len(server("GET", "/products/1/").body))
    server.product()
    for path in "/products/1/", "/products/", "/orders/":
        assert "SELECT" in get(path)[1]
    for path, status in [("/healthz", 200), ("/products/77/", 404)] * 2:  # without an ETag
        response, statements = get(path)
        assert response.status == status
        assert "SELECT" in statements


def test_a_cached_response_is_only_for_requests_with_the_same_headers(start_server, make_shop):
    origins = f"{ORIGIN} https://other.example"
    server = start_server(ADMIN_TOKEN="secret", CORS_ORIGINS=origins)
    app = make_shop(admin_token="secret", cors_origins=origins)  # which has no cache
    app.app.app.store.create_product(name="x", price=100, stock=9)
    server.order()
    etag = app("GET", "/orders/", None, bearer("secret")).headers["ETag"]
    differing_headers = [
        *({}, bearer("secret"), bearer("other"), {"If-None-Match": etag}),
        *(bearer("secret") | {"If-None-Match": tag} for tag in (etag, '"x"')),
        *({"Origin": origin} for origin in (*origins.split(), "https://no.example")),
        *({"Accept": accept} for accept in ("text/html", "*/*")),
    ]
    paths = "/ /orders/ /products/ /products/?limit=1 /products/?after=1 /products/1/"
    for _, path, headers in itertools.product(range(3), paths.split(), differing_headers):
        due = app("GET", path, None, headers)
        response = server("GET", path, **headers)
        assert (response.status, response.body) == (due.status_int, due.body)
        del response.headers["Date"]
        assert sorted(response.headers.items()) == sorted(due.headers.items())


def test_the_cache_takes_no_more_memory_than_it_may(server, database):
    fill(database, 100)  # a megabyte
    before = resident_memory(server)
    connection = http.client.HTTPConnection("127.0.0.1", server.port)
    for number in range(100):
        connection.request("GET", f"/products/?limit={900 + number}")
        assert len(connection.getresponse().read()) > 1_000_000
    assert resident_memory(server) - before < 80 << 20


def test_reads_in_the_batch_of_a_failed_commit_show_the_state_before_it(server):
    created, _ = fill_disk(server)
    set_file_size(server, 1)
    write = post_of(json.dumps({"name": "x", "description": "y" * 10_000, "price": 1}).encode())
    get_missing = get(b"/products/%d/" % (created + 1))
    for _ in range(10):
        with server.connect() as writer, server.connect() as reader:
            writer.sendall(closing(write))
            reader.sendall(GET_PRODUCTS + closing(get_missing))
            listed, missing = read_responses(reader)
            assert statuses_of(read_responses(writer)) == [503]
            assert len(listed.json["products"]) == created
            assert missing.status == 404
    assert len(server("GET", "/products/").json["products"]) == created
    set_file_size(server, -1)
    assert server.product().json["id"] == created + 1
    assert len(server("GET", "/products/").json["products"]) == created + 1


# ------------------------------------------------------- a disk, a clock and files that misbehave


# Preloaded, it makes fdatasync() and fsync() of a WAL fail or dawdle, as long as the file that
# SYNC_CONTROL names exists: "errno times milliseconds"; times 0 is always, errno 0 is no failure.
SYNC_SHIM = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static int fails(int descriptor) {
    const char *control = getenv("SYNC_CONTROL");
    char link[64], path[4096] = "";
    int error = 0, times = 0, milliseconds = 0;
    FILE *file;

    snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
    if (readlink(link, path, sizeof path - 1) < 0 || !strstr(path, "-wal")
        || !(file = fopen(control, "r")))
        return 0;
    if (fscanf(file, "%d %d %d", &error, &times, &milliseconds) != 3)
        abort();
    fclose(file);
    if (times == 1)
        unlink(control);
    if (times > 1 && (file = fopen(control, "w"))) {
        fprintf(file, "%d %d %d", error, times - 1, milliseconds);
        fclose(file);
    }
    usleep(milliseconds * 1000);
    errno = error;
    return error != 0;
}

#define FLUSH(function) int function(int descriptor) { \
    int (*next)(int) = (int (*)(int)) dlsym(RTLD_NEXT, #function); \
    return fails(descriptor) ? -1 : next(descriptor); \
}
FLUSH(fdatasync)
FLUSH(fsync)
"""


class SyncControl:
    """Decides how the flushes of a WAL go, in a process that has these settings."""

    def __init__(self, library, path):
        self.path = path
        self.settings = {"LD_PRELOAD": str(library), "SYNC_CONTROL": str(path)}

    def fail(self, number, times=0, milliseconds=0):
        """Let so many flushes, or all until restore(), take so long and fail with an errno."""
        # Whole or not at all: the shop may read it at any moment.
        new = self.path.with_suffix(".new")
        new.write_text(f"{number} {times} {milliseconds}")
        new.replace(self.path)

    def restore(self):
        self.path.unlink(missing_ok=True)


@pytest.fixture(scope="session")
def sync_library(tmp_path_factory):
    compiler = shutil.which("cc")
    if sys.platform != "linux" or not compiler:
        pytest.skip("Only with /proc/self/fd, LD_PRELOAD and a C compiler can a flush fail here.")
    library = tmp_path_factory.mktemp("shim") / "sync.so"
    command = [compiler, "-shared", "-fPIC", "-x", "c", "-", "-o", library, "-ldl"]
    subprocess.run(command, input=SYNC_SHIM, text=True, check=True)
    return library


@pytest.fixture
def sync(sync_library, tmp_path):
    return SyncControl(sync_library, tmp_path / "sync_control")


@pytest.fixture
def sync_server(start_server, sync):
    """A server whose flushes `sync` decides on, and a product with a stock of nine."""
    server = start_server(ends_silently=False, **sync.settings)
    server.product(stock=9)
    return server


def kill_and_restart(server, sync):
    """Kill a server, start it again on a sound disk, and check what was left."""
    assert server.end(signal.SIGKILL)[0] == -signal.SIGKILL
    sync.restore()
    server.start()
    assert server.run("check").stdout == "db.sqlite3: sound\n"


def wait_for(condition, seconds=5):
    """The first true value of condition(), which is asked until the time is up."""
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, "It did not happen in time."
    return value


def order_ids(shop):
    return [order["id"] for order in shop("GET", "/orders/?limit=1000").json["orders"]]


def orders_and_stock(shop):
    """The ids of the orders, and the stock of product 1."""
    return order_ids(shop), shop("GET", "/products/1/").json["stock"]


def statuses_of(responses):
    return [response.status for response in responses]


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC])
@pytest.mark.parametrize("key", [{}, {"Idempotency-Key": "k"}])
def test_an_order_answered_503_does_not_come_true_after_a_crash(sync_server, sync, number, key):
    assert sync_server.order(quantity=2).status == 201
    sync.fail(number, times=1)
    refused = sync_server.order(quantity=4, **key)
    assert_unavailable(refused, "The disk cannot be read or written.")
    assert not sync.path.exists()  # the flush did fail
    assert order_ids(sync_server) == [1]
    kill_and_restart(sync_server, sync)
    assert orders_and_stock(sync_server) == ([1], 7)
    retried = sync_server.order(quantity=4, **key)
    assert "Idempotent-Replayed" not in retried.headers
    assert orders_and_stock(sync_server) == ([1, retried.json["id"]], 3)
    assert sync_server.run("check").stdout == "db.sqlite3: sound\n"


# Orders whose first line is for three pieces fail.
FAULTY_ORDERS = """
take_stock = db.Store._take_stock
def faulty(connection, products):
    taken = take_stock(connection, products)
    if products[0]["quantity"] == 3:
        raise RuntimeError("planted")
    return taken
db.Store._take_stock = staticmethod(faulty)
"""


def test_a_fault_in_a_batch_costs_no_other_request_its_order(start_server, database):
    server = start_server(FAULTY_ORDERS, ends_silently=False)
    server.product(stock=9)
    assert server.order(quantity=3).status == 500
    responses = serve_as_batch(server, database, [2, 2, 3, 2, 2])
    assert statuses_of(responses) == [201, 201, 500, 201, 201]
    assert orders_and_stock(server) == ([responses[n].json["id"] for n in (0, 1, 3, 4)], 1)
    # That of one order is logged once, that of a batch for the batch and for its order alone.
    assert server.stderr().count("RuntimeError: planted") == 1 + 2
    assert "During handling" not in server.stderr()
    assert server("GET", "/healthz").status == 200
    assert db.check_integrity(database) == []


def test_a_fault_in_a_batch_breaks_no_connection_and_no_long_read(start_server, database):
    server = start_server(FAULTY_ORDERS, ends_silently=False)
    server.product(stock=9)
    expecting = order_request(1).replace(b"Host: x", b"Host: x\r\nExpect: 100-continue", 1)
    head, body = expecting.split(b"{", 1)
    with contextlib.ExitStack() as stack:
        connections = [stack.enter_context(server.connect()) for _ in range(4)]
        pipelined, waiting, faulty, reader = connections
        with in_one_batch(server, database):
            pipelined.sendall(order_request(2) + closing(GET_HEALTH))
            waiting.sendall(order_request(2) + head)
            faulty.sendall(closing(order_request(3)))
            reader.sendall(GET_PRODUCTS + GET_HEALTH)
        statuses = [statuses_of(read_responses(connection)) for connection in connections]
        assert statuses == [[201, 200], [201, 100], [500], [200, 200]]
        waiting.sendall(b"{" + body)
        assert statuses_of(read_responses(waiting)) == [201]
    assert server("GET", "/products/1/").json["stock"] == 4


@pytest.fixture
def store(tmp_path):
    with contextlib.closing(db.Store(tmp_path / "store")) as store:
        yield store


@pytest.mark.parametrize("begin", [db.Store.transaction, db.Store.batch])
def test_a_rejected_step_of_a_transaction_leaves_the_others(store, begin):
    mug, jug, gold, none = ({"product_id": number, "quantity": 10} for number in (1, 2, 3, 4))
    gold["quantity"] = 10_000
    many = {"metadata": {f"n{number}": "x" for number in range(51)}}
    new = {"name": "x", "price": 1, "stock": 3}
    create, update, order = store.create_product, store.update_product, store.create_order
    with begin(store):
        create(name="Mug", price=999, stock=25, sku="A", metadata={"a": None})
        create(name="Jug", price=999, stock=1)
        create(name="Gold", price=10**11, stock=90_000)
        for error, write in [
            (db.InsufficientStock, lambda: order([mug, jug])),
            (db.UnknownProducts, lambda: order([mug, none])),
            (db.ExcessiveTotal, lambda: order([gold, mug])),
            (db.ExcessiveMetadata, lambda: order([mug], **many)),
            (db.ExcessiveMetadata, lambda: create(**new, **many)),
            (db.ExcessiveMetadata, lambda: update(1, name="x", **many)),
            (db.DuplicateSku, lambda: create(**new, sku="A")),
            (db.DuplicateSku, lambda: update(2, name="x", sku="A")),
            (db.DuplicateSku, lambda: store.import_products([{"id": 2, "sku": "A"}])),
        ]:
            with pytest.raises(error):
                write()
        order([mug], metadata={"a": None})
        placed = order([gold])
    assert placed["total"] == 10**15
    assert [tuple(product.values()) for product in store.list_products()[0]] == [
        (1, "Mug", "", 999, 15, "A", {}),
        (2, "Jug", "", 999, 1, "", {}),
        (3, "Gold", "", 10**11, 80_000, "", {}),
    ]
    orders, _ = store.list_orders()
    assert (orders[0]["metadata"], orders[1:]) == ({}, [placed])


def test_a_batch_that_finds_the_database_locked_does_not_begin(tmp_path):
    with contextlib.closing(db.Store(tmp_path / "store", lock_timeout=0)) as store:
        other = lock(store.path)
        with pytest.raises(db.DatabaseBusy), store.batch():
            pytest.fail("The block runs.")
        store.check_health()  # a lock is no fault, after which a write would be tried
        other.close()
        with store.batch():
            mug = store.create_product(name="Mug", price=999)
        assert store.list_products() == ([mug], None)
        with pytest.raises(db.InsufficientStock):
            store.create_order([{"product_id": 1, "quantity": 1}])
        with full_disk():
            store.check_health()


def test_a_step_that_fails_after_a_change_rolls_its_transaction_back(store):
    def fail():
        with pytest.raises(RuntimeError, match="planted"), store.transaction():
            store.create_product(name="Jug", price=999)
            store.save_idempotent("key", "fingerprint", "result")
            raise RuntimeError("planted")

    with pytest.raises(db.TransactionLost), store.batch():
        store.create_product(name="Mug", price=999)
        fail()
        with pytest.raises(db.TransactionLost):
            store.create_product(name="Pot", price=999)
    with pytest.raises(db.TransactionLost), store.transaction() as connection:
        fail()
        connection.execute("DELETE FROM product")  # does not slip past the transaction
    assert store.list_products() == ([], None)
    with store.transaction():
        assert store.get_idempotent("key", "fingerprint") is None
    store.check_health()
    assert store.create_product(name="Cup", price=999)["id"] == 1


def test_the_store_gives_the_fields_it_takes_and_a_later_read_has_the_same_etag(store):
    fields = {"name": "Mug", "description": "Blue", "price": 10**11, "stock": 5}
    fields |= {"sku": "MUG-BL", "metadata": {"image": "https://img.example/mug", "b": "ü"}}
    mug = store.create_product(**fields)
    assert list(mug.items()) == [("id", 1), *fields.items()]
    order = store.create_order([{"product_id": 1, "quantity": 2}], "cart", {"email": "a@b.example"})
    line = {"product_id": 1, "name": "Mug", "price": 10**11, "quantity": 2, "sku": "MUG-BL"}
    created_at = order["created_at"]
    expected = {"id": 1, "status": "pending", "total": 2 * 10**11, "created_at": created_at}
    expected |= {"reference": "cart", "metadata": {"email": "a@b.example"}, "lines": [line]}
    assert list(order.items()) == list(expected.items())
    for product in (
        store.update_product(1, metadata={"b": None, "c": "x"}, sku="M2"),
        store.update_stock(1, 3),
        store.update_product(1, price=2, name="Jug"),
    ):
        assert product["metadata"] == {"image": "https://img.example/mug", "c": "x"}
        assert product["sku"] == "M2"
    assert db.etag(store.get_product(1)) == db.etag(product) != db.etag(mug)
    assert store.list_products()[0] == list(store.export_products()) == [product]
    assert json.loads(store.list_products_json()[0]) == product | {"price": 0.02}
    assert repr(store.get_order(1)) == repr(order)  # etag() hashes it
    changed = store.update_order(1, metadata={"phone": "1", "email": None})
    assert repr(store.get_order(1)) == repr(changed)
    assert changed == order | {"metadata": {"phone": "1"}}  # with the old name, price and sku
    tea = store.create_product(name="Tea", price=450)
    assert store.list_products(sort="-id", limit=1) == ([tea], 2)
    assert store.list_products(sort="-id", after=2, limit=1) == ([product], None)


def test_a_status_that_cannot_follow_changes_nothing_and_an_equal_update_writes_nothing(store):
    store.create_product(name="x", price=1, stock=5)
    store.create_order([{"product_id": 1, "quantity": 2}], "cart", {"a": "1"})
    lost = {"reference": "lost", "metadata": {"lost": "x"}}
    statuses = ["unknown", "pending", "completed", "cancelled"]
    for position, status in enumerate(statuses[1:], 1):
        order = store.update_order(1, status=status)
        for other in statuses[:position]:
            message = f"^Order 1 is {status} and cannot become {other}.$"
            with pytest.raises(db.InvalidTransition, match=message):
                store.update_order(1, status=other, **lost)
        assert store.get_order(1) == order
        changes = store._writer.total_changes
        assert store.update_order(1, status=status, reference="cart", metadata={"a": "1"}) == order
        assert store._writer.total_changes == changes


def test_the_lines_of_orders_are_exported_as_of_one_moment(store):
    place_orders(store.path, 3)
    with contextlib.closing(store.export_order_lines(None, None)) as export:
        rows = [next(export)]
        store.update_order(2, reference="later")
        store.create_order([{"product_id": 1, "quantity": 1}])
        rows += export
    assert [(row["order_id"], row["reference"]) for row in rows] == [(1, ""), (2, ""), (3, "")]


def test_the_rows_of_an_import_take_effect_in_their_order_or_not_at_all(store):
    store.create_product(name="a", price=1, stock=2, sku="A")
    store.create_product(name="b", price=1)
    new = {"name": "new", "price": 5, "sku": "A"}
    products = store.list_products()[0]
    for rows, error in [
        ([new], db.DuplicateSku),
        ([{**new, "sku": "twice"}] * 2, db.DuplicateSku),
        ([{**new, "sku": "N"}, {"id": 1, "sku": "N"}], db.DuplicateSku),
        ([{"id": 1, "sku": "N"}, {**new, "sku": "N"}], db.DuplicateSku),
        ([{**new, "sku": ""}, {"id": 9, "price": 1}], db.NotFound),
        ([{"id": 1, "metadata": {f"n{n}": "x" for n in range(51)}}], db.ExcessiveMetadata),
    ]:
        with pytest.raises(error):
            store.import_products([{"id": 2, "price": 8}, {**new, "sku": "first"}, *rows])
        assert store.list_products()[0] == products
    moves = iter([{"id": 1, "sku": "", "stock": 9}, new, {"id": 2, "sku": "B"}])
    assert store.import_products(moves) == (1, 2, 0)
    assert [product["sku"] for product in store.list_products()[0]] == ["", "B", "A"]


def test_orders_of_a_batch_whose_flush_fails_once_are_placed_alone(sync_server, database, sync):
    sync.fail(errno.EIO, times=1)
    responses = serve_as_batch(sync_server, database, [2] * 4)
    assert statuses_of(responses) == [201] * 4
    kill_and_restart(sync_server, sync)
    assert orders_and_stock(sync_server) == ([response.json["id"] for response in responses], 1)


def test_orders_of_a_batch_whose_outcome_is_unknown_are_not_tried_again(
    sync_server, database, sync
):
    sync.fail(errno.EIO, times=2)  # the flush of the commit, and of the write that would void it
    refused = serve_as_batch(sync_server, database, [2] * 4)
    assert all("may or may not" in response.json["detail"] for response in refused)
    ids, stock = orders_and_stock(sync_server)
    assert (ids, stock) in [([], 9), ([1, 2, 3, 4], 1)]


@pytest.mark.parametrize("quantities", [[4], [1] * 4])
def test_orders_whose_outcome_is_unknown_are_answered_so_and_orders_then_work_again(
    sync_server, database, sync, quantities
):
    sync.fail(errno.EIO)
    outcome = "may or may not have been stored: check before you retry, or use an Idempotency-Key."
    for refused in serve_as_batch(sync_server, database, quantities):
        assert_unavailable(refused, f"The database failed while it stored this. It {outcome}")
    assert sync_server("GET", "/healthz").status == 503
    sync.restore()
    accepted = sync_server.order(quantity=3)
    assert sync_server("GET", "/healthz").status == 200
    ids, stock = orders_and_stock(sync_server)
    assert accepted.json["id"] in ids
    assert stock == (6 if len(ids) == 1 else 2)
    kill_and_restart(sync_server, sync)
    assert orders_and_stock(sync_server) == (ids, stock)


# --- a full disk


@contextlib.contextmanager
def full_disk(size=0):
    """No file of this process can be written beyond a size."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.fixture
def clock(monkeypatch):
    """The monotonic clock of db.py, frozen: [seconds]."""
    seconds = [time.monotonic()]
    frozen = vars(time) | {"monotonic": lambda: seconds[0]}
    monkeypatch.setattr(db, "time", SimpleNamespace(**frozen))
    return seconds


def fail_to_write(store):
    with full_disk(), pytest.raises(db.DatabaseUnavailable):
        store.create_product(name="x", price=1)


def assert_unhealthy(store):
    with pytest.raises(db.DatabaseUnavailable, match="^The last write failed: "):
        store.check_health()


def test_only_a_write_heals_and_one_is_tried_each_second_that_waits_for_no_lock(tmp_path, clock):
    statements = []
    store = db.Store(tmp_path / "store", lock_timeout=30, trace=statements.append)
    store.create_product(name="x", price=1)
    fail_to_write(store)
    with full_disk():
        statements.clear()
        for _ in range(9):
            assert_unhealthy(store)
        assert len([text for text in statements if "application_id" in text]) == 1
    with pytest.raises(db.InsufficientStock):
        store.create_order([{"product_id": 1, "quantity": 2}])
    with store.batch(), pytest.raises(db.NotFound):
        store.delete_product(9)
    with store.transaction():
        assert store.get_idempotent("k", "f") is None
    assert_unhealthy(store)
    store.create_product(name="x", price=1)
    store.check_health()
    fail_to_write(store)
    clock[0] += 0.9
    assert_unhealthy(store)
    clock[0] += 0.2
    with store.transaction():
        assert_unhealthy(store)  # its thread cannot try: it holds the lock
    clock[0] += 1
    start = time.monotonic()
    with contextlib.closing(lock(store.path)):
        assert_unhealthy(store)
    assert time.monotonic() - start < 5
    clock[0] += 1
    store.check_health()
    assert [product["id"] for product in store.list_products()[0]] == [1, 2]
    store.close()


def test_neither_a_trial_nor_an_export_uses_another_file(tmp_path, clock):
    store = db.Store(tmp_path / "store", checkpoints=True)
    fail_to_write(store)
    store.list_products()  # the file at the path is looked at now, and again in a second
    before = store.path.read_bytes()
    (tmp_path / "other").write_bytes(before)
    (tmp_path / "other").rename(store.path)
    for read in store.check_health, lambda: list(store.export_products()):
        with pytest.raises(db.DatabaseUnavailable, match="deleted or replaced"):
            read()
    assert store.path.read_bytes() == before
    store.close()


def test_a_full_wal_makes_room_by_itself_for_the_next_order(shop, database):
    shop.product(stock=1000)
    wal = database.with_name("db.sqlite3-wal")
    accepted = []
    failures = 0
    # The file of the shop is far below the limit: only its WAL, which one commit after the other
    # makes longer, comes to it.
    with full_disk(900_000):
        for _ in range(300):
            order = shop.order((1, 1))
            if order.status_int == 503:
                failures += 1
                order = shop.order((1, 1), status=201)
                assert shop("GET", "/healthz").json == {"status": "ok"}
                assert wal.stat().st_size < 90_000
            accepted.append(order.json["id"])
    assert failures
    assert orders_and_stock(shop) == (accepted, 700)
    assert db.check_integrity(database) == []


# --- a database that is no longer the one that was opened


@pytest.mark.parametrize("is_replaced", [False, True])
def test_no_order_is_accepted_for_a_database_that_was_deleted_or_replaced(
    start_server, tmp_path, database, is_replaced
):
    server = start_server(ends_silently=False)
    server.product(stock=1000)
    assert server.run("backup", "older").returncode == 0
    assert server.order().status == 201
    if is_replaced:
        (tmp_path / "older").replace(database)
    else:
        database.unlink()
    for _ in range(3):
        for refused in server.order(), server("GET", "/healthz"):
            assert_unavailable(refused, "The database file has been deleted or replaced.")
    # This one has a thread and a connection of its own. Opened only now, and by the path, that
    # connection would put the WAL of the old file into the new one.
    assert server("GET", "/products/?q=x").status in (200, 503)
    assert server.end()[0] == 0
    assert server.stderr() == f"{database} has been deleted or replaced: restart the shop.\n"
    server.start()
    if is_replaced:
        assert orders_and_stock(server) == ([], 1000)
    assert server.run("check").stdout == "db.sqlite3: sound\n"


# --- a symlink


def test_a_symlinked_database_is_checked_and_backed_up_while_it_is_in_use(
    start_server, tmp_path, database
):
    (tmp_path / "volume").mkdir()
    target = tmp_path / "volume" / "real.sqlite3"
    database.symlink_to(target)
    server = start_server()
    server.product(stock=9)
    assert server.order().status == 201
    assert target.with_name("real.sqlite3-wal").exists()
    assert not database.with_name("db.sqlite3-wal").exists()
    assert server.run("check").stdout == "db.sqlite3: sound\n"
    assert server.run("backup", "copy").stdout.startswith("copy: 1 products, 1 orders, ")
    assert server.run("backup", "volume/real.sqlite3", "--overwrite").returncode == 1
    copy = start_server(READ_ONLY="true")
    for _ in range(3):
        server.order()
        assert copy("GET", "/products/1/").json == server("GET", "/products/1/").json
    for process in copy, server:
        assert process.end()[0] == 0
    assert database.is_symlink()
    assert {path.name for path in target.parent.iterdir()} == {"real.sqlite3"}


def test_a_newer_database_behind_a_symlink_is_left_unchanged(tmp_path, database):
    (tmp_path / "volume").mkdir()
    target = tmp_path / "volume" / "real.sqlite3"
    db.Store(target).close()
    # Killed, the newer shop leaves its version in the WAL alone.
    run_and_kill(target, "PRAGMA user_version = 99", "CREATE TABLE later (x)")
    database.symlink_to(target)
    index = {"real.sqlite3-shm": b""}  # of the WAL: reading changes it too
    files = contents(target.parent) | index
    assert "real.sqlite3-wal" in files
    for settings in {}, {"READ_ONLY": "true"}:
        assert " newer version " in Server(tmp_path, **settings).fail()
        assert contents(target.parent) | index == files
    assert not database.with_name("db.sqlite3-wal").exists()


def run_and_kill(path, *statements):
    """Run statements in a process that ends without closing the database, as killed ones do."""
    program = (
        "import os, sqlite3, sys\n"
        "connection = sqlite3.connect(sys.argv[1], isolation_level=None)\n"
        "for statement in sys.argv[2:]:\n"
        "    connection.execute(statement).fetchall()\n"
        "os._exit(0)\n"
    )
    subprocess.run([sys.executable, "-c", program, path, *statements], check=True)


# --- a hot journal: what a power loss leaves of a transaction outside of WAL mode


def cut_backup(database):
    """A shop's database in one file, as backups are, and a transaction in it that was cut."""
    with contextlib.closing(db.Store(database.with_name("source"))) as store:
        for _ in range(50):
            store.create_product(name="x", price=100, stock=9, description="y" * 5000)
        store.create_order([{"product_id": 1, "quantity": 2}])
        db.backup(store.path, database)
    cut_transaction(
        database,
        "PRAGMA user_version = 0",
        "PRAGMA application_id = 0",
        "UPDATE product SET stock = 1, description = hex(randomblob(2500))",
    )
    with database.open("r+b") as file:
        file.write(bytes(512))  # of the first page, which says whose file it is, one sector came


def cut_new_file(database):
    """A file whose very first transaction was cut."""
    insert = "INSERT INTO product VALUES (randomblob(3000))"
    cut_transaction(database, "CREATE TABLE product (x)", *[insert] * 100)


def cut_transaction(database, *statements):
    run_and_kill(
        database,
        "PRAGMA journal_mode = DELETE",
        # With room for one page, SQLite writes each of them into the file before the commit.
        "PRAGMA cache_size = 1",
        "BEGIN IMMEDIATE",
        *statements,
    )
    assert database.with_name(database.name + "-journal").read_bytes()[:4] == b"\xd9\xd5\x05\xf9"
    assert database.stat().st_size > 100_000


@pytest.mark.parametrize("cut, stocks", [(cut_backup, [7] + [9] * 49), (cut_new_file, [])])
@pytest.mark.parametrize("first", ["check", "backup copy", "read-only shop", "shop"])
def test_a_cut_transaction_is_never_shown_whatever_opens_its_file_first(
    make_shop, command, database, cut, stocks, first
):
    cut(database)
    reason = f"{database} is the database of another program."
    if first in ("check", "backup copy") and stocks:
        status, output, errors = command(*first.split())
        assert (status, errors) == (0, "")
        assert re.search(r"^copy: 50 products, 1 orders, |db\.sqlite3: sound\n$", output)
    elif first in ("check", "backup copy"):
        assert command(*first.split()) == (1, "", f"shop: {reason}\n")
    elif first == "read-only shop" and stocks:
        products = products_of(make_shop(read_only=True))
        assert [product["stock"] for product in products] == stocks
    elif first == "read-only shop":
        with pytest.raises(db.DatabaseError, match=re.escape(reason)):
            make_shop(read_only=True)
    shop = make_shop()
    products = products_of(shop)
    assert [product["stock"] for product in products] == stocks
    assert {product["description"] for product in products} <= {"y" * 5000}
    assert order_ids(shop) == [1] * bool(stocks)
    assert shop.product()["id"] == len(stocks) + 1
    shop.order((len(stocks) + 1, 1), status=201)
    assert not database.with_name("db.sqlite3-journal").exists()
    assert db.check_integrity(database) == []


# --- clocks


def test_keys_live_a_day_and_are_then_purged_though_older_ones_are_stamped_in_the_future(
    shop, database, monkeypatch
):
    def order(key):
        response = shop.order((1, 1), **{"Idempotency-Key": key}, status=201)
        return "Idempotent-Replayed" in response.headers

    shop.product(stock=100)
    day = 24 * 60 * 60
    kept = {f"future{n}": "2999-01-01T00:00:00Z" for n in range(10)}
    kept["young"] = db.timestamp(day - 360)
    times = kept | {f"old{n}": db.timestamp(day + 60) for n in range(30)}
    assert not any([order(key) for key in times])
    with connect(database) as connection:
        sql = "UPDATE idempotency_key SET created_at = ? WHERE key = ?"
        connection.executemany(sql, zip(times.values(), times, strict=True))
    assert [order("young"), order("old0")] == [True, False]
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 1)  # expired keys are looked for once a second
    new = [f"new{n}" for n in range(30)]
    assert not any([order(key) for key in new])
    with connect(database) as connection:
        keys = {key for (key,) in connection.execute("SELECT key FROM idempotency_key")}
    assert keys == {*kept, "old0", *new}


STEPPED_CLOCK = """
wall_clock = time.time
time.time = lambda: wall_clock() + (%d if os.path.exists("step") else 0)
shop.IDLE_TIMEOUT = %d
"""


def test_a_step_forward_of_the_clock_cuts_no_idle_connection(start_server, tmp_path):
    server = start_server(STEPPED_CLOCK % (3600, 30))
    with server.connect() as idle, server.connect() as slow:
        slow.sendall(GET_HEALTH[:-2])
        assert server("GET", "/healthz").status == 200
        (tmp_path / "step").touch()
        # The timeouts are checked once a second.
        assert select.select([idle, slow], [], [], 2.5)[0] == []
        slow.sendall(b"\r\n")
        assert slow.recv(12) == b"HTTP/1.1 200"
        idle.sendall(GET_HEALTH)
        assert idle.recv(12) == b"HTTP/1.1 200"


def test_a_step_back_of_the_clock_keeps_no_idle_connection(start_server, tmp_path):
    server = start_server(STEPPED_CLOCK % (-3600, 1))
    with server.connect() as idle:
        idle.sendall(GET_HEALTH)
        assert idle.recv(12) == b"HTTP/1.1 200"
        (tmp_path / "step").touch()
        idle.settimeout(5)
        assert b"200 OK" not in read_to_end(idle)


# --- READ_ONLY beside a writer


def test_a_read_only_shop_shows_an_order_whose_flush_was_slow(start_server, sync):
    server = start_server(**sync.settings)
    server.product(stock=9)
    copy = start_server(READ_ONLY="true")
    for sold in range(1, 4):
        sync.fail(0, times=1, milliseconds=500)
        with concurrent.futures.ThreadPoolExecutor() as pool:
            order = pool.submit(server.order)
            # The frames are in the WAL for half a second before they are committed.
            while not order.done():
                copy("GET", "/products/1/")
            assert order.result().status == 201
        assert copy("GET", "/products/1/").json["stock"] == 9 - sold


def test_a_read_only_shop_caches_nothing_while_there_is_a_wal(make_shop, shop, database):
    shop.product()
    wal = database.with_name("db.sqlite3-wal")
    store = make_shop(read_only=True).app.app.store
    for file in database, wal:
        os.utime(file, (1, 1))  # long ago, so that only the WAL can speak against it
    assert store.data_version() is None
    shop.app.app.close()
    assert not wal.exists()
    os.utime(database, (1, 1))
    assert store.data_version() is not None
    assert store.data_version() == store.data_version()


# --- a WAL that grows


LARGE_IMPORT = [{"name": "x", "price": 1, "description": "y" * 10_000}] * 1000


def test_only_the_store_that_serves_checkpoints(store):
    serving = db.Store(store.path, checkpoints=True)
    before = store.path.read_bytes()
    store.import_products(LARGE_IMPORT)
    assert store._wal.stat().st_size > 4000 * 4096  # after which the other checkpoints
    fail_to_write(store)
    store.create_product(name="x", price=1)
    store.check_health()
    store.close()
    assert store.path.read_bytes() == before
    wal = serving._wal.stat().st_size
    serving.create_product(name="x", price=1)
    assert store.path.stat().st_size > 8_000_000
    serving.create_product(name="x", price=1)
    assert serving._wal.stat().st_size <= wal + 100_000  # it begins again at its start
    serving.close()
    assert not serving._wal.exists()
    assert db.check_integrity(store.path) == []


def test_the_wal_of_a_script_is_bounded_if_nobody_serves_and_its_file_is_complete(
    store, tmp_path, monkeypatch
):
    monkeypatch.setattr(db, "WAL_LIMIT", 200_000)
    sizes = []
    versions = set()
    for number in range(1, 101):
        store.create_product(name="x", price=1)
        assert store.get_product(number)["id"] == number
        versions.add(store.data_version())
        sizes.append(store._wal.stat().st_size)
    assert max(sizes) < 400_000
    assert sum(sizes) > 1_000_000
    assert len(versions) == 100
    store.close()
    assert [file.name for file in tmp_path.iterdir()] == ["store"]
    assert db.backup(store.path, tmp_path / "copy")["products"] == 100


def test_a_server_without_a_write_of_its_own_checkpoints_an_import(start_server, database):
    start_server("db.WAL_LIMIT = 1_000_000")
    with contextlib.closing(db.Store(database)) as script:
        script.import_products(LARGE_IMPORT)
    wait_for(lambda: database.stat().st_size > 8_000_000)


def test_the_serving_store_checkpoints_what_others_write_without_waiting(database, monkeypatch):
    monkeypatch.setattr(db, "WAL_LIMIT", 1_000_000)
    statements = []
    serving = db.Store(database, checkpoints=True, lock_timeout=30, trace=statements.append)
    script = db.Store(database)
    script.create_product(name="x", price=1)
    before = database.read_bytes()

    def checkpoint():
        statements.clear()
        start = time.monotonic()
        serving.checkpoint_if_large()
        script.checkpoint_if_large()
        assert time.monotonic() - start < 10
        return database.read_bytes() != before

    assert (checkpoint(), statements) == (False, [])
    script.import_products(LARGE_IMPORT)
    for store in serving, script:
        with store.transaction():
            assert not checkpoint()
    assert checkpoint()
    assert database.stat().st_size > 8_000_000
    assert (checkpoint(), statements) == (True, [])  # nothing is left to do
    wal = serving._wal.stat().st_size
    script.create_product(name="x", price=1)
    assert serving._wal.stat().st_size == wal  # it begins again at its start
    serving.close()
    script.close()
    assert db.check_integrity(database) == []


# --- backups that were cut


def test_a_backup_removes_the_partial_copies_of_processes_that_are_gone(shop, database, tmp_path):
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    left = {f"copy.partial-{os.getpid()}", "copy.partial-mine", "other"}
    removed = {f"copy.partial-{gone.pid}", f"copy.partial-{gone.pid}-journal"}
    for name in left | removed:
        (tmp_path / name).write_text("partial")
    result = Server(tmp_path).run("backup", "copy")
    assert (result.returncode, result.stderr) == (0, "")
    assert (left | removed) & contents(tmp_path).keys() == left
    assert {(tmp_path / name).read_text() for name in left} == {"partial"}
    assert db.check_integrity(tmp_path / "copy") == []


def test_a_backup_that_would_keep_a_wal_fails_and_leaves_nothing(shop, mug, database, tmp_path):
    cursors = []

    def read(remaining, total):
        # Somebody who reads the copy keeps SQLite from folding its WAL into it.
        [partial] = tmp_path.glob(f"copy.partial-{os.getpid()}")
        cursors.append(sqlite3.connect(partial).execute("SELECT * FROM product"))

    with pytest.raises(db.DatabaseError, match="copy cannot be written"):
        db.backup(database, tmp_path / "copy", progress=read)
    for cursor in cursors:
        cursor.connection.close()
    assert list(tmp_path.glob("copy*")) == []


# ---------------------------------------------------------------------------------------- ledger


def movements_of(shop, product_id, query=""):
    return shop("GET", f"/products/{product_id}/stock/{query}").json["movements"]


def steps_of(shop, product_id=1):
    """What each movement of a product was: change, stock, order_id, note."""
    movements = movements_of(shop, product_id, "?limit=1000")
    assert [movement["id"] for movement in movements] == [*range(1, len(movements) + 1)]
    assert sum(movement["change"] for movement in movements) == shop.stock({"id": product_id})
    names = ("change", "stock", "order_id", "note")
    return [tuple(movement[name] for name in names) for movement in movements]


def test_every_change_of_a_stock_is_a_movement_that_says_what_was_left(shop, mug):
    shop.product(stock=0)
    shop("PATCH", "/products/1/", {"stock": 9})
    shop("POST", "/products/1/stock/", {"change": -3, "note": "broken ☕"})
    shop("POST", "/products/2/stock/", {"change": 4})
    shop.order((2, 1), (1, 2))
    shop.order((1, 1))
    shop("PATCH", "/orders/1/", {"status": "cancelled"})
    shop("PATCH", "/orders/2/", {"status": "completed"})
    assert steps_of(shop, 1) == [
        *((5, 5, None, ""), (4, 9, None, ""), (-3, 6, None, "broken ☕")),
        *((-2, 4, 1, ""), (-1, 3, 2, ""), (2, 5, 1, "")),
    ]
    assert steps_of(shop, 2) == [(4, 4, None, ""), (-1, 3, 1, ""), (1, 4, 1, "")]
    first, *_, sale, _, _ = movements_of(shop, 1)
    assert list(first) == ["id", "change", "stock", "order_id", "note", "created_at"]
    assert db.timestamp(60) < first["created_at"] <= db.timestamp()
    assert sale["created_at"] == shop("GET", "/orders/1/").json["created_at"]


def test_only_a_change_of_the_stock_is_a_movement(shop, mug, database):
    shop.product(stock=1)
    shop.product()
    shop("PATCH", "/products/1/", {"stock": 5})
    shop("PATCH", "/products/1/", {"name": "Cup", "price": 1})
    shop("PATCH", "/products/1/", {"stock": 6}, {"If-Match": '"x"'})
    for body in {"change": 0, "note": "counted"}, {"change": -6}, {"change": 10**9}:
        shop("POST", "/products/1/stock/", body)
    shop("POST", "/products/1/stock/", {"change": 1, "note": 1})
    for last in (1, 6), (2, 2), (7, 1):  # the order fails at its last line
        assert shop.order((3, 2), last).status_int in (409, 422)
    steps = [steps_of(shop, product_id) for product_id in (1, 2, 3)]
    assert steps == [[(5, 5, None, "")], [(1, 1, None, "")], [(5, 5, None, "")]]
    assert db.check_integrity(database) == []


@pytest.mark.parametrize("statuses", [["cancelled"], ["completed", "cancelled"]])
def test_a_cancel_puts_back_what_the_maximum_allows_and_nothing_of_deleted_products(
    shop, database, statuses
):
    for _ in range(4):
        shop.product()
    shop.order((1, 4), (2, 4), (3, 4), (4, 4))
    shop("DELETE", "/products/1/")
    shop("PATCH", "/products/2/", {"stock": 999_999_999})
    shop("PATCH", "/products/3/", {"stock": 10**9})
    for status in statuses:
        shop("PATCH", "/orders/1/", {"status": status}, status=200)
    shop("GET", "/products/1/stock/", status=404)
    assert steps_of(shop, 2)[2:] == [(999_999_998, 999_999_999, None, ""), (1, 10**9, 1, "")]
    assert steps_of(shop, 3)[2:] == [(999_999_999, 10**9, None, "")]
    assert steps_of(shop, 4) == [(5, 5, None, ""), (-4, 1, 1, ""), (4, 5, 1, "")]
    with connect(database) as connection:
        rows = connection.execute("SELECT count(*) FROM movement WHERE product_id = 1")
        assert rows.fetchone() == (0,)
    assert db.check_integrity(database) == []


def test_movements_are_paged_in_both_directions_by_next_and_link(shop, mug):
    path = "/products/1/stock/"
    for _ in range(100):
        shop("POST", path, {"change": 1})
    for sort, step in ("id", 1), ("-id", -1):
        walked = walk_pages(shop, f"{path}?sort={sort}&limit=30", "movements")
        assert [movement["id"] for movement in walked] == [*range(1, 102)][::step]
    for query, ids in [
        *(("", [*range(1, 101)]), ("after=0", [*range(1, 101)]), ("after=99", [100, 101])),
        *(("limit=3", [1, 2, 3]), ("sort=-id&limit=2", [101, 100]), ("after=999", [])),
        *(("after=5&sort=-id", [4, 3, 2, 1]), ("after=999&sort=-id&limit=2", [101, 100])),
    ]:
        assert [movement["id"] for movement in movements_of(shop, 1, f"?{query}")] == ids
    assert shop("GET", f"{path}?limit=101").json["next"] is None
    for query in "limit=1001", "limit=0", "sort=change", "after=-1", "q=x":
        errors = errors_of(shop("GET", f"{path}?{query}"))
        assert list(errors) == [query.partition("=")[0]]


def test_a_note_is_text_of_up_to_200_characters(shop, mug):
    path = "/products/1/stock/"
    shop("POST", path, {"change": 1, "note": "é" * 200})
    assert steps_of(shop)[-1] == (1, 6, None, "é" * 200)
    for note in "x" * 201, "a\0b", 5, None, "\ud800":
        assert list(errors_of(shop("POST", path, {"change": 1, "note": note}))) == ["#/note"]


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE product SET stock = stock + 1 WHERE id = 2",
        "UPDATE product SET movements = movements + 1 WHERE id = 2",
        "DELETE FROM movement WHERE product_id = 2 AND id = 1",
        "DELETE FROM movement WHERE product_id = 2 AND id = 4",
        "DELETE FROM movement WHERE product_id = 2 AND id IN (3, 4)",  # together they change 0
        "DELETE FROM movement WHERE product_id = 2",
        "UPDATE movement SET change = change + 1 WHERE product_id = 2 AND id = 3",
        "UPDATE movement SET stock = stock + 1 WHERE product_id = 2 AND id = 3",
        "UPDATE order_line SET movement_id = NULL WHERE product_id = 2",
        "UPDATE order_line SET movement_id = 1 WHERE product_id = 2 AND order_id = 1",
        "UPDATE order_line SET movement_id = 9 WHERE product_id = 2 AND order_id = 2",
        "UPDATE order_line SET stock = 0 WHERE product_id = 2 AND order_id = 1",
    ],
)
def test_check_names_the_product_whose_ledger_is_off(shop, mug, database, statement):
    shop.product()
    shop.order((1, 1), (2, 1))  # movement 2
    shop("POST", "/products/2/stock/", {"change": 3})
    shop("POST", "/products/2/stock/", {"change": -3})
    shop.order((2, 2), (1, 1))  # movement 5
    assert db.check_integrity(database) == []
    with connect(database) as connection:
        assert connection.execute(statement).rowcount > 0
    problems = db.check_integrity(database)
    assert problems
    for problem in problems:
        assert re.search(r"\bproduct 2\b", problem, re.IGNORECASE), problem


def test_a_product_from_before_the_ledger_starts_with_its_opening_balance(make_shop, database):
    make_old(database)
    with connect(database) as connection:
        connection.execute("INSERT INTO product VALUES (20, 'sold out', '', 1, 0)")
    shop = make_shop()
    assert db.check_integrity(database) == []
    assert steps_of(shop, 1) == [(3, 3, None, "opening balance")]
    assert steps_of(shop, 2) == [(7, 7, None, "opening balance")]
    assert steps_of(shop, 20) == []
    shop("PATCH", "/orders/1/", {"status": "cancelled"})  # whose lines are from before, too
    shop.order((1, 4))
    shop("POST", "/products/20/stock/", {"change": 2})
    assert steps_of(shop, 1)[1:] == [(2, 5, 1, ""), (-4, 1, 3, "")]
    assert steps_of(shop, 20) == [(2, 2, None, "")]
    assert db.check_integrity(database) == []


# --------------------------------------------------------------------------- orders that expire


def backdate(database, minutes, condition="TRUE"):
    """Make orders so many minutes older, past the shop."""
    with connect(database) as connection:
        sql = f"UPDATE orders SET created_at = ? WHERE {condition}"
        connection.execute(sql, [db.timestamp(minutes * 60)])


def place_orders(database, number, lines=1):
    """Products 1 to `lines` with 10,000 pieces each, and orders of one piece of each."""
    with contextlib.closing(db.Store(database)) as store, store.transaction():
        for _ in range(lines):
            store.create_product(name="x", price=100, stock=10_000)
        for _ in range(number):
            store.create_order([{"product_id": n + 1, "quantity": 1} for n in range(lines)])


def statuses_in(database):
    with connect(database) as connection:
        return [status for (status,) in connection.execute("SELECT status FROM orders ORDER BY id")]


def test_the_shop_cancels_orders_that_nobody_has_paid_in_time(start_server, database):
    place_orders(database, 4)
    backdate(database, 61, "id IN (1, 2)")
    backdate(database, 58, "id = 3")
    with connect(database) as connection:
        connection.execute("UPDATE orders SET status = 'completed' WHERE id = 2")
    server = start_server(ORDER_TIMEOUT="60")
    wait_for(lambda: server("GET", "/orders/1/").json["status"] == "cancelled")
    assert statuses_in(database) == ["cancelled", "completed", "pending", "pending"]
    assert server("GET", "/products/1/").json["stock"] == 9997
    [last] = server("GET", "/products/1/stock/?sort=-id&limit=1").json["movements"]
    assert (last["id"], last["change"], last["stock"], last["order_id"]) == (6, 1, 9997, 1)
    backdate(database, 61, "id = 3")  # while the shop runs
    wait_for(lambda: server("GET", "/orders/3/").json["status"] == "cancelled")
    assert db.check_integrity(database) == []


def test_five_hundred_orders_that_expire_at_once_do_not_hold_up_the_others(start_server, database):
    place_orders(database, 500, 20)
    backdate(database, 2)
    server = start_server(ORDER_TIMEOUT="1")
    seconds = []
    while "pending" in statuses_in(database):
        seconds.append(time_health(server))
        assert sum(seconds) < 20
    assert len(seconds) > 5
    assert max(seconds) < 0.5
    assert server("GET", "/products/20/").json["stock"] == 10_000
    assert db.check_integrity(database) == []


def test_the_command_expire_cancels_what_is_due_and_says_how_many(command, database, monkeypatch):
    place_orders(database, 25)
    backdate(database, 2, "id < 24")
    for minutes, number in ("99999999", 0), ("1.5", 23), ("1.5", 0):
        monkeypatch.setenv("ORDER_TIMEOUT", minutes)
        assert command("expire") == (0, f"{number} orders cancelled\n", "")
    assert statuses_in(database) == ["cancelled"] * 23 + ["pending"] * 2
    assert db.check_integrity(database) == []


def test_the_oldest_orders_before_a_moment_expire_first_and_those_of_it_do_not(store):
    place_orders(store.path, 9)
    with connect(store.path) as connection:
        connection.execute("UPDATE orders SET created_at = '2026-11-22T10:15:' || (39 - id) || 'Z'")
    before = "2026-11-22T10:15:34Z"  # order 5 was placed then
    for number, cancelled in (3, [7, 8, 9]), (1, [6, 7, 8, 9]), (0, [6, 7, 8, 9]):
        assert store.expire_orders(before, limit=3) == number
        orders, _ = store.list_orders(status="cancelled")
        assert [order["id"] for order in orders] == cancelled
    assert store.get_product(1)["stock"] == 9995


def test_expire_without_a_timeout_is_an_error_and_changes_nothing(command, database, monkeypatch):
    place_orders(database, 1)
    backdate(database, 10**6)
    reason = "shop: ORDER_TIMEOUT is not set: no order expires.\n"
    assert command("expire") == (1, "", reason)
    monkeypatch.setenv("ORDER_TIMEOUT", "")
    assert command("expire") == (1, "", reason)
    assert statuses_in(database) == ["pending"]


NO_MINUTES = "0 0.0 -1 +1 1e3 1_0 x nan inf ٣ 1. .5 1,5 60m 700000000 9999999999"


@pytest.mark.parametrize("value", NO_MINUTES.split())
@pytest.mark.parametrize("arguments, status", [([], 2), (["expire"], 1)])
def test_a_timeout_is_a_number_of_minutes(command, monkeypatch, value, arguments, status):
    monkeypatch.setenv("ORDER_TIMEOUT", value)
    reason = f"ORDER_TIMEOUT must be a number of minutes above 0, not '{value}'."
    assert command(*arguments) == (status, "", f"shop: {reason}\n")


def test_a_fault_in_the_expiry_does_not_end_the_process(start_server):
    setup = "db.Store.expire_orders = lambda store, before: 1 / 0"
    server = start_server(setup, ends_silently=False, ORDER_TIMEOUT="1")
    wait_for(lambda: server.stderr().count("ZeroDivisionError") > 1)
    assert server.product().status == 201


def test_a_read_only_shop_expires_no_order(start_server, database):
    place_orders(database, 1)
    backdate(database, 2)
    server = start_server(ORDER_TIMEOUT="1", READ_ONLY="true")
    for _ in range(20):  # each turn of the loop would cancel it
        assert server("GET", "/orders/1/").json["status"] == "pending"
    assert "read-only" in server.fail("expire")
    assert statuses_in(database) == ["pending"]


def test_of_completing_and_expiring_one_order_exactly_one_wins(database):
    place_orders(database, 120)
    backdate(database, 2)
    stores = [db.Store(database, lock_timeout=30) for _ in range(2)]  # as in two processes
    completed = set()
    cancelled = []

    def work(n):
        store = stores[n % 2]
        if n < 2:
            for order_id in range(n + 1, 121, 2):
                with contextlib.suppress(db.InvalidTransition):
                    store.update_order(order_id, status="completed")
                    completed.add(order_id)
        else:
            while portion := store.expire_orders(db.timestamp(60), limit=2):
                cancelled.append(portion)

    at_once(6, work)
    assert len(completed) + sum(cancelled) == 120
    expected = ["completed" if n in completed else "cancelled" for n in range(1, 121)]
    assert statuses_in(database) == expected
    assert stores[0].get_product(1)["stock"] == 10_000 - len(completed)
    for store in stores:
        store.close()
    assert db.check_integrity(database) == []


# -------------------------------------------------------------------------------- spreadsheets


@pytest.fixture
def command(tmp_path, url, monkeypatch, capsys):
    """Runs a command beside the shop: its status, standard output and standard error."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DATABASE_URL", url)

    def run(*arguments):
        capsys.readouterr()
        status = shop_module.main(list(arguments))
        return status, *capsys.readouterr()

    return run


@pytest.fixture
def import_csv(tmp_path, command):
    """Imports a text, or bytes, as a file in.csv."""

    def run(data, *options):
        data = data if isinstance(data, bytes) else data.encode()
        (tmp_path / "in.csv").write_bytes(data)
        return command("import", "in.csv", *options)

    return run


def imported(added, changed, unchanged=0, *, differing=0):
    line = f"in.csv: {added} products added, {changed} changed, {unchanged} unchanged\n"
    products = f"the stock of {differing} product{'s' if differing > 1 else ''} differs"
    hint = f"shop: in.csv: {products}: --stock would change it.\n"
    return 0, line, hint if differing else ""


@pytest.fixture
def assert_refused(shop, import_csv):
    """Asserts that a file is refused with these lines on standard error, and changes nothing."""

    def check(data, *faults):
        before = products_of(shop)
        lines = "\n".join(f"shop: in.csv: {fault}" for fault in faults)
        assert import_csv(data) == (1, "", f"{lines} Nothing has been imported.\n"), data[:100]
        assert products_of(shop) == before

    return check


def start_command(server, *arguments, **options):
    """Start a command in the folder and with the settings of a server."""
    command = [sys.executable, HERE / "shop.py", *arguments]
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options
    return subprocess.Popen(command, cwd=server.folder, env=server.environment(), **options)


def run_with_input(server, data, *arguments):
    """Run a command to its end on some input: status, output with bare LF, and errors."""
    process = start_command(server, *arguments, stdin=subprocess.PIPE)
    output, errors = process.communicate(data, 30)
    return process.returncode, output.decode().replace("\r\n", "\n"), errors.decode()


def products_of(shop):
    return shop("GET", "/products/").json["products"]


ODD_TEXTS = [
    *('a "quote", and a comma', "two\nlines", "two\r\nlines, of Windows", "of an\rold Mac"),
    *(" blanks around ", "=1+1", "'", '"', "é ☕ 😀 \u2028 \x85 \x0b \x1c", "\ufeffx", "null", "0"),
]


def test_what_was_exported_is_imported_without_a_change(
    shop, import_csv, command, tmp_path, database
):
    for number, text in enumerate(ODD_TEXTS):
        metadata = {"Size": text, f"entry_{number}": "x", "none": ""}
        sku = text.strip() and f"{text.strip()}{number}"
        fields = {"description": text, "stock": number, "sku": sku, "metadata": metadata}
        shop.product(name=text, price=number / 100, **fields)
    shop.product(name="x" * 200, description="y" * 10_000, price=1_000_000, stock=10**9)
    shop("DELETE", "/products/3/")
    products = products_of(shop)
    before = dump(database)
    assert command("export", "in.csv") == (0, "", "")
    exported = (tmp_path / "in.csv").read_bytes()
    assert import_csv(exported, "--stock") == imported(0, 0, len(products))
    assert dump(database) == before
    # Without its ids, it fills an empty shop.
    rows = list(csv.reader(io.StringIO(exported.decode(), newline="")))
    names = ["Size", *sorted(f"entry_{n}" for n in range(len(ODD_TEXTS)) if n != 2), "none"]
    columns = ["id", "sku", "name", "description", "price", "stock"]
    assert rows[0] == columns + [f"metadata.{name}" for name in names]
    for product_id, product in enumerate(products, len(products) + 2):
        shop("DELETE", f"/products/{product['id']}/")
        product["id"] = product_id
        for name in "name", "description":
            product[name] = product[name].strip()
        entries = {name: text.strip() for name, text in product["metadata"].items()}
        product["metadata"] = {name: text for name, text in entries.items() if text}
    text = io.StringIO()
    csv.writer(text, quoting=csv.QUOTE_ALL).writerows(row[1:] for row in rows)
    assert import_csv(text.getvalue()) == imported(len(products), 0)
    assert products_of(shop) == products
    assert db.check_integrity(database) == []


def test_import_and_export_through_pipes_are_utf_8_whatever_the_terminal_is(tmp_path):
    server = Server(tmp_path, LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")
    data = 'name,price,stock\n"Tee 🍵, grün",9.99,3\n'.encode()
    expected = (0, "-: 1 products added, 0 changed, 0 unchanged\n", "")
    assert run_with_input(server, data, "import", "-") == expected
    table = 'id,sku,name,description,price,stock\n1,,"Tee 🍵, grün",,9.99,3\n'
    assert run_with_input(server, b"", "export") == (0, table, "")
    assert run_with_input(server, b"", "export", "-") == (0, table, "")


def test_an_export_goes_where_its_file_leads(tmp_path, shop):
    shop.product()
    server = Server(tmp_path)
    real, link, pipe = (tmp_path / name for name in ("real.csv", "link.csv", "pipe"))
    real.write_text("before")
    real.chmod(0o600)
    link.symlink_to(real)
    os.mkfifo(pipe)
    assert server.run("export", "link.csv").returncode == 0
    assert link.is_symlink()
    assert real.stat().st_mode & 0o777 == 0o600
    with concurrent.futures.ThreadPoolExecutor() as pool:
        reading = pool.submit(pipe.read_text)
        assert server.run("export", "pipe").returncode == 0
        assert reading.result() == real.read_text().replace("\r\n", "\n")
    assert pipe.is_fifo()
    assert server.fail("export", "/dev/full") == "shop: /dev/full: No space left on device.\n"


def test_a_name_that_the_terminal_cannot_show_is_no_traceback(tmp_path):
    (tmp_path / "y\udcff.csv").write_text("name,price\nx,1\n")
    result = Server(tmp_path, PYTHONIOENCODING="utf-8").run("import", "y\udcff.csv")
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout == "y\\udcff.csv: 1 products added, 0 changed, 0 unchanged\n"


def test_an_export_that_nobody_reads_to_its_end_is_no_traceback(tmp_path, store):
    store.import_products([{"name": "x", "price": 1, "description": "y" * 100}] * 3000)
    process = start_command(Server(tmp_path, DATABASE_URL="sqlite:///store"), "export")
    assert process.stdout.read(2) == b"id"
    process.stdout.close()
    assert process.stderr.read() == b""
    process.stderr.close()
    assert process.wait(10) == 1


def test_a_file_that_cannot_be_read_or_written_is_one_line(shop, tmp_path, command):
    for name, file in itertools.product(["import", "export"], ["none/x.csv", "."]):
        status, output, errors = command(name, file)
        assert (status, output) == (1, "")
        assert re.fullmatch(rf"shop: {re.escape(file)}: [^\n]+\.\n", errors)
    with open("/dev/full", "w") as full:
        process = start_command(Server(tmp_path), "export", stdout=full)
    assert process.communicate()[1] == b"shop: standard output: No space left on device.\n"
    assert process.returncode == 1


def test_import_adds_rows_without_an_id_and_changes_those_with_one(shop, import_csv):
    mug = shop.product(description="Blue")
    text = "stock,name,description,price,id\n7,Tea,green,4.5,\n99,Cup,,8,1\n,Jam,,3,\n"
    assert import_csv(text) == imported(2, 1, differing=1)
    cup, *others = products_of(shop)
    assert cup == mug | {"name": "Cup", "description": "", "price": 8}
    new = [tuple(product.values()) for product in others]
    assert new == [(2, *item("Tea", 4.5, 7, "green")), (3, *item("Jam", 3))]
    assert steps_of(shop, 1) == [(5, 5, None, "")]
    assert steps_of(shop, 2) == [(7, 7, None, "import")]
    assert find_ids(shop, "green") == [2]
    assert find_ids(shop, "cup") == [1]
    assert import_csv("price,id\n2.50,1\n") == imported(0, 1)
    assert products_of(shop) == [cup | {"price": 2.5}, *others]
    assert import_csv("name,price\n") == imported(0, 0)


def test_a_file_without_the_header_line_is_refused(mug, assert_refused):
    columns = "id, sku, name, description, price, stock and metadata.NAME, each once"
    for header, name in [
        *(("Mug,9.99", "Mug"), ("id,name,colour", "colour"), ("name,name,price", "name")),
        *(("name, NAME ,price", "NAME"), ("name,price,metadata.a,metadata.a", "metadata.a")),
        *(("name|price", "name|price"), ("sep=|\nname|price", "sep=|")),
        *((f"name,{name}", name) for name in ("metadata", "metadata.", "metadata.a b")),
        (f"name,metadata.{'x' * 41}", f"metadata.{'x' * 41}"),
    ]:
        text = f"{header}\n1,x,2,3\n"
        assert_refused(text, f"line 1: the header can name {columns}, not '{name}'.")


NO_TABLES = {
    "there is no header line.": ["", "\n", ",,\n\n,,\n", "sep=;\n", "\ufeff"],
    "this is a workbook, a web page or text in another encoding: save it as CSV UTF-8.": [
        # Workbooks, web pages, XML, a picture and a database.
        *(b"PK\3\4\x14\0\6\0\x08\0\0\0!\0", b"PK\3\4\n", b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR"),
        *(b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(500), b"SQLite format 3\0\x10\0\1\1\0@  \0"),
        b"\r\n <!DOCTYPE html>\n<html><body>Log in, please; or not</body></html>\n",
        b'\xef\xbb\xbf<?xml version="1.0"?>\n<Workbook></Workbook>\n',
        "<html>\n".encode("utf-16"),
        # Other encodings, and UTF-16 without its mark or its end.
        b"name;price\r\nTeekanne f\xfcr zwei;19,90\r\nS\xfc\xdfstoff;2,10\r\n",
        b"name,price\n" + b"Tea,x\n" * 5000 + "Süßstoff,1\n".encode("mac-roman"),
        *("näme;price\nTee;1\n".encode("cp1252"), "名前,name,price\n".encode("shift-jis")),
        *("name,price\nTea,1\n".encode(name) for name in ("utf-16-le", "utf-16-be", "utf-32")),
        *("name,price\nTea,1\n".encode("utf-16")[:-1], b"name,price\nTea\xed\xa0\x80,1\n"),
    ],
}


@pytest.mark.parametrize("message, files", NO_TABLES.items())
def test_a_file_that_is_no_such_table_is_refused_in_one_line(mug, assert_refused, message, files):
    for data in files:
        assert_refused(data, message)


def test_every_faulty_line_is_named_by_its_number_and_nothing_is_imported(mug, assert_refused):
    lines = [
        "id,name,description,price,stock",
        ',"fine","on\nthree\r\nlines",1,1',  # lines 2 to 4
        "",
        "1,fine,,1,1",
        '7,"two\nlines",,1,1',  # lines 7 and 8
        "1,twice,,1,1",
        *("x,a,,-1,1", "1_0,a,,1,1", ",a,,-1,x", ",a,b", '"00",a,,1,1'),  # lines 10 to 14
        *(",a,,1,1,,b,", ",a,,1,1,,,"),
    ]
    unknown = "there is no product with id"
    range_ = f"price must be 0 to {shop_module.PRICE['maximum']}"
    faults = [
        *(f"7: {unknown} '7'", "9: line 6 also changes product 1", f"10: {range_}: '-1'"),
        *(f"10: {unknown} 'x'", f"11: {unknown} '1_0'", f"12: {range_}: '-1'"),
        *("12: stock must be an integer: 'x'", "13: price is required: ''", f"14: {unknown} '00'"),
        "15: a column without a name has the value 'b'",
    ]
    assert_refused("\n".join(lines), *(f"line {fault}." for fault in faults))


def test_a_new_row_needs_a_name_and_a_price(mug, assert_refused):
    for text, fault in [
        *(("name\nx\n", "2: price is required"), ("price\n1\n", "2: name is required")),
        ("id,name\n1,x\n,y\n", "3: price is required"),
        ("stock,name,price\n,x\n", "2: price is required: ''"),
        ("id,price\n1,\n", "2: price must be a number: ''"),
        ("id,name\n1,\n", "2: name must be 1 to 200 characters long, not 0: ''"),
    ]:
        assert_refused(text, f"line {fault}.")


def test_the_rules_of_an_import_and_its_messages_are_those_of_the_api(shop, assert_refused):
    row = {"name": "x", "description": "", "price": "1", "stock": "1", "sku": ""}
    rows = [list(row)]
    expected = []
    for field, cell in [
        *(("name", cell) for cell in ("", " ", "\u2003", "x" * 201, "a\0b")),
        *(("description", cell) for cell in ("y" * 10_001, "\0")),
        *(("price", cell) for cell in ("-0.01", "-1", "1" * 30, "x", "", "NaN", "1_0", "٣", "\0")),
        *(("stock", cell) for cell in ("-1", "1000000001", "1.5", "x", "NaN", "9" * 5000)),
        *(("sku", cell) for cell in ("x" * 65, "a\0b")),
    ]:
        rows.append(list((row | {field: cell}).values()))
        body = {"name": "x", "price": 1, field: cell.strip()}
        if not cell.strip():
            del body[field]
        elif re.fullmatch("-?[0-9.]+", cell):
            body[field] = json.loads(cell[:30])  # of thousands of digits, these are enough
        [detail] = errors_of(shop("POST", "/products/", body)).values()
        value = shop_module.shown(cell.strip())
        expected.append(f"line {len(rows)}: {detail[:-1]}: {value}.")
    text = io.StringIO()
    csv.writer(text, quoting=csv.QUOTE_ALL).writerows(rows)
    assert_refused(text.getvalue(), *expected)


def test_numbers_that_would_have_to_be_guessed_are_refused_by_their_lines(assert_refused):
    text = "name;price;stock\nSyrup;6,80;20\n"
    faults = []
    cells = (
        "1,299|1.000|1.299,00|1,299.00|2.450,00|3,125|1,050|$9.99|£14.20|9,99 €|EUR 5|9.990|9,000|"
        "9.|.99|,99|1 299|1\xa0299|1'299|1e3|+1|٩|1,2,3|0x1|--"
    )
    for line, cell in enumerate(cells.split("|"), 3):
        text += f'x;"{cell}";"{cell}"\n'
        for column, message in ("price", "must be a number"), ("stock", "must be an integer"):
            faults.append(f"line {line}: {column} {message}: {shop_module.shown(cell)}.")
    assert_refused(text, *faults)


def test_a_cell_without_end_is_refused_by_the_line_it_begins_in(shop, import_csv):
    start = "name,price,description\n,1,x\n"
    for text, lines in [
        (f"{start}a,1,{'y' * 131_073}\n", ["2", "3"]),
        (start + 'a,1,"' + "y\n" * 70_000 + '"\n', ["2", "3"]),
        # A quote that nobody has closed, or it would swallow the rows that follow.
        (f'{start}a,1,"y\nb,1,z\n', ["2", "3"]),
        ('name\tprice\n"3 inch burr\t1\nb\t2\n', ["2"]),
        ('name\tprice\n"3" burr\t1\nb\t2\n', ["2"]),
        ('name;price\n"Mug;1', ["2"]),
    ]:
        status, output, errors = import_csv(text)
        assert (status, output, products_of(shop)) == (1, "", [])
        assert re.findall("line ([0-9]+): ", errors) == lines
        assert "the rest has not been checked" in errors


def test_the_stock_of_a_product_changes_only_with_stock_which_is_named_if_missing(
    shop, mug, import_csv
):
    shop.product(stock=7, sku="B")
    shop.product(stock=3)
    assert import_csv("id,stock\n1,3\n2,7\n3,\n") == imported(0, 0, 3, differing=1)
    assert import_csv("id,stock,sku\n1,3,\n,9,B\n") == imported(0, 0, 2, differing=2)
    assert import_csv("id\n1\n") == imported(0, 0, 1)
    text = "id,stock,name,price,sku\n1,3,Cup,1,\n2,7,Cup,1,B\n,4,Tea,1,\n"
    assert import_csv(text) == imported(1, 2, differing=1)
    assert [shop.stock({"id": n}) for n in (1, 2, 3, 4)] == [5, 7, 3, 4]
    assert import_csv("id,stock,sku\n1,3,\n,7,B\n3,,\n", "--stock") == imported(0, 1, 2)
    assert [shop.stock({"id": n}) for n in (1, 2, 3, 4)] == [3, 7, 3, 4]
    assert steps_of(shop, 1) == [(5, 5, None, ""), (-2, 3, None, "import")]
    assert steps_of(shop, 2) == [(7, 7, None, "")]


def item(name, price, stock=0, description="", sku="", **entries):
    return name, description, price, stock, sku, entries


# The bytes that real spreadsheet programs save, and the products in them.
SPREADSHEETS = {
    "german": (
        "\ufeffsku;name;description;price;stock\r\n"
        'KAF-01;Kaffeemühle;"Buche; ""Handkurbel""\nwiegt 1,2 kg";48,90;6\r\n'.encode(),
        [item("Kaffeemühle", 48.9, 6, 'Buche; "Handkurbel"\nwiegt 1,2 kg', "KAF-01")],
    ),
    "Unicode text": (
        '\ufeffname\tprice\tdescription\r\nDzbanek żółty\t27,80\t"3,5 l, ""duży"""\r\n'
        "Kubek\t6\t\r\n".encode("utf-16-le"),
        [item("Dzbanek żółty", 27.8, 0, '3,5 l, "duży"'), item("Kubek", 6)],
    ),
    "UTF-16, big end first": ("\ufeffname\tprice\r\nŻ\t6\r\n".encode("utf-16-be"), [item("Ż", 6)]),
    "tabs": (b'name\tprice\tstock\nGrinder 3" burr\t4.1\t2\n', [item('Grinder 3" burr', 4.1, 2)]),
    "blank rows": (
        b'\r\n,,\r\n"","",""\r\nname,description,price,stock\r\n,,,\r\n\r\n'
        b'Filter,"100\r\npieces",3.49,80\r\n,,,\r\n   ,,,\r\nScale,,29,4\r\n,,,\r\n',
        [item("Filter", 3.49, 80, "100\r\npieces"), item("Scale", 29, 4)],
    ),
    "prices": (
        b'name,price,stock\nKettle,"39,95",3\nLid,"0,7",12\na,0.01,\nb,9.9,\nc," 1000,50 ",\n',
        [item("Kettle", 39.95, 3), item("Lid", 0.7, 12)]
        + [item(name, price) for name, price in (("a", 0.01), ("b", 9.9), ("c", 1000.5))],
    ),
    "nameless columns": (b"name;price;;stock;;\r\nPress;24,00;;8;;\r\n", [item("Press", 24, 8)]),
    "sep= and header": (
        "sep=;\r\n SKU ; Name ;PRICE;Metadata.a-B_1\r\n ES-9 ; Cup ; 8,40 ;weiß\r\n".encode(),
        [item("Cup", 8.4, 0, "", "ES-9", **{"a-B_1": "weiß"})],
    ),
    "sep= in quotes": (b'"sep=\t"\r\nname\tprice\r\nx;y,z\t1\r\n', [item("x;y,z", 1)]),
    "sep= and separators": (b"SEP=,,,\nname,price\na;b;c,2\n", [item("a;b;c", 2)]),
    "short rows, and blanks before quotes": (
        b'name, price, description, stock\nCup,1\nMug, 2, "a, b"\n',
        [item("Cup", 1), item("Mug", 2, 0, "a, b")],
    ),
    "white space around quotes": (
        '"name" ;"" ;\u00a0"price"  \r\n"Cup ""x"" y"\t; "" ;\t"1,5" \n"Mug; "" ; z"  ;;2\n'
        '"The ""Tea""" ;;3'.encode(),
        [item('Cup "x" y', 1.5), item('Mug; " ; z', 2), item('The "Tea"', 3)],
    ),
    "CR alone": (b"name;price\rCup;1\rMug;2,5\r", [item("Cup", 1), item("Mug", 2.5)]),
    "a header in quotes": (b'\xef\xbb\xbf"name"\tprice\nCup\t1', [item("Cup", 1)]),
}


@pytest.mark.parametrize("data, products", SPREADSHEETS.values(), ids=SPREADSHEETS.keys())
def test_import_reads_what_spreadsheet_programs_save(shop, import_csv, data, products):
    assert import_csv(data) == imported(len(products), 0)
    assert [tuple(product.values())[1:] for product in products_of(shop)] == products
    if products[0][4]:  # found again by its sku
        assert import_csv(data) == imported(0, 0, len(products))


def test_a_sku_finds_its_product_and_an_empty_entry_is_removed(shop, import_csv):
    text = "sku,name,price,stock,metadata.shelf\nB-1,Bowl,5.00,10,A4\nB-2,Plate,7.00,20,\n"
    assert import_csv(text) == imported(2, 0)
    text = "sku;name;price;metadata.shelf\nB-1;Bowl;5,00;\nB-2;Plate;7,0;\nB-3;Jug;18,25;C1\n"
    assert import_csv(text) == imported(1, 1, 1)
    assert [tuple(product.values()) for product in products_of(shop)] == [
        (1, *item("Bowl", 5, 10, sku="B-1")),
        (2, *item("Plate", 7, 20, sku="B-2")),
        (3, *item("Jug", 18.25, sku="B-3", shelf="C1")),
    ]
    assert import_csv("id,sku\n2,\n1,b-1\n") == imported(0, 2)
    assert [product["sku"] for product in products_of(shop)] == ["b-1", "", "B-3"]
    assert import_csv("sku,name,price\n,Bowl,5\n,Bowl,5\n") == imported(2, 0)
    assert len(products_of(shop)) == 5


def test_metadata_columns_add_change_and_remove_entries_and_leave_others(shop, import_csv):
    metadata = {"a": "1", "b": " 2 ", "other": "x", "empty": ""}
    mug = shop.product(sku="A", metadata=metadata)
    columns = "sku,metadata.a,METADATA.b,metadata.A,metadata.empty,metadata.never"
    assert import_csv(f"{columns}\nA,1,2,,,\n") == imported(0, 0, 1)
    assert products_of(shop) == [mug]
    assert import_csv(f"{columns}\nA,,3,new,,\n") == imported(0, 1)
    changed = {"b": "3", "A": "new", "other": "x", "empty": ""}
    assert products_of(shop) == [mug | {"metadata": changed}]


def test_metadata_is_limited_as_in_the_api_and_faults_are_named(shop, import_csv, assert_refused):
    shop.product(metadata={f"old{n}": "x" for n in range(30)})
    many = "metadata must have at most 50 entries, not 51."
    header = ",".join(["id", *(f"metadata.new{n}" for n in range(21))])
    row = "1" + ",x" * 21
    assert_refused(f"{header}\n{row}\n", f"line 2: {many}")
    assert import_csv(f"{header},metadata.old1\n{row},\n") == imported(0, 1)
    message = "metadata.a must be 0 to 500 characters long, not 501"
    value = shop_module.shown("x" * 501)
    assert_refused(f"id,metadata.a\n1,{'x' * 501}\n", f"line 2: {message}: {value}.")
    names = ",".join(f"metadata.n{n}" for n in range(51))
    assert_refused(f"name,price,{names}\nx,1{',y' * 51}\n", f"line 2: {many}")


def test_two_rows_for_one_product_or_one_new_sku_are_refused(shop, import_csv, assert_refused):
    for sku in "A", "B", "C":
        shop.product(sku=sku)
    for text, fault in [
        ("id,sku\n1,A\n,A\n", "line 3: line 2 also changes product 1"),
        ("id,sku\n1,\n,A\n", "line 3: line 2 also changes product 1"),
        ("sku,stock\nA,5\nA,5\n", "line 3: line 2 also changes product 1"),
        ("id,stock\n2,5\n02,5\n", "line 3: line 2 also changes product 2"),
        ("id,sku\n1,B\n", "line 2: another product or row has sku 'B'"),
        ("id,sku\n1,N\n2,N\n", "line 3: another product or row has sku 'N'"),
        ("id,sku\n1,B\n2,A\n", "line 2: another product or row has sku 'B'"),
        ("sku,name,price\nN,x,1\nn,x,1\nN,x,1\n", "line 4: another product or row has sku 'N'"),
    ]:
        assert_refused(text, f"{fault}.")
    # In the order of the rows, a sku that a product gives up is free for the next.
    assert import_csv("id,sku\n1,\n2,A\n3,B\n") == imported(0, 3)
    assert [product["sku"] for product in products_of(shop)] == ["", "A", "B"]


@pytest.mark.parametrize(
    "change, body, message",
    [
        ("DELETE /products/1/", None, "There is no product 1."),
        ("POST /products/", {"name": "x", "price": 1, "sku": "N"}, "Product 2 already has "),
        ("PATCH /products/1/", {"metadata": FULL_METADATA}, "must have at most 50 entries, not 51"),
    ],
)
def test_what_changes_after_the_rows_were_checked_is_one_line(
    shop, import_csv, monkeypatch, change, body, message
):
    shop.product(sku="A")
    products = []

    def read_and_change(*arguments, read_rows=shop_module.read_rows):
        rows = read_rows(*arguments)
        assert shop(*change.split(), body).status_int < 300
        products.extend(products_of(shop))
        return rows

    monkeypatch.setattr(shop_module, "read_rows", read_and_change)
    status, output, errors = import_csv("id,sku,name,price,metadata.a\n,N,Tea,1,\n1,A,Cup,2,x\n")
    assert (status, output, products_of(shop)) == (1, "", products)
    assert re.fullmatch(rf"shop: in\.csv: {message}[^\n]* Nothing has been imported\.\n", errors)


def test_an_import_waits_for_the_lock_at_most_ten_seconds(import_csv, database, monkeypatch):
    text = "name,price\nTea,1\n"
    busy = (1, "", "shop: The database is busy.\n")
    with contextlib.closing(lock(database)), monkeypatch.context() as patch:  # a new file
        patch.setattr(shop_module, "COMMAND_LOCK_TIMEOUT", 0.1)
        assert import_csv(text) == busy
    assert import_csv(text) == imported(1, 0)
    with contextlib.closing(lock(database)):
        started = time.monotonic()
        assert import_csv(text) == busy
        assert 5 < time.monotonic() - started < 11
    assert import_csv(text) == imported(1, 0)


def test_the_sample_catalogue_of_the_readme_can_be_pasted_and_sells(server):
    readme = (HERE / "README.md").read_text()
    sample = re.search(r"shop\.py import - <<'END'\n(.*?)END\n", readme, re.DOTALL)[1]
    expected = (0, "-: 9 products added, 0 changed, 0 unchanged\n", "")
    assert run_with_input(server, sample.encode(), "import", "-") == expected
    products = server("GET", "/products/?available=true").json["products"]
    assert server.order(products[0]["id"]).status == 201


@contextlib.contextmanager
def selling(shop):
    """Four threads that order one piece each until the block ends; gives the ids of the orders."""
    stop = threading.Event()
    orders = []

    def buy(n):
        client = Client(shop.app.app)
        for product_id in itertools.cycle([1, 2, 3]):
            if stop.is_set():
                return
            orders.append(client.order((product_id, 1)).json["id"])

    def wait_for_orders():
        aim = len(orders) + 50
        wait_for(lambda: len(orders) > aim, 20)

    threads = start_threads(4, buy)
    try:
        wait_for_orders()
        yield orders
        wait_for_orders()
    finally:
        stop.set()
        join_all(threads)


def test_an_import_loses_nothing_that_is_sold_meanwhile_nor_does_a_stocktake(
    shop, import_csv, database
):
    for _ in range(3):
        shop.product(stock=100_000)
    text = "id,name,price,stock\n1,Cup,5,7\n2,Cup,5,7\n3,Cup,5,7\n" + ",new,1,1\n" * 300
    stocktake = "id,stock\n1,50001\n2,50002\n3,50003\n"
    with selling(shop) as orders:
        for changed in 3, 0, 0:
            assert import_csv(text) == imported(300, changed, 3 - changed, differing=3)
        assert import_csv(stocktake, "--stock") == imported(0, 3)
    sold = []
    for product in products_of(shop)[:3]:
        movements, _ = shop.app.app.store.list_movements(product["id"], limit=10**6)
        place = [movement["note"] for movement in movements].index("import")
        later = len(movements) - place - 1
        assert min(place, later) > 1
        assert movements[place]["stock"] == 50_000 + product["id"]
        assert (product["name"], product["stock"]) == ("Cup", 50_000 + product["id"] - later)
        sold += [movement["order_id"] for movement in movements if movement["order_id"]]
    assert sorted(sold) == sorted(orders)
    assert db.check_integrity(database) == []


def run_measured(folder, *arguments):
    """Run a command: its standard output, seconds, and the most memory that it took, in MiB."""
    process = start_command(Server(folder), *arguments, stderr=None)
    started = time.monotonic()
    with process.stdout:
        output = process.stdout.read().decode()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0
    return output, time.monotonic() - started, usage.ru_maxrss / 1024


def test_a_hundred_thousand_rows_are_imported_in_little_time_and_memory(tmp_path, database):
    text = f'"{"y" * 50}; {"ü" * 50}"'
    rows = [f"S-{n};Käse {n};{text};{n % 999},25;{n % 100}\n" for n in range(100_000)]
    for name, number in ("first.csv", 20_000), ("in.csv", 100_000):
        content = "sku;name;description;price;stock\n" + "".join(rows[:number])
        (tmp_path / name).write_text(content, encoding="utf-8")
    output, seconds, _ = run_measured(tmp_path, "import", "first.csv")
    assert output == "first.csv: 20000 products added, 0 changed, 0 unchanged\n"
    assert seconds < 6
    for counts in "80000 products added, 0 changed, 20000", "0 products added, 0 changed, 100000":
        output, _, memory = run_measured(tmp_path, "import", "in.csv")
        assert output == f"in.csv: {counts} unchanged\n"
        assert memory < 300
    assert db.check_integrity(database) == []


@pytest.fixture
def sold(shop, mug, database):
    """Orders of four days, the first of which has been changed since."""
    shop.product(name='Tea; "green"', price=0.1, stock=500, sku="T-1")
    shop.order((2, 3), (1, 2))
    for day in range(3):
        shop("POST", "/orders/", referring(f"cart-{day}", (2, 100 + day)))
    shop("PATCH", "/orders/1/", {"status": "completed"})
    shop("PATCH", "/products/1/", {"name": "Cup", "price": 1})
    days = "2026-10-31T23:59:59Z 2026-11-01T00:00:00Z 2026-11-30T23:59:59Z 2026-12-01T00:00:00Z"
    with connect(database) as connection:
        sql = "UPDATE orders SET created_at = ? WHERE id = ?"
        connection.executemany(sql, zip(days.split(), (1, 2, 3, 4), strict=True))
    return shop


def exported_orders(command, tmp_path, options=""):
    assert command("export", "--orders", "out.csv", *options.split()) == (0, "", "")
    with (tmp_path / "out.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_the_export_of_orders_has_a_row_for_each_line_and_exact_sums(sold, command, tmp_path):
    rows = exported_orders(command, tmp_path)
    header = "order_id created_at status reference product_id sku name price quantity amount"
    assert list(rows[0]) == header.split()
    assert [";".join(row.values()) for row in rows[:3]] == [
        '1;2026-10-31T23:59:59Z;completed;;2;T-1;Tea; "green";0.10;3;0.30',
        "1;2026-10-31T23:59:59Z;completed;;1;;Mug;9.99;2;19.98",
        '2;2026-11-01T00:00:00Z;pending;cart-0;2;T-1;Tea; "green";0.10;100;10.00',
    ]
    for order in sold("GET", "/orders/").json["orders"]:
        amounts = [Decimal(row["amount"]) for row in rows if row["order_id"] == str(order["id"])]
        assert sum(amounts) == Decimal(str(order["total_price"]))
    text = (tmp_path / "out.csv").read_bytes().decode().replace("\r\n", "\n")
    assert run_with_input(Server(tmp_path), b"", "export", "--orders") == (0, text, "")


def test_the_export_of_orders_is_from_the_first_to_the_last_day(sold, command, tmp_path):
    for options, orders in [
        *(("", "11234"), ("--from 2026-11-01", "234"), ("--to 2026-11-30", "1123")),
        *(("--from 2026-11-01 --to=2026-11-30", "23"), ("--from 2026-12-02", "")),
        ("--to 2026-12-01 --from 2026-12-01", "4"),
    ]:
        rows = exported_orders(command, tmp_path, options)
        assert "".join(row["order_id"] for row in rows) == orders, options


def test_an_import_that_is_killed_leaves_all_or_nothing(tmp_path, database):
    place_orders(database, 1)
    (tmp_path / "in.csv").write_text("name,price,description\n" + f"x,1,{'y' * 2000}\n" * 5000)
    server = Server(tmp_path)
    wal = database.with_name("db.sqlite3-wal")
    process = start_command(server, "import", "in.csv")
    # SQLite writes into the WAL before the end of a transaction that is larger than its cache.
    wait_for(lambda: (wal.exists() and wal.stat().st_size > 10**6) or process.poll() is not None)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert server.run("check").stdout == "db.sqlite3: sound\n"
    with connect(database) as connection:
        [number] = connection.execute("SELECT count(*) FROM product").fetchone()
    assert number in (1, 5001)
    expected = "in.csv: 5000 products added, 0 changed, 0 unchanged\n"
    assert server.run("import", "in.csv").stdout == expected


# --------------------------------------------------------------------------- a model of the shop


class Player:
    """A thread that writes at random, and a model of what the shop must make of its writes.

    Each has products, skus and orders of its own, so that its model is exact: what the threads
    share is the database, its ids and the Store.
    """

    def __init__(self, app, number):
        self.client = Client(app)
        self.dice = random.Random(number)
        self.number = number
        self.products = {}  # by id: the changes of the stock, sku and metadata
        self.deleted = set()
        self.orders = {}  # by id: status, metadata, and (quantity, sku) by product
        self.sent = 0
        self.create_product()

    def send(self, method, path, body, due, headers=None):
        """Send a write that must get the status that is due; a POST sometimes with a key, twice."""
        self.sent += 1
        headers = headers or {}
        if method == "POST" and self.dice.random() < 0.3:
            headers = headers | {"Idempotency-Key": f"{self.number}-{self.sent}"}
        response = self.client(method, path, body, headers, due)
        if "Idempotency-Key" in headers and due < 300 and self.dice.random() < 0.5:
            again = self.client(method, path, body, headers)
            assert again.body == response.body
            assert again.headers["Idempotent-Replayed"] == "true"
        return response

    def any_product(self):
        return self.dice.choice([*self.products, *self.deleted])

    def any_sku(self):
        return self.dice.choice(["", *(f"{self.number}-{letter}" for letter in "abcdef")])

    def any_metadata(self, *texts):
        return {name: self.dice.choice(texts) for name in self.dice.sample("abc", 2)}

    def stock(self, product_id):
        return sum(self.products[product_id].changes)

    def has_sku(self, sku, product_id=None):
        """Whether a product other than this one has the sku."""
        others = (product for other, product in self.products.items() if other != product_id)
        return any(sku == product.sku != "" for product in others)

    # What the model makes of a write to one of its products: the status that is due.

    def change(self, product_id, stock, sku, metadata, **others):
        if self.has_sku(sku, product_id):
            return 409
        product = self.products[product_id]
        product.sku = sku
        product.metadata = merged(product.metadata, metadata)
        return self.move(product_id, stock - self.stock(product_id))

    def move(self, product_id, change, note=""):
        if not 0 <= self.stock(product_id) + change <= db.MAX_STOCK:
            return 409 if change < 0 else 422
        self.products[product_id].changes += [change] if change else []
        return 200

    def delete(self, product_id):
        del self.products[product_id]
        self.deleted.add(product_id)
        return 204

    def write_product(self, act, method, path, body=None):
        """Send a write to a product, maybe under a condition, that does `act` in the model."""
        product_id = self.any_product()
        headers = {"If-Match": '"stale"'} if self.dice.random() < 0.25 else {}
        if product_id not in self.products:
            due = 404
        elif headers:
            due = 412
        else:
            due = act(product_id, **(body or {}))
            if self.dice.random() < 0.3:
                headers["If-Match"] = etag_of(self.client, f"/products/{product_id}/")
        self.send(method, path.format(product_id), body, due, headers)

    def create_product(self):
        body = {"name": "x", "price": 0.1, "sku": self.any_sku()}
        body |= {"stock": self.dice.choice([0, 30, 30, db.MAX_STOCK - 5])}
        body |= {"metadata": self.any_metadata("", "1")}
        due = 409 if self.has_sku(body["sku"]) else 201
        response = self.send("POST", "/products/", body, due)
        if due == 201:
            product_id = response.json["id"]
            self.products[product_id] = SimpleNamespace(changes=[], sku="", metadata={})
            self.change(product_id, **body)

    def update_product(self):
        body = {"price": self.dice.randrange(100), "sku": self.any_sku()}
        body |= {"stock": self.dice.choice([0, 20, 20, db.MAX_STOCK])}
        body |= {"metadata": self.any_metadata(None, "", "1")}
        self.write_product(self.change, "PATCH", "/products/{}/", body)

    def update_stock(self):
        body = {"change": self.dice.choice([-(10**8), -9, -1, 0, 4, 12]), "note": "counted"}
        self.write_product(self.move, "POST", "/products/{}/stock/", body)

    def delete_product(self):
        if self.dice.random() < 0.2:
            self.write_product(self.delete, "DELETE", "/products/{}/")
        if not self.products:
            self.create_product()

    def create_order(self):
        lines = {self.any_product(): self.dice.randint(1, 6) for _ in range(3)}
        body = order_of(*lines.items()) | {"metadata": self.any_metadata("", "1")}
        due = 201
        if not lines.keys() <= self.products.keys():
            due = 422
        elif any(self.stock(product_id) < quantity for product_id, quantity in lines.items()):
            due = 409
        response = self.send("POST", "/orders/", body, due)
        if due == 201:
            order = SimpleNamespace(status="pending", metadata=body["metadata"], lines={})
            self.orders[response.json["id"]] = order
            for product_id, quantity in lines.items():
                order.lines[product_id] = quantity, self.products[product_id].sku
                self.move(product_id, -quantity)

    def update_order(self):
        if not self.orders:
            return
        order_id, order = self.dice.choice([*self.orders.items()][-5:])
        status = self.dice.choice(["completed", "cancelled", "cancelled"])
        body = {"status": status, "metadata": self.any_metadata(None, "", "1")}
        is_refused = (order.status, status) == ("cancelled", "completed")
        self.send("PATCH", f"/orders/{order_id}/", body, 409 if is_refused else 200)
        if is_refused:
            return
        if order.status != status == "cancelled":
            for product_id in order.lines.keys() & self.products.keys():
                room = db.MAX_STOCK - self.stock(product_id)
                self.move(product_id, min(order.lines[product_id][0], room))
        order.status = status
        order.metadata = merged(order.metadata, body["metadata"])

    def play(self, turns):
        moves = [self.create_product, self.update_product, self.update_stock, self.delete_product]
        moves += [self.create_order, self.update_order] * 3
        for _ in range(turns):
            self.dice.choice(moves)()


def merged(metadata, patch):
    return {name: text for name, text in (metadata | patch).items() if text is not None}


def test_the_shop_does_what_a_model_of_it_does_through_thousands_of_writes(shop, database):
    players = [Player(shop.app.app, number) for number in range(6)]
    at_once(6, lambda n: players[n].play(500))
    assert sum(player.sent for player in players) > 2000
    products, orders = {}, {}
    for player in players:
        products |= player.products
        orders |= player.orders
        for product_id in player.deleted:
            shop("GET", f"/products/{product_id}/stock/", status=404)
    for product in products_of(shop):
        due = products.pop(product["id"])
        assert (product["sku"], product["metadata"]) == (due.sku, due.metadata)
        assert [change for change, *_ in steps_of(shop, product["id"])] == due.changes
    for order in walk_pages(shop, "/orders/?limit=1000", "orders"):
        due = orders.pop(order["id"])
        lines = {line["product_id"]: (line["quantity"], line["sku"]) for line in order["products"]}
        assert (order["status"], order["metadata"], lines) == (due.status, due.metadata, due.lines)
    assert (products, orders) == ({}, {})
    assert db.check_integrity(database) == []
