"""What the shop does, one sentence a test: through the WSGI interface, and where that shows less than the whole
truth, against a real `python shop.py`. Run: python -m pytest
"""

import concurrent.futures
import http.client
import inspect
import json
import os
import random
import re
import resource
import select
import shlex
import signal
import socket
import sqlite3
import struct
import subprocess
import sys
import threading
import time
from decimal import Decimal
from importlib import metadata
from pathlib import Path

import bottle
import pytest
import webtest

import db
import shop as shop_module

pytestmark = pytest.mark.filterwarnings("ignore:Unknown REQUEST_METHOD")
HERE = Path(__file__).parent
JSON = {"Content-Type": "application/json"}


# --------------------------------------------------------------------------------------------------- the fixtures


class Client:
    """Asks a shop through WSGI: client("POST", "/orders/", {...}). Every failure must be a problem of its status."""

    def __init__(self, app):
        self.app = webtest.TestApp(app)

    def __call__(self, method, path, body=None, headers=None):
        data = (
            body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
        )
        headers = {**({} if body is None else JSON), **(headers or {})}
        answer = self.app.request(
            path, method=method, body=data, headers=headers, expect_errors=True
        )
        if answer.status_int >= 400 and method != "HEAD":
            assert answer.content_type == "application/problem+json", answer
            assert answer.json["status"] == answer.status_int and answer.json.keys() >= {
                "type",
                "title",
                "detail",
            }
            assert all(answer.json[field] for field in ("type", "title", "detail")), answer
        self.compare(method, path, answer)
        return answer

    def compare(self, method, path, answer):
        """Every answer of every test is one that /openapi.json declares, its headers and fields included."""
        path = re.sub(r"/\d+", "/{id}", path.partition("?")[0].removesuffix("/"))
        described = shop_module.openapi_document("", True)
        methods = {
            re.sub("{.*?}", "{id}", known).removesuffix("/"): methods
            for known, methods in described["paths"].items()
        }.get(path, {})
        operation = methods.get("get" if method == "HEAD" else method.lower())
        if not operation:
            assert answer.status_int in (204, 404, 405) or "/a/b" in path
            return
        declared = operation["responses"][str(answer.status_int)]
        if "$ref" in declared:
            declared = described["components"]["responses"][declared["$ref"].rpartition("/")[2]]
        declared_headers = {name.lower() for name in declared["headers"]} | {
            "content-type",
            "content-length",
        }
        assert {name.lower() for name in answer.headers} <= declared_headers
        if answer.body:
            [(kind, media)] = declared["content"].items()
            schema = media["schema"]
            if "$ref" in schema:
                schema = described["components"]["schemas"][schema["$ref"].rpartition("/")[2]]
            assert kind == answer.content_type
            assert set(schema.get("required", ())) <= answer.json.keys()
            assert "properties" not in schema or answer.json.keys() <= schema["properties"].keys()

    def product(self, **fields):
        return self("POST", "/products/", {"name": "Mug", "price": 9.99, "stock": 5, **fields}).json

    def order(self, *lines, **headers):
        return self(
            "POST",
            "/orders/",
            {
                "products": [
                    {"product_id": product, "quantity": quantity} for product, quantity in lines
                ]
            },
            headers,
        )

    def stock(self, product):
        return self("GET", f"/products/{product['id']}/").json["stock"]


@pytest.fixture
def url(tmp_path):
    return f"sqlite:///{tmp_path}/db.sqlite3"


@pytest.fixture
def shop(url):
    app = shop_module.create_app(url)
    yield Client(app)
    app.store.close()


@pytest.fixture
def mug(shop):
    return shop.product()


def errors_of(answer):
    assert answer.status_int == 422 and answer.json["type"] == "urn:problem-type:validation", answer
    return {
        error.get("pointer", error.get("parameter")): error["detail"]
        for error in answer.json["errors"]
    }


def at_once(number, work):
    """The results of work(0), work(1), ... in as many threads, begun together."""
    gate = threading.Barrier(number)
    with concurrent.futures.ThreadPoolExecutor(number) as pool:
        return list(pool.map(lambda n: (gate.wait(), work(n))[1], range(number)))


# -------------------------------------------------------------------------------------------------------- products


def test_a_product_is_added_and_read_back_as_it_was_given(shop):
    made = shop(
        "POST", "/products/", {"name": "Mug ☕", "description": "Blue", "price": 9.99, "stock": 12}
    )
    assert made.status_int == 201 and made.headers["Location"] == "/products/1/"
    assert made.content_type == "application/json"
    assert made.json == {
        "id": 1,
        "name": "Mug ☕",
        "description": "Blue",
        "price": 9.99,
        "stock": 12,
    }
    assert shop("GET", "/products/1/").json == made.json
    assert shop("GET", "/products/").json == {"products": [made.json], "next": None}


def test_description_and_stock_may_be_left_out(shop):
    assert shop("POST", "/products/", {"name": "x", "price": 0}).json == {
        "id": 1,
        "name": "x",
        "description": "",
        "price": 0,
        "stock": 0,
    }


@pytest.mark.parametrize(
    "body",
    [
        b'{"name": "x", "price": 2.0, "stock": 2.0}',
        b'{"name": "x", "price": 1e1, "stock": 1e2}',
        b'{"name": "x", "price": 9.990, "stock": -0}',
        b'{"name": "x", "price": 1000000, "stock": 1000000000}',
        '{"name": "\u2000x\u3000", "price": 0.01, "description": "\\ud83d\\ude00\\t"}'.encode(),
        b'{"name": "%s", "price": 1}' % (b"x" * 200),
        b'{"name": "x", "price": 1, "description": "%s"}' % (b"y" * 10_000),
    ],
)
def test_whatever_the_rules_allow_is_accepted(shop, body):
    made = shop("POST", "/products/", body)
    assert made.status_int == 201, made
    sent = json.loads(body)
    assert {name: made.json[name] for name in sent} == sent


@pytest.mark.parametrize(
    "field, values",
    {
        "name": ["", "   ", "\u2003\t\n", "x" * 201, "a\0b", "\ud800", 5, None, True, ["x"], {}],
        "description": ["y" * 10_001, "\0", "x\udfff", 5, None],
        "price": [-0.01, 1000000.01, 9.999, "9.99", None, True, [], 1e300],
        "stock": [-1, 1000000001, 1.5, "2", True, None, 10**30],
        "id": [7],
        "colour": ["red"],
    }.items(),
)
def test_a_field_that_breaks_its_rule_is_told_by_pointer_and_nothing_is_added(shop, field, values):
    for value in values:
        answer = shop("POST", "/products/", {"name": "x", "price": 1, field: value})
        assert list(errors_of(answer)) == [f"#/{field}"], value
    assert shop("GET", "/products/").json["products"] == []


@pytest.mark.parametrize(
    "number",
    [
        "1e999",
        "-1e999",
        "1e1000000000",
        "1e99999999999999999999",
        "1e-99999999999999999999",
        "1" * 5000,
        "9" * 100_000,
        "0." + "1" * 100_000,
        "1e-1000000000",
    ],
)
def test_absurd_numbers_are_refused_at_once(shop, number):
    answer = shop(
        "POST", "/products/", f'{{"name": "x", "price": {number}, "stock": {number}}}'.encode()
    )
    assert list(errors_of(answer)) == ["#/price", "#/stock"]


def test_every_fault_is_told_at_once(shop):
    answer = shop("POST", "/products/", {"price": "1", "stock": -1, "colour": "red", "a/b~c d": 1})
    assert errors_of(answer) == {
        "#/name": "name is required.",
        "#/price": "price must be a number.",
        "#/stock": "stock must be 0 to 1000000000.",
        "#/colour": "colour is an unknown field; allowed: name, description, price, stock.",
        "#/a~1b~0c%20d": "a/b~c d is an unknown field; allowed: name, description, price, stock.",
    }


@pytest.mark.parametrize(
    "body, detail",
    [
        (b"", "JSON"),
        (b"{", "JSON"),
        (b"nonsense", "JSON"),
        (b'{"name": NaN}', "NaN"),
        (b'{"name": -Infinity}', "Infinity"),
        (b'{"name": "\xff"}', "UTF-8"),
        ('{"name": "x"}'.encode("utf-16"), "UTF-8"),
        (b"\xef\xbb\xbf{}", "JSON"),
        (b'{"name": "a", "name": "b", "price": 1}', "duplicate"),
        (b"[" * 100_000, "nested"),
        (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "nested"),
        (b'{"name": "a\nb"}', "JSON"),
        (b"{} {}", "JSON"),
    ],
)
def test_a_body_that_is_no_json_is_a_400(shop, body, detail):
    answer = shop("POST", "/products/", body)
    assert answer.status_int == 400 and detail in answer.json["detail"]


@pytest.mark.parametrize("body", [[], "x", 5, None, True])
def test_a_body_that_is_no_object_is_told_so(shop, body):
    assert errors_of(shop("POST", "/products/", json.dumps(body).encode())) == {
        "#": "The body must be an object."
    }


@pytest.mark.parametrize(
    "kind",
    [
        None,
        "text/plain",
        "application/x-www-form-urlencoded",
        "application/json; charset=latin-1",
        "application/jsonp",
        "application/merge-patch+json",
    ],
)
def test_a_body_not_declared_as_json_is_a_415_that_helps_a_curl_user(shop, kind):
    answer = shop(
        "POST",
        "/products/",
        b'{"name": "x", "price": 1}',
        {"Content-Type": kind} if kind else {"Content-Type": ""},
    )
    assert answer.status_int == 415 and answer.headers["Accept"] == "application/json"
    assert "-H 'Content-Type: application/json'" in answer.json["detail"]


@pytest.mark.parametrize(
    "kind",
    ["application/json", "Application/JSON; charset=UTF-8", 'application/json;charset="utf-8"'],
)
def test_json_may_be_declared_in_any_of_its_spellings(shop, kind):
    assert (
        shop("POST", "/products/", b'{"name": "x", "price": 1}', {"Content-Type": kind}).status_int
        == 201
    )


def test_a_body_over_one_mebibyte_is_a_413_and_one_of_just_that_is_read(shop):
    body = b'{"name": "x", "price": 1}'
    assert shop("POST", "/products/", body.ljust(1 << 20)).status_int == 201
    assert shop("POST", "/products/", body.ljust((1 << 20) + 1)).status_int == 413


def test_ids_are_never_given_twice(shop, mug):
    shop("DELETE", "/products/1/")
    assert shop.product()["id"] == 2


def test_products_are_found_by_text_ignoring_case_and_by_stock(shop):
    for name, description, stock in [
        ("Müg", "", 1),
        ("Tea", "for a MÜG", 0),
        ("100%_", "", 0),
        ("Straße", "x\ny", 3),
    ]:
        shop.product(name=name, description=description, stock=stock)

    def found(query):
        return [product["id"] for product in shop("GET", "/products/?" + query).json["products"]]

    assert (
        found("q=m%C3%BCG") == [1, 2]
        and found("q=%25_") == [3]
        and found("q=STRASSE") == [4]
        and found("q=nope") == []
    )
    assert (
        found("q=") == [1, 2, 3, 4] and found("q=x%0Ay") == [4] and found("q=" + "z" * 2000) == []
    )
    assert found("available=true") == [1, 4] and found("available=false") == [2, 3]
    assert (
        found("available=false&q=m%C3%9CG") == [2]
        and found("after=2") == [3, 4]
        and found("limit=1&after=0") == [1]
    )


