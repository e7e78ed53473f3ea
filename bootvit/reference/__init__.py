"""The reference implementation's files: its settings as a `Config`, its weights under our names, its runs as ours."""

from bootvit.reference.files import read_settings
from bootvit.reference.names import WeightNames
from bootvit.reference.translate import translate

__all__ = ["WeightNames", "read_settings", "translate"]
