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
        data = body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
        headers = {**({} if body is None else JSON), **(headers or {})}
        answer = self.app.request(path, method=method, body=data, headers=headers, expect_errors=True)
        if answer.status_int >= 400 and method != "HEAD":
            assert answer.content_type == "application/problem+json", answer
            assert answer.json["status"] == answer.status_int and answer.json.keys() >= {"type", "title", "detail"}
        self.compare(method, path, answer)
        return answer

    def compare(self, method, path, answer):
        """Every answer of every test is one that /openapi.json declares, its headers and fields included."""
        path = re.sub(r"/\d+", "/{id}", path.partition("?")[0].removesuffix("/"))
        described = shop_module.describe("", True)
        methods = {known.removesuffix("/"): methods for known, methods in described["paths"].items()}.get(path, {})
        operation = methods.get("get" if method == "HEAD" else method.lower())
        if not operation:
            assert answer.status_int in (204, 404, 405) or "/a/b" in path
            return
        declared = operation["responses"][str(answer.status_int)]
        if "$ref" in declared:
            declared = described["components"]["responses"][declared["$ref"].rpartition("/")[2]]
        declared_headers = {name.lower() for name in declared["headers"]} | {"content-type", "content-length"}
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
        return self("POST", "/orders/", {"products": [{"product_id": product, "quantity": quantity}
                                                      for product, quantity in lines]}, headers)

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
    return {error.get("pointer", error.get("parameter")): error["detail"] for error in answer.json["errors"]}


def at_once(number, work):
    """The results of work(0), work(1), ... in as many threads, begun together."""
    gate = threading.Barrier(number)
    with concurrent.futures.ThreadPoolExecutor(number) as pool:
        return list(pool.map(lambda n: (gate.wait(), work(n))[1], range(number)))


# -------------------------------------------------------------------------------------------------------- products

def test_a_product_is_added_and_read_back_as_it_was_given(shop):
    made = shop("POST", "/products/", {"name": "Mug ☕", "description": "Blue", "price": 9.99, "stock": 12})
    assert made.status_int == 201 and made.headers["Location"] == "/products/1/"
    assert made.content_type == "application/json"
    assert made.json == {"id": 1, "name": "Mug ☕", "description": "Blue", "price": 9.99, "stock": 12}
    assert shop("GET", "/products/1/").json == made.json
    assert shop("GET", "/products/").json == {"products": [made.json], "next": None}


def test_description_and_stock_may_be_left_out(shop):
    assert shop("POST", "/products/", {"name": "x", "price": 0}).json == {
        "id": 1, "name": "x", "description": "", "price": 0, "stock": 0}


@pytest.mark.parametrize("body", [
    b'{"name": "x", "price": 2.0, "stock": 2.0}', b'{"name": "x", "price": 1e1, "stock": 1e2}',
    b'{"name": "x", "price": 9.990, "stock": -0}', b'{"name": "x", "price": 1000000, "stock": 1000000000}',
    '{"name": "\u2000x\u3000", "price": 0.01, "description": "\\ud83d\\ude00\\t"}'.encode(),
    b'{"name": "%s", "price": 1}' % (b"x" * 200), b'{"name": "x", "price": 1, "description": "%s"}' % (b"y" * 10_000)])
def test_whatever_the_rules_allow_is_accepted(shop, body):
    made = shop("POST", "/products/", body)
    assert made.status_int == 201, made
    sent = json.loads(body)
    assert {name: made.json[name] for name in sent} == sent


@pytest.mark.parametrize("field, values", {
    "name": ["", "   ", "\u2003\t\n", "x" * 201, "a\0b", "\ud800", 5, None, True, ["x"], {}],
    "description": ["y" * 10_001, "\0", "x\udfff", 5, None],
    "price": [-0.01, 1000000.01, 9.999, "9.99", None, True, [], 1e300],
    "stock": [-1, 1000000001, 1.5, "2", True, None, 10 ** 30],
    "id": [7], "colour": ["red"]}.items())
def test_a_field_that_breaks_its_rule_is_told_by_pointer_and_nothing_is_added(shop, field, values):
    for value in values:
        answer = shop("POST", "/products/", {"name": "x", "price": 1, field: value})
        assert list(errors_of(answer)) == [f"#/{field}"], value
    assert shop("GET", "/products/").json["products"] == []


