"""One file a library: each does a job (``bench.work.Job``) with it, in an environment where Keel may not exist."""