def test_pages_follow_one_another_by_next_and_link_and_none_is_empty(shop):
    for number in range(7):
        shop.product(stock=number % 2, name=f"Ö & {number}")
    path, seen, pages = "/products/?q=%C3%96+%26&available=true&limit=1", [], 0
    while path:
        page = shop("GET", path)
        seen += [product["id"] for product in page.json["products"]]
        path, pages = page.json["next"], pages + 1
        assert page.headers.get("Link") == (f'<{path}>; rel="next"' if path else None)
    assert seen == [2, 4, 6] and pages == 3
    assert shop("GET", "/products/?limit=7").json["next"] is None


@pytest.mark.parametrize(
    "query, name",
    [
        ("limit=0", "limit"),
        ("limit=1001", "limit"),
        ("limit=", "limit"),
        ("limit=1_0", "limit"),
        ("limit=%205", "limit"),
        ("limit=%2B5", "limit"),
        ("limit=%D9%A3", "limit"),
        ("limit=1.0", "limit"),
        ("limit=-1", "limit"),
        ("after=-1", "after"),
        ("after=" + "9" * 20, "after"),
        ("after=" + "9" * 5000, "after"),
        ("after=x", "after"),
        ("available=yes", "available"),
        ("available=True", "available"),
        ("available=", "available"),
        ("q=%00", "q"),
        ("q=%FF", "q"),
        ("q=%ED%A0%80", "q"),
        ("colour=red", "colour"),
        ("Q=x", "Q"),
        ("limit=1&limit=2", "limit"),
        ("%FF=1", "?"),
    ],
)
def test_a_query_parameter_that_breaks_its_rule_is_named(shop, query, name):
    answer = shop("GET", "/products/?" + query)
    assert list(errors_of(answer)) == [name] and "parameter" in answer.json["errors"][0]


@pytest.mark.parametrize("path", ["/", "/healthz", "/openapi.json", "/products/1/", "/orders/1/"])
def test_an_unknown_query_parameter_is_refused_everywhere(shop, mug, path):
    shop.order((1, 1))
    assert "x" in errors_of(shop("GET", path + "?x=1"))
    assert "x" in errors_of(
        shop("POST", "/orders/?x=1", {"products": [{"product_id": 1, "quantity": 1}]})
    )


@pytest.mark.parametrize(
    "number",
    [
        "0",
        "7",
        "abc",
        "%ff1",
        "1%ff",
        "99999999999999999999",
        "9223372036854775808",
        "-1",
        "+1",
        "1_0",
        "%201",
        "%D9%A3",
        "1.0",
        "1%00",
        "1%0A",
        "%F0%9F%98%80",
    ],
)
@pytest.mark.parametrize(
    "method, path",
    [
        ("GET", "/products/{}/"),
        ("PATCH", "/products/{}/"),
        ("DELETE", "/products/{}"),
        ("POST", "/products/{}/stock/"),
        ("GET", "/orders/{}"),
        ("PATCH", "/orders/{}/"),
    ],
)
def test_an_id_that_does_not_exist_is_a_404(shop, mug, method, path, number):
    body = {
        "PATCH": {"status": "completed"} if "orders" in path else {"stock": 1},
        "POST": {"change": 1},
    }.get(method)
    assert shop(method, path.format(number), body).status_int == 404


def test_every_path_works_without_its_last_slash_for_every_method(shop):
    assert shop("POST", "/products", {"name": "x", "price": 1, "stock": 5}).status_int == 201
    assert shop("GET", "/products").json == shop("GET", "/products/").json
    assert shop("PATCH", "/products/1", {"price": 2}).json["price"] == 2
    assert shop("POST", "/products/1/stock", {"change": 1}).json["stock"] == 6
    assert (
        shop("POST", "/orders", {"products": [{"product_id": 1, "quantity": 1}]}).status_int == 201
    )
    assert (
        shop("GET", "/orders/1").json["id"] == 1
        and shop("PATCH", "/orders/1", {"status": "completed"}).status_int == 200
    )
    assert shop("DELETE", "/products/1").status_int == 204
    for path in (
        "/product",
        "/products//",
        "/products/1/2/",
        "/orders/1/stock/",
        "//",
        "/products/1/stock/x",
    ):
        assert shop("GET", path).status_int == 404, path


def test_a_change_touches_only_what_it_gives(shop, mug):
    changed = shop("PATCH", "/products/1/", {"price": 12.5})
    assert (
        changed.status_int == 200
        and changed.json == {**mug, "price": 12.5} == shop("GET", "/products/1/").json
    )
    assert shop("PATCH", "/products/1/", {"stock": 0, "name": "Cup", "description": "d"}).json == {
        "id": 1,
        "name": "Cup",
        "description": "d",
        "price": 12.5,
        "stock": 0,
    }
    assert (
        shop(
            "PATCH", "/products/1/", {"stock": 3}, {"Content-Type": "application/merge-patch+json"}
        ).json["stock"]
        == 3
    )
    assert list(errors_of(shop("PATCH", "/products/1/", {}))) == ["#"]
    assert list(errors_of(shop("PATCH", "/products/1/", {"name": None, "id": 2}))) == [
        "#/id",
        "#/name",
    ]


def test_if_match_guards_every_change_of_a_product_and_an_order(shop, mug):
    shop.order((1, 1))
    for path, method, body, then in [
        ("/products/1/", "PATCH", {"price": 2}, 200),
        ("/products/1/stock/", "POST", {"change": 1}, 200),
        ("/orders/1/", "PATCH", {"status": "completed"}, 200),
        ("/products/1/", "DELETE", None, 204),
    ]:
        tag = shop("GET", path.replace("stock/", "")).headers["ETag"]
        assert re.fullmatch('"[!#-~]+"', tag)
        for other in '"other"', "W/" + tag, "nonsense", "", '"a", "b"':
            assert shop(method, path, body, {"If-Match": other}).status_int == 412, (path, other)
        assert shop(method, path, body, {"If-Match": f'"other", {tag}'}).status_int == then
    assert shop("PATCH", "/products/1/", {"price": 2}, {"If-Match": "*"}).status_int == 404
    assert shop("PATCH", "/orders/1/", {"status": "completed"}, {"If-Match": "*"}).status_int == 200


def test_the_tag_of_a_change_is_the_one_of_the_next_read(shop, mug):
    shop.order((1, 1))
    for path, body in ("/products/1/", {"price": 3}), ("/orders/1/", {"status": "completed"}):
        assert shop("PATCH", path, body).headers["ETag"] == shop("GET", path).headers["ETag"]


def test_stock_is_added_to_and_taken_from(shop, mug):
    assert shop("POST", "/products/1/stock/", {"change": 7}).json == {**mug, "stock": 12}
    assert shop("POST", "/products/1/stock/", {"change": -12}).json == {**mug, "stock": 0}
    short = shop("POST", "/products/1/stock/", {"change": -3})
    assert short.status_int == 409 and short.json["type"] == "urn:problem-type:insufficient-stock"
    assert short.json["shortages"] == [{"product_id": 1, "requested": 3, "available": 0}]
    shop("PATCH", "/products/1/", {"stock": 999_999_999})
    assert list(errors_of(shop("POST", "/products/1/stock/", {"change": 2}))) == ["#/change"]
    assert shop.stock(mug) == 999_999_999
    for change in (1.5, "1", None, True, 10**10):
        assert list(errors_of(shop("POST", "/products/1/stock/", {"change": change}))) == [
            "#/change"
        ]


def test_a_read_is_answered_304_as_long_as_nothing_has_changed(shop, mug):
    for path in "/orders/1/", "/products/", "/products/1/", "/products/?limit=1", "/orders/":
        shop("PATCH", "/products/1/", {"stock": 10})
        shop.order((1, 1))
        read = shop("GET", path)
        tag = read.headers["ETag"]
        assert read.headers["Cache-Control"] == "no-cache"
        for tags in tag, "W/" + tag, '"x", ' + tag, "*":
            again = shop("GET", path, None, {"If-None-Match": tags})
            assert again.status_int == 304 and again.body == b"" and again.headers["ETag"] == tag
        assert shop("GET", path, None, {"If-None-Match": '"x"', "If-Match": tag}).status_int == 200
        assert shop("GET", path, None, {"If-Match": '"x"'}).status_int == 412
        shop.order((1, 1))
        shop("PATCH", "/orders/1/", {"status": "cancelled"})
        fresh = shop("GET", path, None, {"If-None-Match": tag})
        assert fresh.status_int == 200 and fresh.headers["ETag"] != tag


def test_a_kept_answer_never_outlives_a_change(shop, mug, url):
    other = Client(shop_module.create_app(url))  # as another process would
    for price in range(1, 30):
        (other if price % 2 else shop)("PATCH", "/products/1/", {"price": price})
        assert (
            shop("GET", "/products/1/").json["price"]
            == shop("GET", "/products/").json["products"][0]["price"]
            == price
        )
    other.app.app.store.close()


# --------------------------------------------------------------------------------------------------- every path


@pytest.mark.parametrize(
    "path, methods",
    [
        ("/", "GET HEAD"),
        ("/healthz", "GET HEAD"),
        ("/openapi.json", "GET HEAD"),
        ("/products/", "GET HEAD POST"),
        ("/products/1/", "DELETE GET HEAD PATCH"),
        ("/products/1/stock", "POST"),
        ("/orders/", "GET HEAD POST"),
        ("/orders/1/", "GET HEAD PATCH"),
    ],
)
def test_the_methods_of_a_path_are_told_and_the_others_refused(shop, mug, path, methods):
    allow = ", ".join(sorted([*methods.split(), "OPTIONS"]))
    options = shop("OPTIONS", path)
    assert options.status_int == 204 and options.headers["Allow"] == allow and options.body == b""
    for method in {"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "TRACE", "BREW"} - set(
        methods.split()
    ):
        refused = shop(method, path)
        assert refused.status_int == 405 and refused.headers["Allow"] == allow


def test_head_answers_with_the_headers_of_get(shop, mug):
    shop.order((1, 1))
    for path in (
        "/",
        "/healthz",
        "/openapi.json",
        "/products/",
        "/products/?limit=1",
        "/products/1/",
        "/orders/",
        "/orders/1/",
        "/products/9/",
        "/nowhere/",
    ):
        get, head = shop("GET", path), shop("HEAD", path)
        assert (head.status, head.headerlist, head.body) == (get.status, get.headerlist, b"")


def test_headers_are_spelled_as_everybody_spells_them(url):
    app = shop_module.create_app(url, "secret")
    shop = Client(app)
    assert "ETag" in dict(shop("GET", "/products/").headerlist) and "WWW-Authenticate" in dict(
        shop("GET", "/orders/").headerlist
    )
    app.store.close()


def test_the_index_names_paths_that_exist_and_health_is_ok(shop):
    index = shop("GET", "/").json
    assert set(index.values()) == {"/products/", "/orders/", "/healthz", "/openapi.json"}
    assert all(shop("GET", path).status_int == 200 for path in index.values())
    assert shop("GET", "/healthz").json == {"status": "ok"}


