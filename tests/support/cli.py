"""Words of the command line that keep a test small."""

FAST = ("--loader", "torch", "--workers", "1", "--device", "cpu")
"""One process and no GPU."""
