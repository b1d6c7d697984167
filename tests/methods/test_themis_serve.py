# SPDX-License-Identifier: Apache-2.0
"""The endpoint over real sockets: forms of requests, what is refused, tokens, limits, clients that go; the client."""

import asyncio
import base64
import dataclasses
import http.client
import json
import math
import os
import re
import signal
import socket
import threading
import time

import pytest
from themis_judges import CALL, Crashes, Gives, Hangs, Lengths, query

from tenfold.themis.client import RemoteError, RemoteScorer
from tenfold.themis.scorer import Scorer
from tenfold.themis.serve import Limits, Server, serve

TOKEN = "a-token-of-twenty-ch"


@pytest.fixture
def open_server():
    """Starts servers with their scorers, and ends them."""
    ends = []

    def make(judge=None, scorer=None, **settings):
        made = Scorer(judge or Lengths(), **({"max_wait": 0.0} | (scorer or {})))
        server = Server(made, **settings).start()
        ends.append(server)
        return server

    yield make
    for server in ends:
        server.stop()
        if hasattr(server.scorer.judge, "free"):
            server.scorer.judge.free.set()
        server.scorer.close(timeout=5)


def ask(server, method="POST", path="/score", body=None, headers=None, raw=None):
    """(status, JSON, headers) of one request."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)
    data = raw if raw is not None else None if body is None else json.dumps(body).encode()
    given = {"Content-Type": "application/json"} if data is not None else {}
    connection.request(method, path, data, given | (headers or {}))
    answer = connection.getresponse()
    text = answer.read()
    connection.close()
    return answer.status, json.loads(text), dict(answer.getheaders())


def plain(server, data, wait=10.0):
    """What comes back for some bytes, until the server closes."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=wait) as s:
        s.sendall(data)
        found = b""
        while part := s.recv(65536):
            found += part
    return found


ONE = {"question": "q", "answer": "abc"}


class TestScore:
    def test_one(self, open_server):
        judge = Gives({"abc": 7.5}, [CALL])
        status, found, headers = ask(open_server(judge), body=ONE)
        assert status == 200 and headers["Content-Type"] == "application/json"
        assert (found["reward"], found["score"], found["finish"]) == (7.5, 5.0, "rationale")
        assert found["calls"] == [{"tool": "calculator", "arguments": "<<1+1=2>>2", "observation": "right",
                                   "status": "ok", "seconds": 0.25, "cached": False}]  # fmt: skip
        assert found["trace"]["steps"][0]["tool"] == "calculator" and found["new_tokens"] == 1

    def test_many(self, open_server):
        judge = Lengths()
        items = [
            ONE,
            {"question": "q", "answer": "four", "context": "c", "example": {"test_list": ["x"]}},
        ]
        status, found, _ = ask(
            open_server(judge), body={"items": items, "trace": False, "deadline": 3}
        )
        assert status == 200 and [r["reward"] for r in found["results"]] == [3, 4]
        assert "text" not in found["results"][0] and judge.examples == [None, {"test_list": ["x"]}]
        assert ask(open_server(), body={"items": []})[:2] == (200, {"results": []})

    def test_no_reward_is_null(self, open_server):
        status, found, _ = ask(open_server(Hangs()), body=ONE | {"deadline": 0.1})
        assert status == 200 and found["reward"] is None and found["score"] is None
        assert found["finish"] == "deadline"
        status, found, _ = ask(
            open_server(Crashes(RuntimeError("broken"))), body=ONE | {"answer": "bad"}
        )
        assert (
            status == 200
            and found["finish"] == "error"
            and found["message"] == "RuntimeError: broken"
        )

    def test_text_of_any_kind(self, open_server):
        texts = ["", '\u2028\x00\x1f"\\', "日本語 🙂", "<start_tool>", "a\r\n\r\nGET / HTTP/1.1"]
        _, found, _ = ask(
            open_server(), body={"items": [{"question": t, "answer": t} for t in texts]}
        )
        assert [r["text"] for r in found["results"]] == [f"judged {t}" for t in texts]


REMOTE = {"query": ["p: yes</s>", "p: no"], "prompts": ["p: ", "p: "], "labels": ["a", None]}


