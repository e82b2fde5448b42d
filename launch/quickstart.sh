#!/usr/bin/env bash
# From a fresh clone to digits that a DiffiT drew: sets itself up, prepares the data, trains,
# samples and scores.
#   bash launch/quickstart.sh [digits|digits_latent|chain] [workdir]
#                                      default: digits, in runs/digits; run it again to continue
# digits is the image-space network with EDM, digits_latent the latent network with ADM's diffusion;
# chain is the way of ImageNet in small: images, an autoencoder, latents, and ADM's metrics.
set -euo pipefail
case "${1:-}" in
  --help | -h)
    awk 'NR > 1 && /^#/ { sub(/^# ?/, ""); print; next } NR > 1 { exit }' "${BASH_SOURCE[0]}"
    exit
    ;;
esac
experiment=digits
case "${1:-}" in
  digits | digits_latent | chain)
    experiment="$1"
    shift
    ;;
esac
workdir="$(realpath -m "${1:-"$(dirname "${BASH_SOURCE[0]}")/../runs/$experiment"}")"
cd "$(dirname "${BASH_SOURCE[0]}")/.."

bash launch/setup_env.sh
python=.venv/bin/python

if [ "$experiment" = chain ]; then
  bash launch/chain.sh "$workdir"
  exit
fi
$python launch/train.py --config "configs/$experiment.py" --workdir "$workdir" --fewer_devices
$python launch/sample.py --workdir "$workdir" --seeds 0-99 --overwrite
$python launch/sample.py --workdir "$workdir" --seeds 0-999 --overwrite
$python launch/score.py --samples "$workdir/samples_1000x8x8x1.npz" --dataset digits --overwrite

echo
echo "100 digits, a column for each class: $workdir/samples_100x8x8x1.png"
echo "the same seeds during training:      $workdir/grids/"
echo "scores:                              $workdir/samples_1000x8x8x1.metrics.json"
