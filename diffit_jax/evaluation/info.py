"""The verb `info`: what a file or a folder is, in lines for a person."""

import itertools
import json
import math
from collections.abc import Iterator, Mapping
from typing import Any

import jax
from etils import epath

from diffit_jax import models
from diffit_jax.data import records
from diffit_jax.data.sources import data_folder
from diffit_jax.diffusion.flow import Flow
from diffit_jax.errors import UserError
from diffit_jax.evaluation.evaluate import table
from diffit_jax.evaluation.reference import COVARIANCES
from diffit_jax.experiment.config import build
from diffit_jax.ingest.decoding import SUFFIXES
from diffit_jax.ingest.prepare import summary
from diffit_jax.interop import diffusers, official, songunet, weight_files
from diffit_jax.models.model import Model, traced_multiply_adds
from diffit_jax.run import workdir as workdirs
from diffit_jax.runtime import files, hub, npz
from diffit_jax.runtime.checkpoint import Checkpoints
from diffit_jax.runtime.console import first_few, in_short
from diffit_jax.sampling.weights import CLASSES_CARRIED, CONFIG_CARRIED, layout_of


def info(path: epath.PathLike) -> list[str]:
    """Describe what lies at a path: a run, weights, a data set, a reference, samples.

    Args:
      path: a file or folder, local, `gs://` or `hf://`; or the name of a prepared data set.

    Raises:
      UserError: nothing is there, or it is none of what this package knows; the line says what it
        looks like.
    """
    place = hub.local(path, "--path")
    if not place.exists():
        named = _data_set_named(place.name)
        if named is None:
            raise UserError(f"{place} is not there: name a file, a folder, or a prepared data set")
        place = named
    return list(_folder(place) if place.is_dir() else _file(place))


def _data_set_named(name: str) -> epath.Path | None:
    try:
        folder = data_folder(name)
    except UserError:
        return None
    return folder if any(folder.glob("*.manifest.json")) else None


def _folder(folder: epath.Path) -> Iterator[str]:
    config = files.read_json(folder / workdirs.CONFIG_FILE)
    if config is not None and {"model", "process", "training"} <= config.keys():
        yield from _run(folder, config)
    elif config is not None and {"latent_channels", "block_out_channels"} <= config.keys():
        yield from _autoencoder(folder)
    elif (folder / "vae").is_dir():
        yield from _autoencoder(folder / "vae")
    elif any(folder.glob("*.manifest.json")):
        yield from _data_set(folder)
    else:
        yield from _other_folder(folder)


def _run(folder: epath.Path, config: Mapping[str, Any]) -> Iterator[str]:
    experiment = build(config, folder / workdirs.CONFIG_FILE)
    training, data = experiment.training, experiment.data
    yield f"{folder}: a run"
    steps = Checkpoints(folder / workdirs.CHECKPOINTS).steps()
    newest = max(steps, default=0)
    yield f"  trained: {newest} of {training.total_steps} steps of {training.batch_size} images"
    yield f"  checkpoints: {', '.join(map(str, sorted(steps))) or 'none'}"
    snapshots = Checkpoints(folder / workdirs.SNAPSHOTS).steps()
    if snapshots:
        lengths = ", ".join(map(str, experiment.ema.power_lengths))
        yield f"  snapshots of averages of lengths {lengths}: {in_short(sorted(snapshots))}"
    yield f"  data set: {data.name}" + (
        f", latents of {data.autoencoder}" if data.autoencoder else ""
    )
    yield from _classes([names[0] for names in workdirs.read_classes(folder, config)])
    yield from _model(experiment.model)
    yield f"  process: {_settings(config['process'])}"
    if isinstance(experiment.process, Flow):
        yield f"    {experiment.process.clocks}"
    yield f"  sampler: {_settings(config['sampling']['sampler'])}"
    yield f"  guidance: {_settings(config['sampling'].get('guidance', {'kind': 'none'}))}"
    evaluations = sorted((folder / workdirs.EVALUATIONS).glob("*.json"))
    if evaluations:
        yield f"  evaluations: {len(evaluations)}, the last one {evaluations[-1]}"
    samples = sorted(path.name for path in folder.glob("*.npz"))
    if samples:
        yield f"  files of samples: {first_few(samples)}"


