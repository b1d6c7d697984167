# SPDX-License-Identifier: Apache-2.0
"""Macro actions of text: the walk over constituents, sentences, statements, tokens' texts, and parsers."""

import random
import sys
import types

import pytest
import tokenizers
import transformers

from tenfold.ma_rlhf import parsers, parsing
from tenfold.ma_rlhf.parsing import (
    Mismatch,
    as_tree,
    constituents,
    sentences,
    split_sentences,
    token_pieces,
    tree_boundaries,
)
from tenfold.ma_rlhf.statements import statement_starts, statements

CAT = "(S (NP The cat) (VP sat (PP on (NP the red mat))) .)"


class Labelled(list):
    """What nltk.Tree is: a list of children with a label."""

    def label(self):
        return "X"


def walk(text, cutoff=5, counts=None):
    tree = as_tree(text)
    return tree_boundaries(tree, counts or [1] * tree.words[1], cutoff)


class TestWalk:
    def test_12_the_specifications_tree(self):
        assert walk(CAT) == [0, 3, 8]

    @pytest.mark.parametrize(
        ("cutoff", "want"),
        [(1, [0, 8]), (3, [0, 8]), (4, [0, 4, 8]), (5, [0, 3, 8]), (6, [0, 2, 8]), (8, [0, 2, 8]), (9, [0, 8])],
    )  # fmt: skip
    def test_cutoffs(self, cutoff, want):
        assert walk(CAT, cutoff) == want

    def test_counts_are_tokens_not_words(self):
        # "cat" of four tokens: NP is no longer short, so "The", "cat" and "sat" move the first boundary to 6
        assert walk(CAT, 5, [1, 4, 1, 1, 1, 1, 1, 1]) == [0, 6, 11]
        # of three, NP (4) ends a macro action, and "sat" joins it
        assert walk(CAT, 5, [1, 3, 1, 1, 1, 1, 1, 1]) == [0, 5, 10]

    def test_words_at_the_beginning_are_a_run_of_their_own(self):
        assert walk("(S Well , (VP go home now))") == [0, 2, 5]
        assert walk("(S Well , then (VP go straight home (ADVP right now)))") == [0, 6, 8]
        assert walk("(S Oh (NP the big red dog) barks loudly (PP in the yard))") == [0, 1, 7, 10]

    def test_single_words(self):
        assert walk("(S Yes)") == [0, 1] and walk("(S Yes)", counts=[7]) == [0, 7]
        assert walk("(S (NP (NN Yes)))") == [0, 1]  # a chain with one leaf is a word
        assert walk("(S Yes .)") == [0, 2]

    def test_words_without_tokens(self):
        assert walk("(S (NP The cat) (VP sat down))", 4, [1, 0, 1, 2]) == [0, 1, 4]

    def test_errors(self):
        with pytest.raises(ValueError, match="cutoff must be at least 1, got 0"):
            walk(CAT, 0)


class TestTrees:
    def test_all_forms_agree(self):
        nested = [["The", "cat"], ["sat", ["on", ["the", "red", "mat"]]], "."]
        labelled = Labelled(
            [
                Labelled(["The", "cat"]),
                Labelled(["sat", Labelled(["on", Labelled(["the", "red", "mat"])])]),
                ".",
            ]
        )
        want = ["The", "cat", "sat", "on", "the", "red", "mat", "."]
        for made in (
            CAT,
            nested,
            labelled,
            "((S (NP (DT The) (NN cat)) (VP sat (PP on (NP the red mat))) .))",
        ):
            assert as_tree(made).leaves() == want and walk(made) == [0, 3, 8]

    def test_empty_constituents_vanish(self):
        assert as_tree("(S (NP (-NONE-)) (VP go) ())").leaves() == ["go"]

    @pytest.mark.parametrize(
        "made", ["(S (NP a)", "S a))", "", "()", "(S)", [], 3, [["a"], 4], None]
    )
    def test_mismatches(self, made):
        with pytest.raises(Mismatch):
            as_tree(made)


