"""`digits`: a tensorflow-datasets builder over the handwritten digits that scikit-learn ships.

1,797 scans of 8×8 pixels, ten classes (UCI optical recognition of handwritten digits, Alpaydin & Kaynak 1998). It downloads nothing and
does not import TensorFlow.
"""

import numpy as np
import tensorflow_datasets as tfds

TEST_COUNT = 360


class Digits(tfds.core.GeneratorBasedBuilder):
    """Handwritten digits, 8×8×1 uint8 in [0, 255] with a label 0…9; 1,437 in `train`, 360 in `test`."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self) -> tfds.core.DatasetInfo:
        features = {
            # Tensor, not Image: Image needs TensorFlow to encode.
            "image": tfds.features.Tensor(shape=(8, 8, 1), dtype=np.uint8),
            "label": tfds.features.ClassLabel(num_classes=10),
        }
        return self.dataset_info_from_configs(
            description=self.__doc__,
            features=tfds.features.FeaturesDict(features),
            homepage="https://archive.ics.uci.edu/dataset/80/optical+recognition+of+handwritten+digits",
        )

    def _split_generators(self, dl_manager):
        # The scans come writer by writer; a fixed shuffle gives both splits the same writers.
        order = np.random.RandomState(0).permutation(1797)
        return {"train": self._generate_examples(order[TEST_COUNT:]), "test": self._generate_examples(order[:TEST_COUNT])}

    def _generate_examples(self, indices):
        from sklearn.datasets import load_digits  # needed once, when the data set is prepared

        digits = load_digits()
        images = np.rint(digits.images * (255 / 16)).astype(np.uint8)[..., None]  # grey levels 0…16 in the source
        for index in indices:
            yield int(index), {"image": images[index], "label": int(digits.target[index])}