class TestOpenRlhf:
    def test_its_form(self, open_server):
        judge = Lengths()
        status, found, _ = ask(open_server(judge), body=REMOTE)
        assert status == 200 and found["rewards"] == [5, 2] and found["scores"] == [7, 2]
        assert found["extra_logs"] == {"themis_calls": [0, 0], "themis_finished": [1, 1]}
        assert judge.examples == [{"label": "a"}, None] and judge.batches == [["yes</s>", "no"]]

    def test_an_empty_share(self, open_server):
        """With more servers than samples, OpenRLHF asks the others for nothing."""
        status, found, _ = ask(open_server(), body={"query": [], "prompts": [], "labels": []})
        assert status == 200 and found["rewards"] == []

    def test_no_reward_makes_it_ask_again(self, open_server):
        body = {"query": ["pbad"], "prompts": ["p"], "labels": None}
        status, found, headers = ask(open_server(Crashes(RuntimeError("broken"))), body=body)
        assert status == 503 and headers["Retry-After"] == "1"
        assert found["error"] == "answer 0 has no reward (error: RuntimeError: broken)"
        status, found, _ = ask(
            open_server(Crashes(RuntimeError("broken")), missing=-1.5), body=body
        )
        assert status == 200 and found["rewards"] == found["scores"] == [-1.5]

    @pytest.mark.parametrize(
        "change, message",
        [
            ({"query": "text"}, "query must be a list, got str"),
            ({"prompts": None}, "prompts must be a list, got NoneType"),
            ({"labels": []}, "query, prompts and labels must be equally many, got 2, 2 and 0"),
            ({"query": ["p: yes", "other"]}, r"query\[1\]: does not hold its prompt"),
            ({"query": ["p: yes", 3]}, r"query\[1\] must be a text, got int"),
            ({"more": 1}, "unknown fields 'more'; known: query, prompts, labels"),
        ],
    )
    def test_refused(self, open_server, change, message):
        body = REMOTE | change
        status, found, _ = ask(open_server(), body=body)
        if change == {"labels": []}:  # none at all is as good as None
            assert status == 200
            return
        assert status == 400
        assert re.search(message, found["error"])


