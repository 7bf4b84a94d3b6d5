#!/usr/bin/env bash
# Writes a data set as ArrayRecord shards for data.source=array_record, or prepares a TFDS set.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh"

usage() {
  cat <<'TEXT'
Usage: launch/prepare_data.sh --from=folder|imagenet_tars --source=DIR --out=DIR [--check]
       launch/prepare_data.sh --from=tfds --name=NAME [--out=DATA_DIR]

Makes or reuses .venv, then writes the images of a folder, or of the ImageNet tars, as ArrayRecord
shards; or prepares a TFDS data set as ArrayRecord, which installs TensorFlow first. A run that was
stopped goes on where it was when the same command is given again.

  --from=folder          DIR/train/<class>/* with DIR/val or DIR/test, DIR/<class>/*, or a flat folder
  --from=imagenet_tars   DIR holds ILSVRC2012_img_train.tar, ILSVRC2012_img_val.tar and
                         ILSVRC2012_devkit_t12.tar.gz, which has the validation labels
  --from=tfds            --name=cifar10 and the like; --out is TFDS's data_dir
  --check                decode every image, and leave out those that do not decode
  --shard_samples=8192   images in a shard, about
  --help                 print this

Example: launch/prepare_data.sh --from=folder --source=/photos --out=/data/photos
then:    python -m folk_jax.main --config=configs/vit_s.py:data=array_record,path=/data/photos ...
TEXT
}

extras=()
for argument in "$@"; do
  case $argument in
    -h | --help) usage; exit 0 ;;
    --from=tfds) extras=(prepare) ;;
  esac
done
ensure_venv ${extras[@]+"${extras[@]}"}
exec "$VENV/bin/python" -m folk_jax.data.prepare "$@"
