"""CLIP: configurations, text and vision towers, and the preparation of their pixels."""
