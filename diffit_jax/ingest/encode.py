"""The verb `encode`: from images to the moments of their latents, to train on."""

import collections
import contextlib
import dataclasses
import itertools
import logging
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from etils import epath

from diffit_jax.data import records
from diffit_jax.data.records import ArraySpec, Manifest
from diffit_jax.data.sources import folder_to_write
from diffit_jax.errors import UserError
from diffit_jax.ingest import latent_statistics
from diffit_jax.ingest.decoding import Preprocessing
from diffit_jax.ingest.images import Loaded, Loader, open_images
from diffit_jax.ingest.locations import Index, stamp_of_file
from diffit_jax.ingest.prepare import (
    check_shape,
    kept,
    label_of,
    numbered_as_other_splits,
    progress_of,
    report,
    shards_of,
    source_metadata,
)
from diffit_jax.ingest.shards import Shards
from diffit_jax.interop import diffusers, dinov2
from diffit_jax.runtime import backend, distributed, files, hub, interruption, npz, parallel
from diffit_jax.runtime.console import first_few
from diffit_jax.runtime.run_in_subprocess import count_cores
from diffit_jax.sampling.decoder import VAE_FILES
from diffit_jax.sampling.encoder import FeatureEncoder, ImageEncoder

log = logging.getLogger(__name__)

STORED = ("float16", "float32")
KEPT = ("none", "image", "features")
_POLL_S = 0.5
_MANY = 100_000  # images whose index is kept while a command is not done


@dataclasses.dataclass(frozen=True)
class Encoding:
    """How images become moments.

    Attributes:
      vae: folder of the autoencoder, see `diffusers.load`; `hf://` too.
      dtype: of its convolutions.
      stored: dtype of the moments on disk, one of `STORED`.
      orientations: 2: of the image and its mirror image; 1: of the image.
      batch_per_device: images that each device encodes in a call.
      chunk_size: images of a slice of it, see `decoder.slice_size`.
      keep: what is kept beside moments, one of `KEPT`: "image", uint8, from which training makes an
        encoder's tokens, or these themselves, "features", float16, of both orientations.
      encoder: of features: weights, see `interop.dinov2`; `hf://` too.
      encoder_dtype: of its matrix products.
      encoder_positions: how positions come to its grid, a name in `dinov2.POSITIONS`.
    """

    vae: epath.PathLike
    dtype: str = "float32"
    stored: str = "float16"
    orientations: int = 2
    batch_per_device: int = 32
    chunk_size: int | None = None
    keep: str = "none"
    encoder: epath.PathLike = ""
    encoder_dtype: str = "float32"
    encoder_positions: str = "antialiased"

    def __post_init__(self):
        if self.keep not in KEPT:
            raise UserError(f"--keep {self.keep} is unknown: use {', '.join(KEPT)}")
        if (self.keep == "features") != bool(self.encoder):
            raise UserError(
                "--keep features and --encoder go together: name the weights of the encoder whose "
                "tokens are kept, or leave out both"
            )
        if self.stored not in STORED:
            raise UserError(f"--stored {self.stored} is unknown: use {' or '.join(STORED)}")
        if self.orientations not in (1, 2):
            raise UserError(f"--orientations is {self.orientations}: use 1 or 2")


