"""The built-in demo: a tiny chat model, two adapters and questions only a memory can answer."""
