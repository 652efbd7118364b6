"""Looking at finished runs: tables, curves, error consistency."""
