"""The rule tables between our tensor names and those of published files, one module per network."""
