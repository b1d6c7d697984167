# SPDX-License-Identifier: Apache-2.0
"""S2: which experts are merged, how, that it resumes and has the same bits, LoRA experts, what is refused."""

import hashlib
import json
import math
from pathlib import Path

import pytest
import torch
import upit_dense as dense
from safetensors.torch import load_file, save_file

from tenfold import reference
from tenfold.reference.random import name_stream
from tenfold.testing import processes, threads
from tenfold.upit import adapters
from tenfold.upit.expand import expand
from tenfold.upit.selection import child_seed, choose_pair, crossover, extended, similarities

W = "model.layers.0.mlp.up_proj.weight"
Q = "model.layers.0.self_attn.q_proj.weight"


def toy(*deltas, base=(0.5, -0.25)):
    """Experts with these task vectors, and an attention weight that is no expert's."""
    origin = {W: torch.tensor(base), Q: torch.ones(2)}
    made = [
        {W: origin[W] + torch.tensor(d), Q: torch.ones(2) * (i + 2)} for i, d in enumerate(deltas)
    ]
    return origin, made


def brute(base, experts, part=".mlp."):
    flat = [torch.cat([(e[n].double() - base[n].double()).flatten() for n in sorted(base) if part in n])
            for e in experts]  # fmt: skip
    return torch.stack(flat) @ torch.stack(flat).T


def digest(folder):
    made = hashlib.sha256()
    for file in sorted(Path(folder).glob("*/*.safetensors")):
        made.update(file.name.encode() + file.read_bytes())
    return made.hexdigest()


class TestSelection:
    """Acceptance check 8."""

    def test_hand_made_vectors(self):
        base, experts = toy((1.0, 0.0), (0.0, 1.0), (-1.0, 0.1))
        found = expand(base, experts, to=5, drop=0.0)
        assert found.children[0].parents == (0, 2)
        assert [c.number for c in found.children] == [3, 4] and len(found.experts) == 5
        cosine = similarities(brute(base, experts))
        assert cosine[0][2] == pytest.approx(-1 / math.sqrt(1.01), abs=1e-7)
        assert cosine[0][1] == pytest.approx(0, abs=1e-7) and cosine[1][2] == pytest.approx(
            0.0995, abs=1e-4
        )
        assert (found.gram - brute(base, found.experts)).abs().max() <= 1e-12

    def test_it_is_deterministic_and_seeds_differ(self):
        base, experts = toy((1.0, 0.0), (0.0, 1.0), (-1.0, 0.1))
        a, b, c = (expand(base, experts, to=8, seed=s) for s in (3, 3, 4))
        assert a.to_json() == b.to_json() and a.to_json() != c.to_json()
        assert all(torch.equal(x[W], y[W]) for x, y in zip(a.experts, b.experts))
        assert len(a.children) == 5 and all(max(k.parents) < k.number for k in a.children)

    def test_children_can_be_parents(self):
        gram = torch.tensor(
            [[1.0, 0.5, -0.9], [0.5, 1.0, 0.2], [-0.9, 0.2, 1.0]], dtype=torch.float64
        )
        grown = extended(gram, torch.tensor([0.1, -0.95, 0.3, 1.0], dtype=torch.float64))
        assert choose_pair(grown, originals=3) == (1, 3)
        assert choose_pair(grown, originals=3, policy="originals") == (0, 2)
        used = [(0, 2)]
        assert choose_pair(gram, originals=3, policy="no_repeat", used=used) == (1, 2)
        assert choose_pair(gram, originals=3, used=used) == (0, 2)
        with pytest.raises(
            ValueError, match="no pair of experts is left to merge: 3 may be parents, 3"
        ):
            choose_pair(gram, originals=3, policy="no_repeat", used=[(0, 1), (0, 2), (1, 2)])

    def test_ties_and_zero_vectors(self):
        assert choose_pair(torch.eye(4, dtype=torch.float64), originals=4) == (0, 1)
        gram = torch.zeros(3, 3, dtype=torch.float64)
        gram[0, 0] = 1.0
        assert similarities(gram) == [[1.0, 0.0, 0.0], [0.0, 1.0, 1.0], [0.0, 1.0, 1.0]]
        assert choose_pair(gram, originals=3) == (0, 1)

    def test_distance(self):
        base, experts = toy((1.0, 0.0), (10.0, 0.5), (0.0, 1.0))
        assert expand(base, experts, to=4, similarity="l2").children[0].parents == (1, 2)
        assert expand(base, experts, to=4).children[0].parents == (0, 2)
        assert similarities(brute(base, experts), "l2")[0][2] == pytest.approx(-2.0)

    def test_weights_instead_of_task_vectors(self):
        base, experts = toy((1.0, 0.0), (-1.0, 1.0), (0.0, -1.0), base=(100.0, 0.0))
        found = expand(base, experts, to=4, similarity="weight_cosine")
        flat = [e[W].double() for e in experts]
        cosine = {(j, k): float(torch.cosine_similarity(flat[j], flat[k], 0))
                  for j, k in ((0, 1), (0, 2), (1, 2))}  # fmt: skip
        assert found.children[0].parents == min(cosine, key=cosine.get) == (1, 2)

    def test_random_pairs(self):
        base, experts = toy((1.0, 0.0), (0.0, 1.0), (-1.0, 0.1))
        found = [expand(base, experts, to=8, similarity="none", seed=s) for s in range(8)]
        assert all(f.gram is None and f.children[0].similarity is None for f in found)
        assert len({f.children[0].parents for f in found}) == 3

    def test_shares_are_uniform(self):
        drawn = torch.tensor([crossover(i, 0) for i in range(2000)])
        assert float(drawn.min()) >= 0 and float(drawn.max()) < 1
        assert abs(float(drawn.mean()) - 0.5) < 3 / math.sqrt(12 * 2000)
        assert len({child_seed(i, s) for i in range(50) for s in range(4)}) == 200
        assert crossover(7, 0, 0.25) == 0.25


