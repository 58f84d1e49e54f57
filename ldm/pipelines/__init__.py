"""Models that draw images: `LatentDiffusion` and `UnCLIP`, their stages and their tasks.

A task settles the options of a call and asks the pipeline to draw a request. The pipeline makes conditions,
its stage samples, and the images come back with a recipe.
"""