class TestBadRequests:
    @pytest.mark.parametrize(
        "body, status, message",
        [
            ({"question": "q"}, 400, "the body: answer must be a text, got NoneType"),
            ({"question": 3, "answer": "a"}, 400, "the body: question must be a text, got int"),
            (ONE | {"context": []}, 400, "the body: context must be a text, got list"),
            (ONE | {"example": "x"}, 400, "the body: example must be an object, got str"),
            (ONE | {"deadline": 0}, 400, "deadline must be seconds in (0, 600], got 0"),
            (ONE | {"deadline": "3"}, 400, "deadline must be seconds in (0, 600], got '3'"),
            (ONE | {"deadline": 601}, 400, "deadline must be seconds in (0, 600], got 601"),
            (ONE | {"trace": 1}, 400, "trace must be true or false, got int"),
            (ONE | {"labels": 1}, 400, "the body has unknown fields 'labels'"),
            ({"items": {}}, 400, "items must be a list, got dict"),
            ({"items": [ONE, 3]}, 400, "items[1] must be an object, got int"),
            ({"items": [ONE | {"deadline": 3}]}, 400, "items[0] has unknown fields 'deadline'"),
            (
                {"items": [ONE, {"question": "q", "answer": None}]},
                400,
                "items[1]: answer must be a text",
            ),
            ({"items": [ONE] * 5}, 413, "items has 5 entries, at most 4 are taken"),
            (
                ONE | {"answer": "x" * 101},
                413,
                "the body: answer has 101 characters, at most 100 are taken",
            ),
            ([ONE], 400, "the body must be a JSON object, got list"),
        ],
    )
    def test_bodies(self, open_server, body, status, message):
        server = open_server(limits=Limits(batch=4, text=100))
        found = ask(server, body=body)
        assert found[0] == status and message in found[1]["error"], found
        assert ask(server, body=ONE)[0] == 200 and server.scorer.stats()["requests"] == 1

    @pytest.mark.parametrize(
        "raw, message",
        [
            (b"", "the body is not JSON"),
            (b"{", "the body is not JSON"),
            (b'{"question": "\xff"}', "the body is not JSON"),
            (b'{"question": "q", "answer": "a", "deadline": NaN}', "NaN is no number of JSON"),
            (b"[" * 100_000, "nested too deeply"),
        ],
    )
    def test_not_json(self, open_server, raw, message):
        status, found, _ = ask(open_server(), raw=raw)
        assert status == 400 and message in found["error"]

    def test_paths_and_methods(self, open_server):
        server = open_server()
        assert ask(server, path="/other", body=ONE)[0] == 404
        status, found, headers = ask(server, "GET")
        assert (
            status == 405 and headers["Allow"] == "POST" and found["error"] == "/score takes POST"
        )
        assert ask(server, body=ONE, path="/health")[0] == 405
        assert ask(server, body=ONE, headers={"Content-Type": "text/plain"})[0] == 415
        assert ask(server, path="/score?x=1", body=ONE)[0] == 200

    @pytest.mark.parametrize(
        "data, status",
        [
            (b"nonsense\r\n\r\n", 400),
            (b"POST score HTTP/1.1\r\n\r\n", 400),
            (b"GET /health HTTP/2\r\n\r\n", 400),
            (b"GET /health HTTP/1.1\r\nHost localhost\r\n\r\n", 400),
            (b"GET /health HTTP/1.1\r\nHost : localhost\r\n\r\n", 400),
            (b"GET /health HTTP/1.1\r\nHost: localhost\r\nHost: evil\r\n\r\n", 400),
            (b"POST /score HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\n", 400),
            (b"POST /score HTTP/1.1\r\nHost: localhost\r\nContent-Length: -5\r\n\r\n", 400),
            (b"POST /score HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1_0\r\n\r\n", 400),
            (b"POST /score HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 501),
            (b"POST /score HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99999999\r\n\r\n", 413),
            (b"GET /health HTTP/1.1\r\nA: " + b"x" * 70_000 + b"\r\n\r\n", 431),
        ],
    )  # fmt: skip
    def test_no_http(self, open_server, data, status):
        server = open_server()
        found = plain(server, data)
        assert found.startswith(b"HTTP/1.1 %d " % status) and b"Connection: close" in found
        assert ask(server, "GET", "/health")[0] == 200

    def test_slow_clients(self, open_server):
        server = open_server(limits=Limits(read_seconds=0.2))
        assert plain(server, b"POST /score HT").startswith(b"HTTP/1.1 408 ")
        head = b"POST /score HTTP/1.1\r\nHost: localhost\r\nContent-Length: 10\r\n\r\n{"
        assert plain(server, head).startswith(b"HTTP/1.1 408 ")


class TestConnections:
    def test_kept_open(self, open_server):
        server = open_server()
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)
        for body in (ONE, {"question": 3}, ONE):  # errors of a body do not end it
            connection.request(
                "POST", "/score", json.dumps(body), {"Content-Type": "application/json"}
            )
            answer = connection.getresponse()
            assert answer.status == (200 if body is ONE else 400) and answer.read()
        connection.request("GET", "/health", headers={"Connection": "close"})
        assert connection.getresponse().getheader("Connection") == "close"
        assert b"Connection: close" in plain(
            server, b"GET /health HTTP/1.0\r\nHost: localhost\r\n\r\n"
        )

    def test_a_client_that_does_not_read(self, open_server):
        """Its connection ends, and with it what it was sent."""
        long = dataclasses.replace(CALL, observation="x" * 50_000)
        server = open_server(Gives({}, [long]), limits=Limits(read_seconds=0.3, connections=1))
        body = json.dumps({"items": 256 * [ONE]}).encode()
        with socket.socket() as s:
            s.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            s.connect(("127.0.0.1", server.port))
            s.sendall(
                b"POST /score HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                b"Content-Length: %d\r\n\r\n" % len(body) + body
            )
            end = time.monotonic() + 5
            while time.monotonic() < end and not server._connections:
                time.sleep(0.01)
            while time.monotonic() < end and server._connections:
                time.sleep(0.05)
            assert ask(server, "GET", "/health")[0] == 200

    def test_continue(self, open_server):
        body = json.dumps(ONE).encode()
        head = (
            b"POST /score HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nExpect: 100-continue\r\n"
            b"Connection: close\r\nContent-Length: %d\r\n\r\n" % len(body)
        )
        with socket.create_connection(("127.0.0.1", open_server().port), timeout=10) as s:
            s.sendall(head)
            assert s.recv(100) == b"HTTP/1.1 100 Continue\r\n\r\n"
            s.sendall(body)
            assert s.recv(65536).startswith(b"HTTP/1.1 200 OK")

    def test_only_so_many(self, open_server):
        server = open_server(limits=Limits(connections=2))
        held = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(2)]
        time.sleep(0.1)
        assert ask(server, "GET", "/health")[0] == 503
        held[0].close()
        time.sleep(0.1)
        assert ask(server, "GET", "/health")[0] == 200
        held[1].close()

    def test_a_client_that_goes(self, open_server):
        judge = Hangs()
        server = open_server(judge, scorer={"batch_size": 1})
        body = json.dumps({"items": [ONE, ONE, ONE]}).encode()
        head = (
            b"POST /score HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            b"Content-Length: %d\r\n\r\n"
        )
        with socket.create_connection(("127.0.0.1", server.port)) as s:
            s.sendall(head % len(body) + body)
            judge.entered.wait(5)
            assert server.scorer.stats()["queued"] == 2
        end = time.monotonic() + 5
        while server.scorer.stats()["pending"] and time.monotonic() < end:
            time.sleep(0.01)
        assert server.scorer.stats()["finish"] == {"cancelled": 3}

    def test_a_full_queue(self, open_server):
        judge = Hangs()
        server = open_server(judge, scorer={"batch_size": 1, "queue": 2})
        thread = threading.Thread(target=lambda: ask(server, body={"items": [ONE, ONE]}))
        thread.start()
        judge.entered.wait(5)
        status, found, headers = ask(server, body={"items": [ONE, ONE]})
        assert (
            status == 503
            and headers["Retry-After"] == "1"
            and "2 more do not fit" in found["error"]
        )
        assert ask(server, body={"items": [ONE] * 3})[0] == 413
        judge.free.set()
        thread.join()

    def test_health(self, open_server):
        judge = Hangs()
        server = open_server(judge)
        assert ask(server, "GET", "/health")[:2] == (200, {"status": "ok"})
        ask(server, body=ONE | {"deadline": 0.05})
        assert ask(server, "GET", "/health")[:2] == (503, {"status": "stalled"})
        assert ask(server, "GET", "/stats")[1]["finish"] == {"deadline": 1}
        judge.free.set()
        server.scorer.close()
        assert ask(server, "GET", "/health")[:2] == (503, {"status": "closed"})
        assert ask(server, body=ONE)[:2] == (503, {"error": "the scorer is closed"})


