"""What a network needs that has left bootvit: how images are prepared, and the networks that timm has not got.

An export and a logged model carry a copy of this package, named `bootvit_networks`. So its modules import one another
relatively, and nothing else of bootvit.
"""
