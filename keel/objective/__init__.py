"""Pure tensor functions: masked statistics, preference losses, policy and value losses, group baselines, KL estimators
and controllers.

Losses come back per example or per token. Whoever holds the whole batch divides once, by its global count: that is
what makes gradient accumulation and sharding leave the loss unchanged.
"""
