"""The one error that means: the input is wrong, not the program."""


class InputError(ValueError):
    """Something the user gave cannot be used.

    The message is one line that names the file, the tensor or the field, says what was found and
    what was expected, and what to do about it. The command line prints it without a traceback
    and exits with status 2.
    """
