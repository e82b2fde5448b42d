"""Flags of the commands that measure pictures by the FID network."""

from typing import Any

from absl import flags

from diffit_jax import cli


def define_samples(help_text: str) -> flags.FlagHolder:
    """The flag that names pictures."""
    return cli.define_path("samples", help_text, to_read=True)


def define_data_dir() -> flags.FlagHolder:
    """The flag that says where data sets live."""
    help_text = "Where prepared data sets live; default: ~/tensorflow_datasets."
    return cli.define_path("data_dir", help_text, to_read=True)


class InceptionFlags:
    """The flags of the FID network."""

    def __init__(self):
        self._path = cli.define_path(
            "inception",
            "Weights of the FID network: pytorch-fid's or torch-fidelity's .pth, or safetensors; "
            "random: to try the way to figures that then have no meaning.",
            to_read=True,
            words=("random",),
        )
        self._resize = flags.DEFINE_enum(
            "resize",
            "tf1",
            ["tf1", "pytorch_fid"],
            "How pictures come to 299 pixels: as ADM's suite has it.",
        )
        self._batch = flags.DEFINE_integer(
            "inception_batch",
            32,
            "Pictures in the FID network at once, on each device.",
            lower_bound=1,
        )

    @property
    def value(self) -> dict[str, Any]:
        """As arguments of the verbs; the command ends if there is no network."""
        if not self._path.value:
            cli.fail(
                "--inception is missing: name the weights of the FID network, such as "
                "pytorch-fid's pt_inception-2015-12-05-6726825d.pth"
            )
        return {
            "inception": self._path.value,
            "resize": self._resize.value,
            "batch_per_device": self._batch.value,
        }


class ScoreFlags:
    """The flags of what samples are compared with, and where the scores go."""

    def __init__(self, output: str, replaced: str):
        """`output`: where they go unless it is said; `replaced`: what may be replaced."""
        self.reference = cli.define_path(
            "reference", "npz file of statistics: ADM's, EDM's or our own.", to_read=True
        )
        self._metrics = flags.DEFINE_list(
            "metrics",
            None,
            "Of fid, sfid, inception_score, precision, recall and kid; default: all but kid that "
            "the reference serves.",
        )
        self.labels = flags.DEFINE_string(
            "labels", None, "Of a network's samples, see launch/sample.py: random is ADM's rule."
        )
        self._output = cli.define_path("output", f"JSON file to write; default: {output}.")
        self.overwrite = flags.DEFINE_bool("overwrite", False, f"Replace {replaced}.")

    def value(self, inception: InceptionFlags) -> dict[str, Any]:
        """As arguments of the verbs; the command ends if there is no network."""
        from diffit_jax.evaluation.evaluator import Comparison

        network = inception.value
        comparison = Comparison(
            reference=self.reference.value, metrics=self._metrics.value, **network
        )
        output, overwrite = self._output.value, self.overwrite.value
        return {"comparison": comparison, "output": output, "overwrite": overwrite}
