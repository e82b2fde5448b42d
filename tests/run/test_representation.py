"""Losses on a network's tokens: REPA, iREPA, REG, SRA, Self-Flow and the dispersive loss."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file
from support.configs import small_config, small_latent_config, small_token_config
from support.golden import GOLDEN
from support.processes import at_question
from support.trees import assert_equal_trees

from diffit_jax import models
from diffit_jax.data.records import FEATURES, IMAGE
from diffit_jax.data.sources import SyntheticSource
from diffit_jax.diffusion.flow import Flow
from diffit_jax.diffusion.samplers import seeded_noise
from diffit_jax.errors import UserError
from diffit_jax.experiment.config import build, given_config
from diffit_jax.experiment.representation import REPA
from diffit_jax.interop import dinov2 as interop
from diffit_jax.interop import official
from diffit_jax.models.pretrained.dinov2 import ENCODERS
from diffit_jax.run import representation
from diffit_jax.run.objective import DENOISING, flops_per_image, inputs_of, objective_of
from diffit_jax.run.state import create_state, setup_experiment
from diffit_jax.runtime import distributed, interruption
from diffit_jax.runtime.config_files import ConfigArgs
from diffit_jax.sampling.analysis import analyse
from diffit_jax.sampling.convert import weights_to_workdir, workdir_to_weights
from diffit_jax.sampling.request import Run, Weights
from diffit_jax.sampling.sample import sample
from diffit_jax.training.train import train

DATA = np.load(GOLDEN / "repa/repa_losses.npz")
# As the README there states them: scalars and targets, projections, and gradients of their largest.
SCALAR, PROJECTED, GRADIENT = 2e-6, 1e-5, 1e-5


def projector(number, count=3):
    return {
        f"layer_{layer}": {
            "kernel": jnp.asarray(DATA[f"projector{number}/{layer}/weight"].T),
            "bias": jnp.asarray(DATA[f"projector{number}/{layer}/bias"]),
        }
        for layer in range(count)
    }


def near(found, wanted, bound):
    np.testing.assert_allclose(found, wanted, rtol=0, atol=bound)


def same_gradient(found, wanted):
    near(found, wanted, GRADIENT * np.abs(wanted).max())


def test_repa_of_one_and_two_encoders():
    params, hidden = projector(0), jnp.asarray(DATA["hidden"])
    near(jax.jit(representation.project)(params, hidden), DATA["projected0"], PROJECTED)

    def loss(params, hidden):
        return representation.alignment(
            DATA["target0"], representation.project(params, hidden)
        ).mean()

    value, (of_params, of_hidden) = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(
        params, hidden
    )
    near(value, DATA["repa_loss_1_encoders"], SCALAR)
    same_gradient(of_hidden, DATA["grad_1_encoders/hidden"])
    for layer in range(3):
        theirs = f"grad_1_encoders/projector0/{layer}"
        same_gradient(of_params[f"layer_{layer}"]["kernel"].T, DATA[f"{theirs}/weight"])
        same_gradient(of_params[f"layer_{layer}"]["bias"], DATA[f"{theirs}/bias"])

    def both(hidden):
        second = representation.project(projector(1), hidden)
        other = representation.alignment(DATA["target1"], second).mean()
        return (loss(params, hidden) + other) / 2

    value, gradient = jax.jit(jax.value_and_grad(both))(hidden)
    near(value, DATA["repa_loss_2_encoders"], SCALAR)
    same_gradient(gradient, DATA["grad_2_encoders/hidden"])


def test_irepa():
    hidden = jnp.asarray(DATA["hidden"])
    kernel = jnp.asarray(DATA["conv/weight"].transpose(2, 3, 1, 0))
    params = {"conv": {"kernel": kernel, "bias": jnp.asarray(DATA["conv/bias"])}}
    near(representation.project(params, hidden), DATA["conv/projected"], PROJECTED)
    before = DATA["conv/target_before_normalisation"]
    for gamma in (0.0, 0.6, 0.8, 1.0):
        name = f"irepa_{gamma}" if gamma else "irepa_plain_target"
        target = representation.spatially_normalised(jnp.asarray(before), gamma)

        def loss(hidden, target=target):
            return representation.alignment(target, representation.project(params, hidden)).mean()

        value, gradient = jax.value_and_grad(loss)(hidden)
        near(value, DATA[f"{name}/loss"], SCALAR)
        if gamma:
            near(target, DATA[f"{name}/target"], SCALAR)
            same_gradient(gradient, DATA[f"{name}/grad_hidden"])


def test_reg():
    hidden = jnp.concatenate([DATA["reg/hidden_of_class_token"], DATA["hidden"]], axis=1)
    target = jnp.concatenate([DATA["reg/class_token"][:, None], DATA["target0"]], axis=1)

    def loss(hidden):
        return representation.alignment(target, representation.project(projector(0), hidden)).mean()

    value, gradient = jax.jit(jax.value_and_grad(loss))(hidden)
    near(value, DATA["reg/repa_loss"], SCALAR)
    same_gradient(gradient, DATA["reg/grad_hidden"])
    process, t_B = Flow(), jnp.asarray(DATA["t"])
    clean, noise, velocity = (
        jnp.asarray(DATA[f"reg/class_{name}"])[:, None, None]
        for name in ("token", "noise", "velocity")
    )
    noised = process.noised_at(clean, t_B, noise)
    near(noised.x_BHWC[:, 0, 0], DATA["reg/class_x_t"], SCALAR)
    near(process.loss_of(noised, velocity)[0], DATA["reg/class_denoising_loss"], SCALAR)
    x, noise, velocity = (
        jnp.asarray(DATA[name].transpose(0, 2, 3, 1)) for name in ("x0", "noise", "velocity")
    )
    for path, theirs in (("linear", "linear"), ("cosine", "cosine")):
        process = Flow(path=path)
        noised = process.noised_at(x, t_B, noise)
        near(noised.x_BHWC.transpose(0, 3, 1, 2), DATA[f"{theirs}/x_t"], SCALAR)
        found = process.loss_of(noised, velocity)[0]
        near(found, DATA[f"{theirs}/denoising_loss"], SCALAR * 4)  # values up to 4


def test_sra():
    student, teacher = jnp.asarray(DATA["sra_student"]), jnp.asarray(DATA["sra_teacher"])
    names = {"smooth_l1": "sml1", "cosine_over_tokens": "cos", "l2": "l2", "l1": "l1"}
    for ours, theirs in names.items():
        distance = representation.DISTANCES[ours]
        value, gradient = jax.jit(jax.value_and_grad(lambda s, d=distance: d(s, teacher).mean()))(
            student
        )
        near(value, DATA[f"sra_{theirs}"], SCALAR)
        same_gradient(gradient, DATA[f"sra_{theirs}/grad"])
    value = representation.DISTANCES["cosine"](student, teacher).mean()
    near(value, DATA["sra_cos_over_channels"], SCALAR)


def test_the_dispersive_loss():
    z = DATA["dispersive_z"]
    for temperature in (0.5, 1.0):
        name = f"dispersive_tau{temperature}"

        @jax.jit
        def loss(z, temperature=temperature):
            return representation.dispersive(z, temperature, len(z)).mean()

        value, gradient = jax.jit(jax.value_and_grad(loss))(z)
        near(value, DATA[name], SCALAR)
        same_gradient(gradient, DATA[f"{name}/grad"])
        halves = [loss(z[:4]), loss(z[4:])]
        near(halves, DATA[f"{name}/halves"], SCALAR)
        # Groups are positions that are equal modulo their number.
        apart = np.stack([z[:4], z[4:]], axis=1).reshape(z.shape)
        grouped = jax.jit(lambda z, t=temperature: representation.dispersive(z, t, 4))(apart)
        near(grouped, np.tile(halves, 4), SCALAR)


def test_equal_tokens_have_finite_gradients():
    """A picture twice in a group, tokens of length 0, and a constant target."""
    zeros = jnp.zeros((4, 9, 8))
    losses = [
        lambda z: representation.dispersive(z, 0.5, 4),
        lambda z: representation.alignment(zeros, z),
        lambda z: representation.DISTANCES["cosine"](z, zeros),
        lambda z: representation.DISTANCES["cosine_over_tokens"](z, zeros),
    ]
    for loss in losses:
        assert np.isfinite(jax.jit(jax.grad(lambda z, of=loss: of(z).sum()))(zeros)).all()
    assert np.isfinite(representation.spatially_normalised(zeros, 0.6)).all()


# --- In training


# REG is REPA with one more token, Self-Flow SRA with one more time.
@pytest.mark.parametrize("kind", ["reg", "self_flow"])
def test_an_interrupted_run_ends_as_one_that_was_not(kind, tmp_path, monkeypatch):
    """Bit for bit, with a stop step on the way; the encoder is in no checkpoint."""
    config = small_token_config(kind, training__total_steps=4, representation__stop_step=3)
    whole = train(config, workdir=tmp_path / "whole")
    assert int(whole.skipped) == 0
    items = {path.name for path in (tmp_path / "whole/checkpoints/4").iterdir() if path.is_dir()}
    assert items == {"state", "ema", "constants", "facts", "objective"}
    width = ENCODERS["digits"].width
    for leaf in jax.tree.leaves((whole.objective, whole.ema)):
        assert leaf.shape != (3 * 14 * 14, width)
    monkeypatch.setattr(distributed.PreemptionNotice, "reached", at_question(2))
    with pytest.raises(interruption.Preempted):
        train(config, workdir=tmp_path / "halves")
    monkeypatch.undo()
    assert_equal_trees(train(config, workdir=tmp_path / "halves"), whole)
    assert sample(Run(tmp_path / "whole"), seeds=[0]).exists()


def losses_of(config, *updates):
    """(loss, terms, gradient) of each update, of a batch of random examples."""
    setup = setup_experiment(config)
    experiment, objective = setup.experiment, setup.objective
    state = create_state(experiment, setup.mesh, objective)
    frozen = {"average": state.ema_variables, **objective.load(experiment, setup.mesh)}
    source = SyntheticSource(
        experiment.model.sample_shape,
        10,
        latents=experiment.space.example == "latent",
        arrays=representation.arrays_beside(experiment),
    )
    examples = jax.tree.map(jnp.asarray, source.read(np.arange(8)))
    keys = jax.random.split(jax.random.key(0), 8)

    def loss(trained, update):
        variables = {"constants": state.constants, "params": trained[0], "objective": trained[1]}
        loss_B, terms = objective(
            experiment, variables, frozen, examples, key_B=keys, update=update,
            training=True,
        )  # fmt: skip
        return loss_B.mean(), terms

    trained = state.params, state.objective.get("params", {})
    program = jax.jit(jax.value_and_grad(loss, has_aux=True))
    found = [program(trained, jnp.int32(update)) for update in updates]
    return [(value, terms, gradient) for (value, terms), gradient in found]


@pytest.fixture(scope="module")
def plain_loss():
    ((value, _, _),) = losses_of(small_token_config("none", model__class_token=0), 0)
    return value


@pytest.mark.parametrize("kind", ["repa", "reg", "sra", "self_flow", "dispersive"])
def test_the_loss_is_the_process_s_and_weighted_terms(kind, plain_loss):
    config = small_token_config(kind, representation__stop_step=3)
    (value, terms, gradient), (stopped, _, later) = losses_of(config, 0, 3)
    settings = build(config).representation
    name = "dispersion" if kind == "dispersive" else "alignment"
    added = settings.weight * terms[name].mean()
    if kind == "reg":  # its network is another one
        added += settings.class_weight * terms["class_token"].mean()
        without = value - added
        assert 0.5 < float(without) < 3  # a velocity's variance
        assert float(terms["class_token"].mean()) > 0.5
    else:  # a fresh network's output is 0, so that Self-Flow's two times change no velocity
        np.testing.assert_allclose(value - added, plain_loss, rtol=1e-5)
    assert jax.tree.leaves(gradient)
    if kind == "reg":
        assert float(stopped) != float(value)
    else:
        np.testing.assert_allclose(stopped, plain_loss, rtol=1e-5)
        for leaf in jax.tree.leaves(later[1]):
            np.testing.assert_array_equal(leaf, 0)


@pytest.mark.parametrize("kind", ["sra", "self_flow"])
def test_the_teacher_is_the_average(kind):
    """Before the first update the network itself: a loss compares tokens of two of its blocks.

    In SRA, here without a shift, both see the same; in Self-Flow the teacher sees the earlier time.
    """
    config = small_token_config(kind)
    if kind == "sra":
        config.representation.max_shift = 0.0
    setup = setup_experiment(config)
    experiment = setup.experiment
    state = create_state(experiment, setup.mesh, setup.objective)
    ((_, terms, _),) = losses_of(config, 0)
    source = SyntheticSource(experiment.model.sample_shape, 10, latents=True)
    examples = jax.tree.map(jnp.asarray, source.read(np.arange(8)))
    keys = jax.random.split(jax.random.key(0), 8)
    inputs = inputs_of(experiment, examples, keys, {}, training=True)
    noised = experiment.process.noise(inputs.x_BHWC, inputs.key_B)
    variables = {"params": state.params, "constants": state.constants}
    seen, less, told = noised.x_BHWC, noised, {}
    if kind == "self_flow":
        numbered = (jax.vmap(lambda k, n=n: jax.random.fold_in(k, n))(keys) for n in (6, 7))
        mixed = representation.mixed(experiment, inputs.x_BHWC, noised, *numbered)
        seen, told = mixed.x_BHWC, mixed.told
        times = jnp.minimum(noised.draws["time"], told["second_level"])
        less = experiment.process.noised_at(inputs.x_BHWC, times, noised.draws["noise"])

    def tokens_after(block, x_BHWC, level_B, told):
        network = models.as_network(experiment.model, variables, capture=block)
        return jax.jit(network)(x_BHWC, level_B, {**inputs.conditioning, **told})[1]

    student = tokens_after(0, seen, noised.level_B, told)
    teacher = tokens_after(1, less.x_BHWC, less.level_B, {})
    student = representation.project(state.objective["params"], student)
    distance = experiment.representation.distance
    assert distance == {"sra": "smooth_l1", "self_flow": "cosine"}[kind]
    wanted = representation.DISTANCES[distance](student, teacher)
    np.testing.assert_allclose(terms["alignment"], wanted, rtol=1e-4, atol=1e-6)


def test_groups_are_the_same_however_a_batch_is_accumulated(tmp_path):
    """The dispersive loss of a batch, whole or in two parts: gradients, and so parameters."""
    ends = [
        train(
            small_token_config(
                "dispersive",
                training__total_steps=1,
                training__accumulation=parts,
                optimizer__epsilon=1.0,
            ),
            workdir=tmp_path / str(parts),
        )
        for parts in (1, 2)
    ]
    for one, other in zip(*(jax.tree.leaves(end.params) for end in ends), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-7)


def planted(orientations, size=16, factor=8):
    """Moments without noise and pictures, in both of which every pixel tells its column and row."""
    rows, columns = np.meshgrid(np.arange(size), np.arange(size), indexing="ij")
    latent = np.stack([rows, columns], axis=-1).astype(np.float32)
    ways = [latent, latent[:, ::-1]][:orientations]
    moments = np.stack([np.concatenate([way, np.full_like(way, -60.0)], axis=-1) for way in ways])
    picture = np.kron(latent, np.ones((factor, factor, 1))).astype(np.uint8)
    return moments, np.concatenate([picture, np.zeros_like(picture[..., :1])], axis=-1), latent


@pytest.mark.parametrize("orientations", [1, 2])
def test_latents_pictures_and_features_are_turned_together(orientations):
    moments, picture, latent = planted(orientations)
    features = np.stack([way.reshape(-1, 2) for way in (latent, latent[:, ::-1])][:orientations])
    count = 16
    examples = {
        "moments": jnp.asarray(np.broadcast_to(moments, (count, *moments.shape))),
        IMAGE: jnp.asarray(np.broadcast_to(picture, (count, *picture.shape))),
        FEATURES: jnp.asarray(np.broadcast_to(features, (count, *features.shape))),
    }
    space = build(small_latent_config(data__latent_scale=(1.0,))).space
    keys = jax.random.split(jax.random.key(0), count)
    x_BHWC, _ = space.to_model(examples, keys, {})
    there = space.beside(examples, x_BHWC, keys)
    mirrored = np.asarray(x_BHWC[:, 0, 0, 1]) > 8
    assert mirrored.any() == (orientations == 2) and not mirrored.all()
    np.testing.assert_allclose(there[IMAGE][:, ::8, ::8, :2], x_BHWC, atol=1e-6)
    np.testing.assert_allclose(there[FEATURES].reshape(x_BHWC.shape), x_BHWC, atol=1e-6)


def test_augmented_images_reach_the_encoder_as_the_network_sees_them():
    config = small_config(model__augment_labels=9)
    config.augmentation = {"probability": 1.0}
    space = build(config).space
    images = jax.random.randint(jax.random.key(1), (4, 8, 8, 1), 0, 256).astype(jnp.uint8)
    keys = jax.random.split(jax.random.key(0), 4)
    x_BHWC, _ = space.to_model({IMAGE: images}, keys, {})
    there = space.beside({IMAGE: images}, x_BHWC, keys)[IMAGE]
    np.testing.assert_allclose(there / 127.5 - 1, x_BHWC, atol=1e-6)
    assert np.abs(there - images).max() > 1


def test_the_encoder_costs_what_its_products_do():
    """8.2 % of a step of XL/2 with the projector, as the paper's shapes have it."""
    config = small_token_config("repa").to_dict()
    config["model"] = {"name": "latent_diffit", "input_size": 32, "learn_sigma": False}
    config["representation"] = {"kind": "repa"}
    with_encoder = build(config)
    none = build(config | {"representation": {"kind": "none"}})
    share = flops_per_image(with_encoder) / flops_per_image(none) - 1
    assert 0.075 < share < 0.09
    settings = {"kind": "repa", "stop_step": 3}
    ends = build(config | {"representation": settings})
    assert flops_per_image(ends, 2) == flops_per_image(with_encoder)
    without = flops_per_image(with_encoder) - representation.encoder_flops(with_encoder)
    assert flops_per_image(none) < flops_per_image(ends, 3) == pytest.approx(without, rel=1e-12)
    config["model"] |= {"class_token": 768}
    config["process"] = {"name": "flow"}
    goes_on = build(config | {"representation": settings | {"kind": "reg"}})
    assert flops_per_image(goes_on, 3) == flops_per_image(goes_on) > flops_per_image(none)
    giga = representation.encoder_flops(with_encoder) / 2e9
    assert giga == pytest.approx(23, rel=0.03)  # multiply-adds at 257 tokens


