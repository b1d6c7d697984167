# SPDX-License-Identifier: Apache-2.0
"""Macro actions inside OpenRLHF: its real experience maker, whole, up to the whitening over the rollout.

Two GPU-only packages that OpenRLHF imports cannot be installed here. In their place stand STUBS: empty modules
``vllm`` and ``flash_attn``, nothing of which is called in these tests (a call would raise). All else is real.
"""

import importlib.machinery
import importlib.metadata
import importlib.util
import os
import subprocess
import sys
import types
from types import SimpleNamespace

import macro_cases as cases
import pytest
import torch

from tenfold.integrations import openrlhf as adapter
from tenfold.integrations.openrlhf import MacroActions

pytestmark = pytest.mark.host_openrlhf

STUBS = {
    "vllm": (),
    "vllm.inputs": ("TokensPrompt",),
    "vllm.utils": ("random_uuid",),
    "flash_attn": (),
    "flash_attn.bert_padding": ("index_first_axis", "pad_input", "rearrange", "unpad_input"),
    "flash_attn.utils": (),
    "flash_attn.utils.distributed": ("all_gather",),
}


def put_stubs() -> None:
    """Only where the package itself is missing."""
    missing = {p for p in ("vllm", "flash_attn") if importlib.util.find_spec(p) is None}
    for name, members in STUBS.items():
        if name.split(".")[0] in missing:
            module = types.ModuleType(name)
            module.__spec__ = importlib.machinery.ModuleSpec(name, None)
            for member in members:
                setattr(module, member, None)
            sys.modules[name] = module


@pytest.fixture(scope="module")
def host():
    if importlib.util.find_spec("openrlhf") is None:
        pytest.skip("needs openrlhf (make test-hosts)")
    before = set(sys.modules)
    put_stubs()
    from openrlhf.trainer.ppo_utils import experience_maker

    yield experience_maker
    for name in set(STUBS) - before:
        sys.modules.pop(name, None)


@pytest.fixture
def maker(host):
    """A RemoteExperienceMaker with its settings and without workers, as OpenRLHF's own tests make one."""
    made = host.RemoteExperienceMaker.__new__(host.RemoteExperienceMaker)
    nested = SimpleNamespace
    made.advantage_estimator = "gae"
    made.kl_ctl = nested(value=0.05)
    advantage = nested(estimator="gae", gamma=0.99, lambd=0.9, no_std_norm=False)
    made.strategy = nested(args=nested(
        algo=nested(advantage=advantage), rollout=nested(n_samples_per_prompt=1),
        reward=nested(clip_range=(-10, 10), overlong_buffer_len=None, stop_properly_penalty_coef=None),
    ))  # fmt: skip
    return made


def experiences(host, holes: bool = False):
    """Two batches of unlike widths, as a rollout has them, with what rewards are made of."""
    made = []
    for first, width in ((0, 13), (5, 9)):
        _, values, mask = cases.batch(width=width, holes=holes)
        made.append(host.Experience(
            action_mask=mask, values=values, rewards=torch.randn(5), kl=0.3 * torch.randn(5, width),
            index=list(range(first, first + 5)), info={},
        ))  # fmt: skip
    return made


def rewards_of(host, exp):
    return host.compute_reward(exp.rewards, 0.05, exp.kl, exp.action_mask, (-10, 10))


class TestAgainstOpenRLHF:
    @pytest.mark.parametrize("gamma, lam", cases.DISCOUNTS)
    @pytest.mark.parametrize("dtype, tol", [(torch.float64, 1e-12), (torch.float32, 1e-5)])
    def test_one_token_is_openrlhfs_gae(self, maker, gamma, lam, dtype, tol):
        rewards, values, mask = cases.batch(dtype=dtype)
        want = maker.get_advantages_and_returns(values, rewards, mask, gamma, lam)
        with adapter.install(n=1):
            got = maker.get_advantages_and_returns(values, rewards, mask, gamma, lam)
        for a, b in zip(got, want):  # padding included: 0 in both
            torch.testing.assert_close(a, b, rtol=tol, atol=tol)

    def test_prompt_in_the_mask(self, maker):
        """OpenRLHF's action mask spans the prompt too, with 0; it belongs to no macro action."""
        rewards, values, mask = (torch.nn.functional.pad(x, (4, 0)) for x in cases.batch())
        values[:, :4] = 3.0
        want, _ = maker.get_advantages_and_returns(values, rewards, mask, 0.99, 0.9)
        with adapter.install(n=1):
            got, _ = maker.get_advantages_and_returns(values, rewards, mask, 0.99, 0.9)
        torch.testing.assert_close(got[mask], want[mask], rtol=1e-5, atol=1e-5)
        assert not got[:, :4].any() and MacroActions(3).segments(mask)[0][0, 4:8].tolist() == [
            0,
            0,
            0,
            1,
        ]

    def test_holes(self, maker):
        """Across tool output OpenRLHF's advantages decay and its next value is 0; ours skip it, as verl's do."""
        rewards, values, mask = cases.batch(holes=True, dtype=torch.float64)
        own = maker.get_advantages_and_returns(values, rewards, mask, 0.99, 0.9)
        with adapter.install(n=1):
            got = maker.get_advantages_and_returns(values, rewards, mask, 0.99, 0.9)
        want = cases.by_hand(rewards, values, mask, 0.99, 0.9, 1)
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
        assert not torch.allclose(got[0][mask], own[0][mask], atol=0.01)
        # Packed, where there are no holes, OpenRLHF computes the same.
        for b in range(len(mask)):
            packed = [x[b : b + 1, mask[b]] for x in (values, rewards, mask)]
            theirs, _ = maker.get_advantages_and_returns(*packed, 0.99, 0.9)
            torch.testing.assert_close(got[0][b, mask[b]], theirs[0], rtol=1e-12, atol=1e-12)


