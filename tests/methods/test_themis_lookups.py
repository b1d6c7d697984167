# SPDX-License-Identifier: Apache-2.0
"""Themis's tools that look things up: tables, search over a corpus, the web client; and the default set."""

import contextlib
import http.server
import json
import math
import threading
import time

import numpy as np
import pytest

from tenfold.themis.tools import (
    BadArguments,
    Bm25,
    GoogleSerper,
    HistoryWeather,
    Refused,
    Translate,
    WikiSearch,
    default_tools,
    invented_table,
    invented_weather,
)
from tenfold.themis.tools.google_serper import answer_of
from tenfold.themis.tools.wiki_search import split_passages


class TestTables:
    def test_translate(self, tmp_path):
        (tmp_path / "ids.json").write_text(
            json.dumps({"t1": {"answer": "by id"}, "t2": {"answer": None}})
        )
        tool = Translate({"guten  Tag": "good day"}, by_id=tmp_path / "ids.json")
        assert tool.call("translate", " guten\nTag", {"id": "t2"}) == "good day"
        assert tool.call("translate", "guten Tag", {"id": "t1"}) == "by id"
        with pytest.raises(LookupError, match="no translation of this text"):
            tool.call("translate", "auf Wiedersehen", {})
        with pytest.raises(BadArguments):
            tool.call("translate", "  ", {})
        keys = [tool.key("translate", "a", e) for e in ({}, {"id": "t1"}, {"id": "other"})]
        assert keys[0] == keys[2] != keys[1]

    def test_packaged_translations(self):
        assert Translate(languages=("de",)).call("translate", "Benutzername", {}) == "username"

    def test_packaged_translations_are_refused_where_missing(self, monkeypatch):
        from tenfold.data import translations

        def missing():
            raise translations.MissingData("install it")

        monkeypatch.setattr(translations, "_root", missing)
        with pytest.raises(Refused, match="install it"):
            Translate().call("translate", "Benutzername", {})

    def test_weather(self, tmp_path):
        made = invented_weather("Berlin", "2023-06-19")
        assert (
            made
            == invented_weather("Berlin", "2023-06-19")
            != invented_weather("Berlin", "2023-06-19", seed=1)
        )
        table = invented_table(["Berlin", "Rio de Janeiro"], ["2023-06-19", "2023-06-20"])
        tool = HistoryWeather(table)
        said = tool.call("history_weather", "Rio de Janeiro ,2023-06-20", {})
        header, line = said.split("\n")
        assert header == "Weather in Rio de Janeiro on 2023-06-20:"
        for part in ("overall weather: ", "temperature: ", "(C)", "(kph)", "(mph)", "(mm)", "(inch)", "(km)", "(miles)",
                     "humidity: ", "UV index: "):  # fmt: skip
            assert part in line
        file = tmp_path / "w.json"
        file.write_text(json.dumps({"Berlin, 2023-06-19": "fine", "Bonn, 2023-06-19": None}))
        replayed = HistoryWeather(file)
        assert replayed.call("history_weather", "Berlin, 2023-06-19", {}) == "fine"
        with pytest.raises(LookupError, match="no weather of Bonn on 2023-06-19"):
            replayed.call("history_weather", "Bonn, 2023-06-19", {})
        for bad in (
            "Berlin",
            "2023-06-19",
            "Berlin, yesterday",
            ", 2023-06-19",
            "Berlin, 2023-02-30",
        ):
            with pytest.raises(BadArguments):
                replayed.call("history_weather", bad, {})

    def test_bad_tables(self, tmp_path):
        with pytest.raises(ValueError, match="translate: 'a' must have a text, got int"):
            Translate({"a": 1})
        (tmp_path / "x.json").write_text("[1]")
        with pytest.raises(ValueError, match="the file must hold texts by key, got list"):
            HistoryWeather(tmp_path / "x.json")
        (tmp_path / "x.json").write_text("{")
        with pytest.raises(ValueError, match=r"x\.json is no JSON"):
            HistoryWeather(tmp_path / "x.json")