@pytest.mark.parametrize("number", ["1e999", "-1e999", "1e1000000000", "1e99999999999999999999", "1e-99999999999999999999",
                                    "1" * 5000, "9" * 100_000, "0." + "1" * 100_000, "1e-1000000000"])
def test_absurd_numbers_are_refused_at_once(shop, number):
    answer = shop("POST", "/products/", f'{{"name": "x", "price": {number}, "stock": {number}}}'.encode())
    assert list(errors_of(answer)) == ["#/price", "#/stock"]


def test_every_fault_is_told_at_once(shop):
    answer = shop("POST", "/products/", {"price": "1", "stock": -1, "colour": "red", "a/b~c d": 1})
    assert errors_of(answer) == {
        "#/name": "name is required.", "#/price": "price must be a number.",
        "#/stock": "stock must be 0 to 1000000000.",
        "#/colour": "colour is unknown; there is name, description, price, stock.",
        "#/a~1b~0c%20d": "a/b~c d is unknown; there is name, description, price, stock."}


@pytest.mark.parametrize("body, detail", [
    (b"", "JSON"), (b"{", "JSON"), (b"nonsense", "JSON"), (b'{"name": NaN}', "NaN"), (b'{"name": -Infinity}', "Infinity"),
    (b'{"name": "\xff"}', "UTF-8"), ('{"name": "x"}'.encode("utf-16"), "UTF-8"), (b"\xef\xbb\xbf{}", "JSON"),
    (b'{"name": "a", "name": "b", "price": 1}', "twice"), (b"[" * 100_000, "nested"),
    (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "nested"), (b'{"name": "a\nb"}', "JSON"), (b"{} {}", "JSON")])
def test_a_body_that_is_no_json_is_a_400(shop, body, detail):
    answer = shop("POST", "/products/", body)
    assert answer.status_int == 400 and detail in answer.json["detail"]


@pytest.mark.parametrize("body", [[], "x", 5, None, True])
def test_a_body_that_is_no_object_is_told_so(shop, body):
    assert errors_of(shop("POST", "/products/", json.dumps(body).encode())) == {"#": "The body must be an object."}


@pytest.mark.parametrize("kind", [None, "text/plain", "application/x-www-form-urlencoded", "application/json; charset=latin-1",
                                  "application/jsonp", "application/merge-patch+json"])
def test_a_body_not_declared_as_json_is_a_415_that_helps_a_curl_user(shop, kind):
    answer = shop("POST", "/products/", b'{"name": "x", "price": 1}', {"Content-Type": kind} if kind else {"Content-Type": ""})
    assert answer.status_int == 415 and answer.headers["Accept"] == "application/json"
    assert "-H 'Content-Type: application/json'" in answer.json["detail"]


@pytest.mark.parametrize("kind", ["application/json", "Application/JSON; charset=UTF-8", 'application/json;charset="utf-8"'])
def test_json_may_be_declared_in_any_of_its_spellings(shop, kind):
    assert shop("POST", "/products/", b'{"name": "x", "price": 1}', {"Content-Type": kind}).status_int == 201


def test_a_body_over_one_mebibyte_is_a_413_and_one_of_just_that_is_read(shop):
    body = b'{"name": "x", "price": 1}'
    assert shop("POST", "/products/", body.ljust(1 << 20)).status_int == 201
    assert shop("POST", "/products/", body.ljust((1 << 20) + 1)).status_int == 413


def test_ids_are_never_given_twice(shop, mug):
    shop("DELETE", "/products/1/")
    assert shop.product()["id"] == 2


def test_products_are_found_by_text_ignoring_case_and_by_stock(shop):
    for name, description, stock in [("Müg", "", 1), ("Tea", "for a MÜG", 0), ("100%_", "", 0), ("Straße", "x\ny", 3)]:
        shop.product(name=name, description=description, stock=stock)

    def found(query):
        return [product["id"] for product in shop("GET", "/products/?" + query).json["products"]]

    assert found("q=m%C3%BCG") == [1, 2] and found("q=%25_") == [3] and found("q=STRASSE") == [4] and found("q=nope") == []
    assert found("q=") == [1, 2, 3, 4] and found("q=x%0Ay") == [4] and found("q=" + "z" * 2000) == []
    assert found("available=true") == [1, 4] and found("available=false") == [2, 3]
    assert found("available=false&q=m%C3%9CG") == [2] and found("after=2") == [3, 4] and found("limit=1&after=0") == [1]


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


