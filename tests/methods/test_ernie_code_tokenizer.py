# SPDX-License-Identifier: Apache-2.0
"""Vocabularies: the order of ids, sentinels, what is added to others, saving, and tables of other lengths."""

import pytest
from ernie_code_data import Mt5Ids, t5_tokenizer, tokenizer

from tenfold.ernie_code.formatting import SPACE, encode_code
from tenfold.ernie_code.tokenizer import (
    check_rows,
    extend_tokenizer,
    layout,
    load_tokenizer,
    sentinels,
    train_tokenizer,
)

WHITESPACE = ["\n", "\t", SPACE * 4, SPACE * 2, SPACE]


@pytest.mark.parametrize("model", ["bpe", "unigram"])
def test_layout_of_a_trained_one(model):
    t = tokenizer(model)
    n = len(t)
    assert n == 1024
    assert t.convert_ids_to_tokens([0, 1, 2]) == ["<pad>", "</s>", "<unk>"]
    assert t.convert_ids_to_tokens(list(range(n - 5, n))) == WHITESPACE
    assert sentinels(t) == (n - 6, 100)
    ends = t.convert_ids_to_tokens([n - 6, n - 7, n - 105])
    assert ends == ["<extra_id_0>", "<extra_id_1>", "<extra_id_99>"]
    assert layout(t).problems == ()
    assert t("a")["input_ids"][-1] == 1 and t("a", "b")["input_ids"].count(1) == 1
    assert t("")["input_ids"] == [1]


def test_few_texts_give_fewer_ids_and_are_reproducible():
    one, two = (train_tokenizer(["ab ab\n"] * 3, 1000, num_sentinels=8) for _ in range(2))
    assert one.get_vocab() == two.get_vocab() and 256 + 3 + 13 <= len(one) < 1000
    assert sentinels(one) == (len(one) - 6, 8)
    with pytest.raises(ValueError, match=r"vocab_size must be at least 364.*got vocab_size 300"):
        train_tokenizer(["a"], 300)
    with pytest.raises(ValueError, match="model must be one of bpe, unigram"):
        train_tokenizer(["a"], model="word")


def test_saved_and_loaded(tmp_path):
    t, code = tokenizer(), "if x:\n     y  </s>\n"
    t.save_pretrained(tmp_path)
    loaded = load_tokenizer(str(tmp_path), local_files_only=True)
    assert loaded.get_vocab() == t.get_vocab() and layout(loaded) == layout(t)
    assert encode_code(loaded, code) == encode_code(t, code)
    assert extend_tokenizer(loaded) == []


def test_mt5_extended_has_the_released_ids(tmp_path):
    t = t5_tokenizer(250_000)
    assert len(t) == 250_100 and sentinels(t) == (250_099, 100)
    with pytest.raises(ValueError, match="whitespace tokens"):
        layout(t)
    assert extend_tokenizer(t) == WHITESPACE
    found = layout(t)
    assert found.length == 250_105 and found.problems == ()
    assert list(found.whitespace.values()) == [250_100, 250_101, 250_102, 250_103, 250_104]
    check_rows(t, 250_105)
    said = r"250112 embedding rows \(mT5's table\).*resize_token_embeddings\(250105\)"
    with pytest.raises(ValueError, match=said):
        check_rows(t, 250_112)


def test_rows():
    t = tokenizer()
    check_rows(t, 1024)
    check_rows(t, 1088, allow_more=True)
    for rows, more in ((1088, False), (1000, True), (250_105, False)):
        with pytest.raises(ValueError, match=f"{rows} embedding rows.*1024 ids.*resize"):
            check_rows(t, rows, allow_more=more)


def test_sentinels_that_do_not_descend():
    assert sentinels(Mt5Ids()) == (250_099, 100)
    t = t5_tokenizer(sentinels="")
    with pytest.raises(ValueError, match=r"no sentinels.*extend_tokenizer"):
        sentinels(t)
    t.add_tokens([f"<extra_id_{i}>" for i in range(3)], special_tokens=True)
    with pytest.raises(ValueError, match=r"descending ids without gaps.*<extra_id_1> should be"):
        sentinels(t)
    with pytest.raises(ValueError, match="descending"):
        extend_tokenizer(t)
    t = t5_tokenizer(sentinels="")
    t.add_tokens(["<extra_id_3>", "<extra_id_1>", "<extra_id_0>"], special_tokens=True)
    with pytest.raises(ValueError, match="<extra_id_2>"):
        sentinels(t)
    t = t5_tokenizer(sentinels="")
    t.add_tokens(["<extra_id_1>", "<extra_id_0>"], special_tokens=True)
    twice = t5_tokenizer()
    twice.add_tokens(["<extra_id_0>"], special_tokens=True)
    with pytest.raises(ValueError, match=r"<extra_id_0> twice.*give first_sentinel"):
        sentinels(twice)
    with pytest.raises(ValueError, match=r"2 sentinels of 100.*num_sentinels=2"):
        extend_tokenizer(t)
    assert extend_tokenizer(t, 2) == WHITESPACE


def test_sentinels_are_added_in_descending_order():
    t = t5_tokenizer(sentinels="")
    n = len(t)
    assert extend_tokenizer(t, 4) == [f"<extra_id_{i}>" for i in (3, 2, 1, 0)] + WHITESPACE
    assert sentinels(t) == (n + 3, 4)


def test_wrong_special_ids(tmp_path):
    t = tokenizer()
    other = type(t)(
        tokenizer_object=t.backend_tokenizer, pad_token="</s>", eos_token="</s>", unk_token="<unk>"
    )
    assert layout(other).problems == ("pad is 1, not 0",)
    other.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="pad is 1, not 0"):
        load_tokenizer(str(tmp_path))
