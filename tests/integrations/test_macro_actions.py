# SPDX-License-Identifier: Apache-2.0
"""Macro actions at the level of a host's advantages, and the gates of the four adapters: no host needed."""

import importlib
import importlib.metadata
import sys
import warnings
from functools import partial

import macro_cases as cases
import pytest
import torch

from tenfold import ops
from tenfold.integrations._hosts import Replacement, after_import
from tenfold.integrations.macro_actions import MacroActions
from tenfold.testing import processes

HOSTS = {"verl": "install", "openrlhf": "install", "skyrl": "register", "trl": "MacroAdvantages"}


class TestAdvantages:
    @pytest.mark.parametrize("gamma, lam", cases.DISCOUNTS)
    @pytest.mark.parametrize("n", [1, 2, 5, 100])
    @pytest.mark.parametrize("holes", [False, True])
    def test_by_hand(self, n, gamma, lam, holes):
        rewards, values, mask = cases.batch(holes=holes, dtype=torch.float64)
        got = MacroActions(n).advantages(rewards, values, mask, gamma, lam)
        for a, b in zip(got, cases.by_hand(rewards, values, mask, gamma, lam, n)):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)

    def test_whole_response_and_turns(self):
        rewards, values, mask = cases.batch()
        whole = MacroActions(None).advantages(rewards, values, mask, 1.0, 0.3)
        torch.testing.assert_close(
            whole, MacroActions(50).advantages(rewards, values, mask, 1.0, 0.3)
        )
        mask[0, 4:6] = False
        seg, nseg = MacroActions(None, holes="split").segments(mask)
        assert seg[0].tolist() == [0] * 4 + [-1] * 2 + [1] * 7 and nseg[0] == 2

    def test_discount_per_token(self):
        """Spec's fixture: gamma .9, rewards of the tokens of a macro action discounted within it."""
        rewards = torch.tensor([[-0.05, -0.15, 0.1, -0.2, 2.0]], dtype=torch.float64)
        values = torch.tensor([[0.2, 0.4, 0.6, 0.8, 1.0]], dtype=torch.float64)
        on = torch.ones(1, 5)
        adv, _ = MacroActions(2, discount="per_token").advantages(rewards, values, on, 0.9, 0.5)
        want = torch.tensor([[0.258175, 0.258175, 0.435, 0.435, 1.0]], dtype=torch.float64)
        torch.testing.assert_close(adv, want, rtol=0, atol=1e-9)

    def test_the_rl_package_agrees(self):
        """Rewards made of a score and a KL penalty, against the op that is given both."""
        _, values, mask = cases.batch(dtype=torch.float64)
        old, ref = torch.randn(2, *mask.shape, dtype=torch.float64)
        score = torch.randn(len(mask), dtype=torch.float64)
        rewards = -0.05 * (old - ref)
        rewards[torch.arange(len(mask)), mask.sum(1) - 1] += score
        for macro in (MacroActions(3), MacroActions(1), MacroActions(4, sigma="position")):
            seg, nseg = macro.segments(mask)
            want = ops.ma_ppo_prepare(old, ref, values, score, seg, nseg, 0.05, 0.9, 0.95,
                                      score_clip=1e9, sigma=macro.sigma)  # fmt: skip
            got = macro.advantages(rewards, values, mask, 0.9, 0.95)
            torch.testing.assert_close(got, want[:2], rtol=1e-12, atol=1e-12)

    def test_segmenters_of_the_package(self):
        from tenfold.ma_rlhf import MARLHFConfig, make_segmenter

        rewards, values, mask = cases.batch()
        fixed = make_segmenter(MARLHFConfig(n=3))
        got = MacroActions(segment=fixed).advantages(rewards, values, mask, 1.0, 0.95)
        torch.testing.assert_close(
            got, MacroActions(3).advantages(rewards, values, mask, 1.0, 0.95)
        )
        drawn = partial(
            make_segmenter(MARLHFConfig(termination="random", lengths=(2, 3), repeat=2)),
            generator=torch.Generator().manual_seed(0),
        )
        seg, nseg = MacroActions(segment=drawn).segments(mask)
        assert int(nseg[0]) == 5 and int((seg[0] == 4).sum()) == 3

    @pytest.mark.parametrize("mask_dtype", [torch.bool, torch.int64, torch.float32])
    def test_what_is_masked_is_not_read(self, mask_dtype):
        rewards, values, mask = cases.batch(holes=True)
        want = MacroActions(2).advantages(rewards, values, mask, 0.9, 0.9)
        bad = [x.masked_fill(~mask, float("nan")) for x in (rewards, values)]
        got = MacroActions(2).advantages(*bad, mask.to(mask_dtype), 0.9, 0.9)
        for a, b in zip(got, want):
            assert torch.equal(a, b) and not a[~mask].any() and not a.requires_grad

    def test_low_precision_gives_float32(self):
        rewards, values, mask = cases.batch(dtype=torch.bfloat16)
        got = MacroActions(2).advantages(rewards, values, mask, 1.0, 0.9)
        want = MacroActions(2).advantages(rewards.float(), values.float(), mask, 1.0, 0.9)
        assert got[0].dtype == torch.float32
        torch.testing.assert_close(got, want)

    def test_empty_rows(self):
        rewards, values, mask = cases.batch()
        mask[2] = False
        adv, ret = MacroActions(2).advantages(rewards, values, mask, 1.0, 0.9)
        assert not adv[2].any() and not ret[2].any() and adv[0].any()


