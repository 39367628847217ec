"""How models/darkroom-tiny was made, and how to make it again."""