@pytest.mark.parametrize("query, name", [
    ("limit=0", "limit"), ("limit=1001", "limit"), ("limit=", "limit"), ("limit=1_0", "limit"), ("limit=%205", "limit"),
    ("limit=%2B5", "limit"), ("limit=%D9%A3", "limit"), ("limit=1.0", "limit"), ("limit=-1", "limit"), ("after=-1", "after"),
    ("after=" + "9" * 20, "after"), ("after=" + "9" * 5000, "after"), ("after=x", "after"), ("available=yes", "available"),
    ("available=True", "available"), ("available=", "available"), ("q=%00", "q"), ("q=%FF", "q"), ("q=%ED%A0%80", "q"),
    ("colour=red", "colour"), ("Q=x", "Q"), ("limit=1&limit=2", "limit"), ("%FF=1", "?")])
def test_a_query_parameter_that_breaks_its_rule_is_named(shop, query, name):
    answer = shop("GET", "/products/?" + query)
    assert list(errors_of(answer)) == [name] and "parameter" in answer.json["errors"][0]


@pytest.mark.parametrize("path", ["/", "/healthz", "/openapi.json", "/products/1/", "/orders/1/"])
def test_an_unknown_query_parameter_is_refused_everywhere(shop, mug, path):
    shop.order((1, 1))
    assert "x" in errors_of(shop("GET", path + "?x=1"))
    assert "x" in errors_of(shop("POST", "/orders/?x=1", {"products": [{"product_id": 1, "quantity": 1}]}))


@pytest.mark.parametrize("number", ["0", "7", "abc", "%ff1", "1%ff", "99999999999999999999", "9223372036854775808", "-1", "+1",
                                    "1_0", "%201", "%D9%A3", "1.0", "1%00", "1%0A", "%F0%9F%98%80"])
@pytest.mark.parametrize("method, path", [("GET", "/products/{}/"), ("PATCH", "/products/{}/"), ("DELETE", "/products/{}"),
                                          ("POST", "/products/{}/stock/"), ("GET", "/orders/{}"), ("PATCH", "/orders/{}/")])
def test_an_id_that_does_not_exist_is_a_404(shop, mug, method, path, number):
    body = {"PATCH": {"status": "completed"} if "orders" in path else {"stock": 1}, "POST": {"change": 1}}.get(method)
    assert shop(method, path.format(number), body).status_int == 404


def test_every_path_works_without_its_last_slash_for_every_method(shop):
    assert shop("POST", "/products", {"name": "x", "price": 1, "stock": 5}).status_int == 201
    assert shop("GET", "/products").json == shop("GET", "/products/").json
    assert shop("PATCH", "/products/1", {"price": 2}).json["price"] == 2
    assert shop("POST", "/products/1/stock", {"change": 1}).json["stock"] == 6
    assert shop("POST", "/orders", {"products": [{"product_id": 1, "quantity": 1}]}).status_int == 201
    assert shop("GET", "/orders/1").json["id"] == 1 and shop("PATCH", "/orders/1", {"status": "completed"}).status_int == 200
    assert shop("DELETE", "/products/1").status_int == 204
    for path in "/product", "/products//", "/products/1/2/", "/orders/1/stock/", "//", "/products/1/stock/x":
        assert shop("GET", path).status_int == 404, path


def test_a_change_touches_only_what_it_gives(shop, mug):
    changed = shop("PATCH", "/products/1/", {"price": 12.5})
    assert changed.status_int == 200 and changed.json == {**mug, "price": 12.5} == shop("GET", "/products/1/").json
    assert shop("PATCH", "/products/1/", {"stock": 0, "name": "Cup", "description": "d"}).json == {
        "id": 1, "name": "Cup", "description": "d", "price": 12.5, "stock": 0}
    assert shop("PATCH", "/products/1/", {"stock": 3}, {"Content-Type": "application/merge-patch+json"}).json["stock"] == 3
    assert list(errors_of(shop("PATCH", "/products/1/", {}))) == ["#"]
    assert list(errors_of(shop("PATCH", "/products/1/", {"name": None, "id": 2}))) == ["#/id", "#/name"]