class TestAccess:
    @pytest.mark.parametrize(
        "host", ["0.0.0.0", "::", "192.168.1.7", "example.com", "localhost.evil.com"]
    )
    def test_other_hosts_need_a_token(self, host):
        with Scorer(Lengths()) as scorer:
            with pytest.raises(
                ValueError, match="can be reached from other machines: give a token"
            ):
                Server(scorer, host=host)
            with pytest.raises(ValueError, match="token must have at least 16 ASCII characters"):
                Server(scorer, host=host, token="short")
            Server(scorer, host=host, token=TOKEN)

    def test_token(self, open_server):
        server = open_server(token=TOKEN)
        basic = base64.b64encode(f"any:{TOKEN}".encode()).decode()
        for given, status in (
            (f"Bearer {TOKEN}", 200), (f"bearer {TOKEN}", 200), (f"Basic {basic}", 200), (None, 401), ("Bearer ", 401),
            (f"Bearer {TOKEN}x", 401), (f"Bearer {TOKEN[:-1]}", 401), (f"Basic {TOKEN}", 401), ("Basic !", 401),
            (f"Other {TOKEN}", 401), ("Bearer \xe9", 401),
        ):  # fmt: skip
            headers = {} if given is None else {"Authorization": given}
            assert ask(server, body=ONE, headers=headers)[0] == status, given
            assert ask(server, "GET", "/stats", headers=headers)[0] == status, given
        assert ask(server, "GET", "/health")[:2] == (200, {"status": "ok"})
        assert server.scorer.stats()["requests"] == 3

    def test_names_that_were_resolved_here(self, open_server):
        """A web page whose name is made to resolve to this machine is not answered."""
        server = open_server()
        for name, status in (("localhost:1", 200), ("127.0.0.1", 200), ("[::1]:80", 200), ("evil.com", 403),
                             ("evil.com:80", 403), ("", 403)):  # fmt: skip
            assert ask(server, body=ONE, headers={"Host": name})[0] == status, name
        assert ask(open_server(token=TOKEN), body=ONE,
                   headers={"Host": "evil.com", "Authorization": f"Bearer {TOKEN}"})[0] == 200  # fmt: skip

    @pytest.mark.parametrize(
        "name, value", [("body", 0), ("batch", 1.5), ("read_seconds", 0), ("deadline", -1.0)]
    )
    def test_limits(self, name, value):
        with pytest.raises(ValueError, match=name):
            Limits(**{name: value})

    def test_missing(self):
        with (
            Scorer(Lengths()) as scorer,
            pytest.raises(ValueError, match="missing must be a finite"),
        ):
            Server(scorer, missing=math.nan)

    def test_a_taken_port(self, open_server):
        with pytest.raises(OSError):
            Server(open_server().scorer, port=open_server().port).start()


