"""Cards of the embedded, the published and the registered models, by name, and the shapes of networks."""
