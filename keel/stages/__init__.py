"""One file a kind of stage: it opens the stage's inputs, calls the room that does the work, and returns its summary."""
