"""The places where this package touches SGLang's internals, and the contract they rely on."""
