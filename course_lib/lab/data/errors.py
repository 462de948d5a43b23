"""What can go wrong with data that is not the caller's mistake (those are ``ValueError``)."""


class DataUnavailable(RuntimeError):
    """The data set is not in the data folder and cannot be downloaded; says what works without a network."""


class DataDamaged(RuntimeError):
    """A file of a data set cannot be read; names the file and how to mend it."""
