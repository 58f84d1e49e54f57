"""The kinds of changes that adapters make to the weight of a module, one formula per file."""