class TestBadInput:
    @pytest.mark.parametrize(
        "settings, message",
        [
            ({"n": 0}, "n must be >= 1, got 0"),
            (
                {"sigma": "late"},
                "sigma must be one of equal, unit, position, position_early, got 'late'",
            ),
            ({"reward_reduce": "mean"}, "reward_reduce must be one of sum, sigma, got 'mean'"),
            ({"discount": "none"}, "discount must be one of per_macro, per_token"),
            ({"holes": "skip"}, "holes must be one of bridge, split, error"),
        ],
    )
    def test_settings(self, settings, message):
        with pytest.raises(ValueError, match=message):
            MacroActions(**settings)
        for host in ("verl", "openrlhf", "skyrl"):  # before the host is looked for
            adapter = importlib.import_module(f"tenfold.integrations.{host}")
            with pytest.raises(ValueError, match=message):
                getattr(adapter, HOSTS[host])(**settings)

    def test_n_is_an_integer(self):
        with pytest.raises(TypeError, match=r"n must be an integer, got 2\.5"):
            MacroActions(2.5)

    def test_diluted_scores_warn(self):
        with pytest.warns(UserWarning, match="dilutes the score"):
            MacroActions(3, reward_reduce="sigma")
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            MacroActions(1, reward_reduce="sigma")
            MacroActions(3, reward_reduce="sigma", sigma="unit")

    def test_tensors(self):
        rewards, values, mask = cases.batch()
        call = MacroActions(2).advantages
        with pytest.raises(ValueError, match=r"values is \[5, 12\], mask is \[5, 13\]"):
            call(rewards, values[:, 1:], mask, 1.0, 0.9)
        rewards[3, 0] = float("inf")
        with pytest.raises(ValueError, match=r"rewards must be finite at valid tokens; rows \[3\]"):
            call(rewards, values, mask, 1.0, 0.9)
        rewards[3, 0] = 0
        for gamma, lam, name in ((1.1, 0.9, "gamma"), (1.0, -0.1, "lam")):
            with pytest.raises(ValueError, match=name):
                call(rewards, values, mask, gamma, lam)
        mask[0, 3] = False
        with pytest.raises(ValueError, match=r"holes in rows \[0\]"):
            MacroActions(2, holes="error").advantages(rewards, values, mask, 1.0, 0.9)

    def test_segments_of_a_callback(self):
        rewards, values, mask = cases.batch()
        for wrong in (torch.zeros_like(mask, dtype=torch.int32), torch.full((2, 2), -1)):
            macro = MacroActions(segment=lambda on, wrong=wrong: (wrong, on.sum(1).int()))
            with pytest.raises(ValueError, match="segment must give a seg"):
                macro.advantages(rewards, values, mask, 1.0, 0.9)
        gaps = MacroActions(
            segment=lambda on: (torch.where(on, 2 * on.int().cumsum(1), -1), on.sum(1))
        )
        with pytest.raises(ValueError, match="without gaps"):
            gaps.advantages(rewards, values, mask, 1.0, 0.9)


