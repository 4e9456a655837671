"""The one exception of conversion."""


class ConversionError(ValueError):
    """A source cannot be converted as it is. The message names the file, key or tensor and what to do."""