class TestSentences:
    @pytest.mark.parametrize(
        ("text", "want"),
        [
            ("One. Two!  Three?", ["One.", "Two!", "Three?"]),
            ("No end", ["No end"]),
            ("Pi is 3.14 now. Yes", ["Pi is 3.14 now.", "Yes"]),
            ("  a\n\n b?! c...\nd", ["a", "b?!", "c...", "d"]),
            ("", []),
            (" \n ", []),
        ],
    )
    def test_rule(self, text, want):
        assert [text[a:b] for a, b in split_sentences(text)] == want

    def test_cut(self):
        pieces = [" One", ".", " Two", " words", "!", "\n", "\n", "Three", ""]
        assert sentences()(pieces) == [
            0,
            2,
            7,
        ]  # separators and the end token go with what is before
        assert (
            sentences()(["\n", "Hi", "."]) == [0]
            and sentences()(["", " "]) == [0]
            and sentences()([]) == []
        )

    def test_a_token_over_the_border_counts_to_where_it_begins(self):
        assert sentences()(["Hi", ".\nYou", " go", ". A"]) == [0, 2]

    def test_pysbd(self):
        pieces = ["Dr.", " Smith", " came", ".", " He", " left", "."]
        assert sentences("pysbd")(pieces) == [0, 4] and sentences()(pieces) == [0, 1, 4]


class TestConstituents:
    def parser(self, trees):
        def parse(sentence):
            return trees[sentence]

        return parse

    def test_one_sentence(self):
        pieces = ["The", " cat", " sat", " on", " the", " red", " mat", "."]
        cut = constituents(self.parser({"The cat sat on the red mat.": CAT}), 5)
        assert cut(pieces) == [0, 3]
        assert cut([*pieces, ""]) == [0, 3]  # the end token

    def test_every_token_is_counted(self):
        """Newlines between sentences, and words of several tokens."""
        pieces = ["Th", "e", " cat", " sat", ".", "\n", "\n", "Dogs", " bark", " lou", "dly", "."]
        trees = {
            "The cat sat.": "(S (NP The cat) (VP sat) .)",
            "Dogs bark loudly.": "(S (NP Dogs) (VP bark loudly) .)",
        }
        # 7 tokens: NP of 3 ends at 3, "sat" at 4, "." with both newlines at 7; then 5: Dogs 8, bark loudly 11, . 12
        assert constituents(self.parser(trees), 5)(pieces) == [0, 7, 8]
        assert constituents(self.parser(trees), 2)(pieces) == [0, 7]

    def test_a_lone_word_does_not_join_the_sentence_before(self):
        trees = {
            "Go home now.": "(S (VP Go home now) .)",
            "No, you must not go.": "(S (INTJ No) , (NP you) (VP must not go) .)",
        }
        pieces = ["Go", " home", " now", ".", " No", ",", " you", " must", " not", " go", "."]
        assert constituents(self.parser(trees), 5)(pieces) == [0, 4, 7]

    def test_escaped_brackets_and_quotes(self):
        tree = "(S (NP We) (VP say (NP `` no '')) -LRB- now -RRB-)"
        cut = constituents(self.parser({'We say "no" (now)': tree}), 5)
        assert cut(["We", ' say "', "no", '"', " (", "now", ")"]) == [0, 1]

    @pytest.mark.parametrize(
        ("tree", "text"),
        [("(S The dog sat .)", "the parser's word 'dog' is not in the response at 'cat sat.'"),
         ("(S The cat)", "the parser left out 'sat.'"), ("(S The cat sat . .)", "the parser's word '.' is not")],
    )  # fmt: skip
    def test_mismatch(self, tree, text):
        with pytest.raises(Mismatch, match=text):
            constituents(lambda _: tree, 5)(["The", " cat", " sat", "."])

    def test_nothing_to_parse(self):
        with pytest.raises(Mismatch, match="there is no sentence"):
            constituents(lambda _: CAT, 5)(["\n", ""])

    def test_too_deep(self):
        deep = "x"
        for _ in range(5000):
            deep = [deep]
        with pytest.raises(Mismatch, match="too deep"):
            constituents(lambda _: deep, 5)(["x"])


PROGRAM = '''\
import os
@decorated
def f(x):
    """Doc."""
    if x:
        return os.sep; y = 1
    return 2

print(f(3))
'''


