# SPDX-License-Identifier: Apache-2.0
"""Macro actions inside verl: its real functions, its trainer's real call, its registry, its plug-in variable."""

import importlib.metadata
import importlib.util
import os
import subprocess
import sys

import macro_cases as cases
import pytest
import torch

from tenfold import ops
from tenfold.integrations import verl as adapter
from tenfold.integrations.verl import MacroActions

pytestmark = pytest.mark.host_verl


@pytest.fixture
def algos():
    if importlib.util.find_spec("verl") is None:
        pytest.skip("needs verl (make test-hosts)")
    from verl.trainer.ppo import core_algos

    return core_algos


@pytest.fixture
def plain(algos, monkeypatch):
    """verl's own GAE without the whitening at its end."""
    monkeypatch.setattr(algos.verl_F, "masked_whiten", lambda values, mask: values)
    return algos.compute_gae_advantage_return


def data_proto(rewards, values, mask):
    from verl import DataProto

    tensors = {"token_level_rewards": rewards, "values": values, "response_mask": mask.long()}
    return DataProto.from_dict(tensors)


def trainer_advantages(rewards, values, mask, gamma=0.99, lam=0.9):
    """What verl's trainer computes of a batch, by its own function."""
    from verl.trainer.config import AlgoConfig
    from verl.trainer.ppo.ray_trainer import compute_advantage

    data = compute_advantage(
        data_proto(rewards, values, mask), "gae", gamma, lam, config=AlgoConfig()
    )
    return data.batch["advantages"], data.batch["returns"]


class TestAgainstVerl:
    @pytest.mark.parametrize("gamma, lam", cases.DISCOUNTS)
    @pytest.mark.parametrize("holes", [False, True], ids=["", "holes"])
    @pytest.mark.parametrize("dtype, tol", [(torch.float64, 1e-12), (torch.float32, 1e-5)])
    def test_one_token_is_verls_gae(self, plain, gamma, lam, holes, dtype, tol):
        rewards, values, mask = cases.batch(holes=holes, dtype=dtype)
        want = plain(rewards, values, mask.to(dtype), gamma, lam)
        got = adapter.estimator(MacroActions(1), whiten=False)(rewards, values, mask, gamma, lam)
        for a, b in zip(got, want):
            torch.testing.assert_close(a[mask], b[mask], rtol=tol, atol=tol)
            assert not a[~mask].any()

    @pytest.mark.parametrize("holes", [False, True], ids=["", "holes"])
    def test_whitening_is_verls(self, algos, holes):
        rewards, values, mask = cases.batch(holes=holes)
        want, _ = algos.compute_gae_advantage_return(rewards, values, mask.float(), 0.99, 0.95)
        got, _ = adapter.estimator(MacroActions(1))(rewards, values, mask.float(), 0.99, 0.95)
        torch.testing.assert_close(got[mask], want[mask], rtol=1e-5, atol=1e-5)
        got, _ = adapter.estimator(MacroActions(3))(rewards, values, mask.long(), 0.99, 0.95)
        adv, _ = MacroActions(3).advantages(rewards, values, mask, 0.99, 0.95)
        torch.testing.assert_close(got.double(), cases.whitened(adv, mask), rtol=1e-5, atol=1e-5)

    def test_rewards_made_by_verl(self, algos):
        """verl's score and KL penalty, then ours, is the op that is given score and log-probabilities."""
        from verl.trainer.ppo.ray_trainer import apply_kl_penalty

        _, values, mask = cases.batch()
        old, ref = torch.randn(2, *mask.shape)
        score = torch.randn(len(mask))
        scores = torch.zeros(mask.shape)
        scores[torch.arange(len(mask)), mask.sum(1) - 1] = score
        data = data_proto(scores, values, mask)
        data.batch.update({"token_level_scores": scores, "old_log_probs": old, "ref_log_prob": ref})
        data, _ = apply_kl_penalty(data, algos.FixedKLController(0.05))
        rewards = data.batch["token_level_rewards"]
        got = adapter.estimator(MacroActions(4), whiten=False)(rewards, values, mask, 1.0, 0.95)
        seg, nseg = ops.macro_segment_fixed(mask, 4)
        want = ops.ma_ppo_prepare(old, ref, values, score, seg, nseg, 0.05, score_clip=1e9)
        torch.testing.assert_close(got, want[:2], rtol=1e-5, atol=1e-5)


