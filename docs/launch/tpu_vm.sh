#!/usr/bin/env bash
# One experiment on every host of a Cloud TPU VM slice, with one process for each host.
#
#   NAME=fedcl-slice ZONE=us-east5-b TYPE=v5litepod-16 VERSION=v2-alpha-tpuv5-lite \
#   BUCKET=gs://my-bucket docs/launch/tpu_vm.sh experiment.toml
#
# NOT RUN on the real service: checked by `bash -n` and by what gcloud's reference says.
# TPU hosts find each other: --distributed needs neither coordinator nor numbers. The
# experiment's federation.shards must be a multiple of the chips (16 above). The results
# and checkpoints go to one directory that every host sees, a mounted bucket here.
set -euo pipefail

experiment=${1:?give the experiment: experiment.toml}
: "${NAME:?}" "${ZONE:?}" "${TYPE:?}" "${VERSION:?}" "${BUCKET:?}"
source=${SOURCE:-fedcl-jax}  # Until it is released: git+https://… of your repository.
place=(--zone="$ZONE")

on_all() {
  gcloud compute tpus tpu-vm ssh "$NAME" "${place[@]}" --worker=all --command="$1"
}

gcloud compute tpus tpu-vm create "$NAME" "${place[@]}" \
  --accelerator-type="$TYPE" --version="$VERSION"
trap 'echo "The slice costs money until: gcloud compute tpus tpu-vm delete $NAME --zone=$ZONE"' EXIT

# fedcl needs Python 3.11 or later, which not every image has.
on_all "python3 -m pip install -q --user uv && python3 -m uv venv -q --python 3.12 ~/fedcl"
on_all "python3 -m uv pip install -q --python ~/fedcl/bin/python 'jax[tpu]' '$source'"
on_all "mkdir -p ~/runs && { mountpoint -q ~/runs || gcsfuse --implicit-dirs ${BUCKET#gs://} ~/runs; }"
gcloud compute tpus tpu-vm scp "$experiment" "$NAME": "${place[@]}" --worker=all
on_all "~/fedcl/bin/python -m fedcl.cli run $(basename "$experiment") --distributed --out ~/runs/$NAME ${RESUME:+--resume}"
