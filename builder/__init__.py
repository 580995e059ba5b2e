"""Host side of torchyard: one module per stage of the line, from matrix.yaml to tags."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("torchyard")
except PackageNotFoundError:  # run from a checkout that was never installed
    __version__ = "0+unknown"
