"""Kill it anywhere, run it twice, fill its disk: what must hold then, shown on the command line."""
