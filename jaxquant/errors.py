"""What can go wrong through no fault of the code: every message names the place and the remedy."""


class JaxquantError(Exception):
    """Base class; the command line prints the message without a traceback and exits with 1."""


class InputError(JaxquantError):
    """A file, a text or a value cannot be used as it is."""


class UsageError(JaxquantError):
    """The call contradicts itself or names something that does not exist; the command line exits with 2."""


class NonFiniteError(JaxquantError):
    """NaN or infinity where a finite number is required."""
