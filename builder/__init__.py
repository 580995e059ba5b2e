"""Host side of torchyard: one module per stage of the line, from matrix.yaml to tags."""

__version__ = "0.1.0"
