"""Training on plain PyTorch and transformers: adapters for any backbone, and the demo model.

Nothing here imports vLLM.
"""
