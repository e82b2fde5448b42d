"""`digits`: a tensorflow-datasets builder over `data.digits`. It downloads nothing and does not
import TensorFlow."""

import numpy as np
import tensorflow_datasets as tfds

from diffit_jax.data import digits


class Digits(tfds.core.GeneratorBasedBuilder):
    """Handwritten digits, 8×8×1 uint8 in [0, 255] with a label 0…9; 1,437 in `train`, 360 in
    `test`."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self) -> tfds.core.DatasetInfo:
        features = {
            # Tensor, not Image: Image needs TensorFlow to encode.
            "image": tfds.features.Tensor(shape=digits.SHAPE, dtype=np.uint8),
            "label": tfds.features.ClassLabel(num_classes=digits.NUM_CLASSES),
        }
        return self.dataset_info_from_configs(
            description=self.__doc__,
            features=tfds.features.FeaturesDict(features),
            homepage="https://archive.ics.uci.edu/dataset/80/optical+recognition+of+handwritten+digits",
        )

    def _split_generators(self, dl_manager):
        return {split: self._generate_examples(split) for split in digits.COUNTS}

    def _generate_examples(self, split):
        images, labels = digits.load()
        for index in digits.split_indices(split):
            yield int(index), {"image": images[index], "label": int(labels[index])}
