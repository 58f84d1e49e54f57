"""Tasks, one file each: functions over a `Pipeline`, which the pipelines have as methods."""
