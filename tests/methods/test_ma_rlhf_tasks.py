# SPDX-License-Identifier: Apache-2.0
"""The packaged prompts and the reward that a program computes."""

import pytest
import torch

from tenfold.ma_rlhf.tasks import Spelling, text_prompts, vocabulary


def test_spelling_counts_known_new_whole_words():
    reward = Spelling({"the", "method", "returns"})
    # 'the' once of twice; 'retrns' is wrong; 'method' may be cut
    assert reward.score("Note. ", "the retrns the method") == pytest.approx(3 / 21)
    assert reward.score("Note. ", "the retrns the method.") == pytest.approx(9 / 22)
    assert reward.score("Note. ", "") == 0.0
    assert reward.score("Note. ", "...") == 0.0
    assert reward.score("a re", "turns it") == pytest.approx(5 / 8)  # continues the prompt's word
    assert reward.score("a ", "turns it") == 0.0
    got = reward(prompts=["", ""], completions=["The. ", "x. "], extra=[1, 2])
    assert got == [pytest.approx(3 / 5), 0.0]


def test_spelling_needs_words():
    with pytest.raises(ValueError, match="words must not be empty"):
        Spelling([])


def test_vocabulary_counts_without_case():
    assert vocabulary("The the THE of of of. Cat cat dog dog_dog", 3) == {"the", "dog"}


def test_prompts_are_pieces_of_the_text():
    stream = torch.tensor(list(b"A function of the position alone. " * 20))
    prompts = text_prompts(stream, 5, 16, seed=1)
    assert len(prompts) == 5 and all(len(p) == 16 for p in prompts)
    assert prompts == text_prompts(stream, 5, 16, seed=1) != text_prompts(stream, 5, 16, seed=2)
    text = bytes(stream.tolist()).decode()
    assert all(p in text for p in prompts)
