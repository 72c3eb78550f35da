"""What the labelling app does, without HTTP: who may do what, what they are shown, what is kept."""