def test_urls_carry_the_mount_point(url):
    app = shop_module.create_app(url)
    parent = bottle.Bottle()
    parent.mount("/a/b/", app)
    client = Client(parent)
    made = client("POST", "/a/b/products/", {"name": "x", "price": 1, "stock": 9})
    client("POST", "/a/b/products", {"name": "y", "price": 1})
    assert made.headers["Location"] == "/a/b/products/1/"
    assert (
        client.app.post_json(
            "/a/b/orders/", {"products": [{"product_id": 1, "quantity": 1}]}
        ).headers["Location"]
        == "/a/b/orders/1/"
    )
    page = client("GET", "/a/b/products/?limit=1")
    assert (
        page.json["next"] == "/a/b/products/?limit=1&after=1" and "</a/b/" in page.headers["Link"]
    )
    assert client("GET", "/a/b/").json["orders"] == "/a/b/orders/"
    assert client("GET", "/a/b/openapi.json").json["servers"] == [{"url": "/a/b"}]
    assert client("GET", "/a/b/products/%E6%97%A5/").status_int == 404
    app.store.close()


def test_two_shops_in_one_process_do_not_touch_each_other(shop, tmp_path):
    other = Client(shop_module.create_app(f"sqlite:///{tmp_path}/other.sqlite3", "secret"))
    shop.product()
    assert (
        other("GET", "/products/").json["products"] == []
        and other("GET", "/orders/").status_int == 401
    )
    assert shop("GET", "/orders/").status_int == 200
    other.app.app.store.close()


def test_a_fault_of_ours_is_a_500_that_tells_nothing(shop, mug, url):
    with sqlite3.connect(url[10:]) as con:
        con.execute("ALTER TABLE product RENAME TO secret_name")
    con.close()
    answer = shop("GET", "/products/")
    assert (
        answer.status_int == 500
        and "secret" not in answer.text
        and "no such table" not in answer.text
    )
    assert "Traceback" in answer.errors
    assert shop("GET", "/healthz").status_int == 503
    assert shop.order((1, 1)).status_int == 500 and shop("GET", "/openapi.json").status_int == 200


def test_importing_the_shop_has_no_effects(tmp_path):
    subprocess.run(
        [sys.executable, "-c", "import shop, db"],
        cwd=tmp_path,
        check=True,
        env={"PYTHONPATH": str(HERE)},
    )
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------------------------------------------------- orders


def test_an_order_takes_the_stock_and_copies_name_and_price(shop, mug):
    tea = shop.product(name="Tea", price=4.99, stock=1)
    placed = shop.order((tea["id"], 1), (mug["id"], 2))
    assert placed.status_int == 201 and placed.headers["Location"] == "/orders/1/"
    assert (
        abs(
            time.time()
            - time.mktime(time.strptime(placed.json["created_at"], "%Y-%m-%dT%H:%M:%SZ"))
            + time.timezone
        )
        < 60
    )
    assert placed.json == {
        "id": 1,
        "status": "pending",
        "total_price": 24.97,
        "created_at": placed.json["created_at"],
        "products": [
            {"product_id": 2, "name": "Tea", "price": 4.99, "quantity": 1},
            {"product_id": 1, "name": "Mug", "price": 9.99, "quantity": 2},
        ],
    }
    assert (shop.stock(mug), shop.stock(tea)) == (3, 0)
    shop("PATCH", "/products/1/", {"name": "Cup", "price": 1})
    shop("DELETE", "/products/2/")
    assert (
        shop("GET", "/orders/1/").json == placed.json == shop("GET", "/orders/").json["orders"][0]
    )


def test_an_order_that_is_short_of_anything_changes_nothing(shop, mug):
    tea, jam = shop.product(name="Tea", stock=1), shop.product(name="Jam", stock=50)
    short = shop.order((mug["id"], 6), (jam["id"], 50), (tea["id"], 2))
    assert short.status_int == 409 and short.json["title"] == "Insufficient stock"
    assert short.json["shortages"] == [
        {"product_id": 1, "requested": 6, "available": 5},
        {"product_id": 2, "requested": 2, "available": 1},
    ]
    assert short.json["detail"].startswith("Product 1 has 5 left, 6 were asked for.")
    assert [shop.stock(product) for product in (mug, tea, jam)] == [5, 1, 50]
    assert shop("GET", "/orders/").json == {"orders": [], "next": None}


def test_an_unknown_product_is_told_by_a_pointer_to_the_line(shop, mug):
    answer = shop.order((mug["id"], 1), (77, 1), (10**17, 1))
    assert list(errors_of(answer)) == ["#/products/1", "#/products/2"] and shop.stock(mug) == 5


@pytest.mark.parametrize(
    "body, pointers",
    [
        ({}, ["#/products"]),
        ({"products": []}, ["#/products"]),
        ({"products": {}}, ["#/products"]),
        ({"products": [1]}, ["#/products/0"]),
        ({"products": [{}]}, ["#/products/0/product_id", "#/products/0/quantity"]),
        ({"products": [{"product_id": 1, "quantity": 1}] * 2}, ["#/products/1"]),
        (
            {"products": [{"product_id": 1, "quantity": 1}, {"product_id": 1, "quantity": 0}]},
            ["#/products/1/quantity", "#/products/1"],
        ),
        ({"products": [{"product_id": n, "quantity": 1} for n in range(1, 102)]}, ["#/products"]),
        (
            {"products": [{"product_id": 0, "quantity": 0}]},
            ["#/products/0/product_id", "#/products/0/quantity"],
        ),
        ({"products": [{"product_id": 1, "quantity": 100_001}]}, ["#/products/0/quantity"]),
        (
            {"products": [{"product_id": True, "quantity": "2"}]},
            ["#/products/0/product_id", "#/products/0/quantity"],
        ),
        (
            {"products": [{"product_id": 1, "quantity": 1.5, "price": 1}]},
            ["#/products/0/price", "#/products/0/quantity"],
        ),
        (
            {"products": [{"product_id": 10**20, "quantity": 1}], "total": 5},
            ["#/total", "#/products/0/product_id"],
        ),
    ],
)
def test_an_order_that_breaks_a_rule_is_told_where(shop, mug, body, pointers):
    assert list(errors_of(shop("POST", "/orders/", body))) == pointers and shop.stock(mug) == 5


def test_a_total_is_exact_to_the_cent(shop):
    prices = [random.Random(1).randrange(0, 100_000_001) for _ in range(99)] + [100_000_000]
    for cents in prices:
        shop(
            "POST",
            "/products/",
            f'{{"name": "x", "price": {Decimal(cents) / 100}, "stock": 1000000}}'.encode(),
        )
    quantities = [random.Random(2).randrange(1, 100_001) for _ in range(99)] + [100_000]
    placed = shop.order(*enumerate(quantities, 1))
    exact = json.loads(placed.text, parse_float=Decimal)
    assert exact["total_price"] == Decimal(sum(map(int.__mul__, prices, quantities))) / 100
    assert [line["price"] for line in exact["products"]] == [
        Decimal(cents) / 100 for cents in prices
    ]
    listed = json.loads(shop("GET", "/products/").text, parse_float=Decimal)
    assert [product["price"] for product in listed["products"]] == [
        Decimal(cents) / 100 for cents in prices
    ]


def test_the_greatest_order_there_can_be_has_an_exact_total(shop):
    for _ in range(100):
        shop.product(price=1_000_000, stock=100_000)
    assert (
        shop.order(*((number, 100_000) for number in range(1, 101))).json["total_price"] == 10**13
    )


def test_orders_are_paged_filtered_and_polled(shop):
    shop.product(stock=1000)
    assert shop("GET", "/orders/").json == {"orders": [], "next": None}
    for _ in range(105):
        shop.order((1, 1))
    for number in 2, 3, 5:
        shop("PATCH", f"/orders/{number}/", {"status": "completed"})

    def listed(query):
        page = shop("GET", "/orders/" + query)
        assert (
            f'<{page.json["next"]}>; rel="next"' if page.json["next"] else None
        ) == page.headers.get("Link")
        return [order["id"] for order in page.json["orders"]], page.json["next"]

    assert listed("") == (list(range(1, 101)), "/orders/?after=100")
    assert listed("?after=100") == (list(range(101, 106)), None) and listed("?after=105") == (
        [],
        None,
    )
    assert (
        listed("?limit=1000") == (list(range(1, 106)), None)
        and listed("?after=0&limit=105")[1] is None
    )
    assert listed("?status=completed&limit=2") == (
        [2, 3],
        "/orders/?status=completed&limit=2&after=3",
    )
    assert listed("?status=completed&limit=2&after=3") == ([5], None) and listed(
        "?status=cancelled"
    ) == ([], None)
    for query, name in [
        ("limit=1001", "limit"),
        ("status=lost", "status"),
        ("status=", "status"),
        ("q=x", "q"),
    ]:
        assert list(errors_of(shop("GET", "/orders/?" + query))) == [name]


def test_cancelling_puts_the_stock_back_exactly_once(shop, mug):
    shop.order((1, 4))
    for _ in range(3):
        cancelled = shop("PATCH", "/orders/1/", {"status": "cancelled"})
        assert (
            cancelled.status_int == 200
            and cancelled.json["status"] == "cancelled"
            and shop.stock(mug) == 5
        )
    refused = shop("PATCH", "/orders/1/", {"status": "completed"})
    assert (
        refused.status_int == 409 and refused.json["type"] == "urn:problem-type:invalid-transition"
    )


def test_a_completed_order_stays_completed(shop, mug):
    shop.order((1, 4))
    assert [
        shop("PATCH", "/orders/1/", {"status": status}).status_int
        for status in ("completed", "completed", "cancelled")
    ] == [200, 200, 409]
    assert shop.stock(mug) == 1 and shop("GET", "/orders/1/").json["status"] == "completed"
    for body in {"status": "shipped"}, {"status": 5}, {}, {"status": "completed", "total_price": 0}:
        assert errors_of(shop("PATCH", "/orders/1/", body))


def test_neither_a_deleted_product_nor_a_full_stock_blocks_a_cancel(shop):
    _, full, normal = shop.product(), shop.product(), shop.product()
    shop.order((1, 2), (2, 2), (3, 2))
    shop("DELETE", "/products/1/")
    shop("PATCH", "/products/2/", {"stock": 999_999_999})
    assert shop("PATCH", "/orders/1/", {"status": "cancelled"}).status_int == 200
    assert (shop.stock(full), shop.stock(normal)) == (10**9, 5)


# ----------------------------------------------------------------------------------------------------- idempotency


def test_a_repeat_gets_the_first_answer_and_does_nothing(shop, mug):
    for path, body in [
        ("/orders/", {"products": [{"product_id": 1, "quantity": 1}]}),
        ("/products/", {"name": "x", "price": 1}),
        ("/products/1/stock/", {"change": 1}),
    ]:
        first = shop("POST", path, body, {"Idempotency-Key": "key" + path})
        before = shop("GET", "/products/").json
        again = shop("POST", path.rstrip("/"), body, {"Idempotency-Key": f'"key{path}"'})
        assert (again.status, again.body, again.headers.get("Location")) == (
            first.status,
            first.body,
            first.headers.get("Location"),
        )
        assert (
            "Idempotent-Replayed" not in first.headers
            and again.headers["Idempotent-Replayed"] == "true"
        )
        assert shop("GET", "/products/").json == before


def test_a_key_with_another_request_is_refused(shop, mug):
    body = {"products": [{"product_id": 1, "quantity": 1}]}
    shop("POST", "/orders/", body, {"Idempotency-Key": "k"})
    for path, other in [
        ("/orders/", {"products": [{"product_id": 1, "quantity": 2}]}),
        ("/products/", {"name": "x", "price": 1}),
    ]:
        refused = shop("POST", path, other, {"Idempotency-Key": "k"})
        assert (
            refused.status_int == 422
            and refused.json["type"] == "urn:problem-type:idempotency-key-reused"
        )
    assert shop.stock(mug) == 4


