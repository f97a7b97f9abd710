"""What the commands of `scanside` do; `adapters/cli.py` has their names, options and help."""