class TestSearch:
    TEXTS = ("the cat sat on the mat", "the dog", "a cat and a dog and a cat", "")

    def test_scores_are_the_formula(self):
        index = Bm25(self.TEXTS, k1=1.5, b=0.6)
        mean = (6 + 2 + 8 + 0) / 4

        def term(f, n, length):
            idf = math.log(1 + (4 - n + 0.5) / (n + 0.5))
            return idf * f * 2.5 / (f + 1.5 * (0.4 + 0.6 * length / mean))

        want = [term(1, 2, 6), term(1, 2, 2), term(2, 2, 8) + term(1, 2, 8), 0]
        np.testing.assert_allclose(index.scores("Cat DOG bird"), want, rtol=1e-6)
        assert index.top("cat dog", 3) == [2, 1, 0] and index.top("bird") == []

    def test_equals_come_in_the_corpus_order(self):
        assert Bm25(["a b", "b a", "a b"]).top("a", 3) == [0, 1, 2]

    def test_tool(self, tmp_path):
        rows = [
            {"title": "Cats", "text": "Cats sleep.\n\nA lot."},
            {"title": "Dogs", "text": "Dogs bark."},
        ]
        (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
        tool = WikiSearch(tmp_path / "p.jsonl")
        assert tool.call("wiki_search", "who sleeps, cats?", {}) == "Cats | Cats sleep. A lot."
        assert WikiSearch([("T", "a b c d")], max_words=2).call("wiki_search", "c", {}) == "T | a b"
        with pytest.raises(LookupError, match="no passage has a word"):
            tool.call("wiki_search", "elephant", {})
        with pytest.raises(BadArguments, match="takes a query"):
            tool.call("wiki_search", "?!", {})
        assert tool.key("wiki_search", "Who  sleeps?", {}) == "who sleeps"

    def test_packaged_corpus(self, monkeypatch):
        """Of Python's reference alone, so that the test is quick."""
        from tenfold.themis.tools import wiki_search

        monkeypatch.setattr(wiki_search.packaged_passages, "__defaults__", (("reference",),))
        said = WikiSearch().call("wiki_search", "what does the lambda expression create", {})
        title, text = said.split(" | ", 1)
        assert title == "Python reference: lambda" and "anonymous functions" in text
        assert len(text.split()) <= 200

    def test_passages(self):
        text = "\n\n".join(f"{i} " + "w " * 40 for i in range(7)) + "\n\n" + "z " * 500
        made = list(split_passages(text))
        assert " ".join(made).split() == text.split()
        assert all(len(p.split()) <= 200 for p in made) and len(made[0].split()) >= 100

    def test_bad_input(self, tmp_path):
        (tmp_path / "p.jsonl").write_text('{"title": "a", "text": "b"}\n{"title": "a"}\n')
        with pytest.raises(ValueError, match=r"p\.jsonl, line 2: needs a title and a text"):
            WikiSearch(tmp_path / "p.jsonl")
        with pytest.raises(ValueError, match="there are none to search"):
            WikiSearch([])
        with pytest.raises(ValueError, match="b must be in"):
            Bm25(["a"], b=2)


class Service(http.server.BaseHTTPRequestHandler):
    """Answers with what ``reply`` says; keeps what was asked."""

    reply: tuple = (200, b"{}", {})
    asked: tuple = ()
    drip = 0.0  # seconds after each byte

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        type(self).asked = (json.loads(body), self.headers["X-API-KEY"])
        status, data, headers = self.reply
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        with contextlib.suppress(OSError):
            for i in range(0, len(data), 1 if self.drip else len(data)):
                self.wfile.write(data[i:] if not self.drip else data[i : i + 1])
                time.sleep(self.drip)

    def log_message(self, *args):
        pass


@pytest.fixture
def service(monkeypatch):
    """(set the reply, the tool's address, what was asked)."""
    for name in ("http_proxy", "HTTP_PROXY", "SERPER_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Service) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()

        def reply(value, status=200, **headers):
            data = value if isinstance(value, bytes) else json.dumps(value).encode()
            Service.reply = (status, data or b" ", headers)

        Service.drip = 0.0
        yield reply, f"http://127.0.0.1:{server.server_port}/search"
        server.shutdown()


class TestGoogle:
    FOUND = {  # noqa: RUF012
        "knowledgeGraph": {"title": "Ada", "type": "Person", "description": "Wrote.",
                           "attributes": {"Born": "1815", "x": 3}},
        "organic": [{"snippet": "one\ntwo", "attributes": {"Year": "1843"}}, {"title": "no snippet"}, "odd",
                    {"snippet": 5}],
    }  # fmt: skip

    def test_answers(self):
        assert answer_of({"answerBox": {"answer": "42"}} | self.FOUND) == "42"
        assert answer_of({"answerBox": {"snippet": "a\nb"}}) == "a b"
        assert answer_of({"answerBox": {"snippetHighlighted": ["a", "b"]}}) == "a b"
        want = "Ada: Person. Wrote. Ada Born: 1815. one two Year: 1843."
        assert answer_of({"answerBox": {}} | self.FOUND) == want
        for nothing in (
            {},
            {"organic": []},
            {"organic": "x", "answerBox": [], "knowledgeGraph": 3},
        ):
            with pytest.raises(LookupError):
                answer_of(nothing)

    def test_asks_the_service(self, service, monkeypatch):
        reply, url = service
        reply(self.FOUND)
        monkeypatch.setenv("SERPER_API_KEY", "from the environment")
        tool = GoogleSerper(url=url, results=7)
        assert tool.call("google_serper", " who was\nAda? ", {}).startswith("Ada: Person.")
        assert Service.asked == ({"q": "who was Ada?", "num": 7}, "from the environment")
        GoogleSerper("given", url=url).call("google_serper", "x", {})
        assert Service.asked[1] == "given" and "given" not in repr(GoogleSerper("given"))

    def test_failures(self, service):
        reply, url = service
        tool = GoogleSerper("k", url=url, timeout=2.0)
        for value, status, error, text in (
            ({}, 403, Refused, "refused the key: HTTP 403"), ({}, 500, OSError, "HTTP 500"),
            (b"<html>", 200, ValueError, "Expecting value"), ([1], 200, OSError, "no object"),
            (b" " * (2 << 20), 200, OSError, "more than 1048576 bytes"), ({}, 200, LookupError, "found nothing"),
        ):  # fmt: skip
            reply(value, status)
            with pytest.raises(error, match=text):
                tool.call("google_serper", "x", {})
        reply(b"", 302, Location=url.replace("search", "elsewhere"))  # it would carry the key along
        with pytest.raises(OSError, match="HTTP 302"):
            tool.call("google_serper", "x", {})

    def test_a_service_that_drips(self, service):
        reply, url = service
        Service.drip = 0.05
        reply(b" " * 100)
        start = time.monotonic()
        with pytest.raises(OSError, match="too long"):
            GoogleSerper("k", url=url, timeout=0.5).call("google_serper", "x", {})
        assert time.monotonic() - start < 4

    def test_off_by_default(self):
        names = {n for tool in default_tools({"wiki_search": [("a", "b")]}) for n in tool.names}
        assert names == {"calculator", "Calendar.week_day", "Calendar.target_day", "Calendar.day_difference",
                         "code_run", "translate", "history_weather", "wiki_search"}  # fmt: skip
        assert "google_serper" in {n for tool in default_tools({}, web=True) for n in tool.names}

    def test_bad_input(self, monkeypatch):
        monkeypatch.delenv("SERPER_API_KEY", raising=False)
        with pytest.raises(Refused, match="set SERPER_API_KEY"):
            GoogleSerper(url="http://127.0.0.1:1").call("google_serper", "x", {})
        for key in ("line\nbreak", "schlüssel"):
            with pytest.raises(Refused, match="that no key has") as caught:
                GoogleSerper(key, url="http://127.0.0.1:1").call("google_serper", "x", {})
            assert key not in str(caught.value)
        for bad in ("", "x" * 501):
            with pytest.raises(BadArguments, match="1 to 500 characters"):
                GoogleSerper("k").call("google_serper", bad, {})
        with pytest.raises(ValueError, match="url must begin with https://"):
            GoogleSerper(url="file:///etc/passwd")
        with pytest.raises(ValueError, match=r"results must be in \[1, 100\], got 0"):
            GoogleSerper(results=0)


def test_default_tools_take_a_folder(tmp_path):
    (tmp_path / "translate.json").write_text('{"eins": "one"}')
    (tmp_path / "history_weather.json").write_text('{"Bonn, 2023-01-01": "rain"}')
    tools = {tool.names[0]: tool for tool in default_tools(tmp_path)}
    assert tools["translate"].call("translate", "eins", {}) == "one"
    assert tools["history_weather"].call("history_weather", "Bonn, 2023-01-01", {}) == "rain"
    with pytest.raises(FileNotFoundError, match="data must be a folder"):
        default_tools(tmp_path / "none")
    with pytest.raises(ValueError, match=r"data may hold translate, .*; got weather"):
        default_tools({"weather": {}})