class TestStatements:
    def lines(self, text):
        return [text[a:].split("\n")[0] for a in statement_starts(text)]

    def test_nested_ones_begin_too(self):
        assert self.lines(PROGRAM) == ["import os", "@decorated", '"""Doc."""', "if x:", "return os.sep; y = 1",
                                       "y = 1", "return 2", "print(f(3))"]  # fmt: skip

    def test_characters_not_bytes(self):
        assert self.lines("a = 'é—🙂'; b = 1\nc = 'ö'; d = 2") == [
            "a = 'é—🙂'; b = 1",
            "b = 1",
            "c = 'ö'; d = 2",
            "d = 2",
        ]

    def test_lines_are_pythons(self):
        assert self.lines("a = '\x0c\x1c\u2028'\nb = 1") == ["a = '\x0c\x1c\u2028'", "b = 1"]

    def test_what_breaks_off_is_the_last_one(self):
        assert self.lines("a = 1\nfor i in a:\n    b = (i +") == ["a = 1", "for i in a:"]
        assert self.lines("a = 1\nb = 2\nc = [3,\n4,") == ["a = 1", "b = 2", "c = [3,"]
        assert self.lines("def f():\n    return 1\n    x = (\n") == [
            "def f():",
            "return 1",
            "x = (",
        ]

    def test_fences(self):
        text = "Here it is:\n```python\na = 1\nb = 2\n```\nIt works. c = 3"
        assert self.lines(text) == ["a = 1", "b = 2"]
        pieces = [
            "Here it is:\n",
            "```python\n",
            "a",
            " =",
            " 1",
            "\n",
            "b = 2",
            "\n```",
            "\nIt works.",
        ]
        assert statements(pieces) == [0, 6]

    def test_cut(self):
        pieces = ["if", " x", ":", "\n   ", " a", " =", " 1", "\n", "b", " = 2", ""]
        assert statements(pieces) == [0, 4, 8]

    def test_warnings_of_the_program_are_its_own(self, recwarn):
        assert self.lines("a = '\\d'\nb = 1 is 1") == ["a = '\\d'", "b = 1 is 1"]
        assert not recwarn.list

    @pytest.mark.parametrize("text", ["This is prose.", "", "\n", "x = (", "(" * 3000, "a\0b"])
    def test_mismatch(self, text):
        with pytest.raises(Mismatch, match="no statement of Python"):
            statements([text])


class Toy:
    """A tokenizer of UTF-8 bytes; 256 is special."""

    def decode(self, ids, skip_special_tokens=False, clean_up_tokenization_spaces=None):
        kept = [i for i in ids if i < 256 or not skip_special_tokens]
        return bytes(kept).decode(errors="replace")


class TestTokenPieces:
    def test_characters_of_several_tokens(self):
        text = "né 🙂!"
        pieces = token_pieces(Toy(), [*text.encode(), 256])
        assert "".join(pieces) == text
        assert pieces == ["n", "", "é", " ", "", "", "", "🙂", "!", ""]

    def test_broken_characters(self):
        ids = [*b"a", 0xC3, *b"b", 0xF0, 0x9F]
        pieces = token_pieces(Toy(), ids)
        assert len(pieces) == len(ids) and "".join(pieces).startswith("a\ufffdb")

    def test_real_tokenizers(self):
        text = "The cat's né 🙂 sat.\n\nOn a mat, naïvely (12.5%)!"
        for kind in ("bytes", "pieces"):
            if kind == "bytes":
                made = tokenizers.Tokenizer(tokenizers.models.BPE())
                made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
                made.decoder = tokenizers.decoders.ByteLevel()
                trainer = tokenizers.trainers.BpeTrainer(
                    vocab_size=280, special_tokens=["</s>"],
                    initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(), show_progress=False,
                )  # fmt: skip
            else:  # as SentencePiece: spaces are part of words, and the first one is not text
                made = tokenizers.Tokenizer(tokenizers.models.Unigram())
                made.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
                made.decoder = tokenizers.decoders.Metaspace()
                trainer = tokenizers.trainers.UnigramTrainer(
                    vocab_size=80, special_tokens=["</s>"], show_progress=False
                )
            made.train_from_iterator([text, "The mat sat on a cat."], trainer)
            tokenizer = transformers.PreTrainedTokenizerFast(
                tokenizer_object=made, eos_token="</s>"
            )
            ids = [*tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id]
            pieces = token_pieces(tokenizer, ids)
            assert len(pieces) == len(ids) and pieces[-1] == ""
            assert "".join(pieces) == tokenizer.decode(ids, skip_special_tokens=True) == text


class Word(types.SimpleNamespace):
    """A word of a dependency tree, as spaCy's."""


def dependencies(*rows):
    words = [Word(text=text, i=i, dep_=dep) for i, (text, _, dep) in enumerate(rows)]
    for word, (_, head, _) in zip(words, rows):
        word.head = words[head]
    return words