def test_a_refused_request_may_be_tried_again_with_its_key(shop, mug):
    body = {"products": [{"product_id": 1, "quantity": 6}]}
    assert shop("POST", "/orders/", body, {"Idempotency-Key": "k"}).status_int == 409
    shop("POST", "/products/1/stock/", {"change": 1})
    placed = shop("POST", "/orders/", body, {"Idempotency-Key": "k"})
    assert placed.status_int == 201 and "Idempotent-Replayed" not in placed.headers


@pytest.mark.parametrize(
    "key, good",
    [
        ("", 0),
        ('""', 0),
        ("a b", 0),
        ("a\tb", 0),
        ("é", 0),
        ("x" * 256, 0),
        ('"abc', 0),
        ('abc"def', 1),
        ('"a"b"', 0),
        ('"a\\b"', 0),
        ("x" * 255, 1),
        ('"' + "y" * 255 + '"', 1),
        ('"' + "y" * 256 + '"', 0),
        ('"a\\"b"', 1),
        ("!#$%&'*+-.^_`|~:;<>()", 1),
        ('"', 0),
    ],
)
def test_a_key_is_1_to_255_visible_ascii_characters_bare_or_quoted(shop, mug, key, good):
    assert shop.order((1, 1), **{"Idempotency-Key": key}).status_int == (201 if good else 400)


def test_keys_live_a_day_and_are_then_purged(shop, mug, url):
    for key in "old", "young":
        shop.order((1, 1), **{"Idempotency-Key": key})
    with sqlite3.connect(url[10:]) as con:
        for key, hours in ("old", 24.1), ("young", 23.9):
            con.execute(
                "UPDATE idempotency_key SET created_at = ? WHERE key = ?",
                (db.timestamp(int(hours * 3600)), key),
            )
    assert shop.order((1, 1), **{"Idempotency-Key": "new"}).status_int == 201
    assert [key for (key,) in con.execute("SELECT key FROM idempotency_key ORDER BY key")] == [
        "new",
        "young",
    ]
    con.close()
    assert (
        shop.order((1, 1), **{"Idempotency-Key": "young"}).headers["Idempotent-Replayed"] == "true"
    )
    assert "Idempotent-Replayed" not in shop.order((1, 1), **{"Idempotency-Key": "old"}).headers


# ---------------------------------------------------------------------------------------------------------- access


def test_with_a_token_set_only_reading_products_and_ordering_stay_open(url):
    app = shop_module.create_app(url, "s3cret~token")
    shop = Client(app)
    key = {"Authorization": "Bearer s3cret~token"}
    assert shop("POST", "/products/", {"name": "x", "price": 1, "stock": 9}, key).status_int == 201
    for method, path, body in [
        ("GET", "/", None),
        ("GET", "/healthz", None),
        ("GET", "/openapi.json", None),
        ("GET", "/products/", None),
        ("HEAD", "/products/1", None),
        ("POST", "/orders/", {"products": [{"product_id": 1, "quantity": 1}]}),
    ]:
        assert shop(method, path, body).status_int in (200, 201)
    for method, path, body in [
        ("POST", "/products/", {"name": "x", "price": 1}),
        ("PATCH", "/products/1/", {"price": 2}),
        ("DELETE", "/products/1/", None),
        ("POST", "/products/1/stock/", {"change": 1}),
        ("GET", "/orders/", None),
        ("GET", "/orders/1/", None),
        ("GET", "/orders/99/", None),
        ("PATCH", "/orders/1/", {"status": "completed"}),
        ("POST", "/products/", b"{"),
    ]:
        for wrong in (
            {},
            {"Authorization": "Bearer other"},
            {"Authorization": "s3cret~token"},
            {"Authorization": "Bearer "},
            {"Authorization": "Basic s3cret~token"},
            {"Authorization": "Bearer s3cret~tokenx"},
            {"Authorization": "Bearer é"},
        ):
            refused = shop(method, path, body, wrong)
            assert refused.status_int == 401 and refused.headers["WWW-Authenticate"] == "Bearer"
            assert "s3cret" not in refused.text
        assert shop(method, path, body, {"Authorization": "bearer s3cret~token"}).status_int != 401
    app.store.close()


# ---------------------------------------------------------------------------------------------------------- races


def test_fifty_pieces_make_fifty_sales_to_sixty_four_threads(shop):
    mug = shop.product(stock=50)
    answers = at_once(64, lambda n: Client(shop.app.app).order((mug["id"], 1)).status_int)
    assert (answers.count(201), answers.count(409), shop.stock(mug)) == (50, 14, 0)


def test_orders_of_the_same_products_in_opposite_order_never_block_each_other(shop):
    for _ in range(4):
        shop.product(stock=1000)
    lines = [(number, 3) for number in range(1, 5)]
    answers = at_once(
        16,
        lambda n: [
            Client(shop.app.app).order(*lines[:: 1 if n % 2 else -1]).status_int for _ in range(8)
        ],
    )
    assert sum(answers, []) == [201] * 128
    assert [shop.stock({"id": number}) for number in range(1, 5)] == [1000 - 128 * 3] * 4


def test_forty_equal_requests_with_one_key_make_one_order_and_forty_equal_answers(shop, mug):
    answers = at_once(40, lambda n: Client(shop.app.app).order((1, 1), **{"Idempotency-Key": "k"}))
    assert {(answer.status_int, answer.body) for answer in answers} == {(201, answers[0].body)}
    assert sum("Idempotent-Replayed" not in answer.headers for answer in answers) == 1
    assert shop.stock(mug) == 4 and len(shop("GET", "/orders/").json["orders"]) == 1


def test_many_cancels_of_one_order_put_the_stock_back_once(shop, mug):
    shop.order((1, 3))
    answers = at_once(
        16,
        lambda n: Client(shop.app.app)(
            "PATCH", "/orders/1/", {"status": "cancelled" if n % 2 else "completed"}
        ).json.get("status"),
    )
    order = shop("GET", "/orders/1/").json["status"]
    assert set(answers) <= {order, 409} and shop.stock(mug) == (5 if order == "cancelled" else 2)


def test_changes_guarded_by_one_tag_have_one_winner(shop, mug):
    tag = shop("GET", "/products/1/").headers["ETag"]
    answers = at_once(
        16,
        lambda n: (
            Client(shop.app.app)(
                "PATCH", "/products/1/", {"price": n + 20}, {"If-Match": tag}
            ).status_int
        ),
    )
    assert (answers.count(200), answers.count(412)) == (1, 15)


def test_stock_is_conserved_through_a_mixed_run(shop, url):
    for _ in range(5):
        shop.product(stock=200)
    added = [0] * 6

    def work(n):
        client, dice = Client(shop.app.app), random.Random(n)
        for _ in range(25):
            product, other, amount = dice.randint(1, 5), dice.randint(1, 5), dice.randint(1, 9)
            match dice.randrange(4):
                case 0 if (
                    client("POST", f"/products/{product}/stock/", {"change": amount}).status_int
                    == 200
                ):
                    added[product] += amount
                case 1 if (
                    client("POST", f"/products/{product}/stock/", {"change": -amount}).status_int
                    == 200
                ):
                    added[product] -= amount
                case 2:
                    client(
                        "PATCH",
                        f"/orders/{dice.randint(1, 60)}/",
                        {"status": dice.choice(["cancelled", "completed"])},
                    )
                case _:
                    client.order(*{product: amount, other: amount}.items())

    at_once(1, work) and at_once(1, work)  # added[] is counted without a lock
    at_once(
        8,
        lambda n: [
            Client(shop.app.app).order((1 + n % 5, 2), (1 + (n + 1) % 5, 1)) for _ in range(10)
        ],
    )
    sold = [0] * 6
    for order in shop("GET", "/orders/?limit=1000").json["orders"]:
        for line in order["products"] if order["status"] != "cancelled" else []:
            sold[line["product_id"]] += line["quantity"]
    for number in range(1, 6):
        assert shop.stock({"id": number}) == 200 + added[number] - sold[number]
    assert db.check_integrity(url[10:]) == []


# ------------------------------------------------------------------------------------------------ the real process


class Server:
    """A `python shop.py` on a port of its own."""

    def __init__(self, folder, **settings):
        self.folder, self.settings = folder, settings

    def run(self, *arguments, **more):
        """Run it to its end."""
        return subprocess.run(
            [sys.executable, HERE / "shop.py", *arguments],
            cwd=self.folder,
            env=self.environment(),
            capture_output=True,
            text=True,
            timeout=30,
            **more,
        )

    def environment(self):
        return {
            "PATH": os.environ["PATH"],
            "PORT": "0",
            "DATABASE_URL": "sqlite:///db.sqlite3",
        } | self.settings

    def start(self, program=None):
        command = ["-c", program] if program else [HERE / "shop.py"]
        self.errors = open(self.folder / "stderr", "a+")
        self.process = subprocess.Popen(
            [sys.executable, *command],
            cwd=self.folder,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
            stderr=self.errors,
            env=self.environment() | {"PYTHONPATH": str(HERE)},
        )
        line = self.process.stdout.readline()
        assert line.startswith("Serving http://"), (line, (self.folder / "stderr").read_text())
        self.port = int(re.search(r":(\d+)/ from ", line)[1])
        self.log = [line]
        self.reader = threading.Thread(
            target=lambda: self.log.extend(self.process.stdout), daemon=True
        )
        self.reader.start()
        return self

    def end(self, number=signal.SIGTERM):
        """Send a signal; returns the exit status and the seconds that it took."""
        began = time.monotonic()
        self.process.send_signal(number)
        status = self.process.wait(20)
        self.reader.join(5)
        self.errors.close()
        self.process.stdout.close()
        return status, time.monotonic() - began

    def connect(self, **options):
        connection = socket.create_connection(("127.0.0.1", self.port), 10)
        for name, value in options.items():
            connection.setsockopt(socket.SOL_SOCKET, getattr(socket, name), value)
        return connection

    def send(self, *parts, half_close=False):
        """Send bytes on a new connection and return every answer, until the server closes or is silent."""
        with self.connect() as connection:
            for part in parts:
                connection.sendall(part)
            if half_close:
                connection.shutdown(socket.SHUT_WR)
            return read_answers(connection)

    def __call__(self, method, path, body=None, **headers):
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        try:
            data = json.dumps(body) if body is not None else None
            connection.request(method, path, data, {"Content-Type": "application/json", **headers})
            answer = connection.getresponse()
            text = answer.read()
            return answer.status, json.loads(text) if text else None, answer.headers
        finally:
            connection.close()

    def order(self, product=1, quantity=1, **headers):
        return self(
            "POST",
            "/orders/",
            {"products": [{"product_id": product, "quantity": quantity}]},
            **headers,
        )

    def tracebacks(self):
        return (self.folder / "stderr").read_text()


def read_answers(connection):
    """Each answer as (status, headers, body); reads on until the connection is closed or half a second of silence."""
    data, found = b"", []
    connection.settimeout(0.5)
    try:
        while part := connection.recv(1 << 16):
            data += part
    except (TimeoutError, ConnectionResetError) as error:
        found += [] if isinstance(error, TimeoutError) else ["reset"]
    while data:
        head, _, data = data.partition(b"\r\n\r\n")
        first, *lines = head.decode().split("\r\n")
        headers = {name.lower(): value for name, value in (line.split(": ", 1) for line in lines)}
        length = int(headers.get("content-length", 0))
        found.append((int(first.split()[1]), headers, data[:length]))
        data = data[length:]
    return found


