"""What a run does, as strict data: sections, judges, the kinds of stages and how they lean on each other. No torch."""