class TestMerging:
    def test_children_are_dare_on_experts_and_linear_elsewhere(self):
        base = {n: t for n, t in dense.llama().state_dict().items()}
        experts = [dense.near(base, s) for s in (1, 2)]
        found = expand(base, experts, to=3, drop=0.25, seed=5)
        child = found.children[0]
        a, b = child.shares
        for name in (W, "model.layers.1.mlp.down_proj.weight"):
            want = reference.dare_merge(base[name], [e[name] for e in experts], [a, b], [0.25, 0.25], child.seed,
                                        name_stream(name))  # fmt: skip
            torch.testing.assert_close(found.experts[2][name], want)
        for name in (Q, "model.norm.weight", "lm_head.weight"):
            want = a * experts[0][name].double() + b * experts[1][name].double()
            torch.testing.assert_close(found.experts[2][name].double(), want, atol=1e-6, rtol=1e-6)

    def test_nothing_dropped_and_all_of_one_parent(self):
        base, experts = toy((1.0, 0.3), (-0.2, 0.7))
        whole = expand(base, experts, to=3, drop=0.0, alpha=1.0).experts[2]
        assert torch.equal(whole[W], experts[0][W]) and torch.equal(whole[Q], experts[0][Q])
        half = expand(base, experts, to=3, drop=0.0, alpha=0.5, lambda_=2.0).experts[2]
        torch.testing.assert_close(half[W], base[W] + experts[0][W] + experts[1][W] - 2 * base[W])
        torch.testing.assert_close(half[Q], torch.full((2,), 2.5))

    @pytest.mark.parametrize("rescale", ["inv_keep", "l1", "l2", "none"])
    def test_rescale(self, rescale):
        base = {W: torch.zeros(64, 64)}
        experts = [{W: torch.randn(64, 64)} for _ in range(2)]
        found = expand(base, experts, to=3, drop=0.5, rescale=rescale, alpha=1.0).experts[2][W]
        kept = found != 0
        factor = (found[kept] / experts[0][W][kept]).mean()
        want = {"inv_keep": 2.0, "none": 1.0}.get(rescale)
        if want is None:
            p = int(rescale[1])
            norms = [torch.linalg.vector_norm(x, p) for x in (experts[0][W], experts[0][W][kept])]
            want = float(norms[0] / norms[1])
        assert float(factor) == pytest.approx(want, rel=1e-4)
        assert abs(float(kept.float().mean()) - 0.5) < 3 * 0.5 / 64

    def test_bf16_experts_of_a_float_base(self, tmp_path):
        base, _ = dense.folders(tmp_path / "a", 0)
        _, experts = dense.folders(tmp_path / "b", 2, torch.bfloat16)
        found = expand(base, experts, tmp_path / "out", to=4)
        made = load_file(f"{found.experts[3]}/model.safetensors")
        assert {t.dtype for t in made.values()} == {torch.bfloat16}
        config = json.loads((Path(found.experts[3]) / "config.json").read_text())
        assert config["dtype"] == "bfloat16"


