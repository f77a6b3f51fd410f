"""Raw bytes against `rolecall serve`: framing, sizes, drips, upgrades, clients that stop halfway.

What Hypercorn and h11 allow that is no danger stays (docs/security.md tells); whatever a request
can be smuggled by, or a connection held with, is refused.
"""

from __future__ import annotations

import re
import socket
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import httpx
import psutil
import pytest

from api.http import HEADERS
from tests.live import _serve
from tests.live._serve import ROOT, Serving, wait_until

# The settings of the project, in less time.
IDLE, BODY, UNREAD = 2, 1, 1
LOGIN = b'{"username":"testuser","password":"testpass"}'
LENGTH = str(len(LOGIN)).encode()
GET = b"GET /health/live HTTP/1.1\r\nHost: it\r\n"
POST = b"POST /login HTTP/1.1\r\nHost: it\r\nContent-Type: application/json\r\n"
CHUNKED = POST + b"Transfer-Encoding: chunked\r\n\r\n"
CLOSE = b"Connection: close\r\n"
# Whatever is answered to a request, this would be the answer to what was smuggled in behind it.
NEXT = GET + CLOSE + b"\r\n"
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
UPGRADE = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQ\r\n"


@pytest.fixture(scope="module")
def serving(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    """One worker, with little patience."""
    folder = tmp_path_factory.mktemp("wire")
    config = (ROOT / "hypercorn.toml").read_text()
    shorter = re.sub(r"(?m)^keep_alive_timeout = \d+", f"keep_alive_timeout = {IDLE}", config)
    assert shorter != config
    (folder / "hypercorn.toml").write_text(shorter)
    code = f"from api import cli, idle; idle.UNREAD_SECONDS = {UNREAD}; cli.main()"
    command = (sys.executable, "-c", code)
    found = _serve.start(
        folder, "--demo", cwd=folder, command=command, ROLECALL_BODY_TIMEOUT=str(BODY)
    )
    yield found
    assert found.stop() == 0
    assert "Traceback" not in found.log.read_text()


@dataclass
class Talk:
    """What came back over one connection, and whether the server closed it."""

    got: bytes
    closed: bool
    seconds: float

    @property
    def statuses(self) -> list[int]:
        """The status of each answer."""
        return [int(found) for found in re.findall(rb"HTTP/1\.1 (\d{3}) ", self.got)]


def talk(
    serving: Serving, *pieces: bytes, every: float = 0, half: bool = False, wait: float = 8
) -> Talk:
    """Send pieces over one connection; ``half`` closes our side of it; read to the end."""
    got, began = b"", time.monotonic()
    port = int(serving.url.rpartition(":")[2])
    with socket.create_connection(("127.0.0.1", port), timeout=wait) as wire:
        try:
            for piece in pieces:
                wire.sendall(piece)
                time.sleep(every)
            if half:
                wire.shutdown(socket.SHUT_WR)
        except ConnectionError:
            pass
        try:
            while piece := wire.recv(65_536):
                got += piece
        except TimeoutError:
            return Talk(got, closed=False, seconds=time.monotonic() - began)
        except ConnectionError:
            pass
    return Talk(got, closed=True, seconds=time.monotonic() - began)


POOL = ThreadPoolExecutor(20)


def talk_later(
    serving: Serving, *pieces: bytes, every: float = 0, half: bool = False
) -> Future[Talk]:
    """Talk in a thread."""
    return POOL.submit(talk, serving, *pieces, every=every, half=half)


def chunk(body: bytes) -> bytes:
    """Return a body as one chunk and the last."""
    return b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body)


