# SPDX-License-Identifier: Apache-2.0
"""Scheduler and pipeline: sounds of prompts, their independence, guidance, init audio, inpainting, files, refusals."""

import ernie_music_models as tiny
import numpy as np
import pytest
import torch

from tenfold.ernie_music import ErnieMusicPipeline, VDiffusionScheduler, read_audio


def seeds(*numbers):
    return [torch.Generator().manual_seed(n) for n in numbers]


def test_sounds_do_not_depend_on_their_batch():
    pipe = tiny.pipeline()
    many = pipe(
        ["low", "high", ""],
        num_inference_steps=4,
        guidance_scale=2.0,
        generator=seeds(1, 2, 3),
        eta=0.5,
    )
    assert (
        many.audios.shape == (3, 1, 128)
        and many.sample_rate == 1000
        and np.abs(many.audios).max() <= 1
    )
    for i, prompt in enumerate(("low", "high", "")):
        one = pipe(
            prompt, num_inference_steps=4, guidance_scale=2.0, generator=seeds(i + 1), eta=0.5
        )
        np.testing.assert_allclose(one.audios[0], many.audios[i], atol=2e-5)
    again = pipe(
        ["low", "high", ""],
        num_inference_steps=4,
        guidance_scale=2.0,
        generator=seeds(1, 2, 3),
        eta=0.5,
    )
    assert (again.audios == many.audios).all()
    both = pipe(["low", "high"], num_inference_steps=2, num_waveforms_per_prompt=2)
    assert both.prompts == ["low", "low", "high", "high"]


def test_guidance_is_what_it_says():
    pipe = tiny.pipeline()
    noise = torch.randn(2, 1, 128)
    scale = torch.tensor([1.5, 4.0])
    made = pipe(
        ["low", "high"],
        negative_prompt="noise",
        num_inference_steps=3,
        guidance_scale=scale,
        noise=noise,
        output_type="pt",
    ).audios
    states, masks = pipe.encode(["low", "high"])
    free_states, free_masks = pipe.encode(["noise", "noise"])
    scheduler = VDiffusionScheduler()
    scheduler.set_timesteps(3)
    z = noise
    with torch.no_grad():
        for t in scheduler.timesteps:
            v, free = (
                pipe.unet(z, t, states, masks).sample,
                pipe.unet(z, t, free_states, free_masks).sample,
            )
            z = scheduler.step(free + scale.view(-1, 1, 1) * (v - free), t, z).prev_sample
    torch.testing.assert_close(made, z.clamp(-1, 1), atol=1e-4, rtol=1e-4)
    # Outside its interval there is none; a share of rescaling moves the deviation to the conditional one's.
    off = pipe(
        ["low", "high"],
        num_inference_steps=3,
        guidance_scale=scale,
        guidance_interval=(0.9999, 0.99995),
        noise=noise,
    ).audios
    plain = pipe(["low", "high"], num_inference_steps=3, noise=noise).audios
    assert (off == plain).all()
    for more in ({"guidance_rescale": 0.7}, {"cfg_plus_plus": True}):
        other = pipe(
            ["low", "high"], num_inference_steps=3, guidance_scale=scale, noise=noise, **more
        ).audios
        assert np.isfinite(other).all() and np.abs(other - plain).max() > 1e-4


def test_init_audio_and_inpainting():
    pipe = tiny.pipeline()
    known = 0.5 * tiny.tone(50, 0.128)
    near = pipe(
        "low", num_inference_steps=4, init_audio=known, strength=0.01, output_type="pt"
    ).audios
    assert (near[0, 0] - known).abs().max() < 0.05
    mask = torch.zeros(128, dtype=torch.bool)
    mask[:64] = True
    made = pipe(
        "low", num_inference_steps=4, inpaint_audio=known, inpaint_mask=mask, output_type="pt"
    ).audios
    assert (
        torch.equal(made[0, 0, :64], known[:64])
        and (made[0, 0, 64:] - known[64:]).abs().max() > 0.01
    )
    stereo = tiny.pipeline(channels=2)
    assert stereo("x", num_inference_steps=2, init_audio=known).audios.shape == (1, 2, 128)


def test_lengths():
    pipe = tiny.pipeline()
    assert pipe("x", num_inference_steps=1, audio_end_in_s=0.0301).audios.shape[-1] == 30
    assert (
        pipe("x", num_inference_steps=1, audio_length=62, pad_to_valid=True).audios.shape[-1] == 62
    )
    with pytest.raises(ValueError, match="got 62, the next valid length is 64"):
        pipe("x", num_inference_steps=1, audio_length=62)


