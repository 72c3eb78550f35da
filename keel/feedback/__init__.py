"""What people prefer, simulated and measured: annotators as programs, agreement statistics."""
