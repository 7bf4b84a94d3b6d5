"""The one exception that means "the user can mend this"; every room may import it."""


class UserError(Exception):
  """A mistake of the user's: one line that names the thing, what was found, what was expected, and the cure.

  The entry points print it on stderr without a traceback and exit with status 2.
  """
