"""dre_fast: end-to-end whole-slide training."""

__version__ = "0.1.0"
