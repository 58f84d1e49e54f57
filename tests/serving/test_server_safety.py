"""What the server refuses: hosts, origins, keys, bodies in size and pace, and damaged or hostile content."""

from __future__ import annotations

import io
import socket
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image
from running_server import Running, running_server
from tiny_latent_diffusion import tiny_model

from ldm.serving.launch import MOST_HEAD
from ldm.serving.store import ImageStore

PIPE = tiny_model("tiny")
MODELS = {"tiny": lambda: PIPE}
GENERATIONS = "/v1/images/generations"
BODY = {"prompt": "a cat", "steps": 1}


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running_server(MODELS, most=2**20) as running:
        yield running


def png(width: int = 32, height: int = 32) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), "red").save(buffer, format="PNG")
    return buffer.getvalue()


def bomb(width: int, height: int) -> bytes:
    """Return a PNG of some bytes whose header states a size."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return (
            struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = zlib.compress(b"\0" * 1000)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def raw(server: Running, request: bytes, seconds: float = 20) -> bytes:
    """Send bytes and return all that is answered."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=seconds) as made:
        made.sendall(request)
        answer = b""
        while part := made.recv(65536):
            answer += part
        return answer


# Hosts and origins


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("127.0.0.1", 200),
        ("localhost:9", 200),
        ("[::1]:80", 200),
        ("192.168.1.5", 200),  # an address cannot be pointed elsewhere, a name can
        ("evil.example", 403),
        ("localhost.evil.example", 403),
        ("127.0.0.1.evil.example", 403),
        ("127.0.0.1@evil.example", 403),
        ("evil.example@127.0.0.1", 403),
        ("127.0.0.1/v1?", 403),
        ("", 403),
        ("[", 403),
    ],
)
def test_names_of_other_hosts_are_refused(server, host, status):
    answer = raw(server, f"GET /health HTTP/1.1\r\nhost: {host}\r\nconnection: close\r\n\r\n".encode())
    assert int(answer.split()[1]) == status, answer[:300]