def _model(model: Model) -> Iterator[str]:
    shapes = models.initial_shapes(model)["params"]
    parts = {
        name: sum(leaf.size for leaf in jax.tree.leaves(tree)) for name, tree in shapes.items()
    }
    yield f"  model: {type(model).__name__} for {_by(model.sample_shape)}"
    yield f"  parameters: {sum(parts.values()):,}, of which"
    shown = sorted(parts.items(), key=lambda part: -part[1])
    for name, count in shown[:8]:
        yield f"    {name}: {count:,}"
    if len(shown) > 8:
        yield f"    {len(shown) - 8} more: {sum(count for _, count in shown[8:]):,}"
    yield f"  multiply-adds of an evaluation: {traced_multiply_adds(model) / 1e9:.4g} G"


def _classes(names: list[str]) -> Iterator[str]:
    if names:
        yield f"  classes: {len(names)}, {first_few(names, 8)}"


def _settings(section: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in section.items())


def _by(shape: tuple[int, ...]) -> str:
    return "×".join(map(str, shape))


def _data_set(folder: epath.Path) -> Iterator[str]:
    for path in sorted(folder.glob("*.manifest.json")):
        split = path.name.partition(".")[0]
        manifest = records.read_manifest(folder, split)
        first, *rest = summary(manifest, folder)
        yield f"{first.replace(': ', f': a data set, split {split}: ', 1)}"
        yield from (f"  {line}" for line in rest)
        yield f"  of {manifest.source.get('path', 'unknown')}, crop {_settings(manifest.crop)}"
        if manifest.classes:
            counts = zip(manifest.classes, manifest.class_counts, strict=True)
            yield f"  examples: {first_few([f'{name} {count}' for name, count in counts], 8)}"
        if manifest.autoencoder:
            yield f"  autoencoder: {manifest.autoencoder.get('path', 'unknown')}"


def _autoencoder(folder: epath.Path) -> Iterator[str]:
    module, variables = diffusers.load(folder)
    count = sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))
    yield f"{folder}: an autoencoder (diffusers' AutoencoderKL), for --vae"
    yield f"  parameters: {count:,}"
    yield f"  latents of {module.latent_channels} channels, a side of 1/{module.factor}"
    yield f"  scaling: (z - {module.latent_mean}) * {module.latent_scale}"


def _other_folder(folder: epath.Path) -> Iterator[str]:
    entries = sorted(entry.name for entry in folder.iterdir())
    within = itertools.chain(folder.glob("*"), folder.glob("*/*"))
    found = (path for path in within if path.suffix.lower() in SUFFIXES)
    images = sum(1 for _ in itertools.islice(found, 1000))
    if images:
        more = " or more" if images == 1000 else ""
        yield f"{folder}: a folder of {images}{more} images, for diffit prepare --source"
        return
    begun = [entry for entry in entries if entry.endswith(".lines")]
    if begun:
        yield f"{folder}: a data set that is not complete; the command that made it continues it"
        return
    what = f"it holds {first_few(entries)}" if entries else "it is empty"
    raise UserError(
        f"{folder} is no run, data set, autoencoder or folder of images ({what}): name one of these"
    )


def _file(path: epath.Path) -> Iterator[str]:
    if path.suffix == ".npz":
        yield from _npz(path)
    elif path.name.endswith((".safetensors", ".safetensors.index.json", ".pkl")):
        yield from _weights(path)
    elif path.suffix in (".pth", ".pt"):
        yield f"{path}: a file of PyTorch's; of those, the FID network is read, by --inception"
    elif path.suffix == ".py":
        yield f"{path}: a Python file; if it is a config, --config {path} --help prints its keys"
    elif path.suffix == ".json":
        yield from _json(path)
    else:
        raise UserError(f"{path} is {_looks_like(path)}: name a run, weights, data or samples")


def _looks_like(path: epath.Path) -> str:
    with path.open("rb") as file:
        start = file.read(16)
    kinds = {
        b"\x89PNG": "a PNG image",
        b"\xff\xd8": "a JPEG image",
        b"RIFF": "a WebP image, or another RIFF file",
        b"PK": "a zip archive, for diffit prepare --source, if it is of images",
        b"\x1f\x8b": "a gzip archive, for diffit prepare --source, if it is of images",
        b"PAR1": "a Parquet table, for diffit prepare --source",
    }
    found = next((what for magic, what in kinds.items() if start.startswith(magic)), None)
    if found is None and path.name.endswith(".tar"):
        return "a tar archive, for diffit prepare --source, if it is of images"
    return found or f"an unknown file ({files.size(path)} bytes)"


