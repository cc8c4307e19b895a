"""From a run to a file that a device runs: written, run in its own runtime, compared with torch, and only then kept."""
