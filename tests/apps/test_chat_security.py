"""Who may talk to the chat's server: hosts, origins, tokens, one-time links, headers."""

from __future__ import annotations

import http.client

import httpx
import pytest

pytest.importorskip("starlette")

from edge_runtime.apps.chat.security import Gate
from tests.apps.chats import chatting


@pytest.fixture(scope="module")
def client(tmp_path_factory):
    with chatting(tmp_path_factory.mktemp("chat")) as found:
        yield found


def plain(client, method="GET", path="/api/start", cookies=True, **headers):
    jar = dict(client.http.cookies) if cookies else {}
    return httpx.request(method, client.origin + path, headers=headers, cookies=jar, content=b"{}")


def test_every_answer_has_the_headers_and_no_inline_code_is_allowed(client):
    for answer in (
        plain(client),
        plain(client, path="/"),
        plain(client, path="/web/js/main.js"),
        plain(client, cookies=False),
        plain(client, path="/nothing"),
    ):
        policy = answer.headers["content-security-policy"]
        assert "default-src 'none'" in policy and "unsafe" not in policy and "frame-ancestors 'none'" in policy
        assert "require-trusted-types-for 'script'" in policy
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["referrer-policy"] == "no-referrer"


def test_the_page_has_no_inline_script_or_style(client):
    page = plain(client, path="/").text
    assert "style=" not in page and "<style" not in page and "onclick" not in page
    assert page.count("<script") == 1 and '<script type="module" src="/web/js/main.js"></script>' in page
    assert "http://" not in page.replace("http://www.w3.org", "") and "https://" not in page


def test_without_the_cookie_nothing_is_told(client):
    for method, path in (
        ("GET", "/"),
        ("GET", "/api/start"),
        ("GET", "/api/events"),
        ("GET", "/api/export"),
        ("POST", "/api/messages"),
    ):
        answer = plain(client, method, path, cookies=False, origin=client.origin)
        assert answer.status_code == 401, path
        assert "edge-runtime chat" in answer.text
    wrong = httpx.get(client.origin + "/api/start", cookies={client.server.gate.cookie: "guess"})
    assert wrong.status_code == 401


@pytest.mark.parametrize(
    "host", ["evil.example", "127.0.0.1", "localhost:1", "127.0.0.1.nip.io:{port}", "", "[::]:{port}"]
)
def test_other_names_are_refused_against_dns_rebinding(client, host):
    answer = plain(client, host=host.format(port=client.server.port))
    assert answer.status_code in (400, 421)
    assert "conversations" not in answer.text


@pytest.mark.parametrize(
    "headers",
    [
        {"origin": "http://evil.example"},
        {"origin": "null"},
        {"origin": "http://127.0.0.1:1"},
        {"origin": "https://127.0.0.1:{port}"},
        {"sec-fetch-site": "cross-site"},
        {"sec-fetch-site": "same-site"},
    ],
)
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_other_pages_are_refused_even_with_the_cookie(client, headers, method):
    headers = {key: value.format(port=client.server.port) for key, value in headers.items()}
    answer = plain(client, method, "/api/start" if method == "GET" else "/api/folders", **headers)
    assert answer.status_code == 403
    assert "access-control-allow-origin" not in answer.headers


def test_changes_without_an_origin_are_refused(client):
    assert plain(client, "POST", "/api/folders").status_code == 403
    assert plain(client, "DELETE", "/api/conversations/1", **{"sec-fetch-site": "none"}).status_code == 403


def test_a_link_works_once_and_its_cookie_is_strict(client):
    link = client.server.link()
    first = httpx.get(link, follow_redirects=False)
    assert first.status_code == 303 and first.headers["location"] == "/"
    cookie = first.headers["set-cookie"]
    assert "HttpOnly" in cookie and "SameSite=Strict" in cookie and "Path=/" in cookie
    again = httpx.get(link, follow_redirects=False)
    assert again.status_code == 403 and "set-cookie" not in again.headers
    assert httpx.get(f"{client.origin}/open/guess").status_code == 403


def test_links_end_after_a_while(monkeypatch):
    gate = Gate(1)
    code = gate.code()
    monkeypatch.setattr("edge_runtime.apps.chat.security.time.monotonic", lambda: 1e12)
    assert gate.redeem(code) is None


def test_the_owners_secret_gives_links_to_programs_but_not_to_pages(client):
    secret = {"x-edge-launch": client.server.gate.launch_secret}
    link = httpx.post(f"{client.origin}/launch", headers=secret).json()["url"]
    assert httpx.get(link, follow_redirects=False).status_code == 303
    assert httpx.post(f"{client.origin}/launch", headers={"x-edge-launch": "guess"}).status_code == 403
    assert httpx.post(f"{client.origin}/launch", headers={**secret, "origin": client.origin}).status_code == 403
    assert httpx.post(f"{client.origin}/launch").status_code == 403


def test_files_outside_the_page_are_not_served(client):
    for path in ("/web/../app.py", "/web/%2e%2e/app.py", "/web/..%2fstore.py", "/web//etc/passwd"):
        connection = http.client.HTTPConnection("127.0.0.1", client.server.port)
        connection.request(
            "GET", path, headers={"cookie": "; ".join(f"{k}={v}" for k, v in client.http.cookies.items())}
        )
        assert connection.getresponse().status == 404, path
        connection.close()
