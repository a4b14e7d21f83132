"""Draft trees for SGLang's DFLASH speculative decoding."""

__version__ = "0.1.0"