@pytest.fixture
def server(tmp_path):
    server = Server(tmp_path).start()
    yield server
    if server.process.poll() is None:
        assert server.end()[0] == 0
    assert server.tracebacks() == ""


def test_a_catalogue_is_filled_sold_by_thirty_buyers_killed_and_nothing_is_lost(tmp_path):
    server = Server(tmp_path).start()
    for _ in range(2):
        connection = http.client.HTTPConnection("127.0.0.1", server.port)
        for number in range(500):
            connection.request(
                "POST",
                "/products/",
                json.dumps({"name": f"P{number}", "price": 1.25, "stock": 1000}),
                JSON,
            )
            answer = connection.getresponse()
            answer.read()
            assert answer.status == 201
        connection.close()
    placed, stop = [], threading.Event()

    def buy(n):
        connection, dice = (
            http.client.HTTPConnection("127.0.0.1", server.port, timeout=10),
            random.Random(n),
        )
        for number in range(10**6):
            body = json.dumps(
                {
                    "products": [
                        {"product_id": product, "quantity": dice.randint(1, 3)}
                        for product in dice.sample(range(1, 1001), 3)
                    ]
                }
            )
            key = f"{n}-{number}"
            placed.append([key, body, None])
            mine = placed[-1]
            try:
                connection.request("POST", "/orders/", body, JSON | {"Idempotency-Key": key})
                answer = connection.getresponse()
                mine[2] = answer.status, json.loads(answer.read())
            except (OSError, http.client.HTTPException):
                return
            if stop.is_set():
                return

    for _ in range(2):
        threads = [threading.Thread(target=buy, args=(n + 100 * _,)) for n in range(30)]
        [thread.start() for thread in threads]
        while sum(answer is not None for *_, answer in placed) < 300 * (_ + 1):
            time.sleep(0)
        assert server.end(signal.SIGKILL)[0] == -signal.SIGKILL
        [thread.join() for thread in threads]
        server.start()
    stop.set()
    acknowledged = {key: answer[1] for key, _, answer in placed if answer and answer[0] == 201}
    assert len(acknowledged) >= 600
    for key, body, answer in placed:
        status, again, headers = server(
            "POST", "/orders/", json.loads(body), **{"Idempotency-Key": key}
        )
        assert status == 201 and (
            key not in acknowledged
            or (again, headers["Idempotent-Replayed"]) == (answer[1], "true")
        )
    orders, path = [], "/orders/?limit=1000"
    while path:
        _, page, _ = server("GET", path)
        orders, path = orders + page["orders"], page["next"]
    assert len(orders) == len(placed)
    sold = sum(line["quantity"] for order in orders for line in order["products"])
    assert (
        sum(product["stock"] for product in server("GET", "/products/")[1]["products"])
        == 1_000_000 - sold
    )
    assert server.end()[0] == 0 and server.tracebacks() == ""
    assert server.run("check").stdout == "db.sqlite3: sound\n"


BODY = b'{"name": "x", "price": 1}'
HEAD = b"POST /products/ HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"


