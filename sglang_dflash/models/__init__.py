"""The embedded pair: which target and drafter it is, where they lie, how the target gets there."""
