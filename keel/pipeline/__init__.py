"""Which stages are done, and the running of what is left."""
