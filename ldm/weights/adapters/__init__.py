"""Adapters: files that change some weights of a model, matched to our networks by the models' own names."""
