"""Backbones with memory: one small file each, holding only what differs from vLLM's own class."""
