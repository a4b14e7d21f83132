"""Train a DFlash drafter for a target: corpus, model, recipe, judging (docs/training.md)."""