@backend.reproducible_numerics()
@backend.explain_oom("lower --batch_per_device or --vae_batch_size")
def encode(
    source: epath.PathLike,
    *,
    name: str,
    encoding: Encoding,
    data_dir: epath.PathLike = "",
    split: str = "train",
    preprocessing: Preprocessing = Preprocessing(),
    unlabelled: bool = False,
    tar_classes: bool = False,
    workers: int | None = None,
) -> Manifest:
    """Write the moments of a source's images as `DATA_DIR/NAME`: ArrayRecord shards and a manifest.

    Each process encodes shards of its own on its own devices, while other processes of its host
    decode images. Repeated, an interrupted command resumes, on as many hosts as there are then. On
    devices of one kind the files are the same, byte for byte, however often it was interrupted.

    Args:
      source: as of `prepare.prepare`; or a data set that it wrote.
      name: as of `prepare.prepare`, and so the others below.
      encoding: the autoencoder, and how its moments are stored.
      data_dir: where data sets are.
      split: that it becomes.
      preprocessing: size and channels of the images.
      unlabelled: whether to leave labels out.
      tar_classes: as of `prepare.prepare`.
      workers: processes that decode.

    Returns:
      The manifest, on every process.

    Raises:
      UserError: as `prepare.prepare`; an autoencoder that cannot be read or does not take the
        images, or moments that are not finite.
      interruption.Interrupted, interruption.Preempted: finished shards stay.
    """
    folder = folder_to_write(name, data_dir)
    place = hub.local(source, "source")
    index_file = folder / f".{split}.index"
    # Process 0 indexes the source, the others read its index.
    index = distributed.primary_first(
        lambda: _indexed(place, split, index_file, unlabelled=unlabelled, tar_classes=tar_classes),
        lambda: Index.from_bytes(index_file.read_bytes()),
    )
    # Each process encodes alone, without collectives.
    mesh = parallel.local_mesh()
    vae = hub.local(encoding.vae, "vae", VAE_FILES)
    module, variables = diffusers.load(vae, encoding.dtype, parallel.replicated(mesh))
    encoder = ImageEncoder(
        module,
        variables,
        mesh,
        batch_per_device=encoding.batch_per_device,
        orientations=encoding.orientations,
        chunk_size=encoding.chunk_size,
        features=_feature_encoder(encoding, mesh),
    )
    workers = count_cores() if workers is None else workers
    with Loader(index, preprocessing, workers) as loader:
        image = loader.first_shape()
        _check_image(index, image, encoder)
        arrays = {records.MOMENTS: ArraySpec(encoder.shape_of(image), encoding.stored)}
        if encoding.keep == "image":
            arrays[records.IMAGE] = ArraySpec(image, "uint8")
        of_features: dict[str, Any] = {}
        if encoder.features:
            arrays[records.FEATURES] = ArraySpec(encoder.shape_of_features(image), "float16")
            of_features = encoder.features.identity(encoder.grid_of(image))
        _say_sizes(arrays, len(index))
        arrays = records.layout(**arrays)
        crop = dict(index.crop) or dataclasses.asdict(preprocessing)
        # All that the records depend on, so that another command's are not continued.
        identity = {
            "source": index.digest(),
            "crop": crop,
            "image": list(image),
            "stored": encoding.stored,
            "autoencoder": encoder.identity(),
        }
        if encoding.keep != "none":
            identity["keep"] = [encoding.keep, of_features or None]
        how = {"arrays": arrays, "identity": identity, "contents": loader.contents}
        shards = shards_of(index, folder, split, **how)
        distributed.primary_first(lambda: files.make_directory(folder, "data_dir"), lambda: folder)
        with distributed.primary_context(lambda: files.owned(folder, "data set")):
            distributed.on_primary(shards.begin)
            _write(shards, index, loader=loader, encoder=encoder, arrays=arrays, image=image)
            if distributed.is_primary():
                shards.finish(
                    index.classes,
                    lambda sums: {
                        "source": source_metadata(index, source, split)
                        | {"image_shape": list(image)},
                        "crop": crop,
                        "autoencoder": _autoencoder_metadata(encoder, encoding),
                        "statistics": latent_statistics.of_sums(sums),
                        "features": of_features and {"path": str(encoding.encoder), **of_features},
                    },
                )
            distributed.on_primary(lambda: index_file.unlink(missing_ok=True))
    manifest = records.read_manifest(folder, split)
    report(manifest, folder, index)
    latent_statistics.say(manifest)
    return manifest