class TestClient:
    def test_scores(self, open_server):
        server = open_server(Gives({"abc": 7.5, "d": -1.0}, [CALL]), token=TOKEN)
        for url, token in (
            (server.url, TOKEN),
            (f"http://any:{TOKEN}@127.0.0.1:{server.port}/score", None),
        ):
            with RemoteScorer(url, token, batch=2) as remote:
                asked = [query(a) for a in ("abc", "d", "other", "abc", "d")]
                found = remote.score_many(asked)
                assert [f.score for f in found][:2] == [5.0, -1.0] and math.isnan(found[2].reward)
                assert found[0].reward == 7.5 and found[0].calls == (CALL,) and len(found) == 5
                assert found[0].trace.steps[0].arguments == CALL.arguments and not found[0].ids
                assert asyncio.run(remote.score(query("d"))).reward == -1.0
                assert remote.health() == "ok"

    def test_waits_for_room(self, open_server):
        judge = Lengths(0.01)
        server = open_server(judge, scorer={"batch_size": 1, "queue": 2})
        with RemoteScorer(server.url, batch=2, connections=4, trace=False) as remote:
            found = remote.score_many([query("x" * i) for i in range(12)], deadline=10)
        assert [f.reward for f in found] == list(range(12))

    def test_the_deadline_is_of_all(self, open_server):
        """Requests that wait for a connection wait within it."""
        judge = Hangs()
        server = open_server(judge)
        with RemoteScorer(server.url, batch=1, connections=1) as remote:
            begin = time.monotonic()
            found = [remote.submit(query(), deadline=0.4) for _ in range(4)]
            for future in found:  # the server's word, or, without time for one, the client's
                try:
                    assert future.result().finish == "deadline"
                except RemoteError as error:
                    assert "by the deadline" in str(error)
            assert time.monotonic() - begin < 1.2  # and not 4 times as long
            with pytest.raises(ValueError, match="deadline must be a positive number, got 0"):
                remote.score_many([query()], deadline=0)

    def test_says_why_not(self, open_server):
        server = open_server(token=TOKEN)
        with (
            RemoteScorer(server.url, "wrong" * 5) as remote,
            pytest.raises(RemoteError, match="401: the token"),
        ):
            remote.score_many([query()])
        server.stop()
        with RemoteScorer(server.url, TOKEN, deadline=0.3) as remote:
            assert remote.health() == "unreachable"
            with pytest.raises(RemoteError, match="by the deadline; the last attempt: Conn"):
                remote.score_many([query()])

    @pytest.mark.parametrize(
        "found",
        [{}, {"results": []}, {"results": 3}, {"results": [{"reward": 1.0}]}, {"results": [None]}],
    )
    def test_another_server(self, found, monkeypatch):
        """Answers that are not as many as the questions would be taken for those of others."""
        with RemoteScorer("http://host") as remote:
            monkeypatch.setattr(remote, "_post", lambda body, seconds: (200, found))
            with pytest.raises(RemoteError, match="is it a server of Themis"):
                remote.score_many([query()])

    @pytest.mark.parametrize("url", ["127.0.0.1:80", "ftp://host", "http://", "http://:80"])
    def test_urls(self, url):
        with pytest.raises(ValueError, match="url must be as http://host:port"):
            RemoteScorer(url)
        with pytest.raises(ValueError, match="batch and connections must be >= 1"):
            RemoteScorer("http://host", batch=0)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_serve_ends_by_a_signal(number):
    found = []

    def client(url):
        with RemoteScorer(url) as remote:
            found.extend(remote.score_many([query()]))
        os.kill(os.getpid(), number)

    def ready(server):
        threading.Thread(target=client, args=(server.url,)).start()

    with Scorer(Lengths()) as scorer:
        serve(scorer, port=0, ready=ready)
    assert found[0].reward == 3
