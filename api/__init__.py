"""
HTTP: OpenAI's Files and Batches wire, and Darkroom's own additions to it.

The room knows routes, schemas and errors. It knows neither a model nor how a task runs: what must
happen after a commit goes out through one port, and what it shows is read from `storage`.
"""
