"""Models that draw image tokens one after the other: `DalleMini`, its calls and its tasks."""
