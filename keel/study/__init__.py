"""Studies: one recipe, varied by name over several seeds; the runs share what is equal, and figures are compared."""
