"""Batches from files: rows in, replies out, sessions written once, whatever is killed in between.

    source -> rows -> schedule -> conversation -> output

`source` reads files, `rows` is their format, `schedule` keeps the order of each session's rows,
`conversation` runs one row on a `MemoryLLM`, `runner` runs many at a time, `output` keeps what is
finished, and `job` puts them together in one process. `deltamem_vllm.ray.batch` does so on Ray.
"""
