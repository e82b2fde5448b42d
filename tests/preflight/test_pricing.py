"""What preflight says of the networks between images, latents and scores, in sizes that compile in
seconds."""

import dataclasses
import functools
import os
import shutil
from pathlib import Path

import jax
import pytest
from ml_collections import ConfigDict
from support.configs import small_config, small_latent_config, small_token_config
from support.processes import ROOT

from diffit_jax.errors import UserError
from diffit_jax.experiment.config import build
from diffit_jax.models.pretrained.autoencoder import Autoencoder
from diffit_jax.models.pretrained.dinov2 import ENCODERS
from diffit_jax.models.pretrained.inception import Inception
from diffit_jax.preflight import chain, compiler, preflight, report
from diffit_jax.preflight.figures import Step
from diffit_jax.run import representation
from diffit_jax.runtime import parallel


@pytest.fixture(scope="module", autouse=True)
def small_networks(tmp_path_factory):
    """Smaller ones than the published; and the compiler's answers to them, as in
    test_preflight.py."""
    place = Path(os.environ.get("RENEW_ANSWERS") or tmp_path_factory.mktemp("answers") / "there")
    if not place.exists():
        shutil.copytree(ROOT / "tests" / "golden" / "preflight", place)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiler, "CACHE", place)
        small = functools.partial(Autoencoder, channels=(32, 64), num_blocks=1)
        patch.setattr(chain, "Autoencoder", small)
        patch.setattr(chain, "Inception", functools.partial(Inception, width=1 / 8))
        patch.setattr(chain, "ENCODERS", {"dinov2_vitl14": ENCODERS["digits"]})
        yield


def test_encoders_of_a_loss_and_of_a_distance():
    """Their FLOPs are those of their products, their weights a copy on each device."""
    config = small_token_config("repa")
    found = preflight.preflight(config, topology="v5e:2x2", programs=["encoder", "dinov2"])
    encoder, dinov2 = found.chain.programs["encoder"], found.chain.programs["dinov2"]
    assert encoder.images == config.training.batch_size and dinov2.images == 128
    flops = representation.encoder_flops(build(config)) * encoder.images
    assert encoder.flops == pytest.approx(flops)
    # 256 patches, where the loss has 16.
    assert dinov2.flops / dinov2.images > 10 * encoder.flops / encoder.images
    shapes = representation.abstract_encoder(
        build(config).representation, parallel.make_mesh(jax.devices()[:1])
    )
    sizes = [leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes)]
    assert found.chain.held["encoder"] == sum(sizes)
    assert "the encoder of representations" in report.render(found)
    with pytest.raises(UserError, match="--programs has encoder, but the config has none"):
        preflight.preflight(small_latent_config(), topology="v5e:2x2", programs=["encoder"])


def test_the_chain_from_latents_to_scores():
    programs = ["sample", "encode", "decode", "inception"]
    found = preflight.preflight(small_latent_config(), topology="v5e:2x2", programs=programs)
    chain = found.chain
    assert list(chain.programs) == programs[1:] and chain.fits and found.fits
    # A slice of eight for each of four chips, and a batch of 32.
    images = {name: step.images for name, step in chain.programs.items()}
    assert images == {"encode": 32, "decode": 32, "inception": 128}
    for step in chain.programs.values():
        assert isinstance(step, Step) and 0 < step.mfu < 1 and step.step_s > 0
    # All weights, and the largest of what the programs need beside them.
    plans = [found.sample.batch.memory, *(chain.programs[name].memory for name in programs[2:])]
    beside = max(plan.outputs + plan.temporaries + plan.program for plan in plans)
    assert chain.together == plans[0].arguments + sum(chain.held.values()) + beside
    text = report.render(found)
    for words in ("encoding, one slice of 32 images", "decoding", "the FID network, one batch"):
        assert words in text
    assert "beside the network's autoencoder and inception" in text and text.endswith("FITS")


def test_too_little_memory_for_all_together():
    programs = ["sample", "decode", "inception"]
    found = preflight.preflight(small_latent_config(), topology="v5e:2x2", programs=programs)
    chain = found.chain
    assert not type(chain)(chain.programs, chain.held, chain.together, chain.together - 1).fits


def test_images_have_no_autoencoder():
    with pytest.raises(UserError, match="encode or decode, but the config names no autoencoder"):
        preflight.preflight(small_config(), topology="v5e:2x2", programs=["decode"])


def watched(**settings):
    config = small_latent_config()
    files = dict(reference="r.npz", inception="i.pth", vae="vae")
    config.evaluation = ConfigDict(dict(steps=2, count=1000, **files) | settings)
    return config


def test_evaluations_of_a_run_are_priced_beside_its_state():
    """Two evaluations of 1,000 samples and one of 5,000, of averaged and raw weights, on four
    chips."""
    found = preflight.preflight(
        watched(final_count=5000), topology="v5e:2x2", programs=["sample", "decode", "inception"]
    )
    evaluating, steps = found.evaluating, found.chain.programs
    images_per_s = [
        4 * step.images_per_s_per_chip
        for step in (found.sample.batch, steps["decode"], steps["inception"])
    ]
    seconds = sum(1 / rate for rate in images_per_s)
    assert evaluating.kinds == 2
    assert evaluating.hours(10_000) == pytest.approx(2 * 10_000 * seconds / 3600)
    assert evaluating.run_hours == pytest.approx(2 * 7_000 * seconds / 3600)
    beside = found.chain.together - found.sample.batch.memory.arguments
    assert evaluating.memory == found.memory.held.total + beside
    assert evaluating.fits and "evaluation while training, of 2 kinds" in report.render(found)
    full = dataclasses.replace(evaluating, limit=evaluating.memory - 1e9)
    lacking = dataclasses.replace(found, evaluating=full)
    assert "an evaluation beside the state needs 1.00 GB too much" in report.shortage(lacking)


def test_a_run_that_is_evaluated_is_priced_with_that_unless_programs_are_named():
    found = preflight.preflight(watched(raw=False), topology="v5e:2x2")
    assert found.train and found.sample and list(found.chain.programs) == ["decode", "inception"]
    assert found.evaluating.kinds == 1
    plain = preflight.preflight(small_latent_config(), topology="v5e:2x2")
    assert plain.chain is None and plain.evaluating is None
