"""A run that goes on elsewhere, in legs: the images in every batch, and every number, are those of a run in one piece.

tests/train/test_hosts.py goes from two processes to one; here devices and loader workers change, and the numbers of the
images are looked at. benchmarks/faults/elastic.py changes each of them alone, and microbatches too.
"""

import dataclasses
import json
import pathlib
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / 'benchmarks' / 'faults'))

import children  # noqa: E402  # Programs are found where they are run from, and tests are no package.
import elastic  # noqa: E402

STEPS = 4
FLAGS = (*children.TINY_TOTAL, '--config.checkpoint.every=0')


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  """With a run in one piece, on one device."""
  made = tmp_path_factory.mktemp('elastic')
  (made / 'cache').symlink_to(children.shared_cache(tmp_path_factory.getbasetemp()))
  assert elastic.run(made / 'whole', elastic.Leg(STEPS), made / 'cache', FLAGS) == ''
  return made


@pytest.mark.slow
def test_a_run_that_goes_on_on_other_resources_sees_the_same_images_and_numbers(folder):
  workdir = folder / 'legs'
  legs = (
    elastic.Leg(2, devices=2, flags=('--config.data.workers=2',)),
    elastic.Leg(STEPS),
  )
  move = elastic.Move('', '', legs)
  for leg in legs:
    assert elastic.run(workdir, leg, folder / 'cache', FLAGS) == ''
  assert children.steps_on_disk(workdir) == [2, STEPS]
  # Rounding, as elastic.py argues.
  assert elastic.differences(workdir, folder / 'whole', move, STEPS) == ''
  # Rounding it is: a comparison that sees no difference at all would look at the wrong numbers.
  assert elastic.differences(
    workdir, folder / 'whole', dataclasses.replace(move, exactly=True), STEPS
  )


@pytest.mark.slow
def test_what_differs_is_found(folder, tmp_path):
  """The comparison itself: another image, and another number."""
  whole, other = folder / 'whole', tmp_path / 'other'
  move = elastic.Move('', '', ())
  other.mkdir()
  metrics = (whole / 'metrics.jsonl').read_text()
  (other / 'metrics.jsonl').write_text(metrics)
  images = (folder / 'whole.images.0').read_text()
  (tmp_path / 'other.images.0').write_text(images)
  assert elastic.differences(other, whole, dataclasses.replace(move, exactly=True), STEPS) == ''
  assert elastic.differences(other, whole, move, STEPS + 1).startswith('images were recorded for')
  line = json.loads(metrics.splitlines()[0])
  changed = metrics.replace(str(line['train/loss']), str(line['train/loss'] * (1 + 3e-4)), 1)
  (other / 'metrics.jsonl').write_text(changed)
  assert elastic.differences(other, whole, move, STEPS).startswith('train/loss at step 1 is ')
  lines = [json.loads(one) for one in images.splitlines()]
  assert sorted(one['step'] for one in lines) == list(range(1, STEPS + 1))
  lines[2]['index'].reverse()
  (tmp_path / 'other.images.0').write_text('\n'.join(map(json.dumps, lines)))
  step = lines[2]['step']
  assert elastic.differences(other, whole, move, STEPS).startswith(f'step {step} saw the images ')
