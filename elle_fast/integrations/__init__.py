"""Adapters for training loops of other libraries. Each is imported by who uses it, and by nothing else here."""