@pytest.mark.parametrize(
    "request_, status",
    [
        (b"nonsense\r\n\r\n", 400),
        (b"\x16\x03\x01\x02\x00\x01\x00\r\n\r\n", 400),
        (b"GET\r\n\r\n", 400),
        (b"GET /\r\n\r\n", 400),
        (b"GET / HTTP/2.0\r\n\r\n", 400),
        (b"GET / HTTP/9.9\r\n\r\n", 400),
        (b"get / HTTP/1.1\r\nHost: x\r\n\r\n", 400),
        (b"GET / HTTP/1.1 x\r\n\r\n", 400),
        (b"GET / FTP/1.1\r\n\r\n", 400),
        (b"GET http://[ HTTP/1.1\r\nHost: x\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost x\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: x\r\n folded\r\n\r\n", 200),
        (b"GET / HTTP/1.1\r\n x: y\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: x\r\nHost: y\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: x\r\nA: b\nC: d\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nA:" + b" " * 16_000 + b"\1\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nA: " + b"a" * 17_000 + b"\r\n\r\n", 431),
        (b"GET /" + b"a" * 17_000 + b" HTTP/1.1\r\n\r\n", 431),
        (b"GET / HTTP/1.1\r\nA: " + b"a" * 40_000, 431),
        (b"GET / HTTP/1.1\r\nA: " + b"a" * 16_000 + b"\r\n\r\n", 200),
        (b"BREW / HTTP/1.1\r\nHost: x\r\n\r\n", 405),
        (b"GET http://example.org/healthz HTTP/1.1\r\nHost: x\r\n\r\n", 200),
        (b"GET /healthz HTTP/1.0\r\n\r\n", 200),
        (b"GET /%ff HTTP/1.1\r\nHost: x\r\n\r\n", 404),
        (b"GET /\xff\xfe HTTP/1.1\r\nHost: x\r\n\r\n", 404),
        (b"CONNECT example.org:80 HTTP/1.1\r\nHost: x\r\n\r\n", 404),
        (HEAD + b"Content-Length: " + b"9" * 5000 + b"\r\n\r\n", 400),
        (HEAD + b"Content-Length: -1\r\n\r\n", 400),
        (HEAD + b"Content-Length: 25\r\nContent-Length: 25\r\n\r\n" + BODY, 400),
        (HEAD + b"Content-Length: +25\r\n\r\n" + BODY, 400),
        (HEAD + b"Content-Length: 25\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400),
        (HEAD + b"Content-Length: 25\r\nTransfer-Encoding:\r\n\r\n" + BODY, 400),
        (HEAD + b"Transfer-Encoding: gzip\r\n\r\n", 400),
        (HEAD + b"Transfer-Encoding: chunked, chunked\r\n\r\n0\r\n\r\n", 400),
        (HEAD + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400),
        (HEAD.replace(b"1.1", b"1.0") + b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400),
        (
            HEAD
            + b"Transfer-Encoding: Chunked\r\n\r\n19;a=b\r\n"
            + BODY
            + b"\r\n0\r\nT: x\r\n\r\n",
            201,
        ),
        (HEAD + b"Transfer-Encoding: chunked\r\n\r\nxyz\r\n", 400),
        (HEAD + b"Transfer-Encoding: chunked\r\n\r\n5\r\nabcdefgh", 400),
        (HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + b"1" * 3000, 400),
        (HEAD + b"Content-Length: 25\r\nExpect: 100-continue\r\n\r\n" + BODY, 201),
        (HEAD + b"Expect: 100-continue\r\n\r\n", 400),
        (HEAD + b"Content-Length: 25\r\nExpect: a miracle\r\n\r\n" + BODY, 417),
        (HEAD + b"Content-Length: 2000000\r\n\r\n", 413),
        (HEAD + b"Content-Length: 2000000\r\nExpect: 100-continue\r\n\r\n", 413),
        (HEAD + b"Content-Length: 25\r\n\r\n" + BODY[:9], 400),
        (HEAD[:40], 400),
        (b"GET / HTT", 400),
        (b"\r\n\r\nGET / HTTP/1.1\r\n\r\n", 200),
    ],
)
def test_whatever_comes_over_the_wire_is_answered_in_json(server, request_, status):
    answers = [answer for answer in server.send(request_, half_close=True) if answer[0] != 100]
    assert [answer[0] for answer in answers] == [status], answers
    kind = "application/json" if status < 300 else "application/problem+json"
    assert (
        answers[0][1]["content-type"] == kind
        and json.loads(answers[0][2]).get("status", status) == status
        or status < 300
    )


def test_a_chunked_body_is_measured_without_its_framing(server):
    def chunked(size):
        body = BODY.ljust(size)
        chunks = b"".join(
            b"%x\r\n%b\r\n" % (len(part), part)
            for part in (body[at : at + 500] for at in range(0, size, 500))
        )
        return server.send(HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + chunks, b"0\r\n\r\n")[0][
            0
        ]

    assert chunked(1 << 20) == 201
    assert chunked((1 << 20) + 1) == 413


def test_a_client_that_sends_too_much_can_still_read_the_413(server):
    for head in b"Content-Length: 8000000\r\n\r\n", b"Transfer-Encoding: chunked\r\n\r\n7a1200\r\n":
        [(status, headers, body)] = server.send(HEAD + head, *[b"x" * 80_000] * 100)
        assert (
            status == 413 and json.loads(body)["status"] == 413 and headers["connection"] == "close"
        )


def test_a_smuggled_request_is_never_served(server):
    inner = b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n"
    answers = server.send(
        HEAD
        + b"Content-Length: %d\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n" % (5 + len(inner))
        + inner
    )
    assert [(answer[0], answer[1]["connection"]) for answer in answers] == [(400, "close")]


def test_requests_in_one_packet_are_answered_in_their_order(server):
    get = b"GET /products/ HTTP/1.1\r\nHost: x\r\n\r\n"
    post = HEAD + b"Content-Length: 25\r\n\r\n" + BODY
    answers = server.send((post + get) * 20)
    assert [answer[0] for answer in answers] == [201, 200] * 20
    assert [len(json.loads(answer[2])["products"]) for answer in answers[1::2]] == list(
        range(1, 21)
    )


def test_a_search_may_be_typed_into_curl_as_it_is(server):
    server("POST", "/products/", {"name": "CAFÉ", "price": 1})
    [(status, _, body)] = server.send("GET /products/?q=é HTTP/1.1\r\nHost: x\r\n\r\n".encode())
    assert status == 200 and len(json.loads(body)["products"]) == 1


@pytest.mark.parametrize(
    "request_",
    [
        b"GET / HTTP/1.1\nHost: x\n\n",
        b"\x16\x03\x01\x02\x00",
        b"\r\n {",
        b"GET / HTTP/1.1\r\nHost: x\n",
        HEAD + b"Transfer-Encoding: chunked\r\n\r\n5\nabcde\n0\n\n",
    ],
)
def test_what_can_never_become_a_request_is_refused_without_waiting_for_its_end(server, request_):
    [(status, headers, body)] = server.send(request_)
    assert status == 400 and json.loads(body)["status"] == 400


def test_an_answer_without_a_body_leaves_the_connection_open(server):
    server("POST", "/products/", {"name": "x", "price": 1})
    for first, status in [
        (b"OPTIONS / HTTP/1.1\r\nHost: x\r\n\r\n", 204),
        (b"DELETE /products/1/ HTTP/1.1\r\nHost: x\r\n\r\n", 204),
        (b"GET /products/ HTTP/1.1\r\nHost: x\r\nIf-None-Match: *\r\n\r\n", 304),
    ]:
        answers = server.send(
            first + b"GET /healthz HTTP/1.1\r\nHost: x\r\nConnection: te, close\r\n\r\n"
        )
        assert [answer[0] for answer in answers] == [status, 200]
        assert [answer[1].get("connection") for answer in answers] == [None, "close"]


def test_a_client_of_http_1_0_may_keep_its_connection(server):
    get = b"GET /healthz HTTP/1.0\r\n%b\r\n"
    kept, closed = get % b"Connection: Keep-Alive\r\n", get % b""
    assert [answer[1]["connection"] for answer in server.send(kept + closed + kept)] == [
        "keep-alive",
        "close",
    ]


def test_proxy_headers_of_a_stranger_change_nothing(server):
    forged = (
        b"X-Forwarded-Host: evil\r\nX-Forwarded-Proto: https\r\nX-Forwarded-For: 6.6.6.6\r\nForwarded: for=6.6.6.6\r\n"
        b"X-Forwarded-Prefix: /evil\r\nX-Script-Name: /evil\r\n"
    )
    [(status, headers, _)] = server.send(HEAD + forged + b"Content-Length: 25\r\n\r\n" + BODY)
    assert status == 201 and headers["location"] == "/products/1/" and "server" not in headers
    server.end()
    assert " 127.0.0.1 POST /products/ 201 " in server.log[-1]


def test_idle_and_slow_clients_do_not_hold_up_the_others(server):
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 4096), hard))
    server("POST", "/products/", {"name": "x", "price": 1, "stock": 1000})
    idle = [server.connect() for _ in range(min(hard, 4096) // 2 - 248)]  # 1800
    slow = [server.connect() for _ in range(100)]
    for byte in HEAD[:8]:
        for connection in slow:
            connection.sendall(bytes([byte]))
        began = time.monotonic()
        assert server.order()[0] == 201 and time.monotonic() - began < 1
    for connection in idle + slow:
        connection.close()


def test_half_sent_and_idle_connections_end(tmp_path):
    server = Server(tmp_path).start(
        "import shop; shop.IDLE_TIMEOUT = 1; raise SystemExit(shop.main([]))"
    )
    with server.connect() as idle, server.connect() as slow:
        for byte in (
            b"GET /healthz HTTP/1.1\r\nX: " + b"x" * 100
        ):  # a byte at a time does not keep it alive
            slow.sendall(bytes([byte]))
            if select.select([slow], [], [], 0.1)[0]:
                break
        [(status, _, body)] = read_answers(slow)
        assert status == 408 and json.loads(body)["status"] == 408
        assert idle.recv(1) == b""
    assert server.end()[0] == 0 and server.tracebacks() == ""


def test_a_write_that_waits_for_the_lock_outlives_the_patience_with_the_rest_of_its_connection(
    tmp_path,
):
    server = Server(tmp_path).start(
        "import shop; shop.IDLE_TIMEOUT, shop.LOCK_TIMEOUT = 1, 3; raise SystemExit(shop.main([]))"
    )
    other = sqlite3.connect(tmp_path / "db.sqlite3", isolation_level=None)
    other.execute("BEGIN EXCLUSIVE")
    with server.connect() as connection:
        connection.sendall((HEAD + b"Content-Length: 25\r\n\r\n" + BODY) * 2 + HEAD)
        assert connection.recv(20) == b"HTTP/1.1 503 Service"
    other.close()
    assert server("POST", "/products/", {"name": "x", "price": 1})[0] == 201
    assert server.end()[0] == 0 and server.tracebacks() == ""


def fill(folder, products):
    """Add so many products of 10 kB, past the shop."""
    with sqlite3.connect(folder / "db.sqlite3") as con:
        con.executemany(
            "INSERT INTO product (name, description, price, stock) VALUES (?, ?, 100, 9)",
            [("x", "y" * 10_000)] * products,
        )
    con.close()


def test_a_slow_reader_gets_a_large_answer_in_full_while_others_go_on_and_the_server_stops(
    server, tmp_path
):
    fill(tmp_path, 1800)  # waitress would wait for a second thread above 16 MiB
    with server.connect() as reader, server.connect() as idle:
        reader.sendall(b"GET /products/ HTTP/1.1\r\nHost: x\r\n\r\n" * 2)
        idle.sendall(b"GET /healthz HTTP/1.1\r\n")
        assert server.order()[0] == 201
        server.process.terminate()
        parts = []
        while part := reader.recv(1 << 20):
            parts.append(part)
        received = b"".join(parts)
        assert received.count(b"HTTP/1.1 200 OK") == 2 and received.count(b'"next":null}') == 2
    assert server.process.wait(5) == 0


def test_an_upload_under_way_at_the_signal_is_told_to_come_again(server):
    with server.connect() as connection:
        connection.sendall(HEAD + b"Content-Length: 25\r\n\r\n" + BODY[:9])
        assert server("GET", "/healthz")[0] == 200
        server.process.terminate()
        data = b""
        while part := connection.recv(1000):
            data += part
        assert data.startswith(b"HTTP/1.1 503 ") and b"Retry-After: 1" in data
    assert server.process.wait(5) == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_server_with_status_0_and_a_folded_wal(server, tmp_path, number):
    with server.connect(), server.connect():
        server("POST", "/products/", {"name": "x", "price": 1, "stock": 9})
        status, seconds = server.end(number)
    assert status == 0 and seconds < 3 and not (tmp_path / "db.sqlite3-wal").exists()


def test_a_second_signal_ends_the_server_at_once(server, tmp_path):
    fill(tmp_path, 1800)
    with server.connect() as reader:
        reader.sendall(b"GET /products/ HTTP/1.1\r\nHost: x\r\n\r\n")
        reader.recv(10)
        server.process.terminate()
        with pytest.raises(subprocess.TimeoutExpired):
            server.process.wait(0.5)
        assert server.end()[0] == 128 + signal.SIGTERM


def test_an_urgent_byte_closes_its_connection_and_no_more(server):
    with server.connect() as connection:
        connection.send(b"x", socket.MSG_OOB)
        assert read_answers(connection) in ([], ["reset"])
    assert server("GET", "/healthz")[0] == 200


def test_an_answer_under_way_at_the_signal_is_whole_though_the_client_has_asked_again(
    server, tmp_path
):
    fill(tmp_path, 600)
    with server.connect(SO_RCVBUF=1 << 16) as reader:
        reader.sendall(b"GET /products/ HTTP/1.1\r\nHost: x\r\n\r\n")
        reader.recv(10)
        reader.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
        server.process.terminate()
        received = b""
        while part := reader.recv(1 << 20):
            received += part
    assert b'"next":null}' in received and server.process.wait(5) == 0


def test_a_connection_that_is_reset_between_two_requests_does_no_harm(server, tmp_path):
    fill(tmp_path, 300)
    for number in range(100):
        with server.connect(SO_LINGER=struct.pack("ii", 1, 0)) as connection:
            connection.sendall(
                b"GET /products/?q=z%d HTTP/1.1\r\nHost: x\r\n\r\n" % number
                + HEAD
                + b"Expect: 100-continue\r\nContent-Length: 60\r\n\r\n"
            )
            select.select([connection], [], [], number / 50_000)
    assert server("GET", "/healthz")[0] == 200


def test_clients_that_vanish_leave_nothing_behind(server):
    server("POST", "/products/", {"name": "x", "price": 1, "stock": 10**9})
    status = Path(f"/proc/{server.process.pid}")

    def measure():
        pages = int((status / "statm").read_text().split()[1])
        return len(list((status / "fd").iterdir())), pages * 4096

    def vanish(times):
        order = b'{"products": [{"product_id": 1, "quantity": 1}]}'
        whole = (
            HEAD.replace(b"products", b"orders")
            + b"Content-Length: %d\r\n\r\n" % len(order)
            + order
        )
        for number in range(times):
            with server.connect(SO_LINGER=struct.pack("ii", 1, 0)) as connection:
                connection.sendall(whole[: len(whole) - number % 3 * 40])
        for _ in range(100):
            assert server("GET", "/products/")[0] == 200

    vanish(300)
    files, memory = measure()
    vanish(1500)
    later_files, later_memory = measure()
    assert later_files <= files + 3 and later_memory < memory + (4 << 20)
    assert server.order()[0] == 201


def test_while_another_process_holds_the_lock_reads_go_on_and_writes_wait(server, tmp_path):
    server("POST", "/products/", {"name": "x", "price": 1, "stock": 9})
    other = sqlite3.connect(tmp_path / "db.sqlite3", isolation_level=None)
    other.execute("BEGIN EXCLUSIVE")
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        waiting = [pool.submit(server.order) for _ in range(3)]
        slowest = 0
        while not all(answer.done() for answer in waiting):
            began = time.monotonic()
            assert server("GET", "/products/1/")[:2] == (
                200,
                {"id": 1, "name": "x", "description": "", "price": 1, "stock": 9},
            )
            slowest = max(slowest, time.monotonic() - began)
        for answer in waiting:
            status, problem, headers = answer.result()
            assert (
                status == 503
                and headers["Retry-After"] == "1"
                and problem["detail"] == "The database is busy."
            )
        assert slowest < 0.5
        waiting = [pool.submit(server.order) for _ in range(3)]
        assert server("GET", "/healthz")[0] == 200
        other.execute("ROLLBACK")
        assert [answer.result()[0] for answer in waiting] == [201] * 3
    other.close()
    assert server("GET", "/products/1/")[1]["stock"] == 6


def test_a_database_that_is_locked_at_the_start_is_used_as_soon_as_it_is_free(tmp_path):
    other = sqlite3.connect(tmp_path / "db.sqlite3", isolation_level=None)
    other.execute("PRAGMA user_version = 0")
    other.execute("BEGIN EXCLUSIVE")
    other.execute("CREATE TABLE _litestream_seq (x)")
    server = Server(tmp_path).start()
    status, problem, headers = server("GET", "/products/")
    assert (status, headers["Retry-After"]) == (503, "1") and server("GET", "/healthz")[0] == 503
    other.execute("COMMIT")
    other.close()
    assert (
        server("POST", "/products/", {"name": "x", "price": 1})[0] == 201
        and server("GET", "/healthz")[0] == 200
    )
    assert server.end()[0] == 0 and server.tracebacks() == ""


def test_a_full_disk_is_a_503_that_changes_nothing_and_passes(tmp_path):
    server = Server(tmp_path).start(
        "import resource, shop; resource.setrlimit(resource.RLIMIT_FSIZE, (900_000, -1)); "
        "raise SystemExit(shop.main([]))"
    )
    added = 0
    while (
        answer := server(
            "POST", "/products/", {"name": "x", "description": "y" * 10_000, "price": 1, "stock": 9}
        )
    )[0] == 201:
        added += 1
    status, problem, headers = answer
    assert (
        status == 503
        and headers["Retry-After"] == "1"
        and problem["detail"] in ("The disk is full.", "The disk cannot be read or written.")
    )
    assert added > 10 and len(server("GET", "/products/")[1]["products"]) == added
    body = json.dumps({"name": "x", "description": "y" * 9000, "price": 1}).encode()
    post = HEAD + b"Content-Length: %d\r\n" % len(body)
    answers = server.send(
        post + b"\r\n" + body + post + b"Expect: 100-continue\r\n\r\n"
    )  # the 100 sends no 201 along
    assert [answer[0] for answer in answers] == [503]
    resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE, (-1, -1))
    assert (
        server.order()[0] == 201
        and server("POST", "/products/", {"name": "x", "price": 1})[1]["id"] == added + 1
    )
    assert server.end()[0] == 0 and server.tracebacks() == ""
    assert db.check_integrity(tmp_path / "db.sqlite3") == []


def test_a_failed_commit_is_told_to_all_that_shared_it_and_undone(url):
    store = db.Store(url[10:])
    store.create_product(name="x", price=1, stock=9)
    store.begin()
    store.create_order([{"product_id": 1, "quantity": 1}])
    with pytest.raises(db.InsufficientStock):
        store.create_order([{"product_id": 1, "quantity": 9}])
    store._writer.execute("ROLLBACK")  # as SQLite does by itself when the disk is full
    with pytest.raises(db.DatabaseUnavailable):
        store.create_order([{"product_id": 1, "quantity": 1}])
    with pytest.raises(db.DatabaseUnavailable):
        store.commit()
    assert store.get_product(1)["stock"] == 9 and store.list_orders() == ([], None)
    assert store.create_order([{"product_id": 1, "quantity": 9}])["id"] == 1
    store.close()


def test_the_access_log_has_one_line_a_request(server):
    server("POST", "/products/", {"name": "x", "price": 1})
    server("GET", "/products/1/?secret=1")
    server.send(b"GET /a%0Ab\x1b HTTP/1.1\r\nHost: x\r\n\r\n")
    server.send(b"nonsense\r\n\r\n")
    server.end()
    stamp = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ 127\.0\.0\.1 "
    assert server.log[1] == "ADMIN_TOKEN is not set: anyone may read orders and change products.\n"
    for line, rest in zip(
        server.log[2:],
        [
            "POST /products/ 201 59",
            "GET /products/1/ 422 \\d+",
            "GET /a%0Ab%1B 404 \\d+",
            "- - 400 \\d+",
        ],
        strict=True,
    ):
        assert re.fullmatch(stamp + rest + r" \d+\.\d\n", line), line


def test_the_log_tells_how_long_each_request_of_one_packet_took(server, tmp_path):
    fill(tmp_path, 300)
    get = b"GET /products/?q=y HTTP/1.1\r\nHost: x\r\n\r\n"
    assert [
        answer[0] for answer in server.send(get + b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
    ] == [200, 200]
    server.end()
    first, second = (float(line.split()[-1]) for line in server.log[2:])
    assert first > second and first > 1


def test_the_access_log_can_be_off_and_the_token_is_nowhere_in_a_log(tmp_path):
    server = Server(tmp_path, ACCESS_LOG="false", ADMIN_TOKEN="s3cret", DEBUG="true").start()
    assert (
        server("POST", "/products/", {"name": "x", "price": 1}, Authorization="Bearer s3cret")[0]
        == 201
    )
    server.end()
    assert (
        len(server.log) == 1
        and "INSERT INTO product" in server.tracebacks()
        and "s3cret" not in server.tracebacks()
    )


def test_nobody_needs_to_read_the_log(tmp_path):
    server = Server(tmp_path)
    server.process = subprocess.Popen(
        [sys.executable, HERE / "shop.py"],
        cwd=tmp_path,
        env=server.environment(),
        stdout=subprocess.PIPE,
        text=True,
        bufsize=1,
    )
    server.port = int(re.search(r":(\d+)/", server.process.stdout.readline())[1])
    request = b"GET /products/ HTTP/1.1\r\nHost: x\r\n\r\n"
    for _ in range(4):
        assert len(server.send(request * 400)) == 400  # 100 KB of log lines, and a pipe holds 64
    server.process.stdout.close()
    assert len(server.send(request)) == 1
    server.process.terminate()
    assert server.process.wait(5) == 0


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"PORT": "http"}, "PORT"),
        ({"PORT": "65536"}, "PORT"),
        ({"PORT": "-1"}, "PORT"),
        ({"DATABASE_URL": "postgres://x"}, "DATABASE_URL"),
        ({"DATABASE_URL": "sqlite:///"}, "DATABASE_URL"),
        ({"DATABASE_URL": "sqlite:///:memory:"}, "DATABASE_URL"),
        ({"DEBUG": "maybe"}, "DEBUG"),
        ({"ACCESS_LOG": "2"}, "ACCESS_LOG"),
        ({"READ_ONLY": "x"}, "READ_ONLY"),
        ({"LITESTREAM": "x"}, "LITESTREAM"),
        ({"ADMIN_TOKEN": "a b"}, "ADMIN_TOKEN"),
        ({"HOST": "no.such.host.invalid"}, "HOST"),
        ({"HOST": "192.0.2.1"}, "HOST"),
        ({"DATABASE_URL": "sqlite:///none/such/db.sqlite3"}, "cannot be opened"),
        ({"DATABASE_URL": "sqlite:///."}, "cannot be opened"),
        ({"DATABASE_URL": "sqlite:///text"}, "not a database"),
        ({"DATABASE_URL": "sqlite:///foreign"}, "another program"),
        ({"DATABASE_URL": "sqlite:///short"}, "damaged"),
        ({"DATABASE_URL": "sqlite:///newer"}, "newer version"),
        ({"DATABASE_URL": "sqlite:///none", "READ_ONLY": "true"}, "cannot be opened"),
    ],
)
def test_a_setting_that_cannot_be_used_ends_the_start_with_one_line(tmp_path, settings, words):
    (tmp_path / "text").write_text("no database " * 100)
    db.Store(tmp_path / "db.sqlite3").close()
    (tmp_path / "short").write_bytes((tmp_path / "db.sqlite3").read_bytes()[:5000])
    for name, statement in ("foreign", "CREATE TABLE x (y)"), ("newer", "PRAGMA user_version = 99"):
        with sqlite3.connect(tmp_path / name) as con:
            con.execute(statement)
            con.execute("PRAGMA journal_mode = WAL")
        con.close()
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    ended = Server(tmp_path, **settings).run()
    assert ended.returncode == 2 and ended.stdout == ""
    assert re.fullmatch(r"shop: [^\n]+\.\n", ended.stderr) and words in ended.stderr
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_port_in_use_ends_the_start_with_one_line(server, tmp_path):
    ended = Server(tmp_path, PORT=str(server.port)).run()
    assert ended.returncode == 2 and re.fullmatch(
        r"shop: cannot listen [^\n]+ in use\.\n", ended.stderr
    )