FRAMED = POST + b"Content-Length: " + LENGTH + b"\r\n"
HIDDEN = b"0\r\n\r\n" + NEXT
SMUGGLING = {
    "CL and TE": FRAMED + b"Transfer-Encoding: chunked\r\n\r\n" + chunk(LOGIN),
    "TE and CL": POST + b"Transfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n" + HIDDEN,
    "CL, folded TE": FRAMED + b"Transfer-Encoding:\r\n chunked\r\n\r\n" + HIDDEN,
    "CL, TE in capitals": FRAMED + b"TRANSFER-ENCODING: CHUNKED\r\n\r\n" + HIDDEN,
    "two CL": FRAMED + b"Content-Length: 5\r\n\r\n" + LOGIN,
    "CL in a list": POST + b"Content-Length: 5, 6\r\n\r\n" + LOGIN,
    "CL with a plus": POST + b"Content-Length: +5\r\n\r\n" + LOGIN,
    "negative CL": POST + b"Content-Length: -1\r\n\r\n" + LOGIN,
    "CL in hex": POST + b"Content-Length: 0x5\r\n\r\n" + LOGIN,
    "empty CL": POST + b"Content-Length:\r\n\r\n" + LOGIN,
    "CL with an underscore": POST + b"Content-Length: 1_0\r\n\r\n" + LOGIN,
    "CL of 30 digits": POST + b"Content-Length: " + b"9" * 30 + b"\r\n\r\n" + LOGIN,
    "space before a colon": POST + b"Content-Length : 5\r\n\r\n" + LOGIN,
    "TE, space before the colon": POST + b"Transfer-Encoding : chunked\r\n\r\n" + HIDDEN,
    "TE gzip": POST + b"Transfer-Encoding: gzip\r\n\r\n" + HIDDEN,
    "TE identity": POST + b"Transfer-Encoding: identity\r\n\r\n" + HIDDEN,
    "TE gzip, chunked": POST + b"Transfer-Encoding: gzip, chunked\r\n\r\n" + HIDDEN,
    "TE twice": POST + b"Transfer-Encoding: chunked\r\n" * 2 + b"\r\n" + HIDDEN,
    "TE xchunked": POST + b"Transfer-Encoding: xchunked\r\n\r\n" + HIDDEN,
    "TE with a tab": POST + b"Transfer-Encoding: \x0bchunked\r\n\r\n" + HIDDEN,
    "TE empty": POST + b"Transfer-Encoding:\r\n\r\n" + HIDDEN,
    "TE chunked, chunked": POST + b"Transfer-Encoding: chunked, chunked\r\n\r\n" + HIDDEN,
    "TE in HTTP/1.0": CHUNKED.replace(b"/1.1", b"/1.0", 1) + chunk(LOGIN),
    "a chunk of no size": CHUNKED + b"zz\r\n" + HIDDEN,
    "a chunk in 0x": CHUNKED + b"0x5\r\nhello\r\n" + HIDDEN,
    "a negative chunk": CHUNKED + b"-1\r\nhello\r\n" + HIDDEN,
    "a chunk too long": CHUNKED + b"5\r\nhelloXX" + HIDDEN,
    "a chunk of 25 digits": CHUNKED + b"f" * 25 + b"\r\n" + HIDDEN,
    "chunks with bare LF": CHUNKED + b"5\nhello\n0\n\n" + NEXT,
    "HTTP/2.0": GET.replace(b"/1.1", b"/2.0") + b"\r\n",
    "HTTP/9.9": GET.replace(b"/1.1", b"/9.9") + b"\r\n",
    "HTTP/0.9": b"GET /health/live\r\n\r\n", "no Host": b"GET / HTTP/1.1\r\n\r\n",
    "a Host with space": GET.replace(b"it", b"a b") + b"\r\n",
    "a Host with a user": GET.replace(b"it", b"it@other") + b"\r\n",
    "a Host with a path": GET.replace(b"it", b"it/x") + b"\r\n",
    "two Hosts": GET + b"Host: other\r\n\r\n", "NUL in a value": GET + b"X: a\0b\r\n\r\n",
    "CR in a value": GET + b"X: a\rY: b\r\n\r\n", "NUL in a name": GET + b"X\0: a\r\n\r\n",
    "space in the target": b"GET /a b HTTP/1.1\r\nHost: it\r\n\r\n",
    "no target": b"GET  HTTP/1.1\r\nHost: it\r\n\r\n",
    "a target without a slash": GET.replace(b"/health", b"health") + b"\r\n",
    "an authority": GET.replace(b"/health/live", b"it:443") + b"\r\n",
    "CONNECT": b"CONNECT it:443 HTTP/1.1\r\nHost: it:443\r\n\r\n",
    "an asterisk": GET.replace(b"/health/live", b"*") + b"\r\n",
    "another authority than Host": GET.replace(b"/health", b"http://other/health") + b"\r\n",
    "a user beside Host": GET.replace(b"/health", b"http://it@it/health") + b"\r\n",
    "an authority that is none": GET.replace(b"/health", b"http:///health") + b"\r\n",
    "another scheme": GET.replace(b"/health", b"ftp://it/health") + b"\r\n",
    "a method in small letters": GET.replace(b"GET", b"get") + b"\r\n",
    "a method of both": POST.replace(b"POST", b"Post", 1) + b"Content-Length: 0\r\n\r\n",
    "an LF before a request": b"\n" + GET + b"\r\n",
    "Latin-1 in the target": b"GET /\xe9 HTTP/1.1\r\nHost: it\r\n\r\n",
    "a head with bare LF": NEXT.replace(b"\r\n", b"\n"),
    "one line with bare LF": GET.replace(b"\r\n", b"\n", 1) + b"\r\n",
    "a head that ends in bare LF": GET + b"\n",
    "CL behind a bare LF": POST + b"X: a\nContent-Length: 5\r\n\r\n" + LOGIN,
    "a folded header": GET + b"X: a\r\n b\r\n\r\n", "by a tab": GET + b"X: a\r\n\tb\r\n\r\n",
    "folded Authorization": GET + b"Authorization: Bearer\r\n a.b.c\r\n\r\n",
    "folded CL": POST + b"Content-Length:\r\n " + LENGTH + b"\r\n\r\n" + LOGIN,
    "a trailer with bare LF": CHUNKED + chunk(LOGIN)[:-2] + b"X: a\nY: b\r\n\r\n",
    "a folded trailer": CHUNKED + chunk(LOGIN)[:-2] + b"X: a\r\n b\r\n\r\n",
    "folded first header": b"GET / HTTP/1.1\r\n Host: it\r\n\r\n",
    "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"x" * 500 + b"\r\n\r\n",
    "a preface of HTTP/2": PREFACE, "and settings": PREFACE + b"\0\0\0\4\0\0\0\0\0",
    "half a preface": PREFACE[:20],
}  # fmt: skip