def _feature_encoder(encoding: Encoding, mesh: jax.sharding.Mesh) -> FeatureEncoder | None:
    """Read the encoder of features, if some are kept."""
    if not encoding.encoder:
        return None
    module, variables = dinov2.load(
        encoding.encoder,
        positions=encoding.encoder_positions,
        dtype=np.dtype(encoding.encoder_dtype),
        sharding=parallel.replicated(mesh),
        flag="encoder",
    )
    return FeatureEncoder(module, variables)


def _say_sizes(arrays: Mapping[str, ArraySpec], count: int) -> None:
    """Log what the records will take, before the work begins."""
    if distributed.is_primary():
        parts = ", ".join(f"{name} {spec.size / 1e3:.4g} kB" for name, spec in arrays.items())
        total = count * records.record_size(arrays) / 1e9
        log.info("an example takes %s: %.3g GB for %d", parts, total, count)


def _indexed(
    place: epath.Path, split: str, index_file: epath.Path, *, unlabelled: bool, tar_classes: bool
) -> Index:
    """Index a source; keep the index as a file for other processes, or where making it is slow.

    A tar of ImageNet's size has 1.3 million headers.
    """
    # Nothing tells a folder from what it was: its index is for other processes alone.
    is_file = place.exists() and not place.is_dir()
    stamp = stamp_of_file(place) if is_file else ""
    about = f"{place} {split} {unlabelled} {tar_classes} {stamp}"
    if is_file and index_file.exists():
        with contextlib.suppress(OSError, KeyError, *npz.DAMAGED):
            index = Index.from_bytes(index_file.read_bytes())
            if index.about == about:
                return index
    index = open_images(place, split, unlabelled, tar_classes=tar_classes)
    index = numbered_as_other_splits(index, index_file.parent, split)
    index = dataclasses.replace(index, about=about)
    if jax.process_count() > 1 or (is_file and len(index) > _MANY):
        files.make_directory(index_file.parent, "data_dir")
        files.write_bytes(index_file, index.to_bytes())
    return index


def _check_image(index: Index, image: tuple[int, ...], encoder: ImageEncoder) -> None:
    factor, channels = encoder.module.factor, encoder.module.image_channels
    if image[0] % factor or image[1] % factor or image[2] != channels:
        raise UserError(
            f"the images ({index.names[0]}) are {image[1]}×{image[0]} with {image[2]} channels, "
            f"the autoencoder takes {channels} channels and sides that are multiples of {factor}: "
            "change --crop and --size"
        )


def _autoencoder_metadata(encoder: ImageEncoder, encoding: Encoding) -> dict[str, Any]:
    channels = encoder.module.latent_channels
    scaling = {
        name: np.broadcast_to(getattr(encoder.module, name), channels).astype(float).tolist()
        for name in ("latent_mean", "latent_scale")
    }
    return {
        "path": str(encoding.vae),
        "factor": encoder.module.factor,
        **encoder.identity(),
        **scaling,
        "dtype": encoding.dtype,
    }


