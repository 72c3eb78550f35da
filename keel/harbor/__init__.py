"""The harbor: a small world whose truth is known, used to check every stage of the pipeline."""