def test_what_has_two_readings_has_none(serving: Serving) -> None:
    """One 4xx, and the connection is closed: nothing behind it is a request."""

    def ended(case: tuple[str, bytes]) -> tuple[str, list[int], bool]:
        found = talk(serving, case[1])
        return case[0], found.statuses, found.closed

    with ThreadPoolExecutor(8) as pool:
        for name, statuses, closed in pool.map(ended, SMUGGLING.items()):
            assert closed, name
            assert len(statuses) == 1, (name, statuses)
            assert statuses[0] in {400, 408}, (name, statuses)


def test_a_refusal_of_the_server_itself_is_a_problem_too(serving: Serving) -> None:
    """What never reached the application: a problem document, an id, the headers of all answers."""
    for name, status in (("TE identity", 400), ("two CL", 400), ("CONNECT", 400)):
        head, _, body = talk(serving, SMUGGLING[name]).got.partition(b"\r\n\r\n")
        answer = httpx.Response(status, headers=_fields(head), content=body)
        problem = answer.json()
        assert problem["status"] == status, name
        assert (problem["code"], problem["type"]) == ("bad_request", "/problems/bad_request")
        assert answer.headers["content-type"] == "application/problem+json"
        assert answer.headers["content-length"] == str(len(body))
        assert answer.headers["connection"] == "close"
        assert problem["request_id"] == answer.headers["x-request-id"]
        for field, value in HEADERS.items():
            assert answer.headers[field] == value, (name, field)
    large = talk(serving, GET + b"X: " + b"a" * 200_000 + b"\r\n\r\n").got
    assert b'"status":431' in large
    assert b"aaa" not in large


