"""The one family of errors that a user's input can cause."""


class FqError(ValueError):
    """Bad input: a file, an option or a text that cannot be used as it is.

    The message is one line that names the thing at fault; the command line prints it
    and exits with status 2.
    """