def test_if_match_guards_every_change_of_a_product_and_an_order(shop, mug):
    shop.order((1, 1))
    for path, method, body, then in [
            ("/products/1/", "PATCH", {"price": 2}, 200), ("/products/1/stock/", "POST", {"change": 1}, 200),
            ("/orders/1/", "PATCH", {"status": "completed"}, 200), ("/products/1/", "DELETE", None, 204)]:
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
    for change in (1.5, "1", None, True, 10 ** 10):
        assert list(errors_of(shop("POST", "/products/1/stock/", {"change": change}))) == ["#/change"]


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
        assert shop("GET", "/products/1/").json["price"] == shop("GET", "/products/").json["products"][0]["price"] == price
    other.app.app.store.close()


# --------------------------------------------------------------------------------------------------- every path

@pytest.mark.parametrize("path, methods", [
    ("/", "GET HEAD"), ("/healthz", "GET HEAD"), ("/openapi.json", "GET HEAD"), ("/products/", "GET HEAD POST"),
    ("/products/1/", "DELETE GET HEAD PATCH"), ("/products/1/stock", "POST"), ("/orders/", "GET HEAD POST"),
    ("/orders/1/", "GET HEAD PATCH")])
def test_the_methods_of_a_path_are_told_and_the_others_refused(shop, mug, path, methods):
    allow = ", ".join(sorted([*methods.split(), "OPTIONS"]))
    options = shop("OPTIONS", path)
    assert options.status_int == 204 and options.headers["Allow"] == allow and options.body == b""
    for method in {"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "TRACE", "BREW"} - set(methods.split()):
        refused = shop(method, path)
        assert refused.status_int == 405 and refused.headers["Allow"] == allow


def test_head_answers_with_the_headers_of_get(shop, mug):
    shop.order((1, 1))
    for path in ("/", "/healthz", "/openapi.json", "/products/", "/products/?limit=1", "/products/1/", "/orders/", "/orders/1/",
                 "/products/9/", "/nowhere/"):
        get, head = shop("GET", path), shop("HEAD", path)
        assert (head.status, head.headerlist, head.body) == (get.status, get.headerlist, b"")


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
    assert client.app.post_json("/a/b/orders/", {"products": [{"product_id": 1, "quantity": 1}]}).headers[
        "Location"] == "/a/b/orders/1/"
    page = client("GET", "/a/b/products/?limit=1")
    assert page.json["next"] == "/a/b/products/?limit=1&after=1" and "</a/b/" in page.headers["Link"]
    assert client("GET", "/a/b/").json["orders"] == "/a/b/orders/"
    assert client("GET", "/a/b/openapi.json").json["servers"] == [{"url": "/a/b"}]
    assert client("GET", "/a/b/products/%E6%97%A5/").status_int == 404
    app.store.close()


def test_two_shops_in_one_process_do_not_touch_each_other(shop, tmp_path):
    other = Client(shop_module.create_app(f"sqlite:///{tmp_path}/other.sqlite3", "secret"))
    shop.product()
    assert other("GET", "/products/").json["products"] == [] and other("GET", "/orders/").status_int == 401
    assert shop("GET", "/orders/").status_int == 200
    other.app.app.store.close()


def test_a_fault_of_ours_is_a_500_that_tells_nothing(shop, mug, url):
    with sqlite3.connect(url[10:]) as con:
        con.execute("ALTER TABLE product RENAME TO secret_name")
    con.close()
    answer = shop("GET", "/products/")
    assert answer.status_int == 500 and "secret" not in answer.text and "no such table" not in answer.text
    assert "Traceback" in answer.errors
    assert shop("GET", "/healthz").status_int == 503
    assert shop.order((1, 1)).status_int == 500 and shop("GET", "/openapi.json").status_int == 200


def test_importing_the_shop_has_no_effects(tmp_path):
    subprocess.run([sys.executable, "-c", "import shop, db"], cwd=tmp_path, check=True, env={"PYTHONPATH": str(HERE)})
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------------------------------------------------- orders

def test_an_order_takes_the_stock_and_copies_name_and_price(shop, mug):
    tea = shop.product(name="Tea", price=4.99, stock=1)
    placed = shop.order((tea["id"], 1), (mug["id"], 2))
    assert placed.status_int == 201 and placed.headers["Location"] == "/orders/1/"
    assert abs(time.time() - time.mktime(time.strptime(placed.json["created_at"], "%Y-%m-%dT%H:%M:%SZ")) + time.timezone) < 60
    assert placed.json == {
        "id": 1, "status": "pending", "total_price": 24.97, "created_at": placed.json["created_at"],
        "products": [{"product_id": 2, "name": "Tea", "price": 4.99, "quantity": 1},
                     {"product_id": 1, "name": "Mug", "price": 9.99, "quantity": 2}]}
    assert (shop.stock(mug), shop.stock(tea)) == (3, 0)
    shop("PATCH", "/products/1/", {"name": "Cup", "price": 1})
    shop("DELETE", "/products/2/")
    assert shop("GET", "/orders/1/").json == placed.json == shop("GET", "/orders/").json["orders"][0]


def test_an_order_that_is_short_of_anything_changes_nothing(shop, mug):
    tea, jam = shop.product(name="Tea", stock=1), shop.product(name="Jam", stock=50)
    short = shop.order((mug["id"], 6), (jam["id"], 50), (tea["id"], 2))
    assert short.status_int == 409 and short.json["title"] == "Insufficient stock"
    assert short.json["shortages"] == [{"product_id": 1, "requested": 6, "available": 5},
                                       {"product_id": 2, "requested": 2, "available": 1}]
    assert short.json["detail"].startswith("Product 1 has 5 left, 6 were asked for.")
    assert [shop.stock(product) for product in (mug, tea, jam)] == [5, 1, 50]
    assert shop("GET", "/orders/").json == {"orders": [], "next": None}


def test_an_unknown_product_is_told_by_a_pointer_to_the_line(shop, mug):
    answer = shop.order((mug["id"], 1), (77, 1), (10 ** 17, 1))
    assert list(errors_of(answer)) == ["#/products/1", "#/products/2"] and shop.stock(mug) == 5


@pytest.mark.parametrize("body, pointers", [
    ({}, ["#/products"]), ({"products": []}, ["#/products"]), ({"products": {}}, ["#/products"]),
    ({"products": [1]}, ["#/products/0"]), ({"products": [{}]}, ["#/products/0/product_id", "#/products/0/quantity"]),
    ({"products": [{"product_id": 1, "quantity": 1}] * 2}, ["#/products/1"]),
    ({"products": [{"product_id": 1, "quantity": 1}, {"product_id": 1, "quantity": 0}]},
     ["#/products/1/quantity", "#/products/1"]),
    ({"products": [{"product_id": n, "quantity": 1} for n in range(1, 102)]}, ["#/products"]),
    ({"products": [{"product_id": 0, "quantity": 0}]}, ["#/products/0/product_id", "#/products/0/quantity"]),
    ({"products": [{"product_id": 1, "quantity": 100_001}]}, ["#/products/0/quantity"]),
    ({"products": [{"product_id": True, "quantity": "2"}]}, ["#/products/0/product_id", "#/products/0/quantity"]),
    ({"products": [{"product_id": 1, "quantity": 1.5, "price": 1}]}, ["#/products/0/price", "#/products/0/quantity"]),
    ({"products": [{"product_id": 10 ** 20, "quantity": 1}], "total": 5}, ["#/total", "#/products/0/product_id"])])
def test_an_order_that_breaks_a_rule_is_told_where(shop, mug, body, pointers):
    assert list(errors_of(shop("POST", "/orders/", body))) == pointers and shop.stock(mug) == 5


def test_a_total_is_exact_to_the_cent(shop):
    prices = [random.Random(1).randrange(0, 100_000_001) for _ in range(99)] + [100_000_000]
    for cents in prices:
        shop("POST", "/products/", f'{{"name": "x", "price": {Decimal(cents) / 100}, "stock": 1000000}}'.encode())
    quantities = [random.Random(2).randrange(1, 100_001) for _ in range(99)] + [100_000]
    placed = shop.order(*enumerate(quantities, 1))
    exact = json.loads(placed.text, parse_float=Decimal)
    assert exact["total_price"] == Decimal(sum(map(int.__mul__, prices, quantities))) / 100
    assert [line["price"] for line in exact["products"]] == [Decimal(cents) / 100 for cents in prices]
    listed = json.loads(shop("GET", "/products/").text, parse_float=Decimal)
    assert [product["price"] for product in listed["products"]] == [Decimal(cents) / 100 for cents in prices]


def test_the_greatest_order_there_can_be_has_an_exact_total(shop):
    for _ in range(100):
        shop.product(price=1_000_000, stock=100_000)
    assert shop.order(*((number, 100_000) for number in range(1, 101))).json["total_price"] == 10 ** 13


def test_orders_are_paged_filtered_and_polled(shop):
    shop.product(stock=1000)
    assert shop("GET", "/orders/").json == {"orders": [], "next": None}
    for _ in range(105):
        shop.order((1, 1))
    for number in 2, 3, 5:
        shop("PATCH", f"/orders/{number}/", {"status": "completed"})

    def listed(query):
        page = shop("GET", "/orders/" + query)
        assert (f'<{page.json["next"]}>; rel="next"' if page.json["next"] else None) == page.headers.get("Link")
        return [order["id"] for order in page.json["orders"]], page.json["next"]

    assert listed("") == (list(range(1, 101)), "/orders/?after=100")
    assert listed("?after=100") == (list(range(101, 106)), None) and listed("?after=105") == ([], None)
    assert listed("?limit=1000") == (list(range(1, 106)), None) and listed("?after=0&limit=105")[1] is None
    assert listed("?status=completed&limit=2") == ([2, 3], "/orders/?status=completed&limit=2&after=3")
    assert listed("?status=completed&limit=2&after=3") == ([5], None) and listed("?status=cancelled") == ([], None)
    for query, name in [("limit=1001", "limit"), ("status=lost", "status"), ("status=", "status"), ("q=x", "q")]:
        assert list(errors_of(shop("GET", "/orders/?" + query))) == [name]


def test_cancelling_puts_the_stock_back_exactly_once(shop, mug):
    shop.order((1, 4))
    for _ in range(3):
        cancelled = shop("PATCH", "/orders/1/", {"status": "cancelled"})
        assert cancelled.status_int == 200 and cancelled.json["status"] == "cancelled" and shop.stock(mug) == 5
    refused = shop("PATCH", "/orders/1/", {"status": "completed"})
    assert refused.status_int == 409 and refused.json["type"] == "urn:problem-type:invalid-transition"


def test_a_completed_order_stays_completed(shop, mug):
    shop.order((1, 4))
    assert [shop("PATCH", "/orders/1/", {"status": status}).status_int
            for status in ("completed", "completed", "cancelled")] == [200, 200, 409]
    assert shop.stock(mug) == 1 and shop("GET", "/orders/1/").json["status"] == "completed"
    for body in {"status": "shipped"}, {"status": 5}, {}, {"status": "completed", "total_price": 0}:
        assert errors_of(shop("PATCH", "/orders/1/", body))


def test_neither_a_deleted_product_nor_a_full_stock_blocks_a_cancel(shop):
    _, full, normal = shop.product(), shop.product(), shop.product()
    shop.order((1, 2), (2, 2), (3, 2))
    shop("DELETE", "/products/1/")
    shop("PATCH", "/products/2/", {"stock": 999_999_999})
    assert shop("PATCH", "/orders/1/", {"status": "cancelled"}).status_int == 200
    assert (shop.stock(full), shop.stock(normal)) == (10 ** 9, 5)


# ----------------------------------------------------------------------------------------------------- idempotency

def test_a_repeat_gets_the_first_answer_and_does_nothing(shop, mug):
    for path, body in [("/orders/", {"products": [{"product_id": 1, "quantity": 1}]}), ("/products/", {"name": "x", "price": 1}),
                       ("/products/1/stock/", {"change": 1})]:
        first = shop("POST", path, body, {"Idempotency-Key": "key" + path})
        before = shop("GET", "/products/").json
        again = shop("POST", path.rstrip("/"), body, {"Idempotency-Key": f'"key{path}"'})
        assert (again.status, again.body, again.headers.get("Location")) == (
            first.status, first.body, first.headers.get("Location"))
        assert "Idempotent-Replayed" not in first.headers and again.headers["Idempotent-Replayed"] == "true"
        assert shop("GET", "/products/").json == before


def test_a_key_with_another_request_is_refused(shop, mug):
    body = {"products": [{"product_id": 1, "quantity": 1}]}
    shop("POST", "/orders/", body, {"Idempotency-Key": "k"})
    for path, other in [("/orders/", {"products": [{"product_id": 1, "quantity": 2}]}), ("/products/", {"name": "x", "price": 1})]:
        refused = shop("POST", path, other, {"Idempotency-Key": "k"})
        assert refused.status_int == 422 and refused.json["type"] == "urn:problem-type:idempotency-key-reused"
    assert shop.stock(mug) == 4


def test_a_refused_request_may_be_tried_again_with_its_key(shop, mug):
    body = {"products": [{"product_id": 1, "quantity": 6}]}
    assert shop("POST", "/orders/", body, {"Idempotency-Key": "k"}).status_int == 409
    shop("POST", "/products/1/stock/", {"change": 1})
    placed = shop("POST", "/orders/", body, {"Idempotency-Key": "k"})
    assert placed.status_int == 201 and "Idempotent-Replayed" not in placed.headers


@pytest.mark.parametrize("key, good", [
    ("", 0), ('""', 0), ("a b", 0), ("a\tb", 0), ("é", 0), ("x" * 256, 0), ('"abc', 0), ('abc"def', 1), ('"a"b"', 0), ('"a\\b"', 0),
    ("x" * 255, 1), ('"' + "y" * 255 + '"', 1), ('"' + "y" * 256 + '"', 0), ('"a\\"b"', 1), ("!#$%&'*+-.^_`|~:;<>()", 1), ('"', 0)])
def test_a_key_is_1_to_255_visible_ascii_characters_bare_or_quoted(shop, mug, key, good):
    assert shop.order((1, 1), **{"Idempotency-Key": key}).status_int == (201 if good else 400)


def test_keys_live_a_day_and_are_then_purged(shop, mug, url):
    for key in "old", "young":
        shop.order((1, 1), **{"Idempotency-Key": key})
    with sqlite3.connect(url[10:]) as con:
        for key, hours in ("old", 24.1), ("young", 23.9):
            con.execute("UPDATE idempotency_key SET created_at = ? WHERE key = ?", (db.timestamp(int(hours * 3600)), key))
    assert shop.order((1, 1), **{"Idempotency-Key": "new"}).status_int == 201
    assert [key for key, in con.execute("SELECT key FROM idempotency_key ORDER BY key")] == ["new", "young"]
    con.close()
    assert shop.order((1, 1), **{"Idempotency-Key": "young"}).headers["Idempotent-Replayed"] == "true"
    assert "Idempotent-Replayed" not in shop.order((1, 1), **{"Idempotency-Key": "old"}).headers


# ---------------------------------------------------------------------------------------------------------- access

def test_with_a_token_set_only_reading_products_and_ordering_stay_open(url):
    app = shop_module.create_app(url, "s3cret~token")
    shop = Client(app)
    key = {"Authorization": "Bearer s3cret~token"}
    assert shop("POST", "/products/", {"name": "x", "price": 1, "stock": 9}, key).status_int == 201
    for method, path, body in [("GET", "/", None), ("GET", "/healthz", None), ("GET", "/openapi.json", None),
                               ("GET", "/products/", None), ("HEAD", "/products/1", None),
                               ("POST", "/orders/", {"products": [{"product_id": 1, "quantity": 1}]})]:
        assert shop(method, path, body).status_int in (200, 201)
    for method, path, body in [("POST", "/products/", {"name": "x", "price": 1}), ("PATCH", "/products/1/", {"price": 2}),
                               ("DELETE", "/products/1/", None), ("POST", "/products/1/stock/", {"change": 1}),
                               ("GET", "/orders/", None), ("GET", "/orders/1/", None), ("GET", "/orders/99/", None),
                               ("PATCH", "/orders/1/", {"status": "completed"}), ("POST", "/products/", b"{")]:
        for wrong in {}, {"Authorization": "Bearer other"}, {"Authorization": "s3cret~token"}, {"Authorization": "Bearer "}, {
                "Authorization": "Basic s3cret~token"}, {"Authorization": "Bearer s3cret~tokenx"}, {"Authorization": "Bearer é"}:
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
    answers = at_once(16, lambda n: [Client(shop.app.app).order(*lines[::1 if n % 2 else -1]).status_int for _ in range(8)])
    assert sum(answers, []) == [201] * 128
    assert [shop.stock({"id": number}) for number in range(1, 5)] == [1000 - 128 * 3] * 4


def test_forty_equal_requests_with_one_key_make_one_order_and_forty_equal_answers(shop, mug):
    answers = at_once(40, lambda n: Client(shop.app.app).order((1, 1), **{"Idempotency-Key": "k"}))
    assert {(answer.status_int, answer.body) for answer in answers} == {(201, answers[0].body)}
    assert sum("Idempotent-Replayed" not in answer.headers for answer in answers) == 1
    assert shop.stock(mug) == 4 and len(shop("GET", "/orders/").json["orders"]) == 1


def test_many_cancels_of_one_order_put_the_stock_back_once(shop, mug):
    shop.order((1, 3))
    answers = at_once(16, lambda n: Client(shop.app.app)("PATCH", "/orders/1/", {
        "status": "cancelled" if n % 2 else "completed"}).json.get("status"))
    order = shop("GET", "/orders/1/").json["status"]
    assert set(answers) <= {order, 409} and shop.stock(mug) == (5 if order == "cancelled" else 2)


def test_changes_guarded_by_one_tag_have_one_winner(shop, mug):
    tag = shop("GET", "/products/1/").headers["ETag"]
    answers = at_once(16, lambda n: Client(shop.app.app)("PATCH", "/products/1/", {"price": n + 20}, {"If-Match": tag}).status_int)
    assert (answers.count(200), answers.count(412)) == (1, 15)


def test_writers_are_served_in_the_order_in_which_they_came():
    queue, served = db.Queue(), []
    assert queue.enter(0)

    def wait(number):
        assert queue.enter(5)
        served.append(number)
        queue.leave()

    threads = []
    for number in range(8):
        threads.append(threading.Thread(target=wait, args=(number,)))
        threads[-1].start()
        while len(queue.tickets) < number + 2:
            pass
    assert not queue.enter(0.01) and len(queue.tickets) == 9
    queue.leave()
    [thread.join() for thread in threads]
    assert served == list(range(8)) and not queue.tickets


def test_stock_is_conserved_through_a_mixed_run(shop, url):
    for _ in range(5):
        shop.product(stock=200)
    added = [0] * 6

    def work(n):
        client, dice = Client(shop.app.app), random.Random(n)
        for _ in range(25):
            product, other, amount = dice.randint(1, 5), dice.randint(1, 5), dice.randint(1, 9)
            match dice.randrange(4):
                case 0 if client("POST", f"/products/{product}/stock/", {"change": amount}).status_int == 200:
                    added[product] += amount
                case 1 if client("POST", f"/products/{product}/stock/", {"change": -amount}).status_int == 200:
                    added[product] -= amount
                case 2:
                    client("PATCH", f"/orders/{dice.randint(1, 60)}/", {"status": dice.choice(["cancelled", "completed"])})
                case _:
                    client.order(*{product: amount, other: amount}.items())

    at_once(1, work) and at_once(1, work)  # added[] is counted without a lock
    at_once(8, lambda n: [Client(shop.app.app).order((1 + n % 5, 2), (1 + (n + 1) % 5, 1)) for _ in range(10)])
    sold = [0] * 6
    for order in shop("GET", "/orders/?limit=1000").json["orders"]:
        for line in order["products"] if order["status"] != "cancelled" else []:
            sold[line["product_id"]] += line["quantity"]
    for number in range(1, 6):
        assert shop.stock({"id": number}) == 200 + added[number] - sold[number]
    assert db.find_faults(url[10:]) == []
