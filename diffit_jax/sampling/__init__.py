"""From weights to files of samples."""
