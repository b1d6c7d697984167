# SPDX-License-Identifier: Apache-2.0
"""Macro actions inside SkyRL: its real estimator, its trainer's real call, its registry across Ray processes.

SkyRL 0.3 defines pydantic models over ``typing.TypedDict``, which pydantic refuses before Python 3.12. There these
tests import it with ``typing_extensions.TypedDict`` in that name, as pydantic's message asks. Nothing is stubbed.
"""

import importlib.metadata
import importlib.util
import os
import pickle
import subprocess
import sys
import typing
from types import SimpleNamespace

import macro_cases as cases
import pytest
import torch

from tenfold.integrations import skyrl as adapter
from tenfold.integrations.skyrl import MacroActions, MacroGAE

pytestmark = pytest.mark.host_skyrl


def imported():
    if sys.version_info < (3, 12):
        import typing_extensions

        own, typing.TypedDict = typing.TypedDict, typing_extensions.TypedDict
    try:
        from skyrl.backends.skyrl_train.utils import ppo_utils
    finally:
        if sys.version_info < (3, 12):
            typing.TypedDict = own
    return ppo_utils


@pytest.fixture
def host():
    if importlib.util.find_spec("skyrl") is None:
        pytest.skip("needs skyrl (make test-hosts)")
    ppo_utils = imported()
    yield ppo_utils
    ppo_utils.AdvantageEstimatorRegistry._functions.pop("macro_gae", None)


@pytest.fixture
def plain(host, monkeypatch):
    """SkyRL's own GAE without the whitening at its end."""
    monkeypatch.setattr(host, "masked_whiten", lambda values, mask: values)
    return host.compute_gae_advantage_return


def call(host, name, rewards, values, mask, gamma=0.99, lam=0.9):
    """As SkyRL's trainer calls it."""
    return host.compute_advantages_and_returns(
        token_level_rewards=rewards, response_mask=mask, index=["a"] * len(mask), adv_estimator=name,
        config=None, values=values, gamma=gamma, lambd=lam, grpo_norm_by_std=True,
    )  # fmt: skip


def config(steps=False, critic="my/critic"):
    model = SimpleNamespace(path=critic)
    return SimpleNamespace(
        generator=SimpleNamespace(step_wise_trajectories=steps),
        trainer=SimpleNamespace(critic=SimpleNamespace(model=model)),
    )


def padded(dtype=torch.float32):
    """Padded as SkyRL pads: on the left."""
    rewards, values, mask = cases.batch(dtype=dtype)
    return cases.left(rewards, values, mask=mask)


