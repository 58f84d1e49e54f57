"""General tools: typed configurations, atomic file writes, the choice of device and dtype."""
