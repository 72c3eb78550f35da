"""Rows of people's files -> records -> token ids -> packed tensors."""
