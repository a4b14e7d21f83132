"""Talking to an SGLang server from outside: start it, wait for it, stream from it, compare outputs."""
