"""The one family of errors that a user's input can cause, and the exit statuses of the command line."""

# 0 done, 1 logits that are NaN or infinite, 2 bad input, 130 interrupted (128 + SIGINT)
NOT_FINITE, BAD_INPUT, INTERRUPTED = 1, 2, 130


class FqError(ValueError):
    """Bad input: a file, an option or a text that cannot be used as it is.

    The message is one line that names the thing at fault; the command line prints it
    and exits with status 2.
    """


class NotFiniteError(FqError):
    """NaN or infinite logits that nothing can do without: a baseline's, or those to sample from.

    The message names the chunk or token and the graph's first node that is not finite; the command
    line prints it and exits with status 1.
    """