def _write(
    shards: Shards,
    index: Index,
    *,
    loader: Loader,
    encoder: ImageEncoder,
    arrays: Mapping[str, ArraySpec],
    image: tuple[int, ...],
) -> None:
    """Write the missing shards: each process its own; return when all are there."""
    missing = np.flatnonzero(
        distributed.broadcast([stats is None for stats in shards.stats()])
    ).tolist()
    mine = missing[jax.process_index() :: jax.process_count()]
    progress = progress_of(shards, missing, "encode", "image")
    started, encoded = time.monotonic(), 0
    notices = distributed.PreemptionNotice(ctrl_c=True)
    with progress, notices as notice:
        stream = _encoded(shards, mine, loader=loader, encoder=encoder, index=index, image=image)
        for shard, parts in itertools.groupby(stream, key=lambda part: part[0]):
            with shards.writing(shard) as writer:
                for _, group, result in parts:
                    # Not `notice.reached`: processes do not go in step.
                    if interruption.noticed():
                        raise notice.ending(kept(shards))
                    for loaded in group:
                        writer.content.add(loaded.pixels, loaded.reason)
                        if loaded.pixels is None:
                            name = index.names[loaded.number]
                            writer.stats.skipped.append((name, loaded.reason))
                        writer.note(list(loaded.notes))
                    good = [loaded for loaded in group if loaded.pixels is not None]
                    if result is not None:
                        found, stored = result.result()[0], {}
                        for name, array in found.items():
                            with np.errstate(over="ignore"):
                                stored[name] = array.astype(arrays[name].dtype)
                            _check_finite(name, array, stored[name], good, index)
                        sums = latent_statistics.sums_of(found[records.MOMENTS])
                        writer.stats.add_sums(**sums)
                        if records.IMAGE in arrays:
                            stored[records.IMAGE] = [loaded.pixels for loaded in good]
                        for row, loaded in enumerate(good):
                            values = {name: of_all[row] for name, of_all in stored.items()}
                            writer.add(label_of(index, loaded.number), **values)
                    encoded += len(good)
                    # Other processes are about as far.
                    progress.advance(len(group) * jax.process_count())
            seconds = max(time.monotonic() - started, 1e-9)
            progress.say(
                f"{encoded * jax.process_count() / seconds:.1f} images/s | chips waiting "
                f"{encoder.waited_s / seconds:.1%}"
            )
        _await_all(shards)


def _await_all(shards: Shards) -> None:
    """Wait until the other processes have written their shards too."""
    while jax.process_count() > 1 and shards.missing():
        if interruption.noticed():
            raise interruption.Preempted(kept(shards))
        time.sleep(_POLL_S)


def _encoded(
    shards: Shards,
    mine: list[int],
    *,
    loader: Loader,
    encoder: ImageEncoder,
    index: Index,
    image: tuple[int, ...],
) -> Iterator[tuple[int, list[Loaded], Any]]:
    """Yield (shard, some of its images, their moments to come) in order, one call ahead.

    The devices have the next images while the last ones' moments are written. Which images are
    encoded together is fixed: sums come out the same only then.
    """
    numbers = [number for shard in mine for number in shards.numbers(shard)]
    stream = loader.load(numbers)
    waiting: collections.deque[tuple[int, list[Loaded], Any]] = collections.deque()
    for shard in mine:
        count = len(shards.numbers(shard))
        for start in range(0, count, encoder.batch_size):
            size = min(encoder.batch_size, count - start)
            group = list(itertools.islice(stream, size))
            good = [loaded.pixels for loaded in group if loaded.pixels is not None]
            for loaded in group:
                if loaded.pixels is not None:
                    check_shape(index.names[loaded.number], loaded.pixels.shape, image)
            waiting.append((shard, group, encoder.start(np.stack(good)) if good else None))
            if len(waiting) > 1:
                yield waiting.popleft()
    yield from waiting


def _check_finite(
    name: str, found: np.ndarray, stored: np.ndarray, good: list[Loaded], index: Index
) -> None:
    """Raise `UserError` if arrays (n, …) are not finite, or not any more as they are stored."""
    network, exact, wide = "autoencoder", "--vae_dtype float32", "--stored float32"
    if name == records.FEATURES:
        network, exact, wide = "encoder", "--encoder_dtype float32", "--keep image"
    for array, what, remedy in (
        (found, "are not finite", exact),
        (stored, f"are too large for {stored.dtype}", wide),
    ):
        finite = np.isfinite(array).reshape(len(array), -1).all(axis=1)
        if not finite.all():
            names = [index.names[good[row].number] for row in np.flatnonzero(~finite)]
            raise UserError(
                f"the {network}'s {name} of {first_few(names)} {what}: use {remedy}, or another "
                f"{network}"
            )