def test_callback_and_files(tmp_path):
    pipe, seen = tiny.pipeline(), []

    def watch(who, step, t, tensors):
        seen.append((step, float(t), tensors["latents"].shape))
        return {"latents": torch.zeros_like(tensors["latents"])} if step == 2 else {}

    made = pipe(["a", "b"], num_inference_steps=3, callback_on_step_end=watch)
    assert (
        [s for s, _, _ in seen] == [0, 1, 2]
        and seen[0][1] == 1.0
        and seen[1][1] == pytest.approx(2 / 3)
    )
    for ending in (".wav", ".flac"):
        files = made.save(tmp_path / f"x{ending}")
        assert [f.name for f in files] == [f"x-0{ending}", f"x-1{ending}"]
        for file, wave in zip(files, made.audios):
            read, rate = read_audio(file)
            assert rate == 1000
            np.testing.assert_allclose(read, wave, atol=1 / 16000)
    exact = made.save(tmp_path / "y.wav", "float")
    np.testing.assert_array_equal(read_audio(exact[0])[0], made.audios[0])


REFUSED = [
    ({"guidance_scale": torch.ones(3) * 2}, r"guidance_scale must be a number or \[1\], got \[3\]"),
    ({"guidance_scale": float("nan")}, "guidance_scale must be finite"),
    ({"guidance_scale": 2.0, "guidance_interval": (0.5, 0.1)}, "guidance_interval must be"),
    ({"guidance_scale": 2.0, "guidance_rescale": 2.0}, r"guidance_rescale must be in \[0, 1\]"),
    ({"guidance_scale": 2.0, "negative_prompt": ["a", "b"]}, "2 negative prompts for 1 prompts"),
    ({"eta": 1.5}, r"eta must be in \[0, 1\], got 1.5"),
    ({"num_inference_steps": 0}, "num_inference_steps must be an integer >= 1, got 0"),
    ({"audio_end_in_s": -1.0}, "audio_end_in_s must be positive"),
    ({"audio_end_in_s": 1.0, "audio_length": 64}, "give audio_end_in_s or audio_length, not both"),
    ({"init_audio": torch.zeros(64), "strength": 0.0}, r"strength must be in \(0, 1\], got 0.0"),
    ({"init_audio": torch.zeros(1, 3, 64)}, r"init_audio must be \[S\], \[C, S\] or \[1, 1, S\]"),
    ({"init_audio": torch.full((64,), torch.nan)}, "init_audio has values that are not finite"),
    ({"inpaint_audio": torch.zeros(64)}, "inpainting needs both"),
    ({"noise": torch.zeros(1, 1, 64)}, r"noise must be \[1, 1, 128\], got \[1, 1, 64\]"),
    ({"generator": seeds(1, 2)}, "2 generators for 1 waveforms"),
    ({"output_type": "list"}, "output_type must be 'np' or 'pt'"),
]


@pytest.mark.parametrize("more, words", REFUSED, ids=[" ".join(m) for m, _ in REFUSED])
def test_refusals(more, words):
    with pytest.raises(ValueError, match=words):
        tiny.pipeline()("low", **({"num_inference_steps": 1} | more))


def test_guidance_needs_condition_dropout():
    pipe = tiny.pipeline(condition_dropout=0.0)
    with pytest.warns(UserWarning, match="trained without condition dropout"):
        pipe("low", num_inference_steps=1, guidance_scale=2.0)
    with pytest.raises(ValueError, match=r"has no model_index\.json"):
        ErnieMusicPipeline.from_pretrained("/nowhere")
    bare = ErnieMusicPipeline(tiny.unet(text_encoder=None))
    bare.set_progress_bar_config(disable=True)
    assert bare("", num_inference_steps=1).audios.shape == (1, 1, 128)
    with pytest.raises(ValueError, match="has no text encoder"):
        bare("low", num_inference_steps=1)


def test_scheduler(tmp_path):
    made = VDiffusionScheduler(num_inference_steps=10, time_warp="crash", solver="dpm++")
    # Section 3.1's table of the warp.
    made.set_timesteps(10)
    want = [1, 0.8589, 0.7195, 0.5839, 0.4542, 0.3333, 0.2246, 0.1322, 0.0609, 0.0156]
    assert made.timesteps.tolist() == pytest.approx(want, abs=5e-5)
    made.save_pretrained(tmp_path)
    again = VDiffusionScheduler.from_pretrained(tmp_path)
    assert again.config == made.config and len(again) == 10
    assert VDiffusionScheduler.from_config(made.config, solver="ddim").config.solver == "ddim"
    assert made.init_noise_sigma == 1 and made.scale_model_input(3) == 3
    z = torch.randn(1, 1, 8)
    with pytest.raises(ValueError, match="is none of this run's"):
        made.step(z, 0.123, z)
    with pytest.raises(ValueError, match="needs uncond_output"):
        made.step(z, 1.0, z, guidance_scale=3.0)
    for t in made.timesteps:
        z = made.step(z * 0.1, t, z, return_dict=False)[0]
    with pytest.raises(ValueError, match="the run is over"):
        made.step(z, 0.1, z)
    for name, value, words in (
        ("solver", "euler", "solver must be"),
        ("eta", 2.0, "eta must be"),
        ("clip", -1.0, "clip must be"),
    ):
        with pytest.raises(ValueError, match=words):
            VDiffusionScheduler(**{name: value})
