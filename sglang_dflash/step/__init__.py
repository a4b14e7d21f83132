"""What a decode step is made of: its width, facts, noise, sampling, penalties and report.

Only torch and ``dflash_kernels`` below it; the worker's stages and the contact with SGLang both use it.
"""
