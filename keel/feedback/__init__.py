"""What people prefer, simulated and measured: annotators as programs, agreement, reliability, and what training takes."""