class TestParsers:
    def test_dependencies_become_constituents(self):
        words = dependencies(("The", 1, "det"), ("cat", 2, "nsubj"), ("sat", 2, "ROOT"), ("on", 2, "prep"),
                             ("the", 6, "det"), ("red", 6, "amod"), ("mat", 3, "pobj"), (".", 2, "punct"))  # fmt: skip
        made = parsers.dependency_tree(words)
        assert made == [[[["The"], "cat"], ["sat", ["on", [["the"], ["red"], "mat"]]], ["."]]]
        assert walk(made) == [0, 3, 8]

    def test_crossing_arcs_are_lifted(self):
        # "a hearing is scheduled on it today": "on" depends on "hearing", across the verb
        words = dependencies(("a", 1, "det"), ("hearing", 3, "nsubjpass"), ("is", 3, "aux"), ("scheduled", 3, "ROOT"),
                             ("on", 1, "prep"), ("it", 4, "pobj"), ("today", 3, "npadvmod"))  # fmt: skip
        made = as_tree(parsers.dependency_tree(words))
        assert made.leaves() == [w.text for w in words]

    def test_several_roots_in_any_order(self):
        words = dependencies(("a", 2, "x"), ("b", 1, "ROOT"), ("c", 2, "ROOT"), ("d", 1, "x"))
        assert as_tree(parsers.dependency_tree(words)).leaves() == ["a", "b", "c", "d"]

    @pytest.mark.parametrize("seed", range(5))
    def test_any_dependencies_keep_the_order(self, seed):
        made = random.Random(seed)
        order = list(range(12))
        made.shuffle(order)
        heads = {k: order[made.randrange(max(n, 1))] if n else k for n, k in enumerate(order)}
        words = dependencies(
            *((f"w{k}", heads[k], made.choice(["nsubj", "punct", "x"])) for k in range(12))
        )
        assert as_tree(parsers.dependency_tree(words)).leaves() == [f"w{k}" for k in range(12)]

    @pytest.mark.parametrize("module", ["spacy", "pysbd"])
    def test_without_the_extra(self, monkeypatch, module):
        monkeypatch.setitem(sys.modules, module, None)
        parsing._segmenter.cache_clear()
        call = parsers.spacy_parser if module == "spacy" else lambda: split_sentences("A.", "pysbd")
        with pytest.raises(
            ImportError, match=rf"needs {module}.*pip install 'tenfold\[parse\]' \(extra parse\)"
        ):
            call()

    def test_without_its_model(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "spacy", types.ModuleType("spacy"))
        with pytest.raises(ImportError, match=r"needs spaCy's model no_such_model: .* download"):
            parsers.spacy_parser("no_such_model")

    def test_spacy(self, monkeypatch):
        """spaCy's tokens, pipeline and documents; only the arcs, which need its model, are written by hand."""
        import spacy

        pipeline = spacy.blank("en")
        heads, deps = (
            [1, 2, 2, 2, 6, 6, 3, 2],
            ["det", "nsubj", "ROOT", "prep", "det", "amod", "pobj", "punct"],
        )

        def parse(sentence):
            words = pipeline.make_doc(sentence)
            return spacy.tokens.Doc(
                pipeline.vocab, [w.text for w in words], [bool(w.whitespace_) for w in words],
                heads=heads, deps=deps,
            )  # fmt: skip

        package = types.ModuleType("en_core_web_sm")
        package.load = lambda exclude: parse
        monkeypatch.setitem(sys.modules, "en_core_web_sm", package)
        tree = parsers.spacy_parser()("The cat sat on the red mat.")
        assert walk(tree) == [0, 3, 8]
        assert as_tree(tree).leaves() == ["The", "cat", "sat", "on", "the", "red", "mat", "."]

    def test_benepar_protocol_stub(self, monkeypatch):
        """A stub with benepar's names: the package installs, but its models are not on PyPI."""
        stub = types.ModuleType("benepar")
        stub.InputSentence = lambda words: words
        asked = []

        class Parser:
            def __init__(self, name):
                asked.append(name)

            def parse(self, words):
                if len(words) > 4:
                    raise ValueError("Sentence of length 512 is too long")
                return Labelled([Labelled(words[:-1]), words[-1]])

        stub.Parser = Parser
        monkeypatch.setitem(sys.modules, "benepar", stub)
        parse = parsers.benepar_parser("benepar_en3")
        assert asked == ["benepar_en3"] and as_tree(parse("The cat sat.")).leaves() == [
            "The",
            "cat",
            "sat",
            ".",
        ]
        with pytest.raises(Mismatch, match=r"benepar cannot parse .* too long"):
            parse("a b c d e")
        monkeypatch.setitem(sys.modules, "benepar", None)
        with pytest.raises(ImportError, match="needs benepar and its model"):
            parsers.benepar_parser()
