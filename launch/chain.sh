#!/usr/bin/env bash
# What launch/quickstart.sh runs for `chain`: from images to a number, with digits enlarged to
# 32×32 pixels in place of ImageNet. Everything lies in the work directory; run it again to go on.
#   bash launch/chain.sh WORKDIR [short]      short: so little training that nothing is learnt
set -euo pipefail
case "${1:-}" in
  --help | -h)
    awk 'NR > 1 && /^#/ { sub(/^# ?/, ""); print; next } NR > 1 { exit }' "${BASH_SOURCE[0]}"
    exit
    ;;
esac
workdir="$(realpath -m "$1")"
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python="${PYTHON:-.venv/bin/python}"
data=(--data_dir "$workdir/data")
images=() autoencoder=() train=() sample=() adm=() count=1000
if [ "${2:-}" = short ]; then
  images=(200)
  autoencoder=(--steps 4 --channels "8,8,8,8")
  train=(--config.training.total_steps=8 --config.training.grid_images=10
    --config.evaluation.count=20 --config.evaluation.raw=False --config.model.depth=1)
  sample=(--sampler.num_steps 2)
  adm=(--count 40 --metrics "fid,sfid,inception_score")
  count=200
fi

# Images as people have them: PNG files in class folders.
$python -m diffit_jax.data.digits "$workdir/images" "${images[@]}"
for split in train test; do
  $python launch/prepare.py --source "$workdir/images/$split" --split "$split" \
    --name digits32 "${data[@]}" --crop resize --size 32
done
$python launch/train_autoencoder.py --dataset digits32 "${data[@]}" \
  --workdir "$workdir/autoencoder" "${autoencoder[@]}"
for split in train test; do
  $python launch/encode.py --source "$workdir/data/digits32" --split "$split" \
    --name digit_latents "${data[@]}" --vae "$workdir/autoencoder" --orientations 1
done
[ -e "$workdir/reference.npz" ] || $python launch/make_reference.py --dataset digits32 \
  "${data[@]}" --output "$workdir/reference.npz" --inception random
$python launch/train.py --config "configs/chain.py:$workdir" --workdir "$workdir/latents" \
  --fewer_devices "${train[@]}"
samples="$workdir/samples_${count}x32x32x3"
$python launch/sample.py --workdir "$workdir/latents" --vae "$workdir/autoencoder" \
  --seeds "0-$((count - 1))" --output "$samples.npz" --overwrite "${sample[@]}"
$python launch/score.py --samples "$samples.npz" --dataset digits32 "${data[@]}" --overwrite
$python launch/evaluate.py --samples "$samples.npz" --reference "$workdir/reference.npz" \
  --inception random --output "$workdir/adm.metrics.json" --overwrite "${adm[@]}"

echo
echo "100 digits, a column for each class:    $samples.png"
echo "test images, and what comes back:       $workdir/autoencoder/reconstructions.png"
echo "the same seeds during training:         $workdir/latents/grids/"
echo "scores, without and with a FID network: $samples.metrics.json, $workdir/adm.metrics.json"
echo "(the FID network has random weights here: its figures show that the way works, no more)"
