"""What preflight says of the networks between images, latents and scores, in sizes that compile in
seconds."""

import functools
import os
import shutil
from pathlib import Path

import pytest
from support.configs import small_config, small_latent_config
from support.processes import ROOT

from diffit_jax.errors import UserError
from diffit_jax.models.autoencoder import Autoencoder
from diffit_jax.models.inception import Inception
from diffit_jax.tpu import compiler, report
from diffit_jax.tpu.figures import Step
from diffit_jax.verbs import preflight, pricing


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
        patch.setattr(pricing, "Autoencoder", small)
        patch.setattr(pricing, "Inception", functools.partial(Inception, width=1 / 8))
        yield


def test_the_chain_from_latents_to_scores():
    programs = ["sample", "encode", "decode", "inception"]
    found = preflight.preflight(small_latent_config(), "v5e:2x2", programs=programs)
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
    found = preflight.preflight(small_latent_config(), "v5e:2x2", programs=programs)
    chain = found.chain
    assert not type(chain)(chain.programs, chain.held, chain.together, chain.together - 1).fits


def test_images_have_no_autoencoder():
    with pytest.raises(UserError, match="encode or decode, but the config names no autoencoder"):
        preflight.preflight(small_config(), "v5e:2x2", programs=["decode"])
