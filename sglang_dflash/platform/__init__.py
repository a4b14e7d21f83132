"""SGLang platform for machines without an accelerator."""

#: Name under which our attention backend is registered with SGLang.
ATTENTION_BACKEND = "dflash_cpu"

#: Key under which SGLang's layer operators look for our forwards.
DISPATCH_KEY = "dflash_cpu"
