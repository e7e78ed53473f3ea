"""What happens next in a sweep, decided from its log alone: no Ray, no torch, nothing on disk but the log."""