def test_outside_of_training_it_is_the_process_s_loss():
    experiment = build(small_token_config("repa"))
    assert objective_of(experiment) is not DENOISING
    state = create_state(experiment, setup_experiment(small_token_config("repa")).mesh)
    source = SyntheticSource(experiment.model.sample_shape, 10, latents=True)
    examples = jax.tree.map(jnp.asarray, source.read(np.arange(4)))
    arguments = dict(
        key_B=jax.random.split(jax.random.key(0), 4), update=jnp.int32(0), training=False
    )
    variables = {"params": state.params, "constants": state.constants}
    both = [
        one(experiment, variables, {}, examples, **arguments)[0]
        for one in (objective_of(experiment), DENOISING)
    ]
    np.testing.assert_array_equal(*both)


@pytest.mark.parametrize(
    ("kind", "changes", "match"),
    [
        ("repa", {"representation__depth": 3}, r"depth is 3, but there is no block 2"),
        ("sra", {"representation__teacher_depth": 9}, r"teacher_depth is 9, but there is no"),
        ("reg", {"model__class_token": 32}, r"class_token is 32.*64 channels of digits"),
        ("none", {"model__class_token": 64}, "trained by representation.kind reg"),
        ("repa", {"model__class_token": 64}, "trained by representation.kind reg"),
        ("reg", {"model__inner_head": 1}, "inner_head do not go together"),
        ("reg", {"representation__projector": "conv"}, "class token lies outside"),
        ("reg", {"evaluation__loss_steps": 2}, "loss_steps measures"),
        ("dispersive", {"representation__group": 3}, "group is 3, which does not divide"),
        (
            "dispersive",
            {"representation__group": 0, "training__accumulation": 2},
            r"group is 0.*accumulation 2",
        ),
        ("repa", {"representation__encoder": "dinov1"}, "use dinov2_vits14"),
        ("dispersive", {"representation__group": 1}, "group is 1: it must be at least 2, or 0"),
        (
            "sra",
            {"representation__depth": 2, "representation__teacher_depth": 1},
            "teacher_depth is 1, before depth 2",
        ),
        (
            "repa",
            {"model__patch_size": 8, "representation__spatial_norm": 0.6},
            "spatial_norm needs the deviation",
        ),
        ("repa", {"sampling__guide_class_token": False}, r"but the network has no model.class_tok"),
    ],
)
def test_what_cannot_be(kind, changes, match):
    with pytest.raises(UserError, match=match):
        build(small_token_config(kind, **changes))