class TestFolders:
    def test_loads_and_gram(self, tmp_path):
        base, experts = dense.folders(tmp_path, 3)
        found = expand(base, experts, tmp_path / "out", to=5, seed=1)
        assert [Path(e).name for e in found.experts[3:]] == ["expert-03", "expert-04"]
        states = [load_file(f"{e}/model.safetensors") for e in found.experts]
        want = brute(load_file(f"{base}/model.safetensors"), states)
        assert ((found.gram - want) / want.diagonal().mean()).abs().max() <= 1e-12
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(found.experts[4])
        assert torch.equal(model.state_dict()[W], states[4][W])
        memory = expand(load_file(f"{base}/model.safetensors"), states[:3], to=5, seed=1)
        assert memory.children == found.children
        assert all(torch.equal(memory.experts[4][n], states[4][n]) for n in states[4])

    def test_threads_and_sharding_do_not_matter(self, tmp_path):
        base, experts = dense.folders(tmp_path, 2)
        one = expand(base, experts, tmp_path / "one", to=4)
        with threads(2):
            two = expand(base, experts, tmp_path / "two", to=4)
        assert (
            digest(tmp_path / "one") == digest(tmp_path / "two") and one.to_json() == two.to_json()
        )

    def test_a_kill_and_a_new_process_give_the_same_bits(self, tmp_path):
        base, experts = dense.folders(tmp_path, 2)
        want = expand(base, experts, tmp_path / "whole", to=5)
        script = f"""
import os
from tenfold.merge import checkpoint
from tenfold.upit.expand import expand
write, seen = checkpoint.write_shard, []
def killed(folder, shard, make):
    def make_some(tensor):
        seen.append(tensor)
        if len(seen) > len(shard.tensors) + 5:  # within the second child
            os._exit(9)
        return make(tensor)
    return write(folder, shard, make_some)
checkpoint.write_shard = killed
expand({base!r}, {experts!r}, {str(tmp_path / "killed")!r}, to=5)
"""
        done = processes.python("-c", script)
        assert done.returncode == 9, done.stderr[-2000:]
        state = json.loads((tmp_path / "killed" / "expand.json").read_text())
        assert len(state["children"]) == 1
        assert not (tmp_path / "killed/expert-03/model.safetensors").exists()
        made = expand(base, experts, tmp_path / "killed", to=5)
        assert digest(tmp_path / "whole") == digest(tmp_path / "killed")
        assert made.to_json() == want.to_json()

    def test_a_child_that_was_written_but_not_recorded(self, tmp_path, monkeypatch):
        base, experts = dense.folders(tmp_path, 2)
        expand(base, experts, tmp_path / "whole", to=4)
        with monkeypatch.context() as patch:
            import tenfold.upit.expand as module

            def stop(gram, row):
                raise KeyboardInterrupt

            patch.setattr(module, "extended", stop)
            with pytest.raises(KeyboardInterrupt):
                expand(base, experts, tmp_path / "stopped", to=4)
        assert (tmp_path / "stopped/expert-02/model.safetensors").exists()
        expand(base, experts, tmp_path / "stopped", to=4)
        assert digest(tmp_path / "whole") == digest(tmp_path / "stopped")

    def test_a_folder_of_other_settings(self, tmp_path):
        base, experts = dense.folders(tmp_path, 2)
        expand(base, experts, tmp_path / "out", to=3)
        with pytest.raises(ValueError, match=r"belongs to another run.*drop 0.5 there, 0.25 here"):
            expand(base, experts, tmp_path / "out", to=3, drop=0.25)


