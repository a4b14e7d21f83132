"""How the package attaches to SGLang: entry point, hooks, checks at start."""
