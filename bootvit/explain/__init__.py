"""What a run's networks have become: where the ViT looks, and how alike it and its agent are.

`attention` and `similarity` compute, `measure` collects, `figures` draws, `run` does what `bootvit explain` does.
"""
