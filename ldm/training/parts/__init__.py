"""One module for each network that can be trained: its configuration, loss, validation and export."""
