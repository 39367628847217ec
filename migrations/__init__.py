"""The schema's history, one dated file a step, and `upgrade`, which brings a database up to date."""