def test_what_needs_a_flow():
    config = small_token_config("sra")
    config.process = {"name": "edm"}
    config.sampling.sampler = {"name": "heun", "num_steps": 4}
    with pytest.raises(UserError, match=r"kind is sra.*set process.name to flow"):
        build(config)


def test_weights_are_read_before_anything_is_written(tmp_path):
    config = small_token_config("repa", representation__encoder="dinov2_vits14")
    with pytest.raises(UserError, match=r"encoder_weights is missing.*dinov2_vits14"):
        train(config, workdir=tmp_path / "run")
    plain = str(GOLDEN / "repa/dinov2_plain.safetensors")
    config.representation["encoder_weights"] = plain
    with pytest.raises(UserError, match=r"are of another network.*asks for dinov2_vits14"):
        train(config, workdir=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_run_goes_on_with_its_encoder_alone(tmp_path):
    """Weights of the same network, but others: nothing is written."""
    config = small_token_config("repa", training__total_steps=1)
    train(config, workdir=tmp_path / "run")
    tensors = interop.released_tensors(*interop.load(interop.DIGITS))
    save_file({k: v + 1 for k, v in tensors.items()}, tmp_path / "other.safetensors")
    config.training.total_steps = 2
    config.representation["encoder_weights"] = str(tmp_path / "other.safetensors")
    with pytest.raises(UserError, match="holds a run with other encoder weights"):
        train(config, workdir=tmp_path / "run")
    config.representation["encoder_weights"] = ""
    assert int(train(config, workdir=tmp_path / "run").step) == 2


def test_keys_of_a_section_that_is_left_out(tmp_path):
    """Each belongs to a kind, which is none there."""
    given = ["--config=configs/digits.py", "--config.representation.depth=1"]
    with pytest.raises(UserError, match=r"representation\.depth is unknown"):
        given_config(ConfigArgs.find(given))
    given.append("--config.representation.kind=dispersive")
    assert given_config(ConfigArgs.find(given)).representation.depth == 1


def test_records_that_lack_what_is_needed(tmp_path):
    config = small_config()
    config.process = {"name": "flow"}
    config.data.name = "digits"
    config.representation = {
        "kind": "repa", "depth": 1, "encoder": "digits", "source": "features",
        "projector_width": 16,
    }  # fmt: skip
    with pytest.raises(UserError, match=r"digits has no features.*--keep features"):
        train(config, workdir=tmp_path / "run")


def test_settings_are_keys():
    assert isinstance(build(small_token_config("repa")).representation, REPA)
    assert build(small_latent_config()).representation.kind == "none"


@pytest.fixture(scope="module")
def reg_run(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("reg") / "run"
    return workdir, train(small_token_config("reg", training__total_steps=2), workdir=workdir)


def test_a_class_token_is_drawn_beside_a_sample(reg_run, tmp_path):
    """By every sampler; guidance of the class token is a choice, and without it samples differ."""
    samplers = {
        "heun": {},
        "euler": {"sampler": "euler"},
        "sde": {"sampler": "sde", "sampler.num_steps": 4},
        "dpm_solver": {"sampler": "dpm_solver"},
        "alone": {"guide_class_token": False},
        "unguided": {"guidance": "none"},
    }
    drawn = {}
    for name, overrides in samplers.items():
        path = sample(
            Run(reg_run[0], raw=True), seeds=range(3), overrides=overrides,
            output=tmp_path / f"{name}.npz",
        )  # fmt: skip
        drawn[name] = np.load(path)["arr_0"]
        assert drawn[name].shape == (3, 8, 8, 4) and np.isfinite(drawn[name]).all()
    assert len({each.tobytes() for each in drawn.values()}) == len(drawn)


def test_attention_is_followed_beside_a_class_token(reg_run):
    """What is denoised is what Euler's method along the flow draws: the class token goes along."""
    run = Run(reg_run[0], raw=True)
    setup = setup_experiment(run.config, to_train=False)
    variables = run.load(setup)[0]
    found = analyse.follow(setup, variables, images=2, steps=3)
    assert len(found.layers) == 2 and found.denoised.shape[-4:] == (2, 8, 8, 4)
    noise = seeded_noise(jnp.arange(2, dtype=jnp.uint32), setup.experiment.model.noise_shapes)(0)
    x = jax.tree.map(lambda z: z * float(found.sigmas[0]), noise)
    network = models.as_network(setup.experiment.model, variables)
    first = jax.jit(lambda *given: setup.experiment.process.denoise(network, *given))(
        x, jnp.full(2, found.sigmas[0]), {"label": jnp.arange(2)}
    )
    scale = np.abs(first["image"]).max()
    np.testing.assert_allclose(found.denoised[0] / scale, first["image"] / scale, atol=1e-4)


def test_weights_carry_the_class_token(reg_run, tmp_path):
    """They draw what the run draws, to the bit, and go on as a run, with a projector of its own."""
    weights, again = tmp_path / "w.safetensors", tmp_path / "again"
    workdir_to_weights(reg_run[0], weights=weights)
    module, variables = official.load(weights)
    assert module.class_token == 64
    jax.tree.map(np.testing.assert_array_equal, variables["params"], reg_run[1].ema)
    config = json.loads((reg_run[0] / "config.json").read_text())
    ours, theirs = (
        sample(source, seeds=range(2), output=tmp_path / f"{number}.npz")
        for number, source in enumerate((Run(reg_run[0]), Weights(weights, config)))
    )
    np.testing.assert_array_equal(np.load(ours)["arr_0"], np.load(theirs)["arr_0"])
    weights_to_workdir(weights, workdir=again, config=config)
    assert int(train(config, workdir=again).step) == 2
