"""Where else than ``metrics.jsonl`` a run is logged."""
