"""What all the detectors of this repository share. Imports no benchmark."""


class UserError(Exception):
    """A mistake in the input or the environment, in words for the person who can mend it.

    The message names the file or option, the value, and what to do. Programs print it without
    a traceback and leave with exit code 2 (see `detcore.cli`).
    """