def test_a_second_start_changes_nothing(tmp_path):
    (tmp_path / ".env").write_text(
        "# mine\nDATABASE_URL='sqlite:///mine.sqlite3'\n\nACCESS_LOG = false\n"
    )
    first = Server(tmp_path)
    first.settings = {name: os.environ[name] for name in ("PATH",)}
    env = first.environment()
    env.pop("DATABASE_URL")
    contents = []
    for _ in range(2):
        process = subprocess.Popen(
            [sys.executable, HERE / "shop.py"],
            cwd=tmp_path,
            env=env,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert "/mine.sqlite3" in process.stdout.readline()
        process.terminate()  # at once: the handlers stand before the line is printed
        process.communicate()
        assert process.returncode == 0
        contents.append((tmp_path / "mine.sqlite3").read_bytes())
    assert contents[0] == contents[1]


def test_the_environment_outranks_the_file_env_and_one_that_cannot_be_read_ends_the_start(tmp_path):
    (tmp_path / ".env").write_text("READ_ONLY=nonsense\nDEBUG=false # as ever\nPORT=1\n")
    server = Server(tmp_path, READ_ONLY="false").start()
    assert server("GET", "/healthz")[1] == {"status": "ok"} and server.end()[0] == 0
    for content in b"\xff", None:
        (tmp_path / ".env").unlink()
        (tmp_path / ".env").write_bytes(content) if content else (tmp_path / ".env").mkdir()
        for command in [], ["check"], ["backup", "x"]:
            ended = Server(tmp_path).run(*command)
            assert ended.returncode in (1, 2) and re.fullmatch(
                r"shop: The file \.env [^\n]+\n", ended.stderr
            )
        (tmp_path / ".env").rmdir() if not content else None


def test_an_app_made_without_a_url_takes_the_settings_of_the_environment(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DATABASE_URL", "sqlite:///mine.sqlite3")
    monkeypatch.setenv("ADMIN_TOKEN", "theirs")
    for token, app in (
        ("theirs", shop_module.create_app()),
        ("mine", shop_module.create_app(admin_token="mine")),
    ):
        shop = Client(app)
        assert shop("GET", "/orders/").status_int == 401
        assert shop("GET", "/orders/", None, {"Authorization": f"Bearer {token}"}).status_int == 200
        app.store.close()
    assert (tmp_path / "mine.sqlite3").exists()


def test_the_shop_runs_under_a_server_with_threads(tmp_path):
    server = Server(tmp_path)
    process = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "waitress",
            "--listen=127.0.0.1:0",
            "--threads=8",
            "--call",
            "shop:create_app",
        ],
        cwd=tmp_path,
        env=server.environment() | {"PYTHONPATH": str(HERE)},
        text=True,
        stderr=subprocess.PIPE,
    )
    server.port = int(re.search(r":(\d+)$", process.stderr.readline())[1])
    server("POST", "/products/", {"name": "x", "price": 1, "stock": 20})
    answers = at_once(32, lambda n: server.order()[0])
    process.terminate()
    process.communicate()
    assert (answers.count(201), answers.count(409)) == (20, 12)


@pytest.mark.parametrize("litestream, pages", [(False, 4000), (True, 50_000)])
def test_every_commit_is_flushed_and_one_connection_checkpoints(url, litestream, pages):
    store = shop_module.create_app(url, litestream=litestream).store
    store.list_orders()

    def pragma(connection, name):
        return connection.execute(f"PRAGMA {name}").fetchone()[0]

    assert [
        pragma(store._writer, name)
        for name in ("journal_mode", "synchronous", "foreign_keys", "wal_autocheckpoint")
    ] == ["wal", 2, 1, pages]
    assert (
        pragma(store._local.reader, "query_only") == 1
        and pragma(store._local.reader, "busy_timeout") == 1000
    )
    store.close()


def test_all_writes_of_a_turn_share_one_commit(tmp_path):
    server = Server(tmp_path, DEBUG="true").start()
    server("POST", "/products/", {"name": "x", "price": 1, "stock": 9})
    other = sqlite3.connect(tmp_path / "db.sqlite3", isolation_level=None)
    other.execute("BEGIN EXCLUSIVE")
    before = server.tracebacks().count("COMMIT")
    body = b'{"products": [{"product_id": 1, "quantity": 2}]}'
    order = (
        b"POST /orders/ HTTP/1.1\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
        % len(body)
        + body
    )
    waiting = [server.connect() for _ in range(6)]
    for connection in waiting:
        connection.sendall(order)
    server("GET", "/healthz")  # by now they have all been read, and wait for the lock
    other.execute("ROLLBACK")
    other.close()
    answers = [read_answers(connection)[0][0] for connection in waiting]
    [connection.close() for connection in waiting]
    assert (
        sorted(answers) == [201] * 4 + [409] * 2
        and server.tracebacks().count("COMMIT") == before + 1
    )
    assert server.end()[0] == 0


# ------------------------------------------------------------------------------------------------ backup and check


def test_a_backup_under_load_is_one_consistent_state(server, tmp_path):
    for _ in range(3):
        server("POST", "/products/", {"name": "x", "price": 1.5, "stock": 10**6})
    stop = threading.Event()

    def buy(n):
        while not stop.is_set():
            server(
                "POST",
                "/orders/",
                {"products": [{"product_id": 1, "quantity": 1}, {"product_id": 2, "quantity": 2}]},
            )

    threads = [threading.Thread(target=buy, args=(n,)) for n in range(4)]
    [thread.start() for thread in threads]
    for number in range(3):
        made = server.run("backup", f"copy{number}")
        assert made.returncode == 0, made.stderr
        copy = db.Store(tmp_path / f"copy{number}")
        orders = copy.list_orders(limit=10**6)[0]
        assert [copy.get_product(id)["stock"] for id in (1, 2, 3)] == [
            10**6 - len(orders),
            10**6 - 2 * len(orders),
            10**6,
        ]
        copy.close()
        size = (tmp_path / f"copy{number}").stat().st_size
        assert made.stdout == f"copy{number}: 3 products, {len(orders)} orders, {size} bytes\n"
        assert server.run("check", f"copy{number}").stdout == f"copy{number}: sound\n"
    stop.set()
    [thread.join() for thread in threads]


