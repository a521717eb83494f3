"""States at rest: the page of a state beside the KV cache, and a session's snapshot."""
