"""The decode step with draft trees: one folder per stage, in the order of the step.

draft -> tree -> verify -> accept -> commit; ``worker.py`` reads like the step it performs, and
``sglang_dflash.upstream.bridge`` is where it touches SGLang.
"""