def test_a_backup_refuses_a_bad_target_and_leaves_it(server, tmp_path):
    server("POST", "/products/", {"name": "x", "price": 1})
    (tmp_path / "mine").write_text("mine")
    (tmp_path / "used-wal").write_text("")
    for target, more in [
        ("mine", []),
        ("db.sqlite3-wal", ["--overwrite"]),
        ("used", []),
        ("db.sqlite3", []),
        ("db.sqlite3", ["--overwrite"]),
        ("none/such", []),
        (".", ["--overwrite"]),
    ]:
        ended = server.run("backup", target, *more)
        assert ended.returncode == 1 and re.fullmatch(r"shop: [^\n]+\n", ended.stderr), ended
    assert (tmp_path / "mine").read_text() == "mine" and server("GET", "/products/1/")[0] == 200
    assert server.run("backup", "mine", "--overwrite").returncode == 0
    assert not list(tmp_path.glob("*partial*")) and server.run("check", "mine").returncode == 0


@pytest.mark.parametrize(
    "statement, words",
    [
        (
            "UPDATE orders SET total = total + 1",
            "Order 1 has a total of 1000 cents, but 1 lines that make 999.",
        ),
        ("DELETE FROM order_line", "Order 1 has a total"),
        (
            "PRAGMA ignore_check_constraints = ON; UPDATE product SET stock = -1",
            "CHECK constraint failed in product",
        ),
        (
            "PRAGMA foreign_keys = OFF; DELETE FROM orders",
            "A row of order_line refers to a missing row of orders.",
        ),
    ],
)
def test_check_finds_a_planted_fault(shop, mug, url, tmp_path, statement, words):
    shop.order((1, 1))
    assert Server(tmp_path).run("check").stdout == "db.sqlite3: sound\n"
    with sqlite3.connect(url[10:]) as con:
        con.executescript(statement)
    con.close()
    ended = Server(tmp_path).run("check")
    assert ended.returncode == 1 and words in ended.stdout


def test_check_finds_a_damaged_page(shop, tmp_path, url):
    for number in range(100):
        shop.product(description="y" * 1000)
    shop.app.app.store.close()
    with open(url[10:], "r+b") as file:
        file.seek(10 * 4096)
        file.write(os.urandom(4096))
    ended = Server(tmp_path).run("check", "db.sqlite3")
    assert ended.returncode == 1 and ended.stdout.count("\n") and "Traceback" not in ended.stderr


def test_help_tells_every_command_and_every_setting(tmp_path):
    told = Server(tmp_path).run("--help")
    assert told.returncode == 0
    for word in (
        "backup FILE",
        "check [FILE]",
        *(name.upper() for name in shop_module.Settings._fields if name != "database"),
    ):
        assert word in told.stdout
    for wrong in (
        ["bakcup"],
        ["backup"],
        ["check", "a", "b"],
        ["backup", "--force", "x"],
        ["check", "-x"],
        ["--nonsense"],
    ):
        ended = Server(tmp_path).run(*wrong)
        assert ended.returncode == 2 and ended.stderr == told.stdout


def test_a_read_only_shop_serves_every_get_and_refuses_every_write(server, tmp_path):
    server("POST", "/products/", {"name": "x", "price": 1, "stock": 9})
    copy = Server(tmp_path, READ_ONLY="true").start()
    assert copy("GET", "/healthz")[1] == {"status": "ok", "read_only": True}
    for _ in range(5):
        server.order()
        for path in "/products/", "/products/1/", "/orders/", "/orders/1/":
            assert copy("GET", path)[1] == server("GET", path)[1]
    for method, path, body in [
        ("POST", "/orders/", {"products": [{"product_id": 1, "quantity": 1}]}),
        ("POST", "/products/", {"name": "x", "price": 1}),
        ("DELETE", "/products/1/", None),
        ("PATCH", "/products/1/", {"price": 2}),
        ("PATCH", "/orders/1/", {"status": "cancelled"}),
    ]:
        status, problem, headers = copy(method, path, body, **{"Idempotency-Key": "k"})
        assert status == 503 and headers["Retry-After"] and "read-only copy" in problem["detail"]
    assert copy.end()[0] == 0 and server("GET", "/products/1/")[1]["stock"] == 4


# ------------------------------------------------------------------------------------- what the others are told


def test_waitress_is_still_what_the_loop_leans_on():
    pins = dict(line.split("==") for line in (HERE / "requirements.txt").read_text().split())
    assert metadata.version("waitress") == pins["waitress"] == "3.0.2"
    assert metadata.version("bottle") == pins["bottle"] and set(pins) == {
        "bottle",
        "waitress",
        "pytest",
        "webtest",
    }
    for ours in (shop_module.Channel, shop_module.Server, shop_module.RequestParser):
        theirs = ours.__mro__[1]
        for name, member in vars(ours).items():
            if (
                inspect.isfunction(member)
                and hasattr(theirs, name)
                and name not in ("__init__", "refuse")
            ):
                assert len(inspect.signature(member).parameters) == len(
                    inspect.signature(getattr(theirs, name)).parameters
                ), name
    source = inspect.getsource(shop_module.waitress.channel.HTTPChannel.service)
    for leaned_on in (
        "self.task_class(self, request)",
        "self.server.add_task(self)",
        "self.close_when_flushed = True",
        "self.requests.pop(0)",
    ):
        assert leaned_on in source


def run_curl(server, command):
    """What `curl` would print, by way of http.client: -i, -X, -H and -d are all that the README needs."""
    words, method, headers, body, shows_head = iter(shlex.split(command)[1:]), None, {}, None, False
    for word in words:
        match word:
            case "-i":
                shows_head = True
            case "-X":
                method = next(words)
            case "-H":
                name, _, value = next(words).partition(": ")
                headers[name] = value
            case "-d":
                body = next(words)
                headers.setdefault("Content-Type", "application/x-www-form-urlencoded")
            case _:
                path = word.removeprefix("localhost:8000")
    connection = http.client.HTTPConnection("127.0.0.1", server.port)
    connection.request(method or ("POST" if body else "GET"), path, body, headers)
    answer = connection.getresponse()
    head = [
        f"HTTP/1.1 {answer.status} {answer.reason}",
        *(": ".join(pair) for pair in answer.getheaders()),
        "",
    ]
    text = "\n".join([*(head if shows_head else []), answer.read().decode()])
    connection.close()
    return text


def test_every_example_of_the_readme_answers_as_the_readme_says(server):
    blocks = re.findall(r"```console\n(.*?)```", (HERE / "README.md").read_text(), re.S)
    examples = [example.partition("\n") for block in blocks for example in block.split("$ ")[1:]]
    assert len(examples) == 12

    def timeless(text):
        return re.sub(r"\d{4}-\d\d-\d\dT[\d:]+Z|Date: .*", "then", text)

    for command, _, output in examples:
        assert timeless(run_curl(server, command)) == timeless(output)


def test_the_readme_tells_every_path_status_and_setting(shop):
    readme, described = (HERE / "README.md").read_text(), shop("GET", "/openapi.json").json
    for path, operations in described["paths"].items():
        for method in operations if path != "/" else ():
            assert "`" + method.upper() + " " + re.sub("{.*?}", "1", path) + "`" in readme
    for status in described["components"]["responses"]:
        assert re.search(rf"^\|.*\b{status}\b.*\|", readme, re.M), status
    for name in (
        "DATABASE_URL",
        *(name.upper() for name in shop_module.Settings._fields if name != "database"),
    ):
        assert f"`{name}`" in readme and re.search(
            rf"^#?{name}=", (HERE / ".env.example").read_text(), re.M
        )


def test_the_description_names_every_route_and_refers_to_nothing_that_is_missing(shop):
    described = shop("GET", "/openapi.json").json
    assert described["openapi"] == "3.1.0"
    operations = {
        (method.upper(), path): operation
        for path, methods in described["paths"].items()
        for method, operation in methods.items()
    }
    assert set(operations) == {
        (route.method, re.sub("<(.*?):id>", r"{\1}", route.rule))
        for route in shop_module.api.routes
    }
    for reference in re.findall(r'"\$ref": ?"#/([^"]+)"', json.dumps(described)):
        found = described
        for step in reference.split("/"):
            found = found[step]
    for (method, path), operation in operations.items():
        names = {parameter["name"] for parameter in operation["parameters"]}
        assert ("Idempotency-Key" in names) == (method == "POST") and any(
            "_id" in n for n in names
        ) == ("{" in path)
        assert operation["summary"] and ("401" not in operation["responses"])
    assert described["components"]["schemas"]["NewProduct"] == json.loads(
        json.dumps(shop_module.describe_schema(shop_module.NEW_PRODUCT))
    )


def test_the_description_asks_for_the_token_where_the_shop_does(url):
    app = shop_module.create_app(url, "secret")
    shop = Client(app)
    for path, operations in shop("GET", "/openapi.json").json["paths"].items():
        for method, operation in operations.items():
            refused = shop(method.upper(), re.sub("{.*?}", "1", path)).status_int == 401
            assert refused == bool(operation["security"]) == ("401" in operation["responses"])
    app.store.close()


def test_dockerfile_compose_file_and_readme_agree():
    dockerfile, compose, readme = (
        (HERE / name).read_text() for name in ("Dockerfile", "docker-compose.yml", "README.md")
    )
    web, _, replica = compose.partition("\n  replica:\n")
    assert (
        re.search(r"^FROM python:3\.14-slim$", dockerfile, re.M)
        and "USER 10001:10001" in dockerfile
    )
    assert 'user: "10001:10001"' in replica and "user 10001" in readme
    assert (
        "VOLUME /data" in dockerfile
        and "- data:/data" in web
        and "- data:/data" in replica
        and "-v shop:/data shop" in readme
    )
    assert (
        "EXPOSE 8000" in dockerfile and 'ports: ["8000:8000"]' in web and "-p 8000:8000" in readme
    )
    for name, value in (
        ("DATABASE_URL", "sqlite:////data/db.sqlite3"),
        ("HOST", "0.0.0.0"),
        ("PORT", "8000"),
    ):
        assert re.search(rf"\b{name}={re.escape(value)}\b", dockerfile)
        assert re.search(rf'^ +{name}: "?{re.escape(value)}"?$', web, re.M)
        assert shop_module.read_settings({name: value})
    assert (
        'CMD ["python", "shop.py"]' in dockerfile
        and "HEALTHCHECK" in dockerfile
        and "/healthz" in dockerfile
        and "/healthz" in web
    )
    for line in (
        "read_only: true",
        "cap_drop: [ALL]",
        '"no-new-privileges:true"',
        "tmpfs: [/tmp]",
        "restart: unless-stopped",
    ):
        assert line in web and line in replica
    assert (
        "profiles: [replica]" in replica
        and "profiles" not in web
        and "docker compose --profile replica up -d" in readme
    )
    assert (
        re.search(r"image: litestream/litestream:0\.5\.\d+$", replica, re.M)
        and "name: shop" in compose
        and "shop_data" in readme
    )
    for name in set(re.findall(r"\$\{(\w+)", compose)):
        assert f"{name}=" in readme and f"#{name}=" in (HERE / ".env.example").read_text(), name
    copied = (
        (HERE / ".dockerignore").read_text().split() if (HERE / ".dockerignore").exists() else []
    )
    for name in re.findall(r"HERE / \"([\w.-]+)\"", Path(__file__).read_text()) if copied else ():
        assert f"!{name}" in copied or name == ".dockerignore", name
