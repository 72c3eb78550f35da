"""Compiled CPU code, and the plain torch that it must agree with."""
