"""What a compiled step costs before it ever runs: its program read, counted, and held against published rates."""
