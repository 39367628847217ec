"""The small bundled model, and the program that trains it."""
