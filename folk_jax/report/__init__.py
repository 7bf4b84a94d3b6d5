"""Pictures of a run: one HTML page that needs no network, and a page of one's own photograph under every filter.

`python -m folk_jax.report --workdir=DIR` or `--image=photo.jpg` is the command. `of_run.py` reads a run's files and
joins rooms; the files beside it turn arrays and numbers into figures, and know nothing of runs.
"""
