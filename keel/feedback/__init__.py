"""What people prefer, simulated and measured: annotators as programs, agreement, reliability, what training takes."""
