"""Workdirs of every method as a run leaves them, and a reader of pages."""

import html.parser

import jax
import pytest

from folk_jax import checkpoint
from folk_jax import config as config_lib
from folk_jax.report import of_run
from folk_jax.train import metrics, run

_VOID = {'meta', 'img', 'br', 'hr'}


class Page(html.parser.HTMLParser):
  """Elements of a page; fails on one that isn't closed where it should be."""

  def __init__(self, text: str):
    super().__init__()
    self.elements, self.open, self.words = [], [], []
    self.feed(text)
    self.close()
    assert not self.open

  def handle_starttag(self, tag, attributes):
    self.elements.append((tag, dict(attributes)))
    if tag not in _VOID:
      self.open.append(tag)

  def handle_endtag(self, tag):
    assert self.open.pop() == tag

  def handle_data(self, data):
    self.words.append(data)

  def of(self, tag: str) -> list[dict]:
    return [attributes for name, attributes in self.elements if name == tag]

  @property
  def sections(self) -> list[str]:
    return [attributes['id'] for attributes in self.of('section')]

  @property
  def text(self) -> str:
    return ' '.join(' '.join(self.words).split())


@pytest.fixture(scope='session')
def read_page():
  return Page


@pytest.fixture(scope='session')
def make_workdir(support, tmp_path_factory):
  """`make_workdir(method, **fields)`: a workdir with config, metrics and a checkpoint at step 4 of 4."""

  def make(method: str, step: int = 4, **fields):
    workdir = tmp_path_factory.mktemp(method)
    config = support('every_objective').make_config(method)
    config.total_steps = 4
    config.update_from_flattened_dict(fields)
    (workdir / 'config.json').write_text(config_lib.to_json(config))
    made = run.make_run(config, images=64, classes=10)
    state = jax.jit(made.new_state)(jax.random.key(0), {})
    about = {'data': {'images': 64, 'classes': ''}}
    with checkpoint.Checkpoints(str(workdir / 'checkpoints'), every=1, keep=1) as checkpoints:
      checkpoints.save(step, state, about, force=True)
    with metrics.MetricWriter(str(workdir), tensorboard=False, start_step=-1) as writer:
      writer.write(0, {'eval/knn_top1': 0.25})
      for i in range(1, step + 1):
        writer.write(i, {'train/loss': 1 / i, 'train/learning_rate': 0.1, 'train/data_wait': 0.5})
      writer.write(step, {'eval/knn_top1': 0.5})
    return workdir

  return make


@pytest.fixture
def small_bank(monkeypatch):
  """Eight training images to look for neighbours in."""
  monkeypatch.setattr(of_run, '_BANK', (8, 8))
  monkeypatch.setattr(of_run, '_BATCH', 8)
