"""The verb `make_reference`: from the images of a data set to what samples are compared with."""

import json
import zipfile
from collections.abc import Mapping

import numpy as np
from etils import epath

from diffit_jax.errors import UserError
from diffit_jax.evaluation.features import BATCH_PER_DEVICE, Extractor, Networks
from diffit_jax.evaluation.images import DatasetImages, NpzImages, StoredImages
from diffit_jax.evaluation.measuring import PartialResult, measure, protocol_of
from diffit_jax.evaluation.reference import COVARIANCES
from diffit_jax.runtime import backend, distributed, files, npz, parallel

IMAGES = 10_000  # in a reference, for precision and recall, as in ADM's


@backend.reproducible_numerics()
@backend.explain_oom("lower --batch_per_device")
def make_reference(
    images: StoredImages,
    *,
    output: epath.PathLike,
    networks: Networks,
    overwrite: bool = False,
    kept: int = IMAGES,
    batch_per_device: int = BATCH_PER_DEVICE,
) -> epath.Path:
    """Measure a data set and write an npz file like ADM's.

    `mu`, `sigma`, `mu_s`, `sigma_s`, and of DINOv2 `mu_dinov2`, `sigma_dinov2`, float64; `arr_0`,
    some images, uint8, and `arr_1`, their labels, if they have any; `protocol`, JSON.

    Args:
      images: of the data set, all of them.
      output: path of the npz.
      networks: that make features, of which there must be one.
      overwrite: whether a file that is there may be replaced.
      kept: how many images `arr_0` has, at most.
      batch_per_device: images of which a device extracts the features at once.

    Raises:
      UserError: one image, a reference for images, unreadable weights, an unwritable output.
    """
    output = files.resolve(output, "output")
    if output.suffix != ".npz" or output.is_dir():
        raise UserError(f"--output {output} must be a file that ends in .npz: change it")
    if isinstance(images, NpzImages) and images.has("mu"):
        raise UserError(
            f"{images.metadata['samples']} is a reference already: its {images.count} images "
            "are for precision and recall, its mu and sigma are of the whole data set"
        )
    if images.count < 2:
        raise UserError("one image has no covariance: name a data set")

    def check_place() -> None:
        files.refuse_existing(output, "output", overwrite)
        files.make_directory(output.parent, "output")

    distributed.on_primary(check_place)
    extractor = Extractor.load(networks, parallel.any_mesh(), batch_per_device)

    # --- Measure all images; interrupted, the same command resumes.
    chosen = np.unique(np.linspace(0, images.count - 1, kept).astype(np.int64))
    metadata = protocol_of(images, extractor, images.count)
    partial = PartialResult.of(
        output.with_name(f"{output.name}.begun.npz"), images, metadata, pooled=False
    )
    measured = measure(images, extractor, "reference", partial=partial)
    digest = {"samples_digest": measured.digest.hex()}
    arrays = {"protocol": np.array(json.dumps(metadata | digest))}
    of_features = {"mu": measured.pool, "mu_s": measured.spatial, "mu_dinov2": measured.dinov2}
    for name in extractor.sizes:
        moments = of_features[name]
        arrays[name], arrays[COVARIANCES[name]] = moments.statistics()
        if not all(np.isfinite(arrays[each]).all() for each in (name, COVARIANCES[name])):
            raise UserError(
                f"the statistics of {images.metadata['samples']} are not finite: use other weights "
                "of the network"
            )
    if isinstance(images, DatasetImages) and images.labelled:
        arrays["arr_1"] = images.labels()[chosen]

    def write() -> None:
        _write(output, arrays, images, chosen)
        partial.done()

    distributed.on_primary(write)
    return output


def _write(
    output: epath.Path, arrays: Mapping[str, np.ndarray], images: StoredImages, chosen: np.ndarray
) -> None:
    """Write the npz: `arr_0` of the `chosen` images, (n,) int, and arrays by name."""
    shape = (len(chosen), *images.shape)
    with files.writing(output) as file, zipfile.ZipFile(file, "w") as archive:
        parts = (np.ascontiguousarray(part).tobytes() for part in images.some(chosen))
        npz.write_rows(archive, "arr_0", np.dtype(np.uint8), shape, parts)
        for name, array in arrays.items():
            npz.write(archive, name, array)