class TestAdapters:
    @pytest.fixture
    def three(self, tmp_path):
        initial = dense.adapter(tmp_path / "initial", 0, initial=True)
        return initial, [dense.adapter(tmp_path / f"a{i}", i) for i in (1, 2, 3)]

    def update(self, path):
        state, settings = adapters.load_adapter(path)
        scale = adapters.scale_of(settings)
        return {n: scale * state[n + adapters._B].double() @ state[n + adapters._A].double()
                for n in adapters.layers_of(state)}  # fmt: skip

    @pytest.mark.parametrize("how", ["factors", "peft", "delta"])
    def test_merges(self, three, tmp_path, how):
        initial, experts = three
        found = expand(
            initial, experts, tmp_path / "out", to=5, lora_merge=how, drop=0.0, alpha=0.3
        )
        updates = [self.update(e) for e in found.experts]
        flat = [torch.cat([u[n].flatten() for n in sorted(u)]) for u in updates]
        want = torch.stack(flat) @ torch.stack(flat).T
        assert ((found.gram - want) / want.diagonal().mean()).abs().max() <= 1e-12
        child = found.children[0]
        j, k = (adapters.load_adapter(experts[p])[0] for p in child.parents)
        made = adapters.load_adapter(found.experts[3])[0]
        zero = adapters.load_adapter(initial)[0]
        for layer in adapters.layers_of(made):
            a, b = layer + adapters._A, layer + adapters._B
            if how == "factors":
                torch.testing.assert_close(
                    made[a], zero[a] + 0.3 * (j[a] - zero[a]) + 0.7 * (k[a] - zero[a])
                )
                torch.testing.assert_close(made[b], 0.3 * j[b] + 0.7 * k[b])
            elif how == "peft":
                for n in (a, b):
                    torch.testing.assert_close(
                        made[n], math.sqrt(0.3) * j[n] + math.sqrt(0.7) * k[n]
                    )
            else:
                both = 2.0 * (
                    0.3 * j[b].double() @ j[a].double() + 0.7 * k[b].double() @ k[a].double()
                )
                u, s, v = torch.linalg.svd(both)
                best = u[:, :2] * s[:2] @ v[:2]
                torch.testing.assert_close(updates[3][layer], best, atol=1e-6, rtol=1e-5)

    def test_delta_is_exact_where_the_rank_is_enough(self, tmp_path):
        paths = [dense.adapter(tmp_path / f"a{i}", i, rank=4, alpha=4) for i in (1, 2)]
        for path in paths:  # of rank 2 in truth
            state, _ = adapters.load_adapter(path)
            for n, t in state.items():
                (t if n.endswith(adapters._A) else t.T)[2:] = 0
            save_file(
                {n: t.contiguous() for n, t in state.items()}, f"{path}/adapter_model.safetensors"
            )
        found = expand(None, paths, tmp_path / "out", to=3, lora_merge="delta", drop=0.0, alpha=0.4)
        u = [self.update(e) for e in found.experts]
        for layer in u[0]:
            torch.testing.assert_close(
                u[2][layer], 0.4 * u[0][layer] + 0.6 * u[1][layer], atol=1e-6, rtol=1e-5
            )

    def test_resumes(self, three, tmp_path):
        initial, experts = three
        a = expand(initial, experts, tmp_path / "a", to=6)
        with open(tmp_path / "a" / "expand.json") as file:
            state = json.load(file)
        b = expand(initial, experts, tmp_path / "b", to=6)
        state["children"], state["gram"] = state["children"][:1], [r[:4] for r in state["gram"][:4]]
        (tmp_path / "b" / "expand.json").write_text(json.dumps(state))
        c = expand(initial, experts, tmp_path / "b", to=6)
        assert a.to_json() == b.to_json() == c.to_json() and digest(tmp_path / "a") == digest(
            tmp_path / "b"
        )

    def test_what_is_refused(self, three, tmp_path):
        initial, experts = three
        other = dense.adapter(tmp_path / "other", 7, rank=2, alpha=8)
        with pytest.raises(ValueError, match=r"one rank and scale.*rank 2, scale 4.0"):
            expand(initial, [experts[0], other], tmp_path / "o1", to=3)
        base, models = dense.folders(tmp_path / "m", 1)
        with pytest.raises(ValueError, match="all be models or all be LoRA adapters"):
            expand(base, [experts[0], models[0]], tmp_path / "o2", to=3)
        (Path(other) / "adapter_config.json").write_text(json.dumps({"peft_type": "IA3"}))
        with pytest.raises(ValueError, match="no plain LoRA adapter"):
            expand(initial, [experts[0], other], tmp_path / "o3", to=3)


