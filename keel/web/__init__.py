"""The labelling app: people judge, rank, write and talk to models, on the pipeline's own store."""