class TestInstall:
    def test_the_trainer_uses_it(self, algos):
        """verl's trainer calls the module's function; others look "gae" up. Both are replaced, and restored."""
        rewards, values, mask = cases.batch(holes=True)
        own = algos.compute_gae_advantage_return
        before = trainer_advantages(rewards, values, mask)
        with adapter.install(n=3) as made:
            assert made.original is own
            assert (
                algos.get_adv_estimator_fn("gae") is algos.compute_gae_advantage_return is not own
            )
            got = trainer_advantages(rewards, values, mask)
            with pytest.raises(RuntimeError, match="installed already"):
                adapter.install(n=2)
        want = MacroActions(3).advantages(rewards, values, mask, 0.99, 0.9)
        torch.testing.assert_close(
            got[0].double(), cases.whitened(want[0], mask), rtol=1e-5, atol=1e-5
        )
        assert torch.equal(got[1], want[1])
        assert not torch.allclose(got[0][mask], before[0][mask], atol=0.05)
        assert algos.get_adv_estimator_fn("gae") is algos.compute_gae_advantage_return is own
        assert all(
            torch.equal(a, b) for a, b in zip(trainer_advantages(rewards, values, mask), before)
        )

    def test_one_token_installed_changes_nothing(self, algos):
        rewards, values, mask = cases.batch(holes=True)
        before = trainer_advantages(rewards, values, mask)
        with adapter.install(n=1):
            got = trainer_advantages(rewards, values, mask)
        for a, b in zip(got, before):
            torch.testing.assert_close(a[mask], b[mask], rtol=1e-5, atol=1e-5)

    def test_settings_arrive(self, algos):
        rewards, values, mask = cases.batch(holes=True)
        settings = {"sigma": "position", "discount": "per_token", "holes": "split"}
        with adapter.install(n=2, whiten=False, **settings):
            got = trainer_advantages(rewards, values, mask)
        want = MacroActions(2, **settings).advantages(rewards, values, mask, 0.99, 0.9)
        assert all(torch.equal(a, b) for a, b in zip(got, want))

    def test_versions(self, algos, monkeypatch):
        own = algos.compute_gae_advantage_return
        monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.42.0")
        with pytest.raises(ImportError, match=r"tested with verl 0\.9\.1; found 0\.42\.0"):
            adapter.install()
        assert algos.compute_gae_advantage_return is own
        adapter.install(allow_untested=True).remove()

    def test_another_signature_is_refused(self, algos, monkeypatch):
        def gae(token_level_rewards, values, response_mask, gamma, lam, bootstrap):
            raise AssertionError

        monkeypatch.setitem(algos.ADV_ESTIMATOR_REGISTRY, "gae", gae)
        with pytest.raises(ImportError, match=r"takes \(.*bootstrap\); this adapter replaces"):
            adapter.install(allow_untested=True)
        assert algos.ADV_ESTIMATOR_REGISTRY["gae"] is gae

    def test_by_verls_variable_in_a_ray_worker(self, algos, tmp_path):
        """VERL_USE_EXTERNAL_MODULES reaches the process in which verl computes advantages."""
        (tmp_path / "my_macro.py").write_text(
            "from tenfold.integrations import verl\nverl.install(n=5)\n"
        )
        code = (
            "import ray\n"
            "from verl.trainer.constants_ppo import get_ppo_ray_runtime_env\n"
            "ray.init(num_cpus=1, include_dashboard=False, runtime_env=get_ppo_ray_runtime_env(),\n"
            "         object_store_memory=80_000_000)\n"
            "@ray.remote\n"
            "class TaskRunner:\n"
            "    def estimators(self):\n"
            "        from verl.trainer.ppo.ray_trainer import core_algos as c\n"
            "        return c.compute_gae_advantage_return.__module__, c.get_adv_estimator_fn('gae').__module__\n"
            "print(*ray.get(TaskRunner.remote().estimators.remote()))\n"
        )
        path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
        env = os.environ | {"PYTHONPATH": path, "VERL_USE_EXTERNAL_MODULES": "my_macro"}
        done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
        said = done.stdout.strip().splitlines()
        assert said and said[-1].split() == [adapter.__name__] * 2, done.stderr[-3000:]