def _fields(head: bytes) -> list[tuple[bytes, bytes]]:
    lines = head.split(b"\r\n")[1:]
    return [(name, value) for name, _, value in (line.partition(b": ") for line in lines)]


def test_what_has_one_reading_is_read(serving: Serving) -> None:
    """The same length twice, chunk extensions, trailers, expectations, a target in its absolute
    form, an empty line before a request, anything behind the last one: read as RFC 9112 says.
    """
    login = chunk(LOGIN)
    for name, request in {
        "length": POST + CLOSE + b"Content-Length: " + LENGTH + b"\r\n\r\n" + LOGIN,
        "same length twice": FRAMED + CLOSE + b"Content-Length: " + LENGTH + b"\r\n\r\n" + LOGIN,
        "underscores":
        FRAMED + CLOSE + b"Content_Length: 5\r\nTransfer_Encoding: x\r\n\r\n" + LOGIN,
        "chunked": POST + CLOSE + b"Transfer-Encoding: Chunked\r\n\r\n" + login,
        "an extension": POST + CLOSE + b"Transfer-Encoding: chunked\r\n\r\n"
        + login.replace(b"\r\n", b";a=b\r\n", 1),
        "a trailer": POST + CLOSE + b"Transfer-Encoding: chunked\r\n\r\n"
        + login[:-2] + b"Cookie: access_token=x\r\nContent-Length: 5\r\n\r\n",
    }.items():  # fmt: skip
        assert talk(serving, request).statuses == [200], name
    for name, target in {
        "absolute": b"http://it/health/live", "in capitals": b"HTTP://IT/health/live",
        "for TLS": b"https://it/health/live", "a query": b"http://it/health/live?a=http://b",
    }.items():  # fmt: skip
        found = talk(serving, NEXT.replace(b"/health/live", target))
        assert found.statuses == [200], name
        assert b'"status":"ok"' in found.got, name
    for name, request in {
        "no path": NEXT.replace(b"GET /health/live", b"GET http://it"),
        "no path, a query": NEXT.replace(b"GET /health/live", b"GET http://it?a"),
    }.items():
        assert talk(serving, request).statuses == [302], name
    ping = talk(serving, NEXT.replace(b"GET /health/live", b"OPTIONS *"))
    assert ping.statuses == [200]
    assert b"allow: " in ping.got.lower()
    for name, pieces in {
        "before": [b"\r\n" + NEXT], "before, by itself": [b"\r\n", NEXT],
    }.items():  # fmt: skip
        assert talk(serving, *pieces, every=0.05).statuses == [200], name
    between = FRAMED + b"\r\n" + LOGIN + b"\r\n" + NEXT
    assert talk(serving, between).statuses == [200, 200]
    for behind in (b"\r\n", b"garbage", NEXT):
        assert talk(serving, FRAMED + CLOSE + b"\r\n" + LOGIN + behind).statuses == [200], behind
    expecting = FRAMED + CLOSE + b"Expect: 100-continue\r\n\r\n" + LOGIN
    assert talk(serving, expecting).statuses == [100, 200]


@pytest.mark.parametrize(
    ("target", "status"),
    [
        (b"/admin/users", 200), (b"//admin/users", 404), (b"///admin/users", 404),
        (b"/%2fadmin/users", 404), (b"/%2Fadmin/users", 404), (b"/admin%2fusers", 404),
        (b"/admin%2Fusers?limit=1", 404), (b"http://it//admin/users", 404),
        (b"admin/users", 400), (b"%2fadmin/users", 404), (b"metrics", 400), (b"/%00admin", 400),
        (b"/metrics", 200), (b"//metrics", 404),
    ],
)  # fmt: skip
def test_a_path_has_one_spelling(serving: Serving, target: bytes, status: int) -> None:
    """A proxy's rule for a path cannot be gone round by a target that only looks another."""
    body = {"username": "admin", "password": "adminpass", "transport": "json"}
    token = httpx.post(f"{serving.url}/login", json=body).json()["access_token"]
    bearer = b"Authorization: Bearer " + token.encode() + b"\r\n\r\n"
    found = talk(serving, NEXT[:-2].replace(b"/health/live", target) + bearer)
    assert found.statuses == [status]
    if status != 200:
        assert b'"code":"' + (b"not_found" if status == 404 else b"bad_request") in found.got
        assert b"items" not in found.got
        assert b"# HELP" not in found.got