class TestInstall:
    def test_the_whole_of_its_computation(self, host, maker):
        """Its rewards, our macro advantages, its whitening over all batches of the rollout."""
        own = host.RemoteExperienceMaker.get_advantages_and_returns
        made = experiences(host)
        wants = [MacroActions(3).advantages(rewards_of(host, e), e.values, e.action_mask, 0.99, 0.9)
                 for e in made]  # fmt: skip
        valid = torch.cat([adv[e.action_mask] for (adv, _), e in zip(wants, made)])
        scale = (valid - valid.mean()).square().mean().clamp(min=1e-8).rsqrt()
        with adapter.install(n=3) as replaced:
            assert replaced.original is own
            done = maker.compute_advantages_and_returns(made)
        assert host.RemoteExperienceMaker.get_advantages_and_returns is own
        for exp, (adv, ret) in zip(done, wants):
            on = exp.action_mask
            want = (adv - valid.mean()) * scale
            torch.testing.assert_close(exp.advantages[on], want[on], rtol=1e-5, atol=1e-5)
            assert torch.equal(exp.returns, ret)

    def test_one_token_installed_changes_nothing(self, host, maker):
        torch.manual_seed(1)
        want = maker.compute_advantages_and_returns(experiences(host))
        torch.manual_seed(1)
        with adapter.install(n=1):
            got = maker.compute_advantages_and_returns(experiences(host))
        for a, b in zip(got, want):
            torch.testing.assert_close(a.advantages, b.advantages, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(a.returns, b.returns, rtol=1e-5, atol=1e-5)

    def test_settings_arrive(self, maker):
        rewards, values, mask = cases.batch(holes=True)
        settings = {"sigma": "unit", "discount": "per_token", "holes": "split"}
        with adapter.install(n=2, **settings):
            got = maker.get_advantages_and_returns(values, rewards, mask, 0.9, 0.9)
            with pytest.raises(RuntimeError, match="installed already"):
                adapter.install()
        want = MacroActions(2, **settings).advantages(rewards, values, mask, 0.9, 0.9)
        assert all(torch.equal(a, b) for a, b in zip(got, want))

    def test_versions(self, host, monkeypatch):
        own = host.RemoteExperienceMaker.get_advantages_and_returns
        monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.42.0")
        with pytest.raises(ImportError, match=r"tested with openrlhf 0\.11\.2; found 0\.42\.0"):
            adapter.install()
        assert host.RemoteExperienceMaker.get_advantages_and_returns is own
        adapter.install(allow_untested=True).remove()

    def test_another_signature_is_refused(self, host, monkeypatch):
        def gae(self, values, rewards, action_mask, gamma, lambd, bootstrap):
            raise AssertionError

        monkeypatch.setattr(host.RemoteExperienceMaker, "get_advantages_and_returns", gae)
        with pytest.raises(ImportError, match=r"takes \(.*bootstrap\); this adapter replaces"):
            adapter.install(allow_untested=True)

    def test_in_a_ray_worker(self, host, tmp_path):
        """OpenRLHF's trainer is a Ray actor; Ray's setup hook installs there, at OpenRLHF's own import."""
        (tmp_path / "my_macro.py").write_text(
            "from tenfold.integrations import openrlhf\n"
            "def setup():\n"
            "    import test_openrlhf\n"
            "    test_openrlhf.put_stubs()\n"
            "    openrlhf.install_on_import(n=5)\n"
        )
        code = (
            "import ray\n"
            "ray.init(num_cpus=1, include_dashboard=False, object_store_memory=80_000_000,\n"
            "         runtime_env={'worker_process_setup_hook': 'my_macro.setup'})\n"
            "@ray.remote\n"
            "class PPOTrainer:\n"
            "    def method(self):\n"
            "        import sys\n"
            "        early = [m for m in ('openrlhf', 'deepspeed') if m in sys.modules]\n"
            "        from openrlhf.trainer.ppo_utils.experience_maker import RemoteExperienceMaker as m\n"
            "        return early, m.get_advantages_and_returns.__module__\n"
            "print(*ray.get(PPOTrainer.remote().method.remote()))\n"
        )
        path = [str(tmp_path), os.path.dirname(__file__), os.environ.get("PYTHONPATH", "")]
        env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, path))}
        done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
        said = done.stdout.strip().splitlines()
        assert said and said[-1] == f"[] {adapter.__name__}", done.stderr[-3000:]

    def test_on_import_refuses_at_once(self, host, monkeypatch):
        with pytest.raises(ValueError, match="n must be >= 1"):
            adapter.install_on_import(n=0)
        monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.42.0")
        with pytest.raises(ImportError, match=r"found 0\.42\.0"):
            adapter.install_on_import()
