"""What leaves a run: a checkpoint with its model card, and the commands that serve it."""