def test_requests_in_a_row_are_answered_in_their_order(serving: Serving) -> None:
    """Pipelined, bodies and errors among them, a body on a GET too: one answer each."""
    nowhere = b"GET /nowhere HTTP/1.1\r\nHost: it\r\n\r\n"
    unread = GET.replace(b"live", b"none") + b"Content-Length: 5\r\n\r\nhello"
    missing = b"GET /protected HTTP/1.1\r\nHost: it\r\nContent-Length: 5\r\n\r\nGET /"
    row = [
        GET + b"\r\n",
        FRAMED + b"\r\n" + LOGIN,
        nowhere,
        unread,
        missing,
        CHUNKED + chunk(LOGIN),
    ]
    found = talk(serving, b"".join(row) + NEXT)
    assert found.statuses == [200, 200, 404, 404, 401, 200, 200]


@pytest.mark.parametrize(
    ("pieces", "expected"),
    [
        ([GET + b"X: " + b"a" * 200_000 + b"\r\n\r\n"], {431}),
        ([GET + b"X: a\r\n" * 60_000 + b"\r\n"], {431}),
        ([b"GET /" + b"a" * 200_000 + b" HTTP/1.1\r\n\r\n"], {431}),
        ([b"a" * 200_000], {431, 400}),
        ([CHUNKED + b"1;" + b"a" * 200_000], {431, 400}),
        ([CHUNKED + b"0\r\n" + b"a: b\r\n" * 60_000], {431, 400}),
        ([CHUNKED, *[b"2000\r\n" + b"x" * 0x2000 + b"\r\n"] * 400], {413}),
        ([FRAMED.replace(LENGTH, b"99999999") + b"\r\n"], {413}),
        ([FRAMED.replace(LENGTH, b"99999999") + b"\r\n", *[b"x" * 65_536] * 100], {413}),
    ],
    ids=["a header", "headers", "a target", "a line", "an extension", "trailers", "chunks",
         "announced", "sent"],
)  # fmt: skip
def test_nothing_grows_without_end(
    serving: Serving, pieces: list[bytes], expected: set[int]
) -> None:
    """Too much of anything is refused, the connection closed, and nothing of it kept (52)."""
    found = talk(serving, *pieces)
    assert found.closed
    assert len(found.statuses) == 1
    assert set(found.statuses) <= expected
    assert psutil.Process(serving.workers()[0]).memory_info().rss < 400 * 2**20


def test_nobody_is_waited_for_without_end(serving: Serving) -> None:
    """Silent, dripping, half closed, upgraded: each connection is closed by the server (53)."""
    slow = {
        "silence": talk_later(serving), "half a head": talk_later(serving, GET),
        "a dripped head": talk_later(serving, *[GET[:1], *[b"E"] * 30], every=0.2),
        "half a body": talk_later(serving, FRAMED + b"\r\n" + LOGIN[:5]),
        "a dripped body": talk_later(serving, FRAMED + b"\r\n", *[b"x"] * 20, every=0.2),
        "dripped chunks": talk_later(serving, CHUNKED, *[b"1\r\nx\r\n"] * 20, every=0.2),
        "a large chunk": talk_later(serving, CHUNKED + b"f" * 15 + b"\r\n" + LOGIN),
        "kept alive": talk_later(serving, GET + b"\r\n"),
        "silence, half closed": talk_later(serving, half=True),
        "a head, half closed": talk_later(serving, GET, half=True),
        "a request, half closed": talk_later(serving, GET + b"\r\n", half=True),
        "a login, half closed": talk_later(serving, FRAMED + b"\r\n" + LOGIN, half=True),
        "half a body, half closed": talk_later(serving, FRAMED + b"\r\n" + LOGIN[:5], half=True),
        "h2c": talk_later(serving, GET + UPGRADE + b"\r\n"),
        "h2c without settings":
        talk_later(serving, GET + b"Connection: Upgrade\r\nUpgrade: h2c\r\n\r\n"),
        "a websocket": talk_later(serving, GET + b"Connection: Upgrade\r\nUpgrade: websocket\r\n"
                                  b"Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n"
                                  b"Sec-WebSocket-Version: 13\r\n\r\n"),
        "half a websocket":
        talk_later(serving, GET + b"Connection: Upgrade\r\nUpgrade: websocket\r\n\r\n"),
    }  # fmt: skip
    statuses = {
        "kept alive": [200], "a request, half closed": [200], "a login, half closed": [200],
        "half a body": [408], "a dripped body": [408], "dripped chunks": [408],
        "a large chunk": [408], "a head, half closed": [400], "h2c": [200],
        "h2c without settings": [200], "a websocket": [200], "half a websocket": [200],
    }  # fmt: skip
    for name, talking in slow.items():
        found = talking.result()
        assert found.closed, name
        # the time for all that drips in is one: the longest would take three times as long
        assert found.seconds < 2 * IDLE + BODY, name
        if name != "half a body, half closed":  # its 400 may come too late for it
            assert found.statuses == statuses.get(name, []), name