class TestGates:
    """A host that is missing, or of a version nobody has compared, is refused loudly."""

    @pytest.fixture(params=HOSTS)
    def host(self, request):
        return request.param

    def enter(self, host, **settings):
        adapter = importlib.import_module(f"tenfold.integrations.{host}")
        return getattr(adapter, HOSTS[host])(**settings), adapter

    def test_missing(self, host, monkeypatch):
        def none(name):
            raise importlib.metadata.PackageNotFoundError(name)

        monkeypatch.setattr(importlib.metadata, "version", none)
        with pytest.raises(ModuleNotFoundError, match="which is not installed") as said:
            self.enter(host)
        assert f"pip install {host}==" in str(said.value) and said.value.name == host

    def test_unknown_version(self, host, monkeypatch):
        monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.0.7")
        tested = ", ".join(importlib.import_module(f"tenfold.integrations.{host}").TESTED)
        with pytest.raises(ImportError, match="allow_untested=True") as said:
            self.enter(host)
        assert f"tested with {host} {tested}; found 0.0.7" in str(said.value)

    def test_adapters_import_no_host(self, host):
        code = (
            f"import sys, tenfold.integrations.{host}; "
            f"print([m for m in {list(HOSTS)} + ['ray', 'transformers'] if m in sys.modules])"
        )
        done = processes.python("-c", code, loaded=("torch",))
        assert done.stdout.strip() == "[]", done.stderr

    def test_pins_are_what_is_tested(self, host):
        from pathlib import Path

        lists = Path(__file__).parents[2] / "requirements" / "hosts"
        text = "".join(p.read_text() for p in lists.rglob(f"{host}*.txt"))
        for version in importlib.import_module(f"tenfold.integrations.{host}").TESTED:
            assert f"{host}=={version}\n" in text


class TestReplacement:
    def test_undone_once_and_only_by_its_owner(self):
        def own():
            return "own"

        def ours():
            return "ours"

        class Host:
            gae = own

        table = {"gae": own}
        with Replacement(ours, own, [(Host, "gae"), (table, "gae")]) as made:
            assert Host.gae() == table["gae"]() == "ours" and made.original is own
            with pytest.raises(RuntimeError, match="installed already"):
                Replacement(lambda: 0, Host.gae, [(Host, "gae")])
        assert Host.gae is table["gae"] is own
        made.remove()

        made = Replacement(ours, own, [(Host, "gae"), (table, "gae")])
        table["gae"] = other = lambda: "other"
        with pytest.raises(RuntimeError, match="replaced again"):
            made.remove()
        assert Host.gae is ours and table["gae"] is other

    def test_nothing_changes_where_others_were_first(self):
        def own():
            return "own"

        table = {"gae": own, "also": lambda: "other"}
        with pytest.raises(RuntimeError, match="also has been replaced by other code"):
            Replacement(lambda: 0, own, [(table, "gae"), (table, "also")])
        assert table["gae"] is own


class TestAfterImport:
    def test_acts_once_and_changes_no_other_import(self, tmp_path, monkeypatch):
        (tmp_path / "late_host.py").write_text("VALUE = 1")
        (tmp_path / "other_host.py").write_text("VALUE = 2")
        monkeypatch.syspath_prepend(tmp_path)
        seen, finders = [], list(sys.meta_path)
        after_import("late_host", lambda: seen.append(sys.modules["late_host"].VALUE))
        import other_host

        assert other_host.VALUE == 2 and seen == []
        import late_host  # noqa: F401

        assert seen == [1] and sys.meta_path == finders
        after_import("late_host", lambda: seen.append("at once"))
        assert seen == [1, "at once"]

    def test_its_error_is_the_imports(self, tmp_path, monkeypatch):
        (tmp_path / "strange_host.py").write_text("")
        monkeypatch.syspath_prepend(tmp_path)

        def refuse():
            raise ImportError("another signature")

        after_import("strange_host", refuse)
        with pytest.raises(ImportError, match="another signature"):
            import strange_host  # noqa: F401
