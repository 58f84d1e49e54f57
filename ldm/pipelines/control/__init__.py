"""Controls of pipelines: how calls use them, their hints, and `pipe.controls`."""