@pytest.mark.parametrize(
    "head", [b"GET /health HTTP/1.1\r\nhost: x\r\nlong: ", b"GET /", b"GET / HTTP/1.1\r\n"]
)
def test_headers_that_do_not_end_are_refused(server, head):
    line = b"a" * 1000 if not head.endswith(b"\n") else b"name: value\r\n" * 100
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as client:
        client.sendall(head)
        for _ in range(2 * MOST_HEAD // len(line)):
            try:
                client.sendall(line)
            except OSError:  # the server has closed the connection
                break
        else:
            assert client.recv(100).startswith(b"HTTP/1.1 400")
    assert server.http.get("/health").status_code == 200


def test_long_headers_and_large_bodies_are_read(server):
    headers = {"x-long": "a" * (MOST_HEAD // 2), "content-type": "application/json"}
    content = b'{"prompt": "a cat", "steps": 1' + b" " * 2**19 + b"}"
    assert server.http.post(GENERATIONS, content=content, headers=headers).status_code == 200


@pytest.mark.parametrize("origin", ["https://evil.example", "null", "http://127.0.0.1:1", "http://[", "x"])
def test_pages_of_other_origins_are_refused(server, origin):
    for path in (GENERATIONS, "/sdapi/v1/txt2img"):
        made = server.http.post(path, json=BODY, headers={"origin": origin})
        assert made.status_code == 403 and made.json()["error"]["code"] == "origin_not_allowed"
        assert "access-control-allow-origin" not in made.headers


def test_the_own_page_is_allowed(server):
    assert server.http.post(GENERATIONS, json=BODY, headers={"origin": server.url}).status_code == 200


def test_allowed_origins_may_ask():
    origin = "https://images.example"
    with running_server(MODELS, origins=(origin,)) as running:
        asked = {"origin": origin, "access-control-request-method": "POST"}
        made = running.http.options(GENERATIONS, headers=asked)
        assert made.status_code == 204 and made.headers["access-control-allow-origin"] == origin
        made = running.http.post(GENERATIONS, json=BODY, headers={"origin": origin})
        assert made.status_code == 200 and made.headers["access-control-allow-origin"] == origin
        assert running.http.get("/health", headers={"host": "images.example"}).status_code == 200
        made = running.http.post(GENERATIONS, json=BODY, headers={"origin": "https://other.example"})
        assert made.status_code == 403


# Keys


def test_a_key_is_required_everywhere_but_for_the_page():
    with running_server(MODELS, key="sesame") as running:
        for path in ("/", "/health"):
            assert running.http.get(path).status_code == 200
        for headers in (
            {},
            {"authorization": "Bearer other"},
            {"authorization": "sesame"},
            {"authorization": b"Bearer \xe9"},
        ):
            for path in (GENERATIONS, "/sdapi/v1/txt2img"):
                made = running.http.post(path, json=BODY, headers=headers)
                assert made.status_code == 401 and made.json()["error"]["code"] == "invalid_api_key"
            for path in ("/v1/models", "/metrics", "/openapi.json", "/sdapi/v1/options"):
                assert running.http.get(path, headers=headers).status_code == 401
        made = running.http.post(GENERATIONS, json=BODY, headers={"authorization": "Bearer sesame"})
        assert made.status_code == 200
        assert running.http.get(made.json()["data"][0]["url"]).status_code == 200  # unguessable
        basic = running.http.get("/sdapi/v1/options", auth=("any", "sesame"))
        assert basic.status_code == 200


# Bodies


def test_large_bodies_are_refused_before_they_are_read(server):
    head = f"POST {GENERATIONS} HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\n"
    head += "connection: close\r\n"
    answer = raw(server, f"{head}content-length: 9999999999999\r\n\r\n".encode())
    assert b" 413 " in answer.splitlines()[0]
    chunks = b"10000\r\n" + b" " * 0x10000 + b"\r\n"
    answer = raw(server, f"{head}transfer-encoding: chunked\r\n\r\n".encode() + chunks * 17 + b"0\r\n\r\n")
    assert b" 413 " in answer.splitlines()[0]


def test_bodies_that_stand_still_are_given_up(monkeypatch):
    monkeypatch.setattr("ldm.serving.guard.Guard._limited", short(0.2))
    with running_server(MODELS) as running:
        made = socket.create_connection(("127.0.0.1", running.port), timeout=10)
        with made:
            made.sendall(
                f"POST {GENERATIONS} HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-length: 10\r\n\r\n{{".encode()
            )
            answer = made.recv(65536)
        assert answer.startswith(b"HTTP/1.1 408") and b"x-should-retry: false" in answer
        assert running.http.post(GENERATIONS, json=BODY).status_code == 200


def short(seconds: float):
    from ldm.serving.guard import Guard

    limited = Guard._limited

    def run(self: Guard, headers, receive):
        self.seconds = seconds
        return limited(self, headers, receive)

    return run


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"null",
        b"[]",
        b'"text"',
        b"{",
        b'{"prompt": "a", "n": NaN}',
        b'{"prompt": "a", "guidance": 1e999}',
        b'{"prompt": "a", "guidance": Infinity}',
        b'{"prompt": "a", "prompt": "b"}',
        b'{"prompt": "\xff"}',
        b'{"prompt": "\\ud800"}',
        b'{"prompt": "a", "n": ' + b"9" * 5000 + b"}",
        b"[" * 100_000,
        b'{"a":' * 5000 + b"1" + b"}" * 5000,
    ],
)
def test_damaged_json_is_the_clients_fault(server, content):
    made = server.http.post(GENERATIONS, content=content, headers={"content-type": "application/json"})
    assert made.status_code == 400 and set(made.json()["error"]) == {"message", "type", "param", "code"}


FORM = "multipart/form-data; boundary=x"
PART = b'--x\r\ncontent-disposition: form-data; name="image"; filename="a.png"\r\n\r\n'


@pytest.mark.parametrize(
    ("kind", "content", "status"),
    [
        (FORM, b"", 400),
        (FORM, b"--y\r\n", 400),
        (FORM, PART + png()[:50], 400),  # truncated
        (FORM, PART + png() + b"\r\n--x--\r\n", 400),  # no prompt
        (
            FORM,
            b'--x\r\ncontent-disposition: form-data; name="prompt"\r\n\r\na\r\n' * 200 + b"--x--\r\n",
            400,
        ),
        (FORM, b"--x\r\ncontent-disposition: form-data\r\n\r\na\r\n--x--\r\n", 400),
        (FORM, b"--x\r\n" + b"a: b\r\n" * 5000 + b"\r\n--x--\r\n", 400),
        ("multipart/form-data", b"--x--\r\n", 400),
        ("multipart/form-data; boundary=", b"--\r\n", 400),
        ("multipart/form-data; boundary=\x80", b"--\r\n", 400),
        ("application/json", b'{"prompt": "a"}', 415),
        ("text/plain", b"a", 415),
        ("", b"a", 415),
    ],
)
def test_damaged_forms_are_the_clients_fault(server, kind, content, status):
    for endpoint in ("edits", "variations"):
        made = server.http.post(
            f"/v1/images/{endpoint}", content=content, headers={"content-type": kind.encode("latin-1")}
        )
        if endpoint == "variations" and made.status_code == 200:
            continue  # which needs no prompt
        assert made.status_code == status, made.text
        assert set(made.json()["error"]) == {"message", "type", "param", "code"}


def test_texts_in_place_of_files_and_files_in_place_of_texts(server):
    made = server.http.post("/v1/images/edits", files={"prompt": png(), "image": png()})
    assert made.status_code == 400 and made.json()["error"]["param"] == "prompt"
    made = server.http.post(
        "/v1/images/edits", data={"prompt": "a", "image": "/etc/passwd"}, files={"mask": png()}
    )
    assert made.status_code == 400 and made.json()["error"]["param"] == "image"


@pytest.mark.parametrize(
    "content", [bomb(60_000, 60_000), bomb(2**31 - 1, 2**31 - 1), bomb(5000, 5000), bomb(0, 0), png()[:60]]
)
def test_images_are_refused_before_they_are_decoded(server, content):
    for path in ("edits", "variations"):
        made = server.http.post(f"/v1/images/{path}", files={"image": content}, data={"prompt": "a cat"})
        assert made.status_code == 400 and made.json()["error"]["param"] == "image", made.text


def test_large_images_are_reduced(server):
    data = {"prompt": "a cat", "steps": "1", "strength": "0.2", "response_format": "b64_json"}
    made = server.http.post("/v1/images/edits", files={"image": png(4000, 1000)}, data=data)
    assert made.status_code == 200 and made.json()["size"] == "2048x512"


def test_slim_images_are_drawn_in_a_size_that_the_model_makes(server):
    data = {"prompt": "a cat", "steps": "1", "response_format": "b64_json"}
    made = server.http.post("/v1/images/edits", files={"image": png(2000, 1)}, data=data)
    assert made.status_code == 200 and made.json()["size"] == "2000x1"


def test_methods_and_paths_that_there_are_not(server):
    for path in (
        "/v1/images/other",
        "/page/../application.py",
        "/page/%2e%2e/guard.py",
        "/page/none",
        "/etc/passwd",
    ):
        made = server.http.get(path)
        assert made.status_code == 404 and made.json()["error"]["code"] == "not_found"
    assert server.http.get(GENERATIONS).status_code == 405
    assert server.http.get("/v1/images/files/none.png").status_code == 404


def test_no_path_of_the_disk_is_told(server):
    here = str(Path(__file__).parents[2])
    for path in (
        "/v1/models",
        "/health",
        "/openapi.json",
        "/sdapi/v1/sd-models",
        "/sdapi/v1/options",
        "/metrics",
    ):
        assert here not in server.http.get(path).text
    made = server.http.post(GENERATIONS, json={**BODY, "response_format": "b64_json"})
    assert here not in made.text


def test_pages_may_load_nothing_from_elsewhere(server):
    headers = server.http.get("/").headers
    assert "default-src 'none'" in headers["content-security-policy"]
    assert headers["x-frame-options"] == "DENY" and headers["x-content-type-options"] == "nosniff"


# Urls


def test_images_expire_and_the_oldest_go_first():
    now = [0.0]
    store = ImageStore(lifetime=10, most=100, clock=lambda: now[0])
    names = [store.put(bytes(40), "image/png", "png") for _ in range(2)]
    assert len(set(names)) == 2 and all(len(name) >= 43 for name in names)
    third = store.put(bytes(40), "image/png", "png")
    assert [store.get(name) is None for name in (*names, third)] == [True, False, False]
    now[0] = 9.9
    assert store.get(third).content == bytes(40)
    now[0] = 10
    assert store.get(third) is None and len(store) == 0
    large = store.put(bytes(1000), "image/png", "png")
    assert store.get(large) is not None
