"""What the data have to say is said by every process: each reads files that no other does."""

from absl import logging


def warn(process: int, words: str) -> None:
  """Warns of something.

  Args:
    process: number of this process. All but 0 are silent but for errors: theirs go out as such, with the number.
    words: one line.
  """
  if process:
    logging.error('process %d: %s', process, words)
  else:
    logging.warning('%s', words)
