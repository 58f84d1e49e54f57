"""`Images`, image files with recipes, and what image arguments accept."""
