"""Checkpoints, on disk or in a bucket: saved while training goes on, resumed on any devices.

The only user of Orbax. A checkpoint is `<directory>/<step>/` with two items: `state` (any pytree of
arrays) and `meta` (a small JSON dict with `format_version`, and whatever the run says of itself, its
configuration among it). A step appears under its name when it is whole: a save cut short by a kill
leaves a temporary folder, which is ignored, and which the next run clears away. On disks (not in
buckets, which keep checksums of their own) a step also holds `digests.json`, a checksum of every
file, so that what a disk has lost since is found before anything is trained on it.

`manager.py` saves and resumes, `reading.py` reads (a part, on any machine), `trees.py` compares and
searches saved trees, `digests.py` are the checksums, `files.py` is small files and full disks.
Nothing here unpickles or runs what a file holds.
"""

from folk_jax.checkpoint.files import is_remote, read_json, replace_text, unwritable
from folk_jax.checkpoint.manager import Checkpoints
from folk_jax.checkpoint.reading import FORMAT_VERSION, Damaged, read_subtree

__all__ = [
  'FORMAT_VERSION',
  'Checkpoints',
  'Damaged',
  'is_remote',
  'read_json',
  'read_subtree',
  'replace_text',
  'unwritable',
]