def test_an_answer_that_nobody_reads_is_given_up(serving: Serving) -> None:
    """A client that asks and takes nothing in loses its connection; others are served."""
    worker = psutil.Process(serving.workers()[0])
    ask = b"GET /docs/swagger-ui-bundle.js HTTP/1.1\r\nHost: it\r\n\r\n"

    def connected() -> int:
        return sum(found.status == "ESTABLISHED" for found in worker.net_connections("tcp"))

    wait_until(lambda: connected() == 0)
    held = []
    for _ in range(5):
        wire = socket.socket()
        wire.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4_096)
        wire.connect(("127.0.0.1", int(serving.url.rpartition(":")[2])))
        wire.sendall(ask * 5)
        held.append(wire)
    wait_until(lambda: connected() == 5, 5)
    assert httpx.get(f"{serving.url}/health/live").status_code == 200
    wait_until(lambda: connected() == 0, 15)
    for wire in held:
        wire.close()


def test_a_client_that_has_gone_leaves_nothing(serving: Serving) -> None:
    """Its connection is let go at once, and not when the time for the next request is up."""
    worker = psutil.Process(serving.workers()[0])
    time.sleep(IDLE)  # for those of other tests
    before = worker.num_fds()
    for _ in range(30):
        with socket.create_connection(("127.0.0.1", int(serving.url.rpartition(":")[2]))) as wire:
            wire.sendall(GET + b"\r\n")
            assert wire.recv(65_536).startswith(b"HTTP/1.1 200 ")
    # files of its own it opens meanwhile
    wait_until(lambda: worker.num_fds() < before + 15, IDLE / 2)


def test_others_are_served_beside_a_crowd_that_hangs(serving: Serving) -> None:
    """Two hundred that send nothing, half a head or half a body: a login takes its turn (29)."""
    port = int(serving.url.rpartition(":")[2])
    crowd = []
    for number in range(201):
        wire = socket.create_connection(("127.0.0.1", port))
        wire.sendall((b"", GET, FRAMED + b"\r\n" + LOGIN[:3])[number % 3])
        crowd.append(wire)
    body = {"username": "testuser", "password": "testpass"}
    answers = []

    def sign_in() -> None:
        answers.append(httpx.post(f"{serving.url}/login", json=body, timeout=10).status_code)

    threads = [threading.Thread(target=sign_in) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for wire in crowd:
        wire.close()
    assert answers == [200] * 5


def test_no_answer_tells_what_this_runs_on(serving: Serving) -> None:
    """Neither the application's nor the server's own errors name a library (22)."""
    for request in (NEXT, *SMUGGLING.values()):
        got = talk(serving, request).got.lower()
        for word in (b"server:", b"hypercorn", b"h11", b"python", b"flask", b"werkzeug"):
            assert word not in got, (request, got)
