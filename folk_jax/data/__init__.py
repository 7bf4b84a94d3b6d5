"""Images from disk to uint8 batches in host memory: NumPy, Grain and TFDS; never jax."""

from folk_jax.data.batches import Batches, waiting_for
from folk_jax.data.labels import MissingLabel, check_labels
from folk_jax.data.ledger import Ledger
from folk_jax.data.pipeline import eval_batches, train_batches
from folk_jax.data.settings import DataSettings, LocalViewSettings, MaskSettings
from folk_jax.data.sources import SOURCES, MissingSplit, Source, Subset, make_source
from folk_jax.data.views import ViewSettings

__all__ = [
  'SOURCES',
  'Batches',
  'DataSettings',
  'Ledger',
  'LocalViewSettings',
  'MaskSettings',
  'MissingLabel',
  'MissingSplit',
  'Source',
  'Subset',
  'ViewSettings',
  'check_labels',
  'eval_batches',
  'make_source',
  'train_batches',
  'waiting_for',
]
