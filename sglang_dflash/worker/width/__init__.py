"""Stage 0: how wide the step is, chosen once per scheduling round."""
