"""What a server counts, as Prometheus reads it."""

from __future__ import annotations

import math
import threading
from collections import Counter

BATCHES = (1, 2, 4, 8, 16)  # upper ends of the classes of batch sizes
IMAGE_SECONDS = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)  # and of the seconds that an image takes


class Histogram:
    """Counts of values by classes.

    Args:
        ends: The upper end of each class but the last.
    """

    def __init__(self, ends: tuple[float, ...]) -> None:
        self.ends, self.counts, self.sum = ends, [0] * (len(ends) + 1), 0.0

    def add(self, value: float, times: int = 1) -> None:
        """Count a value."""
        place = next((i for i, end in enumerate(self.ends) if value <= end), len(self.ends))
        self.counts[place] += times
        self.sum += value * times

    def lines(self, name: str, about: str) -> list[str]:
        """Return the lines of Prometheus's text format."""
        lines, total = [f"# HELP {name} {about}", f"# TYPE {name} histogram"], 0
        for end, count in zip((*self.ends, math.inf), self.counts, strict=True):
            total += count
            lines.append(f'{name}_bucket{{le="{"+Inf" if end == math.inf else f"{end:g}"}"}} {total}')
        return [*lines, f"{name}_sum {self.sum:.6g}", f"{name}_count {total}"]


class Counters:
    """Counts of a server since its start."""

    def __init__(self) -> None:
        self.images = self.refused = self.cancelled = self.failed = 0
        self.responses: Counter[tuple[str, int]] = Counter()  # by path and status
        self.batches, self.seconds = Histogram(BATCHES), Histogram(IMAGE_SECONDS)
        self._mean = 1.0
        self._lock = threading.Lock()

    def drew(self, images: int, seconds: float) -> None:
        """Count the images of a batch and the time that they took."""
        if images:
            with self._lock:
                self.images += images
                self.seconds.add(seconds / images, images)
                self._mean += 0.3 * (seconds / images - self._mean)

    def batch(self, images: int) -> None:
        """Count a batch."""
        with self._lock:
            self.batches.add(images)

    def answered(self, path: str, status: int) -> None:
        """Count a response."""
        with self._lock:
            self.responses[path, status] += 1

    def expected_seconds(self, images: int) -> int:
        """Return after how many whole seconds a number of images will be drawn, from 1 to 60."""
        return min(max(math.ceil(self._mean * images / 2), 1), 60)

    def text(self, *, waiting: int, running: int, loaded: int) -> str:
        """Return all counts in Prometheus's text format.

        Args:
            waiting: Number of requests that wait.
            running: Number of requests in work.
            loaded: Number of models in memory.
        """
        lines: list[str] = []

        def add(name: str, kind: str, about: str, value: float) -> None:
            lines.extend([f"# HELP {name} {about}", f"# TYPE {name} {kind}", f"{name} {value:g}"])

        with self._lock:
            add("ldm_queue_requests", "gauge", "Requests that wait.", waiting)
            add("ldm_running_requests", "gauge", "Requests in work.", running)
            add("ldm_models_loaded", "gauge", "Models in memory.", loaded)
            add("ldm_images_total", "counter", "Images made.", self.images)
            add("ldm_refused_total", "counter", "Requests refused because the queue was full.", self.refused)
            add("ldm_cancelled_total", "counter", "Requests whose client had gone.", self.cancelled)
            add("ldm_failed_total", "counter", "Requests that failed by the server's fault.", self.failed)
            lines += self.batches.lines("ldm_batch_images", "Images in a batch.")
            lines += self.seconds.lines("ldm_image_seconds", "Seconds of work for an image.")
            lines += ["# HELP ldm_responses_total Responses.", "# TYPE ldm_responses_total counter"]
            for (path, status), count in sorted(self.responses.items()):
                lines.append(f'ldm_responses_total{{path="{path}",status="{status}"}} {count}')
        return "\n".join(lines) + "\n"
