"""The vLLM side: the memory layer and its op, its metadata, and the connector that moves states."""
