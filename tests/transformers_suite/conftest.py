"""`make test` has nothing to run here: see `make test-transformers`."""

collect_ignore = ["stand_ins"]
