"""The `darkroom` command: verbs, options and what a person reads. No logic of its own."""
