"""FOLK in JAX: self-supervised pre-training on the frequencies an image makes prominent.

Importing this package imports nothing else, so that data workers and recipes stay free of jax.
"""

__version__ = '0.1.0'
