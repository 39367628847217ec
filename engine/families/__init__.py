"""One file a model family: how its pictures become patches, tokens and positions."""
