"""The one exception that reaches users as a single line instead of a traceback."""


class InputError(ValueError):
    """Something the user handed in (file, config, checkpoint, argument) cannot be used.

    The message is one line: where (`path:line:` when there is one), what is wrong, and the mend.
    """
