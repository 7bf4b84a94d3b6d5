#!/bin/sh
# Writes a data set as ArrayRecord shards for data.source=array_record, from a folder of images or the ImageNet tars,
# or prepares a TFDS set. A stopped run goes on when the same command is given again.
#
#   launch/prepare_data.sh --from=folder --source=/photos --out=/data/photos
#   launch/prepare_data.sh --from=imagenet_tars --source=/downloads --out=/data/imagenet
#   launch/prepare_data.sh --from=tfds --name=cifar10
#   launch/prepare_data.sh --help
set -eu
cd "$(dirname "$0")/.."
if [ -x .venv/bin/python ]; then
  python=.venv/bin/python
else
  python=python3
fi
exec "$python" -m folk_jax.data.prepare "$@"
