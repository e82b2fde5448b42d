"""The verb `decode`: from a file of latents to files of images."""

import numpy as np
from etils import epath

from diffit_jax.data.labels import name_of
from diffit_jax.errors import UserError
from diffit_jax.run import workdir as workdirs
from diffit_jax.runtime import backend, files, npz, parallel
from diffit_jax.sampling.decoder import Decoding
from diffit_jax.sampling.image_files import read_record, write_images
from diffit_jax.sampling.request import default_name
from diffit_jax.sampling.sample import RequestKey, SampleFiles, conclude, draw_parts, finish_files

_BATCH_PER_DEVICE = 32


@backend.reproducible_numerics()
@backend.explain_oom(backend.SAMPLING_OOM_HINT)
def decode(
    latents: epath.PathLike,
    *,
    decoding: Decoding,
    output: epath.PathLike | None = None,
    overwrite: bool = False,
    images: str | None = None,
) -> epath.Path:
    """Decode a file of latents, and write what `sample` with an autoencoder writes.

    Interrupted, the same call resumes.

    Args:
      latents: npz file with `arr_0` (N, h, w, c) float32, in the network's scale, and perhaps
        `arr_1` (N,) labels.
      decoding: the autoencoder.
      output: npz file to write; None: `samples_NxHxWxC.npz` beside the latents.
      overwrite: whether other samples may be replaced.
      images: "png", "jpeg" or "webp": each image is a file too, see `write_images`.

    Returns:
      Path of the npz.

    Raises:
      UserError: a file that is not of latents, an autoencoder with other channels, or an output
        that is there.
    """
    path = files.resolve(latents, "--latents")
    shape, labels = _read_header(path)
    record = read_record(path) or {}
    asked = record.get("request", {}).get("identity", {})
    mesh = parallel.make_mesh()
    rounding = asked.get("sampling.pixel_rounding", "adm")
    decoder = decoding.open(mesh, _BATCH_PER_DEVICE * mesh.size, rounding)
    if decoder.channels != shape[-1]:
        raise UserError(
            f"{path} has latents of {shape[-1]} channels, the autoencoder {decoder.path} of "
            f"{decoder.channels}: name the one that they are of"
        )

    # --- What the images are known by.
    digest = record.get("arr_0_sha256") or files.sha256(path)
    identity = {"latents": digest, "autoencoder": decoder.identity(), "rounding": rounding}
    source = {"latents": str(path), "autoencoder": str(decoder.path)}
    if output is None:
        # What differs from the default request stays in the name.
        name = default_name("samples", (shape[0], *decoder.shape_of(shape[1:])), {})
        _, dash, more = path.name.partition("-")
        kept = dash and "latents" in path.name
        output = path.parent / (f"{name.removesuffix('.npz')}-{more}" if kept else name)
    target = files.resolve(output, "--output")
    files.make_directory(target.parent, "output directory")
    sample_files = SampleFiles(target, RequestKey(identity, source), overwrite)

    numbers = np.arange(shape[0])
    given = np.zeros(shape[0], np.int64) if labels is None else labels
    made = sample_files.finished()
    if made is None:
        with sample_files, npz.reading(path, "arr_0") as stream:

            def draw(batch: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
                latents = stream.rows(int(batch[0]), len(batch))  # batches come in their order
                finite = np.isfinite(latents).reshape(len(latents), -1).all(axis=1)
                images, decoded = decoder.checked(latents)
                return images, finite & decoded

            draw_parts(sample_files, numbers, decoder.batch_size, draw, "decode")
            made = finish_files(sample_files, given, numbers)
    if images:
        config = files.read_json(path.parent / workdirs.CONFIG_FILE) or {}
        class_name = name_of(workdirs.read_classes(path.parent, config))
        write_images(target, labels, numbers.tolist(), class_name, images)
    return conclude(target, made)


def _read_header(path: epath.Path) -> tuple[tuple[int, int, int, int], np.ndarray | None]:
    """Return the shape of a file's latents, and its labels if it has some."""
    try:
        with npz.reading(path, "arr_0") as stream:
            shape, dtype = stream.shape, stream.dtype
        labels = npz.read(path, "arr_1") if npz.has(path, "arr_1") else None
    except (OSError, KeyError, *npz.DAMAGED) as error:
        raise UserError(
            f"--latents {path} is no npz file with arr_0 ({type(error).__name__}): name one that "
            "diffit sample has written"
        ) from error
    if len(shape) != 4 or dtype != np.float32:
        what = "images already" if dtype == np.uint8 else f"{dtype} of {len(shape)} dimensions"
        raise UserError(f"--latents {path} holds {what}, not latents (N, h, w, c) float32")
    return (shape[0], shape[1], shape[2], shape[3]), labels
