#!/usr/bin/env bash
# MAR-B to a one-step student on ImageNet, on 8 GPUs. NOT YET RUN at full size: every step was tested on small models only.
#
#   examples/imagenet_8gpu.sh kl16.ckpt mar_base.pth imagenet/train VIRTUAL_imagenet256_labeled.npz
#
# kl16.ckpt and mar_base.pth are the official files of MAR, the .npz is ADM's reference. Run the script again after a kill: each step continues where it was.
set -euo pipefail
vae=${1:?kl16.ckpt} teacher=${2:?mar_base.pth} images=${3:?the folder of ImageNet} reference=${4:?the reference .npz}
gpus=${GPUS:-8}
many() { torchrun --standalone --nproc_per_node "$gpus" -m marval "$@"; }
resume() { if compgen -G "$1/state-*" >/dev/null; then echo "--resume"; fi; }

[ -d models/kl16 ] || marval convert vae "$vae" models/kl16
[ -d models/mar-base ] || marval convert mar "$teacher" models/mar-base --vae models/kl16
many cache cache/imagenet --images "$images" --vae models/kl16 --scale 0.2325   # 42 GB; shards that are there are skipped
many distill models/mar-base --preset imagenet256-base --data latents:cache/imagenet --probe-samples 0 --compile \
  --out runs/marval-base $(resume runs/marval-base)
many evaluate runs/marval-base --samples 50000 --keep-images drawn --reference "$reference" --batches \
  --out results/marval-base.json
