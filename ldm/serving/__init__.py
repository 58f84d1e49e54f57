"""A server of images: OpenAI's images API, a part of AUTOMATIC1111's, and one page for a browser."""
