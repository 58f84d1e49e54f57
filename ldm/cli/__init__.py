"""The commands of `ldm`: `commands` lists and dispatches them, `tools` holds those that sample no prompt."""