def _weights(path: epath.Path) -> Iterator[str]:
    if path.suffix == ".pkl" and not songunet.is_song_unet(path):
        raise UserError(f"{path} is a pickle without a network that is known: name another file")
    if not _is_known(path):
        yield from _unknown_weights(path)
        return
    layout = layout_of(path)
    config = weight_files.read_metadata(path, CONFIG_CARRIED)
    if layout is official:
        sizes = official.fit_config({"model": {}}, path)["model"]
        sizes.pop("name")
        model: Any = models.MODELS["latent_diffit"](**sizes)
        yield f"{path}: weights of a latent DiffiT in the released layout, for --weights"
    else:
        sizes = songunet.fit_config({"model": {}, "process": {}}, path)["model"]
        sizes.pop("name", None)
        model = models.MODELS["songunet"](**sizes)
        yield f"{path}: weights of EDM's DDPM++ or NCSN++, for --weights"
    yield from _model(model)
    if config is not None:
        yield f"  made by a run on {config['data']['name']}; settings of sampling are in the file"
        yield f"  sampler: {_settings(config['sampling']['sampler'])}"
    else:
        yield "  it carries no settings: sampling goes by its size, see diffit configs"
    yield from _classes(weight_files.read_metadata(path, CLASSES_CARRIED) or [])


def _is_known(path: epath.Path) -> bool:
    try:
        if layout_of(path) is songunet:
            return True
        official.read_input_size(path)
    except UserError:
        return False
    return True


def _unknown_weights(path: epath.Path) -> Iterator[str]:
    with weight_files.WeightFiles(path, ".*") as file:
        shapes = dict(file.shapes)
    count, names = sum(math.prod(shape) for shape in shapes.values()), list(shapes)
    what = "weights of an unknown network"
    if any(name.startswith(("decoder.", "encoder.")) for name in names):
        what = "weights of an autoencoder: name its folder, or this file, by --vae"
    elif any(name.startswith(("Conv2d_1a", "Mixed_5b")) for name in names):
        what = "weights of the FID network, for --inception"
    yield f"{path}: {what}"
    yield f"  {len(names)} tensors, {count:,} numbers: {first_few(names)}"


def _npz(path: epath.Path) -> Iterator[str]:
    try:
        statistics = [name for name in (*COVARIANCES, *COVARIANCES.values()) if npz.has(path, name)]
        shape, dtype = None, None
        if npz.has(path, "arr_0"):
            with npz.reading(path, "arr_0") as stream:
                shape, dtype = stream.shape, stream.dtype
        labelled = npz.has(path, "arr_1")
        protocol = json.loads(str(npz.read(path, "protocol"))) if npz.has(path, "protocol") else {}
    except (OSError, KeyError, *npz.DAMAGED) as error:
        raise UserError(f"{path} is no whole npz file ({error}): fetch it again") from error
    if statistics:
        yield f"{path}: a reference with {', '.join(statistics)}, for --reference"
        if shape is not None:
            yield f"  and {shape[0]} images of {_by(shape[1:])}"
        yield from (f"  {name}: {value}" for name, value in protocol.items())
        return
    if shape is None or len(shape) != 4:
        raise UserError(f"{path} is an npz file without images, latents or statistics")
    kind = "images" if str(dtype) == "uint8" else "latents"
    yield f"{path}: {shape[0]} {kind} of {_by(shape[1:])}" + (", with labels" if labelled else "")
    record = files.read_json(path.with_suffix(".json"))
    if record is not None and isinstance(record.get("request"), dict):
        request = record["request"]
        yield "  drawn of " + _settings(
            {name: value for name, value in request["source"].items() if value is not None}
        )
        for name, value in request["identity"].items():
            if name.startswith("sampling.") or name in ("seeds", "labels"):
                yield f"  {name.removeprefix('sampling.')}: {value}"
    else:
        yield "  no record lies beside it: of which network they are is not known"
    scores = files.read_json(path.with_suffix(".metrics.json"))
    if scores is not None and {"metrics", "protocol"} <= scores.keys():
        yield from (f"  {line}" for line in table(scores).splitlines())


def _json(path: epath.Path) -> Iterator[str]:
    content = files.read_json(path)
    if content is None:
        raise UserError(f"{path} is no JSON object: name a run, weights, data or samples")
    if path.name == workdirs.CONFIG_FILE or path.name.endswith(".manifest.json"):
        yield from _folder(path.parent)
    elif isinstance(content.get("request"), dict):
        yield from _npz(path.with_suffix(".npz"))
    else:
        raise UserError(f"{path} is JSON with {first_few(list(content))}: nothing of this package")
