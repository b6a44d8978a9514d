"""The one error for what a user wrote: a value, a key or a file that cannot be used."""


class ConfigurationError(ValueError):
    """A value, key or file given by the user cannot be used.

    The message names the value and the key (or argument) that fixes it. The command line prints it without a
    traceback and exits with code 2; nothing has been changed when it is raised.
    """