class TestAgainstSkyRL:
    @pytest.mark.parametrize("gamma, lam", cases.DISCOUNTS)
    @pytest.mark.parametrize("dtype, tol", [(torch.float64, 1e-12), (torch.float32, 1e-5)])
    def test_one_token_is_skyrls_gae(self, plain, gamma, lam, dtype, tol):
        rewards, values, mask = padded(dtype)
        want = plain(rewards, values, mask.to(dtype), gamma, lam)
        got = MacroGAE(MacroActions(1), whiten=False)(rewards, values, mask.to(dtype), gamma, lam)
        for a, b in zip(got, want):
            torch.testing.assert_close(a[mask], b[mask], rtol=tol, atol=tol)
            assert not a[~mask].any()

    def test_whitening_is_skyrls(self, host):
        rewards, values, mask = padded()
        want, _ = host.compute_gae_advantage_return(rewards, values, mask.float(), 0.99, 0.95)
        got, _ = MacroGAE(MacroActions(1))(rewards, values, mask.float(), 0.99, 0.95)
        torch.testing.assert_close(got[mask], want[mask], rtol=1e-5, atol=1e-5)

    def test_batches_made_by_skyrl(self, host):
        """Its own padding of prompts and responses; tool output (loss mask 0) counts, as in its GAE."""
        from skyrl.train.dataset.preprocess import convert_prompts_responses_to_batch_tensors

        responses = [[5, 6, 7, 2], [8, 2], [9, 9, 9, 9, 9, 9, 2]]
        rewards = [[0.0] * (len(r) - 1) + [float(k)] for k, r in enumerate(responses)]
        loss_masks = [[1, 0, 1, 1], [1, 1], [1, 1, 0, 0, 1, 1, 1]]
        made = convert_prompts_responses_to_batch_tensors(
            SimpleNamespace(pad_token_id=0), [[3], [3, 4], [3]], responses, rewards, loss_masks
        )
        mask, token_rewards = made[2], made[3]
        assert mask.tolist() == [[0, 0, 0, 1, 1, 1, 1], [0] * 5 + [1, 1], [1] * 7]
        values = torch.randn(mask.shape)
        own = call(host, "gae", token_rewards, values, mask)
        adapter.register(n=1)
        got = call(host, "macro_gae", token_rewards, values, mask)
        torch.testing.assert_close(got[0][mask > 0], own[0][mask > 0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(got[1][mask > 0], own[1][mask > 0], rtol=1e-5, atol=1e-5)
        seg, _ = MacroActions(3).segments(mask)
        assert seg[0].tolist() == [-1, -1, -1, 0, 0, 0, 1]


class TestRegister:
    def test_the_trainers_call_finds_it(self, host):
        rewards, values, mask = padded()
        own = call(host, "gae", rewards, values, mask.long())
        made = adapter.register(n=3, cfg=config())
        assert host.AdvantageEstimatorRegistry.get("macro_gae") is made
        got = call(host, "macro_gae", rewards, values, mask.long())
        want = MacroActions(3).advantages(rewards, values, mask, 0.99, 0.9)
        torch.testing.assert_close(
            got[0].double(), cases.whitened(want[0], mask), rtol=1e-5, atol=1e-5
        )
        assert torch.equal(got[1], want[1])
        assert not torch.allclose(got[0][mask], own[0][mask], atol=0.05)
        again = call(host, "gae", rewards, values, mask.long())
        assert all(torch.equal(a, b) for a, b in zip(again, own))
        host.repopulate_all_registries()  # SkyRL does so when it checks its configuration
        assert host.AdvantageEstimatorRegistry.get("macro_gae") is made
        adapter.unregister()
        assert "macro_gae" not in host.AdvantageEstimatorRegistry.list_available()

    def test_settings_arrive(self, host):
        rewards, values, mask = cases.batch(holes=True)
        settings = {"sigma": "position", "discount": "per_token", "holes": "split"}
        adapter.register(n=2, whiten=False, **settings)
        got = call(host, "macro_gae", rewards, values, mask)
        want = MacroActions(2, **settings).advantages(rewards, values, mask, 0.99, 0.9)
        assert all(torch.equal(a, b) for a, b in zip(got, want))

    def test_names(self, host):
        with pytest.raises(ValueError, match="'gae' already registered"):
            adapter.register("gae")
        adapter.register()
        with pytest.raises(ValueError, match="'macro_gae' already registered"):
            adapter.register()
        with pytest.raises(ValueError, match="'grpo' is not an estimator of tenfold"):
            adapter.unregister("grpo")
        assert "grpo" in host.AdvantageEstimatorRegistry.list_available()

    def test_needs_a_critic(self, host):
        adapter.register()
        rewards, _, mask = cases.batch()
        with pytest.raises(ValueError, match=r"need values; set trainer\.critic\.model\.path"):
            call(host, "macro_gae", rewards, None, mask)

    def test_configuration(self, host):
        with pytest.raises(ValueError, match="step_wise_trajectories must be False"):
            adapter.register(cfg=config(steps=True))
        with pytest.raises(ValueError, match=r"trainer\.critic\.model\.path must name a critic"):
            adapter.register(cfg=config(critic=None))
        assert "macro_gae" not in host.AdvantageEstimatorRegistry.list_available()
        from skyrl.train.config import SkyRLTrainConfig

        real = SkyRLTrainConfig()
        with pytest.raises(ValueError, match="must name a critic"):
            adapter.register(cfg=real)
        real.trainer.critic.model.path = "my/critic"
        adapter.register(cfg=real)

    def test_versions(self, host, monkeypatch):
        monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.42.0")
        with pytest.raises(ImportError, match=r"tested with skyrl 0\.3\.0; found 0\.42\.0"):
            adapter.register()
        assert "macro_gae" not in host.AdvantageEstimatorRegistry.list_available()
        adapter.register(allow_untested=True)

    def test_travels(self, host):
        made = MacroGAE(MacroActions(3, sigma="unit"), whiten=False)
        assert pickle.loads(pickle.dumps(made)) == made
        assert pickle.loads(host.cloudpickle.dumps(made)) == made

    def test_from_one_ray_process_to_another(self, host):
        """Registered in the driver, found by a worker that never called register."""
        code = (
            "import ray, test_skyrl\n"
            "from tenfold.integrations import skyrl\n"
            "ray.init(num_cpus=2, include_dashboard=False, object_store_memory=80_000_000)\n"
            "test_skyrl.imported()\n"
            "skyrl.register(n=7)\n"
            "@ray.remote\n"
            "def entrypoint():\n"
            "    import test_skyrl\n"
            "    registry = test_skyrl.imported().AdvantageEstimatorRegistry\n"
            "    return registry.get('macro_gae').macro.n, registry.get('gae').__name__\n"
            "print(*ray.get(entrypoint.remote()))\n"
        )
        path = [os.path.dirname(__file__), os.environ.get("PYTHONPATH", "")]
        env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, path))}
        done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
        said = done.stdout.strip().splitlines()
        assert said and said[-1] == "7 compute_gae_advantage_return", done.stderr[-3000:]