class TestRefused:
    def test_numbers(self):
        base, experts = toy((1.0, 0.0), (0.0, 1.0), (-1.0, 0.1))
        with pytest.raises(ValueError, match="at least 2 and the number of experts, got 2 and 3"):
            expand(base, experts, to=2)
        with pytest.raises(ValueError, match="merging 4 experts needs two parents, got 1"):
            expand(base, experts[:1], to=4)
        for drop in (-0.1, 1.0, math.nan):
            with pytest.raises(ValueError, match=r"drop must be in \[0, 1\), got"):
                expand(base, experts, to=4, drop=drop)
        with pytest.raises(ValueError, match="similarity must be one of cosine"):
            expand(base, experts, to=4, similarity="dot")
        with pytest.raises(ValueError, match="not all finite"):
            expand(base, [experts[0], {**experts[1], W: torch.tensor([math.nan, 0.0])}], to=3)

    def test_identical_experts(self):
        base, experts = toy((1.0, 0.0))
        with pytest.raises(ValueError, match=r"all 3 experts are identical.*allow_identical"):
            expand(base, experts * 3, to=4)
        assert len(expand(base, experts * 3, to=4, allow_identical=True).experts) == 4

    def test_other_tensors(self):
        base, experts = toy((1.0, 0.0), (0.0, 1.0))
        with pytest.raises(
            ValueError, match=r"experts\[1\] lacks tensors of base: .*q_proj.weight"
        ):
            expand(base, [experts[0], {W: experts[1][W]}], to=3)
        with pytest.raises(ValueError, match=r"different dtypes at .*up_proj.*q_proj"):
            expand(base, [experts[0], {n: t.half() for n, t in experts[1].items()}], to=3)
        with pytest.raises(ValueError, match=r"no tensor has experts_in '.ffn.'"):
            expand(base, experts, to=3, experts_in=".ffn.")
        with pytest.raises(TypeError, match="quantised"):
            expand(base, [{n: t.to(torch.int8) for n, t in e.items()} for e in experts], to=3)

    def test_half_precision_mix_warns(self):
        base, experts = toy((1.0, 0.0), (0.0, 1.0))
        base = {n: t.bfloat16() for n, t in base.items()}
        experts = [{n: t.half() for n, t in e.items()} for e in experts]
        with pytest.warns(UserWarning, match="the experts are float16 and the base is bfloat16"):
            found = expand(base, experts, to=3)
        assert found.experts[2][W].dtype == torch.float16
